r"""A device gateway of your own in one file: it uses the public APIs, Kafka and the protos, and nothing of our code.

It does what docs/own-gateway.md says, in the same order: it beats once a second, resolves its devices in batches,
claims offers for them, publishes what they said in signed records, and asks before a device switches slots. Devices are
simulated here; how yours reach you is your own matter, but who they are is what you vouch for.

    GROUNDSWELL_OPERATOR_KEY=gsw_acme_owner_… GROUNDSWELL_API_KEY=gsw_acme_edge_… \
    python examples/own_gateway.py --profile .local/profile.json --kafka 127.0.0.1:19092 --env dev \
        --gateway organizations/acme/gateways/edge --signing-key edge.pem \
        --device organizations/acme/products/pump/devices/SN-0042
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import sys
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from aiokafka import AIOKafkaProducer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc
from groundswell.releases.v1 import releases_pb2, releases_pb2_grpc
from groundswell.rollout.v1 import edge_pb2, edge_pb2_grpc, rollout_pb2, rollout_pb2_grpc

State = device_pb2.AttemptState
BEAT_S = 1.0
GIVE_UP_S = 30.0


# Signed records -----------------------------------------------------------------------------------------------------


class CheckInTopic:
    """Signs and sends records. One object is one process: it has a process id and a sequence for each partition."""

    def __init__(
        self, producer: AIOKafkaProducer, env: str, gateway: str, key: Ed25519PrivateKey, registry_seq: int = 0
    ) -> None:
        self.topic = f"{env}.device.checkins.v1"
        self._producer = producer
        self._gateway = gateway
        self._key = key
        self._key_id = hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()
        self._process = str(uuid.uuid4())
        self._registry_seq = registry_seq
        self._sequences: dict[int, int] = {}
        self._lock = asyncio.Lock()

    async def partition_of(self, organization: str) -> int:
        """Where an organization lives."""
        partitions = await self._producer.partitions_for(self.topic)
        return zlib.crc32(organization.encode()) % len(partitions)

    def headers(self, partition: int, value: bytes) -> list[tuple[str, bytes]]:
        """Headers of the next record of a partition: its sequence is one above the last."""
        sequence = self._sequences.get(partition, 0) + 1
        self._sequences[partition] = sequence
        parts = (self.topic, str(partition), self._gateway, self._key_id, self._process, str(sequence))
        signed = b"\0".join((b"groundswell.checkin.v1", *(part.encode() for part in parts), value))
        return [
            ("gateway", self._gateway.encode()),
            ("key-id", self._key_id.encode()),
            ("process", self._process.encode()),
            ("sequence", str(sequence).encode()),
            ("registry-seq", str(self._registry_seq).encode()),
            ("signature", self._key.sign(signed)),
        ]

    async def send(self, organization: str, batch: device_pb2.CheckInBatch) -> None:
        """Return when Kafka has the record; only then a report counts as accepted."""
        value = batch.SerializeToString()
        partition = await self.partition_of(organization)
        async with self._lock:  # a record must be in the log before the next sequence is signed
            headers = self.headers(partition, value)
            await self._producer.send_and_wait(self.topic, value, partition=partition, headers=headers)


# The calls ----------------------------------------------------------------------------------------------------------


class Api:
    """The public ports, with an API key; what is UNAVAILABLE is repeated."""

    def __init__(self, endpoints: dict[str, str], ca_pem: bytes, key: str) -> None:
        credentials = grpc.ssl_channel_credentials(ca_pem)
        self._channels = [
            grpc.aio.secure_channel(endpoints[service], credentials) for service in ("registry", "releases", "rollout")
        ]
        registry, releases, rollout = self._channels
        self.registry = registry_pb2_grpc.RegistryServiceStub(registry)
        self.releases = releases_pb2_grpc.ReleasesServiceStub(releases)
        self.rollout = rollout_pb2_grpc.RolloutServiceStub(rollout)
        self.edge = edge_pb2_grpc.RolloutEdgeServiceStub(rollout)
        self._metadata = (("authorization", f"Bearer {key}"),)

    async def call(self, method: Any, request: Any) -> Any:
        """The answer of a call."""
        return (await self.call_at(method, request))[0]

    async def call_at(self, method: Any, request: Any) -> tuple[Any, str]:
        """The answer, and the log position it was given at."""
        give_up = time.monotonic() + GIVE_UP_S
        while True:
            call = method(request, metadata=self._metadata, timeout=10)
            try:
                answer = await call
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > give_up:
                    raise
                await asyncio.sleep(0.2)
                continue
            positions = dict(await call.trailing_metadata())
            return answer, str(positions.get("x-log-position", ""))

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()


async def register(api: Api, gateway: str, key: Ed25519PrivateKey) -> int:
    """Make the Gateway resource, once, and answer the header `registry-seq` of its records.

    Whoever verifies them waits until the registry's log is known that far, so that no record comes before its key.
    """
    parent, _, gateway_id = gateway.partition("/gateways/")
    image = registry_pb2.Gateway(public_key=key.public_key().public_bytes_raw())
    create = registry_pb2.CreateGatewayRequest(parent=parent, gateway_id=gateway_id, gateway=image)
    try:
        _, position = await api.call_at(api.registry.CreateGateway, create)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise
        request = registry_pb2.GetGatewayRequest(name=gateway)
        known, position = await api.call_at(api.registry.GetGateway, request)
        if known.public_key != image.public_key:
            raise SystemExit(f"{gateway} has another key") from None
    return int(position.rsplit("/", 1)[1])  # service/partition/log id/position/public-seq


# The gateway --------------------------------------------------------------------------------------------------------


class OwnGateway:
    """Speaks for the devices of one product."""

    def __init__(self, api: Api, topic: CheckInTopic, gateway: str, product: str) -> None:
        self.api = api
        self.topic = topic
        self.name = gateway
        self.product = product
        self._organization = gateway.split("/")[1]
        self._beating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to beat."""
        self._beating = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        """Stop beating. After ten seconds the installation counts this gateway as lost and goes on without it."""
        if self._beating is not None:
            self._beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beating

    async def _beat(self) -> None:
        """Time passes for soaks and deadlines only while every gateway beats: once a second, from the first moment."""
        while True:
            beat = device_pb2.CheckInBatch(gateway=self.name, heartbeat=True)
            await self.topic.send(self._organization, beat)
            await asyncio.sleep(BEAT_S)

    async def check_in(self, *items: device_pb2.CheckInItem) -> list[rollout_pb2.ClaimResult]:
        """Many devices at once: resolve, claim, publish. An empty result means: nothing for this device."""
        answers = [rollout_pb2.ClaimResult() for _ in items]
        resolved = await self._resolve(items)
        claims: list[tuple[int, rollout_pb2.ClaimItem]] = []
        for index, (item, found) in enumerate(zip(items, resolved.resolutions, strict=True)):
            item.receipt.steps.extend(found.steps)
            item.receipt.views.append(resolved.view)
            if found.candidates and not item.attempt:
                claim = rollout_pb2.ClaimItem(
                    device=item.device, device_uid=item.device_uid, candidates=found.candidates, check_in=item
                )
                claims.append((index, claim))
        if claims:
            request = edge_pb2.EdgeClaimOffersRequest(
                parent=self.product, gateway=self.name, items=[claim for _, claim in claims]
            )
            granted = await self.api.call(self.api.edge.ClaimOffers, request)
            for (index, _), result in zip(claims, granted.results, strict=True):
                answers[index] = result
        for item, answer in zip(items, answers, strict=True):
            item.receipt.steps.extend(answer.reasons)
            item.receipt.answer = "offer" if answer.HasField("offer") else "cancel" if answer.cancel_attempt else "none"
            item.receipt.attempt = answer.offer.attempt or answer.cancel_attempt
        await self._publish(items)
        return answers

    async def _resolve(self, items: Sequence[device_pb2.CheckInItem]) -> releases_pb2.ResolveDevicesResponse:
        supposed = [releases_pb2.SupposedDevice(device=item.device, running=item.running) for item in items]
        request = releases_pb2.ResolveDevicesRequest(parent=self.product, supposed_devices=supposed)
        resolved: releases_pb2.ResolveDevicesResponse = await self.api.call(self.api.releases.ResolveDevices, request)
        return resolved

    async def ask_to_switch(self, item: device_pb2.CheckInItem) -> rollout_pb2.AuthorizeSwitchResponse:
        """Leave to switch slots: without it a device stays where it is."""
        request = edge_pb2.EdgeAuthorizeSwitchRequest(
            gateway=self.name, device=item.device, attempt=item.attempt, check_in=item
        )
        answer: rollout_pb2.AuthorizeSwitchResponse = await self.api.call(self.api.edge.AuthorizeSwitch, request)
        item.receipt.steps.extend(answer.reasons)
        item.receipt.answer = (
            rollout_pb2.AuthorizeSwitchResponse.Answer.Name(answer.answer).removeprefix("ANSWER_").lower()
        )
        item.receipt.attempt = item.attempt
        await self._publish([item])
        return answer

    async def _publish(self, items: Sequence[device_pb2.CheckInItem]) -> None:
        """The same items that were claimed with: the leader has seen them and changes nothing by them again."""
        for item in items:
            item.receipt.decided_at_ms = time.time_ns() // 1_000_000
        batch = device_pb2.CheckInBatch(gateway=self.name, organization=self._organization, items=items)
        await self.topic.send(self._organization, batch)


# A device -----------------------------------------------------------------------------------------------------------


@dataclass
class SimulatedDevice:
    """What a device behind the gateway keeps: one counter for its check-ins and reports, which never goes back."""

    name: str
    uid: str
    running: registry_pb2.ReportedState
    instance: str = field(default_factory=lambda: str(uuid.uuid4()))
    boot_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    counter: int = 0

    def says(self, *states: State.ValueType, attempt: str = "") -> device_pb2.CheckInItem:
        """A check-in, with a report for each state reached since the last."""
        reports = []
        for state in states:
            self.counter += 1
            reports.append(device_pb2.Report(counter=self.counter, attempt=attempt, state=state))
        self.counter += 1
        item = device_pb2.CheckInItem(
            device=self.name,
            device_uid=self.uid,
            instance=self.instance,
            boot_id=self.boot_id,
            counter=self.counter,
            running=self.running,
            attempt=attempt,
            reports=reports,
        )
        # Two different bodies under one counter mean that two devices share an identity.
        item.body_sha256 = hashlib.sha256(item.SerializeToString(deterministic=True)).digest()
        return item

    def boots(self, offer: rollout_pb2.Offer) -> None:
        """The new slot runs, on trial."""
        self.boot_id = str(uuid.uuid4())
        self.running = registry_pb2.ReportedState(
            release=offer.release,
            bundle=offer.bundle,
            version=offer.version,
            security_version=offer.security_version,
        )


async def update(
    gateway: OwnGateway, device: SimulatedDevice, say: Callable[[str], None], poll_s: float = 0.5
) -> rollout_pb2.Offer:
    """One device from its first poll to its confirmed boot."""
    while True:
        (answer,) = await gateway.check_in(device.says())
        if answer.HasField("offer"):
            break
        await asyncio.sleep(poll_s)
    offer = answer.offer
    say(f"offered {offer.version} as {offer.attempt}")
    # Here a real device verifies offer.statement and offer.signatures against the keys it trusts, fetches each binary
    # by its sealed link (with its own certificate, from the installation's gateway), checks the digests, and installs.
    work = (State.ATTEMPT_STATE_ACCEPTED, State.ATTEMPT_STATE_DOWNLOADING, State.ATTEMPT_STATE_DOWNLOADED)
    await gateway.check_in(device.says(*work, State.ATTEMPT_STATE_INSTALLED, attempt=offer.attempt))
    say("installed")
    while True:
        leave = await gateway.ask_to_switch(device.says(attempt=offer.attempt))
        if leave.answer == leave.ANSWER_GO:
            break
        if leave.answer == leave.ANSWER_CANCEL:
            raise RuntimeError(f"cancelled: {[reason.code for reason in leave.reasons]}")
        await asyncio.sleep(poll_s)
    device.boots(offer)
    say(f"switched within {leave.valid_for_s:.0f} s")
    await gateway.check_in(
        device.says(State.ATTEMPT_STATE_BOOTED, State.ATTEMPT_STATE_CONFIRMED, attempt=offer.attempt)
    )
    return offer


async def await_confirmed(api: Api, device: str, attempt: str) -> None:
    """Until the rollout has taken it in, through the topic and its worker."""
    request = rollout_pb2.ListAttemptsRequest(parent=device)
    while True:
        listed = await api.call(api.rollout.ListAttempts, request)
        if any(one.name == attempt and one.state == State.ATTEMPT_STATE_CONFIRMED for one in listed.attempts):
            return
        await asyncio.sleep(0.2)


# The command --------------------------------------------------------------------------------------------------------


def load_or_make(path: Path) -> Ed25519PrivateKey:
    """The gateway's signing key: it never leaves this machine."""
    if path.exists():
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, Ed25519PrivateKey):
            raise SystemExit(f"{path} holds no Ed25519 key")
        return key
    made = Ed25519PrivateKey.generate()
    pem = made.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return made


async def started_producer(kafka: str) -> AIOKafkaProducer:
    """Idempotent and acknowledged by all, as the contract asks."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka, enable_idempotence=True, acks="all")
    await producer.start()
    return producer


async def run(options: argparse.Namespace, api_key: str, operator_key: str) -> None:
    """Register with the operator's key where it is given, beat, and take every device through its update."""
    profile = json.loads(options.profile.read_text())
    ca_pem = (options.profile.parent / profile["ca"]).read_bytes()
    key = load_or_make(options.signing_key)
    registry_seq = 0
    if operator_key:
        operator = Api(profile["endpoints"], ca_pem, operator_key)
        registry_seq = await register(operator, options.gateway, key)
        await operator.close()
    api = Api(profile["endpoints"], ca_pem, api_key)
    producer = await started_producer(options.kafka)
    product = options.device[0].partition("/devices/")[0]
    topic = CheckInTopic(producer, options.env, options.gateway, key, registry_seq)
    gateway = OwnGateway(api, topic, options.gateway, product)
    gateway.start()

    async def one(name: str) -> None:
        known = await api.call(api.registry.GetDevice, registry_pb2.GetDeviceRequest(name=name))
        running = registry_pb2.ReportedState(version=options.version)
        device = SimulatedDevice(name, known.uid, running)
        offer = await update(gateway, device, lambda line: print(f"{known.identifier}: {line}"))
        await await_confirmed(api, name, offer.attempt)
        print(f"{known.identifier}: confirmed {offer.version}")

    try:
        work: list[Awaitable[None]] = [one(name) for name in options.device]
        await asyncio.gather(*work)
    finally:
        await gateway.stop()
        await producer.stop()
        await api.close()


def main(arguments: Sequence[str]) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="A device gateway of your own, with simulated devices.")
    parser.add_argument("--profile", type=Path, required=True, help="profile with endpoints and CA")
    parser.add_argument("--kafka", required=True, help="bootstrap servers")
    parser.add_argument("--env", default="dev", help="prefix of the installation's topics")
    parser.add_argument("--gateway", required=True, help="organizations/x/gateways/y")
    parser.add_argument("--signing-key", type=Path, required=True, help="PEM file, made when it is missing")
    parser.add_argument("--device", action="append", required=True, help="full name; may be given often")
    parser.add_argument("--version", default="1.0.0", help="what the devices run before")
    options = parser.parse_args(arguments)
    key = os.environ.get("GROUNDSWELL_API_KEY", "")
    if not key:
        parser.error("set GROUNDSWELL_API_KEY to the gateway's API key")
    asyncio.run(run(options, key, os.environ.get("GROUNDSWELL_OPERATOR_KEY", "")))


if __name__ == "__main__":
    main(sys.argv[1:])
