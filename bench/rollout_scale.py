"""A rollout over 20,000 devices: created and started, and how fast the next stage stands after its gate.

    python -m bench.rollout_scale [--cohorts 20] [--each 1000] [--rounds 3] [--kafka 127.0.0.1:19092]

Each cohort is a stage. One round creates and starts a rollout and walks through its stages: every device of the cohort
is granted, given go and confirmed, then heartbeats let the soak end. *Next stage* is the time from the tick that passes
the gate until the next release exists and its devices could be granted: task, release and Inbox on the real broker.
The baseline of the first is the same number of bare transactions, one event each, as a start has hops; that of the
second the same for a stage.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import sys
import time

from groundswell.device.v1 import device_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import rollout_pb2

from bench.fleet import ORGANIZATION, PRODUCT, Bare, Fleet, cohort
from libs.eventlog.collector import tune_collector
from services.rollout.domain import AuthorizeSwitch, Control, CreateRollout, State

CALL = 100
CALLERS = 4
START_HOPS = 5
"""Create, start, the release in its service, the task's answer, the fact by the Inbox: one after the other."""
STAGE_HOPS = 4


def plan(cohorts: int, each: int) -> rollout_pb2.Rollout:
    rollout = rollout_pb2.Rollout()
    for index in range(cohorts):
        stage = rollout.stages.add(display_name=f"s{index}", cohort=cohort(index), max_in_flight=each)
        stage.gate.min_sample = each
        stage.gate.soak.FromSeconds(2)
        stage.gate.dark_after.FromSeconds(100_000)
    return rollout


def stands(state: State, name: str, stage: int) -> bool:
    """The stage is open and its release known here: a device that asks now is granted."""
    status = state.rollouts[name].control.stage_statuses[stage]
    return status.state == rollout_pb2.StageStatus.STATE_OPEN and status.release in state.releases


async def in_calls(fleet: Fleet, stage: int, call: object) -> None:
    """All devices of a cohort, in coalesced calls, some at once."""
    items = fleet.devices[stage]
    chunks = iter([items[first : first + CALL] for first in range(0, len(items), CALL)])

    async def caller() -> None:
        for chunk in chunks:
            await call(chunk)  # type: ignore[operator]

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def update(fleet: Fleet, stage: int, release: releases_pb2.Release) -> None:
    """Every device of the cohort: granted, go, confirmed."""
    attempts: dict[str, str] = {}

    async def grant(chunk: list[device_pb2.CheckInItem]) -> None:
        answer = await fleet.claim(fleet.claims([fleet.check_in(item) for item in chunk], release.name))
        for item, result in zip(chunk, answer.results, strict=True):
            assert result.HasField("offer"), result
            attempts[item.device] = result.offer.attempt

    async def go(chunk: list[device_pb2.CheckInItem]) -> None:
        await asyncio.gather(
            *(
                fleet.submit(
                    AuthorizeSwitch(
                        rollout_pb2.AuthorizeSwitchRequest(
                            organization=ORGANIZATION, attempt=attempts[item.device], device=item.device
                        )
                    )
                )
                for item in chunk
            )
        )

    async def confirm(chunk: list[device_pb2.CheckInItem]) -> None:
        for item in chunk:
            item.running.release, item.running.bundle = release.name, release.bundle
            item.running.version = release.version
            attempt = attempts[item.device]
            fleet.check_in(item, device_pb2.ATTEMPT_STATE_CONFIRMED, attempt=attempt)
            item.attempt = ""
        await fleet.claim(fleet.claims(chunk, ""))

    for step in (grant, go, confirm):
        await in_calls(fleet, stage, step)


async def walk(fleet: Fleet, version: str, cohorts: int, each: int) -> tuple[float, list[float], float]:
    """Seconds to create and start, to open each next stage, and for the whole walk."""
    bundle = await fleet.bundle(version)
    name = f"{PRODUCT}/rollouts/to-{version}"
    began = time.perf_counter()
    await fleet.submit(CreateRollout(name, plan(cohorts, each), bundle))
    await fleet.submit(Control("start", name))
    await fleet.until(lambda state: stands(state, name, 0))
    started = time.perf_counter() - began
    opened: list[float] = []
    for stage in range(cohorts):
        status = fleet.state.rollouts[name].control.stage_statuses[stage]
        await update(fleet, stage, fleet.state.releases[status.release])
        counts = fleet.state.rollouts[name].counts[stage]
        assert (counts.confirmed, counts.soaked) == (each, 0), counts
        tick = time.perf_counter()
        if stage == cohorts - 1:
            break
        while fleet.state.rollouts[name].control.current_stage == stage:
            tick = time.perf_counter()  # deadlines of a thousand soaks are met in chunks: the last one passes the gate
            await fleet.beat(1)
        await fleet.until(lambda state, following=stage + 1: stands(state, name, following))  # type: ignore[misc]
        opened.append(time.perf_counter() - tick)
    while fleet.state.rollouts[name].control.state != rollout_pb2.Rollout.STATE_COMPLETED:
        await fleet.beat(1)
    return started, opened, time.perf_counter() - began


async def bare_hops(fleet: Fleet, bare: Bare, hops: int, times: int) -> float:
    """Seconds for as many bare transactions one after the other, the median of several goes."""
    start = await bare.here()
    await fleet.beat(1)
    written = await bare.read_since(start)
    one = [written[0][:1], []]
    return statistics.median([sum([await bare.produce(one) for _ in range(hops)]) for _ in range(times)])


async def main(kafka: str, cohorts: int, each: int, rounds: int) -> None:
    tune_collector()  # as services do
    starts, stages, walks = [], [], []
    async with Fleet(kafka) as fleet:
        await fleet.furnish(cohorts, each)
        await fleet.beat(2)
        bare = Bare(fleet)
        await bare.start()
        for number in range(rounds):
            started, opened, whole = await walk(fleet, f"2.{number}.0", cohorts, each)
            starts.append(started)
            stages.extend(opened)
            walks.append(whole)
        start_bare = await bare_hops(fleet, bare, START_HOPS, 20)
        stage_bare = await bare_hops(fleet, bare, STAGE_HOPS, 20)
        await bare.stop()
    devices = cohorts * each
    stages.sort()
    p99 = stages[min(len(stages) - 1, int(len(stages) * 0.99))]
    start, stage = statistics.median(starts), statistics.median(stages)
    print(
        f"rollout_scale: {devices:,} devices created and started in {start * 1000:.0f} ms (aim 500), "
        f"ratio to {START_HOPS} bare transactions {start / start_bare:.1f}; "
        f"next stage after its gate p50 {stage * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms of {len(stages)} (aim 100), "
        f"ratio to {STAGE_HOPS} bare transactions {stage / stage_bare:.1f}; "
        f"whole walk {devices / statistics.median(walks):,.0f} devices/s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cohorts", type=int, default=20)
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kafka", default=os.environ.get("GROUNDSWELL_KAFKA", "127.0.0.1:19092"))
    given = parser.parse_args(sys.argv[1:])
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # topics made a moment ago are still finding their leaders
    asyncio.run(main(given.kafka, given.cohorts, given.each, given.rounds))
