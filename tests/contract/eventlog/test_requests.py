"""One request id, one execution, one answer: whoever leads, whatever was lost on the way."""

from __future__ import annotations

import asyncio
from hashlib import sha256

import pytest

from libs.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from libs.eventlog import Command, Deadline
from libs.eventlog.ports import UnknownOutcomeError
from tests.contract.eventlog.scenarios import hand_over
from tests.contract.eventlog.support import ORGANIZATION, FailOnce, Gate, OpenTask, Put, Refuse, World, retried

ID = {"request_id": "0e2f", "principal": "key-1", "request_digest": sha256(b"put a 1").digest()}
OTHER = ID | {"request_digest": sha256(b"put a 2").digest()}


async def puts(world: World) -> int:
    return [kind for kind, *_ in await world.events()].count("StringValue")


async def test_a_repeat_is_answered_from_the_log(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    first = await replica.put("a", "1", **ID)
    again = await replica.put("a", "1", **ID)
    assert not first.replayed
    assert again.replayed
    assert again.result == first.result
    assert await puts(world) == 1


async def test_repeats_within_a_batch_and_while_in_flight(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    gate = Gate("commit")
    replica.log.hooks.append(gate)
    same = [asyncio.create_task(replica.put("a", "1", **ID)) for _ in range(3)]
    await gate.arrived.wait()
    late = asyncio.create_task(replica.put("a", "1", **ID))
    other = asyncio.create_task(replica.put("a", "2", **OTHER))
    await asyncio.sleep(0)
    gate.opened.set()
    answers = await asyncio.gather(*same, late)
    assert sorted(answer.replayed for answer in answers) == [False, True, True, True]
    assert {answer.result.value for answer in answers} == {1}  # type: ignore[union-attr]
    with pytest.raises(InvalidArgumentError, match="REQUEST_ID_REUSED"):
        await other
    assert await puts(world) == 1


async def test_the_id_is_the_callers_own(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    await replica.put("a", "1", **ID)
    done = await replica.put("a", "2", **OTHER | {"principal": "key-2"})
    assert not done.replayed


async def test_the_next_leader_knows_the_answer(world: World) -> None:
    first, second = await world.start(), await world.start()
    await first.lead()
    done = await first.put("a", "1", **ID)
    await hand_over(first, second)
    again = await second.put("a", "1", **ID)
    assert again.replayed
    assert again.result == done.result
    with pytest.raises(InvalidArgumentError, match="REQUEST_ID_REUSED"):
        await second.put("a", "2", **OTHER)


@pytest.mark.parametrize("step", ["stage", "staged", "commit", "committed"])
async def test_an_unknown_outcome_is_settled_by_the_retry(world: World, step: str) -> None:
    replica = await world.start()
    await replica.lead()
    replica.log.hooks.append(FailOnce(step, UnknownOutcomeError("injected")))
    with pytest.raises(UnavailableError, match="OUTCOME_UNKNOWN"):
        await replica.put("a", "1", **ID)
    done = await retried(replica, Put("a", "1"), **ID)
    assert done.result.value == 1  # type: ignore[union-attr]
    assert done.replayed == (step == "committed")
    assert await puts(world) == 1


async def test_a_caller_that_gave_up_gets_the_one_answer_later(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    gate = Gate("committed")
    replica.log.hooks.append(gate)
    with pytest.raises(UnavailableError, match="OUTCOME_UNKNOWN"):
        await replica.runtime.submit(Command(ORGANIZATION, Put("a", "1"), **ID), Deadline.after(0.05))  # type: ignore[arg-type]
    gate.opened.set()
    assert (await replica.put("a", "1", **ID)).replayed
    assert await puts(world) == 1


async def test_a_command_without_domain_events_is_remembered_too(world: World) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    replica = await world.start(handlers={"work": never})
    await replica.lead()
    await replica.submit(OpenTask("t1"), **ID)
    assert (await replica.submit(OpenTask("t1"), **ID)).replayed


async def test_refusals_are_decided_again(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    for _ in range(2):
        with pytest.raises(FailedPreconditionError):
            await replica.submit(Refuse(), **ID)
    assert not (await replica.put("a", "1", **ID)).replayed
