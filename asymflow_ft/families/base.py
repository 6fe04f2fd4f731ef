"""What every base family shares: reading a saved pipeline's index, and building the lifted network."""

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor


def load_index(base: str, revision: str | None = None) -> dict[str, Any]:
    """model_index.json of a diffusers folder or Hub repository.

    Raises:
        ValueError: there is no such folder or repository, or it is not a diffusers pipeline.
    """
    if Path(base).exists() and not (Path(base) / "model_index.json").is_file():
        raise ValueError(f"{base} is not a diffusers pipeline folder: it has no model_index.json")
    try:
        return dict(DiffusionPipeline.load_config(base, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot open the base {base!r}: it is no local folder, and the Hugging Face Hub answered: {reason} "
            "Check the spelling; gated models need `hf auth login` and an accepted licence."
        ) from error


def build_lifted(transformer: ModelMixin, changes: dict[str, Any], state: dict[str, Tensor]) -> ModelMixin:
    """The same diffusers class with some config fields changed, holding `state` without a copy."""
    config = {key: value for key, value in transformer.config.items() if key != "_use_default_values"}
    with init_empty_weights():  # with that key, diffusers would put defaults in the place of our changes
        lifted = type(transformer).from_config(config | changes)
    lifted.load_state_dict(state, assign=True)
    return lifted.eval()
