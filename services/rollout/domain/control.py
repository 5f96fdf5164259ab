"""What operators do to a rollout, and what a new one must satisfy."""

from __future__ import annotations

from typing import Final

from groundswell.rollout.v1 import rollout_pb2

from libs.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    check_etag,
)
from services.rollout.domain import attempts, stages
from services.rollout.domain.commands import Control, CreateRollout
from services.rollout.domain.draft import Draft
from services.rollout.domain.state import State

_Rollout = rollout_pb2.Rollout
_Status = rollout_pb2.StageStatus

_ALLOWED: Final[dict[str, frozenset[int]]] = {
    "start": frozenset({_Rollout.STATE_DRAFT}),
    "pause": frozenset({_Rollout.STATE_RUNNING}),
    "resume": frozenset({_Rollout.STATE_PAUSED, _Rollout.STATE_HALTED}),
    "abort": frozenset({_Rollout.STATE_DRAFT, _Rollout.STATE_RUNNING, _Rollout.STATE_PAUSED, _Rollout.STATE_HALTED}),
    "roll_back": frozenset({_Rollout.STATE_RUNNING, _Rollout.STATE_PAUSED, _Rollout.STATE_HALTED}),
    "advance": frozenset({_Rollout.STATE_RUNNING}),
}


def create(draft: Draft, command: CreateRollout) -> rollout_pb2.Rollout:
    """Check the plan, copy what the bundle says, and store a draft."""
    if command.name in draft.state.rollouts:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{command.name} exists already", resource=command.name)
    asked = command.rollout
    check_plan(command.name.partition("/rollouts/")[0], asked)
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
        failure_action=asked.failure_action or _Rollout.FAILURE_ACTION_PAUSE,
        state=_Rollout.STATE_DRAFT,
        stage_statuses=[_Status(state=_Status.STATE_PENDING) for _ in asked.stages],
        control_epoch=1,
        create_time=attempts.timestamp(draft.ctx.now_ms),
        description=asked.description,
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


def _check_cohorts_free(state: State, control: rollout_pb2.Rollout) -> None:
    """One active rollout per cohort."""
    wanted = {stage.cohort for stage in control.stages}
    for name in state.active:
        if name == control.name:
            continue
        taken = wanted.intersection(stage.cohort for stage in state.rollouts[name].control.stages)
        if taken:
            cohort = min(taken)
            raise FailedPreconditionError("COHORT_BUSY", f"{name} is active in {cohort}", cohort=cohort, rollout=name)


def control(draft: Draft, command: Control) -> rollout_pb2.Rollout:
    """Check the state, do it, look at the gates again."""
    plan = draft.state.rollouts.get(command.name)
    if plan is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{command.name} does not exist", resource=command.name)
    check_etag(command.etag, plan.control.etag, command.name)
    if plan.control.state not in _ALLOWED[command.verb]:
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
            _check_cohorts_free(draft.state, image)
            image.state = _Rollout.STATE_RUNNING
            image.start_time.CopyFrom(attempts.timestamp(draft.ctx.now_ms))
            stages.open_stage(draft, image, 0)
            stages.save(draft, image, "rollout.started")
        case "pause":
            image.state = _Rollout.STATE_PAUSED
            image.state_reason = "PAUSED_BY_OPERATOR"
            image.control_epoch += 1
            stages.save(draft, image, "rollout.paused", image.current_stage, reason=command.reason)
        case "resume":
            _resume(draft, image, command.reason)
        case "abort":
            stages.abort(draft, command.name, command.reason)
        case "roll_back":
            stages.roll_back(draft, command.name, "ROLLED_BACK_BY_OPERATOR", command.reason)
        case "advance":
            _advance(draft, image, command.reason)
    stages.settle(draft)
    return stages.view(draft.state.rollouts[command.name])


def _resume(draft: Draft, image: rollout_pb2.Rollout, reason: str) -> None:
    """Going on after a halt accepts the failures so far; the stage that tripped is open again."""
    image.state = _Rollout.STATE_RUNNING
    image.state_reason = ""
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
