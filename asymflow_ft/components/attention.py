"""The attention backend that diffusers' environment variable asks for."""

import os
from functools import cache

from diffusers import ModelMixin
from huggingface_hub.errors import HTTPError

VARIABLE = "DIFFUSERS_ATTN_BACKEND"


@cache
def prepare_attention() -> None:
    """Look whether the backend in DIFFUSERS_ATTN_BACKEND can be used, and fetch its kernel where that is on the Hub.
    diffusers does neither for the variable, only for `set_attention_backend`, and then fails inside the first step.

    Raises:
        ValueError: its package is missing or too old, or its kernel cannot be fetched.
    """
    name = os.environ.get(VARIABLE)
    if name is None:
        return
    try:
        ModelMixin().set_attention_backend(name)  # of no layer, and so for all networks
    except (ValueError, RuntimeError, ImportError, OSError, HTTPError) as error:
        raise ValueError(
            f"{VARIABLE}={name} cannot be used: {error} Without the variable torch chooses the kernel"
        ) from error
