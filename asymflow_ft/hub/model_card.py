"""README.md of a pushed model, from its provenance (asymflow_ft.json)."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from asymflow_ft.components.pipelines import CFG_SCALE, NEGATIVE_PROMPT
from asymflow_ft.hub.provenance import without_folders

FORMS = {
    "pipeline": "a complete diffusers pipeline",
    "adapter": "an adapter in the format of the AsymFlow release",
    "merged": "the finetuned transformer, with its pixel subspace and colour codec",
    "lora": "a style LoRA for a pixel-space pipeline",
}
ROWS = {"real": "real pictures", "latent base": "latent base", "step 0": "pixels, step 0", "finetuned": "finetuned"}
COLUMNS = {
    "retrieval_at_5": "retrieval@5", "picture_error": "picture error", "sharpness": "sharpness",
}  # fmt: skip
CITATION = """```bibtex
@misc{chen2026asymflow,
  title = {Asymmetric Flow Models},
  author = {Chen, Hansheng and Ackermann, Jan and Kim, Minseo and Wetzstein, Gordon and Guibas, Leonidas},
  year = {2026},
  eprint = {2605.12964},
  archivePrefix = {arXiv}
}
```"""


def model_card(
    provenance: dict[str, Any], repo_id: str, assets: frozenset[str] = frozenset(), terms: str = "", notice: str = ""
) -> str:
    """README.md with the front matter of a Hub model.

    Args:
        provenance: see asymflow_ft.hub.provenance; what is null or missing is left out of the card.
        assets: names of the pictures in the folder's assets/.
        terms: what the base's licence means for this model, see cards.model_terms.
        notice: the sentence that the base's licence requires; given, the card asks readers to accept the licence.
    """
    provenance = {**provenance, **{key: without_folders(provenance.get(key)) for key in ("base", "init_from")}}
    version = (provenance.get("versions") or {}).get("asymflow-ft")
    about = [
        f"This is {FORMS[provenance['form']]}, made from {_link(provenance['base'])} with "
        "[AsymFlow](https://arxiv.org/abs/2605.12964), which turns a latent into a pixel-space text-to-image model. "
        "It draws pixels itself; no VAE takes part in sampling. Made with asymflow-ft"
        f"{f' {version}' if version else ''}; `asymflow_ft.json` holds the facts below in full."
    ]
    if provenance.get("init_from"):
        about.append(f"Training started from {_link(provenance['init_from'])}.")
    sections = [
        ("", "\n\n".join(about)),
        ("", "![samples](assets/samples.png)" if "samples.png" in assets else ""),
        ("Load it", _loading(provenance, repo_id)),
        ("Sampling settings", _settings(provenance)),
        ("Training", _training(provenance)),
        ("Alignment", _alignment(provenance.get("alignment") or {}, "alignment.png" in assets)),
        ("Figures", _figures(provenance.get("metrics") or {})),
        ("Intended use and limits", _limits(provenance)),
        ("Safety", _safety(provenance)),
        ("Licence", "\n\n".join(text for text in (terms, f"> {notice}" if notice else "") if text)),
        ("Citation", CITATION),
    ]
    parts = [f"## {title}\n\n{text}" if title else text for title, text in sections if text]
    front = _front_matter(provenance, "samples.png" in assets, bool(notice))
    title = repo_id.rsplit("/", 1)[-1]
    return f"---\n{front.to_yaml()}\n---\n\n# {title}\n\n" + "\n\n".join(parts) + "\n"


def gating(licence: dict[str, str]) -> dict[str, Any]:
    """Front matter with which the Hub asks readers to accept a non-commercial licence before they download."""
    name, link = licence.get("license_name", licence["license"]), licence.get("license_link", "its LICENSE file")
    return {
        "extra_gated_prompt": f"This model derives from a base under {name} ({link}). Read that licence before you "
        "ask for access; it covers this model too.",
        "extra_gated_fields": {
            "I have read the licence, accept it and will use this model for non-commercial purposes only": "checkbox"
        },
    }


def is_hub_id(name: str | None) -> bool:
    """Whether a base is a repository and no local folder."""
    return name is not None and name.count("/") == 1 and name[0] not in "/." and not Path(name).exists()


def _front_matter(provenance: dict[str, Any], has_samples: bool, gated: bool) -> ModelCardData:
    form, licence = provenance["form"], provenance.get("licence") or {}
    base = (provenance.get("init_from") if form == "lora" else None) or provenance["base"]
    extra = gating(licence) if gated else {}
    if is_hub_id(base):
        extra["base_model_relation"] = "adapter" if form in ("adapter", "lora") else "finetune"
    if has_samples:
        extra["widget"] = [{"text": "sample grid of the run", "output": {"url": "assets/samples.png"}}]
    return ModelCardData(
        **licence, base_model=base if is_hub_id(base) else None, library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["asymflow", "pixel-space", provenance["family"], *(["lora"] if form == "lora" else [])], **extra,
    )  # fmt: skip


def _loading(provenance: dict[str, Any], repo_id: str) -> str:
    draw = 'pipeline("a photo of a red fox in snow").images[0].save("fox.png")'
    ours = f'asymflow-ft sample --pipeline {repo_id} --prompt "a photo of a red fox in snow"'
    if provenance["form"] == "pipeline":
        return (
            f"```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained(\n    "{repo_id}", trust_remote_code=True, '
            f'dtype=torch.bfloat16\n).to("cuda")\n{draw}\n```\n\nNothing but torch, diffusers (0.38 or later) and '
            "transformers has to be installed. `trust_remote_code=True` runs the Python files of this repository on "
            'your machine: read them first, and pin what you read with `revision="COMMIT"`. Without network: '
            f'`snapshot_download("{repo_id}")` beforehand, then load the folder that it returns.'
        )
    if provenance["form"] == "lora":
        start = provenance.get("init_from")
        base = start if is_hub_id(start) else "PIPELINE"
        named = "" if is_hub_id(start) else " `PIPELINE` stands for it."
        return (
            f"It belongs on the pixel-space pipeline it was trained on, not on the latent base.{named}\n\n"
            f'```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\npipeline = '
            f'DiffusionPipeline.from_pretrained(\n    "{base}", trust_remote_code=True, dtype=torch.bfloat16\n)'
            f'.to("cuda")\npipeline.load_lora_weights("{repo_id}", adapter_name="style")\n'
            f'pipeline.set_adapters(["style"], [1.0])\n{draw}\n```'
        )  # fmt: skip
    base = provenance["base"]
    needs = f"What it needs of its base, {_link(base)}, is fetched beside it."
    if not is_hub_id(base):
        needs = f"It needs its base, {_link(base)}: name it with `--base`."
    text = f"{needs}\n\n```sh\n{ours}\nasymflow-ft export {repo_id} --form pipeline --out pipeline\n```"
    if provenance["form"] == "adapter":
        return (
            f"{text}\n\nThe second line writes a "
            "pipeline that loads in plain diffusers. In ComfyUI, the node of the method's authors, "
            "[Lakonik/ComfyUI-piFlow](https://github.com/Lakonik/ComfyUI-piFlow), reads "
            "`diffusion_pytorch_model.safetensors` as it is."
        )
    return (
        f"{text}\n\nThe second line writes a pipeline that loads in plain diffusers. The transformer alone is a stock "
        "diffusers class, but draws nothing useful without `subspace/`: its output is not yet a velocity."
    )


def _settings(provenance: dict[str, Any]) -> str:
    settings = provenance.get("settings") or {}
    guidance = 1.0 if settings.get("distilled_guidance") else CFG_SCALE
    lines = [f"- steps: 38\n- guidance_scale: {guidance:g}"]
    lines += [f"- negative_prompt: {NEGATIVE_PROMPT}"] if guidance != 1 else []
    lines += [f"- {name}: {_number(value)}" for name, value in sorted(settings.items()) if value is not None]
    return "\n".join(lines)


def _training(provenance: dict[str, Any]) -> str:
    data, run = provenance.get("data") or {}, (provenance.get("metrics") or {}).get("run") or {}
    facts = {
        "base": " at ".join(str(part) for part in (provenance["base"], provenance.get("revision")) if part),
        "steps": provenance.get("step"),
        "weights": provenance.get("weights"),
        "precision of the files": provenance.get("dtype"),
        "data": _data(data),
        **{f"run, {name.replace('_', ' ')}": value for name, value in run.items() if name != "steps"},
        "software": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
    }
    text = "\n".join(f"- {name}: {_number(value)}" for name, value in facts.items() if value not in (None, ""))
    if provenance.get("recipe"):
        recipe = yaml.safe_dump(without_folders(provenance["recipe"]), sort_keys=False, allow_unicode=True)
        text += f"\n\n<details><summary>Recipe</summary>\n\n```yaml\n{recipe}```\n\n</details>"
    return text


def _data(data: dict[str, Any]) -> str:
    counts = ", ".join(f"{data[name]:,} {name}" for name in ("samples", "images") if data.get(name))
    sources = ", ".join(str(source) for source in without_folders(data.get("sources") or []))
    return " from ".join(part for part in (counts, sources) if part)


def _alignment(report: dict[str, Any], has_picture: bool) -> str:
    if not report:
        return ""
    lines = [f"- images: {report['images']:,}, tokens: {report['tokens']:,}"]
    lines.append(f"- patches of {report['patch']}x{report['patch']} pixels, rank {report['rank']}")
    lines.append(f"- scale s: {report['scale']:.4f}, orthonormality error: {report['orthonormality_error']:.1e}")
    bands = ", ".join(f"{name} {share:.0%}" for name, share in report["explained_by_frequency"].items())
    lines.append(
        f"- pixel energy that the lifted latents explain: {report['explained_total']:.1%} "
        f"(by frequency in the patch: {bands})"
    )
    lines.append(
        f"- timestep shift in pixels: {report['pixel_shift']:.2f}, of the latent base: {report['latent_shift']:g}"
    )
    return "\n".join(lines) + ("\n\n![alignment](assets/alignment.png)" if has_picture else "")


def _figures(metrics: dict[str, Any]) -> str:
    errors = metrics.get("held_out_error") or {}
    rows = {name: metrics.get(name) or {} for name in ROWS if metrics.get(name) or errors.get(name)}
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    levels = sorted({level for error in errors.values() for level in error}, key=float)
    if not rows:
        return ""
    head = ["", *(COLUMNS[name] for name in columns), *(f"error at sigma {level}" for level in levels)]
    table = [head, ["---"] * len(head)]
    for name, row in rows.items():
        cells = [row.get(column) for column in columns] + [errors.get(name, {}).get(level) for level in levels]
        table.append([ROWS[name], *("" if cell is None else _number(cell) for cell in cells)])
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    return (
        f"{text}\n\nMeasured at the end of the run, on its own prompts and held-out images. Retrieval@5: share of "
        "prompts whose right picture is among the five nearest to what was drawn. Picture error: Oklab difference "
        "from the right picture, times 100. Error at sigma: held-out error of the one-step estimate at that noise "
        "level."
    )


def _limits(provenance: dict[str, Any]) -> str:
    size = (provenance.get("settings") or {}).get("default_size")
    trained = f" It was trained at about {size}x{size} pixels; other sizes may look worse." if size else ""
    return (
        "Text-to-image drawing, research on pixel-space models, and further finetuning, within the licence below."
        f"{trained} It inherits what its base cannot do, such as long lettering, exact counts and facts, and may have "
        "lost abilities of the base that its training data does not show. No public benchmark was run."
    )


def _safety(provenance: dict[str, Any]) -> str:
    code = "" if provenance["form"] == "pipeline" else ", and the repository holds no code"
    return (
        "No filter looks at prompts or pictures: add one before you offer this model to others. It can draw "
        "offensive, false or biased pictures, and look-alikes of real people. Say that pictures are AI-generated "
        "where people could take them for real. Weights are safetensors files, which cannot run code when they are "
        f"loaded{code}."
    )


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name}` (a local folder)"


def _number(value: Any) -> str:
    return (
        f"{value:,.4g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)
    )
