"""`make reference`: the API reference in docs/reference, from the comments of the protos: every word stands there.

One page a service: its methods with the permission each asks for, then its resources and messages, then enumerations.
`python -m deploy.reference --check` writes nothing and fails when a page is not what the protos say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from buf.validate import validate_pb2
from google.api import field_behavior_pb2
from google.protobuf import descriptor_pb2
from groundswell.options.v1 import access_pb2

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = ROOT / "docs" / "reference"
PACKAGES: Final = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks", "device", "audit")
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6  # field numbers of FileDescriptorProto
_FIELD, _NESTED, _NESTED_ENUM = 2, 3, 4  # of DescriptorProto
_VALUE = 2  # of EnumDescriptorProto and ServiceDescriptorProto
File = descriptor_pb2.FileDescriptorProto
Path_ = tuple[int, ...]


class Comments:
    """What a file says about each of its elements."""

    def __init__(self, file: File) -> None:
        self._texts = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}

    def of(self, path: Path_) -> str:
        """In one line, fit for a table cell."""
        return " ".join(self._texts.get(path, "").split()).replace("|", "\\|")


def pages(image: bytes) -> dict[str, str]:
    """File name and text of every page."""
    files = [file for file in descriptor_pb2.FileDescriptorSet.FromString(image).file if _package(file)]
    written = {f"{name}.md": _page(name, [file for file in files if _package(file) == name]) for name in PACKAGES}
    return {"README.md": _index(files), **written}


def _package(file: File) -> str:
    parts = file.package.split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "groundswell" and parts[1] in PACKAGES else ""


def _index(files: list[File]) -> str:
    lines = ["# API reference", "", "Generated from the comments in `protos/` by `make reference`; do not edit.", ""]
    lines += ["| package | services | what it is |", "|---|---|---|"]
    for name in PACKAGES:
        own = [file for file in files if _package(file) == name and not file.name.endswith("events.proto")]
        services = ", ".join(f"`{service.name}`" for file in own for service in file.service) or "-"
        said = " ".join(Comments(file).of((2,)) for file in own).strip()
        lines.append(f"| [{name}]({name}.md) | {services} | {said} |")
    lines += [
        "",
        "Names follow the AIP style: `parent` and `<resource>_id` create, `name` reads, `update_mask` says what",
        "changes, `etag` guards, `request_id` makes a retry the same command, `page_size`, `page_token` and `filter`",
        "shape a list.",
        "Errors carry `google.rpc.ErrorInfo` with a stable reason and the domain `groundswell`.",
    ]
    return "\n".join(lines) + "\n"


def _page(name: str, files: list[File]) -> str:
    lines = [f"# {name}", "", "Generated from `protos/`; do not edit."]
    for file in sorted(files, key=lambda found: (found.name.endswith("events.proto"), found.name)):
        comments = Comments(file)
        lines += ["", f"## `{file.name}`", "", comments.of((2,)) or "Events."]
        for index, service in enumerate(file.service):
            lines += _service(service, (_SERVICE, index), comments)
        for index, message in enumerate(file.message_type):
            lines += _message(message, message.name, (_MESSAGE, index), comments)
        for index, enum in enumerate(file.enum_type):
            lines += _enum(enum, enum.name, (_ENUM, index), comments)
    return "\n".join(lines) + "\n"


def _service(service: descriptor_pb2.ServiceDescriptorProto, path: Path_, comments: Comments) -> Iterator[str]:
    yield from ("", f"### {service.name}", "", comments.of(path), "")
    yield "| method | request | answer | who may call it | what it does |"
    yield "|---|---|---|---|---|"
    for index, method in enumerate(service.method):
        answer = ("stream of " if method.server_streaming else "") + _short(method.output_type)
        said = comments.of((*path, _VALUE, index))
        yield f"| `{method.name}` | {_short(method.input_type)} | {answer} | {_access(method)} | {said} |"


def _access(method: descriptor_pb2.MethodDescriptorProto) -> str:
    rule = method.options.Extensions[access_pb2.access]
    if rule.permission:
        return f"`{rule.permission}`"
    return "services: " + ", ".join(f"`{caller}`" for caller in rule.callers)


def _message(message: descriptor_pb2.DescriptorProto, title: str, path: Path_, comments: Comments) -> Iterator[str]:
    if message.options.map_entry:
        return
    yield from ("", f"#### {title}", "", comments.of(path))
    if message.field:
        yield from ("", "| field | type | | what it is |", "|---|---|---|---|")
        maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        for index, field in enumerate(message.field):
            yield f"| `{field.name}` | {_type(field, maps)} | {_marks(field)} | {comments.of((*path, _FIELD, index))} |"
    for index, nested in enumerate(message.nested_type):
        yield from _message(nested, f"{title}.{nested.name}", (*path, _NESTED, index), comments)
    for index, enum in enumerate(message.enum_type):
        yield from _enum(enum, f"{title}.{enum.name}", (*path, _NESTED_ENUM, index), comments)


def _enum(enum: descriptor_pb2.EnumDescriptorProto, title: str, path: Path_, comments: Comments) -> Iterator[str]:
    yield from ("", f"#### {title}", "", comments.of(path), "", "| value | number | what it means |", "|---|---|---|")
    for index, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {comments.of((*path, _VALUE, index))} |"


def _short(full_name: str) -> str:
    parts = full_name.lstrip(".").split(".")
    return f"`{'.'.join(part for part in parts if part[:1].isupper())}`"


def _type(field: descriptor_pb2.FieldDescriptorProto, maps: dict[str, Any]) -> str:
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = (_type(part, {}) for part in entry.field)
        return f"map of {key} to {value}"
    if field.type_name:
        name = _short(field.type_name)
    else:
        name = descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return f"repeated {name}" if field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED else name


def _marks(field: descriptor_pb2.FieldDescriptorProto) -> str:
    behaviors = field.options.Extensions[field_behavior_pb2.field_behavior]
    marks = [field_behavior_pb2.FieldBehavior.Name(number).lower().replace("_", " ") for number in behaviors]
    rules = field.options.Extensions[validate_pb2.field]
    if rules.string.max_len:
        marks.append(f"at most {rules.string.max_len} characters")
    if rules.repeated.max_items:
        marks.append(f"at most {rules.repeated.max_items}")
    return ", ".join(marks)


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    wanted = pages((ROOT / "gen" / "image.binpb").read_bytes())
    if "--check" in arguments:
        old = sorted(
            name for name, text in wanted.items() if not (PAGES / name).exists() or (PAGES / name).read_text() != text
        )
        if old:
            print(f"not what the protos say: {', '.join(old)}; run `make reference`", file=sys.stderr)
        return 1 if old else 0
    PAGES.mkdir(parents=True, exist_ok=True)
    for name, text in wanted.items():
        (PAGES / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
