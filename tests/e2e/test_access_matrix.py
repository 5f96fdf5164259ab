"""Route x role x tenant, generated from the access rules of the protos; every cell is called (T61, T68, T69, N24).

The table of roles below is the promise of docs/conventions.md, written a second time on purpose: a slip in the code
that enforces it cannot also slip in here.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import partial

import pytest
from groundswell.registry.v1 import registry_pb2

from demo.steps import wait_until
from tests.e2e import logs
from tests.e2e.ports import Ports
from tests.e2e.routes import Route, public_routes, request_for
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant

ROUTES = tuple(public_routes())
VIEW = ("*.get", "*.list", "*.watch", "*.explain", "*.resolve")
OPERATE = (
    *VIEW,
    "artifacts.*",
    "releases.*",
    "rollout.*",
    "webhooks.*",
    "pki.*",
    "registry.devices.*",
    "registry.cohorts.*",
    "registry.deviceImports.*",
)
ROLES = {"viewer": VIEW, "operator": OPERATE, "admin": ("*",), "owner": ("*",)}
PLATFORM = ("registry.organizations.*", "registry.gateways.*")
ONLY_PLATFORM = "registry.organizations.create"
DENIED = ("PERMISSION_DENIED", "UNAUTHENTICATED")


@pytest.fixture(scope="module")
def home(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("home"))
    yield tenant
    tenant.close()


@pytest.fixture(scope="module")
def victim(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("victim"))
    yield tenant
    tenant.close()


def key_of(tenant: Tenant, name: str, role: str, *scopes: str, **values: object) -> str:
    """A key of a new member with that role."""
    member = tenant.client.registry.CreateMember(
        registry_pb2.CreateMemberRequest(parent=tenant.name, member_id=name, member=registry_pb2.Member(role=role))
    )
    secret = secrets.token_hex(24)
    tenant.client.registry.CreateApiKey(
        registry_pb2.CreateApiKeyRequest(
            parent=tenant.name,
            api_key_id=name,
            api_key=registry_pb2.ApiKey(
                member=member.name,
                scopes=scopes or ("*",),
                secret_sha256=hashlib.sha256(secret.encode()).digest(),
                **values,  # type: ignore[arg-type]
            ),
        )
    )
    return f"gsw_{tenant.organization}_{name}_{secret}"


def covered(permission: str, patterns: tuple[str, ...]) -> bool:
    return permission != ONLY_PLATFORM and any(fnmatchcase(permission, pattern) for pattern in patterns)


def destructive_for_itself(route: Route, role: str) -> bool:
    """An owner's call that is allowed and could end the very keys this test holds."""
    return route.method.name in ("RevokeApiKey", "DeleteMember", "RemoveMember", "RotateApiKey") and role == "owner"


def test_every_public_route_has_a_rule_and_a_well_formed_request() -> None:
    for route in ROUTES:
        assert route.access.permission, f"{route.path} has no permission: nobody can call it"
        assert not route.access.callers, f"{route.path} names callers, but is public"
        request_for(route, "acme").SerializeToString()
    assert len({route.path for route in ROUTES}) > 80


@pytest.mark.timeout(600)
def test_every_cell_of_the_matrix_and_no_leak(stack: Stack, ports: Ports, home: Tenant, victim: Tenant) -> None:
    keys = {role: key_of(home, f"m-{role}", role) for role in ROLES}
    before = logs.settled(stack, victim.organization)
    wrong: list[str] = []
    cells: Counter[str] = Counter()
    for route in ROUTES:
        permission = route.access.permission
        for role, patterns in ROLES.items():
            allowed = covered(permission, patterns)
            if not destructive_for_itself(route, role):
                code, reason, said = ports.call(route, home.organization, keys[role])
                cells["own"] += 1
                if reason == "INVALID_FIELD" and "pattern" in said:
                    wrong.append(f"{route.id} {role}: the generated request is not well formed: {said}")
                elif allowed is (code in DENIED):
                    wrong.append(f"{route.id} as {role} in its own organization: {code} {reason}, allowed={allowed}")
            if not route.access.resource:
                continue
            code, reason, said = ports.call(route, victim.organization, keys[role])
            cells["foreign"] += 1
            if (code, reason) != ("NOT_FOUND", "RESOURCE_NOT_FOUND"):
                wrong.append(f"{route.id} as {role} at another organization: {code} {reason} {said}")
    assert not wrong, "\n".join(wrong)
    assert logs.settled(stack, victim.organization) == before
    print(f"cells: {dict(cells)} over {len(ROUTES)} routes")


@pytest.mark.timeout(600)
def test_t69_nothing_is_open_without_a_key_or_with_a_bad_one(ports: Ports, home: Tenant) -> None:
    organization = home.organization
    expire = datetime.now(UTC) + timedelta(seconds=1.5)
    expiring = key_of(home, "mayfly", "owner", expire_time=expire)
    wait_until("the key to expire", 10, lambda: datetime.now(UTC) > expire + timedelta(seconds=0.5), 0.1)
    bad = {
        "": "CREDENTIALS_MISSING",
        "gsw_nonsense": "CREDENTIALS_MALFORMED",
        f"gsw_{organization}_nobody_{secrets.token_hex(24)}": "API_KEY_UNKNOWN",
        expiring: "API_KEY_EXPIRED",
    }
    answers = {
        (route.id, reason): ports.call(route, organization, key)[:2] for route in ROUTES for key, reason in bad.items()
    }
    assert {cell: got for cell, got in answers.items() if got != ("UNAUTHENTICATED", cell[1])} == {}


@pytest.mark.timeout(600)
def test_the_platform_reaches_no_tenants_resources(stack: Stack, ports: Ports, victim: Tenant) -> None:
    key = stack.profile.keys["platform"]
    wrong = []
    for route in ROUTES:
        if not route.access.resource or fnmatchcase(route.access.permission, PLATFORM[0]):
            continue
        code, reason, _ = ports.call(route, victim.organization, key)
        if (code, reason) != ("NOT_FOUND", "RESOURCE_NOT_FOUND"):
            wrong.append(f"{route.id}: {code} {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(600)
def test_t61_a_narrow_key_of_a_mighty_member_holds_only_its_scopes_within_its_prefix(
    ports: Ports, home: Tenant
) -> None:
    prefix = f"{home.name}/products/other"
    narrow = key_of(home, "narrow", "owner", "registry.devices.get", "*.list", resource_prefix=prefix)
    wrong = []
    for route in ROUTES:
        if not route.access.resource:
            continue
        code, reason, _ = ports.call(route, home.organization, narrow)
        if (code, reason) != ("NOT_FOUND", "RESOURCE_NOT_FOUND"):
            wrong.append(f"{route.id} outside the prefix: {code} {reason}")
    assert not wrong, "\n".join(wrong)


def test_t68_a_revoked_key_is_refused_by_every_service_within_its_bound(ports: Ports, home: Tenant) -> None:
    key = key_of(home, "fired", "admin")
    lists = [route for route in ROUTES if route.method.name == "ListAuditRecords"]
    assert all(ports.call(route, home.organization, key)[0] == "OK" for route in lists)
    home.client.registry.RevokeApiKey(registry_pb2.RevokeApiKeyRequest(name=f"{home.name}/apiKeys/fired"))
    begin = time.monotonic()
    for route in lists:
        refused = partial(ports.call, route, home.organization, key)
        wait_until(f"{route.service} to refuse it", 5, lambda ask=refused: ask()[1] == "API_KEY_REVOKED", 0.02)
    print(f"revoked at every service after {time.monotonic() - begin:.2f} s (bound: 5 s)")
