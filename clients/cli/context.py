"""What every command gets: client, output and the organization and product it speaks of by default."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import typer
from rich.console import Console

from clients.cli.output import Output
from clients.sdk import Client, Profile


@dataclass
class Session:
    """Made once per command line by the global options."""

    profile_path: Path | None
    form: str
    key: str
    organization: str
    product: str

    @cached_property
    def output(self) -> Output:
        """Where results go."""
        return Output(self.form, Console())

    @cached_property
    def profile(self) -> Profile:
        """The profile, with the key that ``--key`` names."""
        profile = Profile.load(self.profile_path)
        return profile.with_current(self.key) if self.key else profile

    @cached_property
    def client(self) -> Client:
        """A client for the profile."""
        profile = self.profile
        return Client(profile.endpoints, profile.api_key, profile.ca.read_bytes(), on_acknowledged=_command_journal())

    def organization_name(self, given: str = "") -> str:
        """``organizations/x`` from a full name, an id, or the default."""
        name = given or self.organization or _organization_of_key(self.profile.api_key)
        return name if name.startswith("organizations/") else f"organizations/{name}"

    def product_name(self, given: str = "") -> str:
        """Full product name from a full name, an id, or the default."""
        name = given or self.product
        if not name:
            raise typer.BadParameter("name the product with --product, or set GROUNDSWELL_PRODUCT")
        return name if name.startswith("organizations/") else f"{self.organization_name()}/products/{name}"

    def name_in_product(self, collection: str, given: str) -> str:
        """Full name of a resource below the product, from a full name or an id."""
        return given if given.startswith("organizations/") else f"{self.product_name()}/{collection}/{given}"

    def name_below_product(self, collections: tuple[str, ...], given: str) -> str:
        """Full name from a full name, or from the ids of the collections joined by `/`."""
        ids = given.split("/")
        if given.startswith("organizations/"):
            return given
        if len(ids) != len(collections) or not all(ids):
            form = "/".join(f"<{one}>" for one in collections)
            raise typer.BadParameter(f"'{given}' is neither a full name nor {form}")
        return "/".join((self.product_name(), *(part for pair in zip(collections, ids, strict=True) for part in pair)))

    def name_in_organization(self, collection: str, given: str) -> str:
        """Full name of a resource below the organization, from a full name or an id."""
        return given if given.startswith("organizations/") else f"{self.organization_name()}/{collection}/{given}"


def _command_journal() -> Callable[[str, str], None] | None:
    """GROUNDSWELL_COMMAND_JOURNAL names a file that gets one line per acknowledged command, for later audits."""
    path = os.environ.get("GROUNDSWELL_COMMAND_JOURNAL")
    if not path:
        return None

    def append(method: str, request_id: str) -> None:
        with Path(path).open("a") as file:
            file.write(f"{request_id} {method}\n")

    return append


def _organization_of_key(key: str) -> str:
    parts = key.split("_", 3)
    return parts[1] if len(parts) == 4 else ""


def session(context: typer.Context) -> Session:
    """The session of a command."""
    found = context.find_object(Session)
    if found is None:
        raise RuntimeError("the command line was not set up")
    return found
