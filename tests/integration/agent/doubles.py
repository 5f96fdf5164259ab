"""A gateway and an object store for one device, as `docs/device-api.md` describes them, with faults on request.

The gateway refuses what a real one would call a fork or a step back of the counters, so every test of the agent is
also a test of its one counter sequence.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import pkcs7

PRODUCT = "organizations/acme/products/thermostat"
TARGET = "board-b"
ENDED = {"CONFIRMED", "FAILED", "REVERTED"}


def raw_public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


@dataclass
class Bundle:
    """Content to offer."""

    version: str
    security_version: int
    files: list[tuple[bytes, dict[str, Any]]]
    target: str = TARGET
    product: str = PRODUCT

    def statement(self) -> bytes:
        body = {
            "binaries": [
                {
                    "digest": one["digest"],
                    "metadata_digest": one["metadata_digest"],
                    "size": one["size"],
                    "target": one["target"],
                }
                for one in self.binaries("")
            ],
            "product": self.product,
            "security_version": self.security_version,
            "version": self.version,
        }
        return b"groundswell.bundle-statement.v1\n" + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

    def binaries(self, grant: str) -> list[dict[str, Any]]:
        entries = []
        for content, metadata in self.files:
            text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
            digest = hashlib.sha256(content).hexdigest()
            entries.append(
                {
                    "digest": digest,
                    "size": len(content),
                    "target": self.target,
                    "metadata": text,
                    "metadata_digest": hashlib.sha256(text.encode()).hexdigest(),
                    "url": f"/v1/downloads/{grant}/{digest}",
                }
            )
        return entries

    def offer(self, attempt: str, keys: list[Ed25519PrivateKey], kind: str = "forward") -> dict[str, Any]:
        statement = self.statement()
        return {
            "attempt": attempt,
            "kind": kind,
            "release": f"{PRODUCT}/cohorts/canary/releases/{self.version.replace('.', '-')}",
            "bundle": f"{PRODUCT}/bundles/{self.version.replace('.', '-')}",
            "version": self.version,
            "security_version": self.security_version,
            "statement": base64.b64encode(statement).decode(),
            "signatures": [
                {"key_id": hashlib.sha256(raw_public(key)).hexdigest(), "signature": key.sign(statement).hex()}
                for key in keys
            ],
            "binaries": self.binaries(attempt.rpartition("/")[2]),
            "lease_s": 60.0,
        }


@dataclass
class Store:
    """Objects, and what goes wrong with the next requests."""

    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Callable[[BaseHTTPRequestHandler, bytes, int], None]] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    address: str = ""


@dataclass
class Enrolment:
    """Certificates of one device in two phases, as the server keeps them: one in force, at most one announced."""

    ca: x509.Certificate
    ca_key: ec.EllipticCurvePrivateKey
    in_force: bytes
    expired: bool = False
    announced: bytes = b""
    history: list[bytes] = field(default_factory=list)
    answers: dict[bytes, bytes] = field(default_factory=dict)
    asked: int = 0
    confirmed: int = 0
    superseded: int = 0
    refusing: list[str] = field(default_factory=list)
    wrong_key: bool = False

    def refuses(self) -> str:
        return self.refusing.pop(0) if self.refusing else ""

    def known(self, presented: bytes, *, renewing: bool = False) -> str:
        """Why this certificate is refused; the first use of an announced one confirms it."""
        if self.announced and presented == self.announced:
            self.history.append(self.in_force)
            self.in_force, self.announced, self.expired = self.announced, b"", False
            self.confirmed += 1
        if presented != self.in_force:
            self.superseded += presented in self.history
            return "CERTIFICATE_SUPERSEDED" if presented in self.history else "CERTIFICATE_LAPSED"
        return "CERTIFICATE_EXPIRED" if self.expired and not renewing else ""

    def issue(self, body: bytes) -> bytes:
        request = x509.load_der_x509_csr(base64.b64decode(body))
        key = ec.generate_private_key(ec.SECP256R1()).public_key() if self.wrong_key else request.public_key()
        raw = base64.b64decode(body)
        if raw not in self.answers:
            now = datetime.now(UTC)
            made = (
                x509.CertificateBuilder()
                .subject_name(request.subject)
                .issuer_name(self.ca.subject)
                .public_key(key)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - timedelta(minutes=5))
                .not_valid_after(now + timedelta(days=90))
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .sign(self.ca_key, hashes.SHA256())
            )
            self.answers[raw] = made.public_bytes(serialization.Encoding.DER)
        self.announced = self.answers[raw]
        certificate = x509.load_der_x509_certificate(self.announced)
        return base64.encodebytes(pkcs7.serialize_certificates([certificate], serialization.Encoding.DER))


@dataclass
class Gateway:
    """One device's server."""

    store: Store
    keys: list[Ed25519PrivateKey]
    port: int = 0
    lock: threading.Condition = field(default_factory=threading.Condition)
    bundle: Bundle | None = None
    kind: str = "forward"
    attempt: str = ""
    attempts: int = 0
    history: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(attempt, state, code, version that ran)."""
    running: list[dict[str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    hold_go: bool = False
    go_valid_s: float = 5.0
    goes: int = 0
    one_device: bool = True
    down: bool = False
    down_after_go: bool = False
    cancel: bool = False
    poll_s: float = 0.05
    extra_signatures: list[dict[str, str]] = field(default_factory=list)
    enrolment: Enrolment | None = None
    server_time: str = "1970-01-01T00:00:00Z"
    _counter: int = 0
    _seen: dict[int, bytes] = field(default_factory=dict)

    def release(self, bundle: Bundle, kind: str = "forward") -> str:
        """Offer this from the next check-in on, as a new attempt."""
        with self.lock:
            for content, _ in bundle.files:
                self.store.objects[hashlib.sha256(content).hexdigest()] = content
            self.attempts += 1
            self.attempt = f"{PRODUCT}/rollouts/r/claims/d/attempts/{self.attempts}"
            self.bundle, self.kind = bundle, kind
            return self.attempt

    def states(self, attempt: str) -> list[str]:
        return [state for name, state, _, _ in self.history if name == attempt]

    def code(self, attempt: str) -> str:
        return next((code for name, state, code, _ in self.history if name == attempt and state in ENDED), "")

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 25.0) -> None:
        """Wait for something to be said."""
        with self.lock:
            if not self.lock.wait_for(condition, timeout_s):
                raise AssertionError(f"never seen: {what}; history {self.history}, running {self.running[-1:]}")

    def ended(self, attempt: str) -> str:
        self.until(lambda: bool(ENDED & set(self.states(attempt))), f"an end of {attempt}")
        return next(state for state in self.states(attempt) if state in ENDED)

    def check_in(self, body: dict[str, Any]) -> dict[str, Any]:
        agent, version = body["agent"], body["running"]["version"]
        if self.one_device:
            self._judge_counters(agent["counter"], body["reports"])
        for one in body["reports"]:
            if one["counter"] <= self._counter:
                continue
            self._counter = one["counter"]
            self.history.append((one["attempt"], one["state"], one["code"], version))
        self._counter = max(self._counter, agent["counter"])
        self.running.append(body["running"])
        answer: dict[str, Any] = {
            "server_time": self.server_time,
            "poll_after_s": self.poll_s,
            "reports_accepted_through": self._counter,
            "reasons": [],
            "answer": "none",
        }
        told = self.states(self.attempt)
        working = body.get("attempt", {})
        if self.cancel and working:
            answer |= {"answer": "cancel", "cancel": {"attempt": working["name"]}}
        elif working.get("ask") == "go" and not self.hold_go:
            self.goes += 1
            self.down = self.down_after_go
            answer |= {"answer": "go", "go": {"attempt": working["name"], "valid_for_s": self.go_valid_s}}
        elif working.get("ask") == "go":
            answer |= {"answer": "wait", "wait": {"attempt": working["name"]}}
        elif self.bundle and not told:
            offer = self.bundle.offer(self.attempt, self.keys, self.kind)
            offer["signatures"] += self.extra_signatures
            answer |= {"answer": "offer", "offer": offer}
        return answer

    def _judge_counters(self, counter: int, reports: list[dict[str, Any]]) -> None:
        numbers = [one["counter"] for one in reports]
        if sorted(set(numbers)) != numbers or (numbers and numbers[-1] >= counter):
            self.violations.append(f"reports {numbers} before check-in {counter}")
        for one in reports:
            digest = hashlib.sha256(json.dumps(one, sort_keys=True).encode()).digest()
            if self._seen.setdefault(one["counter"], digest) != digest:
                self.violations.append(f"report {one['counter']} was another before")
        if counter in self._seen:
            self.violations.append(f"check-in {counter} was used before")
        if self._seen and counter < max(self._seen):
            self.violations.append(f"check-in {counter} goes back")
        self._seen[counter] = b"check-in"


def _gateway_handler(gateway: Gateway) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def _send(self, status: int, body: dict[str, Any], **headers: str) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            presented = self.connection.getpeercert(binary_form=True)
            if self.path == "/.well-known/est/simplereenroll":
                self._enroll(presented, raw)
                return
            body = json.loads(raw)
            with gateway.lock:
                refusal = gateway.enrolment.known(presented) if gateway.enrolment else ""
                if refusal:
                    self._send(403, {"error": {"reason": refusal, "message": "no"}})
                    gateway.lock.notify_all()
                    return
                if gateway.down:
                    error = {"error": {"reason": "UNAVAILABLE", "message": "try later"}}
                    self._send(503, error, Retry_After="0.1")
                    return
                answer = gateway.check_in(body)
                self._send(200, answer)
                gateway.lock.notify_all()

        def _enroll(self, presented: bytes, raw: bytes) -> None:
            with gateway.lock:
                enrolment = gateway.enrolment
                if enrolment is None:
                    self._send(403, {"error": {"reason": "ISSUING_CA_MISSING", "message": "no"}})
                    return
                enrolment.asked += 1
                refusal = enrolment.refuses() or enrolment.known(presented, renewing=True)
                if refusal:
                    self._send(403, {"error": {"reason": refusal, "message": "no"}})
                else:
                    data = enrolment.issue(raw)
                    self.send_response(200)
                    self.send_header("Content-Type", "application/pkcs7-mime; smime-type=certs-only")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                gateway.lock.notify_all()

        def do_GET(self) -> None:
            digest = self.path.rpartition("/")[2]
            location = f"{gateway.store.address}/{digest}?signature=for-sixty-seconds"
            self._send(307, {}, Location=location)

    return Handler


def _store_handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            store.requests.append({key.lower(): value for key, value in self.headers.items()})
            content = store.objects[self.path.strip("/").partition("?")[0]]
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match else 0
            if store.faults:
                store.faults.pop(0)(self, content, start)
                return
            serve(self, content, start)

    return Handler


def serve(handler: BaseHTTPRequestHandler, content: bytes, start: int, announced: int | None = None) -> None:
    """Answer as a store does."""
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - start if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(content[start:])


def cut_after(count: int) -> Callable[[BaseHTTPRequestHandler, bytes, int], None]:
    """The line breaks after so many bytes."""

    def fault(handler: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
        serve(handler, content[: start + count], start, announced=len(content) - start)
        handler.close_connection = True

    return fault


def link_expired(handler: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    handler.send_error(403)


def longer(handler: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    """A body that announces nothing and never ends."""
    handler.send_response(200)
    handler.end_headers()
    try:
        handler.wfile.write(content)
        while True:
            handler.wfile.write(b"x" * 65536)
    except OSError:
        pass


def announces_more(handler: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    serve(handler, content + b"more", start)


def swapped(handler: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    """Other bytes of the same length."""
    serve(handler, bytes(len(content)), start)


def drip(handler: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    """One byte now and then, until the device has had enough."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    try:
        for value in content:
            handler.wfile.write(bytes([value]))
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


class _TlsServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._context is None:
            super().finish_request(request, client_address)
            return
        # In the thread of the connection: a client killed amid its handshake blocks nobody.
        with self._context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed on purpose here."""


@contextmanager
def serving(tls: Path, keys: list[Ed25519PrivateKey]) -> Iterator[Gateway]:
    """Both, on ports of their own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "gateway.pem", tls / "gateway.key")
    context.load_verify_locations(tls / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    store = Store()
    gateway = Gateway(store, keys)
    servers = [_TlsServer(context, _gateway_handler(gateway)), _TlsServer(None, _store_handler(store))]
    gateway.port = servers[0].server_address[1]
    store.address = f"http://127.0.0.1:{servers[1].server_address[1]}"
    threads = [threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True) for one in servers]
    for thread in threads:
        thread.start()
    try:
        yield gateway
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
