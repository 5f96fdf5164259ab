"""Bundle overrides, pure: every field may change at any time, devices come and go one by one.

An override begins now unless said otherwise, and ends after it begins. It names devices of its own product; adding one
that is in it, or taking out one that is not, changes nothing. Overlaps are allowed: resolution takes the latest start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import immutables
from google.protobuf.empty_pb2 import Empty
from groundswell.releases.v1 import events_pb2 as events
from groundswell.releases.v1 import releases_pb2 as pb

from libs.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, check_etag
from libs.eventlog import Context, Decision, NewEvent, Public
from libs.names import product_of
from services.releases.graph import check_size, check_time, timestamp

Overrides = immutables.Map[str, pb.BundleOverride]
_PATHS: Final = ("bundle", "start_time", "end_time", "devices")


@dataclass(frozen=True, slots=True)
class CreateOverride:
    """A bundle override; its bundle was looked up."""

    override: pb.BundleOverride


@dataclass(frozen=True, slots=True)
class UpdateOverride:
    """New values for named fields; a new bundle was looked up."""

    override: pb.BundleOverride
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChangeDevices:
    """Some devices come or go."""

    name: str
    etag: str
    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeleteOverride:
    """End an override."""

    name: str
    etag: str


def create(overrides: Overrides, command: CreateOverride, ctx: Context) -> Decision:
    """A new one."""
    override = _copy(command.override)
    if override.name in overrides:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{override.name} exists already", resource=override.name)
    if not override.HasField("start_time"):
        override.start_time.CopyFrom(timestamp(ctx.now_ms))
    override.create_time.CopyFrom(timestamp(ctx.now_ms))
    return _saved(override, "bundle_override.created", ctx)


def update(overrides: Overrides, command: UpdateOverride, ctx: Context) -> Decision:
    """Change what the mask names; what it leaves as it was writes nothing."""
    known = _find(overrides, command.override.name)
    check_etag(command.override.etag, known.etag, known.name)
    wrong = [path for path in command.paths if path not in _PATHS]
    if wrong or not command.paths:
        raise InvalidArgumentError(
            "INVALID_FIELD",
            f"update_mask may name {', '.join(_PATHS)}; not {', '.join(wrong) or 'nothing'}",
            field="update_mask",
        )
    changed = _copy(known)
    for path in command.paths:
        changed.ClearField(path)  # type: ignore[arg-type]
    given = pb.BundleOverride()
    given.CopyFrom(command.override)
    for path in set(_PATHS).difference(command.paths):
        given.ClearField(path)  # type: ignore[arg-type]
    given.name, given.etag = changed.name, changed.etag
    given.ClearField("create_time")
    changed.MergeFrom(given)
    if not changed.HasField("start_time"):
        changed.start_time.CopyFrom(timestamp(ctx.now_ms))
    return _changed(known, changed, ctx)


def change_devices(overrides: Overrides, command: ChangeDevices, ctx: Context) -> Decision:
    """Devices one by one."""
    known = _find(overrides, command.name)
    check_etag(command.etag, known.etag, known.name)
    _check_devices((*command.add, *command.remove), product_of(known.name), "devices")
    changed = _copy(known)
    del changed.devices[:]
    changed.devices.extend(set(known.devices).union(command.add).difference(command.remove))
    return _changed(known, changed, ctx)


def delete(overrides: Overrides, command: DeleteOverride, ctx: Context) -> Decision:
    """It ends now, and its name is free again."""
    known = _find(overrides, command.name)
    check_etag(command.etag, known.etag, known.name)
    decision = _saved(_copy(known), "bundle_override.deleted", ctx, deleted=True)
    return decision.replace(result=Empty())


def _changed(known: pb.BundleOverride, changed: pb.BundleOverride, ctx: Context) -> Decision:
    _check(changed)
    return _saved(changed, "bundle_override.updated", ctx) if changed != known else Decision(result=known)


def _saved(override: pb.BundleOverride, change: str, ctx: Context, *, deleted: bool = False) -> Decision:
    _check(override)
    override.etag = str(ctx.version(override.name) + 1)
    private = events.BundleOverrideSaved(bundle_override=override, deleted=deleted)
    public = events.BundleOverrideChanged(bundle_override=override, deleted=deleted, change=change)
    check_size(public, override.name)
    event = NewEvent(ctx.organization, override.name, private, public=(Public(override.name, public),))
    return Decision((event,), override)


def _check(override: pb.BundleOverride) -> None:
    """Rules of one override; its devices get an order."""
    check_time(override, "start_time", "bundle_override")
    check_time(override, "end_time", "bundle_override")
    if override.HasField("end_time") and override.end_time.ToNanoseconds() <= override.start_time.ToNanoseconds():
        raise InvalidArgumentError(
            "INVALID_FIELD", "end_time must be later than start_time", field="bundle_override.end_time"
        )
    _check_devices(override.devices, product_of(override.name), "bundle_override.devices")
    devices = sorted(set(override.devices))
    del override.devices[:]
    override.devices.extend(devices)


def _check_devices(devices: Iterable[str], product: str, field: str) -> None:
    for device in devices:
        if not is_device_of(device, product):
            raise InvalidArgumentError("INVALID_FIELD", f"'{device[:200]}' is not a device of {product}", field=field)


def is_device_of(name: str, product: str) -> bool:
    """Whether the name has the form of a device of the product."""
    rest = name.removeprefix(f"{product}/devices/")
    return rest != name and bool(rest) and "/" not in rest


def _find(overrides: Overrides, name: str) -> pb.BundleOverride:
    known = overrides.get(name)
    if known is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return known


def _copy(override: pb.BundleOverride) -> pb.BundleOverride:
    copied = pb.BundleOverride()
    copied.CopyFrom(override)
    return copied
