"""What gateways and the worker ask; mutual TLS only. High-rate commands have natural keys and no request table."""

from __future__ import annotations

import time
from typing import Any, Final

from google.protobuf.message import Message
from groundswell.rollout.v1 import rollout_pb2, rollout_pb2_grpc

from libs.errors import InvalidArgumentError
from libs.eventlog import Command, Deadline, Runtime, partition_of
from libs.rpc import report_position
from services.rollout.domain import AuthorizeSwitch, AuthorizeSwitches, ClaimOffers, RecordObservations, State
from services.rollout.keys import routing_key
from services.rollout.offers import OfferBuilder

MAX_DEADLINE_S: Final = 10.0


class RolloutInternalServicer(rollout_pb2_grpc.RolloutInternalServiceServicer):
    """See the proto. Method names are gRPC's."""

    def __init__(self, runtime: Runtime[State], offers: OfferBuilder, partitions: int) -> None:
        self._runtime = runtime
        self._offers = offers
        self._partitions = partitions
        self._routing_keys = [routing_key(partition, partitions) for partition in range(partitions)]

    async def _submit(self, organization: str, payload: object, principal: str, context: Any) -> Message | None:
        left = context.time_remaining() if context is not None else None
        deadline = Deadline.after(min(left or MAX_DEADLINE_S, MAX_DEADLINE_S))
        committed = await self._runtime.submit(Command(organization, payload, principal=principal), deadline)
        report_position(committed.token)
        return committed.result

    def _inbox_lag_ms(self, organization: str) -> float:
        return self._runtime.inbox_lag(partition_of(organization, self._partitions)) * 1000

    async def ClaimOffers(  # noqa: N802
        self, request: rollout_pb2.ClaimOffersRequest, context: Any
    ) -> rollout_pb2.ClaimOffersResponse:
        """Grants are in the log before they are answered; then manifests are added and links sealed."""
        command = ClaimOffers(request, self._inbox_lag_ms(request.organization))
        response = await self._submit(request.organization, command, request.gateway, context)
        if not isinstance(response, rollout_pb2.ClaimOffersResponse):
            raise TypeError("the decision has no answer")
        state = self._runtime.snapshot(request.organization).state
        if not isinstance(state, State):
            raise TypeError("not a state of this service")
        now_ms = time.time_ns() // 1_000_000
        for result in response.results:
            if result.HasField("offer"):
                self._offers.complete(result.offer, state, now_ms)
        return response

    async def AuthorizeSwitch(  # noqa: N802
        self, request: rollout_pb2.AuthorizeSwitchRequest, context: Any
    ) -> rollout_pb2.AuthorizeSwitchResponse:
        command = AuthorizeSwitch(request, self._inbox_lag_ms(request.organization))
        return await self._submit(request.organization, command, "gateway", context)  # type: ignore[return-value]

    async def BatchAuthorizeSwitch(  # noqa: N802
        self, request: rollout_pb2.BatchAuthorizeSwitchRequest, context: Any
    ) -> rollout_pb2.BatchAuthorizeSwitchResponse:
        """Decided one by one and committed together."""
        if any(one.organization != request.organization for one in request.requests):
            raise InvalidArgumentError("INVALID_FIELD", "a request is of another organization", field="requests")
        command = AuthorizeSwitches(request, self._inbox_lag_ms(request.organization))
        return await self._submit(request.organization, command, "gateway", context)  # type: ignore[return-value]

    async def RecordObservations(  # noqa: N802
        self, request: rollout_pb2.RecordObservationsRequest, context: Any
    ) -> rollout_pb2.RecordObservationsResponse:
        key = self._routing_key(request.source_partition)
        return await self._submit(key, RecordObservations(request, key), "worker", context)  # type: ignore[return-value]

    async def GetWatermark(  # noqa: N802
        self, request: rollout_pb2.GetWatermarkRequest, _context: Any
    ) -> rollout_pb2.GetWatermarkResponse:
        self._routing_key(request.source_partition)
        state = self._runtime.snapshot_of_partition(request.source_partition).state
        if not isinstance(state, State):
            raise TypeError("not a state of this service")
        through = state.watermarks.get(request.source_partition, -1)
        return rollout_pb2.GetWatermarkResponse(through_position=through)

    def _routing_key(self, partition: int) -> str:
        if partition >= self._partitions:
            raise InvalidArgumentError("INVALID_FIELD", "there is no such partition", field="source_partition")
        return self._routing_keys[partition]
