"""Every test sees uninitialised memory as NaN, so that an output a kernel forgets to write cannot pass."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
