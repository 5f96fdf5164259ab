"""Steps of the Kafka client are bounded even when they lose cancellations, as aiokafka's sometimes do."""

from __future__ import annotations

import asyncio

import pytest

from libs.eventlog import ending
from libs.eventlog.kafka import close, within


class Deaf:
    """A step that loses its first cancellation and goes on."""

    def __init__(self) -> None:
        self.lost = 0
        self.ended = asyncio.Event()

    async def run(self) -> None:
        try:
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.lost += 1
                    if self.lost == 2:
                        raise
        finally:
            self.ended.set()


async def test_what_is_done_in_time_is_returned() -> None:
    async def step() -> str:
        return "done"

    assert await within(5.0, step()) == "done"


async def test_what_it_raises_is_raised() -> None:
    async def step() -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        await within(5.0, step())


async def test_a_step_that_loses_its_cancellation_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AGAIN_S", 0.05)
    deaf = Deaf()
    async with asyncio.timeout(5.0):
        with pytest.raises(TimeoutError):
            await within(0.01, deaf.run())
        await deaf.ended.wait()
    assert deaf.lost == 2, "it is cancelled until it has ended"


async def test_what_was_given_up_and_succeeds_all_the_same_is_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer that starts after all would hold connections for ever, and fence whoever came after it."""
    monkeypatch.setattr(ending, "AGAIN_S", 60.0)
    story: list[str] = []
    cleaned = asyncio.Event()

    async def start() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            story.append("lost")
        await asyncio.sleep(0)
        story.append("started")

    async def clean_up() -> None:
        story.append("cleaned up")
        cleaned.set()

    with pytest.raises(TimeoutError):
        await within(0.01, start(), clean_up)
    async with asyncio.timeout(5.0):
        await cleaned.wait()
    assert story == ["lost", "started", "cleaned up"]


async def test_what_failed_is_cleaned_up_and_what_was_returned_is_not() -> None:
    cleaned = asyncio.Event()

    async def clean_up() -> None:
        cleaned.set()

    async def fail() -> None:
        raise ValueError("of its own")

    await within(5.0, asyncio.sleep(0), clean_up)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not cleaned.is_set()
    with pytest.raises(ValueError, match="of its own"):
        await within(5.0, fail(), clean_up)
    async with asyncio.timeout(5.0):
        await cleaned.wait()


async def test_a_caller_that_is_cancelled_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AGAIN_S", 0.05)
    deaf = Deaf()
    caller = asyncio.create_task(within(60.0, deaf.run()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    async with asyncio.timeout(5.0):
        with pytest.raises(asyncio.CancelledError):
            await caller
        await deaf.ended.wait()


async def test_closing_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.eventlog.kafka._CLOSE_WITHIN_S", 0.01)
    monkeypatch.setattr(ending, "AGAIN_S", 0.05)
    deaf = Deaf()
    async with asyncio.timeout(5.0):
        await close(deaf.run())
        await deaf.ended.wait()
