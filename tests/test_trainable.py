"""The precision of the layers of a network that is trained."""

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from asymflow_ft.bench.architectures import NAMED, random_subspace
from asymflow_ft.components.subspace import Cond
from asymflow_ft.families import flux2
from asymflow_ft.recipe import load_recipe
from asymflow_ft.training import trainable
from asymflow_ft.training.rehearsal import Meter
from asymflow_ft.training.student import build_student
from tests.conftest import REPOSITORY


def test_inputs_of_lora_in_autocast_are_its_own_and_not_a_wide_copy(tiny_base):
    network = flux2.load_parts(tiny_base, ("transformer",), torch.bfloat16).transformer
    trainable.attach_lora(network, flux2.lora_targets(network), flux2.TRAINED_ENDS, rank=4, dropout=0.0)
    for name, parameter in trainable.trained_parameters(network).items():
        if "lora_B" in name:  # zeros would have no gradient behind them
            torch.nn.init.normal_(parameter, std=0.02)
    network.enable_gradient_checkpointing()
    network.train()
    wide = copy.deepcopy(network)
    for module in wide.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = True  # as PEFT has it
    tokens, cond = torch.randn(2, 64, 128), Cond(torch.randn(2, 32, 192).bfloat16())
    outs, peaks = [], []
    for one in (network, wide):
        parameters = list(trainable.trained_parameters(one).values())
        with Meter([*one.parameters(), *one.buffers()]) as meter:
            out = flux2.predict(one, tokens, torch.tensor([0.2, 0.8]), cond, (8, 8))
            outs.append([out.detach(), *torch.autograd.grad(out.square().sum(), parameters)])
        peaks.append(meter.peak)
        del out
    assert all(torch.equal(own, other) for own, other in zip(*outs, strict=True))
    assert peaks[0] < 0.97 * peaks[1]


def test_norms_of_the_student_are_narrow(tiny_base):
    """What that means: tests/families/test_norms.py."""
    subspace = random_subspace(NAMED["tiny"])
    for overrides in ((), ("lora=null",)):
        recipe = load_recipe(REPOSITORY / "recipes/tiny/finetune.yaml", overrides)
        base = flux2.load_parts(tiny_base, ("transformer",), torch.float32).transformer
        student = build_student(recipe, flux2, subspace, None, lambda base=base: base, torch.device("cpu"))
        kinds = {type(module) for module in student.modules()}
        assert any(issubclass(kind, torch.nn.RMSNorm) for kind in kinds)
        assert not kinds & {torch.nn.RMSNorm, torch.nn.LayerNorm}
