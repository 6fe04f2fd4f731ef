"""Scores of single pictures by pretrained networks: agreement with the prompt, and distance to another picture."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from asymflow_ft.evaluation.features import opening

Picture = Path | Image.Image | Callable[[], Image.Image]  # the last is opened when it is looked at
_BATCH = 16
HPSV3_PYTHON = "ASYMFLOW_HPSV3_PYTHON"


def open_picture(picture: Picture) -> Image.Image:
    if isinstance(picture, Path):
        with Image.open(picture) as stored:
            return stored.convert("RGB")
    return (picture if isinstance(picture, Image.Image) else picture()).convert("RGB")


def check_scorers(names: Sequence[str], clip: str) -> None:
    """Before anything is drawn: what the metrics `names` need is there. Loads no large weights.

    Raises:
        ValueError: a missing extra, or a CLIP that does not open.
    """
    if "clip" in names:
        from transformers import AutoTokenizer

        with opening(clip):
            AutoTokenizer.from_pretrained(clip)
    if "hpsv2" in names:
        _import_open_clip()
    if "hpsv3" in names:
        _hpsv3_python()
    if "lpips" in names:
        open_lpips("cpu")


@torch.no_grad()
def clip_scores(texts: Sequence[str], pictures: Sequence[Picture], model: str, device: torch.device | str) -> Tensor:
    """Cosine of CLIP's embeddings of text and picture, (N,). `model`: a Hub repository or a folder.

    Raises:
        ValueError: the model does not open.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    with opening(model):
        network = CLIPModel.from_pretrained(model).eval().to(device)
        processor, tokenizer = AutoImageProcessor.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    length = network.config.text_config.max_position_embeddings
    found = []
    for text, images in _batches("CLIP", texts, pictures):
        tokens = tokenizer(text, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        seen = processor(images=images, return_tensors="pt").to(device)
        said = network.get_text_features(**tokens).pooler_output
        found.append(F.cosine_similarity(network.get_image_features(**seen).pooler_output, said).float().cpu())
    return torch.cat(found)


@torch.no_grad()
def hpsv2_scores(texts: Sequence[str], pictures: Sequence[Picture], device: torch.device | str) -> Tensor:
    """Human Preference Score v2.1, (N,). The hpsv2 package asks for an old pytest and protobuf, so its weights are
    opened by open_clip, on which it is built.

    Raises:
        ValueError: open_clip is missing, or the weights do not open.
    """
    from huggingface_hub import hf_hub_download

    open_clip = _import_open_clip()
    with opening("xswu/HPSv2"):
        weights = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
        network, _, process = open_clip.create_model_and_transforms(
            "ViT-H-14", pretrained=weights, device=device, image_resize_mode="longest"
        )
    network.eval()
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    found = []
    for text, images in _batches("HPSv2.1", texts, pictures):
        seen = network.encode_image(torch.stack([process(image) for image in images]).to(device))
        found.append(F.cosine_similarity(seen, network.encode_text(tokenizer(text).to(device))).float().cpu())
    return torch.cat(found)


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"metric hpsv2 needs open_clip, which does not import ({error}). Install it with "
            "`pip install 'asymflow-ft[hpsv2]'`, or leave hpsv2 out of --metrics"
        ) from error
    return open_clip


def hpsv3_scores(texts: Sequence[str], pictures: Sequence[Picture], device: torch.device | str) -> Tensor:
    """Human Preference Score v3 (its mean, mu), (N,), by the hpsv3 package.

    The package asks for transformers 4.45.2, which this one cannot run with, so it has an environment of its own:
    hpsv3_worker.py runs there and prints a score for each line that it reads.

    Raises:
        ValueError: no such environment is named, or the worker stopped.
    """
    python = _hpsv3_python()
    worker = [python, str(Path(__file__).with_name("hpsv3_worker.py")), str(device)]
    with TemporaryDirectory() as folder:
        files = []
        for i, picture in enumerate(pictures):
            files.append(picture if isinstance(picture, Path) else Path(folder) / f"{i}.png")
            if not isinstance(picture, Path):
                open_picture(picture).save(files[-1])
        tasks = Path(folder) / "tasks.jsonl"
        rows = [{"prompt": t, "file": str(f.resolve())} for t, f in zip(texts, files, strict=True)]
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            process = subprocess.Popen([*worker, str(tasks)], stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise ValueError(f"{HPSV3_PYTHON}={python} does not run: {error}") from error
        marked = (line[len("score ") :] for line in process.stdout or () if line.startswith("score "))
        found = [float(score) for score in tqdm(marked, "HPSv3", len(rows), leave=False, mininterval=1)]
        if process.wait() or len(found) != len(rows):
            raise ValueError(f"the hpsv3 package stopped after {len(found)} of {len(rows)} pictures; see above")
    return torch.tensor(found)


def _hpsv3_python() -> str:
    python = os.environ.get(HPSV3_PYTHON)
    if not python:
        raise ValueError(
            "metric hpsv3 needs the hpsv3 package, which asks for transformers 4.45.2 and so for an environment of "
            "its own: `python -m venv hpsv3 && hpsv3/bin/pip install hpsv3 && "
            f"export {HPSV3_PYTHON}=$PWD/hpsv3/bin/python`; or leave hpsv3 out of --metrics"
        )
    return python


def open_lpips(device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS of two RGB batches (B, 3, H, W) in [-1, 1], (B,). Its AlexNet: training minimises the one with VGG.

    Raises:
        ValueError: the package is missing or broken.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"metric lpips needs the lpips package, which does not import ({error}). Install it with "
            "`pip install 'asymflow-ft[lpips]'` (it needs a torchvision that fits your torch), or leave lpips out of "
            "--metrics"
        ) from error
    network = lpips.LPIPS(net="alex", verbose=False).requires_grad_(False).eval().to(device)
    return lambda a, b: network(a.to(device), b.to(device)).flatten().float().cpu()


def _batches(
    title: str, texts: Sequence[str], pictures: Sequence[Picture]
) -> Iterator[tuple[list[str], list[Image.Image]]]:
    for start in tqdm(range(0, len(texts), _BATCH), desc=title, leave=False, mininterval=1):
        stop = start + _BATCH
        yield list(texts[start:stop]), [open_picture(picture) for picture in pictures[start:stop]]
