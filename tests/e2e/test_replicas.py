"""Two processes of every service: clients and devices see one installation, whichever of them dies."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from groundswell.registry.v1 import registry_pb2

from clients.sdk import Client
from demo.steps import wait_until
from tests.e2e import logs
from tests.e2e.stack import Stack, running
from tests.e2e.tenant import Rollout, Tenant

CANARY = ("canary-1", "canary-2")
MAIN = ("main-1", "main-2")
STAGES = (("canary", len(CANARY)), ("main", len(MAIN)))


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """An installation of this module's own."""
    with running(replicas=2) as found:
        yield found


def at_replica(stack: Stack, tenant: Tenant, index: int) -> Client:
    """A client that knows one replica of each service only."""
    endpoints = {name: listed.split(",")[index] for name, listed in stack.profile.endpoints.items()}
    return Client(endpoints, tenant.api_key, stack.ca_pem)


def test_each_replica_answers_for_the_whole(stack: Stack, tenant: Tenant) -> None:
    ready = {process.name for process in stack.processes() if process.state == "ready"}
    assert {"registry", "registry-2", "rollout", "rollout-2", "webhooks-2", "pki-2"} <= ready
    request = registry_pb2.CreateProductRequest(
        parent=f"organizations/{tenant.organization}",
        product_id="other",
        product=registry_pb2.Product(),
        request_id=str(uuid.uuid4()),
    )
    with at_replica(stack, tenant, 0) as one, at_replica(stack, tenant, 1) as other:
        made = one.registry.CreateProduct(request)
        assert other.registry.CreateProduct(request) == made, "the same request, wherever it arrives"
        assert other.registry.GetProduct(registry_pb2.GetProductRequest(name=made.name)) == made
    with stack.client(tenant.api_key) as either:
        assert either.registry.GetProduct(registry_pb2.GetProductRequest(name=made.name)) == made


def test_a_rollout_survives_the_death_of_each_replica_in_turn(stack: Stack, tenant: Tenant) -> None:
    tenant.start_agents(*CANARY, *MAIN)
    name = tenant.start_rollout(tenant.bundle("1.1.0"), cohorts=STAGES, soak_s=2)

    tenant.await_attempt(name, "DOWNLOADING", "DOWNLOADED", "INSTALLED")
    died = stack.kill9("rollout")
    tenant.await_rollout(name, "a canary to confirm", lambda now: now.stage_statuses[0].confirmed)
    stack.await_successor("rollout", died)
    died = stack.kill9("rollout-2")
    for service in ("registry", "registry-2"):
        stack.await_successor(service, stack.kill9(service))

    ended = tenant.await_completion(name)
    assert ended.state == Rollout.STATE_COMPLETED
    stack.await_successor("rollout-2", died)
    confirmed = logs.confirmations(stack, tenant.organization, name)
    assert confirmed == {tenant.device_name(device): 1 for device in (*CANARY, *MAIN)}
    wait_until("all devices to report", 30, lambda: versions(tenant) == {"1.1.0"})
    logs.check(stack, tenant.organization, tenant.request_ids)


def versions(tenant: Tenant) -> set[str]:
    return {device.reported.version for device in tenant.devices().values()}
