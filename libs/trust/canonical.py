"""Canonical JSON: keys sorted, no spaces, non-ASCII escaped, one spelling for each value."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def to_canonical(value: object) -> bytes:
    """The one spelling of a value. Raises ValueError for what JSON cannot hold (NaN, infinities)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_strict(text: str | bytes) -> Any:
    """Parse JSON, refusing duplicate keys, trailing data and non-finite numbers with ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def metadata_digest(canonical: str | bytes) -> str:
    """Lowercase hex SHA-256 of canonical metadata."""
    return hashlib.sha256(canonical.encode() if isinstance(canonical, str) else canonical).hexdigest()


def canonical_object(text: str) -> str:
    """Canonical form of a JSON object given as text; empty text is the empty object. Raises ValueError."""
    value = parse_strict(text) if text.strip() else {}
    if not isinstance(value, dict):
        raise ValueError("a JSON object was expected")  # noqa: TRY004 - all that is wrong with text is a ValueError
    return to_canonical(value).decode()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
