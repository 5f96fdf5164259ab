"""Bad input, generated for every public RPC from the rules in its proto: refused, the field named, nothing changed.

What a rule cannot say (wrong states, stale etags, digests that differ) has tests of its own beside the services.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from buf.validate import validate_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.e2e import logs
from tests.e2e.ports import Ports
from tests.e2e.routes import Route, public_routes, request_for
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant

ROUTES = tuple(public_routes())
Spoil = Callable[[Message], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to spoil a well-formed request."""

    route: Route
    field: str
    fault: str
    spoil: Spoil

    @property
    def id(self) -> str:
        return f"{self.route.id}: {self.field} {self.fault}"


def _set(field: str, value: object) -> Spoil:
    return lambda request: setattr(request, field, value)


def cases() -> Iterator[Case]:
    for route in ROUTES:
        for field in route.method.input_type.fields:
            rules = field.GetOptions().Extensions[validate_pb2.field]
            for fault, spoil in _faults(field, rules):
                yield Case(route, field.name, fault, spoil)


def _faults(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> Iterator[tuple[str, Spoil]]:
    name = field.name
    if field.is_repeated:
        if rules.repeated.min_items:
            yield "empty", lambda request: request.ClearField(name)
        return
    if field.message_type is not None:
        if rules.required:
            yield "missing", lambda request: request.ClearField(name)
        return
    if field.type == FieldDescriptor.TYPE_STRING:
        if rules.string.pattern:
            yield "of another form", _set(name, "../" + "%2f\N{SNOWMAN} x")
            if rules.ignore != validate_pb2.IGNORE_IF_ZERO_VALUE and not re.search(rules.string.pattern, ""):
                yield "missing", _set(name, "")
        if rules.string.uuid:
            yield "no UUID", _set(name, "once more")
        if rules.string.max_len:
            yield "oversized", _set(name, "a" * (rules.string.max_len + 1))
    elif name == "page_size":
        yield "negative", _set(name, -1)


CASES = tuple(cases())
NOT_OURS = (
    ("page_token", "bm90IG1pbmU\N{SNOWMAN}"),
    ("filter", "name = (SELECT 1"),
    ("filter", "no_such_field = 1"),
)
ABOUT_ONE = ("Get", "Update", "Delete", "Pause", "Resume", "Abort", "Revoke", "Retire")
THERE = ("GetOrganization", "UpdateOrganization", "GetEventType")
"""They name what is there: one's own organization, and event types, of which any may come to be."""


@pytest.fixture(scope="module")
def home(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("home"))
    yield tenant
    tenant.close()


@pytest.mark.timeout(600)
def test_every_broken_rule_is_named_and_changes_nothing(stack: Stack, ports: Ports, home: Tenant) -> None:
    wrong: list[str] = []
    with logs.unchanged(stack, home.organization):
        for case in CASES:
            request = request_for(case.route, home.organization)
            case.spoil(request)
            error = ports.refusal(case.route, request, home.api_key)
            if error is None or (error.code, error.reason) != ("INVALID_ARGUMENT", "INVALID_FIELD"):
                wrong.append(f"{case.id}: {error}")
            elif not any(path.split(".")[0].split("[")[0] == case.field for path in error.fields):
                wrong.append(f"{case.id}: the field is not named: {error} {dict(error.fields)}")
    assert not wrong, "\n".join(wrong)
    print(f"{len(CASES)} cases: {dict(Counter(case.fault for case in CASES))}")


@pytest.mark.timeout(600)
def test_every_list_refuses_tokens_and_filters_that_it_did_not_make(ports: Ports, home: Tenant) -> None:
    wrong: list[str] = []
    for route in ROUTES:
        fields = route.method.input_type.fields_by_name
        for field, value in NOT_OURS:
            if field not in fields:
                continue
            request = request_for(route, home.organization)
            setattr(request, field, value)
            error = ports.refusal(route, request, home.api_key)
            # A list below something that does not exist may say that first.
            if error is None and field == "filter" and value.startswith("no_such"):
                continue  # nothing was listed, so nothing was asked for that field
            if error is None or error.reason not in ("INVALID_FIELD", "RESOURCE_NOT_FOUND"):
                wrong.append(f"{route.id} {field}={value}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(600)
def test_what_does_not_exist_is_not_found_by_any_call_that_names_it(stack: Stack, ports: Ports, home: Tenant) -> None:
    wrong: list[str] = []
    with logs.unchanged(stack, home.organization):
        for route in ROUTES:
            if not route.method.name.startswith(ABOUT_ONE) or route.method.name in THERE:
                continue
            if route.access.resource.endswith("name"):
                error = ports.refusal(route, request_for(route, home.organization), home.api_key)
                if error is None or error.code not in ("NOT_FOUND", "INVALID_ARGUMENT"):
                    wrong.append(f"{route.id}: {error}")
    assert not wrong, "\n".join(wrong)
