"""The gRPC servicer of webhooks: it translates, and adds the secrets that no log may hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from groundswell.webhooks.v1 import webhooks_pb2 as pb
from groundswell.webhooks.v1 import webhooks_pb2_grpc

from libs.errors import FailedPreconditionError, NotFoundError
from libs.eventlog import Runtime
from libs.names import last_segment, organization_of, parent_of
from libs.rpc import page, snapshot_state, submit
from services.webhooks import views
from services.webhooks.model import (
    MAX_OVERLAP_MS,
    CancelReplay,
    CreateEndpoint,
    DeleteEndpoint,
    Place,
    RecordVerification,
    ResendOne,
    RotateSecret,
    StartReplay,
    State,
    UpdateEndpoint,
    find,
    generation_of,
    shown,
)
from services.webhooks.policy import UrlPolicy
from services.webhooks.replays import find_replay
from services.webhooks.signing import Signer
from services.webhooks.verify import Asks

Starts = Callable[[str], Awaitable[tuple[tuple[Place, int], ...]]]
"""Ends of the source logs that hold an organization's records, now."""
SETTABLE: Final = (
    "event_types",
    "products",
    "cohorts",
    "ca_pem",
    "payload_version",
    "verification",
    "ordering",
    "max_per_second",
)
"""Fields that a caller may set at creation, besides the URL."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the servicer is made of."""

    runtime: Runtime[State]
    policy: UrlPolicy
    signer: Signer
    verifier: Asks
    starts: Starts


class WebhooksServicer(webhooks_pb2_grpc.WebhooksServiceServicer):
    """Public API."""

    def __init__(self, parts: Parts) -> None:
        self._runtime = parts.runtime
        self._policy = parts.policy
        self._signer = parts.signer
        self._verifier = parts.verifier
        self._starts = parts.starts

    # Endpoints.

    async def CreateWebhookEndpoint(self, request: Any, context: Any) -> pb.CreateWebhookEndpointResponse:
        """Create an endpoint; the secret is derived, so that a retry answers with the same one.

        Its events begin with those committed after the call began; they wait until the endpoint is verified.
        """
        wanted = pb.WebhookEndpoint(
            name=f"{request.parent}/webhookEndpoints/{request.webhook_endpoint_id}",
            url=self._policy.normal_form(request.webhook_endpoint.url),
            **{name: getattr(request.webhook_endpoint, name) for name in SETTABLE},
        )
        organization = organization_of(request.parent)
        command = CreateEndpoint(wanted, await self._starts(organization))
        stored: pb.CreateWebhookEndpointResponse = await submit(self._runtime, organization, command, request, context)
        # A copy: what is answered is also what the log's fold holds, and must stay without the secret.
        answer = pb.CreateWebhookEndpointResponse()
        answer.CopyFrom(stored)
        answer.secret.secret = self._secret_of(answer.webhook_endpoint)
        return answer

    async def GetWebhookEndpoint(self, request: Any, context: Any) -> pb.WebhookEndpoint:
        return shown(find(snapshot_state(self._runtime, request.name), request.name))

    async def ListWebhookEndpoints(self, request: Any, context: Any) -> pb.ListWebhookEndpointsResponse:
        state = snapshot_state(self._runtime, request.parent)
        prefix = f"{request.parent}/webhookEndpoints/"
        mine = ((name, shown(found)) for name, found in state.endpoints.items() if name.startswith(prefix))
        found, token = page(mine, request)
        return pb.ListWebhookEndpointsResponse(webhook_endpoints=found, next_page_token=token)

    async def UpdateWebhookEndpoint(self, request: Any, context: Any) -> pb.WebhookEndpoint:
        paths = tuple(request.update_mask.paths)
        wanted = pb.WebhookEndpoint()
        wanted.CopyFrom(request.webhook_endpoint)
        if "url" in paths:
            wanted.url = self._policy.normal_form(wanted.url)
        organization = organization_of(wanted.name)
        updated: pb.WebhookEndpoint = await submit(
            self._runtime, organization, UpdateEndpoint(wanted, paths), request, context
        )
        return updated

    async def DeleteWebhookEndpoint(self, request: Any, context: Any) -> Any:
        command = DeleteEndpoint(request.name, request.etag)
        return await submit(self._runtime, organization_of(request.name), command, request, context)

    async def VerifyWebhookEndpoint(self, request: Any, context: Any) -> pb.WebhookEndpoint:
        """Asked outside the log, decided in it: what was asked about another URL counts for nothing."""
        endpoint = find(snapshot_state(self._runtime, request.name), request.name)
        image = endpoint.image
        if endpoint.active:
            return shown(endpoint)
        _refuse_disabled(image)
        problem = await self._verifier.ask(image)
        command = RecordVerification(image.name, image.uid, image.url, problem)
        verified = await submit(self._runtime, organization_of(request.name), command, request, context)
        return verified or shown(find(snapshot_state(self._runtime, request.name), request.name))

    async def TestWebhookEndpoint(self, request: Any, context: Any) -> pb.DeliveryAttempt:
        image = find(snapshot_state(self._runtime, request.name), request.name).image
        _refuse_disabled(image)
        return await self._verifier.test_fire(image)

    async def RotateWebhookSecret(self, request: Any, context: Any) -> pb.RotateWebhookSecretResponse:
        overlap_ms = request.overlap.ToMilliseconds() if request.HasField("overlap") else MAX_OVERLAP_MS
        command = RotateSecret(request.name, overlap_ms, request.etag)
        stored = await submit(self._runtime, organization_of(request.name), command, request, context)
        answer = pb.RotateWebhookSecretResponse()
        answer.CopyFrom(stored)
        answer.secret.secret = self._secret_of(answer.webhook_endpoint)
        return answer

    def _secret_of(self, image: pb.WebhookEndpoint) -> str:
        return self._signer.keys(image.name, image.uid, generation_of(image)).shown_secret

    # Deliveries.

    async def ListDeliveries(self, request: Any, context: Any) -> pb.ListDeliveriesResponse:
        """Deliveries that wait or are dead, and the latest that were made."""
        endpoint = find(snapshot_state(self._runtime, request.parent), request.parent)
        found, token = page(views.deliveries(request.parent, endpoint).items(), request)
        return pb.ListDeliveriesResponse(
            deliveries=[views.without_attempts(each) for each in found], next_page_token=token
        )

    async def GetDelivery(self, request: Any, context: Any) -> pb.Delivery:
        parent = parent_of(request.name)
        endpoint = find(snapshot_state(self._runtime, request.name), parent)
        found = views.deliveries(parent, endpoint).get(request.name)
        if found is None:
            raise NotFoundError("RESOURCE_NOT_FOUND", f"{request.name} is not kept", resource=request.name)
        return found

    async def ResendDelivery(self, request: Any, context: Any) -> pb.Replay:
        command = ResendOne(request.name)
        started: pb.Replay = await submit(self._runtime, organization_of(request.name), command, request, context)
        return started

    async def ReplayDeliveries(self, request: Any, context: Any) -> pb.Replay:
        organization = organization_of(request.parent)
        wanted = pb.Replay(
            name=f"{request.parent}/replays/{request.replay_id}",
            ranges=request.ranges,
            event_types=request.event_types,
            only_failed=request.only_failed,
        )
        for name in ("start_time", "end_time"):
            if request.HasField(name):
                getattr(wanted, name).CopyFrom(getattr(request, name))
        command = StartReplay(wanted, await self._starts(organization))
        started: pb.Replay = await submit(self._runtime, organization, command, request, context)
        return started

    async def GetReplay(self, request: Any, context: Any) -> pb.Replay:
        return find_replay(snapshot_state(self._runtime, request.name), request.name)

    async def ListReplays(self, request: Any, context: Any) -> pb.ListReplaysResponse:
        endpoint = find(snapshot_state(self._runtime, request.parent), request.parent)
        found, token = page(endpoint.replays.items(), request)
        return pb.ListReplaysResponse(replays=found, next_page_token=token)

    async def CancelReplay(self, request: Any, context: Any) -> pb.Replay:
        command = CancelReplay(request.name)
        ended: pb.Replay = await submit(self._runtime, organization_of(request.name), command, request, context)
        return ended

    # Catalogue.

    async def ListEventTypes(self, request: Any, context: Any) -> pb.ListEventTypesResponse:
        version = views.check_version(request.payload_version)
        every: Sequence[tuple[str, pb.EventType]] = list(views.catalogue(version, whole=request.with_schemas))
        found, token = page(every, request)
        return pb.ListEventTypesResponse(event_types=found, next_page_token=token)

    async def GetEventType(self, request: Any, context: Any) -> pb.EventType:
        """A type that the catalogue does not describe is answered too, in general words: it may be delivered."""
        version = views.check_version(request.payload_version)
        return views.event_type(last_segment(request.name), version, whole=True)


def _refuse_disabled(image: pb.WebhookEndpoint) -> None:
    if image.state == pb.WebhookEndpoint.STATE_DISABLED:
        state = pb.WebhookEndpoint.State.Name(image.state)
        raise FailedPreconditionError(
            "WRONG_STATE", f"{image.name} is disabled: enable it first", resource=image.name, state=state
        )
