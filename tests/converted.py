"""Converted models for tests, on the shipped tiny base."""

import torch

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.hub.forms import Converted
from asymflow_ft.hub.official import subspace_buffers, trained_tensors
from asymflow_ft.hub.provenance import UNKNOWN
from asymflow_ft.training import trainable


def basis(seed: int = 0) -> PixelSubspace:
    generator = torch.Generator().manual_seed(seed)
    return PixelSubspace.from_fit(torch.linalg.qr(torch.randn(768, 128, generator=generator)).Q, torch.tensor(2.4))


def as_converted(pipeline, base: str) -> Converted:
    """A pipeline as a full finetune would leave it."""
    settings = {k: v for k, v in pipeline.config.items() if not k.startswith("_") and not isinstance(v, tuple | list)}
    provenance = {
        **UNKNOWN, "family": "flux2", "pipeline_class": type(pipeline).__name__, "base": base, "dtype": "float32",
        "settings": settings,
    }  # fmt: skip
    trained = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    return Converted(flux2, pipeline.subspace, pipeline.codec, provenance, trained)


def converted_lora(base: str, rank: int = 3, seed: int = 0, dtype: str = "float32") -> Converted:
    """A LoRA conversion of the tiny base that was never trained: random factors and end layers."""
    subspace, generator = basis(seed), torch.Generator().manual_seed(seed)
    lifted = flux2.lift(flux2.load_parts(base, ("transformer",), torch.float32).transformer, subspace)
    trained = {}
    for name in flux2.lora_targets(lifted):
        rows, columns = lifted.get_submodule(name).weight.shape
        trained[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, columns, generator=generator)
        trained[f"{name}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)
    for name in flux2.TRAINED_ENDS:
        weight = lifted.get_submodule(name).weight
        trained[f"{name}.weight"] = weight + 0.01 * torch.randn(weight.shape, generator=generator)
    codec = PixelCodec(mean=(0.5, 0.0, 0.0), std=0.25)
    provenance = {
        **UNKNOWN, "family": "flux2", "pipeline_class": "PixelFlux2KleinPipeline", "base": base, "dtype": dtype,
        "weights": "ema", "step": 7, "pixels": {"space": "oklab", "mean": [0.5, 0.0, 0.0], "std": 0.25},
        "settings": {
            "shift": 7.0, "shift_mode": "static", "default_size": 64, "max_sequence_length": 32, "base_pixels": 64**2,
            "max_pixels": 128**2, "max_shift": 14.0,
        },
    }  # fmt: skip
    return Converted(flux2, subspace, codec, provenance, trained)


def adapter_of(network, subspace: PixelSubspace) -> dict[str, torch.Tensor]:
    """A trained network's adapter, in float32."""
    parameters = trainable.trained_parameters(network)
    trained = {trainable.adapter_name(name): parameter for name, parameter in parameters.items()}
    return trained_tensors(trained, dtype=torch.float32) | subspace_buffers(subspace, torch.float32)
