"""Webhooks of a whole rollout: every body obeys the schema that the server serves for it, by the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from groundswell.webhooks.v1 import webhooks_pb2 as pb
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from clients.cli.main import app
from clients.sdk import ApiError
from demo.factory import server_identity
from demo.steps import wait_until
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
    """The command line, as the owner of an organization; in this process, because each start of one takes long."""

    def __init__(self, tenant: Tenant) -> None:
        self._environment = {
            "GROUNDSWELL_PROFILE": str(tenant.stack.profile.path),
            "GROUNDSWELL_API_KEY": tenant.api_key,
            "GROUNDSWELL_ORGANIZATION": tenant.organization,
            "GROUNDSWELL_PRODUCT": tenant.product.rpartition("/")[2],
        }

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["--output", "json", *arguments], env=self._environment)

    def __call__(self, *arguments: str) -> Any:
        done = self.run(*arguments)
        assert done.exit_code == 0, (arguments, done.output, done.exception)
        return json.loads(done.stdout)


def test_a_rollout_in_webhooks_each_obeys_its_schema_and_all_can_be_had_again(
    tenant: Tenant, receiver: Receiver
) -> None:
    swell, api, endpoint = Swell(tenant), tenant.client.webhooks, f"{tenant.name}/webhookEndpoints/ops"
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
            request = pb.GetEventTypeRequest(name=f"{tenant.name}/eventTypes/{kind}")
            validators[kind] = Draft202012Validator(closed(json.loads(api.GetEventType(request).schema)))
        validators[kind].validate(document)

    shown = swell("event-type", "show", "rollout.started")
    assert closed(shown) == validators["rollout.started"].schema
    swell("webhook", "rotate-secret", "ops", "--overlap", "1")
    attempt = swell("webhook", "test", "ops")
    assert attempt["status"] == 200
    first = {line["id"]: line["body"] for line in receiver.lines()}

    def listed() -> bool:
        request = pb.ListDeliveriesRequest(parent=endpoint, filter='state = "SUCCEEDED"')
        return len(api.ListDeliveries(request).deliveries) >= len(first)

    wait_until("the delivery log", 20, listed, 0.3)
    one = swell("webhook", "deliveries", "ops", "--event", "rollout.started")[0]["name"]
    detail = swell("webhook", "deliveries", "ops", "--delivery", one)
    assert detail["attempts"][0]["status"] == 204
    resent = swell("webhook", "resend", "ops", one)["name"].rpartition("/")[2]
    begun = swell("webhook", "get", "ops")["create_time"]
    again = swell("webhook", "replay", "ops", "--from", begun)["name"].rpartition("/")[2]
    for replay in (resent, again):

        def ended(replay: str = replay) -> bool:
            found = api.GetReplay(pb.GetReplayRequest(name=f"{endpoint}/replays/{replay}"))
            return bool(found.state == pb.Replay.STATE_SUCCEEDED)

        wait_until("the replay", 40, ended, 0.1)
    assert swell("webhook", "replay", "ops", "--status", again)["state"] == "STATE_SUCCEEDED"
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
    refused = swell.run("webhook", "replay", "ops", "--only-failed").exception
    assert isinstance(refused, ApiError)
    assert refused.reason == "WRONG_STATE"
    swell("webhook", "enable", "ops")
    swell("webhook", "delete", "ops")
    assert swell("webhook", "list") == []
