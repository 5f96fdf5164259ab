"""Life of a rollout: stages open, pass and re-open; gates trip; the rollout halts, goes back, completes.

``settle`` is called after every fold and every tick for the rollouts that were touched; it runs until nothing follows.

* A stage opens by a task that creates its release; nothing exists in later cohorts before their stage. A later stage of
  the same cohort shares the release.
* The current stage is the first that has not passed. A stage that loses confirmations re-opens and is current again.
* A trip halts at once (the control epoch grows: sealed links die); with ROLL_BACK the release is retracted in every
  cohort that was touched. Attempts without ``go`` are cancelled, in chunks.
* An expedited rollout pauses those that run in its cohorts; whichever way it ends, they go on where they were.
* A kill stops both ways: what is on its way back is cancelled too.
"""

from __future__ import annotations

from typing import Final

from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.eventlog.model import Public, Task, Timer
from services.rollout.domain import attempts, gates
from services.rollout.domain.draft import Draft, organization_of
from services.rollout.domain.state import CANCELLED, FORWARD, Plan, State

_Rollout = rollout_pb2.Rollout
_Status = rollout_pb2.StageStatus

TASK_CREATE: Final = "create-release"
TASK_RETRACT: Final = "retract-release"
TASK_DISABLE: Final = "disable-release"
TASK_HAND_OVER: Final = "end-management"
TIMER_SWEEP: Final = "sweep"

REACHED: Final = frozenset(
    {_Status.STATE_OPEN, _Status.STATE_PASSED, _Status.STATE_STALLED, _Status.STATE_AWAITING_APPROVAL}
)
"""Stage states in which grants are given, as long as the stage is not beyond the current one."""
SUPERSEDED: Final = "SUPERSEDED"


def view(plan: Plan, control: rollout_pb2.Rollout | None = None) -> rollout_pb2.Rollout:
    """The rollout as published: control state with the counts of the fold."""
    image = _Rollout()
    image.CopyFrom(control if control is not None else plan.control)
    for status, counts in zip(image.stage_statuses, plan.counts, strict=True):
        status.in_flight = counts.in_flight
        status.peak_in_flight = counts.peak_in_flight
        status.confirmed = counts.confirmed
        status.soaked = counts.soaked
        status.failed = counts.failed
        status.reverted = counts.reverted
        status.dark = counts.dark
        status.withdrawn = counts.withdrawn
        status.claimed = counts.claimed
        status.rolled_back = counts.rolled_back
        status.held = counts.held
        status.rollback_failed = counts.rollback_failed
        status.expired = counts.expired
        status.cancelled = counts.cancelled
    return image


def edited(draft: Draft, rollout: str) -> rollout_pb2.Rollout:
    """A copy of the control state, to be changed and saved."""
    image = _Rollout()
    image.CopyFrom(draft.state.rollouts[rollout].control)
    return image


def save(
    draft: Draft,
    image: rollout_pb2.Rollout,
    change: str,
    stage: int = 0,
    *,
    published_as: str = "",
    reason: str = "",
) -> None:
    """Append a control change and publish the whole rollout with its counts."""
    image.etag = str(draft.next_version(image.name))
    plan = draft.state.rollouts.get(image.name)
    if plan is not None:
        image = view(plan, image)
    payload = events_pb2.RolloutSaved(rollout=image, change=change, stage=stage, reason=reason)

    def public(state: State) -> tuple[Public, ...]:
        whole = view(state.rollouts[image.name])
        return (Public(image.name, events_pb2.RolloutChanged(rollout=whole, change=published_as or change)),)

    draft.emit(image.name, payload, public)
    draft.touched[image.name] = None


# Opening -----------------------------------------------------------------------------------------------------------


def release_name(rollout: rollout_pb2.Rollout, stage: int) -> str:
    """Derived name of the release of a stage: the natural key that makes its creation idempotent."""
    return f"{rollout.stages[stage].cohort}/releases/{rollout.name.rsplit('/', 1)[1]}-{stage + 1}"


def managed_release(rollout: rollout_pb2.Rollout, stage: int) -> releases_pb2.Release:
    """The release a stage needs in its cohort."""
    return releases_pb2.Release(
        name=release_name(rollout, stage),
        bundle=rollout.bundle,
        version=rollout.version,
        version_requirement=rollout.version_requirement,
        security_version=rollout.security_version,
        rollout=rollout.name,
        description=rollout.description,
    )


def open_stage(draft: Draft, image: rollout_pb2.Rollout, stage: int) -> None:
    """Make a stage current in ``image`` (not saved yet) and open the task that creates its release."""
    image.current_stage = stage
    status = image.stage_statuses[stage]
    if status.state != _Status.STATE_PENDING:
        return  # it was open before and waits for the re-opened one
    status.open_time.CopyFrom(attempts.timestamp(draft.ctx.now_ms))
    for earlier in range(stage):
        if image.stages[earlier].cohort == image.stages[stage].cohort and image.stage_statuses[earlier].release:
            status.release = image.stage_statuses[earlier].release
            status.state = _Status.STATE_OPEN
            return
    status.state = _Status.STATE_OPENING
    request = releases_pb2.CreateManagedReleaseRequest(release=managed_release(image, stage))
    draft.tasks.append(_task(image, TASK_CREATE, stage, request.SerializeToString()))


def _task(rollout: rollout_pb2.Rollout, kind: str, stage: int, payload: bytes) -> Task:
    return Task(f"{kind}:{stage}:{rollout.name}", kind, payload, organization_of(rollout.name))


def stage_of_task(task_id: str) -> tuple[str, int]:
    """Rollout and stage of a task made here."""
    _, stage, rollout = task_id.split(":", 2)
    return rollout, int(stage)


def open_release_tasks(draft: Draft, image: rollout_pb2.Rollout, kind: str) -> None:
    """One task for each release the rollout made."""
    done: set[str] = set()
    for stage, status in enumerate(image.stage_statuses):
        if status.release and status.release not in done:
            done.add(status.release)
            request = releases_pb2.RetractReleaseRequest(name=status.release, rollout=image.name)
            draft.tasks.append(_task(image, kind, stage, request.SerializeToString()))


def release_made(draft: Draft, rollout: str, stage: int, release: str) -> None:
    """The release of a stage exists."""
    image = edited(draft, rollout)
    status = image.stage_statuses[stage]
    if status.state != _Status.STATE_OPENING:
        return
    status.release = release
    status.state = _Status.STATE_OPEN
    save(draft, image, "rollout.stage_opened", stage)
    late = {
        _Rollout.STATE_ROLLING_BACK: TASK_RETRACT,
        _Rollout.STATE_ROLLED_BACK: TASK_RETRACT,
        _Rollout.STATE_ABORTED: TASK_DISABLE,
        _Rollout.STATE_KILLED: TASK_DISABLE,
    }
    kind = late.get(image.state)
    if kind is not None:  # the rollout ended while its release was being made
        request = releases_pb2.RetractReleaseRequest(name=release, rollout=rollout)
        draft.tasks.append(_task(image, kind, stage, request.SerializeToString()))


def release_refused(draft: Draft, rollout: str, stage: int, code: str) -> None:
    """The release of a stage cannot be made: a conflict halts with its reason."""
    image = edited(draft, rollout)
    if image.stage_statuses[stage].state != _Status.STATE_OPENING:
        return
    image.stage_statuses[stage].state = _Status.STATE_FAILED
    if image.state in (_Rollout.STATE_RUNNING, _Rollout.STATE_PAUSED):
        image.state = _Rollout.STATE_HALTED
        image.state_reason = code
        image.superseded_by = ""
        image.control_epoch += 1
    save(draft, image, "rollout.halted", stage)


# Ends --------------------------------------------------------------------------------------------------------------


def halt(draft: Draft, rollout: str, stage: int, code: str) -> None:
    """A gate tripped: stop granting; go back when that is the failure action."""
    image = edited(draft, rollout)
    image.state = _Rollout.STATE_HALTED
    image.state_reason = code
    image.superseded_by = ""  # going on is an operator's decision now
    image.control_epoch += 1
    image.stage_statuses[stage].state = _Status.STATE_FAILED
    save(draft, image, "rollout.halted", stage)
    if image.failure_action == _Rollout.FAILURE_ACTION_ROLL_BACK:
        roll_back(draft, rollout, code)


def roll_back(draft: Draft, rollout: str, code: str, reason: str = "") -> None:
    """Retract the release in every touched cohort; devices come back under the caps."""
    image = edited(draft, rollout)
    image.state = _Rollout.STATE_ROLLING_BACK
    image.state_reason = code
    image.control_epoch += 1
    image.superseded_by = ""
    save(draft, image, "rollout.rolling_back", image.current_stage, reason=reason)
    open_release_tasks(draft, image, TASK_RETRACT)
    sweep(draft, rollout)


def abort(draft: Draft, rollout: str, reason: str) -> None:
    """End it: attempts without go are cancelled, updated devices stay, the release is disabled."""
    _end_at_once(draft, rollout, _Rollout.STATE_ABORTED, "rollout.aborted", "ABORTED_BY_OPERATOR", reason)


def kill(draft: Draft, rollout: str, reason: str) -> None:
    """The kill switch: as an abort, and what is on its way back stops too."""
    _end_at_once(draft, rollout, _Rollout.STATE_KILLED, "rollout.killed", "KILLED_BY_OPERATOR", reason)


def _end_at_once(
    draft: Draft, rollout: str, state: rollout_pb2.Rollout.State.ValueType, change: str, code: str, reason: str
) -> None:
    image = edited(draft, rollout)
    image.state = state
    image.state_reason = code
    image.superseded_by = ""
    image.control_epoch += 1
    image.end_time.CopyFrom(attempts.timestamp(draft.ctx.now_ms))
    save(draft, image, change, image.current_stage, reason=reason)
    open_release_tasks(draft, image, TASK_DISABLE)
    sweep(draft, rollout)
    let_others_go_on(draft, rollout)


def supersede(draft: Draft, older: str, by: str) -> None:
    """Pause a running rollout while an expedited one lasts."""
    image = edited(draft, older)
    image.state = _Rollout.STATE_PAUSED
    image.state_reason = SUPERSEDED
    image.superseded_by = by
    image.control_epoch += 1
    save(draft, image, "rollout.paused", image.current_stage, reason=f"superseded by {by}")


def let_others_go_on(draft: Draft, ended: str) -> None:
    """Rollouts that were paused for this one run again."""
    if not draft.state.rollouts[ended].control.expedited:
        return
    for older in list(draft.state.active):
        if draft.state.rollouts[older].control.superseded_by != ended:
            continue
        image = edited(draft, older)
        by = _overtaken_by(draft.state, image)
        if by:
            image.superseded_by = by
            save(draft, image, "rollout.paused", image.current_stage, reason=f"superseded by {by}")
            continue
        image.state = _Rollout.STATE_RUNNING
        image.state_reason = ""
        image.superseded_by = ""
        save(draft, image, "rollout.resumed", image.current_stage, reason=f"{ended} ended")


def _overtaken_by(state: State, rollout: rollout_pb2.Rollout) -> str:
    """An active expedited rollout that shares a cohort; empty when there is none."""
    cohorts = {stage.cohort for stage in rollout.stages}
    for name in state.active:
        other = state.rollouts[name].control
        if other.expedited and name != rollout.name and cohorts.intersection(stage.cohort for stage in other.stages):
            return name
    return ""


def sweep(draft: Draft, rollout: str) -> None:
    """Cancel attempts without go; what is too much for one decision goes on by a timer."""
    both_ways = draft.state.rollouts[rollout].control.state == _Rollout.STATE_KILLED
    for name in draft.state.live.get(rollout, ()):
        attempt = draft.state.attempts[name]
        if attempt.go or not (both_ways or attempt.kind == FORWARD):
            continue
        if draft.full:
            timer = Timer(
                f"{TIMER_SWEEP}:{rollout}", TIMER_SWEEP, draft.ctx.now_ms, rollout.encode(), organization_of(rollout)
            )
            draft.timers.append(timer)
            return
        attempts.move(
            draft, attempt, CANCELLED, "ROLLOUT_STOPPED", "the rollout was stopped before the device switched"
        )


# Gates -------------------------------------------------------------------------------------------------------------


def settle(draft: Draft) -> None:
    """Look at the gates of everything that was touched, until nothing more follows."""
    while draft.touched:
        rollout = next(iter(draft.touched))
        del draft.touched[rollout]
        plan = draft.state.rollouts.get(rollout)
        if plan is not None:
            _settle_one(draft, rollout, plan)


def _settle_one(draft: Draft, rollout: str, plan: Plan) -> None:
    control = plan.control
    if control.state in (_Rollout.STATE_RUNNING, _Rollout.STATE_PAUSED):
        for stage, status in enumerate(control.stage_statuses):
            if status.state in REACHED:
                code = gates.tripped(control.stages[stage].gate, plan.counts[stage])
                if code:
                    halt(draft, rollout, stage, code)
                    return
    if control.state == _Rollout.STATE_RUNNING:
        _re_open(draft, rollout, plan) or _advance(draft, rollout, plan) or _complete(draft, rollout, plan)
    elif control.state == _Rollout.STATE_ROLLING_BACK:
        _returned(draft, rollout, plan)


def _re_open(draft: Draft, rollout: str, plan: Plan) -> bool:
    for stage, status in enumerate(plan.control.stage_statuses):
        if status.state == _Status.STATE_PASSED and not gates.holds(
            plan.control.stages[stage].gate, plan.counts[stage]
        ):
            image = edited(draft, rollout)
            image.stage_statuses[stage].state = _Status.STATE_OPEN
            image.stage_statuses[stage].ClearField("pass_time")
            image.current_stage = min(stage, image.current_stage)
            image.control_epoch += 1
            save(draft, image, "rollout.stage_opened", stage)
            return True
    return False


def _advance(draft: Draft, rollout: str, plan: Plan) -> bool:
    control = plan.control
    stage = control.current_stage
    state = control.stage_statuses[stage].state
    if state == _Status.STATE_AWAITING_APPROVAL and not gates.holds(control.stages[stage].gate, plan.counts[stage]):
        image = edited(draft, rollout)  # what was to be approved is no longer so
        image.stage_statuses[stage].state = _Status.STATE_OPEN
        save(draft, image, "rollout.stage_opened", stage)
        return True
    if state not in (_Status.STATE_OPEN, _Status.STATE_STALLED):
        return False
    if not gates.passes(control.stages[stage].gate, plan.counts[stage]):
        return False
    image = edited(draft, rollout)
    if control.stages[stage].gate.manual_approval:
        image.stage_statuses[stage].state = _Status.STATE_AWAITING_APPROVAL
        save(draft, image, "rollout.stage_awaiting_approval", stage, published_as="rollout.stage_passed")
        return True
    pass_stage(draft, image, stage, "rollout.stage_passed")
    return True


def pass_stage(draft: Draft, image: rollout_pb2.Rollout, stage: int, change: str, reason: str = "") -> None:
    """Mark a stage passed and open the next that has not passed."""
    image.stage_statuses[stage].state = _Status.STATE_PASSED
    image.stage_statuses[stage].pass_time.CopyFrom(attempts.timestamp(draft.ctx.now_ms))
    image.current_stage = len(image.stages) - 1
    for later, status in enumerate(image.stage_statuses):
        if status.state != _Status.STATE_PASSED:
            open_stage(draft, image, later)
            break
    save(draft, image, change, stage, published_as="rollout.stage_passed", reason=reason)


def _complete(draft: Draft, rollout: str, plan: Plan) -> bool:
    if any(status.state != _Status.STATE_PASSED for status in plan.control.stage_statuses):
        return False
    if any(counts.in_flight for counts in plan.counts):
        return False
    image = edited(draft, rollout)
    image.state = _Rollout.STATE_COMPLETED
    image.end_time.CopyFrom(attempts.timestamp(draft.ctx.now_ms))
    save(draft, image, "rollout.completed", image.current_stage)
    open_release_tasks(draft, image, TASK_HAND_OVER)
    let_others_go_on(draft, rollout)
    return True


def _returned(draft: Draft, rollout: str, plan: Plan) -> None:
    if plan.to_return > 0 or any(counts.in_flight for counts in plan.counts):
        return
    image = edited(draft, rollout)
    image.state = _Rollout.STATE_ROLLED_BACK
    image.end_time.CopyFrom(attempts.timestamp(draft.ctx.now_ms))
    save(draft, image, "rollout.rolled_back", image.current_stage)
    let_others_go_on(draft, rollout)


def check_stalls(draft: Draft) -> None:
    """A stage that could not pass in its time, in stream time, becomes STALLED."""
    for rollout in draft.state.active:
        plan = draft.state.rollouts[rollout]
        stage = plan.control.current_stage
        if (
            plan.control.state != _Rollout.STATE_RUNNING
            or plan.control.stage_statuses[stage].state != _Status.STATE_OPEN
        ):
            continue
        since = plan.counts[stage].open_ms
        if since >= 0 and draft.state.stream_ms - since >= plan.policies[stage].stall_after_ms:
            image = edited(draft, rollout)
            image.stage_statuses[stage].state = _Status.STATE_STALLED
            save(draft, image, "rollout.stage_stalled", stage)
