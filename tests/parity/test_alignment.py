"""Colours, patches, and the bases that are fitted to them: cases 01 to 04."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from asymflow_ft.components.color import LMS_TO_OKLAB, RGB_TO_LMS, PixelCodec
from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.method.align import Fit, Grams, bottleneck_weight, pca, procrustes
from asymflow_ft.method.patches import to_channel_first, to_channel_last, to_image, to_tokens
from tests.parity.conftest import close, grid_of, patch_side, read


def test_case_01_oklab(golden: Path) -> None:
    data, codec = read(golden, "oklab"), PixelCodec()
    close(torch.tensor(RGB_TO_LMS), data["lrgb_to_lms"], "lrgb_to_lms")
    close(torch.tensor(LMS_TO_OKLAB), data["lms_to_oklab"], "lms_to_oklab")
    close(torch.tensor(codec.mean), data["affine_mean"], "affine_mean")
    close(torch.tensor(codec.std), data["affine_std"], "affine_std")

    close(codec.encode(data["rgb"]), data["encoded"], "encoded", abs=1e-4)
    close(codec.decode(data["encoded"]), data["decoded_roundtrip"], "decoded_roundtrip", abs=1e-4)
    close(codec.encode(data["rgb_outside"]), data["encoded_outside"], "encoded_outside", abs=1e-4)
    close(codec.decode(data["decode_in"]), data["decode_out"], "decode_out", abs=1e-4)


def test_case_01_decode_gradient(golden: Path) -> None:
    data, codec = read(golden, "oklab"), PixelCodec()
    pixels = data["decode_in"].requires_grad_()
    (codec.decode(pixels) * data["decode_cotangent"]).sum().backward()

    # At a kink of the colour curve either one-sided slope is right, for all three inputs of that position.
    value = pixels.detach().double() * data["affine_std"].double() + data["affine_mean"].double()[:, None, None]
    to_lms, to_linear = (data[name].double().inverse() for name in ("lms_to_oklab", "lrgb_to_lms"))
    lms = torch.einsum("ij,bjhw->bihw", to_lms, value) ** 3
    linear = torch.einsum("ij,bjhw->bihw", to_linear, lms)
    kinks = ((0.0, 1e-5), (1.0, 1e-5), (0.0031308, 1e-6))
    smooth = torch.stack([(linear - kink).abs() > width for kink, width in kinks]).all(0).all(1, keepdim=True)
    assert smooth.any()
    close(pixels.grad * smooth, data["decode_grad"] * smooth, "decode_grad", rel=2e-4)


def test_case_02_patchify(golden: Path) -> None:
    data = read(golden, "patchify")
    patch = int(data["patch_size"])
    for name in ("ramp", "random"):
        tokens = to_tokens(data[name], patch)
        close(tokens, data[f"{name}_tokens_cf"], f"{name}_tokens_cf")
        close(to_channel_last(tokens), data[f"{name}_tokens_cl"], f"{name}_tokens_cl")

    tokens, grid = to_tokens(data["ramp"], patch), grid_of(data["ramp"], patch)
    close(to_image(tokens, grid, 1), data["ramp_grid_cf"], "ramp_grid_cf")
    close(to_image(to_channel_last(tokens), grid, 1), data["ramp_grid_cl"], "ramp_grid_cl")
    close(to_image(tokens, grid, 1).unflatten(1, (3, -1)), data["ramp_split_cf"], "ramp_split_cf")

    latent_patch = patch_side(data["latent_tokens"].shape[-1], data["latent"].shape[1])
    close(to_tokens(data["latent"], latent_patch), data["latent_tokens"], "latent_tokens")

    tokens, grid = data["inverse_in_tokens"], grid_of(data["inverse_out_cf"], patch)
    close(to_image(tokens, grid, patch), data["inverse_out_cf"], "inverse_out_cf")
    close(to_image(to_channel_first(tokens), grid, patch), data["inverse_out_cl"], "inverse_out_cl")


def fit_tokens(latent_tokens: Tensor, pixel_tokens: Tensor) -> Fit:
    grams = Grams.zeros(pixel_tokens.shape[-1], latent_tokens.shape[-1])
    for z, x in zip(latent_tokens.split(100), pixel_tokens.split(100), strict=True):
        grams.update(z, x)
    return procrustes(grams)


def test_case_03_procrustes_from_tokens(golden: Path, tmp_path: Path) -> None:
    data = read(golden, "procrustes")
    fit = fit_tokens(data["latent_tokens"], data["pixel_tokens"])
    subspace = PixelSubspace.from_fit(fit.basis, fit.scale)
    close(subspace.basis, data["A"], "A", abs=1e-6)
    close(subspace.scale, data["s"], "s", abs=1e-6)
    close(fit.basis, data["A_f64"], "A_f64", abs=1e-9)
    close(fit.scale, data["s_f64"], "s_f64", abs=1e-9)
    close(fit.singular_values, data["cross_singular_values"], "cross_singular_values", rel=1e-9)

    patch = int(data["patch_size"])
    save_file({f"proj_mat_p{patch}": data["A"], f"scale_p{patch}": data["s"]}, tmp_path / "official.safetensors")
    official = PixelSubspace.from_official(tmp_path / "official.safetensors")
    assert official.config["patch"] == patch
    close(official.basis, data["A"], "proj_mat")
    close(official.scale, data["s"], "scale")


def test_case_03_procrustes_from_images(golden: Path) -> None:
    data = read(golden, "procrustes")
    latent_tokens = to_tokens(data["latents"], int(data["latent_patch_size"])).flatten(0, 1)
    pixels = PixelCodec().encode(2 * data["images"] - 1)
    pixel_tokens = to_tokens(pixels, int(data["patch_size"])).flatten(0, 1)
    close(latent_tokens, data["latent_tokens"], "latent_tokens")
    close(pixel_tokens, data["pixel_tokens"], "pixel_tokens", abs=1e-4)
    fit = fit_tokens(latent_tokens, pixel_tokens)
    close(fit.basis, data["A"], "A from images", abs=1e-4)
    close(fit.scale, data["s"], "s from images", abs=1e-5)


def test_case_03_procrustes_from_resized_images(golden: Path) -> None:
    data = read(golden, "procrustes")
    patch, latent_patch = int(data["patch_size"]), int(data["latent_patch_size"])
    rows, columns = grid_of(data["resize_latents"], latent_patch)
    resized = []
    for image in data["resize_images"]:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
        picture = picture.resize((columns * patch, rows * patch), Image.Resampling.LANCZOS)
        resized.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    resized = torch.stack(resized)
    close(resized, data["resize_resized"], "resize_resized")

    latent_tokens = to_tokens(data["resize_latents"], latent_patch).flatten(0, 1)
    fit = fit_tokens(latent_tokens, to_tokens(PixelCodec().encode(2 * resized - 1), patch).flatten(0, 1))
    close(fit.basis, data["resize_A"], "resize_A", abs=1e-4)
    close(fit.scale, data["resize_s"], "resize_s", abs=1e-5)


def test_case_04_pca(golden: Path) -> None:
    data = read(golden, "pca")
    rank, patch = int(data["rank"]), int(data["patch_size"])
    tokens = to_channel_last(to_tokens(2 * data["images"] - 1, patch)).flatten(0, 1)
    close(tokens, data["tokens_cl"], "tokens_cl", abs=1e-6)

    grams = Grams.zeros(tokens.shape[-1], tokens.shape[-1])
    grams.update(data["tokens_cl"], data["tokens_cl"])
    close(torch.linalg.eigvalsh(grams.pixel), data["eigenvalues"], "eigenvalues", rel=1e-10)
    basis = pca(grams.pixel, rank)
    kept = (basis.mT @ grams.pixel @ basis).diagonal()
    close(kept, data["eigenvalues"][-rank:], "eigenvalues of the columns, ascending", rel=1e-10)
    for name, columns in (("ours", basis.float().double()), ("A", data["A"].double())):
        close(columns @ columns.mT, data["projector"], f"projector of {name}", abs=1e-6)

    weight = bottleneck_weight(data["bottleneck_weight_before"], data["A"])
    close(weight, data["bottleneck_weight_after"], "bottleneck_weight_after", abs=1e-6)
