"""A graph as text, and times as people write them."""

from __future__ import annotations

import pytest
import typer
from groundswell.releases.v1 import releases_pb2 as pb

from clients.cli.commands.releases import drawn, moment

COHORT = "organizations/acme/products/pump/cohorts/beta"


def node(name: str, ahead: str, **fields: object) -> pb.GraphNode:
    full = {"name": f"{COHORT}/releases/{name}", "next": f"{COHORT}/releases/{ahead}" if ahead else ""}
    return pb.GraphNode(release=pb.Release(**full | fields), state=pb.GraphNode.STATE_OPEN)


def test_the_longest_way_is_the_trunk_and_shorter_ones_stand_beside_it() -> None:
    nodes = [node("a", "b", version="1.0.0"), node("b", "d", required=True), node("x", "d"), node("d", "")]
    nodes[0].devices, nodes[0].devices_entering = 3, 2
    warnings = [pb.GraphWarning(code="UNREACHABLE", message="m", release=f"{COHORT}/releases/x", devices=4)]
    graph = pb.Graph(cohort=COHORT, nodes=nodes, warnings=warnings, devices=9, devices_unplaced=1)
    assert drawn(graph) == [
        f"{COHORT}: 9 devices, 1 without a place in the graph",
        "d  open  0 devices",
        "├─ x  open  0 devices",
        "│",
        "b  open  required  0 devices",
        "│",
        "a  open  1.0.0  3 devices  2 begin here",
        "! UNREACHABLE: x: m (4 devices)",
    ]


def test_a_long_chain_is_drawn_whole() -> None:
    names = [f"r{index}" for index in range(2000)]
    chain = pb.Graph(cohort=COHORT, nodes=[node(one, two) for one, two in zip(names, [*names[1:], ""], strict=True)])
    assert len(drawn(chain)) == 1 + 2000 + 1999


def test_a_time_without_a_zone_is_utc_and_nonsense_is_refused() -> None:
    assert moment("2031-05-01T06:00:00").ToJsonString() == "2031-05-01T06:00:00Z"
    assert moment("2031-05-01T06:00:00+02:00").ToJsonString() == "2031-05-01T04:00:00Z"
    with pytest.raises(typer.BadParameter):
        moment("tomorrow")
