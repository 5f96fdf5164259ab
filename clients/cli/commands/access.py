"""Keys and organizations: who may do what."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.registry.v1 import registry_pb2

from clients.cli.context import session
from clients.sdk import Profile

auth = typer.Typer(help="API keys in the profile.", no_args_is_help=True)
org = typer.Typer(help="Organizations.", no_args_is_help=True)
key = typer.Typer(help="API keys on the server.", no_args_is_help=True)
member = typer.Typer(help="Members and their roles.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(auth, name="auth")
    app.add_typer(org, name="org")
    app.add_typer(key, name="key")
    app.add_typer(member, name="member")


def _new_secret() -> tuple[str, bytes]:
    secret = secrets.token_hex(24)
    return secret, hashlib.sha256(secret.encode()).digest()


def _remember(profile: Profile, name: str, value: str, *, use: bool) -> None:
    updated = profile.with_key(name, value)
    (updated if use else updated.with_current(profile.current)).save()


@auth.command("list")
def auth_list(context: typer.Context) -> None:
    """Names of the keys in the profile; the current one is marked."""
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
    """Store a key in the profile and use it."""
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


@key.command("revoke")
def key_revoke(context: typer.Context, name: str) -> None:
    """Revoke a key for good; every service refuses it within 5 s."""
    state = session(context)
    full = state.name_in_organization("apiKeys", name)
    state.output.one(state.client.registry.RevokeApiKey(registry_pb2.RevokeApiKeyRequest(name=full)))


@member.command("create")
def member_create(context: typer.Context, member_id: str, role: str) -> None:
    """Add a member. Example: `swell member create build-server operator`."""
    state = session(context)
    request = registry_pb2.CreateMemberRequest(
        parent=state.organization_name(), member_id=member_id, member=registry_pb2.Member(role=role)
    )
    state.output.one(state.client.registry.CreateMember(request))
