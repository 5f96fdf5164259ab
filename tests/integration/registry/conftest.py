"""One registry for the tests of a module; each makes an organization of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.registry.running import Running, registry
from tests.servers import Servers


@pytest.fixture(scope="module")
def running(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with registry(servers, tmp_path_factory.mktemp("registry")) as found:
        yield found
