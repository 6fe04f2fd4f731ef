"""Calibration, velocity and the lifted network: cases 05 to 07."""

from pathlib import Path

import torch

from asymflow_ft.components.subspace import Cond
from asymflow_ft.families import flux2
from asymflow_ft.hub.official import (
    adapter_config,
)
from asymflow_ft.method import asymflow
from asymflow_ft.method.patches import to_image, to_tokens
from tests.parity.conftest import (
    TRAINING_SIGMA_MIN,
    close,
    grid_of,
    image_velocity,
    level,
    load_base,
    load_lifted,
    patch_side,
    read,
    read_config,
)


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
