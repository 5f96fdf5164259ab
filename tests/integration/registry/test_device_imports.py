"""Imports of devices on the real log: broken off by a power cut, and gone on with; each row exactly once."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import grpc
import pytest
from groundswell.registry.v1 import device_imports_pb2 as imports_pb
from groundswell.registry.v1 import registry_pb2 as pb

from clients.sdk import ApiError, Client
from clients.sdk.device_import import DeviceImportJob
from demo.steps import wait_until
from tests.integration.registry.running import Running, Tenant

Image = imports_pb.DeviceImport
Row = imports_pb.DeviceImportRow
WITHIN_S = 90.0
COUNT = 6_000


def client(tenant: Tenant) -> Client:
    settings = tenant.running.settings
    endpoints = {
        name: settings.address(name, "public")
        for name in ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")
    }
    return Client(endpoints, tenant.key, settings.ca, server_name="localhost", retry_budget_s=WITHIN_S)


@pytest.fixture
def tenant(running: Running) -> Tenant:
    return running.organization()


@pytest.fixture
def job(tenant: Tenant) -> Iterator[DeviceImportJob]:
    product = tenant.product().name
    tenant.call("CreateCohort", pb.CreateCohortRequest(parent=product, cohort_id="beta", cohort=pb.Cohort()))
    rows = [Row(identifier=f"SN-{number:06d}", tags=["made"], cohort="beta", target="t1") for number in range(COUNT)]
    with contextlib.closing(client(tenant)) as found:
        yield DeviceImportJob(found, product, "batch", "batch.csv", rows)


def devices(job: DeviceImportJob, filter_: str = "") -> list[pb.Device]:
    request = pb.ListDevicesRequest(parent=job.product, page_size=1000, filter=filter_)
    return list(job.client.pages(job.client.registry.ListDevices, request, "devices"))


@pytest.mark.timeout(300)
def test_an_import_goes_on_after_power_cuts(running: Running, job: DeviceImportJob) -> None:
    job.begin()
    half = job.rows[: COUNT // 2]
    for begin in range(0, len(half), 1_000):
        request = imports_pb.AppendDeviceImportRowsRequest(
            name=job.name, first_row=begin, rows=half[begin : begin + 1_000]
        )
        job.client.registry.AppendDeviceImportRows(request)
    running.restart()
    assert job.get().next_row == COUNT // 2
    # A client that starts anew finds the import and sends only what is missing.
    again = DeviceImportJob(job.client, job.product, job.import_id, job.display_name, job.rows)
    assert again.upload().next_row == COUNT
    image = again.validate()
    assert (image.state, image.problem_count, image.validated_count) == (Image.STATE_VALIDATED, 0, COUNT)
    assert not devices(job)
    begun = job.client.registry.CommitDeviceImport(imports_pb.CommitDeviceImportRequest(name=job.name))
    assert begun.state == Image.STATE_COMMITTING
    for least in (1, COUNT // 2):
        wait_until("some rows to be made", WITHIN_S, lambda least=least: job.get().committed_count >= least, 0.01)
        running.restart()
    done = wait_until("the commit to end", WITHIN_S, lambda: (i := job.get()).state == Image.STATE_COMPLETED and i, 0.1)
    assert (done.created_count, done.failed_count, done.committed_count) == (COUNT, 0, COUNT)
    made = devices(job)
    assert [one.identifier for one in made] == sorted(row.identifier for row in job.rows)
    assert len({one.uid for one in made}) == COUNT
    assert {one.etag for one in made} == {"1"}, "each was written once"
    assert len(devices(job, f'cohort = "{job.product}/cohorts/beta" AND tags : made')) == COUNT


def test_rows_are_appended_over_and_over_and_their_problems_listed(job: DeviceImportJob) -> None:
    job.rows = [*job.rows[:10], Row(identifier="not good", cohort="none"), Row(identifier="SN-000001")]
    job.upload()
    request = imports_pb.AppendDeviceImportRowsRequest(name=job.name, first_row=0, rows=job.rows)
    assert job.client.registry.AppendDeviceImportRows(request).received_count == 12
    request.rows[3].target = "other"
    with pytest.raises(ApiError) as error:
        job.client.registry.AppendDeviceImportRows(request)
    assert (error.value.code, error.value.reason) == ("ALREADY_EXISTS", "IMPORT_ROWS_CONFLICT")
    assert job.validate().problem_count == 2
    assert [(one.row, one.code) for one in job.problems()] == [(10, "INVALID_FIELD"), (11, "DUPLICATE_ROW")]
    every = imports_pb.ListDeviceImportVerdictsRequest(parent=job.name, all_rows=True, page_size=5)
    assert len(list(job.client.pages(job.client.registry.ListDeviceImportVerdicts, every, "verdicts"))) == 12
    with pytest.raises(ApiError) as error:
        job.commit()
    assert (error.value.reason, error.value.metadata["problems"]) == ("IMPORT_HAS_PROBLEMS", "2")
    assert job.commit(skip_problems=True).created_count == 10
    assert len(devices(job)) == 10


def test_a_foreign_import_does_not_exist(running: Running, job: DeviceImportJob) -> None:
    job.begin()
    stranger = running.organization()
    for method, request in (
        ("GetDeviceImport", imports_pb.GetDeviceImportRequest(name=job.name)),
        ("AppendDeviceImportRows", imports_pb.AppendDeviceImportRowsRequest(name=job.name, rows=job.rows[:1])),
        ("ValidateDeviceImport", imports_pb.ValidateDeviceImportRequest(name=job.name)),
        ("ListDeviceImportVerdicts", imports_pb.ListDeviceImportVerdictsRequest(parent=job.name)),
        ("CommitDeviceImport", imports_pb.CommitDeviceImportRequest(name=job.name)),
        ("CancelDeviceImport", imports_pb.CancelDeviceImportRequest(name=job.name)),
        ("DeleteDeviceImport", imports_pb.DeleteDeviceImportRequest(name=job.name)),
    ):
        assert stranger.refused(method, request)[:2] == ("NOT_FOUND", "RESOURCE_NOT_FOUND")
    assert job.get().state == Image.STATE_UPLOADING


def test_t60_a_mixed_batch_is_refused_and_changes_nothing(running: Running, tenant: Tenant) -> None:
    """T60, from outside: own and foreign devices in one call."""
    product = tenant.product().name
    own = tenant.call("CreateDevice", pb.CreateDeviceRequest(parent=product, device_id="SN-1", device=pb.Device())).name
    other = running.organization()
    theirs = other.call(
        "CreateDevice", pb.CreateDeviceRequest(parent=other.product().name, device_id="SN-1", device=pb.Device())
    ).name
    batch = pb.BatchUpdateDevicesRequest(parent=product, names=[own, theirs], add_tags=["mine"])
    absent = pb.BatchUpdateDevicesRequest(parent=product, names=[own, f"{theirs}-none"], add_tags=["mine"])
    assert [tenant.refused("BatchUpdateDevices", request)[:2] for request in (batch, absent)] == [
        ("NOT_FOUND", "RESOURCE_NOT_FOUND")
    ] * 2
    assert not tenant.call("GetDevice", pb.GetDeviceRequest(name=own)).tags
    assert not other.call("GetDevice", pb.GetDeviceRequest(name=theirs)).tags
    batch.names[:] = [own]
    batch.request_id = str(uuid.uuid4())
    first = tenant.call("BatchUpdateDevices", batch)
    assert list(first.devices[0].tags) == ["mine"]
    assert tenant.call("BatchUpdateDevices", batch) == first


def test_too_much_at_once_is_refused(tenant: Tenant) -> None:
    product = tenant.product().name
    many = pb.BatchUpdateDevicesRequest(parent=product, names=[f"{product}/devices/{n}" for n in range(501)])
    assert tenant.refused("BatchUpdateDevices", many)[0] == grpc.StatusCode.INVALID_ARGUMENT.name
    huge = imports_pb.CreateDeviceImportRequest(
        parent=product, device_import_id="x", device_import=Image(row_count=100_001)
    )
    assert tenant.refused("CreateDeviceImport", huge)[:2] == ("INVALID_ARGUMENT", "INVALID_FIELD")
