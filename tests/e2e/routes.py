"""Every public RPC as its proto declares it, and a well-formed request for each: made from the rules, not by hand.

A new RPC is in the matrix the moment it exists. When no well-formed request can be made for it, that is an error here.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from buf.validate import validate_pb2
from google.protobuf import symbol_database
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.audit.v1 import audit_pb2
from groundswell.options.v1 import access_pb2
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import edge_pb2, rollout_pb2
from groundswell.webhooks.v1 import webhooks_pb2

FILES: Final = {
    "registry": (registry_pb2,),
    "pki": (pki_pb2,),
    "artifacts": (artifacts_pb2,),
    "releases": (releases_pb2,),
    "rollout": (rollout_pb2, edge_pb2),
    "webhooks": (webhooks_pb2,),
}
_ORGANIZATION: Final = "organizations/[a-z][a-z0-9-]{1,40}"
_CLASS: Final = re.compile(r"\[([^\]]+)\](?:\{(\d+)(?:,\d*)?\}|[*+?])?")
_DEEP: Final = 6


@dataclass(frozen=True, slots=True)
class Route:
    """One public RPC."""

    service: str
    """Process that serves it."""
    method: MethodDescriptor

    @property
    def path(self) -> str:
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def access(self) -> access_pb2.Access:
        return self.method.GetOptions().Extensions[access_pb2.access]

    @property
    def streams(self) -> bool:
        return bool(self.method.server_streaming)

    @property
    def id(self) -> str:
        return f"{self.service}.{self.method.name}"


def public_routes() -> Iterator[Route]:
    """Every RPC that a public port serves: all but those of internal services."""
    for service, modules in FILES.items():
        for found in (one for module in modules for one in module.DESCRIPTOR.services_by_name.values()):
            if not found.name.endswith("InternalService"):
                yield from (Route(service, method) for method in found.methods)
        audit = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
        yield from (Route(service, method) for method in audit.methods)


def request_for(route: Route, organization: str) -> Message:
    """A request that passes validation and names resources of the organization (which need not exist)."""
    request = _fill(route.method.input_type, organization, 0)
    path = route.access.resource
    if path:
        _put(request, path, _resource_name(route, path, organization))
    return request


def _resource_name(route: Route, path: str, organization: str) -> str:
    field = _field(route.method.input_type, path)
    pattern = _rules(field).string.pattern
    if not pattern and "." in path:
        # A nested name (Update) has the form that the Get of the same resource asks for.
        kind = re.sub(r"^(Update|Set)", "", route.method.name)
        pattern = _get_pattern(route, kind)
    return from_pattern(pattern, organization) if pattern else f"organizations/{organization}/products/none"


def _get_pattern(route: Route, kind: str) -> str:
    for method in route.method.containing_service.methods:
        if method.name == f"Get{kind}":
            return str(_rules(method.input_type.fields_by_name["name"]).string.pattern)
    raise AssertionError(f"{route.path}: no Get{kind} tells the form of its names")


def _field(descriptor: Descriptor, path: str) -> FieldDescriptor:
    first, _, rest = path.partition(".")
    field = descriptor.fields_by_name[first]
    return _field(field.message_type, rest) if rest else field


def _put(message: Message, path: str, value: str) -> None:
    *parents, last = path.split(".")
    inner: Any = message
    for parent in parents:
        inner = getattr(inner, parent)
    setattr(inner, last, value)


def _rules(field: FieldDescriptor) -> validate_pb2.FieldRules:
    return field.GetOptions().Extensions[validate_pb2.field]


def from_pattern(pattern: str, organization: str) -> str:
    """A text of the form that a name's pattern describes. Names of organizations become the given one."""
    text = pattern.strip("^$").replace(_ORGANIZATION, f"organizations/{organization}")
    text = re.sub(r"\(([^()|]*)(?:\|[^()]*)?\)[?+*]?", r"\1", text)
    text = _CLASS.sub(lambda match: _of_class(match[1]) * int(match[2] or 1), text)
    text = text.replace("\\", "")
    assert re.search(pattern, text), f"{text!r} is not of the form {pattern!r}"
    return text


def _of_class(characters: str) -> str:
    return "a" if "a-" in characters else characters[0]


def _fill(descriptor: Descriptor, organization: str, depth: int) -> Message:
    message = GetMessageClass(descriptor)()
    assert depth < _DEEP, f"{descriptor.full_name} asks for itself"
    for field in descriptor.fields:
        rules = _rules(field)
        if field.is_repeated:
            for _ in range(int(rules.repeated.min_items)):
                _add(message, field, rules, organization, depth)
        elif field.message_type is not None:
            if rules.required:
                getattr(message, field.name).CopyFrom(_message(field, organization, depth))
        elif field.containing_oneof is None or rules.required:
            value = _scalar(field, rules, organization)
            if value is not None:
                setattr(message, field.name, value)
    return message


def _message(field: FieldDescriptor, organization: str, depth: int) -> Message:
    if field.message_type.full_name == "google.protobuf.FieldMask":
        mask = symbol_database.Default().GetSymbol("google.protobuf.FieldMask")()
        mask.paths.append("display_name")
        return mask
    return _fill(field.message_type, organization, depth + 1)


def _add(message: Message, field: FieldDescriptor, rules: Any, organization: str, depth: int) -> None:
    if field.message_type is not None:
        getattr(message, field.name).add().CopyFrom(_message(field, organization, depth))
    else:
        value = _scalar(field, rules.repeated.items, organization)
        getattr(message, field.name).append(value if value is not None else f"organizations/{organization}/x")


def _scalar(field: FieldDescriptor, rules: Any, organization: str) -> Any:
    if rules.ignore == validate_pb2.IGNORE_IF_ZERO_VALUE:
        return str(uuid.uuid4()) if rules.string.uuid else None
    if field.type == FieldDescriptor.TYPE_STRING:
        if rules.string.pattern:
            return from_pattern(rules.string.pattern, organization)
        if rules.string.uuid:
            return str(uuid.uuid4())
        least = max(int(rules.string.min_len), int(rules.string.len))
        return "a" * least if least else None
    if field.type == FieldDescriptor.TYPE_BYTES:
        least = max(int(rules.bytes.min_len), int(rules.bytes.len))
        return b"a" * least if least else None
    if field.type == FieldDescriptor.TYPE_ENUM:
        return 1 if 0 in rules.enum.not_in or rules.required else None
    kind = rules.WhichOneof("type")
    if kind:
        numbers = getattr(rules, kind)
        least = getattr(numbers, "gte", 0) or (getattr(numbers, "gt", 0) + 1 if numbers.HasField("gt") else 0)
        return least or (1 if rules.required else None)
    return 1 if rules.required and field.type != FieldDescriptor.TYPE_BOOL else None
