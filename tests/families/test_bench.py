"""Benchmarks take the configs of every family."""

import json

import pytest
import torch
from diffusers import ModularPipeline

from asymflow_ft.bench import targets
from asymflow_ft.bench.architectures import find_architecture
from asymflow_ft.bench.step import bench_step
from asymflow_ft.bench.workload import Options
from asymflow_ft.components.subspace import Cond
from asymflow_ft.families import z_image
from asymflow_ft.training.encode import encode_texts
from tests.tiny.z_image import build

SMALLEST = Options(resolution=64, precision="no", rank=2, perceptual="none", repeats=1, warmup=0)
CPU = torch.device("cpu")


def test_a_benchmark_takes_its_config(tiny):
    found = find_architecture(f"{tiny.folder}/transformer")
    assert found.family is tiny.family
    assert found.guidance is None or tiny.guidance() is not None
    (embedding,) = encode_texts(tiny.family, tiny.parts, ["a red apple " * found.max_length], found.max_length)
    assert found.text_length == len(embedding) == {"flux1": 513, "sd3": 334}.get(tiny.name, 512)


def test_a_training_step_of_it_is_timed(tiny):
    found = find_architecture(f"{tiny.folder}/transformer")
    figures = bench_step(found, SMALLEST, CPU)
    assert figures["step"]["median"] > 0 and figures["tokens"] == tiny.grid[0] * tiny.grid[1] + found.text_length


def test_targets_need_a_stock_pipeline_and_say_so_before_anything_is_measured(tiny, monkeypatch):
    class Measured(Exception):
        pass

    def measure(*_):
        raise Measured

    monkeypatch.setattr(targets, "planned", lambda *_: None)
    monkeypatch.setattr(targets, "bench_align", measure)
    modular = issubclass(next(iter(tiny.family.PIPELINES.values())), ModularPipeline)
    with pytest.raises(ValueError if modular else Measured, match="no stock pipeline" if modular else None):
        targets.bench_targets(find_architecture(f"{tiny.folder}/transformer"), SMALLEST, CPU)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "longest"), [(129, 96), (130, 128)])
def test_text_for_which_there_are_no_positions_is_refused_before_anything_is_measured(frames, longest, tmp_path):
    build(tmp_path)
    file = tmp_path / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"axes_lens": [frames, 4, 3]}))
    with pytest.raises(
        ValueError, match=rf"512 rows of text and 2x2 patches, more .* for: {longest} and 4x3 \(axes_le"
    ):
        find_architecture(str(file))
    network = z_image.TRANSFORMER.from_config(json.loads(file.read_text())).eval()

    def predict(rows, grid):
        cond = Cond(torch.ones(1, rows, 32))
        return z_image.predict(network, torch.zeros(1, grid[0] * grid[1], 64), torch.ones(1), cond, grid)

    predict(longest, (4, 3))
    for rows, grid in ((longest + 1, (4, 3)), (longest, (5, 3)), (longest, (4, 4))):
        with pytest.raises(ValueError, match=f"{rows} rows of text and {grid[0]}x{grid[1]} patches"):
            predict(rows, grid)
        with pytest.raises(IndexError):  # what the network says itself
            network([torch.zeros(16, 1, 2 * grid[0], 2 * grid[1])], torch.ones(1), [torch.ones(rows, 32)])
