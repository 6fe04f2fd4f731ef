"""Noise is drawn on a thread while the device works: the same values, and errors in their place."""

import threading

import pytest
import torch

from asymflow_ft.data.prepare import Batch
from asymflow_ft.training.feed import micro_batches
from asymflow_ft.training.objective import pixel_noise


def batch_of(*serials):
    empty = torch.empty(len(serials), 0, 0)
    return Batch(
        torch.zeros(len(serials), 3, 32, 48), empty, empty, list(serials), [str(serial) for serial in serials]
    )


def test_noise_is_a_function_of_seed_and_serial_number():
    batches = [batch_of(4, 9), batch_of(2), batch_of(9)]
    drawn = list(micro_batches(batches, lambda batch: pixel_noise(batch, 16, seed=3)))
    assert [batch for batch, _ in drawn] == batches
    for batch, (level, eps) in drawn:
        for i, serial in enumerate(batch.serials):
            generator = torch.Generator().manual_seed(3_000_009 + serial)
            assert torch.equal(level[i], torch.randn(1, 1, generator=generator))
            assert torch.equal(eps[i], torch.randn(6, 768, generator=generator))


def test_the_next_noise_is_drawn_before_it_is_asked_for():
    begun = {serial: threading.Event() for serial in range(9)}
    batches = micro_batches(map(batch_of, begun), lambda batch: begun[batch.serials[0]].set())
    next(batches)
    assert begun[1].wait(timeout=10) and not begun[3].is_set()  # nor many more, which take memory
    batches.close()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_errors_come_in_their_place():
    def with_a_worker_that_dies():
        yield batch_of(0)
        yield batch_of(1)
        raise RuntimeError("DataLoader worker exited unexpectedly")

    broken = [batch_of(0), batch_of(1), ValueError("no image"), batch_of(3)]
    for loaded, message in ((broken, "^no image$"), (with_a_worker_that_dies(), "a data worker failed.*workers=0")):
        batches = micro_batches(loaded, lambda batch: None)
        assert [next(batches)[0].serials for _ in range(2)] == [[0], [1]]
        with pytest.raises(ValueError, match=message):
            next(batches)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuDNN error")])
def test_an_error_of_a_model_is_no_dead_worker(error):
    def encoding_in_this_process():
        yield batch_of(0)
        raise error

    with pytest.raises(type(error), match=f"^{error}$"):
        list(micro_batches(encoding_in_this_process(), lambda batch: None))
