"""Signed offers for unit tests, written from the contract and not from the code under test."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.device.model import Binary, Offer, Signature
from clients.device.offers import Rules

PRODUCT = "organizations/acme/products/thermostat"
TARGET = "board-b"
ATTEMPT = "organizations/acme/products/thermostat/rollouts/r/claims/d/attempts/1"
TAG = b"groundswell.bundle-statement.v1\n"


class Signer:
    """A key pair."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.key_id = hashlib.sha256(self.public).hexdigest()

    def sign(self, data: bytes) -> Signature:
        return Signature(self.key_id, self._key.sign(data))


def rules(*signers: Signer, threshold: int = 1) -> Rules:
    return Rules(PRODUCT, TARGET, tuple(one.public for one in signers), threshold)


def binary(content: bytes, metadata: dict[str, Any], target: str = TARGET) -> Binary:
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(content).hexdigest()
    metadata_digest = hashlib.sha256(text.encode()).hexdigest()
    return Binary(digest, len(content), target, text, metadata_digest, f"/v1/downloads/grant/{digest}")


PROGRAM = binary(b"program", {"role": "program"})
CONFIG = binary(b"{}", {"role": "config", "filename": "config.json"})


def statement(version: str, security_version: int, binaries: tuple[Binary, ...], product: str = PRODUCT) -> bytes:
    body = {
        "binaries": [
            {"digest": one.digest, "metadata_digest": one.metadata_digest, "size": one.size, "target": one.target}
            for one in binaries
        ],
        "product": product,
        "security_version": security_version,
        "version": version,
    }
    return TAG + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def offer(
    *signers: Signer,
    version: str = "2.0.0",
    security_version: int = 2,
    binaries: tuple[Binary, ...] = (PROGRAM, CONFIG),
    product: str = PRODUCT,
    attempt: str = ATTEMPT,
    kind: str = "forward",
) -> Offer:
    signed = statement(version, security_version, binaries, product)
    return Offer(
        attempt,
        kind,
        "release",
        "bundle",
        version,
        security_version,
        signed,
        tuple(one.sign(signed) for one in signers),
        binaries,
    )
