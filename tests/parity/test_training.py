"""Estimates, loss and its gradients: case 08; noise levels: case 10."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import Cond
from asymflow_ft.families import flux2
from asymflow_ft.method import asymflow, noise
from asymflow_ft.method import loss as losses
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.training.trainable import frozen_reference, lora_reference
from tests.parity.conftest import (
    STATIC_SHIFT,
    close,
    grid_of,
    image_velocity,
    level,
    load_base,
    load_lifted,
    load_student,
    patch_side,
    read,
    read_config,
)


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


def test_case_10_training_levels(golden: Path) -> None:
    data = read(golden, "schedule")
    draws = data["train.normal_draws"]
    before = noise.logit_normal_sigmas(draws, shift=1.0)
    close(before, data["train.sigma_before_shift"], "train.sigma_before_shift", abs=1e-6)
    close(noise.logit_normal_sigmas(draws, STATIC_SHIFT), data["train.sigma"], "train.sigma", abs=1e-6)
    timestep = 1000 * noise.logit_normal_sigmas(draws, shift=3.0, mean=-0.8, std=0.8)
    close(timestep, data["train.alt_timestep_T1000"], "train.alt_timestep_T1000", abs=1e-3)
