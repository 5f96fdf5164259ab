from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local.credentials import S3Credentials
from deploy.local.errors import StackError
from deploy.local.services import service_specs
from deploy.local.settings import KAFKA, KAFKA_CONTROLLER, MAX_REPLICAS, REDIS, S3, WEBHOOK_RECEIVER, load

ROOT = Path("/checkout")


def test_defaults_are_the_documented_ones() -> None:
    settings = load({}, ROOT)
    environment = settings.environment
    assert environment["GROUNDSWELL_KAFKA"] == "127.0.0.1:19092"
    assert environment["GROUNDSWELL_REDIS"] == "redis://127.0.0.1:19379/0"
    assert environment["GROUNDSWELL_S3_ENDPOINT"] == "http://127.0.0.1:19900"
    assert environment["GROUNDSWELL_REGISTRY_INTERNAL"] == "127.0.0.1:19101"
    assert environment["GROUNDSWELL_WEBHOOKS_PUBLIC"] == "127.0.0.1:19206"
    assert environment["GROUNDSWELL_GATEWAY_LISTEN"] == "127.0.0.1:19443"
    assert environment["GROUNDSWELL_TLS_DIR"] == "/checkout/.local/tls"
    assert settings.partitions == 4


def test_two_checkouts_share_no_port() -> None:
    def ports(base: str) -> set[str]:
        values = load({"GROUNDSWELL_PORT_BASE": base}, ROOT).environment.values()
        return {v.rpartition(":")[2].partition("/")[0] for v in values if "127.0.0.1:" in v}

    assert len(ports("19000")) == 19
    assert not ports("19000") & ports("20000")


def test_a_given_address_is_external_and_wins() -> None:
    settings = load({"GROUNDSWELL_KAFKA": "10.0.0.1:9092"}, ROOT)
    assert settings.is_external("GROUNDSWELL_KAFKA")
    assert not settings.is_external("GROUNDSWELL_REDIS")
    assert settings.kafka == settings.environment["GROUNDSWELL_KAFKA"] == "10.0.0.1:9092"


def test_a_given_s3_endpoint_is_the_public_one_too() -> None:
    environment = load({"GROUNDSWELL_S3_ENDPOINT": "http://127.0.0.1:9"}, ROOT).environment
    assert environment["GROUNDSWELL_S3_PUBLIC_ENDPOINT"] == "http://127.0.0.1:9"


def test_local_dir_moves_everything() -> None:
    settings = load({"GROUNDSWELL_LOCAL_DIR": "/elsewhere"}, ROOT)
    assert settings.data_dir == Path("/elsewhere/data")
    assert settings.environment["GROUNDSWELL_KEYSTORE_DIR"] == "/elsewhere/keystore"


@pytest.mark.parametrize("base", ["x", "80", "65000", "-1"])
def test_a_useless_port_base_is_one_line(base: str) -> None:
    with pytest.raises(StackError, match="GROUNDSWELL_PORT_BASE"):
        load({"GROUNDSWELL_PORT_BASE": base}, ROOT)


@pytest.mark.parametrize("count", ["0", "many"])
def test_a_useless_partition_count_is_one_line(count: str) -> None:
    with pytest.raises(StackError, match="GROUNDSWELL_PARTITIONS"):
        load({"GROUNDSWELL_PARTITIONS": count}, ROOT)


def test_replicas_have_ports_of_their_own() -> None:
    settings = load({"GROUNDSWELL_PORT_BASE": "5000", "GROUNDSWELL_REPLICAS": "3"})
    assert settings.environment["GROUNDSWELL_PKI_INTERNAL"] == "127.0.0.1:5102,127.0.0.1:5112,127.0.0.1:5122"
    assert settings.environment["GROUNDSWELL_PKI_PUBLIC"] == "127.0.0.1:5202,127.0.0.1:5212,127.0.0.1:5222"


def test_most_replicas_fit_into_the_block() -> None:
    settings = load({"GROUNDSWELL_REPLICAS": str(MAX_REPLICAS)})
    specs = service_specs(settings, S3Credentials("key", "secret"))
    ports = [port for spec in specs for port in spec.ports]
    others = [settings.port(offset) for offset in (KAFKA, KAFKA_CONTROLLER, REDIS, S3, WEBHOOK_RECEIVER)]
    assert len({*ports, *others}) == len(ports) + len(others) == 6 * 2 * MAX_REPLICAS + 3 + 5
    assert len({spec.name for spec in specs}) == len(specs) == 6 * MAX_REPLICAS + 2


def test_a_replica_knows_which_it_is() -> None:
    specs = service_specs(load({"GROUNDSWELL_REPLICAS": "2"}), S3Credentials("key", "secret"))
    told = {spec.name: spec.env["GROUNDSWELL_REPLICA"] for spec in specs}
    assert (told["rollout"], told["rollout-2"], told["gateway"]) == ("0", "1", "0")


@pytest.mark.parametrize("count", ["0", "10", "two", "-1"])
def test_a_useless_number_of_replicas_is_one_line(count: str) -> None:
    with pytest.raises(StackError, match="GROUNDSWELL_REPLICAS"):
        load({"GROUNDSWELL_REPLICAS": count})


def test_given_addresses_must_be_as_many_as_replicas() -> None:
    settings = load({"GROUNDSWELL_REPLICAS": "2", "GROUNDSWELL_PKI_INTERNAL": "127.0.0.1:7001"})
    with pytest.raises(StackError, match="addresses given for pki"):
        service_specs(settings, S3Credentials("key", "secret"))
