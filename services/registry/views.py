"""Lists that are walked, not sorted: devices by the index that their filter allows, verdicts row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from groundswell.registry.v1 import device_imports_pb2 as imports_pb
from groundswell.registry.v1 import registry_pb2 as pb

from libs.names import organization_of
from libs.rpc import parse_filter
from services.registry.domain import State
from services.registry.domain.imports import OK, UNCHANGED, is_unchanged
from services.registry.domain.rules import invalid, wrong_state
from services.registry.domain.state import Upload, shelf

Image = imports_pb.DeviceImport


def devices(state: State, request: pb.ListDevicesRequest) -> Callable[[str], Iterator[tuple[str, pb.Device]]]:
    """Devices after a name, in order: at most those of the shortest index that the filter allows."""
    collection = f"{request.parent}/devices"
    found = shelf(state.devices, collection)
    names = state.index.shortest(collection, parse_filter(request.filter))
    return lambda after: ((name, found[name]) for name in names.after(after))


def verdicts(
    state: State, image: Image, *, all_rows: bool
) -> Callable[[str], Iterator[tuple[str, imports_pb.DeviceImportVerdict]]]:
    """Verdicts after a row, in order; all of them only between the dry run and the commit."""
    upload = state.uploads.get(image.name, Upload())
    if all_rows and image.state != Image.STATE_VALIDATED:
        raise wrong_state(image.name, "has verdicts of all rows only between the dry run and the commit")

    def walk(after: str) -> Iterator[tuple[str, imports_pb.DeviceImportVerdict]]:
        begin = 0
        if after:
            if not after.isdecimal():
                raise invalid("page_token", "is not one that this server gave out")
            begin = int(after) + 1
        for row in range(begin, image.row_count):
            verdict = upload.problems.get(row) or (_good(state, upload, image, row) if all_rows else None)
            if verdict is not None:
                yield f"{row:06d}", verdict

    return walk


def _good(state: State, upload: Upload, image: Image, row: int) -> imports_pb.DeviceImportVerdict:
    same = is_unchanged(state, upload, row, organization_of(image.name))
    identifier = upload.rows[row].identifier
    return imports_pb.DeviceImportVerdict(row=row, identifier=identifier, code=UNCHANGED if same else OK)
