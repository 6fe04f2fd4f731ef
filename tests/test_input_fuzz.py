"""Five hundred mutated inputs: each is refused in one clear sentence, or gives samples that can be trained on."""

import csv
import hashlib
import io
import json
import random
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from asymflow_ft.data.prepare import Batch, PreparedData, make_entries
from asymflow_ft.data.scan import read_index, scan, stamp
from asymflow_ft.data.source import open_sources
from asymflow_ft.families import flux2
from asymflow_ft.recipe import Data, Part
from asymflow_ft.training.encode import encode_texts, load_text_parts

MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "I", "F", "YCbCr")
KINDS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")
SIZES = ((1, 1), (1, 2000), (2000, 1), (3, 5), (40, 30), (200, 17), (64, 64))
NAMES = (
    "a",
    "b c",
    "é",
    "日本",
    "x.y",
    "new\nline",
    "tab\t",
    "-n",
    "'q'",
    '"',
    "%s",
    "*",
    "{0}",
    "CON",
    "..x",
    "a" * 200,
)
TEXTS = (
    "", " ", "\n", "a cat", "x " * 20000, "\x00", "\ufeff", "é" * 300, "👩\u200d👧", "<|im_end|>", "\u2028", "{}",
    "NA", "1999", "\\", '"', "a,b", "\r\n", "|<|", "\x1b[31m",
)  # fmt: skip
WRONG = (None, 5, -0.5, True, {}, [], ["a", "b"], ["a", None], [["a"]], {"text": "a"}, "\ud800", float("nan"), 10**40)


class Told:
    def latents(self, entry, rgb):
        return torch.zeros(4, 2)

    def embeds(self, caption):
        return torch.zeros(1, 1)


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(rng):
    """An encoded image, or something that is none."""
    mode, size, kind = rng.choice(MODES), rng.choice(SIZES), rng.choice(KINDS)
    image = Image.new("RGB", size, (rng.randrange(256), 90, 7))
    if mode in ("I;16", "I"):
        image = Image.fromarray(
            np.full(size[::-1], rng.choice((0, 300, 65535)), np.uint16 if mode != "I" else np.int32)
        )
    elif mode == "F":
        image = Image.fromarray(np.full(size[::-1], rng.choice((0.5, 2.0, np.nan)), np.float32))
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    try:
        image.save(file, kind)
    except (OSError, ValueError):  # not every format has every mode
        image.save(file, "TIFF")
    content = bytearray(file.getvalue())
    damage = rng.randrange(12)
    if damage == 0:
        return b""
    if damage == 1:
        return bytes(content[: rng.randrange(len(content))])
    if damage == 2:
        return rng.randbytes(50)
    if damage in (3, 4):
        for _ in range(4):
            content[rng.randrange(min(len(content), 200))] = rng.randrange(256)
    return bytes(content)


def text(rng):
    """Bytes of a caption file."""
    content = rng.choice(TEXTS).encode()
    if rng.random() < 0.08:
        return rng.choice((b"caf\xe9", b"\xff\xfe\x00"))
    return rng.choice((content, content + b"\n", b"\xef\xbb\xbf" + content))


def rows(rng, column="text"):
    """(image bytes, record) of a few images."""
    found = []
    for i in range(rng.randint(1, 4)):
        name = (
            rng.choice(("", "d/", "d/é e/")) + f"{rng.choice(NAMES)}{i}{rng.choice(('.png', '.JPG', '.webp', '.gif'))}"
        )
        caption = rng.choice(WRONG) if rng.random() < 0.05 else rng.choice(TEXTS)
        found.append((picture(rng), {"file_name": name, column: caption}))
    return found


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(content)
    except (OSError, ValueError):  # a name that no file can have
        return
    return path


def damaged(rng, content):
    """Now and then not what was written."""
    if rng.random() < 0.85 or not content:
        return content
    at = rng.randrange(len(content))
    return rng.choice((content[:at], content[:at] + rng.randbytes(3) + content[at + 3 :], b"", content[:at] + b"\n{"))


def folder_of_images(rng, folder):
    for content, record in rows(rng):
        path = put(folder, record["file_name"], content)
        if path and rng.random() < 0.97:
            path.with_suffix(".txt").write_bytes(text(rng))
    if rng.random() < 0.1:
        put(folder, rng.choice(("x.tar", "notes.pdf", ".hidden.png", "x.parquet", "Thumbs.db")), rng.randbytes(20))
    return folder


def folder_of_table(rng, folder):
    records = []
    for content, record in rows(rng):
        if rng.random() < 0.9:
            put(folder, record["file_name"], content)
        if rng.random() < 0.04:
            record[rng.choice(("file_name", "text"))] = rng.choice(
                (*WRONG, "../..", "/dev/null", ".", "\x00", "a/" * 3000)
            )
        if rng.random() < 0.04:
            del record[rng.choice(("file_name", "text"))]
        records.append(record)
    if rng.random() < 0.7:
        lines = "\n".join(json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records)
        content, name = lines.encode("utf-8", "surrogatepass"), "metadata.jsonl"
    else:
        table = io.StringIO()
        writer = csv.DictWriter(table, ["file_name", "text"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
        content, name = (
            table.getvalue().encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")), "surrogatepass"),
            "metadata.csv",
        )
    put(folder, name, damaged(rng, content))
    return rng.choice((folder, folder, folder / name))


def tar(rng, folder):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=rng.choice(("w", "w", "w", "w:gz"))) as archive:
        for content, record in rows(rng):
            stem, _, suffix = record["file_name"].rpartition(".")
            members = [(f"{stem}.{suffix}", content)]
            if rng.random() < 0.5:
                members.append((f"{stem}.txt", text(rng)))
            elif rng.random() < 0.95:
                line = json.dumps(rng.choice(({"text": record["text"]},) * 6 + ({}, [1])))
                members.append((f"{stem}.json", damaged(rng, line.encode())))
            for name, body in members:
                member = tarfile.TarInfo(name)
                member.size = len(body)
                if rng.random() < 0.02:
                    member.type, member.linkname = tarfile.SYMTYPE, "/nowhere"
                archive.addfile(member, io.BytesIO(body))
    return put(folder, "x.tar", damaged(rng, file.getvalue()))


def parquet(rng, folder):
    found = rows(rng)
    captions = [
        record["text"] if isinstance(record["text"], str | None) else str(record["text"]) for _, record in found
    ]
    captions = [None if text is None else text.encode("utf-8", "replace").decode() for text in captions]
    images = [rng.choice((content, content, content, None)) for content, _ in found]
    table = datasets.Dataset.from_dict({
        rng.choice(("image", "image", "image", "jpg")): rng.choice((images, images, images, list(range(len(images))))),
        rng.choice(("text", "text", "text", "alt")): rng.choice((captions, captions, [captions] * len(captions))),
    })  # fmt: skip
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return put(folder, "x.parquet", damaged(rng, buffer.getvalue()))


def check(rng, make, folder, captions):
    """Whether the input gave samples; a ValueError must say what is wrong."""
    folder.mkdir()
    source = str(make(rng, folder))
    part = {"source": source, "limit": rng.choice((None, None, None, 1))}
    data = Data(**part) if rng.random() < 0.8 else Data(mix=(Part(**part, weight=0.5), Part(**part)))
    try:
        images = open_sources(data)
        cache = folder.parent / f"{folder.name}.cache"
        scan(images, range(len(images)), cache, show=False)
        index = read_index(cache)
        pictures = [index[stamp(images, row)] for row in range(len(images))]
        errors = [picture.error for picture in pictures if picture.error]
        assert all(len(error) > 10 for error in errors)
        entries, _ = make_entries(images, pictures, [32, 48], 16, 0)
    except ValueError as error:
        assert 25 < len(str(error)) and type(error) is ValueError, repr(error)
        assert any(word in str(error) for word in (source, str(folder), "usable images", "file name")), error
        return False
    assert {entry.row for entry in entries} == {row for row, found in enumerate(pictures) if not found.error}
    samples = PreparedData(images, entries, Told(), seed=0)
    for number, entry in enumerate(entries):
        batch = samples[number, number]
        assert isinstance(batch, Batch), batch
        assert batch.rgb.shape == (1, 3, entry.size[1], entry.size[0]) and not any(side % 16 for side in entry.size)
        assert batch.rgb.min() >= -1 and batch.rgb.max() <= 1
        assert hashlib.sha256(images.content(entry.row)).hexdigest() == entry.digest
        captions.update(images.captions(entry.row))
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_inputs(tmp_path, tiny_base):
    rng = random.Random(0)
    kinds = {folder_of_images: 200, folder_of_table: 160, tar: 90, parquet: 50}
    captions: set[str] = set()
    for make, count in kinds.items():
        usable = sum(check(rng, make, tmp_path / f"{make.__name__}-{i}", captions) for i in range(count))
        assert count / 5 < usable < count * 0.95, (make, usable)
    parts = load_text_parts(flux2, tiny_base, None, torch.float32, torch.device("cpu"))
    assert len(captions) > 20 and all(isinstance(caption, str) for caption in captions)
    for embedding in encode_texts(flux2, parts, sorted(captions), 32):
        assert torch.isfinite(embedding).all()
