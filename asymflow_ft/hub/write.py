"""Writing converted models: the forms of hub/forms.py."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from torch import Tensor

from asymflow_ft.families.base import transformer_on_meta
from asymflow_ft.hub.bundle import bundle
from asymflow_ft.hub.forms import Converted
from asymflow_ft.hub.official import NUM_TIMESTEPS, SIGMA_MIN, adapter_config, save_adapter, subspace_buffers
from asymflow_ft.hub.provenance import versions, write_provenance

Form = Literal["pipeline", "adapter", "merged"]
FORMS: tuple[Form, ...] = get_args(Form)
SHARD_SIZE = "5GB"


def export(
    model: Converted, out: str | Path, form: Form, dtype: torch.dtype | None = None, shard_size: str = SHARD_SIZE
) -> None:
    """Write a converted model as a folder that is whole or absent.

    Args:
        dtype: see Converted.with_dtype. shard_size: most that one weights file holds.

    Raises:
        ValueError: `out` holds files, a value does not fit the precision, or the folder cannot be written.
    """
    model = model.with_dtype(dtype)
    with whole_folder(Path(out), {**model.provenance, "form": form}, model.pictures) as folder:
        _write(model, folder, form, shard_size)


@contextmanager
def whole_folder(out: Path, provenance: Mapping[str, Any], pictures: Mapping[str, Path]) -> Iterator[Path]:
    """Inside, a folder beside `out` to write into; afterwards it is `out`, with provenance and pictures, or gone.

    Raises:
        ValueError: `out` holds files, or something cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists; remove it or choose another folder")
    part = out.with_name(f"{out.name}.asymflow-part")  # whatever a broken write left is removed, so a name of our own
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        write_provenance(part, {**provenance, "versions": versions()})
        for name, file in pictures.items():
            (part / "assets").mkdir(exist_ok=True)
            shutil.copy(file, part / "assets" / name)
        if out.exists():
            out.rmdir()
        part.rename(out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"could not write {out}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(model: Converted, out: Path, form: Form, shard_size: str) -> None:
    if form == "adapter":
        trained, config = model.trained, {}
        if trained is None:  # of a full finetune: every tensor is trained
            transformer = model.transformer()
            trained, config = transformer.state_dict(), transformer.config
        _write_adapter(model, out, trained, config)
    else:
        transformer = model.transformer()
        if model.has_lora:
            assert model.trained is not None
            _write_adapter(model, out / "adapter", model.trained, transformer.config)
    if form == "pipeline":
        _write_pipeline(model.pipeline(transformer), out, shard_size)
    else:
        parts: dict[str, ModelMixin] = {"subspace": model.subspace, "codec": model.codec}
        if form == "merged":
            parts["transformer"] = transformer
        for name, part in parts.items():
            part.save_pretrained(out / name, max_shard_size=shard_size)


def _write_adapter(
    model: Converted, out: Path, trained: Mapping[str, Tensor], transformer_config: Mapping[str, Any]
) -> None:
    provenance = model.provenance
    known = {
        "sigma_min": str(SIGMA_MIN), "num_timesteps": str(NUM_TIMESTEPS), "base_model": provenance["base"],
        "base_revision": provenance["revision"], "weights": provenance["weights"],
    }  # fmt: skip
    known |= {
        key: json.dumps(provenance[key]) for key in ("pixels", "settings", "recipe", "step") if provenance[key]
    }  # fmt: skip
    ranks = {tensor.shape[0] for name, tensor in trained.items() if ".lora_A." in name}
    if ranks:
        known |= {"lora_rank": str(max(ranks)), "lora_alpha": str(max(ranks))}
    exact = provenance["dtype"] == "float32"
    buffers = subspace_buffers(model.subspace, torch.float32 if exact else torch.bfloat16)
    state = {name: tensor.cpu().contiguous() for name, tensor in trained.items()}
    if not transformer_config:
        transformer_config = transformer_on_meta(model.family, provenance["base"], provenance["revision"]).config
    save_adapter(
        out, {**state, **buffers}, adapter_config(model.family, transformer_config, model.subspace),
        {key: value for key, value in known.items() if value is not None},
    )  # fmt: skip


def _write_pipeline(pipeline: DiffusionPipeline, out: Path, shard_size: str) -> None:
    """What diffusers writes, with the classes that it does not know replaced by files of code beside the weights."""
    pipeline.save_pretrained(out, max_shard_size=shard_size)
    index = json.loads((out / "model_index.json").read_text(encoding="utf-8"))
    for key, kind in (
        ("_class_name", type(pipeline)), ("subspace", type(pipeline.subspace)), ("codec", type(pipeline.codec)),
    ):  # fmt: skip
        code = bundle(kind, "pipeline" if key == "_class_name" else key)
        folder = out if key == "_class_name" else out / key
        (folder / f"{code.name}.py").write_text(code.source, encoding="utf-8")
        index[key] = [code.name, kind.__name__]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
