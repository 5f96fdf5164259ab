"""pki as it runs, on the log in memory, with a registry that keeps devices and can be told to fail."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from google.protobuf.message import Message
from groundswell.pki.v1 import events_pb2, pki_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2

from libs.errors import AlreadyExistsError, GroundswellError, NotFoundError
from libs.eventlog import Command, Deadline, Foreign, Runtime, RuntimeConfig, partition_of
from libs.eventlog.memory import MemoryLog
from libs.keystore import MemoryKeyStore
from libs.rpc.identity import Principal, set_caller
from services.pki.agenda import image_of
from services.pki.app import code_function
from services.pki.domain import Pki
from services.pki.issuer import Issuer
from services.pki.model import State
from services.pki.service import PkiInternalServicer, PkiServicer
from services.pki.tasks import PkiTasks
from tests.unit.pki.factory import Ca, der

ORG = "organizations/acme"
PRODUCT = f"{ORG}/products/thermostat"
NEIGHBOUR = next(f"n{index}" for index in range(1000) if partition_of(f"n{index}", 4) == partition_of("acme", 4))
"""An organization in the same partition, so in the same state."""


@dataclass
class FakeRegistry:
    """Idempotent by fingerprint, as the real one. ``before`` may wait or raise."""

    products: set[str] = field(
        default_factory=lambda: {
            PRODUCT,
            "organizations/beta/products/valve",
            f"organizations/{NEIGHBOUR}/products/valve",
        }
    )
    cohorts: set[str] = field(default_factory=lambda: {f"{PRODUCT}/cohorts/canary", f"{PRODUCT}/cohorts/main"})
    devices: dict[str, registry_pb2.Device] = field(default_factory=dict)
    calls: int = 0
    before: Callable[[], Awaitable[None]] | None = None

    async def lookup_product(self, name: str) -> registry_pb2.Product:
        if name not in self.products:
            raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
        return registry_pb2.Product(name=name)

    async def lookup_cohort(self, name: str) -> registry_pb2.Cohort:
        if name not in self.cohorts:
            raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
        return registry_pb2.Cohort(name=name)

    async def provision_device(self, request: registry_pb2.ProvisionDeviceRequest) -> registry_pb2.Device:
        self.calls += 1
        if self.before is not None:
            await self.before()
        name = f"{request.parent}/devices/{request.device_id}"
        known = self.devices.get(name)
        if known is None:
            known = self.devices[name] = registry_pb2.Device(
                name=name,
                uid=str(uuid.uuid4()),
                identifier=request.device_id,
                cohort=request.cohort,
                tags=request.tags,
                target=request.target,
                description=request.description,
                provisioned_by=request.provisioned_by,
                certificate_fingerprint=request.certificate_fingerprint,
                state=registry_pb2.Device.STATE_ACTIVE,
            )
        if known.certificate_fingerprint != request.certificate_fingerprint:
            raise AlreadyExistsError("DEVICE_IDENTIFIER_TAKEN", f"{name} exists", resource=name)
        return known

    async def undo_provisioning(self, request: registry_pb2.UndoProvisioningRequest) -> registry_pb2.Device:
        device = self.devices[request.name]
        device.state = registry_pb2.Device.STATE_RETIRED
        return device


class Clock:
    """Real time plus what a test adds; it never goes back."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms


@dataclass
class World:
    """One running pki."""

    log: MemoryLog
    registry: FakeRegistry
    keystore: MemoryKeyStore
    clock: Clock
    runtime: Runtime[State]
    public: PkiServicer
    internal: PkiInternalServicer

    async def code(self, code_id: str = "one", parent: str = ORG) -> str:
        request = pki_pb2.CreateVerificationCodeRequest(parent=parent, verification_code_id=code_id)
        return (await self.public.CreateVerificationCode(request, context())).code

    async def register(
        self,
        ca: Ca,
        *,
        ca_id: str = "factory",
        code_id: str = "",
        proof: str = "",
        parent: str = PRODUCT,
        jitp: pki_pb2.JitpSettings | None = None,
        within_s: float = 5.0,
        request_id: str = "",
    ) -> pki_pb2.CaCertificate:
        if not proof:
            proof = ca.proof(await self.code(code_id or ca_id, "/".join(parent.split("/")[:2])))
        request = pki_pb2.RegisterCaCertificateRequest(
            parent=parent,
            ca_certificate_id=ca_id,
            certificate_pem=ca.pem,
            verification_certificate_pem=proof,
            ca_certificate=pki_pb2.CaCertificate(jitp=jitp or pki_pb2.JitpSettings(enabled=True)),
            request_id=request_id,
        )
        return await self.public.RegisterCaCertificate(request, context(within_s))

    async def admit(self, leaf: Any, organization: str = "acme", within_s: float = 5.0) -> pki_pb2.DeviceCertificate:
        request = pki_pb2.AdmitCertificateRequest(organization=organization, leaf_der=der(leaf))
        return (await self.internal.AdmitCertificate(request, context(within_s))).device_certificate

    async def issuing_ca(self, ca_id: str = "one", days: int = 0) -> pki_pb2.IssuingCa:
        request = pki_pb2.CreateIssuingCaRequest(parent=ORG, issuing_ca_id=ca_id, validity_days=days)
        return await self.public.CreateIssuingCa(request, context())

    async def rotate(self, name: str, successor: str, etag: str = "") -> pki_pb2.IssuingCa:
        request = pki_pb2.RotateIssuingCaRequest(name=name, successor_id=successor, etag=etag)
        return await self.public.RotateIssuingCa(request, context())

    async def issue(
        self, current: pki_pb2.DeviceCertificate, csr: bytes, *, first: bool = False
    ) -> pki_pb2.DeviceCertificate:
        request = pki_pb2.IssueCertificateRequest(
            organization="acme", fingerprint=current.fingerprint, csr_der=csr, first=first
        )
        return (await self.internal.IssueCertificate(request, context())).device_certificate

    async def connect(self, certificate: pki_pb2.DeviceCertificate) -> pki_pb2.DeviceCertificate:
        """What the gateway does when a device comes with a certificate that this server issued."""
        request = pki_pb2.AdmitCertificateRequest(organization="acme", leaf_der=certificate.der)
        return (await self.internal.AdmitCertificate(request, context())).device_certificate

    def now(self, certificate: pki_pb2.DeviceCertificate) -> pki_pb2.DeviceCertificate:
        """A certificate as it is by now."""
        return self.state().certificates[certificate.name]

    async def policy(self, product: str = PRODUCT, **fields: Any) -> None:
        """The registry publishes a product with this certificate policy."""
        policy = registry_pb2.CertificatePolicy(**fields)
        image = registry_pb2.Product(name=product, policy=registry_pb2.ConfigurationPolicy(certificate_policy=policy))
        await self._published(product, registry_events.ProductChanged(product=image, change="product.updated"))

    async def retire(self, device: str) -> None:
        """The registry publishes the end of a device."""
        image = registry_pb2.Device(name=device, state=registry_pb2.Device.STATE_RETIRED)
        await self._published(device, registry_events.DeviceChanged(device=image, change="device.retired"))

    async def _published(self, resource: str, record: Message) -> None:
        foreign = Foreign("registry", "t.registry.public.v1", 0, 0, 1, "acme", resource, record, 0)
        await self.runtime.submit(Command("acme", foreign), Deadline.after(5))

    def told(self, kind: type[Message] = events_pb2.DeviceCertificateChanged) -> list[tuple[str, str]]:
        """(change, last segment) of the public records of a kind, in their order."""
        found = []
        for record in self.log.records("t.pki.public.v1", partition_of("acme", 4)):
            if dict(record.headers)["event-type"].decode() == kind.DESCRIPTOR.full_name:
                payload: Any = kind.FromString(record.value)
                image: Any = image_of(payload)
                found.append((payload.change, getattr(image, "common_name", "") or image.name.rpartition("/")[2]))
        return found

    def state(self, organization: str = "acme") -> State:
        return cast("State", self.runtime.snapshot(organization).state)

    async def until(self, condition: Callable[[], bool], organization: str = "acme") -> None:
        deadline = Deadline.after(10)
        while not condition():
            await self.runtime.changed(organization, deadline)

    def written(self, organization: str = "acme") -> int:
        """Position of the last record: what writes nothing leaves it."""
        return self.runtime.snapshot(organization).token.position


def context(timeout: float = 5.0) -> Any:
    set_caller(Principal("organizations/acme/apiKeys/test", "api_key"))
    return SimpleNamespace(time_remaining=lambda: timeout)


@asynccontextmanager
async def running(
    log: MemoryLog | None = None,
    registry: FakeRegistry | None = None,
    keystore: MemoryKeyStore | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[World]:
    """A pki that leads every partition. Give it another's log to go on where that one ended."""
    log = log or MemoryLog(partitions=4)
    registry = registry or FakeRegistry()
    keystore = keystore or MemoryKeyStore()
    clock = clock or Clock()
    log.clock_ms = clock
    code_of = code_function(keystore)
    issuer = Issuer(keystore, "local")
    tasks = PkiTasks(registry)
    config = RuntimeConfig(
        env="t", partitions=4, wall_clock_ms=clock, retry_first_s=0.01, retry_most_s=0.05, verify_folds=True
    )
    runtime: Runtime[State] = Runtime(Pki(code_of), log, config, tasks.handlers())
    tasks.submit = runtime.submit
    await runtime.start()
    await runtime.wait_leading(Deadline.after(10))
    public = PkiServicer(runtime, registry, code_of, issuer, clock)
    try:
        yield World(log, registry, keystore, clock, runtime, public, PkiInternalServicer(runtime, issuer, clock))
    finally:
        await runtime.stop()


async def refused(call: Awaitable[Any]) -> str:
    """Reason of the refusal that the call must end with."""
    try:
        answer = await call
    except GroundswellError as error:
        return error.reason
    raise AssertionError(f"was not refused: {answer}")


async def both(*calls: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)
