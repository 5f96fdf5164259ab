"""What the agent believes: each refusal by its code (rows of the attack catalogue by their ids)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clients.device.errors import ConfigError, RefusedError
from clients.device.model import Offer, Signature
from clients.device.offers import Rules, role_and_filename, verify
from tests.unit.device.offering import CONFIG, PROGRAM, TAG, Signer, binary, offer, rules, statement

ONE, TWO, STRANGER = Signer(), Signer(), Signer()


def refusal(with_rules: Rules, offered: Offer, floor: int = 0) -> str:
    with pytest.raises(RefusedError) as caught:
        verify(with_rules, offered, floor)
    return caught.value.reason


def test_a_sound_offer_is_believed() -> None:
    assert verify(rules(ONE, TWO, threshold=2), offer(ONE, TWO), 2) == offer(ONE, TWO)


def test_signatures_of_strangers_beside_enough_good_ones_do_not_matter() -> None:
    assert verify(rules(ONE), offer(STRANGER, ONE), 0).version == "2.0.0"


def test_t02_unsigned_is_refused() -> None:
    assert refusal(rules(ONE), offer()) == "SIGNATURES_BELOW_THRESHOLD"


def test_an_unknown_key_is_refused() -> None:
    assert refusal(rules(ONE), offer(STRANGER)) == "SIGNATURES_BELOW_THRESHOLD"


def test_t03_a_key_is_counted_once_however_it_is_named() -> None:
    offered = offer(ONE, ONE)
    upper = Signature(ONE.key_id.upper(), offered.signatures[0].signature)
    twice = replace(offered, signatures=(*offered.signatures, upper))
    assert refusal(rules(ONE, TWO, threshold=2), twice) == "SIGNATURES_BELOW_THRESHOLD"
    assert refusal(rules(ONE, ONE, threshold=2), twice) == "SIGNATURES_BELOW_THRESHOLD"


def test_t04_one_stolen_key_of_two_is_not_enough() -> None:
    assert refusal(rules(ONE, TWO, threshold=2), offer(ONE)) == "SIGNATURES_BELOW_THRESHOLD"


def test_a_signature_of_other_bytes_is_refused() -> None:
    stolen = offer(ONE, version="1.0.0").signatures
    assert refusal(rules(ONE), replace(offer(ONE), signatures=stolen)) == "SIGNATURES_BELOW_THRESHOLD"
    short = (Signature(ONE.key_id, b"short"),)
    assert refusal(rules(ONE), replace(offer(ONE), signatures=short)) == "SIGNATURES_BELOW_THRESHOLD"


def test_an_empty_trust_list_says_so() -> None:
    assert refusal(rules(threshold=1), offer(ONE)) == "TRUST_LIST_EMPTY"


@pytest.mark.parametrize(("keys", "threshold"), [((b"short",), 1), ((bytes(32),), 0)])
def test_a_trust_list_that_cannot_be_meant_is_refused(keys: tuple[bytes, ...], threshold: int) -> None:
    with pytest.raises(ConfigError):
        Rules("product", "target", keys, threshold)


def test_t05_t06_a_lower_security_version_is_refused_under_valid_signatures() -> None:
    assert refusal(rules(ONE), offer(ONE, security_version=2), floor=3) == "SECURITY_VERSION_TOO_LOW"
    assert verify(rules(ONE), offer(ONE, security_version=3, version="0.1.0", kind="rollback"), 3).kind == "rollback"


def test_the_version_told_beside_the_statement_must_be_the_signed_one() -> None:
    for lie in (replace(offer(ONE), version="9.9.9"), replace(offer(ONE), security_version=9)):
        assert refusal(rules(ONE), lie) == "STATEMENT_MISMATCH"


def test_another_product_is_refused() -> None:
    assert refusal(rules(ONE), offer(ONE, product="organizations/acme/products/kettle")) == "WRONG_PRODUCT"


def test_t12_parts_of_two_valid_bundles_do_not_mix() -> None:
    other = binary(b"other config", {"role": "config", "filename": "config.json"})
    other_offer = offer(ONE, binaries=(PROGRAM, other))
    assert verify(rules(ONE), other_offer, 0) == other_offer
    assert refusal(rules(ONE), replace(offer(ONE), binaries=(PROGRAM, other))) == "STATEMENT_MISMATCH"


def test_a_part_less_a_part_more_or_another_order_is_refused() -> None:
    for binaries in ((PROGRAM,), (CONFIG, PROGRAM), (PROGRAM, CONFIG, CONFIG), (PROGRAM, PROGRAM)):
        assert refusal(rules(ONE), replace(offer(ONE), binaries=binaries)) == "STATEMENT_MISMATCH"


@pytest.mark.parametrize("change", [{"size": 8}, {"metadata": "{}"}, {"metadata_digest": "0" * 64}, {"digest": "../x"}])
def test_every_field_of_a_binary_is_the_signed_one(change: dict[str, object]) -> None:
    changed = replace(PROGRAM, **change)  # type: ignore[arg-type]
    assert refusal(rules(ONE), replace(offer(ONE), binaries=(changed, CONFIG))) == "STATEMENT_MISMATCH"


def test_t16_firmware_for_other_hardware_is_refused() -> None:
    foreign = binary(b"program", {"role": "program"}, target="board-c")
    portable = binary(b"{}", {"role": "config"}, target="portable")
    assert refusal(rules(ONE), offer(ONE, binaries=(foreign,))) == "WRONG_TARGET"
    assert refusal(rules(ONE), offer(ONE, binaries=(foreign, portable))) == "WRONG_TARGET"
    # Relabelled by the server, it is not what was signed.
    relabelled = replace(offer(ONE, binaries=(foreign,)), binaries=(replace(foreign, target="board-b"),))
    assert refusal(rules(ONE), relabelled) == "WRONG_TARGET"


def test_of_a_bundle_for_two_boards_a_device_takes_its_own_part() -> None:
    foreign = binary(b"program c", {"role": "program"}, target="board-c")
    portable = binary(b"{}", {"role": "config"}, target="portable")
    whole = offer(ONE, binaries=(foreign, PROGRAM, portable))
    assert verify(rules(ONE), whole, 0).binaries == (PROGRAM, portable)
    fitting = replace(whole, binaries=(PROGRAM, portable))
    assert verify(rules(ONE), fitting, 0).binaries == (PROGRAM, portable)


def test_t14_a_bundle_over_the_hard_cap_is_refused() -> None:
    assert refusal(replace(rules(ONE), max_bundle_bytes=8), offer(ONE)) == "OFFER_TOO_LARGE"


def test_t22_statements_that_are_not_canonical_are_refused_though_signed() -> None:
    good = statement("2.0.0", 2, (PROGRAM, CONFIG))
    bad = [
        good + b"\n",
        good.replace(b',"version"', b', "version"'),
        good.replace(b'"version":"2.0.0"', b'"version":"1.0.0","version":"2.0.0"'),
        good.replace(b'"version":"2.0.0"', b'"version":"2.0.0","zone":1'),
        good.replace(TAG, b"groundswell.bundle-statement.v2\n"),
        good[len(TAG) :],
        TAG + b"[]",
        TAG + b"\xff",
        b"",
    ]
    for data in bad:
        changed = replace(offer(ONE), statement=data, signatures=(ONE.sign(data),))
        assert refusal(rules(ONE), changed) == "STATEMENT_MALFORMED"


def test_roles_come_from_metadata() -> None:
    assert role_and_filename(PROGRAM) == ("program", "")
    assert role_and_filename(CONFIG) == ("config", "config.json")
    assert role_and_filename(binary(b"", {"filename": "wifi.json"})) == ("config", "wifi.json")
    assert role_and_filename(binary(b"", {})) == ("program", "")


@pytest.mark.parametrize(
    "metadata", [{"role": "kernel"}, {"filename": "../x"}, {"filename": "a/b"}, {"filename": "/x"}, {"filename": 1}]
)
def test_t21_metadata_leads_nowhere_else(metadata: dict[str, object]) -> None:
    assert refusal(rules(ONE), offer(ONE, binaries=(PROGRAM, binary(b"x", metadata)))) == "METADATA_UNUSABLE"
