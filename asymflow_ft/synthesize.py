"""A training set drawn by the latent base itself: pictures, the exact latents behind them, and their captions.

Picture i is drawn from prompt i % P, the noise of seed + i and a size that follows from i: the batch it was in and the
process that drew it do not matter. The unit of work is a shard of pictures; its rows (latents/shard-00000.jsonl) are
written last, so an interrupted run draws again only the shards in hand.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from asymflow_ft.align import to_picture
from asymflow_ft.components.memory import free_memory, memory_is_full
from asymflow_ft.data.buckets import bucket_size
from asymflow_ft.data.synthetic import SETTINGS, read_rows, weights_digest
from asymflow_ft.families.terms import OUTPUT_TERMS
from asymflow_ft.hub.cards import card_licence, data_card, hub_commit, licence_terms
from asymflow_ft.hub.provenance import versions
from asymflow_ft.training.checkpoint import write_whole
from asymflow_ft.training.encode import encode_texts, load_text_parts
from asymflow_ft.training.run import PNG_BYTES_PER_PIXEL, claim_folder, process_state

SHARD = 64  # pictures
MOST = 1_000_000  # pictures that the six digits of a file name can tell apart
PROMPTS_AT_ONCE = 512  # embeddings held in memory: 8 to 13 MB each for a large base


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: about `size`**2 pixels in each of `aspects` (width:height) in turn; `max_length` text
    tokens; network in `dtype`, the VAE always in float32."""

    size: int = 1024
    aspects: tuple[str, ...] = ("1:1",)
    steps: int = 50
    guidance: float = 4.0
    seed: int = 0
    max_length: int = 512
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.size, self.steps, self.max_length) < 1:
            raise ValueError(
                f"--size {self.size}, --steps {self.steps} and --max-length {self.max_length} must be positive"
            )
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"--seed {self.seed} must lie between 0 and 2**62")


@dataclass(frozen=True)
class Picture:
    """What one picture is drawn from. size: (width, height) in pixels."""

    index: int
    text: str
    seed: int
    size: tuple[int, int]

    @property
    def file_name(self) -> str:
        return f"images/{self.index // 1000:06d}/{self.index:06d}.png"


def plan(prompts: Sequence[str], sizes: Sequence[tuple[int, int]], seed: int, num: int) -> list[Picture]:
    """The first `num` pictures. Prompt p of round r has size p + r, so in time every prompt meets every size."""
    count = len(prompts)
    return [Picture(i, prompts[i % count], seed + i, sizes[(i % count + i // count) % len(sizes)]) for i in range(num)]


@dataclass(frozen=True)
class _Job:
    """What drawing needs beside the pictures' own data."""

    base: str
    family: ModuleType
    revision: str | None
    sampling: Sampling
    vae: nn.Module
    out: Path
    batch_size: int
    state: PartialState


@torch.no_grad()
def synthesize(
    base: str,
    family: ModuleType,
    prompts: Sequence[str],
    out: Path,
    num: int,
    sampling: Sampling,
    batch_size: int = 4,
    revision: str | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> bool:
    """Draw `num` pictures of a base into `out`, continuing what is there; under `accelerate launch` processes share
    the shards.

    Args:
        say: takes the lines to print; called in the main process alone.

    Returns:
        Whether the set is complete. False in a process that ends while others still draw.

    Raises:
        ValueError: a setting is out of range or differs from those of the pictures in `out`, the base cannot be read,
            or the disk cannot hold the set.
    """
    if not 1 <= num <= MOST or batch_size < 1:
        raise ValueError(f"--num {num} must lie between 1 and {MOST}, and --batch-size {batch_size} must be positive")
    ratios = [_ratio(aspect) for aspect in sampling.aspects]
    state = process_state()
    with state.main_process_first():
        revision = hub_commit(base, revision)
        vae = family.load_parts(base, ("vae",), torch.float32, revision).vae.to(state.device)
        settings = {
            "base": base, "revision": revision, "vae": weights_digest(vae), "prompts": _digest(prompts),
            **asdict(sampling), "shard": SHARD,
        }  # fmt: skip
        claim_folder(out, SETTINGS, settings, "use the same settings to continue them, or choose another --out")
    licence = card_licence(base, revision)
    job = _Job(base, family, revision, sampling, vae, out, batch_size, state)
    patch = family.pixel_patch(vae)
    pictures = plan(prompts, [_size(ratio, sampling.size, patch) for ratio in ratios], sampling.seed, num)
    shards = [pictures[start : start + SHARD] for start in range(0, num, SHARD)]
    todo = [(k, rest) for k, shard in enumerate(shards) if (rest := shard[len(_rows(out, k)) :])]
    state.wait_for_everyone()  # before anyone finishes a shard, which would change the others' lists
    terms = licence_terms(base, licence, OUTPUT_TERMS)
    if state.is_main_process:
        say(terms)
        say(_check_disk(out, [picture for _, rest in todo for picture in rest], patch, family.latent_dim(vae)))

    own = todo[state.process_index :: state.num_processes]
    at_once = PROMPTS_AT_ONCE // SHARD if len(set(prompts)) > PROMPTS_AT_ONCE else max(len(own), 1)
    with tqdm(
        total=sum(len(rest) for _, rest in own), unit="picture", disable=not (own and state.is_main_process),
        desc="pictures" if state.num_processes == 1 else f"pictures (process 1 of {state.num_processes})",
    ) as bar:  # fmt: skip
        for start in range(0, len(own), at_once):
            _draw(job, own[start : start + at_once], bar)

    # no barrier: processes may end further apart than its timeout. The last one finds every row there.
    drawn = [_rows(out, k) for k in range(len(shards))]
    if any(len(rows) < len(shard) for rows, shard in zip(drawn, shards, strict=True)):
        return False
    rows = [row for rows in drawn for row in rows][:num]
    if len(read_rows(out / "metadata.jsonl")) < num:
        writer = str(state.process_index)
        made_with = {"made with": ", ".join(map(" ".join, versions().items()))}
        write_whole(out / "README.md", data_card(len(rows), settings | made_with, licence, terms).encode(), writer)
        write_whole(out / "metadata.jsonl", _lines(rows), writer)
    return True


def _draw(job: _Job, part: Sequence[tuple[int, list[Picture]]], bar: tqdm) -> None:
    """Draw numbered shards: first all their prompts' embeddings, then, with the text encoder gone, the pictures."""
    dtype, device = getattr(torch, job.sampling.dtype), job.state.device
    texts = list(dict.fromkeys(["", *(picture.text for _, rest in part for picture in rest)]))
    parts = load_text_parts(job.family, job.base, job.revision, dtype, device)
    encoded = encode_texts(job.family, parts, texts, job.sampling.max_length)
    hidden = not job.state.is_main_process
    embeds = {
        text: value.cpu()
        for text, value in tqdm(
            zip(texts, encoded, strict=True), "captions", len(texts), disable=hidden, mininterval=1
        )
    }
    del parts, encoded
    free_memory()
    stock = job.family.load_parts(job.base, ("vae", "transformer", "scheduler"), dtype, job.revision).to(device)
    stock.set_progress_bar_config(disable=True)
    for number, rest in part:
        file, rows = job.out / f"latents/shard-{number:05d}.safetensors", _rows(job.out, number)
        latents = load_file(file) if rows else {}
        for batch in _batches(rest, job.batch_size):
            for picture, z in zip(batch, _latents(job, stock, embeds, batch), strict=True):
                content = _png(job, picture, z)
                write_whole(job.out / picture.file_name, content)
                latents[picture.file_name] = z
                rows.append({
                    "file_name": picture.file_name, "text": picture.text, "seed": picture.seed,
                    "latents": file.relative_to(job.out).as_posix(), "sha256": hashlib.sha256(content).hexdigest(),
                })  # fmt: skip
            bar.update(len(batch))
        write_whole(file, save(latents))
        write_whole(file.with_suffix(".jsonl"), _lines(sorted(rows, key=lambda row: row["file_name"])))
    del stock
    free_memory()


def _batches(pictures: Sequence[Picture], batch_size: int) -> Iterator[list[Picture]]:
    by_size: dict[tuple[int, int], list[Picture]] = {}
    for picture in pictures:
        by_size.setdefault(picture.size, []).append(picture)
    for same in by_size.values():
        yield from (same[i : i + batch_size] for i in range(0, len(same), batch_size))


def _latents(job: _Job, stock: DiffusionPipeline, embeds: dict[str, Tensor], batch: list[Picture]) -> Tensor:
    """Latent tokens (B, N, R) in float16, on the CPU, of pictures of one size."""
    device, patch = job.state.device, job.family.pixel_patch(job.vae)
    width, height = batch[0].size
    shape = (job.family.latent_dim(job.vae), height // patch, width // patch)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(picture.seed)) for picture in batch]
    text = [embeds[picture.text] for picture in batch]
    try:
        _, z = job.family.draw_base(
            stock, torch.stack(noise).to(device), pad_sequence(text, batch_first=True).to(device),
            embeds[""].to(device), (height, width), job.sampling.steps, job.sampling.guidance, output_type="latent",
        )  # fmt: skip
        z = z.half().cpu().contiguous()
    except RuntimeError as error:
        if not memory_is_full(error):
            raise
        raise ValueError(
            f"out of memory with {len(batch)} pictures of {width}x{height} at once; run the same command with a "
            "smaller --batch-size, which changes nothing else"
        ) from error
    if not z.isfinite().all():
        raise ValueError(
            f"the base drew NaN or infinity for one of the prompts {[picture.text for picture in batch]} in "
            f"{job.sampling.dtype}; try --dtype float32"
        )
    return z


def _png(job: _Job, picture: Picture, z: Tensor) -> bytes:
    """The file of one picture, decoded from the very latents that are stored, rounded as they are."""
    patch = job.family.pixel_patch(job.vae)
    grid = (picture.size[1] // patch, picture.size[0] // patch)
    content = io.BytesIO()
    to_picture(job.family.decode_latents(job.vae, z[None].float(), grid)[0]).save(content, format="png")
    return content.getvalue()


def _check_disk(out: Path, pictures: Sequence[Picture], patch: int, rank: int) -> str:
    """One line about the work and its space on the disk."""
    if not pictures:
        return f"{out} holds all pictures that were asked for; a larger --num adds to them"
    pixels = sum(picture.size[0] * picture.size[1] for picture in pictures)
    need, free = pixels * (PNG_BYTES_PER_PIXEL + 2 * rank / patch**2), shutil.disk_usage(out).free
    line = (
        f"{len(pictures)} pictures to draw: about {need / 1e6:,.0f} MB in {out}, where {free / 1e6:,.0f} MB are free"
    )
    if need > free:
        raise ValueError(f"{line}; free some space, or choose another --out or a smaller --num")
    return line


def _ratio(aspect: str) -> tuple[float, float]:
    try:
        width, height = (float(side) for side in aspect.split(":"))
        if 0.1 <= width / height <= 10:
            return width, height
    except (ValueError, ZeroDivisionError):
        pass
    raise ValueError(f"--aspect {aspect} is no width:height between 1:10 and 10:1, such as 3:2")


def _size(ratio: tuple[float, float], resolution: int, patch: int) -> tuple[int, int]:
    """(width, height) that training at this resolution will keep, so that it can use the latents as they are."""
    size = bucket_size(*ratio, resolution, patch)
    while (kept := bucket_size(*size, resolution, patch)) != size:  # rounding moves long shapes a few times
        size = kept
    return size


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def _rows(out: Path, number: int) -> list[dict[str, Any]]:
    return read_rows(out / f"latents/shard-{number:05d}.jsonl")


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
