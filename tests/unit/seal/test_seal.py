"""Sealed links: what goes in comes out, and nothing else opens."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest

from libs.errors import PermissionDeniedError
from libs.keystore import MemoryKeyStore
from libs.seal import GENERATION_MS, DownloadGrant, accepted_keys, generation_at, generation_key, seal, unseal

NOW = 1_800_000_000_000
KEY = bytes(range(32))
GRANT = DownloadGrant(
    attempt="organizations/acme/products/p/rollouts/r/attempts/a",
    device_uid="9f1c2d1e-7c55-4a0e-8b1a-0d9f6c3b2a10",
    digest="ab" * 32,
    rollout="organizations/acme/products/p/rollouts/r",
    control_epoch=7,
    expires_at_ms=NOW + 60_000,
)


def reason_of(keys: dict[int, bytes], text: str, now_ms: int = NOW) -> str:
    with pytest.raises(PermissionDeniedError) as refused:
        unseal(keys, text, now_ms)
    return refused.value.reason


def test_what_was_sealed_is_unsealed() -> None:
    text = seal(3, KEY, GRANT)
    assert unseal({3: KEY}, text, NOW) == GRANT
    assert text == base64.urlsafe_b64encode(base64.urlsafe_b64decode(text + "==")).decode().rstrip("=")


def test_expiry_is_exclusive() -> None:
    text = seal(3, KEY, GRANT)
    assert unseal({3: KEY}, text, GRANT.expires_at_ms - 1) == GRANT
    assert reason_of({3: KEY}, text, GRANT.expires_at_ms) == "LINK_EXPIRED"


def test_every_changed_bit_is_noticed() -> None:
    text = seal(3, KEY, GRANT)
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    for index in range(len(raw)):
        changed = raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]
        assert reason_of({3: KEY}, base64.urlsafe_b64encode(changed).decode().rstrip("=")) == "LINK_INVALID"


@pytest.mark.parametrize("text", ["", "A", "é", "a b", "AAAA", "=" * 8, "A" * 5000])
def test_garbage_is_invalid(text: str) -> None:
    assert reason_of({3: KEY}, text) == "LINK_INVALID"


def test_cut_and_extended_links_are_invalid() -> None:
    text = seal(3, KEY, GRANT)
    assert reason_of({3: KEY}, text[:-4]) == "LINK_INVALID"
    assert reason_of({3: KEY}, text + "AAAA") == "LINK_INVALID"


def test_a_grant_has_one_text() -> None:
    grant = next(
        grant
        for grant in (replace(GRANT, attempt="a" * size) for size in range(1, 4))
        if len(seal(3, KEY, grant)) % 4 != 0
    )
    text = seal(3, KEY, grant)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    sibling = text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1]
    assert reason_of({3: KEY}, sibling) == "LINK_INVALID"


def test_two_generations_open_and_others_do_not() -> None:
    old, new = b"o" * 32, b"n" * 32
    keys = {4: old, 5: new}
    assert unseal(keys, seal(4, old, GRANT), NOW) == GRANT
    assert unseal(keys, seal(5, new, GRANT), NOW) == GRANT
    assert reason_of(keys, seal(3, old, GRANT)) == "LINK_INVALID"
    assert reason_of(keys, seal(5, old, GRANT)) == "LINK_INVALID"


def test_keys_come_from_the_key_store_by_the_day() -> None:
    store = MemoryKeyStore()
    today = generation_at(NOW)
    text = seal(today, generation_key(store, today), GRANT)
    assert unseal(accepted_keys(store, NOW), text, NOW) == GRANT
    tomorrow = replace(GRANT, expires_at_ms=NOW + 3 * GENERATION_MS)
    text = seal(today, generation_key(store, today), tomorrow)
    assert unseal(accepted_keys(store, NOW + GENERATION_MS), text, NOW + GENERATION_MS) == tomorrow
    later = NOW + 2 * GENERATION_MS
    assert reason_of(accepted_keys(store, later), text, later) == "LINK_INVALID"


def test_a_digest_that_is_not_one_cannot_be_sealed() -> None:
    for digest in ("AB" * 32, "ab" * 31, "zz" * 32):
        with pytest.raises(ValueError, match=r"digest|hexadecimal"):
            seal(3, KEY, replace(GRANT, digest=digest))
