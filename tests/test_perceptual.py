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
from asymflow_ft.training.perceptual import image_by_image, load_lpips, load_perceptual
from asymflow_ft.training.rehearsal import Meter, VggMap
from tests.conftest import REPOSITORY

SCRIPT = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from asymflow_ft.training.perceptual import load_lpips

torch.manual_seed(0)
distance = load_lpips("cpu", random_vgg=True)
image = torch.rand(2, 3, 64, 64, requires_grad=True)
other = torch.rand(2, 3, 64, 64)
value = distance(2 * image - 1, 2 * other - 1)
assert value.shape == (2, 1, 64, 64) and torch.isfinite(value).all() and value.mean() > 0, value
assert distance(other, other).abs().max() == 0
import lpips
torch.manual_seed(0)
network = lpips.LPIPS(net="vgg", spatial=True, pnet_rand=True, verbose=False).eval()  # channels come first here
torch.testing.assert_close(value, network(2 * image - 1, 2 * other - 1), rtol=1e-4, atol=1e-6)
value.mean().backward()
assert image.grad.abs().sum() > 0
print("lpips ran")
"""


def test_missing_package_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"pip install 'asymflow-ft\[lpips\]'.*loss.perceptual=none"):
        load_lpips("cpu")


def test_image_by_image_a_batch_takes_the_memory_of_one():
    network, weight = VggMap(), torch.rand(3, 1, 32, 32)
    target = torch.rand(3, 3, 32, 32)

    def measured(distance, count):
        image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))[:count].requires_grad_()
        with Meter(network.parameters()) as meter:
            between = distance(image, target[:count])
            (between * weight[:count]).sum().backward()
        return between, image.grad, meter.peak

    one, other = measured(network, 3), measured(image_by_image(network), 3)
    torch.testing.assert_close(other[:2], one[:2], rtol=1e-4, atol=1e-6)
    alone = measured(image_by_image(network), 1)
    assert alone[2] == measured(network, 1)[2] and other[2] < 1.1 * alone[2] < 0.5 * one[2]


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
