"""ClaimOffers and AuthorizeSwitch: fold the check-in, then grant, answer again, wait or cancel.

The fold and the gates come first: a failure in this very check-in may trip the gate, and then nothing is granted.
"""

from __future__ import annotations

from groundswell.device.v1 import device_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.errors import DomainError, FailedPreconditionError, PermissionDeniedError
from services.rollout.domain import attempts, stages
from services.rollout.domain.admission import (
    INBOX_LIMIT_MS,
    NOT_YET_KNOWN_MS,
    Admitted,
    Refusal,
    device_refusal,
    judge_override,
    judge_release,
    standing_refusal,
)
from services.rollout.domain.commands import AuthorizeSwitches, ClaimOffers
from services.rollout.domain.draft import Draft
from services.rollout.domain.observation import Observation
from services.rollout.domain.observe import fold_all_but_counter, fold_item
from services.rollout.domain.rollback import Hold, hold, judge_way_back
from services.rollout.domain.state import (
    BOOTED,
    CANCELLED,
    EXPIRED,
    FAILED,
    FORWARD,
    GRANTED,
    INSTALLED,
    REVERTED,
    ROLLBACK,
    Attempt,
    Claim,
    Running,
    Seen,
)

_Answer = rollout_pb2.AuthorizeSwitchResponse
_ENDED = frozenset({FAILED, REVERTED, EXPIRED, CANCELLED})
_STALE = Refusal("INBOX_STALE", "the leader's view of facts from elsewhere is behind", closed_for_ms=NOT_YET_KNOWN_MS)


def _reason(refusal: Refusal) -> device_pb2.Reason:
    return attempts.reason(refusal.code, refusal.message, refusal.subject, blocking=True)


def claim_offers(draft: Draft, command: ClaimOffers) -> rollout_pb2.ClaimOffersResponse:
    """One answer for each item, each judged on the state the earlier ones left."""
    request = command.request
    response = rollout_pb2.ClaimOffersResponse()
    for item in request.items:
        if item.device.split("/", 2)[:2] != ["organizations", request.organization]:
            refusal = Refusal("DEVICE_NOT_YET_KNOWN", "the device is of another organization", item.device)
            _refuse(response.results.add(), refusal)
            continue
        _claim(draft, item, request.gateway, response.results.add(), stale=command.inbox_lag_ms > INBOX_LIMIT_MS)
    return response


def _refuse(result: rollout_pb2.ClaimResult, refusal: Refusal) -> None:
    result.reasons.append(_reason(refusal))
    if refusal.closed_for_ms and (refusal.plan or not result.closed_for_ms):
        result.closed_for_ms = refusal.closed_for_ms
        result.closed_plan = refusal.plan


def _claim(
    draft: Draft, item: rollout_pb2.ClaimItem, gateway: str, result: rollout_pb2.ClaimResult, *, stale: bool
) -> None:
    if item.check_in.device == item.device:
        fold_item(draft, item.check_in, gateway)
        stages.settle(draft)
    refusal = device_refusal(draft.state, draft.ctx, item.device, item.device_uid)
    if stale:
        refusal = _STALE
    seen = draft.state.seen.get(item.device, Seen())
    if seen.live:
        _answer_live(draft, draft.state.attempts[seen.live], item, result, refusal)
        return
    if _say_if_ended(draft, item, result):
        return  # first it forgets, then it may be offered something new
    if refusal is not None:
        _refuse(result, refusal)
        return
    refused: list[device_pb2.Reason] = []
    for candidate in item.candidates:
        verdict = _judge(draft, item.device, candidate)
        if isinstance(verdict, Admitted):
            del result.reasons[:]
            result.closed_for_ms = 0
            result.closed_plan = ""
            attempt = _grant(draft, item, candidate, verdict, refused)
            _offer(attempt, result)
            return
        if isinstance(verdict, Hold):
            hold(draft, item.device, candidate.rollback_of, verdict)
            stages.settle(draft)
            verdict = verdict.refusal
        refused.append(_reason(verdict))
        _refuse(result, verdict)
        if verdict.ends:
            return


def _judge(draft: Draft, device: str, candidate: releases_pb2.Candidate) -> Admitted | Refusal | Hold:
    facts, seen = draft.state.devices[device], draft.state.seen.get(device, Seen())
    if candidate.rollback_of:
        return judge_way_back(draft.state, draft.ctx, facts, seen, candidate.rollback_of)
    if candidate.bundle_override:
        return judge_override(draft.state, draft.ctx, facts, seen, candidate)
    return judge_release(draft.state, draft.ctx, facts, seen, candidate)


def _grant(
    draft: Draft,
    item: rollout_pb2.ClaimItem,
    candidate: releases_pb2.Candidate,
    admitted: Admitted,
    refused: list[device_pb2.Reason],
) -> Attempt:
    state = draft.state
    claim = state.claims.get(admitted.claim)
    bundle = admitted.bundle.bundle
    running = state.seen.get(item.device, Seen()).running
    kind = ROLLBACK if candidate.rollback_of else FORWARD
    attempt = rollout_pb2.Attempt(
        name=f"{item.device}/attempts/{draft.ctx.new_uuid(item.device)}",
        device=item.device,
        device_uid=state.devices[item.device].uid,
        release=admitted.release,
        bundle=bundle.name,
        rollout=admitted.rollout,
        stage=admitted.stage,
        kind=kind,
        rollback_of=candidate.rollback_of,
        state=GRANTED,
        ordinal=len(claim.attempts) + 1 if claim is not None else 1,
        security_version=bundle.security_version,
        grant_time=attempts.timestamp(draft.ctx.now_ms),
    )
    before = 0
    if admitted.rollout:
        before = state.rollouts[admitted.rollout].counts[admitted.stage].in_flight
    else:
        plain = state.plain.get(admitted.release or bundle.name)
        before = plain.in_flight if plain is not None else 0
    came_from = _came_from(claim, running)
    subject = admitted.rollout or admitted.came_through or admitted.release
    words = "goes back to the release it came from" if kind == ROLLBACK else "admitted by its plan"
    granted = events_pb2.AttemptGranted(
        attempt=attempt,
        reasons=[*refused, attempts.reason("GRANTED", words, subject, in_flight=before + 1, cap=admitted.cap)],
        steps=item.check_in.receipt.steps,
        views=item.check_in.receipt.views,
        in_flight_after=before + 1,
        cap=admitted.cap,
        came_from_release=came_from.release,
        came_from_bundle=came_from.bundle,
        came_from_version=came_from.version,
        version=bundle.version,
    )
    return attempts.grant(draft, granted)


def _came_from(claim: Claim | None, running: Running) -> Running:
    """Written by the first attempt of a claim, never overwritten."""
    return claim.came_from if claim is not None and claim.attempts else running


def _offer(attempt: Attempt, result: rollout_pb2.ClaimResult) -> None:
    """The servicer completes the offer with statement, binaries and sealed links."""
    if not result.reasons:
        result.reasons.extend(attempt.receipt.reasons)
    result.live_attempt = attempt.name
    result.offer.attempt = attempt.name
    result.offer.kind = attempt.kind  # type: ignore[assignment]
    result.offer.release = attempt.release
    result.offer.bundle = attempt.bundle
    result.offer.version = attempt.version
    result.offer.security_version = attempt.security_version
    result.offer.lease_s = attempt.policy.lease_ms / 1000


def _answer_live(
    draft: Draft,
    attempt: Attempt,
    item: rollout_pb2.ClaimItem,
    result: rollout_pb2.ClaimResult,
    refusal: Refusal | None,
) -> None:
    """A live attempt is answered again without a new event, unless something stands against it now."""
    refusal = refusal or standing_refusal(draft.state, draft.ctx, attempt)
    if refusal is not None:
        _refuse(result, refusal)
        if refusal.final and not attempt.go:
            attempts.move(draft, attempt, CANCELLED, refusal.code, refusal.message)
            stages.settle(draft)
            result.cancel_attempt = attempt.name
        else:
            result.live_attempt = attempt.name
        return
    if attempt.state == GRANTED or (attempt.state < BOOTED and item.check_in.attempt != attempt.name):
        _offer(attempt, result)
        return
    result.live_attempt = attempt.name
    result.reasons.append(attempts.reason("ATTEMPT_IN_PROGRESS", "the device works on its attempt", attempt.name))


def _say_if_ended(draft: Draft, item: rollout_pb2.ClaimItem, result: rollout_pb2.ClaimResult) -> bool:
    """The agent works on an attempt that has ended, or that never was."""
    name = item.check_in.attempt
    attempt = draft.state.attempts.get(name)
    if not name or (attempt is not None and attempt.device == item.device and attempt.state not in _ENDED):
        return False
    result.cancel_attempt = name
    result.reasons.append(attempts.reason("ATTEMPT_ENDED", "the attempt has ended or never was", name))
    return True


# Leave to switch ---------------------------------------------------------------------------------------------------


def authorize_switches(draft: Draft, command: AuthorizeSwitches) -> rollout_pb2.BatchAuthorizeSwitchResponse:
    """Each is decided for itself, on the state the earlier ones left; a refusal concerns no other."""
    response = rollout_pb2.BatchAuthorizeSwitchResponse()
    for request in command.request.requests:
        result = response.results.add()
        try:
            result.response.CopyFrom(authorize_switch(draft, request, command.inbox_lag_ms))
        except DomainError as error:
            result.refusal.CopyFrom(attempts.reason(error.reason, error.message, blocking=True))
    return response


def authorize_switch(
    draft: Draft, request: rollout_pb2.AuthorizeSwitchRequest, inbox_lag_ms: float
) -> rollout_pb2.AuthorizeSwitchResponse:
    """Every admission check again except the caps; GO_GIVEN is in the log before the answer is.

    Raises before anything is drafted, or not at all.
    """
    attempt = draft.state.attempts.get(request.attempt)
    if attempt is not None and attempt.device != request.device:
        raise PermissionDeniedError("ATTEMPT_NOT_YOURS", "the attempt is of another device", attempt=request.attempt)
    observed: Observation | None = None
    if request.HasField("check_in"):
        if request.check_in.device != request.device:
            raise FailedPreconditionError(
                "IDENTITY_MISMATCH", "the check-in is of another device", device=request.device
            )
        _, observed = fold_all_but_counter(draft, request.check_in, "")
        stages.settle(draft)
    attempt = draft.state.attempts.get(request.attempt)
    refusal = _against_switching(draft, request.attempt, attempt, inbox_lag_ms)
    if refusal is None:
        return _go(draft, draft.state.attempts[request.attempt], observed)
    if observed is not None:
        observed.emit(draft)
    if attempt is not None and attempt.in_flight and refusal.final:
        # After go nothing is cancelled: a device that asks again has not switched; told to forget it, it has failed.
        attempts.move(draft, attempt, FAILED if attempt.go else CANCELLED, refusal.code, refusal.message)
        stages.settle(draft)
    return _switch(_Answer.ANSWER_CANCEL if refusal.final else _Answer.ANSWER_WAIT, refusal)


def _against_switching(draft: Draft, name: str, attempt: Attempt | None, inbox_lag_ms: float) -> Refusal | None:
    """What stands against it now. Nothing of it depends on how often the device was seen."""
    if attempt is None:
        return Refusal("ATTEMPT_UNKNOWN", "there is no such attempt", name, final=True)
    if not attempt.in_flight:
        return Refusal("ATTEMPT_ENDED", "the attempt has ended", name, final=True)
    if attempt.state > INSTALLED:
        return Refusal("ALREADY_SWITCHED", "the device reported its new slot", name)
    return _STALE if inbox_lag_ms > INBOX_LIMIT_MS else standing_refusal(draft.state, draft.ctx, attempt)


def _go(draft: Draft, attempt: Attempt, observed: Observation | None) -> rollout_pb2.AuthorizeSwitchResponse:
    valid_for_s = attempt.policy.go_valid_ms / 1000
    payload = events_pb2.GoGiven(
        attempt=attempt.name,
        device=attempt.device,
        valid_for_s=valid_for_s,
        observed=observed.payload if observed is not None else None,
    )
    draft.emit(attempt.name, payload)
    response = _Answer(answer=_Answer.ANSWER_GO, valid_for_s=valid_for_s)
    response.reasons.append(attempts.reason("GO_GIVEN", "all checks passed again", attempt.name))
    return response


def _switch(
    answer: rollout_pb2.AuthorizeSwitchResponse.Answer.ValueType, refusal: Refusal
) -> rollout_pb2.AuthorizeSwitchResponse:
    closed = refusal.closed_for_ms if answer == _Answer.ANSWER_WAIT else 0
    return _Answer(answer=answer, reasons=[_reason(refusal)], closed_for_ms=closed)
