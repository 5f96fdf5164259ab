"""Decisions about device gateways: who may publish check-ins, proven by an Ed25519 key.

Rules: a key belongs to one gateway of an organization; records of a disabled gateway are refused by the check-in
worker, and so are those signed by the key before a rotation. A gateway is never deleted: its name stands in the log.
"""

from __future__ import annotations

import hashlib
from typing import Final

from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb

from libs.errors import AlreadyExistsError, check_etag
from libs.eventlog import Context, Decision, NewEvent, Public
from libs.names import organization_of
from libs.rpc.access import PLATFORM, not_found
from services.registry.domain import commands as ask
from services.registry.domain import rules
from services.registry.domain.devices import existing, next_etag, refuse_existing
from services.registry.domain.rules import Quotas, check_quota, invalid, timestamp
from services.registry.domain.state import State, find, shelf

GATEWAY_FIELDS: Final = ("disabled", "public_key")


def _gateway_event(gateway: pb.Gateway, change: str) -> NewEvent:
    image = ev.GatewayChanged(gateway=gateway, change=change)
    return NewEvent(
        organization_of(gateway.name), gateway.name, ev.GatewaySaved(gateway=gateway), (Public(gateway.name, image),)
    )


def _free_key_id(state: State, name: str, public_key: bytes) -> str:
    """Id of a key that no gateway of the organization has."""
    if len(public_key) != 32:
        raise invalid("gateway.public_key", "must be a raw Ed25519 public key of 32 bytes")
    key_id = hashlib.sha256(public_key).hexdigest()
    if any(gateway.key_id == key_id for gateway in shelf(state.gateways, name.rpartition("/")[0]).values()):
        raise AlreadyExistsError("GATEWAY_KEY_TAKEN", "another gateway has this key", key_id=key_id)
    return key_id


def _new_gateway(state: State, name: str, public_key: bytes, ctx: Context, quotas: Quotas) -> pb.Gateway:
    gateways = shelf(state.gateways, name.rpartition("/")[0])
    refuse_existing(gateways, name)
    key_id = _free_key_id(state, name, public_key)
    check_quota("gateways", len(gateways), quotas.gateways)
    return pb.Gateway(
        name=name,
        public_key=public_key,
        key_id=key_id,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )


def create(state: State, command: ask.CreateGateway, ctx: Context, quotas: Quotas) -> Decision:
    """A gateway with its public key."""
    if command.parent not in state.organizations:
        raise not_found(command.parent)
    name = f"{command.parent}/gateways/{command.gateway_id}"
    gateway = _new_gateway(state, name, command.gateway.public_key, ctx, quotas)
    return Decision(events=(_gateway_event(gateway, "gateway.created"),), result=gateway)


def update(state: State, command: ask.UpdateGateway, ctx: Context, _quotas: Quotas) -> Decision:
    """Disabled, enabled, or with a new key."""
    current = existing(state.gateways, command.gateway.name)
    check_etag(command.gateway.etag, current.etag, current.name)
    changed = rules.masked(current, command.gateway, command.paths, GATEWAY_FIELDS, "a gateway")
    if changed.public_key != current.public_key:
        changed.key_id = _free_key_id(state, current.name, changed.public_key)
    if changed == current:
        return Decision(result=current)
    changed.etag = next_etag(ctx, current.name)
    return Decision(events=(_gateway_event(changed, "gateway.updated"),), result=changed)


def enrol(state: State, command: ask.EnrolGateway, ctx: Context, quotas: Quotas) -> Decision:
    """The platform's own gateways; they may come before the platform is bootstrapped."""
    name = f"organizations/{PLATFORM}/gateways/{command.gateway_id}"
    found = find(state.gateways, name)
    if found is not None:
        if found.public_key != command.public_key:
            raise AlreadyExistsError(
                "GATEWAY_KEY_CONFLICT",
                f"{name} has another key: give this gateway an id of its own",
                resource=name,
                key_id=found.key_id,
            )
        return Decision(result=found)
    gateway = _new_gateway(state, name, command.public_key, ctx, quotas)
    return Decision(events=(_gateway_event(gateway, "gateway.created"),), result=gateway)
