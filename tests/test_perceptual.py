"""LPIPS: the message without the package, and the real package's code path with a random VGG.

The package imports torchvision, which has no CPU build that fits a CPU torch; so the second test installs both into a
folder of its own and runs a process in which torchvision's two missing operators are declared first.
"""

import os
import subprocess
import sys

import pytest
import torch

from asymflow_ft.recipe import load_recipe
from asymflow_ft.training.perceptual import load_lpips, load_perceptual
from tests.conftest import REPOSITORY

SCRIPT = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from asymflow_ft.training.perceptual import load_lpips

distance = load_lpips("cpu", random_vgg=True)
image = torch.rand(2, 3, 64, 64, requires_grad=True)
other = torch.rand(2, 3, 64, 64)
value = distance(2 * image - 1, 2 * other - 1)
assert value.shape == (2, 1, 64, 64) and torch.isfinite(value).all() and value.mean() > 0, value
assert distance(other, other).abs().max() == 0
value.mean().backward()
assert image.grad.abs().sum() > 0
print("lpips ran")
"""


def test_missing_package_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"pip install 'asymflow-ft\[lpips\]'.*loss.perceptual=none"):
        load_lpips("cpu")


@pytest.mark.slow
def test_the_real_package_gives_a_map_and_gradients(tmp_path):
    packages = ["lpips==0.1.4", "torchvision==0.28.0", "scipy", "tqdm"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), *packages], check=True
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "lpips ran" in done.stdout, done.stderr


def test_a_network_of_the_users_own_takes_the_place_of_lpips(tmp_path):
    file = tmp_path / "networks.py"
    file.write_text(
        "def squared(device):\n"
        "    assert device == 'cpu'\n"
        "    return lambda image, target: (image - target).square().mean(1, keepdim=True)\n"
        "def number(device):\n"
        "    return lambda image, target: (image - target).square().mean((1, 2, 3))\n"
    )
    distance = load_perceptual(f"{file}:squared", "cpu")
    a, b = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert torch.equal(distance(a, b), (a - b).square().mean(1, keepdim=True))
    assert load_perceptual("none", "cpu") is None
    for name, message in (
        (f"{tmp_path}/other.py:squared", "there is no file"),
        (f"{file}:cubed", "has no function cubed"),
        (f"{file}:number", r"gives the shape \(2,\) .* it must be a distance map"),
        ("no_such_package_at_all:f", "does not import"),
        (":f", "names no function"),
    ):
        with pytest.raises(ValueError, match=message):
            load_perceptual(name, "cpu")
    with pytest.raises(ValueError, match="it must be lpips, none, or file"):
        load_recipe(REPOSITORY / "recipes/tiny/finetune.yaml", ["loss.perceptual=vgg"])
