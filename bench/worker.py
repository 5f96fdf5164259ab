"""Check-ins through the Faust worker, against a bare `getmany` loop that decodes the same batches.

    python -m bench.worker [--records 1200] [--rounds 3]

Signed records of 250 items (as many as a gateway puts into one when they have receipts; one of them not idle) are
written while the worker is frozen. Then it is let go: it verifies, splits, has the rollout leader acknowledge, and
writes last-seen and receipts to Redis; done is when Redis stands at the last record. The baseline only parses.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
import uuid
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.device.v1 import device_pb2
from redis.asyncio import Redis

from bench.checkins import cpu_s
from bench.installation import enrolled, running, tenant_of, what_else_ran
from libs.checkins import CheckInSigner
from libs.checkins.producer import KafkaCheckInProducer, checkin_topic
from libs.eventlog import partition_of
from libs.keystore import DirectoryKeyStore
from services.rollout.keys import positions_key
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant

ITEMS = 250
GATEWAY = "organizations/platform/gateways/local-1"


def items_of(tenant: Tenant, known: str, number: int) -> list[device_pb2.CheckInItem]:
    """A record's worth of a fleet: as the gateway says them, with steps and positions in the receipt."""
    views = [
        device_pb2.ViewPosition(service=service, partition=1, public_seq=1000 + number, log_id="0" * 32)
        for service in ("registry", "pki", "artifacts", "releases", "rollout")
    ]
    steps = [device_pb2.Reason(code="NO_RELEASES", message="the cohort has no releases: create one", blocking=True)]
    receipt = device_pb2.Receipt(steps=steps, views=views, answer="none", decided_at_ms=1_800_000_000_000)
    made = []
    for index in range(ITEMS):
        name = tenant.device_name(f"d-{(number * ITEMS + index) % 100_000:06d}") if index else known
        item = device_pb2.CheckInItem(
            device=name,
            device_uid=str(uuid.UUID(int=index + 1)),
            instance="1b4e28ba-2fa1-41d2-883f-0016d3cca427",
            boot_id="2b4e28ba-2fa1-41d2-883f-0016d3cca427",
            counter=number + 1_000_000,
            body_sha256=bytes(32),
            certificate_fingerprint="ab" * 32,
            idle=index > 0,
            receipt=receipt,
        )
        item.running.version = "1.0.0" if number % 2 else "1.0.1"
        made.append(item)
    return made


class Bench:
    """One installation, its topic and its worker."""

    def __init__(self, stack: Stack, tenant: Tenant, known: str) -> None:
        settings = stack.settings
        self._stack, self._tenant, self._known = stack, tenant, known
        self._topic = checkin_topic(settings.env)
        self._place = TopicPartition(self._topic, partition_of(tenant.organization, settings.partitions))
        self._producer = KafkaCheckInProducer(settings.kafka, self._topic)
        self._redis: Redis = Redis.from_url(settings.redis)
        seed = DirectoryKeyStore(settings.keystore_dir).get_or_create("gateway-local-1", lambda: b"")
        key = Ed25519PrivateKey.from_private_bytes(seed)
        self._signer = CheckInSigner(key, GATEWAY, str(uuid.uuid4()), self._topic)
        self._number = 0

    async def __aenter__(self) -> Self:
        await self._producer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._producer.stop()
        await self._redis.aclose()

    async def _at(self) -> int:
        found = await self._redis.hget(positions_key(self._stack.settings.env), str(self._place.partition))
        return int(found or -1)

    async def written(self, records: int) -> tuple[int, int]:
        """First and last position of so many new records."""
        values = []
        for _ in range(records):
            self._number += 1
            items = items_of(self._tenant, self._known, self._number)
            batch = device_pb2.CheckInBatch(gateway=GATEWAY, organization=self._tenant.organization, items=items)
            values.append(batch.SerializeToString())
        key = self._tenant.organization.encode()
        os.kill(self._stack.pid("worker"), signal.SIGSTOP)
        try:
            partition = self._place.partition
            posted = [
                await self._producer.post(partition, key, value, self._signer.headers(partition, value))
                for value in values
            ]
            stored: Any = [await acknowledged for acknowledged in posted]
        finally:
            self._began = time.perf_counter()
            os.kill(self._stack.pid("worker"), signal.SIGCONT)
        return stored[0].offset, stored[-1].offset

    async def ours(self, records: int, last: int) -> tuple[float, float]:
        """(rate, CPU in us) of the worker."""
        pid = self._stack.pid("worker")
        used, began = cpu_s(pid), self._began
        async with asyncio.timeout(300):
            while await self._at() < last:  # noqa: ASYNC110 - it is in another process
                await asyncio.sleep(0.01)
        count = records * ITEMS
        return count / (time.perf_counter() - began), (cpu_s(pid) - used) * 1e6 / count

    async def bare(self, records: int, first: int, last: int) -> tuple[float, float]:
        """The same of a loop that only decodes."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self._stack.settings.kafka, max_partition_fetch_bytes=8 << 20)
        await consumer.start()
        consumer.assign([self._place])
        consumer.seek(self._place, first)
        used, began, count = cpu_s(os.getpid()), time.perf_counter(), 0
        while await consumer.position(self._place) <= last:
            for found in (await consumer.getmany(timeout_ms=500, max_records=500)).values():
                for record in found:
                    count += len(device_pb2.CheckInBatch.FromString(record.value).items)
        spent = time.perf_counter() - began
        cpu = cpu_s(os.getpid()) - used
        await consumer.stop()
        if count < records * ITEMS:
            raise SystemExit(f"worker: the baseline found {count} items")
        return count / spent, cpu * 1e6 / count


async def measure(stack: Stack, tenant: Tenant, known: str, records: int, rounds: int) -> None:
    async with Bench(stack, tenant, known) as bench:
        first, last = await bench.written(20)
        await bench.ours(20, last)
        results: list[tuple[Any, Any]] = []
        for _ in range(rounds):
            first, last = await bench.written(records)
            ours = await bench.ours(records, last)
            results.append((ours, await bench.bare(records, first, last)))
    rate, bare = (statistics.median(side[which][0] for side in results) for which in (0, 1))
    cost, bare_cost = (statistics.median(side[which][1] for side in results) for which in (0, 1))
    print(
        f"worker: {rate:,.0f} check-ins/s verified, acknowledged by the leader, in Redis; bare getmany and decoding "
        f"{bare:,.0f}/s, ratio {rate / bare:.2f} (aim 0.30, above 100,000/s); {cost:.1f} us of CPU of the worker each, "
        f"bare {bare_cost:.1f} us, ratio {bare_cost / cost:.2f}; {what_else_ran()}"
    )


def main(records: int, rounds: int) -> None:
    with running() as stack, tenant_of(stack) as tenant:
        enrolled(tenant, ["bench-0"])
        asyncio.run(measure(stack, tenant, tenant.device_name("bench-0"), records, rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kafka", help="not used: the benchmark brings an installation of its own")
    arguments = parser.parse_args(sys.argv[1:])
    main(arguments.records, arguments.rounds)
