"""Sets drawn by the base: what a picture depends on, what survives an interruption, and who can read them."""

import hashlib
import json
import os
import shutil
import sys
import weakref
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from huggingface_hub import DatasetCard, constants
from PIL import Image
from safetensors.torch import load_file

from asymflow_ft import synthesize as module
from asymflow_ft.align import to_picture
from asymflow_ft.cli import main
from asymflow_ft.data.prepare import bucket_size
from asymflow_ft.data.source import open_source
from asymflow_ft.data.synthetic import SETTINGS, stored_latents
from asymflow_ft.families import flux2
from asymflow_ft.families.terms import OUTPUT_TERMS
from asymflow_ft.hub.cards import card_licence, hub_commit, licence_terms
from asymflow_ft.synthesize import Sampling, plan, synthesize
from tests.interruptions import interrupted_after, kill_at_the_first_picture, printed_by_two

PROMPTS = ["red apple", "rocket", "deer", "green apple", "badger"]
SMALL = Sampling(size=64, aspects=("1:1", "2:1"), steps=2, seed=7, max_length=32, dtype="float32")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tree(folder):
    """Every file's content, by its path in the folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def draw(tiny_base, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)

    def run(out, num=5, sampling=SMALL, batch_size=2, prompts=PROMPTS, base=tiny_base):
        return synthesize(base, flux2, prompts, out, num, sampling, batch_size, say=lambda line: None)

    return run


def test_every_prompt_meets_every_size():
    pictures = plan(["a", "b"], [(64, 64), (96, 48)], seed=3, num=8)
    assert [p.text for p in pictures] == ["a", "b"] * 4
    assert [p.seed for p in pictures] == list(range(3, 11))
    assert {(p.text, p.size) for p in pictures} == {(t, s) for t in "ab" for s in ((64, 64), (96, 48))}


@pytest.mark.parametrize("aspect", ["1:1", "3:2", "9:16", "5:1", "1:8"])
def test_training_keeps_the_size(aspect):
    for resolution in (128, 512, 768, 1024):
        size = module._size(module._ratio(aspect), resolution, 16)
        assert bucket_size(*size, resolution, 16) == size


@torch.no_grad()
def test_pictures_are_the_stock_pipelines_and_latents_are_theirs(draw, tmp_path, tiny_base):
    draw(tmp_path)
    stock = Flux2KleinPipeline.from_pretrained(tiny_base, dtype=torch.float32)
    source, find = open_source(str(tmp_path)), stored_latents(tmp_path, stock.vae)
    assert [source.captions(row) for row in range(len(source))] == [(prompt,) for prompt in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        picture, digest = source.image(i), hashlib.sha256(source.content(i)).hexdigest()
        grid = (picture.height // 16, picture.width // 16)
        z = find(digest)
        decoded = to_picture(flux2.decode_latents(stock.vae, z[None].float(), grid)[0])
        assert z.dtype == torch.float16 and np.array_equal(decoded, picture)
        expected = stock(
            prompt=prompt, height=picture.height, width=picture.width, num_inference_steps=2, guidance_scale=4.0,
            latents=torch.randn(1, 128, *grid, generator=torch.Generator().manual_seed(7 + i)), max_sequence_length=32,
        ).images[0]  # fmt: skip
        difference = np.abs(np.array(expected, int) - np.array(picture, int))
        assert difference.max() <= 1 and difference.mean() < 0.01  # float16, and the batch it was drawn in
    assert {source.image(i).size for i in range(5)} == {(64, 64), bucket_size(2, 1, 64, 16)}
    Image.new("RGB", (64, 64)).save(source.name(0))
    assert find(hashlib.sha256(source.content(0)).hexdigest()) is None
    with torch.no_grad():
        stock.vae.bn.running_mean.add_(0.1)
    assert stored_latents(tmp_path, stock.vae)(hashlib.sha256(source.content(1)).hexdigest()) is None


def test_batch_and_place_in_the_set_do_not_matter(draw, tmp_path):
    draw(tmp_path / "set", batch_size=3)
    rows = [json.loads(line) for line in (tmp_path / "set/metadata.jsonl").read_text().splitlines()]
    one = Sampling(size=64, aspects=("2:1",), steps=2, seed=rows[3]["seed"], max_length=32, dtype="float32")
    draw(tmp_path / "one", num=1, sampling=one, prompts=[rows[3]["text"]])
    together = load_file(tmp_path / "set" / rows[3]["latents"])[rows[3]["file_name"]].float()
    alone = load_file(tmp_path / "one/latents/shard-00000.safetensors")["images/000000/000000.png"].float()
    torch.testing.assert_close(together, alone, rtol=2**-10, atol=1e-4)  # one step of float16


def test_the_text_encoder_is_gone_before_the_transformer_comes(draw, tmp_path, monkeypatch):
    load, encoders, loaded = flux2.load_parts, [], []

    def spy(base, parts, *rest):
        if "transformer" in parts:
            assert encoders and not any(encoder() for encoder in encoders)
        pipeline = load(base, parts, *rest)
        loaded.append(parts)
        if "text_encoder" in parts:
            encoders.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    draw(tmp_path / "all at once")
    monkeypatch.setattr(flux2, "load_parts", spy)
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 4)
    draw(tmp_path / "in parts")
    assert sum("transformer" in parts for parts in loaded) == 2
    assert tree(tmp_path / "in parts") == tree(tmp_path / "all at once")


def test_any_interrupted_write_leaves_a_set_that_the_same_command_completes(draw, tmp_path):
    draw(tmp_path / "whole")
    expected = tree(tmp_path / "whole")
    # the 11 writes: 4 pictures, their latents, their rows, 1 picture, its latents and row, README.md, metadata.jsonl
    for survived in (1, 4, 5, 10):
        out = tmp_path / f"after {survived}"
        with interrupted_after(survived):
            draw(out)
        assert not (out / "metadata.jsonl").exists()
        assert draw(out)
        assert tree(out) == expected


def test_killed_before_the_settings_are_in_place(draw, tmp_path):
    (tmp_path / f"{SETTINGS}.part").write_text('{"ba')
    assert draw(tmp_path, num=1)


def test_two_processes_killed_and_continued_draw_what_one_draws(draw, tmp_path, tiny_base):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "two"
    code = (
        "import sys; from asymflow_ft import cli, synthesize; synthesize.SHARD = 4; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [
        sys.executable, "-c", code, "synthesize", "--base", tiny_base, "--prompts", str(tmp_path / "prompts.txt"),
        "--num", "10", "--out", str(out), "--size", "64", "--aspect", "1:1", "--aspect", "2:1", "--steps", "2",
        "--seed", "7", "--max-length", "32", "--batch-size", "2", "--dtype", "float32",
    ]  # fmt: skip

    kill_at_the_first_picture(command, out)
    assert not (out / "metadata.jsonl").exists()
    said = printed_by_two(command)
    assert "pictures to draw" in said[0] and "pictures to draw" not in said[1]
    assert any("10 pictures in" in text for text in said)
    draw(tmp_path / "one", num=10)
    assert tree(out) == tree(tmp_path / "one")


def test_more_pictures_are_added_and_a_finished_set_is_left_alone(draw, tmp_path):
    draw(tmp_path / "at once", batch_size=1)
    out = tmp_path / "grown"
    draw(out, num=3, batch_size=1)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    draw(out, batch_size=1)
    assert tree(out) == tree(tmp_path / "at once")
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert draw(out) and draw(out, num=3)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == stamps
    table = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))["train"]
    assert table["text"] == PROMPTS and table["seed"] == [7, 8, 9, 10, 11]
    assert [picture.size for picture in table["image"]] == [(64, 64), (96, 48)] * 2 + [(64, 64)]


def test_other_settings_are_refused(draw, tmp_path):
    draw(tmp_path, num=1)
    other = Sampling(size=64, aspects=("1:1", "2:1"), steps=3, seed=7, max_length=32, dtype="float32")
    with pytest.raises(ValueError, match=r"holds pictures with steps=2, and now it is 3; use the same"):
        draw(tmp_path, sampling=other)
    with pytest.raises(ValueError, match=r"with prompts='\w+', and now"):
        draw(tmp_path, prompts=PROMPTS[:2])


CARDS = {
    "license: apache-2.0": ["apache-2.0"],
    "license: other\nlicense_name: flux-non-commercial-license\nlicense_link: LICENSE.md": [
        "flux-non-commercial-license (LICENSE.md)", "forbids training commercial models"
    ],
    "tags: [text-to-image]": ["unknown", "Look at the card"],
    "license: [": ["unknown"],
}  # fmt: skip


@pytest.mark.parametrize("front", CARDS)
def test_the_bases_own_card_gives_the_licence(front, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A base\n")
    terms = licence_terms("some/base", card_licence(str(tmp_path)), OUTPUT_TERMS)
    assert all(part in terms for part in CARDS[front])
    assert ("forbids" in terms) == ("non-commercial" in front)


def test_a_hub_base_is_pinned_and_its_licence_linked(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--base/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--base/refs").mkdir()
    (tmp_path / "models--some--base/refs/main").write_text(COMMIT)
    (snapshot / "model_index.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_commit("some/base") == COMMIT
    assert card_licence("some/base", COMMIT) == {}
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: its-own\nlicense_link: LICENSE.md\n---\n")
    assert card_licence("some/base", COMMIT) == {
        "license": "other",
        "license_name": "its-own",
        "license_link": f"https://huggingface.co/some/base/blob/{COMMIT}/LICENSE.md",
    }


def test_the_data_card_repeats_the_licence(draw, tmp_path, tiny_base):
    base = tmp_path / "base"
    base.mkdir()
    for part in os.listdir(tiny_base):
        (base / part).symlink_to(os.path.join(tiny_base, part))
    (base / "README.md").unlink()  # the link; writing through it would change the base's own card
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: flux-non-commercial-license\n---\n")
    said = []
    synthesize(str(base), flux2, PROMPTS, tmp_path / "out", 1, SMALL, say=said.append)
    card = (tmp_path / "out/README.md").read_text()
    assert said[0] in card and "forbids training commercial models" in said[0]
    assert DatasetCard(card).data.to_dict()["license"] == "other"
    assert DatasetCard(card).data.to_dict()["license_name"] == "flux-non-commercial-license"


def test_bad_input_is_named(tmp_path, tiny_base, capsys):
    prompts, blank, file = tmp_path / "prompts.txt", tmp_path / "blank.txt", tmp_path / "file"
    prompts.write_text("red apple\n")
    blank.write_text(" \n\n# a comment\n")
    file.write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").write_text("")
    distilled = tmp_path / "distilled"
    shutil.copytree(tiny_base, distilled, ignore=shutil.ignore_patterns("*.safetensors"))
    index = distilled / "model_index.json"
    index.write_text(index.read_text().replace('"is_distilled": false', '"is_distilled": true'))
    good = {
        "--base": tiny_base, "--prompts": str(prompts), "--num": "1", "--out": str(tmp_path / "out"), "--size": "64",
        "--steps": "1", "--max-length": "32",
    }  # fmt: skip
    for option, value, message in (
        ("--prompts", str(tmp_path / "none.txt"), "no prompt file at"),
        ("--prompts", str(tmp_path), "no prompt file at"),
        ("--prompts", str(blank), "holds no prompts"),
        ("--num", "0", "--num 0 must lie between 1 and 1000000"),
        ("--batch-size", "0", "--batch-size 0 must be positive"),
        ("--steps", "0", "--steps 0 and --max-length 32 must be positive"),
        ("--seed", "-1", "--seed -1 must lie between"),
        ("--aspect", "3x2", "--aspect 3x2 is no width:height"),
        ("--aspect", "1:0", "--aspect 1:0 is no width:height"),
        ("--base", str(distilled), "step-distilled"),
        ("--out", str(file), "cannot write to --out"),
        ("--out", str(file / "below"), "cannot write to --out"),
        ("--out", str(tmp_path / "other"), f"holds other files and no {SETTINGS}"),
    ):
        arguments = [part for pair in (good | {option: value}).items() for part in pair]
        assert main(["synthesize", *arguments]) == 1
        error = capsys.readouterr().err
        assert "error: " in error and message in error
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_is_told_before_drawing(draw, tmp_path, monkeypatch):
    # five pictures of 64x64 to 96x48: 2.6 bytes a pixel, half of it for 16x16 pixels' 128 float16 values
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    with pytest.raises(ValueError, match=r"5 pictures to draw: about 0 MB .*; free some space"):
        draw(tmp_path)
    assert os.listdir(tmp_path) == [SETTINGS]
