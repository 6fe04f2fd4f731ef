"""A small Hugging Face Hub on this machine: what huggingface_hub asks for in downloads and uploads.

It keeps the Hub's habits that clients depend on: large files travel by Git LFS before a commit names them, identical
ones are not sent twice, and every revision resolves to a commit. It does not offer Xet.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.conftest import REPOSITORY

Answer = tuple[int, dict[str, str], bytes]
OWNER = re.compile(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?")


@dataclass
class Repo:
    """One model repository. `refused`: start of the paths that `refusal` is answered for."""

    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files
    private: bool = False
    gated: str | bool = False
    refused: str | None = None
    refusal: tuple[int, str] = (403, "")

    def commit(self, files: dict[str, bytes], branch: str = "main", name: str | None = None) -> str:
        name = name or hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


class Hub(ThreadingHTTPServer):
    """Serves on a free port until `running` ends. The client must have HF_ENDPOINT, see `environment`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, str] = {}  # token -> user
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.breaks: dict[str, int] = {}  # SHA-256 -> how many more of its uploads the connection breaks in
        self.log: list[tuple[str | None, str, str]] = []  # token, method, path of every request
        self.fetched: list[tuple[str, str]] = []  # repository and path of every downloaded file
        self.received: list[str] = []  # SHA-256 of every large file that arrived whole

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        with self:
            threading.Thread(target=self.serve_forever, daemon=True).start()
            yield self
            self.shutdown()

    def environment(self, home: Path) -> dict[str, str]:
        """For a client process: huggingface_hub reads its environment when it is imported."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        return env | {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def client(self, program: str, argument: object, home: Path) -> object:
        """What a Python program prints as JSON in its last line; it runs in a process of its own."""
        command = [sys.executable, "-c", program, json.dumps(argument)]
        done = subprocess.run(
            command, env=self.environment(home), cwd=REPOSITORY, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def handle_error(self, request: object, client_address: object) -> None:
        kind = sys.exc_info()[0]
        if kind is None or not issubclass(kind, ConnectionError):
            super().handle_error(request, client_address)


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file of a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".png"))


def blob_id(name: str, content: bytes) -> str:
    """SHA-256 of a large file, git's own id of any other."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = unquote(self.path.partition("?")[0])
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.server.log.append((token, self.command, path))
        oid = path.removeprefix("/lfs/")
        if self.command == "PUT" and self.server.breaks.get(oid, 0) > 0:
            self.server.breaks[oid] -= 1
            self.rfile.read(1 << 16)
            self.close_connection = True
            self.connection.close()
            return
        status, headers, content = self.answer(path, token, self.body())
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, path: str, token: str | None, body: bytes) -> Answer:
        hub = self.server
        if path.startswith("/lfs/"):  # the real Hub signs these addresses instead of reading the token
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                return _error(400, "BadDigest", "The content is not what its name says.")
            hub.objects[oid] = body
            hub.received.append(oid)
            return 200, {}, b""
        if token is not None and token not in hub.users:
            return _error(401, "", "Invalid credentials in Authorization header")
        user = hub.users.get(token or "")
        if path == "/api/whoami-v2":
            return _json({"type": "user", "name": user, "orgs": []}) if user else _error(401, "", "Log in.")
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(user, json.loads(body))
        match = OWNER.fullmatch(path)
        name, action = (match[1], match[2] or "") if match else ("", "")
        repo = hub.repos.get(name)
        if repo is None or (repo.private and user != name.partition("/")[0]):
            return _error(404, "RepoNotFound", "")
        if self.command in ("POST", "PUT"):
            if user != name.partition("/")[0]:
                return _error(403, "", f"You may not write to {name}")
            return self.write(name, repo, action, body)
        return self.read(name, repo, action)

    def create(self, user: str | None, asked: dict) -> Answer:
        owner = asked["organization"] or user
        if user is None or owner != user:
            return _error(403, "", f"You may not create a model under {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.server.repos:
            return 409, {}, json.dumps({"error": "exists", "url": f"{self.server.address}/{name}"}).encode()
        repo = self.server.repos[name] = Repo(private=asked.get("private") or asked.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return _json({"url": f"{self.server.address}/{name}", "name": name})

    def write(self, name: str, repo: Repo, action: str, body: bytes) -> Answer:
        objects = self.server.objects
        kind, _, branch = action.partition("/")
        if kind == "settings":
            settings = json.loads(body)
            repo.gated = settings.get("gated", repo.gated)
            return _json(settings)
        if kind == "preupload":
            files = repo.commits[repo.branches[branch]]
            asked = [file["path"] for file in json.loads(body)["files"]]
            return _json({"files": [
                {"path": file, "uploadMode": "lfs" if is_large(file) else "regular", "shouldIgnore": False,
                 "oid": blob_id(file, files[file]) if file in files else None} for file in asked
            ]})  # fmt: skip
        if action == "info/lfs/objects/batch":
            wanted = [{"oid": file["oid"], "size": file["size"]} for file in json.loads(body)["objects"]]
            for file in wanted:
                if file["oid"] not in objects:
                    file["actions"] = {"upload": {"href": f"{self.server.address}/lfs/{file['oid']}"}}
            return _json({"transfer": "basic", "objects": wanted})
        if kind == "commit":
            files = dict(repo.commits[repo.branches[branch]])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in objects:
                        return _error(400, "", f"{value['path']} was not uploaded")
                    files[value["path"]] = objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            commit = repo.commit(files, branch)
            return _json(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{name}/commit/{commit}"}
            )
        return _error(404, "", f"no such address: {self.path}")

    def read(self, name: str, repo: Repo, action: str) -> Answer:
        kind, _, rest = action.partition("/")
        revision, _, path = rest.partition("/")
        if kind == "resolve" and repo.refused is not None and path.startswith(repo.refused):
            return _error(repo.refusal[0], "GatedRepo", repo.refusal[1])
        revision = revision or "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return _error(404, "RevisionNotFound", "")
        files = repo.commits[commit]
        if kind in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            return _json(
                {"id": name, "sha": commit, "private": repo.private, "gated": repo.gated, "siblings": siblings}
            )
        if kind == "tree":
            return _json([_entry(file, content) for file, content in files.items()])
        if kind == "resolve" and path in files:
            if self.command == "GET":
                self.server.fetched.append((name, path))
            return 200, {"ETag": f'"{blob_id(path, files[path])}"', "X-Repo-Commit": commit}, files[path]
        return _error(404, "EntryNotFound", "")

    def log_message(self, *arguments: object) -> None:
        pass


def _entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if is_large(name):
        entry["lfs"] = {"oid": blob_id(name, content), "size": len(content), "pointerSize": 130}
    return entry


def _json(value: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str, message: str) -> Answer:
    headers = {"X-Error-Message": message, "Content-Type": "application/json"} | (
        {"X-Error-Code": code} if code else {}
    )
    return status, headers, json.dumps({"error": message}).encode()
