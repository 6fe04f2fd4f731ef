"""One solver step of drawing in pixels against one of the stock pipeline in latents, with as many tokens each."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from tqdm import tqdm

from asymflow_ft.bench.architectures import (
    Architecture,
    random_embeds,
    random_subspace,
    random_transformer,
    random_vae,
    stock_pipeline,
    transformer_on_meta,
)
from asymflow_ft.bench.clock import Timing, interleaved, measure, now, peak_memory, ratio, summary
from asymflow_ft.bench.limits import check_memory
from asymflow_ft.bench.run import frozen_bytes
from asymflow_ft.bench.workload import Options, resolution_of
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import CFG_SCALE, PixelPipelineMixin, flow_solver
from asymflow_ft.components.quantize import quantize_frozen
from asymflow_ft.components.subspace import Cond, PixelSubspace
from asymflow_ft.families.base import compile_blocks
from asymflow_ft.method.asymflow import recover_velocity
from asymflow_ft.method.guidance import clamp_velocity, guide
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.training.memory import count_tensors, quantised_bytes
from asymflow_ft.training.run import synchronise

STEPS = 6  # of a picture; the first one is set-up, and kept apart
WARMUP = 2


Span = tuple[float, float]  # seconds, by both clocks of `now`
Moment = tuple[float | torch.cuda.Event, float]


@dataclass
class Trace:
    """Solver steps of some pictures; their first steps with the set-up; and what of a step is inside the network."""

    steps: list[Span]
    first: list[Span]
    network: list[Span]


def _moment(device: torch.device) -> Moment:
    """Now. On a GPU the wall's clock is an event in its stream, as in a `Stopwatch`: waiting for the GPU in every step
    would add the launch of the next kernels to it, which otherwise hides behind the work."""
    if device.type != "cuda":
        synchronise(device)
        return now()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event, now()[1]


def _since(before: Moment, after: Moment) -> Span:
    """What is between; events must have happened."""
    (begin, own), (end, own_after) = before, after
    wall = begin.elapsed_time(end) / 1000 if isinstance(begin, torch.cuda.Event) else end - begin  # type: ignore
    return wall, own_after - own


def _timing(spans: list[Span]) -> Timing:
    return summary([wall for wall, _ in spans], processor=[own for _, own in spans])


@contextmanager
def traced(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[Callable[[Callable[[], object]], Trace]]:
    """Inside, a function that draws one picture and says how long its steps took: from the end of one call of the
    scheduler's `step` to the end of the next one. The same for both pipelines, and no callback of theirs is needed."""
    marks: list[Moment] = []
    entered: list[Moment] = []
    left: list[Moment] = []
    step = pipeline.scheduler.step

    def watched(*arguments: Any, **options: Any) -> Any:
        out = step(*arguments, **options)
        marks.append(_moment(device))
        return out

    def draw(picture: Callable[[], object]) -> Trace:
        marks.clear(), entered.clear(), left.clear()
        started = _moment(device)
        picture()
        synchronise(device)
        inside = [_since(*span) for span in zip(entered, left, strict=True)]
        calls = len(inside) // len(marks)
        each = [tuple(map(sum, zip(*inside[i : i + calls], strict=True))) for i in range(calls, len(inside), calls)]
        return Trace([_since(*pair) for pair in pairwise(marks)], [_since(started, marks[0])], each)

    hooks = [
        pipeline.transformer.register_forward_pre_hook(lambda *_: entered.append(_moment(device))),
        pipeline.transformer.register_forward_hook(lambda *_: left.append(_moment(device))),
    ]
    pipeline.scheduler.step = watched
    try:
        yield draw
    finally:
        del pipeline.scheduler.step
        for hook in hooks:
            hook.remove()


def pixel_pipeline(architecture: Architecture, stock: DiffusionPipeline, transformer: ModelMixin) -> Any:
    """The pixel pipeline that belongs to a stock one, around a lifted network."""
    family = architecture.family
    kind: type[PixelPipelineMixin] = family.pixel_pipeline_class(stock)
    pipeline = kind(
        scheduler=flow_solver(), transformer=transformer, subspace=random_subspace(architecture), codec=PixelCodec(),
        **dict.fromkeys(family.TEXT_PARTS), shift=7.0, shift_mode="static", default_size=architecture.resolution,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_both(
    works: Mapping[str, tuple[DiffusionPipeline, Callable[[], object]]], repeats: int, device: torch.device
) -> tuple[dict[str, Trace], dict[str, float]]:
    """Pictures of both pipelines in turns, after some to warm up; and the very first step of each."""
    traces = {name: Trace([], [], []) for name in works}
    cold = {}
    for turn in tqdm(range(WARMUP + repeats), desc="pictures", leave=False, mininterval=1):
        for name, (pipeline, picture) in works.items():
            with traced(pipeline, device) as draw:
                trace = draw(picture)
            if turn == 0:
                cold[name] = trace.first[0][0]
            if turn >= WARMUP:
                kept = traces[name]
                kept.steps += trace.steps
                kept.first += trace.first
                kept.network += trace.network
    return traces, cold


def arithmetic(pipeline: Any, tokens: Tensor, grid: tuple[int, int], repeats: int) -> dict[str, Timing]:
    """What a guided pixel step does outside the network and the solver, each alone."""
    basis, scale = pipeline.subspace.float32()
    patch, codec, device = pipeline.subspace.config["patch"], pipeline.codec, tokens.device
    sigma = torch.full((len(tokens), 1, 1), 0.7, device=device)
    u, v = torch.randn_like(tokens), torch.randn_like(tokens)

    def clamp(x0: Tensor) -> Tensor:
        return to_tokens(codec.clamp(to_image(x0, grid, patch)), patch)

    works = {
        "recovery": lambda: [recover_velocity(u, tokens, sigma, basis, scale) for _ in range(2)],
        "guidance": lambda: guide(u, v, CFG_SCALE, tokens - sigma * u),
        "clamp": lambda: clamp_velocity(v, tokens, sigma, clamp),
    }
    return interleaved(works, repeats, WARMUP, device)


def weight_bytes(architecture: Architecture, dtype: torch.dtype, quant: str) -> int:
    """Of the base and its lifted network together: they share what is not lifted, but each is quantised apart."""
    family = architecture.family
    rank, patch = family.GEOMETRY
    base = nn.Module.to(transformer_on_meta(architecture), dtype)
    with torch.device("meta"):
        lifted = family.lift(base, PixelSubspace(3 * patch**2, rank, patch))
    for network in (base, lifted):
        network.requires_grad_(False)
    tensors = count_tensors(family, lifted, (base, lifted))
    if quant == "full":
        return tensors.frozen
    return tensors.frozen + sum(2 * quantised_bytes(quant, *linear) - linear[-1] for linear in tensors.linears)


@torch.no_grad()
def bench_sample(architecture: Architecture, options: Options, device: torch.device) -> dict[str, Any]:
    """All figures of drawing, for bench.json.

    Raises:
        ValueError: options that cannot work, or no stock pipeline to compare with.
    """
    family, side = architecture.family, resolution_of(architecture, options)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    quantised = options.quant != "full"
    check_memory(weight_bytes(architecture, dtype, options.quant), device, "the pair of networks")
    base = random_transformer(architecture, dtype, "cpu" if quantised else device, quantised)
    vae = random_vae(architecture, dtype, device)
    rank, patch = family.GEOMETRY
    grid, count, repeats = (side // patch, side // patch), options.batch, options.repeats
    lifted = family.lift(base, random_subspace(architecture)).requires_grad_(False)
    for network in (base, lifted) if quantised else ():  # quantised weights cannot be lifted
        quantize_frozen(network, options.quant, family.TRAINED_ENDS, device)
    networks = {"pixel": frozen_bytes(lifted), "latent": frozen_bytes(base)}  # int8 weights move at their first call
    stock = stock_pipeline(architecture, base, vae)
    pixels = pixel_pipeline(architecture, stock, lifted).to(device)
    embeds = random_embeds(architecture, 2 * count, dtype).to(device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, side, side, generator=generator)
    latent_noise = torch.randn(count, rank, *grid, generator=generator).to(device, dtype)

    def draw_pixels() -> None:
        pixels(
            prompt_embeds=embeds[:count], negative_prompt_embeds=embeds[count:], latents=noise, height=side,
            width=side, num_inference_steps=STEPS, guidance_scale=CFG_SCALE, output_type="latent",
            batch_guidance=options.batch_guidance,
        )  # fmt: skip

    def draw_latents() -> None:
        family.draw_base(
            stock, latent_noise, embeds[:count], embeds[count], (side, side), STEPS, CFG_SCALE, output_type="latent"
        )

    works = {"pixel": (pixels, draw_pixels), "latent": (stock, draw_latents)}
    result: dict[str, Any] = {
        "what": "sample", "architecture": architecture.name, "options": asdict(options), "resolution": side,
        "guidance": CFG_SCALE, "solver_steps": STEPS,
    }  # fmt: skip
    for name in ("eager", "compiled") if options.compile else ("eager",):
        if name == "compiled":
            for network in (pixels.transformer, stock.transformer):
                compile_blocks(network)
        traces, cold = draw_both(works, repeats, device)
        result[name] = {kind: _figures(trace, cold[kind], device) for kind, trace in traces.items()}
        pixel_step, latent_step = (_timing(traces[kind].steps) for kind in ("pixel", "latent"))
        result[name]["pixel_over_latent"] = ratio(pixel_step, latent_step, device)
        if name == "eager":  # after pictures that made what libraries keep; of compiled code a CPU sees no tensors
            held = [noise, latent_noise, embeds, *pixels.subspace.buffers()]
            held += [tensor for network in (lifted, base) for tensor in (*network.parameters(), *network.buffers())]
            result["memory"] = {
                kind: {"network": networks[kind], "drawing": peak_memory(draw, held, device)}
                for kind, (_, draw) in works.items()
            }
        result[name]["pairs"] = _pairs(pixels, to_tokens(noise.to(device), patch), embeds, grid, options)

    tokens = to_tokens(noise.to(device), patch)
    alone = arithmetic(pixels, tokens, grid, repeats)
    step = Timing(**result["eager"]["pixel"]["step"])
    result["arithmetic"] = {name: asdict(timing) for name, timing in alone.items()}
    result["arithmetic_share"] = sum(ratio(timing, step, device) for timing in alone.values())
    latents = torch.randn(count, grid[0] * grid[1], rank, device=device)
    result["decode"] = {
        "pixel": asdict(measure(lambda: pixels.codec.decode(noise.to(device)), repeats, WARMUP, device)),
        "latent": asdict(measure(lambda: family.decode_latents(vae, latents, grid), repeats, 1, device)),
    }
    return result


def _figures(trace: Trace, cold: float, device: torch.device) -> dict[str, Any]:
    step, network = _timing(trace.steps), _timing(trace.network)
    return {"step": asdict(step), "network": asdict(network), "first_step": asdict(_timing(trace.first)),
            "first_step_cold": cold, "outside_network": 1 - ratio(network, step, device)}  # fmt: skip


def _pairs(pixels: Any, tokens: Tensor, embeds: Tensor, grid: tuple[int, int], options: Options) -> dict[str, Any]:
    """With and without a prompt: one batch of two predictions against two calls."""
    model, count = pixels.pixel_model, len(tokens)
    sigma = torch.full((count, 1, 1), 0.7, device=tokens.device)

    def two_calls() -> None:
        for half in (embeds[:count], embeds[count:]):
            model.velocity(tokens, sigma, Cond(half, model.guidance), grid)

    def one_batch() -> None:
        both, level = tokens.repeat(2, 1, 1), sigma.repeat(2, 1, 1)
        model.velocity(both, level, Cond(embeds, model.guidance), grid)

    works = {"two_calls": two_calls, "one_batch": one_batch}
    taken = interleaved(works, options.repeats, WARMUP, tokens.device, "guidance")
    share = ratio(taken["one_batch"], taken["two_calls"], tokens.device)
    return {name: asdict(timing) for name, timing in taken.items()} | {"one_batch_over_two_calls": share}
