"""`swell rollout watch` takes its stream up again when the server that served it went away, and fits into a log."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from groundswell.rollout.v1 import rollout_pb2

from clients.cli.commands import rollouts
from clients.sdk import ApiError


class Server:
    """Each time it is asked it tells the next of what it has, then fails with a code."""

    def __init__(self, *told: tuple[int, str]) -> None:
        self.told = list(told)
        self.rollout = SimpleNamespace(WatchRollout=None)

    def stream(self, _method: object, _request: object) -> Iterator[rollout_pb2.WatchRolloutResponse]:
        state, code = self.told.pop(0)
        yield rollout_pb2.WatchRolloutResponse(rollout=rollout_pb2.Rollout(state=state))  # type: ignore[arg-type]
        raise ApiError(code, "SOME_REASON", "gone", {}, {}, None)


def follow(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(rollouts.time, "sleep", lambda _s: None)
    return rollouts._updates(SimpleNamespace(client=server), rollout_pb2.WatchRolloutRequest())  # type: ignore[arg-type]


def test_it_goes_on_after_the_server_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server((2, "UNAVAILABLE"), (3, "CANCELLED"), (6, "UNAVAILABLE"))
    updates = follow(server, monkeypatch)
    assert [next(updates).rollout.state for _ in range(3)] == [2, 3, 6]


def test_a_refusal_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = follow(Server((2, "NOT_FOUND")), monkeypatch)
    next(updates)
    with pytest.raises(ApiError):
        next(updates)


def test_it_gives_up_when_nothing_is_heard_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = follow(Server((2, "UNAVAILABLE")), monkeypatch)
    next(updates)
    now = rollouts.time.monotonic()
    monkeypatch.setattr(rollouts.time, "monotonic", lambda: now + rollouts.WATCH_GIVE_UP_S + 1)
    with pytest.raises(ApiError):
        next(updates)


def update(state: str, confirmed: int, in_flight: int = 0) -> rollout_pb2.WatchRolloutResponse:
    kinds = rollout_pb2.StageStatus.State
    return rollout_pb2.WatchRolloutResponse(
        rollout=rollout_pb2.Rollout(
            name="organizations/acme/products/thermostat/rollouts/to-1-1-0",
            version="1.1.0",
            state=rollout_pb2.Rollout.State.Value(state),
            stages=[rollout_pb2.Stage(display_name="canary"), rollout_pb2.Stage(display_name="all")],
            stage_statuses=[
                rollout_pb2.StageStatus(state=kinds.Value("STATE_OPEN"), confirmed=confirmed, in_flight=in_flight),
                rollout_pb2.StageStatus(state=kinds.Value("STATE_PENDING"), rolled_back=1 if confirmed else 0),
            ],
        ),
        observation_lag_s=confirmed,
    )


def test_a_log_gets_a_line_for_each_change_until_the_end() -> None:
    updates = iter(
        [
            update("STATE_RUNNING", 0),
            update("STATE_RUNNING", 0),
            update("STATE_RUNNING", 2, in_flight=3),
            update("STATE_COMPLETED", 2),
            update("STATE_COMPLETED", 3),
        ]
    )
    assert list(rollouts._lines(updates, until_end=True)) == [
        "to-1-1-0  1.1.0  RUNNING | canary OPEN | all PENDING",
        "to-1-1-0  1.1.0  RUNNING | canary OPEN: 3 in flight, 2 confirmed | all PENDING: 1 back",
        "to-1-1-0  1.1.0  COMPLETED | canary OPEN: 2 confirmed | all PENDING: 1 back",
    ]


def test_the_table_has_a_row_for_each_stage() -> None:
    table = rollouts.render(update("STATE_RUNNING", 2, in_flight=3))
    assert table.row_count == 2
    assert [column.header for column in table.columns][:4] == ["stage", "state", "in flight", "confirmed"]
