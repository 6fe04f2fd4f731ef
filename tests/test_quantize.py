"""A base in 4 or 8 bits: what stays, what it costs, how far it is off, and that it trains."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn

from asymflow_ft.components.quantize import quantize_frozen, round_frozen
from asymflow_ft.components.subspace import Cond, PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.hub.official import apply_adapter
from asymflow_ft.training import trainable
from asymflow_ft.training.recompute import checkpointed
from asymflow_ft.training.rehearsal import Meter
from tests.converted import adapter_of

WEIGHT_ERROR = {"nf4": (0.06, 0.11), "int8": (0.003, 0.02)}  # relative, root mean square
OUTPUT_ERROR = {"nf4": 0.25, "int8": 0.04}  # of the tiny base, whose layers are narrow: measured 0.18 and 0.023


@pytest.fixture(scope="module")
def subspace():
    g = torch.Generator().manual_seed(0)
    return PixelSubspace.from_fit(torch.linalg.qr(torch.randn(768, 128, generator=g)).Q, torch.tensor(2.4))


@pytest.fixture(scope="module")
def base(tiny_base):
    return flux2.load_parts(tiny_base, ("transformer",), torch.float32).transformer


@pytest.fixture(scope="module")
def lifted(base, subspace):
    return flux2.lift(base, subspace)


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantised(request, lifted):
    network = copy.deepcopy(lifted)
    quantize_frozen(network, request.param, flux2.TRAINED_ENDS, "cpu")
    return request.param, network


def is_quantised(module):
    return isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)


def predict(network, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, tau, embeds = (
        torch.randn(2, 16, 768, generator=g),
        torch.rand(2, generator=g),
        torch.randn(2, 8, 192, generator=g),
    )
    return flux2.predict(network, x, tau, Cond(embeds), (4, 4))


def test_ends_and_norms_are_untouched_and_everything_else_is_quantised(lifted, quantised):
    _, network = quantised
    linear = {name for name, module in lifted.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, m in network.named_modules() if is_quantised(m)} == linear - set(flux2.TRAINED_ENDS)
    ours = dict(network.named_parameters())
    for name, parameter in lifted.named_parameters():
        if name.removesuffix(".weight") not in linear - set(flux2.TRAINED_ENDS):
            assert torch.equal(parameter, ours[name]) and parameter.dtype == ours[name].dtype, name


def test_bytes_and_weight_error_are_those_of_the_format(lifted, quantised):
    kind, network = quantised
    stored, error, size = 0, 0.0, 0.0
    for name, module in network.named_modules():
        if not is_quantised(module):
            continue
        weight, original = module.weight, lifted.get_submodule(name).weight.detach()
        if kind == "nf4":
            scales = weight.quant_state
            blocks = original.numel() // 64
            assert weight.numel() == original.numel() // 2 and weight.dtype == torch.uint8
            assert (scales.absmax.numel(), scales.absmax.dtype) == (blocks, torch.uint8)
            assert scales.state2.absmax.numel() == -(-blocks // 256)
            stored += weight.numel() + scales.absmax.numel() + 4 * scales.state2.absmax.numel()
            back = bitsandbytes.functional.dequantize_4bit(weight.data, scales)
        else:
            scale = module.state.SCB if weight.SCB is None else weight.SCB
            assert weight.dtype == torch.int8 and scale.shape == (original.shape[0],)
            stored += weight.numel() + 4 * scale.numel()
            back = weight.data * scale[:, None] / 127
        error, size = error + (back - original).square().sum().item(), size + original.square().sum().item()
    values = sum(lifted.get_submodule(n).weight.numel() for n, m in network.named_modules() if is_quantised(m))
    assert 8 * stored / values == pytest.approx({"nf4": 4.127, "int8": 8.0 + 32 / 192}[kind], rel=0.02)
    low, high = WEIGHT_ERROR[kind]
    assert low < (error / size) ** 0.5 < high


@torch.no_grad()
def test_output_error_is_bounded(lifted, quantised):
    kind, network = quantised
    expected = predict(lifted)
    for mode in (True, False):
        error = ((predict(network.train(mode)) - expected).norm() / expected.norm()).item()
        assert 0 < error < OUTPUT_ERROR[kind]


def test_lora_trains_on_top_and_the_reference_stays(base, lifted, quantised, subspace):
    kind, network = copy.deepcopy(quantised)
    trainable.attach_lora(network, flux2.lora_targets(network), flux2.TRAINED_ENDS, rank=4, dropout=0.5)
    network.train().enable_gradient_checkpointing(checkpointed(True))
    parameters = trainable.trained_parameters(network)
    reference = trainable.lora_reference(network, network, subspace, flux2.predict)
    g = torch.Generator().manual_seed(3)
    z0, eps, sigma = (
        torch.randn(2, 16, 128, generator=g),
        torch.randn(2, 16, 768, generator=g),
        torch.full((2, 1, 1), 0.6),
    )
    cond = Cond(torch.randn(2, 8, 192, generator=g))
    before = reference(z0, eps, sigma, cond, (4, 4))
    network.eval()
    with torch.no_grad():
        predict(network)  # drawing between steps must not cost the layers their gradient
    network.train()
    optimizer, losses = torch.optim.AdamW(parameters.values(), lr=1e-3), []
    for _ in range(5):
        loss = (predict(network) - 0.1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad.count_nonzero() for name, p in parameters.items() if ".lora_A." not in name)
    assert torch.equal(reference(z0, eps, sigma, cond, (4, 4)), before)

    adapter = adapter_of(network, subspace)
    with torch.no_grad():
        trained, whole = predict(network.eval()), predict(apply_adapter(flux2, base, adapter, base_weights=kind))
    assert (whole - trained).norm() < {"nf4": 1e-5, "int8": 0.05}[kind] * trained.norm()

    merged = apply_adapter(flux2, base, adapter)
    assert not any(is_quantised(module) for module in merged.modules())
    assert torch.equal(merged.proj_out.weight, parameters["proj_out.modules_to_save.default.weight"])
    name = "transformer_blocks.0.ff.linear_in"
    product = parameters[f"{name}.lora_B.default.weight"] @ parameters[f"{name}.lora_A.default.weight"]
    change = merged.get_submodule(name).weight - lifted.get_submodule(name).weight
    torch.testing.assert_close(change, product, atol=1e-6, rtol=1e-3)


def activations(network, dtype=torch.bfloat16, tokens=64):
    """Peak bytes of a forward and a backward pass with gradient checkpointing."""
    network = copy.deepcopy(network).to(dtype)
    trainable.attach_lora(network, flux2.lora_targets(network), flux2.TRAINED_ENDS, rank=4, dropout=0.0)
    network.train().enable_gradient_checkpointing(checkpointed(True))
    x, cond = torch.randn(1, tokens, 768), Cond(torch.randn(1, 8, 192, dtype=dtype))
    parameters = list(trainable.trained_parameters(network).values())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with Meter([*network.parameters(), *(p.grad for p in parameters), x, cond.embeds]) as meter:
        flux2.predict(network, x, torch.tensor([0.5]), cond, (8, tokens // 8)).square().mean().backward()
    return meter.peak


def test_a_quantised_base_costs_no_activations(lifted, quantised):
    kind, network = quantised
    largest = max(m.weight.numel() for m in lifted.modules() if isinstance(m, nn.Linear))
    network = copy.deepcopy(lifted).to(torch.bfloat16)
    plain = activations(network, tokens=1024)
    quantize_frozen(network, kind, flux2.TRAINED_ENDS, "cpu")
    assert activations(network, tokens=1024) <= plain + 2 * largest


def test_gradient_of_the_inputs_is_that_of_the_weights_in_use(lifted, quantised):
    kind, network = quantised
    rounded = copy.deepcopy(lifted)
    round_frozen(rounded, kind, flux2.TRAINED_ENDS)
    for name, layer in network.named_modules():
        if is_quantised(layer):
            x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
            gradient = torch.randn(3, layer.out_features, generator=torch.Generator().manual_seed(1))
            layer(x).backward(gradient)
            torch.testing.assert_close(x.grad, gradient @ rounded.get_submodule(name).weight, rtol=1e-4, atol=1e-4)
