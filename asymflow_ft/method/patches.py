"""Images <-> patch tokens.

One order everywhere: channel first, feature (c * p + i) * p + j of channel c, row i, column j inside a p x p patch;
tokens row by row. It is the order of most packed latents and of the released pixel model. Networks with another order
(DiT, JiT) permute with `to_channel_last` / `to_channel_first` at their own door. Both ways are one copy into a tensor
whose values lie in this order: arithmetic on two tensors that lie differently in memory takes twice as long.
"""

from torch import Tensor


def to_tokens(image: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, H/patch * W/patch, C * patch**2).

    Raises:
        ValueError: a side is not a multiple of the patch.
    """
    height, width = image.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(
            f"an image of {width}x{height} (width x height) cannot be cut into {patch}x{patch} patches; "
            f"use multiples of {patch}, for example {max(width // patch, 1) * patch}x{max(height // patch, 1) * patch}"
        )
    cut = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def to_image(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h * w, C * patch**2) -> (B, C, h * patch, w * patch), the inverse of `to_tokens`; `grid` is (h, w)."""
    cut = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, grid)
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def to_channel_last(tokens: Tensor, channels: int = 3) -> Tensor:
    """(..., C * p**2) tokens with feature (c * p + i) * p + j -> feature (i * p + j) * C + c."""
    return tokens.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2)


def to_channel_first(tokens: Tensor, channels: int = 3) -> Tensor:
    """The inverse of `to_channel_last`."""
    return tokens.unflatten(-1, (-1, channels)).transpose(-1, -2).flatten(-2)
