"""The releases service's gRPC servicers: they translate, and look up what others own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.device.v1 import device_pb2
from groundswell.releases.v1 import releases_pb2 as pb
from groundswell.releases.v1 import releases_pb2_grpc

from libs.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from libs.eventlog import Runtime
from libs.names import last_segment, organization_of, parent_of, product_of, segment
from libs.rpc import caller, not_found, page, snapshot_state, submit
from libs.rpc.access import authorize
from services.releases import domain, overrides, views
from services.releases.domain import State
from services.releases.explain import explanation
from services.releases.graph import MAX_DESCRIPTION
from services.releases.overrides import is_device_of

_CHOSEN: Final = frozenset(
    {
        "bundle",
        "version",
        "version_requirement",
        "required",
        "disabled",
        "schedule_time",
        "next",
        "phase",
        "description",
    }
)
"""Fields of a new release that its creator chooses; the others are the server's."""
_OF_ROLLOUT: Final = frozenset(
    {"name", "bundle", "version", "version_requirement", "security_version", "rollout", "description"}
)

_PROMOTED: Final = frozenset(
    {"bundle", "version", "version_requirement", "security_version", "required", "description"}
)
_NOT_PROMOTED: Final = {
    True: ("RELEASE_RETRACTED", "was retracted for good: nobody should get it"),
    False: ("RELEASE_DISABLED", "is disabled: enable it before it goes further"),
}
MAX_RESOLVED: Final = 500


class References(Protocol):
    """Synchronous look-ups of what releases refer to; the caller's read-after tokens go along."""

    async def check_cohort(self, name: str) -> None:
        """Raises NOT_FOUND."""

    async def check_product(self, name: str) -> None:
        """Raises NOT_FOUND."""

    async def check_device(self, name: str) -> None:
        """Raises NOT_FOUND."""

    async def bundle(self, name: str) -> artifacts_pb2.Bundle:
        """Raises NOT_FOUND."""


async def offerable_bundle(references: References, name: str, product: str, field: str) -> artifacts_pb2.Bundle:
    """A bundle of the product that may be offered now."""
    if product_of(name) != product or segment(name, "bundles") != last_segment(name):
        raise InvalidArgumentError(
            "INVALID_FIELD", f"'{name[:200]}' is not a bundle of {product}", field=field, bundle=name[:200]
        )
    bundle = await references.bundle(name)
    if not bundle.offerable:
        why = bundle.not_offerable_reason or "SIGNATURES_MISSING"
        raise FailedPreconditionError("BUNDLE_NOT_OFFERABLE", f"{name} may not be offered: {why}", bundle=name, why=why)
    return bundle


def wall_ms() -> int:
    """Now, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def _copy(source: Message, target: Message, fields: frozenset[str]) -> None:
    """Copy the named fields that are set."""
    for field, value in source.ListFields():
        if field.name not in fields:
            continue
        if field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def _managed_image(wanted: pb.Release) -> pb.Release:
    """What a rollout may say of its release; it becomes the latest, without phase and schedule."""
    parts = wanted.name.split("/")
    if len(parts) != 8 or parts[4::2] != ["cohorts", "releases"] or not all(parts) or not product_of(wanted.name):
        raise InvalidArgumentError("INVALID_FIELD", f"'{wanted.name[:200]}' is no release name", field="release.name")
    if segment(wanted.rollout, "rollouts") == "" or product_of(wanted.rollout) != product_of(wanted.name):
        raise InvalidArgumentError(
            "INVALID_FIELD", "a managed release names its rollout, of the same product", field="release.rollout"
        )
    release = pb.Release()
    _copy(wanted, release, _OF_ROLLOUT)
    release.description = release.description[:MAX_DESCRIPTION]
    return release


def _promoted(source: pb.Release, name: str, request: Any) -> pb.Release:
    """The same firmware under another name; phase and schedule are the new cohort's own."""
    release = pb.Release(name=name)
    _copy(source, release, _PROMOTED)
    _copy(request, release, frozenset({"phase", "schedule_time"}))
    return release


class ReleasesServicer(releases_pb2_grpc.ReleasesServiceServicer):
    """Public API."""

    def __init__(self, runtime: Runtime[State], references: References, now_ms: Callable[[], int] = wall_ms) -> None:
        self._runtime = runtime
        self._references = references
        self._now_ms = now_ms
        self._derived = views.Derived()

    async def CreateRelease(self, request: Any, context: Any) -> pb.Release:
        name = f"{request.parent}/releases/{request.release_id}"
        await self._references.check_cohort(request.parent)
        product = product_of(request.parent)
        bundle = await offerable_bundle(self._references, request.release.bundle, product, "release.bundle")
        release = pb.Release(name=name, security_version=bundle.security_version)
        _copy(request.release, release, _CHOSEN)
        command = domain.CreateRelease(release, request.previous)
        created: pb.Release = await submit(self._runtime, organization_of(name), command, request, context)
        return created

    async def GetRelease(self, request: Any, context: Any) -> pb.Release:
        graph = snapshot_state(self._runtime, request.name).graphs.get(parent_of(request.name))
        found = graph.get(request.name) if graph is not None else None
        if found is None:
            raise not_found(request.name)
        return found

    async def ListReleases(self, request: Any, context: Any) -> pb.ListReleasesResponse:
        graph = snapshot_state(self._runtime, request.parent).graphs.get(request.parent)
        if graph is None:
            await self._references.check_cohort(request.parent)
        found, token = page(graph.items() if graph is not None else (), request)
        return pb.ListReleasesResponse(releases=found, next_page_token=token)

    async def UpdateRelease(self, request: Any, context: Any) -> pb.Release:
        command = domain.UpdateRelease(request.release, tuple(request.update_mask.paths))
        organization = organization_of(request.release.name)
        updated: pb.Release = await submit(self._runtime, organization, command, request, context)
        return updated

    async def DeleteRelease(self, request: Any, context: Any) -> Any:
        command = domain.DeleteRelease(request.name, request.etag, request.force, request.reason)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def PromoteRelease(self, request: Any, context: Any) -> pb.Release:
        # The cohort is a second resource of this call: a key that may not see it is told that it does not exist.
        authorize(caller(), "releases.releases.promote", request.cohort)
        if product_of(request.cohort) != product_of(request.name):
            raise InvalidArgumentError(
                "INVALID_FIELD", "a release is promoted to a cohort of its own product", field="cohort"
            )
        source = await self.GetRelease(request, context)
        name = f"{request.cohort}/releases/{request.release_id or last_segment(request.name)}"
        release = _promoted(source, name, request)
        graph = snapshot_state(self._runtime, name).graphs.get(request.cohort)
        if graph is None or name not in graph:
            # What was promoted already is answered from the log, whatever has become of it since.
            if source.retracted or source.disabled:
                reason, said = _NOT_PROMOTED[source.retracted]
                raise FailedPreconditionError(reason, f"{source.name} {said}", resource=source.name)
            await self._references.check_cohort(request.cohort)
            await offerable_bundle(self._references, source.bundle, product_of(name), "name")
        command = domain.Promote(release)
        promoted: pb.Release = await submit(self._runtime, organization_of(name), command, request, context)
        return promoted

    async def GetGraph(self, request: Any, context: Any) -> pb.Graph:
        state = snapshot_state(self._runtime, request.cohort)
        if request.cohort not in state.graphs:
            await self._references.check_cohort(request.cohort)
        return views.graph_image(state, request.cohort, self._now_ms(), self._derived)

    async def CreateBundleOverride(self, request: Any, context: Any) -> pb.BundleOverride:
        await self._references.check_product(request.parent)
        bundle = request.bundle_override.bundle
        await offerable_bundle(self._references, bundle, request.parent, "bundle_override.bundle")
        await self._check_devices(request.parent, request.bundle_override.devices)
        override = pb.BundleOverride()
        override.CopyFrom(request.bundle_override)
        override.name = f"{request.parent}/bundleOverrides/{request.bundle_override_id}"
        command = overrides.CreateOverride(override)
        organization = organization_of(request.parent)
        created: pb.BundleOverride = await submit(self._runtime, organization, command, request, context)
        return created

    async def GetBundleOverride(self, request: Any, context: Any) -> pb.BundleOverride:
        found = snapshot_state(self._runtime, request.name).overrides.get(request.name)
        if found is None:
            raise not_found(request.name)
        return found

    async def ListBundleOverrides(self, request: Any, context: Any) -> pb.ListBundleOverridesResponse:
        state = snapshot_state(self._runtime, request.parent)
        prefix = f"{request.parent}/bundleOverrides/"
        found, token = page(((n, o) for n, o in state.overrides.items() if n.startswith(prefix)), request)
        return pb.ListBundleOverridesResponse(bundle_overrides=found, next_page_token=token)

    async def UpdateBundleOverride(self, request: Any, context: Any) -> pb.BundleOverride:
        wanted = request.bundle_override
        if "bundle" in request.update_mask.paths:
            product = product_of(wanted.name)
            await offerable_bundle(self._references, wanted.bundle, product, "bundle_override.bundle")
        if "devices" in request.update_mask.paths:
            await self._check_devices(product_of(wanted.name), wanted.devices)
        command = overrides.UpdateOverride(wanted, tuple(request.update_mask.paths))
        updated: pb.BundleOverride = await submit(
            self._runtime, organization_of(wanted.name), command, request, context
        )
        return updated

    async def AddDevices(self, request: Any, context: Any) -> pb.BundleOverride:
        await self._check_devices(product_of(request.name), request.devices)
        command = overrides.ChangeDevices(request.name, request.etag, add=tuple(request.devices))
        changed: pb.BundleOverride = await submit(
            self._runtime, organization_of(request.name), command, request, context
        )
        return changed

    async def RemoveDevices(self, request: Any, context: Any) -> pb.BundleOverride:
        command = overrides.ChangeDevices(request.name, request.etag, remove=tuple(request.devices))
        changed: pb.BundleOverride = await submit(
            self._runtime, organization_of(request.name), command, request, context
        )
        return changed

    async def DeleteBundleOverride(self, request: Any, context: Any) -> Any:
        command = overrides.DeleteOverride(request.name, request.etag)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def ResolveDevices(self, request: Any, context: Any) -> pb.ResolveDevicesResponse:
        asked = len(request.devices) + len(request.supposed_devices)
        if not 0 < asked <= MAX_RESOLVED:
            raise InvalidArgumentError(
                "INVALID_FIELD", f"1 to {MAX_RESOLVED} devices are resolved at once, not {asked}", field="devices"
            )
        state = snapshot_state(self._runtime, request.parent)
        self._refuse_parked(request.parent, [*request.devices, *(like.device for like in request.supposed_devices)])
        now_ms = request.at_time.ToMilliseconds() if request.HasField("at_time") else self._now_ms()
        found = views.resolve_devices(
            state, request.parent, request.devices, request.supposed_devices, now_ms, self._derived
        )
        return pb.ResolveDevicesResponse(resolutions=found, view=self._view(request.parent))

    async def ExplainDevice(self, request: Any, context: Any) -> pb.ExplainDeviceResponse:
        state = snapshot_state(self._runtime, request.name)
        self._refuse_parked(request.name, [request.name])
        running = request.running if request.HasField("running") else None
        return explanation(state, request.name, running, self._now_ms(), self._derived)

    async def _check_devices(self, product: str, names: Sequence[str]) -> None:
        """Those that have not arrived here yet are asked for; names of another form are refused by the decision."""
        if not names:
            return
        known = snapshot_state(self._runtime, product).devices
        for name in names:
            if name not in known and is_device_of(name, product):
                await self._references.check_device(name)

    def _refuse_parked(self, within: str, names: Sequence[str]) -> None:
        """What is not understood is not guessed."""
        unread = self._runtime.snapshot(organization_of(within)).parked.intersection(names)
        if unread:
            name = min(unread)
            raise UnavailableError("RESOURCE_PARKED", f"a record of {name} is not understood yet", resource=name)

    def _view(self, within: str) -> device_pb2.ViewPosition:
        """What a decision was made on."""
        token = self._runtime.snapshot(organization_of(within)).token
        return device_pb2.ViewPosition(
            service=token.service, partition=token.partition, public_seq=token.public_seq, log_id=token.log_id
        )


class ReleasesInternalServicer(releases_pb2_grpc.ReleasesInternalServiceServicer):
    """What the rollout service asks."""

    def __init__(self, runtime: Runtime[State], references: References, now_ms: Callable[[], int] = wall_ms) -> None:
        self._runtime = runtime
        self._references = references
        self._now_ms = now_ms

    async def CreateManagedRelease(self, request: Any, context: Any) -> pb.Release:
        release = _managed_image(request.release)
        cohort = parent_of(release.name)
        graph = snapshot_state(self._runtime, release.name).graphs.get(cohort)
        if graph is None or release.name not in graph:
            # What exists is answered from the log, whatever has become of its bundle since.
            await self._references.check_cohort(cohort)
            bundle = await offerable_bundle(self._references, release.bundle, product_of(cohort), "release.bundle")
            if bundle.security_version != release.security_version:
                raise InvalidArgumentError(
                    "INVALID_FIELD",
                    f"{bundle.name} has security version {bundle.security_version}, not {release.security_version}",
                    field="release.security_version",
                )
        if request.validate_only:
            state = snapshot_state(self._runtime, release.name)
            domain.validate_managed(state, release, self._now_ms())
            return release
        command = domain.CreateRelease(release)
        created: pb.Release = await submit(self._runtime, organization_of(release.name), command, request, context)
        return created

    async def RetractRelease(self, request: Any, context: Any) -> pb.Release:
        return await self._set(request, context, "retract")

    async def DisableManagedRelease(self, request: Any, context: Any) -> pb.Release:
        return await self._set(request, context, "disable")

    async def ReleaseManagement(self, request: Any, context: Any) -> pb.Release:
        return await self._set(request, context, "release")

    async def _set(self, request: Any, context: Any, action: str) -> pb.Release:
        command = domain.SetManaged(request.name, request.rollout, action)
        changed: pb.Release = await submit(self._runtime, organization_of(request.name), command, request, context)
        return changed
