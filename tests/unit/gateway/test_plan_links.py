"""Links die with their plan: a rollout's when its control epoch moves, a plain release's while it is disabled."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from libs.eventlog import Foreign
from libs.eventlog.memory import MemoryLog
from services.gateway.views import GatewayViews

COHORT = "organizations/acme/products/p/cohorts/main"
RELEASE = f"{COHORT}/releases/2-0-0"
ROLLOUT = "organizations/acme/products/p/rollouts/r"


class NoCache:
    """Devices and certificates play no part here."""

    def changed(self, partition: int, position: int, key: str, value: Any) -> None: ...


@pytest.fixture
def views() -> GatewayViews:
    log = MemoryLog(partitions=1)
    return GatewayViews(log, "dev", 1, lambda _organization, _anchors: None, lambda _plan: None, NoCache(), NoCache())


def hear(views: GatewayViews, resource: str, payload: object) -> None:
    views._apply(Foreign("s", "t", 0, 0, 0, "acme", resource, payload, 0))  # type: ignore[arg-type]


def graph(**fields: bool) -> releases_events.GraphChanged:
    release = releases_pb2.Release(name=RELEASE, uid=str(uuid.UUID(int=1)), bundle="b", **fields)
    return releases_events.GraphChanged(cohort=COHORT, releases=[release])


def test_a_plain_releases_links_hold_while_it_is_offered(views: GatewayViews) -> None:
    assert not views.plan_allows_download(RELEASE, 0), "not known here: nothing is guessed"
    for fields, allowed in (({}, True), ({"disabled": True}, False), ({}, True), ({"retracted": True}, False)):
        hear(views, COHORT, graph(**fields))
        assert views.plan_allows_download(RELEASE, 0) is allowed


def test_a_rollouts_links_hold_until_its_epoch_moves(views: GatewayViews) -> None:
    assert not views.plan_allows_download(ROLLOUT, 1)
    for epoch, allowed in ((1, True), (2, False)):
        plan = rollout_pb2.Rollout(name=ROLLOUT, control_epoch=epoch)
        hear(views, ROLLOUT, rollout_events.RolloutChanged(rollout=plan))
        assert views.plan_allows_download(ROLLOUT, 1) is allowed


def test_an_overrides_links_have_no_plan(views: GatewayViews) -> None:
    assert views.plan_allows_download("", 0)
