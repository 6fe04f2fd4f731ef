"""Image sizes that the patch divides, and the order in which images are trained on."""

import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from PIL import Image
from torch.utils.data import Sampler

Size = tuple[int, int]  # (width, height) in pixels
MAX_ASPECT = 3.0  # a longer picture loses its ends rather than train the model on slivers


def bucket_size(width: int, height: int, resolution: int, patch: int) -> Size:
    """(width, height) in multiples of the patch, near resolution**2 pixels, near the image's aspect ratio.

    Aspect ratios move from square in steps of about a sixteenth, so that buckets stay few and well filled, and end at
    3:1.
    """
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
    square = max(round(resolution / patch), 1) * patch
    step = max(resolution // 16 // patch, 1) * patch
    long = square + round((resolution * math.sqrt(max(aspect, 1 / aspect)) - square) / step) * step
    short = min(max(round(resolution**2 / long / patch), 1) * patch, long)
    return (long, short) if aspect >= 1 else (short, long)


def fit_image(image: Image.Image, size: Size) -> Image.Image:
    """The largest part in the centre that has the shape of `size`, resized (Lanczos) to it."""
    factor = max(size[0] / image.width, size[1] / image.height)
    width, height = min(size[0] / factor, image.width), min(size[1] / factor, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    # not resized before it is cropped: a strip of 2 x 4000 pixels would fill gigabytes
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


class BucketBatches(Sampler[list[tuple[int, int]]]):
    """Endless micro-batches of (serial number of the sample, index of its entry), each from one bucket.

    Step n of the run draws its bucket with the bucket's share of all images, and takes the next `per_step` entries of
    that bucket's own shuffled stream: a function of (seed, n) alone. How a step is cut into micro-batches and
    processes changes nothing, and a run continues at any step without saved state.

    Args:
        buckets: what each entry has in common with the others of its bucket, such as the sizes of all its images.
        weights: how often one epoch visits each entry; 0.5 is every second epoch.
        batch_size: entries of a micro-batch. accumulation: micro-batches of a step and process.
        start: step to begin with. rank, world: this process's number, and how many there are.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        accumulation: int = 1,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.batch_size, self.accumulation = batch_size, accumulation
        self.seed, self.start, self.rank, self.world = seed, start, rank, world
        self.per_step = batch_size * accumulation * world
        members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(index)
        self.buckets = [np.array(items) for items in members.values()]
        self.weights = [np.asarray(weights, dtype=float)[items] for items in self.buckets]

    def _stream(self, bucket: int, skip: int) -> Iterator[int]:
        """The bucket's entries in shuffled epochs, without the first `skip`."""
        items, weights = self.buckets[bucket], self.weights[bucket]
        epoch = 0
        while True:
            rng = np.random.default_rng((self.seed, bucket, epoch))
            # weight 2.5: two visits in every epoch and a third in every second one; the offset spreads those visits
            offset = np.random.default_rng((self.seed, bucket)).random(len(items))
            visits = np.floor(weights * (epoch + 1) + offset) - np.floor(weights * epoch + offset)
            order = rng.permutation(np.repeat(items, visits.astype(int)))
            yield from order[skip:].tolist()
            skip = max(skip - len(order), 0)
            epoch += 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shares = np.cumsum([weights.sum() for weights in self.weights])
        draws = np.random.default_rng(self.seed)

        def bucket() -> int:
            return int(np.searchsorted(shares[:-1], draws.random() * shares[-1], side="right"))

        used = [0] * len(self.buckets)
        for _ in range(self.start):
            used[bucket()] += self.per_step
        streams = [self._stream(number, skip) for number, skip in enumerate(used)]
        serial = self.start * self.per_step
        while True:
            stream = streams[bucket()]
            step = [(serial + i, next(stream)) for i in range(self.per_step)]
            serial += self.per_step
            own = step[self.rank * self.batch_size * self.accumulation :]
            for micro in range(self.accumulation):
                yield own[micro * self.batch_size : (micro + 1) * self.batch_size]
