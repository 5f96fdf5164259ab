"""Where the servers are and with which key to speak: a small JSON file that ``make up`` writes.

Found by ``GROUNDSWELL_PROFILE``, else ``.local/profile.json`` below the working directory; the command ``swell`` of a
checkout goes on to the checkout's own. ``GROUNDSWELL_API_KEY`` wins over the key in the file. Paths in the file are
relative to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clients.sdk.errors import SdkError

SERVICES: Final = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")


class ProfileError(SdkError):
    """The profile is missing or unusable; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A set of endpoints with their CA and the keys known for them."""

    path: Path
    endpoints: Mapping[str, str]
    """Service name → ``host:port`` of its public port; of several replicas, a comma list of them."""
    ca: Path
    gateway: str
    gateway_domain: str
    keys: Mapping[str, str]
    """Name → API key; ``platform`` is written by ``make up``."""
    current: str
    """Name of the key in use."""

    @property
    def api_key(self) -> str:
        """The key to present."""
        key = os.environ.get("GROUNDSWELL_API_KEY") or self.keys.get(self.current, "")
        if not key:
            raise ProfileError(
                f"no API key named '{self.current}' in {self.path}: "
                "set GROUNDSWELL_API_KEY or run `swell auth add NAME KEY`"
            )
        return key

    def with_key(self, name: str, key: str) -> Profile:
        """The profile with a key added and made current."""
        return Profile(
            self.path, self.endpoints, self.ca, self.gateway, self.gateway_domain, {**self.keys, name: key}, name
        )

    def with_current(self, name: str) -> Profile:
        """The profile with another key in use."""
        if name not in self.keys:
            raise ProfileError(f"no key named '{name}' in {self.path}; known: {', '.join(sorted(self.keys)) or 'none'}")
        return Profile(self.path, self.endpoints, self.ca, self.gateway, self.gateway_domain, self.keys, name)

    def without_key(self, name: str) -> Profile:
        """The profile without a key."""
        keys = {known: key for known, key in self.keys.items() if known != name}
        return Profile(self.path, self.endpoints, self.ca, self.gateway, self.gateway_domain, keys, self.current)

    def save(self) -> None:
        """Write it back, readable by its owner alone."""
        document = json.loads(self.path.read_text())
        document["keys"] = {name: key for name, key in self.keys.items() if name != "platform"}
        document["current"] = self.current
        scratch = self.path.with_suffix(f".{os.getpid()}")
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(document, file, indent=1)
        scratch.replace(self.path)

    @classmethod
    def load(cls, path: Path | None = None) -> Profile:
        """Read a profile. Raises ProfileError."""
        path = path or Path(os.environ.get("GROUNDSWELL_PROFILE", ".local/profile.json"))
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            raise ProfileError(f"no profile at {path}: run `make up`, or set GROUNDSWELL_PROFILE") from None
        except (OSError, ValueError) as error:
            raise ProfileError(f"the profile {path} cannot be read: {error}") from None
        missing = [name for name in ("endpoints", "ca") if name not in document]
        if missing:
            raise ProfileError(f"the profile {path} has no {', '.join(missing)}: run `make up` again")
        keys = dict(document.get("keys", {}))
        if document.get("platform_key"):
            keys["platform"] = document["platform_key"]
        return cls(
            path,
            document["endpoints"],
            path.parent / document["ca"],
            document.get("gateway", ""),
            document.get("gateway_domain", ""),
            keys,
            document.get("current", "platform"),
        )
