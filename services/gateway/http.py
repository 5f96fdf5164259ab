"""The HTTP side of the device API: routes, identity of a request, status codes.

A request's identity is the leaf of its own TLS connection, looked up at every request: a revocation or retirement that
reached the views refuses the next request on an open connection too. An unknown leaf is admitted by pki, once per
fingerprint at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple

import grpc
from aiohttp import web
from groundswell.pki.v1 import pki_pb2

from libs.errors import AbortedError, GroundswellError, NotFoundError, UnavailableError
from libs.rpc import error_of
from libs.seal import unseal
from services.gateway import body as bodies
from services.gateway.checkin import CheckInHandler
from services.gateway.directory import CertificateEntry, DeviceDirectory, DeviceEntry
from services.gateway.est import EstApi, Handler, Issue, Route
from services.gateway.identity import Peer, judge, organization_of_socket, peer_of, refuse_identity
from services.gateway.views import DeviceView, GatewayViews

log = logging.getLogger(__name__)

MOST_ADMISSIONS: Final = 64
"""Admissions under way at a time: a fleet that arrives at once must not drown pki (and its log)."""
BODY_S: Final = 10.0
"""A body that is not here by then is not waited for: slow senders must not hold connections for ever."""
LINK_LIFE_S: Final = 60

_ASK_PKI: Final = (pki_pb2.DeviceCertificate.STATE_PENDING, pki_pb2.DeviceCertificate.STATE_NEXT)
"""What only pki can settle: an admission under way, and the first use of a certificate that it issued."""

_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 403,
    "PERMISSION_DENIED": 403,
    "FAILED_PRECONDITION": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
}

Admit = Callable[[pki_pb2.AdmitCertificateRequest], Awaitable[pki_pb2.AdmitCertificateResponse]]
Presign = Callable[[str, int], Awaitable[str]]


class _ContradictionError(AbortedError):
    """What a request says is not what its connection proves."""


class DeviceApi:
    """Routes of the device listener."""

    def __init__(
        self,
        views: GatewayViews,
        handler: CheckInHandler,
        admit: Admit,
        issue: Issue,
        directory: DeviceDirectory,
        presign: Presign,
        seal_keys: Callable[[], dict[int, bytes]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._views = views
        self._handler = handler
        self._admit = admit
        self._directory = directory
        self._presign = presign
        self._seal_keys = seal_keys
        self._now = now
        self._est = EstApi(views, self._identify_request, _organization, issue, _body)
        self._admissions: dict[str, asyncio.Future[pki_pb2.DeviceCertificate]] = {}

    def application(self) -> web.Application:
        """The aiohttp application."""
        return application_of(
            [
                ("POST", "/v1/checkin", self._check_in_route),
                ("GET", "/v1/downloads/{grant}/{digest}", self._download_route),
                *self._est.routes(),
            ]
        )

    async def _check_in_route(self, request: web.Request) -> web.Response:
        peer = _peer(request)
        answer = self.check_in(peer, await _body(request))
        return web.Response(body=answer if isinstance(answer, bytes) else await answer, content_type="application/json")

    async def _download_route(self, request: web.Request) -> web.Response:
        return (await self.download(_peer(request), **request.match_info)).response()

    def check_in(self, peer: Peer, raw: bytes) -> bytes | Awaitable[bytes]:
        """POST /v1/checkin: the answer's JSON, at once for a device that is known here and has nothing to wait for."""
        view = self._known(peer)
        return self._check_in_unknown(peer, raw) if view is None else self._checked_in(view, raw)

    async def _check_in_unknown(self, peer: Peer, raw: bytes) -> bytes:
        answer = self._checked_in(await self._identify(peer), raw)
        return answer if isinstance(answer, bytes) else await answer

    def _checked_in(self, view: DeviceView, raw: bytes) -> bytes | Awaitable[bytes]:
        body = bodies.parse(raw)
        if body.device and body.device not in (view.device.name, view.device.identifier):
            log.warning("identity mismatch: certificate of %s, body names another device", view.device.name)
            raise _ContradictionError("IDENTITY_MISMATCH", "the body names another device than the certificate does")
        return self._handler.handle(view, self._views.partition(view.organization), raw, body)

    async def download(self, peer: Peer, grant: str, digest: str) -> Reply:
        """GET /v1/downloads/{grant}/{digest}: check the seal, the certificate and the plan, then redirect."""
        view = self._known(peer) or await self._identify(peer)
        sealed = unseal(self._seal_keys(), grant, int(self._now() * 1000))
        if sealed.device_uid != view.device.uid:
            raise refuse_identity("LINK_NOT_YOURS", "this link was made for another device")
        if sealed.digest != digest:
            raise NotFoundError("DIGEST_NOT_IN_OFFER", "the offer of this link holds no such digest")
        stale = self._views.stale_services(self._views.partition(view.organization))
        if stale:
            # Whether the link was withdrawn or the device refused cannot be said now.
            text = f"this gateway's view of {', '.join(stale)} is behind: try later"
            raise UnavailableError("GATEWAY_STALE", text, retry_after_s=2)
        if not self._views.plan_allows_download(sealed.rollout, sealed.control_epoch):
            raise refuse_identity("OFFER_WITHDRAWN", "the rollout withdrew this offer: check in again")
        key = self._views.blob_key(view.organization, digest)
        if key is None:
            raise NotFoundError("DIGEST_NOT_IN_OFFER", "no bundle of this organization holds that digest")
        url = await self._presign(key, LINK_LIFE_S)
        return Reply(307, b"", {"Location": url, "Cache-Control": "no-store"})

    def _known(self, peer: Peer, *, renewing: bool = False) -> DeviceView | None:
        """The device of a connection; None when that cannot be said from what is cached. Raises a refusal."""
        certificate = self._directory.certificates.get(peer.key)
        if certificate is None or certificate.state in _ASK_PKI:
            return None
        device = self._directory.devices.get(certificate.device)
        return None if device is None else self._judged(peer, certificate, device, renewing=renewing)

    async def _identify(self, peer: Peer, *, renewing: bool = False) -> DeviceView:
        """The same, asking Redis, the owners and pki for what is not cached."""
        certificate = self._directory.certificates.get(peer.key)
        if certificate is None:
            partition = self._views.partition(peer.organization)
            certificate = await self._directory.certificates.fetch(partition, peer.key)
        if certificate is None or certificate.state in _ASK_PKI:
            certificate = CertificateEntry.of(await self._admitted(peer))
        device = self._directory.devices.get(certificate.device)
        if device is None:
            device = await self._device(peer.organization, certificate.device)
        return self._judged(peer, certificate, device, renewing=renewing)

    def _judged(
        self, peer: Peer, certificate: CertificateEntry, device: DeviceEntry | None, *, renewing: bool
    ) -> DeviceView:
        if device is not None and device.facts.retired:
            # Its certificates are revoked with it: what happened to the device is the better answer.
            raise refuse_identity("DEVICE_RETIRED", "this device was decommissioned")
        policy = self._views.policy(certificate.product)
        state = self._views.ca_state(peer.organization, certificate.ca)
        judge(certificate, state, policy, self._now(), renewing=renewing)
        if device is None:
            raise UnavailableError("ADMISSION_PENDING", "the device is being created: try again", retry_after_s=1)
        return DeviceView(peer.organization, device, certificate)

    async def _identify_request(self, request: web.Request, *, renewing: bool = False) -> DeviceView:
        return await self._identify(_peer(request), renewing=renewing)

    async def _device(self, organization: str, name: str) -> DeviceEntry | None:
        """A device that is not cached. Its name comes from pki, its record from the registry, which may come later."""
        if not name.startswith(f"organizations/{organization}/") or self._views.is_parked(name):
            return None
        return await self._directory.devices.fetch(self._views.partition(organization), name)

    async def _admitted(self, peer: Peer) -> pki_pb2.DeviceCertificate:
        """Ask pki once per fingerprint at a time; everyone who waits shares the answer."""
        running = self._admissions.get(peer.fingerprint)
        if running is None:
            if len(self._admissions) >= MOST_ADMISSIONS:
                raise UnavailableError("ADMISSION_BUSY", "many devices are being admitted: try later", retry_after_s=3)
            running = asyncio.ensure_future(self._ask_admission(peer.organization, peer.der))
            self._admissions[peer.fingerprint] = running
            running.add_done_callback(lambda _: self._admissions.pop(peer.fingerprint, None))
        try:
            return await asyncio.shield(running)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from None

    async def _ask_admission(self, organization: str, der: bytes) -> pki_pb2.DeviceCertificate:
        request = pki_pb2.AdmitCertificateRequest(organization=organization, leaf_der=der)
        return (await self._admit(request)).device_certificate


def _ssl_object(request: web.Request) -> ssl.SSLObject | None:
    transport = request.transport
    found: ssl.SSLObject | None = transport.get_extra_info("ssl_object") if transport else None
    return found


def _peer(request: web.Request) -> Peer:
    return peer_of(_ssl_object(request))


def _organization(request: web.Request) -> str:
    ssl_object = _ssl_object(request)
    return organization_of_socket(ssl_object) if ssl_object else ""


async def _body(request: web.Request) -> bytes:
    """The body, in time. It mostly came with the head, and then there is nothing to wait for."""
    if request.content.is_eof():
        return await request.read()
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None


class Reply(NamedTuple):
    """What is answered, whoever writes it."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    closing: bool = False
    """Nothing more can be read from this connection."""

    def response(self) -> web.Response:
        """For aiohttp."""
        found = web.Response(status=self.status, body=self.body, headers=self.headers)
        if self.closing:
            found.force_close()
        return found


def error_reply(status: int, reason: str, message: str, retry_after_s: float | None = None) -> Reply:
    """The error document of the device API."""
    headers = {"Content-Type": "application/json"}
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(retry_after_s)))
    return Reply(status, json.dumps({"error": {"reason": reason, "message": message}}).encode(), headers)


def reply_of(error: Exception, what: str) -> Reply:
    """The one place where an error becomes a status."""
    match error:
        case UnavailableError():
            return error_reply(503, error.reason, error.message, error.retry_after_s)
        case GroundswellError():
            status = _STATUS.get(error.status, 500)
            wait_s = float(error.metadata.get("retry_after_s", 5)) if status == 429 else None
            return error_reply(status, error.reason, error.message, wait_s)
        case web.HTTPRequestEntityTooLarge():
            return error_reply(413, "BODY_TOO_LARGE", f"a body holds at most {bodies.MAX_BODY} bytes")
        case web.HTTPRequestTimeout():
            return error_reply(408, "BODY_TIMEOUT", f"the body was not here within {BODY_S:g} s")._replace(closing=True)
        case web.HTTPException():
            reason = {404: "NO_SUCH_ROUTE", 405: "METHOD_NOT_ALLOWED"}.get(error.status, "HTTP_ERROR")
            return error_reply(error.status, reason, error.reason)
    log.error("unexpected error in %s", what, exc_info=error)
    return error_reply(503, "INTERNAL", "unexpected error, logged: try later", 5)


async def _no_route(request: web.Request) -> web.StreamResponse:
    """What no other route takes: another method of a path that there is, or a path that there is not."""
    resources = request.app.router.resources()
    allowed = [method for one in list(resources)[:-1] for method in (await one.resolve(request))[1]]
    raise web.HTTPMethodNotAllowed(request.method, allowed) if allowed else web.HTTPNotFound


def application_of(routes: Sequence[Route]) -> web.Application:
    """The aiohttp application of these routes; whatever fails on any path is answered as one error document."""
    app = web.Application(client_max_size=bodies.MAX_BODY)
    for method, path, handler in (*routes, ("*", "/{path:.*}", _no_route)):
        app.router.add_route(method, path, answered(handler))
        if method == "GET":
            app.router.add_route("HEAD", path, answered(handler))
    return app


def answered(handler: Handler) -> Handler:
    """Whatever a handler raises, as an answer. Around each of them: a middleware would cost every request."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - it is looked at there
            return reply_of(error, f"{request.method} {request.path}").response()

    return answer
