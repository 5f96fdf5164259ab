"""Tasks and timers survive their leader."""

from __future__ import annotations

import asyncio

from libs.eventlog import Command, Task, TaskContext
from tests.contract.eventlog.scenarios import hand_over
from tests.contract.eventlog.support import (
    ORGANIZATION,
    CloseTask,
    OpenTask,
    SetTimer,
    World,
    eventually,
)


async def closing(task: Task, ctx: TaskContext) -> Command:
    del ctx
    return Command(task.organization, CloseTask(task.task_id))


async def stuck(task: Task, ctx: TaskContext) -> None:
    del task, ctx
    await asyncio.Event().wait()


async def test_a_task_runs_and_is_closed(world: World) -> None:
    replica = await world.start(handlers={"work": closing})
    await replica.lead()
    await asyncio.gather(replica.submit(OpenTask("t1")), replica.submit(OpenTask("t1")))
    await eventually(lambda: not replica.runtime.snapshot(ORGANIZATION).open_tasks)
    assert replica.values()["t1"] == "done"
    kinds = [kind for kind, *_ in await world.events()]
    assert (kinds.count("TaskOpened"), kinds.count("TaskClosed")) == (1, 1)


async def test_the_next_leader_resumes_open_tasks(world: World) -> None:
    first = await world.start(handlers={"work": stuck})
    await first.lead()
    await first.submit(OpenTask("t1"))
    assert set(first.runtime.snapshot(ORGANIZATION).open_tasks) == {"t1"}
    second = await world.start(handlers={"work": closing})
    await hand_over(first, second)
    await eventually(lambda: second.values().get("t1") == "done")


async def test_a_failing_task_is_tried_until_it_works(world: World) -> None:
    attempts: list[int] = []

    async def shaky(task: Task, ctx: TaskContext) -> Command:
        attempts.append(ctx.attempt)
        if len(attempts) < 3:
            raise ConnectionError("not yet")
        return await closing(task, ctx)

    replica = await world.start(handlers={"work": shaky})
    await replica.lead()
    await replica.submit(OpenTask("t1"))
    await eventually(lambda: replica.values().get("t1") == "done")
    assert attempts == [0, 1, 2]


async def test_a_task_with_nothing_to_record_is_closed(world: World) -> None:
    async def quiet(task: Task, ctx: TaskContext) -> None: ...

    replica = await world.start(handlers={"work": quiet})
    await replica.lead()
    await replica.submit(OpenTask("t1"))
    await eventually(lambda: not replica.runtime.snapshot(ORGANIZATION).open_tasks)


async def test_timers_fire_once_also_after_a_hand_over(world: World) -> None:
    first, second = await world.start(), await world.start()
    await first.lead()
    await first.submit(SetTimer("soon", 1))
    await eventually(lambda: first.values().get("soon") == "fired")
    await first.submit(SetTimer("later", 300))
    await hand_over(first, second)
    await eventually(lambda: second.values().get("later") == "fired")
    rows = await world.events()
    assert [resource for kind, _, resource, _ in rows if kind == "StringValue"] == ["soon", "later"]
