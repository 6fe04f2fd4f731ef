"""The run folder: who may write there, what was logged, and how a run stops."""

import importlib.util
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, parse_flag_from_env
from tqdm import tqdm

from asymflow_ft.hub.provenance import versions
from asymflow_ft.recipe import Recipe, flat, load_recipe, save_recipe
from asymflow_ft.textfiles import read_lines
from asymflow_ft.training.checkpoint import write_json
from asymflow_ft.training.zero import set_up_zero

STOPPED = 75  # exit code after a stop with a checkpoint: EX_TEMPFAIL, "try again later"
PATIENCE = timedelta(hours=6)  # processes wait for a download, a merge or a slow neighbour; the default is 10 minutes
PNG_BYTES_PER_PIXEL = 1.6  # photographs; drawings take less
# A run that continues may change these; anything else would make it another run.
MAY_CHANGE = (
    "train.steps", "train.batch_size", "train.accumulation", "train.checkpoint_every", "train.keep_checkpoints",
    "train.keep_every", "train.trackers", "train.gradient_checkpointing", "train.compile", "train.ema_device",
    "train.max_bad_steps", "sample.every", "data.workers", "data.max_unreadable", "cache.folder", "cache.enabled",
    "align.mode", "output_dir",
)  # fmt: skip


def process_state() -> PartialState:
    """This process among those of `accelerate launch`. Several CPU processes find each other only when told `cpu`;
    Accelerator reads that from the environment, PartialState does not."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


T = TypeVar("T")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns in the main process, for every process; its ValueError is raised in every one."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except ValueError as error:
            result[1] = str(error)
    result, problem = broadcast_object_list(result)
    if problem is not None:
        raise ValueError(problem)
    return result


def begun(out: Path) -> bool:
    """Whether a run has left more than its preparation in `out`, which another recipe would not belong to."""
    return any((out / name).exists() for name in ("samples", "checkpoints"))


def claim(out: Path, recipe: Recipe, images_per_step: int) -> None:
    """Make the run folder, or check that the run in it is this one; nothing there is overwritten.

    Raises:
        ValueError: the folder holds a run of another recipe or with another number of images per step, or cannot be
            written.
    """
    file = out / "recipe.yaml"
    status = read_status(out)
    if status and begun(out) and status["images_per_step"] != images_per_step:
        raise ValueError(
            f"{out} holds a run of {status['images_per_step']} images per step, and this is one of {images_per_step} "
            "(train.batch_size x train.accumulation x processes); change one of them, or choose another output_dir"
        )
    if file.is_file():
        before, now = flat(load_recipe(file)), flat(recipe)
        changed = [key for key in now if now[key] != before.get(key) and key not in MAY_CHANGE]
        if changed and begun(out):
            key = changed[0]
            raise ValueError(
                f"{out} holds a run with {key}={before.get(key)!r}, and the recipe now says {now[key]!r}"
                f"{f' (and {len(changed) - 1} more differ)' if len(changed) > 1 else ''}; choose another output_dir"
            )
    elif out.is_dir() and any(path.name not in ("subspace", "cache", "recipe.yaml.part") for path in out.iterdir()):
        raise ValueError(f"{out} holds other files and no recipe.yaml; choose another output_dir")
    try:
        out.mkdir(parents=True, exist_ok=True)
        part = out / "recipe.yaml.part"
        save_recipe(recipe, part, "resolved recipe; made with " + ", ".join(map(" ".join, versions().items())))
        part.replace(file)
        write_status(out, "running", status["step"] if status else 0, images_per_step)
        (out / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {out}: {error}") from error


def claim_folder(
    out: Path, name: str, settings: Mapping[str, Any], advice: str, may_grow: bool = False
) -> None:  # fmt: skip
    """Make a folder of drawn pictures with their settings in out/`name`, or check that those there are the same.

    Args:
        advice: what to do about others. may_grow: settings that are not there yet are added.

    Raises:
        ValueError: other settings or other files are there, or it cannot be written.
    """
    file = out / name
    now = json.loads(json.dumps(settings))
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if before is not None:
        changed = [key for key in now if now[key] != before.get(key) and (key in before or not may_grow)]
        if changed:
            key = changed[0]
            more = f" (and {', '.join(changed[1:])} differ)" if len(changed) > 1 else ""
            raise ValueError(
                f"{out} holds pictures with {key}={before.get(key)!r}, and now it is {now[key]!r}{more}; {advice}"
            )
        if now.keys() <= before.keys():
            return
    try:
        if before is None and out.is_dir() and any(path.suffix != ".part" for path in out.iterdir()):
            raise ValueError(f"{out} holds other files and no {name}; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, {**(before or {}), **now})
    except OSError as error:
        raise ValueError(f"cannot write to --out {out}: {error}") from error


def check_same(out: Path, now: dict[str, str]) -> None:
    """Refuse to continue a run on other material than it began with: the recipe names files, not what is in them.

    Args:
        now: hashes by name.

    Raises:
        ValueError: names what changed.
    """
    file = out / "logs/material.json"
    before = json.loads(file.read_text()) if file.is_file() and begun(out) else now
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        raise ValueError(
            f"{out} holds a run that began with other {' and '.join(changed)}; restore what it had, or choose another "
            "output_dir"
        )
    write_json(file, now)


def check_setup(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse packages that are not installed, and what a way of spreading the run over processes cannot do.

    Raises:
        ValueError: names the recipe key to change, or the other way.
    """
    train = recipe.train
    if "wandb" in train.trackers and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "train.trackers has wandb, which is not installed; `pip install 'asymflow-ft[track]'`, "
            "or train.trackers=[tensorboard]"
        )
    eight_bit = [key for key, value in (("optimizer", train.optimizer), ("base_weights", train.base_weights))
                 if value in ("adamw8bit", "nf4", "int8")]  # fmt: skip
    if eight_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"train.{eight_bit[0]} needs bitsandbytes, which is not installed (macOS has none); "
            "use train.optimizer=adamw train.base_weights=full"
        )
    layout = accelerator.distributed_type
    if layout == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported; launch with recipes/accelerate/fsdp2.yaml")
    sharded = layout in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if not sharded and layout not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"the launch configuration asks for {layout.value}, which is not supported; use "
            "recipes/accelerate/8_gpus.yaml (DDP), fsdp2.yaml or deepspeed.yaml"
        )
    if layout == DistributedType.DEEPSPEED:
        set_up_zero(accelerator, train)
    if sharded:
        for key, value, good in (
            ("train.base_weights", train.base_weights, "full"),
            ("train.optimizer", train.optimizer, "adamw"),
            ("train.ema_device", train.ema_device, "same"),
        ):
            if value != good:
                raise ValueError(
                    f"{key} is {value}, which a sharded run ({layout.value}) cannot have; set {key}={good}, "
                    "or launch with recipes/accelerate/8_gpus.yaml, where every GPU holds the whole model"
                )


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Open TensorBoard and W&B runs named after the output folder, with the recipe as their configuration."""
    values = flat(recipe)
    config = {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()
    }
    accelerator.init_trackers("asymflow-ft", config, {"wandb": {"name": Path(recipe.output_dir).name}})


def finished_steps(out: Path) -> int:
    file = out / "metrics.json"
    return json.loads(file.read_text())["run"]["steps"] if file.is_file() else 0


def write_status(out: Path, state: str, step: int, images_per_step: int) -> None:
    """output_dir/status.json, for scripts: launchers hide a process's exit code. state: running, stopped (asked to,
    with a checkpoint) or finished; a run that crashed still says running."""
    write_json(out / "status.json", {"state": state, "step": step, "images_per_step": images_per_step})


def read_status(out: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last."""
    file = out / "status.json"
    return json.loads(file.read_text()) if file.is_file() else None


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint."""


class StopSignal:
    """In its context, Ctrl-C and SIGTERM end the step in hand, so that the checkpoint is of a whole step; a second
    Ctrl-C ends the run now."""

    def __enter__(self) -> "StopSignal":
        self.seen = False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.seen and number == signal.SIGINT:  # launchers send SIGTERM twice
            raise KeyboardInterrupt
        self.seen = True
        tqdm.write("stopping after this step; Ctrl-C once more stops at once", file=sys.stderr)

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop."""
        if accelerator.num_processes == 1:
            return self.seen
        return bool(accelerator.reduce(torch.tensor(float(self.seen), device=accelerator.device)).item())

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """The run's figures: a line per step in logs/train.jsonl, and the trackers. Lines that an interrupted run made
    after its last checkpoint are dropped.

    Args:
        step: optimizer step that the run continues from.
    """

    def __init__(self, out: Path, step: int, accelerator: Accelerator):
        self.accelerator, self.file = accelerator, out / "logs/train.jsonl"
        self.figures: dict[str, float | None] = {}
        self.started, self.first, self.bad_in_a_row = time.monotonic(), step, 0
        self.skipped = 0
        if accelerator.is_main_process:
            lines = read_lines(self.file)
            kept = [line for line in lines if line["step"] <= step]
            self.skipped = sum(line["grad_norm"] is None for line in kept)
            part = self.file.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(self.file)

    def step(
        self, step: int, figures: dict[str, float], norm: float, optimizer: torch.optim.Optimizer, names: list[str],
        limit: int,
    ) -> None:  # fmt: skip
        """Take in a finished step; with a gradient that is not finite it was skipped.

        Args:
            names: images of this process's batch. limit: skipped steps in a row that end the run.

        Raises:
            ValueError: too many in a row; names the images.
        """
        rates = {f"lr/{i}": group["lr"] for i, group in enumerate(optimizer.param_groups)}
        values = figures | {"grad_norm": norm} | rates
        self.figures = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if self.accelerator.is_main_process:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **self.figures}) + "\n")
        if math.isfinite(norm):
            self.bad_in_a_row = 0
        else:
            self.skipped += 1
            self.bad_in_a_row += 1
        if self.bad_in_a_row >= limit:
            raise ValueError(
                f"the loss or its gradient was not finite in {limit} steps in a row, the last one step {step}, and "
                f"changed nothing. Lower train.lr in another output_dir, or look at the images of that step: "
                f"{', '.join(gather_object(names))}"
            )
        tracked = {name: value for name, value in self.figures.items() if value is not None}
        device = self.accelerator.device
        speed = (step - self.first) / (time.monotonic() - self.started)
        more = {"steps_per_second": speed, "peak_memory_gb": peak_memory_gb(device), "skipped_steps": self.skipped}
        self.accelerator.log(tracked | more, step=step)

    def postfix(self) -> dict[str, str]:
        """For the progress bar."""
        loss, memory = self.figures["loss"], peak_memory_gb(self.accelerator.device)
        shown = {"loss": "skipped" if loss is None else f"{loss:.3f}", "mem": f"{memory:.1f}GB"}
        return shown | ({"skipped": str(self.skipped)} if self.skipped else {})


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held: on the GPU if it runs there, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_gb` count from now on; where the system cannot, it counts from the program's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def synchronise(device: torch.device) -> None:
    """Wait for what an accelerator has in hand."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
