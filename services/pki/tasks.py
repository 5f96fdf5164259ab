"""Outgoing work of pki: reserving CA keys at their own partition, creating and undoing devices at the registry.

Every handler reads what it needs from the committed state, so it may run again after any fail-over, and what it calls
is idempotent by a natural key: the CA's name at the key's partition, the fingerprint at the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from groundswell.pki.v1 import events_pb2, pki_pb2
from groundswell.registry.v1 import registry_pb2

from libs.errors import (
    AlreadyExistsError,
    DomainError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from libs.eventlog import Command, Committed, Deadline, Task, TaskContext, TaskHandler
from libs.names import organization_of, product_of
from services.pki.model import (
    PROVISION,
    RELEASE,
    RESERVE,
    UNDO,
    AbandonCa,
    ActivateCa,
    Ca,
    CloseAdmission,
    ConfirmSpki,
    ReleaseSpki,
    ReserveSpki,
    State,
    routing_key,
)
from services.pki.ports import RegistryPort

_CALL_S: Final = 10.0
_FINAL: Final = (
    InvalidArgumentError,
    NotFoundError,
    AlreadyExistsError,
    FailedPreconditionError,
    ResourceExhaustedError,
)
"""Answers of the registry that end an admission; the device may come again. Anything else is tried again here."""


class Submit(Protocol):
    """``Runtime.submit``."""

    async def __call__(self, command: Command, deadline: Deadline, /) -> Committed: ...


@dataclass(slots=True)
class PkiTasks:
    """Handlers of all kinds. ``submit`` is set once the runtime exists: reservations are decided by it, too."""

    registry: RegistryPort
    submit: Submit | None = None

    def handlers(self) -> Mapping[str, TaskHandler]:
        """By kind, for the runtime."""
        return {RESERVE: self.reserve, RELEASE: self.release, PROVISION: self.provision, UNDO: self.undo}

    async def reserve(self, task: Task, ctx: TaskContext, /) -> Command | None:
        """Get the key for a pending registration, finally or not at all."""
        name = task.payload.decode()
        ca = _ca(ctx, name)
        if ca is None or ca.state != Ca.STATE_PENDING:
            return None
        fingerprint = ca.spki_fingerprint
        holder = await self._at_key(fingerprint, ReserveSpki(fingerprint, name))
        if holder == name:
            holder = await self._at_key(fingerprint, ConfirmSpki(fingerprint, name))
        if not holder:
            raise UnavailableError("RESERVATION_LOST", f"the reservation of the key of {name} is gone: asking again")
        payload = ActivateCa(name) if holder == name else AbandonCa(name, "CA_KEY_TAKEN")
        return Command(organization_of(name), payload)

    async def release(self, task: Task, ctx: TaskContext, /) -> Command | None:
        """Give back what an abandoned registration may hold; its abandonment is in the log, or this task were not."""
        name = task.payload.decode()
        ca = _ca(ctx, name)
        if ca is not None and ca.state == Ca.STATE_ABANDONED:
            await self._at_key(ca.spki_fingerprint, ReleaseSpki(ca.spki_fingerprint, name))
        return None

    async def provision(self, task: Task, ctx: TaskContext, /) -> Command | None:
        """Have the device created."""
        name = task.payload.decode()
        opened = _state(ctx).openings.get(name)
        if opened is None:
            return None
        image = opened.device_certificate
        request = registry_pb2.ProvisionDeviceRequest(
            parent=product_of(image.device),
            device_id=image.common_name,
            certificate_fingerprint=image.fingerprint,
            provisioned_by=image.ca_certificate,
            cohort=opened.cohort,
            tags=opened.tags,
            target=opened.target,
            description=opened.description,
            development=opened.development,
        )
        return Command(organization_of(name), await self._provisioned(name, image, request))

    async def _provisioned(
        self, name: str, image: pki_pb2.DeviceCertificate, request: registry_pb2.ProvisionDeviceRequest
    ) -> CloseAdmission:
        try:
            device = await self.registry.provision_device(request)
        except _FINAL as error:
            return CloseAdmission(name, reason=error.reason)
        if device.name != image.device or device.certificate_fingerprint != image.fingerprint:
            # "It exists" is no answer until what exists is what was asked for.
            return CloseAdmission(name, reason="DEVICE_IDENTIFIER_TAKEN")
        if device.state == registry_pb2.Device.STATE_RETIRED:
            return CloseAdmission(name, reason="DEVICE_RETIRED")
        return CloseAdmission(name, device_uid=device.uid)

    async def undo(self, task: Task, ctx: TaskContext, /) -> Command | None:
        """Retire a device whose admission was refused after it had been created."""
        image = _state(ctx).certificates[task.payload.decode()]
        request = registry_pb2.UndoProvisioningRequest(name=image.device, certificate_fingerprint=image.fingerprint)
        try:
            await self.registry.undo_provisioning(request)
        except (NotFoundError, FailedPreconditionError):
            return None  # no such device, or it is not the one of this certificate: nothing to undo
        return None

    async def _at_key(self, fingerprint: str, payload: ReserveSpki | ConfirmSpki | ReleaseSpki) -> str:
        """Decide at the key's partition; the name of the holder."""
        if self.submit is None:
            raise RuntimeError("PkiTasks.submit is set before the runtime starts")
        command = Command(routing_key(fingerprint), payload, principal="task")
        try:
            committed = await self.submit(command, Deadline.after(_CALL_S))
        except DomainError as error:
            raise RuntimeError(f"{type(payload).__name__} is never refused") from error
        result = committed.result
        return result.ca_certificate if isinstance(result, events_pb2.SpkiReserved) else ""


def _state(ctx: TaskContext) -> State:
    state = ctx.snapshot().state
    if not isinstance(state, State):
        raise TypeError(type(state))
    return state


def _ca(ctx: TaskContext, name: str) -> pki_pb2.CaCertificate | None:
    return _state(ctx).cas.get(name)
