"""`Leader.submit` with group commit against bare transactional produce of the very same records, in the same run.

    python -m bench.log_submit [--events 20000] [--rounds 5] [--kafka 127.0.0.1:19092]

Each command writes one private event of about 300 bytes and one public record; both sides use transactions of up to 500
events. `submit` also decides, folds, hashes the audit chain, waits for the read-back and answers each caller.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import immutables
import uvloop
from aiokafka import AIOKafkaProducer
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import StringValue

from deploy.topics import ensure_topics
from libs.eventlog import (
    Command,
    Context,
    Deadline,
    Decision,
    Event,
    NewEvent,
    Public,
    Runtime,
    RuntimeConfig,
    partition_of,
)
from libs.eventlog.collector import tune_collector
from libs.eventlog.config import events_topic, public_topic
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import Record, TopicPartition

ORGANIZATION = "bench"
PARTITIONS = 4
HOME = partition_of(ORGANIZATION, PARTITIONS)
CALLERS = 1000
BATCH = 500
State = immutables.Map[str, str]


@dataclass(frozen=True, slots=True)
class Put:
    name: str
    value: str


class Service:
    service = "registry"
    event_types: Sequence[type[Message]] = (StringValue,)
    sources: Mapping[str, Sequence[type[Message]]] = MappingProxyType({})

    def initial_state(self, partition: int) -> State:
        del partition
        return immutables.Map()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        del state
        assert isinstance(command, Put)
        payload = StringValue(value=command.value)
        return Decision((NewEvent(ctx.organization, command.name, payload, (Public(command.name, payload),)),), payload)

    def evolve(self, state: State, event: Event) -> State:
        return state.set(event.resource, event.payload.value)  # type: ignore[attr-defined]


async def submit_all(runtime: Runtime[State], count: int, value: str) -> float:
    # Made beforehand, as the baseline's records are: making requests is not what is measured.
    commands = iter(
        [Command(ORGANIZATION, Put(f"organizations/bench/things/{number}", value)) for number in range(count)]
    )
    deadline = Deadline.after(600)

    async def caller() -> None:
        for command in commands:
            await runtime.submit(command, deadline)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return count / (time.perf_counter() - began)


async def one_at_a_time(runtime: Runtime[State], count: int) -> list[float]:
    spent = []
    for number in range(count):
        began = time.perf_counter()
        await runtime.submit(Command(ORGANIZATION, Put(f"single/{number}", "v")), Deadline.after(60))
        spent.append(time.perf_counter() - began)
    return spent


async def read_all(log: KafkaLog, env: str, start: dict[TopicPartition, int]) -> list[list[Record]]:
    """What submit wrote, private and public, so that the baseline writes the same bytes."""
    ends = await log.end_positions(start)
    tail = await log.open_tail(start)
    found: dict[str, list[Record]] = {place.topic: [] for place in start}
    while any(tail.position(place) < ends[place] for place in start):
        for record in await tail.fetch(1.0):
            found[record.topic].append(record)
    await tail.close()
    return [found[events_topic(env, "registry")], found[public_topic(env, "registry")]]


async def produce_all(producer: AIOKafkaProducer, env: str, written: list[list[Record]]) -> float:
    """The same bytes into topics of another service: a copy in the own log would be refused as corruption."""
    topics = [topic(env, "pki") for topic in (events_topic, public_topic)]
    count = len(written[0])
    began = time.perf_counter()
    for first in range(0, count, BATCH):
        await producer.begin_transaction()
        for topic, records in zip(topics, written, strict=True):
            for record in records[first : first + BATCH]:
                await producer.send(topic, record.value, record.key, record.partition, headers=list(record.headers))
        await producer.commit_transaction()
    return count / (time.perf_counter() - began)


async def main(kafka: str, events: int, rounds: int) -> None:
    tune_collector()  # as services do
    env = f"bench{secrets.token_hex(4)}"
    await ensure_topics(kafka, env, PARTITIONS)
    log = KafkaLog(kafka)
    runtime: Runtime[State] = Runtime(Service(), log, RuntimeConfig(env=env, partitions=PARTITIONS, address="bench"))
    await runtime.start()
    await runtime.wait_leading(Deadline.after(30))
    producer = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=f"{env}.raw", max_batch_size=900_000)
    await producer.start()
    places = [TopicPartition(topic(env, "registry"), HOME) for topic in (events_topic, public_topic)]
    submitted, produced = [], []
    value = "x" * 200
    await submit_all(runtime, min(events, 2000), value)
    for _ in range(rounds):
        start = dict(await log.end_positions(places))
        submitted.append(await submit_all(runtime, events, value))
        written = await read_all(log, env, start)
        produced.append(await produce_all(producer, env, written))
    latency = await one_at_a_time(runtime, 100)
    await producer.stop()
    await runtime.stop()
    await log.close()
    ours, bare = statistics.median(submitted), statistics.median(produced)
    print(
        f"log_submit: submit {ours:,.0f} events/s, bare transactional produce {bare:,.0f} events/s, "
        f"ratio {ours / bare:.2f} (aim 0.50); one at a time {statistics.median(latency) * 1000:.1f} ms"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kafka", default=os.environ.get("GROUNDSWELL_KAFKA", "127.0.0.1:19092"))
    arguments = parser.parse_args(sys.argv[1:])
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # topics made a moment ago are still finding their leaders
    uvloop.run(main(arguments.kafka, arguments.events, arguments.rounds))
