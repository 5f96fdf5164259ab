"""What a version needs beside itself in a bundle. Pure.

A dependency names an artifact of the same product and a requirement on its version. It is checked when a bundle is
made: for every target that the dependent binary reaches, the bundle has a binary of that artifact, and the versions of
that artifact it holds satisfy the requirement. Versions that need each other in a circle are refused when the one is
saved that closes it.
"""

from __future__ import annotations

from typing import Final

from groundswell.artifacts.v1 import artifacts_pb2 as pb

from libs.errors import FailedPreconditionError
from libs.names import parent_of, product_of
from libs.resolution.requirement import RequirementError, check_requirement, satisfies
from services.artifacts.rules import existing, invalid
from services.artifacts.state import State, shelf

PORTABLE: Final = "portable"
MAX_DEPENDENCIES: Final = 32
_MOST_VISITED: Final = 10_000


def check_declared(state: State, version: pb.ArtifactVersion) -> None:
    """Refuse dependencies that cannot be meant, or that close a circle."""
    field = "artifact_version.dependencies"
    own = parent_of(version.name)
    if len(version.dependencies) > MAX_DEPENDENCIES:
        raise invalid(field, f"has more than {MAX_DEPENDENCIES} entries")
    seen: set[str] = set()
    for dependency in version.dependencies:
        name = dependency.artifact
        if product_of(name) != product_of(own) or name.count("/") != own.count("/") or name == own:
            raise invalid(field, f"may name other artifacts of {product_of(own)}; not '{name[:200]}'")
        if name in seen:
            raise invalid(field, f"names {name} twice: join the requirements with `and`")
        seen.add(name)
        existing(state.artifacts, name)
        try:
            check_requirement(dependency.requirement)
        except RequirementError as error:
            raise invalid(field, f"has a requirement that cannot be read: {error}") from None
    _refuse_circles(state, version)


def _refuse_circles(state: State, version: pb.ArtifactVersion) -> None:
    """Walk from what the version needs to all that could be bundled for it; nothing of that may need the version."""
    own = parent_of(version.name)
    waiting, visited = [version], {version.name}
    while waiting:
        for dependency in waiting.pop().dependencies:
            if dependency.artifact == own and satisfies(version.version, dependency.requirement):
                raise FailedPreconditionError(
                    "DEPENDENCY_CYCLE", f"what {version.name} needs would need it in turn", resource=version.name
                )
            for name, known in shelf(state.versions, f"{dependency.artifact}/versions").items():
                if name not in visited and satisfies(known.version, dependency.requirement):
                    visited.add(name)
                    waiting.append(known)
        if len(visited) > _MOST_VISITED:
            raise invalid("artifact_version.dependencies", f"reach more than {_MOST_VISITED} versions")


def check_dependencies(state: State, binaries: tuple[str, ...]) -> None:
    """Refuse a set of binaries that lacks what one of them needs."""
    held = [(existing(state.binaries, name), existing(state.versions, parent_of(name))) for name in binaries]
    targets = {binary.target for binary, _ in held} - {PORTABLE} or {PORTABLE}
    for binary, version in held:
        reaches = targets if binary.target == PORTABLE else {binary.target}
        for dependency in version.dependencies:
            found = [one for one in held if parent_of(one[1].name) == dependency.artifact]
            wrong = next((one for _, one in found if not satisfies(one.version, dependency.requirement)), None)
            served = {one.target for one, _ in found}
            if wrong is None and (PORTABLE in served or reaches <= served):
                continue
            has = f"the bundle has version {wrong.version}" if wrong else "the bundle has no such binary"
            raise FailedPreconditionError(
                "DEPENDENCY_UNSATISFIED",
                f"{version.name} needs {dependency.artifact} {dependency.requirement}, {has}",
                resource=version.name,
                artifact=dependency.artifact,
                requirement=dependency.requirement,
                version=wrong.version if wrong else "",
            )
