import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores; more threads wait for each other

REPOSITORY = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--golden", type=Path, default=Path(__file__).parent / "golden" / "reference",
        help="folder of reference data for test_reference_parity.py",
    )  # fmt: skip


@pytest.fixture(scope="session")
def golden_folder(request) -> Path:
    return request.config.getoption("--golden")


@pytest.fixture(scope="session")
def tiny_base() -> str:
    return str(REPOSITORY / "recipes/tiny/base")


@pytest.fixture(scope="session")
def tiny_data() -> str:
    return str(REPOSITORY / "recipes/tiny/data")
