"""A leader that dies between commit and answer: the retry gets the first answer, and the log holds one command."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import rollout_pb2

from clients.sdk import ApiError
from libs.eventlog import failpoints
from tests.e2e import logs
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant

Ask = Callable[[Any, Tenant, str], Message]


def _cohort(client: Any, tenant: Tenant, request_id: str) -> Message:
    return client.registry.CreateCohort(
        registry_pb2.CreateCohortRequest(
            parent=tenant.product, cohort_id="late", cohort=registry_pb2.Cohort(), request_id=request_id
        )
    )


def _artifact(client: Any, tenant: Tenant, request_id: str) -> Message:
    return client.artifacts.CreateArtifact(
        artifacts_pb2.CreateArtifactRequest(
            parent=tenant.product, artifact_id="late", artifact=artifacts_pb2.Artifact(), request_id=request_id
        )
    )


def _pause(client: Any, tenant: Tenant, request_id: str) -> Message:
    name = tenant.rollout_name("to-1-1-0")
    return client.rollout.PauseRollout(rollout_pb2.PauseRolloutRequest(name=name, request_id=request_id))


ASKS: dict[str, Ask] = {"rollout": _pause, "registry": _cohort, "artifacts": _artifact}


@pytest.mark.parametrize("service", list(ASKS))
def test_a_retry_after_death_between_commit_and_answer_gets_the_first_answer(
    stack: Stack, tenant: Tenant, service: str
) -> None:
    ask = ASKS[service]
    if service == "rollout":
        tenant.start_rollout(tenant.bundle("1.1.0"), cohorts=[("canary", 1)])
    request_id = str(uuid.uuid4())
    before = stack.status(service).pid
    armed = stack.arm(service, failpoints.AFTER_COMMIT_BEFORE_ANSWER_REQUEST)

    with stack.client(tenant.api_key, retry_budget_s=0) as impatient:
        with pytest.raises(ApiError) as unknown:
            ask(impatient, tenant, request_id)
        assert unknown.value.code == "UNAVAILABLE"
    assert not armed.exists(), "the fail point did not act"

    first = ask(tenant.client, tenant, request_id)
    again = ask(tenant.client, tenant, request_id)

    stack.await_successor(service, before)
    assert again == first
    written = [
        entry for entry in logs.entries(stack, service, tenant.organization) if entry.envelope.request_id == request_id
    ]
    assert len(written) == 1
    assert first.etag == str(written[0].envelope.aggregate_version), "the answer is of another version than the event"
    logs.check_commands(stack, [*tenant.request_ids, request_id])
