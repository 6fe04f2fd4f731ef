"""Perceptual distance as a map over the image: LPIPS-VGG from the `lpips` package (an extra), or the user's own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from asymflow_ft.components.plugin import load_function

PerceptualMap = Callable[[Tensor, Tensor], Tensor]


def load_perceptual(name: str, device: torch.device | str) -> PerceptualMap | None:
    """The map that the recipe key `loss.perceptual` names: "lpips", "none" (None), or file.py:function, which
    takes the device and gives such a map.

    Raises:
        ValueError: it cannot be loaded, or gives no map (B, 1, H, W).
    """
    if name == "none":
        return None
    if name == "lpips":
        return load_lpips(device)
    distance = load_function(name)(device)
    probe = torch.zeros(2, 3, 64, 96, device=device)
    with torch.no_grad():
        shape = tuple(distance(probe, probe).shape)
    if shape != (2, 1, 64, 96):  # others could broadcast
        raise ValueError(
            f"loss.perceptual {name!r} gives the shape {shape} for pictures (2, 3, 64, 96); it must be a distance "
            "map (2, 1, 64, 96)"
        )
    return distance


def image_by_image(distance: PerceptualMap) -> PerceptualMap:
    """The same map for a batch in the memory of one image: what `distance` keeps is made again in the backward
    pass."""

    def one_by_one(image: Tensor, target: Tensor) -> Tensor:
        if len(image) == 1:  # nothing to save
            return distance(image, target)
        pairs = zip(image.split(1), target.split(1), strict=True)
        return torch.cat([checkpoint(distance, *pair, use_reentrant=False) for pair in pairs])

    return one_by_one


def lpips_autocast(device_type: str) -> torch.autocast:
    """The precision of LPIPS: bf16 on an accelerator, float32 on the CPU."""
    return torch.autocast(device_type, torch.bfloat16, enabled=device_type != "cpu")


def load_lpips(device: torch.device | str, random_vgg: bool = False) -> PerceptualMap:
    """A function of two RGB batches (B, 3, H, W) in [-1, 1] to their LPIPS distance map (B, 1, H, W).

    Its precision is `lpips_autocast`'s. Gradients flow to both images, not to the network.

    Args:
        random_vgg: do not download VGG's weights; the result is no perceptual distance, only code that runs.

    Raises:
        ValueError: the package is missing or broken; the message has the install line.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"loss.perceptual is 'lpips', but the lpips package does not import ({error}). "
            "Install it with `pip install 'asymflow-ft[lpips]'` (it needs a torchvision that fits your torch), "
            "or set loss.perceptual=none"
        ) from error
    network = lpips.LPIPS(net="vgg", spatial=True, pnet_rand=random_vgg, verbose=False)
    network = network.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    device_type = torch.device(device).type

    def distance(image: Tensor, target: Tensor) -> Tensor:
        with lpips_autocast(device_type):
            return network(image, target).float()

    return image_by_image(distance)
