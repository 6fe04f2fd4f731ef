"""Every recipe key with its type, default and meaning; docs/recipes.md is made from this file."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Part:
    """One source of a mix. `weight`: how often an epoch goes over it; 2 is twice, 0.5 half of it."""

    source: str
    weight: float = 1.0
    split: str = "train"
    subset: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    condition_column: str | None = None
    streaming: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Data:
    """Images with captions, from one `source` or from several in `mix`: folders, tar shards, tables, Hub datasets
    (docs/data.md). Images are resized to about `resolution`**2 pixels in multiples of the patch."""

    source: str | None = None
    mix: tuple[Part, ...] = ()  # each entry has a weight, and the keys from source to limit
    split: str = "train"
    subset: str | None = None  # of a Hub dataset that has several
    image_column: str = "image"
    caption_column: str = "text"
    condition_column: str | None = None  # its condition image or list of them, to train editing; null: there are none
    streaming: bool = False  # downloads the first `limit` images of a Hub dataset and no others
    limit: int | None = None  # use the first images only
    resolution: int = 1024
    more_resolutions: tuple[int, ...] = ()  # images train at these too, where they fill them
    condition_resolution: int | None = None  # of condition images; null: that of the image which they belong to
    held_out: int = 16  # images chosen by content and never trained on; the held-out error is measured on them
    latents: Literal["mode", "sample"] = "mode"  # of the VAE's posterior; the paper takes a sample
    max_unreadable: float = 0.05  # share of images that may be unusable before the run stops
    workers: int | None = None  # processes that read images; null: up to 4, as the machine has cores; 0: none

    def resolutions(self) -> tuple[int, ...]:
        """All that images train at, `resolution` first."""
        return tuple(dict.fromkeys((self.resolution, *self.more_resolutions)))

    def parts(self) -> tuple[Part, ...]:
        """The sources, one or several.

        Raises:
            ValueError: there is none, `source` and `mix` are both given, or values that cannot work.
        """
        shared = {f.name: vars(self)[f.name] for f in fields(Part) if f.name not in ("source", "weight")}
        if self.mix:
            if self.source is not None:
                raise ValueError(f"data.source is {self.source!r} and data.mix is given too; remove one (data.mix=[])")
            for key, value in shared.items():
                if value != vars(Data())[key]:
                    raise ValueError(f"data.{key} is {value!r}; with data.mix it belongs into each entry of the mix")
            parts = self.mix
        elif self.source is None:
            raise ValueError("the recipe lacks data.source, the images to train on (or data.mix, several sources)")
        else:
            parts = (Part(self.source, **shared),)
        for part in parts:
            if not 0 < part.weight < math.inf:
                raise ValueError(f"data.mix: the weight of {part.source} is {part.weight}; it must be positive")
            if part.limit is not None and part.limit < 1:
                raise ValueError(f"data.limit of {part.source} is {part.limit}; it must be 1 or more images")
            if part.streaming and part.limit is None:
                raise ValueError(f"data.streaming of {part.source} needs data.limit, the number of images to download")
        return parts


@dataclass(frozen=True)
class Cache:
    """Latents and text embeddings, computed once. `folder` null: output_dir/cache; one folder can serve several runs.
    `enabled` false computes them in every step, with VAE and text encoder kept in memory."""

    enabled: bool = True
    folder: str | None = None
    text: Literal["exact", "fp8"] = "exact"  # fp8 halves the disk that bf16 embeddings take
    latents: Literal["float16", "float32", "fp8"] = "float16"


@dataclass(frozen=True)
class Text:
    """Text embeddings are computed once, before the transformer is loaded. `max_length`: tokens per prompt."""

    max_length: int = 512


@dataclass(frozen=True)
class Align:
    """`path`: the aligned subspace (folder or official file); null with `init_from`, which has one. `mode` "require"
    stops without it, "auto" makes it."""

    path: str | None = None
    mode: Literal["require", "auto"] = "require"
    num_images: int = 1000


@dataclass(frozen=True)
class Pixels:
    """Pixel representation that the model learns: normalised Oklab, or RGB."""

    space: Literal["oklab", "rgb"] = "oklab"
    mean: tuple[float, ...] = (0.56, 0.0, 0.01)
    std: float = 0.16


@dataclass(frozen=True)
class Lora:
    """Adapters on the family's target modules. `ends`: train the end layers in full beside them, which turns a base
    into a pixel model; false makes a style LoRA for the converted model in `init_from`."""

    rank: int = 256
    dropout: float = 0.05
    ends: bool = True


@dataclass(frozen=True)
class Noise:
    """Training noise levels: logit-normal, then a timestep shift. `shift` null: scale x the base's native shift."""

    shift: float | None = None
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Loss:
    """Weights of the two terms. `kappa` null turns the fade off; `perceptual` "none" trains on the first alone, and
    file.py:function (or package.module:function) takes a network of your own in the place of LPIPS.
    `variance_reduction` false is plain flow matching: no reference, no latents, and no perceptual term."""

    variance_reduction: bool = True
    mse: float = 5.0
    perceptual: str = "lpips"  # "lpips", "none", or a function(device) that gives a distance map of two RGB batches
    perceptual_weight: float = 1.0
    kappa: float | None = 0.3
    sigma_floor: float = 0.05


Checkpointing = Literal[True, False, "selective"]


@dataclass(frozen=True)
class Train:
    """The optimizer's run. `batch_size` is per process and micro-batch; the effective batch is batch_size x
    accumulation x processes."""

    steps: int = 15000
    batch_size: int = 1
    accumulation: int = 1
    lr: float = 1e-4  # the blocks: LoRA factors, or all weights
    lr_ends: float | None = None  # the other end layers; null: as lr
    lr_output: float = 1e-3  # the output projection, which starts from a rank-R matrix
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at a hundredth
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    warmup: int = 100
    clip_norm: float = 200.0
    clip_after: int = 100
    caption_dropout: float = 0.0
    precision: Literal["bf16", "no"] = "bf16"
    gradient_checkpointing: Checkpointing = True  # false keeps all activations, selective those that cost most time
    compile: bool = False  # torch.compile of the repeated blocks
    base_weights: Literal["full", "nf4", "int8"] = "full"  # how the frozen linear layers are held; the ends stay whole
    ema_device: Literal["same", "cpu"] = "same"  # cpu: the average costs no GPU memory, but a copy every step
    ema_gamma: float = 7.0  # Karras power-function EMA; mean age of the average is about 11 % of training
    ema_start: int = 100
    max_bad_steps: int = 10  # steps in a row with a gradient that is not finite (they are skipped) that end the run
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int | None = None  # checkpoints at multiples of it stay for ever, beside the newest keep_checkpoints


@dataclass(frozen=True)
class Sample:
    """Validation grids and the saved pipeline's defaults. `prompts`: a text file, one prompt a line. `every`: steps
    between grids (0: only before and after training). `shift` null: as `noise.shift`. `guidance` null: 4, or 1 where
    the network has distilled guidance as an input."""

    prompts: str
    every: int = 500
    count: int = 8
    steps: int = 38
    guidance: float | None = None
    orthogonal: float = 1.0
    clamp: bool = True
    shift: float | None = None
    shift_mode: Literal["sqrt", "exp", "static"] = "sqrt"
    judge: int = 0  # prompts whose pictures are held against their own image; they must be captions of the data


@dataclass(frozen=True)
class Recipe:
    """One conversion, from base to pipeline. `lora` null: train all weights, beside one frozen reference. `init_from`:
    go on from a converted model of this base: an export of any form, or a released adapter (folder, file, Hub id)."""

    base: str
    output_dir: str
    data: Data
    sample: Sample
    align: Align = field(default_factory=Align)
    init_from: str | None = None
    revision: str | None = None
    seed: int = 0
    text: Text = field(default_factory=Text)
    cache: Cache = field(default_factory=Cache)
    pixels: Pixels = field(default_factory=Pixels)
    lora: Lora | None = field(default_factory=Lora)
    noise: Noise = field(default_factory=Noise)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)

    @property
    def is_style(self) -> bool:
        """Whether this trains adapters alone, on top of a converted model."""
        return self.lora is not None and not self.lora.ends

    @property
    def stream_folder(self) -> Path:
        """Where the downloaded images of streams are kept."""
        return self.cache_folder / "streams"

    @property
    def cache_folder(self) -> Path:
        """Where latents, embeddings and what is known of the images are kept."""
        return Path(self.cache.folder or Path(self.output_dir) / "cache")
