"""One training step: how long it takes, which part of it takes how long, what it holds, and how fast it could be."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn
from tqdm import tqdm

from asymflow_ft.bench.architectures import (
    Architecture,
    random_subspace,
    random_transformer,
    transformer_on_meta,
    vae_on_meta,
)
from asymflow_ft.bench.clock import Stopwatch, Timing, now, ratio, summary
from asymflow_ft.bench.limits import check_memory, largest_gemm, peak_rate, time_matmul
from asymflow_ft.bench.workload import Options, make_data, make_recipe
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import PixelModel, PixelSubspace
from asymflow_ft.data.prepare import Batch
from asymflow_ft.families.base import compile_blocks
from asymflow_ft.recipe import Recipe
from asymflow_ft.training import trainable
from asymflow_ft.training.distributed import limit_norm, whole
from asymflow_ft.training.ema import PowerEma
from asymflow_ft.training.feed import Noise, loader, micro_batches
from asymflow_ft.training.memory import MemoryPlan, plan_memory
from asymflow_ft.training.objective import pixel_noise, summarise, training_terms
from asymflow_ft.training.optimizer import make_optimizer, set_rates
from asymflow_ft.training.perceptual import PerceptualMap, image_by_image, lpips_autocast
from asymflow_ft.training.recompute import checkpointed
from asymflow_ft.training.rehearsal import Meter, VggMap
from asymflow_ft.training.run import check_setup
from asymflow_ft.training.student import base_dtype, build_student

# In the order of a step; docs/performance.md says what belongs to each.
PARTS = (
    "data wait", "reference forward", "student forward", "recompute", "backward", "perceptual",
    "recovery + loss arithmetic", "optimizer", "EMA", "rest",
)  # fmt: skip
ARITHMETIC = "recovery + loss arithmetic"


@dataclass
class Run:
    """All that the steps of one process need, as finetune.py has it; with a watch in the places where parts change."""

    recipe: Recipe
    accelerator: Accelerator
    network: ModelMixin
    model: PixelModel
    reference: trainable.Reference | None
    codec: PixelCodec
    perceptual: PerceptualMap | None
    optimizer: torch.optim.Optimizer
    ema: PowerEma
    batches: Iterator[tuple[Batch, Noise]]
    watch: Stopwatch
    frozen: int
    perceptual_bytes: int


def watched_predict(predict: Callable[..., Tensor], watch: Stopwatch, part: str) -> Callable[..., Tensor]:
    """A family's `predict` as a part of its own. The gradient of its output is where the network's backward begins."""

    def call(*arguments: Any) -> Tensor:
        with watch.part(part):
            out = predict(*arguments)
        if out.requires_grad:
            out.register_hook(lambda gradient: watch.switch("backward"))
        return out

    return call


def watched_checkpoint(kind: Literal[True, "selective"], watch: Stopwatch) -> Callable[..., Any]:
    """`checkpointed`, with what runs once more in the backward pass as a part."""
    checkpoint = checkpointed(kind)

    def call(block: nn.Module, *arguments: Any) -> Any:
        def run(*inputs: Any) -> Any:
            if watch.running != "backward":
                return block(*inputs)
            with watch.part("recompute"):
                return block(*inputs)

        return checkpoint(run, *arguments)

    return call


def watched_perceptual(distance: PerceptualMap, watch: Stopwatch) -> PerceptualMap:
    """The perceptual network as a part, which in the backward pass comes first and ends with the image's gradient."""

    def call(image: Tensor, target: Tensor) -> Tensor:
        with watch.part("perceptual"):
            image.register_hook(lambda gradient: watch.switch(ARITHMETIC))
            return distance(image, target)

    return call


def vgg_map(device: torch.device) -> tuple[PerceptualMap, int]:
    """The work of LPIPS with random weights, in the precision and layout of `load_lpips`; and its bytes."""
    network = VggMap().to(device, memory_format=torch.channels_last)

    def distance(image: Tensor, target: Tensor) -> Tensor:
        with lpips_autocast(device.type):
            return network(image, target).float()

    return image_by_image(distance), sum(p.nbytes for p in network.parameters())


def frozen_bytes(*networks: nn.Module) -> int:
    """Bytes of all frozen weights, shared ones once, with the scales of quantised ones."""
    held: dict[int, int] = {}
    for parameter in (p for network in networks for p in network.parameters() if not p.requires_grad):
        tensors = [parameter, *_scales(parameter)]
        held |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held.values())


def _scales(weight: Tensor) -> list[Tensor]:
    if type(weight).__name__ == "Params4bit":
        scales = weight.quant_state  # type: ignore[attr-defined]
        return [scales.absmax, scales.state2.absmax]
    return [weight.SCB] if type(weight).__name__ == "Int8Params" else []  # type: ignore[attr-defined]


def build_run(architecture: Architecture, recipe: Recipe, accelerator: Accelerator, watch: Stopwatch) -> Run:
    """Networks, optimizer, average and data, made as finetune.py makes them."""
    family, device, train = architecture.family, accelerator.device, recipe.train
    dtype = base_dtype(recipe)
    subspace: PixelSubspace = random_subspace(architecture).to(device)
    quantised = train.base_weights != "full"  # on its way to the device, a layer at a time
    base: ModelMixin | None = random_transformer(architecture, dtype, "cpu" if quantised else device, quantised)

    def hand_over() -> ModelMixin:
        nonlocal base
        assert base is not None
        handed, base = base, (base if recipe.lora is None else None)
        return handed

    network = build_student(recipe, family, subspace, None, hand_over, device)
    frozen: tuple[nn.Module, ...] = (network,)
    reference = None
    predict_reference = watched_predict(family.predict, watch, "reference forward")
    if base is not None and recipe.loss.variance_reduction:
        reference, frozen = trainable.frozen_reference(base, subspace, predict_reference), (network, base)
    network.train()
    if train.gradient_checkpointing:
        network.enable_gradient_checkpointing(watched_checkpoint(train.gradient_checkpointing, watch))
    if train.compile:
        compile_blocks(network)
    optimizer = make_optimizer(recipe, trainable.trained_parameters(network), family.TRAINED_ENDS, family.OUTPUT_LAYER)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    if recipe.lora is not None and recipe.loss.variance_reduction:
        reference = trainable.lora_reference(prepared, network, subspace, predict_reference)
    ema = PowerEma(trainable.trained_parameters(network).items(), train.ema_gamma, start=0)
    model = PixelModel(
        prepared, subspace, watched_predict(family.predict, watch, "student forward"), architecture.guidance
    )
    perceptual, perceptual_bytes = None, 0
    if recipe.loss.perceptual == "lpips":
        distance, perceptual_bytes = vgg_map(device)
        perceptual = watched_perceptual(distance, watch)
    draw_noise = partial(pixel_noise, patch=family.GEOMETRY[1], seed=recipe.seed)
    batches = micro_batches(loader(recipe, make_data(recipe, architecture, accelerator), 0, accelerator), draw_noise)
    return Run(
        recipe, accelerator, network, model, reference, PixelCodec(), perceptual, optimizer, ema, batches, watch,
        frozen_bytes(*frozen), perceptual_bytes,
    )  # fmt: skip


def losses(run: Run, batch: Batch, noise: Noise) -> Tensor:
    """Forward and backward of a micro-batch; its row for the log."""
    watch, perceptual = run.watch, run.perceptual
    with watch.part(ARITHMETIC):
        terms = training_terms(
            run.recipe, run.model, run.reference, run.codec, perceptual, batch, noise, 17.0, run.accelerator.device
        )
        loss = terms.loss()
        if perceptual is not None:
            watch.switch("perceptual")
        run.accelerator.backward(loss)
    return terms.rows()


def train_step(run: Run, step: int) -> None:
    """An optimizer step as in the loop of finetune.py, without what is done for the user (log file, trackers, bar)."""
    watch, train = run.watch, run.recipe.train
    with watch.part("optimizer"):
        set_rates(run.optimizer, step, train)
        limit_norm(run.optimizer, train.clip_norm)
    with watch.part("data wait"):
        batch, noise = next(run.batches)
    with run.accelerator.accumulate(run.model.transformer):
        row = losses(run, batch, noise)
    with watch.part("optimizer"):
        norm = float(whole(run.accelerator.clip_grad_norm_(run.ema.parameters.values(), train.clip_norm)))
        run.optimizer.step()
        run.optimizer.zero_grad()
    with watch.part("EMA"):
        run.ema.update(step + 1)
    if not norm < float("inf"):
        raise ValueError(f"the gradient of step {step + 1} is not finite, so the figures would mean nothing")
    summarise(run.accelerator.gather(row))


def time_steps(run: Run, repeats: int, warmup: int) -> tuple[Timing, dict[str, Timing]]:
    """The whole step and its parts, of the same steps."""
    taken: list[dict[str, float]] = []
    processor: list[float] = []
    for step in tqdm(range(warmup + repeats), desc="steps", leave=False, mininterval=1):
        _, before = now()
        run.watch.start("rest")
        train_step(run, step)
        parts = run.watch.stop()
        _, after = now()
        if step >= warmup:
            taken.append(parts)
            processor.append(after - before)
    whole_step = summary([sum(parts.values()) for parts in taken], processor=processor)
    return whole_step, {part: summary([parts.get(part, 0.0) for parts in taken]) for part in PARTS}


def measured_memory(run: Run) -> dict[str, int | None]:
    """Bytes by item, in the names of `MemoryPlan.held`, of one more micro-batch, on top of gradients as all but the
    first one of a step have it. Activations: the most bytes of tensors alive, on a GPU the allocator's peak less all
    else."""
    parameters = list(run.ema.parameters.values())
    trained = sum(p.nbytes for p in parameters)
    state = [value for entry in run.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    held = {
        "frozen weights": run.frozen, "trained weights": trained, "gradients": trained,
        "optimizer state": sum({value.untyped_storage().data_ptr(): value.nbytes for value in state}.values()),
        "EMA": sum(average.nbytes for average in run.ema.average.values()),
        "perceptual network": run.perceptual_bytes,
    }  # fmt: skip
    cuda = run.accelerator.device.type == "cuda"
    if run.recipe.train.compile and not cuda:  # what compiled code allocates is not seen
        return {**held, "activations": None}
    batch, noise = next(run.batches)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        losses(run, batch, noise)
        return {**held, "activations": torch.cuda.max_memory_allocated() - sum(held.values())}
    known = [*run.network.parameters(), *run.network.buffers(), *run.model.subspace.buffers(), *gradients]
    with Meter([*known, batch.rgb, batch.z0, batch.embeds]) as meter:
        losses(run, batch, noise)
    return {**held, "activations": meter.peak}


def planned_memory(plan: MemoryPlan) -> dict[str, int]:
    """The estimate of the same items."""
    return {**plan.held, "activations": plan.activations + plan.perceptual_activations}


def bench_step(architecture: Architecture, options: Options, device: torch.device) -> dict[str, Any]:
    """All figures of a training step, for bench.json.

    Raises:
        ValueError: options that cannot work; `NotEnoughMemory` for more memory than there is.
    """
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    with tempfile.TemporaryDirectory(prefix="asymflow-bench-") as folder:
        recipe = make_recipe(architecture, options, Path(folder), device)
        check_setup(recipe, accelerator)
        family = architecture.family
        latent, vae = transformer_on_meta(architecture), vae_on_meta(architecture)
        plan = plan_memory(recipe, family, latent, vae, 0, wide_perceptual=device.type == "cpu")
        check_memory(plan, device)
        torch.manual_seed(0)
        run = build_run(architecture, recipe, accelerator, Stopwatch(device))
        step, parts = time_steps(run, options.repeats, options.warmup)
        memory = measured_memory(run)
        del run.batches  # its workers read from the folder
    tokens = options.batch * ((recipe.data.resolution // family.GEOMETRY[1]) ** 2 + architecture.text_length)
    shape = largest_gemm(run.network, tokens)
    multiplied, product = time_matmul(shape, base_dtype(recipe), device, options.repeats)
    rate = multiplied / product.median
    forwards = 4 if run.reference is not None else 3
    floor = forwards * plan.step.forward_flops
    instead = multiplied * ratio(step, product, device)  # operations of such products in the time of a step
    peak, speed = peak_rate(device, base_dtype(recipe)), plan.step.flops / step.median
    return {
        "what": "step", "architecture": architecture.name, "options": asdict(options), "recipe": asdict(recipe.train),
        "resolution": recipe.data.resolution, "tokens": tokens,
        "parameters": sum(p.numel() for p in latent.parameters()),
        "trained": sum(p.numel() for p in run.ema.parameters.values()),
        "step": asdict(step), "samples_per_second": options.batch / step.median,
        "parts": {part: asdict(timing) for part, timing in parts.items()},
        "shares": {part: timing.median / step.median for part, timing in parts.items()},
        "memory": {name: {"planned": planned, "measured": memory[name]}
                   for name, planned in planned_memory(plan).items()},
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "operations": {"step": plan.step.flops, "forward": plan.step.forward_flops,
                       "reference": plan.step.reference_flops},
        "tflops": speed / 1e12,
        "matmul": {"shape": shape, "tflops": rate / 1e12, "product": asdict(product)},
        "floor": {"forwards": forwards, "seconds": floor / rate}, "over_floor": instead / floor,
        "share_of_matmul_rate": plan.step.flops / instead, "mfu": None if peak is None else speed / peak,
    }  # fmt: skip
