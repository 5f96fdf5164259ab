"""Members, roles and keys: nobody gives or takes more than they hold, and somebody always governs."""

from __future__ import annotations

import hashlib

import pytest
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb

from libs.errors import (
    AbortedError,
    AlreadyExistsError,
    DomainError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from libs.rpc.access import KeyRecord, authenticate, authorize, parse_credential
from libs.rpc.directory import key_record
from services.registry import domain as ask
from services.registry.domain import Quotas, Registry, find
from services.registry.domain.state import known_key
from tests.unit.registry.world import ORG, OWNER, PUMP, SHA, World, furnished

TECH = f"{ORG}/roles/tech"
VALVE = f"{ORG}/products/valve"
HOUR_MS = 3600 * 1000


@pytest.fixture
def world() -> World:
    return furnished()


def define(world: World, *permissions: str, principal: str = OWNER, role_id: str = "tech") -> pb.Role:
    made: pb.Role = world.do(ask.CreateRole(ORG, role_id, pb.Role(permissions=permissions)), principal)
    return made


def record(world: World, name: str) -> KeyRecord:
    found = known_key(world.state, name)
    assert found is not None
    return found


def may(world: World, key: str, permission: str, resource: str) -> str:
    """Empty when the key may, else the reason why not."""
    known = record(world, key)
    credential = parse_credential(f"Bearer gsw_acme_{key.rpartition('/')[2]}_secret")
    principal = authenticate(credential, known_with(known, "secret"), world.now_ms)
    try:
        authorize(principal, permission, resource)
    except DomainError as error:
        return error.reason
    return ""


def known_with(known: KeyRecord, secret: str) -> KeyRecord:
    values = {name: getattr(known, name) for name in known.__dataclass_fields__}
    return KeyRecord(**{**values, "secret_sha256": hashlib.sha256(secret.encode()).digest()})


def test_a_custom_role_is_what_its_members_hold(world: World) -> None:
    role = define(world, "registry.devices.*", "*.list", "*.list")
    assert list(role.permissions) == ["*.list", "registry.devices.*"]
    assert world.changes()[-1] == "role.created"
    key = world.key("t", TECH)
    assert may(world, key, "registry.devices.update", f"{PUMP}/devices/SN-1") == ""
    assert may(world, key, "registry.cohorts.list", PUMP) == ""
    assert may(world, key, "registry.cohorts.create", PUMP) == "PERMISSION_MISSING"
    assert may(world, key, "registry.devices.get", "organizations/other/products/p/devices/d") == "RESOURCE_NOT_FOUND"


def test_even_a_role_that_holds_everything_creates_no_organizations(world: World) -> None:
    define(world, "*")
    assert may(world, world.key("t", TECH), "registry.organizations.create", "") == "PERMISSION_MISSING"


def test_t61_grants_do_not_add_up(world: World) -> None:
    """T61: keys of one member for two places hold neither each other's scopes nor each other's place."""
    define(world, "registry.devices.*", "rollout.rollouts.*")
    member = world.do(ask.CreateMember(ORG, "ann", pb.Member(role=TECH)))
    for key_id, scope, prefix in (("a", "registry.devices.*", PUMP), ("b", "rollout.rollouts.*", VALVE)):
        wanted = pb.ApiKey(member=member.name, scopes=[scope], resource_prefix=prefix, secret_sha256=SHA)
        world.do(ask.CreateApiKey(ORG, key_id, wanted))
    a, b = f"{ORG}/apiKeys/a", f"{ORG}/apiKeys/b"
    assert may(world, a, "registry.devices.update", PUMP) == ""
    assert may(world, b, "rollout.rollouts.create", VALVE) == ""
    assert may(world, a, "registry.devices.update", VALVE) == "RESOURCE_NOT_FOUND"
    assert may(world, a, "rollout.rollouts.create", PUMP) == "PERMISSION_MISSING"
    assert may(world, b, "registry.devices.update", VALVE) == "PERMISSION_MISSING"
    wider = pb.ApiKey(name=a, scopes=["registry.devices.*", "rollout.rollouts.*"])
    world.refused(PermissionDeniedError, "SCOPE_ABOVE_OWN", ask.UpdateApiKey(wider, ("scopes",)), a)
    anywhere = ask.UpdateApiKey(pb.ApiKey(name=a), ("resource_prefix",))
    world.refused(PermissionDeniedError, "PREFIX_ABOVE_OWN", anywhere, a)


def test_nobody_defines_a_role_above_their_own(world: World) -> None:
    define(world, "registry.roles.*", "registry.members.*", "registry.devices.*")
    key = world.key("t", TECH)
    assert define(world, "registry.devices.get", principal=key, role_id="less").name == f"{ORG}/roles/less"
    more = ask.CreateRole(ORG, "more", pb.Role(permissions=["registry.products.*"]))
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", more, key)
    wider = pb.Role(name=f"{ORG}/roles/less", permissions=["*"])
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", ask.UpdateRole(wider, ("permissions",)), key)
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", ask.CreateMember(ORG, "v", pb.Member(role="viewer")), key)
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", ask.CreateMember(ORG, "o", pb.Member(role="owner")), key)
    assert world.do(ask.CreateMember(ORG, "l", pb.Member(role=f"{ORG}/roles/less")), key).role.endswith("/less")


def test_what_one_lacks_one_cannot_take_from_others(world: World) -> None:
    define(world, "*.get", role_id="look")
    define(world, "registry.roles.*")
    key = world.key("t", TECH)
    narrowed = pb.Role(name=f"{ORG}/roles/look", permissions=["registry.roles.get"])
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", ask.UpdateRole(narrowed, ("permissions",)), key)
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", ask.DeleteRole(f"{ORG}/roles/look", ""), key)


def test_a_narrow_key_of_an_owner_gives_no_wide_role(world: World) -> None:
    narrow = world.key("n", "owner", ("registry.members.*", "registry.roles.*"))
    made = ask.CreateMember(ORG, "x", pb.Member(role="admin"))
    world.refused(PermissionDeniedError, "SCOPE_ABOVE_OWN", made, narrow)
    member = world.do(ask.CreateMember(ORG, "x", pb.Member(role="viewer")))
    raised = ask.UpdateMember(pb.Member(name=member.name, role="owner"), ("role",))
    world.refused(PermissionDeniedError, "SCOPE_ABOVE_OWN", raised, narrow)
    wide = ask.CreateRole(ORG, "wide", pb.Role(permissions=["registry.devices.get"]))
    world.refused(PermissionDeniedError, "SCOPE_ABOVE_OWN", wide, narrow)


@pytest.mark.parametrize("role_id", ["owner", "admin", "operator", "viewer", "platform"])
def test_names_of_built_in_roles_are_taken(world: World, role_id: str) -> None:
    command = ask.CreateRole(ORG, role_id, pb.Role(permissions=["*.get"]))
    world.refused(InvalidArgumentError, "INVALID_FIELD", command)


@pytest.mark.parametrize("permissions", [[], ["registry"], ["a.b.c.d"], ["x; drop"], ["*.get"] * 65])
def test_permissions_are_patterns(world: World, permissions: list[str]) -> None:
    made = ask.CreateRole(ORG, "tech", pb.Role(permissions=permissions))
    world.refused(InvalidArgumentError, "INVALID_FIELD", made)


def test_a_role_in_use_stays(world: World) -> None:
    define(world, "*.get")
    world.refused(AlreadyExistsError, "ALREADY_EXISTS", ask.CreateRole(ORG, "tech", pb.Role(permissions=["*.get"])))
    member = world.do(ask.CreateMember(ORG, "ann", pb.Member(role=TECH)))
    error = world.refused(FailedPreconditionError, "ROLE_IN_USE", ask.DeleteRole(TECH, ""))
    assert error.metadata["members"] == "1"
    world.refused(AbortedError, "ETAG_MISMATCH", ask.DeleteRole(TECH, "7"))
    world.do(ask.UpdateMember(pb.Member(name=member.name, role="viewer"), ("role",)))
    world.do(ask.DeleteRole(TECH, "1"))
    assert world.changes()[-1] == "role.deleted"
    assert find(world.state.roles, TECH) is None
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", ask.DeleteRole(TECH, ""))


def test_roles_have_a_quota(world: World) -> None:
    world.registry = Registry(Quotas(roles=1))
    define(world, "*.get")
    second = ask.CreateRole(ORG, "second", pb.Role(permissions=["*.get"]))
    error = world.refused(ResourceExhaustedError, "QUOTA_EXCEEDED", second)
    assert error.metadata["quota"] == "roles"


def test_a_role_of_another_organization_does_not_exist(world: World) -> None:
    world.organization = "other"
    world.do(ask.CreateOrganization("other", "", "first", SHA), "organizations/platform/apiKeys/bootstrap")
    theirs = "organizations/other/roles/tech"
    world.do(
        ask.CreateRole("organizations/other", "tech", pb.Role(permissions=["*"])), "organizations/other/apiKeys/first"
    )
    world.organization = "acme"
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", ask.CreateMember(ORG, "x", pb.Member(role=theirs)))
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", ask.CreateMember(ORG, "x", pb.Member(role=f"{ORG}/roles/none")))


def test_a_change_of_role_changes_what_its_members_may(world: World) -> None:
    """T68: the key stays, its right goes. How soon others know is tested with the real log."""
    role = define(world, "registry.devices.*", "registry.cohorts.*")
    key = world.key("t", TECH)
    assert may(world, key, "registry.cohorts.create", PUMP) == ""
    narrowed = pb.Role(name=TECH, permissions=["registry.devices.*"], etag=role.etag)
    changed = world.do(ask.UpdateRole(narrowed, ("permissions",)))
    assert (changed.etag, world.changes()[-1]) == ("2", "role.updated")
    assert may(world, key, "registry.cohorts.create", PUMP) == "PERMISSION_MISSING"
    world.refused(AbortedError, "ETAG_MISMATCH", ask.UpdateRole(narrowed, ("permissions",)))


def test_a_member_changes_and_leaves(world: World) -> None:
    key = world.key("a", "viewer")
    member = f"{ORG}/members/m-a"
    changed = world.do(ask.UpdateMember(pb.Member(name=member, role="operator", display_name="Ann"), ("*",)))
    assert (changed.role, changed.display_name, changed.etag) == ("operator", "Ann", "2")
    same = pb.Member(name=member, role="operator")
    assert world.do(ask.UpdateMember(same, ("role",))).etag == "2"
    world.refused(AbortedError, "ETAG_MISMATCH", ask.DeleteMember(member, "1"))
    world.do(ask.DeleteMember(member, "2"))
    assert world.changes()[-2:] == ["api_key.revoked", "member.removed"]
    revoked = find(world.state.api_keys, key)
    assert revoked is not None
    assert revoked.revoked
    assert known_key(world.state, key) is None
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", ask.DeleteMember(member, ""))


def test_the_last_owner_stays(world: World) -> None:
    owner = f"{ORG}/members/owner"
    world.refused(FailedPreconditionError, "LAST_OWNER", ask.DeleteMember(owner, ""))
    lowered = ask.UpdateMember(pb.Member(name=owner, role="admin"), ("role",))
    world.refused(FailedPreconditionError, "LAST_OWNER", lowered)
    second = world.key("b", "owner", ("registry.devices.*",))
    world.refused(FailedPreconditionError, "LAST_OWNER", lowered)
    wider = ask.UpdateApiKey(pb.ApiKey(name=second, scopes=["*"]), ("scopes",))
    world.do(wider)
    assert world.do(lowered).role == "admin"


def test_an_admin_touches_no_owner(world: World) -> None:
    admin = world.key("a", "admin")
    owner = f"{ORG}/members/owner"
    for command in (
        ask.DeleteMember(owner, ""),
        ask.UpdateMember(pb.Member(name=owner, display_name="x"), ("display_name",)),
        ask.RotateApiKey(OWNER, b"n" * 32, None, ""),
        ask.UpdateApiKey(pb.ApiKey(name=OWNER, scopes=["*.get"]), ("scopes",)),
    ):
        world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", command, admin)


def secret_of(world: World, key: str, secret: str) -> str:
    stored, member = find(world.state.api_keys, key), find(world.state.members, f"{ORG}/members/owner")
    assert stored is not None
    assert member is not None
    try:
        credential = parse_credential(f"Bearer gsw_acme_first_{secret}")
        authenticate(credential, key_record(stored, member), world.now_ms)
    except UnauthenticatedError as error:
        return error.reason
    return ""


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def test_a_rotated_key_takes_both_secrets_for_a_while(world: World) -> None:
    world.do(ask.RotateApiKey(OWNER, sha("one"), 0, ""))
    assert [secret_of(world, OWNER, text) for text in ("one", "two")] == ["", "API_KEY_UNKNOWN"]
    rotated = world.do(ask.RotateApiKey(OWNER, sha("two"), HOUR_MS, ""))
    assert (rotated.secret_sha256, rotated.previous_secret_sha256) == (sha("two"), sha("one"))
    image = world.published[-1]
    assert isinstance(image, ev.ApiKeyChanged)
    assert (image.change, image.api_key) == ("api_key.rotated", rotated)
    world.now_ms += HOUR_MS - 1
    assert [secret_of(world, OWNER, text) for text in ("one", "two", "six")] == ["", "", "API_KEY_UNKNOWN"]
    world.now_ms += 1
    assert [secret_of(world, OWNER, text) for text in ("one", "two")] == ["API_KEY_UNKNOWN", ""]


def test_a_second_rotation_ends_the_oldest_secret_at_once(world: World) -> None:
    for text in ("one", "two", "three"):
        world.do(ask.RotateApiKey(OWNER, sha(text), HOUR_MS, ""))
    assert [secret_of(world, OWNER, text) for text in ("one", "two", "three")] == ["API_KEY_UNKNOWN", "", ""]


def test_without_an_overlap_the_old_secret_ends_at_once(world: World) -> None:
    world.do(ask.RotateApiKey(OWNER, sha("one"), 0, ""))
    rotated = world.do(ask.RotateApiKey(OWNER, sha("two"), 0, ""))
    assert rotated.previous_secret_sha256 == b""
    assert secret_of(world, OWNER, "one") == "API_KEY_UNKNOWN"
    assert secret_of(world, OWNER, "") == "CREDENTIALS_MALFORMED"


@pytest.mark.parametrize(
    ("secret", "overlap_ms"), [(b"short", None), (SHA, None), (b"n" * 32, -1), (b"n" * 32, 24 * HOUR_MS + 1)]
)
def test_a_rotation_is_checked(world: World, secret: bytes, overlap_ms: int | None) -> None:
    command = ask.RotateApiKey(OWNER, secret, overlap_ms, "")
    world.refused(InvalidArgumentError, "INVALID_FIELD", command)


def test_whoever_rotates_a_key_holds_what_it_holds(world: World) -> None:
    """Setting a secret is as good as having the key."""
    narrow = world.key("n", "owner", ("registry.apiKeys.*",))
    world.refused(PermissionDeniedError, "SCOPE_ABOVE_OWN", ask.RotateApiKey(OWNER, sha("x"), None, ""), narrow)
    assert world.do(ask.RotateApiKey(narrow, sha("x"), None, ""), narrow).secret_sha256 == sha("x")
    world.refused(AbortedError, "ETAG_MISMATCH", ask.RotateApiKey(OWNER, sha("x"), None, "9"))


def test_a_key_that_ended_is_not_brought_back(world: World) -> None:
    wanted = pb.ApiKey(scopes=["*"], secret_sha256=SHA)
    wanted.expire_time.FromMilliseconds(world.now_ms + 10)
    key = world.do(ask.CreateApiKey(ORG, "brief", wanted)).name
    revoked = world.key("r", "viewer")
    world.do(ask.RevokeApiKey(revoked, ""))
    world.now_ms += 10
    for name in (key, revoked):
        world.refused(FailedPreconditionError, "WRONG_STATE", ask.RotateApiKey(name, sha("x"), None, ""))
        longer = ask.UpdateApiKey(pb.ApiKey(name=name), ("expire_time",))
        world.refused(FailedPreconditionError, "WRONG_STATE", longer)


def test_no_key_outlives_the_one_that_made_it(world: World) -> None:
    brief = pb.ApiKey(scopes=["*"], secret_sha256=SHA)
    brief.expire_time.FromMilliseconds(world.now_ms + HOUR_MS)
    key = world.do(ask.CreateApiKey(ORG, "brief", brief)).name
    endless = ask.CreateApiKey(ORG, "endless", pb.ApiKey(scopes=["*"], secret_sha256=SHA))
    world.refused(PermissionDeniedError, "EXPIRY_BEYOND_OWN", endless, key)
    own = ask.UpdateApiKey(pb.ApiKey(name=key), ("expire_time",))
    world.refused(PermissionDeniedError, "EXPIRY_BEYOND_OWN", own, key)
    world.refused(PermissionDeniedError, "EXPIRY_BEYOND_OWN", ask.RotateApiKey(OWNER, sha("x"), 0, ""), key)
    assert world.do(own).HasField("expire_time") is False


def test_an_expiry_lies_ahead(world: World) -> None:
    past = pb.ApiKey(name=world.key("k", "viewer"))
    past.expire_time.FromMilliseconds(world.now_ms)
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.UpdateApiKey(past, ("expire_time",)))


def test_the_last_owners_key_is_not_narrowed(world: World) -> None:
    narrowed = pb.ApiKey(name=OWNER, scopes=["*.get"], resource_prefix=PUMP)
    narrowed.expire_time.FromMilliseconds(world.now_ms + HOUR_MS)
    for path in ("scopes", "resource_prefix", "expire_time"):
        world.refused(FailedPreconditionError, "LAST_OWNER_KEY", ask.UpdateApiKey(narrowed, (path,)))
    forbidden = ask.UpdateApiKey(pb.ApiKey(name=OWNER, member=f"{ORG}/members/x"), ("member",))
    world.refused(InvalidArgumentError, "INVALID_FIELD", forbidden)
