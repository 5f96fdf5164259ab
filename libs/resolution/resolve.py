"""Resolution: which releases a device may be offered, in the order of preference, and why.

The story, step by step (each leaves a coded reason):

0. A quarantined device gets nothing, not even an override.
1. An active override (latest start wins) hides releases entirely.
2. A device without a cohort gets nothing.
3. A reported release of this cohort is where the device stands. Retracted: the way back is the only candidate, and the
   rollout leader knows where the device came from. The latest: up to date.
4. Else the reported bundle, 5. else the reported version says where it stands or which release it matches.
6. Walk forward to the first required release, else to the latest.
7. Validate from there backwards: disabled, version requirement, schedule, tags. What fails is stepped over.
8. A bundle that cannot be offered, does not fit the hardware, or lies below the device's security floor ends the list:
   nothing older is offered in its place.

Counts, shares and caps are the rollout leader's business: it goes down the list. A release whose bundle the device runs
already is a candidate like any other, so that chains of required releases can be walked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from libs.resolution.model import (
    BundleFacts,
    Candidate,
    Code,
    CohortGraph,
    DeviceFacts,
    OverrideFacts,
    PlanFacts,
    ReleaseNode,
    Resolution,
    Step,
)
from libs.resolution.requirement import satisfies

_WORKING = frozenset({"RUNNING", "COMPLETED", "DRAFT"})


def resolve(
    device: DeviceFacts,
    graph: CohortGraph | None,
    overrides: Sequence[OverrideFacts],
    bundles: Mapping[str, BundleFacts],
    plans: Sequence[PlanFacts],
    now_ms: int,
) -> Resolution:
    """Decide for one device at one moment; never reads a clock, never fails."""
    steps: list[Step] = []
    candidates = _candidates(device, graph, overrides, bundles, now_ms, steps)
    for plan in plans:
        _explain_plan(device, plan, steps)
    return Resolution(tuple(candidates), tuple(steps))


def _candidates(
    device: DeviceFacts,
    graph: CohortGraph | None,
    overrides: Sequence[OverrideFacts],
    bundles: Mapping[str, BundleFacts],
    now_ms: int,
    steps: list[Step],
) -> list[Candidate]:
    if device.quarantined:
        steps.append(Step(Code.QUARANTINED, "the device is quarantined: release it first", device.name, blocking=True))
        return []
    override = _active_override(overrides, now_ms)
    if override is not None:
        return _from_override(device, override, bundles, steps)
    if not device.cohort or graph is None:
        steps.append(
            Step(Code.NO_COHORT, "the device is in no cohort: put it into one", device.name, blocking=True)
            if not device.cohort
            else Step(Code.NO_RELEASES, "the cohort has no releases", device.cohort, blocking=True)
        )
        return []
    start = _standing(device, graph, steps)
    if isinstance(start, Candidate):
        return [start]
    if start is None:
        return []
    first, current = start
    return _validated(device, current, _walk(graph, first, steps), bundles, now_ms, steps)


# Step 1.


def _active_override(overrides: Sequence[OverrideFacts], now_ms: int) -> OverrideFacts | None:
    active = [o for o in overrides if o.start_ms <= now_ms and (not o.end_ms or now_ms < o.end_ms)]
    if not active:
        return None
    best = max((o.start_ms, o.created_ms) for o in active)
    return min((o for o in active if (o.start_ms, o.created_ms) == best), key=lambda o: o.name)


def _from_override(
    device: DeviceFacts, override: OverrideFacts, bundles: Mapping[str, BundleFacts], steps: list[Step]
) -> list[Candidate]:
    if device.bundle == override.bundle:
        steps.append(
            Step(
                Code.OVERRIDE_ALREADY_INSTALLED,
                "the device runs the override's bundle; releases are hidden while it is active",
                override.name,
                blocking=True,
            )
        )
        return []
    steps.append(Step(Code.OVERRIDE_ACTIVE, "an active override hides all releases", override.name))
    if not _offerable(device, override.bundle, bundles, steps):
        return []
    steps.append(Step(Code.CANDIDATE, "the override's bundle", override.bundle))
    return [Candidate(bundle=override.bundle, bundle_override=override.name)]


# Steps 3 to 5.


def _standing(
    device: DeviceFacts, graph: CohortGraph, steps: list[Step]
) -> tuple[ReleaseNode, ReleaseNode | None] | Candidate | None:
    """(first release to consider, release the device stands on), the way back, or None."""
    current = graph.releases.get(device.release) if device.release else None
    if current is not None:
        steps.append(Step(Code.CURRENT_BY_RELEASE, "the device reports this release", current.name))
        if current.retracted:
            message = "the release was retracted: the device goes back to where it came from"
            steps.append(Step(Code.STEP_BACK_TO_ORIGIN, message, current.name))
            return Candidate(rollback_of=current.name)
        return _next(graph, current, steps)
    matching = graph.by_bundle.get(device.bundle) if device.bundle else None
    if matching:
        steps.append(Step(Code.CURRENT_BY_BUNDLE, "the device reports this release's bundle", matching[0].name))
        return _next(graph, matching[0], steps)
    if not device.version:
        steps.append(
            Step(
                Code.NOTHING_REPORTED,
                "the device reports no release, bundle or version known here: it must report one",
                device.name,
                blocking=True,
            )
        )
        return None
    for node in graph.by_version:
        if satisfies(device.version, node.requirement):
            message = f"version {device.version} satisfies '{node.requirement}'"
            steps.append(Step(Code.MATCHED_BY_VERSION, message, node.name, metadata={"version": device.version}))
            return node, None
    steps.append(
        Step(
            Code.NO_MATCH,
            f"no release of the cohort takes version {device.version}: its version requirement would have to",
            device.cohort,
            blocking=True,
            metadata={"version": device.version},
        )
    )
    return None


def _next(graph: CohortGraph, current: ReleaseNode, steps: list[Step]) -> tuple[ReleaseNode, ReleaseNode | None] | None:
    following = graph.releases.get(current.next)
    if following is None:
        message = "the device runs the latest release of its cohort: a newer one would have to be created"
        steps.append(Step(Code.UP_TO_DATE, message, current.name, blocking=True, metadata={"version": current.version}))
        return None
    return following, current


# Step 6.


def _walk(graph: CohortGraph, first: ReleaseNode, steps: list[Step]) -> list[ReleaseNode]:
    path = [first]
    while not path[-1].required and path[-1].next:
        path.append(graph.releases[path[-1].next])
    if path[-1].required and path[-1].next:
        steps.append(Step(Code.REQUIRED_STOP, "this release must be passed through", path[-1].name))
    return path


# Steps 7 and 8.


def _validated(
    device: DeviceFacts,
    current: ReleaseNode | None,
    path: Sequence[ReleaseNode],
    bundles: Mapping[str, BundleFacts],
    now_ms: int,
    steps: list[Step],
) -> list[Candidate]:
    version = device.version or (current.version if current is not None else "")
    found: list[Candidate] = []
    for node in reversed(path):
        if not _admissible(device, version, node, now_ms, steps):
            continue
        if node.security_version < device.security_floor:
            steps.append(
                Step(
                    Code.SECURITY_VERSION_BELOW_FLOOR,
                    f"security version {node.security_version} is below the device's {device.security_floor}",
                    node.name,
                    blocking=True,
                    metadata={"security_version": str(node.security_version), "floor": str(device.security_floor)},
                )
            )
            break
        if not _offerable(device, node.bundle, bundles, steps):
            break
        steps.append(Step(Code.CANDIDATE, "may be offered", node.name, metadata={"version": node.version}))
        found.append(Candidate(release=node.name, bundle=node.bundle))
    return found


def _admissible(device: DeviceFacts, version: str, node: ReleaseNode, now_ms: int, steps: list[Step]) -> bool:
    step: Step | None = None
    if node.retracted:
        step = Step(Code.RELEASE_RETRACTED, "the release was retracted", node.name, blocking=True)
    elif node.disabled:
        step = Step(Code.RELEASE_DISABLED, "the release is disabled: enable it", node.name, blocking=True)
    elif node.requirement and not satisfies(version, node.requirement):
        step = Step(
            Code.VERSION_NOT_SATISFIED,
            f"version '{version}' does not satisfy '{node.requirement}'",
            node.name,
            blocking=True,
            metadata={"version": version, "requirement": node.requirement},
        )
    elif node.schedule_ms > now_ms:
        step = Step(Code.NOT_YET_SCHEDULED, "the release is scheduled for later", node.name, blocking=True)
    elif node.tags and not node.tags & device.tags:
        wanted = ", ".join(sorted(node.tags))
        step = Step(Code.TAGS_NOT_MATCHED, f"the device has none of the tags {wanted}", node.name, blocking=True)
    if step is None:
        return True
    steps.append(step)
    return False


def _offerable(device: DeviceFacts, bundle: str, bundles: Mapping[str, BundleFacts], steps: list[Step]) -> bool:
    facts = bundles.get(bundle)
    if facts is None:
        steps.append(Step(Code.BUNDLE_UNKNOWN, "the bundle is not known here yet", bundle, blocking=True))
    elif not facts.offerable:
        message = f"the bundle may not be offered: {facts.reason or 'not signed'}"
        steps.append(Step(Code.BUNDLE_NOT_OFFERABLE, message, bundle, blocking=True))
    elif device.target not in facts.targets and "portable" not in facts.targets:
        message = f"the bundle has nothing for target '{device.target}'"
        steps.append(Step(Code.TARGET_NOT_SUPPORTED, message, bundle, blocking=True))
    else:
        return True
    return False


# What is not a candidate, and why.


def _explain_plan(device: DeviceFacts, plan: PlanFacts, steps: list[Step]) -> None:
    """Say why a rollout that means this cohort offers nothing here."""
    for stage in plan.stages:
        if stage.cohort != device.cohort or (stage.open and plan.state in _WORKING):
            continue
        current = plan.stages[plan.current_stage].display_name if plan.current_stage < len(plan.stages) else ""
        state = plan.state + (f" ({plan.state_reason})" if plan.state_reason else "")
        metadata = {
            "version": plan.version,
            "stage": stage.display_name,
            "current_stage": current,
            "state": plan.state,
        }
        if stage.open:
            message = f"the rollout of {plan.version} is {state}: it offers nothing"
            steps.append(Step(Code.ROLLOUT_STOPPED, message, plan.rollout, blocking=True, metadata=metadata))
        else:
            message = (
                f"the rollout of {plan.version} is {state} at stage {current}; stage {stage.display_name} never opened"
            )
            steps.append(Step(Code.STAGE_NOT_OPEN, message, plan.rollout, blocking=True, metadata=metadata))
        return
