"""Metrics of whole models: planted faults are found with the right sign, by the right metric and no other."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageFilter

from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.evaluation.distribution import kernel_distance, reference
from asymflow_ft.evaluation.features import open_features
from asymflow_ft.evaluation.metrics import METRICS, default_metrics, measure
from asymflow_ft.evaluation.observe import patches
from asymflow_ft.evaluation.retrieval import sharpness

AT = (48, 32)
PROMPTS, PER_PROMPT = 24, 2


def scene(seed):
    """Smooth colours with some detail, of a size of its own."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 6, generator=g)
    fine = torch.nn.functional.interpolate(coarse, (32, 48), mode="bicubic") + 0.08 * torch.randn(
        1, 3, 32, 48, generator=g
    )
    return Image.fromarray((fine[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy())


def grain(image, seed):
    noise = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 0.15
    rgb = ((rgb_tensor(image) + noise).clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(rgb.byte().permute(1, 2, 0).contiguous().numpy())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models that draw each prompt's reference: "exact" as it is, "blurred", with "grain", or another prompt's."""
    folder = tmp_path_factory.mktemp("pictures")
    references = [scene(p) for p in range(PROMPTS)]
    draw = {
        "exact": lambda p, k: references[p],
        "blurred": lambda p, k: references[p].filter(ImageFilter.GaussianBlur(0.8 + 0.1 * k)),
        "grainy": lambda p, k: grain(references[p], 100 * p + k),
        "wrong": lambda p, k: references[(p + 7) % PROMPTS],
    }
    pictures = {}
    for model, picture in draw.items():
        pictures[model] = [[folder / f"{model}-{p}-{k}.png" for k in range(PER_PROMPT)] for p in range(PROMPTS)]
        for p, row in enumerate(pictures[model]):
            for k, file in enumerate(row):
                picture(p, k).save(file)
    prompts = [SimpleNamespace(text=f"scene {p}", id=str(p), category="even" if p % 2 == 0 else "odd")
               for p in range(PROMPTS)]  # fmt: skip
    return SimpleNamespace(
        pictures=pictures, prompts=prompts, references=references, real=[scene(1000 + i) for i in range(70)]
    )


def run(world, models, names, **changes):
    arguments = {
        "pictures": {model: world.pictures.get(model, []) for model in models}, "prompts": world.prompts,
        "real": world.real,
        "references": world.references, "names": names, "features": open_features("pixels"), "at": AT, "seed": 0,
    }  # fmt: skip
    return measure(**arguments | changes)


def value(found, metric, model, category=None):
    (one,) = [v for v in found.values if (v.metric, v.model, v.category) == (metric, model, category)]
    return one


def verdicts(found, category=None):
    return {(d.metric, d.against): d.verdict for d in found.differences if d.category == category}


@pytest.fixture(scope="module")
def everything(world):
    return run(world, ["exact", "blurred", "grainy", "wrong"], default_metrics(True, True, "pixels"))


def test_default_metrics_are_those_that_can_run():
    assert default_metrics(False, False, None) == ["sharpness"]
    bands = ["sharpness", "spectrum_error", "low_band", "middle_band", "high_band"]
    assert default_metrics(True, False, None) == bands
    assert default_metrics(True, False, "pixels") == ["fid", "kid", "pfid", *bands]
    assert "clip" in default_metrics(False, False, "clip:some/model") and "lpips" not in default_metrics(
        True, True, ""
    )
    everything = default_metrics(True, True, "pixels")
    assert set(METRICS) - set(everything) == {"clip", "hpsv3", "hpsv2", "lpips"}


def test_every_model_has_every_metric_in_its_interval(everything):
    for metric in everything.metrics:
        for model in ("exact", "blurred", "grainy", "wrong"):
            one = value(everything, metric.key, model)
            assert one.low - 1e-9 <= one.value <= one.high + 1e-9, one
            assert one.count == PROMPTS * PER_PROMPT
    assert {(d.model, d.against) for d in everything.differences} == {
        ("exact", other) for other in ("blurred", "grainy", "wrong")
    }


def test_the_exact_model_is_equal_to_its_references(everything):
    expected = {"psnr": 100, "ssim": 1, "feature_distance": 0, "picture_error": 0, "retrieval_at_5": 1}
    for metric, number in expected.items():
        assert value(everything, metric, "exact").value == pytest.approx(number, abs=1e-4), metric


def test_verdicts_know_blur_grain_and_wrong_pictures(everything):
    said = verdicts(everything)
    for against in ("blurred", "grainy", "wrong"):
        for metric in ("psnr", "ssim", "feature_distance"):
            assert said[metric, against] == "better", (metric, against)
    for metric in ("sharpness", "spectrum_error", "high_band"):
        assert said[metric, "blurred"] == said[metric, "grainy"] == "better", metric
    assert said["pfid", "blurred"] == "better"
    assert value(everything, "high_band", "blurred").high < -3 < 1 < value(everything, "high_band", "grainy").low
    assert value(everything, "high_band", "real").value == pytest.approx(0, abs=1e-9)
    # the same pictures in another order: sets are equal, prompts are not
    for metric in ("fid", "kid", "pfid", "sharpness", "spectrum_error", "low_band", "middle_band", "high_band"):
        assert said[metric, "wrong"] == "no difference seen", metric
        assert value(everything, metric, "wrong").value == pytest.approx(value(everything, metric, "exact").value)
    assert said["retrieval_at_5", "wrong"] == "better" and said["retrieval_at_5", "blurred"] == "no difference seen"


def test_the_verdict_is_of_the_first_model(world):
    found = run(world, ["blurred", "exact"], ["psnr", "sharpness", "high_band", "picture_error"])
    assert set(verdicts(found).values()) == {"worse"}
    assert {d.metric: d.value < 0 for d in found.differences} == {
        "psnr": True,
        "sharpness": False,
        "high_band": False,
        "picture_error": False,
    }  # fmt: skip  (of the two in the middle, the difference is that of the distances to real)


def test_closer_compares_the_distances_to_real_on_both_sides(world):
    """Twice as far above as the other is below, and the reverse."""
    real = [grain(picture, i) if i % 4 else picture for i, picture in enumerate(world.references * 2)]
    found = run(world, ["exact", "grainy"], ["sharpness"], real=real)
    mild, strong, truth = (value(found, "sharpness", name).value for name in ("exact", "grainy", "real"))
    assert mild < truth < strong and truth - mild > strong - truth
    assert truth == pytest.approx(sharpness(real))
    assert verdicts(found) == {("sharpness", "grainy"): "worse"}


def test_psnr_and_ssim_by_their_formulas(everything, world):
    a, b = (
        rgb_tensor(Image.open(world.pictures["blurred"][0][0])) / 2 + 0.5,
        rgb_tensor(world.references[0]) / 2 + 0.5,
    )
    found = run(world, ["blurred"], ["psnr", "ssim"], pictures={"blurred": [[world.pictures["blurred"][0][0]]]},
                prompts=world.prompts[:1], references=world.references[:1])  # fmt: skip
    assert value(found, "psnr", "blurred").value == pytest.approx(-10 * math.log10((a - b).square().mean()), abs=1e-4)
    line = torch.exp(-0.5 * ((torch.arange(11.0) - 5) / 1.5) ** 2)
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
    pad = torch.nn.ReflectionPad2d(5)
    blur = lambda x: torch.nn.functional.conv2d(pad(x[:, None]), kernel)  # noqa: E731
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    index = ((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)) / (
        (mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)
    )
    assert value(found, "ssim", "blurred").value == pytest.approx(index.mean().item(), abs=1e-4)


def test_kid_is_of_the_features_of_all_pictures(everything, world):
    features = open_features("pixels")
    seen = torch.stack([
        torch.cat([features(rgb_tensor(Image.open(file))[None]) for file in row]) for row in world.pictures["grainy"]
    ])  # fmt: skip
    real = reference(features(torch.stack([rgb_tensor(picture) for picture in world.real])))
    expected = kernel_distance(seen, real, torch.full((1, PROMPTS), 1 / PROMPTS, dtype=torch.float64)).item()
    assert value(everything, "kid", "grainy").value == pytest.approx(expected, rel=1e-5)


def test_patches_are_in_the_middle_of_the_quarters_and_not_resized():
    picture = torch.arange(700 * 800.0).reshape(1, 1, 700, 800).expand(1, 3, 700, 800)
    cut = patches(picture)
    assert cut.shape == (1, 4, 3, 299, 299)
    torch.testing.assert_close(cut[0, 3, 0], picture[0, 0, 525 - 149 : 525 + 150, 600 - 149 : 600 + 150])
    assert patches(picture[..., :64, :48]).shape == (1, 4, 3, 24, 24)


def test_categories_are_of_metrics_of_single_pictures_alone(everything, world):
    by_category = {v.metric for v in everything.values if v.category}
    assert by_category == {"psnr", "ssim", "feature_distance", "picture_error", "retrieval_at_5"}
    halves = [value(everything, "psnr", "grainy", category) for category in ("even", "odd")]
    assert [half.count for half in halves] == [24, 24]
    whole = value(everything, "psnr", "grainy").value
    assert sum(half.value for half in halves) / 2 == pytest.approx(whole)
    assert verdicts(everything, "odd")["psnr", "grainy"] == "better"
    few = [SimpleNamespace(**vars(prompt) | {"category": str(p // 6)}) for p, prompt in enumerate(world.prompts)]
    assert not [v for v in run(world, ["grainy"], ["psnr"], prompts=few).values if v.category]


def test_prompts_without_a_reference_are_left_out_of_what_needs_one(world):
    references = [picture if p % 3 else None for p, picture in enumerate(world.references)]
    found = run(world, ["grainy"], ["psnr", "sharpness", "picture_error"], references=references)
    assert value(found, "psnr", "grainy").count == 32 and value(found, "sharpness", "grainy").count == 48
    kept = [p for p in range(PROMPTS) if p % 3]
    alone = run(
        world, ["grainy"], ["psnr"], pictures={"grainy": [world.pictures["grainy"][p] for p in kept]},
        prompts=[world.prompts[p] for p in kept], references=[world.references[p] for p in kept],
    )  # fmt: skip
    assert value(found, "psnr", "grainy") == value(alone, "psnr", "grainy")


def test_references_stand_for_real_pictures(world):
    found = run(world, ["exact"], ["fid", "high_band"], real=None)
    assert value(found, "fid", "exact").value == pytest.approx(0, abs=0.2)  # its pictures are there twice
    assert value(found, "high_band", "exact").value == pytest.approx(0, abs=1e-6)


def test_other_sizes_are_cropped_and_resized_to_the_stated_one(world, tmp_path):
    large = [[tmp_path / f"{p}.png"] for p in range(12)]
    for p, (file,) in enumerate(large):
        page = Image.new("RGB", (4 * 48, 4 * 32 + 60), "red")  # 30 rows above and below are cropped
        page.paste(world.references[p].resize((4 * 48, 4 * 32), Image.Resampling.BICUBIC), (0, 30))
        page.save(file)
    found = run(world, ["x"], ["psnr"], pictures={"x": large}, prompts=world.prompts[:12],
                references=world.references[:12])  # fmt: skip
    assert value(found, "psnr", "x").low > 30


def test_spectra_of_the_report_are_the_mean_densities(everything):
    assert set(everything.spectra) == {"frequency", "exact", "blurred", "grainy", "wrong", "real"}
    frequency = torch.tensor(everything.spectra["frequency"])
    fine = frequency > 0.25
    blurred, exact, grainy = (torch.tensor(everything.spectra[name])[fine] for name in ("blurred", "exact", "grainy"))
    assert (blurred < 0.5 * exact).all() and (grainy > 1.2 * exact).all()


def test_a_metric_says_when_pictures_are_too_few(everything, world):
    warnings = "\n".join(everything.warnings)
    assert "FID is too high for want of pictures, by about" in warnings and "(48 vectors of 60 features)" in warnings
    assert "real vectors of 60" not in warnings
    few = run(world, ["exact"], ["fid", "retrieval_at_5"], prompts=world.prompts[:4], real=world.real[:50],
              references=world.references[:4], pictures={"exact": world.pictures["exact"][:4]})  # fmt: skip
    warnings = "\n".join(few.warnings)
    assert "50 real vectors of 60 features do not fill their space" in warnings
    assert "4 prompts: below 10, intervals are a little too narrow" in warnings
    assert "retrieval@5 among 4 references says little: chance is 100%" in warnings
    small = run(world, ["exact"], ["sharpness"], at=(64, 48))
    assert "70 of the real pictures are smaller than 64x48 and were enlarged" in small.warnings[0]


def test_the_bias_of_fid_is_estimated(world):
    """Against FID of the same model with four times as many pictures, from whose bias the smaller one's follows."""
    from asymflow_ft.evaluation import statistics
    from asymflow_ft.evaluation.distribution import frechet_distance

    g = torch.Generator().manual_seed(0)
    real = reference(torch.randn(4000, 8, generator=g, dtype=torch.float64))
    biases = []
    for _ in range(20):
        x = torch.randn(40, 1, 8, generator=g, dtype=torch.float64)
        found = statistics.estimate(lambda w, x=x: frechet_distance(x, real, w), statistics.jackknife_weights(40, 0))
        biases.append((statistics.jackknife_bias(found), found.value))
    estimated, actual = torch.tensor(biases).mean(0)  # the true distance is 0, so all of the value is bias
    assert abs(estimated - actual) < 0.15 * actual


def test_one_prompt(world):
    pictures = {model: world.pictures[model][:1] for model in ("exact", "grainy")}
    found = run(world, [], ["fid", "psnr"], pictures=pictures, prompts=world.prompts[:1],
                references=world.references[:1])  # fmt: skip
    one = value(found, "psnr", "exact")
    assert one.low == one.high == one.value and verdicts(found) == {("psnr", "grainy"): "no difference seen"}
    assert "one prompt gives no intervals" in found.warnings[0]
    assert "FID needs at least three prompts and was left out" in found.warnings[1]


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [(["fidd"], {}, "unknown metrics fidd; there are fid, kid"),
     (["fid"], {"real": None, "references": [None] * PROMPTS}, "fid: compared with real pictures, but there are none"),
     (["psnr"], {"references": [None] * PROMPTS}, "psnr: compared with each prompt's own picture"),
     (["kid", "sharpness"], {"features": None}, "kid: computed from features; name an extractor with --features"),
     (["psnr"], {"prompts": [SimpleNamespace(text="", category=None)]}, "same number of pictures of each of the 1 ")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(world, names, changes, message):
    with pytest.raises(ValueError, match=message):
        run(world, ["exact"], names, **changes)


def test_text_scores_go_with_their_prompts_and_pictures(world, monkeypatch):
    """A scorer that knows whose picture it is: the number of the prompt in its text, and the red of the picture."""
    from asymflow_ft.evaluation import scorers

    def score(texts, pictures, model, device):
        assert model == "my/clip"
        red = [rgb_tensor(scorers.open_picture(picture))[0].mean().item() for picture in pictures]
        return torch.tensor([int(text.split()[1]) + r for text, r in zip(texts, red, strict=True)])

    monkeypatch.setattr(scorers, "clip_scores", score)
    references = [None, *world.references[1:]]
    features = replace(open_features("pixels"), name="clip:my/clip")
    found = run(world, ["exact", "wrong"], ["clip"], features=features, references=references)
    reds = torch.stack([rgb_tensor(picture)[0].mean() for picture in world.references])
    number = torch.arange(PROMPTS).float()
    assert value(found, "clip", "exact").value == pytest.approx((number + reds).mean().item(), abs=1e-4)
    assert value(found, "clip", "real").value == pytest.approx((number + reds)[1:].mean().item(), abs=1e-4)
    assert value(found, "clip", "real").count == PROMPTS - 1
    assert value(found, "clip", "exact", "even").value == pytest.approx((number + reds)[::2].mean().item(), abs=1e-4)
