"""What a network costs on a GPU while it draws, counted on fake CUDA tensors under CUDA's autocast."""

from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from asymflow_ft.bench.architectures import NAMED, transformer_on_meta
from asymflow_ft.components.norms import narrow_norms
from asymflow_ft.components.subspace import Cond
from tests.fake_cuda import FusedKernels, Moved, fake_cuda, put_on
from tests.families.conftest import LENGTH, pixel_pipeline

GRID = (8, 8)
Answer = tuple[type[nn.Module], torch.dtype, torch.dtype]  # of a norm: its kind, what it is given, what it says


@pytest.fixture
def network(tiny):
    """The lifted network in bf16, on "cuda"."""
    with fake_cuda():
        yield put_on(tiny.family.lift(tiny.parts.transformer, tiny.subspace), torch.bfloat16)


def call(tiny, network: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Moved, int, list[Answer]]:
    """One call of the network: its operators, the bytes that its blocks move, and what its norms do."""
    kinds = network._repeated_blocks or network._no_split_modules
    moved, before, inside, answers = Moved(), [0], [0], []

    def enter(*_: Any) -> None:
        before[0] = moved.moved.total()

    def leave(*_: Any) -> None:
        inside[0] += moved.moved.total() - before[0]

    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                kind = nn.RMSNorm if isinstance(module, nn.RMSNorm) else nn.LayerNorm
                hook = module.register_forward_hook(
                    lambda _, given, answer, kind=kind: answers.append((kind, given[0].dtype, answer.dtype))
                )
                stack.callback(hook.remove)
            if type(module).__name__ in kinds:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        tokens = torch.empty(1, GRID[0] * GRID[1], tiny.subspace.config["pixel_dim"], dtype=dtype, device="cuda")
        embeds = torch.empty(1, LENGTH, tiny.family.text_dim(network), dtype=torch.bfloat16, device="cuda")
        tau = torch.empty(1, dtype=dtype, device="cuda")
        with moved:
            tiny.family.predict(network, tokens, tau, Cond(embeds, tiny.guidance()), GRID)
    return moved, inside[0], answers


@torch.no_grad()
def test_a_network_that_draws_moves_what_a_stock_one_moves(tiny, network, monkeypatch):
    """As the same network without autocast on 16-bit tokens: the bytes in its blocks, and the precision of its norms
    (FLUX.3 itself gives queries and keys in float32 to some)."""
    pixel_pipeline(tiny, transformer=network)
    _, drawing, answers = call(tiny, network)
    monkeypatch.setattr(tiny.family, "autocast", lambda *_: nullcontext())
    _, stock, expected = call(tiny, network, torch.bfloat16)
    assert answers == expected and expected[-1][-1] == torch.bfloat16
    assert drawing == pytest.approx(stock, rel=1e-3) and stock > 1e6


def test_training_keeps_layer_norms_wide_and_rms_norms_as_they_come(tiny, network):
    """Of the trained network, the reference in it, and any network that is differentiated. Left to autocast, RMS norms
    are float32 too since torch 2.12."""
    call(tiny, network)  # some make tables at their first call

    def run() -> list[tuple[int, list[Answer]]]:
        runs = []
        for training, gradients in [(True, True), (True, False), (False, True)]:
            with torch.set_grad_enabled(gradients):
                moved, _, answers = call(tiny, network.train(training))
            runs.append((moved.moved.total(), answers))
        return runs

    wide = run()
    assert {dtype for _, answers in wide for *_, dtype in answers} == {torch.float32}
    narrow_norms(network)
    for (moved, answers), (moved_wide, _) in zip(run(), wide, strict=True):
        assert all(answer == (given if kind is nn.RMSNorm else torch.float32) for kind, given, answer in answers)
        saves = any(kind is nn.RMSNorm and given == torch.bfloat16 for kind, given, _ in answers)
        assert moved < moved_wide if saves else moved == moved_wide


def test_norms_with_wide_weights_are_left_to_autocast(tiny, network):
    """As where all weights are trained, in float32: their values are not rounded."""
    narrow_norms(network)
    norm = next((m for m in network.modules() if isinstance(m, nn.RMSNorm)), nn.RMSNorm(8))
    norm = put_on(norm, torch.float32).eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        x = torch.empty(1, norm.normalized_shape[0], dtype=torch.bfloat16, device="cuda")
        assert norm(x).dtype == norm.weight.dtype == torch.float32
        assert torch.is_autocast_enabled("cuda")


@torch.no_grad()
def test_what_klein_moves_in_a_guided_step_at_full_size():
    """GB beside products and attention, and kernels, of two calls in bf16 at 1024 px: the figures of
    docs/performance.md."""
    klein = NAMED["klein-4b"]
    base = transformer_on_meta(klein)
    with init_empty_weights():
        lifted = type(base).from_config({**base.config, "in_channels": 768, "out_channels": None})

    def count(network: nn.Module, width: int, dtype: torch.dtype) -> tuple[float, int]:
        tokens, tau = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((1, 4096, width), (1,)))
        embeds = torch.empty(1, 512, 7680, dtype=torch.bfloat16, device="cuda")
        with Moved() as moved:
            klein.family.predict(network, tokens, tau, Cond(embeds), (64, 64))
        return 2 * moved.moved.total() / 1e9, 2 * len(moved.operators)

    with fake_cuda(), FusedKernels():
        base, lifted = (put_on(network.eval(), torch.bfloat16) for network in (base, lifted))
        wide = count(lifted, 768, torch.float32)
        narrow_norms(lifted)
        narrow = count(lifted, 768, torch.float32)
        with patch.object(klein.family, "autocast", lambda *_: nullcontext()):
            stock = count(base, 128, torch.bfloat16)
    assert wide == (pytest.approx(185.0, rel=1e-3), 2506)
    assert narrow == (pytest.approx(131.2, rel=1e-3), 2152)
    assert stock == (pytest.approx(131.05, rel=1e-3), 2150)
