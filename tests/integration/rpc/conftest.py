"""The registry that the access directory follows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.registry.running import Running, registry
from tests.servers import Servers


@pytest.fixture(scope="module")
def running(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with registry(servers, tmp_path_factory.mktemp("registry")) as found:
        yield found
