"""What a leader does besides answering: open tasks and due timers, both taken from the committed state.

A chore is only ever a command in the end, so a leader that has been fenced without knowing it can do harm nowhere but
outside, where tasks are idempotent by contract.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from libs.errors import GroundswellError
from libs.eventlog.config import RuntimeConfig, TaskContext, TaskHandler, partition_of
from libs.eventlog.leader import Leadership
from libs.eventlog.model import Timer
from libs.eventlog.work import CloseTaskWork, CommandWork, TimerWork, Work

logger = logging.getLogger(__name__)

S = TypeVar("S")


def back_off(first_s: float, most_s: float, attempt: int) -> float:
    """Full jitter, so that what failed together does not come back together."""
    return random.uniform(0.5, 1.0) * min(most_s, first_s * 2.0 ** min(attempt, 30))  # noqa: S311 - not a secret


class Failures:
    """Failures in a row of something that is tried for ever: each waits longer, and a success ends the row.

    Whoever forgot the success would, after some days of small troubles, answer the next one with the longest pause.
    """

    __slots__ = ("_first_s", "_most_s", "count")

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self.count = 0

    def end(self) -> None:
        """It worked."""
        self.count = 0

    async def pause(self, most_s: float = math.inf) -> None:
        """It failed, or has to begin again: wait before the next try."""
        self.count += 1
        await asyncio.sleep(back_off(self._first_s, min(self._most_s, most_s), self.count - 1))


class TaskRunner(Generic[S]):
    """Executes open tasks, some at a time, until each one is closed in the log."""

    def __init__(self, leadership: Leadership[S], handlers: Mapping[str, TaskHandler], config: RuntimeConfig) -> None:
        self._leadership = leadership
        self._handlers = handlers
        self._config = config
        self._ready: deque[str] = deque()
        self._known: set[str] = set()
        self._attempts: dict[str, int] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._delayed: set[asyncio.TimerHandle] = set()

    def start(self) -> None:
        """Take over all open tasks, however old, and those still to come."""
        state = self._leadership.replica.state
        state.on_task_opened = self._opened
        for task_id in state.tasks:
            self._opened(task_id)

    async def close(self) -> None:
        self._leadership.replica.state.on_task_opened = None
        for handle in self._delayed:
            handle.cancel()
        self._ready.clear()
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _opened(self, task_id: str) -> None:
        if task_id not in self._known:
            self._known.add(task_id)
            self._ready.append(task_id)
            self._pump()

    def _pump(self) -> None:
        while self._ready and self._leadership.serving and len(self._running) < self._config.task_concurrency:
            running = asyncio.create_task(self._execute(self._ready.popleft()))
            self._running.add(running)
            running.add_done_callback(self._finished)

    def _finished(self, running: asyncio.Task[None]) -> None:
        self._running.discard(running)
        if not running.cancelled():
            self._pump()

    async def _execute(self, task_id: str) -> None:
        state = self._leadership.replica.state
        task = state.tasks.get(task_id)
        if task is None:
            self._forget(task_id)
            return
        attempt = self._attempts.get(task_id, 0)
        before = state.applied
        try:
            handler = self._handlers.get(task.kind)
            if handler is None:
                raise LookupError(f"no handler for tasks of kind {task.kind}")
            context = TaskContext(self._leadership.partition, attempt, self._leadership.replica.snapshot)
            command = await handler(task, context)
            work: Work[S]
            if command is None:
                work = CloseTaskWork(task_id)
            else:
                if not command.principal:
                    command = replace(command, principal="task")
                if command.organization and (
                    partition_of(command.organization, self._config.partitions) != self._leadership.partition
                ):
                    raise ValueError(f"task {task_id} made a command for another partition")
                work = CommandWork(command)
            self._leadership.enqueue(work)
            _, token = await work.done
        except GroundswellError as error:
            if not self._leadership.serving:
                return
            logger.warning("task %s (%s) attempt %d: %s", task_id, task.kind, attempt, error)
            self._again(task_id)
            return
        except Exception:
            logger.exception("task %s (%s) attempt %d failed", task_id, task.kind, attempt)
            self._again(task_id)
            return
        if task_id not in state.tasks:
            self._forget(task_id)
        elif token.position > before:
            # Work in chunks: the command made progress and left the task open on purpose.
            self._attempts.pop(task_id, None)
            self._ready.append(task_id)
        else:
            self._again(task_id)

    def _forget(self, task_id: str) -> None:
        self._known.discard(task_id)
        self._attempts.pop(task_id, None)
        if task_id in self._leadership.replica.state.tasks:
            self._opened(task_id)

    def _again(self, task_id: str) -> None:
        if not self._leadership.serving:
            return
        attempt = self._attempts.get(task_id, 0)
        self._attempts[task_id] = attempt + 1
        handle: asyncio.TimerHandle

        def ready() -> None:
            self._delayed.discard(handle)
            self._ready.append(task_id)
            self._pump()

        delay = back_off(self._config.retry_first_s, self._config.retry_most_s, attempt)
        handle = asyncio.get_running_loop().call_later(delay, ready)
        self._delayed.add(handle)


class TimerRunner(Generic[S]):
    """Fires timers by the leader's clock. The decision, and the clearing with it, is an ordinary command."""

    def __init__(self, leadership: Leadership[S], config: RuntimeConfig) -> None:
        self._leadership = leadership
        self._config = config
        self._due: list[tuple[int, str, int]] = []
        self._failures: dict[str, int] = {}
        self._wake = asyncio.Event()

    async def run(self) -> None:
        state = self._leadership.replica.state
        state.on_timer_set = self._set
        for timer in state.timers.values():
            self._set(timer)
        try:
            while True:
                now = self._config.wall_clock_ms()
                fired: list[tuple[str, TimerWork[S]]] = []
                while self._due and self._due[0][0] <= now and len(fired) < self._config.max_batch_events:
                    _, timer_id, at_ms = heapq.heappop(self._due)
                    known = state.timers.get(timer_id)
                    if known is not None and known.at_ms == at_ms:
                        work: TimerWork[S] = TimerWork(timer_id)
                        try:
                            self._leadership.enqueue(work)
                        except GroundswellError as error:
                            work.done.set_exception(error)
                        fired.append((timer_id, work))
                for timer_id, work in fired:
                    await self._settle(timer_id, work)
                if not fired:
                    await self._sleep(now)
        finally:
            state.on_timer_set = None

    def _set(self, timer: Timer) -> None:
        heapq.heappush(self._due, (timer.at_ms, timer.timer_id, timer.at_ms))
        self._wake.set()

    async def _settle(self, timer_id: str, work: TimerWork[S]) -> None:
        try:
            await work.done
        except GroundswellError as error:
            failures = self._failures.get(timer_id, 0)
            self._failures[timer_id] = failures + 1
            logger.error("timer %s failed %d times: %s", timer_id, failures + 1, error)  # noqa: TRY400
            timer = self._leadership.replica.state.timers.get(timer_id)
            if timer is not None:
                pause = back_off(self._config.retry_first_s, self._config.retry_most_s, failures)
                again_ms = self._config.wall_clock_ms() + int(pause * 1000)
                heapq.heappush(self._due, (again_ms, timer_id, timer.at_ms))
        else:
            self._failures.pop(timer_id, None)

    async def _sleep(self, now: int) -> None:
        self._wake.clear()
        # At most a second: wall clocks jump, and the loop's clock does not jump with them.
        pause = min(1.0, max(0.0, (self._due[0][0] - now) / 1000)) if self._due else None
        try:
            async with asyncio.timeout(pause):
                await self._wake.wait()
        except TimeoutError:
            pass
