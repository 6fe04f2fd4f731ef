"""The released AsymFlow adapter format, both ways: one flat file of trained tensors beside a config.json.

Names are diffusers' own; LoRA factors end in lora_A.weight / lora_B.weight and carry no alpha, so a reader assumes
alpha = rank. Trained tensors are float16, `proj_buffer` (the basis) and `scale_buffer` bfloat16. Metadata are ours;
other readers use sigma_min and num_timesteps of them, or none.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from asymflow_ft.components.quantize import round_frozen
from asymflow_ft.components.subspace import PixelSubspace

WEIGHTS = "diffusion_pytorch_model.safetensors"
BUFFERS = ("proj_buffer", "scale_buffer")
SIGMA_MIN = 1e-4  # PixelModel's when it samples
NUM_TIMESTEPS = 1  # the model's clock runs from 0 to 1


def adapter_config(
    family: ModuleType, transformer_config: Mapping[str, Any], subspace: PixelSubspace, sigma_min: float = SIGMA_MIN
) -> dict[str, Any]:
    """The adapter's config.json for a transformer config and its subspace."""
    return {
        "_class_name": family.ADAPTER_CLASS,
        "_diffusers_version": diffusers.__version__,
        "patch_size": subspace.config["patch"],
        "in_channels": 3,
        "base_rank": subspace.config["rank"],
        "sigma_min": sigma_min,
        "num_timesteps": NUM_TIMESTEPS,
        **{name: transformer_config[name] for name in family.ADAPTER_CONFIG},
    }


def trained_tensors(
    parameters: Mapping[str, Tensor], alpha_over_rank: float = 1.0, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Trained parameters as an adapter stores them.

    Args:
        parameters: float32 tensors by diffusers name; LoRA factors may carry PEFT's `.default`.
        alpha_over_rank: LoRA scale, multiplied into lora_B because the format has no place for it.

    Raises:
        ValueError: a value is not finite, or too large for `dtype`.
    """
    state = {}
    for name, tensor in parameters.items():
        factor = alpha_over_rank if ".lora_B." in name else 1.0
        value = tensor.detach().float() * factor
        if not value.isfinite().all():
            raise ValueError(f"{name} has values that are no finite numbers")
        value = value.to("cpu", dtype).contiguous()
        if not value.isfinite().all():
            raise ValueError(f"{name} has values that {dtype} cannot hold; choose --dtype float32")
        state[name.replace(".default.", ".")] = value
    return state


def subspace_buffers(subspace: PixelSubspace, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Basis and scale under the format's names."""
    return dict(zip(BUFFERS, (part.to("cpu", dtype).contiguous() for part in subspace.float32()), strict=True))


def save_adapter(
    folder: str | Path, state: dict[str, Tensor], config: dict[str, Any], metadata: Mapping[str, str] = {}
) -> None:
    """Write config.json and the weights file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / WEIGHTS, metadata={"format": "pt", **metadata})
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors by name, without a leading `transformer.`; the config, {} without one; and the metadata.

    Args:
        path: an adapter folder, or its safetensors file alone.

    Raises:
        ValueError: the file is missing or cannot be read, or it is not such an adapter.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is not an adapter folder: it has no {WEIGHTS}")
    try:
        state = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    if not set(BUFFERS) <= state.keys():
        raise ValueError(f"{file} is not an AsymFlow adapter: it has no {' and '.join(BUFFERS)}")
    for name in (name for name in state if ".lora_" in name):
        other = name.replace(*((".lora_A.", ".lora_B.") if ".lora_A." in name else (".lora_B.", ".lora_A.")))
        if other == name or other not in state:
            raise ValueError(f"{file} is not whole: {name} has no counterpart (lora_A.weight and lora_B.weight)")
    beside = file.parent / "config.json"
    try:
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{beside} cannot be read: {error}") from error
    for name, known in (("sigma_min", SIGMA_MIN), ("num_timesteps", NUM_TIMESTEPS)):
        stated = float(config.get(name, metadata.get(name, known)))
        if stated != known:
            raise ValueError(f"{file} was made for {name} {stated:g}; only {known:g} is supported")
    return state, config, metadata


def adapter_subspace(state: Mapping[str, Tensor]) -> PixelSubspace:
    """The subspace in an adapter's buffers."""
    return PixelSubspace.from_fit(*(state[name].float() for name in BUFFERS))


def apply_adapter(
    family: ModuleType, base: ModelMixin, state: Mapping[str, Tensor], fuse: bool = True, base_weights: str = "full"
) -> ModelMixin:
    """A base transformer with an adapter on it: the pixel transformer.

    Args:
        base: the latent transformer, unchanged by this call. state: an adapter's tensors, buffers included.
        fuse: add the LoRA products to the weights; else attach them as a PEFT adapter named "asymflow".
        base_weights: "nf4" or "int8" when the adapter was trained on weights rounded so.

    Raises:
        ValueError: a tensor that the base does not have, or has in another shape.
    """
    lifted = family.lift(base, adapter_subspace(state))
    if base_weights != "full":
        round_frozen(lifted, base_weights, family.TRAINED_ENDS)  # type: ignore[arg-type]
    weights = lifted.state_dict()
    lora = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    plain = {name: tensor for name, tensor in state.items() if name not in lora and name not in BUFFERS}
    for name, tensor in plain.items():
        _check_fits(name, tensor, tuple(tensor.shape), weights.get(name))
        weights[name] = tensor.to(weights[name])
    for name, down in lora.items():
        if ".lora_A." in name:
            up, target = lora[name.replace(".lora_A.", ".lora_B.")], name.replace(".lora_A.weight", ".weight")
            _check_fits(name, down, (up.shape[0], down.shape[1]), weights.get(target))
            if fuse:
                weights[target] = (weights[target].float() + up.float() @ down.float()).to(weights[target])
    lifted.load_state_dict(weights, assign=True)
    if lora and not fuse:
        lifted.load_lora_adapter(lora, adapter_name="asymflow", prefix=None)
    return lifted


def _check_fits(name: str, tensor: Tensor, shape: tuple[int, ...], weight: Tensor | None) -> None:
    if weight is None or tuple(weight.shape) != shape:
        found = "no such tensor" if weight is None else tuple(weight.shape)
        raise ValueError(f"the adapter's {name} {tuple(tensor.shape)} does not fit this base, which has {found}")
