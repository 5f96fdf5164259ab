"""docs/device-api.openapi.yaml says what the gateway does: bodies, answers, every status and every reason."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import rollout_pb2
from jsonschema import Draft202012Validator

from clients.device import CheckIn, Report, Running
from deploy.local.settings import ROOT
from libs.errors import InvalidArgumentError
from libs.resolution.model import Code
from libs.seal import DownloadGrant, seal
from services.gateway.body import parse, reasons_json
from services.gateway.checkin import offer_json
from tests.openapi import DOCUMENT, problems, reasons_by_status

UPPER_SNAKE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
UUID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for value in node.values() for found in references(value)]
    return [found for value in node for found in references(value)] if isinstance(node, list) else []


def test_it_is_whole() -> None:
    assert DOCUMENT["openapi"].startswith("3.1")
    for reference in references(DOCUMENT):
        at: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            at = at[part]
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


# Requests: what the parser takes and what the description takes are the same.


def body(**changes: Any) -> dict[str, Any]:
    return {
        "agent": {"instance": UUID, "boot_id": UUID, "counter": 1},
        "running": {"version": "1.0.0", "slot": "a", "security_version": 1},
        **changes,
    }


def report(**changes: Any) -> dict[str, Any]:
    return {"counter": 1, "attempt": "a", "state": "ACCEPTED", **changes}


GOOD: dict[str, Any] = {
    "least": {"agent": {"instance": UUID, "boot_id": UUID, "counter": 1}, "running": {}},
    "usual": body(),
    "unknown fields": body(weather="fine"),
    "no attempt, said so": body(attempt=None),
    "an attempt": body(attempt={"name": "a", "ask": "go"}),
    "reports": body(reports=[report(), report(counter=2, state="FAILED", code="NO_SPACE", detail="x" * 512)]),
    "attributes and metrics": body(attributes={"board": "b"}, metrics={"t": 41.5, "n": 3}),
    "highest counter": body(agent={"instance": UUID, "boot_id": UUID, "counter": 2**63 - 1}),
}
BAD: dict[str, Any] = {
    "not an object": [],
    "nothing": {},
    "nobody": {"running": {}},
    "counter of zero": body(agent={"instance": UUID, "boot_id": UUID, "counter": 0}),
    "counter too high": body(agent={"instance": UUID, "boot_id": UUID, "counter": 2**63}),
    "counter as text": body(agent={"instance": UUID, "boot_id": UUID, "counter": "1"}),
    "instance is no UUID": body(agent={"instance": "a b", "boot_id": UUID, "counter": 1}),
    "instance ends in a newline": body(agent={"instance": UUID + "\n", "boot_id": UUID, "counter": 1}),
    "unknown state": body(reports=[report(state="EXPLODED")]),
    "a state of the server": body(reports=[report(state="WENT_DARK")]),
    "code in lower case": body(reports=[report(code="no_space")]),
    "no attempt": body(reports=[report(attempt="")]),
    "long detail": body(reports=[report(detail="x" * 513)]),
    "too many reports": body(reports=[report(counter=n + 1) for n in range(65)]),
    "too many attributes": body(attributes={str(n): "" for n in range(33)}),
    "attribute of a number": body(attributes={"a": 1}),
    "metric of text": body(metrics={"a": "1"}),
    "unknown question": body(attempt={"name": "a", "ask": "stop"}),
    "negative security version": body(running={"security_version": -1}),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_the_gateway_takes_is_described(case: str) -> None:
    parse(json.dumps(GOOD[case]).encode())
    assert problems("CheckIn", GOOD[case]) == []


@pytest.mark.parametrize("case", BAD)
def test_what_the_gateway_refuses_is_described_as_wrong(case: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse(json.dumps(BAD[case]).encode())
    assert refused.value.reason in reasons_by_status()[400]
    if case != "instance ends in a newline":  # `$` of a JSON Schema pattern means less in Python than in ECMA-262
        assert problems("CheckIn", BAD[case])


def test_what_the_sdk_says_is_described() -> None:
    said = CheckIn(
        instance=UUID,
        boot_id=UUID,
        counter=7,
        running=Running("1.0.0", "a", 1, "r", "b"),
        attempt="a",
        ask_go=True,
        reports=(Report(6, "a", "FAILED", "NO_SPACE", "x"),),
        attributes={"board": "b"},
        metrics={"t": 1.5},
    )
    assert problems("CheckIn", said.to_json()) == []
    parse(json.dumps(said.to_json()).encode())


# Answers.


def test_an_offer_is_described() -> None:
    grant = DownloadGrant("a", UUID, "ab" * 32, "", 0, 1)
    offer = rollout_pb2.Offer(
        attempt="a",
        kind=rollout_pb2.Attempt.KIND_FORWARD,
        release="r",
        bundle="b",
        version="1.1.0",
        security_version=1,
        statement=b"s",
        signatures=[artifacts_pb2.Signature(key_id="ab" * 32, signature="ab" * 64)],
        lease_s=60,
    )
    offer.binaries.add(
        digest="ab" * 32,
        size=1,
        target="t",
        metadata="{}",
        metadata_digest="cd" * 32,
        link=f"/v1/downloads/{seal(1, bytes(32), grant)}/{'ab' * 32}",
    )
    assert problems("Offer", offer_json(offer)) == []
    reasons = reasons_json([device_pb2.Reason(code="UP_TO_DATE", message="m", subject="s")])
    answer = {
        "server_time": "2026-01-01T00:00:00Z",
        "poll_after_s": 1.0,
        "reports_accepted_through": 0,
        "reasons": json.loads(reasons),
        "answer": "offer",
        "offer": offer_json(offer),
    }
    assert problems("Answer", answer) == []
    assert problems("Answer", answer | {"answer": "none"})
    assert problems("Answer", {**answer, "answer": "go"})


# Reasons.


def said_by(*paths: Path) -> set[str]:
    """Reasons in calls that make an error or a reason."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name.endswith("Error") or name in {"reason", "refuse_identity", "error_reply"}:
                texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                found.update(text for text in texts[:1] if UPPER_SNAKE.fullmatch(text))
    return found


def test_every_reason_of_the_gateway_is_described() -> None:
    refusals = set().union(*reasons_by_status().values())
    known = DOCUMENT["components"]["schemas"]["Reason"]["properties"]["code"]["x-known"]
    said = said_by(*(ROOT / "services/gateway").glob("*.py"), ROOT / "libs/seal/__init__.py")
    assert {"GATEWAY_STALE", "IDENTITY_MISMATCH", "LINK_EXPIRED", "LOOKUP_BUSY"} <= said, "the scan finds them"
    assert said <= refusals | set(known["gateway"])


def test_every_reason_of_resolution_and_of_the_leader_is_described() -> None:
    known = DOCUMENT["components"]["schemas"]["Reason"]["properties"]["code"]["x-known"]
    assert set(known["resolution"]) == {str(code) for code in Code}
    decisions = [ROOT / f"services/rollout/domain/{name}.py" for name in ("admission", "claiming")]
    said = {
        node.value
        for path in decisions
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and UPPER_SNAKE.fullmatch(node.value)
    }
    assert said <= set(known["rollout"]) | set(known["resolution"])


def test_every_reason_of_an_admission_is_described() -> None:
    refusals = set().union(*reasons_by_status().values())
    said = said_by(ROOT / "services/pki/admission.py", ROOT / "services/pki/certificates.py")
    about_cas = {reason for reason in said if reason.startswith(("CA_", "PROOF_"))}
    assert said - about_cas <= refusals, "what a leaf is refused for"


def test_every_reason_why_another_service_may_not_answer_is_described() -> None:
    found = set()
    for path in (ROOT / "libs/eventlog").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UnavailableError":
                found.update(one.value for one in node.args[:1] if isinstance(one, ast.Constant))
    assert {"NOT_CAUGHT_UP", "OVERLOADED"} <= found, "the scan finds them"
    assert found <= reasons_by_status()[503]


def test_every_status_of_the_gateway_is_described() -> None:
    source = (ROOT / "services/gateway/http.py").read_text()
    statuses = {int(text) for text in re.findall(r"error_reply\((\d{3})", source)}
    statuses |= {int(text) for text in re.findall(r'^    "[A-Z_]+": (\d{3}),', source, re.MULTILINE)}
    assert {400, 403, 404, 408, 409, 413, 429, 503} <= statuses
    assert statuses <= reasons_by_status().keys()
