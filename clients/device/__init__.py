"""The device SDK: everything a Groundswell agent needs, in the standard library and one Ed25519 verifier.

* :mod:`.model` the bodies of the device API, typed, parsed strictly;
* :mod:`.api` check-ins and downloads over mutual TLS;
* :mod:`.download` fetching one binary with resume, caps and a floor rate;
* :mod:`.offers` what makes an offer trustworthy: statement, signatures, product, target, floor;
* :mod:`.machine` the pure state machine of an update;
* :mod:`.state`, :mod:`.counter`, :mod:`.slots` what survives a power cut.

What an agent of one's own is built on is exported here, and stays: see README.md beside this file. Everything is
blocking and single-threaded, and nothing starts by itself.
"""

from clients.device.api import DeviceApi, Endpoint, fitting
from clients.device.counter import Counter
from clients.device.download import Pace, fetch_once, verify_file
from clients.device.errors import (
    ArchiveError,
    ConfigError,
    DeviceError,
    DownloadError,
    RefusedError,
    ServerError,
    StateError,
    TransportError,
)
from clients.device.model import Answer, Binary, CheckIn, Go, Offer, Report, Running, Signature
from clients.device.offers import Rules, verify
from clients.device.slots import SlotStore
from clients.device.state import StateFile

__all__ = [
    "Answer",
    "ArchiveError",
    "Binary",
    "CheckIn",
    "ConfigError",
    "Counter",
    "DeviceApi",
    "DeviceError",
    "DownloadError",
    "Endpoint",
    "Go",
    "Offer",
    "Pace",
    "RefusedError",
    "Report",
    "Rules",
    "Running",
    "ServerError",
    "Signature",
    "SlotStore",
    "StateError",
    "StateFile",
    "TransportError",
    "fetch_once",
    "fitting",
    "verify",
    "verify_file",
]
