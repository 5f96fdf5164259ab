"""Resolution: which releases a device may be offered, in the order of preference, and why.

The story, step by step (each leaves a coded reason that says what would have to change):

0. A retired or quarantined device gets nothing, not even an override.
1. An active override (latest start wins) hides releases entirely.
2. A device without a cohort gets nothing.
3. A reported release of this cohort is where the device stands. Retracted: the way back is the only candidate, and the
   rollout leader knows where the device came from. The latest: up to date.
4. Else the reported bundle, 5. else the reported version says where it stands or which release it matches.
6. Walk forward to the first required release, else to the latest.
7. Validate from there backwards: disabled, version requirement, schedule, tags, hardware. What fails is stepped over.
8. A bundle that cannot be offered, or lies below the device's security floor, ends the list: nothing older is offered
   in its place. So does a bundle that is not known here, since nobody can say whether it would.

Counts, shares and caps are the rollout leader's business, which knows the claims: it goes down the list. A release
whose bundle the device runs already is a candidate like any other, so that chains of required releases can be walked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from libs.resolution.buckets import in_share
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
from libs.resolution.semver import version_or_none

PORTABLE: Final = "portable"
"""Target of a binary that fits every device."""
_WORKING: Final = frozenset({"RUNNING", "COMPLETED"})
_STOPPED: Final[Mapping[str, tuple[Code, str]]] = {
    "DRAFT": (Code.ROLLOUT_NOT_STARTED, "start it"),
    "PAUSED": (Code.ROLLOUT_PAUSED, "resume it"),
    "HALTED": (Code.ROLLOUT_HALTED, "an operator must resume it, roll it back or abort it"),
    "ROLLING_BACK": (Code.ROLLOUT_ROLLING_BACK, "it will not offer it again: create a new rollout"),
    "ROLLED_BACK": (Code.ROLLOUT_ROLLED_BACK, "it will not offer it again: create a new rollout"),
    "ABORTED": (Code.ROLLOUT_ABORTED, "it will not offer it again: create a new rollout"),
    "KILLED": (Code.ROLLOUT_KILLED, "it will not offer it again: create a new rollout"),
}
_SUPERSEDED: Final = (Code.ROLLOUT_SUPERSEDED, "it goes on when the expedited rollout that paused it ends")
"""Codes are those of the rollout leader's refusals in the same state."""


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
    if device.retired:
        steps.append(Step(Code.DEVICE_RETIRED, "the device is retired for good", device.name, blocking=True))
        return []
    if device.quarantined:
        steps.append(
            Step(
                Code.QUARANTINED,
                "the device is quarantined: its quarantine would have to be lifted",
                device.name,
                blocking=True,
            )
        )
        return []
    override = _active_override(overrides, now_ms)
    if override is not None:
        return _from_override(device, override, bundles, steps)
    if not device.cohort or graph is None:
        steps.append(
            Step(Code.NO_COHORT, "the device is in no cohort: put it into one", device.name, blocking=True)
            if not device.cohort
            else Step(Code.NO_RELEASES, "the cohort has no releases: create one", device.cohort, blocking=True)
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
                "the device runs the override's bundle; releases are hidden until the override ends",
                override.name,
                blocking=True,
            )
        )
        return []
    steps.append(Step(Code.OVERRIDE_ACTIVE, "an active override hides all releases", override.name))
    facts = bundles.get(override.bundle)
    blocked = _unfit(device, override.name, facts) or _unoffered(
        device, override.name, facts, facts.security_version if facts is not None else 0
    )
    if blocked is not None:
        steps.append(blocked)
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
        steps.append(current.current_step)
        if current.retracted:
            message = "the release was retracted: the device goes back to where it came from"
            steps.append(Step(Code.STEP_BACK_TO_ORIGIN, message, current.name))
            return Candidate(rollback_of=current.name)
        return _next(graph, current, steps)
    current = graph.on_bundle(device.bundle)
    if current is not None:
        steps.append(Step(Code.CURRENT_BY_BUNDLE, "the device reports this release's bundle", current.name))
        return _next(graph, current, steps)
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
    node = graph.entry(device.version)
    if node is not None:
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
        steps.append(current.up_to_date_step)
        return None
    return following, current


# Step 6.


def _walk(graph: CohortGraph, first: ReleaseNode, steps: list[Step]) -> Sequence[ReleaseNode]:
    path = graph.path_from(first)
    if path[-1].required and path[-1].next:
        steps.append(Step(Code.REQUIRED_STOP, "this release must be passed through first", path[-1].name))
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
        facts = bundles.get(node.bundle)
        skipped = _inadmissible(device, version, node, now_ms) or _unfit(device, node.name, facts)
        if skipped is not None:
            steps.append(skipped)
            continue
        ending = _unoffered(device, node.name, facts, node.security_version)
        if ending is not None:
            steps.append(ending)
            break
        if node.share_ppm is not None and device.uid and not in_share(node.salt, device.uid, node.share_ppm):
            steps.append(_outside_share(node))
        steps.append(node.candidate_step)
        found.append(node.candidate)
    return found


def _inadmissible(device: DeviceFacts, version: str, node: ReleaseNode, now_ms: int) -> Step | None:
    if node.retracted:
        message = "the release was retracted for good: a newer one would have to be created"
        return Step(Code.RELEASE_RETRACTED, message, node.name, blocking=True)
    if node.disabled:
        return Step(Code.RELEASE_DISABLED, "the release is disabled: enable it", node.name, blocking=True)
    if node.requirement and not satisfies(version, node.requirement):
        said = f"version {version}" if version else "a device that reports no version"
        return Step(
            Code.VERSION_NOT_SATISFIED,
            f"{said} does not satisfy '{node.requirement}': the requirement or the device would have to change",
            node.name,
            blocking=True,
            metadata={"version": version, "requirement": node.requirement},
        )
    if node.schedule_ms > now_ms:
        return Step(
            Code.NOT_YET_SCHEDULED,
            f"the release is scheduled: offered in {(node.schedule_ms - now_ms + 999) // 1000} s",
            node.name,
            blocking=True,
            metadata={"schedule_ms": str(node.schedule_ms), "now_ms": str(now_ms)},
        )
    if node.tags and node.tags.isdisjoint(device.tags):
        wanted = ", ".join(sorted(node.tags))
        message = f"the device has none of the tags {wanted}: give it one of them"
        return Step(Code.TAGS_NOT_MATCHED, message, node.name, blocking=True, metadata={"tags": wanted})
    return None


def _unfit(device: DeviceFacts, subject: str, facts: BundleFacts | None) -> Step | None:
    """The bundle has nothing for this hardware. What is not known is judged by step 8."""
    if facts is None or device.target in facts.targets or PORTABLE in facts.targets:
        return None
    message = f"the bundle has nothing for target '{device.target}': it would need a binary for it"
    metadata = {"bundle": facts.name, "target": device.target, "targets": ", ".join(sorted(facts.targets))}
    return Step(Code.TARGET_NOT_SUPPORTED, message, subject, blocking=True, metadata=metadata)


def _unoffered(device: DeviceFacts, subject: str, facts: BundleFacts | None, security_version: int) -> Step | None:
    """Why the list ends here: security floor and step 8."""
    if security_version < device.security_floor:
        message = (
            f"security version {security_version} is below {device.security_floor}, which the device has confirmed: "
            "only a bundle of at least that security version can follow"
        )
        metadata = {"security_version": str(security_version), "floor": str(device.security_floor)}
        return Step(Code.SECURITY_VERSION_BELOW_FLOOR, message, subject, blocking=True, metadata=metadata)
    if facts is None:
        return Step(Code.BUNDLE_UNKNOWN, "its bundle is not known here yet: ask again", subject, blocking=True)
    if not facts.offerable:
        why = facts.reason or "SIGNATURES_MISSING"
        message = f"its bundle may not be offered ({why}): all binaries must be signed and alive, and the bundle signed"
        metadata = {"bundle": facts.name, "why": why}
        return Step(Code.BUNDLE_NOT_OFFERABLE, message, subject, blocking=True, metadata=metadata)
    return None


def _outside_share(node: ReleaseNode) -> Step:
    """Only a note: a device that holds a claim is granted all the same, and only the leader knows claims."""
    message = f"the device is outside the share of {node.share_ppm} ppm: only a claim it holds already lets it in"
    return Step(Code.NOT_IN_SHARE, message, node.name, metadata={"share_ppm": str(node.share_ppm)})


# What is not a candidate, and why.


def _explain_plan(device: DeviceFacts, plan: PlanFacts, steps: list[Step]) -> None:
    """Say why a rollout that means this cohort offers nothing here: its first stage that does not.

    A device that runs its version or a higher one does not ask.
    """
    running, offered = version_or_none(device.version), version_or_none(plan.version)
    if running is not None and offered is not None and running >= offered:
        return
    for stage in plan.stages:
        if stage.cohort != device.cohort or (stage.open and plan.state in _WORKING):
            continue
        current = plan.stages[plan.current_stage].display_name if plan.current_stage < len(plan.stages) else ""
        state = plan.state + (f" ({plan.state_reason})" if plan.state_reason else "")
        stopped = _STOPPED.get(plan.state)
        if plan.state == "PAUSED" and plan.state_reason == "SUPERSEDED":
            stopped = _SUPERSEDED
        metadata = {
            "version": plan.version,
            "stage": stage.display_name,
            "current_stage": current,
            "state": plan.state,
            "state_reason": plan.state_reason,
        }
        if stopped is not None and (stage.open or plan.state == "DRAFT"):
            code, remedy = stopped
            message = f"the rollout of {plan.version} is {state} and offers nothing: {remedy}"
        else:
            code = Code.STAGE_NOT_OPEN
            remedy = stopped[1] if stopped is not None else "the gates of the stages before it would have to pass"
            message = (
                f"the rollout of {plan.version} is {state} at stage {current}; "
                f"stage {stage.display_name} never opened: {remedy}"
            )
        steps.append(Step(code, message, plan.rollout, blocking=True, metadata=metadata))
        return
