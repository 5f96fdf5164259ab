"""Cohorts, devices and gateways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.registry.v1 import registry_pb2

from clients.cli.commands.products import product
from clients.cli.context import Session, session

cohort = typer.Typer(help="Cohorts.", no_args_is_help=True)
device = typer.Typer(help="Devices.", no_args_is_help=True)
gateway = typer.Typer(help="Device gateways.", no_args_is_help=True)

ReasonOption = Annotated[str, typer.Option(help="Why, for the audit.")]


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(product, name="product")
    app.add_typer(cohort, name="cohort")
    app.add_typer(device, name="device")
    app.add_typer(gateway, name="gateway")


def _labels(given: list[str] | None) -> dict[str, str]:
    labels = {}
    for text in given or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise typer.BadParameter(f"'{text}' is not KEY=VALUE")
        labels[key] = value
    return labels


LabelOption = Annotated[list[str] | None, typer.Option(help="`KEY=VALUE`, repeatable; all of them together.")]


@cohort.command("create")
def cohort_create(
    context: typer.Context,
    cohort_id: str,
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    label: LabelOption = None,
) -> None:
    """Create a cohort in the product.

    Example: `swell -O acme -P thermostat cohort create canary --label ring=0`
    """
    state = session(context)
    wanted = registry_pb2.Cohort(display_name=display_name or cohort_id, description=description, labels=_labels(label))
    request = registry_pb2.CreateCohortRequest(parent=state.product_name(), cohort_id=cohort_id, cohort=wanted)
    state.output.one(state.client.registry.CreateCohort(request))


@cohort.command("update")
def cohort_update(
    context: typer.Context,
    name: str,
    display_name: Annotated[str | None, typer.Option(help="Name for people.")] = None,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    label: LabelOption = None,
) -> None:
    """Change a cohort. Example: `swell -P thermostat cohort update canary --description 'our own offices'`."""
    state = session(context)
    wanted = registry_pb2.Cohort(name=state.name_in_product("cohorts", name))
    paths: list[str] = []
    for field, value in (("display_name", display_name), ("description", description)):
        if value is not None:
            setattr(wanted, field, value)
            paths.append(field)
    if label is not None:
        wanted.labels.update(_labels(label))
        paths.append("labels")
    if not paths:
        raise typer.BadParameter("nothing to change: give at least one option")
    request = registry_pb2.UpdateCohortRequest(cohort=wanted, update_mask=FieldMask(paths=paths))
    state.output.one(state.client.registry.UpdateCohort(request))


@device.command("create")
def device_create(
    context: typer.Context,
    device_id: str,
    cohort: Annotated[str, typer.Option(help="Cohort.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Tag, repeatable.")] = None,
    target: Annotated[str, typer.Option(help="Hardware target.")] = "",
) -> None:
    """Create a device by hand. Example: `swell -P thermostat device create SN-0042 --cohort beta --tag lab`."""
    state = session(context)
    wanted = registry_pb2.Device(
        cohort=state.name_in_product("cohorts", cohort) if cohort else "", tags=tag or [], target=target
    )
    request = registry_pb2.CreateDeviceRequest(parent=state.product_name(), device_id=device_id, device=wanted)
    state.output.one(state.client.registry.CreateDevice(request))


@device.command("update")
def device_update(
    context: typer.Context,
    name: str,
    cohort: Annotated[str | None, typer.Option(help="Move to this cohort; empty takes it out of any.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Replace the tags, repeatable.")] = None,
    target: Annotated[str | None, typer.Option(help="Hardware target.")] = None,
    description: Annotated[str | None, typer.Option(help="Description.")] = None,
    quarantine: Annotated[bool | None, typer.Option("--quarantine/--release", help="Quarantine or release.")] = None,
    reason: ReasonOption = "",
) -> None:
    """Change a device. Example: `swell device update SN-0042 --quarantine --reason 'water damage'`."""
    state = session(context)
    wanted = registry_pb2.Device(name=state.name_in_product("devices", name))
    paths: list[str] = []
    if cohort is not None:
        wanted.cohort = state.name_in_product("cohorts", cohort) if cohort else ""
        paths.append("cohort")
    if tag is not None:
        wanted.tags.extend(tag)
        paths.append("tags")
    for field, value in (("target", target), ("description", description)):
        if value is not None:
            setattr(wanted, field, value)
            paths.append(field)
    if quarantine is not None:
        wanted.quarantined, wanted.quarantine_reason = quarantine, reason
        paths += ["quarantined", "quarantine_reason"]
    if not paths:
        raise typer.BadParameter("nothing to change: give at least one option")
    request = registry_pb2.UpdateDeviceRequest(device=wanted, update_mask=FieldMask(paths=paths))
    state.output.one(state.client.registry.UpdateDevice(request))


@device.command("retire")
def device_retire(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Retire a device for good. Example: `swell -P thermostat device retire SN-0042 --reason 'water damage'`."""
    state = session(context)
    request = registry_pb2.RetireDeviceRequest(name=state.name_in_product("devices", name), reason=reason)
    state.output.one(state.client.registry.RetireDevice(request))


def _batch(context: typer.Context, names: list[str], **change: Any) -> None:
    """The same change for all of them, or for none."""
    state = session(context)
    full = [state.name_in_product("devices", name) for name in names]
    if change.get("cohort"):
        change["cohort"] = state.name_in_product("cohorts", change["cohort"])
    request = registry_pb2.BatchUpdateDevicesRequest(parent=_product_of(state, full), names=full, **change)
    answer = state.client.registry.BatchUpdateDevices(request)
    state.output.many(answer.devices, ("identifier", "cohort", "tags", "quarantined", "quarantine_reason"))


def _product_of(state: Session, names: list[str]) -> str:
    """Product of the first device; the server refuses the call when another one is elsewhere."""
    return names[0].rpartition("/devices/")[0] if names else state.product_name()


@device.command("tag")
def device_tag(
    context: typer.Context,
    names: list[str],
    add: Annotated[list[str] | None, typer.Option(help="Tag to add, repeatable.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Tag to take away, repeatable.")] = None,
) -> None:
    """Add and take away tags, up to 500 devices at once: all of them or none.

    Example: `swell -P thermostat device tag SN-0042 SN-0043 --add beta --remove alpha`
    """
    _batch(context, names, add_tags=add or [], remove_tags=remove or [])


@device.command("move")
def device_move(
    context: typer.Context,
    names: list[str],
    cohort: Annotated[str, typer.Option(help="Cohort of the product; empty takes them out of any.")],
) -> None:
    """Move up to 500 devices to a cohort. Example: `swell -P thermostat device move SN-0042 --cohort beta`."""
    _batch(context, names, cohort=cohort)


@device.command("quarantine")
def device_quarantine(
    context: typer.Context, names: list[str], reason: Annotated[str, typer.Option(help="Why.")]
) -> None:
    """Quarantine up to 500 devices: they check in and get nothing.

    Example: `swell -P thermostat device quarantine SN-0042 --reason 'smells of smoke'`
    """
    _batch(
        context,
        names,
        quarantine=registry_pb2.BatchUpdateDevicesRequest.QUARANTINE_SET,
        quarantine_reason=reason,
    )


@device.command("release")
def device_release(context: typer.Context, names: list[str]) -> None:
    """Release up to 500 devices from quarantine. Example: `swell -P thermostat device release SN-0042`."""
    _batch(context, names, quarantine=registry_pb2.BatchUpdateDevicesRequest.QUARANTINE_RELEASED)


def _public_key(path: Path) -> bytes:
    """Raw bytes of an Ed25519 public key in PEM."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise typer.BadParameter(f"{path} holds no Ed25519 public key in PEM")
    return key.public_bytes_raw()


KeyOption = Annotated[Path, typer.Option("--public-key", help="Ed25519 public key, PEM.", exists=True)]


@gateway.command("create")
def gateway_create(context: typer.Context, gateway_id: str, public_key: KeyOption) -> None:
    """Register a gateway of your own. Example: `swell -O acme gateway create edge-1 --public-key edge-1.pub.pem`."""
    state = session(context)
    wanted = registry_pb2.Gateway(public_key=_public_key(public_key))
    request = registry_pb2.CreateGatewayRequest(parent=state.organization_name(), gateway_id=gateway_id, gateway=wanted)
    state.output.one(state.client.registry.CreateGateway(request))


def _update_gateway(context: typer.Context, name: str, path: str, **values: Any) -> None:
    state = session(context)
    wanted = registry_pb2.Gateway(name=state.name_in_organization("gateways", name), **values)
    request = registry_pb2.UpdateGatewayRequest(gateway=wanted, update_mask=FieldMask(paths=[path]))
    state.output.one(state.client.registry.UpdateGateway(request))


@gateway.command("disable")
def gateway_disable(context: typer.Context, name: str) -> None:
    """Refuse what a gateway says from now on. Example: `swell -O acme gateway disable edge-1`."""
    _update_gateway(context, name, "disabled", disabled=True)


@gateway.command("enable")
def gateway_enable(context: typer.Context, name: str) -> None:
    """Take what a gateway says again. Example: `swell -O acme gateway enable edge-1`."""
    _update_gateway(context, name, "disabled", disabled=False)


@gateway.command("rotate")
def gateway_rotate(context: typer.Context, name: str, public_key: KeyOption) -> None:
    """Give a gateway another key; records signed by the old one are refused.

    Example: `swell -O acme gateway rotate edge-1 --public-key edge-1.new.pub.pem`
    """
    _update_gateway(context, name, "public_key", public_key=_public_key(public_key))
