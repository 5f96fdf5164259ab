"""What the registry knows of one partition: the fold of its events.

Resources lie on shelves: collection name (`organizations/acme/products`) → resource name → after-image, so that a list
and a quota cost what the collection holds and not what the partition holds. Messages in state are never mutated.
"""

from __future__ import annotations

from typing import Final, TypeVar

import immutables
import msgspec
from google.protobuf.message import Message
from groundswell.registry.v1 import device_imports_pb2 as imports_pb
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb
from msgspec.structs import replace

from libs.eventlog import Event
from libs.names import organization_of, product_of
from libs.rpc.access import KeyRecord
from libs.rpc.directory import key_record
from services.registry.domain.index import DeviceIndex

M = TypeVar("M", bound=Message)
Shelves = immutables.Map[str, immutables.Map[str, M]]

ENDED: Final = frozenset({imports_pb.DeviceImport.STATE_COMPLETED, imports_pb.DeviceImport.STATE_CANCELLED})
_JUDGING: Final = frozenset({imports_pb.DeviceImport.STATE_VALIDATING, imports_pb.DeviceImport.STATE_COMMITTING})
PROBLEMS_KEPT: Final = 1_000
"""Problems that an import keeps once it has ended."""


class Failures(msgspec.Struct, frozen=True, gc=False):
    """What automatic quarantine knows of a device."""

    attempt: str
    """Counted last: an attempt counts once."""
    in_a_row: int
    recent_ms: tuple[int, ...]


class Upload(msgspec.Struct, frozen=True, gc=False):
    """Rows of an import."""

    rows: immutables.Map[int, imports_pb.DeviceImportRow] = msgspec.field(default_factory=immutables.Map)
    first_of: immutables.Map[str, int] = msgspec.field(default_factory=immutables.Map)
    """Identifier → the lowest row that names it; every other one is a duplicate."""
    problems: immutables.Map[int, imports_pb.DeviceImportVerdict] = msgspec.field(default_factory=immutables.Map)
    size: int = 0
    """Bytes of the rows."""


class State(msgspec.Struct, frozen=True, gc=False):
    """See the module."""

    organizations: immutables.Map[str, pb.Organization] = msgspec.field(default_factory=immutables.Map)
    products: Shelves[pb.Product] = msgspec.field(default_factory=immutables.Map)
    cohorts: Shelves[pb.Cohort] = msgspec.field(default_factory=immutables.Map)
    devices: Shelves[pb.Device] = msgspec.field(default_factory=immutables.Map)
    members: Shelves[pb.Member] = msgspec.field(default_factory=immutables.Map)
    api_keys: Shelves[pb.ApiKey] = msgspec.field(default_factory=immutables.Map)
    gateways: Shelves[pb.Gateway] = msgspec.field(default_factory=immutables.Map)
    roles: Shelves[pb.Role] = msgspec.field(default_factory=immutables.Map)
    imports: Shelves[imports_pb.DeviceImport] = msgspec.field(default_factory=immutables.Map)
    uploads: immutables.Map[str, Upload] = msgspec.field(default_factory=immutables.Map)
    """Import name → its rows, until it has ended, and the problems found in them."""
    index: DeviceIndex = msgspec.field(default_factory=DeviceIndex)
    failures: immutables.Map[str, Failures] = msgspec.field(default_factory=immutables.Map)
    """Device name → failed attempts since the last success, where automatic quarantine counts them."""
    identifiers: immutables.Map[tuple[str, str], str] = msgspec.field(default_factory=immutables.Map)
    """(organization id, device identifier) → device name; retired devices keep theirs for good."""
    active_devices: immutables.Map[str, int] = msgspec.field(default_factory=immutables.Map)
    """Organization id, and product name → devices that are not retired."""


def shelf(shelves: Shelves[M], collection: str) -> immutables.Map[str, M]:
    """All resources of a collection."""
    return shelves.get(collection) or immutables.Map()


def find(shelves: Shelves[M], name: str) -> M | None:
    """A resource by its name."""
    return shelf(shelves, name.rpartition("/")[0]).get(name)


def put(shelves: Shelves[M], name: str, message: M) -> Shelves[M]:
    """The shelves with a resource's new after-image."""
    collection = name.rpartition("/")[0]
    return shelves.set(collection, shelf(shelves, collection).set(name, message))


def drop(shelves: Shelves[M], name: str) -> Shelves[M]:
    """The shelves without a resource."""
    collection = name.rpartition("/")[0]
    return shelves.set(collection, shelf(shelves, collection).delete(name))


def known_key(state: State, name: str) -> KeyRecord | None:
    """An API key with its member's role."""
    key = find(state.api_keys, name)
    member = find(state.members, key.member) if key is not None else None
    if key is None or member is None:
        return None
    return key_record(key, member, find(state.roles, member.role))


def evolve(state: State, event: Event) -> State:
    """The state after an event."""
    name = event.resource
    match event.payload:
        case ev.DeviceSaved(device=device):
            return _with_device(state, name, device)
        case ev.OrganizationCreated(organization=organization) | ev.OrganizationSaved(organization=organization):
            return replace(state, organizations=state.organizations.set(name, organization))
        case ev.ProductSaved(product=product):
            return replace(state, products=put(state.products, name, product))
        case ev.CohortSaved(cohort=cohort):
            return replace(state, cohorts=put(state.cohorts, name, cohort))
        case ev.MemberSaved(member=member):
            return replace(state, members=put(state.members, name, member))
        case ev.ApiKeySaved(api_key=api_key):
            return replace(state, api_keys=put(state.api_keys, name, api_key))
        case ev.GatewaySaved(gateway=gateway):
            return replace(state, gateways=put(state.gateways, name, gateway))
        case ev.MemberRemoved():
            return replace(state, members=drop(state.members, name))
        case ev.RoleSaved(role=role):
            return replace(state, roles=put(state.roles, name, role))
        case ev.RoleDeleted():
            return replace(state, roles=drop(state.roles, name))
        case ev.DeviceFailuresCounted() as counted:
            return _with_failures(state, counted)
    return _evolve_import(state, event)


def _evolve_import(state: State, event: Event) -> State:
    name = event.resource
    match event.payload:
        case ev.DeviceImportRowsAppended() as appended:
            return _with_rows(state, name, appended)
        case ev.DeviceImportAdvanced(device_import=image, problems=problems):
            upload = state.uploads.get(name, Upload())
            with upload.problems.mutate() as known:
                for problem in problems:
                    known[problem.row] = problem
                upload = replace(upload, problems=known.finish())
            return _with_import(replace(state, uploads=state.uploads.set(name, upload)), name, image)
        case ev.DeviceImportSaved(device_import=image):
            return _with_import(state, name, image)
        case ev.DeviceImportDeleted():
            uploads = state.uploads.delete(name) if name in state.uploads else state.uploads
            return replace(state, imports=drop(state.imports, name), uploads=uploads)
    return state


def _with_rows(state: State, name: str, appended: ev.DeviceImportRowsAppended) -> State:
    upload = state.uploads.get(name, Upload())
    with upload.rows.mutate() as rows, upload.first_of.mutate() as first_of:
        for index, row in zip(appended.indexes, appended.rows, strict=True):
            rows[index] = row
            first_of[row.identifier] = min(index, first_of.get(row.identifier, index))
        size = upload.size + sum(row.ByteSize() for row in appended.rows)
        upload = replace(upload, rows=rows.finish(), first_of=first_of.finish(), size=size)
    return _with_import(replace(state, uploads=state.uploads.set(name, upload)), name, appended.device_import)


def _with_import(state: State, name: str, image: imports_pb.DeviceImport) -> State:
    """An import that has ended keeps its problems, a bounded number of them, and no rows."""
    uploads = state.uploads
    upload = uploads.get(name)
    if upload is not None and image.state != _state_of(state, name) and image.state in _JUDGING:
        # A new judgement begins: what the one before it found is void.
        uploads = uploads.set(name, replace(upload, problems=immutables.Map()))
    if image.state in ENDED and upload is not None:
        kept = immutables.Map({row: upload.problems[row] for row in sorted(upload.problems)[:PROBLEMS_KEPT]})
        uploads = uploads.set(name, Upload(problems=kept))
    return replace(state, imports=put(state.imports, name, image), uploads=uploads)


def _state_of(state: State, name: str) -> int:
    image = find(state.imports, name)
    return image.state if image is not None else 0


def _with_failures(state: State, counted: ev.DeviceFailuresCounted) -> State:
    known = Failures(counted.attempt, counted.failures, tuple(counted.recent_ms))
    return replace(state, failures=state.failures.set(counted.device, known))


def is_active(device: pb.Device | None) -> bool:
    """Whether it exists and is not retired."""
    return device is not None and device.state != pb.Device.STATE_RETIRED


def _with_device(state: State, name: str, device: pb.Device) -> State:
    organization = organization_of(name)
    before = find(state.devices, name)
    identifiers, active = state.identifiers, state.active_devices
    if before is None:
        identifiers = identifiers.set((organization, device.identifier), name)
    change = is_active(device) - is_active(before)
    if change:
        for holder in (organization, product_of(name)):
            active = active.set(holder, active.get(holder, 0) + change)
    return replace(
        state,
        devices=put(state.devices, name, device),
        identifiers=identifiers,
        active_devices=active,
        index=state.index.moved(name, before, device),
    )
