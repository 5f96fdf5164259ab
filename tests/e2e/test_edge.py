"""The device edge under attack and under failure: it answers as described, and says nothing that it cannot know."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import random
import socket
import ssl
import subprocess
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import rollout_pb2
from redis import Redis

from demo import checker
from demo.steps import wait_until
from deploy.local.credentials import s3_credentials
from deploy.local.services import service_specs
from tests.e2e import logs
from tests.e2e.device import Answer, RawDevice
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant
from tests.openapi import problems_of_exchange

PUT_OFF = {"GATEWAY_STALE", "CHECKINS_UNAVAILABLE"}


@pytest.fixture(scope="module")
def home(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("home"))
    tenant.enrolled("pioneer")
    yield tenant
    tenant.close()


def asked(device: RawDevice, /, **changes: Any) -> Answer:
    """A check-in whose answer is what the published description says."""
    answer = device.check_in(**changes)
    assert problems_of_exchange(answer.status, answer.body, answer.headers) == []
    return answer


def offered(device: RawDevice, within_s: float = 60.0) -> dict[str, Any]:
    """The offer, once it comes."""

    def look() -> dict[str, Any] | None:
        return asked(device).body.get("offer")

    found: dict[str, Any] = wait_until("an offer", within_s, look, 0.2)
    return found


def report(device: RawDevice, attempt: str, state: str, **more: Any) -> dict[str, Any]:
    device.counter += 1
    return {"counter": device.counter, "attempt": attempt, "state": state, **more}


def updated(device: RawDevice, offer: dict[str, Any]) -> list[Answer]:
    """A whole update cycle of a device that does as it is told, byte by byte; every answer on the way."""
    attempt = offer["attempt"]
    answers = [asked(device, attempt={"name": attempt}, reports=[report(device, attempt, "ACCEPTED")])]
    answers.extend(
        asked(device, attempt={"name": attempt}, reports=[report(device, attempt, state)])
        for state in ("DOWNLOADED", "INSTALLED")
    )

    def go() -> Answer | None:
        answer = asked(device, attempt={"name": attempt, "ask": "go"})
        answers.append(answer)
        return answer if answer.body["answer"] == "go" else None

    wait_until("go", 30, go, 0.1)
    now = {key: offer[key] for key in ("release", "bundle", "version", "security_version")} | {"slot": "b"}
    device.boot_id = str(uuid.uuid4())
    answers.extend(
        asked(device, running=now, reports=[report(device, attempt, state)]) for state in ("BOOTED", "CONFIRMED")
    )
    return answers


def exchange(device: RawDevice, raw: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """One request with headers of the sender's choice."""
    with socket.create_connection(device._address, 15) as plain:
        connection = http.client.HTTPConnection(*device._address, timeout=15)
        with device.context.wrap_socket(plain, server_hostname=device._server_name) as connection.sock:
            connection.request("POST", "/v1/checkin", raw, {"content-type": "application/json", **headers})
            response = connection.getresponse()
            return response.status, json.loads(response.read())


def batches(stack: Stack, organization: str) -> list[device_pb2.CheckInBatch]:
    """What the topic holds of an organization."""
    records = asyncio.run(checker.read_topic(stack.settings.kafka, f"{stack.settings.env}.device.checkins.v1"))
    found = (device_pb2.CheckInBatch.FromString(record.value) for record in records)
    return [batch for batch in found if batch.organization == organization]


def said_counters(stack: Stack, tenant: Tenant, device_id: str) -> list[int]:
    """Counters of a device's check-ins in the topic."""
    name = tenant.device_name(device_id)
    found = batches(stack, tenant.organization)
    return [item.counter for batch in found for item in batch.items if item.device == name]


# A whole cycle, and what may be said again.


def test_t45_old_reports_said_again_change_nothing(stack: Stack, tenant: Tenant) -> None:
    bundle = tenant.bundle("1.1.0")
    device = tenant.enrolled("canary-1")
    name = tenant.start_rollout(bundle, cohorts=[("canary", 1)])
    said: list[bytes] = []
    send = device.send

    def listened(raw: bytes, method: str = "POST", path: str = "/v1/checkin") -> Answer:
        said.append(raw)
        return send(raw, method, path)

    device.send = listened  # type: ignore[method-assign]
    offer = offered(device)
    answers = updated(device, offer)
    assert {answer.body["answer"] for answer in answers} >= {"none", "go"}
    tenant.await_completion(name)

    with logs.unchanged(stack, tenant.organization):
        # Every byte of the past once more, backwards.
        for raw in reversed(said):
            answer = send(raw)
            assert (answer.status, answer.body["answer"] in {"none", "cancel", "wait"}) == (200, True)
        now = {key: offer[key] for key in ("release", "bundle", "version", "security_version")}
        mark = asked(device, counter=2**40, running=now)
        assert mark.status == 200
        wait_until("the worker to have read it all", 60, lambda: 2**40 in said_counters(stack, tenant, "canary-1"), 0.2)
    assert [attempt.state for attempt in tenant.attempts(name)] == [device_pb2.ATTEMPT_STATE_CONFIRMED]
    logs.check(stack, tenant.organization, tenant.request_ids)


def test_t46_the_identity_is_the_certificate_whatever_the_body_says(stack: Stack, home: Tenant) -> None:
    sender, victim = home.enrolled("sender"), home.enrolled("victim")
    for device in ("victim", home.device_name("victim"), victim.identity.certificate.name):
        answer = asked(sender, device=device)
        assert (answer.status, answer.reason) == (409, "IDENTITY_MISMATCH")
    assert asked(sender, device="sender").status == 200
    assert asked(sender, device=home.device_name("sender")).status == 200
    mine = sender.counter

    wait_until("what the sender said", 20, lambda: mine in said_counters(stack, home, "sender"), 0.2)
    spoke = [item for batch in batches(stack, home.organization) for item in batch.items]
    assert {item.device for item in spoke if item.instance == sender.instance} == {home.device_name("sender")}


def test_t47_one_key_on_two_boards_is_found_and_gets_nothing(stack: Stack, tenant: Tenant) -> None:
    bundle = tenant.bundle("1.1.0")
    first = tenant.enrolled("canary-1")
    second = tenant.raw_device(first.identity)
    second.instance = first.instance  # copied with the rest of the disk
    second.counter = first.counter
    runs = {"slot": "a", "security_version": 1}
    assert asked(first, running={"version": "1.0.1", **runs}).status == 200
    assert asked(second, running={"version": "1.0.2", **runs}).status == 200

    def alarms() -> list[Any]:
        public = logs.entries(stack, "rollout", tenant.organization, "public")
        return [entry for entry in public if getattr(entry.message(), "change", "") == "identity.cloned"]

    wait_until("the alarm", 30, alarms, 0.2)
    name = tenant.start_rollout(bundle, cohorts=[("canary", 1)])

    def refused(device: RawDevice) -> bool:
        device.counter += 100
        answer = asked(device)
        assert answer.body["answer"] == "none"
        return "IDENTITY_CLONED" in answer.codes or "QUARANTINED" in answer.codes

    for device in (first, second):
        wait_until("the reason", 30, lambda device=device: refused(device), 0.2)  # type: ignore[misc]
    assert not tenant.attempts(name)


FORGED = (
    "X-Client-Cert",
    "X-SSL-Client-Cert",
    "X-SSL-Client-S-DN",
    "SSL-Client-Subject",
    "X-Ssl-Client-Dn",
    "X-Ssl-Issuer-Hash-1",
    "X-Forwarded-Client-Cert",
    "X-Forwarded-For",
    "X-Real-IP",
    "Forwarded",
    "X-Forwarded-Host",
    "X-Amzn-Mtls-Clientcert",
    "Client-Cert",
)


def test_t52_headers_that_a_proxy_would_set_are_nobodys_word(stack: Stack, home: Tenant) -> None:
    liar, victim = home.enrolled("liar"), home.enrolled("other")
    certificate = victim.identity.certificate.read_text().replace("\n", "%0A")
    values = (home.device_name("other"), "CN=other", certificate, f'By=x;Cert="{certificate}";Subject="CN=other"')
    for number, value in enumerate(values):
        raw = json.dumps(liar.body()).encode()
        status, body = exchange(liar, raw, dict.fromkeys(FORGED, value) | {"Host": f"rival-{number}.devices.localhost"})
        assert (status, body["answer"]) == (200, "none")

    def by_device() -> Counter[str]:
        return Counter(item.device for batch in batches(stack, home.organization) for item in batch.items
                       if item.instance == liar.instance)  # fmt: skip

    wait_until("all of it in the topic", 20, lambda: sum(by_device().values()) >= liar.counter, 0.2)
    assert set(by_device()) == {home.device_name("liar")}

    nameless = ssl.create_default_context(cafile=str(stack.profile.ca))
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):  # noqa: PT012
        liar.context = nameless
        exchange(liar, b"{}", dict.fromkeys(FORGED, values[0]))


ODD = (
    "\x83h\x02d\x00\x01a",  # an Erlang term
    "\x80\x04\x95cos\nsystem\n(S'true'\ntR.",  # a pickle
    "!!python/object/apply:os.system ['true']",
    "${jndi:ldap://127.0.0.1/x}",
    "../../etc/passwd\x00.pem",
    "'; DROP TABLE devices; --",
    "\u202etxet desrever",
    "a" * 3_000,
)


@pytest.mark.parametrize("number", range(len(ODD)))
def test_t53_odd_ids_are_data_or_refused(home: Tenant, number: int) -> None:
    odd = ODD[number]
    device = home.enrolled(f"odd-{number}")
    agent = {"instance": device.instance, "boot_id": device.boot_id}
    for field in agent:
        device.counter += 1
        body = device.body(counter=device.counter)
        body["agent"][field] = odd
        answer = device.send(json.dumps(body).encode())
        assert (answer.status, answer.reason) == (400, "INVALID_FIELD")
    answer = asked(device, reports=[{"counter": 1, "attempt": odd, "state": "ACCEPTED"}])
    assert (answer.status, answer.reason) in {(200, ""), (400, "INVALID_FIELD")}
    assert asked(device, device=odd).reason == "IDENTITY_MISMATCH"
    said = asked(device, running={"version": odd, "release": odd}, attributes={odd: odd})
    assert (said.status, said.body["answer"]) == (200, "none")
    wait_until(
        "it to be kept as it was said", 30, lambda: home.explain(f"odd-{number}").running.version == odd[:128], 0.2
    )


def test_a_lone_surrogate_is_refused_and_no_error_of_ours(home: Tenant) -> None:
    device = home.enrolled("lonely")
    raw = json.dumps(device.body()).replace('"1.0.0"', '"\\ud800"').encode()
    answer = device.send(raw)
    assert (answer.status, answer.reason) == (400, "MALFORMED_BODY")


# Links.


def link_of(device: RawDevice, url: str) -> Answer:
    return device.send(b"", "GET", url)


def test_t67_a_link_is_good_for_one_device_one_file_and_one_epoch(
    stack: Stack, new_tenant: Callable[..., Tenant]
) -> None:
    tenant, rival = new_tenant(), new_tenant()
    bundle = tenant.bundle("1.1.0")
    device, neighbour, stranger = tenant.enrolled("canary-1"), tenant.enrolled("main-1"), rival.enrolled("canary-1")
    name = tenant.start_rollout(bundle, cohorts=[("canary", 1)])
    offer = offered(device)
    binary = offer["binaries"][0]
    url = binary["url"]

    # A gateway that is behind its logs, on a busy machine, says so and gives no link.
    mine = wait_until("the link", 30, lambda: (got := link_of(device, url)).status == 307 and got, 0.2)
    location = urlsplit(mine.headers["location"])
    assert parse_qs(location.query)["X-Amz-Expires"] == ["60"]
    with urllib.request.urlopen(location.geturl(), timeout=15) as response:  # noqa: S310
        assert hashlib.sha256(response.read()).hexdigest() == binary["digest"]

    assert link_of(neighbour, url).reason == "LINK_NOT_YOURS"
    assert link_of(stranger, url).reason == "LINK_NOT_YOURS"
    assert link_of(device, url.replace(binary["digest"], "0" * 64)).reason == "DIGEST_NOT_IN_OFFER"
    at = len("/v1/downloads/") + random.randrange(20, 100)
    changed = url[:at] + ("A" if url[at] != "A" else "B") + url[at + 1 :]
    assert link_of(device, changed).reason == "LINK_INVALID"

    tenant.client.rollout.KillRollout(
        rollout_pb2.KillRolloutRequest(name=name, reason="T67", request_id=str(uuid.uuid4()))
    )
    stopped = time.monotonic()
    wait_until("the link to be dead", 10, lambda: link_of(device, url).reason == "OFFER_WITHDRAWN", 0.05)
    # The gateway's freshness bound, and a busy machine's tardiness.
    assert time.monotonic() - stopped < 5
    assert link_of(device, url).reason == "OFFER_WITHDRAWN"


# Failures.


def test_t75_after_an_outage_everybody_is_answered_soon_and_told_to_spread(stack: Stack, tenant: Tenant) -> None:
    tenant.enrolled("main-0")
    fleet = [tenant.raw_device(tenant.factory.device(f"main-{number}")) for number in range(1, 41)]
    gone = stack.kill9("gateway")
    stack.await_successor("gateway", gone)
    began = time.monotonic()

    def knock(device: RawDevice) -> list[Answer]:
        heard: list[Answer] = []

        def answered() -> bool:
            answer = asked(device)
            heard.append(answer)
            return answer.status == 200

        wait_until("an answer", 110, answered, 0.5)
        return heard

    with ThreadPoolExecutor(len(fleet)) as hands:
        answers = list(hands.map(knock, fleet))
    assert time.monotonic() - began < 120
    put_off = [answer for heard in answers for answer in heard[:-1]]
    assert all(answer.status == 503 and int(answer.headers["retry-after"]) >= 1 for answer in put_off)
    assert len({heard[-1].body["poll_after_s"] for heard in answers}) > len(fleet) / 2


def test_with_kafka_frozen_devices_are_told_why_they_get_nothing_and_go_on_afterwards(
    stack: Stack, tenant: Tenant
) -> None:
    bundle = tenant.bundle("1.1.0")
    device = tenant.enrolled("canary-1")
    name = tenant.start_rollout(bundle, cohorts=[("canary", 1)])
    offer = offered(device)  # the rollout is open: an offer would be given at every poll until it is accepted
    with stack.stopped("kafka"):
        frozen = time.monotonic()
        wait_until("to be told why", 15, lambda: PUT_OFF & set(asked(device).codes), 0.1)
        # The freshness bound is 2 s; a claim that was under way may end by its own time-out before.
        assert time.monotonic() - frozen < 14
        for _ in range(10):
            answer = asked(device)
            assert (answer.status, answer.body["answer"]) == (200, "none")
            assert PUT_OFF & set(answer.codes)
        asked_to_switch = asked(device, attempt={"name": offer["attempt"], "ask": "go"})
        assert asked_to_switch.body["answer"] == "none"
        url = offer["binaries"][0]["url"]
        wait_until("links to be put off too", 15, lambda: link_of(device, url).reason == "GATEWAY_STALE", 0.2)
        said = asked(device, reports=[report(device, offer["attempt"], "ACCEPTED")])
        assert said.body["reports_accepted_through"] == 0, "nothing is confirmed that the log does not have"
    updated(device, offered(device))
    tenant.await_completion(name)
    logs.check(stack, tenant.organization, tenant.request_ids)


def test_redis_lost_and_emptied_while_it_runs_costs_nobody_an_answer(stack: Stack, tenant: Tenant) -> None:
    bundle = tenant.bundle("1.1.0")
    known = [tenant.enrolled(f"main-{number}") for number in range(3)]
    fresh = tenant.raw_device(tenant.factory.device("canary-1"))
    gone = stack.kill9("redis")
    assert [asked(device).status for device in known] == [200] * 3
    wait_until("a new device to be admitted without Redis", 30, lambda: asked(fresh).status == 200, 0.5)
    stack.await_successor("redis", gone)
    with Redis.from_url(stack.settings.redis) as redis:
        redis.flushall()
        key = f"{stack.settings.env}:edge:v1:registry:*"
        wait_until("the view to come back", 30, lambda: any(redis.hlen(one) > 1 for one in redis.keys(key)), 0.2)
    # A gateway that starts now has nothing in memory, and reads what was put back.
    gone = stack.kill9("gateway")
    stack.await_successor("gateway", gone)
    wait_until("devices to be answered", 30, lambda: all(asked(device).status == 200 for device in known), 0.5)
    name = tenant.start_rollout(bundle, cohorts=[("canary", 1)])
    updated(fresh, offered(fresh))
    tenant.await_completion(name)
    assert stack.health("gateway")["devices"]["redis_reads"] > 0


@contextlib.contextmanager
def another_gateway(stack: Stack, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A second gateway, with an id and a health port of its own; it must end well."""
    twice = replace(stack.settings, gateways=2)
    specs = {spec.name: spec for spec in service_specs(twice, s3_credentials(stack.settings))}
    spec = specs["gateway-2"]

    def healthy() -> bool:
        try:
            with urllib.request.urlopen(spec.probe.url, timeout=5) as response:  # type: ignore[union-attr] # noqa: S310
                return bool(response.status == 200)
        except OSError:
            return False

    with subprocess.Popen(spec.argv, cwd=spec.cwd, env=spec.env | environment, stderr=subprocess.DEVNULL) as second:
        try:
            wait_until("the second gateway", 90, healthy, 0.2)
            yield second
        finally:
            second.terminate()
            assert second.wait(30) == 0


def test_two_gateways_share_the_port_and_the_work(stack: Stack, tenant: Tenant) -> None:
    bundle = tenant.bundle("1.1.0")
    with another_gateway(stack):
        device = tenant.enrolled("canary-1")
        name = tenant.start_rollout(bundle, cohorts=[("canary", 1)])
        updated(device, offered(device))
        tenant.await_completion(name)
        for _ in range(40):
            assert asked(device, running={"version": "1.1.0", "security_version": 1}).status == 200

        def speakers() -> set[str]:
            return {batch.gateway.rpartition("/")[2] for batch in batches(stack, tenant.organization)}

        wait_until("both to have spoken", 30, lambda: speakers() == {"local-1", "local-2"}, 0.2)
    logs.check(stack, tenant.organization, tenant.request_ids)


def opened(device: RawDevice) -> ssl.SSLSocket:
    """A connection that says nothing yet."""
    plain = socket.create_connection(device._address, 30)
    return device.context.wrap_socket(plain, server_hostname=device._server_name)


def head_of(device: RawDevice, length: int, **headers: str) -> bytes:
    lines = [f"{name}: {value}" for name, value in headers.items()]
    text = ["POST /v1/checkin HTTP/1.1", f"Host: {device._server_name}", f"Content-Length: {length}", *lines]
    return "\r\n".join([*text, "", ""]).encode()


def test_a_body_that_does_not_come_is_not_waited_for(home: Tenant) -> None:
    device = home.enrolled("sleepy")
    with opened(device) as connection:
        began = time.monotonic()
        connection.sendall(head_of(device, 100) + b"{")
        heard = b"".join(iter(lambda: connection.recv(4096), b""))
    assert heard.startswith(b"HTTP/1.1 408 ")
    assert json.loads(heard.partition(b"\r\n\r\n")[2])["error"]["reason"] == "BODY_TIMEOUT"
    assert 9 < time.monotonic() - began < 40


def test_a_head_without_end_is_refused(home: Tenant) -> None:
    device = home.enrolled("windy")
    with opened(device) as connection:
        connection.sendall(head_of(device, 2, **{"X-Long": "a" * 20_000}) + b"{}")
        assert connection.recv(4096).partition(b"\r\n")[0].split()[1] == b"400"
    assert asked(device).status == 200


def test_a_gateway_cuts_connections_beyond_its_bound_and_ends_without_losing_what_was_said(
    stack: Stack, home: Tenant
) -> None:
    device = home.enrolled("caller")
    port = stack.settings.port(444)
    own = {"GROUNDSWELL_GATEWAY_LISTEN": f"127.0.0.1:{port}", "GROUNDSWELL_GATEWAY_CONNECTIONS": "3"}
    with another_gateway(stack, **own) as second:
        device._address = ("127.0.0.1", port)
        wait_until("to be answered there", 30, lambda: asked(device).status == 200, 0.2)
        held: list[ssl.SSLSocket] = []

        def full() -> bool:
            if len(held) < 3:
                held.append(opened(device))
            return len(held) == 3

        wait_until("three connections", 30, full, 0.1)

        def refused() -> bool:
            try:
                asked(device)
            except (ssl.SSLError, ConnectionError, http.client.HTTPException):
                return True
            return False

        wait_until("one more to be cut", 30, refused, 0.2)
        held.pop().close()
        wait_until("a place to be free again", 30, lambda: not refused(), 0.2)
        raw = json.dumps(device.body()).encode()
        held[0].sendall(head_of(device, len(raw)) + raw)
        assert held[0].recv(4096).startswith(b"HTTP/1.1 200 ")
        second.terminate()  # within the moment for which answers to others are collected into one record
        for connection in held:
            connection.close()
    last = device.counter
    wait_until("what was said last", 30, lambda: last in said_counters(stack, home, "caller"), 0.2)
