"""Keys and organizations: who may do what."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.registry.v1 import registry_pb2

from clients.cli.commands.products import span
from clients.cli.context import Session, session
from clients.sdk import ApiError, Profile

BUILT_IN: Final = ("owner", "admin", "operator", "viewer", "platform")
"""Roles that every organization has."""

auth = typer.Typer(help="API keys in the profile.", no_args_is_help=True)
org = typer.Typer(help="Organizations.", no_args_is_help=True)
key = typer.Typer(help="API keys on the server.", no_args_is_help=True)
member = typer.Typer(help="Members and their roles.", no_args_is_help=True)
role = typer.Typer(help="Roles of the organization's own.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(auth, name="auth")
    app.add_typer(org, name="org")
    app.add_typer(key, name="key")
    app.add_typer(key, name="api-key", hidden=True)
    app.add_typer(member, name="member")
    app.add_typer(role, name="role")


def _new_secret() -> tuple[str, bytes]:
    secret = secrets.token_hex(24)
    return secret, hashlib.sha256(secret.encode()).digest()


def _remember(profile: Profile, name: str, value: str, *, use: bool) -> None:
    updated = profile.with_key(name, value)
    (updated if use else updated.with_current(profile.current)).save()


@auth.command("list")
def auth_list(context: typer.Context) -> None:
    """Names of the keys in the profile; the current one is marked. Example: `swell auth list`."""
    state = session(context)
    profile = state.profile
    for name in sorted(profile.keys):
        state.output.console.print(f"{'*' if name == profile.current else ' '} {name}", highlight=False)


@auth.command("use")
def auth_use(context: typer.Context, name: str) -> None:
    """Use another key of the profile. Example: `swell auth use acme-ci`."""
    session(context).profile.with_current(name).save()


@auth.command("add")
def auth_add(context: typer.Context, name: str, value: str) -> None:
    """Store a key in the profile and use it. Example: `swell auth add acme-ci gsw_acme_ci_…`."""
    _remember(session(context).profile, name, value, use=True)


@org.command("create")
def org_create(
    context: typer.Context,
    organization: str,
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
    owner_key: Annotated[str, typer.Option(help="Id of the first owner key.")] = "owner",
) -> None:
    """Create an organization; its owner key goes into the profile as `<organization>-<owner key>`.

    Needs the platform key. Example: `swell --key platform org create acme`
    """
    state = session(context)
    secret, digest = _new_secret()
    value = f"gsw_{organization}_{owner_key}_{secret}"
    # Stored before the call: an answer that is lost must not lose the only copy of the secret.
    _remember(state.profile, f"{organization}-{owner_key}", value, use=False)
    created = state.client.registry.CreateOrganization(
        registry_pb2.CreateOrganizationRequest(
            organization_id=organization,
            organization=registry_pb2.Organization(display_name=display_name or organization),
            owner_key_id=owner_key,
            owner_key_sha256=digest,
        )
    )
    state.output.one(created)


@org.command("update")
def org_update(
    context: typer.Context,
    display_name: Annotated[str, typer.Option(help="Name for people.")],
    name: Annotated[str, typer.Option(help="Organization; the key's own when left out.")] = "",
) -> None:
    """Rename your organization for people. Example: `swell -O acme org update --display-name 'Acme Heating'`."""
    state = session(context)
    wanted = registry_pb2.Organization(name=state.organization_name(name), display_name=display_name)
    request = registry_pb2.UpdateOrganizationRequest(organization=wanted, update_mask=FieldMask(paths=["display_name"]))
    state.output.one(state.client.registry.UpdateOrganization(request))


@key.command("create")
def key_create(
    context: typer.Context,
    key_id: str,
    scope: Annotated[list[str] | None, typer.Option(help="Permission pattern, repeatable, e.g. `rollout.*`.")] = None,
    prefix: Annotated[str, typer.Option(help="Resource prefix the key is limited to.")] = "",
    member: Annotated[str, typer.Option(help="Member whose role bounds the key; default: yours.")] = "",
    days: Annotated[int, typer.Option(help="Life in days; 0 means for ever.")] = 0,
    use: Annotated[bool, typer.Option(help="Make it the current key of the profile.")] = False,
) -> None:
    """Create an API key; only its SHA-256 leaves this machine, the key goes into the profile.

    Example: `swell key create ci --scope 'artifacts.*' --scope 'rollout.rollouts.*' --days 90`
    """
    state = session(context)
    parent = state.organization_name()
    secret, digest = _new_secret()
    organization = parent.removeprefix("organizations/")
    _remember(state.profile, f"{organization}-{key_id}", f"gsw_{organization}_{key_id}_{secret}", use=False)
    wanted = registry_pb2.ApiKey(
        scopes=scope or ["*"],
        resource_prefix=prefix,
        member=state.name_in_organization("members", member) if member else "",
        secret_sha256=digest,
    )
    if days:
        expire = Timestamp()
        expire.FromDatetime(datetime.now(UTC) + timedelta(days=days))
        wanted.expire_time.CopyFrom(expire)
    created = state.client.registry.CreateApiKey(
        registry_pb2.CreateApiKeyRequest(parent=parent, api_key_id=key_id, api_key=wanted)
    )
    if use:
        state.profile.load(state.profile.path).with_current(f"{organization}-{key_id}").save()
    state.output.one(created)


@key.command("rotate")
def key_rotate(
    context: typer.Context,
    name: str,
    overlap: Annotated[str, typer.Option(help="How long the old secret is taken too: 0 to 24h.")] = "1h",
) -> None:
    """Give a key a new secret, made here. The profile gets it as `<organization>-<key>`.

    Example: `swell key rotate ci --overlap 2h`
    """
    state = session(context)
    full = state.name_in_organization("apiKeys", name)
    organization, key_id = full.split("/")[1], full.split("/")[3]
    secret, digest = _new_secret()
    value = f"gsw_{organization}_{key_id}_{secret}"
    # Kept apart until the server has it: neither a lost answer nor a refusal must cost the only copy of a secret.
    waiting = f"{organization}-{key_id}.next"
    _remember(state.profile, waiting, value, use=False)
    request = registry_pb2.RotateApiKeyRequest(name=full, secret_sha256=digest, overlap=span(overlap))
    try:
        rotated = state.client.registry.RotateApiKey(request)
    except ApiError as error:
        if error.code != "UNAVAILABLE":
            Profile.load(state.profile.path).without_key(waiting).save()
        raise
    known = Profile.load(state.profile.path).without_key(waiting)
    _remember(known, f"{organization}-{key_id}", value, use=False)
    state.output.one(rotated)


@key.command("update")
def key_update(
    context: typer.Context,
    name: str,
    scope: Annotated[list[str] | None, typer.Option(help="Permission pattern, repeatable; all of them.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Resource prefix the key is limited to.")] = None,
    days: Annotated[int | None, typer.Option(help="Life in days from now; 0 means for ever.")] = None,
) -> None:
    """Change what a key may do. Example: `swell key update ci --scope 'artifacts.*' --days 30`."""
    state = session(context)
    wanted = registry_pb2.ApiKey(name=state.name_in_organization("apiKeys", name))
    paths = []
    if scope is not None:
        wanted.scopes.extend(scope)
        paths.append("scopes")
    if prefix is not None:
        wanted.resource_prefix = prefix
        paths.append("resource_prefix")
    if days is not None:
        if days:
            wanted.expire_time.FromDatetime(datetime.now(UTC) + timedelta(days=days))
        paths.append("expire_time")
    if not paths:
        raise typer.BadParameter("nothing to change: give at least one option")
    request = registry_pb2.UpdateApiKeyRequest(api_key=wanted, update_mask=FieldMask(paths=paths))
    state.output.one(state.client.registry.UpdateApiKey(request))


@key.command("revoke")
def key_revoke(context: typer.Context, name: str) -> None:
    """Revoke a key for good; every service refuses it within 5 s. Example: `swell key revoke ci`."""
    state = session(context)
    full = state.name_in_organization("apiKeys", name)
    state.output.one(state.client.registry.RevokeApiKey(registry_pb2.RevokeApiKeyRequest(name=full)))


@member.command("create")
def member_create(context: typer.Context, member_id: str, role: str) -> None:
    """Add a member. Example: `swell member create build-server operator`."""
    state = session(context)
    wanted = registry_pb2.Member(role=_role_name(state, role))
    request = registry_pb2.CreateMemberRequest(parent=state.organization_name(), member_id=member_id, member=wanted)
    state.output.one(state.client.registry.CreateMember(request))


def _role_name(state: Session, given: str) -> str:
    """A built-in role as it is, anything else as a role of the organization's own."""
    return given if given in BUILT_IN else state.name_in_organization("roles", given)


@member.command("update")
def member_update(
    context: typer.Context,
    name: str,
    role: Annotated[str, typer.Option(help="Built-in role, or a custom one.")] = "",
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
) -> None:
    """Change a member's role or name. Example: `swell member update build-server --role field-tech`."""
    state = session(context)
    wanted = registry_pb2.Member(name=state.name_in_organization("members", name), display_name=display_name)
    paths = ["display_name"] if display_name else []
    if role:
        wanted.role = _role_name(state, role)
        paths.append("role")
    if not paths:
        raise typer.BadParameter("nothing to change: give at least one option")
    request = registry_pb2.UpdateMemberRequest(member=wanted, update_mask=FieldMask(paths=paths))
    state.output.one(state.client.registry.UpdateMember(request))


@member.command("remove")
def member_remove(context: typer.Context, name: str) -> None:
    """Remove a member and revoke its keys. Example: `swell member remove build-server`."""
    state = session(context)
    full = state.name_in_organization("members", name)
    state.client.registry.DeleteMember(registry_pb2.DeleteMemberRequest(name=full))
    state.output.text(f"{full} is removed, its keys are revoked", removed=full)


PermissionOption = Annotated[
    list[str] | None, typer.Option("--permission", help="Permission pattern, repeatable, e.g. `registry.devices.*`.")
]


@role.command("create")
def role_create(
    context: typer.Context,
    role_id: str,
    permission: PermissionOption = None,
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
) -> None:
    """Define a role; nobody can define more than they hold.

    Example: `swell role create field-tech --permission '*.get' --permission '*.list' --permission
    'registry.devices.*'`
    """
    state = session(context)
    wanted = registry_pb2.Role(
        permissions=permission or [], display_name=display_name or role_id, description=description
    )
    request = registry_pb2.CreateRoleRequest(parent=state.organization_name(), role_id=role_id, role=wanted)
    state.output.one(state.client.registry.CreateRole(request))


@role.command("update")
def role_update(
    context: typer.Context,
    name: str,
    permission: PermissionOption = None,
    display_name: Annotated[str | None, typer.Option(help="Name for people.")] = None,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
) -> None:
    """Change a role; in force everywhere within 5 s. Example: `swell role update field-tech --permission '*.get'`."""
    state = session(context)
    wanted = registry_pb2.Role(name=state.name_in_organization("roles", name))
    paths = []
    if permission is not None:
        wanted.permissions.extend(permission)
        paths.append("permissions")
    for field, value in (("display_name", display_name), ("description", description)):
        if value is not None:
            setattr(wanted, field, value)
            paths.append(field)
    if not paths:
        raise typer.BadParameter("nothing to change: give at least one option")
    request = registry_pb2.UpdateRoleRequest(role=wanted, update_mask=FieldMask(paths=paths))
    state.output.one(state.client.registry.UpdateRole(request))


@role.command("delete")
def role_delete(context: typer.Context, name: str) -> None:
    """Delete a role that no member has. Example: `swell role delete field-tech`."""
    state = session(context)
    full = state.name_in_organization("roles", name)
    state.client.registry.DeleteRole(registry_pb2.DeleteRoleRequest(name=full))
    state.output.text(f"{full} is deleted", deleted=full)
