"""The operator's side of trust: Ed25519 keys that never leave it, and what they sign.

A bundle's statement is computed here again from the bundle's own fields and compared with the server's bytes before it
is signed: an operator signs what it sees, not what it is handed.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.artifacts.v1 import artifacts_pb2

from clients.sdk.errors import SdkError
from libs.trust.signatures import key_id
from libs.trust.statement import Statement, StatementBinary


class SigningError(SdkError):
    """Nothing was signed; the message says why."""


def generate_key(path: Path) -> Ed25519PrivateKey:
    """Make a key and store it as PKCS#8 PEM, readable by its owner alone. Never overwrites."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SigningError(f"{path} exists and is not overwritten: choose another file") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a PKCS#8 PEM Ed25519 key."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise SigningError(f"{path} is not a readable private key: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{path} holds no Ed25519 key: make one with `swell signing-key generate`")
    return key


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """Raw public key, 32 bytes."""
    return key.public_key().public_bytes_raw()


def sign_digest(key: Ed25519PrivateKey, sha256: str) -> artifacts_pb2.Signature:
    """Signature of a single binary: over the ASCII lowercase hex of its digest."""
    return _signature(key, sha256.lower().encode())


def statement_of(bundle: artifacts_pb2.Bundle) -> bytes:
    """The canonical statement as the operator computes it."""
    return Statement(
        product=bundle.name.partition("/bundles/")[0],
        version=bundle.version,
        security_version=bundle.security_version,
        binaries=tuple(
            StatementBinary(
                digest=entry.sha256, size=entry.size, target=entry.target, metadata_digest=entry.metadata_sha256
            )
            for entry in bundle.entries
        ),
    ).to_bytes()


def sign_bundle(key: Ed25519PrivateKey, bundle: artifacts_pb2.Bundle) -> artifacts_pb2.Signature:
    """Signature over the statement, after comparing it with the server's."""
    statement = statement_of(bundle)
    if statement != bundle.statement:
        raise SigningError(f"the server's statement of {bundle.name} is not what its entries say: do not sign it")
    return _signature(key, statement)


def _signature(key: Ed25519PrivateKey, message: bytes) -> artifacts_pb2.Signature:
    return artifacts_pb2.Signature(key_id=key_id(public_bytes(key)), signature=key.sign(message).hex())
