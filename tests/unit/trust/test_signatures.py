"""Keys are counted, never signatures; nothing is trusted for want of a rule; JSON has one reading."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from libs.trust.canonical import canonical_object, parse_strict
from libs.trust.signatures import ThresholdError, count_valid, is_usable_key, key_id, require_threshold, verify

MESSAGE = b"message"
KEYS = [Ed25519PrivateKey.generate() for _ in range(3)]
PUBLIC = [key.public_key().public_bytes_raw() for key in KEYS]
SIGNED = [(key_id(public), key.sign(MESSAGE)) for key, public in zip(KEYS, PUBLIC, strict=True)]


def test_one_key_counts_once_however_often_it_signs_or_is_listed() -> None:
    assert count_valid(MESSAGE, SIGNED[:1] * 3, PUBLIC[:1] * 3) == 1


def test_only_trusted_keys_count() -> None:
    assert count_valid(MESSAGE, SIGNED, PUBLIC[:2]) == 2


def test_a_signature_under_another_keys_id_does_not_count() -> None:
    assert count_valid(MESSAGE, [(SIGNED[0][0], SIGNED[1][1])], PUBLIC) == 0


def test_a_wrong_signature_does_not_hide_a_right_one_of_the_same_key() -> None:
    assert count_valid(MESSAGE, [(SIGNED[0][0], bytes(64)), SIGNED[0]], PUBLIC) == 1


@pytest.mark.parametrize("threshold", [-1, 0, 1])
def test_no_signature_is_never_enough(threshold: int) -> None:
    with pytest.raises(ThresholdError):
        require_threshold(MESSAGE, [], PUBLIC, threshold)


def test_a_threshold_is_met_exactly() -> None:
    assert require_threshold(MESSAGE, SIGNED[:2], PUBLIC, 2) == {name for name, _ in SIGNED[:2]}
    with pytest.raises(ThresholdError) as refused:
        require_threshold(MESSAGE, SIGNED[:2], PUBLIC, 3)
    assert (refused.value.found, refused.value.needed) == (2, 3)


@pytest.mark.parametrize("tail", [b"", b"x"], ids=["cut", "longer"])
def test_signatures_of_another_length_do_not_verify(tail: bytes) -> None:
    signature = SIGNED[0][1]
    assert not verify(PUBLIC[0], signature + tail if tail else signature[:-1], MESSAGE)


@pytest.mark.parametrize(
    "point",
    [
        bytes(32),
        b"\x01" + bytes(31),
        bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
        bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
        bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85"),
    ],
)
def test_a_key_of_small_order_verifies_nothing(point: bytes) -> None:
    forged = b"\x01" + bytes(63)  # R is the neutral element and S is 0: right for every message under the key 1
    assert not is_usable_key(point)
    assert not verify(point, forged, MESSAGE)


def test_ordinary_keys_are_usable() -> None:
    assert all(is_usable_key(public) for public in PUBLIC)
    assert not is_usable_key(PUBLIC[0][:-1])


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', '{"a":{"b":1,"b":1}}', "{} {}", "NaN", "-Infinity", "[" * 100_000, ""]
)
def test_json_with_two_readings_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_strict(text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '{"a":1e999}', '{"a":' * 5_000 + "1" + "}" * 5_000])
def test_metadata_is_an_object_that_json_can_hold(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        canonical_object(text)


def test_nothing_heavy_is_imported() -> None:
    """The device agent imports this: no package of ours beyond it, and cryptography only to verify."""
    code = (
        "import sys, libs.trust.statement, libs.trust.signatures;"
        "print([m for m in sys.modules if m.startswith(('libs.', 'cryptography', 'google', 'grpc'))"
        " and not m.startswith('libs.trust')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
