"""The released AsymFLUX.2 adapter format, both ways: one flat file of trained tensors beside a config.json.

Names are diffusers' own; LoRA factors end in lora_A.weight / lora_B.weight and carry no alpha, so a reader assumes
alpha = rank. Trained tensors are float16, `proj_buffer` (the basis) and `scale_buffer` bfloat16.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.families import flux2

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS_NAME = "AsymFlux2Transformer2DModel"
# the architecture, under the names and with the values of the transformer's own config
SHARED_CONFIG = (
    "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "timestep_guidance_channels", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps", "guidance_embeds",
)  # fmt: skip


def adapter_config(
    transformer_config: dict[str, Any], subspace: PixelSubspace, sigma_min: float = 1e-4
) -> dict[str, Any]:
    """The adapter's config.json for a FLUX.2 transformer config and its subspace."""
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": diffusers.__version__,
        "patch_size": subspace.config["patch"],
        "in_channels": 3,
        "base_rank": subspace.config["rank"],
        "sigma_min": sigma_min,
        "num_timesteps": 1,
        **{name: transformer_config[name] for name in SHARED_CONFIG},
    }


def adapter_state(
    trained: dict[str, Tensor], subspace: PixelSubspace, alpha_over_rank: float = 1.0
) -> dict[str, Tensor]:
    """The adapter's tensors from the trained ones.

    Args:
        trained: float32 tensors by diffusers name; LoRA factors may carry PEFT's `.default`.
        alpha_over_rank: LoRA scale, multiplied into lora_B because the format has no place for it.
    """
    state = {}
    for name, tensor in trained.items():
        factor = alpha_over_rank if ".lora_B." in name else 1.0
        state[name.replace(".default.", ".")] = (tensor.float() * factor).to(torch.float16).contiguous()
    basis, scale = subspace.float32()
    return state | {"proj_buffer": basis.to(torch.bfloat16), "scale_buffer": scale.to(torch.bfloat16)}


def save_adapter(folder: str | Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write config.json and the weights file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, without a leading `transformer.`, and the config of an adapter folder.

    Raises:
        ValueError: a file is missing, or it is not such an adapter.
    """
    folder = Path(folder)
    for name in (WEIGHTS, "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an adapter folder: it has no {name}")
    state = {name.removeprefix("transformer."): t for name, t in load_file(folder / WEIGHTS).items()}
    if not {"proj_buffer", "scale_buffer"} <= state.keys():
        raise ValueError(f"{folder / WEIGHTS} is not an AsymFlow adapter: it has no proj_buffer and scale_buffer")
    return state, json.loads((folder / "config.json").read_text())


def apply_adapter(
    base: Flux2Transformer2DModel, state: dict[str, Tensor], fuse: bool = True
) -> tuple[Flux2Transformer2DModel, PixelSubspace]:
    """A base transformer with an adapter on it: the pixel transformer and its subspace.

    Args:
        base: the latent transformer, unchanged by this call. state: from `load_adapter`.
        fuse: add the LoRA products to the weights; else attach them as a PEFT adapter named "asymflow".

    Raises:
        ValueError: a tensor that the base does not have, or has in another shape.
    """
    subspace = PixelSubspace.from_fit(state["proj_buffer"].float(), state["scale_buffer"].float())
    lifted = flux2.lift(base, subspace)
    weights = lifted.state_dict()
    lora = {name: tensor for name, tensor in state.items() if "lora_" in name}
    plain = {name: t for name, t in state.items() if name not in lora and name not in ("proj_buffer", "scale_buffer")}
    for name, tensor in plain.items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = tuple(weights[name].shape) if name in weights else "no such tensor"
            raise ValueError(f"the adapter's {name} {tuple(tensor.shape)} does not fit this base, which has {found}")
        weights[name] = tensor.to(weights[name])
    if fuse:
        for name in [name for name in lora if name.endswith(".lora_A.weight")]:
            target = name.replace(".lora_A.weight", ".weight")
            if target not in weights:
                raise ValueError(f"the adapter's {name} does not fit this base, which has no {target}")
            up, down = lora[name.replace("lora_A", "lora_B")].float(), lora[name].float()
            weights[target] = (weights[target].float() + up @ down).to(weights[target])
    lifted.load_state_dict(weights, assign=True)
    if lora and not fuse:
        lifted.load_lora_adapter(lora, adapter_name="asymflow", prefix=None)
    return lifted, subspace
