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
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from aiohttp import web
from groundswell.pki.v1 import pki_pb2

from libs.errors import GroundswellError, UnavailableError
from libs.rpc import error_of
from libs.seal import unseal
from services.gateway import body as bodies
from services.gateway.checkin import CheckInHandler
from services.gateway.est import EstApi, Issue
from services.gateway.identity import fingerprint_of, judge, organization_of_socket, refuse_identity
from services.gateway.views import DeviceView, GatewayViews

log = logging.getLogger(__name__)

ADMISSION_DEADLINE_S: Final = 8.0
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


class DeviceApi:
    """Routes of the device listener."""

    def __init__(
        self,
        views: GatewayViews,
        handler: CheckInHandler,
        admit: Admit,
        issue: Issue,
        presign: Presign,
        seal_keys: Callable[[], dict[int, bytes]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._views = views
        self._handler = handler
        self._admit = admit
        self._presign = presign
        self._seal_keys = seal_keys
        self._now = now
        self._est = EstApi(views, self._identify, _organization, issue)
        self._admissions: dict[str, asyncio.Future[pki_pb2.DeviceCertificate]] = {}

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=bodies.MAX_BODY, middlewares=[_errors])
        app.router.add_post("/v1/checkin", self.check_in)
        app.router.add_get("/v1/downloads/{grant}/{digest}", self.download)
        self._est.add_to(app)
        return app

    async def check_in(self, request: web.Request) -> web.Response:
        """POST /v1/checkin."""
        view = await self._identify(request)
        raw = await request.read()
        body = bodies.parse(raw)
        if body.device and body.device not in (view.device.name, view.device.identifier):
            log.warning("identity mismatch: certificate of %s, body names another device", view.device.name)
            return _error(409, "IDENTITY_MISMATCH", "the body names another device than the certificate does")
        answer = await self._handler.handle(view.organization, view, raw, body)
        return web.json_response(answer)

    async def download(self, request: web.Request) -> web.Response:
        """GET /v1/downloads/{grant}/{digest}: check the seal, the certificate and the plan, then redirect."""
        view = await self._identify(request)
        grant = unseal(self._seal_keys(), request.match_info["grant"], int(self._now() * 1000))
        digest = request.match_info["digest"]
        if grant.device_uid != view.device.uid:
            raise refuse_identity("LINK_NOT_YOURS", "this link was made for another device")
        if grant.digest != digest:
            return _error(404, "DIGEST_NOT_IN_OFFER", "the offer of this link holds no such digest")
        if not self._views.plan_allows_download(grant.rollout, grant.control_epoch):
            raise refuse_identity("OFFER_WITHDRAWN", "the rollout withdrew this offer: check in again")
        key = self._views.blob_key(view.organization, digest)
        if key is None:
            return _error(404, "DIGEST_NOT_IN_OFFER", "no bundle of this organization holds that digest")
        url = await self._presign(key, LINK_LIFE_S)
        return web.Response(status=307, headers={"Location": url, "Cache-Control": "no-store"})

    async def _identify(self, request: web.Request, *, renewing: bool = False) -> DeviceView:
        ssl_object = _ssl_object(request)
        der = ssl_object.getpeercert(binary_form=True) if ssl_object else None
        if ssl_object is None or der is None:
            raise refuse_identity("CERTIFICATE_MISSING", "present a device certificate")
        organization = organization_of_socket(ssl_object)
        fingerprint = fingerprint_of(der)
        certificate = self._views.certificate(organization, fingerprint)
        if certificate is None or certificate.state in _ASK_PKI:
            certificate = await self._admitted(organization, fingerprint, der)
        view = self._views.device(organization, certificate.device, fingerprint)
        if view is not None and view.retired:
            raise refuse_identity("DEVICE_RETIRED", "this device was decommissioned")
        policy = self._views.policy(certificate.device).certificate_policy
        judge(certificate, self._views.ca_state(certificate), policy, self._now(), renewing=renewing)
        if view is None:
            raise UnavailableError("ADMISSION_PENDING", "the device is being created: try again", retry_after_s=1)
        return view

    async def _admitted(self, organization: str, fingerprint: str, der: bytes) -> pki_pb2.DeviceCertificate:
        """Ask pki once per fingerprint at a time; everyone who waits shares the answer."""
        running = self._admissions.get(fingerprint)
        if running is None:
            running = asyncio.ensure_future(self._ask_admission(organization, der))
            self._admissions[fingerprint] = running
            running.add_done_callback(lambda _: self._admissions.pop(fingerprint, None))
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


def _organization(request: web.Request) -> str:
    ssl_object = _ssl_object(request)
    return organization_of_socket(ssl_object) if ssl_object else ""


def _error(status: int, reason: str, message: str, retry_after_s: float | None = None) -> web.Response:
    headers = {"Retry-After": str(max(1, round(retry_after_s)))} if retry_after_s is not None else {}
    payload: dict[str, Any] = {"error": {"reason": reason, "message": message}}
    return web.Response(status=status, text=json.dumps(payload), content_type="application/json", headers=headers)


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """The one place where an error becomes a status."""
    try:
        return await handler(request)
    except UnavailableError as error:
        return _error(503, error.reason, error.message, error.retry_after_s)
    except GroundswellError as error:
        status = _STATUS.get(error.status, 500)
        wait_s = float(error.metadata.get("retry_after_s", 5)) if status == 429 else None
        return _error(status, error.reason, error.message, wait_s)
    except web.HTTPRequestEntityTooLarge:
        return _error(413, "BODY_TOO_LARGE", f"a body holds at most {bodies.MAX_BODY} bytes")
    except web.HTTPException as error:
        return _error(error.status, "NO_SUCH_ROUTE" if error.status == 404 else "HTTP_ERROR", error.reason)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("unexpected error in %s %s", request.method, request.path)
        return _error(503, "INTERNAL", "unexpected error, logged: try later", 5)
