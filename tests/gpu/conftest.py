"""A GPU for the tests that need one; without it they are skipped, with the reason."""

import os

import pytest
import torch

ON_CPU = os.environ.get("L2KV_GPU_TESTS") == "cpu"  # to try the tests themselves where there is no GPU


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == item.session.config.rootpath / "tests" / "gpu":
            item.add_marker(pytest.mark.gpu)
            if not (ON_CPU or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """The device that is tested."""
    return torch.device("cpu" if ON_CPU else "cuda")


@pytest.fixture
def cuda(device) -> torch.device:
    """The same, for what a CPU does not measure."""
    if device.type == "cpu":
        pytest.skip("no CUDA device")
    return device
