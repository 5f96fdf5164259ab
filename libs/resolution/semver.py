"""Semantic Versioning 2.0.0: parsing and precedence (semver.org, items 2 to 11)."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

_PATTERN: Final = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(?:\+[0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*)?",
    re.ASCII,
)
MAX_LENGTH: Final = 128

Version = tuple[int, int, int, tuple[tuple[int, int, str], ...]]
"""Compares by precedence: (major, minor, patch, pre-release). A release sorts after its pre-releases."""

_FINAL: Final = ((2, 0, ""),)
"""Pre-release part of a version that has none: above every identifier."""


class VersionError(ValueError):
    """The text is no semantic version."""


@lru_cache(maxsize=4096)
def parse_version(text: str) -> Version:
    """A version by its precedence; build metadata is dropped. Raises VersionError."""
    match = _PATTERN.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None:
        raise VersionError(f"'{text[:MAX_LENGTH]}' is no semantic version such as 1.4.0 or 2.0.0-rc.1")
    major, minor, patch, pre = match.groups()
    return int(major), int(minor), int(patch), _identifiers(pre)


@lru_cache(maxsize=4096)
def version_or_none(text: str) -> Version | None:
    """The version, or None for a text that is none."""
    try:
        return parse_version(text)
    except VersionError:
        return None


def _identifiers(pre: str | None) -> tuple[tuple[int, int, str], ...]:
    if pre is None:
        return _FINAL
    # Numeric identifiers sort below others and by value; a longer list sorts after its own beginning.
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in pre.split("."))
