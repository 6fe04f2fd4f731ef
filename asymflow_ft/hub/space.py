"""The files of a Hugging Face Space that serves a converted model with `asymflow_ft.demo`."""

import platform

from huggingface_hub import SpaceCardData


def space_files(
    model: str, base: str | None, dtype: str | None, licence: dict[str, str], gradio: str, versions: dict[str, str]
) -> dict[str, str]:
    """README.md, requirements.txt and app.py.

    Args:
        model, base: Hub ids. dtype: see `asymflow_ft.demo.open_studio`. licence: of the model (see card_licence).
        gradio: its version, which a Space installs by itself. versions: of the other packages, by name.
    """
    name = model.rpartition("/")[2]
    front = SpaceCardData(
        title=name, sdk="gradio", sdk_version=gradio, python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py", models=[repo for repo in (model, base) if repo], tags=["asymflow"], **licence,
    )  # fmt: skip
    options = "".join(f", {key}={value!r}" for key, value in (("base", base), ("dtype", dtype)) if value)
    stated = licence.get("license_name") or licence.get("license") or "unknown, its card names none"
    page = f"""---
{front.to_yaml()}
---

# {name} in the browser

Draws with [{model}](https://huggingface.co/{model}). The page is `asymflow_ft.demo` of the package asymflow-ft, in the
version that requirements.txt names. Choose hardware whose memory holds the model; a private or gated model also needs
the secret `HF_TOKEN`.

Licence of the model: {stated}.
"""
    return {
        "README.md": page,
        # a build such as 2.13.0+cpu is not on PyPI
        "requirements.txt": "".join(f"{key}=={value.partition('+')[0]}\n" for key, value in versions.items()),
        "app.py": f"from asymflow_ft.demo import serve\n\nserve({model!r}{options})\n",
    }
