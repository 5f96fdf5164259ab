"""One installation for all end-to-end tests; what each needs for itself is an organization of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.ports import Ports
from tests.e2e.stack import Stack, running
from tests.e2e.tenant import Tenant

# The first test pays for the start of everything, and a killed broker takes its time.
LONGEST_S = 240


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.timeout(LONGEST_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure is shown with the end of every log."""
    report = yield
    stack = getattr(item, "funcargs", {}).get("stack")
    if report.failed and stack is not None:
        report.sections.append(("logs of the installation", stack.log_tails()))
    return report


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def ports(stack: Stack) -> Iterator[Ports]:
    found = Ports(stack)
    yield found
    found.close()


@pytest.fixture
def new_tenant(stack: Stack, tmp_path: Path) -> Iterator[Callable[..., Tenant]]:
    """Makes organizations; whatever runs for them ends with the test."""
    made: list[Tenant] = []

    def make(beside: Tenant | None = None) -> Tenant:
        tenant = Tenant.create(stack, tmp_path / f"tenant-{len(made)}", beside)
        made.append(tenant)
        return tenant

    yield make
    for tenant in made:
        tenant.close()


@pytest.fixture
def tenant(new_tenant: Callable[..., Tenant]) -> Tenant:
    return new_tenant()
