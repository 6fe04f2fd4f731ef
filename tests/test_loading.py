"""Where a base may lie: in shards, and on the Hub, which a server on this machine plays."""

from pathlib import Path

import pytest
import torch

from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.families import flux2
from tests.hub_server import Hub, Repo, files_of

COMMIT = "c0ffee" + 34 * "0"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CLIENT = """
import json, sys, torch
from asymflow_ft.families import family_of
from asymflow_ft.families.base import transformer_on_meta

answers = []
for base, revision, parts in json.loads(sys.argv[1]):
    try:
        family = family_of(base, revision)
        layers = transformer_on_meta(family, base, revision).config.num_layers
        pipeline = family.load_parts(base, tuple(parts), torch.float32, revision)
        loaded = [name for name, part in pipeline.components.items() if part is not None]
        answers.append([family.__name__, layers, sorted(loaded)])
    except ValueError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""
ASKED = {
    "pictures": ("user/pictures", "v1", ["vae", "scheduler"]),
    "text": ("user/text", "v1", ["text_encoder", "tokenizer"]),
    "gated": ("user/gated", None, ["vae"]),
    "no weights": ("user/locked", "v1", ["vae"]),
    "unknown": ("user/unknown", None, ["vae"]),
    "revision": ("user/text", "v2", ["vae"]),
    "name": ("../x/y", None, ["vae"]),
}


@pytest.fixture(scope="module")
def loaded(tiny_base, tmp_path_factory):
    """(answer to each request, files fetched from each repository).

    All requests go through one other process: huggingface_hub reads its environment when it is imported.
    """
    files = files_of(Path(tiny_base))
    with Hub().running() as hub:
        for name, refused, refusal in (
            ("pictures", None, (403, "")),
            ("text", None, (403, "")),
            ("locked", "vae/diffusion_pytorch_model.safetensors", (401, "Log in to read the weights.")),
            ("gated", "", (403, "Ask for access to user/gated.")),
        ):
            hub.repos[f"user/{name}"] = Repo(refused=refused, refusal=refusal)
            hub.repos[f"user/{name}"].commit(files, "v1", COMMIT)
        answers = hub.client(CLIENT, list(ASKED.values()), tmp_path_factory.mktemp("huggingface"))
    fetched = {repo: [name for where, name in hub.fetched if where == f"user/{repo}"] for repo in ("pictures", "text")}
    return dict(zip(ASKED, answers, strict=True)), fetched


def test_only_the_parts_asked_for_are_downloaded(loaded):
    answers, fetched = loaded
    assert answers["pictures"] == ["asymflow_ft.families.flux2", 2, ["scheduler", "vae"]]
    assert sorted(fetched["pictures"]) == [
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert answers["text"] == ["asymflow_ft.families.flux2", 2, ["scheduler", "text_encoder", "tokenizer"]]
    assert "text_encoder/model.safetensors" in fetched["text"] and "tokenizer/tokenizer.json" in fetched["text"]
    assert not any(name.startswith("vae/") or name == WEIGHTS for name in fetched["text"])


@pytest.mark.parametrize(
    ("case", "base", "reasons"),
    [
        ("gated", "user/gated", ["Ask for access to user/gated", "an accepted licence"]),
        ("no weights", "user/locked", ["Log in to read the weights"]),
        ("unknown", "user/unknown", ["Repository Not Found", "Check the spelling"]),
        ("revision", "user/text", ["Revision Not Found", "v2"]),
        ("name", "../x/y", ["Repo id must"]),
    ],
)
def test_what_the_hub_refuses_is_one_clear_message(case, base, reasons, loaded):
    message = loaded[0][case]
    assert f"cannot open '{base}': it is no local folder, and the Hugging Face Hub answered" in message
    assert all(reason in message for reason in reasons) and "\n" not in message


@torch.no_grad()
def test_a_base_in_shards_is_the_same_base(tiny_base, tmp_path):
    parts = flux2.load_parts(tiny_base, ("vae", "text_encoder", "tokenizer", "transformer"), torch.float32)
    parts.save_pretrained(tmp_path, max_shard_size="2MB")
    for part in ("transformer", "text_encoder"):
        assert len(list((tmp_path / part).glob("*-of-*.safetensors"))) > 2
    basis = torch.linalg.qr(torch.randn(768, 128, generator=torch.Generator().manual_seed(0))).Q
    subspace = PixelSubspace.from_fit(basis, torch.tensor(2.4))
    sharded = flux2.load_parts(str(tmp_path), ("text_encoder", "transformer"), torch.float32)
    for one, other in (
        (parts.text_encoder, sharded.text_encoder),
        (parts.transformer, sharded.transformer),
        (flux2.lift(parts.transformer, subspace), flux2.lift(sharded.transformer, subspace)),
    ):
        expected, state = one.state_dict(), other.state_dict()
        assert expected.keys() == state.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
