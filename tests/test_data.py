"""Data sources, buckets, and the order of batches."""

import itertools
import json

import pytest
from PIL import Image

from asymflow_ft.data.prepare import BucketBatches, bucket_size, fit_image
from asymflow_ft.data.source import UnreadableImage, open_source


@pytest.fixture
def folder(tmp_path):
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20 + i, 30), color).save(tmp_path / f"{i}.png")
    return tmp_path


def test_text_beside_images(folder):
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"caption {i}\n")
    source = open_source(str(folder))
    assert len(source) == 3 and source.caption(1) == "caption 1"
    assert source.image(1)[0].getpixel((0, 0)) == (0, 128, 0)
    (folder / "2.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images .* have no \.txt caption, such as 2\.png"):
        open_source(str(folder))


def test_metadata_and_missing_columns(folder):
    rows = [{"file_name": f"{i}.png", "title": f"picture {i}"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_source(str(folder), caption_column="title").caption(2) == "picture 2"
    with pytest.raises(ValueError, match=r"no column 'text'; it has title, image \(recipe key data.caption_column\)"):
        open_source(str(folder))
    assert len(open_source(str(folder), caption_column=None)) == 3


def test_broken_images_are_told_apart(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    source = open_source(str(folder), caption_column=None)
    assert source.image(0)[0].size == (20, 30)
    with pytest.raises(UnreadableImage, match=r"1\.png"):
        source.image(1)


def test_wrong_paths(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no folder \./nothing"):
        open_source("./nothing")


def test_buckets_keep_area_and_shape():
    assert bucket_size(512, 512, 128, 16) == (128, 128)
    width, height = bucket_size(1600, 900, 1024, 16)
    assert width % 16 == height % 16 == 0 and abs(width / height / (16 / 9) - 1) < 0.05
    assert abs(width * height / 1024**2 - 1) < 0.05
    assert fit_image(Image.new("RGB", (1600, 900)), (128, 64)).size == (128, 64)


def test_batches_resume_split_and_cover():
    sizes = [(128, 128)] * 7 + [(96, 160)] * 3
    whole = list(itertools.islice(BucketBatches(sizes, 2, seed=1), 20))
    assert all(len({sizes[i] for i in batch}) == 1 for batch in whole)
    per_epoch = BucketBatches(sizes, 2, seed=1).per_epoch
    assert {i for batch in whole[:per_epoch] for i in batch} == set(range(10))
    assert list(itertools.islice(BucketBatches(sizes, 2, seed=1, start=5), 15)) == whole[5:]
    ranks = [list(itertools.islice(BucketBatches(sizes, 2, seed=1, rank=r, world=2), 10)) for r in (0, 1)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == whole
    assert list(itertools.islice(BucketBatches(sizes, 2, seed=2), 20)) != whole
