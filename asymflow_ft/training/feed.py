"""From prepared data to the micro-batches of one process."""

import os
import signal
from collections.abc import Callable, Generator, Iterable
from contextlib import closing

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from asymflow_ft.data.ahead import ahead
from asymflow_ft.data.buckets import BucketBatches
from asymflow_ft.data.prepare import Batch, PreparedData, collate
from asymflow_ft.recipe import Recipe

Noise = tuple[Tensor, Tensor]  # of a micro-batch, as `objective.draw_noise` gives it
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


def micro_batches(
    loaded: Iterable[Batch | ValueError], draw: Callable[[Batch], Noise]
) -> Generator[tuple[Batch, Noise], None, None]:
    """Micro-batches with their noise, which a thread draws up to two ahead while the device works. Its end, by `close`
    or an error, is that of the data workers.

    Raises:
        ValueError: where the micro-batch would be: an image cannot be read or has changed, or a data worker died.
    """

    def with_noise(item: Batch | ValueError) -> tuple[Batch, Noise]:
        if isinstance(item, ValueError):
            raise item
        return item, draw(item)

    with closing(_with_failure(loaded)) as items:  # an error's traceback would keep the workers, who heed no signal
        yield from ahead(with_noise, items, threads=1)


def _with_failure(loaded: Iterable[Batch | ValueError]) -> Generator[Batch | ValueError, None, None]:
    try:
        yield from loaded
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # of models that encode in this process
            raise
        yield ValueError(f"a data worker failed: {error}. With little shared memory (Docker), use data.workers=0")
