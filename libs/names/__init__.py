"""Resource names: ``organizations/{o}/products/{p}/…``, alternating collection and id."""

from __future__ import annotations

from libs.errors import InvalidArgumentError


def organization_of(name: str) -> str:
    """Organization id of a resource name: the routing key. Raises INVALID_FIELD."""
    parts = name.split("/", 2)
    if len(parts) < 2 or parts[0] != "organizations" or not parts[1]:
        raise InvalidArgumentError("INVALID_FIELD", f"'{name}' is not a resource name", field="name", value=name[:200])
    return parts[1]


def parent_of(name: str) -> str:
    """Name of the resource above: ``a/b/c/d`` → ``a/b``."""
    return name.rsplit("/", 2)[0] if name.count("/") >= 2 else ""


def last_segment(name: str) -> str:
    """Last id of a name."""
    return name.rpartition("/")[2]


def segment(name: str, collection: str) -> str:
    """The id that follows a collection, empty when the name has no such collection."""
    parts = name.split("/")
    for index in range(0, len(parts) - 1, 2):
        if parts[index] == collection:
            return parts[index + 1]
    return ""


def product_of(name: str) -> str:
    """Full product name that a resource is below, empty when it is below none."""
    parts = name.split("/")
    return "/".join(parts[:4]) if len(parts) >= 4 and parts[2] == "products" else ""


def is_within(name: str, prefix: str) -> bool:
    """Whether a name is the prefix or below it. An empty prefix holds everything."""
    return not prefix or name == prefix or name.startswith(prefix + "/")
