"""Webhook deliveries by the sender against bare signed aiohttp posts to the very same receiver, in the same run.

    python -m bench.webhooks [--events 9000] [--endpoints 2] [--rounds 3] [--kafka 127.0.0.1:19092]

The receiver is HTTPS in a process of its own and only counts. The baseline posts the same bodies over keep-alive TLS
with as many requests open as the sender has, and signs each with both keys (``v1`` and ``v1a``). The sender's side is
the whole path behind publication: the records are read from Kafka, filtered, rendered, signed, posted, and what became
of them is committed to Kafka and read back. Both sides run in this process, one after the other. The receiver's own
ceiling is what the baseline reaches with no signing at all: printed, so that one can see what limits.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import uvloop
from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from demo.factory import server_identity
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
    Task,
    TaskContext,
    partition_of,
)
from libs.eventlog.codec import new_id
from libs.eventlog.collector import tune_collector
from libs.eventlog.config import wall_clock_ms
from libs.eventlog.kafka import KafkaLog
from libs.eventlog.ports import TopicPartition
from libs.keystore import MemoryKeyStore
from services.webhooks.domain import Webhooks
from services.webhooks.model import VERIFY, CreateEndpoint, Endpoint, RecordVerification, State, UpdateEndpoint
from services.webhooks.policy import UrlPolicy
from services.webhooks.pump import CONCURRENCY
from services.webhooks.render import WebhookEvent, render
from services.webhooks.sender import Sender
from services.webhooks.signing import KeyRing, Signer
from services.webhooks.source import places_of
from services.webhooks.transport import HttpsTransport

ORGANIZATION = "bench"
PARTITIONS = 4
HOME = partition_of(ORGANIZATION, PARTITIONS)


@dataclass(frozen=True, slots=True)
class Say:
    """Publish that many devices."""

    first: int
    count: int


class Publisher:
    """Stands where the registry stands."""

    service = "registry"
    event_types: Sequence[type[Message]] = (registry_events.DeviceSaved,)
    sources: Mapping[str, Sequence[type[Message]]] = MappingProxyType({})

    def initial_state(self, partition: int) -> None:
        del partition

    def decide(self, state: None, command: object, ctx: Context) -> Decision:
        del state
        assert isinstance(command, Say)
        events = []
        for number in range(command.first, command.first + command.count):
            device = device_of(number)
            image = registry_events.DeviceChanged(device=device, change="device.created")
            saved = registry_events.DeviceSaved(device=device)
            events.append(NewEvent(ctx.organization, device.name, saved, (Public(device.name, image),)))
        return Decision(tuple(events))

    def evolve(self, state: None, event: Event) -> None:
        del state, event


def device_of(number: int) -> registry_pb2.Device:
    return registry_pb2.Device(
        name=f"organizations/{ORGANIZATION}/products/p/devices/SN-{number:06}",
        uid=f"{number:032x}",
        identifier=f"SN-{number:06}",
        cohort=f"organizations/{ORGANIZATION}/products/p/cohorts/canary",
        tags=["blue", "made"],
    )


class Counter(asyncio.Protocol):
    """An HTTP receiver reduced to what it must do: find the ends of requests, answer 204."""

    def connection_made(self, transport: Any) -> None:
        self._transport, self._data = transport, b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while True:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return
            at = self._data.lower().find(b"content-length:", 0, end)
            size = int(self._data[at + 15 : self._data.find(b"\r\n", at)]) if at >= 0 else 0
            if len(self._data) < end + 4 + size:
                return
            self._data = self._data[end + 4 + size :]
            self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


async def receive(certificate: str, key: str) -> None:
    """The receiver's process: prints its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = await asyncio.get_running_loop().create_server(Counter, "127.0.0.1", 0, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def post_all(url: str, ca_pem: str, bodies: Sequence[bytes], ring: KeyRing | None, open_: int) -> float:
    """Bare posts per second."""
    context = ssl.create_default_context(cadata=ca_pem)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    waiting = iter(range(len(bodies)))
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:

        async def poster() -> None:
            for number in waiting:
                now_ms, identifier = wall_clock_ms(), f"msg_{number:040x}"
                headers = {
                    "content-type": "application/json",
                    "webhook-id": identifier,
                    "webhook-timestamp": str(now_ms // 1000),
                    "webhook-signature": ring.signature(identifier, now_ms, bodies[number]) if ring else "none",
                }
                async with session.post(url, data=bodies[number], headers=headers, ssl=context) as response:
                    await response.read()
                    assert response.status == 204

        began = time.perf_counter()
        await asyncio.gather(*(poster() for _ in range(open_)))
        return len(bodies) / (time.perf_counter() - began)


@dataclass
class Bench:
    """All parts of the sender's side."""

    log: KafkaLog
    env: str
    registry: Runtime[None]
    webhooks: Runtime[State]
    sender: Sender
    published: int = 0

    async def create(self, identifier: str, url: str, ca_pem: str) -> str:
        name = f"organizations/{ORGANIZATION}/webhookEndpoints/{identifier}"
        wanted = pb.WebhookEndpoint(name=name, url=url, ca_pem=ca_pem)
        places = [TopicPartition(*place) for place in places_of(self.env, HOME)]
        ends = await self.log.end_positions(places)
        starts = tuple(((place.topic, place.partition), position) for place, position in ends.items())
        await self.webhooks.submit(Command(ORGANIZATION, CreateEndpoint(wanted, starts)), Deadline.after(30))
        image = self.endpoint(name).image
        verified = RecordVerification(name, image.uid, image.url, "")
        await self.webhooks.submit(Command(ORGANIZATION, verified), Deadline.after(30))
        return name

    def endpoint(self, name: str) -> Endpoint:
        state: Any = self.webhooks.snapshot_of_partition(HOME).state
        found: Endpoint = state.endpoints[name]
        return found

    async def publish(self, count: int) -> None:
        for first in range(self.published, self.published + count, 100):
            command = Command(ORGANIZATION, Say(first, min(100, self.published + count - first)))
            await self.registry.submit(command, Deadline.after(60))
        self.published += count

    async def switch(self, names: Sequence[str], state: pb.WebhookEndpoint.State.ValueType) -> None:
        for name in names:
            wanted = UpdateEndpoint(pb.WebhookEndpoint(name=name, state=state), ("state",))
            await self.webhooks.submit(Command(ORGANIZATION, wanted), Deadline.after(30))

    async def deliver(self, names: Sequence[str], count: int) -> float:
        """Deliveries per second, from the enabling of the endpoints to the last record that all were made."""
        before = {name: self.endpoint(name).delivered for name in names}
        await self.switch(names, pb.WebhookEndpoint.STATE_DISABLED)
        await self.publish(count)
        began = time.perf_counter()
        await self.switch(names, pb.WebhookEndpoint.STATE_ACTIVE)
        while not all(self.endpoint(name).delivered >= before[name] + count for name in names):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return len(names) * count / (time.perf_counter() - began)


async def nothing_to_ask(task: Task, ctx: TaskContext, /) -> Command | None:
    """The endpoints are verified by hand."""
    del task, ctx
    return None


async def main(kafka: str, events: int, endpoints: int, rounds: int) -> None:
    tune_collector()  # as services do
    env = f"bench{secrets.token_hex(4)}"
    await ensure_topics(kafka, env, PARTITIONS)
    log, signer = KafkaLog(kafka), Signer(MemoryKeyStore())
    registry: Runtime[None] = Runtime(Publisher(), log, RuntimeConfig(env=env, partitions=PARTITIONS, address="b"))
    domain = Webhooks(lambda name, uid, generation: signer.keys(name, uid, generation).public_key)
    config = RuntimeConfig(env=env, partitions=PARTITIONS, address="bench", node=new_id())
    webhooks: Runtime[State] = Runtime(domain, log, config, {VERIFY: nothing_to_ask})
    for runtime in (registry, webhooks):
        await runtime.start()
        await runtime.wait_leading(Deadline.after(60))
    with tempfile.TemporaryDirectory() as folder:
        identity, ca_file = server_identity(Path(folder))
        arguments = ("--receive", str(identity.certificate), str(identity.key))
        receiver = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.webhooks", *arguments, stdout=subprocess.PIPE
        )
        assert receiver.stdout is not None
        port = int(await receiver.stdout.readline())
        url, ca_pem = f"https://127.0.0.1:{port}/hooks", ca_file.read_text()
        transport = HttpsTransport(UrlPolicy.parse(f"127.0.0.1:{port}"), wall_clock_ms)
        await transport.start()
        sender = Sender(webhooks, log, env, transport, signer, wall_clock_ms)
        await sender.start()
        bench = Bench(log, env, registry, webhooks, sender)
        names = [await bench.create(f"e{number}", url, ca_pem) for number in range(endpoints)]
        ring = signer.ring(bench.endpoint(names[0]).image)
        bodies = [body_of(number) for number in range(events)] * endpoints
        open_ = CONCURRENCY * endpoints
        try:
            await bench.deliver(names, 200)
            ours, bare = [], []
            for _ in range(rounds):
                ours.append(await bench.deliver(names, events))
                bare.append(await post_all(url, ca_pem, bodies, ring, open_))
            ceiling = await post_all(url, ca_pem, bodies, None, open_)
        finally:
            receiver.terminate()
            await receiver.wait()
            await sender.stop()
            await transport.stop()
    await webhooks.stop()
    await registry.stop()
    await log.close()
    mine, theirs = statistics.median(ours), statistics.median(bare)
    print(
        f"webhooks: sender {mine:,.0f} deliveries/s from log to log ({endpoints} endpoints, {open_} open), bare signed "
        f"posts {theirs:,.0f}/s, ratio {mine / theirs:.2f} (aim 0.50); unsigned posts to this receiver {ceiling:,.0f}/s"
    )


def body_of(number: int) -> bytes:
    device = device_of(number)
    image = registry_events.DeviceChanged(device=device, change="device.created")
    return render(WebhookEvent("device.created", f"e{number}", ORGANIZATION, device.name, wall_clock_ms(), image), 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=9_000)
    parser.add_argument("--endpoints", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kafka", default=os.environ.get("GROUNDSWELL_KAFKA", "127.0.0.1:19092"))
    parser.add_argument("--receive", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(sys.argv[1:])
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # topics made a moment ago are still finding their leaders
    if given.receive:
        uvloop.run(receive(*given.receive))
    else:
        uvloop.run(main(given.kafka, given.events, given.endpoints, given.rounds))
