"""The contract of a key store, run against both adapters, and what only files can get wrong."""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from libs.keystore import DirectoryKeyStore, KeyStore, KeyStoreError, MemoryKeyStore, new_key


def folder_with_kek(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    kek = path / "kek"
    kek.write_bytes(os.urandom(32))
    kek.chmod(0o600)
    return path


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> KeyStore:
    return MemoryKeyStore() if request.param == "memory" else DirectoryKeyStore(folder_with_kek(tmp_path / "keys"))


def never() -> bytes:
    raise AssertionError("an existing key must not be made again")


def test_a_key_is_made_once_and_never_changes(store: KeyStore) -> None:
    assert store.get("webhook") is None
    made = store.get_or_create("webhook", lambda: b"first")
    assert made == b"first"
    assert store.get_or_create("webhook", never) == b"first"
    assert store.get("webhook") == b"first"


def test_derivation_is_hmac_over_purpose_nul_resource(store: KeyStore) -> None:
    key = store.get_or_create("codes", new_key)
    expected = hmac.new(key, b"code\0organizations/acme", hashlib.sha256).digest()
    assert store.derive("codes", "code", "organizations/acme") == expected


def test_derivations_differ_by_name_purpose_and_resource(store: KeyStore) -> None:
    first = store.derive("a", "p", "r")
    assert first == store.derive("a", "p", "r")
    assert len({first, store.derive("b", "p", "r"), store.derive("a", "q", "r"), store.derive("a", "p", "s")}) == 4


def test_a_purpose_with_nul_could_collide_and_is_refused(store: KeyStore) -> None:
    with pytest.raises(KeyStoreError):
        store.derive("a", "p\0q", "r")


@pytest.mark.parametrize("name", ["", "../kek", "kek", "A", "a/b", ".hidden", "a\n", "x" * 129])
def test_names_that_could_leave_the_folder_are_refused(store: KeyStore, name: str) -> None:
    with pytest.raises(KeyStoreError):
        store.get_or_create(name, new_key)


def test_another_replica_reads_the_same_key(tmp_path: Path) -> None:
    folder = folder_with_kek(tmp_path / "keys")
    made = DirectoryKeyStore(folder).get_or_create("a", new_key)
    assert DirectoryKeyStore(folder).get_or_create("a", never) == made


def test_no_cleartext_on_disk_and_files_are_private(tmp_path: Path) -> None:
    folder = folder_with_kek(tmp_path / "keys")
    secret = b"a secret that must not be found on disk"
    DirectoryKeyStore(folder).get_or_create("a", lambda: secret)
    assert sorted(path.name for path in folder.iterdir()) == ["a.key", "kek"]
    assert (folder / "a.key").stat().st_mode & 0o777 == 0o600
    assert secret not in (folder / "a.key").read_bytes()


def test_racing_replicas_agree_on_one_key(tmp_path: Path) -> None:
    folder = folder_with_kek(tmp_path / "keys")
    count = 8
    barrier = threading.Barrier(count)
    got: list[bytes] = []

    def replica() -> None:
        store = DirectoryKeyStore(folder)

        def make() -> bytes:
            barrier.wait(10)  # every replica has seen that there is no key yet
            return new_key()

        got.append(store.get_or_create("a", make))

    threads = [threading.Thread(target=replica) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(got) == count
    assert len(set(got)) == 1


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def swap(path: Path) -> None:
    path.write_bytes((path.parent / "b.key").read_bytes())


def other_kek(path: Path) -> None:
    (path.parent / "kek").write_bytes(os.urandom(32))


def other_format(path: Path) -> None:
    path.write_bytes(b"plain")


@pytest.mark.parametrize("tamper", [damage, swap, other_kek, other_format])
def test_a_file_that_was_tampered_with_does_not_open(tmp_path: Path, tamper: Callable[[Path], None]) -> None:
    folder = folder_with_kek(tmp_path / "keys")
    store = DirectoryKeyStore(folder)
    store.get_or_create("a", new_key)
    store.get_or_create("b", new_key)
    tamper(folder / "a.key")
    with pytest.raises(KeyStoreError):
        DirectoryKeyStore(folder).get("a")


def test_a_missing_open_or_short_kek_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyStoreError, match="make up"):
        DirectoryKeyStore(tmp_path)
    folder = folder_with_kek(tmp_path / "keys")
    (folder / "kek").chmod(0o640)
    with pytest.raises(KeyStoreError, match="0600"):
        DirectoryKeyStore(folder)
    (folder / "kek").write_bytes(b"short")
    (folder / "kek").chmod(0o600)
    with pytest.raises(KeyStoreError, match="5 bytes"):
        DirectoryKeyStore(folder)
