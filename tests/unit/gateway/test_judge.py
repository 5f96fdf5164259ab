"""What a known certificate may do: judged at every request."""

from __future__ import annotations

import pytest
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import registry_pb2

from libs.errors import PermissionDeniedError
from services.gateway.directory import CertificateEntry
from services.gateway.identity import judge

NOW = 1_800_000_000.0
Leaf = pki_pb2.DeviceCertificate
CaState = pki_pb2.CaCertificate
Policy = registry_pb2.CertificatePolicy


def verdict(
    state: Leaf.State.ValueType = Leaf.STATE_ACTIVE,
    ca: CaState.State.ValueType = CaState.STATE_ACTIVE,
    *,
    begin: float = NOW - 10,
    end: float = NOW + 10,
    policy: Policy.ExpiredLeaf.ValueType = Policy.EXPIRED_LEAF_UNSPECIFIED,
    renewing: bool = False,
) -> str:
    leaf = Leaf(state=state)
    leaf.not_before.FromSeconds(int(begin))
    leaf.not_after.FromSeconds(int(end))
    try:
        configured = registry_pb2.ConfigurationPolicy(certificate_policy=Policy(expired_leaf=policy))
        judge(CertificateEntry.of(leaf), ca, configured, NOW, renewing=renewing)
    except PermissionDeniedError as error:
        return error.reason
    return ""


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (Leaf.STATE_ACTIVE, ""),
        (Leaf.STATE_REVOKED, "CERTIFICATE_REVOKED"),
        (Leaf.STATE_RETIRED, "CERTIFICATE_SUPERSEDED"),
        (Leaf.STATE_LAPSED, "CERTIFICATE_LAPSED"),
        (Leaf.STATE_REFUSED, "CERTIFICATE_REFUSED"),
    ],
)
@pytest.mark.parametrize("renewing", [False, True])
def test_an_ended_certificate_may_nothing(state: Leaf.State.ValueType, reason: str, *, renewing: bool) -> None:
    assert verdict(state, renewing=renewing) == reason


def test_a_ca_out_of_force_takes_its_devices_with_it() -> None:
    assert verdict(ca=CaState.STATE_SUSPENDED) == "CA_SUSPENDED"
    assert verdict(ca=CaState.STATE_REVOKED, renewing=True) == "CA_REVOKED"
    assert verdict(ca=CaState.STATE_UNSPECIFIED) == ""


@pytest.mark.parametrize(
    ("policy", "works", "renews"),
    [
        (Policy.EXPIRED_LEAF_UNSPECIFIED, False, True),
        (Policy.EXPIRED_LEAF_GRACE, False, True),
        (Policy.EXPIRED_LEAF_STRICT, False, False),
        (Policy.EXPIRED_LEAF_LENIENT, True, True),
    ],
)
def test_what_an_expired_certificate_may_do_is_the_products_policy(
    policy: Policy.ExpiredLeaf.ValueType, *, works: bool, renews: bool
) -> None:
    assert (verdict(end=NOW, policy=policy) == "") == works
    assert (verdict(end=NOW, policy=policy, renewing=True) == "") == renews
    assert verdict(begin=NOW + 1, policy=policy, renewing=True) == "CERTIFICATE_NOT_YET_VALID"
