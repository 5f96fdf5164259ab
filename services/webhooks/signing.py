"""Ids, keys and signatures of deliveries, after Standard Webhooks 1.0.0.

Nothing here is stored: an endpoint's HMAC secret and its Ed25519 seed are derived from the key store by the
endpoint's name, uid and generation, so that a retry of its creation or of a rotation answers with the same secret and
no log holds one. While a rotation overlaps, two generations sign; after it the old one signs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.keystore import KeyStore
from services.webhooks.model import generation_of, previous_until_ms

KEY_NAME: Final = "webhook-secrets"


def webhook_id(endpoint_uid: str, event_id: str) -> str:
    """Idempotency key of a delivery: the same for every attempt, and when its record is read again."""
    return f"msg_{hashlib.sha256(f'{endpoint_uid}/{event_id}'.encode()).hexdigest()[:40]}"


@dataclass(frozen=True, slots=True)
class EndpointKeys:
    """Both keys of one endpoint. Never printed: the representation is left out."""

    secret: bytes
    private_key: Ed25519PrivateKey

    def __repr__(self) -> str:
        return "EndpointKeys(…)"

    @property
    def shown_secret(self) -> str:
        """As receivers' libraries take it."""
        return f"whsec_{base64.b64encode(self.secret).decode()}"

    @property
    def public_key(self) -> str:
        """As receivers' libraries take it."""
        return f"whpk_{base64.b64encode(self.private_key.public_key().public_bytes_raw()).decode()}"

    def signature(self, identifier: str, timestamp_s: int, body: bytes) -> str:
        """Value of ``webhook-signature``: HMAC first, as every receiver knows it."""
        signed = f"{identifier}.{timestamp_s}.".encode() + body
        mac = hmac.digest(self.secret, signed, hashlib.sha256)
        asymmetric = self.private_key.sign(signed)
        return f"v1,{base64.b64encode(mac).decode()} v1a,{base64.b64encode(asymmetric).decode()}"


class Signer:
    """Derives the keys of endpoints."""

    def __init__(self, keystore: KeyStore) -> None:
        self._keystore = keystore
        keystore.derive(KEY_NAME, "check", "")  # a store that cannot be used must stop the start, not a delivery

    def keys(self, name: str, uid: str, generation: int = 1) -> EndpointKeys:
        """Keys of an endpoint; always the same ones."""
        resource = f"{name}/{uid}/{generation}"
        secret = self._keystore.derive(KEY_NAME, "endpoint-secret", resource)
        seed = self._keystore.derive(KEY_NAME, "endpoint-ed25519", resource)
        return EndpointKeys(secret, Ed25519PrivateKey.from_private_bytes(seed))

    def ring(self, image: pb.WebhookEndpoint) -> KeyRing:
        """All keys that sign for an endpoint as it is now."""
        generation = generation_of(image)
        until_ms = previous_until_ms(image)
        previous = self.keys(image.name, image.uid, generation - 1) if until_ms and generation > 1 else None
        return KeyRing(self.keys(image.name, image.uid, generation), previous, until_ms)

    def nonce(self, image: pb.WebhookEndpoint) -> str:
        """What a receiver must repeat: of this endpoint at this URL, and nobody can guess it."""
        return self._keystore.derive(KEY_NAME, "endpoint-challenge", f"{image.name}/{image.uid}/{image.url}").hex()


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The current keys, and those before until their time is over."""

    current: EndpointKeys
    previous: EndpointKeys | None = None
    previous_until_ms: int = 0

    def signature(self, identifier: str, now_ms: int, body: bytes) -> str:
        """Value of ``webhook-signature`` for an attempt at that time; ``webhook-timestamp`` is its second."""
        signed = self.current.signature(identifier, now_ms // 1000, body)
        if self.previous is None or now_ms >= self.previous_until_ms:
            return signed
        return f"{signed} {self.previous.signature(identifier, now_ms // 1000, body)}"
