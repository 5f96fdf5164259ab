"""Decisions about members, their roles and their API keys.

Rules: nobody gives, defines or takes away a role that holds more than their own, nor a scope or a reach that their key
lacks; names of built-in roles are taken; a role that a member has cannot be deleted; an organization always keeps one
key of an owner that can manage it for ever; revoked is final.

A rotation leaves the secret before it valid for a while: every service compares its end with the time of the call, so
no event ends it. A second rotation inside that while ends the oldest secret at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Final

from google.protobuf.empty_pb2 import Empty
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb
from msgspec.structs import replace

from libs.errors import FailedPreconditionError, PermissionDeniedError, check_etag
from libs.eventlog import Context, Decision, NewEvent, Public
from libs.names import is_within, organization_of
from libs.rpc.access import ROLES, KeyRecord, covers, is_custom, may_grant, not_found, patterns_of
from services.registry.domain import commands as ask
from services.registry.domain import rules
from services.registry.domain.devices import existing, next_etag, refuse_existing
from services.registry.domain.rules import Quotas, check_quota, check_text, invalid, timestamp, wrong_state
from services.registry.domain.state import State, drop, find, known_key, put, shelf

MEMBER_FIELDS: Final = ("role", "display_name")
ROLE_FIELDS: Final = ("display_name", "description", "permissions")
KEY_FIELDS: Final = ("scopes", "resource_prefix", "expire_time")
PATTERN_LIMIT: Final = 64
OVERLAP_DEFAULT_MS: Final = 3600 * 1000
OVERLAP_MOST_MS: Final = 24 * 3600 * 1000
_PATTERN: Final = re.compile(r"\*|(?:\*|[a-z][A-Za-z]*)(?:\.(?:\*|[a-z][A-Za-z]*)){1,2}")


def member_event(member: pb.Member, change: str) -> NewEvent:
    """A member's new image."""
    image = ev.MemberChanged(member=member, change=change)
    return NewEvent(
        organization_of(member.name), member.name, ev.MemberSaved(member=member), (Public(member.name, image),)
    )


def key_event(key: pb.ApiKey, change: str) -> NewEvent:
    """A key's new image."""
    image = ev.ApiKeyChanged(api_key=key, change=change)
    return NewEvent(organization_of(key.name), key.name, ev.ApiKeySaved(api_key=key), (Public(key.name, image),))


def _role_event(role: pb.Role, change: str) -> NewEvent:
    image = ev.RoleChanged(role=role, change=change)
    private = ev.RoleDeleted(role=role) if change == "role.deleted" else ev.RoleSaved(role=role)
    return NewEvent(organization_of(role.name), role.name, private, (Public(role.name, image),))


# What one may give.


def check_patterns(field: str, patterns: Sequence[str]) -> None:
    """Refuse what are no permission patterns."""
    if not patterns:
        raise invalid(field, "are empty: nothing could be done with that")
    if len(patterns) > PATTERN_LIMIT:
        raise invalid(field, f"are more than {PATTERN_LIMIT}")
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise invalid(field, f"hold '{pattern[:80]}', which is not a permission pattern")


def check_held(giver: KeyRecord | None, patterns: Iterable[str]) -> None:
    """Refuse any pattern that the caller's own role or key does not hold."""
    for pattern in patterns:
        if giver is None or not covers(patterns_of(giver.role, giver.permissions), pattern):
            raise PermissionDeniedError(
                "ROLE_ABOVE_OWN",
                f"the caller's own role does not hold '{pattern}'",
                permission=pattern,
                own_role=giver.role if giver else "",
            )
        if not covers(giver.scopes, pattern):
            raise PermissionDeniedError(
                "SCOPE_ABOVE_OWN", f"the caller's key does not hold '{pattern}' itself", permission=pattern
            )


def check_role(state: State, giver: KeyRecord | None, role: str, field: str) -> None:
    """Refuse an unknown role, and one above the giver's own."""
    if is_custom(role):
        permissions = tuple(existing(state.roles, role).permissions)
        allowed = giver is not None and all(covers(patterns_of(giver.role, giver.permissions), p) for p in permissions)
    elif role not in ROLES:
        raise invalid(field, "must be owner, admin, operator, viewer or the name of a custom role", value=role[:40])
    elif giver is not None and is_custom(giver.role):
        # Ranks order built-in roles only; a custom one is measured by what it holds, and is never an owner's.
        allowed = may_grant("admin", role) and all(covers(giver.permissions, pattern) for pattern in ROLES[role])
    else:
        allowed = giver is not None and may_grant(giver.role, role)
    if not allowed:
        raise PermissionDeniedError(
            "ROLE_ABOVE_OWN",
            f"the role '{role}' is more than the caller's own",
            role=role,
            own_role=giver.role if giver else "",
        )


def _check_given_role(state: State, giver: KeyRecord | None, role: str, organization: str) -> None:
    """A role that a member gets: known, of this organization, and all within what the giver's key may do."""
    if is_custom(role) and not role.startswith(f"organizations/{organization}/roles/"):
        raise not_found(role)
    check_role(state, giver, role, "member.role")
    held = find(state.roles, role)
    check_scopes_held(giver, ROLES[role] if held is None else held.permissions)


def check_scopes_held(giver: KeyRecord | None, patterns: Iterable[str]) -> None:
    """Refuse any pattern that the caller's key does not hold, whatever its role."""
    for pattern in patterns:
        if giver is None or not covers(giver.scopes, pattern):
            raise PermissionDeniedError(
                "SCOPE_ABOVE_OWN", f"the caller's key does not hold '{pattern}' itself", permission=pattern
            )


def _check_reach(giver: KeyRecord | None, key: pb.ApiKey, organization: str) -> None:
    """Refuse malformed scopes and prefixes, and any right or life that the giving key does not have itself."""
    prefix = key.resource_prefix
    check_patterns("api_key.scopes", key.scopes)
    check_scopes_held(giver, key.scopes)
    if prefix and not is_within(prefix, f"organizations/{organization}"):
        raise invalid("api_key.resource_prefix", f"must be within organizations/{organization}")
    if giver is not None and not is_within(prefix, giver.resource_prefix):
        raise PermissionDeniedError(
            "PREFIX_ABOVE_OWN", "the prefix reaches further than the caller's own key", prefix=prefix
        )
    expire_ms = key.expire_time.ToMilliseconds() if key.HasField("expire_time") else 0
    if giver is not None and giver.expire_ms and (not expire_ms or expire_ms > giver.expire_ms):
        raise PermissionDeniedError(
            "EXPIRY_BEYOND_OWN", "the key would outlive the caller's own: give it an earlier end", own_key=giver.name
        )


# Who governs.


def _governs(state: State, name: str) -> bool:
    """Whether a key can manage its organization for ever."""
    key = known_key(state, name)
    return (
        key is not None
        and not key.revoked
        and key.role == "owner"
        and not key.expire_ms
        and not key.resource_prefix
        and covers(key.scopes, "registry.apiKeys.create")
    )


def _is_governed(state: State, organization: str) -> bool:
    return any(_governs(state, name) for name in shelf(state.api_keys, f"organizations/{organization}/apiKeys"))


def _keep_governed(before: State, after: State, organization: str, reason: str, resource: str) -> None:
    if _is_governed(before, organization) and not _is_governed(after, organization):
        raise FailedPreconditionError(
            reason,
            f"without {resource} nobody could manage the organization: it has the last key of an owner",
            resource=resource,
        )


# Members.


def create_member(state: State, command: ask.CreateMember, ctx: Context, quotas: Quotas) -> Decision:
    """Someone with a role."""
    _check_given_role(state, known_key(state, ctx.principal), command.member.role, ctx.organization)
    check_text("member.display_name", command.member.display_name, rules.NAME_LIMIT)
    name = f"{command.parent}/members/{command.member_id}"
    members = shelf(state.members, f"{command.parent}/members")
    refuse_existing(members, name)
    check_quota("members", len(members), quotas.members)
    member = pb.Member(
        name=name,
        role=command.member.role,
        display_name=command.member.display_name,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    return Decision(events=(member_event(member, "member.created"),), result=member)


def update_member(state: State, command: ask.UpdateMember, ctx: Context, _quotas: Quotas) -> Decision:
    """Another role or name; both the old role and the new one must be within the giver's own."""
    current = existing(state.members, command.member.name)
    check_etag(command.member.etag, current.etag, current.name)
    changed = rules.masked(current, command.member, command.paths, MEMBER_FIELDS, "a member")
    check_text("member.display_name", changed.display_name, rules.NAME_LIMIT)
    giver = known_key(state, ctx.principal)
    check_role(state, giver, current.role, "member.role")
    if changed.role != current.role:
        _check_given_role(state, giver, changed.role, ctx.organization)
    if changed == current:
        return Decision(result=current)
    changed.etag = next_etag(ctx, current.name)
    after = replace(state, members=put(state.members, changed.name, changed))
    _keep_governed(state, after, ctx.organization, "LAST_OWNER", current.name)
    return Decision(events=(member_event(changed, "member.updated"),), result=changed)


def delete_member(state: State, command: ask.DeleteMember, ctx: Context, _quotas: Quotas) -> Decision:
    """Out of the organization, with all of its keys."""
    current = existing(state.members, command.name)
    check_etag(command.etag, current.etag, current.name)
    check_role(state, known_key(state, ctx.principal), current.role, "name")
    after = replace(state, members=drop(state.members, current.name))
    _keep_governed(state, after, ctx.organization, "LAST_OWNER", current.name)
    keys = shelf(state.api_keys, f"organizations/{ctx.organization}/apiKeys")
    events = [
        key_event(_revoked(key, ctx), "api_key.revoked")
        for _, key in sorted(keys.items())
        if key.member == current.name and not key.revoked
    ]
    image = ev.MemberChanged(member=current, change="member.removed")
    removed = ev.MemberRemoved(member=current)
    events.append(NewEvent(ctx.organization, current.name, removed, (Public(current.name, image),)))
    return Decision(events=tuple(events), result=Empty())


# Roles.


def _cleaned(role: pb.Role, giver: KeyRecord | None) -> None:
    """Check and normalize, in place on the caller's own copy."""
    check_text("role.display_name", role.display_name, rules.NAME_LIMIT)
    check_text("role.description", role.description, rules.TEXT_LIMIT)
    check_patterns("role.permissions", role.permissions)
    check_held(giver, role.permissions)
    wanted = sorted(set(role.permissions))
    del role.permissions[:]
    role.permissions.extend(wanted)


def create_role(state: State, command: ask.CreateRole, ctx: Context, quotas: Quotas) -> Decision:
    """A named list of permissions."""
    if command.parent not in state.organizations:
        raise not_found(command.parent)
    if command.role_id in ROLES:
        raise invalid("role_id", f"'{command.role_id}' is a built-in role", value=command.role_id)
    name = f"{command.parent}/roles/{command.role_id}"
    roles = shelf(state.roles, f"{command.parent}/roles")
    refuse_existing(roles, name)
    check_quota("roles", len(roles), quotas.roles)
    role = pb.Role(
        name=name,
        display_name=command.role.display_name,
        description=command.role.description,
        permissions=command.role.permissions,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    _cleaned(role, known_key(state, ctx.principal))
    return Decision(events=(_role_event(role, "role.created"),), result=role)


def update_role(state: State, command: ask.UpdateRole, ctx: Context, _quotas: Quotas) -> Decision:
    """Other permissions; who lacks some of the old ones may not take them away from others either."""
    current = existing(state.roles, command.role.name)
    check_etag(command.role.etag, current.etag, current.name)
    changed = rules.masked(current, command.role, command.paths, ROLE_FIELDS, "a role")
    giver = known_key(state, ctx.principal)
    check_held(giver, current.permissions)
    _cleaned(changed, giver)
    if changed == current:
        return Decision(result=current)
    changed.etag = next_etag(ctx, current.name)
    return Decision(events=(_role_event(changed, "role.updated"),), result=changed)


def delete_role(state: State, command: ask.DeleteRole, ctx: Context, _quotas: Quotas) -> Decision:
    """Only when nobody has it."""
    current = existing(state.roles, command.name)
    check_etag(command.etag, current.etag, current.name)
    check_held(known_key(state, ctx.principal), current.permissions)
    members = shelf(state.members, f"organizations/{ctx.organization}/members").values()
    holders = sum(member.role == current.name for member in members)
    if holders:
        raise FailedPreconditionError(
            "ROLE_IN_USE",
            f"{current.name} is the role of {holders} members: give them another one first",
            resource=current.name,
            members=holders,
        )
    return Decision(events=(_role_event(current, "role.deleted"),), result=Empty())


# API keys.


def _changed_key(key: pb.ApiKey, ctx: Context) -> pb.ApiKey:
    changed = pb.ApiKey()
    changed.CopyFrom(key)
    changed.etag = next_etag(ctx, key.name)
    return changed


def _revoked(key: pb.ApiKey, ctx: Context) -> pb.ApiKey:
    revoked = _changed_key(key, ctx)
    revoked.revoked = True
    return revoked


def _check_secret(field: str, secret_sha256: bytes) -> None:
    if len(secret_sha256) != hashlib.sha256().digest_size:
        raise invalid(field, "must be the 32 bytes of the secret's SHA-256")


def _check_expiry(key: pb.ApiKey, now_ms: int) -> None:
    if key.HasField("expire_time") and key.expire_time.ToMilliseconds() <= now_ms:
        raise invalid("api_key.expire_time", "has passed already")


def _check_over(state: State, giver: KeyRecord | None, name: str) -> None:
    """Refuse to touch the key of someone whose role is above one's own; one's own key is always one's own."""
    target = known_key(state, name)
    if target is not None and (giver is None or giver.name != name):
        check_role(state, giver, target.role, "name")


def _check_in_use(key: pb.ApiKey, now_ms: int) -> None:
    if key.revoked:
        raise wrong_state(key.name, "is revoked")
    if key.HasField("expire_time") and key.expire_time.ToMilliseconds() <= now_ms:
        raise wrong_state(key.name, "has expired")


def create_api_key(state: State, command: ask.CreateApiKey, ctx: Context, quotas: Quotas) -> Decision:
    """A key of a member whose role is within the caller's own."""
    wanted = command.api_key
    giver = known_key(state, ctx.principal)
    _check_secret("api_key.secret_sha256", wanted.secret_sha256)
    _check_expiry(wanted, ctx.now_ms)
    member_name = wanted.member or (giver.member if giver else "")
    member = find(state.members, member_name)
    if member is None or not member_name.startswith(f"{command.parent}/members/"):
        raise not_found(member_name)
    check_role(state, giver, member.role, "api_key.member")
    _check_reach(giver, wanted, ctx.organization)
    name = f"{command.parent}/apiKeys/{command.api_key_id}"
    keys = shelf(state.api_keys, f"{command.parent}/apiKeys")
    refuse_existing(keys, name)
    check_quota("api_keys", sum(not key.revoked for key in keys.values()), quotas.api_keys)
    key = pb.ApiKey(
        name=name,
        member=member_name,
        scopes=sorted(set(wanted.scopes)),
        resource_prefix=wanted.resource_prefix,
        secret_sha256=wanted.secret_sha256,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    if wanted.HasField("expire_time"):
        key.expire_time.CopyFrom(wanted.expire_time)
    return Decision(events=(key_event(key, "api_key.created"),), result=key)


def update_api_key(state: State, command: ask.UpdateApiKey, ctx: Context, _quotas: Quotas) -> Decision:
    """Other scopes, reach or expiry: never more than the caller's own key has."""
    current = existing(state.api_keys, command.api_key.name)
    check_etag(command.api_key.etag, current.etag, current.name)
    changed = rules.masked(current, command.api_key, command.paths, KEY_FIELDS, "an API key")
    _check_in_use(current, ctx.now_ms)
    giver = known_key(state, ctx.principal)
    _check_over(state, giver, current.name)
    _check_reach(giver, changed, ctx.organization)
    _check_expiry(changed, ctx.now_ms)
    scopes = sorted(set(changed.scopes))
    del changed.scopes[:]
    changed.scopes.extend(scopes)
    if changed == current:
        return Decision(result=current)
    changed.etag = next_etag(ctx, current.name)
    after = replace(state, api_keys=put(state.api_keys, current.name, changed))
    _keep_governed(state, after, ctx.organization, "LAST_OWNER_KEY", current.name)
    return Decision(events=(key_event(changed, "api_key.updated"),), result=changed)


def rotate_api_key(state: State, command: ask.RotateApiKey, ctx: Context, _quotas: Quotas) -> Decision:
    """A new secret. Whoever sets it can use the key, so it must not hold more than the caller's."""
    current = existing(state.api_keys, command.name)
    check_etag(command.etag, current.etag, current.name)
    _check_secret("secret_sha256", command.secret_sha256)
    overlap_ms = OVERLAP_DEFAULT_MS if command.overlap_ms is None else command.overlap_ms
    if not 0 <= overlap_ms <= OVERLAP_MOST_MS:
        raise invalid("overlap", "must be between 0 and 24 hours")
    _check_in_use(current, ctx.now_ms)
    giver = known_key(state, ctx.principal)
    _check_over(state, giver, current.name)
    _check_reach(giver, current, ctx.organization)
    if command.secret_sha256 in (current.secret_sha256, current.previous_secret_sha256):
        raise invalid("secret_sha256", "is that of a secret this key has or had: make a new one")
    changed = _changed_key(current, ctx)
    changed.secret_sha256 = command.secret_sha256
    changed.ClearField("previous_secret_sha256")
    changed.ClearField("previous_expire_time")
    if overlap_ms:
        changed.previous_secret_sha256 = current.secret_sha256
        changed.previous_expire_time.FromMilliseconds(ctx.now_ms + overlap_ms)
    return Decision(events=(key_event(changed, "api_key.rotated"),), result=changed)


def revoke_api_key(state: State, command: ask.RevokeApiKey, ctx: Context, _quotas: Quotas) -> Decision:
    """For good; a repeat changes nothing."""
    current = existing(state.api_keys, command.name)
    if current.revoked:
        return Decision(result=current)
    check_etag(command.etag, current.etag, current.name)
    _check_over(state, known_key(state, ctx.principal), current.name)
    revoked = _revoked(current, ctx)
    after = replace(state, api_keys=put(state.api_keys, current.name, revoked))
    _keep_governed(state, after, ctx.organization, "LAST_OWNER_KEY", current.name)
    return Decision(events=(key_event(revoked, "api_key.revoked"),), result=revoked)
