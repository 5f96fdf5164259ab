"""The bundle statement: what the operator's keys vouch for, as canonical bytes.

A parser that accepts two spellings of one statement is how signed metadata gets bypassed. So there is one spelling:
what was parsed is written out again, and any other bytes are refused: duplicate keys, trailing data, unknown fields,
spaces, another order. The SHA-256 of the bytes is *the* bundle digest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from libs.trust.canonical import parse_strict, to_canonical

TAG: Final = b"groundswell.bundle-statement.v1\n"
"""Domain tag: a signature over a statement is a signature over nothing else."""


@dataclass(frozen=True, slots=True)
class StatementBinary:
    """One binary as it was signed."""

    digest: str
    """Lowercase hex SHA-256 of the content."""
    metadata_digest: str
    """Lowercase hex SHA-256 of the canonical metadata."""
    size: int
    """Bytes."""
    target: str
    """Hardware target, or ``portable``."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A whole bundle, binaries in install order."""

    product: str
    version: str
    security_version: int
    binaries: tuple[StatementBinary, ...]

    def to_bytes(self) -> bytes:
        """The bytes that are signed."""
        binaries = [
            {
                "digest": binary.digest,
                "metadata_digest": binary.metadata_digest,
                "size": binary.size,
                "target": binary.target,
            }
            for binary in self.binaries
        ]
        body = {
            "binaries": binaries,
            "product": self.product,
            "security_version": self.security_version,
            "version": self.version,
        }
        return TAG + to_canonical(body)

    def digest(self) -> str:
        """The bundle digest."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse(data: bytes) -> Statement:
    """The statement that these bytes are the canonical form of, or ValueError."""
    if not data.startswith(TAG):
        raise ValueError("the statement does not begin with its domain tag")
    fields = _object(parse_strict(data[len(TAG) :]), {"binaries", "product", "security_version", "version"})
    if not isinstance(fields["binaries"], list):
        raise ValueError("binaries is not a list")  # noqa: TRY004 - all that is wrong with bytes is a ValueError
    statement = Statement(
        _text(fields["product"]),
        _text(fields["version"]),
        _whole(fields["security_version"]),
        tuple(_binary(one) for one in fields["binaries"]),
    )
    if statement.to_bytes() != data:
        raise ValueError("the statement is not in canonical form")
    return statement


def _binary(body: object) -> StatementBinary:
    fields = _object(body, {"digest", "metadata_digest", "size", "target"})
    return StatementBinary(
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
