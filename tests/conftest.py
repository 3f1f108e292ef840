"""What every test needs."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a hub client: no test may reach out
# Small matrices gain nothing from threads, and lose much to them on a machine that is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


_SLOW = 1200  # seconds: on a machine that other programs share, five times what they take


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests time, and run the core on another device if `CART_TEST_DEVICE` names one."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_SLOW))
    if os.environ.get("CART_TEST_DEVICE", "cpu") == "cpu":
        return
    from tests.devices import through_the_device

    through_the_device()  # now that all that is tested is imported
    for item in items:
        if item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason="of the CPU alone"))


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """Take back what a command under test has set for its process: torch's threads."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
