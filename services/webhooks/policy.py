"""Where webhooks may go: the form of a URL, checked at creation, and addresses, checked at every connect.

The address is the second and decisive wall: names are resolved long after creation, and not always to the same.
``ipaddress.is_global`` is not enough (it calls NAT64, 6to4 and multicast global on Python 3.11), so the deny table is
written out, and an address that embeds another one is judged by both.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Final

from yarl import URL

from libs.errors import InvalidArgumentError
from libs.settings import Settings

MAX_URL: Final = 1_028
_HOST: Final = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9])?\Z")
PORTS: Final = frozenset({443, 8443})
LOCAL_NAMES: Final = frozenset({"localhost", "localdomain", "local", "internal", "home.arpa"})
"""Names that mean another host wherever they are asked, and cloud metadata services among them."""
SERVICES: Final = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_DENIED_V4: Final = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_DENIED_V6: Final = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "::/96",  # unspecified, loopback, v4-compatible
        "64:ff9b:1::/48",  # local-use NAT64
        "100::/64",  # discard
        "100:0:0:1::/64",  # dummy prefix
        "2001:2::/48",  # benchmarks
        "2001:3::/32",  # AMT
        "2001:4:112::/48",  # AS112
        "2001:10::/28",  # ORCHID
        "2001:20::/28",  # ORCHIDv2
        "2001:30::/28",  # drone remote id
        "2001:db8::/32",  # documentation
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
        "fc00::/7",  # unique local: also metadata of one cloud
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local
        "ff00::/8",  # multicast
    )
)
_V4_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")
_V4_TRANSLATED: Final = ipaddress.IPv6Network("::ffff:0:0:0/96")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")


def embedded(address: ipaddress.IPv6Address) -> tuple[ipaddress.IPv4Address, ...]:
    """IPv4 addresses that a packet to this one may end at."""
    if any(address in network for network in (_V4_MAPPED, _V4_TRANSLATED, _NAT64)):
        return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF),)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return address.teredo
    return ()


def allows(address: Address) -> bool:
    """Whether a connection to the address may be opened."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _DENIED_V4)
    inner = embedded(address)
    if inner:
        return all(allows(each) for each in inner)
    # Outside 2000::/3 nothing is routed on the Internet, whatever is assigned there later.
    return address in _GLOBAL_V6 and not any(address in network for network in _DENIED_V6)


def allows_text(text: str) -> bool:
    """The same for a socket address as resolvers give it, zone id and all; what is not an address is refused."""
    try:
        return allows(ipaddress.ip_address(text.partition("%")[0]))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """Rules for URLs, with the operator's exceptions: exact ``host:port`` pairs."""

    exceptions: frozenset[str] = frozenset()
    own_hosts: frozenset[str] = frozenset()
    """Names of our own, refused with all names below them."""

    @staticmethod
    def parse(setting: str, own: frozenset[str] = frozenset()) -> UrlPolicy:
        """From the comma list of ``GROUNDSWELL_WEBHOOK_ALLOW``."""
        found = set()
        for item in (part.strip().lower() for part in setting.split(",") if part.strip()):
            host, _, port = item.rpartition(":")
            if not host or not port.isdigit() or "*" in host:
                raise ValueError(f"GROUNDSWELL_WEBHOOK_ALLOW takes exact host:port pairs, not '{item}'")
            found.add(f"{host.strip('[]')}:{int(port)}")
        return UrlPolicy(frozenset(found), own)

    def is_exception(self, url: URL) -> bool:
        """Whether the operator has named exactly this host and port."""
        return f"{(url.raw_host or '').lower()}:{url.port}" in self.exceptions

    def normal_form(self, text: str) -> str:
        """The URL as it is stored and used. Raises INVALID_FIELD."""
        if len(text) > MAX_URL:
            raise _refuse(f"must have at most {MAX_URL} characters")
        if not text.isprintable() or any(char.isspace() or char == "\\" for char in text):
            raise _refuse("must not hold white space, control characters or backslashes")
        try:
            url = URL(text)
            host, port = url.raw_host, url.port
        except (ValueError, UnicodeError):
            raise _refuse("is not a URL") from None
        if url.scheme != "https" or not host:
            raise _refuse("must be an absolute https URL")
        if url.raw_user is not None or url.raw_password is not None or "@" in _authority(text):
            raise _refuse("must not hold a user name or password")
        if url.raw_fragment:
            raise _refuse("must not hold a fragment")
        if not self.is_exception(url):
            if port not in PORTS:
                raise _refuse("must use port 443 or 8443")
            self._check_name(host)
            _check_literal(host)
        normal = str(url.with_fragment(None))
        if len(normal) > MAX_URL:
            raise _refuse(f"must have at most {MAX_URL} characters in its normal form")
        return normal

    def _check_name(self, host: str) -> None:
        """Only names that anybody may ask for. A final dot names the same host."""
        name = host.lower().rstrip(".")
        if ":" not in host and not _HOST.match(name):
            raise _refuse("names no host")
        for own in self.own_hosts | LOCAL_NAMES:
            if name == own or name.endswith(f".{own}"):
                raise _refuse("names a host of this installation")


def _authority(text: str) -> str:
    """Host, port and all before them, as they were typed: an empty user name is one, too."""
    return text.partition("://")[2].partition("/")[0].partition("?")[0]


def own_hosts(settings: Settings) -> frozenset[str]:
    """The names in the addresses that this installation's parts have; literal addresses are judged as such."""
    addresses = [
        *(settings.address(service, port) for service in SERVICES for port in ("internal", "public")),
        settings.gateway_listen,
        *settings.kafka.split(","),
        *(URL(each).authority for each in (settings.redis, settings.s3_endpoint, settings.s3_public_endpoint)),
    ]
    hosts = {address.rpartition("@")[2].rpartition(":")[0].strip("[]").lower() for address in addresses}
    return frozenset(host for host in {*hosts, settings.gateway_domain.lower()} if host and not _is_address(host))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_literal(host: str) -> None:
    """A literal address can be judged at once; forms that only some resolvers read as one are not accepted at all."""
    host = host.rstrip(".")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            socket.inet_aton(host)
        except OSError:
            return
        raise _refuse("must name its host by name or by an ordinary address") from None
    if "%" in host or not allows(address):
        raise _refuse("names an address that webhooks are not sent to")


def _refuse(what: str) -> InvalidArgumentError:
    return InvalidArgumentError("INVALID_FIELD", f"url {what}", field="webhook_endpoint.url")
