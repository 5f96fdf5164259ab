"""After every unit test and simulation: what the test's domains folded must survive a snapshot at any point.

The fixture watches `evolve` of every service's domain. At the end it takes some of the states that were passed in,
stores and loads them, folds the events that followed, and compares: fold(log) == load(snapshot) + fold(rest). So the
stories that the tests tell anyway are the logs of this contract, indexes that a state derives included.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from libs.eventlog import Event
from libs.eventlog.freeze import Codec, reachable
from services.artifacts.domain import Artifacts
from services.pki.domain import Pki
from services.registry.domain import Registry
from services.releases.domain import Releases
from services.rollout.domain import RolloutDomain
from services.webhooks.domain import Webhooks

DOMAINS: tuple[type[Any], ...] = (Artifacts, Pki, Registry, Releases, RolloutDomain, Webhooks)
MOST_FOLDS = 3_000
"""Of one test: long simulations need not be remembered whole."""
CUTS = 3

Fold = tuple[Any, Any, Event, Any]
"""(domain, state before, event, state after)."""


def through_a_snapshot(domain: Any, state: Any) -> Any:
    """The state as another process would have it."""
    codec = Codec(reachable(type(domain.initial_state(0)), *getattr(domain, "snapshot_types", ())))
    values: list[Any] = []
    for so_far in codec.thaw(iter(list(codec.freeze([state])))):
        values = so_far
    return values[0]


def check(folds: list[Fold], rng: random.Random) -> None:
    for _ in range(CUTS):
        at = rng.randrange(len(folds))
        domain, before, _, _ = folds[at]
        loaded = through_a_snapshot(domain, before)
        assert loaded == before
        expected = before
        for _, state, event, after in folds[at:]:
            if state is not expected:
                break  # another partition, or the same events again
            loaded, expected = domain.evolve(loaded, event), after
        assert loaded == expected


@pytest.fixture(autouse=True)
def states_survive_snapshots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folds: list[Fold] = []
    for kind in DOMAINS:
        evolve = kind.evolve

        def watched(self: Any, state: Any, event: Event, evolve: Any = evolve) -> Any:
            after = evolve(self, state, event)
            if len(folds) < MOST_FOLDS:
                folds.append((self, state, event, after))
            return after

        monkeypatch.setattr(kind, "evolve", watched)
    yield
    monkeypatch.undo()
    if folds:
        check(folds, random.Random(request.node.nodeid))
