"""Bundle overrides: chosen devices get a bundle for a time, and releases are hidden from them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.releases.v1 import releases_pb2

from clients.cli.commands.releases import moment
from clients.cli.context import session

override = typer.Typer(help="Bundle overrides.", no_args_is_help=True)

Devices = Annotated[list[str], typer.Argument(help="Devices.")]
Etag = Annotated[str, typer.Option(help="Refuse when it has changed since it was read.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(override, name="override")


@override.command("create")
def override_create(
    context: typer.Context,
    override_id: str,
    bundle: Annotated[str, typer.Option(help="Bundle.")],
    device: Annotated[list[str] | None, typer.Option(help="Device; may be given often.")] = None,
    start: Annotated[str, typer.Option(help="Active from, such as 2031-05-01T06:00:00Z; default: now.")] = "",
    end: Annotated[str, typer.Option(help="Active until; default: open-ended.")] = "",
) -> None:
    """Give devices a bundle, whatever the releases of their cohort say.

    Example: `swell override create lab --bundle fw-2-0-0 --device SN-0042 --end 2031-05-01T18:00:00Z`
    """
    state = session(context)
    wanted = releases_pb2.BundleOverride(
        bundle=state.name_in_product("bundles", bundle),
        devices=[state.name_in_product("devices", name) for name in device or ()],
        start_time=moment(start) if start else None,
        end_time=moment(end) if end else None,
    )
    request = releases_pb2.CreateBundleOverrideRequest(
        parent=state.product_name(), bundle_override_id=override_id, bundle_override=wanted
    )
    state.output.one(state.client.releases.CreateBundleOverride(request))


@override.command("update")
def override_update(
    context: typer.Context,
    name: str,
    bundle: Annotated[str, typer.Option(help="Bundle.")] = "",
    device: Annotated[list[str] | None, typer.Option(help="All devices anew; may be given often.")] = None,
    start: Annotated[str | None, typer.Option(help="Active from; empty means now.")] = None,
    end: Annotated[str | None, typer.Option(help="Active until; empty means open-ended.")] = None,
    etag: Etag = "",
) -> None:
    """Change an override, at any time; only what is given changes.

    Example: `swell override update lab --end 2031-05-02T18:00:00Z`
    """
    state = session(context)
    given: dict[str, Any] = {}
    if bundle:
        given["bundle"] = state.name_in_product("bundles", bundle)
    if device:
        given["devices"] = [state.name_in_product("devices", one) for one in device]
    if start is not None:
        given["start_time"] = moment(start) if start else None
    if end is not None:
        given["end_time"] = moment(end) if end else None
    if not given:
        raise typer.BadParameter("say what to change, see --help")
    wanted = releases_pb2.BundleOverride(name=state.name_in_product("bundleOverrides", name), etag=etag, **given)
    request = releases_pb2.UpdateBundleOverrideRequest(bundle_override=wanted, update_mask=FieldMask(paths=list(given)))
    state.output.one(state.client.releases.UpdateBundleOverride(request))


@override.command("add-devices")
def override_add_devices(context: typer.Context, name: str, device: Devices, etag: Etag = "") -> None:
    """Add devices. Example: `swell override add-devices lab SN-0043 SN-0044`."""
    state = session(context)
    request = releases_pb2.AddDevicesRequest(
        name=state.name_in_product("bundleOverrides", name),
        devices=[state.name_in_product("devices", one) for one in device],
        etag=etag,
    )
    state.output.one(state.client.releases.AddDevices(request))


@override.command("remove-devices")
def override_remove_devices(context: typer.Context, name: str, device: Devices, etag: Etag = "") -> None:
    """Take devices out. Example: `swell override remove-devices lab SN-0043`."""
    state = session(context)
    request = releases_pb2.RemoveDevicesRequest(
        name=state.name_in_product("bundleOverrides", name),
        devices=[state.name_in_product("devices", one) for one in device],
        etag=etag,
    )
    state.output.one(state.client.releases.RemoveDevices(request))


@override.command("list")
def override_list(context: typer.Context) -> None:
    """Overrides of the product. Example: `swell -O acme -P thermostat override list`."""
    state = session(context)
    request = releases_pb2.ListBundleOverridesRequest(parent=state.product_name(), page_size=500)
    found = state.client.pages(state.client.releases.ListBundleOverrides, request, "bundle_overrides")
    state.output.many(found, ("name", "bundle", "start_time", "end_time", "devices"))


@override.command("delete")
def override_delete(context: typer.Context, name: str, etag: Etag = "") -> None:
    """End an override; its devices follow their releases again. Example: `swell override delete lab`."""
    state = session(context)
    full = state.name_in_product("bundleOverrides", name)
    state.client.releases.DeleteBundleOverride(releases_pb2.DeleteBundleOverrideRequest(name=full, etag=etag))
    state.output.text(f"deleted {full}", deleted=full)
