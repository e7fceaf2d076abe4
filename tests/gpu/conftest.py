"""These tests fail where there is no GPU: they are run to prove something, and a skip would read as a proof."""

from collections.abc import Iterator

import pytest
import torch

from dvq import device


def pytest_sessionstart() -> None:
    if not torch.cuda.is_available():
        pytest.exit(
            f"torch {torch.__version__} finds no GPU on this machine, and nothing was tested; "
            "run make test-gpu where there is one, with a CUDA build of torch",
            returncode=1,
        )


@pytest.fixture(scope="session")
def gpu() -> Iterator[torch.device]:
    """As a trial takes it."""
    with device.exact():
        yield device.pick()
