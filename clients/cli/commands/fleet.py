"""Products, cohorts and devices."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.registry.v1 import registry_pb2

from clients.cli.context import session

product = typer.Typer(help="Products.", no_args_is_help=True)
cohort = typer.Typer(help="Cohorts.", no_args_is_help=True)
device = typer.Typer(help="Devices.", no_args_is_help=True)

ReasonOption = Annotated[str, typer.Option(help="Why, for the audit.")]


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(product, name="product")
    app.add_typer(cohort, name="cohort")
    app.add_typer(device, name="device")


def seconds(value: float) -> Duration:
    """A duration from seconds."""
    duration = Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


@product.command("create")
def product_create(
    context: typer.Context,
    product_id: str,
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
    poll_interval: Annotated[float, typer.Option(help="Seconds between polls.")] = 60.0,
    poll_jitter: Annotated[float, typer.Option(help="Random addition, seconds; 0 means a tenth.")] = 0.0,
    allow_development_ca: Annotated[bool, typer.Option(help="Take devices of development CAs.")] = False,
) -> None:
    """Create a product. Example: `swell -O acme product create thermostat --poll-interval 300`."""
    state = session(context)
    policy = registry_pb2.ConfigurationPolicy(
        poll_interval=seconds(poll_interval), allow_development_ca=allow_development_ca
    )
    if poll_jitter:
        policy.poll_jitter.CopyFrom(seconds(poll_jitter))
    request = registry_pb2.CreateProductRequest(
        parent=state.organization_name(),
        product_id=product_id,
        product=registry_pb2.Product(display_name=display_name or product_id, policy=policy),
    )
    state.output.one(state.client.registry.CreateProduct(request))


@cohort.command("create")
def cohort_create(
    context: typer.Context, cohort_id: str, display_name: Annotated[str, typer.Option(help="Name for people.")] = ""
) -> None:
    """Create a cohort in the product. Example: `swell -O acme -P thermostat cohort create canary`."""
    state = session(context)
    request = registry_pb2.CreateCohortRequest(
        parent=state.product_name(),
        cohort_id=cohort_id,
        cohort=registry_pb2.Cohort(display_name=display_name or cohort_id),
    )
    state.output.one(state.client.registry.CreateCohort(request))


@device.command("create")
def device_create(
    context: typer.Context,
    device_id: str,
    cohort: Annotated[str, typer.Option(help="Cohort.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Tag, repeatable.")] = None,
    target: Annotated[str, typer.Option(help="Hardware target.")] = "",
) -> None:
    """Create a device by hand."""
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
    """Retire a device for good."""
    state = session(context)
    request = registry_pb2.RetireDeviceRequest(name=state.name_in_product("devices", name), reason=reason)
    state.output.one(state.client.registry.RetireDevice(request))
