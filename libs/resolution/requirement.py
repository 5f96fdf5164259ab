"""Version requirements: ``==``, ``!=``, ``>``, ``>=``, ``<``, ``<=``, ``~>``, joined by ``and`` and ``or``.

``and`` binds tighter. Versions are full (three parts); ``~>`` also takes two. ``~> 1.2.3`` is ≥ 1.2.3 and < 1.3.0, and
``~> 1.2`` is ≥ 1.2.0 and < 2.0.0; pre-releases of the upper bound are out. One space stands between words. Anything
else is refused when a requirement is written, so that none has to be guessed about when a device asks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from libs.resolution.semver import Version, VersionError, parse_version, version_or_none

_LOWEST: Final = ((-1, 0, ""),)
"""Below every pre-release: the exclusive upper bound of ``~>``."""
_COMPARE: Final[dict[str, Callable[[Version, Version], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
MAX_LENGTH: Final = 512

Clause = tuple[Callable[[Version, Version], bool], Version]
Compiled = tuple[tuple[Clause, ...], ...]
"""Any of these groups, each all of its clauses."""


class RequirementError(ValueError):
    """The text is no requirement; the message says what was expected."""


@lru_cache(maxsize=4096)
def compile_requirement(text: str) -> Compiled:
    """The requirement, ready to be asked. Raises RequirementError."""
    if not text or len(text) > MAX_LENGTH:
        raise RequirementError(f"a requirement has 1 to {MAX_LENGTH} characters")
    return tuple(
        tuple(clause for part in group.split(" and ") for clause in _clauses(part)) for group in text.split(" or ")
    )


def check_requirement(text: str) -> None:
    """Raise RequirementError unless the text is a requirement."""
    compile_requirement(text)


@lru_cache(maxsize=65536)
def satisfies(version: str, requirement: str) -> bool:
    """Whether a version satisfies a requirement; what is no semantic version satisfies none."""
    parsed = version_or_none(version)
    if parsed is None:
        return False
    return any(all(compare(parsed, bound) for compare, bound in group) for group in compile_requirement(requirement))


def _clauses(text: str) -> list[Clause]:
    name, space, version = text.partition(" ")
    if not space or not version or " " in version:
        raise RequirementError(f"'{text}' is not `<operator> <version>` with one space")
    if name == "~>":
        return _approximately(version)
    compare = _COMPARE.get(name)
    if compare is None:
        raise RequirementError(f"'{name}' is none of ==, !=, >, >=, <, <=, ~>")
    return [(compare, _version(version))]


def _approximately(text: str) -> list[Clause]:
    short = text.count(".") == 1 and "-" not in text and "+" not in text
    lower = _version(f"{text}.0" if short else text)
    major, minor = lower[0], lower[1]
    upper: Version = (major + 1, 0, 0, _LOWEST) if short else (major, minor + 1, 0, _LOWEST)
    return [(operator.ge, lower), (operator.lt, upper)]


def _version(text: str) -> Version:
    try:
        return parse_version(text)
    except VersionError as error:
        raise RequirementError(str(error)) from None
