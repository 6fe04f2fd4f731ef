"""Captions to embeddings and images to latents: by the base's models, or from the cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asymflow_ft.components.memory import free_memory
from asymflow_ft.data.cache import Storage, TensorCache, content_key, rounded
from asymflow_ft.data.prepare import Entry
from asymflow_ft.data.synthetic import SETTINGS, stored_latents
from asymflow_ft.families.base import component_id
from asymflow_ft.recipe import Recipe

TEXT_BATCH = 16


def load_text_parts(
    family: ModuleType, base: str, revision: str | None, dtype: torch.dtype, device: torch.device
) -> DiffusionPipeline:
    """The base's pipeline with only what turns prompts into embeddings, without the layers that they do not use."""
    parts = family.load_parts(base, family.TEXT_PARTS, dtype, revision)
    family.shorten_text_encoder(parts)
    return parts.to(device)


@torch.no_grad()
def encode_texts(
    family: ModuleType, parts: DiffusionPipeline, captions: Sequence[str], max_length: int
) -> Iterator[Tensor]:
    """Each caption's embedding (L, E), without the rows of zeros that a family's `embed` pads with."""
    for start in range(0, len(captions), TEXT_BATCH):
        batch = list(captions[start : start + TEXT_BATCH])
        for embeds in family.embed(parts, batch, max_length):
            yield embeds[: int(embeds.any(dim=1).nonzero().max()) + 1]


@dataclass(frozen=True)
class Keys:
    """Cache keys. text, latents, conditions: hashes of everything but the caption and the image that a tensor depends
    on; the last is for the latents of condition images."""

    text: str
    latents: str
    conditions: str

    def of_caption(self, caption: str) -> str:
        return content_key(self.text, caption)

    def of_image(self, entry: Entry) -> str:
        return content_key(self.conditions if entry.image else self.latents, entry.digest, *entry.size)


class Encoder:
    """Latents and embeddings of a recipe's base, from the models: one image or a few captions at a time."""

    def __init__(self, recipe: Recipe, family: ModuleType, device: torch.device):
        self.recipe, self.family, self.device = recipe, family, device
        bf16 = recipe.train.precision == "bf16"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self._text: DiffusionPipeline | None = None
        self._vae: nn.Module | None = None
        self.text_storage: Storage = "fp8" if recipe.cache.text == "fp8" else ("bfloat16" if bf16 else "float32")
        sources = [Path(part.source).expanduser() for part in recipe.data.parts()]
        folders = [source if source.is_dir() else source.parent for source in sources]  # or its metadata.jsonl
        self._synthetic = [folder for folder in folders if (folder / SETTINGS).is_file()]
        exact = [(folder / SETTINGS).read_text(encoding="utf-8") for folder in self._synthetic]
        ids = [component_id(recipe.base, recipe.revision, name) for name in (*family.TEXT_PARTS, "vae")]
        self.keys = Keys(
            text=content_key(*ids[:-1], recipe.text.max_length, self.dtype, self.text_storage),
            latents=content_key(ids[-1], recipe.data.latents, recipe.cache.latents, *exact),
            conditions=content_key(ids[-1], "mode", recipe.cache.latents),  # as the base sees them when it draws
        )

    def encode_captions(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings (L, E), in the precision that the transformer gets."""
        if self._text is None:
            recipe = self.recipe
            self._text = load_text_parts(self.family, recipe.base, recipe.revision, self.dtype, self.device)
        return list(encode_texts(self.family, self._text, captions, self.recipe.text.max_length))

    @torch.no_grad()
    def encode_image(self, entry: Entry, rgb: Tensor) -> Tensor:
        """Latent tokens (N, R) of (3, H, W) in [-1, 1]: the posterior's mode, or a sample seeded by the content. Of
        condition images always the mode, which is what the latent base is given of them."""
        if entry.image:
            return self.family.encode_latents(self.vae, rgb[None])[0]
        for find in self._exact:
            known = find(entry.digest)  # of a synthetic picture at its own size
            if known is not None and len(known) == entry.size[0] * entry.size[1] // self.patch**2:
                return known.float()
        generator = None
        if self.recipe.data.latents == "sample":
            generator = torch.Generator().manual_seed(int(self.keys.of_image(entry)[:15], 16))
        return self.family.encode_latents(self.vae, rgb[None], generator)[0]

    @cached_property
    def _exact(self) -> list[Callable[[str], Tensor | None]]:
        return [stored_latents(folder, self.vae) for folder in self._synthetic]

    @property
    def vae(self) -> nn.Module:
        if self._vae is None:
            parts = self.family.load_parts(self.recipe.base, ("vae",), torch.float32, self.recipe.revision)
            self._vae = parts.vae.to(self.device)
        return self._vae

    @property
    def patch(self) -> int:
        """Side in pixels of the patch that one latent token stands for."""
        return self.family.pixel_patch(self.vae)

    def free(self) -> None:
        """Drop the models."""
        if self._text is not None or self._vae is not None:
            self._text = self._vae = None
            free_memory()  # takes a second in a large program


class FromCache:
    """`Encoded`, read from the two caches."""

    def __init__(self, encoder: Encoder, text: TensorCache, images: TensorCache):
        self.keys, self.dtype, self.text, self.images = encoder.keys, encoder.dtype, text, images
        self.needs_latents = encoder.recipe.loss.variance_reduction

    def latents(self, entry: Entry, rgb: Tensor) -> Tensor:
        if not self.needs_latents:
            return torch.empty(0, 0)
        return self.images[self.keys.of_image(entry)]

    def embeds(self, caption: str) -> Tensor:
        return self.text[self.keys.of_caption(caption)].to(self.dtype)


class Live:
    """`Encoded`, computed when asked for (cache.enabled: false); both models stay in memory. Values are rounded as the
    cache rounds them, so both ways train alike."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.embeds = lru_cache(maxsize=256)(self._embeds)

    def latents(self, entry: Entry, rgb: Tensor) -> Tensor:
        if not self.encoder.recipe.loss.variance_reduction:
            return torch.empty(0, 0)
        return rounded(self.encoder.encode_image(entry, rgb), self.encoder.recipe.cache.latents)

    def _embeds(self, caption: str) -> Tensor:
        value = self.encoder.encode_captions([caption])[0]
        return rounded(value, self.encoder.text_storage).to(self.encoder.dtype)
