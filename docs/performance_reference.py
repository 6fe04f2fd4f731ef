"""The authors' official code (LakonLab) beside this package, on one CPU thread: equal inputs and weights, in turns.

python docs/performance_reference.py LAKONLAB [--only training,sampling,align] [--repeats 5]

LAKONLAB is a checkout of https://github.com/Lakonik/LakonLab. Prints rows of a Markdown table: what, the official
code, this package, ratio, and by how much the results differ: max |a - b| / max |a| of losses and all gradients, of
states after six steps, of basis and scale. Milliseconds are the process's own, medians; memory is counted.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import official_checkout as official_code
import torch

from asymflow_ft.bench import architectures as bases
from asymflow_ft.bench.clock import interleaved, now, summary
from asymflow_ft.bench.report import digits
from asymflow_ft.bench.sample import draw_both, pixel_pipeline
from asymflow_ft.bench.workload import Options, make_recipe
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import PixelModel
from asymflow_ft.data.prepare import Batch
from asymflow_ft.families import flux2
from asymflow_ft.method.align import Grams, procrustes
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.recipe_keys import Lora
from asymflow_ft.training import trainable
from asymflow_ft.training.ema import PowerEma
from asymflow_ft.training.objective import pixel_noise, training_terms
from asymflow_ft.training.optimizer import make_optimizer
from asymflow_ft.training.recompute import checkpointed
from asymflow_ft.training.rehearsal import Meter
from asymflow_ft.training.student import build_student

CPU = torch.device("cpu")
TINY, SMALL = bases.NAMED["tiny"], bases.NAMED["100m"]
NO_BLOCKS = replace(TINY, name="no blocks", transformer={**TINY.transformer, "num_layers": 0, "num_single_layers": 0})


def row(what, official, here, unit="ms", differ=None):
    shown = "" if differ is None else f"{differ:.0e}"
    both = " | ".join(f"{digits(value)} {unit}" for value in (official, here))
    print(f"| {what} | {both} | {here / official:.2f} | {shown} |", flush=True)


def in_turns(what, official, here, repeats, differ=None):
    taken = interleaved({"official": official, "here": here}, repeats, 1, CPU)
    row(what, *(1e3 * timing.processor for timing in taken.values()), differ=differ)


def relative(one, other):
    return ((one - other).abs().max() / one.abs().max()).item()


def megabytes(tensors):
    """Of all storages, shared ones once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) / 1e6


def make_base(architecture):
    """A latent base and a subspace with random values, for both sides, and the network's sizes."""
    base, subspace = bases.random_transformer(architecture, torch.float32, CPU), bases.random_subspace(architecture)
    official_code.CHECKPOINTS.update(
        base=base.state_dict(), fit={"proj_mat_p16": subspace.basis, "scale_p16": subspace.scale}
    )
    sizes = {key: architecture.transformer[key] for key in flux2.ADAPTER_CONFIG if key in architecture.transformer}
    return base, subspace, sizes


def training(architecture, side, perceptual, repeats):
    """A micro-batch forward and backward with LoRA of rank 256 and no dropout, and what follows it in a step."""
    base, subspace, sizes = make_base(architecture)
    recipe = make_recipe(architecture, Options(side, precision="no"), Path(tempfile.gettempdir()), CPU)
    recipe = replace(recipe, lora=Lora(256, dropout=0.0))
    network = build_student(recipe, flux2, subspace, None, lambda: base, CPU).train()
    network.enable_gradient_checkpointing(checkpointed(True))
    model = PixelModel(network, subspace, flux2.predict)
    reference = trainable.lora_reference(network, network, subspace, flux2.predict)
    parameters = trainable.trained_parameters(network)
    official = official_code.training_model(sizes, flux2.lora_targets(base), perceptual)
    theirs = {n: p for n, p in official.diffusion.denoising.named_parameters() if p.requires_grad}
    ours = {trainable.diffusers_name(name): parameter for name, parameter in parameters.items()}
    assert theirs.keys() == ours.keys()
    torch.manual_seed(0)
    for name, parameter in theirs.items():  # no longer as they begin, where LoRA does nothing
        parameter.data += 0.02 * torch.randn_like(parameter)
        ours[name].data.copy_(parameter)
    images, z0 = torch.rand(1, 3, side, side), torch.randn(1, (side // 16) ** 2, 128)
    latents, embeds = to_image(z0, (side // 16, side // 16), 2), bases.random_embeds(architecture, 1, torch.float32)
    batch = Batch(images * 2 - 1, z0, embeds, [0], [""])

    distance = official_code.CheapDistance.map if perceptual else None

    def run_theirs():
        data = {"images": images, "latents": latents, "prompt_embed_kwargs": {"encoder_hidden_states": embeds}}
        return official.train_minibatch(data)[0]

    def run_ours(noise=None):
        noise = noise or pixel_noise(batch, 16, 0)
        terms = training_terms(recipe, model, reference, PixelCodec(), distance, batch, noise, 17.0, CPU)
        terms.loss().backward()
        return terms.rows()[0]

    torch.manual_seed(1)
    logged = torch.stack([value for key, value in run_theirs().items() if key.startswith("loss")])
    torch.manual_seed(1)
    mine = run_ours((torch.randn(1, 1, 1), to_tokens(torch.randn(1, 3, side, side), 16)))[: len(logged)]
    gradients = (torch.cat([own[name].grad.flatten() for name in theirs]) for own in (theirs, ours))
    where = f"{architecture.name}, {side} px{', perceptual term' if perceptual else ''}: "
    in_turns(where + "loss, forward and backward", run_theirs, run_ours, repeats,
             max(relative(logged, mine), relative(*gradients)))  # fmt: skip
    peaks = []
    for run, module in ((run_theirs, official), (run_ours, network)):
        known = [*module.parameters(), *module.buffers(), images, latents, z0, embeds, batch.rgb, *subspace.buffers()]
        with Meter([*known, *(p.grad for p in module.parameters() if p.grad is not None)]) as meter:
            run()
        peaks.append(meter.peak / 1e6)
    row(where + "its tensors at the peak", *peaks, "MB")
    if architecture is NO_BLOCKS:
        return
    ema, hook = PowerEma(parameters.items()), official_code.ema_hook()
    runner = SimpleNamespace(model=official, iter=1000)
    hook.before_run(runner)
    optimizer = make_optimizer(recipe, parameters, flux2.TRAINED_ENDS, flux2.OUTPUT_LAYER)
    adam = torch.optim.AdamW(theirs.values(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step_theirs():
        official.step_optimizer({"diffusion": adam}, None, {"iteration": 1000})

    def step_ours():
        torch.nn.utils.clip_grad_norm_(parameters.values(), 200.0)
        optimizer.step()

    in_turns(where + "clipping and fused AdamW", step_theirs, step_ours, 4 * repeats)
    in_turns(where + "EMA", lambda: hook.after_train_iter(runner), lambda: ema.update(1001), 4 * repeats)
    held = ([*official.parameters(), *official.buffers()],
            [*network.parameters(), *ema.average.values(), *subspace.buffers()])  # fmt: skip
    row(where + "weights with reference and EMA", *map(megabytes, held), "MB")


@torch.no_grad()
def sampling(architecture, side, repeats):
    """Guided solver steps of the two pixel pipelines; the results are the states after six."""
    base, subspace, sizes = make_base(architecture)
    official = official_code.drawing_pipeline(sizes)
    official.set_progress_bar_config(disable=True)
    stock = bases.stock_pipeline(architecture, base, bases.random_vae(TINY, torch.float32, CPU))
    here = pixel_pipeline(architecture, stock, flux2.lift(base, subspace))
    embeds, noise = bases.random_embeds(architecture, 2, torch.float32), torch.randn(1, 3, side, side)
    shared = {
        "prompt_embeds": embeds[:1], "negative_prompt_embeds": embeds[1:], "latents": noise, "height": side,
        "width": side, "num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "latent",
    }  # fmt: skip
    works = {"official": (official, lambda: official(**shared)), "here": (here, lambda: here(**shared, shift=17.0))}
    differ = relative(*(draw().images for _, draw in works.values()))
    traces, _ = draw_both(works, repeats, CPU)
    taken = (1e3 * summary([own for _, own in trace.steps]).median for trace in traces.values())
    row(f"{architecture.name}, {side} px: guided solver step", *taken, differ=differ)


@torch.no_grad()
def align(root, side, images):
    """Colours, tokens and sums of an image: their tool runs on `images` random ones, and ours after each of them."""
    grams, codec, theirs, ours = Grams.zeros(768, 128), PixelCodec(), [], []

    def loader(*arguments, **options):
        for _ in range(images):
            image, z = torch.rand(1, 3, side, side), torch.randn(1, (side // 16) ** 2, 128)
            latents, begun = to_image(z, (side // 16, side // 16), 2), now()[1]
            yield {"images": image, "latents": latents}
            theirs.append(now()[1] - begun)
            begun = now()[1]
            grams.update(z, to_tokens(codec.encode(image * 2 - 1), 16))
            ours.append(now()[1] - begun)

    found, fit = official_code.run_alignment(root, images, loader), procrustes(grams)
    differ = max(relative(found["proj_mat_p16"], fit.basis), relative(found["scale_p16"], fit.scale))
    row(f"alignment, {side} px: an image", *(1e3 * summary(taken).median for taken in (theirs, ours)), differ=differ)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="training,sampling,align")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    official_code.open_checkout(chosen.checkout)
    for architecture, side in ((NO_BLOCKS, 1024), (NO_BLOCKS, 256), (TINY, 128), (SMALL, 256)):
        if "training" in chosen.only:
            for perceptual in (False, True) if architecture is NO_BLOCKS else (False,):
                training(architecture, side, perceptual, chosen.repeats)
        if "sampling" in chosen.only:
            sampling(architecture, side, chosen.repeats)
    for side, images in ((1024, 8), (256, 40)) if "align" in chosen.only else ():
        align(chosen.checkout, side, images)
