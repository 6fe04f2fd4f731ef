"""From prepared data to the micro-batches of one process."""

import os
import signal
from collections.abc import Iterator

from accelerate import Accelerator
from torch.utils.data import DataLoader

from asymflow_ft.data.buckets import BucketBatches
from asymflow_ft.data.prepare import Batch, PreparedData, collate
from asymflow_ft.recipe import Recipe

WORKERS = 4  # at most, when the recipe leaves the number open


def loader(recipe: Recipe, data: PreparedData, step: int, accelerator: Accelerator) -> DataLoader:
    """Micro-batches from optimizer step `step` on, for this process."""
    order = BucketBatches(
        [entry.bucket for entry in data.entries], [entry.weight for entry in data.entries], recipe.train.batch_size,
        recipe.seed, recipe.train.accumulation, step, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    workers = min(WORKERS, (os.cpu_count() or 1) - 1) if recipe.data.workers is None else recipe.data.workers
    if not recipe.cache.enabled:
        workers = 0  # models do not travel to workers
    return DataLoader(
        data, batch_sampler=order, collate_fn=collate, num_workers=workers, worker_init_fn=leave_signals_to_the_run
    )


def leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and schedulers signal every process of a run; a step in hand still needs its data."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def next_batch(batches: Iterator[Batch | ValueError]) -> Batch:
    """The next micro-batch.

    Raises:
        ValueError: an image cannot be read or has changed, or a data worker died.
    """
    try:
        batch = next(batches)
    except RuntimeError as error:
        raise ValueError(
            f"a data worker failed: {error}. With little shared memory (Docker), use data.workers=0"
        ) from error
    if isinstance(batch, ValueError):
        raise batch
    return batch
