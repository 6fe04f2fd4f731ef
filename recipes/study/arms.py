"""The arms of the study: what each changes of conversion.yaml."""

from dataclasses import dataclass

STEPS = 400  # of an arm with a reference: 4 forward-equivalents a step
PLAIN_STEPS = STEPS * 4 // 3  # of one without: 3
OUT = "outputs/study"

_PLAIN = ("loss.perceptual=none", "loss.variance_reduction=false", f"train.steps={PLAIN_STEPS}")
_RGB = ("pixels.space=rgb", "pixels.mean=[0.72, 0.608, 0.485]", "pixels.std=0.585")


def _subspace(name: str) -> str:
    return f"align.path={OUT}/subspaces/{name}"


@dataclass(frozen=True)
class Arm:
    """One way to train. `factor`: what it changes of arm (e); None for the five of the ladder. seeds: how many."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    factor: str | None = None
    seeds: int = 2
    latent: bool = False


ARMS = (
    Arm("a_latent", "(a) latent finetune", (f"train.steps={PLAIN_STEPS}",), seeds=3, latent=True),
    Arm("b_scratch", "(b) pixels from scratch, plain",
        (*_PLAIN, f"init_from={OUT}/scratch", "align.path=null"), seeds=3),
    Arm("c_plain", "(c) lifted, plain flow matching", _PLAIN, seeds=3),
    Arm("d_reduced", "(d) + variance reduction", ("loss.perceptual=none",), seeds=3),
    Arm("e_perceptual", "(e) + perceptual term", (), seeds=3),
    Arm("step_0", "lifted, not trained",
        ("train.steps=1", "train.lr=1e-12", "train.lr_output=1e-12"), "none", seeds=1),
    Arm("basis_pca", "PCA basis", (_subspace("pca"),), "basis"),
    Arm("basis_pca_turned", "PCA subspace turned to the latents", (_subspace("pca_turned"),), "basis"),
    Arm("basis_random", "random basis", (_subspace("random"),), "basis"),
    Arm("scale_off", "s = 1, native shift", (_subspace("unscaled"),), "scale"),
    Arm("rgb", "RGB", (_subspace("rgb"), *_RGB), "pixels"),
    Arm("kappa_null", "kappa null (no fade, no perceptual term)", ("loss.kappa=null",), "kappa"),
    Arm("kappa_0.1", "kappa 0.1", ("loss.kappa=0.1",), "kappa"),
    Arm("kappa_1", "kappa 1", ("loss.kappa=1",), "kappa"),
    Arm("weight_0.3", "perceptual weight 0.3", ("loss.perceptual_weight=0.3",), "perceptual weight"),
    Arm("weight_3", "perceptual weight 3", ("loss.perceptual_weight=3",), "perceptual weight"),
    Arm("shift_half", "trained at half the shift", ("noise.shift=3.64",), "training shift"),
    Arm("shift_double", "trained at twice the shift", ("noise.shift=14.57",), "training shift"),
    Arm("lora_16", "LoRA rank 16, lr 1e-3", ("lora={rank: 16}", "train.lr=1e-3"), "LoRA rank"),
    Arm("lora_64", "LoRA rank 64, lr 1e-3", ("lora={rank: 64}", "train.lr=1e-3"), "LoRA rank"),
    Arm("synthetic", "trained on pictures that the base drew",
        (f"data.source={OUT}/data/drawn", "data.held_out=0"), "data"),
)  # fmt: skip
LADDER = tuple(arm for arm in ARMS if arm.factor is None)
