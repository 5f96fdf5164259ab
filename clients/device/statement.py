"""The bundle statement: its canonical bytes, parsed, and which pinned keys signed them.

A parser that accepts two spellings of one statement is how signed metadata gets bypassed. So there is one spelling:
what was parsed is written out again, and any other bytes are refused: duplicate keys, trailing data, unknown fields,
spaces, another order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TAG = b"groundswell.bundle-statement.v1\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """One binary as it was signed."""

    digest: str
    metadata_digest: str
    size: int
    target: str


@dataclass(frozen=True, slots=True)
class Statement:
    """What the operator's keys vouch for."""

    product: str
    version: str
    security_version: int
    binaries: tuple[Entry, ...]


def parse_statement(data: bytes) -> Statement:
    """The statement that these bytes are the canonical form of, or ValueError."""
    if not data.startswith(TAG):
        raise ValueError("the statement does not begin with its domain tag")
    try:
        body = json.loads(data[len(TAG) :])
        if json.dumps(body, sort_keys=True, separators=(",", ":")).encode() != data[len(TAG) :]:
            raise ValueError("the statement is not in canonical form")
    except RecursionError:
        raise ValueError("the statement is nested too deeply") from None
    fields = _object(body, {"binaries", "product", "security_version", "version"})
    if not isinstance(fields["binaries"], list):
        raise ValueError("binaries is not a list")  # noqa: TRY004 - all that is wrong with bytes is a ValueError
    return Statement(
        _text(fields["product"]),
        _text(fields["version"]),
        _whole(fields["security_version"]),
        tuple(_entry(one) for one in fields["binaries"]),
    )


def signers(data: bytes, signatures: Iterable[tuple[str, bytes]], trusted: Sequence[bytes]) -> frozenset[str]:
    """Ids of the distinct trusted keys that signed these bytes: keys are counted, never signatures."""
    keys = {hashlib.sha256(key).hexdigest(): key for key in trusted}
    found: set[str] = set()
    for key_id, signature in signatures:
        if key_id in keys and key_id not in found:
            try:
                Ed25519PublicKey.from_public_bytes(keys[key_id]).verify(signature, data)
            except (InvalidSignature, ValueError):
                continue
            found.add(key_id)
    return frozenset(found)


def _entry(body: object) -> Entry:
    fields = _object(body, {"digest", "metadata_digest", "size", "target"})
    return Entry(
        _text(fields["digest"]), _text(fields["metadata_digest"]), _whole(fields["size"]), _text(fields["target"])
    )


def _object(body: object, names: set[str]) -> dict[str, Any]:
    if not isinstance(body, dict) or set(body) != names:
        raise ValueError(f"an object with exactly {', '.join(sorted(names))} was expected")
    return body


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text was expected")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
        raise ValueError("a whole number of at most 64 bits was expected")
    return value
