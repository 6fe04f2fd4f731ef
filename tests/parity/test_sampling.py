"""Guidance, schedules and whole trajectories: cases 09 to 11."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import PixelModel
from asymflow_ft.families import flux2
from asymflow_ft.method import asymflow, noise
from asymflow_ft.method.guidance import clamp_velocity, guide
from asymflow_ft.method.patches import to_image
from asymflow_ft.method.sampling import prepare_solver
from tests.parity.conftest import STATIC_SHIFT, close, grid_of, load_student, read


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
