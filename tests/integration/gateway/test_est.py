"""EST at the gateway: forms of requests and answers, and who may ask."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from cryptography.hazmat.primitives.serialization import pkcs7
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import registry_pb2

from libs.errors import PermissionDeniedError
from services.gateway.directory import CertificateEntry, DeviceEntry
from services.gateway.est import EstApi
from services.gateway.http import _body, application_of
from services.gateway.views import DeviceView
from tests.unit.pki.factory import Ca, csr, der

DEVICE = "organizations/acme/products/thermostat/devices/SN-1"
UID = "5b5c9c2e-6b0e-4a53-9a0e-9f4a3c1d2e3f"
Leaf = pki_pb2.DeviceCertificate


@dataclass
class Door:
    """The EST routes alone, over plain HTTP, with a pki that signs everything."""

    ca: Ca = field(default_factory=Ca)
    anchors: tuple[bytes, ...] = ()
    expired: bool = False
    asked: list[Any] = field(default_factory=list)
    answer: bytes = b""

    async def identify(self, request: web.Request, *, renewing: bool = False) -> DeviceView:
        if self.expired and not renewing:
            raise PermissionDeniedError("CERTIFICATE_EXPIRED", "expired")
        certificate = CertificateEntry.of(Leaf(device=DEVICE, fingerprint="ab" * 32))
        return DeviceView("acme", DeviceEntry.of(registry_pb2.Device(name=DEVICE, uid=UID)), certificate)

    async def issue(self, request: pki_pb2.IssueCertificateRequest) -> pki_pb2.IssueCertificateResponse:
        self.asked.append(request)
        return pki_pb2.IssueCertificateResponse(device_certificate=Leaf(der=self.answer))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[TestClient[Any, Any]]:
        self.answer = der(self.ca.leaf("SN-1"))
        views: Any = SimpleNamespace(issuing_cas=lambda _: self.anchors)
        app = application_of(EstApi(views, self.identify, lambda _: "acme", self.issue, _body).routes())
        async with TestClient(TestServer(app, host="127.0.0.1")) as client:
            yield client


PKCS10 = {"Content-Type": "application/pkcs10"}


@pytest.mark.parametrize("path", ["simpleenroll", "simplereenroll", "thermostat/simplereenroll"])
@pytest.mark.parametrize("form", ["lines", "one line", "with a lying encoding"])
async def test_a_request_is_answered_with_a_certs_only_pkcs7(path: str, form: str) -> None:
    door, request = Door(), csr("SN-1")
    body = base64.b64encode(request) if form == "one line" else base64.encodebytes(request).replace(b"\n", b"\r\n")
    headers = PKCS10 | ({"Content-Transfer-Encoding": "8bit"} if form == "with a lying encoding" else {})
    async with door.open() as client:
        answer = await client.post(f"/.well-known/est/{path}", data=body, headers=headers)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/pkcs7-mime; smime-type=certs-only"
        assert answer.headers["Content-Transfer-Encoding"] == "base64"
        found = pkcs7.load_der_pkcs7_certificates(base64.b64decode(await answer.read()))
    assert [der(one) for one in found] == [door.answer]
    (asked,) = door.asked
    assert (asked.organization, asked.fingerprint, asked.csr_der) == ("acme", "ab" * 32, request)
    assert asked.first == (path == "simpleenroll")


async def test_cacerts_are_what_this_server_signs_with() -> None:
    door = Door()
    async with door.open() as client:
        none = await client.get("/.well-known/est/cacerts")
        assert (none.status, (await none.json())["error"]["reason"]) == (403, "ISSUING_CA_MISSING")
        door.anchors = (der(door.ca.certificate), der(Ca("Old").certificate))
        for path in ("cacerts", "thermostat/cacerts"):
            answer = await client.get(f"/.well-known/est/{path}")
            found = pkcs7.load_der_pkcs7_certificates(base64.b64decode(await answer.read()))
            assert {der(one) for one in found} == set(door.anchors)


BAD: dict[str, tuple[str, bytes, dict[str, str], int, str]] = {
    "not base64": ("simplereenroll", b"!!", PKCS10, 400, "CSR_MALFORMED"),
    "empty": ("simplereenroll", b"", PKCS10, 400, "CSR_MALFORMED"),
    "another type": ("simplereenroll", b"AAAA", {"Content-Type": "application/json"}, 415, "HTTP_ERROR"),
    "oversized": ("simplereenroll", b"A" * 20_000, PKCS10, 413, "BODY_TOO_LARGE"),
    "foreign label": ("pump/simplereenroll", b"AAAA", PKCS10, 404, "EST_LABEL_UNKNOWN"),
    "keys made elsewhere": ("serverkeygen", b"AAAA", PKCS10, 404, "NO_SUCH_ROUTE"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_requests_reach_no_ca(case: str) -> None:
    path, body, headers, status, reason = BAD[case]
    door = Door()
    async with door.open() as client:
        answer = await client.post(f"/.well-known/est/{path}", data=body, headers=headers)
        assert (answer.status, (await answer.json())["error"]["reason"]) == (status, reason)
    assert not door.asked


async def test_an_expired_certificate_may_renew_and_not_enrol() -> None:
    door = Door(expired=True)
    async with door.open() as client:
        body = base64.b64encode(csr("SN-1"))
        first = await client.post("/.well-known/est/simpleenroll", data=body, headers=PKCS10)
        again = await client.post("/.well-known/est/simplereenroll", data=body, headers=PKCS10)
        assert (first.status, again.status) == (403, 200)
