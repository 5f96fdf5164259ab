"""The public servicer of rollouts: requests to commands, reads from committed state."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from groundswell.artifacts.v1 import artifacts_pb2, artifacts_pb2_grpc
from groundswell.releases.v1 import releases_pb2, releases_pb2_grpc
from groundswell.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from redis.asyncio import Redis
from redis.exceptions import RedisError

from libs.errors import InvalidArgumentError, UnavailableError
from libs.eventlog import Deadline, Runtime
from libs.names import organization_of, product_of
from libs.rpc import page_in_order, snapshot_state, submit
from services.rollout import views
from services.rollout.domain import Control, CreateRollout, RetryAttempt, State
from services.rollout.domain.control import check_plan
from services.rollout.domain.stages import managed_release
from services.rollout.keys import seen_key
from services.rollout.seen import read
from services.rollout.tasks import asked

WATCH_PAUSE_S: Final = 0.1
"""Between two updates of a watcher, at least: a fleet changes faster than anybody reads."""
WATCH_LEAST_S: Final = 1.0
"""A watcher hears at least this often, so that it sees how far observations are behind."""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    """See the proto. Method names are gRPC's."""

    def __init__(
        self,
        runtime: Runtime[State],
        artifacts: artifacts_pb2_grpc.ArtifactsInternalServiceStub,
        releases: releases_pb2_grpc.ReleasesInternalServiceStub,
        redis: Redis,
        env: str,
    ) -> None:
        self._runtime = runtime
        self._artifacts = artifacts
        self._releases = releases
        self._redis = redis
        self._env = env

    async def CreateRollout(self, request: rollout_pb2.CreateRolloutRequest, context: Any) -> rollout_pb2.Rollout:
        """Look at the bundle, dry-run every cohort, store a draft."""
        name = f"{request.parent}/rollouts/{request.rollout_id}"
        check_plan(request.parent, request.rollout)
        if product_of(request.rollout.bundle) != request.parent:
            raise InvalidArgumentError("INVALID_FIELD", "the bundle must be of the product", field="rollout.bundle")
        bundle = await asked(self._artifacts.LookupBundle(artifacts_pb2.GetBundleRequest(name=request.rollout.bundle)))
        if name not in snapshot_state(self._runtime, name).rollouts:
            # Of one that exists, a retry wants the first answer: its own releases are no conflict.
            await self._dry_run(name, request.rollout, bundle)
        command = CreateRollout(name, request.rollout, bundle)
        return await submit(self._runtime, organization_of(name), command, request, context)  # type: ignore[no-any-return]

    async def _dry_run(self, name: str, asked_for: rollout_pb2.Rollout, bundle: artifacts_pb2.Bundle) -> None:
        """Every cohort must be able to take the release, before anything is stored."""
        image = rollout_pb2.Rollout()
        image.CopyFrom(asked_for)
        image.name, image.version, image.security_version = name, bundle.version, bundle.security_version
        image.version_requirement = asked_for.version_requirement or f"< {bundle.version}"
        cohorts: set[str] = set()
        for index, stage in enumerate(image.stages):
            if stage.cohort in cohorts:
                continue
            cohorts.add(stage.cohort)
            request = releases_pb2.CreateManagedReleaseRequest(
                release=managed_release(image, index), validate_only=True
            )
            await asked(self._releases.CreateManagedRelease(request))

    async def GetRollout(self, request: rollout_pb2.GetRolloutRequest, _context: Any) -> rollout_pb2.Rollout:
        return views.rollout_of(snapshot_state(self._runtime, request.name), request.name, _now_ms())

    async def ListRollouts(
        self, request: rollout_pb2.ListRolloutsRequest, _context: Any
    ) -> rollout_pb2.ListRolloutsResponse:
        state = snapshot_state(self._runtime, request.parent)
        found, token = page_in_order(views.rollouts_of(state, request.parent), request)
        return rollout_pb2.ListRolloutsResponse(rollouts=found, next_page_token=token)

    async def _control(self, verb: str, request: Any, context: Any) -> rollout_pb2.Rollout:
        devices = tuple(getattr(request, "devices", ()))
        command = Control(verb, request.name, request.etag, getattr(request, "reason", ""), devices)
        return await submit(self._runtime, organization_of(request.name), command, request, context)  # type: ignore[no-any-return]

    async def StartRollout(self, request: rollout_pb2.StartRolloutRequest, context: Any) -> rollout_pb2.Rollout:
        return await self._control("start", request, context)

    async def PauseRollout(self, request: rollout_pb2.PauseRolloutRequest, context: Any) -> rollout_pb2.Rollout:
        return await self._control("pause", request, context)

    async def ResumeRollout(self, request: rollout_pb2.ResumeRolloutRequest, context: Any) -> rollout_pb2.Rollout:
        return await self._control("resume", request, context)

    async def AbortRollout(self, request: rollout_pb2.AbortRolloutRequest, context: Any) -> rollout_pb2.Rollout:
        return await self._control("abort", request, context)

    async def RollBackRollout(self, request: rollout_pb2.RollBackRolloutRequest, context: Any) -> rollout_pb2.Rollout:
        return await self._control("roll_back", request, context)

    async def AdvanceStage(self, request: rollout_pb2.AdvanceStageRequest, context: Any) -> rollout_pb2.Rollout:
        return await self._control("advance", request, context)

    async def RetryRollout(self, request: rollout_pb2.RetryRolloutRequest, context: Any) -> rollout_pb2.Rollout:
        return await self._control("retry", request, context)

    async def KillRollout(self, request: rollout_pb2.KillRolloutRequest, context: Any) -> rollout_pb2.Rollout:
        return await self._control("kill", request, context)

    async def WatchRollout(
        self, request: rollout_pb2.WatchRolloutRequest, context: Any
    ) -> AsyncIterator[rollout_pb2.WatchRolloutResponse]:
        """The rollout at every change, and once a second how far observations are behind, until it is cancelled.

        It waits for the log and polls nothing. Any replica serves it; one that can read no more ends it with
        UNAVAILABLE, and the watcher asks again: the first answer is the rollout as it is.
        """
        organization = organization_of(request.name)
        shown: object = None
        while not context.cancelled():
            state = snapshot_state(self._runtime, request.name)
            shown = state.rollouts.get(request.name)
            behind = time.time() - state.append_ms / 1000 if state.append_ms else 0.0
            yield rollout_pb2.WatchRolloutResponse(
                rollout=views.rollout_of(state, request.name, _now_ms()),
                observation_lag_s=max(0.0, behind),
                stream_time_s=state.stream_ms / 1000,
                recent_attempts=views.recent_attempts(state, request.name),
            )
            least = Deadline.after(WATCH_LEAST_S)
            await asyncio.sleep(WATCH_PAUSE_S)
            while not least.expired and self._shown_still(request.name, shown):
                with contextlib.suppress(UnavailableError):
                    await self._runtime.changed(organization, least)

    def _shown_still(self, name: str, shown: object) -> bool:
        """Whether a rollout is the one that was shown last. Raises when it cannot be read any more."""
        return snapshot_state(self._runtime, name).rollouts.get(name) is shown

    async def ListAttempts(
        self, request: rollout_pb2.ListAttemptsRequest, _context: Any
    ) -> rollout_pb2.ListAttemptsResponse:
        state = snapshot_state(self._runtime, request.parent)
        found, token = page_in_order(views.attempts_of(state, request.parent), request)
        return rollout_pb2.ListAttemptsResponse(attempts=found, next_page_token=token)

    async def RetryAttempt(self, request: rollout_pb2.RetryAttemptRequest, context: Any) -> rollout_pb2.Attempt:
        command = RetryAttempt(request.name, request.reason)
        return await submit(self._runtime, organization_of(request.name), command, request, context)  # type: ignore[no-any-return]

    async def ListHeldDevices(
        self, request: rollout_pb2.ListHeldDevicesRequest, _context: Any
    ) -> rollout_pb2.ListHeldDevicesResponse:
        state = snapshot_state(self._runtime, request.parent)
        found, token = page_in_order(views.held_in(state, request.parent), request)
        return rollout_pb2.ListHeldDevicesResponse(held_devices=found, next_page_token=token)

    async def ExplainDevice(
        self, request: rollout_pb2.ExplainDeviceRequest, _context: Any
    ) -> rollout_pb2.ExplainDeviceResponse:
        answer = views.explanation(snapshot_state(self._runtime, request.name), request.name)
        try:
            stored = await self._redis.get(seen_key(self._env, request.name))
        except RedisError:
            stored = None  # last-seen is best effort; the grants are in the log
        seen = read(stored) if isinstance(stored, bytes) else None
        if seen is not None:
            answer.last_seen_time.FromMilliseconds(seen.at_ms)
            if seen.receipt is not None:
                answer.last_check_in.CopyFrom(seen.receipt)
        return answer
