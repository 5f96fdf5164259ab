"""Two processes of one registry on the real broker: either answers everything, and one may die at any time."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import grpc
import pytest
from groundswell.registry.v1 import registry_pb2 as pb

from demo.steps import wait_until
from tests.integration.registry.running import Running, Tenant, reason, replicas
from tests.servers import Servers

HAND_OVER_S = 5.0
"""After `kill -9`, with a session of three seconds; the machine of a test run may be busy with other things."""
BUSY = 3.0

Two = tuple[Running, Running]
pytestmark = pytest.mark.timeout(240)  # six starts and stops of processes, beside whatever else runs


@pytest.fixture
def two(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with replicas(servers, tmp_path_factory.mktemp("replicas"), 2) as (first, second):
        yield first, second


def at(tenant: Tenant, replica: Running) -> Tenant:
    """The same caller, at another replica."""
    there = Tenant(replica, tenant.organization, tenant.key)
    there.tokens = tenant.tokens
    return there


def product(tenant: Tenant, product_id: str) -> pb.CreateProductRequest:
    return pb.CreateProductRequest(
        parent=tenant.name, product_id=product_id, product=pb.Product(), request_id=str(uuid.uuid4())
    )


def leads(replica: Running, partition: int) -> bool:
    """By its log: the last thing it said of the partition."""
    said = [line for line in replica.log.read_text().splitlines() if f"registry/{partition}" in line]
    return bool(said) and f"leading registry/{partition}" in said[-1]


def leads_any(replica: Running) -> bool:
    return any(leads(replica, partition) for partition in range(4))


def insist(tenant: Tenant, request: pb.CreateProductRequest, within_s: float) -> tuple[pb.Product, float]:
    """What a client does: the same request again while it is told to; (answer, seconds)."""
    began = time.monotonic()
    refused: list[str] = []
    while time.monotonic() - began < within_s:
        try:
            found: pb.Product = tenant.call("CreateProduct", request)
        except grpc.RpcError as error:
            refused.append(reason(error)[0])
            time.sleep(0.05)
        else:
            assert set(refused) <= {"UNAVAILABLE"}
            return found, time.monotonic() - began
    raise AssertionError(f"no successor in {within_s:g} s: {refused[-3:]}")


def test_either_replica_answers_everything(two: Two) -> None:
    wait_until("both to lead something", 60.0, lambda: all(leads_any(replica) for replica in two), 0.1)
    tenants = [two[0].organization() for _ in range(4)]
    for tenant in tenants:
        made = [at(tenant, replica).call("CreateProduct", product(tenant, f"p{n}")) for n, replica in enumerate(two)]
        for replica in two:
            listed = at(tenant, replica).call("ListProducts", pb.ListProductsRequest(parent=tenant.name))
            assert list(listed.products) == made
        status, why, _ = at(tenant, two[1]).refused("CreateProduct", product(tenant, "p0"))
        assert (status, why) == ("ALREADY_EXISTS", "ALREADY_EXISTS")


def test_the_leader_dies_and_the_other_answers_the_same_request(two: Two) -> None:
    first, second = two
    tenants = [first.organization() for _ in range(4)]
    requests = [product(tenant, "before") for tenant in tenants]
    answers = [tenant.call("CreateProduct", request) for tenant, request in zip(tenants, requests, strict=True)]
    first.process.kill()
    first.process.wait(10)
    spent = [insist(at(tenant, second), product(tenant, "after"), HAND_OVER_S * BUSY)[1] for tenant in tenants]
    for tenant, request, answer in zip(tenants, requests, answers, strict=True):
        there = at(tenant, second)
        assert there.call("CreateProduct", request) == answer, "a retry is answered from the log"
        listed = there.call("ListProducts", pb.ListProductsRequest(parent=tenant.name)).products
        assert sorted(one.name for one in listed) == [f"{tenant.name}/products/after", f"{tenant.name}/products/before"]
    print(f"hand-over after kill -9: {sum(spent):.2f} s (aim {HAND_OVER_S:g})")
    assert sum(spent) < HAND_OVER_S * BUSY
    first.restart()
    wait_until("the survivor to share again", 60.0, lambda: leads_any(first), 0.1)
    for tenant in tenants:
        insist(at(tenant, first), product(tenant, "again"), 15.0)


def test_a_replica_that_stops_hands_over_at_once(two: Two) -> None:
    first, second = two
    tenant = first.organization()
    began = time.monotonic()
    first.process.terminate()
    assert first.process.wait(20) == 0
    insist(at(tenant, second), product(tenant, "after"), 15.0)
    print(f"hand-over after SIGTERM, its own stop included: {time.monotonic() - began:.2f} s")
    first.restart()
