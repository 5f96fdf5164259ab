"""SIGKILL at each dangerous place of a write, and as a surprise: the next leader and a retry settle it."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process

import pytest

from libs.eventlog import failpoints
from libs.eventlog.kafka import KafkaLog
from tests.contract.eventlog.child import REQUEST_ID
from tests.contract.eventlog.scenarios import check_one_writer_between_claims
from tests.contract.eventlog.support import HOME, Put, Replica, World, claims, retried, soon


async def child(world: World, points: str) -> Process:
    log = world.log()
    assert isinstance(log, KafkaLog)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.contract.eventlog.child", log.bootstrap, world.env, points),
        stdout=PIPE,
    )


async def line(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(25):
        return (await process.stdout.readline()).decode().strip()


async def successor(world: World, *, real_election: bool = False) -> Replica:
    """The group takes seconds to notice a death; a steered successor need not wait for it: the broker fences."""
    replica = await world.start(real_election=real_election)
    if real_election:
        await replica.runtime.wait_leading(soon(20))
    else:
        await replica.lead()
    return replica


@pytest.mark.parametrize(
    ("point", "committed"),
    [
        (failpoints.BEFORE_SEND, False),
        (failpoints.AFTER_SEND, False),
        (failpoints.DURING_COMMIT, None),
        (failpoints.AFTER_COMMIT_BEFORE_ANSWER, True),
        (failpoints.AFTER_READBACK, True),
    ],
)
async def test_killed_at(kafka_world: World, point: str, committed: bool | None) -> None:
    process = await child(kafka_world, point)
    assert await line(process) == "leading"
    assert await line(process) == ""
    assert await process.wait() == -signal.SIGKILL
    replica = await successor(kafka_world)
    done = await retried(replica, Put("a", "from the child"), principal="p", request_id=REQUEST_ID)
    if committed is not None:
        assert done.replayed == committed
    assert done.result.value == 1  # type: ignore[union-attr]
    events = await kafka_world.events()
    assert [resource for _, _, resource, _ in events].count("a") == 1
    await check_one_writer_between_claims(kafka_world)


async def test_killed_by_surprise_the_group_elects_another(kafka_world: World) -> None:
    process = await child(kafka_world, "")
    assert await line(process) == "leading"
    assert (await line(process)).startswith("answered")
    process.kill()
    await process.wait()
    replica = await successor(kafka_world, real_election=True)
    assert replica.values()["a"] == "from the child"
    assert claims(await kafka_world.events()) == ["child", "replica-1"]
    assert replica.runtime.health().partitions[HOME].role == "leading"
