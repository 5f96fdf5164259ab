"""Who is at the other end of a device connection.

Rules (protocols.md section 3, docs/device-api.md):

* The listener chooses the organization by SNI, ``<organization>.<gateway-domain>``; only that organization's active CAs
  are anchors of the handshake. An unknown name ends it with ``unrecognized_name``.
* A device is known by the SHA-256 of its leaf, never by anything it says about itself.
* Expired leaves pass the handshake (``X509_V_FLAG_NO_CHECK_TIME``) and are judged here, so that the device is told why;
  what they may still do is the product's policy: renew only (GRACE, the default), nothing (STRICT), all (LENIENT).
* A leaf of an unknown CA dies in the handshake; it is counted and logged with OpenSSL's verify code, and nothing
  more goes on the wire.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import registry_pb2

from libs.errors import PermissionDeniedError
from services.gateway.directory import CertificateEntry, certificate_key

log = logging.getLogger(__name__)

NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which the ssl module does not name."""

_LOG_INTERVAL_S: Final = 5.0
"""At most one log line per verify code in this time: a flood of strangers must not fill the disk."""


class HandshakeFailures:
    """Counts handshakes that died, by OpenSSL verify code; logs a sample of each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[int] = Counter()
        self._clock = clock
        self._last_logged: dict[int, float] = {}

    def record(self, organization: str, verify_code: int, message: str) -> None:
        """Count one failed verification."""
        self.counts[verify_code] += 1
        now = self._clock()
        if now - self._last_logged.get(verify_code, -_LOG_INTERVAL_S) >= _LOG_INTERVAL_S:
            self._last_logged[verify_code] = now
            log.warning(
                "handshake refused: organization=%s verify_code=%d count=%d %s",
                organization or "-",
                verify_code,
                self.counts[verify_code],
                message,
            )


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection, for as long as that lasts."""

    organization: str
    fingerprint: str
    key: str
    """Of its certificate in the directory."""
    der: bytes


class _OrganizationContext(ssl.SSLContext):
    """A server context that remembers whose devices it admits."""

    organization: str = ""


class DeviceTls:
    """Builds the listener's context and keeps one context per organization in step with its CAs."""

    def __init__(self, certificate: str, key: str, domain: str, failures: HandshakeFailures) -> None:
        self._certificate = certificate
        self._key = key
        self._suffix = f".{domain}"
        self._failures = failures
        self._contexts: dict[str, _OrganizationContext] = {}
        self._anchors: dict[str, tuple[bytes, ...]] = {}
        self.context: Final = self._make("", ())
        self.context.sni_callback = self._choose

    def set_anchors(self, organization: str, ders: tuple[bytes, ...]) -> None:
        """Use exactly these CA certificates for new handshakes of the organization."""
        if self._anchors.get(organization) == ders:
            return
        self._anchors[organization] = ders
        self._contexts[organization] = self._make(organization, ders)

    def renew(self) -> None:
        """Show the certificate that the files hold now to whoever connects from now on."""
        # A pair that does not fit would spoil the contexts in use, so it is tried on another first.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key)
        for context in (self.context, *self._contexts.values()):
            context.load_cert_chain(self._certificate, self._key)

    def _make(self, organization: str, ders: tuple[bytes, ...]) -> _OrganizationContext:
        context = _OrganizationContext(ssl.PROTOCOL_TLS_SERVER)
        context.organization = organization
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._certificate, self._key)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags = ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME)
        if ders:
            context.load_verify_locations(cadata=b"".join(ders))
        context.sslobject_class = self._counting_class()
        return context

    def _counting_class(self) -> type[ssl.SSLObject]:
        failures = self._failures

        class CountingSSLObject(ssl.SSLObject):
            def do_handshake(self) -> None:
                try:
                    super().do_handshake()
                except ssl.SSLCertVerificationError as error:
                    failures.record(organization_of_socket(self), error.verify_code, error.verify_message)
                    raise

        return CountingSSLObject

    def _choose(self, ssl_object: ssl.SSLObject, server_name: str | None, _: ssl.SSLContext) -> int | None:
        name = (server_name or "").lower()
        organization = name.removesuffix(self._suffix) if name.endswith(self._suffix) else ""
        context = self._contexts.get(organization)
        if context is None:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        ssl_object.context = context
        return None


def peer_of(ssl_object: ssl.SSLObject | None) -> Peer:
    """Who is at the other end; read once for each connection, because a leaf cannot change within one."""
    known: Peer | None = getattr(ssl_object, "peer", None)
    if known is not None:
        return known
    der = ssl_object.getpeercert(binary_form=True) if ssl_object is not None else None
    if ssl_object is None or der is None:
        raise refuse_identity("CERTIFICATE_MISSING", "present a device certificate")
    organization = organization_of_socket(ssl_object)
    fingerprint = fingerprint_of(der)
    peer = Peer(organization, fingerprint, certificate_key(organization, fingerprint), der)
    with contextlib.suppress(AttributeError):  # only our own class of the listener takes it
        ssl_object.peer = peer  # type: ignore[attr-defined]
    return peer


def organization_of_socket(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> str:
    """Organization chosen by SNI for this connection."""
    return getattr(ssl_object.context, "organization", "")


def fingerprint_of(der: bytes) -> str:
    """Lowercase hex SHA-256 of a certificate."""
    return hashlib.sha256(der).hexdigest()


def refuse_identity(reason: str, message: str, **metadata: object) -> PermissionDeniedError:
    """The device is known well enough to be told why it is refused."""
    return PermissionDeniedError(reason, message, **metadata)


_Leaf = pki_pb2.DeviceCertificate
_Ca = pki_pb2.CaCertificate
_Policy = registry_pb2.CertificatePolicy
_ENDED: Final = {
    _Leaf.STATE_REVOKED: ("CERTIFICATE_REVOKED", "this certificate was revoked for good"),
    _Leaf.STATE_RETIRED: ("CERTIFICATE_SUPERSEDED", "this device has confirmed a newer certificate"),
    _Leaf.STATE_LAPSED: ("CERTIFICATE_LAPSED", "this certificate was not used in its time, or replaced by another"),
}
_CA_ENDED: Final = {
    _Ca.STATE_SUSPENDED: ("CA_SUSPENDED", "the CA of this certificate is suspended"),
    _Ca.STATE_REVOKED: ("CA_REVOKED", "the CA of this certificate was revoked for good"),
}


def judge(
    certificate: CertificateEntry,
    ca_state: _Ca.State.ValueType,
    policy: registry_pb2.ConfigurationPolicy,
    now: float,
    *,
    renewing: bool = False,
) -> None:
    """Raise unless a known certificate may do this now. Asked at every request: connections outlive decisions."""
    if certificate.state == _Leaf.STATE_REFUSED:
        raise refuse_identity(
            certificate.certificate.reason or "CERTIFICATE_REFUSED", "this certificate is refused for good"
        )
    # A revocation's reason is an operator's sentence, for the audit: never a code.
    ended = _ENDED.get(certificate.state) or _CA_ENDED.get(ca_state)
    if ended is not None:
        raise refuse_identity(*ended)
    if certificate.not_before > now:
        raise refuse_identity("CERTIFICATE_NOT_YET_VALID", "this certificate is not valid yet")
    if certificate.not_after <= now:
        expired_leaf = policy.certificate_policy.expired_leaf
        lenient = expired_leaf == _Policy.EXPIRED_LEAF_LENIENT
        strict = expired_leaf == _Policy.EXPIRED_LEAF_STRICT
        if not lenient and (strict or not renewing):
            may = "it is refused" if strict else "it may only renew itself, by EST simplereenroll"
            raise refuse_identity("CERTIFICATE_EXPIRED", f"this certificate has expired: {may}")
