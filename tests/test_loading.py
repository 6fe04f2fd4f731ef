"""Where a base may lie: in shards, and on the Hub, which a server on this machine plays."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.families import flux2
from tests.conftest import REPOSITORY

COMMIT = "c0ffee" + 34 * "0"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CLIENT = """
import json, sys, torch
from asymflow_ft.families import family_of

answers = []
for base, revision, parts in json.loads(sys.argv[1]):
    try:
        family = family_of(base, revision)
        layers = family.transformer_on_meta(base, revision).config.num_layers
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


class HubRequest(BaseHTTPRequestHandler):
    """The part of the Hub's interface that loading uses. The repositories user/pictures, user/text and user/locked
    hold the tiny base on a branch v1; the last refuses the VAE's weights, and user/gated refuses everything."""

    server: "Hub"
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        status, headers, content = self.found()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def found(self) -> tuple[int, dict[str, str], bytes]:
        files = self.server.files
        path = self.path.partition("?")[0].removeprefix("/api/models").removeprefix("/")
        owner, repo, kind, revision, name = [*path.split("/", 4), "", "", "", ""][:5]
        if repo == "gated":
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access to user/gated."}, b""
        if repo not in ("pictures", "text", "locked"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in ("v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if kind == "revision":
            listed = [{"rfilename": file} for file in files]
            return 200, {}, json.dumps({"id": f"{owner}/{repo}", "sha": COMMIT, "siblings": listed}).encode()
        if kind == "tree":
            listed = [{"type": "file", "path": file, "size": len(files[file]), "oid": COMMIT} for file in files]
            return 200, {}, json.dumps(listed).encode()
        if repo == "locked" and name.endswith("vae/diffusion_pytorch_model.safetensors"):
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Log in to read the weights."}, b""
        if self.command == "GET":
            self.server.fetched.append((repo, name))
        content = files[name]
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content

    def log_message(self, *arguments: object) -> None:
        pass


class Hub(ThreadingHTTPServer):
    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), HubRequest)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.fetched: list[tuple[str, str]] = []


@pytest.fixture(scope="module")
def loaded(tiny_base, tmp_path_factory):
    """(answer to each request, files fetched from each repository).

    All requests go through one other process: huggingface_hub reads its environment when it is imported.
    """
    with Hub(Path(tiny_base)) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        home = tmp_path_factory.mktemp("huggingface")
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}
        command = [sys.executable, "-c", CLIENT, json.dumps(list(ASKED.values()))]
        done = subprocess.run(command, env=env, cwd=REPOSITORY, text=True, capture_output=True, timeout=300)
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    answers = dict(zip(ASKED, json.loads(done.stdout.splitlines()[-1]), strict=True))
    return answers, {repo: [name for where, name in hub.fetched if where == repo] for repo, _ in hub.fetched}


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
