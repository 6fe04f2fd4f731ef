"""The forms of a converted model: each becomes each and back without a changed tensor."""

import json
import re
import shutil
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asymflow_ft import cli
from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.export import load_pixel_pipeline, open_source
from asymflow_ft.families import flux2
from asymflow_ft.hub.forms import open_converted
from asymflow_ft.hub.official import apply_adapter, load_adapter, subspace_buffers
from asymflow_ft.hub.provenance import read_provenance
from asymflow_ft.hub.write import export
from tests.converted import as_converted, basis, converted_lora

WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMS = ("pipeline", "merged", "adapter")


def tensors(folder, form):
    """Every tensor of a form by file and name, except the text encoder's, which is the base's own."""
    names = {"adapter": [WEIGHTS], "merged": [f"{part}/{WEIGHTS}" for part in ("transformer", "adapter")]}
    names = [*names.get(form, names["merged"]), f"subspace/{WEIGHTS}"]
    return {f"{name}:{key}": t for name in names for key, t in load_file(folder / name).items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def written(request, tiny_base, tmp_path_factory):
    """The same conversion in every form, each written from the run's result."""
    folder = tmp_path_factory.mktemp("forms")
    model = converted_lora(tiny_base, dtype=request.param)
    for form in FORMS:
        export(model, folder / form, form)
    return folder


@pytest.mark.parametrize("start", FORMS)
@pytest.mark.parametrize("end", FORMS)
def test_every_form_becomes_every_form(start, end, written, tmp_path):
    export(open_converted(written / start), tmp_path / end, end)
    same(tensors(tmp_path / end, end), tensors(written / end, end))
    export(open_converted(tmp_path / end), tmp_path / "back", start)
    same(tensors(tmp_path / "back", start), tensors(written / start, start))
    stated, origin = read_provenance(tmp_path / "back"), read_provenance(written / start)
    assert stated == origin


def test_merged_is_base_plus_adapter(written, tiny_base):
    dtype = getattr(torch, read_provenance(written / "merged")["dtype"])
    state, _, _ = load_adapter(written / "merged/adapter")
    stored = load_file(written / f"merged/transformer/{WEIGHTS}")
    base = flux2.load_parts(tiny_base, ("transformer",), dtype).transformer
    same(stored, apply_adapter(flux2, base, state).state_dict())
    changed = [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, stored[name])]
    assert len(changed) == len(flux2.lora_targets(base)) + len(flux2.TRAINED_ENDS)


def test_adapter_is_in_the_released_format(written, tiny_base):
    state = load_file(written / f"adapter/{WEIGHTS}")
    wide = read_provenance(written / "adapter")["dtype"] == "float32"
    for name, tensor in state.items():
        small = torch.bfloat16 if name in ("proj_buffer", "scale_buffer") else torch.float16
        assert tensor.dtype == (torch.float32 if wide else small), name
    config = json.loads((written / "adapter/config.json").read_text())
    assert config["_class_name"] == "AsymFlux2Transformer2DModel" and config["base_rank"] == 128
    with safe_open(written / f"adapter/{WEIGHTS}", "pt") as file:
        stated = file.metadata()
    assert stated["format"] == "pt" and stated["base_model"] == tiny_base and stated["lora_rank"] == "3"
    assert stated["sigma_min"] == "0.0001" and stated["num_timesteps"] == "1"


def test_the_exact_basis_survives_the_rounded_buffer(written):
    """The format's buffer is bfloat16; `subspace/` beside it is not, and neither is lost on a second save."""
    exact = basis().basis
    opened = open_converted(written / "adapter")
    assert torch.equal(opened.subspace.basis, exact)
    opened.subspace.save_pretrained(written / "again")
    assert torch.equal(PixelSubspace.from_pretrained(written / "again").basis, exact)
    assert not torch.equal(subspace_buffers(opened.subspace)["proj_buffer"].float(), exact)


def test_dtype_is_converted_once_and_said(written, tmp_path):
    export(open_converted(written / "merged"), tmp_path / "half", "merged", torch.bfloat16)
    stored = load_file(tmp_path / f"half/transformer/{WEIGHTS}")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert read_provenance(tmp_path / "half")["dtype"] == "bfloat16"
    adapter = load_file(tmp_path / f"half/adapter/{WEIGHTS}")
    assert adapter["x_embedder.weight"].dtype == torch.float16


def test_an_adapter_of_a_quantised_run_is_folded_into_the_weights_that_it_saw(tiny_base, tmp_path):
    """The adapter's file alone tells which: that is in its metadata."""
    model = converted_lora(tiny_base)
    export(replace(model, provenance={**model.provenance, "recipe": {"train.base_weights": "nf4"}}), tmp_path / "a",
           "adapter")  # fmt: skip
    (tmp_path / "a/asymflow_ft.json").unlink()
    state, _, _ = load_adapter(tmp_path / "a")
    base = flux2.load_parts(tiny_base, ("transformer",), torch.float32).transformer
    opened = open_converted(tmp_path / "a").with_dtype(torch.float32).transformer().state_dict()
    same(opened, apply_adapter(flux2, base, state, base_weights="nf4").state_dict())
    query = "transformer_blocks.0.attn.to_q.weight"  # not trained
    assert not torch.equal(opened[query], base.state_dict()[query])


def test_settings_are_those_that_stock_diffusers_would_read(written, tmp_path):
    shutil.copytree(written / "pipeline", tmp_path / "pipeline")
    edit(tmp_path / "pipeline/model_index.json", shift=3.5)
    assert load_pixel_pipeline(tmp_path / "pipeline", torch.float32).config.shift == 3.5


def test_values_too_large_for_the_released_precision_are_refused(tiny_base, tmp_path):
    model = converted_lora(tiny_base, dtype="bfloat16")
    model.trained["proj_out.weight"][0, 0] = 7e4
    with pytest.raises(ValueError, match=r"proj_out\.weight has values that torch\.float16 cannot hold.*float32"):
        export(model, tmp_path / "adapter", "adapter")
    model.trained["proj_out.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"proj_out\.weight has values that are no finite numbers"):
        export(model, tmp_path / "adapter", "adapter", torch.float32)
    assert not any(tmp_path.iterdir())


def test_a_full_finetune_has_every_tensor_in_its_adapter(tiny_base, tmp_path):
    source = converted_lora(tiny_base)
    pipeline = source.with_dtype(torch.float32).pipeline(source.transformer())
    export(as_converted(pipeline, tiny_base), tmp_path / "pipeline", "pipeline", torch.bfloat16)
    assert not (tmp_path / "pipeline/adapter").exists()
    export(open_converted(tmp_path / "pipeline"), tmp_path / "adapter", "adapter")
    state = load_file(tmp_path / f"adapter/{WEIGHTS}")
    stored = load_file(tmp_path / f"pipeline/transformer/{WEIGHTS}")
    same(stored, {name: tensor for name, tensor in state.items() if "_buffer" not in name})
    export(open_converted(tmp_path / "adapter"), tmp_path / "again", "merged")
    same(load_file(tmp_path / f"again/transformer/{WEIGHTS}"), stored)


@pytest.fixture
def official(written, tmp_path):
    """What the authors' tool writes: two files without metadata; and a card, as on the Hub."""
    folder = tmp_path / "official"
    folder.mkdir()
    state, _, _ = load_adapter(written / "adapter")
    save_file({f"transformer.{name}": tensor for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    shutil.copy(written / "adapter/config.json", folder)
    return folder


def test_the_official_release_opens(official, tiny_base, written, tmp_path):
    with pytest.raises(ValueError, match=r"does not name the base.*--base"):
        open_converted(official)
    (official / "README.md").write_text(f"---\nbase_model: {tiny_base}\n---\n")
    by_card, by_hand = open_converted(official), open_converted(official / WEIGHTS, base=tiny_base)
    for model in (by_card, by_hand):
        assert model.provenance["pipeline_class"] == "PixelFlux2KleinPipeline" and model.codec.mean == (0.56, 0, 0.01)
        expected = load_adapter(written / "adapter")[0]["proj_buffer"].float()
        assert torch.equal(model.subspace.basis, expected)
    export(by_hand, tmp_path / "again", "adapter")
    same(load_file(tmp_path / f"again/{WEIGHTS}"), {
        name: tensor.to(torch.bfloat16 if "_buffer" in name else torch.float16)
        for name, tensor in load_adapter(official)[0].items()
    })  # fmt: skip
    arguments = ["sample", "--pipeline", str(official), "--base", tiny_base, "--prompt", "x", "--steps", "1"]
    assert cli.main([*arguments, "--height", "64", "--width", "64", "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn/00000.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / WEIGHTS).write_bytes(b"no tensors"), "cannot be read as safetensors"),
        (lambda f: save_file({"x": torch.ones(1)}, f / WEIGHTS), "is not an AsymFlow adapter: it has no proj_buffer"),
        (lambda f: (f / WEIGHTS).unlink(), "is no converted model: neither a pipeline or merged folder"),
        (lambda f: edit(f / "config.json", sigma_min=1e-3), "was made for sigma_min 0.001; only 0.0001 is supported"),
        (lambda f: edit(f / "config.json", num_timesteps=1000), "num_timesteps 1000; only 1"),
        (lambda f: edit(f / "config.json", _class_name="Other"), "is a Other, and its base needs a AsymFlux2"),
        (lambda f: reshape(f / WEIGHTS, "proj_out.weight"), r"the adapter's proj_out\.weight .* does not fit"),
        (lambda f: lose(f / WEIGHTS, "lora_A"), r"is not whole: .*lora_B\.weight has no counterpart"),
        (lambda f: lose(f / WEIGHTS, "lora_B"), r"is not whole: .*lora_A\.weight has no counterpart"),
        (lambda f: lose(f / WEIGHTS, "proj_out"), "is not whole: it has no proj_out"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said(change, message, written, tiny_base, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(written / "adapter", folder)
    change(folder)
    assert cli.main(["export", str(folder), "--form", "merged", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().err
    assert "error: " in printed and "Traceback" not in printed and re.search(message, printed), printed
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def reshape(file, name):
    state = load_file(file)
    save_file(state | {name: state[name][:, :-1].contiguous()}, file)


def lose(file, part):
    save_file({name: tensor for name, tensor in load_file(file).items() if part not in name}, file)


def test_arguments_that_do_not_apply_are_refused(written, tiny_base, tmp_path, capsys):
    for arguments, message in (
        ([str(written / "adapter"), "--no-ema"], "holds one set of weights"),
        ([str(written / "adapter"), "--form", "lora"], "a LoRA comes from a run"),
        ([tiny_base], "is a latent pipeline; convert it first"),
        ([str(tmp_path / "nowhere/at/all")], "cannot open"),
        ([str(written / "adapter"), "--out", str(written / "merged")], "already exists"),
        ([str(written / "adapter"), "--base", str(written / "pipeline")], "it draws pixels already"),
        ([str(written / "pipeline"), "--base", tiny_base], "--base and --revision are for adapters"),
        ([str(written / "pipeline"), "--revision", "v2"], "--base and --revision are for adapters"),
    ):
        out = ["--out", str(tmp_path / "out")] if "--out" not in arguments else []
        form = ["--form", "merged"] if "--form" not in arguments else []
        assert cli.main(["export", *arguments, *out, *form]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"it has no asymflow_ft\.json"):
        shutil.copytree(written / "merged", tmp_path / "bare")
        (tmp_path / "bare/asymflow_ft.json").unlink()
        open_source(str(tmp_path / "bare"))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_pushed(form, written, capsys):
    assert cli.main(["push", str(written / form), "--repo", "user/model", "--dry-run", "--private"]) == 0
    printed = capsys.readouterr().out
    assert f"Made with asymflow-ft {version('asymflow-ft')};" in printed and "not pushed" not in printed
    assert WEIGHTS in printed


def test_a_merged_model_takes_the_text_encoder_of_another_base(written, tiny_base, tmp_path, capsys):
    """Its own may have moved since."""
    shutil.copytree(written / "merged", tmp_path / "merged")
    edit(tmp_path / "merged/asymflow_ft.json", base=str(tmp_path / "gone"))
    arguments = ["export", str(tmp_path / "merged"), "--form", "pipeline", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 1 and "gone" in capsys.readouterr().err
    assert cli.main([*arguments, "--base", tiny_base]) == 0
    assert read_provenance(tmp_path / "out") == read_provenance(written / "pipeline")


def test_an_export_removes_no_folder_of_the_user(written, tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/mine.txt").write_text("mine")
    export(open_converted(written / "adapter"), tmp_path / "out", "adapter")
    assert (tmp_path / "out.part/mine.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(written, tmp_path, monkeypatch):
    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asymflow_ft.hub.write.write_provenance", no_space)
    with pytest.raises(ValueError, match=r"could not write .* No space left on device"):
        export(open_converted(written / "adapter"), tmp_path / "out", "merged")
    assert not any(tmp_path.iterdir())


@torch.no_grad()
def test_every_form_draws_the_same_picture(written):
    if read_provenance(written / "adapter")["dtype"] == "bfloat16":
        return  # a pipeline's text encoder is rounded with it, the base's is not
    pictures = []
    for form in FORMS:
        pipeline = load_pixel_pipeline(written / form, torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipeline("red apple", num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
    assert pictures[0].std() > 0.01
