"""Every recorded output of the official code against ours, within the tolerances of the data's README.md.

The sections of that file are the cases here, in the order of its section 13. All sizes, seeds and settings come from
the files, so `pytest tests/test_reference_parity.py --golden DIR` checks any other folder of the same format. Nothing
is skipped: a missing file or tensor fails the test that reads it.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from asymflow_ft.components.color import LMS_TO_OKLAB, RGB_TO_LMS, PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import Cond, Grid, PixelModel, PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.hub.official import (
    adapter_config,
    adapter_subspace,
    apply_adapter,
    load_adapter,
    save_adapter,
    subspace_buffers,
    trained_tensors,
)
from asymflow_ft.method import asymflow, noise
from asymflow_ft.method import loss as losses
from asymflow_ft.method.align import Fit, Grams, bottleneck_weight, pca, procrustes
from asymflow_ft.method.guidance import clamp_velocity, guide
from asymflow_ft.method.patches import to_channel_first, to_channel_last, to_image, to_tokens
from asymflow_ft.method.sampling import prepare_solver
from asymflow_ft.training.trainable import frozen_reference, lora_reference

TRAINING_SIGMA_MIN = 1e-6
STATIC_SHIFT = 17.0


@pytest.fixture
def golden(golden_folder: Path) -> Path:
    return golden_folder


def close(
    got: Tensor, expected: Tensor, name: str, *, abs: float = 0.0, rel: float | None = None, per_sample: bool = False
) -> None:
    """Same shape, finite, and max |got - expected| within `abs`, or within `rel` of the largest expected entry.

    Args:
        per_sample: take both maxima of `rel` separately for each leading index; the worst one counts.
    """
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(got).all() and torch.isfinite(expected).all(), f"{name}: not all values are finite"
    rows = len(expected) if per_sample else 1
    got, expected = (t.detach().double().reshape(rows, -1) for t in (got, expected))
    error, size = (got - expected).abs().amax(1), expected.abs().amax(1)
    kind, tolerance = ("abs", abs) if rel is None else ("rel", rel)
    # some expected tensors are all zero, and then only zero will do
    worst = (error if rel is None else error / size.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
    assert worst <= tolerance, f"{name}: {kind} error {worst:.3g}, tolerance {tolerance:g}"


def read(golden: Path, name: str) -> dict[str, Tensor]:
    return load_file(golden / f"{name}.safetensors")


def read_config(golden: Path, name: str) -> dict[str, object]:
    """A JSON configuration without the one entry that may differ."""
    config = json.loads((golden / name).read_text())
    config.pop("_diffusers_version", None)
    return config


def patch_side(features: int, channels: int) -> int:
    return math.isqrt(features // channels)


def grid_of(image: Tensor, patch: int) -> Grid:
    return image.shape[-2] // patch, image.shape[-1] // patch


def load_base(golden: Path) -> Flux2Transformer2DModel:
    base = Flux2Transformer2DModel.from_config(json.loads((golden / "transformer_base_config.json").read_text()))
    base.load_state_dict(read(golden, "transformer_base"), strict=True)
    return base.eval()


def load_subspace(golden: Path) -> PixelSubspace:
    fit = read(golden, "procrustes")
    return PixelSubspace.from_fit(fit["A"], fit["s"])


def load_lifted(golden: Path) -> PixelModel:
    subspace = load_subspace(golden)
    return PixelModel(flux2.lift(load_base(golden), subspace), subspace, flux2.predict)


def load_student(golden: Path) -> PixelModel:
    model, overrides = load_lifted(golden), read(golden, "student_overrides")
    state = model.transformer.state_dict()
    assert overrides.keys() <= state.keys()
    model.transformer.load_state_dict(state | overrides, assign=True)
    return model


def image_velocity(
    model: PixelModel, x_t: Tensor, sigma: Tensor, cond: Cond, sigma_min: float = TRAINING_SIGMA_MIN
) -> Tensor:
    patch = model.subspace.config["patch"]
    grid = grid_of(x_t, patch)
    return to_image(model.velocity(to_tokens(x_t, patch), level(sigma), cond, grid, sigma_min), grid, patch)


def level(sigma: Tensor) -> Tensor:
    return sigma[:, None, None]


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


def test_case_05_calibration(golden: Path) -> None:
    data = read(golden, "calibration")
    sigma, scale = data["sigma"][None], data["s"][:, None]
    seen = asymflow.calibrate(sigma, scale)
    close(seen.gain, data["k"], "k", rel=1e-6)
    close(seen.tau, data["calibrated_timestep_T1"], "calibrated_timestep_T1", rel=1e-6)
    timestep = asymflow.calibrate(1000 * sigma / 1000, scale).tau * 1000
    close(timestep, data["calibrated_timestep_T1000"], "calibrated_timestep_T1000", rel=1e-6)


def test_case_06_velocity(golden: Path) -> None:
    data = read(golden, "velocity")
    close(data["training_sigma_min"], torch.tensor(TRAINING_SIGMA_MIN), "training_sigma_min")
    for mode in ("training", "sampling"):
        floor = data[f"{mode}_sigma_min"].item()
        for m, scale in enumerate(data["s"]):
            inputs = (data["u_a"], data["x_t"], level(data["sigma"]), data["A"], scale)
            name, exact = f"velocity_{mode}", data[f"velocity_{mode}_exact"][m]
            got = asymflow.recover_velocity(*inputs, sigma_min=floor)
            close(got, data[name][m], f"{name}[{m}]", rel=2e-6, per_sample=True)
            close(got, exact, f"{name}_exact[{m}]", rel=2e-6, per_sample=True)
            wide = asymflow.recover_velocity(*(t.double() for t in inputs), sigma_min=floor)
            close(wide, exact, f"{name}_exact[{m}] in float64", rel=2e-6, per_sample=True)


def test_case_06_full_rank(golden: Path) -> None:
    data = read(golden, "velocity")
    u, x_t, floor = data["full_u_a"], data["full_x_t"], data["sampling_sigma_min"].item()
    for m, scale in enumerate(data["s"]):
        sigma, expected = data["full_identity_sigma"], data["full_identity_velocity"][m]
        got = asymflow.recover_velocity(u, x_t, level(sigma), torch.eye(u.shape[-1]), scale, floor)
        for i, one in enumerate(sigma.tolist()):
            # the reference forms 1 - s k by subtraction, which leaves noise over a tiny sigma
            tolerance = 2e-3 if one <= 1e-4 else 2e-6
            close(got[i], expected[i], f"full_identity_velocity[{m}, {i}]", rel=tolerance)

        sigma, expected = data["full_rotation_sigma"], data["full_rotation_velocity"][m]
        got = asymflow.recover_velocity(u, x_t, level(sigma), data["full_rotation_A"], scale, floor)
        close(got, expected, f"full_rotation_velocity[{m}]", rel=5e-5, per_sample=True)


def test_case_06_ideal_network(golden: Path) -> None:
    data = read(golden, "velocity")
    x0, eps, sigma, basis = data["ideal_x0"], data["ideal_eps"], level(data["ideal_sigma"]), data["A"]
    x_t, floor = torch.lerp(x0, eps, sigma), data["sampling_sigma_min"].item()
    for m, scale in enumerate(data["s"]):
        u = data["ideal_u_a"][m]
        close(asymflow.network_target(x0, eps, basis, scale), u, f"ideal_u_a[{m}]", abs=1e-4)
        got = asymflow.recover_velocity(u, x_t, sigma, basis, scale, floor)
        close(got, data["ideal_velocity"][m], f"ideal_velocity[{m}]", abs=1e-4)
        close(got, eps - x0, f"eps - x0 [{m}]", abs=1e-4)
        close(asymflow.recover_clean(u, x_t, sigma, basis, scale), x0, f"clean estimate [{m}]", abs=1e-4)


def test_case_10_schedule(golden: Path) -> None:
    data = read(golden, "schedule")
    pattern = re.compile(r"((?:(\d+)x(\d+)|static(\d+))\.)steps(\d+)\.sigmas")
    schedules = [match for key in sorted(data) if (match := pattern.fullmatch(key))]
    assert schedules
    compared = set()
    for match in schedules:
        size, height, width, static, steps = match.groups()
        if static is None:
            pixels = int(height) * int(width)
            shift = noise.dynamic_shift(pixels)
            close(torch.tensor(pixels), data[f"{size}seq_len"], f"{size}seq_len")
            close(torch.tensor(shift, dtype=torch.float64), data[f"{size}shift"], f"{size}shift", rel=1e-12)
            compared |= {f"{size}seq_len", f"{size}shift"}
        else:
            shift = float(static)
        sigmas, solver, name = noise.inference_sigmas(int(steps), shift), flow_solver(), f"{size}steps{steps}"
        prepare_solver(solver, sigmas)
        close(sigmas, data[f"{name}.sigmas"], f"{name}.sigmas", abs=1e-6)
        close(1000 * sigmas[:-1], data[f"{name}.timesteps"], f"{name}.timesteps", abs=1e-3)
        close(solver.sigmas, data[f"{name}.solver_sigmas"], f"{name}.solver_sigmas", abs=1e-6)
        compared |= {f"{name}.sigmas", f"{name}.timesteps", f"{name}.solver_sigmas"}
    left = {key for key in data if not key.startswith("train.")} - compared
    assert not left, f"tensors of no known schedule: {sorted(left)}"


def test_case_10_training_levels(golden: Path) -> None:
    data = read(golden, "schedule")
    draws = data["train.normal_draws"]
    before = noise.logit_normal_sigmas(draws, shift=1.0)
    close(before, data["train.sigma_before_shift"], "train.sigma_before_shift", abs=1e-6)
    close(noise.logit_normal_sigmas(draws, STATIC_SHIFT), data["train.sigma"], "train.sigma", abs=1e-6)
    timestep = 1000 * noise.logit_normal_sigmas(draws, shift=3.0, mean=-0.8, std=0.8)
    close(timestep, data["train.alt_timestep_T1000"], "train.alt_timestep_T1000", abs=1e-3)


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


def test_case_07_lift(golden: Path) -> None:
    expected, config = read(golden, "transformer_lifted"), read_config(golden, "transformer_lifted_config.json")
    base, model = load_base(golden), load_lifted(golden)
    close(model.subspace.basis, expected.pop("proj_buffer"), "proj_buffer")
    close(model.subspace.scale, expected.pop("scale_buffer"), "scale_buffer")
    unchanged, lifted = base.state_dict(), model.transformer.state_dict()
    assert expected.keys() <= lifted.keys() == unchanged.keys()
    for name, tensor in lifted.items():
        if name in expected:
            close(tensor, expected[name], name, abs=2e-6)
        else:
            close(tensor, unchanged[name], name)

    ours = adapter_config(flux2, base.config, model.subspace, config["sigma_min"])
    del ours["_diffusers_version"]
    assert ours == config


@torch.no_grad()
def test_case_07_transformer(golden: Path) -> None:
    data, config = read(golden, "transformer"), read_config(golden, "transformer_lifted_config.json")
    model, sampling = load_lifted(golden), config["sigma_min"]
    patch, x_t, sigma = model.subspace.config["patch"], data["x_t"], data["sigma"]
    tokens, grid = to_tokens(x_t, patch), grid_of(x_t, patch)
    seen = {}
    model.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model.transformer.x_embedder.register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0]))
    model.transformer.time_guidance_embed.register_forward_pre_hook(lambda _, args: seen.update(time=args[0]))

    cond = Cond(data["encoder_hidden_states"])
    u = model.network(tokens, level(sigma), cond, grid)
    close(seen["tokens"], data["network_input_tokens"], "network_input_tokens", rel=1e-6)
    close(seen["time"], data["network_time_embed_input"], "network_time_embed_input", rel=1e-6)
    close(seen["img_ids"], data["image_ids"], "image_ids")
    close(seen["txt_ids"], data["text_ids"], "text_ids")
    close(u, data["u_a_tokens"], "u_a_tokens", rel=2e-5)
    close(image_velocity(model, x_t, sigma, cond, sampling), data["velocity"], "velocity", rel=2e-5)
    for mode, floor in (("sampling", sampling), ("training", TRAINING_SIGMA_MIN)):
        name = f"small_velocity_{mode}"
        close(image_velocity(model, x_t, data["small_sigma"], cond, floor), data[name], name, rel=2e-5)

    references = (data["cond_latents_0"], data["cond_latents_1"])
    for count, name in ((1, "one_cond"), (2, "two_conds")):
        cond = Cond(data["encoder_hidden_states"], references=references[:count])
        u = model.network(tokens, level(sigma), cond, grid)
        if count == 1:
            close(seen["tokens"], data["one_cond_network_input_tokens"], "one_cond_network_input_tokens", rel=1e-6)
        else:
            close(seen["img_ids"][tokens.shape[1] :], data["two_cond_ids"], "two_cond_ids")
        close(u, data[f"u_a_tokens_{name}"], f"u_a_tokens_{name}", rel=2e-5)
        got = image_velocity(model, x_t, sigma, cond, sampling)
        close(got, data[f"velocity_{name}"], f"velocity_{name}", rel=2e-5)


@torch.no_grad()
def test_case_07_seamless_initialisation(golden: Path) -> None:
    data, config = read(golden, "seamless_init"), read_config(golden, "transformer_lifted_config.json")
    base, model = load_base(golden), load_lifted(golden)
    patch, (basis, scale) = model.subspace.config["patch"], model.subspace.float32()
    sigma, cond, grid = level(data["sigma"]), Cond(data["encoder_hidden_states"]), grid_of(data["eps"], patch)
    z = to_tokens(data["latents"], patch_side(basis.shape[1], data["latents"].shape[1]))
    eps = to_tokens(data["eps"], patch)

    x_low = asymflow.lift(z, basis, scale)
    x_t = torch.lerp(x_low, eps, sigma)
    close(to_image(x_low, grid, patch), data["x_low"], "x_low", rel=2e-5)
    close(to_image(x_t, grid, patch), data["x_t"], "x_t", rel=2e-5)
    z_tau, tau = asymflow.latent_state(z, eps, sigma, basis, scale)
    gain = asymflow.calibrate(sigma, scale).gain
    close(tau.flatten(), data["calibrated_timestep"], "calibrated_timestep", rel=1e-6)
    close(z_tau, data["latent_noisy_tokens"], "latent_noisy_tokens", rel=2e-5)
    close(gain * x_t @ basis, data["latent_noisy_tokens"], "(a) network input on the basis", rel=2e-5)

    u_lat = flux2.predict(base, z_tau, tau.flatten(), cond, grid)
    close(u_lat, data["latent_velocity_tokens"], "latent_velocity_tokens", rel=2e-5)
    u = model.network(x_t, sigma, cond, grid)
    close(u, data["pixel_u_a_tokens"], "pixel_u_a_tokens", rel=2e-5)
    close(u, u_lat @ basis.mT, "(b) u = u_lat A^T", rel=2e-5)

    v = model.velocity(x_t, sigma, cond, grid, config["sigma_min"])
    close(to_image(v, grid, patch), data["pixel_velocity"], "pixel_velocity", rel=2e-5)
    inside = scale * gain * u_lat + (1 - scale * gain) / sigma * (x_t @ basis)
    close(v @ basis, inside, "(c) velocity on the basis", rel=2e-5)
    estimates = {
        "x_t - sigma v": asymflow.velocity_to_clean(v, x_t, sigma),
        "clean": model.clean(x_t, sigma, cond, grid),
    }
    for name, clean in estimates.items():
        close(clean @ basis, scale * (z_tau - tau * u_lat), f"(d) {name} on the basis", rel=2e-5)
        outside = clean - asymflow.project(clean, basis)
        close(outside, torch.zeros_like(outside), f"(e) {name} off the basis", abs=1e-4)


@torch.no_grad()
def test_case_08_estimates(golden: Path) -> None:
    data, config = read(golden, "train_loss"), read_config(golden, "transformer_lifted_config.json")
    base, teacher, student = load_base(golden), load_lifted(golden), load_student(golden)
    patch, (basis, scale) = student.subspace.config["patch"], student.subspace.float32()
    sigma, cond, grid = data["sigma"], Cond(data["encoder_hidden_states"]), grid_of(data["x_0"], patch)
    z = to_tokens(data["latents"], patch_side(basis.shape[1], data["latents"].shape[1]))
    tokens = {name: to_tokens(data[name], patch) for name in ("noise", "x_0", "x_0_low", "x_t", "x_t_low")}

    close(PixelCodec().encode(2 * data["image01"] - 1), data["x_0"], "x_0", abs=1e-4)
    close(asymflow.lift(z, basis, scale), tokens["x_0_low"], "x_0_low", rel=2e-6)
    for clean, noisy in (("x_0", "x_t"), ("x_0_low", "x_t_low")):
        close(torch.lerp(tokens[clean], tokens["noise"], level(sigma)), tokens[noisy], noisy, rel=2e-6)

    velocities = {
        "student": image_velocity(student, data["x_t"], sigma, cond),
        "teacher": image_velocity(teacher, data["x_t_low"], sigma, cond, config["sigma_min"]),
    }
    large = sigma > 0.01
    for name, got in velocities.items():
        expected = data[f"{name}_velocity"]
        close(got[large], expected[large], f"{name}_velocity at sigma > 0.01", rel=5e-5)
        close(got, expected, f"{name}_velocity", rel=5e-4)

    per_image = sigma[:, None, None, None]
    estimates = {
        "x_t_low - sigma v": asymflow.velocity_to_clean(velocities["teacher"], data["x_t_low"], per_image),
        "clean": to_image(teacher.clean(tokens["x_t_low"], level(sigma), cond, grid), grid, patch),
    }
    for name, reference in (
        ("latent base", frozen_reference(base, student.subspace, flux2.predict)),
        ("embedded latent", lora_reference(teacher.transformer, teacher.transformer, student.subspace, flux2.predict)),
    ):
        estimates[name] = to_image(reference(z, tokens["noise"], level(sigma), cond, grid), grid, patch)
    for name, got in estimates.items():
        close(got, data["teacher_x_0"], f"teacher_x_0 by {name}", rel=2e-5)

    by_velocity = asymflow.velocity_to_clean(velocities["student"], data["x_t"], per_image)
    direct = to_image(student.clean(tokens["x_t"], level(sigma), cond, grid), grid, patch)
    for name, got in (("x_t - sigma v", by_velocity), ("clean", direct)):
        close(got, data["student_x_0"], f"student_x_0 by {name}", rel=2e-5)


def test_case_08_loss(golden: Path) -> None:
    data, codec = read(golden, "train_loss"), PixelCodec()
    teacher, student = load_lifted(golden), load_student(golden)
    patch = student.subspace.config["patch"]
    sigma, cond, grid = level(data["sigma"]), Cond(data["encoder_hidden_states"]), grid_of(data["x_0"], patch)
    x0, x_t, x_low, x_low_t = (to_tokens(data[name], patch) for name in ("x_0", "x_t", "x_0_low", "x_t_low"))

    def spread(per_token: Tensor) -> Tensor:
        return to_image(per_token.expand(-1, -1, patch**2), grid, patch)

    with torch.no_grad():
        x_low_hat = teacher.clean(x_low_t, sigma, cond, grid)
    x0_hat = student.clean(x_t, sigma, cond, grid)
    residual, reference = (t.detach().unflatten(-1, (3, -1)) for t in (x0 - x0_hat, x_low - x_low_hat))
    power = reference.square().mean(-1).clamp(min=losses.MIN_POWER)
    close((residual * reference).mean(-1).mT, data["vr_num"], "vr_num", rel=2e-5)
    close(power.mT, data["vr_den_clamped"], "vr_den_clamped", rel=2e-5)

    pred, original = codec.decode(to_image(x0_hat, grid, patch)), codec.decode(data["x_0"])
    close(pred, data["pred_image"], "pred_image", abs=2e-4)
    close(original, data["target_image"], "target_image", abs=2e-4)
    parameters, large = dict(student.transformer.named_parameters()), data["sigma"] > 0.01
    tags = sorted(key.removesuffix(".loss") for key in data if key.endswith(".loss"))
    assert {"noshift", "noshift_perc", "shift", "shift_perc"} <= set(tags)
    with_gradient = sorted({key.split(".grad.")[1] for key in data if ".grad." in key})
    assert with_gradient
    for tag in tags:
        faded, perceptual = tag.startswith("shift"), tag.endswith("_perc")
        target = losses.variance_reduced_target(x0, x0_hat, x_low, x_low_hat, sigma, 0.3 if faded else None)
        for name, got in (("vr_coef", target.coefficient.mT), ("vr_gate", spread(target.gate))):
            close(got[large], data[name][large], f"{name} at sigma > 0.01", abs=1e-3)
            close(got, data[name], name, abs=5e-3)
        close(target.coefficient.mean(), data["vr_coef_mean"], "vr_coef_mean", abs=5e-5)
        if faded:
            close(target.trust.flatten(), data["signal_ratio"], "signal_ratio", rel=2e-6)
            ungated = dataclasses.replace(target, gate=torch.ones_like(target.gate))
            time_weight = losses.perceptual_weight(ungated, sigma)[:, 0, 0]
            close(time_weight, data["time_weight"], "time_weight", rel=2e-6)
        close(to_image(target.image, grid, patch), data[f"{tag}.target_x_0"], f"{tag}.target_x_0", rel=2e-5)

        loss = 5 * losses.velocity_mse(x0_hat, target.image, sigma).mean()
        close(loss, data[f"{tag}.loss_mse"], f"{tag}.loss_mse", rel=2e-5)
        if perceptual:
            weight = spread(losses.perceptual_weight(target, sigma))
            term = (weight * (pred - original).abs().mean(1, keepdim=True)).mean()
            close(weight, data[f"{tag}.perceptual_weight"], f"{tag}.perceptual_weight", rel=1e-3)
            close(term, data[f"{tag}.loss_perceptual"], f"{tag}.loss_perceptual", rel=1e-4)
            loss = loss + term
        close(loss, data[f"{tag}.loss"], f"{tag}.loss", rel=2e-5)

        for parameter in with_gradient:
            got, key = (
                torch.autograd.grad(loss, parameters[parameter], retain_graph=True)[0],
                f"{tag}.grad.{parameter}",
            )
            close(got, data[key], key, rel=1e-4)


def test_case_09_guidance(golden: Path) -> None:
    data = read(golden, "guidance")
    pos, neg, x_t, sigma = data["pos"], data["neg"], data["x_t"], data["sigma"]
    x0 = asymflow.velocity_to_clean(pos, x_t, sigma)
    close(x0, data["x0_pos"], "x0_pos", abs=5e-6)

    def bias(scale: float, orthogonal: float, direction: Tensor) -> Tensor:
        return guide(pos, neg, scale, direction, orthogonal) - pos

    scales, strengths = data["guidance_scales"].tolist(), data["orthogonal"].tolist()
    by_x0 = torch.stack([torch.stack([bias(w, o, data["x0_pos"]) for o in strengths]) for w in scales])
    close(by_x0, data["bias_x0_direction"], "bias_x0_direction", abs=5e-6)
    by_velocity = torch.stack([bias(4.0, o, pos) for o in strengths])
    close(by_velocity, data["bias_default_direction"], "bias_default_direction", abs=5e-6)
    close(bias(4.0, 1.0, data["tiny_direction"]), data["bias_tiny_direction"], "bias_tiny_direction", abs=5e-6)

    clamp = PixelCodec().clamp
    guided = guide(pos, neg, 4.0, x0)
    close(guided, data["step_guided_velocity"], "step_guided_velocity", abs=1e-5)
    clamped = clamp_velocity(guided, x_t, sigma, clamp)
    close(clamped, data["step_guided_clamped_velocity"], "step_guided_clamped_velocity", abs=2e-4)


def test_case_09_clamp_step(golden: Path) -> None:
    data = read(golden, "guidance")
    inputs, states, outputs = (data[f"clamp_{name}"] for name in ("velocity_in", "x_t", "velocity_out"))
    assert len(data["clamp_sigma"]) == len(inputs) == len(states) == len(outputs)
    for sigma, velocity, x_t, expected in zip(data["clamp_sigma"], inputs, states, outputs, strict=True):
        got, floor = clamp_velocity(velocity, x_t, sigma, PixelCodec().clamp), sigma.clamp(min=1e-4)
        close(floor * got, floor * expected, f"clamp_velocity_out at sigma {sigma:.3g}", abs=1e-4)


def sample(model: PixelModel, data: dict[str, Tensor], schedule: str, **settings) -> tuple[Tensor, ...]:
    """Final state, the state after every step, and the velocities that the solver received, by the real pipeline."""
    pipeline = flux2.PixelFlux2KleinPipeline(
        scheduler=flow_solver(), text_encoder=None, tokenizer=None, transformer=model.transformer,
        subspace=model.subspace, codec=PixelCodec(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    states, velocities = [], []
    patch, step = model.subspace.config["patch"], pipeline.scheduler.step
    grid = grid_of(data["noise"], patch)

    def recorded_step(velocity: Tensor, *args, **kwargs):
        velocities.append(to_image(velocity, grid, patch))
        return step(velocity, *args, **kwargs)

    def on_step_end(pipeline, i: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tensors["latents"])
        return {}

    pipeline.scheduler.step = recorded_step
    count, _, height, width = data["noise"].shape
    final = pipeline(
        prompt_embeds=data["prompt_embeds"].expand(count, -1, -1),
        negative_prompt_embeds=data["negative_prompt_embeds"].expand(count, -1, -1),
        latents=data["noise"], height=height, width=width, num_inference_steps=len(data[f"{schedule}.sigmas"]) - 1,
        # the pipeline's own shift is the released dynamic one
        shift=STATIC_SHIFT if schedule == "static17" else None,
        callback_on_step_end=on_step_end, output_type="latent", **settings,
    ).images  # fmt: skip
    return final, torch.stack(states), torch.stack(velocities)


@pytest.mark.parametrize("mode", ["clamp", "noclamp"])
@pytest.mark.parametrize("schedule", ["static17", "dynamic"])
def test_case_11_sampling(golden: Path, schedule: str, mode: str) -> None:
    data, name = read(golden, "sample"), f"{schedule}.{mode}"
    shift = STATIC_SHIFT if schedule == "static17" else noise.dynamic_shift(data["noise"][0, 0].numel())
    sigmas = data[f"{schedule}.sigmas"]
    close(noise.inference_sigmas(len(sigmas) - 1, shift), sigmas, f"{schedule}.sigmas", abs=1e-6)

    final, states, velocities = sample(load_student(golden), data, schedule, clamp=mode == "clamp")
    trajectory = data[f"{name}.trajectory"]
    assert len(states) == len(trajectory)
    for i, state in enumerate(states):
        close(state, trajectory[i], f"{name}.trajectory after step {i + 1}", abs=2e-4)
    close(final, data[f"{name}.final"], f"{name}.final", abs=2e-4)
    if mode == "clamp":
        close(velocities, data[f"{name}.velocities"], f"{name}.velocities", abs=2e-3)
        close(PixelCodec().decode(final), data[f"{name}.final_image"], f"{name}.final_image", abs=2e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("static17.clamp.no_guidance_final", {"guidance_scale": 1.0}),
        ("static17.clamp.plain_cfg_final", {"orthogonal_guidance": 0.0}),
    ],
)
def test_case_11_guidance_settings(golden: Path, name: str, settings: dict[str, float]) -> None:
    data = read(golden, "sample")
    final, _, _ = sample(load_student(golden), data, "static17", **settings)
    close(final, data[name], name, abs=2e-4)


def test_case_11_condition_image(golden: Path) -> None:
    data = read(golden, "sample")
    picture = Image.fromarray(data["cond.image_uint8"].numpy())
    final, _, _ = sample(load_student(golden), data, "static17", image=picture)
    close(final, data["cond.final"], "cond.final", abs=2e-4)


def test_case_12_export(golden: Path, tmp_path: Path) -> None:
    trained, lifted = read(golden, "export_train_state"), read(golden, "transformer_lifted")
    base, config = load_base(golden), read_config(golden, "export/config.json")
    subspace = PixelSubspace.from_fit(lifted["proj_buffer"], lifted["scale_buffer"])
    state = trained_tensors(trained) | subspace_buffers(subspace)
    save_adapter(tmp_path, state, adapter_config(flux2, base.config, subspace, config["sigma_min"]))

    assert read_config(tmp_path, "config.json") == config
    expected = read(golden, "export/diffusion_pytorch_model")
    written = read(tmp_path, "diffusion_pytorch_model")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype, f"{name}: {tensor.dtype}, expected {expected[name].dtype}"
        close(tensor, expected[name], name)
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), f"{name}: bits differ"

    adapted = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert adapted == set(flux2.lora_targets(base))
    assert {name.removesuffix(".weight") for name in trained if ".lora_" not in name} == set(flux2.TRAINED_ENDS)


def test_case_12_import(golden: Path) -> None:
    expected, base = read(golden, "export_fused"), load_base(golden)
    state, _, _ = load_adapter(golden / "export")
    fused, subspace = apply_adapter(flux2, base, state), adapter_subspace(state)
    close(subspace.basis, expected.pop("proj_buffer"), "proj_buffer", abs=1e-6)
    close(subspace.scale, expected.pop("scale_buffer"), "scale_buffer", abs=1e-6)
    weights, unchanged = fused.state_dict(), base.state_dict()
    assert expected.keys() <= weights.keys() == unchanged.keys()
    for name, tensor in weights.items():
        if name in expected:
            close(tensor, expected[name], name, abs=1e-6)
        else:
            close(tensor, unchanged[name], name)


@torch.no_grad()
@pytest.mark.parametrize("fuse", [True, False])
def test_case_12_forward(golden: Path, fuse: bool) -> None:
    data, (state, config, _) = read(golden, "export_forward"), load_adapter(golden / "export")
    transformer, subspace = apply_adapter(flux2, load_base(golden), state, fuse=fuse), adapter_subspace(state)
    model, cond = PixelModel(transformer, subspace, flux2.predict), Cond(data["encoder_hidden_states"])
    name = "velocity_fused" if fuse else "velocity_unfused"
    close(image_velocity(model, data["x_t"], data["sigma"], cond, config["sigma_min"]), data[name], name, rel=5e-5)
