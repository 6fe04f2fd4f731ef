"""Pushing an exported folder, through huggingface_hub itself, to a server on this machine that plays the Hub."""

import hashlib
import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.numpy import save_file

from asymflow_ft import cli
from asymflow_ft.families.terms import NOTICES
from asymflow_ft.hub.model_card import model_card
from asymflow_ft.hub.provenance import UNKNOWN
from asymflow_ft.hub.push import plan_push
from tests.hub_server import Hub, Repo, files_of

BASE_9B = "black-forest-labs/FLUX.2-klein-base-9B"
LINK = f"https://huggingface.co/{BASE_9B}/blob/abc123/LICENSE.md"
NON_COMMERCIAL = {"license": "other", "license_name": "flux-non-commercial-license", "license_link": LINK}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROVENANCE = {
    "form": "pipeline", "family": "flux2", "pipeline_class": "PixelFlux2KleinPipeline",
    "base": "black-forest-labs/FLUX.2-klein-base-4B", "revision": "abc123",
    "licence": {"license": "apache-2.0"}, "init_from": None, "dtype": "bfloat16", "weights": "ema", "step": 1200,
    "settings": {"shift": 17.0, "shift_mode": "sqrt", "default_size": 1024, "distilled_guidance": None},
    "recipe": {"base": "black-forest-labs/FLUX.2-klein-base-4B", "data.source": "/home/jane/secret/fox", "seed": 0},
    "data": {"samples": 4800, "images": 1600, "sources": ["/home/jane/secret/fox"]},
    "alignment": {
        "images": 400, "tokens": 25600, "patch": 16, "rank": 128, "scale": 2.3908, "orthonormality_error": 1.5e-8,
        "explained_total": 0.6187, "explained_by_frequency": {"mean": 0.766, "1": 0.741}, "pixel_shift": 16.7,
        "latent_shift": 7.0,
    },
    "metrics": {
        "held_out_error": {"step 0": {"0.7": 0.2461}, "finetuned": {"0.7": 0.0781}},
        "latent base": {"retrieval_at_5": 1.0, "picture_error": 2.81, "sharpness": 1.34},
        "step 0": {"retrieval_at_5": 0.99, "picture_error": 6.07, "sharpness": 2.05},
        "finetuned": {"retrieval_at_5": 1.0, "picture_error": 3.31, "sharpness": 1.4},
        "run": {"steps": 1200, "seconds": 340.5, "peak_memory_gb": 0.9},
    },
    "versions": {"torch": "2.13.0", "asymflow-ft": "0.1.0"}, "pixels": None,
}  # fmt: skip
BARE = {**UNKNOWN, "form": "adapter", "family": "flux2", "base": "my_base"}
CLIENT = """
import contextlib, io, json, os, sys, time
from huggingface_hub import snapshot_download
from asymflow_ft.cli import main

time.sleep = lambda seconds: None  # huggingface_hub waits 23 s in all before it gives up a broken connection
answers = []
for token, arguments in json.loads(sys.argv[1]):
    os.environ.update({"HF_TOKEN": token} if token else {})
    if not token:
        os.environ.pop("HF_TOKEN", None)
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        if arguments[0] == "download":
            snapshot_download(arguments[1], local_dir=arguments[2])
            code = 0
        else:
            code = main(arguments)
    answers.append([code, said.getvalue(), wrong.getvalue()])
print(json.dumps(answers))
"""


def export(folder, provenance, **changes):
    """A folder as `asymflow-ft export` writes it, with weights of 3 MB."""
    draw = np.random.default_rng(0).standard_normal
    (folder / "transformer").mkdir(parents=True)
    (folder / "subspace").mkdir()
    (folder / "assets").mkdir()
    (folder / "checkpoints").mkdir()
    save_file({"x": draw((768, 1024), dtype=np.float32)}, folder / WEIGHTS)
    save_file({"basis": draw((768, 128), dtype=np.float32)}, folder / "subspace/diffusion_pytorch_model.safetensors")
    (folder / "transformer/config.json").write_text("{}")
    (folder / "pipeline_asymflow_1a2b.py").write_text("class PixelFlux2KleinPipeline: ...\n")
    (folder / "model_index.json").write_text("{}")
    (folder / "asymflow_ft.json").write_text(json.dumps({**provenance, **changes}))
    Image.new("RGB", (8, 8), "red").save(folder / "assets/samples.png")
    (folder / "checkpoints/state.json").write_text("{}")
    (folder / "notes.txt").write_text("not for the world")
    return folder


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(answer to each command, the hub after all of them, folder of the exports)."""
    root = tmp_path_factory.mktemp("exports")
    plain, private = export(root / "plain", PROVENANCE), export(root / "private", BARE)
    restricted = export(root / "restricted", PROVENANCE, base=BASE_9B, licence=NON_COMMERCIAL)
    bound = export(root / "bound", PROVENANCE, base=BASE_9B, licence=NON_COMMERCIAL)
    hub = Hub()
    hub.users = {"hf_jane": "jane", "hf_joe": "joe", "hf_dry": "jane"}
    hub.repos[BASE_9B] = Repo()
    hub.repos[BASE_9B].commit({"LICENSE.md": b"FLUX Non-Commercial License v2.1\n"}, "abc123")
    hub.repos["jane/open"] = Repo()
    hub.repos["jane/open"].commit({"old.safetensors": b""})
    hub.repos["jane/manual"] = Repo(gated="manual")
    hub.repos["jane/manual"].commit({})
    hub.breaks = {digest(plain / WEIGHTS): 6}  # a try and five repetitions
    commands = {
        "dry": ("hf_dry", ["push", plain, "--repo", "jane/plain", "--dry-run"]),
        "wrong token": ("hf_wrong", ["push", plain, "--repo", "jane/plain"]),
        "no token": (None, ["push", plain, "--repo", "jane/plain"]),
        "foreign": ("hf_joe", ["push", plain, "--repo", "jane/plain"]),
        "broken": ("hf_jane", ["push", plain, "--repo", "jane/plain"]),
        "again": ("hf_jane", ["push", plain, "--repo", "jane/plain"]),
        "unchanged": ("hf_jane", ["push", plain, "--repo", "jane/plain"]),
        "download": (None, ["download", "jane/plain", root / "copy"]),
        "restricted": ("hf_jane", ["push", restricted, "--repo", "jane/restricted"]),
        "manual": ("hf_jane", ["push", restricted, "--repo", "jane/manual"]),
        "no copy": ("hf_jane", ["push", bound, "--repo", "jane/bound"]),
        "private": ("hf_jane", ["push", private, "--repo", "jane/private", "--private"]),
        "not private": ("hf_jane", ["push", private, "--repo", "jane/open", "--private"]),
    }  # fmt: skip
    (bound / "asymflow_ft.json").write_text(
        json.dumps({**PROVENANCE, "licence": {**NON_COMMERCIAL, "license_link": LINK.replace("LICENSE", "TERMS")}})
    )
    with hub.running():
        asked = [(token, [str(word) for word in words]) for token, words in commands.values()]
        answers = hub.client(CLIENT, asked, tmp_path_factory.mktemp("huggingface"))
    return dict(zip(commands, answers, strict=True)), hub, root


def test_these_are_the_facts_that_an_export_writes():
    assert PROVENANCE.keys() == UNKNOWN.keys()


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_dry_run_lists_and_renders_and_contacts_nothing(pushed):
    answers, hub, _ = pushed
    code, said, wrong = answers["dry"]
    assert (code, wrong) == (0, "")
    assert f"3,145,808  {WEIGHTS}" in said and "README.md (written by the push)" in said
    assert "not pushed: checkpoints/state.json" in said and "not pushed: notes.txt" in said
    assert "base_model: black-forest-labs/FLUX.2-klein-base-4B" in said
    assert not [request for request in hub.log if request[0] == "hf_dry"]


def test_what_is_pushed_comes_back_bit_for_bit(pushed):
    answers, _, root = pushed
    assert answers["again"][0] == 0 and "pushed: http://127.0.0.1" in answers["again"][1]
    local, copy = files_of(root / "plain"), files_of(root / "copy")
    copy = {name: content for name, content in copy.items() if not name.startswith((".cache/", ".gitattributes"))}
    assert copy == {name: local[name] for name in local.keys() - {"notes.txt", "checkpoints/state.json"}}
    assert {"README.md", "asymflow_ft.json", "pipeline_asymflow_1a2b.py", WEIGHTS} <= copy.keys()


def test_a_broken_upload_goes_on_with_the_same_command(pushed):
    answers, hub, root = pushed
    code, _, wrong = answers["broken"]
    assert code == 1  # the lines before are progress bars
    assert wrong.splitlines()[-1].startswith("error: the connection to the Hub broke; the same command goes on")
    large = [digest(root / "plain" / name) for name in (WEIGHTS, "subspace/diffusion_pytorch_model.safetensors")]
    assert [hub.received.count(name) for name in large] == [1, 1]


def test_pushing_again_sends_nothing(pushed):
    answers, hub, _ = pushed
    assert answers["unchanged"][0] == 0
    assert len(hub.repos["jane/plain"].commits) == 2  # the empty repository and the push


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("wrong token", "the Hub does not accept the token; run `hf auth login`"),
        ("no token", "not logged in to the Hugging Face Hub; run `hf auth login`"),
        ("foreign", "this token may not write to jane/plain"),
        ("not private", "jane/open exists and is public, which --private does not change"),
        ("no copy", f"TERMS.md of {BASE_9B} cannot be fetched"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_message(case, message, pushed):
    code, _, wrong = pushed[0][case]
    assert code == 1 and message in wrong and wrong.startswith("error: ") and wrong.count("\n") == 1


def test_a_refused_push_leaves_no_trace(pushed):
    _, hub, root = pushed
    assert "jane/bound" not in hub.repos and not (root / "bound/README.md").exists()
    assert hub.repos["jane/open"].commits.popitem()[1] == {"old.safetensors": b""}


def test_a_non_commercial_model_gets_licence_notice_and_gate(pushed):
    answers, hub, _ = pushed
    assert answers["restricted"][0] == 0, answers["restricted"][2]
    repo = hub.repos["jane/restricted"]
    files = repo.commits[repo.branches["main"]]
    assert files["LICENSE.md"] == b"FLUX Non-Commercial License v2.1\n"
    assert NOTICES["non-commercial"].encode() in files["NOTICE"]
    front = ModelCard(files["README.md"].decode()).data.to_dict()
    assert {field: front[field] for field in NON_COMMERCIAL} == NON_COMMERCIAL
    assert LINK in front["extra_gated_prompt"] and list(front["extra_gated_fields"].values()) == ["checkbox"]
    log = [path for _, _, path in hub.log if path.startswith("/api/models/jane/restricted/")]
    gate = log.index("/api/models/jane/restricted/settings")
    assert repo.gated == "auto" and gate < log.index("/api/models/jane/restricted/commit/main")
    assert answers["manual"][0] == 0 and hub.repos["jane/manual"].gated == "manual"
    assert hub.repos["jane/plain"].gated is False


def test_a_private_push_only_warns(pushed):
    answers, hub, _ = pushed
    code, said, _ = answers["private"]
    assert code == 0 and "warning: jane/private may not be public yet" in said and "my_base is unknown" in said
    assert hub.repos["jane/private"].private


def refused(folder, capsys, repo="jane/x"):
    assert cli.main(["push", str(folder), "--repo", repo]) == 1
    return capsys.readouterr().err


def test_a_public_push_names_all_that_a_non_commercial_licence_misses(tmp_path, capsys):
    licence = {**NON_COMMERCIAL, "license_link": "https://example.com/licence"}
    folder = export(tmp_path / "x", PROVENANCE, licence=licence)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    message = refused(folder, capsys)
    assert "LICENSE.md is missing" in message
    assert "set `license: other`, `license_name: flux-non-commercial-license`" in message
    fields = yaml.safe_load(message[message.index("    extra_gated_prompt") : message.index("`--private`")])
    (folder / "LICENSE.md").write_text("The text of the licence.")
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({**licence, **fields})}---\n")
    plan = plan_push(folder, "jane/x", private=False)
    assert plan.problems == () and plan.gated and list(plan.texts) == ["NOTICE"]


def test_a_card_cannot_replace_a_licence_of_the_bases_own(tmp_path, capsys):
    folder = export(tmp_path / "x", PROVENANCE, licence={"license": "other", "license_name": "kommunity"})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    message = refused(folder, capsys)
    assert "LICENSE.md is missing" in message and "set `license: other`, `license_name: kommunity` in" in message
    (folder / "LICENSE.md").write_text("The text of the licence.")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: kommunity\n---\n")
    plan = plan_push(folder, "jane/x", private=False)
    assert plan.problems == () and not plan.gated and plan.texts == {}


def test_an_unknown_licence_is_asked_for(tmp_path, capsys):
    plain = export(tmp_path / "plain", PROVENANCE)
    (plain / "README.md").write_text("A model.")
    assert "does not state the base's licence: set `license: apache-2.0` in" in refused(plain, capsys)
    folder = export(tmp_path / "x", BARE)
    assert "set `license` in the front matter of README.md" in refused(folder, capsys)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert plan_push(folder, "jane/x", private=False).problems == ()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("transformer/optimizer.pt", "", "optimizer.pt may hold a pickle"),
        ("tokenizer/config.json", '{"token": "hf_' + 34 * "a" + '"}', "looks like a Hugging Face token"),
        ("README.md", "---\nlicense: [\n---\n", "the front matter of"),
        ("asymflow_ft.json", "{", "asymflow_ft.json cannot be read"),
    ],
)
def test_files_that_must_not_be_pushed_are_named(file, content, message, tmp_path, capsys):
    folder = export(tmp_path / "x", PROVENANCE)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    assert message in refused(folder, capsys)


def test_what_is_no_export_is_refused(tmp_path, capsys):
    assert f"there is no folder {tmp_path / 'none'}" in refused(tmp_path / "none", capsys)
    assert "make one with `asymflow-ft export`" in refused(tmp_path, capsys)
    for name in ("x", "a/b/c", "jane/-x", "jane/x y"):
        assert f"--repo {name!r} is no repository name" in refused(tmp_path, capsys, name)


def test_offline_mode_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_jane")
    assert "HF_HUB_OFFLINE is set; unset it to push" in refused(export(tmp_path / "x", PROVENANCE), capsys)


def test_the_card_states_what_the_provenance_knows():
    text = model_card(PROVENANCE, "jane/foxes", frozenset({"samples.png"}), terms="TERMS")
    front = ModelCard(text).data.to_dict()
    assert front == {
        "license": "apache-2.0", "base_model": PROVENANCE["base"], "base_model_relation": "finetune",
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["asymflow", "pixel-space", "flux2"],
        "widget": [{"text": "sample grid of the run", "output": {"url": "assets/samples.png"}}],
    }  # fmt: skip
    assert (
        "| finetuned | 1 | 3.31 | 1.4 | 0.0781 |" in text
        and "| pixels, step 0 | 0.99 | 6.07 | 2.05 | 0.2461 |" in text
    )
    assert "4,800 samples, 1,600 images from fox" in text and "secret" not in text and "data.source: fox" in text
    assert "scale s: 2.3908" in text and "340.5" in text and "- shift: 17\n" in text and "\nTERMS\n" in text
    assert 'from_pretrained(\n    "jane/foxes", trust_remote_code=True' in text and "](assets/samples.png)" in text


def test_the_card_of_each_form_says_how_it_loads():
    cards = {form: model_card({**BARE, "form": form, "init_from": "jane/foxes"}, "jane/x") for form in
             ("pipeline", "adapter", "merged", "lora")}  # fmt: skip
    fronts = {form: ModelCard(text).data for form, text in cards.items()}
    assert fronts["lora"].base_model == "jane/foxes" and fronts["lora"].base_model_relation == "adapter"
    assert fronts["adapter"].base_model is None  # a local folder is no model of the Hub
    assert "trust_remote_code=True" in cards["pipeline"] and "Lakonik/ComfyUI-piFlow" in cards["adapter"]
    assert 'load_lora_weights("jane/x"' in cards["lora"] and "subspace/" in cards["merged"]
    assert not any("None" in text or "\n\n\n" in text for text in cards.values())


@pytest.mark.parametrize("form", ["pipeline", "adapter", "merged", "lora"])
def test_a_card_names_no_folder_of_its_author(form):
    folders = {"base": "/home/jane/secret/klein", "init_from": "/home/jane/secret/pixels"}
    text = model_card({**PROVENANCE, **folders, "form": form}, "jane/x")
    assert "secret" not in text and "`klein` (a local folder)" in text and "base_model" not in text
    if form == "lora":
        assert 'from_pretrained(\n    "PIPELINE"' in text
    if form in ("adapter", "merged"):
        assert "name it with `--base`" in text and "is fetched" not in text
