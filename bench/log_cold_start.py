"""A cold start of one partition: everything folded from the log, against a snapshot and the rest.

    python -m bench.log_cold_start [--events 1000000] [--names 200000] [--write-s 30] [--kafka 127.0.0.1:19092]

As many events as get written in the given time, up to the number asked for; both starts fold the same log to the same
end and are compared. The last tenth of the log lies behind the snapshot. The store of snapshots is memory: what is
measured is reading, checking and thawing.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import sys
import time

from bench.log_submit import CALLERS, HOME, ORGANIZATION, PARTITIONS, Put, Service, State
from deploy.topics import ensure_topics
from libs.eventlog import Command, Deadline, Runtime, RuntimeConfig
from libs.eventlog.collector import tune_collector
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.memory import MemorySnapshotStore


async def write(runtime: Runtime[State], events: int, names: int, seconds: float) -> int:
    """How many got written."""
    until = time.perf_counter() + seconds
    numbers = iter(range(events))
    done = 0

    async def caller() -> None:
        nonlocal done
        for number in numbers:
            put = Put(f"organizations/bench/things/{number % names}", "x" * 100)
            await runtime.submit(Command(ORGANIZATION, put), Deadline.after(60))
            done += 1
            if time.perf_counter() > until:
                return

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done


async def cold_start(log: KafkaLog, config: RuntimeConfig, store: MemorySnapshotStore) -> tuple[float, float, State]:
    """Seconds until reads are served, those of our own CPU, and what the reads see."""
    began, worked = time.perf_counter(), time.process_time()
    runtime: Runtime[State] = Runtime(Service(), log, config, snapshots=store)
    await runtime.start()
    await runtime.wait_ready(Deadline.after(120))
    spent, own = time.perf_counter() - began, time.process_time() - worked
    state: State = runtime.snapshot(ORGANIZATION).state  # type: ignore[assignment]
    await runtime.stop()
    return spent, own, state


async def main(kafka: str, events: int, names: int, seconds: float) -> None:
    tune_collector()  # as services do
    env = f"bench{secrets.token_hex(4)}"
    await ensure_topics(kafka, env, PARTITIONS)
    log = KafkaLog(kafka)
    store = MemorySnapshotStore()
    config = RuntimeConfig(env=env, partitions=PARTITIONS, address="bench", snapshot_every_events=sys.maxsize)
    runtime: Runtime[State] = Runtime(Service(), log, config, snapshots=store)
    await runtime.start()
    await runtime.wait_leading(Deadline.after(30))
    written = await write(runtime, events * 9 // 10, names, seconds * 0.9)
    began = time.perf_counter()
    await runtime.write_snapshot(HOME)
    storing = time.perf_counter() - began
    written += await write(runtime, max(1, written // 9), names, seconds)
    await runtime.stop()
    whole, work, expected = await cold_start(log, config, MemorySnapshotStore())
    quick, less, found = await cold_start(log, config, store)
    await log.close()
    if found != expected:
        raise SystemExit("log_cold_start: the snapshot's fold differs from the log's")
    print(
        f"log_cold_start: {written:,} events folded in {whole:.1f} s ({work:.1f} s of CPU; a million in "
        f"{1e6 * whole / written:.0f} s), with a snapshot of nine tenths {quick:.1f} s ({less:.1f} s of CPU), "
        f"ratio {whole / quick:.1f}; {len(expected):,} resources stored in {storing:.1f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--names", type=int, default=200_000)
    parser.add_argument("--write-s", type=float, default=30.0)
    parser.add_argument("--kafka", default=os.environ.get("GROUNDSWELL_KAFKA", "127.0.0.1:19092"))
    arguments = parser.parse_args(sys.argv[1:])
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # topics made a moment ago are still finding their leaders
    asyncio.run(main(arguments.kafka, arguments.events, arguments.names, arguments.write_s))
