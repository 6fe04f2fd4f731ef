"""Training that starts from a converted model: what it goes on with, what it is told by, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asymflow_ft import cli
from asymflow_ft.export import ORIGIN, keep_origin, load_pixel_pipeline
from asymflow_ft.hub.forms import LORA_WEIGHTS, open_converted
from asymflow_ft.hub.provenance import read_provenance
from asymflow_ft.hub.write import export
from asymflow_ft.recipe import load_recipe
from asymflow_ft.training.checkpoint import list_checkpoints
from asymflow_ft.training.student import open_start, start_key
from tests.conftest import REPOSITORY
from tests.converted import as_converted, converted_lora
from tests.hub_server import Hub, Repo, files_of
from tests.init_from.conftest import PIXELS, RECIPE, STYLE, WEIGHTS, arguments, run

pytestmark = pytest.mark.usefixtures("in_repository")


@pytest.mark.parametrize("form", ["adapter", "pipeline"])
def test_a_conversion_goes_on_where_it_stood(form, start, tiny_base, tmp_path):
    out = tmp_path / "run"
    assert run(out, start / form, "lora={rank: 3}", "train.steps=1") == 0
    stored = open_converted(start / form)
    held_out = json.loads((out / "logs/held_out_step_0.json").read_text())
    assert run(tmp_path / "full", start / form, "lora=null", "train.steps=1") == 0
    in_full = json.loads((tmp_path / "full/logs/held_out_step_0.json").read_text())
    assert held_out == pytest.approx(in_full, rel=1e-4)  # adapters beside the base, or folded in: the same network
    assert held_out["0.7"] > 0
    trained = load_file(list_checkpoints(out / "checkpoints")[-1] / "trained.safetensors")
    moved = [
        (trained["x_embedder.modules_to_save.default.weight"] - stored.trained["x_embedder.weight"]).abs().max(),
        (trained["single_transformer_blocks.0.attn.to_out.lora_A.default.weight"]
         - stored.trained["single_transformer_blocks.0.attn.to_out.lora_A.weight"]).abs().max(),
    ]  # fmt: skip
    assert all(0 < change < 2e-3 for change in moved)  # one step of Adam
    assert read_provenance(out / "pipeline")["init_from"] == str(start / form)
    assert torch.equal(open_converted(out / "pipeline").subspace.basis, stored.subspace.basis)


def test_a_report_that_lies_in_the_working_directory_is_not_the_runs(start, tmp_path, monkeypatch):
    """init_from leaves align.path open, and an alignment's report may lie anywhere."""
    monkeypatch.chdir(tmp_path)
    for file, content in (("report.json", b"{}"), ("report.png", b"")):
        (tmp_path / file).write_bytes(content)
    tiny = REPOSITORY / "recipes/tiny"
    paths = [f"base={tiny}/base", f"data.source={tiny}/data", f"sample.prompts={tiny}/data/prompts.txt"]
    out = tmp_path / "2024"  # a name that YAML takes for a number
    assert run(out, start / "adapter", *STYLE, "train.steps=1", *paths) == 0
    stated = read_provenance(out / "lora")
    assert stated["alignment"] is None and not (out / "lora/assets/alignment.png").exists()
    assert cli.main(["export", out.name, "--form", "lora", "--out", "again"]) == 0


def test_checkpoints_are_exported_with_either_weights(start, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, start / "adapter", "lora={rank: 3}", "train.steps=3", "train.keep_checkpoints=3") == 0
    checkpoints = list_checkpoints(out / "checkpoints")

    def exported(source, *options):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        assert cli.main(["export", str(source), "--form", "adapter", "--out", str(folder), *options]) == 0
        return load_file(folder / WEIGHTS), read_provenance(folder)

    newest, stated = exported(out)
    finished = load_file(out / f"pipeline/adapter/{WEIGHTS}")
    assert all(torch.equal(newest[name], finished[name]) for name in newest | finished)
    assert stated["weights"] == "ema" and stated["step"] == 3 and stated["metrics"]["run"]["steps"] == 3
    plain, stated = exported(out, "--no-ema")
    assert stated["weights"] == "trained" and stated["metrics"] is None
    last = load_file(checkpoints[-1] / "trained.safetensors")
    assert torch.equal(plain["proj_out.weight"], last["proj_out.modules_to_save.default.weight"])
    assert not torch.equal(plain["proj_out.weight"], newest["proj_out.weight"])
    earlier, stated = exported(checkpoints[0])
    assert stated["step"] == 1 and not torch.equal(earlier["proj_out.weight"], newest["proj_out.weight"])

    def refused(source):
        assert cli.main(["export", str(source), "--form", "adapter", "--out", str(tmp_path / "none")]) == 1
        return capsys.readouterr().err

    with open(checkpoints[0] / "trained.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert "choose another checkpoint" in refused(checkpoints[0])
    material = out / "logs/material.json"
    material.write_text(json.dumps(json.loads(material.read_text()) | {"subspace": "other"}))
    assert "is not the one that" in refused(out)


def test_a_run_does_not_go_on_from_another_start(start, tiny_base, tmp_path, capsys):
    shutil.copytree(start / "adapter", tmp_path / "adapter")
    out = tmp_path / "run"
    assert run(out, tmp_path / "adapter", *STYLE, "train.steps=1") == 0
    shutil.rmtree(tmp_path / "adapter")
    other = converted_lora(tiny_base, seed=0)
    other.trained["proj_out.weight"][0, 0] += 1
    export(other, tmp_path / "adapter", "adapter")
    assert run(out, tmp_path / "adapter", *STYLE, "train.steps=2") == 1
    assert "began with other init_from" in capsys.readouterr().err


def test_a_start_is_known_by_its_weights_and_not_by_where_they_lie(start, tiny_base, tmp_path):
    """A spot machine fetches the same model again, with other times and under another path."""
    whole = as_converted(load_pixel_pipeline(start / "adapter", torch.float32), tiny_base)
    export(whole, tmp_path / "whole", "merged", shard_size="1MB")
    whole.trained["norm_out.linear.weight"][0, 0] += 1
    export(whole, tmp_path / "trained on", "merged")
    keys = [start_key(open_converted(start / "pipeline")), start_key(open_converted(tmp_path / "whole"))]
    for source, key in zip((start / "pipeline", tmp_path / "whole"), keys, strict=True):
        shutil.copytree(source, tmp_path / f"copy of {source.name}", copy_function=shutil.copyfile)
        assert start_key(open_converted(tmp_path / f"copy of {source.name}")) == key
    assert start_key(open_converted(start / "adapter")) == keys[0]
    assert start_key(open_converted(tmp_path / "trained on")) != keys[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora={rank: 8}"], "has LoRA of rank 3; set lora.rank=3"),
        (["lora={rank: 3}", "pixels.std=0.16"], r"works in pixels\.space=oklab pixels\.mean=\[0\.5"),
        (["lora={rank: 3}", "align.path=somewhere"], "align.path and init_from are both given"),
        (["lora={rank: 3}", "init_from=null"], "align.path and init_from are missing, both"),
        (["lora={rank: 3, ends: false}"], "set loss.variance_reduction=false"),
        (["lora={rank: 3}", "loss.variance_reduction=false", "loss.perceptual=lpips"], "set loss.perceptual=none"),
        ([*STYLE, "init_from=null", "align.path=x"], "set init_from to a converted model"),
        (["lora={rank: 3}", "init_from=recipes/tiny/base"], "is a latent pipeline; convert it first"),
        (["lora={rank: 3}", "init_from=no/where"], "cannot open"),
        (["lora={rank: 3}", "base=START/pipeline"], "it draws pixels already"),
        (["lora={rank: 3}", "init_from=HERE/run"], "is a run; give the pipeline/ in it"),
        (["lora={rank: 3}", "init_from=HERE/style"], "is a LoRA; give the converted model"),
    ],
)
def test_starts_that_cannot_be_are_refused(overrides, message, start, tmp_path, capsys):
    for name, file in (("run", "recipe.yaml"), ("style", LORA_WEIGHTS)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    overrides = [word.replace("START", str(start)).replace("HERE", str(tmp_path)) for word in overrides]
    assert run(tmp_path / "out", start / "adapter", "train.steps=1", *overrides) == 1
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed


def test_a_full_finetune_has_no_adapter_to_go_on_with(start, tiny_base, tmp_path, capsys):
    pipeline = load_pixel_pipeline(start / "adapter", torch.float32)
    export(as_converted(pipeline, tiny_base), tmp_path / "whole", "merged")
    assert run(tmp_path / "run", tmp_path / "whole", "lora={rank: 3}", "train.steps=1") == 1
    assert "has no LoRA factors to go on with" in capsys.readouterr().err
    assert run(tmp_path / "run", tmp_path / "whole", *STYLE, "train.steps=1") == 0


RUN_ON_THE_HUB = """
import json, sys
import huggingface_hub
from asymflow_ft import finetune

save = finetune.save_result

def save_offline(*arguments):
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    save(*arguments)

finetune.save_result = save_offline
print(json.dumps(finetune.main(json.loads(sys.argv[1]))))
"""


def test_the_hub_is_asked_when_a_run_begins_and_not_when_it_ends(start, tiny_base, tmp_path):
    """Base and init_from are on the Hub, gone at the end; then the base's `main` moves, and the run goes on."""
    licence = {"license": "other", "license_name": "strict"}
    out, style = tmp_path / "run", [*STYLE, "base=user/base"]
    with Hub().running() as hub:
        hub.repos["user/base"], hub.repos["user/pixels"] = Repo(), Repo()
        base = files_of(Path(tiny_base)) | {"README.md": b"---\nlicense: mit\n---\n"}
        first = hub.repos["user/base"].commit(base)
        card = b"---\nlicense: other\nlicense_name: strict\n---\n"
        hub.repos["user/pixels"].commit(files_of(start / "pipeline") | {"README.md": card})
        assert hub.client(RUN_ON_THE_HUB, arguments(out, "user/pixels", "train.steps=1", *style), tmp_path / "hf") == 0
        assert not any(repo == "user/pixels" and name.startswith(("text_", "tok")) for repo, name in hub.fetched)
        stated = read_provenance(out / "lora")
        assert (stated["revision"], stated["licence"]) == (first, licence)
        hub.repos["user/base"].commit(base | {"README.md": b"moved"})
        hub.fetched.clear()
        assert hub.client(RUN_ON_THE_HUB, arguments(out, "user/pixels", "train.steps=2", *style), tmp_path / "hf") == 0
        assert read_provenance(out / "lora")["revision"] == first
        assert set(hub.fetched) <= {("user/base", "model_index.json")}


def test_the_revision_is_the_bases_and_a_latent_pipeline_costs_no_gigabytes(start, tiny_base, tmp_path):
    program = """
import json, sys
from asymflow_ft.hub.forms import open_converted
source, base, revision = json.loads(sys.argv[1])
try:
    print(json.dumps(open_converted(source, base, revision).provenance["revision"]))
except ValueError as error:
    print(json.dumps(str(error)))
"""
    with Hub().running() as hub:
        hub.repos["user/base"], hub.repos["user/adapter"] = Repo(), Repo()
        commit = hub.repos["user/base"].commit(files_of(Path(tiny_base)))
        hub.repos["user/adapter"].commit(files_of(start / "adapter"))
        assert hub.client(program, ["user/adapter", "user/base", commit], tmp_path / "hf") == commit
        hub.fetched.clear()
        assert "is a latent pipeline" in hub.client(program, ["user/base", None, None], tmp_path / "hf")
        assert all(name.endswith(".json") for _, name in hub.fetched)


@pytest.mark.parametrize("card", [None, "apache-2.0"])
def test_the_terms_of_the_start_outlive_a_folder_without_a_card(card, start, tiny_base, tmp_path):
    """A local export names its licence in asymflow_ft.json until a push writes the card."""
    shutil.copytree(start / "adapter", tmp_path / "adapter")
    if card:
        (tmp_path / "adapter/README.md").write_text(f"---\nlicense: {card}\n---\n")
    strict = {"license": "other", "license_name": "strict"}
    stated = read_provenance(start / "adapter") | {"licence": strict}
    (tmp_path / "adapter/asymflow_ft.json").write_text(json.dumps(stated))
    file = tmp_path / "adapter" / WEIGHTS
    overrides = [f"output_dir={tmp_path}", f"init_from={file}", "align.path=null", "align.mode=require", *PIXELS]
    recipe = load_recipe(RECIPE, [*overrides, "lora={rank: 3}"])
    (tmp_path / "logs").mkdir()
    keep_origin(recipe, open_start(recipe))
    assert json.loads((tmp_path / ORIGIN).read_text())["licence"] == ({"license": card} if card else strict)
