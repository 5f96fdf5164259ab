"""One check-in, from parsed body to answer. I/O is behind ports; the order of steps is the contract.

1. A view more than two seconds behind, in any service, answers ``none`` with ``GATEWAY_STALE``: never a stale offer.
2. ``resolve()`` in memory gives ordered candidates and the steps that led to them.
3. ``ask: go`` goes to ``AuthorizeSwitch``; a candidate, when the device works on no attempt, to ``ClaimOffers``.
4. What was said and decided is published; reports are confirmed only when Kafka has them.

Whatever fails on the way to the leader is an answer of ``none`` with a reason: the device polls again.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import grpc
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import rollout_pb2

from libs.resolution.convert import candidate_of, reason_of
from services.gateway.body import CheckInBody, reports, running_state
from services.gateway.claims import ClosedPlans, OfferClaims
from services.gateway.publisher import CheckInPublisher
from services.gateway.views import DeviceView, GatewayViews

log = logging.getLogger(__name__)

DEFAULT_POLL_S: Final = 60.0
FRESHNESS_S: Final = 2.0
"""A view that is further behind gives no offers (protocols.md section 3)."""

Authorize = Callable[[rollout_pb2.AuthorizeSwitchRequest], Awaitable[rollout_pb2.AuthorizeSwitchResponse]]


@dataclass(slots=True)
class _Answer:
    kind: str = "none"
    attempt: str = ""
    reasons: list[device_pb2.Reason] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)


def reason(code: str, message: str, subject: str = "", *, blocking: bool = True) -> device_pb2.Reason:
    """A coded reason."""
    return device_pb2.Reason(code=code, message=message, subject=subject, blocking=blocking)


class CheckInHandler:
    """Answers check-ins of one gateway process."""

    def __init__(
        self,
        views: GatewayViews,
        claims: OfferClaims,
        closed: ClosedPlans,
        authorize: Authorize,
        publisher: CheckInPublisher,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._views = views
        self._claims = claims
        self._closed = closed
        self._authorize = authorize
        self._publisher = publisher
        self._now = now

    async def handle(self, organization: str, view: DeviceView, raw: bytes, body: CheckInBody) -> dict[str, Any]:
        """The JSON answer for a device whose identity is settled."""
        item = self._item(view, raw, body)
        answer = _Answer()
        stale = self._views.stale_services(organization, FRESHNESS_S)
        if stale:
            answer.reasons.append(
                reason("GATEWAY_STALE", f"this gateway's view of {', '.join(stale)} is behind: no decision, try later")
            )
        else:
            await self._decide(organization, view, body, item, answer)
        steps = item.receipt.steps
        steps.extend(answer.reasons)
        item.receipt.answer = answer.kind
        item.receipt.attempt = answer.attempt
        accepted = 0
        published = self._publisher.enqueue(organization, item)
        if body.reports and await self._publisher.confirm(published):
            accepted = body.reports[-1].counter
        return {
            "server_time": datetime.fromtimestamp(self._now(), UTC).isoformat().replace("+00:00", "Z"),
            "poll_after_s": round(self._poll_after(view), 3),
            "reports_accepted_through": accepted,
            "reasons": [_reason_json(entry) for entry in (answer.reasons or steps[-2:])],
            "answer": answer.kind,
            **answer.body,
        }

    def _item(self, view: DeviceView, raw: bytes, body: CheckInBody) -> device_pb2.CheckInItem:
        running = running_state(body)
        device_reports = reports(body)
        attempt = body.attempt.name if body.attempt else ""
        return device_pb2.CheckInItem(
            device=view.device.name,
            device_uid=view.device.uid,
            instance=body.agent.instance,
            boot_id=body.agent.boot_id,
            counter=body.agent.counter,
            body_sha256=hashlib.sha256(raw).digest(),
            running=running,
            attempt=attempt,
            reports=device_reports,
            attributes={key[:64]: value[:256] for key, value in body.attributes.items()},
            metrics=body.metrics,
            certificate_fingerprint=view.fingerprint,
            idle=self._is_idle(view, running, attempt, has_reports=bool(device_reports)),
            receipt=device_pb2.Receipt(
                decided_at_ms=int(self._now() * 1000), views=self._views.positions(view.organization)
            ),
        )

    def _is_idle(
        self, view: DeviceView, running: registry_pb2.ReportedState, attempt: str, *, has_reports: bool
    ) -> bool:
        """Nothing here can matter to a rollout: see CheckInItem.idle."""
        if has_reports or attempt or running != view.device.reported:
            return False
        return not self._views.is_managed(running.release) and not self._views.has_live_attempt(view.device.name)

    async def _decide(
        self, organization: str, view: DeviceView, body: CheckInBody, item: device_pb2.CheckInItem, answer: _Answer
    ) -> None:
        if body.attempt is not None and body.attempt.ask == "go":
            await self._ask_go(organization, item, answer)
            return
        resolution = self._views.resolve(view, item.running, int(self._now() * 1000))
        item.receipt.steps.extend(reason_of(step) for step in resolution.steps)
        if body.attempt is not None or not resolution.candidates:
            return
        candidates = [candidate_of(one) for one in resolution.candidates]
        plans = [self._views.plan_of(candidate) for candidate in candidates]
        if not body.reports and all(self._closed.is_closed(plan) for plan in plans):
            answer.reasons.append(reason("PLAN_CLOSED", "the rollout had no place a moment ago", plans[0]))
            return
        await self._claim(organization, view, item, candidates, answer)

    async def _ask_go(self, organization: str, item: device_pb2.CheckInItem, answer: _Answer) -> None:
        try:
            response = await self._authorize(
                rollout_pb2.AuthorizeSwitchRequest(
                    organization=organization, attempt=item.attempt, device=item.device, check_in=item
                )
            )
        except grpc.aio.AioRpcError as error:
            answer.kind, answer.attempt = "wait", item.attempt
            answer.body = {"wait": {"attempt": item.attempt}}
            answer.reasons.append(_leader_unreachable(error))
            return
        kinds = {
            rollout_pb2.AuthorizeSwitchResponse.ANSWER_GO: "go",
            rollout_pb2.AuthorizeSwitchResponse.ANSWER_CANCEL: "cancel",
        }
        answer.kind = kinds.get(response.answer, "wait")
        answer.attempt = item.attempt
        answer.reasons.extend(response.reasons)
        details: dict[str, Any] = {"attempt": item.attempt}
        if answer.kind == "go":
            details["valid_for_s"] = response.valid_for_s
        answer.body = {answer.kind: details}

    async def _claim(
        self,
        organization: str,
        view: DeviceView,
        item: device_pb2.CheckInItem,
        candidates: list[releases_pb2.Candidate],
        answer: _Answer,
    ) -> None:
        claim = rollout_pb2.ClaimItem(
            device=item.device, device_uid=item.device_uid, candidates=candidates, check_in=item
        )
        try:
            result = await self._claims.claim(organization, claim)
        except grpc.aio.AioRpcError as error:
            answer.reasons.append(_leader_unreachable(error))
            return
        answer.reasons.extend(result.reasons)
        self._closed.close(result.closed_plan, result.closed_for_ms, self._poll_interval(view))
        if result.cancel_attempt:
            answer.kind, answer.attempt = "cancel", result.cancel_attempt
            answer.body = {"cancel": {"attempt": result.cancel_attempt}}
        elif result.HasField("offer"):
            answer.kind, answer.attempt = "offer", result.offer.attempt
            answer.body = {"offer": offer_json(result.offer)}

    def _poll_interval(self, view: DeviceView) -> float:
        policy = self._views.policy(view.device.name)
        return policy.poll_interval.ToTimedelta().total_seconds() or DEFAULT_POLL_S

    def _poll_after(self, view: DeviceView) -> float:
        interval = self._poll_interval(view)
        jitter = self._views.policy(view.device.name).poll_jitter.ToTimedelta().total_seconds() or interval / 10
        return interval + random.random() * jitter  # noqa: S311 - spreads polls, decides nothing


def offer_json(offer: rollout_pb2.Offer) -> dict[str, Any]:
    """The offer as the device API writes it."""
    kind = "rollback" if offer.kind == rollout_pb2.Attempt.KIND_ROLLBACK else "forward"
    return {
        "attempt": offer.attempt,
        "kind": kind,
        "release": offer.release,
        "bundle": offer.bundle,
        "version": offer.version,
        "security_version": offer.security_version,
        "statement": base64.b64encode(offer.statement).decode(),
        "signatures": [{"key_id": s.key_id, "signature": s.signature} for s in offer.signatures],
        "binaries": [
            {
                "digest": binary.digest,
                "size": binary.size,
                "target": binary.target,
                "metadata": binary.metadata,
                "metadata_digest": binary.metadata_digest,
                "url": binary.link,
            }
            for binary in offer.binaries
        ],
        "lease_s": offer.lease_s,
    }


def _reason_json(entry: device_pb2.Reason) -> dict[str, str]:
    return {"code": entry.code, "message": entry.message, "subject": entry.subject}


def _leader_unreachable(error: grpc.aio.AioRpcError) -> device_pb2.Reason:
    log.warning("rollout leader did not answer: %s %s", error.code().name, error.details())
    return reason("LEADER_UNAVAILABLE", "the rollout service did not answer: nothing was decided, try later")
