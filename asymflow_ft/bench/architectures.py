"""Latent bases with random weights: all that a benchmark needs of one, without a download."""

import difflib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin, ModularPipeline
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from asymflow_ft.components.subspace import Cond, PixelSubspace
from asymflow_ft.families import family_of_transformer, flux2, flux3
from asymflow_ft.training.rehearsal import fake, full_length

SCALE = 2.4  # of the random subspaces; about what unit-variance latents and pixels give (docs/method.md)
_FLUX2 = {
    "_class_name": "Flux2Transformer2DModel", "in_channels": 128, "attention_head_dim": 128, "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "timestep_guidance_channels": 256,
    "guidance_embeds": False,
}  # fmt: skip
_VAE = {"_class_name": "AutoencoderKLFlux2"}  # FLUX.3's is the same one


@dataclass(frozen=True)
class Architecture:
    """A latent base by its configs alone.

    transformer, vae: configs as diffusers saves them. max_length: text tokens of a prompt. resolution: side of a
    picture in pixels, unless something else is asked for. step_gb: targets for the memory of a training step (LoRA of
    rank 256, batch 1, `resolution`), by precision of the base.
    """

    name: str
    family: ModuleType
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    max_length: int = 512
    resolution: int = 1024
    step_gb: Mapping[str, int] = field(default_factory=dict)

    @property
    def text_length(self) -> int:
        """Rows of a text embedding."""
        return self.max_length + self.family.EXTRA_TEXT_ROWS

    @property
    def guidance(self) -> float | None:
        """A distilled guidance value, for networks that embed one."""
        return 3.5 if self.transformer.get("guidance_embeds", False) else None


NAMED = {
    "tiny": Architecture(  # as recipes/tiny/base
        "tiny", flux2,
        _FLUX2 | {"num_layers": 2, "num_single_layers": 5, "num_attention_heads": 6, "attention_head_dim": 32,
                  "joint_attention_dim": 192, "axes_dims_rope": [8, 8, 8, 8]},
        _VAE | {"block_out_channels": [16, 16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8}, 32, 128,
    ),
    "100m": Architecture(  # FLUX.2 with the depth of klein 4B and a sixth of its width, for CPUs
        "100m", flux2,
        _FLUX2 | {"num_layers": 4, "num_single_layers": 20, "num_attention_heads": 4, "joint_attention_dim": 1536},
        _VAE, 128, 256,
    ),
    "klein-4b": Architecture(
        "klein-4b", flux2,
        _FLUX2 | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        _VAE, step_gb={"full": 24, "nf4": 16},
    ),
    "klein-9b": Architecture(
        "klein-9b", flux2,
        _FLUX2 | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        _VAE, step_gb={"nf4": 24},
    ),
}  # fmt: skip


def find_architecture(name: str) -> Architecture:
    """One of NAMED, or that of a transformer's config.json (its VAE's is looked for in ../vae).

    Raises:
        ValueError: neither, or a file that no family reads.
    """
    if name in NAMED:
        return NAMED[name]
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if file.suffix != ".json":
        near = difflib.get_close_matches(name.lower(), NAMED, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"the architecture {name!r} is unknown; {hint}There are {', '.join(NAMED)}, or give the config.json of a "
            "transformer"
        )
    transformer = _config(file)
    family = family_of_transformer(str(transformer["_class_name"]))
    beside = file.absolute().parent.parent / "vae" / "config.json"
    if not beside.is_file() and family not in (flux2, flux3):
        raise ValueError(f"the VAE of {name} is not known: there is no {beside}; put the one of its base there")
    max_length = inspect.signature(family.PIXEL_PIPELINES[0]).parameters["max_sequence_length"].default
    found = Architecture(name, family, transformer, _config(beside) if beside.is_file() else _VAE, max_length)
    try:
        _forward_once(found)
        vae = vae_on_meta(found)
        fits = (family.latent_dim(vae), family.pixel_patch(vae)) == family.GEOMETRY
    except Exception as error:  # whatever a constructor says of values that it cannot work with
        raise ValueError(f"{file} or {beside} describes no network: {' '.join(str(error).split())}") from error
    if not fits:
        raise ValueError(f"the VAE of {beside} is not one that {transformer['_class_name']} has latents of")
    return found


def _forward_once(architecture: Architecture) -> None:
    """Of shapes alone: head sizes and position axes that do not fit one another fail here, and not in a benchmark."""
    family, network = architecture.family, transformer_on_meta(architecture)
    quiet = patch.object(fake_tensor.log, "disabled", True)
    with quiet, fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), full_length():
        text = torch.empty(1, architecture.text_length, family.text_dim(network))
        tokens = torch.empty(1, 4, family.GEOMETRY[0])
        family.predict(fake(network), tokens, torch.empty(1), Cond(text, architecture.guidance), (2, 2))


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise ValueError(f"{file} names no _class_name, as a diffusers config.json does")
    return config


def _on_meta(kind: type[ModelMixin], config: Mapping[str, Any]) -> ModelMixin:
    with init_empty_weights():
        return kind.from_config(dict(config))


def transformer_on_meta(architecture: Architecture) -> ModelMixin:
    """The latent transformer without weights."""
    return _on_meta(architecture.family.TRANSFORMER, architecture.transformer)


def vae_on_meta(architecture: Architecture) -> ModelMixin:
    """The VAE without weights."""
    return _on_meta(getattr(diffusers, architecture.vae["_class_name"]), architecture.vae)


@torch.no_grad()
def randomise(
    module: ModelMixin, dtype: torch.dtype, device: torch.device | str, seed: int = 0, repeated: bool = False
) -> ModelMixin:
    """Give a module on the meta device weights that keep activations near unit size, in place: N(0, 1 / inputs) for
    matrices, 1 for the weights of norms, 0 for biases.

    Args:
        repeated: linear layers of one shape share one weight. For a network that is then quantised layer by layer: it
            takes seconds to make, and never the memory that it would in full precision.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[torch.Size, Tensor] = {}

    def draw(shape: torch.Size) -> Tensor:
        deviation = shape[1:].numel() ** -0.5
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, deviation, generator=generator)

    for owner in module.modules():
        for name, old in owner.named_parameters(recurse=False):
            if old.ndim < 2:
                new = torch.full(old.shape, float(name == "weight"), dtype=dtype, device=device)
            elif repeated and isinstance(owner, nn.Linear):
                if old.shape not in weights:
                    weights[old.shape] = draw(old.shape)
                new = weights[old.shape]
            else:
                new = draw(old.shape)
            setattr(owner, name, nn.Parameter(new, requires_grad=False))
    return module.to(device).eval()


def random_transformer(
    architecture: Architecture, dtype: torch.dtype, device: torch.device | str, repeated: bool = False
) -> ModelMixin:
    return randomise(transformer_on_meta(architecture), dtype, device, repeated=repeated)


def random_vae(architecture: Architecture, dtype: torch.dtype, device: torch.device | str) -> ModelMixin:
    return randomise(vae_on_meta(architecture), dtype, device)


def random_subspace(architecture: Architecture, seed: int = 0) -> PixelSubspace:
    rank, patch = architecture.family.GEOMETRY
    gaussian = torch.randn(3 * patch**2, rank, generator=torch.Generator().manual_seed(seed))
    return PixelSubspace.from_fit(torch.linalg.qr(gaussian).Q, torch.tensor(SCALE))


def random_embeds(architecture: Architecture, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Text embeddings (count, L, E) without padding, N(0, 1), on the CPU."""
    width = architecture.family.text_dim(transformer_on_meta(architecture))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, architecture.text_length, width, generator=generator).to(dtype)


def stock_kind(architecture: Architecture) -> type[DiffusionPipeline]:
    """The class of the family's stock pipeline.

    Raises:
        ValueError: diffusers has modular blocks alone for this family.
    """
    kind = next(iter(architecture.family.PIPELINES.values()))
    if issubclass(kind, ModularPipeline):
        raise ValueError(
            f"diffusers has no stock pipeline for {architecture.name} to compare with, only modular blocks "
            f"({kind.__name__}); `bench step` needs none"
        )
    return kind


def stock_pipeline(architecture: Architecture, transformer: ModelMixin, vae: ModelMixin) -> DiffusionPipeline:
    """The family's stock pipeline around two networks, without what encodes text.

    Raises:
        ValueError: diffusers has modular blocks alone for this family.
    """
    kind = stock_kind(architecture)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": vae, "transformer": transformer}
    wanted = inspect.signature(kind.__init__).parameters.values()
    absent = [p.name for p in wanted if p.default is p.empty and p.name not in ("self", *parts)]
    pipeline = kind(**parts, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
