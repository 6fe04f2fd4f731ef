"""Images decode on threads while the VAE works: the sums are those of one image after the other."""

import random
import threading
import time

import pytest
import torch

from asymflow_ft.align import EXAMPLES, sum_tokens
from asymflow_ft.components.color import PixelCodec, rgb_tensor
from asymflow_ft.data.ahead import ahead
from asymflow_ft.data.decode import UnreadableImage
from asymflow_ft.data.source import open_source
from asymflow_ft.families import flux2
from asymflow_ft.method.patches import to_tokens

BROKEN = (2, 7)


def test_results_come_in_order_whoever_is_done_first():
    def work(item):
        time.sleep(0.002 * (item % 3 == 0))
        return item**2

    for threads in (0, 1, 2, 5, 40):
        assert list(ahead(work, range(30), threads)) == [i**2 for i in range(30)]
    assert list(ahead(work, [], 2)) == []


def test_threads_stay_near_what_is_taken_and_stop_with_it():
    begun = []
    results = ahead(begun.append, range(100), 2)
    next(results)
    time.sleep(0.05)
    assert begun == sorted(begun) and len(begun) <= 5
    results.close()
    held = len(begun)
    time.sleep(0.05)
    assert len(begun) == held and not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_an_error_is_raised_in_its_place():
    results = ahead(lambda item: 6 / item, [3, 2, 0, 1], 2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


class Slow:
    """A source whose images take all times to decode, and of which some are unreadable."""

    def __init__(self, images):
        self.images, self.random, self.threads = images, random.Random(0), set()

    def image(self, row):
        self.threads.add(threading.get_ident())
        time.sleep(self.random.random() / 100)
        if row in BROKEN:
            raise UnreadableImage(f"row {row}")
        return self.images.image(row)


@pytest.mark.parametrize("seed", [None, 3])
def test_sums_do_not_depend_on_threads(seed, tiny_base, tiny_data):
    vae = flux2.load_parts(tiny_base, ("vae",), torch.float32).vae
    source, codec, rows = open_source(tiny_data, caption_column=None), PixelCodec(), [5, 2, 9, 0, 7, 1, 4, 3, 8]
    found = {}
    for threads in (0, 1, 4):
        slow = Slow(source)
        found[threads] = sum_tokens(flux2, vae, slow, rows, codec, 128, seed, threads)
        assert (threading.get_ident() in slow.threads) == (threads == 0) and len(slow.threads) <= max(threads, 1)
    grams, unreadable, examples = found[0]
    assert unreadable == ["row 2", "row 7"] and len(examples) == EXAMPLES
    for other, errors, shown in (found[1], found[4]):
        assert errors == unreadable
        assert all(torch.equal(a, b) for a, b in zip(other.tensors(), grams.tensors(), strict=True))
        assert all(torch.equal(a, b) for pair, mine in zip(shown, examples, strict=True)
                   for a, b in zip(pair, mine, strict=True))  # fmt: skip
    pixels, latents = [], []
    for row in (row for row in rows if row not in BROKEN):
        rgb = rgb_tensor(source.image(row))[None]
        generator = None if seed is None else torch.Generator().manual_seed(seed + row)
        with torch.no_grad():
            latents.append(flux2.encode_latents(vae, rgb, generator)[0].double())
        pixels.append(to_tokens(codec.encode(rgb), 16)[0].double())
    x, z = torch.cat(pixels), torch.cat(latents)
    for got, expected in zip(grams.tensors()[:3], (x.mT @ x, z.mT @ x, z.mT @ z), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert grams.tokens == len(x) == 64 * 7
