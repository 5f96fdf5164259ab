"""Asks the rollout leader for grants: requests of the last few milliseconds go in one call per organization.

Refusals may say ``closed_for_ms`` for a plan: no use to ask before. The gateway honours that, forgets it at any public
event of the plan, and never holds it longer than the device's own poll interval (protocols.md section 2).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from groundswell.rollout.v1 import rollout_pb2

MAX_ITEMS: Final = 500
LINGER_S: Final = 0.004

ClaimCall = Callable[[rollout_pb2.ClaimOffersRequest], Awaitable[rollout_pb2.ClaimOffersResponse]]
_Waiting = tuple[rollout_pb2.ClaimItem, "asyncio.Future[rollout_pb2.ClaimResult]"]


class OfferClaims:
    """Coalesces claims per organization."""

    def __init__(self, call: ClaimCall, gateway: str) -> None:
        self._call = call
        self._gateway = gateway
        self._waiting: dict[str, list[_Waiting]] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def claim(self, organization: str, item: rollout_pb2.ClaimItem) -> rollout_pb2.ClaimResult:
        """One device's claim; raises what the call raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[rollout_pb2.ClaimResult] = loop.create_future()
        queue = self._waiting.get(organization)
        if queue is None:
            queue = self._waiting[organization] = []
            loop.call_later(LINGER_S, self._flush, organization, queue)
        queue.append((item, future))
        if len(queue) >= MAX_ITEMS:
            self._flush(organization, queue)
        return await future

    def _flush(self, organization: str, queue: list[_Waiting]) -> None:
        if self._waiting.get(organization) is not queue:
            return
        del self._waiting[organization]
        task = asyncio.get_running_loop().create_task(self._send(organization, queue))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _send(self, organization: str, queue: list[_Waiting]) -> None:
        request = rollout_pb2.ClaimOffersRequest(
            organization=organization, gateway=self._gateway, items=[item for item, _ in queue]
        )
        try:
            response = await self._call(request)
            if len(response.results) != len(queue):
                raise RuntimeError(f"{len(response.results)} results for {len(queue)} claims")
        except Exception as error:  # noqa: BLE001 - every waiting request gets the error that its call met
            for _, future in queue:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(queue, response.results, strict=True):
            if not future.done():
                future.set_result(result)


class ClosedPlans:
    """Which plans are closed, until when (monotonic seconds)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def close(self, plan: str, closed_for_ms: int, poll_interval_s: float) -> None:
        """Remember a refusal, never longer than one poll interval."""
        if plan and closed_for_ms:
            self._until[plan] = self._clock() + min(closed_for_ms / 1000, poll_interval_s)

    def is_closed(self, plan: str) -> bool:
        """Whether asking now is of no use."""
        until = self._until.get(plan)
        if until is None:
            return False
        if until <= self._clock():
            del self._until[plan]
            return False
        return True

    def reopen(self, plan: str) -> None:
        """A public event of the plan arrived."""
        self._until.pop(plan, None)
