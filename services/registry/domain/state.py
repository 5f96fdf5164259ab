"""What the registry knows of one partition: the fold of its events.

Resources lie on shelves: collection name (`organizations/acme/products`) → resource name → after-image, so that a list
and a quota cost what the collection holds and not what the partition holds. Messages in state are never mutated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import immutables
from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb

from libs.eventlog import Event
from libs.names import organization_of
from libs.rpc.access import KeyRecord
from libs.rpc.directory import key_record

M = TypeVar("M", bound=Message)
Shelves = immutables.Map[str, immutables.Map[str, M]]


@dataclass(frozen=True, slots=True)
class State:
    """See the module."""

    organizations: immutables.Map[str, pb.Organization] = field(default_factory=immutables.Map)
    products: Shelves[pb.Product] = field(default_factory=immutables.Map)
    cohorts: Shelves[pb.Cohort] = field(default_factory=immutables.Map)
    devices: Shelves[pb.Device] = field(default_factory=immutables.Map)
    members: Shelves[pb.Member] = field(default_factory=immutables.Map)
    api_keys: Shelves[pb.ApiKey] = field(default_factory=immutables.Map)
    gateways: Shelves[pb.Gateway] = field(default_factory=immutables.Map)
    identifiers: immutables.Map[tuple[str, str], str] = field(default_factory=immutables.Map)
    """(organization id, device identifier) → device name; retired devices keep theirs for good."""
    active_devices: immutables.Map[str, int] = field(default_factory=immutables.Map)
    """Organization id → devices that are not retired."""


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


def known_key(state: State, name: str) -> KeyRecord | None:
    """An API key with its member's role."""
    key = find(state.api_keys, name)
    member = find(state.members, key.member) if key is not None else None
    return key_record(key, member) if key is not None and member is not None else None


def evolve(state: State, event: Event) -> State:
    """The state after an event."""
    name = event.resource
    match event.payload:
        case ev.DeviceSaved(device=device):
            return _with_device(state, name, device)
        case ev.OrganizationCreated(organization=organization):
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
    return state


def is_active(device: pb.Device | None) -> bool:
    """Whether it exists and is not retired."""
    return device is not None and device.state != pb.Device.STATE_RETIRED


def _with_device(state: State, name: str, device: pb.Device) -> State:
    organization = organization_of(name)
    change = is_active(device) - is_active(find(state.devices, name))
    return replace(
        state,
        devices=put(state.devices, name, device),
        identifiers=state.identifiers.set((organization, device.identifier), name),
        active_devices=state.active_devices.set(organization, state.active_devices.get(organization, 0) + change),
    )
