"""What was tried for speed, and kept or dropped (docs/performance.md, "Optimisations"), made again on one CPU thread.

python docs/performance_tried.py [NAME ...] [--small]      NAME: a row's, e.g. recovery; none is all of them

Of each pair one side is this package's own code, the other one is written out here or in performance_pairs.py. Both
get equal inputs; results (with gradients, where there is a backward pass) that differ by more than the pair's
tolerance end the script. Then they are timed in turns. Prints rows of a Markdown table: name and what, before, after,
ratio, differ by: max |a - b| / max |a|. Milliseconds are the process's own, medians of 5 to 25; MB are the peak of new
tensors, counted. `--small`: tiny sizes, once, so no figures.
"""

import argparse
import copy
import itertools
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import performance_pairs as before
import torch
from performance_pairs import Pair, measure, patched, with_gradient
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from asymflow_ft.bench import architectures as bases
from asymflow_ft.bench.report import machine
from asymflow_ft.bench.sample import pixel_pipeline
from asymflow_ft.bench.workload import Options, make_recipe
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.quantize import quantize_frozen
from asymflow_ft.components.subspace import PixelModel
from asymflow_ft.data.prepare import Batch
from asymflow_ft.families import flux2
from asymflow_ft.method.align import Grams, procrustes
from asymflow_ft.method.asymflow import calibrate, lift, recover_clean, recover_velocity
from asymflow_ft.method.loss import variance_reduced_target, velocity_mse
from asymflow_ft.training import trainable
from asymflow_ft.training.ema import PowerEma
from asymflow_ft.training.feed import micro_batches
from asymflow_ft.training.objective import draw_noise, pixel_noise, training_terms
from asymflow_ft.training.optimizer import make_optimizer
from asymflow_ft.training.perceptual import image_by_image
from asymflow_ft.training.rehearsal import VggMap
from asymflow_ft.training.student import build_student

CPU, FOLDER = torch.device("cpu"), Path(tempfile.gettempdir())
FULL_SIDE = 1024  # pixels of the pictures; with --small 64
TINY, SMALL = bases.NAMED["tiny"], bases.NAMED["100m"]
NO_BLOCKS = replace(TINY, name="no blocks", transformer={**TINY.transformer, "num_layers": 0, "num_single_layers": 0})
SUBSPACE = bases.random_subspace(TINY)
BASIS, SCALE = SUBSPACE.float32()
SIGMA = torch.full((1, 1, 1), 0.7)
COMPILER = {FULL_SIDE: "inductor"}  # with --small what it traces is run as it is


def random_tokens(side, count):
    return [torch.randn(1, (side // 16) ** 2, 768) for _ in range(count)]


def recovery(side):
    u, x_t = random_tokens(side, 2)
    given, gain = (u, x_t, SIGMA, BASIS, SCALE), calibrate(SIGMA, SCALE).gain
    old, kept = partial(before.two_projections, *given), partial(recover_velocity, *given)

    def baddbmm():
        inside = torch.addcmul(SCALE * gain * u, x_t, gain * (1 - SCALE))
        outside = torch.addcmul(x_t, u, SCALE) / SIGMA
        return torch.baddbmm(outside, (inside - outside) @ BASIS, BASIS.mT[None])

    def projected_first():
        low_u, low_x = SCALE * (gain - 1 / SIGMA) * (u @ BASIS), (gain * (1 - SCALE) - 1 / SIGMA) * (x_t @ BASIS)
        return torch.addcmul(x_t, u, SCALE) / SIGMA + (low_u + low_x) @ BASIS.mT

    yield Pair("one projection in the place of two", old, kept)
    yield Pair("with `baddbmm`", kept, baddbmm)
    yield Pair("`u` and `x_t` projected before they are added", kept, projected_first)
    kinds = (before.clean_by_sums, recover_clean)
    works = (with_gradient(lambda u, f=f: f(u, *given[1:]), u, x_t) for f in kinds)
    yield Pair("`recover_clean` with its backward pass: `addcmul`", *works)


def colour(side):
    codec, pixels, rgb = PixelCodec(), torch.randn(1, 3, side, side), torch.rand(1, 3, side, side) * 2 - 1
    through, encode = partial(before.clamp_through_srgb, codec, pixels), partial(codec.encode, rgb)
    yield Pair("clamp in linear light, without the sRGB curve", through, partial(codec.clamp, pixels), 1e-4)
    masked = patched(encode, {"components.color._cube_root": before.masked_cube_root})
    yield Pair("Oklab's cube root without a mask", masked, encode)


def target(side):
    x0, x0_hat, x_low, noise = random_tokens(side, 4)
    given = (x0, x0_hat, x_low, x_low - (x0 - x0_hat) - noise, SIGMA)

    def work(function, **pieces):
        def parts():
            own = function(*given, **pieces)
            return own.image, own.coefficient, own.gate

        return parts

    old, kept = work(before.spelled_target), work(variance_reduced_target)
    yield Pair("variance-reduced target, `addcmul` for the control variate", old, kept)
    tries = {
        "mean of squares as a vector norm": {"power": lambda a: torch.linalg.vector_norm(a, dim=-1).square() / 256},
        "mean of the product as `vecdot`": {"product": lambda a, b: torch.linalg.vecdot(a, b) / 256},
        "... as `matmul`": {"product": lambda a, b: (a[..., None, :] @ b[..., None])[..., 0, 0] / 256},
    }
    for what, piece in tries.items():
        yield Pair(f"the same, {what}", kept, work(before.spelled_target, less=before.added_in_one, **piece))


def error(side):
    x0_hat, image = random_tokens(side, 2)
    kinds = (before.error_of_velocities, velocity_mse, before.mse_of_library)
    works = [with_gradient(lambda x, f=f: f(x, image, SIGMA), x0_hat, torch.ones(1)) for f in kinds]
    yield Pair("`velocity_mse` with its backward pass: divided by sigma after the mean", *works[:2])
    yield Pair("the same with `F.mse_loss`", *works[1:])


def whole(side):
    """Drawing and loss with a network that has end layers alone."""
    base, noise = bases.random_transformer(NO_BLOCKS, torch.float32, CPU), torch.randn(1, 3, side, side)
    stock = bases.stock_pipeline(NO_BLOCKS, base, bases.random_vae(TINY, torch.float32, CPU))
    pipeline, embeds = pixel_pipeline(NO_BLOCKS, stock, flux2.lift(base, SUBSPACE)), torch.randn(2, 32, 192)

    def draw():
        return pipeline(
            prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], latents=noise, height=side, width=side,
            num_inference_steps=4, guidance_scale=4.0, output_type="latent",
        ).images  # fmt: skip

    yield Pair("4 guided steps, all of the above", patched(draw, before.OLD), draw, 1e-4)
    yield Pair("... tokens in one order in memory alone", patched(draw, before.VIEWS), draw)

    network = flux2.lift(base, SUBSPACE).requires_grad_()
    model = PixelModel(network, SUBSPACE, flux2.predict)
    frozen = trainable.frozen_reference(base, SUBSPACE, flux2.predict)
    recipe = make_recipe(NO_BLOCKS, Options(side, precision="no", perceptual="none"), FOLDER, CPU)
    latents, rgb = random_tokens(side, 1)[0][..., :128], torch.rand(1, 3, side, side) * 2 - 1
    batch = Batch(rgb, latents, embeds[:1], [0], [""])

    def loss(reference=frozen):
        network.zero_grad()
        drawn = pixel_noise(batch, 16, 0)
        own = training_terms(recipe, model, reference, PixelCodec(), None, batch, drawn, 17.0, CPU).loss()
        own.backward()
        return [own.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    def needless_target(x0_hat, x0, sigma, floor):
        nothing = torch.zeros_like(x0)
        return velocity_mse(x0_hat, variance_reduced_target(x0, x0_hat, nothing, nothing, sigma).image, sigma, floor)

    yield Pair("loss, forward and backward, all of the above", patched(loss, before.OLD), loss, 1e-4)
    yield Pair("... tokens in one order in memory alone", patched(loss, before.VIEWS), loss)
    library = patched(loss, {"method.loss.velocity_mse": before.mse_of_library})
    yield Pair("... with `F.mse_loss`", loss, library, memory=True)
    plain = partial(loss, None)
    old = patched(plain, {"method.loss.velocity_mse": needless_target})
    yield Pair("... plain flow matching: no target that nothing is subtracted from", old, plain)


def compiled(side):
    x0, x_low, x_low_hat, u = random_tokens(side, 4)

    def arithmetic(u):
        clean = recover_clean(u, x0, SIGMA, BASIS, SCALE)
        return velocity_mse(clean, variance_reduced_target(x0, clean, x_low, x_low_hat, SIGMA).image, SIGMA)

    kinds = (arithmetic, torch.compile(arithmetic, backend=COMPILER.get(side, "eager")))
    yield Pair("recovery, target and error, with backward pass", *(with_gradient(f, u, torch.ones(1)) for f in kinds))


def weights(side):
    """What follows the backward pass, on the weights that a LoRA of rank 256 trains in `100m`."""
    architecture = SMALL if side == FULL_SIDE else TINY
    base = bases.random_transformer(architecture, torch.float32, CPU)
    recipe = make_recipe(architecture, Options(64, precision="no"), FOLDER, CPU)
    network = build_student(recipe, flux2, SUBSPACE, None, lambda: base, CPU)
    sizes = {name: p.shape for name, p in trainable.trained_parameters(network).items()}

    def copies():  # from 0, so that a weight is the sum of its steps
        torch.manual_seed(0)
        own = {name: nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
        for parameter in own.values():
            parameter.grad = torch.randn_like(parameter)
        return own

    def kept(own, kind="adamw"):
        own_recipe = replace(recipe, train=replace(recipe.train, optimizer=kind))
        return make_optimizer(own_recipe, own, flux2.TRAINED_ENDS, flux2.OUTPUT_LAYER)

    def stock(own, **option):
        groups = [{"params": group["params"], "lr": group["lr"]} for group in kept(own).param_groups]
        return torch.optim.AdamW(groups, betas=recipe.train.betas, weight_decay=recipe.train.weight_decay, **option)

    def stepping(make, **option):
        own = copies()
        optimizer = make(own, **option)
        optimizer.step()
        for parameter in own.values():  # another gradient, so that the moments matter
            parameter.grad.add_(torch.randn_like(parameter))
        return lambda: optimizer.step() or [p.detach() for p in own.values()]

    what = f"{sum(s.numel() for s in sizes.values()) / 1e6:.3g} M weights, {len(sizes)} tensors"
    yield Pair(f"AdamW `fused=True`, {what}", stepping(stock, foreach=False), stepping(kept), memory=True)
    yield Pair("AdamW `foreach=True`", stepping(kept), stepping(stock, foreach=True), memory=True)
    yield Pair("AdamW in 8 bits", stepping(kept), stepping(kept, kind="adamw8bit"), 0.8)

    def clipping(**option):
        own = copies()
        return lambda: [torch.nn.utils.clip_grad_norm_(own.values(), 200.0, **option), *(p.grad for p in own.values())]

    yield Pair("clipping with `foreach=True`", clipping(), clipping(foreach=True))

    def averaging(update):
        ema = PowerEma(copies().items())
        for parameter in ema.parameters.values():
            parameter.data += parameter.grad
        return lambda: update(ema) or list(ema.average.values())

    def all_at_once(ema):
        values = [p.detach() for p in ema.parameters.values()]
        torch._foreach_lerp_(list(ema.average.values()), values, 1 - (1 - 1 / 1001) ** (ema.gamma + 1))

    yield Pair("EMA with `torch._foreach_lerp_`", averaging(lambda ema: ema.update(1001)), averaging(all_at_once))

    def clearing(**option):
        own = copies()
        optimizer, gradients = torch.optim.SGD(own.values()), [(p, p.grad) for p in own.values()]

        def clear():
            for parameter, gradient in gradients:
                parameter.grad = gradient
            optimizer.zero_grad(**option)
            return [torch.zeros(1) if p.grad is None else p.grad.flatten()[-1:] for p in own.values()]

        return clear

    yield Pair("`zero_grad(set_to_none=True)`, the default", clearing(set_to_none=False), clearing())


def noise(side):
    for images in (1, 4):
        batch = Batch(torch.empty(images, 3, side, side), None, None, list(range(images)), [])

        def draw(batch=batch):
            return pixel_noise(batch, 16, 0)

        def stacked(batch=batch):
            drawn = [draw_noise([serial], (side // 16) ** 2, 768, 0) for serial in batch.serials]
            return [torch.cat(parts) for parts in zip(*drawn, strict=True)]

        with closing(micro_batches(itertools.repeat(batch), draw)) as ahead:

            def on_a_thread(ahead=ahead, images=images):
                time.sleep(0.08 * images)  # the device's work
                return next(ahead)[1]

            yield Pair(f"{images} drawn on a thread while the device works", draw, on_a_thread, 0.0, alone=True)
        yield Pair(f"{images} drawn straight into the batch's tensor", stacked, draw, 0.0, memory=True)


def vgg(side):
    plain = VggMap()
    kept, small = copy.deepcopy(plain).to(memory_format=torch.channels_last), side // 4

    def works(*distances, side=small, images=1):
        image, other, direction = (torch.randn(images, channels, side, side) for channels in (3, 3, 1))
        return (with_gradient(lambda x, f=f: f(x, other).float(), image, direction) for f in distances)

    narrow, again = torch.autocast("cpu", torch.bfloat16)(kept.forward), partial(checkpoint, kept, use_reentrant=False)
    turned = 1e-2  # rounding may turn a ReLU, or the choice of a pool, and with it the gradient of some pixels
    yield Pair(f"channels last, {small} px", *works(plain, kept), turned, memory=True)
    yield Pair(f"channels last, {2 * small} px", *works(plain, kept, side=2 * small), turned, memory=True)
    yield Pair(f"bf16, {small} px", *works(kept, narrow), 0.5, memory=True)
    fast = torch.compile(copy.deepcopy(kept), backend=COMPILER.get(side, "eager"))
    yield Pair(f"`torch.compile`, {small} px", *works(kept, fast), turned)
    yield Pair(f"`torch.utils.checkpoint`, {small} px", *works(kept, again), 0.0, memory=True)
    yield Pair(f"image by image, 4 of {small} px", *works(kept, image_by_image(kept), images=4), turned, memory=True)


def gram(side):
    """An alignment's sums of one picture, and the basis that a million tokens give: 16 pictures, again and again."""

    def works(*kinds, tokens=(side // 16) ** 2, images=1):
        z = [torch.randn(tokens, 128) for _ in range(min(images, 16))]
        x = [lift(own, BASIS, SCALE) + torch.randn(tokens, 768) for own in z]

        def summed(kind):
            grams = kind(*Grams.zeros(768, 128).tensors())
            for i in range(images):
                grams.update(z[i % len(z)], x[i % len(x)])
            return procrustes(grams).basis if images > 1 else (grams.pixel, grams.cross, grams.latent)

        return (lambda kind=kind: summed(kind) for kind in kinds)

    yield Pair(f"sums of {(side // 16) ** 2} tokens in strips", *works(before.WholeGrams, Grams), 1e-12)
    yield Pair("sums of 64 tokens in strips", *works(before.WholeGrams, Grams, tokens=64), 1e-12)
    yield Pair("... one Gram of latents and pixels together", *works(Grams, before.JointGrams, tokens=64), 1e-12)
    million = 1 + 10**6 // 64**2 if side == FULL_SIDE else 16  # of pictures with 64x64 tokens
    yield Pair("basis of 10^6 tokens in strips", *works(before.WholeGrams, Grams, images=million), 1e-10)
    yield Pair("... float32 products in blocks of 256", *works(Grams, before.Float32Grams, images=million), 1e-5)


def fp8(side):
    """Frozen weights of a feed-forward as wide as klein-4b's: bf16 against a byte each, with a scale per row."""
    tokens, inputs, outputs = (1024, 3072, 9216) if side == FULL_SIDE else (16, 64, 128)
    x, layer = torch.randn(tokens, inputs).bfloat16(), nn.Linear(inputs, outputs, bias=False).bfloat16()
    int8 = nn.Sequential(copy.deepcopy(layer.requires_grad_(False)))
    quantize_frozen(int8, "int8", (), "cpu")

    def e4m3(rows):
        scale = rows.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        return (rows / scale).to(torch.float8_e4m3fn), scale

    weight, scale = e4m3(layer.weight)

    def multiplied():
        narrow, own = e4m3(x)
        return torch._scaled_mm(narrow, weight.mT, own, scale.mT, out_dtype=torch.bfloat16)

    bf16, unpacked = partial(layer, x), lambda: F.linear(x, weight.bfloat16() * scale.bfloat16())
    yield Pair(f"bf16; int8, {tokens} tokens, {inputs} to {outputs}", bf16, partial(int8, x), 0.1)
    yield Pair("bf16; e4m3, made bf16 first", bf16, unpacked, 0.1)
    yield Pair("bf16; e4m3 products, `torch._scaled_mm`", bf16, multiplied, 0.1)


_ALL = (recovery, colour, target, error, whole, compiled, weights, noise, vgg, gram, fp8)
ROWS = {row.__name__: row for row in _ALL}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, once")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(ROWS):
        parser.error(f"no row is named {', '.join(unknown)}; there are {', '.join(ROWS)}")
    torch.set_num_threads(1)
    print(machine(CPU))
    for name in chosen.names or ROWS:
        torch.manual_seed(0)
        for pair in ROWS[name](64 if chosen.small else FULL_SIDE):
            print(measure(name, pair, chosen.small), flush=True)
