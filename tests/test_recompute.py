"""What selective checkpointing keeps, by hand counts (that it changes no gradient: tests/families)."""

from collections import Counter

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from asymflow_ft.components.quantize import quantize_frozen
from asymflow_ft.components.subspace import Cond
from asymflow_ft.families import flux2
from asymflow_ft.training.recompute import checkpointed
from asymflow_ft.training.rehearsal import Meter

DOUBLE, SINGLE, WIDTH, TOKENS, TEXT = 1, 3, 64, 16, 8
JOINT = TOKENS + TEXT
# Multiplications and additions of what is kept. A block with two streams: attention over both, the products behind the
# two feed-forwards, three times as wide as their outputs. (Output products of attention are square.) A single block:
# attention, and the product behind it and its feed-forward, 4 WIDTH -> WIDTH.
ATTENTION = 2 * 2 * JOINT**2 * WIDTH
KEPT = DOUBLE * (ATTENTION + 2 * JOINT * 3 * WIDTH * WIDTH) + SINGLE * (ATTENTION + 2 * JOINT * 4 * WIDTH * WIDTH)


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def network(quantised=None):
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=128, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
    ).requires_grad_(False)  # fmt: skip
    if quantised:
        quantize_frozen(model, quantised, flux2.TRAINED_ENDS, "cpu")
    model.x_embedder.requires_grad_(True)
    return model.train()


def pass_through(model, kind, mode):
    model.disable_gradient_checkpointing()
    if kind:
        model.enable_gradient_checkpointing(checkpointed(kind))
    x, cond = torch.randn(1, TOKENS, 128), Cond(torch.randn(1, TEXT, 48))
    flux2.predict(model, x, torch.tensor([0.5]), cond, (4, 4)).sum().backward()  # the first one prepares int8 layers
    with mode:
        flux2.predict(model, x, torch.tensor([0.5]), cond, (4, 4)).sum().backward()
    return mode


def test_selective_recomputes_neither_attention_nor_narrowing_products():
    model = network()
    everything, selective, nothing = (pass_through(model, kind, Meter()) for kind in (True, "selective", False))
    assert everything.flops - selective.flops == KEPT
    assert nothing.flops < selective.flops < everything.flops
    assert everything.peak < selective.peak < nothing.peak


@pytest.mark.parametrize(
    ("kind", "operator"), [("nf4", "bitsandbytes.gemm_4bit.default"), ("int8", "aten.mm.default")]
)
def test_quantised_products_are_kept_too(kind, operator):
    model = network(kind)
    everything, selective = (pass_through(model, how, Calls()).count[operator] for how in (True, "selective"))
    assert everything - selective == 2 * DOUBLE + SINGLE
