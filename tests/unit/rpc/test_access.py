"""Effective right = role ∩ scopes ∩ prefix, as a matrix over pure functions."""

from __future__ import annotations

import hashlib

import pytest

from libs.errors import GroundswellError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from libs.rpc.access import KeyRecord, authenticate, authorize, covers, may_grant, parse_credential, role_allows
from libs.rpc.identity import Principal

PRODUCT = "organizations/acme/products/pump"
SECRET = "s3cret_with_underscores"


def principal(role: str, scopes: tuple[str, ...] = ("*",), prefix: str = "", organization: str = "acme") -> Principal:
    return Principal("organizations/acme/apiKeys/k", "api_key", organization, "m", role, scopes, prefix)


def record(**changes: object) -> KeyRecord:
    values: dict[str, object] = {
        "name": "organizations/acme/apiKeys/k",
        "secret_sha256": hashlib.sha256(SECRET.encode()).digest(),
        "member": "organizations/acme/members/m",
        "role": "owner",
        "scopes": ("*",),
        "resource_prefix": "",
        "expire_ms": 0,
        "revoked": False,
    }
    return KeyRecord(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("permission", "roles"),
    [
        ("registry.devices.get", {"viewer", "operator", "admin", "owner"}),
        ("rollout.rollouts.watch", {"viewer", "operator", "admin", "owner"}),
        ("releases.graph.explain", {"viewer", "operator", "admin", "owner"}),
        ("registry.devices.update", {"operator", "admin", "owner"}),
        ("rollout.rollouts.create", {"operator", "admin", "owner"}),
        ("pki.caCertificates.create", {"operator", "admin", "owner"}),
        ("registry.products.create", {"admin", "owner"}),
        ("registry.members.create", {"admin", "owner"}),
        ("registry.gateways.create", {"admin", "owner", "platform"}),
        ("registry.organizations.create", {"platform"}),
    ],
)
def test_roles_hold_what_the_conventions_say(permission: str, roles: set[str]) -> None:
    every = ("viewer", "operator", "admin", "owner", "platform", "", "Owner")
    assert {role for role in every if role_allows(role, permission)} == roles


@pytest.mark.parametrize("role_ok", [True, False])
@pytest.mark.parametrize("scope_ok", [True, False])
@pytest.mark.parametrize("place", ["inside", "outside", "foreign"])
def test_all_three_must_agree(*, role_ok: bool, scope_ok: bool, place: str) -> None:
    asking = principal(
        "operator" if role_ok else "viewer", ("registry.devices.*",) if scope_ok else ("artifacts.*",), PRODUCT
    )
    resource = {
        "inside": f"{PRODUCT}/devices/d",
        "outside": "organizations/acme/products/pump2/devices/d",
        "foreign": "organizations/other/products/pump/devices/d",
    }[place]
    if place != "inside":
        with pytest.raises(NotFoundError) as hidden:
            authorize(asking, "registry.devices.update", resource)
        assert hidden.value.message == f"{resource} does not exist"
    elif role_ok and scope_ok:
        authorize(asking, "registry.devices.update", resource)
    else:
        with pytest.raises(PermissionDeniedError) as denied:
            authorize(asking, "registry.devices.update", resource)
        assert denied.value.metadata["permission"] == "registry.devices.update"


def test_a_prefix_ends_at_a_segment() -> None:
    with pytest.raises(NotFoundError):
        authorize(principal("owner", prefix=PRODUCT), "registry.products.get", PRODUCT + "-two")


def test_the_platform_reaches_organizations_everywhere_and_nothing_of_theirs() -> None:
    platform = principal("platform", organization="platform")
    authorize(platform, "registry.organizations.get", "organizations/acme")
    authorize(platform, "registry.gateways.create", "organizations/platform")
    for permission, resource in (
        ("registry.gateways.create", "organizations/acme"),
        ("registry.devices.get", f"{PRODUCT}/devices/d"),
        ("audit.records.list", "organizations/acme"),
    ):
        with pytest.raises(NotFoundError):
            authorize(platform, permission, resource)


@pytest.mark.parametrize(
    ("giver", "given", "may"),
    [
        ("owner", "owner", True),
        ("admin", "owner", False),
        ("admin", "admin", True),
        ("operator", "admin", False),
        ("owner", "platform", False),
        ("platform", "platform", False),
        ("", "viewer", False),
        ("owner", "root", False),
    ],
)
def test_nobody_gives_more_than_their_own_role(giver: str, given: str, *, may: bool) -> None:
    assert may_grant(giver, given) is may


@pytest.mark.parametrize(
    ("held", "wanted", "holds"),
    [
        (("*",), "*", True),
        (("registry.*",), "registry.devices.*", True),
        (("*.list",), "registry.*.list", True),
        (("registry.*",), "*", False),
        (("registry.devices.get",), "registry.devices.*", False),
        (("registry.*",), "*.list", False),
        ((), "registry.devices.get", False),
    ],
)
def test_scopes_cover_only_what_they_hold(held: tuple[str, ...], wanted: str, *, holds: bool) -> None:
    assert covers(held, wanted) is holds


def test_a_key_is_taken_apart_at_its_first_underscores() -> None:
    credential = parse_credential(f"Bearer gsw_acme_ci-1_{SECRET}")
    assert (credential.name, credential.secret) == ("organizations/acme/apiKeys/ci-1", SECRET)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Basic gsw_acme_k_s", "Bearer gsw_acme_k_", "Bearer gsw__k_s", "Bearer xyz_acme_k_s",
     "Bearer gsw_acme/apiKeys_k_s", "Bearer gsw_acme_k/../x_s"],
)  # fmt: skip
def test_what_is_no_key_is_called_malformed(header: str) -> None:
    with pytest.raises(UnauthenticatedError) as error:
        parse_credential(header)
    assert error.value.reason == "CREDENTIALS_MALFORMED"


@pytest.mark.parametrize(
    ("known", "secret", "reason"),
    [
        (None, SECRET, "API_KEY_UNKNOWN"),
        (record(), "wrong", "API_KEY_UNKNOWN"),
        (record(revoked=True), SECRET, "API_KEY_REVOKED"),
        (record(expire_ms=1000), SECRET, "API_KEY_EXPIRED"),
        (record(revoked=True), "wrong", "API_KEY_UNKNOWN"),
    ],
)
def test_a_key_is_refused_with_its_reason(known: KeyRecord | None, secret: str, reason: str) -> None:
    with pytest.raises(UnauthenticatedError) as error:
        authenticate(parse_credential(f"Bearer gsw_acme_k_{secret}"), known, now_ms=1000)
    assert error.value.reason == reason


def test_a_good_key_becomes_its_members_principal() -> None:
    found = authenticate(parse_credential(f"Bearer gsw_acme_k_{SECRET}"), record(expire_ms=1001), now_ms=1000)
    assert (found.kind, found.organization, found.role, found.scopes) == ("api_key", "acme", "owner", ("*",))


def test_errors_of_access_carry_stable_statuses() -> None:
    refused: list[type[GroundswellError]] = [NotFoundError, PermissionDeniedError, UnauthenticatedError]
    assert [kind.status for kind in refused] == ["NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"]
