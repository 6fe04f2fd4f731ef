"""What a base's card says, and the card of a data set drawn by it."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, ModelCard, hf_hub_download
from huggingface_hub.errors import HTTPError

from asymflow_ft.families.base import opening

FIELDS = ("license", "license_name", "license_link")


def card_licence(base: str, revision: str | None = None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a base's README.md, those that it states; {} without a card, or
    without an answer of the Hub.

    A link to a file of a Hub repository becomes a full address.

    Args:
        base: a folder, a file in one, or a Hub id.
    """
    path = Path(base)
    local = path.exists()
    try:
        card = (
            hf_hub_download(base, "README.md", revision=revision)
            if not local
            else ((path if path.is_dir() else path.parent) / "README.md")
        )
        stated = ModelCard(Path(card).read_text(encoding="utf-8")).data.to_dict()
    except (OSError, HTTPError, ValueError, yaml.YAMLError):
        return {}
    licence = {field: str(stated[field]) for field in FIELDS if stated.get(field)}
    link = licence.get("license_link")
    if link and not local and "://" not in link:
        licence["license_link"] = f"https://huggingface.co/{base}/blob/{revision or 'main'}/{link}"
    return licence


def licence_terms(base: str, licence: dict[str, str], consequences: dict[str, str]) -> str:
    """What to tell those who use a base's pictures.

    Args:
        licence: see card_licence. consequences: families.terms.OUTPUT_TERMS.
    """
    if not licence:
        return (
            f"Licence of the base {base}: unknown, its card could not be read or names none. Look at the card before "
            "you use the pictures: the base's licence decides what they may be used for."
        )
    return " ".join(
        [
            f"Licence of the base {base}: {_named(licence)}. It decides what the pictures may be used for.",
            *matching(licence, consequences),
        ]
    )


def model_terms(base: str, licence: dict[str, str], consequences: dict[str, str]) -> str:
    """What to tell those who use a model made from a base.

    Args:
        licence: see card_licence. consequences: families.terms.MODEL_TERMS.
    """
    if not licence:
        return (
            f"Licence of the base {base}: unknown, its card could not be read or names none. Look at the card before "
            "you use this model: the base's licence covers what is made from it."
        )
    return " ".join(
        [
            f"Licence of the base {base}: {_named(licence)}. It covers this model, which was made from the base.",
            *matching(licence, consequences),
        ]
    )


def matching(licence: dict[str, str], table: dict[str, str]) -> list[str]:
    """The entries of a family's table (part of a licence's name -> text) that concern a licence."""
    name = f"{licence.get('license', '')} {licence.get('license_name', '')}".lower()
    return [text for part, text in table.items() if part in name]


def _named(licence: dict[str, str]) -> str:
    name = licence.get("license_name") or licence.get("license") or "unnamed"
    return f"{name} ({licence['license_link']})" if "license_link" in licence else name


def hub_commit(base: str, revision: str | None = None) -> str | None:
    """The commit that a Hub revision (default: main) stands for; a local folder's `revision` is returned as it is.

    Raises:
        ValueError: the Hub does not answer, and no earlier answer is stored.
    """
    if Path(base).is_dir():
        return revision
    with opening(base):
        return Path(hf_hub_download(base, "model_index.json", revision=revision)).parent.name


def data_card(count: int, settings: dict[str, Any], licence: dict[str, str], terms: str) -> str:
    """README.md of a synthetic set of `count` pictures, with the front matter of a Hub data set.

    Args:
        settings: listed as they are. licence: the base's (see card_licence). terms: see licence_terms.
    """
    title = f"{count} pictures drawn by {settings['base']}"
    front = DatasetCardData(
        **licence, pretty_name=title, task_categories=["text-to-image"], tags=["synthetic", "asymflow"]
    )
    listed = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    return f"""---
{front.to_yaml()}
---

# {title}

Every picture was drawn by the latent base itself, from a caption and a seed, with `asymflow-ft synthesize`.

## Licence

{terms}

## Files

- `metadata.jsonl`: `file_name`, `text` (the prompt), `seed`, `latents` (the file with them), `sha256` of the picture.
- `images/`: each is the VAE's decoding, in float32, of the latents stored for it, rounded to 8 bits.
- `latents/`: whitened latent tokens (N, R), rows of the token grid one after another, in float16, by `file_name`.

## Settings

{listed}

## Train on it

```yaml
data:
  source: PATH/OF/THIS/FOLDER
  resolution: {settings["size"]}
```
"""
