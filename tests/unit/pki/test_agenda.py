"""The agenda by itself: whatever is put on it and taken off, what is due first is found, and only what is due."""

from __future__ import annotations

import random

from services.pki import agenda
from services.pki.model import State

DAY = 24 * 3600 * 1000
START = 1_800_000_000_000


def test_whatever_moves_the_first_is_the_earliest_and_what_is_due_is_what_is_past() -> None:
    rng = random.Random(7)
    state, known = State(), {}
    for step in range(3_000):
        name = f"c{rng.randrange(200)}"
        due = None if rng.random() < 0.3 else START + rng.choice((rng.randrange(90_000), rng.randrange(400 * DAY)))
        state = agenda.moved(state, name, due)
        known[name] = due
        if step % 50 == 0:
            expected = {name: due for name, due in known.items() if due is not None}
            assert dict(state.agenda) == expected
            assert list(agenda._first(state, {})) == ([min(expected.values())] if expected else [])
            for now in (START - 1, START + 45_000, START + 90_000, START + 200 * DAY, START + 500 * DAY):
                assert sorted(agenda._due(state, now)) == sorted(n for n, due in expected.items() if due <= now)
            first = sorted(expected, key=lambda name: expected[name])[:3]
            left = [due for name, due in expected.items() if name not in first]
            assert list(agenda._first(state, dict.fromkeys(first))) == ([min(left)] if left else [])


def test_an_empty_agenda_leaves_nothing_behind() -> None:
    state = agenda.moved(State(), "one", START)
    state = agenda.moved(agenda.moved(state, "two", START + 1), "one", None)
    assert agenda.moved(state, "two", None) == State()
