"""Facts of other services, as far as grants depend on them, and their fold."""

from __future__ import annotations

from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.rollout.v1 import rollout_pb2
from msgspec.structs import replace

from libs.eventlog.model import Event
from services.rollout.domain.state import BundleFacts, DeviceFacts, ProductFacts, State, duration_ms
from services.rollout.domain.windows import window_of

_Rollout = rollout_pb2.Rollout
_FAILURE_ACTIONS = {
    registry_pb2.DEFAULT_FAILURE_ACTION_PAUSE: _Rollout.FAILURE_ACTION_PAUSE,
    registry_pb2.DEFAULT_FAILURE_ACTION_ROLL_BACK: _Rollout.FAILURE_ACTION_ROLL_BACK,
}


def device_facts(it: registry_pb2.Device) -> DeviceFacts:
    """What grants depend on."""
    return DeviceFacts(
        name=it.name,
        uid=it.uid,
        cohort=it.cohort,
        tags=frozenset(it.tags),
        target=it.target,
        quarantined=it.quarantined,
        retired=it.state == registry_pb2.Device.STATE_RETIRED,
    )


def product_facts(product: registry_pb2.Product) -> ProductFacts:
    """What its policy says: the expected time between check-ins (jitter included), the window, the failure action."""
    policy = product.policy
    interval = duration_ms(policy, "poll_interval", 60_000)
    return ProductFacts(
        poll_ms=interval + duration_ms(policy, "poll_jitter", interval // 10),
        window=window_of(policy),
        failure_action=_FAILURE_ACTIONS.get(policy.default_failure_action, _Rollout.FAILURE_ACTION_PAUSE),
    )


def device_changed(state: State, payload: registry_events.DeviceChanged, _event: Event) -> State:
    """Its newest facts."""
    return replace(state, devices=state.devices.set(payload.device.name, device_facts(payload.device)))


def product_changed(state: State, payload: registry_events.ProductChanged, _event: Event) -> State:
    """Its newest policy."""
    return replace(state, products=state.products.set(payload.product.name, product_facts(payload.product)))


def bundle_changed(state: State, payload: artifacts_events.BundleChanged, _event: Event) -> State:
    """Its newest image."""
    facts = BundleFacts(payload.bundle, tuple(payload.blob_keys))
    return replace(state, bundles=state.bundles.set(payload.bundle.name, facts))


def graph_changed(state: State, payload: releases_events.GraphChanged, _event: Event) -> State:
    """All releases of a cohort; those that are gone are forgotten."""
    names = tuple(it.name for it in payload.releases)
    releases = state.releases
    for gone in set(state.graphs.get(payload.cohort, ())) - set(names):
        releases = releases.delete(gone)
    releases = releases.update({it.name: it for it in payload.releases})
    return replace(state, releases=releases, graphs=state.graphs.set(payload.cohort, names))


def override_changed(state: State, payload: releases_events.BundleOverrideChanged, _event: Event) -> State:
    """Its newest image, or none."""
    name = payload.bundle_override.name
    if not payload.deleted:
        return replace(state, overrides=state.overrides.set(name, payload.bundle_override))
    return replace(state, overrides=state.overrides.delete(name)) if name in state.overrides else state
