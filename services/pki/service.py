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
from libs.names import last_segment, organization_of, product_of
from libs.rpc import page, parse_filter, report_position, snapshot_state, submit
from services.pki import admission, agenda, requests, rotation
from services.pki.authorities import CodeOf, cohorts_of, not_found
from services.pki.domain import with_count
from services.pki.issuer import Issuer
from services.pki.model import (
    AdmitCertificate,
    Ca,
    CreateIssuingCa,
    CreateVerificationCode,
    IssueCertificate,
    Leaf,
    RegisterCa,
    RevokeDeviceCertificate,
    SetCaState,
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
        issuer: Issuer,
        now_ms: Callable[[], int] = _wall_clock_ms,
    ) -> None:
        self._runtime = runtime
        self._registry = registry
        self._code_of = code_of
        self._issuer = issuer
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

    async def SuspendCaCertificate(self, request: Any, context: Any) -> pki_pb2.CaCertificate:
        return await self._set_state(request, Ca.STATE_SUSPENDED, context, request.reason)

    async def ResumeCaCertificate(self, request: Any, context: Any) -> pki_pb2.CaCertificate:
        return await self._set_state(request, Ca.STATE_ACTIVE, context)

    async def RevokeCaCertificate(self, request: Any, context: Any) -> pki_pb2.CaCertificate:
        return await self._set_state(request, Ca.STATE_REVOKED, context, request.reason)

    async def _set_state(
        self, request: Any, wanted: Ca.State.ValueType, context: Any, reason: str = ""
    ) -> pki_pb2.CaCertificate:
        command = SetCaState(request.name, wanted, request.etag, reason)
        answer: pki_pb2.CaCertificate = await submit(
            self._runtime, organization_of(request.name), command, request, context
        )
        return answer

    async def CreateIssuingCa(self, request: Any, context: Any) -> pki_pb2.IssuingCa:
        name = f"{request.parent}/issuingCas/{request.issuing_ca_id}"
        return await self._make_issuing_ca(name, "", "", request, context)

    async def RotateIssuingCa(self, request: Any, context: Any) -> pki_pb2.IssuingCa:
        name = f"organizations/{organization_of(request.name)}/issuingCas/{request.successor_id}"
        return await self._make_issuing_ca(name, request.name, request.etag, request, context)

    async def _make_issuing_ca(
        self, name: str, replaces: str, etag: str, request: Any, context: Any
    ) -> pki_pb2.IssuingCa:
        """The certificate is made before the command, so a command that is repeated brings one that is not used."""
        state = snapshot_state(self._runtime, name)
        if name not in state.issuing:
            # What is refused makes no key. A name that exists has one, and the log may know the answer of a repeat.
            rotation.check_new_issuing_ca(state, name, replaces, etag)
        der = self._issuer.make_ca(name, request.validity_days, self._now_ms())
        command = CreateIssuingCa(name, der, replaces, etag)
        answer: pki_pb2.IssuingCa = await submit(self._runtime, organization_of(name), command, request, context)
        return answer

    async def GetIssuingCa(self, request: Any, context: Any) -> pki_pb2.IssuingCa:
        del context
        issuing = snapshot_state(self._runtime, request.name).issuing.get(request.name)
        if issuing is None:
            raise not_found(request.name)
        return issuing

    async def ListIssuingCas(self, request: Any, context: Any) -> pki_pb2.ListIssuingCasResponse:
        del context
        prefix = f"{request.parent}/issuingCas/"
        state = snapshot_state(self._runtime, request.parent)
        items, token = page(((name, one) for name, one in state.issuing.items() if name.startswith(prefix)), request)
        return pki_pb2.ListIssuingCasResponse(issuing_cas=items, next_page_token=token)

    async def GetDeviceCertificate(self, request: Any, context: Any) -> pki_pb2.DeviceCertificate:
        del context
        return _device_certificate(self._runtime, request.name)

    async def ListDeviceCertificates(self, request: Any, context: Any) -> pki_pb2.ListDeviceCertificatesResponse:
        del context
        state = snapshot_state(self._runtime, request.parent)
        prefix = f"{request.parent}/deviceCertificates/"
        # Those of one device are few, and known without looking at all of the partition's.
        device = next(
            (value for path, sign, value in parse_filter(request.filter) if (path, sign) == ("device", "=")), ""
        )
        names = state.history.get(device, ()) if device else state.certificates
        found = ((name, state.certificates[name]) for name in names if name.startswith(prefix))
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

    def __init__(self, runtime: Runtime[State], issuer: Issuer, now_ms: Callable[[], int] = _wall_clock_ms) -> None:
        self._runtime = runtime
        self._issuer = issuer
        self._now_ms = now_ms

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

    async def IssueCertificate(self, request: Any, context: Any) -> pki_pb2.IssueCertificateResponse:
        """Signed before the command: a decision has no randomness. One that is not recorded never leaves this call."""
        name = f"organizations/{request.organization}/deviceCertificates/{request.fingerprint}"
        state = snapshot_state(self._runtime, name)
        current = rotation.current_of(state, name)
        if request.first and current.issuing_ca:
            raise FailedPreconditionError(
                "ALREADY_ENROLLED", "this device has an operational certificate: use simplereenroll", resource=name
            )
        digest = requests.digest_of(request.csr_der)
        issued = rotation.answered(state, current.device, digest)
        if issued is None:
            der, issuing = self._sign(state, current, request.csr_der)
            command = IssueCertificate(name, digest, der, issuing)
            issued = await submit(self._runtime, request.organization, command, request, context)
            state = snapshot_state(self._runtime, name)
        return pki_pb2.IssueCertificateResponse(
            device_certificate=issued, issuing_ca_der=state.issuing[issued.issuing_ca].der
        )

    def _sign(self, state: State, current: pki_pb2.DeviceCertificate, csr_der: bytes) -> tuple[bytes, str]:
        """(certificate, its issuing CA) for a request that passes every check."""
        csr = requests.parse(csr_der)
        organization, product = organization_of(current.name), last_segment(product_of(current.device))
        uri = requests.device_uri(self._issuer.deployment, organization, product, current.common_name)
        requests.check(csr, current.common_name, uri)
        now_ms = self._now_ms()
        rotation.check_issuance(state, current, requests.spki_fingerprint_of(csr), now_ms)
        issuing = rotation.signing_ca(state, organization)
        validity = agenda.validity_ms(agenda.policy_of(state, current.device))
        return self._issuer.sign(issuing, csr, current.common_name, uri, now_ms, validity), issuing.name

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
