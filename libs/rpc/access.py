"""Who may do what: effective right = member's role ∩ key's scopes ∩ resource prefix. Deny by default.

A member has one role, a built-in one or a custom one of the organization, and a key one set of scopes under one prefix.
So a call is judged by one triple, and grants never add up to more than one of them holds.

The rules are pure functions here; where keys come from is a :class:`KeyDirectory`. A foreign organization, or a
resource outside the key's prefix, does not exist for the caller (NOT_FOUND); in the own organization a missing right is
named (PERMISSION_DENIED).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Protocol

from libs.errors import DomainError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from libs.names import is_within, organization_of
from libs.rpc.identity import Principal

PLATFORM: Final = "platform"
"""Organization of platform keys and gateways."""

_VIEW: Final = ("*.get", "*.list", "*.watch", "*.explain", "*.resolve")
_OPERATE: Final = (
    *_VIEW,
    "artifacts.*",
    "releases.*",
    "rollout.*",
    "webhooks.*",
    "pki.*",
    "registry.devices.*",
    "registry.cohorts.*",
    "registry.deviceImports.*",
)
ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "viewer": _VIEW,
    "operator": _OPERATE,
    "admin": ("*",),
    "owner": ("*",),
    PLATFORM: ("registry.organizations.*", "registry.gateways.*"),
}
_RANK: Final = {"viewer": 1, "operator": 2, "admin": 3, "owner": 4, PLATFORM: 5}
PLATFORM_ONLY: Final = frozenset({"registry.organizations.create"})
_PLATFORM_EVERYWHERE: Final = ("registry.organizations.*",)
"""What the platform may do outside its own organization; the tenants' resources are not among it."""
_SEGMENT: Final = re.compile(r"[a-z0-9-]{1,63}")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key as every service knows it."""

    name: str
    secret_sha256: bytes
    member: str
    role: str
    scopes: tuple[str, ...]
    resource_prefix: str
    expire_ms: int
    """0 means never."""
    revoked: bool
    permissions: tuple[str, ...] = ()
    """What a custom role holds; of no meaning when the role is built in."""
    previous_sha256: bytes = b""
    """Secret before the last rotation, taken until then; empty when there is none."""
    previous_expire_ms: int = 0


class KeyDirectory(Protocol):
    """Where API keys are looked up."""

    async def lookup(self, organization: str, name: str) -> KeyRecord | None:
        """The key, or None. Raises UNAVAILABLE when what is known is too old to trust."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A presented key, taken apart."""

    organization: str
    name: str
    secret: str


def parse_credential(authorization: str) -> Credential:
    """Take ``Bearer gsw_<organization>_<id>_<secret>`` apart."""
    scheme, _, token = authorization.partition(" ")
    parts = token.split("_", 3)
    well_formed = len(parts) == 4 and parts[0] == "gsw" and parts[3] and all(map(_SEGMENT.fullmatch, parts[1:3]))
    if scheme.lower() != "bearer" or not well_formed:
        raise UnauthenticatedError(
            "CREDENTIALS_MALFORMED", "present an API key as `authorization: Bearer gsw_<organization>_<id>_<secret>`"
        )
    return Credential(parts[1], f"organizations/{parts[1]}/apiKeys/{parts[2]}", parts[3])


def authenticate(credential: Credential, record: KeyRecord | None, now_ms: int) -> Principal:
    """Check the secret in constant time, then the key's state."""
    digest = hashlib.sha256(credential.secret.encode()).digest()
    known = record.secret_sha256 if record is not None else bytes(32)
    older = record.previous_sha256 if record is not None else b""
    current = hmac.compare_digest(digest, known)
    previous = hmac.compare_digest(digest, older or bytes(32))
    if record is None or not (current or (previous and older and now_ms < record.previous_expire_ms)):
        raise UnauthenticatedError("API_KEY_UNKNOWN", "this API key is not known")
    return principal_of(credential.organization, record, now_ms)


def principal_of(organization: str, record: KeyRecord | None, now_ms: int) -> Principal:
    """The principal of a key whose secret was found right, here or by another replica of this service."""
    if record is None:
        raise UnauthenticatedError("API_KEY_UNKNOWN", "this API key is not known")
    if record.revoked:
        raise UnauthenticatedError("API_KEY_REVOKED", f"{record.name} was revoked", api_key=record.name)
    if record.expire_ms and record.expire_ms <= now_ms:
        raise UnauthenticatedError("API_KEY_EXPIRED", f"{record.name} has expired", api_key=record.name)
    return Principal(
        name=record.name,
        kind="api_key",
        organization=organization,
        member=record.member,
        role=record.role,
        scopes=record.scopes,
        resource_prefix=record.resource_prefix,
        permissions=record.permissions,
    )


def matches(permission: str, patterns: tuple[str, ...]) -> bool:
    """Whether any pattern covers the permission; ``*`` stands for any part."""
    return any(fnmatchcase(permission, pattern) for pattern in patterns)


def only_reads(permission: str) -> bool:
    """Whether a permission is one of those that change nothing: any replica may answer."""
    return matches(permission, _VIEW)


def patterns_of(role: str, permissions: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What a role holds: a built-in one by its name, a custom one by its list."""
    return ROLES.get(role, permissions if is_custom(role) else ())


def is_custom(role: str) -> bool:
    """Whether it is the resource name of a role of an organization's own."""
    return role.startswith("organizations/")


def role_allows(role: str, permission: str, permissions: tuple[str, ...] = ()) -> bool:
    """Whether a role holds a permission at all."""
    if permission in PLATFORM_ONLY and role != PLATFORM:
        return False
    return matches(permission, patterns_of(role, permissions))


def may_grant(giver: str, given: str) -> bool:
    """Nobody gives more than their own role; the platform role is given to nobody."""
    return given in _RANK and given != PLATFORM and _RANK[given] <= _RANK.get(giver, 0)


def covers(patterns: tuple[str, ...], wanted: str) -> bool:
    """Whether scopes hold all that another scope pattern holds.

    Matching the pattern as if it were a permission is exact: its ``*`` can only be matched by a ``*``, which then
    matches whatever the inner one stands for.
    """
    return matches(wanted, patterns)


def authorize(principal: Principal, permission: str, resource: str) -> None:
    """Raise unless the principal may use the permission on the resource (empty: on none in particular)."""
    allowed = role_allows(principal.role, permission, principal.permissions) and matches(permission, principal.scopes)
    if resource:
        everywhere = principal.role == PLATFORM and allowed and matches(permission, _PLATFORM_EVERYWHERE)
        _authorize_place(principal, resource, everywhere=everywhere and not principal.resource_prefix)
    if not allowed:
        raise PermissionDeniedError(
            "PERMISSION_MISSING",
            f"{principal.name} lacks {permission}",
            permission=permission,
            api_key=principal.name,
            role=principal.role,
        )


def _authorize_place(principal: Principal, resource: str, *, everywhere: bool) -> None:
    if everywhere:
        return
    if organization_of(resource) != principal.organization or not is_within(resource, principal.resource_prefix):
        raise not_found(resource)


def not_found(resource: str) -> DomainError:
    """The one answer for what does not exist and for what must not be seen."""
    return NotFoundError("RESOURCE_NOT_FOUND", f"{resource} does not exist", resource=resource)
