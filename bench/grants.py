"""Grants per second through the rollout leader, against bare transactional produce of the very same records.

    python -m bench.grants [--devices 20000] [--batch 100] [--callers 8] [--rounds 3] [--kafka 127.0.0.1:19092]

Each grant folds the device's check-in, judges it, appends the grant and its public record with read-back, and is
answered. `--callers` coalesced calls of `--batch` devices are under way at once, as from several gateways.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import sys
import time

from groundswell.rollout.v1 import rollout_pb2

from bench.fleet import PRODUCT, Bare, Fleet, cohort
from libs.eventlog.collector import tune_collector
from services.rollout.domain import Control, CreateRollout

AIM_PER_S = 5_000


async def start_rollout(fleet: Fleet, version: str) -> str:
    """A rollout of one stage that takes everybody; the release of the stage."""
    bundle = await fleet.bundle(version)
    name = f"{PRODUCT}/rollouts/to-{version}"
    stage = rollout_pb2.Stage(display_name="all", cohort=cohort(0), max_in_flight=1_000_000)
    await fleet.submit(CreateRollout(name, rollout_pb2.Rollout(stages=[stage]), bundle))
    await fleet.submit(Control("start", name))
    release = f"{cohort(0)}/releases/to-{version}-1"
    await fleet.until(
        lambda state: (
            release in state.releases
            and state.rollouts[name].control.stage_statuses[0].state == rollout_pb2.StageStatus.STATE_OPEN
        )
    )
    return release


async def grant_all(fleet: Fleet, release: str, batch: int, callers: int) -> tuple[float, float]:
    """Seconds until every device has its offer, by the clock and of this process's own."""
    devices = fleet.devices[0]
    requests = iter(
        [
            fleet.claims([fleet.check_in(item) for item in devices[first : first + batch]], release)
            for first in range(0, len(devices), batch)
        ]
    )
    granted = 0

    async def caller() -> None:
        nonlocal granted
        for request in requests:
            answer = await fleet.claim(request)
            granted += sum(result.HasField("offer") for result in answer.results)

    began, began_cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(callers)))
    spent, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    assert granted == len(devices), f"{granted} of {len(devices)} granted"
    return spent, cpu


async def main(kafka: str, devices: int, batch: int, callers: int, rounds: int) -> None:
    tune_collector()  # as services do
    rates, ratios, cpus = [], [], []
    async with Fleet(kafka) as fleet:
        await fleet.furnish(1, devices)
        bare = Bare(fleet)
        await bare.start()
        for number in range(rounds):
            release = await start_rollout(fleet, f"2.{number}.0")
            start = await bare.here()
            spent, cpu = await grant_all(fleet, release, batch, callers)
            written = await bare.read_since(start)
            baseline = await bare.produce(written)
            rates.append(devices / spent)
            cpus.append(devices / cpu)
            ratios.append(baseline / spent)
            await fleet.submit(Control("kill", f"{PRODUCT}/rollouts/to-2.{number}.0"))
            await fleet.until(lambda state: not any(state.live.values()))
        await bare.stop()
    print(
        f"grants: {statistics.median(rates):,.0f}/s through the leader (aim {AIM_PER_S:,}), ratio to bare "
        f"transactional produce of the same records {statistics.median(ratios):.2f}; "
        f"{statistics.median(cpus):,.0f} per second of the leader's own CPU; "
        f"{devices:,} devices, {callers} calls of {batch}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kafka", default=os.environ.get("GROUNDSWELL_KAFKA", "127.0.0.1:19092"))
    given = parser.parse_args(sys.argv[1:])
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # topics made a moment ago are still finding their leaders
    asyncio.run(main(given.kafka, given.devices, given.batch, given.callers, given.rounds))
