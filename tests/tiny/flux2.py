"""FLUX.2 klein: the shipped tiny base."""

import shutil
from pathlib import Path

from tests.conftest import REPOSITORY


def build(folder: Path) -> None:
    shutil.copytree(REPOSITORY / "recipes/tiny/base", folder)


def round_trip(vae, rgb):
    """What the VAE itself makes of images."""
    return vae.decode(vae.encode(rgb).latent_dist.mode()).sample
