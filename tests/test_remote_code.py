"""An exported pipeline where this package is not installed: a stock diffusers loads it and draws the same picture.

The environment holds torch, diffusers, transformers and what these require, by links to the installed ones.
"""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.export import load_pixel_pipeline
from asymflow_ft.families import flux2
from asymflow_ft.hub import bundle as bundles
from asymflow_ft.hub.bundle import bundle
from asymflow_ft.hub.forms import open_converted
from asymflow_ft.hub.write import export
from tests.converted import converted_lora
from tests.hub_server import Hub, Repo, files_of

CLIENT = """
import importlib.util, json, sys, torch
from pathlib import Path
from diffusers import AutoModel, DiffusionPipeline
from huggingface_hub import snapshot_download

installed = [name for name in ("asymflow_ft", "peft", "accelerate", "datasets") if importlib.util.find_spec(name)]
folder, out = json.loads(sys.argv[1])

def draw(source, **options):
    pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, **options)
    images = pipeline("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                      output_type="pt").images
    return images, pipeline

answers = {"installed": installed}
images = {}
for name, source, options in (("path", folder, {}), ("hub", "user/model", {}),
                              ("snapshot", snapshot_download("user/model"), {}),
                              ("other", "user/other", {}), ("pinned", "user/model", {"revision": "main"})):
    images[name], pipeline = draw(source, **options)
    if name == "hub":
        first = pipeline
answers["scale"] = [sys.modules[type(p).__module__].CFG_SCALE for p in (first, pipeline)]
answers["other scale"] = sys.modules[type(draw("user/other")[1]).__module__].CFG_SCALE
images["hub again"] = first("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                            output_type="pt").images
answers["transformer"] = type(AutoModel.from_pretrained("user/model", subfolder="transformer")).__name__
half = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
answers["precision"] = [str(part.dtype) for part in (half.transformer, half.subspace)]
for name, source in (("refused path", folder), ("refused hub", "user/model")):
    try:
        DiffusionPipeline.from_pretrained(source)
    except ValueError as error:
        answers[name] = str(error)
torch.save(images, out)
print(json.dumps(answers))
"""


def link_installed(site: Path, *wanted: str) -> None:
    """Put distributions, with all that they require, into another environment's site-packages."""
    done: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name.lower() in done:
            continue
        done.add(name.lower())
        found = importlib.metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files or () if not str(file).startswith("..")}:
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
        requirements = map(Requirement, found.requires or ())
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def exported(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    export(converted_lora(tiny_base), folder, "pipeline")
    return folder


def other_version(files: dict[str, bytes]) -> dict[str, bytes]:
    """The export as a later version of this package would write it: other code, under another name."""
    (name,) = [file for file in files if file.startswith("pipeline_")]
    new = name.replace("pipeline_asymflow", "pipeline_asymflow_later")
    code = files[name].replace(b"CFG_SCALE = 4.0", b"CFG_SCALE = 2.0")
    assert code != files[name]
    index = files["model_index.json"].replace(name.removesuffix(".py").encode(), new.removesuffix(".py").encode())
    return {file: content for file, content in files.items() if file != name} | {new: code, "model_index.json": index}


@pytest.fixture(scope="module")
def elsewhere(exported, tmp_path_factory):
    """(answers, pictures by name, what the Hub was asked for) of a process without this package."""
    room = tmp_path_factory.mktemp("elsewhere")
    venv.create(room / "env", symlinks=True)
    site = next((room / "env/lib").glob("python*/site-packages"))
    link_installed(site, "torch", "diffusers", "transformers", "packaging")
    with Hub().running() as hub:
        hub.repos["user/model"], hub.repos["user/other"] = Repo(), Repo()
        hub.repos["user/model"].commit(files_of(exported))
        hub.repos["user/other"].commit(other_version(files_of(exported)))
        environment = hub.environment(room / "home")
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            environment.pop(name, None)
        command = [room / "env/bin/python", "-c", CLIENT, json.dumps([str(exported), str(room / "pictures.pt")])]
        done = subprocess.run(command, env=environment, cwd=room, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr  # diffusers compares components with the annotations
    return json.loads(done.stdout.splitlines()[-1]), torch.load(room / "pictures.pt"), hub.fetched


@torch.no_grad()
def test_stock_diffusers_draws_the_same_picture(elsewhere, exported):
    answers, pictures, _ = elsewhere
    assert answers["installed"] == []
    pipeline = load_pixel_pipeline(exported, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    here = pipeline("red apple", num_inference_steps=2, generator=generator, output_type="pt").images
    for name in ("path", "hub", "snapshot", "pinned", "hub again"):
        assert torch.equal(pictures[name], here), name
    assert here.std() > 0.01 and not torch.equal(pictures["other"], here)


def test_code_runs_with_the_flag_alone_and_two_versions_live_side_by_side(elsewhere):
    answers, _, _ = elsewhere
    for name in ("refused path", "refused hub"):
        assert "trust_remote_code=True" in answers[name]
    assert answers["scale"] == [4.0, 4.0] and answers["other scale"] == 2.0
    assert answers["transformer"] == "Flux2Transformer2DModel"
    assert answers["precision"] == ["torch.bfloat16", "torch.float32"]  # a rounded basis is not orthonormal


def test_each_component_is_one_file_and_the_base_is_not_fetched(elsewhere, exported):
    _, _, fetched = elsewhere
    code = [name for repo, name in fetched if repo == "user/model" and name.endswith(".py")]
    assert {name.partition("/")[0].partition("_")[0] for name in code} == {"pipeline", "subspace", "codec"}
    assert {repo for repo, _ in fetched} == {"user/model", "user/other"}
    index = json.loads((exported / "model_index.json").read_text())
    for name, value in index.items():
        if isinstance(value, list):
            module, kind = value
            folder = exported if name == "_class_name" else exported / name
            assert module in ("diffusers", "transformers") or f"class {kind}" in (folder / f"{module}.py").read_text()


@pytest.mark.parametrize(
    ("kind", "what"),
    [(flux2.PixelFlux2KleinPipeline, "pipeline"), (flux2.PixelFlux2Pipeline, "pipeline"), (PixelSubspace, "subspace"),
     (PixelCodec, "codec")],
)  # fmt: skip
def test_a_bundle_holds_what_it_needs_once_and_nothing_of_this_package(kind, what, monkeypatch):
    made = bundle(kind, what)
    tree = ast.parse(made.source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not (node.module or "").startswith("asymflow_ft")
    names = [n for node in tree.body for n in bundles._defined(node)]
    assert len(names) == len(set(names)) and kind.__name__ in names
    assert bundle(kind, what) == made and made.name.startswith(f"{what}_asymflow_v")
    space: dict = {"__name__": made.name}
    monkeypatch.setitem(sys.modules, made.name, type(sys)(made.name))  # dataclasses look their module up
    exec(compile(made.source, f"{made.name}.py", "exec"), space)
    assert space[kind.__name__].__mro__[-3:] == kind.__mro__[-3:]
    real = bundles.inspect.getsource
    monkeypatch.setattr(bundles.inspect, "getsource", lambda module: real(module).replace("values", "numbers"))
    assert bundle(kind, what).name != made.name  # other code never goes under the same name


def test_here_no_code_of_a_repository_is_fetched_or_run(exported, tmp_path):
    program = """
import json, sys, torch
from asymflow_ft.export import load_pixel_pipeline
pipeline = load_pixel_pipeline(json.loads(sys.argv[1]), torch.float32)
print(json.dumps([type(part).__module__ for part in (pipeline, pipeline.subspace, pipeline.codec)]))
"""
    files = files_of(exported)
    evil = {name: b"raise SystemExit(3)" if name.endswith(".py") else content for name, content in files.items()}
    with Hub().running() as hub:
        hub.repos["user/model"] = Repo()
        hub.repos["user/model"].commit(evil | {"transformer/x.bin": b"pickle"})
        modules = hub.client(program, "user/model", tmp_path / "home")
    assert modules == ["asymflow_ft.families.flux2", "asymflow_ft.components.subspace", "asymflow_ft.components.color"]
    assert not any(name.endswith((".py", ".bin")) for _, name in hub.fetched)


def test_an_export_of_an_export_loads_again(exported, tmp_path):
    """diffusers' own save_pretrained of such a pipeline would lose the code."""
    export(open_converted(exported), tmp_path / "again", "pipeline")
    one, other = files_of(exported), files_of(tmp_path / "again")
    assert one.keys() == other.keys()
    different = {name for name in one if one[name] != other[name]}
    # safetensors writes its metadata in any order; saved configs name the folder that they were read from
    assert not any(name.endswith(".py") or name == "model_index.json" for name in different), different
    assert os.path.getsize(tmp_path / "again/model_index.json") > 500
