"""Dry runs and graphs: what devices would be offered and where they stand, from this service's own state."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2 as pb

from libs.errors import InvalidArgumentError, NotFoundError
from libs.names import product_of, segment
from libs.resolution import CohortGraph, DeviceFacts, OverrideFacts, PlanFacts, ReleaseNode, resolve
from libs.resolution.convert import candidate_of, cohort_graph, override_facts, reason_of
from services.releases.domain import Fleet, Graph, State
from services.releases.graph import is_phased, is_scheduled
from services.releases.lint import Lint

V = TypeVar("V")
_ENDED: Final = "COMPLETED"
_MAX_DERIVED: Final = 256
"""Of so many cohorts and products things are kept, of others they are made again."""
_MAX_PLANS: Final = 8
"""Rollouts of a cohort that an explanation goes into: the newest."""


class Derived:
    """What resolution needs of a state and is costly to make: kept while what it is made of is the same object."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[str, tuple[object, CohortGraph]] = OrderedDict()
        self._overrides: OrderedDict[str, tuple[object, Mapping[str, Sequence[OverrideFacts]]]] = OrderedDict()
        self._plans: OrderedDict[str, tuple[object, Mapping[str, Sequence[PlanFacts]]]] = OrderedDict()

    def graph(self, state: State, cohort: str) -> CohortGraph | None:
        """The cohort's graph, None when it has no releases."""
        releases = state.graphs.get(cohort)
        if not releases:
            return None
        return _kept(self._graphs, cohort, releases, lambda: cohort_graph(cohort, releases.values()))

    def overrides(self, state: State, product: str) -> Mapping[str, Sequence[OverrideFacts]]:
        """Overrides of each of the product's devices that has any."""
        return _kept(self._overrides, product, state.overrides, lambda: _overrides_of(state, product))

    def plans(self, state: State, product: str) -> Mapping[str, Sequence[PlanFacts]]:
        """Rollouts that mean a cohort of the product and may still hold it back, newest first."""
        return _kept(self._plans, product, state.plans, lambda: _plans_of(state, product))


def _kept(known: OrderedDict[str, tuple[object, V]], key: str, source: object, make: Callable[[], V]) -> V:
    found = known.get(key)
    if found is None or found[0] is not source:
        found = known[key] = (source, make())
        while len(known) > _MAX_DERIVED:
            known.popitem(last=False)
    known.move_to_end(key)
    return found[1]


def resolve_devices(
    state: State,
    product: str,
    names: Sequence[str],
    supposed: Sequence[pb.SupposedDevice],
    now_ms: int,
    derived: Derived | None = None,
) -> list[pb.Resolution]:
    """One resolution for each name, then one for each supposed device, in their order.

    Raises for a name that is no device of the product, and for a cohort that is none of its.
    """
    derived = derived or Derived()
    asked = [device_of(state, product, name, f"devices[{index}]") for index, name in enumerate(names)]
    asked += [_supposed(state, product, like, f"supposed_devices[{index}]") for index, like in enumerate(supposed)]
    overrides = derived.overrides(state, product)
    plans = derived.plans(state, product)
    found = []
    for facts in asked:
        resolution = resolve(
            facts,
            derived.graph(state, facts.cohort),
            overrides.get(facts.name, ()),
            state.bundles,
            plans.get(facts.cohort, ()),
            now_ms,
        )
        found.append(
            pb.Resolution(
                device=facts.name,
                candidates=[candidate_of(candidate) for candidate in resolution.candidates],
                steps=[reason_of(step) for step in resolution.steps],
            )
        )
    return found


def device_of(state: State, product: str, name: str, field: str) -> DeviceFacts:
    """A device of the product. Raises for what is none."""
    if product_of(name) != product or name.count("/") != 5 or name.split("/")[4] != "devices":
        raise InvalidArgumentError("INVALID_FIELD", f"'{name[:200]}' is not a device of {product}", field=field)
    facts = state.devices.get(name)
    if facts is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return facts


def running_as(facts: DeviceFacts, running: registry_pb2.ReportedState) -> DeviceFacts:
    """As if it ran this; its security floor is what it has confirmed and never sinks."""
    return replace(
        facts,
        release=running.release,
        bundle=running.bundle,
        version=running.version,
        security_floor=max(facts.security_floor, running.security_version),
    )


def _supposed(state: State, product: str, like: pb.SupposedDevice, field: str) -> DeviceFacts:
    """The device it is like, with what is supposed."""
    # Without a device there is no uid: nothing is said about shares then.
    facts = device_of(state, product, like.device, f"{field}.device") if like.device else DeviceFacts("", b"")
    if like.HasField("running"):
        facts = running_as(facts, like.running)
    if like.HasField("tag_set"):
        facts = replace(facts, tags=frozenset(like.tag_set.tags))
    if like.HasField("target"):
        facts = replace(facts, target=like.target)
    if like.HasField("cohort"):
        if like.cohort and (product_of(like.cohort) != product or segment(like.cohort, "cohorts") == ""):
            raise InvalidArgumentError(
                "INVALID_FIELD", f"'{like.cohort[:200]}' is not a cohort of {product}", field=f"{field}.cohort"
            )
        facts = replace(facts, cohort=like.cohort)
    return facts


def graph_image(state: State, cohort: str, now_ms: int, derived: Derived | None = None) -> pb.Graph:
    """The graph in walk order, with who stands where and what is wrong with it."""
    fleet = state.fleets.get(cohort, Fleet())
    releases = state.graphs.get(cohort, Graph())
    graph = (derived or Derived()).graph(state, cohort) or CohortGraph(cohort)
    lint = Lint(graph, state.bundles, fleet)
    standing: Counter[str] = Counter()
    entering: Counter[str] = Counter()
    for place in lint.places:
        if place.current is not None:
            standing[place.current.name] += place.count
        elif place.path:
            entering[place.path[0].name] += place.count
    nodes = [
        pb.GraphNode(
            release=releases[node.name],
            state=_state_of(lint, node, releases[node.name], now_ms),
            steps_to_latest=lint.steps_to_latest[node.name],
            devices=standing[node.name],
            devices_entering=entering[node.name],
        )
        for node in lint.order()
    ]
    warnings = [
        pb.GraphWarning(
            code=found.code,
            message=found.message,
            release=found.release,
            devices=found.devices,
            metadata=found.metadata,
        )
        for found in lint.warnings()
    ]
    unplaced = sum(place.count for place in lint.places if not place.placed)
    return pb.Graph(
        cohort=cohort, nodes=nodes, warnings=warnings, devices=sum(fleet.values()), devices_unplaced=unplaced
    )


def _state_of(lint: Lint, node: ReleaseNode, release: pb.Release, now_ms: int) -> pb.GraphNode.State.ValueType:
    if release.retracted:
        return pb.GraphNode.STATE_RETRACTED
    if release.disabled:
        return pb.GraphNode.STATE_DISABLED
    if not lint.offerable(node):
        return pb.GraphNode.STATE_NOT_OFFERABLE
    if is_scheduled(release, now_ms):
        return pb.GraphNode.STATE_SCHEDULED
    return pb.GraphNode.STATE_PHASED if is_phased(release) else pb.GraphNode.STATE_OPEN


def _overrides_of(state: State, product: str) -> Mapping[str, Sequence[OverrideFacts]]:
    found: dict[str, list[OverrideFacts]] = {}
    for name, override in state.overrides.items():
        if name.startswith(f"{product}/"):
            facts = override_facts(override)
            for device in override.devices:
                found.setdefault(device, []).append(facts)
    return found


def _plans_of(state: State, product: str) -> Mapping[str, Sequence[PlanFacts]]:
    found: dict[str, list[PlanFacts]] = {}
    for name, plan in state.plans.items():
        if plan.state != _ENDED and name.startswith(f"{product}/"):
            for cohort in {stage.cohort for stage in plan.stages}:
                found.setdefault(cohort, []).append(plan)
    return {
        cohort: sorted(plans, key=lambda plan: (-plan.created_ms, plan.rollout))[:_MAX_PLANS]
        for cohort, plans in found.items()
    }
