"""Which metrics there are, and all of them of several models' pictures, with intervals and verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from asymflow_ft.evaluation import scorers, spectrum
from asymflow_ft.evaluation.comparison import FEW_PROMPTS, Column, compare_means, compare_sets
from asymflow_ft.evaluation.distribution import reference
from asymflow_ft.evaluation.features import Features
from asymflow_ft.evaluation.observe import RETRIEVAL_DEPTH, Observed, References, observe
from asymflow_ft.evaluation.results import Difference, Metric, Value
from asymflow_ft.evaluation.scorers import Picture
from asymflow_ft.evaluation.suites import Prompt

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
METRICS = {metric.key: metric for metric in (
    Metric("fid", "FID", "lower", "Fréchet distance of the features of all pictures to those of the real ones",
           "too high by an amount that shrinks with the number of pictures: compare equal numbers only"),
    Metric("kid", "KID", "lower", "squared kernel distance of the features to those of the real pictures",
           "no bias: its mean does not depend on the number of pictures; below 0 is no difference from real"),
    Metric("pfid", "patch FID", "lower", "FID of patches at full resolution: detail, where FID sees a small picture",
           "four patches a picture of at most 299 pixels; other patches give other numbers; biased like FID"),
    Metric("clip", "CLIP score", "higher", "cosine of CLIP's embeddings of prompt and picture",
           "reads 77 tokens of a prompt; depends on which CLIP"),
    Metric("hpsv3", "HPSv3", "higher", "Human Preference Score v3",
           "a model's guess of what people prefer; depends on the prompts"),
    Metric("hpsv2", "HPSv2.1", "higher", "Human Preference Score v2.1",
           "a model's guess of what people prefer; depends on the prompts"),
    Metric("psnr", "PSNR (dB)", "higher", "mean square difference from the reference picture",
           "favours blur; for a prompt's own picture only, which a model need not draw; at most 100"),
    Metric("ssim", "SSIM", "higher", "structural similarity to the reference picture", "as for PSNR"),
    Metric("lpips", "LPIPS", "lower", "perceptual distance (AlexNet) to the reference picture",
           "training minimises LPIPS with VGG, a relative"),
    Metric("feature_distance", "feature distance", "lower", "1 - cosine of the features of picture and reference"),
    Metric("picture_error", "picture error", "lower",
           "root mean square Oklab difference of 32 x 32 thumbnails from the reference, times 100: colour and layout",
           "mean over pictures of each one's error"),
    Metric("retrieval_at_5", "retrieval@5", "higher",
           "share of pictures whose prompt's reference is among the five nearest references by thumbnail",
           "depends on how many references there are; chance is 5 divided by that"),
    Metric("sharpness", "sharpness", "closer", "mean square lightness difference of neighbouring pixels, times 1000",
           "grain raises it like detail"),
    Metric("spectrum_error", "spectrum error", "lower",
           "mean absolute log10 ratio of the power spectrum to the real one: 0 is equal, 1 a factor of ten",
           "few pictures raise it"),
    Metric("low_band", "low band (dB)", "closer", "power below 1/16 cycles per pixel relative to real pictures"),
    Metric("middle_band", "middle band (dB)", "closer", "power from 1/16 to 1/4 cycles per pixel, relative to real"),
    Metric("high_band", "high band (dB)", "closer", "power above 1/4 cycles per pixel (finer than 4 pixels), relative "
           "to real: below 0 is blur, above 0 grain"),
)}  # fmt: skip
_SETS = {"fid": "features", "kid": "features", "pfid": "patches"}
_TEXT = ("clip", "hpsv3", "hpsv2")
_BESIDE = ("psnr", "ssim", "lpips", "feature_distance", "picture_error", "retrieval_at_5")
_SINGLE = (*_TEXT, *_BESIDE, "sharpness")
_SPECTRAL = ("spectrum_error", *spectrum.BANDS)


@dataclass(frozen=True)
class Measured:
    """What results.json holds of the metrics. spectra: {"frequency", model, "real"}; empty if none was asked for.
    pictures: of each model, the metrics that single pictures have, P * K numbers each, prompt by prompt."""

    metrics: list[Metric]
    values: list[Value]
    differences: list[Difference]
    spectra: dict[str, list[float]]
    warnings: list[str]
    pictures: dict[str, dict[str, list[float]]]


def default_metrics(has_real: bool, has_references: bool, features: str | None) -> list[str]:
    """The metrics that can run without another extra or download.

    Args:
        has_real: there are real pictures. has_references: prompts have pictures of their own. features: the name of
            the extractor, or None.
    """
    real, beside = has_real or has_references, has_references
    can = {
        "fid": real and features, "kid": real and features, "pfid": real and features,
        "clip": (features or "").startswith("clip:"),
        "psnr": beside, "ssim": beside, "feature_distance": beside and features, "picture_error": beside,
        "retrieval_at_5": beside, "sharpness": True, **dict.fromkeys(_SPECTRAL, real),
    }  # fmt: skip
    return [key for key in METRICS if can.get(key)]


def check_metrics(names: Sequence[str], has_real: bool, has_references: bool, features: str | None) -> None:
    """Before anything is drawn.

    Raises:
        ValueError: an unknown metric, or one that lacks what it compares with.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(METRICS)}")
    real = has_real or has_references
    if lacking := [name for name in names if name in (*_SETS, *_SPECTRAL) and not real]:
        raise ValueError(f"{', '.join(lacking)}: compared with real pictures, but there are none; give --real")
    if lacking := [name for name in names if name in _BESIDE and not has_references]:
        raise ValueError(
            f"{', '.join(lacking)}: compared with each prompt's own picture, but no prompt is the caption of a "
            "picture of --real; use such prompts, or leave these metrics out"
        )
    if lacking := [name for name in names if name in (*_SETS, "feature_distance") and features is None]:
        raise ValueError(f"{', '.join(lacking)}: computed from features; name an extractor with --features")


def clip_of(features: str | None) -> str:
    """The CLIP of the metric "clip", a Hub repository or folder: that of the features if they are of one."""
    kind, _, model = (features or "").partition(":")
    return model if kind == "clip" and model else DEFAULT_CLIP


def measure(
    pictures: Mapping[str, Sequence[Sequence[Picture]]], prompts: Sequence[Prompt], real: Sequence[Picture] | None,
    references: Sequence[Picture | None], names: Sequence[str], features: Features | None, at: tuple[int, int],
    seed: int, device: torch.device | str = "cpu",
) -> Measured:  # fmt: skip
    """All metrics of all models, and of the first one against each other.

    Args:
        pictures: of each model, of each prompt, K files; the first model is the one asked about.
        real: real pictures; without any, the references stand for them.
        references: of each prompt, the picture that it is the caption of, or None.
        names: keys of METRICS. at: (width, height) that all pictures are cropped and resized to.
        seed: of the resampling.

    Raises:
        ValueError: as in `check_metrics`; a missing extra; models with different numbers of pictures.
    """
    known = [p for p, picture in enumerate(references) if picture is not None]
    own = [picture for picture in references if picture is not None]
    check_metrics(names, bool(real), bool(own), features.name if features else None)
    counts = {len(row) for rows in pictures.values() for row in rows}
    if len(counts) != 1 or 0 in counts or any(len(rows) != len(prompts) for rows in pictures.values()):
        raise ValueError(f"every model needs the same number of pictures of each of the {len(prompts)} prompts")
    per_prompt, names = counts.pop(), [key for key in METRICS if key in names]
    alone = [key for key in names if key not in _BESIDE]

    def look(title: str, files: Sequence[Picture], of: Sequence[int | None], keys: Sequence[str]) -> Observed:
        return observe(title, files, of, beside, keys, features, at, device)

    truth, beside = None, None
    if real:
        truth = look("real pictures", real, [None] * len(real), alone)
    if own:
        wanted = [key for key in ("feature_distance", "thumbnail") if key == "thumbnail" or key in names]
        seen_own = look("reference pictures", own, [None] * len(own), [*wanted, *([] if real else alone)])
        truth = truth or seen_own
        beside = References(own, seen_own.parts["thumbnail"], seen_own.parts.get("features"))
    targets = {p: number for number, p in enumerate(known)}
    of = [targets.get(p) for p in range(len(prompts)) for _ in range(per_prompt)]
    seen = {model: look(model, [file for row in rows for file in row], of, names) for model, rows in pictures.items()}
    scores = _text_scores(
        pictures, prompts, [(prompts[p].text, own[targets[p]]) for p in known], names, device,
        clip_of(features.name if features else None),
    )  # fmt: skip

    values: list[Value] = []
    differences: list[Difference] = []
    warnings = _warnings(len(prompts), len(own), names, truth, at)
    for key in names:
        if key not in _SETS:
            column = _column(key, seen, truth, scores, len(prompts), at)
            new = compare_means(METRICS[key], column, prompts, per_prompt, seed)
        elif len(prompts) < 3:  # the jackknife leaves one out, and the sums need pairs of what is left
            warnings.append(f"{METRICS[key].title} needs at least three prompts and was left out")
            continue
        else:
            assert truth is not None
            part, grid = _SETS[key], (len(prompts), per_prompt)
            sets = {model: one.parts[part].unflatten(0, grid).flatten(1, 2) for model, one in seen.items()}
            *new, biases = compare_sets(
                METRICS[key], sets, reference(truth.parts[part].flatten(0, 1)), per_prompt, seed
            )
            warnings += biases
        values += new[0]
        differences += new[1]
    spectra = {}
    if truth is not None and "spectrum" in truth.parts:
        spectra = {"frequency": spectrum.frequency_rings(at[1], at[0])[1].tolist()}
        spectra |= {name: o.parts["spectrum"].mean(0).tolist() for name, o in {**seen, "real": truth}.items()}
    single = {
        model: {key: scores[key][model] if key in _TEXT else one.parts[key] for key in names if key in _SINGLE}
        for model, one in seen.items()
    }
    each = {model: {key: part[:, 0].tolist() for key, part in parts.items()} for model, parts in single.items()}
    return Measured([METRICS[key] for key in names], values, differences, spectra, warnings, each)


def _column(
    key: str, seen: dict[str, Observed], truth: Observed | None, scores: dict[str, dict[str, Tensor]], prompts: int,
    at: tuple[int, int],
) -> Column:  # fmt: skip
    def first(mean: Tensor) -> Tensor:
        return mean[:, 0]

    if key in _TEXT:
        rows = dict(scores[key])
        real = rows.pop("real").double()
        return Column({m: _per_prompt(r, prompts) for m, r in rows.items()}, first, None, real if len(real) else None)
    part = "spectrum" if key in _SPECTRAL else key
    rows = {model: _per_prompt(observed.parts[part], prompts) for model, observed in seen.items()}
    if key in _SPECTRAL:
        assert truth is not None
        spectra = truth.parts["spectrum"]
        if key == "spectrum_error":
            return Column(rows, partial(spectrum.spectrum_error, real=spectra.mean(0)), by_category=False)
        level = partial(spectrum.band_level, real=spectra.mean(0), size=at[::-1], band=key)
        return Column(rows, level, 0.0, spectra, by_category=False)
    real = truth.parts[key].double() if truth is not None and key in truth.parts else None
    target = real.mean().item() if real is not None else None
    return Column(rows, first, target, real, by_category=METRICS[key].better != "closer")


def _per_prompt(rows: Tensor, prompts: int) -> Tensor:
    """(P * K, c) -> the means of each prompt's pictures, (P, c) float64."""
    return rows.double().reshape(prompts, -1, rows.shape[-1]).mean(1)


def _text_scores(
    pictures: Mapping[str, Sequence[Sequence[Picture]]], prompts: Sequence[Prompt], known: list[tuple[str, Picture]],
    names: Sequence[str], device: torch.device | str, clip: str,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """By metric and model, (P * K, 1); "real" are the references, `known` with their prompts."""
    score = {
        "clip": partial(scorers.clip_scores, model=clip, device=device),
        "hpsv2": partial(scorers.hpsv2_scores, device=device), "hpsv3": partial(scorers.hpsv3_scores, device=device),
    }  # fmt: skip
    tasks: dict[str, list[tuple[str, Picture]]] = {
        model: [(prompt.text, picture) for prompt, row in zip(prompts, rows, strict=True) for picture in row]
        for model, rows in pictures.items()
    }
    everything = [pair for pairs in [*tasks.values(), known] for pair in pairs]
    found: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in _TEXT if key in names]:
        scores = score[key]([text for text, _ in everything], [picture for _, picture in everything])[:, None]
        sizes = [len(pairs) for pairs in [*tasks.values(), known]]
        found[key] = dict(zip([*tasks, "real"], scores.split(sizes), strict=True))
    return found


def _warnings(
    prompts: int, references: int, names: Sequence[str], truth: Observed | None, at: tuple[int, int]
) -> list[str]:
    found = []
    if prompts == 1:
        found.append("one prompt gives no intervals: low and high repeat the value")
    elif prompts < FEW_PROMPTS:
        found.append(f"{prompts} prompts: below {FEW_PROMPTS}, intervals are a little too narrow")
    if truth is not None and truth.enlarged:
        found.append(
            f"{truth.enlarged} of the real pictures are smaller than {at[0]}x{at[1]} and were enlarged: "
            "sharpness and spectra compare with pictures softer than real ones"
        )
    if "retrieval_at_5" in names and references < 4 * RETRIEVAL_DEPTH:
        chance = min(1, RETRIEVAL_DEPTH / references)
        found.append(f"retrieval@5 among {references} references says little: chance is {chance:.0%}")
    return found
