"""`asymflow-ft cache` and what it leaves for training: nothing stale, nothing half, and no difference in training."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asymflow_ft import cli, finetune, synthesize
from asymflow_ft.data import cache as cache_module
from asymflow_ft.data import rows
from asymflow_ft.data.prepare import PreparedData, make_entries
from asymflow_ft.data.scan import Picture, read_index, scan
from asymflow_ft.data.source import open_source, open_sources
from asymflow_ft.families import flux2
from asymflow_ft.recipe import load_recipe
from asymflow_ft.training import encode as encode_module
from asymflow_ft.training import stages
from asymflow_ft.training.encode import Encoder, encode_texts, load_text_parts
from tests.conftest import REPOSITORY

RECIPE = "recipes/tiny/finetune.yaml"
CAPTIONS = ["red apple", "rocket", "deer", "badger", "rainbow", "crescent moon"]
PROMPTS = ["owl"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(stages, "TEXT_SHARD", 2)
    monkeypatch.setattr(stages, "LATENT_SHARD", 2)
    monkeypatch.setattr(encode_module, "free_memory", lambda: None)  # takes longer than all else on these models


def noise(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def write_table(folder, captions):
    rows = [{"file_name": f"{i}.bmp", "text": text} for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def data(tmp_path):
    """Six pictures of one size; as BMP, files of one size, too."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(len(CAPTIONS)):
        noise(i).save(folder / f"{i}.bmp")
    write_table(folder, CAPTIONS)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def keys(data, out, *overrides):
    values = {
        "output_dir": out, "data.source": data, "data.resolution": 64, "data.held_out": 1, "text.max_length": 32,
        "sample.prompts": data.parent / "prompts.txt",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()] + list(overrides)


def cache(data, out, *overrides, verify=False):
    return cli.main(["cache", "--recipe", RECIPE, *keys(data, out, *overrides), *["--verify"][: int(verify)]])


def recipe_of(data, out, *overrides):
    return load_recipe(RECIPE, keys(data, out, *overrides))


def prepared_of(data, out, *overrides):
    recipe = recipe_of(data, out, *overrides)
    return stages.prepare(recipe, flux2, open_sources(recipe.data), 16, Accelerator())


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for kind in ("text", "latents")
            for path in sorted((out / "cache" / kind).iterdir())}  # fmt: skip


@pytest.fixture
def encoded(monkeypatch):
    """Captions and image rows that the models were asked for since it was last emptied."""
    seen = SimpleNamespace(texts=set(), images=set())

    def captions(self, texts, original=Encoder.encode_captions):
        seen.texts |= set(texts)
        return original(self, texts)

    def image(self, entry, rgb, original=Encoder.encode_image):
        seen.images.add((entry.row, entry.size))
        return original(self, entry, rgb)

    monkeypatch.setattr(Encoder, "encode_captions", captions)
    monkeypatch.setattr(Encoder, "encode_image", image)
    return seen


# Interruptions


def test_interrupted_in_every_shard_it_ends_with_the_same_files(data, tmp_path, monkeypatch, capsys):
    assert cache(data, tmp_path / "whole") == 0
    whole, written = files(tmp_path / "whole"), []

    def write(self, keys, values, original=cache_module.TensorCache.write):
        original(self, keys, values)
        written.append(keys)

    monkeypatch.setattr(cache_module.TensorCache, "write", write)
    for name in ("encode_captions", "encode_image"):

        def encode(*args, original):
            if written:
                raise KeyboardInterrupt
            return original(*args)

        original = getattr(Encoder, name)
        monkeypatch.setattr(Encoder, name, partialmethod(encode, original=original))
    codes = []
    while not codes or codes[-1]:
        written.clear()
        codes.append(cache(data, tmp_path / "halting"))
        assert len(files(tmp_path / "halting")) == len(codes)
    assert codes == [130] * 6 + [0]  # four shards of text, three of latents
    assert "Traceback" not in capsys.readouterr().err
    assert files(tmp_path / "halting") == whole


KILLED = """
import os, signal, sys
from asymflow_ft import cli
from asymflow_ft.data import cache
from asymflow_ft.training import stages

stages.TEXT_SHARD, stages.LATENT_SHARD = 8, 8
original, done = cache.save_file, []

def save_file(tensors, part, metadata):
    original(tensors, part, metadata=metadata)
    done.append(part)
    if part.parent.name == "latents" and len(done) > 5:
        os.truncate(part, part.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

cache.save_file = save_file
cli.main(sys.argv[1:])
"""


def test_killed_while_writing_a_shard_it_ends_with_the_same_files(tmp_path, monkeypatch):
    """SIGKILL with half of the second shard of latents written, on the shipped images."""
    monkeypatch.setattr(stages, "TEXT_SHARD", 8)
    monkeypatch.setattr(stages, "LATENT_SHARD", 8)
    (tmp_path / "prompts.txt").write_text("owl")
    limits = ["data.limit=24", "data.held_out=2", f"sample.prompts={tmp_path / 'prompts.txt'}"]
    start = ["cache", "--recipe", RECIPE, *limits]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *start, f"output_dir={killed}"], cwd=REPOSITORY, capture_output=True,
        timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    left = {path.suffix.rstrip("0123456789"): path for path in (killed / "cache/latents").iterdir()}
    assert left.keys() == {".part", ".safetensors"}
    os.utime(left[".part"], (0, 0))  # old enough not to be another run's
    assert cli.main([*start, f"output_dir={killed}"]) == cli.main([*start, f"output_dir={whole}"]) == 0
    assert files(killed) == files(whole) and len(files(whole)) == 4 + 3


# Nothing stale


def test_what_changes_is_encoded_anew_and_nothing_else(data, tmp_path, tiny_base, encoded):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base, base)
    every = set(CAPTIONS) | {"", *PROMPTS}

    def runs(texts, images, *overrides, size=(64, 64)):
        encoded.texts.clear(), encoded.images.clear()
        assert cache(data, out, f"base={base}", *overrides) == 0
        assert (encoded.texts, encoded.images) == (set(texts), {(row, size) for row in images})

    runs(every, range(6))
    runs([], [])
    runs([], [], "seed=5", "data.held_out=2", "train.caption_dropout=0.5", f"cache.folder={out / 'cache'}")
    before = (data / "2.bmp").stat()
    noise(77).save(data / "2.bmp")
    os.utime(data / "2.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and cp -p do
    assert (data / "2.bmp").stat().st_size == before.st_size
    runs([], [2])
    shutil.copy(data / "2.bmp", data / "0.bmp")  # known content under another name
    runs([], [])
    write_table(data, [*CAPTIONS[:-1], "owl at night"])
    runs(["owl at night"], [])
    (tmp_path / "prompts.txt").write_text("fox")
    runs(["fox"], [])
    every = {*CAPTIONS[:-1], "owl at night", "", "fox"}
    different = range(1, 6)  # 0 is a copy of 2; the key is encoded once, from the last row that has it
    runs(every, [], "text.max_length=24")
    runs(every, [], "cache.text=fp8")
    runs([], different, "data.latents=sample")
    runs([], different, "cache.latents=float32")
    runs([], different, "data.resolution=96", size=(96, 96))
    runs([], [])
    vae = base / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(vae)
    save_file({name: value * 1.01 if "conv_in" in name else value for name, value in weights.items()}, vae)
    runs([], different)
    for name in ("text_encoder/model.safetensors", "tokenizer/chat_template.jinja"):
        os.utime(base / name)
        runs(every, [])
    runs(every, [], "train.precision=bf16")
    runs([], [])


def test_an_image_that_changes_during_the_run_ends_it_with_one_message(data, tmp_path, monkeypatch, capsys):
    def loader(recipe, train, *rest, original=finetune.loader):
        for entry in train.entries:
            noise(90 + entry.row).save(data / f"{entry.row}.bmp")
        first = train[0, 0]
        assert isinstance(first, ValueError) and "changed since the run looked at it" in str(first)
        return original(recipe, train, *rest)

    monkeypatch.setattr(finetune, "loader", loader)
    assert train(data, tmp_path / "run", "data.workers=1") == 1
    error = capsys.readouterr().err
    assert error.count("changed since") == 1 and "Traceback" not in error
    assert re.search(r"error: .*\.bmp changed since the run looked at it; start the command again", error)


def test_an_image_that_changes_under_the_look_is_not_taken_for_the_new_one(data, tmp_path, monkeypatch):
    images = open_source(str(data))

    def content(row, image=0, original=images.content):
        found = original(row, image)
        if row == 3:
            noise(99, (32, 32)).save(data / "3.bmp")
        return found

    monkeypatch.setattr(images, "content", content)
    with pytest.raises(ValueError, match=r"3\.bmp changed while the run looked"):
        stages.prepare(recipe_of(data, tmp_path / "out"), flux2, images, 16, Accelerator())
    images = open_source(str(data))
    scan(images, range(6), tmp_path / "out/cache", show=False)
    assert read_index(tmp_path / "out/cache")[images.stamp(3)].width == 32


# Verification


def test_verify_reports_what_is_wrong_and_nothing_else(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def faults(*overrides):
        capsys.readouterr()
        code, printed = cache(data, out, *overrides, verify=True), capsys.readouterr()
        lines = [
            line for line in printed.err.splitlines() if line.startswith((str(tmp_path), "latents of", "embedding of"))
        ]
        assert (code == 1) == bool(lines)
        told = f"{len(lines)} faults found" if lines else "verified: no fault found"
        assert told in printed.out
        return lines

    assert faults() == []
    for precision in ("cache.text=fp8", "cache.latents=fp8", "train.precision=bf16", "data.latents=sample"):
        assert faults(precision) == []

    shutil.rmtree(out)
    assert faults() == []
    for kind in ("text", "latents"):
        shard = sorted((out / "cache" / kind).iterdir())[1]
        whole = shard.read_bytes()
        broken = bytearray(whole)
        broken[-7] ^= 16
        shard.write_bytes(broken)
        assert f"{shard}: the checksum differs" in faults()
        shard.write_bytes(whole)

        for wrong, told in (
            (lambda t: t.flip(0), "differs from what the models give"),
            (lambda t: t[1:], "the shape"),
        ):
            tensors = {name: wrong(value).contiguous() for name, value in load_file(shard).items()}
            save_file(tensors, shard, metadata={"sha256": cache_module._digest(tensors)})
            found = faults()
            assert len(found) == 2 and all(told in line for line in found)
            assert all(line.startswith("embedding of" if kind == "text" else "latents of") for line in found)
        shard.write_bytes(whole)

    # on a disk that keeps no times, or when it happens later
    monkeypatch.setattr(rows, "file_stamp", lambda path: path)
    assert faults() == []
    held_out = prepared_of(data, out).held_out.entries[0].row
    for row in {held_out, 5}:
        original = (data / f"{row}.bmp").read_bytes()
        noise(50 + row).save(data / f"{row}.bmp")
        assert faults() == [f"{data / f'{row}.bmp'}: the image changed since it was cached"]
        (data / f"{row}.bmp").write_bytes(original)
    assert cache(data, out, "cache.enabled=false", verify=True) == 1
    assert "nothing to cache" in capsys.readouterr().err


# With and without cache


@pytest.fixture(scope="module")
def subspace(tmp_path_factory, tiny_data):
    out = tmp_path_factory.mktemp("align") / "subspace"
    base, recipe = str(REPOSITORY / "recipes/tiny/base"), str(REPOSITORY / "recipes/tiny/finetune.yaml")
    arguments = ["--recipe", recipe, "--base", base, "--data", tiny_data, "--out", str(out)]
    assert cli.main(["align", *arguments, "--num-images", "12", "--resolution", "128"]) == 0
    return out


@pytest.fixture(autouse=True)
def aligned(subspace):
    train.subspace = subspace


def train(data, out, *overrides):
    settings = [
        f"align.path={train.subspace}", "lora={rank: 2, dropout: 0.0}", "train.steps=3", "train.batch_size=2",
        "train.caption_dropout=0.4", "train.warmup=0", "sample.steps=1", "sample.count=1", "sample.judge=0",
        "sample.guidance=1", "sample.every=0", "data.workers=0",
    ]  # fmt: skip
    return finetune.main([RECIPE, *keys(data, out, *settings, *overrides)])


def test_cached_uncached_and_fp8_training_agree(data, tmp_path, capsys):
    table = [{"file_name": f"{i}.bmp", "text": [text, f"a drawn {text}"]} for i, text in enumerate(CAPTIONS)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    losses = {}
    for name, *overrides in (("cached",), ("live", "cache.enabled=false"), ("fp8", "cache.text=fp8")):
        assert train(data, tmp_path / name, *overrides) == 0
        lines = (tmp_path / name / "logs/train.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["cached"]) == 3 and losses["live"] == pytest.approx(losses["cached"], rel=1e-5)
    assert losses["fp8"] == pytest.approx(losses["cached"], rel=0.05) and losses["fp8"] != losses["cached"]
    assert not (tmp_path / "live/cache/text").exists()
    told = float(re.search(r"rounded by ([\d.]+)% \(root mean square\)", capsys.readouterr().out)[1])
    exact, narrow = (prepared_of(data, tmp_path / name, *o).encoded
                     for name, *o in (("cached",), ("fp8", "cache.text=fp8")))  # fmt: skip
    for caption in CAPTIONS:
        error = (narrow.embeds(caption) - exact.embeds(caption)).norm() / exact.embeds(caption).norm()
        assert 0.005 < error < 0.04 and error == pytest.approx(told / 100, rel=0.2)


# Samples


class Told:
    """`Encoded` whose embedding says which caption it is of."""

    def latents(self, entry, rgb):
        return torch.zeros(4, 2)

    def embeds(self, caption):
        return torch.tensor([[len(caption)]])


def test_captions_and_dropout_follow_from_seed_and_serial_number(data):
    table = [{"file_name": f"{i}.bmp", "text": ["x" * n for n in range(1, 4 + i)]} for i in range(6)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    images = open_source(str(data))
    pictures = [Picture(hashlib.sha256(images.content(i)).hexdigest(), 64, 64) for i in range(6)]
    entries, _ = make_entries(images, pictures, [64], 16, 0)

    def drawn(seed, index, serials, dropout=0.25):
        samples = PreparedData(images, entries, Told(), seed, dropout)
        return [int(samples[serial, index].embeds) for serial in serials]

    some = drawn(3, 0, range(2000))
    shares = Counter(some)
    assert shares.keys() == {0, 1, 2, 3} and abs(shares[0] / 2000 - 0.25) < 0.03
    assert all(abs(shares[n] / 2000 - 0.25) < 0.03 for n in (1, 2, 3))
    assert drawn(3, 0, [1500, 7]) == [some[1500], some[7]]  # whatever came before
    assert drawn(4, 0, range(200)) != some[:200]
    assert set(drawn(3, 5, range(300), dropout=0.0)) == set(range(1, 9))


def test_every_size_that_an_image_fills_and_no_held_out_image_in_training():
    class Weights:
        def weight(self, row):
            return 1.0 + row

    shapes = [(64, 64), (200, 200), (130, 260), (10, 10), (400, 400), (200, 200), (0, 0)]
    pictures = [Picture(f"digest {i}", *shape) for i, shape in enumerate(shapes[:-1])]
    pictures[5] = Picture("digest 1", 200, 200)  # a copy under another name
    pictures.append(Picture(error="broken"))
    for held_out in range(5):
        for more in ([128, 64, 192], [64, 128, 192], [128]):
            trained, kept = make_entries(Weights(), pictures, more, 16, held_out)
            back = {f"digest {i}" for i in range(held_out)}
            assert {entry.digest for entry in kept} == back
            assert {entry.digest for entry in trained} == {f"digest {i}" for i in range(5)} - back
            assert all(entry.weight == 1.0 + entry.row for entry in trained)
    trained, kept = make_entries(Weights(), pictures, [128, 64, 192], 16, 1)
    sizes = {row: [entry.size for entry in trained if entry.row == row] for row in range(7)}
    assert sizes == {
        0: [], 1: [(128, 128), (64, 64), (192, 192)], 2: [(96, 176), (48, 96)], 3: [(64, 64)],
        4: [(128, 128), (64, 64), (192, 192)], 5: [(128, 128), (64, 64), (192, 192)], 6: [],
    }  # fmt: skip
    assert [entry.size for entry in kept] == [(64, 64)]
    _, kept = make_entries(Weights(), pictures, [128, 64, 192], 16, 2)
    assert [(entry.row, entry.size) for entry in kept] == [(0, (64, 64)), (1, (128, 128)), (5, (128, 128))]
    with pytest.raises(ValueError, match=r"5 different usable images leave none to train on after data\.held_out=5"):
        make_entries(Weights(), pictures, [128], 16, 5)


def test_several_resolutions_are_cached_and_cost_what_was_said(data, tmp_path, encoded, capsys):
    noise(9, (200, 100)).save(data / "0.bmp")
    assert cache(data, tmp_path / "out", "data.more_resolutions=[128]", "cache.latents=float32") == 0
    sizes = {(row, (64, 64)) for row in range(1, 6)} | {(0, (96, 48)), (0, (176, 96))}
    held_out = {(row, size) for row, size in sizes if row == 0 and size == (176, 96)} - encoded.images
    assert encoded.images == sizes - held_out
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("caching")]
    assert [line.split(":")[0] for line in said] == [f"caching {len(encoded.images)} latents", "caching 8 text"]
    assert cache(data, tmp_path / "no", "data.more_resolutions=[100]") == 1
    assert "data.resolution 100 is not a multiple of the patch, 16" in capsys.readouterr().err
    for side in ("0", "-64"):
        assert cache(data, tmp_path / "no", f"data.more_resolutions=[{side}]") == 1
        assert f"data.more_resolutions is [{side}]; it must be positive" in capsys.readouterr().err


def test_unreadable_images_are_listed_and_too_many_stop_the_run(data, tmp_path, capsys):
    whole = [(data / f"{i}.bmp").read_bytes() for i in (1, 4)]
    (data / "1.bmp").write_bytes(b"no image")
    (data / "4.bmp").unlink()
    out, listing = tmp_path / "out", tmp_path / "out/cache/unreadable.txt"
    with pytest.warns(UserWarning, match="1 of 6 images"):
        assert cache(data, out, "data.max_unreadable=0.3") == 1
        printed = capsys.readouterr()
        assert "2 of 6 images cannot be used, more than data.max_unreadable=0.3 allows; they are" in printed.err
        assert str(listing) in printed.err and not list((out / "cache").glob("*/*"))
        lines = listing.read_text().splitlines()
        assert [line.split(": ")[0] for line in lines] == [str(data / "1.bmp"), str(data / "4.bmp")]
        assert cache(data, out, "data.max_unreadable=0.4") == 0
    assert "3 training samples of 3 images in 1 bucket(s), 1 held out, 2 left out" in capsys.readouterr().out
    assert listing.read_text().splitlines() == lines
    for i, content in zip((1, 4), whole, strict=True):
        (data / f"{i}.bmp").write_bytes(content)
    assert cache(data, out) == 0 and not listing.exists()
    assert "5 training samples of 5 images in 1 bucket(s), 1 held out, 0 left out" in capsys.readouterr().out


def test_an_image_that_can_be_read_again_is_used(data, tmp_path, monkeypatch):
    """Its file is the same: the disk was away, permissions were mended, or PIL learned its format."""
    with monkeypatch.context() as patch:

        def read_file(path, *rest, original=rows.read_file):
            if path.endswith("2.bmp"):
                raise rows.UnreadableImage(f"{path}: Permission denied")
            return original(path, *rest)

        patch.setattr(rows, "read_file", read_file)
        prepared = prepared_of(data, tmp_path / "out", "data.max_unreadable=0.2")
        assert len(prepared.train) + len(prepared.held_out) == 5
    again = prepared_of(data, tmp_path / "out")
    assert len(again.train) + len(again.held_out) == 6
    # another process's older word does not weigh more
    (tmp_path / "out/cache/index-1.jsonl").write_text(
        json.dumps({"stamp": open_source(str(data)).stamp(2), "error": "old"})
    )
    once_more = prepared_of(data, tmp_path / "out")
    assert len(once_more.train) + len(once_more.held_out) == 6


# Models and disk


@torch.no_grad()
def test_the_shortened_text_encoder_gives_the_stock_pipelines_embeddings(tiny_base):
    stock = flux2.load_parts(tiny_base, ("text_encoder", "tokenizer"), torch.float32)
    short = load_text_parts(flux2, tiny_base, None, torch.float32, torch.device("cpu"))
    count = [sum(p.numel() for p in parts.text_encoder.parameters()) for parts in (stock, short)]
    assert count[1] < count[0]
    captions = ["", *CAPTIONS, "a very long caption " * 30]
    expected = stock.encode_prompt(captions, max_sequence_length=32)[0]
    found = torch.stack(list(encode_texts(flux2, short, captions, 32)))
    assert torch.equal(found, expected) and found.std() > 0.01


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(data, tmp_path, monkeypatch, capsys):
    text, latents = 8 * 32 * 96 * 4, 6 * 16 * 128 * 2  # of the tiny base
    embedding = Encoder(recipe_of(data, tmp_path), flux2, torch.device("cpu")).encode_captions([""])[0]
    text = 8 * embedding.nbytes
    for free, code in ((text + latents - 1, 1), (text + latents, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert cache(data, tmp_path / "out") == code
        assert bool(list((tmp_path / "out/cache").glob("*/*"))) == (code == 0)
    error = capsys.readouterr().err
    assert "GB free and the cache needs about" in error and "cache.folder" in error and error.count("error:") == 1


def test_a_cache_folder_that_cannot_be_is_one_message(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cache(data, tmp_path / "out", f"cache.folder={tmp_path / 'file'}") == 1
    assert re.search(r"error: cannot write to the cache folder .*/file: .*; choose another", capsys.readouterr().err)


# Synthetic data


@pytest.mark.parametrize("given", ["", "/metadata.jsonl"])
def test_exact_latents_of_a_drawn_set_are_the_cached_ones(given, tmp_path, tiny_base, monkeypatch):
    sampling = synthesize.Sampling(size=64, aspects=("1:1", "2:1"), steps=1, max_length=32, dtype="float32")
    drawn = tmp_path / "drawn"
    assert synthesize.synthesize(tiny_base, flux2, CAPTIONS[:3], drawn, 3, sampling, 2, say=lambda line: None)
    (tmp_path / "prompts.txt").write_text("owl")
    encodings = []

    def encode(vae, rgb, generator=None, original=flux2.encode_latents):
        encodings.append(rgb.shape)
        return original(vae, rgb, generator)

    monkeypatch.setattr(flux2, "encode_latents", encode)
    out, source = tmp_path / "out", drawn / given.strip("/")
    overrides = [f"sample.prompts={tmp_path / 'prompts.txt'}"]
    data = prepared_of(source, out, *overrides)
    assert not encodings and len(data.train) + len(data.held_out) == 3
    with safe_open(drawn / "latents/shard-00000.safetensors", "pt") as shard:
        stored = {name: shard.get_tensor(name) for name in shard.keys()}
    for part in (data.train, data.held_out):
        for entry in part.entries:
            name = part.images.name(entry.row).removeprefix(f"{drawn}/")
            assert torch.equal(data.encoded.latents(entry, None), stored[name])
    # pictures of another size have no latents of their own, nor have those of other weights
    prepared_of(source, tmp_path / "smaller", *overrides, "data.resolution=32")
    assert len(encodings) == 4
    encodings.clear()
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    vae = base / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(vae).items()}, vae)
    prepared_of(source, tmp_path / "other", *overrides, f"base={base}")
    assert len(encodings) == 4
