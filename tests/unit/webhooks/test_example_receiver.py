"""T64: what the example receiver takes, and what it does not: edited, replayed, forged."""

from __future__ import annotations

import base64
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from libs.keystore import MemoryKeyStore
from services.webhooks.signing import KeyRing, Signer

NAME = "organizations/acme/webhookEndpoints/ops"
NOW_MS = 1_767_225_600_000
BODY = b'{"type":"rollout.halted"}'


def load() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "webhook_receiver.py"
    spec = importlib.util.spec_from_file_location("webhook_receiver", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


EXAMPLE: Any = load()
KEYS = Signer(MemoryKeyStore()).keys(NAME, "u")
OTHER = Signer(MemoryKeyStore()).keys(NAME, "other")


def delivery(**changes: str) -> dict[str, str]:
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(NOW_MS // 1000),
        "webhook-signature": KEYS.signature("msg_1", NOW_MS // 1000, BODY),
    }
    return headers | {name.replace("_", "-"): value for name, value in changes.items()}


def verified(headers: dict[str, str], body: bytes = BODY, *, later_s: float = 0.0, **keys: Any) -> bool:
    try:
        EXAMPLE.verify(headers, body, now_s=NOW_MS / 1000 + later_s, **(keys or {"secrets": [KEYS.shown_secret]}))
    except EXAMPLE.NotVerifiedError:
        return False
    return True


def test_either_key_verifies_and_others_do_not() -> None:
    assert verified(delivery())
    assert verified(delivery(), public_keys=[KEYS.public_key])
    assert not verified(delivery(), secrets=[OTHER.shown_secret], public_keys=[OTHER.public_key])
    assert verified(delivery(), secrets=[OTHER.shown_secret, KEYS.shown_secret])


def test_t64_nothing_can_be_edited() -> None:
    assert not verified(delivery(), BODY + b" ")
    assert not verified(delivery(webhook_id="msg_2"))
    assert not verified(delivery(webhook_timestamp=str(NOW_MS // 1000 + 1)))
    signature = KEYS.signature("msg_1", NOW_MS // 1000, BODY)
    for at in range(0, len(signature), 7):
        edited = signature[:at] + ("A" if signature[at] != "A" else "B") + signature[at + 1 :]
        if edited.split()[0] != signature.split()[0]:
            assert not verified(delivery(webhook_signature=edited), secrets=[KEYS.shown_secret])


def test_t64_a_captured_delivery_is_worthless_after_five_minutes() -> None:
    assert verified(delivery(), later_s=300)
    assert not verified(delivery(), later_s=301)
    assert verified(delivery(), later_s=-300)
    assert not verified(delivery(), later_s=-301)
    seen = EXAMPLE.Seen(2)
    assert [seen.is_new(each) for each in ("a", "a", "b", "c", "a")] == [True, False, True, True, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"webhook_id": ""},
        {"webhook_timestamp": "soon"},
        {"webhook_timestamp": "-5"},
        {"webhook_timestamp": "²"},
        {"webhook_timestamp": "9" * 30},
        {"webhook_signature": ""},
        {"webhook_signature": "v1"},
        {"webhook_signature": "v1,"},
        {"webhook_signature": "v1,!!!"},
        {"webhook_signature": "v1a,AAAA"},
        {"webhook_signature": "v1," + base64.b64encode(b"x" * 64).decode()},
        {"webhook_signature": "v2," + KEYS.signature("msg_1", NOW_MS // 1000, BODY).split()[0][3:]},
    ],
)
def test_what_is_no_delivery_at_all(changes: dict[str, str]) -> None:
    assert not verified(delivery(**changes), secrets=[KEYS.shown_secret], public_keys=[KEYS.public_key])


def test_a_delivery_of_a_rotation_verifies_with_the_old_and_the_new_secret() -> None:
    ring = KeyRing(OTHER, KEYS, NOW_MS + 1)
    headers = delivery(webhook_signature=ring.signature("msg_1", NOW_MS, BODY))
    for keys in (KEYS, OTHER):
        assert verified(headers, secrets=[keys.shown_secret])
        assert verified(headers, public_keys=[keys.public_key])
