"""The domain of the rollout leader: one entry for every command, foreign fact and timer. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.message import Message
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.releases.v1 import events_pb2 as releases_events

from libs.eventlog.model import Context, Decision, Event, Foreign, TimerFired
from services.rollout.domain import stages
from services.rollout.domain.claiming import authorize_switch, authorize_switches, claim_offers
from services.rollout.domain.commands import (
    AuthorizeSwitch,
    AuthorizeSwitches,
    ClaimOffers,
    Control,
    CreateRollout,
    RecordObservations,
    RetryAttempt,
    StageReleaseMade,
    StageReleaseRefused,
)
from services.rollout.domain.control import control, create, retry_attempt
from services.rollout.domain.draft import Draft
from services.rollout.domain.evolve import EVENT_TYPES, evolve
from services.rollout.domain.facts import device_facts, product_facts
from services.rollout.domain.state import State
from services.rollout.domain.stream import record_observations


def decide(state: State, command: object, ctx: Context) -> Decision:
    """Events, or a refusal that changes nothing."""
    draft = Draft(state, ctx)
    match command:
        case ClaimOffers():
            return draft.decision(claim_offers(draft, command))
        case AuthorizeSwitch():
            return draft.decision(authorize_switch(draft, command.request, command.inbox_lag_ms))
        case AuthorizeSwitches():
            return draft.decision(authorize_switches(draft, command))
        case RecordObservations():
            return draft.decision(record_observations(draft, command))
        case Foreign():
            _take_in(draft, command)
        case CreateRollout():
            return draft.decision(create(draft, command))
        case Control():
            return draft.decision(control(draft, command))
        case RetryAttempt():
            return draft.decision(retry_attempt(draft, command))
        case StageReleaseMade(task_id, release):
            draft.closed.append(task_id)
            stages.release_made(draft, *stages.stage_of_task(task_id), release)
            stages.settle(draft)
        case StageReleaseRefused(task_id, code):
            draft.closed.append(task_id)
            stages.release_refused(draft, *stages.stage_of_task(task_id), code)
            stages.settle(draft)
        case TimerFired(kind=stages.TIMER_SWEEP, payload=payload):
            stages.sweep(draft, payload.decode())
            stages.settle(draft)
        case _:
            raise TypeError(f"no rule for {type(command).__name__}")
    return draft.decision()


def _take_in(draft: Draft, fact: Foreign) -> None:
    """Copy a foreign fact into the own log when it changes anything here."""
    it, state = fact.payload, draft.state
    match it:
        case registry_events.DeviceChanged():
            news = state.devices.get(it.device.name) != device_facts(it.device)
        case registry_events.ProductChanged():
            news = state.products.get(it.product.name) != product_facts(it.product)
        case artifacts_events.BundleChanged():
            known = state.bundles.get(it.bundle.name)
            news = known is None or known.bundle != it.bundle or known.blob_keys != tuple(it.blob_keys)
        case releases_events.GraphChanged():
            news = [state.releases.get(each.name) for each in it.releases] != list(it.releases) or len(
                state.graphs.get(it.cohort, ())
            ) != len(it.releases)
        case releases_events.BundleOverrideChanged():
            news = True
        case _:
            news = False
    if news:
        draft.emit(fact.resource, it, organization=fact.organization)


class RolloutDomain:
    """See libs.eventlog.model.Domain."""

    service: str = "rollout"
    event_types: Sequence[type[Message]] = EVENT_TYPES
    sources: Mapping[str, Sequence[type[Message]]] = {
        "registry": (
            registry_events.OrganizationChanged,
            registry_events.ProductChanged,
            registry_events.CohortChanged,
            registry_events.DeviceChanged,
            registry_events.MemberChanged,
            registry_events.ApiKeyChanged,
            registry_events.GatewayChanged,
            registry_events.RoleChanged,
        ),
        "artifacts": (artifacts_events.SigningKeyChanged, artifacts_events.BundleChanged),
        "releases": (releases_events.GraphChanged, releases_events.BundleOverrideChanged),
    }

    def initial_state(self, partition: int) -> State:
        return State(partition=partition)

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        return decide(state, command, ctx)

    def evolve(self, state: State, event: Event) -> State:
        return evolve(state, event)
