"""T65: two secrets are good during an overlap, and none but the new one after it. No log holds any."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks import Webhook, WebhookVerificationError

from libs.errors import AbortedError, DomainError, NotFoundError
from libs.eventlog.config import wall_clock_ms
from libs.keystore import MemoryKeyStore
from services.webhooks.model import MAX_OVERLAP_MS, RotateSecret, generation_of
from services.webhooks.signing import Signer
from tests.unit.webhooks.support import NAME, World

HOUR = 3_600_000
BODY = b'{"type":"rollout.halted"}'


def verifies(secret: str, signature: str, at_ms: int) -> bool:
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(at_ms // 1000), "webhook-signature": signature}
    try:
        Webhook(secret).verify(BODY.decode(), headers)
    except WebhookVerificationError:
        return False
    return True


def verifies_v1a(public_key: str, signature: str, at_ms: int) -> bool:
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key.removeprefix("whpk_")))
    for part in signature.split():
        if part.startswith("v1a,"):
            try:
                key.verify(base64.b64decode(part[4:]), f"msg_1.{at_ms // 1000}.".encode() + BODY)
            except InvalidSignature:
                continue
            return True
    return False


def test_t65_both_verify_in_the_window_and_the_old_one_fails_after_it() -> None:
    signer = Signer(MemoryKeyStore())
    now = wall_clock_ms()
    world = World(now_ms=now)
    made = world.create()
    old = signer.keys(NAME, made.uid, 1)
    result: Any = world.do(RotateSecret(NAME, HOUR, "")).result
    image = result.webhook_endpoint
    new = signer.keys(NAME, made.uid, generation_of(image))
    assert old.shown_secret != new.shown_secret
    ring = signer.ring(world.endpoint.image)
    inside = ring.signature("msg_1", now, BODY)
    assert [part.partition(",")[0] for part in inside.split()] == ["v1", "v1a", "v1", "v1a"]
    for keys in (old, new):
        assert verifies(keys.shown_secret, inside, now)
        assert verifies_v1a(keys.public_key, inside, now)
    # The moment that the window ends, by the clock alone: nobody needs to do anything.
    last, after = (ring.signature("msg_1", at, BODY) for at in (now + HOUR - 1, now + HOUR))
    assert verifies_v1a(old.public_key, last, now + HOUR - 1)
    assert not verifies_v1a(old.public_key, after, now + HOUR)
    assert verifies_v1a(new.public_key, after, now + HOUR)
    assert len(after.split()) == 2


def test_at_most_two_and_overlap_zero_ends_both_at_once() -> None:
    world = World()
    world.create()
    world.do(RotateSecret(NAME, HOUR, ""))
    with pytest.raises(DomainError) as refused:
        world.do(RotateSecret(NAME, HOUR, ""))
    assert refused.value.reason == "WRONG_STATE"
    result: Any = world.do(RotateSecret(NAME, 0, "")).result
    assert generation_of(result.webhook_endpoint) == 3
    assert not result.webhook_endpoint.HasField("previous_secret_expire_time")
    assert result.webhook_endpoint.previous_public_key == ""
    ring = Signer(MemoryKeyStore()).ring(world.endpoint.image)
    assert ring.previous is None
    world.do(RotateSecret(NAME, HOUR, ""))
    world.now_ms += HOUR
    world.do(RotateSecret(NAME, MAX_OVERLAP_MS, ""))
    assert generation_of(world.endpoint.image) == 5


@pytest.mark.parametrize("overlap_ms", [-1, MAX_OVERLAP_MS + 1])
def test_an_overlap_of_another_length_changes_nothing(overlap_ms: int) -> None:
    world = World()
    world.create()
    before = world.state
    with pytest.raises(DomainError) as refused:
        world.do(RotateSecret(NAME, overlap_ms, ""))
    assert refused.value.reason == "INVALID_FIELD"
    assert world.state is before


def test_a_stale_etag_and_an_unknown_name() -> None:
    world = World()
    made = world.create()
    world.do(RotateSecret(NAME, 0, made.etag))
    with pytest.raises(AbortedError):
        world.do(RotateSecret(NAME, 0, made.etag))
    with pytest.raises(NotFoundError):
        world.do(RotateSecret(f"{NAME}2", 0, ""))


def test_no_event_and_no_stored_answer_holds_a_secret() -> None:
    world = World()
    world.create()
    decision: Any = world.do(RotateSecret(NAME, HOUR, ""))
    assert b"whsec_" not in decision.result.SerializeToString()
    for event in decision.events:
        assert b"whsec_" not in event.payload.SerializeToString()
        assert all(b"whsec_" not in public.payload.SerializeToString() for public in event.public)
