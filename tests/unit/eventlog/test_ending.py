from __future__ import annotations

import asyncio
import contextlib

import pytest

from libs.eventlog import ending


async def test_a_task_that_loses_its_first_cancellation_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AGAIN_S", 0.01)
    begun, never = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await never.wait()
        await never.wait()

    async def failing() -> None:
        raise ValueError("ended by itself")

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(failing())]
    await begun.wait()
    await ending.end(*tasks)
    assert [task.done() for task in tasks] == [True, True]


async def test_nothing_to_end_is_no_error() -> None:
    await ending.end()
