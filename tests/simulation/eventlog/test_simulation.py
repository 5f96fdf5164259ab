"""Seeded stories of trouble, and one story in which the leader dies at every single turn of the event loop."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.simulation.eventlog.virtual import VirtualLoop, run
from tests.simulation.eventlog.world import Simulation, partitions_used


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Trouble is the subject here; its warnings would fill the memory."""
    caplog.set_level(logging.CRITICAL)


async def story(loop: VirtualLoop, seed: int, *, trouble: float) -> Simulation:
    world = Simulation(loop, seed, trouble)
    for process in world.processes:
        await world.start(process)
    async with asyncio.timeout(3600):
        await asyncio.gather(*(world.client(f"c{number}", 12) for number in range(6)))
        await world.heal()
    world.verify()
    await world.close()
    return world


@pytest.mark.parametrize("trouble", [0.01, 0.03, 0.06])
@pytest.mark.parametrize("seed", range(12))
def test_invariants_hold(seed: int, trouble: float) -> None:
    world = run(lambda loop: story(loop, seed, trouble=trouble))
    assert len(world.acknowledged) == 72


def test_the_stories_are_troubled_enough() -> None:
    """Otherwise the seeds above would prove nothing."""
    assert partitions_used() == {0, 1}
    world = run(lambda loop: story(loop, 7, trouble=0.05))
    assert world.kills >= 10
    assert world.faults >= 5
    assert world.lost_markers >= 2
    assert world.snapshots.objects, "some starts begin with a snapshot"
    calmer = run(lambda loop: story(loop, 7, trouble=0.01))
    assert calmer.forwarded >= 10, "and clients call whatever replica they like"


def test_a_seed_reproduces_its_run() -> None:
    first = run(lambda loop: story(loop, 3, trouble=0.03))
    again = run(lambda loop: story(loop, 3, trouble=0.03))
    assert (first.kills, first.faults, first.loop.turns) == (again.kills, again.faults, again.loop.turns)


async def short_story(loop: VirtualLoop, die_at: int | None) -> int:
    """Leaders of both services die together at one turn; returns how many turns there were."""
    world = Simulation(loop, 1, trouble=0.0)
    world.troubled = False
    for process in world.processes:
        await world.start(process)
    await asyncio.sleep(1)
    began = loop.turns

    def on_turn(turn: int) -> None:
        if die_at is not None and turn == began + die_at:
            for process in (world.processes[0], world.processes[2]):
                world.spawn(world.kill(process))

    loop.on_turn = on_turn
    async with asyncio.timeout(600):
        await asyncio.gather(*(world.client(f"c{number}", 2) for number in range(2)))
        turns = loop.turns - began
        await world.heal()
    world.verify()
    await world.close()
    return turns


def test_killed_at_every_turn() -> None:
    turns = run(lambda loop: short_story(loop, None))
    assert turns > 50
    for die_at in range(1, turns, max(1, turns // 80)):
        run(lambda loop, at=die_at: short_story(loop, at))  # type: ignore[misc]
