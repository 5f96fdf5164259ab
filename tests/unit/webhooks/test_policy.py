"""Where webhooks may go: every denied range in every form, and the form of URLs."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from yarl import URL

from libs.errors import InvalidArgumentError
from libs.settings import Settings
from services.webhooks.policy import UrlPolicy, allows, allows_text, own_hosts
from services.webhooks.transport import guarded_socket

DENIED_V4 = [
    "0.0.0.0",  # noqa: S104 - an address to refuse, not to bind
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.1.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
]
ALLOWED_V4 = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.0", "172.15.0.1", "172.32.0.1", "223.255.255.255"]
DENIED_V6 = [
    "::",
    "::1",
    "::7f00:1",
    "64:ff9b:1::1",
    "100::1",
    "2001:db8::1",
    "2001:2::1",
    "2001:20::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "4000::1",
]
ALLOWED_V6 = ["2606:4700:4700::1111", "2a00:1450::1"]


def embeddings(inner: str) -> list[str]:
    """The IPv6 addresses that lead to an IPv4 address."""
    number = int(ipaddress.IPv4Address(inner))
    flipped = number ^ 0xFFFFFFFF
    server = int(ipaddress.IPv4Address("8.8.8.8"))
    return [
        str(ipaddress.IPv6Address((0xFFFF << 32) | number)),
        str(ipaddress.IPv6Address((0xFFFF << 48) | number)),
        str(ipaddress.IPv6Address((0x0064_FF9B << 96) | number)),
        str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80))),
        str(ipaddress.IPv6Address((0x2001 << 112) | (server << 64) | flipped)),
    ]


@pytest.mark.parametrize("text", DENIED_V4 + DENIED_V6)
def test_denied(text: str) -> None:
    assert not allows(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ALLOWED_V4 + ALLOWED_V6)
def test_allowed(text: str) -> None:
    assert allows(ipaddress.ip_address(text))


@pytest.mark.parametrize("inner", DENIED_V4)
def test_denied_addresses_stay_denied_when_embedded(inner: str) -> None:
    assert [each for each in embeddings(inner) if allows(ipaddress.ip_address(each))] == []


def test_public_addresses_stay_allowed_when_embedded() -> None:
    assert [each for each in embeddings("1.1.1.1") if not allows(ipaddress.ip_address(each))] == []


def test_teredo_with_a_denied_server_is_denied() -> None:
    client = int(ipaddress.IPv4Address("1.1.1.1")) ^ 0xFFFFFFFF
    server = int(ipaddress.IPv4Address("10.0.0.1"))
    assert not allows(ipaddress.IPv6Address((0x2001 << 112) | (server << 64) | client))


@pytest.mark.parametrize("text", ["fe80::1%eth0", "::1%1", "", "localhost", "1.2.3", "0x7f000001"])
def test_zone_ids_and_what_is_no_address(text: str) -> None:
    assert not allows_text(text)


@pytest.mark.parametrize("text", ["127.0.0.1", "::ffff:127.0.0.1", "::1"])
def test_no_socket_for_a_denied_address(text: str) -> None:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    with pytest.raises(OSError, match="address not allowed by webhook policy"):
        guarded_socket((family, socket.SOCK_STREAM, 0, "", (text, 443)))


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/x",
        "ftp://hooks.example/x",
        "hooks.example/x",
        "https:///x",
        "https://user@hooks.example/x",
        "https://user:word@hooks.example/x",
        "https://hooks.example:8080/x",
        "https://hooks.example:22/x",
        "https://hooks.example/x#part",
        "https://hooks.example/a b",
        "https://hooks.example\\@other.example/",
        "https://hooks.example/\n",
        "https://127.0.0.1/x",
        "https://[::1]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://[fe80::1%25eth0]/x",
        "https://2130706433/x",
        "https://0x7f000001/x",
        "https://0177.0.0.1/x",
        "https://127.1/x",
        "https://hooks.example/" + "x" * 1_028,
        "https://hooks.example:99999/",
        "https://localhost:8443/",
        "https://LOCALHOST./",
        "https://db.localhost/",
        "https://metadata.google.internal/",
        "https://printer.local/",
        "https://127.0.0.1./x",
        "https://017700000001/x",
        "https://0x7f.0x0.0x0.0x1/x",
        "https://127.0.1/x",
        "https://\uff11\uff12\uff17.0.0.1/x",
        "https://\u2460\u2461\u2466.0.0.1/x",
        "https://[::]/x",
        "https://[64:ff9b::7f00:1]/x",
        "https://[2002:7f00:1::]/x",
        "https://[2001:0:4136:e378:8000:63bf:80ff:fffe]/x",
        "https://[fd00:ec2::254]/x",
        "https://0.0.0.0/x",
        "https://255.255.255.255/x",
        "https://@hooks.example/x",
        "https://hooks.example%00.other.example/x",
        "//hooks.example/x",
        "",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        UrlPolicy().normal_form(url)
    assert refused.value.reason == "INVALID_FIELD"
    assert refused.value.field == "webhook_endpoint.url"


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://hooks.example/x?y=1", "https://hooks.example/x?y=1"),
        ("https://hooks.example:443/", "https://hooks.example/"),
        ("https://Hooks.Example:8443/A", "https://hooks.example:8443/A"),
        ("https://bücher.example/", "https://bücher.example/"),
    ],
)
def test_urls_that_are_taken(url: str, normal: str) -> None:
    taken = UrlPolicy().normal_form(url)
    assert URL(taken) == URL(normal)
    assert UrlPolicy().normal_form(taken) == taken


def test_t63_names_of_our_own_are_refused_with_all_below_them() -> None:
    settings = Settings(
        kafka="kafka-1.fleet.example:9092,kafka-2.fleet.example:9092",
        redis="redis://user:word@cache.fleet.example:6379/0",
        s3_endpoint="http://blobs.fleet.example:9000",
        gateway_domain="devices.fleet.example",
        registry_internal="registry.fleet.example:9101",
    )
    own = own_hosts(settings)
    assert own == {
        "kafka-1.fleet.example",
        "kafka-2.fleet.example",
        "cache.fleet.example",
        "blobs.fleet.example",
        "devices.fleet.example",
        "registry.fleet.example",
    }
    policy = UrlPolicy.parse("", own)
    for host in (*own, "acme.devices.fleet.example", "DEVICES.FLEET.EXAMPLE", "devices.fleet.example."):
        with pytest.raises(InvalidArgumentError, match="of this installation"):
            policy.normal_form(f"https://{host}/hooks")
    assert policy.normal_form("https://hooks.fleet.example/")
    assert policy.normal_form("https://notdevices.fleet.example/")


def test_an_exception_is_one_host_and_one_port() -> None:
    policy = UrlPolicy.parse("127.0.0.1:19700, [::1]:9000")
    assert policy.normal_form("https://127.0.0.1:19700/hooks") == "https://127.0.0.1:19700/hooks"
    assert policy.normal_form("https://[::1]:9000/") == "https://[::1]:9000/"
    for other in ("https://127.0.0.1:19701/", "https://127.0.0.2:19700/", "https://localhost:19700/"):
        with pytest.raises(InvalidArgumentError):
            policy.normal_form(other)
    with pytest.raises(InvalidArgumentError):
        policy.normal_form("http://127.0.0.1:19700/hooks")


@pytest.mark.parametrize("setting", ["127.0.0.1", "*:443", ":443", "host:port"])
def test_a_setting_that_is_not_exact_stops_the_start(setting: str) -> None:
    with pytest.raises(ValueError, match="exact host:port"):
        UrlPolicy.parse(setting)
