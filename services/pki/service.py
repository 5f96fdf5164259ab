"""The gRPC servicers of pki: request, command, answer.

Two calls answer later than their command: a registration when its key is reserved or taken, an admission when its
device exists or is refused. They wait on the committed state, so the task that brings the end about may run anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from groundswell.pki.v1 import pki_pb2, pki_pb2_grpc

from libs.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from libs.eventlog import Deadline, Runtime
from libs.names import organization_of
from libs.rpc import page, report_position, snapshot_state, submit
from services.pki import admission
from services.pki.authorities import CodeOf, cohorts_of, not_found
from services.pki.domain import with_count
from services.pki.model import (
    AdmitCertificate,
    Ca,
    CreateVerificationCode,
    Leaf,
    RegisterCa,
    RevokeDeviceCertificate,
    State,
    UpdateCa,
    timestamp,
)
from services.pki.ports import RegistryPort

FRESHNESS_MS: Final = 2_000
"""A gateway whose view is older than this answers no device."""
ANSWER_DEADLINE_MS: Final = 10_000
"""No answer of a gateway takes longer than this."""
_MARGIN_S: Final = 0.25
"""Kept of a call's deadline, so that the caller gets our reason and not its own time-out."""
_DEFAULT_WAIT_S: Final = 10.0


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


def _deadline(context: Any) -> Deadline:
    remaining = context.time_remaining() if context is not None else None
    return Deadline.after(max(0.0, min(remaining or _DEFAULT_WAIT_S, 60.0) - _MARGIN_S))


class PkiServicer(pki_pb2_grpc.PkiServiceServicer):
    """The public API."""

    def __init__(
        self,
        runtime: Runtime[State],
        registry: RegistryPort,
        code_of: CodeOf,
        now_ms: Callable[[], int] = _wall_clock_ms,
    ) -> None:
        self._runtime = runtime
        self._registry = registry
        self._code_of = code_of
        self._now_ms = now_ms

    async def CreateVerificationCode(self, request: Any, context: Any) -> pki_pb2.VerificationCode:
        name = f"{request.parent}/verificationCodes/{request.verification_code_id}"
        issued = await submit(self._runtime, organization_of(name), CreateVerificationCode(name), request, context)
        answer = pki_pb2.VerificationCode()
        answer.CopyFrom(issued)
        answer.code = self._code_of(name)  # after the log: no log ever holds it
        return answer

    async def RegisterCaCertificate(self, request: Any, context: Any) -> pki_pb2.CaCertificate:
        deadline = _deadline(context)
        name = f"{request.parent}/caCertificates/{request.ca_certificate_id}"
        product = await self._registry.lookup_product(request.parent)
        if product.archived:
            raise FailedPreconditionError(
                "PRODUCT_ARCHIVED", f"{product.name} is archived: it takes no CA", resource=product.name
            )
        await self._check_cohorts(request.ca_certificate.jitp)
        command = RegisterCa(
            name=name,
            certificate_pem=request.certificate_pem,
            proof_pem=request.verification_certificate_pem,
            environment=request.ca_certificate.environment,
            jitp=request.ca_certificate.jitp,
        )
        await submit(self._runtime, organization_of(name), command, request, context)
        return await self._registered(name, deadline)

    async def _registered(self, name: str, deadline: Deadline) -> pki_pb2.CaCertificate:
        """Wait until the registration leaves PENDING."""
        while True:
            snapshot = self._runtime.snapshot(organization_of(name))
            state: Any = snapshot.state
            ca = state.cas[name]
            if ca.state == Ca.STATE_ABANDONED:
                raise FailedPreconditionError(
                    "CA_KEY_TAKEN", "the key of this CA is registered by another organization", resource=name
                )
            if ca.state != Ca.STATE_PENDING:
                report_position(snapshot.token)
                return with_count(state, ca)
            if deadline.expired:
                raise UnavailableError(
                    "REGISTRATION_PENDING", f"{name} is still being registered: repeat the request", resource=name
                )
            await _next_change(self._runtime, name, deadline)

    async def GetCaCertificate(self, request: Any, context: Any) -> pki_pb2.CaCertificate:
        del context
        state = snapshot_state(self._runtime, request.name)
        ca = state.cas.get(request.name)
        if ca is None:
            raise not_found(request.name)
        return with_count(state, ca)

    async def ListCaCertificates(self, request: Any, context: Any) -> pki_pb2.ListCaCertificatesResponse:
        del context
        state = snapshot_state(self._runtime, request.parent)
        prefix = f"{request.parent}/caCertificates/"
        found = ((name, with_count(state, ca)) for name, ca in state.cas.items() if name.startswith(prefix))
        items, token = page(found, request)
        return pki_pb2.ListCaCertificatesResponse(ca_certificates=items, next_page_token=token)

    async def UpdateCaCertificate(self, request: Any, context: Any) -> pki_pb2.CaCertificate:
        paths = tuple(request.update_mask.paths)
        if not paths:
            raise InvalidArgumentError("INVALID_FIELD", "update_mask names no field", field="update_mask")
        if any(path.partition(".")[0] == "jitp" for path in paths):
            await self._check_cohorts(request.ca_certificate.jitp)
        name = request.ca_certificate.name
        command = UpdateCa(request.ca_certificate, paths)
        answer: pki_pb2.CaCertificate = await submit(self._runtime, organization_of(name), command, request, context)
        return answer

    async def GetDeviceCertificate(self, request: Any, context: Any) -> pki_pb2.DeviceCertificate:
        del context
        return _device_certificate(self._runtime, request.name)

    async def ListDeviceCertificates(self, request: Any, context: Any) -> pki_pb2.ListDeviceCertificatesResponse:
        del context
        state = snapshot_state(self._runtime, request.parent)
        prefix = f"{request.parent}/deviceCertificates/"
        found = ((name, leaf) for name, leaf in state.certificates.items() if name.startswith(prefix))
        items, token = page(found, request)
        return pki_pb2.ListDeviceCertificatesResponse(device_certificates=items, next_page_token=token)

    async def RevokeDeviceCertificate(self, request: Any, context: Any) -> pki_pb2.RevokeDeviceCertificateResponse:
        command = RevokeDeviceCertificate(request.name, request.etag, request.reason)
        revoked = await submit(self._runtime, organization_of(request.name), command, request, context)
        # Counted from after the commit, which is later than the decision: a bound that a repeat only makes safer.
        effective_by = timestamp(self._now_ms() + FRESHNESS_MS + ANSWER_DEADLINE_MS)
        return pki_pb2.RevokeDeviceCertificateResponse(device_certificate=revoked, effective_by=effective_by)

    async def _check_cohorts(self, jitp: pki_pb2.JitpSettings) -> None:
        for path, cohort in cohorts_of(jitp):
            try:
                await self._registry.lookup_cohort(cohort)
            except NotFoundError:
                raise InvalidArgumentError(
                    "COHORT_NOT_FOUND", f"{cohort} does not exist", field=f"ca_certificate.jitp.{path}", resource=cohort
                ) from None


class PkiInternalServicer(pki_pb2_grpc.PkiInternalServiceServicer):
    """What the gateway asks."""

    def __init__(self, runtime: Runtime[State]) -> None:
        self._runtime = runtime

    async def AdmitCertificate(self, request: Any, context: Any) -> pki_pb2.AdmitCertificateResponse:
        deadline = _deadline(context)
        name = admission.certificate_name(request.organization, request.leaf_der)
        known = snapshot_state(self._runtime, name).certificates.get(name)
        if known is None or known.state not in {Leaf.STATE_ACTIVE, Leaf.STATE_REVOKED}:
            command = AdmitCertificate(request.organization, request.leaf_der)
            await submit(self._runtime, request.organization, command, request, context)
        return pki_pb2.AdmitCertificateResponse(device_certificate=await self._admitted(name, deadline))

    async def _admitted(self, name: str, deadline: Deadline) -> pki_pb2.DeviceCertificate:
        """Wait until the admission leaves PENDING."""
        while True:
            leaf = snapshot_state(self._runtime, name).certificates[name]
            problem = admission.known_problem(leaf)
            if problem is not None:
                raise problem
            if leaf.state == Leaf.STATE_REFUSED:
                raise admission.refusal(leaf)
            if leaf.state == Leaf.STATE_ACTIVE:
                return leaf
            if deadline.expired:
                raise UnavailableError(
                    "ADMISSION_PENDING", "the device is still being created: try again", retry_after_s=1.0
                )
            await _next_change(self._runtime, name, deadline)

    async def LookupDeviceCertificate(self, request: Any, context: Any) -> pki_pb2.DeviceCertificate:
        del context
        return _device_certificate(self._runtime, request.name)


def _device_certificate(runtime: Runtime[State], name: str) -> pki_pb2.DeviceCertificate:
    leaf = snapshot_state(runtime, name).certificates.get(name)
    if leaf is None:
        raise not_found(name)
    return leaf


async def _next_change(runtime: Runtime[State], name: str, deadline: Deadline) -> None:
    """Return at the next change of the view, or at the deadline."""
    try:
        await runtime.changed(organization_of(name), deadline)
    except UnavailableError:
        if not deadline.expired:
            raise
