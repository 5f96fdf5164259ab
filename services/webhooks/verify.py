"""Asks a receiver whether it wants an endpoint's deliveries, and sends ``webhook.test_fire`` by hand.

A URL is easily mistaken, and anybody can type somebody else's: so nothing but this is sent before the receiver has
shown, in the way that the endpoint's ``verification`` names, that it is meant. The nonce is derived, never stored; a
receiver that does not read the body cannot repeat it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Protocol

from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.eventlog import Command, Task, TaskContext
from libs.names import organization_of
from services.webhooks.lane import attempt_of
from services.webhooks.model import RecordVerification, State
from services.webhooks.schema import fire_body
from services.webhooks.signing import Signer, webhook_id
from services.webhooks.transport import Outcome, Target, Transport

Image = pb.WebhookEndpoint
PAUSE_S: Final = 0.2
"""Between two questions to one endpoint, whoever asks."""
MOST_PACED: Final = 1_000


class Asks(Protocol):
    """What the servicer needs."""

    async def ask(self, image: Image) -> str: ...

    async def test_fire(self, image: Image) -> pb.DeliveryAttempt: ...


class Verifier:
    """See the module."""

    def __init__(self, transport: Transport, signer: Signer, origin: str, wall_clock_ms: Callable[[], int]) -> None:
        self._transport = transport
        self._signer = signer
        self._origin = origin
        """How we call ourselves to receivers that are asked after CloudEvents."""
        self._now_ms = wall_clock_ms
        self._free_at: dict[str, float] = {}
        """By endpoint, on the loop's clock."""

    async def task(self, task: Task, ctx: TaskContext, /) -> Command | None:
        """One attempt; what came of it decides whether there will be another."""
        name = task.payload.decode()
        state: Any = ctx.snapshot().state
        endpoint = state.endpoints.get(name) if isinstance(state, State) else None
        if endpoint is None or endpoint.image.state != Image.STATE_PENDING:
            return None
        image = endpoint.image
        problem = await self.ask(image)
        payload = RecordVerification(name, image.uid, image.url, problem, task.task_id)
        return Command(organization_of(name), payload, principal="webhooks")

    async def ask(self, image: Image) -> str:
        """Ask once. The problem, as reason code, colon and words; empty when the receiver wants the deliveries."""
        await self._pace(image.name)
        if image.verification == Image.VERIFICATION_CLOUDEVENTS:
            headers = {"webhook-request-origin": self._origin}
            outcome = await self._transport.options(Target(image.url, image.ca_pem), headers)
            return _allowed(outcome, self._origin)
        outcome = await self._fire(image)
        if not outcome.succeeded or image.verification == Image.VERIFICATION_TEST_FIRE:
            return outcome.error
        return _repeated(outcome.body, self._signer.nonce(image))

    async def test_fire(self, image: Image) -> pb.DeliveryAttempt:
        """Send one now and tell what came of it."""
        await self._pace(image.name)
        at_ms = self._now_ms()
        return attempt_of(await self._fire(image), at_ms)

    async def _pace(self, name: str) -> None:
        """Whoever asks too often waits: an endpoint that is not verified is perhaps somebody else's address."""
        now = asyncio.get_running_loop().time()
        if len(self._free_at) > MOST_PACED:
            self._free_at = {each: at for each, at in self._free_at.items() if at > now}
        at = max(now, self._free_at.get(name, 0.0))
        self._free_at[name] = at + PAUSE_S
        await asyncio.sleep(at - now)

    async def _fire(self, image: Image) -> Outcome:
        now_ms = self._now_ms()
        event_id = hashlib.sha256(f"{image.uid}/{now_ms}".encode()).hexdigest()[:32]
        body = fire_body(image.name, organization_of(image.name), event_id, now_ms, self._signer.nonce(image))
        identifier = webhook_id(image.uid, event_id)
        headers = {
            "content-type": "application/json",
            "webhook-id": identifier,
            "webhook-timestamp": str(now_ms // 1000),
            "webhook-signature": self._signer.ring(image).signature(identifier, now_ms, body),
        }
        began = time.perf_counter()
        outcome = await self._transport.post(Target(image.url, image.ca_pem), headers, body)
        return replace(outcome, duration_ms=round((time.perf_counter() - began) * 1000))


def _allowed(outcome: Outcome, origin: str) -> str:
    if not outcome.succeeded:
        return outcome.error
    if outcome.allowed_origin in {"*", origin}:
        return ""
    return f"ORIGIN_NOT_ALLOWED: answer OPTIONS with 'WebHook-Allowed-Origin: {origin}'"


def _repeated(body: bytes, nonce: str) -> str:
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    challenge = said.get("challenge") if isinstance(said, dict) else None
    if isinstance(challenge, str) and hmac.compare_digest(challenge.encode(), nonce.encode()):
        return ""
    return 'CHALLENGE_NOT_REPEATED: answer webhook.test_fire with 2xx and {"challenge": <data.challenge>}'
