"""What FID and KID are computed from: one vector per picture, by a network that the user names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.plugin import is_plugin, load_function


@dataclass(frozen=True)
class Features:
    """A feature extractor. `note`: with what distances between its features can be compared."""

    name: str
    dim: int
    note: str
    function: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, rgb: Tensor) -> Tensor:
        """rgb (B, 3, H, W) in [-1, 1] on the CPU, of any size -> (B, dim) float32 there.

        Raises:
            ValueError: the function gave another shape or values that are not finite.
        """
        found = self.function(rgb).float().cpu()
        if found.shape != (len(rgb), self.dim) or not found.isfinite().all():
            raise ValueError(
                f"features {self.name!r} must be finite and of shape {(len(rgb), self.dim)}, got {tuple(found.shape)}"
                f"{'' if found.isfinite().all() else ' with values that are not finite'}"
            )
        return found


def open_features(name: str, device: torch.device | str = "cpu") -> Features:
    """The extractor that `name` says.

    Args:
        name: "pixels" (built in, no network), "inception" (the published FID's), "clip:ID_OR_FOLDER",
            "dinov2:ID_OR_FOLDER" or "vision:ID_OR_FOLDER" (any vision model that transformers' AutoModel opens), or
            "file.py:function", a function of the device that returns a function of rgb as in `Features`.

    Raises:
        ValueError: unknown name, missing extra, or a model that does not open.
    """
    kind, _, model = name.partition(":")
    if name == "pixels":
        function, note = pixel_features, "colours and detail alone: for tests and trends, not for published numbers"
    elif name == "inception":
        function, note = _inception(device), "Inception-v3 as in torch-fidelity, pictures resized with antialiasing"
    elif kind == "clip" and model:
        function, note = _clip(model, device), f"CLIP {model}: not comparable with Inception's FID and KID"
    elif kind in ("dinov2", "vision") and model:
        function, note = _vision(model, device), f"{model}: not comparable with Inception's FID and KID"
    elif is_plugin(name):
        function, note = load_function(name)(device), f"{name}: comparable with its own numbers alone"
    else:
        raise ValueError(
            f"features {name!r} are unknown; use pixels, inception, clip:ID_OR_FOLDER, dinov2:ID_OR_FOLDER, "
            "vision:ID_OR_FOLDER or file.py:function"
        )
    with torch.no_grad():
        probe = function(torch.zeros(1, 3, 64, 64))
    if not isinstance(probe, Tensor) or probe.ndim != 2:
        raise ValueError(f"features {name!r} must be a tensor (B, dim) for pictures (B, 3, H, W)")
    return Features(name, probe.shape[1], note, function)


def pixel_features(rgb: Tensor) -> Tensor:
    """(B, 60): normalised Oklab of a 4 x 4 thumbnail, and in each quarter of the picture how strong its lightness is
    at three scales of detail (finer than 2, 4 and 8 pixels)."""
    lab = PixelCodec().encode(rgb)
    detail = []
    for scale in (2, 4, 8):
        light = F.pad(lab[:, :1], (0, -lab.shape[-1] % scale, 0, -lab.shape[-2] % scale), mode="replicate")
        rest = light - F.interpolate(F.avg_pool2d(light, scale), scale_factor=scale)
        detail.append(F.adaptive_avg_pool2d(rest.square(), 2).sqrt().flatten(1))
    return torch.cat([F.adaptive_avg_pool2d(lab, 4).flatten(1), *detail], 1)


@contextmanager
def opening(model: str) -> Iterator[None]:
    """Around opening a model of transformers: what goes wrong there is a ValueError that says what to change.

    KeyError and TypeError come of folders that hold another kind of model.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot open {model!r}: {reason}. It must be a folder, or a repository on the Hugging Face Hub, with a "
            "model of this kind and its preprocessor_config.json"
        ) from error


def to_uint8(rgb: Tensor) -> Tensor:
    return ((rgb + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _inception(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    try:
        import torch_fidelity  # noqa: F401 (torchmetrics opens its network)
        from torchmetrics.image.fid import NoTrainInceptionV3
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"features 'inception' need torch-fidelity, which does not import ({error}). Install it with "
            "`pip install 'asymflow-ft[inception]'` (it needs a torchvision that fits your torch), or use other "
            "features, for example clip:openai/clip-vit-large-patch14"
        ) from error
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except OSError as error:
        raise ValueError(f"the weights of features 'inception' cannot be downloaded: {error}") from error
    return lambda rgb: network(to_uint8(rgb).to(device))


def _clip(model: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    from transformers import AutoImageProcessor, CLIPModel

    with opening(model):
        network = CLIPModel.from_pretrained(model).eval().to(device)
        processor = AutoImageProcessor.from_pretrained(model)
    return lambda rgb: network.get_image_features(**_processed(processor, rgb).to(device)).pooler_output


def _vision(model: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    from transformers import AutoImageProcessor, AutoModel

    with opening(model):
        network = AutoModel.from_pretrained(model).eval().to(device)
        processor = AutoImageProcessor.from_pretrained(model)

    def features(rgb: Tensor) -> Tensor:
        found = network(**_processed(processor, rgb).to(device))
        pooled = found.get("pooler_output")
        return (found.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1)

    return features


def _processed(processor, rgb: Tensor):
    """What the model's own processor makes of the pictures: its size (antialiased), crop and normalisation."""
    return processor(images=list(to_uint8(rgb).cpu()), return_tensors="pt")
