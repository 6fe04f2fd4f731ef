"""The networks, optimizer, average and data of a training run with random weights, as finetune.py makes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn

from asymflow_ft.bench.architectures import (
    Architecture,
    random_subspace,
    random_transformer,
    transformer_on_meta,
    vae_on_meta,
)
from asymflow_ft.bench.clock import Stopwatch
from asymflow_ft.bench.limits import check_memory
from asymflow_ft.bench.scratch import scratch_folder
from asymflow_ft.bench.workload import Options, make_data, make_recipe
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import PixelModel, PixelSubspace
from asymflow_ft.data.prepare import Batch
from asymflow_ft.families.base import compile_blocks
from asymflow_ft.recipe import Recipe
from asymflow_ft.training import trainable
from asymflow_ft.training.ema import PowerEma
from asymflow_ft.training.feed import Noise, loader, micro_batches
from asymflow_ft.training.memory import MemoryPlan, plan_memory
from asymflow_ft.training.objective import pixel_noise, training_terms
from asymflow_ft.training.optimizer import make_optimizer
from asymflow_ft.training.perceptual import PerceptualMap, image_by_image, lpips_autocast
from asymflow_ft.training.recompute import checkpointed
from asymflow_ft.training.rehearsal import VggMap
from asymflow_ft.training.run import check_setup
from asymflow_ft.training.student import base_dtype, build_student

ARITHMETIC = "recovery + loss arithmetic"


@dataclass
class Run:
    """All that the steps of one process need, as finetune.py has it; with a watch in the places where parts change.

    network: the trained one. networks: that, and the frozen base where there is one. frozen: bytes of their weights.
    """

    recipe: Recipe
    accelerator: Accelerator
    network: ModelMixin
    networks: tuple[nn.Module, ...]
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
    networks: tuple[nn.Module, ...] = (network,)
    reference = None
    predict_reference = watched_predict(family.predict, watch, "reference forward")
    if base is not None and recipe.loss.variance_reduction:
        reference, networks = trainable.frozen_reference(base, subspace, predict_reference), (network, base)
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
        recipe, accelerator, network, networks, model, reference, PixelCodec(), perceptual, optimizer, ema, batches,
        watch, frozen_bytes(*networks), perceptual_bytes,
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


def accelerator_on(device: torch.device) -> Accelerator:
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def planned(architecture: Architecture, recipe: Recipe, accelerator: Accelerator) -> MemoryPlan:
    """The plan of a run that can work here.

    Raises:
        ValueError: options that cannot work; `NotEnoughMemory` for more memory than there is.
    """
    check_setup(recipe, accelerator)
    latent, vae, device = transformer_on_meta(architecture), vae_on_meta(architecture), accelerator.device
    plan = plan_memory(recipe, architecture.family, latent, vae, 0, wide_perceptual=device.type == "cpu")
    check_memory(plan.phases["training step"], device, "a training step")
    return plan


@contextmanager
def started(architecture: Architecture, options: Options, device: torch.device) -> Iterator[tuple[Run, MemoryPlan]]:
    """A run that would do what is measured, and its plan.

    Raises:
        ValueError: options that cannot work; `NotEnoughMemory` for more memory than there is.
    """
    accelerator = accelerator_on(device)
    with scratch_folder() as folder:
        recipe = make_recipe(architecture, options, folder, device)
        plan = planned(architecture, recipe, accelerator)
        torch.manual_seed(0)
        run = build_run(architecture, recipe, accelerator, Stopwatch(device))
        try:
            yield run, plan
        finally:
            del run.batches  # its workers read from the folder
