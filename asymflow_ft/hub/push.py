"""Pushing an exported folder to the Hugging Face Hub: what goes, whether it may, and sending it."""

import glob
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from asymflow_ft.families.terms import MODEL_TERMS, NOTICES
from asymflow_ft.hub.cards import FIELDS, matching, model_terms
from asymflow_ft.hub.model_card import gating, model_card
from asymflow_ft.hub.provenance import FILE, read_provenance, without_folders

PARTS = (
    "transformer", "subspace", "codec", "scheduler", "adapter", "text_encoder", "text_encoder_2", "text_encoder_3",
    "tokenizer", "tokenizer_2", "tokenizer_3",
)  # fmt: skip
ROOT_FILES = ("README.md", "NOTICE", "NOTICE.md", "NOTICE.txt", FILE, "model_index.json", "config.json")
PART_SUFFIXES = (".json", ".safetensors", ".txt", ".jinja", ".model")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
TEXTS = (".json", ".md", ".txt", ".py", ".jinja")
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
HUB_FILE = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/blob/([^/]+)/(.+)")


@dataclass(frozen=True)
class Plan:
    """What a push would do. Nothing is written or sent yet."""

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]  # path in the repository -> bytes
    texts: dict[str, str]  # files that the push writes into the folder first
    licence_copy: tuple[str, str, str] | None  # repository, revision and file that LICENSE.md is fetched from
    gated: bool  # the Hub asks readers to accept the licence
    left_out: tuple[str, ...]  # files of the folder that are not pushed
    problems: tuple[str, ...]  # why a public push is refused; a private one only warns


def plan_push(folder: str | Path, repo: str, private: bool) -> Plan:
    """Look at an exported folder. Reads the folder alone.

    Raises:
        ValueError: not an export, a malformed repository name, a file that must not be pushed, or a README.md that
            cannot be read.
    """
    folder = Path(folder)
    _check_name(repo)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one that `asymflow-ft export` wrote")
    provenance = read_provenance(folder)
    files, left_out = _files(folder, provenance["form"])
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{folder} holds no weights (*.safetensors); export again")
    base, licence = provenance["base"], provenance.get("licence") or {}
    texts = {}
    if "README.md" in files:
        card = _front_matter(folder / "README.md")
        stated = {field: str(card[field]) for field in FIELDS if card.get(field)}
    else:
        notice = " ".join(matching(licence, NOTICES))
        assets = frozenset(name.partition("/")[2] for name in files if name.startswith("assets/"))
        terms = model_terms(without_folders(base), licence, MODEL_TERMS)
        texts["README.md"] = model_card(provenance, repo, assets, terms, notice)
        card, stated = (gating(licence) if notice else {}), licence
    special = licence.get("license") == "other" or matching(licence, NOTICES)
    strict = licence if special or not stated else stated
    notices = matching(strict, NOTICES)
    if notices and not any(name.startswith("NOTICE") for name in files):
        texts["NOTICE"] = "\n\n".join([*notices, *matching(strict, MODEL_TERMS)]) + "\n"
    licence_copy = None
    if strict.get("license") == "other" and not any(name.startswith("LICENSE") for name in files):
        if match := HUB_FILE.fullmatch(strict.get("license_link", "")):
            licence_copy = match[1], match[2], match[3]
    problems = _problems(base, strict, stated, card, bool(notices), licence_copy is not None, files)
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    return Plan(
        folder, repo, private, dict(sorted({**files, **sizes}.items())), texts, licence_copy, bool(notices),
        tuple(left_out), tuple(problems),
    )  # fmt: skip


def describe_plan(plan: Plan) -> str:
    """The files with their sizes, what is written first, and the card if the push renders it."""
    new = dict.fromkeys(plan.texts, " (written by the push)")
    lines = [f"{size:>16,}  {name}{new.get(name, '')}" for name, size in plan.files.items()]
    if plan.licence_copy:
        lines.append(f"{'?':>16}  LICENSE.md (fetched from {plan.licence_copy[0]})")
    visibility = "private" if plan.private else "public, access on accepting the licence" if plan.gated else "public"
    lines.append(f"{sum(plan.files.values()):>16,}  bytes in {len(plan.files)} files, to {plan.repo} ({visibility})")
    lines += [f"not pushed: {name}" for name in plan.left_out]
    if "README.md" in plan.texts:
        lines += ["README.md will be:", "", plan.texts["README.md"]]
    else:
        lines.append("README.md is the folder's own; without it the push would write one")
    return "\n".join(lines)


def refusal(plan: Plan) -> str | None:
    """Why this push may not be public, or None. A private push gives what it says as a warning."""
    if not plan.problems:
        return None
    listed = "".join(f"\n- {problem}" for problem in plan.problems)
    return f"{plan.repo} may not be public yet:{listed}"


def push(plan: Plan, say: Callable[[str], None]) -> str:
    """Write what is missing into the folder, create the repository and send the files. Returns the commit's address.

    Raises:
        ValueError: the push is refused, or the Hub cannot be reached, refuses it, or breaks off.
    """
    if reason := refusal(plan):
        if not plan.private:
            raise ValueError(f"{reason}\n`--private` pushes without these.")
        say(f"warning: {reason}")
    with _hub_errors(plan.repo):
        api = HfApi()
        api.whoami()  # a wrong token ends here, before anything is written
    names = [*plan.files]
    if plan.licence_copy and _fetch_licence(plan, say):
        names.append("LICENSE.md")
    for name, text in plan.texts.items():
        (plan.folder / name).write_text(text, encoding="utf-8")
        say(f"wrote {plan.folder / name}")
    with _hub_errors(plan.repo):
        api.create_repo(plan.repo, private=plan.private, exist_ok=True)
        info = api.model_info(plan.repo)
        if plan.private and not info.private:
            raise ValueError(
                f"{plan.repo} exists and is public, which --private does not change; make it private in its settings "
                "on the Hub, or choose another --repo"
            )
        if plan.gated and not info.private and not info.gated:  # before the first file can be read
            api.update_repo_settings(plan.repo, gated="auto")
        if old := sorted({file.rfilename for file in info.siblings or []} - {*names, ".gitattributes"}):
            say(f"{plan.repo} keeps {len(old)} files that this folder does not have, such as {old[0]}")
        commit = api.upload_folder(
            repo_id=plan.repo, folder_path=plan.folder, allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload with asymflow-ft push",
        )  # fmt: skip
    return commit.commit_url


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
        malformed = repo.count("/") != 1
    except HFValidationError:
        malformed = True
    if malformed:
        raise ValueError(f"--repo {repo!r} is no repository name; write it as user/name, such as jane/pixels")


def _files(folder: Path, form: str) -> tuple[dict[str, int], list[str]]:
    """Bytes of the files that an export writes, by path in the repository, and the paths of all others."""
    files, left_out = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(".cache/"):  # huggingface_hub's own
            continue
        if path.suffix in PICKLES:
            raise ValueError(f"{path} may hold a pickle, which can run code when it is loaded; remove it to push")
        if not _is_known(name, form):
            left_out.append(name)
            continue
        if path.suffix in TEXTS and TOKEN.search(path.read_bytes()):
            raise ValueError(f"{path} holds what looks like a Hugging Face token; remove the token to push")
        files[name] = path.stat().st_size
    return files, left_out


def _is_known(name: str, form: str) -> bool:
    folder, _, file = name.rpartition("/")
    if file.endswith(".py"):
        return form == "pipeline" and folder in ("", *PARTS)
    if folder == "":
        weights = file.endswith((".safetensors", ".safetensors.index.json"))
        return file in ROOT_FILES or file.startswith("LICENSE") or weights
    return (folder in PARTS and file.endswith(PART_SUFFIXES)) or (folder == "assets" and file.endswith(PICTURES))


def _front_matter(file: Path) -> dict[str, Any]:
    try:
        return ModelCard(file.read_text(encoding="utf-8")).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the front matter of {file} cannot be read: {reason}; mend or remove the file") from error


def _problems(
    base: str, strict: dict[str, str], stated: dict[str, str], card: dict[str, Any], restricted: bool,
    can_fetch: bool, files: dict[str, int],
) -> list[str]:  # fmt: skip
    """What is missing for a public push.

    Args:
        strict: the licence to keep: the base's if it is no common one, else the card's. stated: what README.md will
            state. card: its front matter. restricted: the licence is one of NOTICES.
    """
    if not strict.get("license"):
        return [
            f"the licence of the base {base} is unknown: look at its card, then set `license` in the front matter of "
            f'README.md, or "licence": {{"license": ...}} in {FILE} to have it written'
        ]
    problems = []
    name = strict.get("license_name", strict["license"])
    if strict["license"] == "other" and not can_fetch and not any(file.startswith("LICENSE") for file in files):
        problems.append(f"LICENSE.md is missing: put a copy of {name} of the base {base} there")
    if stated.get("license_name", stated.get("license")) != name:
        fields = ", ".join(f"`{field}: {value}`" for field, value in strict.items())
        problems.append(f"README.md does not state the base's licence: set {fields} in its front matter")
    if restricted and not (card.get("extra_gated_prompt") and card.get("extra_gated_fields")):
        fields = yaml.safe_dump(gating(strict), sort_keys=False, width=1000).strip().replace("\n", "\n    ")
        problems.append(f"README.md does not ask readers to accept {name}: add to its front matter\n    {fields}")
    return problems


def _fetch_licence(plan: Plan, say: Callable[[str], None]) -> bool:
    """Copy the base's licence into the folder; a private push goes on without."""
    assert plan.licence_copy
    repo, revision, name = plan.licence_copy
    target = plan.folder / "LICENSE.md"
    try:
        shutil.copyfile(hf_hub_download(repo, name, revision=revision), target)
    except (OSError, HTTPError) as error:
        reason = f"{name} of {repo} cannot be fetched ({' '.join(str(error).split())}); put a copy there as {target}"
        if not plan.private:
            raise ValueError(
                f"{plan.repo} may not be public without a copy of the base's licence: {reason}"
            ) from error
        say(f"warning: {reason}")
        return False
    say(f"wrote {target}, from {repo}")
    return True


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What the Hub or the connection to it does wrong is a ValueError that says what to change."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE is set; unset it to push") from error
    except (HTTPError, RuntimeError, ConnectionError) as error:  # an upload's thread wraps the cause in a RuntimeError
        cause: BaseException = error
        while cause.__cause__ and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        reason = " ".join(str(cause).split())
        if status == 401:
            message = "the Hub does not accept the token; run `hf auth login` with a valid one, or set HF_TOKEN"
        elif status == 403:
            message = (
                f"this token may not write to {repo}; use one with write access, and a user or organisation of yours"
            )
        elif status is not None and status < 500:
            message = f"the Hub refused {repo}"
        else:
            message = "the connection to the Hub broke; the same command goes on, without what has arrived"
        raise ValueError(f"{message} ({reason})") from error
