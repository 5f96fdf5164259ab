"""What gateways ask the rollout leader: grants, and leave to switch.

Refusals may say ``closed_for_ms`` for a plan: no use to ask before. The gateway honours that, forgets it at any public
event of the plan, and never holds it longer than the device's own poll interval (protocols.md section 2).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from groundswell.rollout.v1 import rollout_pb2

MAX_ITEMS: Final = 500
LINGER_S: Final = 0.004
MOST_CALLS: Final = 2
"""Calls of each kind under way for one organization, as long as they are answered in time."""
HOLD_S: Final = 0.25
"""Nobody waits longer for calls under way: one that hangs must not hold up the others."""

ClaimCall = Callable[[rollout_pb2.ClaimOffersRequest], Awaitable[rollout_pb2.ClaimOffersResponse]]
SwitchCall = Callable[[rollout_pb2.BatchAuthorizeSwitchRequest], Awaitable[rollout_pb2.BatchAuthorizeSwitchResponse]]
Q = TypeVar("Q")
A = TypeVar("A")


class Questions(Generic[Q, A]):
    """Puts the questions of an organization's devices to the leader, many in one call, each with its own answer.

    A call takes what came up in the last milliseconds, and while two calls are under way whatever comes up waits a
    while for one of them: the busier the leader, the fewer and larger the calls.
    """

    def __init__(self, call: Callable[[str, list[Q]], Awaitable[Sequence[A]]]) -> None:
        self._call = call
        self._waiting: dict[str, list[tuple[Q, asyncio.Future[A]]]] = {}
        self._under_way: Counter[str] = Counter()
        self._running: set[asyncio.Task[None]] = set()

    async def ask(self, organization: str, question: Q) -> A:
        """One device's question; raises what the call raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[A] = loop.create_future()
        queue = self._waiting.get(organization)
        if queue is None:
            queue = self._waiting[organization] = []
            loop.call_later(LINGER_S, self._flush, organization)
            loop.call_later(HOLD_S, self._flush_held, organization, queue)
        queue.append((question, future))
        return await future

    def _flush_held(self, organization: str, queue: list[tuple[Q, asyncio.Future[A]]]) -> None:
        if self._waiting.get(organization) is queue:
            self._flush(organization, most_calls=self._under_way[organization] + 1)

    def _flush(self, organization: str, *, most_calls: int = MOST_CALLS) -> None:
        while self._waiting.get(organization) and self._under_way[organization] < most_calls:
            queue = self._waiting.pop(organization)
            if len(queue) > MAX_ITEMS:
                rest = self._waiting[organization] = queue[MAX_ITEMS:]
                del queue[MAX_ITEMS:]
                asyncio.get_running_loop().call_later(HOLD_S, self._flush_held, organization, rest)
            self._under_way[organization] += 1
            task = asyncio.get_running_loop().create_task(self._send(organization, queue))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _send(self, organization: str, queue: list[tuple[Q, asyncio.Future[A]]]) -> None:
        try:
            results = await self._call(organization, [question for question, _ in queue])
            if len(results) != len(queue):
                raise RuntimeError(f"{len(results)} answers to {len(queue)} questions")
        except Exception as error:  # noqa: BLE001 - every waiting request gets the error that its call met
            for _, future in queue:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), result in zip(queue, results, strict=True):
                if not future.done():
                    future.set_result(result)
        finally:
            self._under_way[organization] -= 1
            if not self._under_way[organization]:
                del self._under_way[organization]
            self._flush(organization)


Claims = Questions[rollout_pb2.ClaimItem, rollout_pb2.ClaimResult]
Switches = Questions[rollout_pb2.AuthorizeSwitchRequest, rollout_pb2.AuthorizeSwitchResult]


def claims(call: ClaimCall, gateway: str) -> Claims:
    """Claims of offers."""

    async def ask(organization: str, items: list[rollout_pb2.ClaimItem]) -> Sequence[rollout_pb2.ClaimResult]:
        request = rollout_pb2.ClaimOffersRequest(organization=organization, gateway=gateway, items=items)
        return (await call(request)).results

    return Questions(ask)


def switches(call: SwitchCall) -> Switches:
    """Questions whether a device may switch now."""

    async def ask(
        organization: str, requests: list[rollout_pb2.AuthorizeSwitchRequest]
    ) -> Sequence[rollout_pb2.AuthorizeSwitchResult]:
        request = rollout_pb2.BatchAuthorizeSwitchRequest(organization=organization, requests=requests)
        return (await call(request)).results

    return Questions(ask)


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
