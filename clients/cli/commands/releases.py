"""Releases of a cohort's graph, and dry runs of what devices would get."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.releases.v1 import releases_pb2

from clients.cli.context import session

release = typer.Typer(help="Releases.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(release, name="release")


@release.command("create")
def release_create(
    context: typer.Context,
    release_id: str,
    cohort: Annotated[str, typer.Option(help="Cohort.")],
    bundle: Annotated[str, typer.Option(help="Bundle.")],
    version: Annotated[str, typer.Option(help="SemVer, for devices that report only a version.")] = "",
    version_requirement: Annotated[str, typer.Option(help="Requirement on the device's version.")] = "",
    required: Annotated[bool, typer.Option(help="Must be passed through.")] = False,
    share_ppm: Annotated[int, typer.Option(help="Share of the cohort, parts per million.")] = 0,
) -> None:
    """Make a plain release the latest of a cohort.

    Example: `swell release create 1-1-0 --cohort beta --bundle fw-1-1-0 --version 1.1.0
    --version-requirement '< 1.1.0'`
    """
    state = session(context)
    wanted = releases_pb2.Release(
        bundle=state.name_in_product("bundles", bundle),
        version=version,
        version_requirement=version_requirement,
        required=required,
    )
    if share_ppm:
        wanted.phase.share_ppm = share_ppm
    request = releases_pb2.CreateReleaseRequest(
        parent=state.name_in_product("cohorts", cohort), release_id=release_id, release=wanted
    )
    state.output.one(state.client.releases.CreateRelease(request))


@release.command("disable")
def release_disable(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Full resource name.")],
    enable: Annotated[bool, typer.Option("--enable", help="Enable it again.")] = False,
) -> None:
    """Take a release out of resolution, or put it back."""
    state = session(context)
    request = releases_pb2.UpdateReleaseRequest(
        release=releases_pb2.Release(name=name, disabled=not enable), update_mask=FieldMask(paths=["disabled"])
    )
    state.output.one(state.client.releases.UpdateRelease(request))


@release.command("resolve")
def release_resolve(context: typer.Context, device: list[str]) -> None:
    """Dry run: what these devices would be offered now, and why."""
    state = session(context)
    names = [state.name_in_product("devices", name) for name in device]
    request = releases_pb2.ResolveDevicesRequest(parent=state.product_name(), devices=names)
    for resolution in state.client.releases.ResolveDevices(request).resolutions:
        state.output.one(resolution)
