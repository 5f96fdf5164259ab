"""Dry runs: what given devices would be offered now, from this service's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from groundswell.releases.v1 import releases_pb2 as pb

from libs.errors import InvalidArgumentError, NotFoundError
from libs.names import product_of
from libs.resolution import CohortGraph, OverrideFacts, PlanFacts, resolve
from libs.resolution.convert import candidate_of, cohort_graph, override_facts, reason_of
from services.releases.domain import State

_ENDED: Final = "COMPLETED"
_MAX_PLANS: Final = 8
"""Rollouts of a cohort that an explanation goes into: the newest."""


def resolve_devices(state: State, product: str, names: Sequence[str], now_ms: int) -> list[pb.Resolution]:
    """One resolution for each name, in their order. Raises for a name that is no device of the product."""
    for index, name in enumerate(names):
        if product_of(name) != product or name.count("/") != 5 or name.split("/")[4] != "devices":
            raise InvalidArgumentError(
                "INVALID_FIELD", f"'{name[:200]}' is not a device of {product}", field=f"devices[{index}]"
            )
        if name not in state.devices:
            raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    asked = frozenset(names)
    overrides = overrides_of(state, asked, product)
    cohorts = {state.devices[name].cohort for name in asked} - {""}
    graphs = {cohort: graph_of(state, cohort) for cohort in cohorts}
    plans = plans_of(state, cohorts)
    found = []
    for name in names:
        facts = state.devices[name]
        resolution = resolve(
            facts,
            graphs.get(facts.cohort),
            overrides.get(name, ()),
            state.bundles,
            plans.get(facts.cohort, ()),
            now_ms,
        )
        found.append(
            pb.Resolution(
                device=name,
                candidates=[candidate_of(candidate) for candidate in resolution.candidates],
                steps=[reason_of(step) for step in resolution.steps],
            )
        )
    return found


def graph_of(state: State, cohort: str) -> CohortGraph | None:
    """The cohort's graph, None when it has never had one."""
    releases = state.graphs.get(cohort)
    return cohort_graph(cohort, releases.values()) if releases else None


def overrides_of(state: State, devices: frozenset[str], product: str) -> Mapping[str, Sequence[OverrideFacts]]:
    """Overrides that name any of the devices."""
    found: dict[str, list[OverrideFacts]] = {}
    prefix = f"{product}/"
    for name, override in state.overrides.items():
        if name.startswith(prefix):
            for device in devices.intersection(override.devices):
                found.setdefault(device, []).append(override_facts(override))
    return found


def plans_of(state: State, cohorts: set[str]) -> Mapping[str, Sequence[PlanFacts]]:
    """Rollouts that mean a cohort and may still hold it back, newest first."""
    found: dict[str, list[PlanFacts]] = {}
    for plan in state.plans.values():
        if plan.state != _ENDED:
            for cohort in cohorts.intersection(stage.cohort for stage in plan.stages):
                found.setdefault(cohort, []).append(plan)
    return {
        cohort: sorted(plans, key=lambda plan: (-plan.created_ms, plan.rollout))[:_MAX_PLANS]
        for cohort, plans in found.items()
    }
