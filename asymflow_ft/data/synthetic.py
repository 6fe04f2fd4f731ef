"""The exact latents beside the pictures of `asymflow-ft synthesize`."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

SETTINGS = "synthesize.json"


def weights_digest(module: nn.Module) -> str:
    """A hash of all tensors in float32: equal for the same weights, from whatever folder or repository they come."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; [] when there is none."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    return [json.loads(line) for line in lines if line]


def stored_latents(folder: str | Path, vae: nn.Module) -> Callable[[str], Tensor | None]:
    """Look up the latents that a synthetic picture was decoded from, so that nobody needs to encode it.

    Args:
        folder: any image folder. vae: the VAE that training uses; latents of other weights are not given out.

    Returns:
        A function from the SHA-256 of an image file to its whitened latent tokens (N, R) in float16, or None where
        they are not known: another folder, a picture that was added or edited. They belong to the picture at its own
        size, not to a resized or cropped one.
    """
    folder = Path(folder)
    settings = folder / SETTINGS
    known = {}
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8"))["vae"] == weights_digest(vae):
        known = {row["sha256"]: row for row in read_rows(folder / "metadata.jsonl")}

    def find(sha256: str) -> Tensor | None:
        if sha256 not in known:
            return None
        row = known[sha256]
        with safe_open(folder / row["latents"], framework="pt") as file:
            return file.get_tensor(row["file_name"])

    return find
