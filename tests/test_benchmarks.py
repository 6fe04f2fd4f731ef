"""Official layouts as docs/benchmarks.md specifies them, and result files as the official scorers write them."""

import json
import os
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asymflow_ft.evaluation.benchmarks import BENCHMARKS, dpg, geneval, hpsv3
from asymflow_ft.evaluation.suites import Prompt, Suite

SIDE = 6


def picture(file, seed, size=(SIDE, SIDE)):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def drawn(suite, folder):
    return [
        [picture(folder / f"{prompt.id}-{k}.png", 10 * i + k) for k in range(suite.per_prompt)]
        for i, prompt in enumerate(suite.prompts)
    ]


def geneval_suite():
    entries = [{"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of {tag} é"}
               for tag in ("colors", "colors", "counting")]  # fmt: skip
    return Suite("geneval", [Prompt(e["prompt"], f"{i:05d}", e["tag"], e) for i, e in enumerate(entries)], 4)


def dpg_suite():
    return Suite("dpg", [Prompt("a long prompt", "COCOval1"), Prompt("another", "12")], 4)


def hpsv3_suite():
    categories = ("Arts", "Arts", "Natural Scenery")
    return Suite("hpsv3", [Prompt(f"prompt ü {i}", f"{i:05d}-ab", c) for i, c in enumerate(categories)], 1)


SUITES = {"geneval": geneval_suite, "dpg": dpg_suite, "hpsv3": hpsv3_suite}


def laid_out(name, tmp_path):
    """(module, suite, pictures, folder) after writing."""
    suite = SUITES[name]()
    pictures, folder = drawn(suite, tmp_path / "images/m"), tmp_path / name / "a model, of mine"
    BENCHMARKS[name].write_layout(suite, pictures, folder)
    return BENCHMARKS[name], suite, pictures, folder


def tree(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def states(folder):
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in folder.rglob("*.*")
            if file.is_file()}  # fmt: skip


def test_geneval_layout(tmp_path):
    _, suite, pictures, folder = laid_out("geneval", tmp_path)
    assert tree(folder) == {
        *(f"{prompt:05d}/samples/{k:04d}.png" for prompt in range(3) for k in range(4)),
        *(f"{prompt:05d}/metadata.jsonl" for prompt in range(3)),
    }
    for i, prompt in enumerate(suite.prompts):
        text = (folder / f"{i:05d}/metadata.jsonl").read_text(encoding="ascii")  # the scorer opens it in any locale
        assert json.loads(text) == prompt.extra and list(json.loads(text)) == ["tag", "include", "prompt"]
        for k in range(4):
            assert (folder / f"{i:05d}/samples/{k:04d}.png").read_bytes() == pictures[i][k].read_bytes()


def test_dpg_layout(tmp_path):
    _, _, pictures, folder = laid_out("dpg", tmp_path)
    assert tree(folder) == {"pictures/COCOval1.png", "pictures/12.png"}
    for row, name in zip(pictures, ("COCOval1", "12"), strict=True):
        grid = Image.open(folder / f"pictures/{name}.png")
        assert grid.size == (2 * SIDE, 2 * SIDE)
        # the boxes that the scorer cuts out with --resolution SIDE, in its order
        boxes = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
        for (left, top), file in zip(boxes, row, strict=True):
            cut = grid.crop((left, top, left + SIDE, top + SIDE))
            assert np.array_equal(np.asarray(cut), np.asarray(Image.open(file)))


def test_hpsv3_layout(tmp_path):
    _, suite, pictures, folder = laid_out("hpsv3", tmp_path)
    names = ["Arts/00000-ab-0", "Arts/00001-ab-0", "Natural Scenery/00002-ab-0"]
    assert tree(folder) == {f"{name}{ending}" for name in names for ending in (".png", ".txt")}
    for name, prompt, (file,) in zip(names, suite.prompts, pictures, strict=True):
        assert (folder / f"{name}.txt").read_bytes() == prompt.text.encode()
        assert (folder / f"{name}.png").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_writing_again_changes_nothing_and_mends_what_is_missing(name, tmp_path):
    module, suite, pictures, folder = laid_out(name, tmp_path)
    before = states(folder)
    module.write_layout(suite, pictures, folder)
    assert states(folder) == before
    lost = min(file for file in before if file.suffix == ".png")
    lost.unlink()
    part = lost.with_name(f".{lost.name}.part")  # from a run that was killed
    if name != "dpg":
        os.link(pictures[0][0], part)
    else:
        part.write_bytes(b"half of")
    module.write_layout(suite, pictures, folder)
    assert {file: content for file, (*_, content) in states(folder).items()} == {
        file: content for file, (*_, content) in before.items()
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_picture_that_was_drawn_anew_replaces_the_old_one(name, tmp_path):
    module, suite, pictures, folder = laid_out(name, tmp_path)
    before = {file: content for file, (*_, content) in states(folder).items()}
    picture(tmp_path / "new.png", 99).replace(pictures[0][0])
    later = max(file.stat().st_mtime_ns for file in before) + 10**9
    os.utime(pictures[0][0], ns=(later, later))
    module.write_layout(suite, pictures, folder)
    after = {file: content for file, (*_, content) in states(folder).items()}
    assert len([file for file in before if before[file] != after[file]]) == 1


@pytest.mark.parametrize("name", ["geneval", "hpsv3"])
def test_without_hard_links_pictures_are_copied(name, tmp_path, monkeypatch):
    def no_link(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_link)
    module, suite, pictures, folder = laid_out(name, tmp_path)
    before = states(folder)
    originals = [row[0].stat() for row in pictures]
    assert not {state.st_ino for state in originals} & {inode for _, inode, _ in before.values()}
    assert {state.st_mtime_ns for state in originals} <= {time for time, *_ in before.values()}  # told equal unread
    module.write_layout(suite, pictures, folder)
    assert states(folder) == before


@pytest.mark.parametrize("name", ["geneval", "hpsv3"])
def test_pictures_take_no_space_twice(name, tmp_path):
    _, _, pictures, folder = laid_out(name, tmp_path)
    assert {file.stat().st_ino for row in pictures for file in row} <= {
        file.stat().st_ino for file in folder.rglob("*.png")
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_layout_of_other_pictures_is_refused(name, tmp_path):
    module, suite, pictures, folder = laid_out(name, tmp_path)
    part = Suite(suite.name, suite.prompts[1:], suite.per_prompt)
    with pytest.raises(ValueError, match=r"holds (1|4) picture\(s\) of another evaluation"):
        module.write_layout(part, pictures[1:], folder)
    with pytest.raises(ValueError, match=r"prompts need . pictures each"):
        module.write_layout(suite, [row[:-1] for row in pictures], folder)
    pictures[1][0].unlink()
    with pytest.raises(ValueError, match=r"images.m.*-0\.png is gone"):
        module.write_layout(suite, pictures, folder)


def test_what_a_scorer_cannot_read_is_refused_and_what_is_not_comparable_said():
    suite = dpg_suite()
    with pytest.raises(ValueError, match="needs --per-prompt 4"):
        dpg.check(Suite("dpg", suite.prompts, 1), (512, 512))
    with pytest.raises(ValueError, match=r"square pictures .* not 512x256"):
        dpg.check(suite, (512, 256))
    many = [Prompt("a", str(i), f"c{i % 12}") for i in range(12_000)]
    for module, count, per_prompt in ((geneval, 553, 4), (dpg, 1065, 4), (hpsv3, 12_000, 1)):
        assert module.check(Suite("x", many[:count], per_prompt), (512, 512)) == []
        (warning,) = module.check(Suite("x", many[: count - 1], per_prompt), (512, 512))
        assert "published" in warning and f"{count - 1:,}" in warning.replace("1064", "1,064")
    assert len(geneval.check(Suite("x", many[:553], 1), (512, 512))) == 1
    assert len(hpsv3.check(Suite("x", many, 2), (512, 512))) == 1


def test_dpg_pictures_of_two_sizes_are_refused(tmp_path):
    suite = dpg_suite()
    pictures = drawn(suite, tmp_path / "images")
    picture(pictures[1][2], 5, (8, 8))
    with pytest.raises(ValueError, match=r"12-2\.png is 8x8, the first 6x6"):
        dpg.write_layout(suite, pictures, tmp_path / "dpg")
    assert "12.png" not in os.listdir(tmp_path / "dpg/pictures")


# GenEval: evaluate_images.py writes a line per picture, in the order of os.listdir
GENEVAL_CORRECT = {"00000": [1, 1, 0, 1], "00001": [0, 0, 0, 1], "00002": [1, 0, 1, 1]}


def geneval_results(suite, folder, correct=GENEVAL_CORRECT):
    lines = []
    for prompt in reversed(suite.prompts):
        for k, right in enumerate(correct[prompt.id]):
            lines.append(json.dumps({
                "filename": f"{folder}/{prompt.id}/samples/{k:04d}.png", "tag": prompt.category, "prompt": prompt.text,
                "correct": bool(right), "reason": "" if right else "expected bench>=1, found 0",
                "metadata": json.dumps(prompt.extra), "details": "{}",
            }).replace("/", r"\/"))  # fmt: skip
    return "\n".join(lines) + "\n"


def dpg_results(folder):
    """Two prompts; averages 0.75 and 0.5."""
    return (
        f"{folder}/pictures/12.png, 1.0, 0.5, 0.5, 1.0, 0.75\n"
        f"{folder}/pictures/COCOval1.png, 0.3333333333333333, 0.6666666666666666, 0.5, 0.5, 0.5\n"
        "Model: pictures\nL1 category scores:\n\tglobal: 50.0\n\tentity: 81.25\n"
        "L2 category scores:\n\tentity - part: 75.0\n\tentity - whole: 87.5\n\tglobal -: 50.0\n"
        f"Image path: {folder}/pictures\nSave results to: {folder}/results.txt\nDPG-Bench score: 62.5\n"
    )


def hpsv3_results(folder):
    """Arts 9 and 11, Natural Scenery 6: 10 and 6, together 8, where the mean over pictures is 8.67."""
    rewards = {"Arts": {"00000-ab-0": 9.0, "00001-ab-0": 11.0}, "Natural Scenery": {"00002-ab-0": 6.0}}
    means = {"Arts": 10.0, "Natural Scenery": 6.0}
    return {
        "statistics": {
            **{f"{folder}/{name}": {"count": len(rows), "mean": means[name], "std": 0.0, "min": 0.0, "max": 0.0}
               for name, rows in rewards.items()},
            "OVERALL": {"count": 3, "mean": 8.0, "std": 2.0, "min": 6.0, "max": 11.0},
        },
        "data": {
            f"{folder}/{name}": [
                {"image_path": f"{folder}/{name}/{stem}.png", "reward": reward, "prompt": "p"}
                for stem, reward in rows.items()
            ]
            for name, rows in rewards.items()
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_results_are_no_scores(name, tmp_path):
    module, *_, folder = laid_out(name, tmp_path)
    assert module.read_scores(folder) is None


def test_geneval_scores(tmp_path):
    _, suite, _, folder = laid_out("geneval", tmp_path)
    (folder / "results.jsonl").write_text(geneval_results(suite, folder))
    # colors: 4 of 8 pictures, counting: 3 of 4; overall: the mean of the tasks, not 7 of 12
    assert geneval.read_scores(folder) == {"overall": 0.625, "counting": 0.75, "colors": 0.5}


def test_dpg_scores(tmp_path):
    *_, folder = laid_out("dpg", tmp_path)
    (folder / "results.txt").write_text(dpg_results(folder))
    assert dpg.read_scores(folder) == {
        "overall": 62.5, "global": 50.0, "entity": 81.25, "entity - part": 75.0, "entity - whole": 87.5,
        "global -": 50.0,
    }  # fmt: skip


def test_hpsv3_scores(tmp_path):
    *_, folder = laid_out("hpsv3", tmp_path)
    (folder / "results.json").write_text(json.dumps(hpsv3_results(folder), indent=4))
    assert hpsv3.read_scores(folder) == {"overall": 8.0, "Arts": 10.0, "Natural Scenery": 6.0}


def test_results_stay_readable_in_a_folder_that_was_moved(tmp_path):
    for name, file, text in (("geneval", "results.jsonl", lambda folder: geneval_results(geneval_suite(), folder)),
                             ("dpg", "results.txt", dpg_results),
                             ("hpsv3", "results.json", lambda folder: json.dumps(hpsv3_results(folder)))):  # fmt: skip
        module, *_, folder = laid_out(name, tmp_path)
        for elsewhere in ("/other/place", "C:\\other\\place"):
            (folder / file).write_text(text(elsewhere))
            assert module.read_scores(folder) is not None


@pytest.mark.parametrize(
    "damage", ["half a line", "a line less", "a line twice", "other pictures", "no GenEval", "empty"]
)
def test_bad_geneval_results_are_refused(damage, tmp_path):
    _, suite, _, folder = laid_out("geneval", tmp_path)
    text = geneval_results(suite, folder)
    lines = text.splitlines(keepends=True)
    damaged, message = {
        "half a line": (text[:-20], r"results\.jsonl, line 12 is not JSON"),
        "a line less": ("".join(lines[:-1]), r"lacks 1 of 12 pictures, first: 00000/samples/0003\.png"),
        "a line twice": (text + lines[0], r"scores 00002/samples/0000\.png twice"),
        "other pictures": (text.replace("0003.png", "0004.png"), r"0004\.png, which is not there"),
        "no GenEval": ('{"score": 1}\n', "line 1 is not of GenEval"),
        "empty": ("", "lacks 12 of 12"),
    }[damage]
    (folder / "results.jsonl").write_text(damaged)
    with pytest.raises(ValueError, match=message):
        geneval.read_scores(folder)


@pytest.mark.parametrize(
    "damage", ["no end", "a line lost", "other pictures", "nan", "one picture", "foreign", "empty"]
)
def test_bad_dpg_results_are_refused(damage, tmp_path):
    *_, folder = laid_out("dpg", tmp_path)
    text = dpg_results(folder)
    damaged, message = {
        "no end": (text[: text.index("DPG-Bench")], "the scorer is not done, or was stopped"),
        "a line lost": (text[text.index("\n") + 1 :], r"have the mean 50\.0000, but it ends with 62\.5000"),
        "other pictures": (text.replace("12.png", "13.png"), r"scores 13\.png, which is not there"),
        "nan": (text.replace("score: 62.5", "score: nan"), "'nan' is no score"),
        "one picture": (text.replace("1.0, 0.5, 0.5, 1.0, 0.75", "1.0, 1.0"), "line 1 is not of DPG-Bench with"),
        "foreign": ("overall,62.5\n", "line 1 is not of DPG-Bench"),
        "empty": ("", "the scorer is not done"),
    }[damage]
    (folder / "results.txt").write_text(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            dpg.read_scores(folder)


def test_dpg_pictures_that_the_scorer_failed_on_are_named(tmp_path):
    *_, folder = laid_out("dpg", tmp_path)
    text = dpg_results(folder)
    (folder / "results.txt").write_text(text[text.index("\n") + 1 :].replace("score: 62.5", "score: 50.0"))
    with pytest.warns(UserWarning, match=r"lacks 1 of 2 pictures, first: 12\.png"):
        assert dpg.read_scores(folder)["overall"] == 50.0


def test_the_dpg_prompt_that_the_scorer_always_fails_on_is_no_news(tmp_path):
    suite = Suite("dpg", [*dpg_suite().prompts, Prompt("first of the questions", "partiprompts97")], 4)
    folder = tmp_path / "dpg"
    dpg.write_layout(suite, drawn(suite, tmp_path / "images"), folder)
    (folder / "results.txt").write_text(dpg_results(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dpg.read_scores(folder)["overall"] == 62.5


@pytest.mark.parametrize(
    "damage",
    ["cut off", "one machine's", "a picture less", "other pictures", "mean", "overall", "text", "no number", "nan"],
)
def test_bad_hpsv3_results_are_refused(damage, tmp_path):
    *_, folder = laid_out("hpsv3", tmp_path)
    results = hpsv3_results(folder)
    arts = f"{folder}/Arts"
    text = json.dumps(results)
    if damage == "a picture less":
        results["data"][arts].pop()
        results["statistics"][arts]["mean"] = 9.0
    if damage == "other pictures":
        results["data"][arts][0]["image_path"] = f"{arts}/x.png"
    if damage in ("no number", "nan"):
        results["data"][arts][0]["reward"] = {"no number": "9", "nan": float("nan")}[damage]
    if damage == "mean":
        results["statistics"][arts]["mean"] = 9.0
    if damage == "overall":
        results["statistics"]["OVERALL"]["mean"] = 26 / 3
    damaged, message = {
        "cut off": (text[:-30], r"is no result of HPSv3's evaluate/benchmark\.py"),
        "one machine's": (json.dumps(results["data"]), "is no result of HPSv3's"),
        "a picture less": (json.dumps(results), r"lacks 1 of 3 pictures, first: Arts/00001-ab-0\.png"),
        "other pictures": (json.dumps(results), r"scores Arts/x\.png, which is not there"),
        "mean": (json.dumps(results), r"the scores of Arts have the mean 10\.0, and the file says 9\.0"),
        "overall": (json.dumps(results), "the scores of OVERALL have the mean 8.0"),
        "text": ("HPSv3 10.43\n", "is no result of HPSv3's"),
        "no number": (json.dumps(results), "is no result of HPSv3's"),
        "nan": (json.dumps(results), "the scores of Arts have the mean nan"),
    }[damage]
    (folder / "results.json").write_text(damaged)
    with pytest.raises(ValueError, match=message):
        hpsv3.read_scores(folder)


def test_command_lines_name_the_layout_and_where_scores_are_read_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {
        "geneval": ("evaluation/evaluate_images.py", [("--outfile", "results.jsonl")], [""]),
        "dpg": ("dpg_bench/compute_dpg_bench.py",
                [("--res-path", "results.txt"), ("--image-root-path", "pictures")], ["pictures"]),
        "hpsv3": ("evaluate/benchmark.py", [("--output_path", "results.json")], ["Arts", "Natural Scenery"]),
    }  # fmt: skip
    for name, (script, options, places) in expected.items():
        module, *_ = laid_out(name, Path())
        folder = (tmp_path / name / "a model, of mine").resolve()
        comment, command = module.how_to_score(Path(name) / "a model, of mine").split("\n")
        words = shlex.split(command)
        assert comment.startswith("# in a clone of https://github.com/") and script in words
        for option, file in options:
            assert words[words.index(option) + 1] == str(folder / file)
        assert all(str(folder / place) in words for place in places)
    assert words[words.index("--image_folders") + 1 :] == [str(folder / "Arts"), str(folder / "Natural Scenery")]
    words = shlex.split(dpg.how_to_score(tmp_path / "dpg/a model, of mine").split("\n")[1])
    assert words[words.index("--resolution") + 1] == str(SIDE) and words[words.index("--pic-num") + 1] == "4"
