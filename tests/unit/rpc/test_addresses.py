"""Lists of addresses: what is dialled, what is listened on, and what others are told."""

from __future__ import annotations

import pytest

from clients.sdk import Client, ProfileError
from libs.rpc.client import target_of
from libs.settings import Settings

TWO = "127.0.0.1:1101, 127.0.0.1:1111"


def test_one_address_is_bound_dialled_and_told() -> None:
    settings = Settings(registry_internal="127.0.0.1:1101")
    assert settings.addresses("registry", "internal") == ("127.0.0.1:1101",)
    assert settings.address("registry", "internal") == settings.bind("registry", "internal") == "127.0.0.1:1101"


@pytest.mark.parametrize(("replica", "own"), [(0, "127.0.0.1:1101"), (1, "127.0.0.1:1111")])
def test_a_replica_has_its_own_of_several(replica: int, own: str) -> None:
    settings = Settings(registry_internal=TWO, replica=replica)
    assert settings.addresses("registry", "internal") == ("127.0.0.1:1101", "127.0.0.1:1111")
    assert settings.address("registry", "internal") == settings.bind("registry", "internal") == own


def test_a_replica_without_an_address_says_so() -> None:
    with pytest.raises(ValueError, match="GROUNDSWELL_REPLICA=2, but GROUNDSWELL_REGISTRY_INTERNAL lists 2"):
        Settings(registry_internal=TWO, replica=2).address("registry", "internal")


def test_one_name_may_stand_for_all() -> None:
    settings = Settings(
        registry_internal="registry:1101", replica=4, advertise_host="registry-4.registry", bind_host="10.0.0.7"
    )
    assert settings.addresses("registry", "internal") == ("registry:1101",)
    assert settings.address("registry", "internal") == "registry-4.registry:1101"
    assert settings.bind("registry", "internal") == "10.0.0.7:1101"


@pytest.mark.parametrize(
    ("addresses", "target"),
    [
        (("registry:1101",), "registry:1101"),
        (("127.0.0.1:1", "127.0.0.2:2"), "ipv4:127.0.0.1:1,127.0.0.2:2"),
        (("[::1]:1", "[::2]:2"), "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_what_is_dialled(addresses: tuple[str, ...], target: str) -> None:
    assert target_of(addresses) == target


@pytest.mark.parametrize("addresses", [("a:1", "b:2"), ("127.0.0.1:1", "[::1]:2"), ("127.0.0.1:1", "b:2")])
def test_lists_that_cannot_be_dialled_say_what_to_do(addresses: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="give one name that resolves to all replicas"):
        target_of(addresses)
    services = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")
    with pytest.raises(ProfileError, match="give one name that resolves to all replicas"):
        Client(dict.fromkeys(services, ",".join(addresses)), "gsw_a_b_c", b"")
