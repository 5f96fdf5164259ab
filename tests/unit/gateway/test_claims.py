"""Questions to the leader: few calls, each device its own answer, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from services.gateway.claims import HOLD_S, MAX_ITEMS, MOST_CALLS, Questions


class Leader:
    """Answers each question with itself and the number of its call, when it is let."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.short = False
        self.error: Exception | None = None
        self.questions: Questions[int, tuple[int, int]] = Questions(self._call)

    async def _call(self, organization: str, items: list[int]) -> Sequence[tuple[int, int]]:
        self.calls.append((organization, items))
        number = len(self.calls)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [(item, number) for item in items][: -1 if self.short else None]


@pytest.fixture
async def leader() -> Leader:
    return Leader()


async def test_what_comes_up_together_goes_in_one_call_of_its_organization(leader: Leader) -> None:
    asked = [leader.questions.ask("acme", number) for number in range(5)] + [leader.questions.ask("other", 9)]
    answers = await asyncio.gather(*asked)
    assert [item for item, _ in answers] == [0, 1, 2, 3, 4, 9]
    assert sorted(leader.calls) == [("acme", [0, 1, 2, 3, 4]), ("other", [9])]


async def test_a_call_holds_so_many_and_the_others_follow(leader: Leader) -> None:
    asked = [leader.questions.ask("acme", number) for number in range(MAX_ITEMS * 3 + 1)]
    answers = await asyncio.gather(*asked)
    assert [item for item, _ in answers] == list(range(MAX_ITEMS * 3 + 1))
    assert [len(items) for _, items in leader.calls] == [MAX_ITEMS, MAX_ITEMS, MAX_ITEMS, 1]


async def test_while_calls_are_under_way_what_comes_up_waits_and_goes_together(leader: Leader) -> None:
    leader.gate.clear()
    asked = []
    for number in range(MOST_CALLS):
        asked.append(asyncio.ensure_future(leader.questions.ask("acme", number)))
        await until(leader, number + 1)
    for number in range(MOST_CALLS, 20):
        asked.append(asyncio.ensure_future(leader.questions.ask("acme", number)))
        await asyncio.sleep(0.002)
    stranger = asyncio.ensure_future(leader.questions.ask("other", 1))
    await until(leader, MOST_CALLS + 1)
    assert leader.calls[-1] == ("other", [1]), "one organization's calls hold up no other's"
    leader.gate.set()
    assert [item for item, _ in await asyncio.gather(*asked, stranger)] == [*range(20), 1]
    assert leader.calls[-1] == ("acme", list(range(MOST_CALLS, 20)))


async def test_a_call_that_hangs_holds_up_nobody_for_long(leader: Leader) -> None:
    leader.gate.clear()
    asked = []
    for number in range(MOST_CALLS + 1):
        asked.append(asyncio.ensure_future(leader.questions.ask("acme", number)))
        await until(leader, min(number + 1, MOST_CALLS))
    began = asyncio.get_running_loop().time()
    await until(leader, MOST_CALLS + 1)
    assert asyncio.get_running_loop().time() - began < HOLD_S * 4
    leader.gate.set()
    assert [item for item, _ in await asyncio.gather(*asked)] == [0, 1, 2]


async def test_an_error_reaches_everyone_who_waited_for_that_call_and_the_next_call_is_made(leader: Leader) -> None:
    leader.error = ConnectionError("away")
    outcomes = await asyncio.gather(*(leader.questions.ask("acme", n) for n in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ConnectionError] * 3
    leader.error = None
    assert await leader.questions.ask("acme", 7) == (7, 2)


async def test_answers_that_do_not_fit_the_questions_are_nobodys(leader: Leader) -> None:
    leader.short = True
    outcomes = await asyncio.gather(*(leader.questions.ask("acme", n) for n in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 3


async def test_who_gives_up_takes_no_answer_from_the_others(leader: Leader) -> None:
    leader.gate.clear()
    asked = [asyncio.ensure_future(leader.questions.ask("acme", number)) for number in range(3)]
    await until(leader, 1)
    asked[1].cancel()
    leader.gate.set()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [outcomes[0], outcomes[2]] == [(0, 1), (2, 1)]
    assert isinstance(outcomes[1], asyncio.CancelledError)


async def until(leader: Leader, calls: int) -> None:
    async with asyncio.timeout(5):
        while len(leader.calls) < calls:  # noqa: ASYNC110 - what it waits for is told by no event
            await asyncio.sleep(0.001)
