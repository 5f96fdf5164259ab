"""`resolve()` per second on one core, for graphs of 10, 100 and 1,000 releases. It needs no server.

    python -m bench.resolve [--devices 2000] [--rounds 5]

The fleet is what a gateway sees: most devices run the latest release, some stand at any other, some are new and report
only a version, a few are quarantined; a second figure is for a fleet in which nobody is up to date. Releases have
versions, requirements, tags, shares and now and then are required or disabled, and each device is told of a rollout
that has not come to its cohort. The baseline is the least that such a function could do: find the device's release in
a dictionary, and answer.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence

from libs.eventlog.collector import tune_collector
from libs.resolution import (
    BundleFacts,
    CohortGraph,
    DeviceFacts,
    PlanFacts,
    PlanStage,
    ReleaseNode,
    Resolution,
    Step,
    resolve,
)
from libs.resolution.model import Code

SIZES = (10, 100, 1000)
AIM = 50_000
NOW_MS = 1_900_000_000_000
PRODUCT = "organizations/bench/products/pump"
COHORT = f"{PRODUCT}/cohorts/main"


def make_graph(size: int, chance: random.Random) -> tuple[CohortGraph, dict[str, BundleFacts]]:
    """A chain, as a product's history is."""
    names = [f"{COHORT}/releases/r{index}" for index in range(size)]
    nodes = {
        name: ReleaseNode(
            name=name,
            bundle=f"{PRODUCT}/bundles/b{index}",
            salt=uuid.UUID(int=chance.getrandbits(128)).bytes,
            version=f"1.{index}.0",
            requirement=f"< 1.{index}.0",
            required=index % 40 == 7,
            disabled=index % 10 == 3,
            next=names[index + 1] if index + 1 < size else "",
            share_ppm=200_000 if index == size - 1 else None,
            created_ms=index,
        )
        for index, name in enumerate(names)
    }
    bundles = {
        node.bundle: BundleFacts(node.bundle, offerable=True, targets=frozenset({"board-a"}), version=node.version)
        for node in nodes.values()
    }
    return CohortGraph(COHORT, nodes), bundles


def make_fleet(graph: CohortGraph, count: int, chance: random.Random, latest: float) -> list[DeviceFacts]:
    """This share up to date, one of ten new, the others anywhere."""
    nodes = list(graph.releases.values())
    fleet = []
    for index in range(count):
        draw = chance.random()
        node = nodes[-1] if draw < latest else chance.choice(nodes)
        known = draw < 0.9
        fleet.append(
            DeviceFacts(
                name=f"{PRODUCT}/devices/d{index}",
                uid=uuid.UUID(int=chance.getrandbits(128)).bytes,
                cohort=COHORT,
                tags=frozenset({"made", "lab"} if index % 3 else {"made"}),
                target="board-a",
                quarantined=index % 200 == 0,
                release=node.name if known else "",
                bundle=node.bundle if known else "",
                version=node.version if known else "0.9.0",
            )
        )
    return fleet


def make_plans() -> tuple[PlanFacts, ...]:
    """One rollout of the next version that has not come here yet."""
    stages = (PlanStage("canary", f"{PRODUCT}/cohorts/canary", open=True), PlanStage("main", COHORT, open=False))
    return (PlanFacts(f"{PRODUCT}/rollouts/next", "9.0.0", "RUNNING", 0, stages),)


def rate(decide: Callable[[DeviceFacts], object], fleet: Sequence[DeviceFacts]) -> float:
    """Devices per second."""
    began = time.process_time()
    for device in fleet:
        decide(device)
    return len(fleet) / (time.process_time() - began)


def measure(size: int, devices: int, rounds: int, latest: float) -> tuple[float, float]:
    """Medians of ours and of the baseline, in turn in the same process."""
    chance = random.Random(7)
    graph, bundles = make_graph(size, chance)
    fleet = make_fleet(graph, devices, chance, latest)
    plans = make_plans()
    nothing = Step(Code.UP_TO_DATE, "nothing newer", blocking=True)

    def ours(device: DeviceFacts) -> Resolution:
        return resolve(device, graph, (), bundles, plans, NOW_MS)

    def bare(device: DeviceFacts) -> Resolution:
        node = graph.releases.get(device.release)
        following = graph.releases.get(node.next) if node is not None else None
        return Resolution((following.candidate,) if following is not None else (), (nothing,))

    rate(ours, fleet)
    found = [(rate(ours, fleet), rate(bare, fleet)) for _ in range(rounds)]
    return statistics.median(one for one, _ in found), statistics.median(one for _, one in found)


def main(devices: int, rounds: int) -> int:
    """One line for each size; fails when the aim is missed."""
    tune_collector()  # as gateways do
    missed = False
    for size in SIZES:
        ours, bare = measure(size, devices, rounds, latest=0.7)
        behind, _ = measure(size, devices, rounds, latest=0.0)
        aim = f" (aim {AIM:,})" if size == SIZES[0] else ""
        print(
            f"resolve: {size} releases: {ours:,.0f}/s per core{aim}, a bare look-up {bare:,.0f}/s, "
            f"ratio {ours / bare:.3f}; with every device behind {behind:,.0f}/s"
        )
        missed = missed or (size == SIZES[0] and min(ours, behind) < AIM)
    return 1 if missed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kafka", default="", help="taken and not used: `make bench` gives it to all")
    arguments = parser.parse_args(sys.argv[1:])
    sys.exit(main(arguments.devices, arguments.rounds))
