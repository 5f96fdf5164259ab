"""One check-in, from parsed body to answer. I/O is behind ports; the order of steps is the contract.

1. A view more than two seconds behind, in any service, answers ``none`` with ``GATEWAY_STALE``, and a log of check-ins
   that takes nothing with ``CHECKINS_UNAVAILABLE``: never a stale offer.
2. ``resolve()`` in memory gives ordered candidates and the steps that led to them.
3. ``ask: go`` goes to ``BatchAuthorizeSwitch``; a candidate, when the device works on no attempt, to ``ClaimOffers``.
4. What was said and decided is published; reports are confirmed only when Kafka has them.

Whatever fails on the way to the leader is an answer of ``none`` with a reason: the device polls again.

Most polls end at step 2. They are what a gateway's capacity is counted in, so nothing of them is made twice: an item
of the check-in topic is put together from serialized parts (device, certificate, decision, positions of the views),
because protobuf reads messages that are written one after the other as one message.
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
import msgspec
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import rollout_pb2

from services.gateway.body import CheckInBody, reasons_json, reports, running_state
from services.gateway.claims import Claims, ClosedPlans, Switches
from services.gateway.publisher import Batch, CheckInPublisher
from services.gateway.views import Decided, DeviceView, GatewayViews
from services.gateway.wire import IDLE, agent_said

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Answer:
    kind: str = "none"
    attempt: str = ""
    reasons: list[device_pb2.Reason] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)


def reason(code: str, message: str, subject: str = "", *, blocking: bool = True) -> device_pb2.Reason:
    """A coded reason."""
    return device_pb2.Reason(code=code, message=message, subject=subject, blocking=blocking)


_BACKLOG: Final = reason(
    "CHECKINS_UNAVAILABLE", "the log of check-ins takes nothing just now: nothing is decided or recorded, try later"
)


class CheckInHandler:
    """Answers check-ins of one gateway process."""

    def __init__(
        self,
        views: GatewayViews,
        claims: Claims,
        closed: ClosedPlans,
        switches: Switches,
        publisher: CheckInPublisher,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._views = views
        self._claims = claims
        self._closed = closed
        self._switches = switches
        self._publisher = publisher
        self._now = now
        self._second = (0, "")
        """The last second in which something was answered, as it is written."""

    def handle(self, view: DeviceView, partition: int, raw: bytes, body: CheckInBody) -> bytes | Awaitable[bytes]:
        """The JSON answer for a device whose identity is settled: at once, when there is nothing to wait for."""
        now_ms = int(self._now() * 1000)
        blocked = self._blocked(partition)
        going = body.attempt is not None and body.attempt.ask == "go"
        decided = None if blocked or going else self._views.decide(view, partition, body.running, now_ms)
        item = self._said(view, partition, raw, body, decided)
        if decided is None or (body.attempt is None and decided.candidates):
            answer = _Answer(reasons=blocked)
            return self._asked(view, decided, body, item, answer, now_ms)
        batch = self._publisher.enqueue(view.organization, item + _receipt(now_ms))
        if body.reports and batch is not None:
            return self._confirmed(view, batch, body, decided.reasons)
        return self._written(view, 0, decided.reasons, "none", b"")

    async def _asked(
        self, view: DeviceView, decided: Decided | None, body: CheckInBody, item: bytes, answer: _Answer, now_ms: int
    ) -> bytes:
        """The answer of the leader, or why it is not asked."""
        if decided is not None:
            await self._claim_or_wait(view, decided, body, item, answer)
        elif not answer.reasons:
            await self._ask_go(view, item, answer)
        receipt = device_pb2.Receipt(
            steps=answer.reasons, answer=answer.kind, attempt=answer.attempt, decided_at_ms=now_ms
        )
        item += device_pb2.CheckInItem(receipt=receipt).SerializeToString()
        if answer.kind == "go" and not body.reports:
            item += IDLE  # leave to switch holds the check-in that asked; a grant need not hold the one that claimed
        reasons = reasons_json(answer.reasons) if answer.reasons or decided is None else decided.reasons
        batch = self._publisher.enqueue(view.organization, item)
        more = _members(answer.body)
        if body.reports and batch is not None:
            return await self._confirmed(view, batch, body, reasons, answer.kind, more)
        return self._written(view, 0, reasons, answer.kind, more)

    def _confirmed(
        self, view: DeviceView, batch: Batch, body: CheckInBody, reasons: bytes, kind: str = "none", more: bytes = b""
    ) -> Awaitable[bytes]:
        """Reports are accepted when Kafka has them."""

        def written(sent: bool) -> bytes:  # noqa: FBT001 - as it is told
            return self._written(view, body.reports[-1].counter if sent else 0, reasons, kind, more)

        return self._publisher.confirm(batch, written)

    def _blocked(self, partition: int) -> list[device_pb2.Reason]:
        """Why nothing may be decided now; empty when all is well."""
        stale = self._views.stale_services(partition)
        if stale:
            text = f"this gateway's view of {', '.join(stale)} is behind: no decision, try later"
            return [reason("GATEWAY_STALE", text)]
        return [] if self._publisher.takes(partition) else [_BACKLOG]

    def _said(self, view: DeviceView, partition: int, raw: bytes, body: CheckInBody, decided: Decided | None) -> bytes:
        """The item as far as it is known before the answer is."""
        agent = body.agent
        head = (
            view.entry.said,
            view.certificate.said,
            decided.said if decided is not None else b"",
            self._views.said_positions(view.organization, partition),
            agent_said(agent.instance, agent.boot_id, agent.counter, hashlib.sha256(raw).digest()),
        )
        plain = decided is not None and body.attempt is None and not body.reports
        if plain and not body.attributes and not body.metrics:
            return b"".join((*head, IDLE)) if self._is_idle(view, decided) else b"".join(head)
        item = device_pb2.CheckInItem(idle=plain and self._is_idle(view, decided))
        if body.attempt is not None:
            item.attempt = body.attempt.name
        if body.reports:
            item.reports.extend(reports(body))
        if body.attributes:
            item.attributes.update({key[:64]: value[:256] for key, value in body.attributes.items()})
        if body.metrics:
            item.metrics.update(body.metrics)
        if decided is None:
            item.running.CopyFrom(running_state(body.running))
        return b"".join((*head, item.SerializeToString()))

    def _is_idle(self, view: DeviceView, decided: Decided | None) -> bool:
        """Nothing here can matter to a rollout: see CheckInItem.idle."""
        return (
            decided is not None
            and decided.state == view.entry.reported
            and not self._views.is_managed(decided.state[0])
            and not self._views.has_live_attempt(view.entry.facts.name)
        )

    async def _claim_or_wait(
        self, view: DeviceView, decided: Decided, body: CheckInBody, item: bytes, answer: _Answer
    ) -> None:
        if not body.reports and all(self._closed.is_closed(plan) for plan in decided.plans):
            answer.reasons.append(reason("PLAN_CLOSED", "the rollout had no place a moment ago", decided.plans[0]))
            return
        claim = rollout_pb2.ClaimItem(
            device=view.device.name,
            device_uid=view.device.uid,
            candidates=decided.candidates,
            check_in=device_pb2.CheckInItem.FromString(item),
        )
        try:
            result = await self._claims.ask(view.organization, claim)
        except grpc.aio.AioRpcError as error:
            answer.reasons.append(_leader_unreachable(error))
            return
        answer.reasons.extend(result.reasons)
        self._closed.close(result.closed_plan, result.closed_for_ms, self._views.polling(view.entry.product)[0])
        if result.cancel_attempt:
            answer.kind, answer.attempt = "cancel", result.cancel_attempt
            answer.body = {"cancel": {"attempt": result.cancel_attempt}}
        elif result.HasField("offer"):
            answer.kind, answer.attempt = "offer", result.offer.attempt
            answer.body = {"offer": offer_json(result.offer)}

    async def _ask_go(self, view: DeviceView, item: bytes, answer: _Answer) -> None:
        check_in = device_pb2.CheckInItem.FromString(item)
        answer.attempt = check_in.attempt
        details: dict[str, Any] = {"attempt": check_in.attempt}
        try:
            result = await self._switches.ask(
                view.organization,
                rollout_pb2.AuthorizeSwitchRequest(
                    organization=view.organization,
                    attempt=check_in.attempt,
                    device=check_in.device,
                    check_in=check_in,
                ),
            )
        except grpc.aio.AioRpcError as error:
            answer.kind, answer.body = "wait", {"wait": details}
            answer.reasons.append(_leader_unreachable(error))
            return
        if not result.HasField("response"):
            answer.kind, answer.body = "wait", {"wait": details}
            answer.reasons.append(result.refusal)
            return
        response = result.response
        kinds = {
            rollout_pb2.AuthorizeSwitchResponse.ANSWER_GO: "go",
            rollout_pb2.AuthorizeSwitchResponse.ANSWER_CANCEL: "cancel",
        }
        answer.kind = kinds.get(response.answer, "wait")
        answer.reasons.extend(response.reasons)
        if answer.kind == "go":
            details["valid_for_s"] = response.valid_for_s
        answer.body = {answer.kind: details}

    def _written(self, view: DeviceView, accepted: int, reasons: bytes, kind: str, more: bytes) -> bytes:
        interval, jitter = self._views.polling(view.entry.product)
        poll_after = interval + random.random() * jitter  # noqa: S311 - spreads polls, decides nothing
        at = self._now()
        second = int(at)
        if second != self._second[0]:
            self._second = (second, datetime.fromtimestamp(second, UTC).isoformat()[:-6])
        return (
            f'{{"server_time":"{self._second[1]}.{int((at - second) * 1e6):06d}Z","poll_after_s":{poll_after:.3f},'
            f'"reports_accepted_through":{accepted},"reasons":'
        ).encode() + b'%b,"answer":"%b"%b}' % (reasons, kind.encode(), more)


def _receipt(decided_at_ms: int) -> bytes:
    """Receipt of an idle poll: the last two fields of what its decision has begun."""
    return device_pb2.CheckInItem(
        receipt=device_pb2.Receipt(answer="none", decided_at_ms=decided_at_ms)
    ).SerializeToString()


def _members(body: dict[str, Any]) -> bytes:
    """Members of an object, to be appended to others."""
    return b"," + msgspec.json.encode(body)[1:-1] if body else b""


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


def _leader_unreachable(error: grpc.aio.AioRpcError) -> device_pb2.Reason:
    log.warning("rollout leader did not answer: %s %s", error.code().name, error.details())
    return reason("LEADER_UNAVAILABLE", "the rollout service did not answer: nothing was decided, try later")
