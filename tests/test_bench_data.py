"""`asymflow-ft bench align` and `cache`, at their smallest; and the growth that they fit."""

import json
import re
import time
import weakref

import pytest
import torch
from PIL import Image

from asymflow_ft import cli
from asymflow_ft.bench import cache
from asymflow_ft.bench.architectures import NAMED, random_vae
from asymflow_ft.bench.clock import peak_memory
from asymflow_ft.bench.growth import fit_growth, sizes_up_to
from asymflow_ft.bench.workload import Options
from asymflow_ft.families import flux2

VAE = random_vae(NAMED["tiny"], torch.float32, "cpu")
VAE_BYTES = sum(tensor.nbytes for tensor in VAE.state_dict().values())
SIZES = (10, 100, 1000, 10_000)


def test_growth_of_known_laws():
    line = fit_growth({n: 3 + 0.5 * n for n in SIZES})
    assert (line.fixed, line.each) == pytest.approx((3, 0.5)) and 0.5 < line.exponent < 1
    square = fit_growth({n: 1e-4 * n**2 for n in SIZES})
    assert square.exponent == pytest.approx(2) and square.fixed == 0  # no line with a negative start
    assert line.fitted == pytest.approx(line.costs) and square.fitted == pytest.approx(square.costs)
    assert fit_growth(dict.fromkeys(SIZES, 2.0)).exponent == pytest.approx(0)
    assert fit_growth({n: 7.0 * n for n in SIZES}).each == pytest.approx(7)
    assert sizes_up_to(64, (8, 1, 2)) == [8, 32, 64] and sizes_up_to(2, (8, 4, 2, 1)) == [1, 2]


def run(what, out, *options):
    assert cli.main(["bench", what, "--arch", "tiny", "--repeats", "2", "--out", str(out), *options]) == 0
    assert Image.open(out / "chart.png").width > 500
    return json.loads((out / "bench.json").read_text())


def test_align_against_its_floor(tmp_path, capsys, monkeypatch):
    encode = flux2.encode_latents
    monkeypatch.setattr(flux2, "encode_latents", lambda *given: time.sleep(0.1) or encode(*given))
    found = run("align", tmp_path, "--images", "4", "--resolution", "64")
    assert found["images"] == 4 and found["tokens"] == 4 * 16 and found["growth"]["sizes"] == [1, 2, 4]
    seconds = {name: timing["median"] for name, timing in found["passes"].items()}
    assert found["align_over_decode_encode"] == seconds["align 4"] / seconds["decode + encode"]
    stages = {name: timing["median"] for name, timing in found["stages"].items()}
    assert list(stages) == ["decode", "resize", "VAE", "colour + patches", "Gram"] and min(stages.values()) > 0
    assert max(stages, key=stages.get) == "VAE"
    assert f"{found['align_over_decode_encode']:.3f} with 4 threads" in capsys.readouterr().out


def test_memory_of_aligning(tmp_path, capsys):
    few, more = (
        run("align", tmp_path / side, "--repeats", "1", "--images", images, "--resolution", side)["memory"]
        for images, side in (("8", "64"), ("16", "128"))
    )
    assert few["VAE weights"] == VAE_BYTES
    assert few["Gram sums"] == 8 * (768 * 768 + 128 * 768 + 128 * 128 + 768 + 128 + 1)
    assert few["solve"] > 3 * 8 * 768 * 768  # singular vectors and eigenvectors
    grown = {"pictures": 4 * few["pictures"], "report.png": 4 * few["report.png"]}
    assert more == pytest.approx(few | grown, rel=1e-3)  # with a picture's pixels; of more pictures none is kept
    held, picture, latents = [*VAE.parameters(), *VAE.buffers()], 3 * 64 * 64 * 4, 16 * 128 * 4
    with torch.no_grad():
        encoding = peak_memory(lambda: flux2.encode_latents(VAE, torch.zeros(1, 3, 64, 64)), held, VAE.device)
    assert few["pictures"] == encoding + picture + latents + 6 * (picture + latents)  # tokens, last z, examples
    assert re.search(r"\n  Gram sums +5\.64 MB\n", capsys.readouterr().out)


def test_cache_from_filling_to_waiting(tmp_path, capsys):
    found = run(
        "cache", tmp_path, "--images", "200", "--resolution", "64", "--perceptual", "none", "--rank", "2",
        "--precision", "no", "--checkpointing", "none",
    )  # fmt: skip
    # 16 tokens of 128 values in float16, and what a shard says about each
    assert 4096 < found["bytes_per_picture"] < 4096 + 200
    assert found["fill"]["fill"]["processor"] > found["fill"]["write"]["processor"]
    read = {name: timing["median"] for name, timing in found["read"].items()}
    assert list(read) == ["whole", "read + hash", "decode", "resize", "latents", "text"]
    for wait in found["wait"].values():
        assert wait["share"] == wait["wait"]["median"] / wait["step"]["median"] and 0 < wait["share"] < 1
    assert list(found["starts"]) == ["2", "20", "200"]
    assert found["growth"]["start"]["costs"][-1] < found["growth"]["first look"]["costs"][-1]
    assert "waits for data: " in capsys.readouterr().out


def test_the_smallest_cache_and_its_memory(tmp_path, capsys):
    """Its first size is one picture, and a run needs one to train on."""
    options = ["--images", "2", "--perceptual", "none", "--rank", "2", "--precision", "no", "--warmup", "0"]
    small, large = (run("cache", tmp_path / side, *options, "--resolution", side) for side in ("64", "128"))
    assert list(small["starts"]) == ["1", "2"]
    small, large, latents, picture = small["memory"], large["memory"], 16 * 128 * 4, 3 * 64 * 64 * 4
    assert small.pop("VAE weights") == large.pop("VAE weights") == VAE_BYTES
    assert small["latents of a shard"] == 256 * latents
    assert small["sample"] == 2 * picture  # in [0, 255], and divided
    assert small["encode"] > picture + latents
    assert large == {name: 4 * held for name, held in small.items()}
    assert "  latents of a shard " in capsys.readouterr().out


def test_a_network_is_gone_before_the_next_one_is_made(monkeypatch):
    """With its optimizer; a GPU may hold one alone."""
    networks, build, fill = [], cache.build_run, cache.filling

    def one_more(*arguments):
        assert not any(network() for network in networks)
        run = build(*arguments)
        networks.append(weakref.ref(run.network))
        return run

    def filling(*arguments):
        assert not any(network() for network in networks)
        return fill(*arguments)

    monkeypatch.setattr(cache, "build_run", one_more)
    monkeypatch.setattr(cache, "filling", filling)
    options = Options(resolution=64, precision="no", rank=2, perceptual="none", repeats=1, warmup=0, images=2)
    cache.bench_cache(NAMED["tiny"], options, torch.device("cpu"))
    assert len(networks) == 2


def test_sizes_that_cannot_be(capsys):
    for what in ("align", "cache"):
        assert cli.main(["bench", what, "--images", "1"]) == 1
        assert "--images is 1; growth is measured" in capsys.readouterr().err
