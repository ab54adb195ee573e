"""What every test shares: few threads, and a reason for each test that cannot run here."""

import os

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def alone():
    """A job of one rank in this process: DeepSpeed cannot start twice, so all tests share it."""
    from ril_engine.engine import init_distributed

    environment = dict(os.environ)
    init_distributed()
    os.environ.clear()  # what it sets is not for the processes that other tests start
    os.environ.update(environment, LOCAL_RANK="0")  # but deepspeed.initialize asks for this one
