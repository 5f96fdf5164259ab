"""A device without an agent: the device API over mutual TLS, byte by byte."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.factory import Identity


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and body of one exchange."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def reason(self) -> str:
        """Reason of a refusal."""
        return str(self.body.get("error", {}).get("reason", ""))

    @property
    def codes(self) -> list[str]:
        """Codes of the reasons of an answer."""
        return [entry["code"] for entry in self.body.get("reasons", [])]


class RawDevice:
    """One certificate at one gateway; a new connection for each request."""

    def __init__(self, gateway: str, server_name: str, ca: Path, identity: Identity) -> None:
        host, _, port = gateway.rpartition(":")
        self._address = (host, int(port))
        self._server_name = server_name
        self.context = ssl.create_default_context(cafile=str(ca))
        self.context.load_cert_chain(identity.certificate, identity.key)
        self.identity = identity
        self.instance, self.boot_id, self.counter = str(uuid.uuid4()), str(uuid.uuid4()), 0

    def body(self, *, counter: int | None = None, **changes: Any) -> dict[str, Any]:
        """A check-in of a device that runs its factory firmware; the counter rises unless it is given."""
        if counter is None:
            self.counter += 1
            counter = self.counter
        return {
            "agent": {"instance": self.instance, "boot_id": self.boot_id, "counter": counter},
            "running": {"version": "1.0.0", "slot": "a", "security_version": 1},
            **changes,
        }

    def check_in(self, *, counter: int | None = None, **changes: Any) -> Answer:
        return self.send(json.dumps(self.body(counter=counter, **changes)).encode())

    def send(self, raw: bytes, method: str = "POST", path: str = "/v1/checkin") -> Answer:
        """One exchange. Raises `ssl.SSLError` or `OSError` when there is no TLS connection to speak over."""
        status, headers, text = self._exchange(raw, method, path, "application/json")
        return Answer(status, json.loads(text) if text else {}, headers)

    def enroll(self, request_der: bytes, operation: str = "simplereenroll") -> tuple[Answer, bytes]:
        """EST: the answer, and the certificates of a good one as PKCS#7 DER."""
        path = f"/.well-known/est/{operation}"
        status, headers, text = self._exchange(base64.encodebytes(request_der), "POST", path, "application/pkcs10")
        if status != 200:
            return Answer(status, json.loads(text), headers), b""
        return Answer(status, {}, headers), base64.b64decode(text)

    def _exchange(self, raw: bytes, method: str, path: str, content_type: str) -> tuple[int, dict[str, str], bytes]:
        with socket.create_connection(self._address, 15) as plain:
            connection = http.client.HTTPConnection(*self._address, timeout=15)
            connection.sock = self.context.wrap_socket(plain, server_hostname=self._server_name)
            try:
                connection.request(method, path, raw, {"content-type": content_type})
                response = connection.getresponse()
                text = response.read()
            finally:
                connection.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, text
