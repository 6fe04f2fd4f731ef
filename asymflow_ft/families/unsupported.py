"""Why a model of another kind cannot be converted, by the class names in its index or config."""

import re
from typing import Any

_VIDEO = re.compile(
    r"^(Wan|HunyuanVideo|HunyuanSkyreels|LTX|CogVideoX|Mochi|Allegro|SkyReels|Cosmos|EasyAnimate|ConsisID|Latte|AnyFlow"
    r"|AnimateDiff|ChronoEdit|Helios|Lucy|PIA|I2VGen)|Video|[TI]2V"
)
_NOISE = re.compile(r"^(DDPM|DDIM|PNDM|LCM|EulerDiscrete|EulerAncestral|HeunDiscrete|LMSDiscrete|DDPMWuerstchen)")
_REASONS = {
    "pixel": "it draws pixels already, without latents. A model that this tool converted is drawn with `asymflow-ft "
    "sample`, and trained further with the recipe key init_from",
    "video": "a video model's latent holds several frames (four, and one for the first, in most), so no latent token "
    "belongs to one patch of one picture",
    "u-net": "it predicts with a U-Net: convolutions at several sizes have no linear layers that read and write one "
    "latent token, which the lift needs, and a noise prediction is no velocity",
    "rae": "its latents are features of a representation encoder (RAE), far from a linear map of "
    "pixels, so the lifted model would not start from the base's pictures",
    "tokens": "it draws with discrete tokens, one after another or unmasked in groups; there is no velocity of "
    "latents that could be lifted to pixels",
    "distilled": "it is step-distilled: it jumps between noise levels and cannot be finetuned with flow matching; use "
    "the undistilled base of the same name",
    "noise": "its scheduler is one for noise prediction, while the method lifts the velocity of a flow model",
}


def reason(index: dict[str, Any]) -> str | None:
    """Why no family can convert a pipeline, or None when nothing is known against it.

    Args:
        index: its model_index.json.
    """
    name = index.get("_class_name")
    parts = {part: value[1] or "" for part, value in index.items() if isinstance(value, list) and part[0] != "_"}
    if isinstance(name, list) or "subspace" in parts:  # of a class that travels with the model: ours
        kind = "pixel"
    elif _VIDEO.search(name or ""):
        kind = "video"
    elif "transformer" in parts and not {"vae", "vqvae"} & set(parts):
        kind = "pixel"
    elif any("RAE" in part for part in parts.values()):
        kind = "rae"
    elif any("UNet" in part for part in parts.values()):
        kind = "u-net"
    elif any(re.search(r"^VQ|^GlmImage|LLaDA", part) for part in parts.values()):
        kind = "tokens"
    elif re.search(r"Distilled|Sprint", name or ""):
        kind = "distilled"
    elif _NOISE.search(parts.get("scheduler", "")):
        kind = "noise"
    else:
        return None
    return _REASONS[kind]


def reason_without_index(config: dict[str, Any]) -> str:
    """Why a folder that has a config.json in the place of a pipeline's index cannot be converted."""
    if "architectures" in config or "model_type" in config:
        kind = config.get("model_type")
        return f"it is a transformers model ({kind}), not a diffusers pipeline. If it draws: {_REASONS['tokens']}"
    return f"it is one part alone ({config.get('_class_name')}); give the folder of the whole pipeline, one level up"
