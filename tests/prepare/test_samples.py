"""The samples that training gets: captions, sizes, held-out and unreadable images, embeddings and latents."""

import hashlib
import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asymflow_ft import synthesize
from asymflow_ft.data import rows
from asymflow_ft.data.prepare import PreparedData, make_entries
from asymflow_ft.data.scan import Picture
from asymflow_ft.data.source import open_source
from asymflow_ft.families import flux2
from asymflow_ft.training import plan
from asymflow_ft.training.encode import encode_texts, load_text_parts
from tests.prepare.conftest import (
    CAPTIONS,
    cache,
    noise,
    prepared_of,
    recipe_of,
    write_table,
)


class Told:
    """`Encoded` whose embedding says which caption it is of."""

    def latents(self, entry, rgb):
        return torch.zeros(4, 2)

    def embeds(self, caption):
        return torch.tensor([[len(caption)]])


def test_captions_and_dropout_follow_from_seed_and_serial_number(data):
    write_table(data, [["x" * n for n in range(1, 4 + i)] for i in range(6)])
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


def test_the_plan_counts_the_latents_that_are_cached(data, tmp_path):
    for i in range(6):
        noise(i, (128, 128)).save(data / f"{i}.bmp")
    keys = "data.more_resolutions=[128,64]", "data.held_out=2"
    assert cache(data, tmp_path / "out", *keys) == 0
    cached = [tensor for file in (tmp_path / "out/cache/latents").iterdir() for tensor in load_file(file).values()]
    planned = plan.latent_tokens(recipe_of(data, tmp_path, *keys).data, 6, 0, 16)
    assert sum(len(tensor) for tensor in cached) == planned == 4 * (16 + 64) + 2 * 16


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
