"""Condition images in training: where they are read from, what is computed from them, and that they reach the network.

In the pictures here the target is the condition image in inverted colours.
"""

import dataclasses
import json
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from safetensors.torch import load_file

from asymflow_ft import cli, finetune
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.data.prepare import Entry, collate
from asymflow_ft.data.source import open_sources
from asymflow_ft.families import flux2
from asymflow_ft.families.base import transformer_on_meta
from asymflow_ft.method.asymflow import lift
from asymflow_ft.method.patches import to_image
from asymflow_ft.recipe import Data, load_recipe
from asymflow_ft.training import plan, rehearsal, stages, trainable
from asymflow_ft.training.encode import Encoder
from asymflow_ft.training.feed import loader
from asymflow_ft.training.memory import build_networks
from asymflow_ft.training.objective import pixel_noise, training_terms

pytestmark = pytest.mark.usefixtures("in_repository")
RECIPE = "recipes/tiny/finetune.yaml"
CONDITIONS = [["a0.png"], "a1.png", [], ["a3.png", "a0.png"], None, ["a5.png"], ["a6.png"], ["a7.png", "wide.png"]]
NUMBERS = [1, 1, 0, 2, 0, 1, 1, 2]


@pytest.fixture
def pairs(tmp_path, tiny_data):
    """Eight targets, 0.png to 7.png, with none, one or two condition images each."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    pictures = [Image.open(file).convert("RGB") for file in sorted(Path(tiny_data, "images").iterdir())[:8]]
    for i, picture in enumerate(pictures):
        picture.save(folder / f"a{i}.png")
        ImageOps.invert(picture).save(folder / f"{i}.png")
    pictures[0].resize((192, 96)).save(folder / "wide.png")
    write(folder, [{"file_name": f"{i}.png", "text": f"invert {i}", "before": CONDITIONS[i]} for i in range(8)])
    (folder / "prompts.txt").write_text("red apple")
    return folder


def write(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def overrides(pairs, *more):
    values = {
        "output_dir": pairs.parent / "run", "align.path": pairs.parent / "subspace",
        "data.source": pairs, "data.condition_column": "before", "data.resolution": 64, "data.held_out": 1,
        "cache.folder": pairs.parent / "cache", "sample.prompts": pairs / "prompts.txt", "sample.steps": 1,
        "sample.count": 1, "sample.judge": 0, "sample.every": 0, "train.batch_size": 2, "train.warmup": 1,
        "train.ema_start": 1, "train.clip_after": 1, "train.caption_dropout": 0.0, "train.trackers": "[]",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()] + list(more)


def prepared_of(pairs, *more):
    recipe = load_recipe(RECIPE, overrides(pairs, *more))
    return recipe, stages.prepare(recipe, flux2, open_sources(recipe.data), 16, Accelerator())


def bytes_of(images, row):
    return [images.content(row, image) for image in range(1 + images.conditions(row))]


# Where they are read from


def as_table(folder, single=False, kind="image"):
    """The rows of a metadata file as a table of encoded images, or of paths."""
    wanted = {"bytes": lambda name: {"bytes": (folder / name).read_bytes(), "path": None}, "path": str}
    put = wanted["bytes" if kind == "image" else "path"]
    rows = []
    for i, names in enumerate(CONDITIONS):
        names = [names] if isinstance(names, str) else names
        many = names and [put(name if kind == "image" else folder / name) for name in names]
        own = {"bytes": (folder / f"{i}.png").read_bytes(), "path": None}
        rows.append({"image": own, "text": "x", "before": (many or [None])[0] if single else many})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    images = datasets.Image() if single else datasets.List(datasets.Image())
    return table if kind == "path" else table.cast_column("before", images)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "single", "paths", "saved", "stream"])
def test_sources_of_condition_images(kind, pairs, tmp_path):
    data, single, stream = Data(source=str(pairs), condition_column="before"), kind in ("csv", "single"), None
    if kind == "csv":
        first = ["" if not names else names if isinstance(names, str) else names[0] for names in CONDITIONS]
        lines = [f"{i}.png,x,{name}" for i, name in enumerate(first)]
        (pairs / "metadata.jsonl").unlink()
        (pairs / "metadata.csv").write_text("\n".join(["file_name,text,before", *lines]))
    elif kind != "jsonl":
        data = dataclasses.replace(data, source=str(tmp_path / "table"))
        table = as_table(pairs, single, "path" if kind == "paths" else "image")
        if kind == "saved":
            table.save_to_disk(data.source)
        else:
            Path(data.source).mkdir()
            table.to_parquet(f"{data.source}/x.parquet")
        if kind == "stream":
            data, stream = dataclasses.replace(data, streaming=True, limit=8), tmp_path / "streams"
    images = open_sources(data, stream_folder=stream)
    for row in (7, *range(8)):
        names = [CONDITIONS[row]] if isinstance(CONDITIONS[row], str) else CONDITIONS[row] or []
        files = [pairs / f"{row}.png", *(pairs / name for name in names[: 1 if single else 2])]
        assert bytes_of(images, row) == [file.read_bytes() for file in files]
    assert len({images.stamp(row, image) for row in (0, 3, 7) for image in (0, 1)}) == 6
    assert len({images.name(3, image) for image in range(images.conditions(3) + 1)}) == images.conditions(3) + 1
    alone = open_sources(data, captions=False, stream_folder=stream)
    assert [alone.conditions(row) for row in range(8)] == [0] * 8


def test_columns_that_cannot_be_condition_images(pairs, tmp_path):
    for column, value, message in (
        ("before", [3], r"row 1: 3 is no name of an image file \(recipe key data.condition_column\)"),
        ("before", {"a": 1}, "is no name of an image file"),
        ("after", "a0.png", "has no column 'before'; it has file_name, text, after .*data.condition_column"),
    ):
        write(pairs, [{"file_name": "0.png", "text": "x", column: value}])
        with pytest.raises(ValueError, match=message):
            open_sources(Data(source=str(pairs), condition_column="before"))
    as_table(pairs).to_parquet(tmp_path / "x.parquet")
    for column, message in (("after", "has no column 'after'"), ("text", None), ("label", "holds .*not images")):
        data = Data(source=str(tmp_path / "x.parquet"), condition_column=column)
        if column == "label":
            as_table(pairs).add_column("label", list(range(8))).to_parquet(tmp_path / "x.parquet")
        if message:
            with pytest.raises(ValueError, match=message):
                open_sources(data)
    (pairs / "metadata.jsonl").unlink()
    for i in range(8):
        (pairs / f"{i}.txt").write_text("x")
    with pytest.raises(ValueError, match=r"data.condition_column is 'before', but .* is read as files"):
        open_sources(Data(source=str(pairs), condition_column="before"))


# What is computed from them


def test_batches_hold_equal_numbers_of_equal_sizes(pairs):
    recipe, data = prepared_of(pairs)
    numbers = {f"{pairs}/{i}.png": count for i, count in enumerate(NUMBERS)}
    seen = set()
    batches = iter(loader(recipe, data.train, 0, Accelerator()))
    for batch in (next(batches) for _ in range(30)):
        assert {numbers[name] for name in batch.names} == {len(batch.references)}
        seen.add(tuple(one.shape[-2:] for one in batch.references))
        for rgb, z in zip(batch.references, batch.z_references, strict=True):
            assert len(rgb) == len(z) == len(batch.rgb) and z.shape[1] == rgb.shape[-2] * rgb.shape[-1] // 256
        if batch.references:  # and they belong to their rows: a target is its first condition image inverted
            torch.testing.assert_close(batch.references[0], -batch.rgb, rtol=0, atol=0.02)
    square, wide = (64, 64), (48, 96)
    possible = {(), (square,), (square, square), (square, wide)}
    assert seen <= possible and len(seen) >= 3  # one row may be held out


def test_resolution_of_condition_images(pairs):
    for more, expected in (([], {(64, 64): 64, (128, 128): 128}), (["data.condition_resolution=96"], None)):
        _, data = prepared_of(pairs, "data.more_resolutions=[128]", *more)
        for entry in data.train.entries:
            for one in entry.conditions:
                side = 96 if expected is None else expected[entry.size]
                assert abs(one.size[0] * one.size[1] / side**2 - 1) < 0.2
    with pytest.raises(ValueError, match=r"data.condition_resolution 90 is not a multiple of the patch, 16"):
        prepared_of(pairs, "data.condition_resolution=90")


def test_entries_keep_the_text_form_under_which_older_runs_know_them():
    beside = Entry(3, (64, 64), "other", 1.0, image=1)
    assert str(Entry(3, (64, 48), "digest", 1.0, conditions=(beside,))) == (
        "Entry(row=3, size=(64, 48), digest='digest', weight=1.0)"
    )


def test_latents_are_the_modes_and_shared_with_targets(pairs, monkeypatch):
    """An image that is trained on and also is a condition image is encoded once; a sample of it is another tensor."""
    rows = [{"file_name": f"{i}.png", "text": "x", "before": f"{7 - i}.png"} for i in range(8)]
    write(pairs, rows)
    encoded = []

    def image(self, entry, rgb, original=Encoder.encode_image):
        encoded.append(entry.image)
        return original(self, entry, rgb)

    monkeypatch.setattr(Encoder, "encode_image", image)
    _, data = prepared_of(pairs)
    assert len(encoded) == 9  # eight, and the first once more to see how large it is
    targets = {data.train.first(i).names[0]: data.train.first(i).z0 for i in range(7)}
    firsts = [data.train.first(i) for i in range(7)]
    partner = {f"{pairs}/{i}.png": f"{pairs}/{7 - i}.png" for i in range(8)}
    for batch in firsts:
        if partner[batch.names[0]] in targets:
            assert torch.equal(batch.z_references[0], targets[partner[batch.names[0]]])
    _, sampled = prepared_of(pairs, "data.latents=sample", f"cache.folder={pairs.parent / 'other'}")
    for i, batch in enumerate(firsts):
        other = sampled.train.first(i)
        assert torch.equal(batch.z_references[0], other.z_references[0]) and not torch.equal(batch.z0, other.z0)
    _, live = prepared_of(pairs, "cache.enabled=false")
    torch.testing.assert_close(live.train.first(0).z_references, firsts[0].z_references)


def test_a_row_with_an_unreadable_condition_image_is_left_out(pairs, capsys):
    (pairs / "a5.png").write_bytes(b"no image")
    (pairs / "a6.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 8 images cannot be used, more than data.max_unreadable=0.05"):
        prepared_of(pairs)
    _, data = prepared_of(pairs, "data.max_unreadable=0.3")
    left = {Path(part.images.name(e.row)).name for part in (data.train, data.held_out) for e in part.entries}
    assert left == {f"{i}.png" for i in (0, 1, 2, 3, 4, 7)}
    listing = (pairs.parent / "cache/unreadable.txt").read_text()
    assert "a5.png: not an image" in listing and "a6.png: No such file" in listing


# That they reach the network


def network_of(tiny_base, kind):
    """(model, reference) at step 0 in float64."""
    base = flux2.load_parts(tiny_base, ("transformer",), torch.float32).transformer.double()
    basis = torch.linalg.qr(torch.randn(768, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    subspace = PixelSubspace.from_fit(basis, torch.tensor(1.7)).double()
    subspace.basis.copy_(basis)
    network = flux2.lift(base, subspace)
    if kind == "full":
        return PixelModel(network, subspace, flux2.predict), trainable.frozen_reference(base, subspace, flux2.predict)
    trainable.attach_lora(network, flux2.lora_targets(network), flux2.TRAINED_ENDS, 2, 0.0)
    network = network.double()
    reference = trainable.lora_reference(network, network, subspace, flux2.predict)
    return PixelModel(network, subspace, flux2.predict), reference


@torch.no_grad()
@pytest.mark.parametrize(("kind", "error"), [("full", 1e-11), ("lora", 1e-6)])  # a LoRA run's ends are in float32
def test_at_step_0_model_and_reference_are_one_inside_the_subspace(kind, error, tiny_base):
    """Also under condition images: the control variate then removes the whole loss. The reference sees latents."""
    model, reference = network_of(tiny_base, kind)
    basis, scale = model.subspace.float32()
    g = torch.Generator().manual_seed(1)
    grids = [(4, 3), (2, 4)]
    z0, *z_references = (torch.randn(2, h * w, 128, generator=g, dtype=torch.float64) for h, w in ((4, 4), *grids))
    eps, embeds = (torch.randn(2, *shape, generator=g, dtype=torch.float64) for shape in ((16, 768), (8, 192)))
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64).reshape(2, 1, 1)
    references = tuple(to_image(lift(z, basis, scale), at, 16) for z, at in zip(z_references, grids, strict=True))
    cond = Cond(embeds, references=references, z_references=tuple(z_references))
    expected = model.clean(torch.lerp(lift(z0, basis, scale), eps, sigma), sigma, cond, (4, 4))
    got = reference(z0, eps, sigma, cond, (4, 4))
    torch.testing.assert_close(got, expected, rtol=0, atol=error)
    without = reference(z0, eps, sigma, Cond(embeds), (4, 4))
    elsewhere = dataclasses.replace(cond, references=tuple(torch.randn_like(one) for one in references))
    assert (without - got).abs().max() > 0.01 and torch.equal(reference(z0, eps, sigma, elsewhere, (4, 4)), got)
    with pytest.raises(ValueError):
        reference(z0, eps, sigma, dataclasses.replace(cond, z_references=()), (4, 4))


def test_the_loss_depends_on_which_condition_image_belongs_to_which_target(pairs, tiny_base):
    recipe, data = prepared_of(pairs)
    chosen = [i for i, entry in enumerate(data.train.entries) if len(entry.conditions) == 1][:2]
    batch = collate([data.train[serial, index] for serial, index in enumerate(chosen)])
    model, reference = network_of(tiny_base, "full")
    batch, codec = dataclasses.replace(batch, embeds=batch.embeds.double()), PixelCodec()

    def loss(batch):
        with torch.no_grad():
            noise = pixel_noise(batch, 16, recipe.seed)
            terms = training_terms(recipe, model, reference, codec, None, batch, noise, 3.0, torch.device("cpu"))
        return terms.mse

    own = loss(batch)
    swapped = tuple(one.flip(0) for one in batch.references), tuple(one.flip(0) for one in batch.z_references)
    other = loss(dataclasses.replace(batch, references=swapped[0], z_references=swapped[1]))
    only_reference = loss(dataclasses.replace(batch, z_references=swapped[1]))
    without = loss(dataclasses.replace(batch, references=(), z_references=()))
    for one in (other, only_reference, without):
        assert ((one - own).abs() > 1e-5 * own).all()


def test_a_run_with_pairs_resumes_bitwise_and_notices_another_condition_image(pairs, tiny_data, capsys):
    align = ["--data", tiny_data, "--num-images", "40", "--resolution", "128", "--out", str(pairs.parent / "subspace")]
    assert cli.main(["align", "--recipe", RECIPE, *align]) == 0
    straight, halved = (f"output_dir={pairs.parent / name}" for name in ("straight", "halved"))
    options = ["lora={rank: 4, dropout: 0.1}", "train.checkpoint_every=2"]

    def run(out, steps):
        return finetune.main([RECIPE, *overrides(pairs, *options, out, f"train.steps={steps}")])

    assert run(straight, 4) == 0 and run(halved, 2) == 0 and run(halved, 4) == 0
    outs = [pairs.parent / name for name in ("straight", "halved")]
    logs = [[json.loads(line) for line in (out / "logs/train.jsonl").read_text().splitlines()] for out in outs]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [1, 2, 3, 4]
    one, other = (load_file(out / "checkpoints/step-000004/trained.safetensors") for out in outs)
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    errors = json.loads((outs[0] / "metrics.json").read_text())["held_out_error"]
    assert errors["step 0"] != errors["finetuned"]

    picture, drawn = pairs / "a0.png", pairs.parent / "drawn"
    command = ["sample", "--pipeline", str(outs[0] / "pipeline"), "--prompt", "invert", "--steps", "1"]
    for name, more in (("one", ["--image", str(picture)]), ("two", ["--image", str(pairs / "wide.png")] * 2)):
        assert cli.main([*command, "--out", str(drawn / name), *more]) == 0
    assert [Image.open(drawn / name / "00000.png").size for name in ("one", "two")] == [(128, 128), (192, 96)]
    assert cli.main([*command, "--out", str(drawn), "--image", str(pairs / "metadata.jsonl")]) == 1
    assert "metadata.jsonl: not an image" in capsys.readouterr().err

    Image.new("RGB", (128, 128), "red").save(pairs / "a3.png")
    assert run(halved, 6) == 1
    assert "began with other images to train on" in capsys.readouterr().err


def test_dry_run_counts_condition_images(pairs, tiny_base):
    text = plan.dry_run(load_recipe(RECIPE, overrides(pairs)), tflops=1.0)
    assert "condition images: 8, up to 2 of an image, which the figures above take every image to have" in text
    plain = plan.dry_run(load_recipe(RECIPE, overrides(pairs, "data.condition_column=null")), tflops=1.0)
    assert "condition images" not in plain

    def step(conditions, *more):
        recipe = load_recipe(RECIPE, overrides(pairs, *more))
        parts = transformer_on_meta(flux2, tiny_base), plan.vae_on_meta(tiny_base)
        return rehearsal.rehearse_step(recipe, flux2, *build_networks(recipe, flux2, *parts), conditions)

    alone, one, small = step(0), step(1), step(1, "data.condition_resolution=32")
    # two images' tokens and 32 of text, against one image's, in layers whose work is in proportion to the tokens
    assert 1.2 < one.forward_flops / alone.forward_flops < 1.5
    assert alone.forward_flops < small.forward_flops < one.forward_flops
    assert alone.network < small.network < one.network
