"""Outgoing work of the leader: releases are made, retracted, disabled and handed over in their own service.

Every call is idempotent by the derived name of the release, so that a new leader may simply repeat it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import grpc
from groundswell.releases.v1 import releases_pb2, releases_pb2_grpc

from libs.errors import GroundswellError, UnavailableError
from libs.eventlog import Command, Task, TaskContext, TaskHandler
from libs.rpc import error_of
from services.rollout.domain import StageReleaseMade, StageReleaseRefused
from services.rollout.domain.stages import TASK_CREATE, TASK_DISABLE, TASK_HAND_OVER, TASK_RETRACT

log = logging.getLogger(__name__)

_FOR_EVER: Final = frozenset({"INVALID_ARGUMENT", "FAILED_PRECONDITION", "ALREADY_EXISTS", "NOT_FOUND"})
"""What no repetition will change."""


async def asked(call: Any) -> Any:
    """The answer of another service; its refusal as our error, with its reason."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from error


def handlers(releases: releases_pb2_grpc.ReleasesInternalServiceStub) -> Mapping[str, TaskHandler]:
    """One handler for each kind of task."""

    async def create(task: Task, _ctx: TaskContext) -> Command | None:
        request = releases_pb2.CreateManagedReleaseRequest.FromString(task.payload)
        try:
            made = await asked(releases.CreateManagedRelease(request))
        except GroundswellError as error:
            if isinstance(error, UnavailableError) or error.status not in _FOR_EVER:
                raise
            log.warning("release %s refused: %s", request.release.name, error)
            return Command(task.organization, StageReleaseRefused(task.task_id, error.reason))
        if made.bundle != request.release.bundle or made.rollout != request.release.rollout:
            return Command(task.organization, StageReleaseRefused(task.task_id, "RELEASE_CONFLICT"))
        return Command(task.organization, StageReleaseMade(task.task_id, made.name))

    def simple(call: Callable[[releases_pb2.RetractReleaseRequest], Any]) -> TaskHandler:
        async def run(task: Task, _ctx: TaskContext) -> Command | None:
            try:
                await asked(call(releases_pb2.RetractReleaseRequest.FromString(task.payload)))
            except GroundswellError as error:
                if error.status != "NOT_FOUND":
                    raise
            return None

        return run

    return {
        TASK_CREATE: create,
        TASK_RETRACT: simple(releases.RetractRelease),
        TASK_DISABLE: simple(releases.DisableManagedRelease),
        TASK_HAND_OVER: simple(releases.ReleaseManagement),
    }
