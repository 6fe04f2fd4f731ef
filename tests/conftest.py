import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores; more threads wait for each other

REPOSITORY = Path(__file__).parent.parent
pytest.register_assert_rewrite("tests.interruptions")  # so that a failed assert shows its values


def pytest_addoption(parser):
    parser.addoption(
        "--golden", type=Path, default=Path(__file__).parent / "golden" / "reference",
        help="folder of reference data for tests/parity",
    )  # fmt: skip


@pytest.fixture(scope="session")
def golden(request) -> Path:
    return request.config.getoption("--golden")


@pytest.fixture(scope="session")
def tiny_base() -> str:
    return str(REPOSITORY / "recipes/tiny/base")


@pytest.fixture(scope="session")
def tiny_data() -> str:
    return str(REPOSITORY / "recipes/tiny/data")


@pytest.fixture
def in_repository(monkeypatch):
    """The paths in recipes/tiny are relative to it."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def parts(tiny_base):
    import torch

    from asymflow_ft.families import flux2

    return flux2.load_parts(tiny_base, ("text_encoder", "tokenizer", "transformer"), torch.float32)


@pytest.fixture
def pipeline(parts):
    """The lifted tiny base, with a random basis."""
    import torch

    from asymflow_ft.components.color import PixelCodec
    from asymflow_ft.components.pipelines import flow_solver
    from asymflow_ft.components.subspace import PixelSubspace
    from asymflow_ft.families import flux2

    basis = torch.linalg.qr(torch.randn(768, 128, generator=torch.Generator().manual_seed(0))).Q
    subspace = PixelSubspace.from_fit(basis, torch.tensor(2.4))
    pipeline = flux2.PixelFlux2KleinPipeline(
        scheduler=flow_solver(), text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
        transformer=flux2.lift(parts.transformer, subspace), subspace=subspace, codec=PixelCodec(),
        shift=7.0, shift_mode="static", default_size=64, max_sequence_length=32,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
