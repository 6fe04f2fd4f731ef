"""Image sizes, and the order of samples: a function of the seed and the step, however a step is cut up."""

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from asymflow_ft.data.buckets import BucketBatches, bucket_size, fit_image

SIZES = [(128, 128)] * 7 + [(96, 160)] * 3
ONCE = [1.0] * len(SIZES)


def take(count, *args, **options):
    return list(itertools.islice(BucketBatches(*args, **options), count))


def test_buckets_keep_area_and_shape():
    assert bucket_size(512, 512, 128, 16) == (128, 128)
    assert all(bucket_size(99, 99, side, 16) == (side, side) for side in range(16, 2064, 16))
    for width, height in itertools.product(range(300, 3000, 170), repeat=2):
        w, h = bucket_size(width, height, 1024, 16)
        assert w % 16 == h % 16 == 0 and bucket_size(height, width, 1024, 16) == (h, w)
        assert abs(w * h / 1024**2 - 1) < 0.05
        shape = min(max(width / height, 1 / 3), 3)
        assert abs(w / h / shape - 1) < 0.1
    assert len({bucket_size(w, 1000, 1024, 16) for w in range(1000, 3001)}) < 20
    assert fit_image(Image.new("RGB", (1600, 900)), (128, 64)).size == (128, 64)


@pytest.mark.parametrize(
    "batch, accumulation, world", [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
)
def test_a_step_is_the_same_however_it_is_cut(batch, accumulation, world):
    whole = take(20, SIZES, ONCE, 4, seed=1)
    ranks = [
        take(20 * accumulation, SIZES, ONCE, batch, seed=1, accumulation=accumulation, rank=r, world=world)
        for r in range(world)
    ]
    for step in range(20):
        parts = [micro for rank in ranks for micro in rank[step * accumulation : (step + 1) * accumulation]]
        assert all(len(micro) == batch for micro in parts)
        assert list(itertools.chain(*parts)) == whole[step]


def test_every_step_is_from_one_bucket_and_any_step_can_be_first():
    whole = take(60, SIZES, ONCE, 2, seed=1)
    assert all(len({SIZES[entry] for _, entry in step}) == 1 for step in whole)
    assert [serial for step in whole for serial, _ in step] == list(range(120))
    for start in (1, 7, 33):
        assert take(60 - start, SIZES, ONCE, 2, seed=1, start=start) == whole[start:]
    assert take(60, SIZES, ONCE, 2, seed=2) != whole


def test_epochs_cover_a_bucket_and_weights_count_visits():
    one_bucket = [(128, 128)] * 9
    seen = [entry for step in take(9, one_bucket, [1.0] * 9, 3, seed=0) for _, entry in step]
    assert [sorted(seen[i : i + 9]) for i in (0, 9, 18)] == [list(range(9))] * 3
    weights = [2.0, 1.0, 0.5, 0.25] * 2
    visits = Counter(entry for step in take(300, one_bucket[:8], weights, 3, seed=0) for _, entry in step)
    per_epoch = 900 / sum(weights)
    for entry, weight in enumerate(weights):
        assert abs(visits[entry] - weight * per_epoch) <= 2


def test_buckets_come_as_often_as_they_hold_images():
    steps = take(4000, SIZES, ONCE, 2, seed=0)
    small = sum(SIZES[step[0][1]] == (96, 160) for step in steps)
    assert abs(small / 4000 - 0.3) < 0.03
    counts = Counter(entry for step in steps for _, entry in step)
    assert max(counts.values()) / min(counts.values()) < 1.25


def test_a_buckets_bucket_settles_at_every_resolution():
    for resolution in range(16, 2064, 16):
        width, height = bucket_size(300, 300, resolution, 16)
        assert width >= height  # not turned round at every pass
        for shape in ((1, 1), (3, 2), (9, 16), (1, 2), (21, 9)):
            size = bucket_size(*shape, resolution, 16)
            for _ in range(10):
                size = bucket_size(*size, resolution, 16)
            assert bucket_size(*size, resolution, 16) == size  # else `synthesize` would look for it for ever


def test_fitting_keeps_the_centre_and_a_strip_costs_no_more_than_its_result(monkeypatch):
    ramp = Image.linear_gradient("L").convert("RGB")  # row n is grey n
    assert np.array_equal(fit_image(ramp, (256, 256)), ramp)
    assert np.array_equal(fit_image(ramp, (256, 101)), np.asarray(ramp)[77:178])
    half = np.asarray(fit_image(ramp, (64, 32)))[:, :, 0].astype(int)
    assert abs(half[:, 0] - (64 + 4 * np.arange(32) + 1.5)).max() <= 1
    resized = []

    def resize(self, size, *rest, original=Image.Image.resize, **options):
        resized.append(size)
        return original(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    for strip in ((2, 4000), (4000, 1), (1, 1)):
        size = bucket_size(*strip, 256, 16)
        assert fit_image(Image.new("RGB", strip, "red"), size).getpixel((3, 3)) == (255, 0, 0)
        assert resized.pop() == size
