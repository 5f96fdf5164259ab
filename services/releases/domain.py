"""Releases, pure; the rules of a graph are in ``graph``, those of overrides in ``overrides``.

Bundle and cohort are fixed when a release is created. A managed release belongs to its rollout: its name is derived, so
that creating it again is the same fact, and only the rollout retracts or disables it until it becomes a plain one.
``retracted`` implies ``disabled`` and is for good. What other services say of devices, bundles and rollouts is taken in
for dry runs; of decisions on a graph only the deletion of a required release looks at it, at who is still behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import immutables
import msgspec
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.releases.v1 import events_pb2 as events
from groundswell.releases.v1 import releases_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events
from msgspec.structs import replace

from libs.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    check_etag,
)
from libs.eventlog import Context, Decision, Event, Foreign, NewEvent, Public
from libs.names import parent_of
from libs.resolution import BundleFacts, DeviceFacts, PlanFacts
from libs.resolution.convert import cohort_graph
from services.releases import facts, overrides
from services.releases.graph import (
    check_edit,
    check_fields,
    check_graph,
    check_size,
    copy_of,
    insert,
    remove,
    timestamp,
)
from services.releases.lint import Reported, devices_behind

Graph = immutables.Map[str, pb.Release]
Fleet = immutables.Map[Reported, int]

_PATHS: Final = frozenset(
    {"description", "disabled", "next", "phase", "required", "schedule_time", "version", "version_requirement"}
)
_MANAGED_FIELDS: Final = ("bundle", "version", "version_requirement", "security_version", "rollout")
_PROMOTED_FIELDS: Final = ("bundle", "version", "version_requirement", "security_version", "required")


class State(msgspec.Struct, frozen=True, gc=False):
    """One partition's graphs and overrides."""

    graphs: immutables.Map[str, Graph] = msgspec.field(default_factory=immutables.Map)
    """Cohort → its releases by name."""
    overrides: immutables.Map[str, pb.BundleOverride] = msgspec.field(default_factory=immutables.Map)
    devices: immutables.Map[str, DeviceFacts] = msgspec.field(default_factory=immutables.Map)
    fleets: immutables.Map[str, Fleet] = msgspec.field(default_factory=immutables.Map)
    """Cohort → how many of its devices, retired ones left out, report what."""
    bundles: immutables.Map[str, BundleFacts] = msgspec.field(default_factory=immutables.Map)
    plans: immutables.Map[str, PlanFacts] = msgspec.field(default_factory=immutables.Map)


@dataclass(frozen=True, slots=True)
class CreateRelease:
    """A plain or managed release; its bundle and cohort were looked up."""

    release: pb.Release
    previous: str = ""


@dataclass(frozen=True, slots=True)
class UpdateRelease:
    """New values for named fields."""

    release: pb.Release
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteRelease:
    """Take a release out and relink its predecessors."""

    name: str
    etag: str
    force: bool
    reason: str


@dataclass(frozen=True, slots=True)
class SetManaged:
    """What the managing rollout does to its release: ``retract``, ``disable`` or ``release``."""

    name: str
    rollout: str
    action: str


@dataclass(frozen=True, slots=True)
class Promote:
    """The same firmware in another cohort: natural key are its name and what it is."""

    release: pb.Release


def validate_managed(state: State, release: pb.Release, now_ms: int) -> None:
    """Raise what creating the managed release now would raise: the dry run of a rollout."""
    graph = state.graphs.get(parent_of(release.name), Graph())
    known = graph.get(release.name)
    if known is None:
        insert(graph, copy_of(release), "", now_ms)
    elif not same_managed(known, release):
        raise _conflict(release)


def same_managed(known: pb.Release, wanted: pb.Release) -> bool:
    """Whether creating it again is the same fact."""
    return all(getattr(known, name) == getattr(wanted, name) for name in _MANAGED_FIELDS)


def same_promotion(known: pb.Release, wanted: pb.Release) -> bool:
    """Whether promoting it again is the same fact; phase, schedule and words may have moved on."""
    return all(getattr(known, name) == getattr(wanted, name) for name in _PROMOTED_FIELDS)


class Releases:
    """The domain; see the module for its rules."""

    service = "releases"
    event_types: Sequence[type[Message]] = (
        events.ReleasesSaved,
        events.BundleOverrideSaved,
        events.DeviceNoted,
        events.BundleNoted,
        events.RolloutNoted,
    )
    sources: Mapping[str, Sequence[type[Message]]] = {
        "registry": (
            registry_events.OrganizationChanged,
            registry_events.ProductChanged,
            registry_events.CohortChanged,
            registry_events.DeviceChanged,
            registry_events.MemberChanged,
            registry_events.ApiKeyChanged,
            registry_events.GatewayChanged,
            registry_events.RoleChanged,
        ),
        "artifacts": (artifacts_events.SigningKeyChanged, artifacts_events.BundleChanged),
        "rollout": (rollout_events.RolloutChanged, rollout_events.AttemptChanged, rollout_events.DeviceReported),
    }

    def __init__(self) -> None:
        self._handlers: dict[type, Callable[[State, Any, Context], Decision]] = {
            CreateRelease: self._create,
            UpdateRelease: self._update,
            DeleteRelease: self._delete,
            SetManaged: self._set_managed,
            Promote: self._promote,
            overrides.CreateOverride: _of_override(overrides.create),
            overrides.UpdateOverride: _of_override(overrides.update),
            overrides.ChangeDevices: _of_override(overrides.change_devices),
            overrides.DeleteOverride: _of_override(overrides.delete),
            Foreign: _note,
        }

    def initial_state(self, partition: int) -> State:  # noqa: ARG002 - all partitions begin empty
        """Nothing."""
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        """See :class:`libs.eventlog.Domain`."""
        return self._handlers[type(command)](state, command, ctx)

    def evolve(self, state: State, event: Event) -> State:
        """After-images replace what they are images of."""
        payload = event.payload
        if isinstance(payload, events.ReleasesSaved):
            graph = state.graphs.get(payload.cohort, Graph())
            with graph.mutate() as changed:
                for release in payload.releases:
                    changed[release.name] = release
                for name in payload.deleted:
                    changed.pop(name, None)
                return replace(state, graphs=state.graphs.set(payload.cohort, changed.finish()))
        if isinstance(payload, events.BundleOverrideSaved):
            name = payload.bundle_override.name
            if payload.deleted:
                return replace(state, overrides=state.overrides.delete(name))
            return replace(state, overrides=state.overrides.set(name, payload.bundle_override))
        if isinstance(payload, events.DeviceNoted):
            device = facts.facts_of_device(payload.device)
            fleets = _recounted(state.fleets, state.devices.get(device.name), device)
            return replace(state, devices=state.devices.set(device.name, device), fleets=fleets)
        if isinstance(payload, events.BundleNoted):
            bundle = facts.facts_of_bundle(payload.bundle)
            return replace(state, bundles=state.bundles.set(bundle.name, bundle))
        if isinstance(payload, events.RolloutNoted):
            plan = facts.facts_of_rollout(payload.rollout)
            return replace(state, plans=state.plans.set(plan.rollout, plan))
        return state

    def _create(self, state: State, command: CreateRelease, ctx: Context) -> Decision:
        new = copy_of(command.release)
        cohort = parent_of(new.name)
        graph = state.graphs.get(cohort, Graph())
        known = graph.get(new.name)
        if known is not None:
            if new.rollout and same_managed(known, new):
                return Decision(result=known)
            if new.rollout:
                raise _conflict(new)
            raise AlreadyExistsError("ALREADY_EXISTS", f"{new.name} exists already", resource=new.name)
        new.uid = ctx.new_uuid("release")
        new.create_time.CopyFrom(timestamp(ctx.now_ms))
        changed = insert(graph, new, command.previous, ctx.now_ms)
        return self._save(graph, cohort, changed, [], "release.created", new, ctx)

    def _promote(self, state: State, command: Promote, ctx: Context) -> Decision:
        known = state.graphs.get(parent_of(command.release.name), Graph()).get(command.release.name)
        if known is None:
            return self._create(state, CreateRelease(command.release), ctx)
        if not same_promotion(known, command.release):
            raise _conflict(command.release)
        return Decision(result=known)

    def _update(self, state: State, command: UpdateRelease, ctx: Context) -> Decision:
        graph, known = _find(state, command.release.name)
        check_etag(command.release.etag, known.etag, known.name)
        wrong = [path for path in command.paths if path not in _PATHS]
        if wrong or not command.paths:
            raise InvalidArgumentError(
                "INVALID_FIELD",
                f"update_mask may name {', '.join(sorted(_PATHS))}; not {', '.join(wrong) or 'nothing'}",
                field="update_mask",
            )
        if known.rollout:
            raise _managed(known)
        changed = copy_of(known)
        for path in command.paths:
            changed.ClearField(path)  # type: ignore[arg-type]
            if path in ("phase", "schedule_time"):
                if command.release.HasField(path):  # type: ignore[arg-type]
                    getattr(changed, path).CopyFrom(getattr(command.release, path))
            else:
                setattr(changed, path, getattr(command.release, path))
        check_fields(changed, ctx.now_ms)
        check_edit(known, changed, ctx.now_ms)
        if changed == known:
            return Decision(result=known)
        cohort = parent_of(known.name)
        check_graph(graph.set(changed.name, changed))
        return self._save(graph, cohort, [changed], [], "release.updated", changed, ctx)

    def _delete(self, state: State, command: DeleteRelease, ctx: Context) -> Decision:
        graph, known = _find(state, command.name)
        check_etag(command.etag, known.etag, known.name)
        if known.rollout:
            raise _managed(known)
        cohort = parent_of(known.name)
        behind = devices_behind(cohort_graph(cohort, graph.values()), state.fleets.get(cohort, Fleet()), known.name)
        if known.required and behind and not (command.force and command.reason):
            raise FailedPreconditionError(
                "RELEASE_REQUIRED",
                f"{known.name} is required and {behind} devices are behind it: delete it with force and a reason",
                resource=known.name,
                devices=behind,
            )
        changed = remove(graph, known.name)
        decision = self._save(graph, cohort, changed, [known.name], "release.deleted", known, ctx, command.reason)
        return decision.replace(result=Empty())

    def _set_managed(self, state: State, command: SetManaged, ctx: Context) -> Decision:
        graph, known = _find(state, command.name)
        if known.rollout not in (command.rollout, "") or (not known.rollout and command.action != "release"):
            raise FailedPreconditionError(
                "NOT_YOUR_RELEASE", f"{known.name} is not managed by {command.rollout}", resource=known.name
            )
        changed = copy_of(known)
        if command.action == "retract":
            changed.retracted = changed.disabled = True
        elif command.action == "disable":
            changed.disabled = True
        else:
            changed.rollout = ""
        if changed == known:
            return Decision(result=known)
        change = "release.retracted" if command.action == "retract" else "release.updated"
        return self._save(graph, parent_of(known.name), [changed], [], change, changed, ctx)

    def _save(
        self,
        graph: Graph,
        cohort: str,
        changed: Sequence[pb.Release],
        deleted: Sequence[str],
        change: str,
        subject: pb.Release,
        ctx: Context,
        reason: str = "",
    ) -> Decision:
        """One event for all that changes together, and the whole graph for everybody else."""
        etag = str(ctx.version(cohort) + 1)
        after = dict(graph)
        for release in changed:
            release.etag = etag
            after[release.name] = release
        for name in deleted:
            after.pop(name, None)
        private = events.ReleasesSaved(
            cohort=cohort, releases=changed, deleted=deleted, change=change, subject=subject.name, reason=reason
        )
        public = events.GraphChanged(
            cohort=cohort, releases=[after[name] for name in sorted(after)], change=change, subject=subject.name
        )
        check_size(public, f"the graph of {cohort}")
        event = NewEvent(ctx.organization, cohort, private, public=(Public(cohort, public),))
        return Decision((event,), subject)


def _of_override(
    decide: Callable[[overrides.Overrides, Any, Context], Decision],
) -> Callable[[State, Any, Context], Decision]:
    return lambda state, command, ctx: decide(state.overrides, command, ctx)


def _recounted(
    fleets: immutables.Map[str, Fleet], before: DeviceFacts | None, after: DeviceFacts
) -> immutables.Map[str, Fleet]:
    """A device moves from one count to another."""
    for device, step in ((before, -1), (after, 1)):
        if device is None or device.retired or not device.cohort:
            continue
        fleet = fleets.get(device.cohort, Fleet())
        reported = (device.release, device.bundle, device.version)
        count = fleet.get(reported, 0) + step
        fleet = fleet.set(reported, count) if count else fleet.delete(reported)
        fleets = fleets.set(device.cohort, fleet) if fleet else fleets.delete(device.cohort)
    return fleets


def _note(state: State, record: Foreign, ctx: Context) -> Decision:
    """Take in what dry runs need; a record that changes none of it writes nothing."""
    payload = record.payload
    noted: Message | None = None
    if isinstance(payload, registry_events.DeviceChanged):
        device = facts.trimmed_device(payload.device)
        if state.devices.get(device.name) != facts.facts_of_device(device):
            noted = events.DeviceNoted(device=device)
    elif isinstance(payload, artifacts_events.BundleChanged):
        bundle = facts.trimmed_bundle(payload.bundle)
        if state.bundles.get(bundle.name) != facts.facts_of_bundle(bundle):
            noted = events.BundleNoted(bundle=bundle)
    elif isinstance(payload, rollout_events.RolloutChanged):
        rollout = facts.trimmed_rollout(payload.rollout)
        if state.plans.get(rollout.name) != facts.facts_of_rollout(rollout):
            noted = events.RolloutNoted(rollout=rollout)
    if noted is None:
        return Decision()
    return Decision((NewEvent(ctx.organization, record.resource, noted),))


def _find(state: State, name: str) -> tuple[Graph, pb.Release]:
    graph = state.graphs.get(parent_of(name), Graph())
    known = graph.get(name)
    if known is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return graph, known


def _conflict(release: pb.Release) -> AlreadyExistsError:
    return AlreadyExistsError("RELEASE_CONFLICT", f"{release.name} exists and is another", resource=release.name)


def _managed(release: pb.Release) -> FailedPreconditionError:
    return FailedPreconditionError(
        "RELEASE_MANAGED",
        f"{release.name} is managed by {release.rollout}: steer the rollout instead",
        resource=release.name,
        rollout=release.rollout,
    )
