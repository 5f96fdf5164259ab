"""What a product's policy may say, and products, cohorts and organizations that change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.duration_pb2 import Duration
from groundswell.registry.v1 import registry_pb2 as pb

from libs.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from services.registry import domain as ask
from tests.unit.registry.world import ORG, PUMP, World, furnished

MINUTE, HOUR, DAY = 60, 3600, 24 * 3600


@pytest.fixture
def world() -> World:
    return furnished()


def span(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def change(path: str, **fields: object) -> ask.UpdateProduct:
    policy = pb.ConfigurationPolicy(**fields)  # type: ignore[arg-type]
    return ask.UpdateProduct(pb.Product(name=PUMP, policy=policy), (path,))


def window(**changes: object) -> pb.MaintenanceWindow:
    return pb.MaintenanceWindow(**{"start_minute": 120, "length": span(4 * HOUR), **changes})  # type: ignore[arg-type]


GOOD: list[tuple[str, dict[str, object]]] = [
    ("policy.poll_interval", {"poll_interval": span(0.1)}),
    ("policy.poll_interval", {"poll_interval": span(7 * DAY)}),
    ("policy.poll_jitter", {"poll_jitter": span(0)}),
    ("policy.required_signatures", {"required_signatures": 16}),
    ("policy.required_binary_signatures", {"required_binary_signatures": 2}),
    ("policy.default_failure_action", {"default_failure_action": pb.DEFAULT_FAILURE_ACTION_ROLL_BACK}),
    ("policy.maintenance_window", {"maintenance_window": window(time_zone="Europe/Vienna", weekdays=[7, 1])}),
    ("policy.maintenance_window", {"maintenance_window": window(length=span(15 * MINUTE), start_minute=1439)}),
    ("policy.maintenance_window", {"maintenance_window": window(length=span(DAY))}),
    ("policy.certificate_policy", {"certificate_policy": pb.CertificatePolicy(validity=span(400 * DAY))}),
    (
        "policy.certificate_policy",
        {
            "certificate_policy": pb.CertificatePolicy(
                expired_leaf=pb.CertificatePolicy.EXPIRED_LEAF_STRICT, validity=span(30 * DAY), expiring_soon=span(DAY)
            )
        },
    ),
    (
        "policy.automatic_quarantine",
        {"automatic_quarantine": pb.AutomaticQuarantine(failures=3, burst=5, window=span(180), block_for=span(DAY))},
    ),
]
BAD: list[tuple[str, dict[str, object], str]] = [
    ("policy.poll_interval", {"poll_interval": span(0.05)}, "poll_interval"),
    ("policy.poll_interval", {"poll_interval": span(8 * DAY)}, "poll_interval"),
    ("policy.poll_jitter", {"poll_jitter": span(-1)}, "poll_jitter"),
    ("policy.required_signatures", {"required_signatures": 17}, "required_signatures"),
    ("policy.required_binary_signatures", {"required_binary_signatures": 17}, "required_binary_signatures"),
    ("policy.default_failure_action", {"default_failure_action": 9}, "default_failure_action"),
    ("policy.maintenance_window", {"maintenance_window": window(time_zone="Mars/Olympus")}, "time_zone"),
    ("policy.maintenance_window", {"maintenance_window": window(time_zone="../../etc/passwd")}, "time_zone"),
    ("policy.maintenance_window", {"maintenance_window": window(time_zone="/etc/localtime")}, "time_zone"),
    ("policy.maintenance_window", {"maintenance_window": window(start_minute=1440)}, "start_minute"),
    ("policy.maintenance_window", {"maintenance_window": window(length=span(15 * MINUTE - 1))}, "length"),
    ("policy.maintenance_window", {"maintenance_window": window(length=span(DAY + 1))}, "length"),
    ("policy.maintenance_window", {"maintenance_window": pb.MaintenanceWindow(start_minute=5)}, "length"),
    ("policy.maintenance_window", {"maintenance_window": window(weekdays=[0])}, "weekdays"),
    ("policy.maintenance_window", {"maintenance_window": window(weekdays=[8])}, "weekdays"),
    ("policy.maintenance_window", {"maintenance_window": window(weekdays=[2, 2])}, "weekdays"),
    ("policy.certificate_policy", {"certificate_policy": pb.CertificatePolicy(validity=span(HOUR))}, "validity"),
    ("policy.certificate_policy", {"certificate_policy": pb.CertificatePolicy(validity=span(401 * DAY))}, "validity"),
    (
        "policy.certificate_policy",
        {"certificate_policy": pb.CertificatePolicy(expiring_soon=span(365 * DAY))},
        "expiring_soon",
    ),
    ("policy.certificate_policy", {"certificate_policy": pb.CertificatePolicy(expired_leaf=7)}, "expired_leaf"),  # type: ignore[arg-type]
    ("policy.automatic_quarantine", {"automatic_quarantine": pb.AutomaticQuarantine()}, "automatic_quarantine"),
    ("policy.automatic_quarantine", {"automatic_quarantine": pb.AutomaticQuarantine(burst=5)}, "window"),
    (
        "policy.automatic_quarantine",
        {"automatic_quarantine": pb.AutomaticQuarantine(failures=1, window=span(5))},
        "window",
    ),
    ("policy.automatic_quarantine", {"automatic_quarantine": pb.AutomaticQuarantine(failures=101)}, "failures"),
    (
        "policy.automatic_quarantine",
        {"automatic_quarantine": pb.AutomaticQuarantine(burst=2, window=span(0.5))},
        "window",
    ),
    (
        "policy.automatic_quarantine",
        {"automatic_quarantine": pb.AutomaticQuarantine(failures=1, block_for=span(366 * DAY))},
        "block_for",
    ),
]


@pytest.mark.parametrize(("path", "fields"), GOOD)
def test_every_field_is_settable_alone(world: World, path: str, fields: dict[str, object]) -> None:
    before = world.state.products[f"{ORG}/products"][PUMP]
    changed = world.do(change(path, **fields))
    (name, value) = next(iter(fields.items()))
    stored = getattr(changed.policy, name)
    if name == "maintenance_window":
        assert list(stored.weekdays) == sorted(value.weekdays)  # type: ignore[attr-defined]
        assert stored.length == value.length  # type: ignore[attr-defined]
    else:
        assert stored == value
    changed.policy.ClearField(name)
    expected = pb.ConfigurationPolicy()
    expected.CopyFrom(before.policy)
    expected.ClearField(name)  # type: ignore[arg-type]
    assert changed.policy == expected
    assert world.changes()[-1] == "product.updated"


@pytest.mark.parametrize(("path", "fields", "field"), BAD)
def test_a_bad_value_is_named(world: World, path: str, fields: dict[str, object], field: str) -> None:
    error = world.refused(InvalidArgumentError, "INVALID_FIELD", change(path, **fields))
    assert error.field.startswith("product.policy.")
    assert error.field.endswith(field)


def test_a_field_is_unset_by_a_mask_without_a_value(world: World) -> None:
    world.do(change("policy.maintenance_window", maintenance_window=window()))
    assert not world.do(change("policy.maintenance_window")).policy.HasField("maintenance_window")


@pytest.mark.parametrize("path", ["policy.nothing", "policy.maintenance_window.length", "archived", "uid", "policy."])
def test_a_mask_names_what_a_product_lets_be_changed(world: World, path: str) -> None:
    world.refused(InvalidArgumentError, "INVALID_FIELD", change(path))


def test_a_product_is_archived_when_its_devices_are_retired(world: World) -> None:
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device()))
    world.do(ask.CreateDevice(f"{ORG}/products/valve", "SN-2", pb.Device()))
    error = world.refused(FailedPreconditionError, "PRODUCT_HAS_DEVICES", ask.ArchiveProduct(PUMP, "", archived=True))
    assert error.metadata["devices"] == "1"
    world.do(ask.RetireDevice(device.name, ""))
    world.refused(AbortedError, "ETAG_MISMATCH", ask.ArchiveProduct(PUMP, "9", archived=True))
    archived = world.do(ask.ArchiveProduct(PUMP, "1", archived=True))
    assert (archived.archived, archived.etag, world.changes()[-1]) == (True, "2", "product.archived")
    assert world.do(ask.ArchiveProduct(PUMP, "", archived=True)).etag == "2"
    for command in (ask.CreateDevice(PUMP, "SN-3", pb.Device()), ask.CreateCohort(PUMP, "late", pb.Cohort())):
        world.refused(FailedPreconditionError, "WRONG_STATE", command)
    assert not world.do(ask.ArchiveProduct(PUMP, "2", archived=False)).archived
    assert world.changes()[-1] == "product.unarchived"
    assert world.do(ask.CreateDevice(PUMP, "SN-3", pb.Device())).identifier == "SN-3"
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", ask.ArchiveProduct(f"{ORG}/products/none", "", archived=True))


def test_a_cohort_has_labels_and_a_description(world: World) -> None:
    name = f"{PUMP}/cohorts/canary"
    wanted = pb.Cohort(name=name, description="our own offices", labels={"ring": "0", "region": ""}, etag="1")
    changed = world.do(ask.UpdateCohort(wanted, ("description", "labels")))
    assert (changed.description, dict(changed.labels), changed.etag) == (wanted.description, dict(wanted.labels), "2")
    assert world.changes()[-1] == "cohort.updated"
    world.refused(AbortedError, "ETAG_MISMATCH", ask.UpdateCohort(wanted, ("description",)))
    wanted.etag = ""
    assert world.do(ask.UpdateCohort(wanted, ("labels",))).etag == "2"
    fewer = world.do(ask.UpdateCohort(pb.Cohort(name=name, labels={"ring": "1"}), ("labels",)))
    assert dict(fewer.labels) == {"ring": "1"}


@pytest.mark.parametrize(
    "cohort",
    [
        pb.Cohort(labels={"": "x"}),
        pb.Cohort(labels={"a b": "x"}),
        pb.Cohort(labels={"a": "x\ny"}),
        pb.Cohort(labels={f"k{n}": "" for n in range(65)}),
        pb.Cohort(description="x" * 257),
        pb.Cohort(display_name="x" * 129),
    ],
)
def test_what_a_cohort_says_is_checked(world: World, cohort: pb.Cohort) -> None:
    cohort.name = f"{PUMP}/cohorts/canary"
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.UpdateCohort(cohort, ("*",)))
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.CreateCohort(PUMP, "new", cohort))


@pytest.mark.parametrize(
    "command",
    [
        lambda: ask.UpdateOrganization(pb.Organization(name="organizations/none"), ("display_name",)),
        lambda: ask.UpdateCohort(pb.Cohort(name=f"{PUMP}/cohorts/none"), ("description",)),
    ],
)
def test_what_is_not_there_cannot_change(world: World, command: Callable[[], object]) -> None:
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", command())


def test_an_organization_is_renamed(world: World) -> None:
    wanted = pb.Organization(name=ORG, display_name="Acme Heating", etag="1")
    changed = world.do(ask.UpdateOrganization(wanted, ("display_name",)))
    assert (changed.display_name, changed.etag, world.changes()[-1]) == ("Acme Heating", "2", "organization.updated")
    world.refused(AbortedError, "ETAG_MISMATCH", ask.UpdateOrganization(wanted, ("display_name",)))
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.UpdateOrganization(pb.Organization(name=ORG), ("uid",)))
