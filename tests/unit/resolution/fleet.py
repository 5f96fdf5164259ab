"""Small graphs and devices to resolve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from libs.resolution import (
    BundleFacts,
    CohortGraph,
    DeviceFacts,
    OverrideFacts,
    PlanFacts,
    ReleaseNode,
    Resolution,
    resolve,
)

NOW = 1_000_000


def device(**facts: Any) -> DeviceFacts:
    given: dict[str, Any] = {"name": "dev", "uid": bytes(16), "cohort": "main", "target": "board"}
    return DeviceFacts(**given | facts)


def chain(*nodes: dict[str, Any]) -> CohortGraph:
    """r0 → r1 → …, release rN of bundle bN, versions 1.N.0, unless said otherwise."""
    made: dict[str, ReleaseNode] = {}
    for index, given in enumerate(nodes):
        facts: dict[str, Any] = {
            "name": f"r{index}",
            "bundle": f"b{index}",
            "version": f"1.{index}.0",
            "next": f"r{index + 1}" if index + 1 < len(nodes) else "",
            "created_ms": index,
        } | given
        made[facts["name"]] = ReleaseNode(**facts)
    return CohortGraph("main", made)


def bundle(name: str, **facts: Any) -> BundleFacts:
    given: dict[str, Any] = {"name": name, "offerable": True, "targets": frozenset({"board"})}
    return BundleFacts(**given | facts)


def ask(
    facts: DeviceFacts,
    graph: CohortGraph | None,
    *,
    overrides: Sequence[OverrideFacts] = (),
    bundles: Iterable[BundleFacts] = (),
    plans: Sequence[PlanFacts] = (),
    now: int = NOW,
) -> Resolution:
    """Resolve; every bundle of the graph may be offered unless given."""
    known = {node.bundle: bundle(node.bundle) for node in graph.releases.values()} if graph is not None else {}
    known |= {one.name: one for one in bundles}
    return resolve(facts, graph, overrides, known, plans, now)


def offered(resolution: Resolution) -> list[str]:
    """What is offered, in order: releases, `back:<release>`, or `override:<bundle>`."""
    return [
        one.release or (f"back:{one.rollback_of}" if one.rollback_of else f"override:{one.bundle}")
        for one in resolution.candidates
    ]


def codes(resolution: Resolution) -> list[str]:
    return [str(step.code) for step in resolution.steps]


def blocking(resolution: Resolution) -> list[str]:
    return [str(step.code) for step in resolution.steps if step.blocking]
