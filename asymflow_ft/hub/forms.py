"""Converted models as they lie in folders and on the Hub: opening each form, and the pipeline of what was opened.

adapter: the released format (hub/official.py). merged: `transformer/` with all folded in, `subspace/`, `codec/`.
pipeline: merged, with the text encoder, a scheduler and the code that stock diffusers needs. Both hold the adapter
they were made from in `adapter/`, if there is one, and always transformer = base + adapter, bit for bit. No code that
lies in a folder is run here.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
import yaml
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.families import family_named, family_of, name_of, pixel_pipeline_named
from asymflow_ft.families.base import load_index, opening
from asymflow_ft.hub.official import BUFFERS, WEIGHTS, adapter_subspace, apply_adapter, load_adapter, trained_tensors
from asymflow_ft.hub.provenance import FILE, UNKNOWN, read_provenance

# no code, and no pickle
DATA_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md", "assets/*.png"]
TEXT_FILES = ["text_encoder*/*", "tokenizer*/*"]
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name for it
PICTURES = ("samples.png", "alignment.png")  # in assets/


@dataclass(frozen=True)
class Converted:
    """A converted model that was opened; the transformer comes when asked for.

    provenance: see hub/provenance.py. trained: an adapter's tensors without its buffers, None if only the whole
    transformer is there. folder: holds `transformer/`, None if it is to be made from the base. pictures: files for
    `assets/`, by their name there.
    """

    family: ModuleType
    subspace: PixelSubspace
    codec: PixelCodec
    provenance: Mapping[str, Any]
    trained: Mapping[str, Tensor] | None = None
    folder: Path | None = None
    pictures: Mapping[str, Path] = field(default_factory=dict)

    @property
    def has_lora(self) -> bool:
        """Whether there are LoRA factors, which a merged transformer no longer shows."""
        return self.trained is not None and any(".lora_" in name for name in self.trained)

    def with_dtype(self, dtype: torch.dtype | None) -> "Converted":
        """The same with `dtype` for its transformer; None leaves what is stored, bfloat16 if that is not known.

        The trained tensors of a LoRA run become float32 beside a float32 transformer, else float16 as in the
        released adapter; those of a full finetune have the transformer's own precision.
        """
        if dtype is None:
            dtype = getattr(torch, self.provenance["dtype"] or "bfloat16")
        name = str(dtype).removeprefix("torch.")
        kept = dtype if dtype == torch.float32 or not self.has_lora else torch.float16
        trained = None if self.trained is None else trained_tensors(self.trained, dtype=kept)
        return replace(self, trained=trained, provenance={**self.provenance, "dtype": name})

    def transformer(self) -> ModelMixin:
        """The pixel transformer with everything folded in, in the precision that `with_dtype` set."""
        dtype = getattr(torch, self.provenance["dtype"])
        if self.folder is not None:
            with opening(str(self.folder)):
                return AutoModel.from_pretrained(
                    str(self.folder), subfolder="transformer", torch_dtype=dtype, use_safetensors=True
                ).eval()
        base = self.family.load_parts(self.provenance["base"], ("transformer",), dtype, self.provenance["revision"])
        recipe = self.provenance["recipe"] or {}
        buffers = dict(zip(BUFFERS, self.subspace.float32(), strict=True))
        return apply_adapter(
            self.family, base.transformer, {**(self.trained or {}), **buffers},
            base_weights=recipe.get("train.base_weights", "full"),
        )  # fmt: skip

    def pipeline(self, transformer: ModelMixin) -> DiffusionPipeline:
        """The pixel pipeline around `transformer`, with the text encoder that lies beside it or the base's."""
        kind = pixel_pipeline_named(self.provenance["pipeline_class"])
        return kind(
            scheduler=flow_solver(), transformer=transformer, subspace=self.subspace, codec=self.codec,
            **self._text_parts(transformer.dtype), **(self.provenance["settings"] or {}),
        )  # fmt: skip

    def _text_parts(self, dtype: torch.dtype) -> dict[str, Any]:
        if self.folder is None or not (self.folder / self.family.TEXT_PARTS[0]).is_dir():
            base, revision = self.provenance["base"], self.provenance["revision"]
            parts = self.family.load_parts(base, self.family.TEXT_PARTS, dtype, revision)
            return {name: parts.components[name] for name in self.family.TEXT_PARTS}
        index = load_index(str(self.folder))
        loaded = {}
        for name in self.family.TEXT_PARTS:
            library, kind_name = index[name]
            if library != "transformers":
                raise ValueError(f"{self.folder} has a {name} of {library!r}; only transformers' own are loaded")
            kind = getattr(transformers, kind_name)
            options = {"dtype": dtype} if issubclass(kind, nn.Module) else {}
            with opening(str(self.folder)):
                loaded[name] = kind.from_pretrained(self.folder / name, **options)
        return loaded


def open_converted(
    source: str | Path, base: str | None = None, revision: str | None = None, text: bool = True
) -> Converted:
    """Open a converted model of any form.

    Args:
        source: a folder, an adapter's safetensors file, or a Hub id.
        base, revision: the latent base of an adapter; None takes the one that its files name.
        text: fetch the text encoder of a pipeline on the Hub, without which `Converted.pipeline` takes the base's.

    Raises:
        ValueError: it cannot be fetched or read, is no converted model, or its base is not known.
    """
    path = fetch_converted(source, text)
    if (path / "transformer/config.json").is_file() and (path / "subspace/config.json").is_file():
        return _open_merged(path)
    if path.is_file() or (path / WEIGHTS).is_file():
        return _open_adapter(path, base, revision)
    if (path / LORA_WEIGHTS).is_file():
        raise ValueError(f"{source} is a LoRA; give the converted model that it belongs to, and this with --lora")
    if (path / "model_index.json").is_file():
        raise ValueError(f"{source} is a latent pipeline; convert it first with `asymflow-ft align` and `finetune`")
    if (path / "recipe.yaml").is_file():
        raise ValueError(f"{source} is a run; give the pipeline/ in it, or an export of it")
    raise ValueError(
        f"{source} is no converted model: neither a pipeline or merged folder (transformer/ and subspace/) nor an "
        f"adapter ({WEIGHTS})"
    )


def fetch_converted(source: str | Path, text: bool = True) -> Path:
    """Where a converted model lies: a local path as it is, a Hub id's files in the cache, under their commit.

    Args:
        text: see open_converted.

    Raises:
        ValueError: it cannot be fetched.
    """
    path = Path(source)
    if path.exists():
        return path
    without = [] if text else TEXT_FILES
    with opening(str(source)):  # a few kilobytes first, for a latent pipeline is not worth its gigabytes
        path = Path(snapshot_download(str(source), allow_patterns="*.json", ignore_patterns=without))
        if (path / "subspace/config.json").is_file() or not (path / "model_index.json").is_file():
            path = Path(snapshot_download(str(source), allow_patterns=DATA_FILES, ignore_patterns=without))
    return path


def add_loras(pipeline: DiffusionPipeline, given: Sequence[str]) -> None:
    """Put style LoRAs on a pipeline.

    Args:
        given: PATH or PATH=WEIGHT, where PATH is a folder, a safetensors file or a Hub id.

    Raises:
        ValueError: a weight is no number, or a LoRA cannot be read or does not fit.
    """
    weights: dict[str, float] = {}
    for i, one in enumerate(given):
        path, _, weight = one.rpartition("=") if "=" in one and not Path(one).exists() else (one, "", "1")
        if not Path(path).exists() and (path.count("/") != 1 or path.startswith((".", "/"))):
            raise ValueError(f"--lora {one}: there is no file or folder {path}, nor is that a Hub id")
        try:
            weights[f"lora_{i}"] = float(weight)
            if not math.isfinite(weights[f"lora_{i}"]):
                raise ValueError(f"the weight {weight} is no finite number")
            _check_lora(pipeline, path)
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            pipeline.load_lora_weights(path, adapter_name=f"lora_{i}", use_safetensors=True)
        except (OSError, ValueError, LookupError, RuntimeError, SafetensorError, HFValidationError) as error:
            raise ValueError(f"the LoRA {one} cannot be put on this model: {error}") from error
    if weights:
        pipeline.set_adapters(list(weights), list(weights.values()))


def _check_lora(pipeline: DiffusionPipeline, path: str) -> None:
    """Raise ValueError unless the transformer has a place for every tensor of a LoRA; diffusers leaves others out."""
    state = pipeline.lora_state_dict(path, use_safetensors=True)
    modules = {f"transformer.{name}" for name, _ in pipeline.transformer.named_modules()}
    for name in state:
        module = re.split(r"\.(?:lora|lokr)_|\.alpha$", name)[0]
        if ".lora_" in name and not all(f"{module}.lora_{side}.weight" in state for side in "AB"):
            raise ValueError(f"it is not whole: {name} has no counterpart")
        if module not in modules:
            raise ValueError(f"this model has no place for its {name}; was it trained on another kind of model?")


def _open_merged(path: Path) -> Converted:
    provenance = read_provenance(path)
    index = path / "model_index.json"
    if index.is_file():  # what stock diffusers reads, so what its user may have edited
        stated = json.loads(index.read_text(encoding="utf-8"))
        provenance["settings"] = {
            key: value
            for key, value in stated.items()
            if not (key.startswith("_") or isinstance(value, list) or value is None)
        }
    trained = None
    if (path / "adapter" / WEIGHTS).is_file():
        state, _, _ = load_adapter(path / "adapter")
        trained = {name: tensor for name, tensor in state.items() if name not in BUFFERS}
    with opening(str(path)):
        subspace, codec = (kind.from_pretrained(path / name) for kind, name in _COMPONENTS)
    return Converted(
        family_named(provenance["family"]), subspace, codec, provenance, trained, path, _pictures(path)
    )  # fmt: skip


_COMPONENTS = ((PixelSubspace, "subspace"), (PixelCodec, "codec"))


def _open_adapter(path: Path, base: str | None, revision: str | None) -> Converted:
    folder = path if path.is_dir() else path.parent
    state, config, metadata = load_adapter(path)
    provenance = read_provenance(folder) if (folder / FILE).is_file() else _from_metadata(metadata)
    if base is not None:
        provenance |= {"base": base, "revision": revision}
    elif revision is not None:
        provenance["revision"] = revision
    provenance["base"] = provenance["base"] or _base_of_card(folder / "README.md")
    if provenance["base"] is None:
        raise ValueError(f"{path} does not name the base that it belongs to; give it with --base")
    family = family_of(provenance["base"], provenance["revision"])
    if config and config["_class_name"] != family.ADAPTER_CLASS:
        raise ValueError(f"{path} is a {config['_class_name']}, and its base needs a {family.ADAPTER_CLASS}")
    if missing := [end for end in family.TRAINED_ENDS if f"{end}.weight" not in state]:
        raise ValueError(f"{path} is not whole: it has no {', '.join(missing)}")
    provenance["family"] = name_of(family)
    if provenance["pipeline_class"] is None:
        parts = family.load_parts(provenance["base"], (), torch.float32, provenance["revision"])
        provenance["pipeline_class"] = family.pixel_pipeline_class(parts).__name__
    subspace = adapter_subspace(state)  # rounded to bfloat16; the exact one lies beside ours
    if (folder / "subspace/config.json").is_file():
        with opening(str(folder)):
            subspace = PixelSubspace.from_pretrained(folder / "subspace")
    codec = PixelCodec(**provenance["pixels"] or {})
    trained = {name: tensor for name, tensor in state.items() if name not in BUFFERS}
    return Converted(family, subspace, codec, provenance, trained, None, _pictures(folder))


def _from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Provenance as far as an adapter's file alone tells it."""
    known = {"base": metadata.get("base_model"), "revision": metadata.get("base_revision")}
    known |= {key: json.loads(metadata[key]) for key in ("pixels", "recipe", "step", "settings") if key in metadata}
    return {**UNKNOWN, "form": "adapter", "weights": metadata.get("weights"), **known}


def _base_of_card(file: Path) -> str | None:
    try:
        named = ModelCard(file.read_text(encoding="utf-8")).data.base_model
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return named[0] if isinstance(named, list) else named


def _pictures(folder: Path) -> dict[str, Path]:
    found = {name: folder / "assets" / name for name in PICTURES}
    return {name: file for name, file in found.items() if file.is_file()}
