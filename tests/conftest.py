"""Every test sees uninitialised memory as NaN, so that an output a kernel forgets to write cannot pass."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--run-large", action="store_true", help="run the tests marked large: tens of GiB of memory")


def pytest_collection_modifyitems(config, items):
    elsewhere = {"large"} if not config.getoption("--run-large") else set()
    if not torch.cuda.is_available():
        elsewhere.add("gpu")
    left_out = [item for item in items if elsewhere & set(item.keywords)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    if "large" in request.keywords:   # filling tens of GiB with NaN would take longer than the test
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
