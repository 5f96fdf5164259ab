"""Route by role by tenant: generated from the access rules that stand beside the RPCs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.audit.v1 import audit_pb2
from groundswell.options.v1 import access_pb2
from groundswell.pki.v1 import keys_pb2, pki_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import edge_pb2, rollout_pb2
from groundswell.webhooks.v1 import webhooks_pb2

from libs.errors import NotFoundError, PermissionDeniedError
from libs.rpc.access import authorize, role_allows
from libs.rpc.identity import Principal
from libs.rpc.interceptor import access_of

FILES = (artifacts_pb2, audit_pb2, keys_pb2, pki_pb2, registry_pb2, releases_pb2, rollout_pb2, edge_pb2, webhooks_pb2)
SERVICES = {"registry", "pki", "artifacts", "releases", "rollout", "webhooks"}
ROLES = ("viewer", "operator", "admin", "owner", "platform")
UNPLACED = {"registry.organizations.create", "registry.organizations.list"}


def methods() -> Iterator[MethodDescriptor]:
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def rule_of(method: MethodDescriptor) -> access_pb2.Access:
    rule = access_of(f"/{method.containing_service.full_name}/{method.name}")
    assert rule is not None, f"{method.full_name} has no access rule: nobody could call it"
    return rule


ALL = list(methods())
PUBLIC = [method for method in ALL if rule_of(method).permission]


def named(method: MethodDescriptor) -> str:
    return method.full_name.removeprefix("groundswell.")


def principal(role: str, organization: str = "acme", scopes: tuple[str, ...] = ("*",)) -> Principal:
    return Principal(f"organizations/{organization}/apiKeys/k", "api_key", organization, "m", role, scopes)


@pytest.mark.parametrize("method", ALL, ids=named)
def test_a_method_is_public_or_internal_and_never_both(method: MethodDescriptor) -> None:
    rule = rule_of(method)
    internal = "Internal" in method.containing_service.name
    assert bool(rule.callers) is internal
    assert bool(rule.permission) is not internal
    assert set(rule.callers) <= {*SERVICES, "gateway", "worker"}


@pytest.mark.parametrize("method", PUBLIC, ids=named)
def test_a_permission_stands_on_a_field_that_exists(method: MethodDescriptor) -> None:
    rule = rule_of(method)
    assert rule.permission.split(".")[0] == method.full_name.split(".")[1]
    assert len(rule.permission.split(".")) == 3
    if not rule.resource:
        assert rule.permission in UNPLACED
        return
    found: Any = None
    inside: Descriptor = method.input_type
    for part in rule.resource.split("."):
        found = inside.fields_by_name[part]
        inside = found.message_type
    assert found.type == FieldDescriptor.TYPE_STRING


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("method", PUBLIC, ids=named)
def test_only_the_role_opens_a_route_and_only_at_home(method: MethodDescriptor, role: str) -> None:
    permission = rule_of(method).permission
    home = "platform" if role == "platform" else "acme"
    own, foreign = (f"organizations/{organization}/products/p" for organization in (home, "other"))
    if role_allows(role, permission):
        authorize(principal(role, home), permission, own)
        with pytest.raises(PermissionDeniedError):
            authorize(principal(role, home, ("nothing.*",)), permission, own)
    else:
        with pytest.raises(PermissionDeniedError):
            authorize(principal(role, home), permission, own)
    if role == "platform" and permission.startswith("registry.organizations."):
        authorize(principal(role, home), permission, foreign)
        return
    with pytest.raises(NotFoundError):
        authorize(principal(role, home), permission, foreign)


@pytest.mark.parametrize("method", PUBLIC, ids=named)
def test_a_viewer_only_looks(method: MethodDescriptor) -> None:
    looks = method.name.startswith(("Get", "List", "Watch", "Explain", "Resolve"))
    assert role_allows("viewer", rule_of(method).permission) is looks
