"""`swell product`: products and how their devices are treated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Final

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.registry.v1 import registry_pb2

from clients.cli.context import session

product = typer.Typer(help="Products.", no_args_is_help=True)
policy = typer.Typer(help="How devices of a product are treated.", no_args_is_help=True)
product.add_typer(policy, name="policy")

_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_WINDOW: Final = re.compile(r"(\d\d):(\d\d)\+([0-9.]+[smh]?)(?:@(\S+))?")
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_ACTIONS: Final = {
    "pause": registry_pb2.DEFAULT_FAILURE_ACTION_PAUSE,
    "roll-back": registry_pb2.DEFAULT_FAILURE_ACTION_ROLL_BACK,
}
_LEAVES: Final = {
    "grace": registry_pb2.CertificatePolicy.EXPIRED_LEAF_GRACE,
    "strict": registry_pb2.CertificatePolicy.EXPIRED_LEAF_STRICT,
    "lenient": registry_pb2.CertificatePolicy.EXPIRED_LEAF_LENIENT,
}


def seconds(value: float) -> Duration:
    """A duration from seconds."""
    duration = Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


def span(text: str) -> Duration:
    """A duration from `90`, `90s`, `15m`, `24h` or `7d`."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"'{text}' is not a span of time such as 90s, 15m, 24h or 7d")
    return seconds(float(match.group(1)) * _UNITS[match.group(2) or "s"])


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
    wanted = registry_pb2.ConfigurationPolicy(
        poll_interval=seconds(poll_interval), allow_development_ca=allow_development_ca
    )
    if poll_jitter:
        wanted.poll_jitter.CopyFrom(seconds(poll_jitter))
    request = registry_pb2.CreateProductRequest(
        parent=state.organization_name(),
        product_id=product_id,
        product=registry_pb2.Product(display_name=display_name or product_id, policy=wanted),
    )
    state.output.one(state.client.registry.CreateProduct(request))


@product.command("update")
def product_update(
    context: typer.Context, name: str, display_name: Annotated[str, typer.Option(help="Name for people.")]
) -> None:
    """Rename a product for people. Example: `swell -O acme product update thermostat --display-name Thermostats`."""
    state = session(context)
    wanted = registry_pb2.Product(name=state.product_name(name), display_name=display_name)
    request = registry_pb2.UpdateProductRequest(product=wanted, update_mask=FieldMask(paths=["display_name"]))
    state.output.one(state.client.registry.UpdateProduct(request))


@product.command("archive")
def product_archive(context: typer.Context, name: str) -> None:
    """Take a product out of use; it must have no devices that are not retired.

    Example: `swell -O acme product archive thermostat`
    """
    state = session(context)
    request = registry_pb2.ArchiveProductRequest(name=state.product_name(name))
    state.output.one(state.client.registry.ArchiveProduct(request))


@product.command("unarchive")
def product_unarchive(context: typer.Context, name: str) -> None:
    """Take a product into use again. Example: `swell -O acme product unarchive thermostat`."""
    state = session(context)
    request = registry_pb2.UnarchiveProductRequest(name=state.product_name(name))
    state.output.one(state.client.registry.UnarchiveProduct(request))


def _window(text: str, days: str) -> registry_pb2.MaintenanceWindow:
    match = _WINDOW.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"'{text}' is not a window such as 02:00+4h@Europe/Vienna")
    hour, minute, length, zone = match.groups()
    names = [day for day in days.lower().split(",") if day]
    unknown = [day for day in names if day not in _DAYS]
    if unknown:
        raise typer.BadParameter(f"'{unknown[0]}' is no weekday; known: {', '.join(_DAYS)}")
    return registry_pb2.MaintenanceWindow(
        time_zone=zone or "",
        start_minute=int(hour) * 60 + int(minute),
        length=span(length),
        weekdays=[_DAYS.index(day) + 1 for day in names],
    )


def _quarantine(failures: int, burst: str, block_for: str) -> registry_pb2.AutomaticQuarantine:
    wanted = registry_pb2.AutomaticQuarantine(failures=failures)
    if burst:
        count, separator, window = burst.partition("/")
        if not separator or not count.isdecimal():
            raise typer.BadParameter(f"'{burst}' is not COUNT/SPAN such as 5/180s")
        wanted.burst = int(count)
        wanted.window.CopyFrom(span(window))
    if block_for:
        wanted.block_for.CopyFrom(span(block_for))
    return wanted


def _choice(value: str, known: Mapping[str, int], option: str) -> int:
    if value not in known:
        raise typer.BadParameter(f"{option} takes {' or '.join(known)}")
    return known[value]


def _signatures(
    wanted: registry_pb2.ConfigurationPolicy, signatures: int | None, binary_signatures: int | None
) -> list[str]:
    paths = []
    for field, value in (("required_signatures", signatures), ("required_binary_signatures", binary_signatures)):
        if value is not None:
            setattr(wanted, field, value)
            paths.append(field)
    return paths


def _spans(wanted: registry_pb2.ConfigurationPolicy, interval: str, jitter: str) -> list[str]:
    paths = []
    for field, text in (("poll_interval", interval), ("poll_jitter", jitter)):
        if text:
            getattr(wanted, field).CopyFrom(span(text))
            paths.append(field)
    return paths


def _certificates(
    wanted: registry_pb2.ConfigurationPolicy, expired_leaf: str, validity: str, expiring_soon: str
) -> list[str]:
    certificates = wanted.certificate_policy
    if expired_leaf:
        certificates.expired_leaf = _choice(expired_leaf, _LEAVES, "--expired-leaf")  # type: ignore[assignment]
    for field, text in (("validity", validity), ("expiring_soon", expiring_soon)):
        if text:
            getattr(certificates, field).CopyFrom(span(text))
    return ["certificate_policy"] if expired_leaf or validity or expiring_soon else []


@policy.command("set")
def policy_set(
    context: typer.Context,
    name: str,
    poll_interval: Annotated[str, typer.Option(help="Time between polls, e.g. 5m.")] = "",
    poll_jitter: Annotated[str, typer.Option(help="Random addition to it, e.g. 30s.")] = "",
    development_ca: Annotated[bool | None, typer.Option(help="Take devices of development CAs.")] = None,
    signatures: Annotated[int | None, typer.Option(help="Signatures that a bundle needs, 1 to 16.", min=0)] = None,
    binary_signatures: Annotated[int | None, typer.Option(help="Signatures that each binary needs.", min=0)] = None,
    failure_action: Annotated[str, typer.Option(help="When a gate trips: pause or roll-back.")] = "",
    window: Annotated[str, typer.Option(help="Maintenance window, e.g. 02:00+4h@Europe/Vienna.")] = "",
    window_days: Annotated[str, typer.Option(help="Its weekdays, e.g. mon,tue,sat; none means all.")] = "",
    expired_leaf: Annotated[str, typer.Option(help="Expired certificates: grace, strict or lenient.")] = "",
    validity: Annotated[str, typer.Option(help="Life of certificates issued here, e.g. 365d.")] = "",
    expiring_soon: Annotated[str, typer.Option(help="Life left that counts as expiring soon, e.g. 30d.")] = "",
    quarantine_failures: Annotated[int, typer.Option(help="Failures in a row that quarantine a device.", min=0)] = 0,
    quarantine_burst: Annotated[str, typer.Option(help="Failures in a while that do, e.g. 5/180s.")] = "",
    quarantine_for: Annotated[str, typer.Option(help="Released again after this, e.g. 24h.")] = "",
    clear: Annotated[
        list[str] | None, typer.Option(help="Unset a field, repeatable: maintenance_window, automatic_quarantine, …")
    ] = None,
) -> None:
    """Change what is given of a product's policy; the rest stays.

    A group of options (window, certificates, quarantine) is set as a whole.

    Example: `swell -O acme product policy set thermostat --window 02:00+4h@Europe/Vienna --window-days sat,sun
    --quarantine-failures 3 --quarantine-for 24h`
    """
    state = session(context)
    wanted = registry_pb2.ConfigurationPolicy()
    paths = _spans(wanted, poll_interval, poll_jitter) + _signatures(wanted, signatures, binary_signatures)
    if development_ca is not None:
        wanted.allow_development_ca = development_ca
        paths.append("allow_development_ca")
    if failure_action:
        wanted.default_failure_action = _choice(failure_action, _ACTIONS, "--failure-action")  # type: ignore[assignment]
        paths.append("default_failure_action")
    if window:
        wanted.maintenance_window.CopyFrom(_window(window, window_days))
        paths.append("maintenance_window")
    elif window_days:
        raise typer.BadParameter("--window-days goes with --window")
    paths += _certificates(wanted, expired_leaf, validity, expiring_soon)
    if quarantine_failures or quarantine_burst or quarantine_for:
        wanted.automatic_quarantine.CopyFrom(_quarantine(quarantine_failures, quarantine_burst, quarantine_for))
        paths.append("automatic_quarantine")
    both = [field for field in clear or [] if field in paths]
    if both:
        raise typer.BadParameter(f"{both[0]} is both set and cleared")
    paths += clear or []
    if not paths:
        raise typer.BadParameter("nothing to change: give at least one option")
    request = registry_pb2.UpdateProductRequest(
        product=registry_pb2.Product(name=state.product_name(name), policy=wanted),
        update_mask=FieldMask(paths=[f"policy.{path}" for path in paths]),
    )
    state.output.one(state.client.registry.UpdateProduct(request))
