"""Not a test: a small LoRA run for test_distributed.py, alone or under `accelerate launch`. Arguments: a checkpoint of
a single-process run to continue from, and the file for the results."""

import copy
import sys

import torch
from accelerate import Accelerator
from diffusers import Flux2Transformer2DModel

from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.method import asymflow
from asymflow_ft.method import loss as losses
from asymflow_ft.training import trainable
from asymflow_ft.training.checkpoint import restore
from asymflow_ft.training.distributed import gather, gather_optimizer, load_optimizer, whole
from asymflow_ft.training.ema import PowerEma
from tests.on_cpu import spread_as_on_gpus

STEPS, SAVED, BATCH = 5, 3, 4
GRID = (2, 2)


def run(accelerator: Accelerator, checkpoint: dict | None = None, dtype: torch.dtype = torch.float32) -> dict:
    """Losses, gradient norms, and the whole state after step SAVED and at the end; continues from `checkpoint`.

    dtype: of the frozen base; the trained weights are float32.
    """
    torch.manual_seed(0)
    base = Flux2Transformer2DModel(
        in_channels=12, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=32, guidance_embeds=False,
    ).to(dtype)  # fmt: skip
    subspace = PixelSubspace.from_fit(torch.linalg.qr(torch.randn(48, 12)).Q, torch.tensor(2.0))
    network = flux2.lift(base, subspace)
    trainable.attach_lora(network, flux2.lora_targets(network), flux2.TRAINED_ENDS, rank=4, dropout=0.0)
    network.train()
    network.enable_gradient_checkpointing()
    parameters = list(trainable.trained_parameters(network).values())
    groups = [{"params": parameters[:-1], "lr": 2e-3, "peak": 1}, {"params": parameters[-1:], "lr": 4e-3, "peak": 2}]
    prepared, optimizer = accelerator.prepare(network, torch.optim.AdamW(groups))
    trained = trainable.trained_parameters(network)
    ema = PowerEma(trained.items(), start=1)
    reference = trainable.lora_reference(prepared, network, subspace, flux2.predict)
    model = PixelModel(prepared, subspace, flux2.predict)
    if checkpoint is not None:
        restore(trained, checkpoint["trained"], "checkpoint")
        restore(ema.average, checkpoint["ema"], "checkpoint")
        load_optimizer(optimizer, checkpoint["optimizer"])

    def state() -> dict:
        tensors = gather(trained, keep=True), gather(ema.average, keep=True), gather_optimizer(optimizer, keep=True)
        return copy.deepcopy(dict(zip(("trained", "ema", "optimizer"), tensors, strict=True)))

    results: dict = {"losses": [], "norms": [], "kind": type(prepared).__name__}
    share = BATCH // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    for step in range(0 if checkpoint is None else SAVED, STEPS):
        torch.manual_seed(100 + step)
        x0, eps, z0 = torch.randn(BATCH, 4, 48), torch.randn(BATCH, 4, 48), torch.randn(BATCH, 4, 12)
        sigma, embeds = torch.rand(BATCH, 1, 1) * 0.8 + 0.1, torch.randn(BATCH, 3, 24).to(dtype)
        x0, eps, z0, sigma, cond = x0[mine], eps[mine], z0[mine], sigma[mine], Cond(embeds[mine])
        x_low_hat = reference(z0, eps, sigma, cond, GRID)
        x0_hat = model.clean(torch.lerp(x0, eps, sigma), sigma, cond, GRID)
        x_low = asymflow.lift(z0, *subspace.float32())
        target = losses.variance_reduced_target(x0, x0_hat, x_low, x_low_hat, sigma, 0.3)
        loss = losses.velocity_mse(x0_hat, target.image, sigma, 0.05).mean()
        accelerator.backward(loss)
        norm = float(whole(accelerator.clip_grad_norm_(trained.values(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step + 1)
        results["losses"].append(accelerator.reduce(loss.detach(), "mean").item())
        results["norms"].append(norm)
        if step + 1 == SAVED:
            results["saved"] = state()
    with ema.applied(), torch.no_grad():  # drawing, in which every process takes part
        network.eval()
        cond = Cond(torch.ones(1, 3, 24).to(dtype))
        drawn = flux2.predict(prepared, torch.ones(1, 4, 48), torch.tensor([0.5]), cond, GRID)
    return {**results, **state(), "drawn": drawn}


def main() -> None:
    accelerator = Accelerator(cpu=not spread_as_on_gpus(), mixed_precision="no")
    checkpoint, out = sys.argv[1:]
    whole_run = run(accelerator)
    results = {
        "run": whole_run, "own": run(accelerator, whole_run["saved"]),
        "other": run(accelerator, torch.load(checkpoint, weights_only=True)),
        "bf16": run(accelerator, dtype=torch.bfloat16),  # a bf16 base under float32 trained weights
    }  # fmt: skip
    if accelerator.is_main_process:
        torch.save(results, out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
