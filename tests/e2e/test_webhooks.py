"""Webhooks of a whole rollout: every body obeys the schema that the server serves for it, by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from demo.factory import server_identity
from demo.steps import wait_until
from deploy.local.settings import ROOT
from services.webhooks.schema import closed
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant

SERVER = """
import json, ssl, sys
from pathlib import Path
from aiohttp import web

certificate, key, address, journal = sys.argv[1:]


async def receive(request):
    body = await request.text()
    event = json.loads(body)
    if event["type"] == "webhook.test_fire":
        return web.json_response({"challenge": event["data"]["challenge"]})
    with open(journal, "a") as file:
        headers = request.headers
        line = {"id": headers["webhook-id"], "body": body, "replay": headers.get("webhook-replay", "")}
        line["signatures"] = len(headers["webhook-signature"].split())
        file.write(json.dumps(line) + "\\n")
    return web.Response(status=204)


app = web.Application()
app.router.add_post("/hooks", receive)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
host, _, port = address.rpartition(":")
web.run_app(app, host=host, port=int(port), ssl_context=context, print=None)
"""


class Receiver:
    """In a process of its own, at the one address that the installation allows."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        identity, self.ca_file = server_identity(folder)
        self.address = stack.settings.webhook_receiver
        self.journal = folder / "journal"
        arguments = (str(identity.certificate), str(identity.key), self.address, str(self.journal))
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, *arguments])

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def types(self) -> set[str]:
        return {json.loads(line["body"])["type"] for line in self.lines()}


@pytest.fixture
def receiver(stack: Stack, tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(stack, tmp_path / "receiver")
    yield made
    made.process.terminate()
    made.process.wait(10)


class Swell:
    """The command line, as the owner of an organization."""

    def __init__(self, tenant: Tenant) -> None:
        self._environment = os.environ | {
            "GROUNDSWELL_PROFILE": str(tenant.stack.profile.path),
            "GROUNDSWELL_API_KEY": tenant.api_key,
            "GROUNDSWELL_ORGANIZATION": tenant.organization,
            "GROUNDSWELL_PRODUCT": tenant.product.rpartition("/")[2],
        }

    def __call__(self, *arguments: str, expect: int = 0) -> Any:
        command = [sys.executable, "-m", "clients.cli", "--output", "json", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == expect, f"{arguments}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout if expect == 0 else done.stderr.splitlines()[-1])


def test_a_rollout_in_webhooks_each_obeys_its_schema_and_all_can_be_had_again(
    tenant: Tenant, receiver: Receiver
) -> None:
    swell = Swell(tenant)
    url = f"https://{receiver.address}/hooks"
    swell("webhook", "create", "ops", url, "--ca", str(receiver.ca_file), "--strict")

    def verified() -> bool:
        return bool(swell("webhook", "verify", "ops")["state"] == "STATE_ACTIVE")

    wait_until("the endpoint to be verified", 30, verified, 0.2)
    rollout = tenant.start_rollout(tenant.bundle("1.1.0"), cohorts=[("canary", 1)])
    device = tenant.enrolled("canary-1")
    del rollout

    def told() -> bool:
        device.check_in()
        return receiver.types() >= {
            "device.created",
            "rollout.started",
            "rollout.stage_opened",
            "device.claimed_release",
        }

    wait_until("the events of a rollout", 60, told, 0.3)
    known = {each["name"] for each in swell("event-type", "list")}
    validators: dict[str, Draft202012Validator] = {}
    for line in receiver.lines():
        document = json.loads(line["body"])
        kind = document["type"]
        assert kind in known
        if kind not in validators:
            schema = swell("event-type", "show", kind)
            validators[kind] = Draft202012Validator(closed(schema))
        validators[kind].validate(document)

    swell("webhook", "rotate-secret", "ops", "--overlap", "1")
    attempt = swell("webhook", "test", "ops")
    assert attempt["status"] == 200
    first = {line["id"]: line["body"] for line in receiver.lines()}

    def listed() -> bool:
        return len(swell("webhook", "deliveries", "ops", "--state", "SUCCEEDED")) >= len(first)

    wait_until("the delivery log", 20, listed, 0.3)
    one = swell("webhook", "deliveries", "ops", "--event", "rollout.started")[0]["name"]
    detail = swell("webhook", "deliveries", "ops", "--delivery", one)
    assert detail["attempts"][0]["status"] == 204
    resent = swell("webhook", "resend", "ops", one)["name"].rpartition("/")[2]
    begun = swell("webhook", "get", "ops")["create_time"]
    again = swell("webhook", "replay", "ops", "--from", begun)["name"].rpartition("/")[2]
    for replay in (resent, again):
        wait_until(
            "the replay",
            40,
            lambda replay=replay: (  # type: ignore[misc]
                swell("webhook", "replay", "ops", "--status", replay)["state"] == "STATE_SUCCEEDED"
            ),
            0.3,
        )
    replayed = [line for line in receiver.lines() if line["replay"]]
    assert {line["id"] for line in replayed} >= set(first)
    assert all(first[line["id"]] == line["body"] for line in replayed if line["id"] in first)
    assert {line["signatures"] for line in replayed} == {4}, "both secrets sign during the overlap"

    swell("webhook", "update", "ops", "--event", "rollout.*", "--best-effort", "--rate", "50")
    shown = swell("webhook", "get", "ops")
    assert (shown["event_types"], shown["ordering"], shown["max_per_second"]) == (
        ["rollout.*"],
        "ORDERING_BEST_EFFORT",
        50,
    )
    swell("webhook", "disable", "ops")
    assert [each["state"] for each in swell("webhook", "list")] == ["STATE_DISABLED"]
    refused = swell("webhook", "replay", "ops", "--only-failed", expect=1)
    assert refused["error"]["reason"] == "WRONG_STATE"
    swell("webhook", "enable", "ops")
    swell("webhook", "delete", "ops")
    assert swell("webhook", "list") == []
