"""Enrolment over Secure Transport (RFC 7030, RFC 8951) on the device listener.

Operations: ``cacerts``, ``simpleenroll``, ``simplereenroll``, with or without a label: the id of the device's product.
Requests are base64 PKCS#10, answers base64 certs-only PKCS#7. Who asks is the certificate of the connection and nothing
else; what is asked for is judged by pki. A certificate beyond its validity may come here and nowhere else, when the
product's policy says so (GRACE). There is no ``serverkeygen``: keys stay on devices.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import grpc
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from groundswell.pki.v1 import pki_pb2

from libs.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from libs.names import last_segment, product_of
from libs.rpc import error_of
from services.gateway.views import DeviceView, GatewayViews

PREFIX: Final = "/.well-known/est"
CERTIFICATES: Final = "application/pkcs7-mime; smime-type=certs-only"
REQUEST: Final = "application/pkcs10"
_SPACE: Final = re.compile(rb"\s+")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Route = tuple[str, str, Handler]
"""Method, path and handler."""
Issue = Callable[[pki_pb2.IssueCertificateRequest], Awaitable[pki_pb2.IssueCertificateResponse]]


class Identify(Protocol):
    """Who is at the other end; ``renewing`` lets an expired certificate in where its product does."""

    async def __call__(self, request: web.Request, *, renewing: bool = False) -> DeviceView: ...


class EstApi:
    """The EST routes of the device listener."""

    def __init__(
        self,
        views: GatewayViews,
        identify: Identify,
        organization_of: Callable[[web.Request], str],
        issue: Issue,
        body_of: Callable[[web.Request], Awaitable[bytes]],
    ) -> None:
        self._views = views
        self._identify = identify
        self._organization_of = organization_of
        self._issue = issue
        self._body_of = body_of

    def routes(self) -> list[Route]:
        """Each call, with and without a label."""
        return [
            (method, f"{prefix}/{name}", handler)
            for prefix in (PREFIX, f"{PREFIX}/{{label}}")
            for method, name, handler in (
                ("GET", "cacerts", self.ca_certificates),
                ("POST", "simpleenroll", self.enroll),
                ("POST", "simplereenroll", self.reenroll),
            )
        ]

    async def ca_certificates(self, request: web.Request) -> web.Response:
        """GET cacerts: what this server signs with, the replaced ones too. Public facts: the handshake is enough."""
        ders = self._views.issuing_cas(self._organization_of(request))
        if not ders:
            raise FailedPreconditionError("ISSUING_CA_MISSING", "this organization has no issuing CA")
        return _certificates(ders)

    async def enroll(self, request: web.Request) -> web.Response:
        """POST simpleenroll: a first operational certificate for a factory certificate."""
        return await self._issued(request, first=True)

    async def reenroll(self, request: web.Request) -> web.Response:
        """POST simplereenroll: the next certificate for the one in force."""
        return await self._issued(request, first=False)

    async def _issued(self, request: web.Request, *, first: bool) -> web.Response:
        view = await self._identify(request, renewing=not first)
        label = request.match_info.get("label")
        if label is not None and label != last_segment(product_of(view.device.name)):
            raise NotFoundError("EST_LABEL_UNKNOWN", "the label is the id of the device's own product", label=label)
        if request.content_type != REQUEST:
            raise web.HTTPUnsupportedMediaType(reason=f"send {REQUEST}")
        asked = pki_pb2.IssueCertificateRequest(
            organization=view.organization,
            fingerprint=view.fingerprint,
            csr_der=decode(await self._body_of(request)),
            first=first,
        )
        try:
            answer = await self._issue(asked)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from None
        return _certificates((answer.device_certificate.der,))


def decode(body: bytes) -> bytes:
    """The request of a body: base64, with line ends or without, whatever its transfer encoding claims (RFC 8951)."""
    try:
        der = base64.b64decode(_SPACE.sub(b"", body), validate=True)
    except (binascii.Error, ValueError):
        der = b""
    if not der:
        raise InvalidArgumentError("CSR_MALFORMED", "the body is not a base64 PKCS#10 request")
    return der


def _certificates(ders: tuple[bytes, ...]) -> web.Response:
    found = [x509.load_der_x509_certificate(der) for der in ders]
    body = base64.encodebytes(pkcs7.serialize_certificates(found, Encoding.DER))
    headers = {"Content-Type": CERTIFICATES, "Content-Transfer-Encoding": "base64", "Cache-Control": "no-store"}
    return web.Response(body=body, headers=headers)
