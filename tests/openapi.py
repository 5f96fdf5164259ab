"""The published description of the device API, as something that requests and answers can be held against."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from deploy.local.settings import ROOT

PATH = ROOT / "docs/device-api.openapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(PATH.read_text())


@cache
def _validator(schema: str) -> Draft202012Validator:
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    return Draft202012Validator(whole)


def problems(schema: str, value: object) -> list[str]:
    """What keeps a value from being what the description says; empty when nothing does."""
    return [f"{error.json_path}: {error.message}" for error in _validator(schema).iter_errors(value)]


def reasons_by_status() -> dict[int, set[str]]:
    """Every reason that may come with a status, whatever the operation."""
    found: dict[int, set[str]] = {}
    for path in DOCUMENT["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                found.setdefault(int(status), set()).update(_resolved(response).get("x-reasons", ()))
    return found


def problems_of_exchange(status: int, body: Any, headers: dict[str, str]) -> list[str]:
    """The same for a whole answer to a check-in."""
    responses = DOCUMENT["paths"]["/v1/checkin"]["post"]["responses"]
    if str(status) not in responses:
        return [f"status {status} is not described"]
    if status == 200:
        return problems("Answer", body)
    response = _resolved(responses[str(status)])
    found = problems("Refusal", body)
    if not found and body["error"]["reason"] not in response["x-reasons"]:
        found.append(f"{status} {body['error']['reason']} is not described")
    wanted = [name for name in response.get("headers", {}) if name.lower() not in headers]
    return [*found, *(f"{status} has no {name}" for name in wanted)]


def _resolved(response: dict[str, Any]) -> dict[str, Any]:
    reference = response.get("$ref")
    if reference is None:
        return response
    found: dict[str, Any] = DOCUMENT["components"]["responses"][reference.rpartition("/")[2]]
    return found
