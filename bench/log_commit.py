"""One command's commit with read-back against the bare transaction of the same two records, turn by turn.

    python -m bench.log_commit [--rounds 200] [--kafka 127.0.0.1:19092]

Both are timed from the call to the answer, and take turns, so that neither meets the markers of its own transaction
before and both see the same load. Ours also decides, chains, reads back and folds.
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

from aiokafka import AIOKafkaProducer

from bench.log_submit import HOME, ORGANIZATION, PARTITIONS, Put, Service, State, read_all
from deploy.topics import ensure_topics
from libs.eventlog import Command, Deadline, Runtime, RuntimeConfig
from libs.eventlog.collector import tune_collector
from libs.eventlog.config import events_topic, public_topic
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import Record, TopicPartition


async def bare_transaction(producer: AIOKafkaProducer, env: str, records: list[list[Record]]) -> None:
    """What `AIOKafkaProducer` needs for it, into topics of another service."""
    await producer.begin_transaction()
    sent = []
    for topic, (record,) in zip((events_topic(env, "pki"), public_topic(env, "pki")), records, strict=True):
        sent.append(await producer.send(topic, record.value, record.key, HOME, headers=list(record.headers)))
    await asyncio.gather(*sent)
    await producer.commit_transaction()


async def main(kafka: str, rounds: int) -> None:
    tune_collector()  # as services do
    env = f"bench{secrets.token_hex(4)}"
    await ensure_topics(kafka, env, PARTITIONS)
    log = KafkaLog(kafka)
    runtime: Runtime[State] = Runtime(Service(), log, RuntimeConfig(env=env, partitions=PARTITIONS, address="bench"))
    await runtime.start()
    await runtime.wait_leading(Deadline.after(30))
    producer = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=f"{env}.raw")
    await producer.start()
    places = [TopicPartition(topic(env, "registry"), HOME) for topic in (events_topic, public_topic)]
    start = dict(await log.end_positions(places))
    command = Command(ORGANIZATION, Put("organizations/bench/things/1", "x" * 200))
    await runtime.submit(command, Deadline.after(30))
    written = await read_all(log, env, start)
    ours, bare = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        await runtime.submit(command, Deadline.after(30))
        between = time.perf_counter()
        await bare_transaction(producer, env, written)
        ours.append(between - began)
        bare.append(time.perf_counter() - between)
    await producer.stop()
    await runtime.stop()
    await log.close()
    one, other = statistics.median(ours) * 1000, statistics.median(bare) * 1000
    print(
        f"log_commit: submit with read-back {one:.1f} ms, bare transaction {other:.1f} ms, "
        f"ratio {one / other:.2f} (aim at most 2.00)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--kafka", default=os.environ.get("GROUNDSWELL_KAFKA", "127.0.0.1:19092"))
    arguments = parser.parse_args(sys.argv[1:])
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # topics made a moment ago are still finding their leaders
    asyncio.run(main(arguments.kafka, arguments.rounds))
