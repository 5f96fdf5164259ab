"""What operators do to a rollout, and what a new one must satisfy."""

from __future__ import annotations

from typing import Final

from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    check_etag,
)
from services.rollout.domain import attempts, stages
from services.rollout.domain.admission import RETRY_BUDGET, retry_allowed
from services.rollout.domain.commands import Control, CreateRollout, RetryAttempt
from services.rollout.domain.draft import Draft
from services.rollout.domain.state import FORWARD, ProductFacts, State, tries_of

_Rollout = rollout_pb2.Rollout
_Status = rollout_pb2.StageStatus

_ALLOWED: Final[dict[str, frozenset[int]]] = {
    "start": frozenset({_Rollout.STATE_DRAFT}),
    "pause": frozenset({_Rollout.STATE_RUNNING}),
    "resume": frozenset({_Rollout.STATE_PAUSED, _Rollout.STATE_HALTED}),
    "abort": frozenset({_Rollout.STATE_DRAFT, _Rollout.STATE_RUNNING, _Rollout.STATE_PAUSED, _Rollout.STATE_HALTED}),
    "roll_back": frozenset({_Rollout.STATE_RUNNING, _Rollout.STATE_PAUSED, _Rollout.STATE_HALTED}),
    "advance": frozenset({_Rollout.STATE_RUNNING}),
    "retry": frozenset({_Rollout.STATE_RUNNING, _Rollout.STATE_PAUSED, _Rollout.STATE_HALTED}),
    "kill": frozenset(
        {
            _Rollout.STATE_DRAFT,
            _Rollout.STATE_RUNNING,
            _Rollout.STATE_PAUSED,
            _Rollout.STATE_HALTED,
            _Rollout.STATE_ROLLING_BACK,
        }
    ),
}


def create(draft: Draft, command: CreateRollout) -> rollout_pb2.Rollout:
    """Check the plan, copy what the bundle says, and store a draft."""
    if command.name in draft.state.rollouts:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{command.name} exists already", resource=command.name)
    asked = command.rollout
    product = command.name.partition("/rollouts/")[0]
    check_plan(product, asked)
    policy = draft.state.products.get(product, ProductFacts())
    if asked.version and asked.version != command.bundle.version:
        raise InvalidArgumentError("INVALID_FIELD", "the bundle has another version", field="rollout.version")
    image = _Rollout(
        name=command.name,
        uid=draft.ctx.new_uuid("rollout"),
        bundle=command.bundle.name,
        version=command.bundle.version,
        version_requirement=asked.version_requirement or f"< {command.bundle.version}",
        security_version=command.bundle.security_version,
        stages=asked.stages,
        failure_action=asked.failure_action or policy.failure_action,  # type: ignore[arg-type]
        state=_Rollout.STATE_DRAFT,
        stage_statuses=[_Status(state=_Status.STATE_PENDING) for _ in asked.stages],
        control_epoch=1,
        create_time=attempts.timestamp(draft.ctx.now_ms),
        description=asked.description,
        expedited=asked.expedited,
    )
    if asked.HasField("attempt_policy"):
        image.attempt_policy.CopyFrom(asked.attempt_policy)
    stages.save(draft, image, "rollout.created")
    return stages.view(draft.state.rollouts[image.name])


def check_plan(product: str, plan: rollout_pb2.Rollout) -> None:
    """What makes sense whatever the state."""
    if not plan.stages:
        raise InvalidArgumentError("INVALID_FIELD", "a rollout needs a stage", field="rollout.stages")
    names: set[str] = set()
    for index, stage in enumerate(plan.stages):
        field = f"rollout.stages[{index}]"
        if stage.display_name in names or not stage.display_name:
            raise InvalidArgumentError("INVALID_FIELD", "stages need distinct names", field=f"{field}.display_name")
        names.add(stage.display_name)
        if stage.cohort.partition("/cohorts/")[0] != product or not stage.cohort.partition("/cohorts/")[2]:
            raise InvalidArgumentError(
                "INVALID_FIELD", "the cohort must be of the rollout's product", field=f"{field}.cohort"
            )
        if stage.count and stage.share_ppm:
            raise InvalidArgumentError("INVALID_FIELD", "a count or a share, not both", field=f"{field}.count")
        if stage.count and stage.gate.min_sample > stage.count:
            raise InvalidArgumentError(
                "MIN_SAMPLE_UNREACHABLE",
                f"a minimum sample of {stage.gate.min_sample} cannot be reached by {stage.count} devices",
                field=f"{field}.gate.min_sample",
                min_sample=stage.gate.min_sample,
                count=stage.count,
            )


def _in_the_way(state: State, control: rollout_pb2.Rollout) -> list[tuple[rollout_pb2.Rollout, str]]:
    """Other active rollouts of its cohorts, each with a cohort that both want."""
    wanted = {stage.cohort for stage in control.stages}
    found = []
    for name in state.active:
        other = state.rollouts[name].control
        taken = wanted.intersection(stage.cohort for stage in other.stages)
        if taken and name != control.name:
            found.append((other, min(taken)))
    return found


def _busy(other: rollout_pb2.Rollout, cohort: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        "COHORT_BUSY", f"{other.name} is active in {cohort}", cohort=cohort, rollout=other.name
    )


def _start(draft: Draft, image: rollout_pb2.Rollout) -> None:
    """One active rollout per cohort, or an expedited one beside others.

    It pauses those that run there; what is paused, halted or rolling back stays as it is.
    """
    others = _in_the_way(draft.state, image)
    for other, cohort in others:
        if not image.expedited or other.expedited:
            raise _busy(other, cohort)
    image.state = _Rollout.STATE_RUNNING
    image.start_time.CopyFrom(attempts.timestamp(draft.ctx.now_ms))
    stages.open_stage(draft, image, 0)
    stages.save(draft, image, "rollout.started")
    for other, _ in others:
        if other.state == _Rollout.STATE_RUNNING:
            stages.supersede(draft, other.name, image.name)


def control(draft: Draft, command: Control) -> rollout_pb2.Rollout:
    """Check the state, do it, look at the gates again."""
    plan = draft.state.rollouts.get(command.name)
    if plan is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{command.name} does not exist", resource=command.name)
    check_etag(command.etag, plan.control.etag, command.name)
    superseded = command.verb == "pause" and bool(plan.control.superseded_by)
    if plan.control.state not in _ALLOWED[command.verb] and not superseded:
        state = _Rollout.State.Name(plan.control.state)
        raise FailedPreconditionError(
            "WRONG_STATE",
            f"a rollout in {state} cannot {command.verb.replace('_', ' ')}",
            resource=command.name,
            state=state,
        )
    image = stages.edited(draft, command.name)
    match command.verb:
        case "start":
            _start(draft, image)
        case "pause":
            image.state = _Rollout.STATE_PAUSED
            image.state_reason = "PAUSED_BY_OPERATOR"
            image.superseded_by = ""  # now it stays paused when the expedited one ends
            image.control_epoch += 1
            stages.save(draft, image, "rollout.paused", image.current_stage, reason=command.reason)
        case "resume":
            _resume(draft, image, command.reason)
        case "abort":
            stages.abort(draft, command.name, command.reason)
        case "roll_back":
            stages.roll_back(draft, command.name, "ROLLED_BACK_BY_OPERATOR", command.reason)
        case "retry":
            _retry(draft, image, command)
        case "kill":
            stages.kill(draft, command.name, command.reason)
        case "advance":
            _advance(draft, image, command.reason)
    stages.settle(draft)
    return stages.view(draft.state.rollouts[command.name])


def _resume(draft: Draft, image: rollout_pb2.Rollout, reason: str) -> None:
    """Going on after a halt accepts the failures so far; the stage that tripped is open again."""
    for other, cohort in _in_the_way(draft.state, image):
        if other.expedited and not image.expedited:
            raise _busy(other, cohort)
    image.state = _Rollout.STATE_RUNNING
    image.state_reason = ""
    image.superseded_by = ""
    for stage, status in enumerate(image.stage_statuses):
        if status.state != _Status.STATE_FAILED:
            continue
        if status.release:
            status.state = _Status.STATE_OPEN
        else:  # its release could not be made: try again
            status.state = _Status.STATE_PENDING
            stages.open_stage(draft, image, stage)
    image.current_stage = next(
        (index for index, status in enumerate(image.stage_statuses) if status.state != _Status.STATE_PASSED),
        len(image.stages) - 1,
    )
    stages.save(draft, image, "rollout.resumed", image.current_stage, reason=reason)


def _retry(draft: Draft, image: rollout_pb2.Rollout, command: Control) -> None:
    """Another try for devices that failed. For all of them it is one event, however many they are."""
    counts = draft.state.rollouts[image.name].counts
    if not any(each.failed or each.reverted for each in counts):
        raise FailedPreconditionError("NOTHING_TO_RETRY", "no device failed or reverted", resource=image.name)
    for device in command.devices:
        key = f"{device} {image.name}"
        tries = draft.state.tries.get(key)
        if tries is None or not tries.failed:
            raise FailedPreconditionError(
                "NOTHING_TO_RETRY", f"{device} has not failed in this rollout", resource=image.name, device=device
            )
        _allow(draft, key, events_pb2.RetryAllowed(device=device, rollout=image.name, bundle=image.bundle))
    if not command.devices:
        image.retries += 1
    stages.save(draft, image, "rollout.retried", image.current_stage, reason=command.reason)


def _allow(draft: Draft, key: str, allowed: events_pb2.RetryAllowed) -> None:
    """One more try, within the budget; one that is allowed already stays one."""
    failed = draft.state.tries[key].failed
    if failed >= RETRY_BUDGET:
        raise FailedPreconditionError(
            "RETRY_BUDGET_SPENT",
            f"{allowed.device} failed {failed} times",
            device=allowed.device,
            budget=RETRY_BUDGET,
        )
    if not retry_allowed(draft.state, key, allowed.rollout):
        draft.emit(allowed.device, allowed)


_NO_MORE_RETRIES: Final = frozenset(
    {_Rollout.STATE_ABORTED, _Rollout.STATE_KILLED, _Rollout.STATE_ROLLING_BACK, _Rollout.STATE_ROLLED_BACK}
)


def retry_attempt(draft: Draft, command: RetryAttempt) -> rollout_pb2.Attempt:
    """Another try for one device. Asked again, it changes nothing more: one retry is one try."""
    state = draft.state
    attempt = state.attempts.get(command.name)
    if attempt is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{command.name} does not exist", resource=command.name)
    plan = state.rollouts.get(attempt.rollout) if attempt.rollout else None
    if attempt.kind != FORWARD:
        message = "a way back is not retried: point the device at a bundle by an override"
        raise FailedPreconditionError("WRONG_STATE", message, resource=command.name)
    if plan is not None and plan.control.state in _NO_MORE_RETRIES:
        name = _Rollout.State.Name(plan.control.state)
        message = f"its rollout is in {name}: nobody gets its release any more"
        raise FailedPreconditionError("WRONG_STATE", message, resource=command.name, state=name)
    if not attempts.closed_by(attempt) or attempt.superseded:
        raise FailedPreconditionError(
            "NOTHING_TO_RETRY", "it is not the last attempt of its device, or it has not failed", resource=command.name
        )
    allowed = events_pb2.RetryAllowed(
        device=attempt.device,
        rollout=attempt.rollout,
        bundle=attempt.bundle,
        attempt=attempt.name,
        reason=command.reason,
    )
    _allow(draft, tries_of(state, attempt), allowed)
    return attempts.attempt_proto(draft.state, attempt)


def _advance(draft: Draft, image: rollout_pb2.Rollout, reason: str) -> None:
    stage = image.current_stage
    state = image.stage_statuses[stage].state
    if state not in (_Status.STATE_AWAITING_APPROVAL, _Status.STATE_STALLED):
        raise FailedPreconditionError(
            "STAGE_NOT_WAITING",
            "only a stage that awaits approval or is stalled can be advanced",
            resource=image.name,
            stage=stage,
            state=_Status.State.Name(state),
        )
    if state == _Status.STATE_STALLED and not reason:
        raise InvalidArgumentError("INVALID_FIELD", "a stalled stage is advanced with a reason", field="reason")
    stages.pass_stage(draft, image, stage, "rollout.stage_advanced", reason)
