"""Time and memory of a piece of work, on a CPU or a GPU."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from asymflow_ft.training.rehearsal import Meter
from asymflow_ft.training.run import synchronise


@dataclass(frozen=True)
class Timing:
    """Seconds of one repetition: median and quartiles. peak_bytes: most that the GPU's allocator had in use, None on
    the CPU. processor: median of the seconds that this process kept processors busy, which other programs lengthen
    little; None where it was not taken."""

    median: float
    low: float
    high: float
    repeats: int
    peak_bytes: int | None = None
    processor: float | None = None


def now() -> tuple[float, float]:
    """The clock on the wall and this process's own, in seconds."""
    return time.perf_counter(), time.process_time()


def summary(seconds: list[float], peak_bytes: int | None = None, processor: list[float] | None = None) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    busy = statistics.median(processor) if processor else None
    return Timing(median, low, high, len(seconds), peak_bytes, busy)


def ratio(one: Timing, other: Timing, device: torch.device) -> float:
    """How much longer `one` takes; on a CPU by the process's own clock."""
    if device.type == "cpu" and one.processor and other.processor:
        return one.processor / other.processor
    return one.median / other.median


def own_seconds(timing: Timing, device: torch.device) -> float:
    """What growth is seen by: on a CPU the process's own clock, where it was read."""
    return timing.processor if device.type == "cpu" and timing.processor else timing.median


def measure(work: Callable[[], object], repeats: int, warmup: int, device: torch.device) -> Timing:
    """Time of one call of `work`, the device waited for before and after."""
    return interleaved({"": work}, repeats, warmup, device)[""]


def interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, warmup: int, device: torch.device, desc: str = "measure"
) -> dict[str, Timing]:
    """Time of each work, taken in turns (ABAB...), so that a machine that gets slower does so for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    processor: dict[str, list[float]] = {name: [] for name in works}
    peaks: dict[str, int] = dict.fromkeys(works, 0)
    for turn in tqdm(range(warmup + repeats), desc=desc, leave=False, mininterval=1):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            synchronise(device)
            wall, own = now()
            work()
            synchronise(device)
            wall_after, own_after = now()
            if turn >= warmup:
                seconds[name].append(wall_after - wall)
                processor[name].append(own_after - own)
                if device.type == "cuda":
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device))
    return {name: summary(taken, peaks[name] or None, processor[name]) for name, taken in seconds.items()}


def peak_memory(work: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> int:
    """Most bytes that `work` takes beside what is there already: on a GPU of the allocator's memory, on a CPU of the
    tensors that this thread makes; `held` are those that are there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with Meter(held) as meter:
        work()
    return meter.peak


class Stopwatch:
    """Cuts the time between `start` and `stop` into parts without gaps: at any moment one part is running.

    On a GPU the marks are events in its stream, so a part is the time that the GPU spent on it or waited for it. What
    the CPU does while the GPU is busy costs nothing.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.running = ""
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self, part: str) -> None:
        self._marks.clear()
        self.switch(part)

    def switch(self, part: str) -> None:
        """From here on it is `part` that runs."""
        mark: float | torch.cuda.Event = time.perf_counter()
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.running = part
        self._marks.append((part, mark))

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Inside it is `part` that runs, afterwards what ran before."""
        before = self.running
        self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def stop(self) -> dict[str, float]:
        """Seconds of each part since `start`."""
        self.switch("")
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            taken = begin.elapsed_time(end) / 1000 if self.cuda else end - begin  # type: ignore
            seconds[part] = seconds.get(part, 0.0) + taken
        return seconds
