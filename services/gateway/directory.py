"""Devices and their certificates as a check-in reads them: :mod:`.readthrough` over Redis and the services they are of.

What a check-in needs of a device is made once, when it enters the cache: facts for ``resolve()``, and the bytes that
every record of it in the check-in topic begins with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from groundswell.device.v1 import device_pb2
from groundswell.pki.v1 import events_pb2 as pki_events
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from redis.asyncio import Redis

from libs.errors import UnavailableError
from libs.eventlog.codec import EVENT_TYPE, header
from libs.eventlog.deadline import monotonic
from libs.eventlog.follower import PublicFollower
from libs.eventlog.ports import EventLog, Record
from libs.names import organization_of, product_of
from libs.resolution import DeviceFacts
from libs.resolution.convert import device_facts
from libs.rpc.identity import LOG_POSITION
from services.gateway.projection import Projector
from services.gateway.readthrough import ReadThrough, Shelved
from services.gateway.shelf import Row, Shelves

LOOKUP_S: Final = 3.0
OWNER_POLL_S: Final = 0.02
_DEVICE_CHANGED: Final = registry_events.DeviceChanged.DESCRIPTOR.full_name.encode()
_CERTIFICATE_CHANGED: Final = pki_events.DeviceCertificateChanged.DESCRIPTOR.full_name.encode()

Lookup = Callable[..., Any]
"""A unary call of a generated stub."""


StateKey = tuple[str, str, str, int]
"""A running state, to be compared."""


def state_key(state: registry_pb2.ReportedState) -> StateKey:
    """All fields of a running state."""
    return state.release, state.bundle, state.version, state.security_version


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A device, and what is made of it once."""

    device: registry_pb2.Device
    facts: DeviceFacts
    product: str
    reported: StateKey
    said: bytes
    """Beginning of its items in the check-in topic."""

    @classmethod
    def of(cls, device: registry_pb2.Device) -> DeviceEntry:
        """Prepare a device."""
        item = device_pb2.CheckInItem(device=device.name, device_uid=device.uid)
        return cls(
            device, device_facts(device), product_of(device.name), state_key(device.reported), item.SerializeToString()
        )


@dataclass(frozen=True, slots=True)
class CertificateEntry:
    """A certificate, read once."""

    certificate: pki_pb2.DeviceCertificate
    product: str
    device: str
    ca: str
    state: pki_pb2.DeviceCertificate.State.ValueType
    not_before: int
    not_after: int
    said: bytes

    @classmethod
    def of(cls, certificate: pki_pb2.DeviceCertificate) -> CertificateEntry:
        """Prepare a certificate."""
        item = device_pb2.CheckInItem(certificate_fingerprint=certificate.fingerprint)
        return cls(
            certificate,
            product_of(certificate.device),
            certificate.device,
            certificate.ca_certificate,
            certificate.state,
            certificate.not_before.seconds,
            certificate.not_after.seconds,
            item.SerializeToString(),
        )


def certificate_key(organization: str, fingerprint: str) -> str:
    """Key of a certificate."""
    return f"{organization}/{fingerprint}"


def device_row(record: Record) -> Row | None:
    """What a record of the registry puts on the shelf. What cannot be read is not understood, and puts nothing."""
    if header(record, EVENT_TYPE) != _DEVICE_CHANGED:
        return None
    try:
        device = registry_events.DeviceChanged.FromString(record.value).device
    except DecodeError:
        return None
    return device.name, device.SerializeToString()


def certificate_row(record: Record) -> Row | None:
    """The same of pki."""
    if header(record, EVENT_TYPE) != _CERTIFICATE_CHANGED:
        return None
    try:
        certificate = pki_events.DeviceCertificateChanged.FromString(record.value).device_certificate
    except DecodeError:
        return None
    return certificate_key(organization_of(certificate.name), certificate.fingerprint), certificate.SerializeToString()


class DeviceDirectory:
    """Caches, shelves and projectors of one gateway process."""

    def __init__(
        self,
        log: EventLog,
        redis: Redis,
        env: str,
        partitions: int,
        capacity: int,
        lookup_device: Lookup,
        lookup_certificate: Lookup,
    ) -> None:
        self._redis = redis
        self._lookup_device = lookup_device
        self._lookup_certificate = lookup_certificate
        self._followers: Mapping[str, PublicFollower] = {}
        self._registry = Shelves(redis, env, "registry")
        self._pki = Shelves(redis, env, "pki")
        self.devices: ReadThrough[DeviceEntry] = ReadThrough(
            "device", partitions, capacity, self._shelved_device, self._ask_device
        )
        self.certificates: ReadThrough[CertificateEntry] = ReadThrough(
            "certificate", partitions, capacity, self._shelved_certificate, self._ask_certificate
        )
        self._projectors = [
            Projector(log, shelves, env, service, partitions, lambda at, of=service: self._log_id(of, at), row)  # type: ignore[misc]
            for service, shelves, row in (
                ("registry", self._registry, device_row),
                ("pki", self._pki, certificate_row),
            )
        ]

    async def start(self, followers: Mapping[str, PublicFollower]) -> None:
        """Begin to fill Redis. The followers say which logs there are and how far they have been read."""
        self._followers = followers
        for projector in self._projectors:
            await projector.start()

    async def stop(self) -> None:
        """Stop filling Redis."""
        for projector in self._projectors:
            await projector.stop()
        await self._redis.aclose()

    def summary(self) -> dict[str, Any]:
        """For the health answer."""
        return {
            "cached": {"devices": len(self.devices), "certificates": len(self.certificates)},
            "hits": self.devices.hits,
            "redis_reads": self.devices.shelf_reads + self.certificates.shelf_reads,
            "owner_reads": self.devices.owner_reads + self.certificates.owner_reads,
            "redis_failures": self._registry.failures + self._pki.failures,
            "rewinds": sum(projector.rewinds for projector in self._projectors),
        }

    def _log_id(self, service: str, partition: int) -> str:
        follower = self._followers.get(service)
        return follower.token(partition).log_id if follower is not None else ""

    async def _shelved_device(self, partition: int, name: str) -> Shelved[DeviceEntry] | None:
        found = await self._registry.read(partition, self._log_id("registry", partition), name)
        if found is None:
            return None
        value, position = found
        return Shelved(DeviceEntry.of(registry_pb2.Device.FromString(value)) if value is not None else None, position)

    async def _shelved_certificate(self, partition: int, key: str) -> Shelved[CertificateEntry] | None:
        found = await self._pki.read(partition, self._log_id("pki", partition), key)
        if found is None:
            return None
        value, position = found
        entry = CertificateEntry.of(pki_pb2.DeviceCertificate.FromString(value)) if value is not None else None
        return Shelved(entry, position)

    async def _ask_device(self, partition: int, name: str) -> DeviceEntry | None:
        request = registry_pb2.GetDeviceRequest(name=name)
        device = await self._ask("registry", partition, self._lookup_device, request)
        return None if device is None else DeviceEntry.of(device)

    async def _ask_certificate(self, partition: int, key: str) -> CertificateEntry | None:
        organization, _, fingerprint = key.partition("/")
        name = f"organizations/{organization}/deviceCertificates/{fingerprint}"
        request = pki_pb2.GetDeviceCertificateRequest(name=name)
        certificate = await self._ask("pki", partition, self._lookup_certificate, request)
        return None if certificate is None else CertificateEntry.of(certificate)

    async def _ask(self, service: str, partition: int, lookup: Lookup, request: object) -> Any:
        """An answer at least as new as what was followed here; None for what does not exist.

        A follower's token has no position in the private log, so the owner cannot wait for it; it says how far it was.
        """
        follower = self._followers.get(service)
        needed = follower.public_seq(partition) if follower is not None else 0
        until = monotonic() + LOOKUP_S
        while True:
            answer: Any = None
            call = lookup(request, timeout=LOOKUP_S)
            try:
                answer = await call
                stood = _public_seq(await call.trailing_metadata(), service)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise _unavailable(service) from error
                stood = _public_seq(error.trailing_metadata(), service)
            if stood is None or stood >= needed:
                return answer
            if monotonic() >= until:
                raise _unavailable(service)
            await asyncio.sleep(OWNER_POLL_S)


def _public_seq(metadata: Any, service: str) -> int | None:
    """How far the owner had read its own public records when it answered; None when it does not say."""
    for key, value in metadata or ():
        if key == LOG_POSITION and str(value).startswith(f"{service}/"):
            return int(str(value).rpartition("/")[2])
    return None


def _unavailable(service: str) -> UnavailableError:
    return UnavailableError(
        "LOOKUP_UNAVAILABLE", f"neither Redis nor {service} can say who this device is: try later", retry_after_s=2.0
    )
