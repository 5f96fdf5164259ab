"""A device's identities on disk, and what it reads of its own certificate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from clients.device.certificate import JITTER, RENEW_AFTER, Life, life_of, read_life
from clients.device.errors import ConfigError, StateError
from clients.device.identity import CERTIFICATE, Files, IdentityStore
from tests.unit.pki.factory import DAY, Ca, der, pem

FACTORY = Ca()


@pytest.mark.parametrize(
    ("begin", "end"),
    [(-DAY, DAY), (timedelta(0), timedelta(seconds=30)), (-DAY, timedelta(days=365 * 40)), (-DAY, 400 * DAY)],
)
def test_a_life_is_read_as_the_certificate_library_reads_it(begin: timedelta, end: timedelta) -> None:
    leaf = FACTORY.leaf("SN-0042", begin=begin, end=end, uris=["urn:a:b"])
    life = life_of(der(leaf))
    assert life == Life("SN-0042", leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp())


def test_names_and_chains(tmp_path: Path) -> None:
    chain = tmp_path / "chain.pem"
    chain.write_text("a comment\n" + pem(FACTORY.leaf("first")) + FACTORY.pem)
    assert read_life(chain).common_name == "first"
    assert life_of(der(Ca(name=x509.Name([])).certificate)).common_name == ""
    assert life_of(der(FACTORY.leaf("é"))).common_name == "é"


def test_garbage_is_refused_with_a_reason(tmp_path: Path) -> None:
    whole = der(FACTORY.leaf("SN-1"))
    for cut in (0, 1, 5, 40, len(whole) // 2):
        with pytest.raises((ValueError, IndexError)):
            life_of(whole[:cut])
    bad = tmp_path / "bad.pem"
    bad.write_text("-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigError) as refused:
        read_life(bad)
    assert refused.value.reason == "TLS_FILES"


def test_a_fleet_made_in_one_hour_does_not_renew_in_one_hour() -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    year = 365 * 86_400
    times = sorted(Life(f"SN-{number}", begin, begin + year).renew_at() for number in range(1000))
    assert times[0] >= begin + RENEW_AFTER * year
    assert times[-1] <= begin + (RENEW_AFTER + JITTER) * year
    busiest = max(sum(1 for one in times if hour <= one < hour + 3600) for hour in times)
    assert busiest < 20
    assert Life("SN-1", begin, begin + year).renew_at() == Life("SN-1", begin, begin + year).renew_at()


@pytest.fixture
def factory(tmp_path: Path) -> Files:
    files = Files(tmp_path / "device.pem", tmp_path / "device.key")
    files.certificate.write_text(pem(FACTORY.leaf("SN-1")))
    files.key.write_text("key")
    return files


def reopened(tmp_path: Path, factory: Files) -> IdentityStore:
    return IdentityStore(tmp_path / "identity", factory)


def test_every_step_is_what_it_was_after_a_restart(tmp_path: Path, factory: Files) -> None:
    store = reopened(tmp_path, factory)
    assert (store.current, store.announced, store.following) == (factory, None, None)
    folder = store.begin()
    assert reopened(tmp_path, factory).announced is None, "a key alone counts for nothing"
    store.announce(folder)
    assert reopened(tmp_path, factory).announced == folder
    store.stored()
    again = reopened(tmp_path, factory)
    assert (again.announced, again.current) == (None, factory)
    assert again.following == Files(folder / CERTIFICATE, folder / "key.pem")
    store.confirmed()
    again = reopened(tmp_path, factory)
    assert (again.current, again.following) == (Files(folder / CERTIFICATE, folder / "key.pem"), None)
    following = again.begin()
    assert following != folder
    again.announce(following)
    again.stored()
    again.confirmed()
    assert not folder.exists()
    assert factory.certificate.exists()


def test_what_was_given_up_is_gone_and_its_number_not_used_while_it_counts(tmp_path: Path, factory: Files) -> None:
    store = reopened(tmp_path, factory)
    first = store.begin()
    assert store.begin() != first
    store.announce(first)
    store.drop()
    assert (store.current, store.announced) == (factory, None)
    assert not first.exists()


def test_a_torn_file_is_refused(tmp_path: Path, factory: Files) -> None:
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "identity.json").write_text("{")
    with pytest.raises(StateError):
        reopened(tmp_path, factory)


def test_another_factory_certificate_counts_from_then_on(tmp_path: Path, factory: Files) -> None:
    store = reopened(tmp_path, factory)
    folder = store.begin()
    store.announce(folder)
    store.stored()
    store.confirmed()
    factory.certificate.write_text(pem(FACTORY.leaf("SN-1")))
    assert reopened(tmp_path, factory).current == factory
    factory.certificate.unlink()
    assert reopened(tmp_path, factory).current == Files(folder / CERTIFICATE, folder / "key.pem")
