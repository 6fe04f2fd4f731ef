"""asymflow_ft.json, which an export carries: what it is, where it comes from and how it was made."""

import json
from pathlib import Path
from typing import Any

FILE = "asymflow_ft.json"


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """The provenance of an exported folder.

    Raises:
        ValueError: the folder has none, or it is damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ValueError(f"{folder} is not an export: it has no {FILE}; make one with `asymflow-ft export`")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; export again") from error
