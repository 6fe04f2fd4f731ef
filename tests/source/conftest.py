"""The same six captioned images as every kind of data source."""

import io
import pickle
import tarfile

import datasets
import pytest
from PIL import Image

COLORS = [(10 * i, 255 - 10 * i, 7) for i in range(6)]
CAPTIONS = [f"caption {i}" for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


def fill(folder, count=6, text=True):
    """a/0.png, b/1.png, a/2.png, ... as files; sorted they are not in the order of their numbers."""
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(count)]
    for name, color, caption in zip(names, COLORS, CAPTIONS, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(color))
        if text:
            (folder / name).with_suffix(".txt").write_text(f"{caption}\n")
    return names


def table(rows=range(6), text=None, paths=False):
    images = [{"bytes": png(COLORS[i]), "path": f"{i}.png" if paths else None} for i in rows]
    columns = {"image": images, "text": text or [CAPTIONS[i] for i in rows], "label": list(rows)}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def shards(folder):
    """Two shards of three images with .txt captions."""
    folder.mkdir(exist_ok=True)
    for s in (0, 1):
        rows = range(3 * s, 3 * s + 3)
        write_tar(
            folder / f"{s:05d}.tar",
            [m for i in rows for m in ((f"{i}.txt", f"caption {i}\n"), (f"{i}.png", png(COLORS[i])))],
        )
    return folder


def check_rows(source, rows=range(6)):
    """The rows are the numbered images with their captions, read in any order and by another process."""
    rows = list(rows)
    assert len(source) == len(rows)
    source = pickle.loads(pickle.dumps(source))
    for at in (*reversed(range(len(rows))), 0):
        assert source.content(at) == png(COLORS[rows[at]])
        assert source.image(at).getpixel((0, 0)) == COLORS[rows[at]]
        assert source.captions(at) == (CAPTIONS[rows[at]],)
    assert (
        len({source.stamp(at) for at in range(len(rows))})
        == len({source.name(at) for at in range(len(rows))})
        == len(rows)
    )
    with pytest.raises(IndexError):
        source.content(len(rows))
