"""Every case of the reference data (computed with the paper's own code), within the tolerances that its README states.

    pytest tests/test_reference_parity.py --golden FOLDER

Shapes, sizes and settings are read from the files, so any folder of that format will do. A missing file is a failure.
"""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import encode_condition, flow_solver
from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.hub import official
from asymflow_ft.method import align, asymflow, guidance, loss, noise
from asymflow_ft.method.patches import to_channel_first, to_channel_last, to_image, to_tokens
from asymflow_ft.method.sampling import denoise, prepare_solver

CODEC = PixelCodec()
TRAIN_SIGMA_MIN = 1e-6  # the reference's floor in training mode


@pytest.fixture
def load(golden_folder):
    return lambda name: load_file(golden_folder / f"{name}.safetensors")


def close(got, expected, name, abs=None, rel=None, sample=False):
    """Same shape, all finite, and max |got - expected| within `abs`, or within `rel` of the largest expected value
    (per leading index with `sample`)."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error = (got.double() - expected.double()).abs()
    if abs is None:
        size = expected.double().abs()
        error = error.flatten(1).amax(1) / size.flatten(1).amax(1) if sample else error.max() / size.max()
    bound = rel if abs is None else abs
    assert error.max() <= bound, f"{name}: error {error.max():.3g}, tolerance {bound:g}"


def exact(got, expected, name):
    assert got.shape == expected.shape and torch.equal(got, expected.to(got.dtype)), f"{name} differs"


@pytest.fixture
def lifted(golden_folder, load):
    """(base, lifted model, subspace, patch, latent patch) of case 7, lifted by our own code."""
    base = base_model(golden_folder, load)
    tensors = load("transformer_lifted")
    patch = json.loads((golden_folder / "transformer_lifted_config.json").read_text())["patch_size"]
    subspace = PixelSubspace.from_fit(tensors["proj_buffer"], tensors["scale_buffer"])
    latent_patch = int(load("procrustes")["latent_patch_size"])
    assert subspace.config["patch"] == patch
    return base, flux2.lift(base, subspace), subspace, patch, latent_patch


def base_model(folder, load):
    base = Flux2Transformer2DModel.from_config(json.loads((folder / "transformer_base_config.json").read_text()))
    base.load_state_dict(load("transformer_base"))
    return base.eval()


def student_of(model, load):
    """The lifted model with the stored trained tensors."""
    student = Flux2Transformer2DModel.from_config(model.config)
    student.load_state_dict(model.state_dict() | load("student_overrides"))
    return student


def velocity(model, subspace, x_t, sigma, cond, patch, sigma_min):
    """Image-space velocity (B, 3, H, W) and the raw network output in tokens."""
    grid = (x_t.shape[-2] // patch, x_t.shape[-1] // patch)
    tokens, level = to_tokens(x_t, patch), sigma.reshape(-1, 1, 1)
    pixel_model = PixelModel(model, subspace, flux2.predict)
    u = pixel_model.network(tokens, level, cond, grid)
    v = pixel_model.velocity(tokens, level, cond, grid, sigma_min)
    return to_image(v, grid, patch), u


def test_case_01_oklab(load):
    g = load("oklab")
    for given, expected in (("rgb", "encoded"), ("rgb_outside", "encoded_outside")):
        close(CODEC.encode(g[given]), g[expected], expected, abs=1e-4)
    close(CODEC.decode(g["encoded"]), g["decoded_roundtrip"], "decoded_roundtrip", abs=1e-4)
    x = g["decode_in"].clone().requires_grad_()
    y = CODEC.decode(x)
    close(y.detach(), g["decode_out"], "decode_out", abs=1e-4)
    (y * g["decode_cotangent"]).sum().backward()
    assert torch.isfinite(x.grad).all()
    lab = g["decode_in"].double() * g["affine_std"].double() + g["affine_mean"].double().reshape(-1, 1, 1)
    mix = partial(torch.einsum, "ij,bjhw->bihw")
    linear = mix(g["lrgb_to_lms"].double().inverse(), mix(g["lms_to_oklab"].double().inverse(), lab) ** 3)
    kink = (linear.abs() < 1e-5) | ((linear - 1).abs() < 1e-5) | ((linear - 0.0031308).abs() < 1e-6)
    smooth = ~kink.any(1, keepdim=True)
    close(x.grad * smooth, g["decode_grad"] * smooth, "decode_grad", rel=2e-4)


def test_case_02_patches(load):
    g = load("patchify")
    patch = int(g["patch_size"])
    for name in ("ramp", "random"):
        tokens = to_tokens(g[name], patch)
        exact(tokens, g[f"{name}_tokens_cf"], f"{name}_tokens_cf")
        exact(to_channel_last(tokens), g[f"{name}_tokens_cl"], f"{name}_tokens_cl")
        exact(to_channel_first(to_channel_last(tokens)), tokens, "channel order round trip")
        grid = (g[name].shape[-2] // patch, g[name].shape[-1] // patch)
        exact(to_image(tokens, grid, patch), g[name], f"{name} round trip")
    exact(to_image(g["ramp_tokens_cf"], grid, 1), g["ramp_grid_cf"], "ramp_grid_cf")
    exact(to_image(g["ramp_tokens_cl"], grid, 1), g["ramp_grid_cl"], "ramp_grid_cl")
    exact(g["ramp_grid_cf"].unflatten(1, (3, -1)), g["ramp_split_cf"], "ramp_split_cf")
    latent_patch = g["latent"].shape[-2] // grid[0]
    exact(to_tokens(g["latent"], latent_patch), g["latent_tokens"], "latent_tokens")
    grid = (g["inverse_out_cf"].shape[-2] // patch, g["inverse_out_cf"].shape[-1] // patch)
    exact(to_image(g["inverse_in_tokens"], grid, patch), g["inverse_out_cf"], "inverse_out_cf")
    exact(to_image(to_channel_first(g["inverse_in_tokens"]), grid, patch), g["inverse_out_cl"], "inverse_out_cl")


def procrustes_of(x, z):
    grams = align.Grams.zeros(x.shape[-1], z.shape[-1])
    half = len(x) // 2
    grams.update(z[:half], x[:half])  # in two parts, as images stream in
    grams.update(z[half:], x[half:])
    return align.procrustes(grams)


def test_case_03_procrustes(load):
    g = load("procrustes")
    patch, latent_patch = int(g["patch_size"]), int(g["latent_patch_size"])
    fit = procrustes_of(g["pixel_tokens"], g["latent_tokens"])
    close(fit.basis, g["A_f64"], "A_f64", abs=1e-9)
    close(fit.scale, g["s_f64"], "s_f64", abs=1e-9)
    close(fit.basis.float(), g["A"], "A from tokens", abs=1e-6)
    close(fit.scale.float(), g["s"], "s from tokens", abs=1e-6)
    close(fit.singular_values, g["cross_singular_values"], "cross_singular_values", rel=1e-9)
    x, z = to_tokens(CODEC.encode(2 * g["images"] - 1), patch), to_tokens(g["latents"], latent_patch)
    close(x.flatten(0, 1), g["pixel_tokens"], "pixel_tokens", abs=1e-4)
    exact(z.flatten(0, 1), g["latent_tokens"], "latent_tokens")
    fit = procrustes_of(x, z)
    close(fit.basis.float(), g["A"], "A from images", abs=1e-4)
    close(fit.scale.float(), g["s"], "s from images", abs=1e-5)

    height, width = (side // latent_patch * patch for side in g["resize_latents"].shape[-2:])
    resized = []
    for image in g["resize_images"]:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        resized.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
    exact(torch.stack(resized), g["resize_resized"], "resize_resized")
    x = to_tokens(CODEC.encode(2 * torch.stack(resized) - 1), patch)
    fit = procrustes_of(x, to_tokens(g["resize_latents"], latent_patch))
    close(fit.basis.float(), g["resize_A"], "resize_A", abs=1e-4)
    close(fit.scale.float(), g["resize_s"], "resize_s", abs=1e-5)


def test_case_04_pca(load):
    g = load("pca")
    tokens = to_channel_last(to_tokens(2 * g["images"] - 1, int(g["patch_size"]))).flatten(0, 1)
    close(tokens, g["tokens_cl"], "tokens_cl", abs=1e-6)
    gram = g["tokens_cl"].double().mT @ g["tokens_cl"].double()
    basis = align.pca(gram, int(g["rank"]))
    assert basis.shape == g["A"].shape
    close(basis @ basis.mT, g["projector"], "projector", abs=1e-6)
    stored = g["A"].double()
    close(stored @ stored.mT, g["projector"], "stored A", abs=1e-6)
    eigenvalues = torch.linalg.eigvalsh(gram)
    close(eigenvalues, g["eigenvalues"], "eigenvalues", rel=1e-10)
    got = align.bottleneck_weight(g["bottleneck_weight_before"], g["A"])
    close(got, g["bottleneck_weight_after"], "bottleneck_weight_after", abs=1e-6)


def test_case_05_calibration(load):
    g = load("calibration")
    seen = asymflow.calibrate(g["sigma"][None], g["s"][:, None])
    close(seen.gain, g["k"], "k", rel=1e-6)
    close(seen.tau, g["calibrated_timestep_T1"], "calibrated_timestep_T1", rel=1e-6)
    close(1000 * seen.tau, g["calibrated_timestep_T1000"], "calibrated_timestep_T1000", rel=1e-6)


def test_case_06_velocity(load):
    g = load("velocity")
    sigma = g["sigma"][:, None, None]
    floors = {"training": float(g["training_sigma_min"]), "sampling": float(g["sampling_sigma_min"])}
    for i, scale in enumerate(g["s"]):
        for mode, floor in floors.items():
            got = asymflow.recover_velocity(g["u_a"], g["x_t"], sigma, g["A"], scale, floor)
            close(got, g[f"velocity_{mode}"][i], f"velocity_{mode}[{i}]", rel=2e-6, sample=True)
            close(got, g[f"velocity_{mode}_exact"][i], f"velocity_{mode}_exact[{i}]", rel=2e-6, sample=True)
        for name, basis in (("identity", torch.eye(len(g["full_rotation_A"]))), ("rotation", g["full_rotation_A"])):
            levels = g[f"full_{name}_sigma"]
            got = asymflow.recover_velocity(
                g["full_u_a"], g["full_x_t"], levels[:, None, None], basis, scale, floors["sampling"]
            )
            expected = g[f"full_{name}_velocity"][i]
            tiny = levels <= 1e-4
            for part, bound in ((tiny, 2e-3), (~tiny, 2e-6 if name == "identity" else 5e-5)):
                if part.any():
                    close(got[part], expected[part], f"full_{name}_velocity[{i}]", rel=bound, sample=True)
        x0, eps, level = g["ideal_x0"], g["ideal_eps"], g["ideal_sigma"][:, None, None]
        u = asymflow.network_target(x0, eps, g["A"], scale)
        close(u, g["ideal_u_a"][i], f"ideal_u_a[{i}]", abs=1e-4)
        got = asymflow.recover_velocity(u, torch.lerp(x0, eps, level), level, g["A"], scale, floors["sampling"])
        close(got, g["ideal_velocity"][i], f"ideal_velocity[{i}]", abs=1e-4)
        close(got, eps - x0, f"ideal velocity is eps - x0 [{i}]", abs=1e-4)


def test_case_07_lift_and_forward(lifted, load, golden_folder):
    base, model, subspace, patch, _ = lifted
    for name, expected in load("transformer_lifted").items():
        if name == "proj_buffer":
            exact(subspace.basis, expected, name)
        elif name == "scale_buffer":
            exact(subspace.scale, expected, name)
        else:
            close(model.state_dict()[name], expected, name, abs=2e-6)
    unchanged = base.state_dict().keys() - {"x_embedder.weight", "proj_out.weight"}
    assert all(torch.equal(model.state_dict()[name], base.state_dict()[name]) for name in unchanged)

    g = load("transformer")
    sampling_floor = json.loads((golden_folder / "transformer_lifted_config.json").read_text())["sigma_min"]
    grid = (g["x_t"].shape[-2] // patch, g["x_t"].shape[-1] // patch)
    exact(flux2._ids(grid, 0, "cpu"), g["image_ids"], "image_ids")
    images = [g[name] for name in sorted(g) if re.fullmatch(r"cond_latents_\d+", name)]
    grids = [(image.shape[-2] // patch, image.shape[-1] // patch) for image in images]
    ids = torch.cat([flux2._ids(shape, 10 + 10 * m, "cpu") for m, shape in enumerate(grids)])
    exact(ids, g["two_cond_ids"], "two_cond_ids")

    seen = {}

    def spy(module, args, kwargs):
        seen.update(kwargs)

    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    text = g["encoder_hidden_states"]
    with torch.no_grad():
        v, u = velocity(model, subspace, g["x_t"], g["sigma"], Cond(text), patch, sampling_floor)
        close(seen["hidden_states"], g["network_input_tokens"], "network_input_tokens", rel=1e-6)
        # diffusers multiplies by 1000 inside
        close(1000 * seen["timestep"], g["network_time_embed_input"], "network_time_embed_input", rel=1e-6)
        exact(seen["txt_ids"], g["text_ids"], "text_ids")
        close(u, g["u_a_tokens"], "u_a_tokens", rel=2e-5)
        close(v, g["velocity"], "velocity", rel=2e-5)
        for name, chosen in (("one_cond", images[:1]), ("two_conds", images)):
            cond = Cond(text, references=tuple(chosen))
            v, u = velocity(model, subspace, g["x_t"], g["sigma"], cond, patch, sampling_floor)
            if name == "one_cond":
                expected = g["one_cond_network_input_tokens"]
                close(seen["hidden_states"], expected, "one_cond_network_input_tokens", rel=1e-6)
            close(u, g[f"u_a_tokens_{name}"], f"u_a_tokens_{name}", rel=2e-5)
            close(v, g[f"velocity_{name}"], f"velocity_{name}", rel=2e-5)
        for mode, floor in (("sampling", sampling_floor), ("training", TRAIN_SIGMA_MIN)):
            v, _ = velocity(model, subspace, g["x_t"], g["small_sigma"], Cond(text), patch, floor)
            close(v, g[f"small_velocity_{mode}"], f"small_velocity_{mode}", rel=2e-5)
    hook.remove()


def test_case_07_seamless_start(lifted, load):
    base, model, subspace, patch, latent_patch = lifted
    g = load("seamless_init")
    basis, scale = subspace.float32()
    sigma = g["sigma"][:, None, None]
    z, eps = to_tokens(g["latents"], latent_patch), to_tokens(g["eps"], patch)
    grid = (g["eps"].shape[-2] // patch, g["eps"].shape[-1] // patch)
    x_low = asymflow.lift(z, basis, scale)
    close(to_image(x_low, grid, patch), g["x_low"], "x_low", rel=2e-5)
    x_t = torch.lerp(x_low, eps, sigma)
    close(to_image(x_t, grid, patch), g["x_t"], "x_t", rel=2e-5)
    z_tau, tau = asymflow.latent_state(z, eps, sigma, basis, scale)
    close(tau.flatten(), g["calibrated_timestep"], "calibrated_timestep", rel=1e-6)
    close(z_tau, g["latent_noisy_tokens"], "latent_noisy_tokens", rel=2e-5)
    gain = asymflow.calibrate(sigma, scale).gain
    close(gain * x_t @ basis, g["latent_noisy_tokens"], "(a) network input", rel=2e-5)
    cond = Cond(g["encoder_hidden_states"])
    pixel_model = PixelModel(model, subspace, flux2.predict)
    with torch.no_grad():
        u_lat = flux2.predict(base, z_tau, tau.flatten(), cond, grid)
        u = pixel_model.network(x_t, sigma, cond, grid)
        v = pixel_model.velocity(x_t, sigma, cond, grid)
        clean = pixel_model.clean(x_t, sigma, cond, grid)
    close(u_lat, g["latent_velocity_tokens"], "latent_velocity_tokens", rel=2e-5)
    close(u, g["pixel_u_a_tokens"], "pixel_u_a_tokens", rel=2e-5)
    close(u, u_lat @ basis.mT, "(b) network output", rel=2e-5)
    close(to_image(v, grid, patch), g["pixel_velocity"], "pixel_velocity", rel=2e-5)
    inside = scale * gain * u_lat + (1 - scale * gain) / sigma * (x_t @ basis)
    close(v @ basis, inside, "(c) velocity inside", rel=2e-5)
    for name, x0_hat in (("x_t - sigma v", x_t - sigma * v), ("recover_clean", clean)):
        close(x0_hat @ basis, scale * (z_tau - tau * u_lat), f"(d) {name}", rel=2e-5)
        outside = x0_hat - asymflow.project(x0_hat, basis)
        close(outside, torch.zeros_like(outside), f"(e) {name}", abs=1e-4)


def stand_in_distance(image, target):
    return (image - target).abs().mean(1, keepdim=True)


def test_case_08_training_loss(lifted, load):
    base, model, subspace, patch, latent_patch = lifted
    g = load("train_loss")
    basis, scale = subspace.float32()
    student = student_of(model, load)
    grid = (g["noise"].shape[-2] // patch, g["noise"].shape[-1] // patch)
    image = partial(to_image, grid=grid, patch=patch)
    sigma = g["sigma"][:, None, None]
    cond = Cond(g["encoder_hidden_states"])
    x0 = to_tokens(CODEC.encode(2 * g["image01"] - 1), patch)
    close(image(x0), g["x_0"], "x_0", abs=1e-4)
    x0 = to_tokens(g["x_0"], patch)
    z0, eps = to_tokens(g["latents"], latent_patch), to_tokens(g["noise"], patch)
    x_low = asymflow.lift(z0, basis, scale)
    x_t, x_t_low = torch.lerp(x0, eps, sigma), torch.lerp(x_low, eps, sigma)
    close(image(x_low), g["x_0_low"], "x_0_low", rel=2e-6)
    close(image(x_t), g["x_t"], "x_t", rel=2e-6)
    close(image(x_t_low), g["x_t_low"], "x_t_low", rel=2e-6)

    large = g["sigma"] > 0.01
    with torch.no_grad():
        for name, net, state in (("student", student, "x_t"), ("teacher", model, "x_t_low")):
            floor = TRAIN_SIGMA_MIN if name == "student" else 1e-4
            v, _ = velocity(net, subspace, g[state], g["sigma"], cond, patch, floor)
            close(v[large], g[f"{name}_velocity"][large], f"{name}_velocity", rel=5e-5)
            close(v, g[f"{name}_velocity"], f"{name}_velocity, all", rel=5e-4)
        z_tau, tau = asymflow.latent_state(z0, eps, sigma, basis, scale)
        in_latents = asymflow.lift(z_tau - tau * flux2.predict(base, z_tau, tau.flatten(), cond, grid), basis, scale)
        in_pixels = PixelModel(model, subspace, flux2.predict).clean(x_t_low, sigma, cond, grid)
    close(image(in_pixels), g["teacher_x_0"], "teacher_x_0 by the lifted model", rel=2e-5)
    close(image(in_latents), g["teacher_x_0"], "teacher_x_0 by the base", rel=2e-5)

    for tag, kappa in (("noshift", None), ("shift", 0.3), ("noshift_perc", None), ("shift_perc", 0.3)):
        student.zero_grad()
        x0_hat = PixelModel(student, subspace, flux2.predict).clean(x_t, sigma, cond, grid)
        close(image(x0_hat.detach()), g["student_x_0"], "student_x_0", rel=2e-5)
        target = loss.variance_reduced_target(x0, x0_hat, x_low, in_latents, sigma, kappa)
        residual = (x_low - in_latents).unflatten(-1, (3, -1))
        own = (x0 - x0_hat.detach()).unflatten(-1, (3, -1))
        close((own * residual).mean(-1).mT, g["vr_num"], "vr_num", rel=2e-5)
        power = residual.square().mean(-1).clamp(min=loss.MIN_POWER)
        close(power.mT, g["vr_den_clamped"], "vr_den_clamped", rel=2e-5)
        coefficient, gate = target.coefficient.mT, image(target.gate.expand(-1, -1, patch**2))
        close(coefficient[large], g["vr_coef"][large], "vr_coef", abs=1e-3)
        close(coefficient, g["vr_coef"], "vr_coef, all", abs=5e-3)
        close(coefficient.mean(), g["vr_coef_mean"], "vr_coef_mean", abs=5e-5)
        close(gate[large], g["vr_gate"][large], "vr_gate", abs=1e-3)
        close(gate, g["vr_gate"], "vr_gate, all", abs=5e-3)
        close(image(target.image), g[f"{tag}.target_x_0"], f"{tag}.target_x_0", rel=2e-5)
        if kappa is not None:
            close(target.trust.flatten(), g["signal_ratio"], "signal_ratio", rel=2e-6)
        total = mse = 5.0 * loss.velocity_mse(x0_hat, target.image, sigma)
        close(mse.detach(), g[f"{tag}.loss_mse"], f"{tag}.loss_mse", rel=2e-5)
        if tag.endswith("_perc"):
            weight = image(loss.perceptual_weight(target, sigma).expand(-1, -1, patch**2))
            if kappa is not None:
                close(weight, g[f"{tag}.perceptual_weight"], f"{tag}.perceptual_weight", rel=1e-3)
                expected = target.trust / sigma.clamp(min=0.05).square()
                close(expected.flatten(), g["time_weight"].flatten(), "time_weight", rel=1e-5)
            else:
                exact(weight, g[f"{tag}.perceptual_weight"], f"{tag}.perceptual_weight")
            drawn, wanted = CODEC.decode(image(x0_hat)), CODEC.decode(g["x_0"])
            close(drawn.detach(), g["pred_image"], "pred_image", abs=2e-4)
            close(wanted, g["target_image"], "target_image", abs=2e-4)
            perceptual = (stand_in_distance(drawn, wanted) * weight).mean()
            expected = g[f"{tag}.loss_perceptual"]
            bound = {"rel": 1e-4} if expected > 0 else {"abs": 0.0}
            close(perceptual.detach(), expected, f"{tag}.loss_perceptual", **bound)
            total = mse + perceptual
        close(total.detach(), g[f"{tag}.loss"], f"{tag}.loss", rel=2e-5)
        total.backward()
        gradients = [name for name in g if name.startswith(f"{tag}.grad.")]
        assert gradients
        for name in gradients:
            got = student.get_parameter(name.removeprefix(f"{tag}.grad.")).grad
            close(got, g[name], name, rel=1e-4)


def test_case_09_guidance(load):
    g = load("guidance")
    pos, neg = g["pos"], g["neg"]
    for i, w in enumerate(g["guidance_scales"].tolist()):
        for j, o in enumerate(g["orthogonal"].tolist()):
            got = guidance.guide(pos, neg, w, g["x0_pos"], o) - pos
            close(got, g["bias_x0_direction"][i, j], f"bias_x0_direction[{i},{j}]", abs=5e-6)
    for j, o in enumerate(g["orthogonal"].tolist()):
        got = guidance.guide(pos, neg, 4.0, pos, o) - pos
        close(got, g["bias_default_direction"][j], f"bias_default_direction[{j}]", abs=5e-6)
    got = guidance.guide(pos, neg, 4.0, g["tiny_direction"], 1.0) - pos
    close(got, g["bias_tiny_direction"], "bias_tiny_direction", abs=5e-6)
    for i, sigma in enumerate(g["clamp_sigma"]):
        got = guidance.clamp_velocity(g["clamp_velocity_in"][i], g["clamp_x_t"][i], sigma, CODEC.clamp)
        size = sigma.clamp(min=1e-4)
        close(got * size, g["clamp_velocity_out"][i] * size, f"clamp_velocity_out[{i}]", abs=1e-4)
    direction = asymflow.velocity_to_clean(pos, g["x_t"], g["sigma"])
    close(direction, g["x0_pos"], "x0_pos", abs=5e-6)
    guided = guidance.guide(pos, neg, 4.0, direction)
    close(guided, g["step_guided_velocity"], "step_guided_velocity", abs=1e-5)
    clamped = guidance.clamp_velocity(guided, g["x_t"], g["sigma"], CODEC.clamp)
    close(clamped, g["step_guided_clamped_velocity"], "step_guided_clamped_velocity", abs=2e-4)


def sampled(load, lifted, sigmas, clamp=True, w=4.0, o=1.0, references=()):
    """(trajectory, velocities handed to the solver) of case 11."""
    _, model, subspace, patch, _ = lifted
    g = load("sample")
    student = student_of(model, load).eval()
    grid = (g["noise"].shape[-2] // patch, g["noise"].shape[-1] // patch)
    pixel_model = PixelModel(student, subspace, flux2.predict)
    velocities, states = [], []

    def guided(x, sigma):
        level = sigma.expand(len(x), 1, 1)
        v = pixel_model.velocity(x, level, Cond(g["prompt_embeds"], references=references), grid)
        if w > 1:
            negative = Cond(g["negative_prompt_embeds"], references=references)
            v = guidance.guide(v, pixel_model.velocity(x, level, negative, grid), w, x - level * v, o)
        if clamp:
            v = guidance.clamp_velocity(
                v, x, level, lambda x0: to_tokens(CODEC.clamp(to_image(x0, grid, patch)), patch)
            )
        velocities.append(to_image(v, grid, patch))
        return v

    def on_step(i, x):
        states.append(to_image(x, grid, patch))
        return x

    solver = flow_solver()
    prepare_solver(solver, sigmas)
    with torch.no_grad():
        denoise(guided, to_tokens(g["noise"], patch), solver, sigmas, on_step)
    return torch.stack(states), torch.stack(velocities)


def test_case_10_schedule(load):
    g = load("schedule")
    for key in [key for key in g if re.search(r"\.steps\d+\.sigmas$", key)]:
        size, steps = re.match(r"(.+)\.steps(\d+)\.", key).groups()
        shift = 17.0
        if size != "static17":
            height, width = map(int, size.split("x"))
            assert height * width == int(g[f"{size}.seq_len"])
            shift = noise.dynamic_shift(height * width)
            close(torch.tensor(shift, dtype=torch.float64), g[f"{size}.shift"], f"{size}.shift", rel=1e-12)
        sigmas = noise.inference_sigmas(int(steps), shift)
        close(sigmas, g[key], key, abs=1e-6)
        close(1000 * sigmas[:-1], g[key.replace("sigmas", "timesteps")], f"{key}: timesteps", abs=1e-3)
        solver = flow_solver()
        prepare_solver(solver, sigmas)
        close(solver.sigmas, g[key.replace(".sigmas", ".solver_sigmas")], f"{key}: solver", abs=1e-6)
    draws = g["train.normal_draws"]
    close(torch.sigmoid(draws), g["train.sigma_before_shift"], "train.sigma_before_shift", abs=1e-6)
    close(noise.logit_normal_sigmas(draws, 17.0), g["train.sigma"], "train.sigma", abs=1e-6)
    alternative = 1000 * noise.logit_normal_sigmas(draws, 3.0, -0.8, 0.8)
    close(alternative, g["train.alt_timestep_T1000"], "train.alt_timestep_T1000", abs=1e-3)


@pytest.mark.parametrize("schedule", ["static17", "dynamic"])
@pytest.mark.parametrize("mode", ["clamp", "noclamp"])
def test_case_11_sampling(load, lifted, schedule, mode):
    g = load("sample")
    states, velocities = sampled(load, lifted, g[f"{schedule}.sigmas"], clamp=mode == "clamp")
    prefix = f"{schedule}.{mode}"
    for i, expected in enumerate(g[f"{prefix}.trajectory"]):
        close(states[i], expected, f"{prefix} state {i}", abs=2e-4)
    close(states[-1], g[f"{prefix}.final"], f"{prefix}.final", abs=2e-4)
    if mode == "clamp":
        close(velocities, g[f"{prefix}.velocities"], f"{prefix}.velocities", abs=2e-3)
        close(CODEC.decode(states[-1]), g[f"{prefix}.final_image"], f"{prefix}.final_image", abs=2e-4)


def test_case_11_schedules(load):
    g = load("sample")
    steps = len(g["static17.sigmas"]) - 1
    close(noise.inference_sigmas(steps, 17.0), g["static17.sigmas"], "static17.sigmas", abs=1e-6)
    shift = noise.dynamic_shift(g["noise"].shape[-2] * g["noise"].shape[-1])
    close(noise.inference_sigmas(steps, shift), g["dynamic.sigmas"], "dynamic.sigmas", abs=1e-6)


def test_case_11_variants(load, lifted):
    g = load("sample")
    sigmas = g["static17.sigmas"]
    states, _ = sampled(load, lifted, sigmas, w=1.0)
    close(states[-1], g["static17.clamp.no_guidance_final"], "no_guidance_final", abs=2e-4)
    states, _ = sampled(load, lifted, sigmas, o=0.0)
    close(states[-1], g["static17.clamp.plain_cfg_final"], "plain_cfg_final", abs=2e-4)
    picture = Image.fromarray(g["cond.image_uint8"].numpy())
    condition = encode_condition(picture, CODEC, lifted[3]).expand(len(g["noise"]), -1, -1, -1)
    states, _ = sampled(load, lifted, sigmas, references=(condition,))
    close(states[-1], g["cond.final"], "cond.final", abs=2e-4)


def test_case_11_pipeline(load, lifted):
    """The same trajectory through the pipeline that users call."""
    _, model, subspace, _, _ = lifted
    g = load("sample")
    pipeline = flux2.PixelFlux2KleinPipeline(
        scheduler=flow_solver(), text_encoder=None, tokenizer=None, transformer=student_of(model, load).eval(),
        subspace=subspace, codec=CODEC,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    final = pipeline(
        prompt_embeds=g["prompt_embeds"], negative_prompt_embeds=g["negative_prompt_embeds"], latents=g["noise"],
        height=g["noise"].shape[-2], width=g["noise"].shape[-1], shift=17.0, output_type="latent",
        num_inference_steps=len(g["static17.sigmas"]) - 1,
    ).images  # fmt: skip
    close(final, g["static17.clamp.final"], "pipeline", abs=2e-4)


def test_case_12_export(load, golden_folder, lifted, tmp_path):
    _, _, subspace, _, _ = lifted
    config = json.loads((golden_folder / "transformer_base_config.json").read_text())
    sigma_min = json.loads((golden_folder / "transformer_lifted_config.json").read_text())["sigma_min"]
    state = official.adapter_state(load("export_train_state"), subspace)
    official.save_adapter(tmp_path, state, official.adapter_config(config, subspace, sigma_min))
    written, expected = load_file(tmp_path / official.WEIGHTS), load_file(golden_folder / "export" / official.WEIGHTS)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype, name
        exact(written[name], tensor, name)
    got, wanted = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, golden_folder / "export"))
    assert {**got, "_diffusers_version": 0} == {**wanted, "_diffusers_version": 0}


def test_case_12_import(load, golden_folder, lifted):
    base, _, _, patch, _ = lifted
    state, _ = official.load_adapter(golden_folder / "export")
    g = load("export_forward")
    fused = load("export_fused")
    for fuse in (True, False):
        model, subspace = official.apply_adapter(base, state, fuse=fuse)
        if fuse:
            for name, expected in fused.items():
                if name in ("proj_buffer", "scale_buffer"):
                    got = subspace.basis if name == "proj_buffer" else subspace.scale
                else:
                    got = model.state_dict()[name]
                close(got, expected, f"fused {name}", abs=1e-6)
        floor = json.loads((golden_folder / "export" / "config.json").read_text())["sigma_min"]
        with torch.no_grad():
            v, _ = velocity(model, subspace, g["x_t"], g["sigma"], Cond(g["encoder_hidden_states"]), patch, floor)
        name = "velocity_fused" if fuse else "velocity_unfused"
        close(v, g[name], name, rel=5e-5)
