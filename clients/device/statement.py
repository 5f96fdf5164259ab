"""stand-in until libs.trust"""

from __future__ import annotations
import hashlib, json
from dataclasses import dataclass
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TAG = b"groundswell.bundle-statement.v1\n"


@dataclass(frozen=True, slots=True)
class Entry:
    digest: str
    metadata_digest: str
    size: int
    target: str


@dataclass(frozen=True, slots=True)
class Statement:
    product: str
    version: str
    security_version: int
    binaries: tuple[Entry, ...]


def canonical(s: Statement) -> bytes:
    return (
        TAG
        + json.dumps(
            {
                "binaries": [
                    {"digest": b.digest, "metadata_digest": b.metadata_digest, "size": b.size, "target": b.target}
                    for b in s.binaries
                ],
                "product": s.product,
                "security_version": s.security_version,
                "version": s.version,
            },
            sort_keys=True,
            separators=(",", ":"),
        ).encode()
    )


def parse_statement(data: bytes) -> Statement:
    try:
        if not data.startswith(TAG):
            raise ValueError("tag")
        d = json.loads(data[len(TAG) :])
        s = Statement(d["product"], d["version"], d["security_version"], tuple(Entry(**b) for b in d["binaries"]))
    except (KeyError, TypeError) as e:
        raise ValueError(str(e)) from e
    if canonical(s) != data:
        raise ValueError("not canonical")
    return s


def signers(data, signatures, trusted):
    keys = {hashlib.sha256(k).hexdigest(): k for k in trusted}
    found = set()
    for kid, sig in signatures:
        if kid in keys:
            try:
                Ed25519PublicKey.from_public_bytes(keys[kid]).verify(sig, data)
                found.add(kid)
            except InvalidSignature:
                pass
    return found
