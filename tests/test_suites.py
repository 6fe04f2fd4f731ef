"""What becomes of prompt files, good and bad."""

import hashlib
import json

import pytest

from asymflow_ft.evaluation.suites import Prompt, load_suite, take

OBJECT = {"class": "bench", "count": 1}


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def short(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def test_text_file(tmp_path):
    arabic, emoji, mixed = "قطة سوداء على كرسي", "👩‍🚀 na Księżycu", "猫と\u200e犬"
    file = write(tmp_path / "a.txt", f"\ufeff# comment\r\n\r\n  a cat \r\n{arabic}\r\n{emoji}\r\n{mixed}\r\na cat\r\n")
    suite = load_suite(str(file))
    assert (suite.name, suite.per_prompt) == ("a.txt", 1)
    assert [prompt.text for prompt in suite.prompts] == ["a cat", arabic, emoji, mixed]
    assert [prompt.id for prompt in suite.prompts] == [
        f"{number:04d}-{short(prompt.text)}" for number, prompt in enumerate(suite.prompts)
    ]
    assert all(prompt.category is None for prompt in suite.prompts)
    assert len(suite.warnings) == 1 and "1 repeated prompt(s)" in suite.warnings[0]
    assert "a.txt, line 7 repeats line 3" in suite.warnings[0]


def test_an_inserted_prompt_keeps_the_hashes_of_the_others(tmp_path):
    before = load_suite(str(write(tmp_path / "a.txt", "one\ntwo\n"))).prompts
    after = load_suite(str(write(tmp_path / "a.txt", "zero\none\ntwo\n"))).prompts
    assert [prompt.id.split("-")[1] for prompt in after[1:]] == [prompt.id.split("-")[1] for prompt in before]


def test_json_lines(tmp_path):
    file = write(tmp_path / "a.jsonl", lines(
        {"prompt": "one", "id": "first", "category": "numbers", "seed": 5}, {"prompt": "two", "id": 7},
        {"prompt": "line\u2028separator\nand more"}, {"prompt": "one"}, {"prompt": "one"},
    ))  # fmt: skip
    suite = load_suite(str(file))
    odd = "line\u2028separator\nand more"
    assert suite.prompts == [
        Prompt("one", "first", "numbers", {"seed": 5}), Prompt("two", "7"), Prompt(odd, f"0002-{short(odd)}"),
        Prompt("one", f"0003-{short('one')}"),
    ]  # fmt: skip
    assert "line 5 repeats line 4" in suite.warnings[0]
    assert "1 prompt(s) have the text of an earlier one" in suite.warnings[1]


def test_long_prompts_stay_whole_with_a_warning(tmp_path):
    suite = load_suite(str(write(tmp_path / "a.txt", "short\n" + "word " * 400 + "end\n")))
    assert suite.prompts[1].text.endswith("word end")
    assert len(suite.warnings) == 1 and "line 2" in suite.warnings[0] and "over 2,000 bytes" in suite.warnings[0]


def test_geneval(tmp_path):
    entries = [
        {"tag": "single_object", "include": [OBJECT], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [OBJECT], "exclude": [OBJECT], "prompt": "a photo of two benches"},
        {"tag": "position", "include": [OBJECT], "prompt": "a photo of a bench"},
    ]
    suite = load_suite(f"geneval:{write(tmp_path / 'evaluation_metadata.jsonl', lines(*entries))}")
    assert (suite.name, suite.per_prompt) == ("geneval", 4)
    assert suite.prompts == [
        Prompt(entry["prompt"], f"{i:05d}", entry["tag"], entry) for i, entry in enumerate(entries)
    ]
    assert list(suite.prompts[0].extra) == ["tag", "include", "prompt"]
    assert len(suite.warnings) == 1 and "line 3" in suite.warnings[0]  # kept, since the scorer expects it


def test_dpg(tmp_path):
    for name, text in {"b10": "a cat\n", "b9": " a dog", "A1": "a long\nprompt", ".hidden": "x"}.items():
        write(tmp_path / f"{name}.txt", text)
    suite = load_suite(f"dpg:{tmp_path}")
    assert (suite.name, suite.per_prompt) == ("dpg", 4)
    assert suite.prompts == [Prompt("a long\nprompt", "A1"), Prompt("a cat", "b10"), Prompt("a dog", "b9")]


def test_hpsv3(tmp_path):
    entries = [{"caption": f"{what} {i}", "category": what, "image_file": f"x/{i}.jpg"}
               for what in ("Arts", "Natural Scenery") for i in range(2)]  # fmt: skip
    write(tmp_path / "benchmark_Arts.json", json.dumps(entries[:2]))
    write(tmp_path / "benchmark_Natural Scenery.json", json.dumps(entries[2:]))
    suite = load_suite(f"hpsv3:{tmp_path}")
    assert (suite.name, suite.per_prompt) == ("hpsv3", 1)
    assert suite.prompts == [
        Prompt(entry["caption"], f"{i:05d}-{short(entry['caption'])}", entry["category"], entry)
        for i, entry in enumerate(entries)
    ]
    assert load_suite(f"hpsv3:{tmp_path / 'benchmark_Arts.json'}").prompts == suite.prompts[:2]


BAD = {
    "txt empty": ("a.txt", "", "a.txt holds no prompts"),
    "txt comments": ("a.txt", "# x\n\n", "a.txt holds no prompts"),
    "txt latin-1": ("a.txt", b"one\ncaf\xe9\n", r"not UTF-8 text \(line 2: "),
    "txt NUL": ("a.txt", "one\ntw\0o\n", r"line 2: control character U\+0000 at character 3"),
    "txt escape": ("a.txt", "one\n\n\x1b[31mred\n", r"line 3: control character U\+001B at character 1"),
    "txt invisible": ("a.txt", "\u200b\u200b\n", "line 1 has nothing to see in it"),
    "jsonl empty": ("a.jsonl", "\n\n", "a.jsonl holds no prompts"),
    "jsonl cut off": ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b', "line 2 is not JSON"),
    "jsonl list": ("a.jsonl", '["a"]', "line 1 is not a JSON object"),
    "jsonl key": ("a.jsonl", '{"text": "a"}', "line 1: no 'prompt'; it has text"),
    "jsonl number": ("a.jsonl", '{"prompt": 3}', "line 1: no 'prompt'; it is 3, not text"),
    "jsonl blank": ("a.jsonl", '{"prompt": "  "}', "line 1 has nothing to see in it"),
    "jsonl half": ("a.jsonl", r'{"prompt": "\ud83d"}', "line 1: .* cannot be written as UTF-8"),
    "jsonl category": ("a.jsonl", '{"prompt": "a", "category": 3}', "line 1: no 'category'; it is 3"),
    "id bool": ("a.jsonl", '{"prompt": "a", "id": true}', "line 1: the id is true"),
    "id path": ("a.jsonl", '{"prompt": "a", "id": "../a"}', "line 1: the id '../a' cannot name files"),
    "id backslash": ("a.jsonl", r'{"prompt": "a", "id": "a\\b"}', "line 1: the id .* cannot name files"),
    "id dots": ("a.jsonl", '{"prompt": "a", "id": ".."}', "cannot name files"),
    "id newline": ("a.jsonl", r'{"prompt": "a", "id": "a\n"}', "line 1: the id .* cannot name files"),
    "id long": ("a.jsonl", json.dumps({"prompt": "a", "id": "é" * 101}), "cannot name files"),
    "id twice": ("a.jsonl", lines({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}),
                 "line 2: the id 'x' is taken by .*line 1"),
    "id case": ("a.jsonl", lines({"prompt": "a", "id": "Ä"}, {"prompt": "b", "id": "ä"}),
                "line 2: the id 'ä' is taken"),
    "form": ("a.csv", "prompt\na\n", "of no known form; give a .txt file"),
    "geneval text": ("geneval:a.jsonl", "a photo of a bench\n", "line 1 is not JSON"),
    "geneval tag": ("geneval:a.jsonl", lines({"prompt": "a", "include": [OBJECT]}), "line 1: no 'tag'"),
    "geneval include": ("geneval:a.jsonl", lines({"prompt": "a", "tag": "t", "include": ["bench"]}),
                        'line 1: no list "include"'),
    "geneval empty": ("geneval:a.jsonl", "", "geneval holds no prompts"),
    "hpsv3 object": ("hpsv3:a.json", '{"caption": "a"}', "is no list of prompts"),
    "hpsv3 cut off": ("hpsv3:a.json", '[{"caption": "a"', "a.json is not JSON"),
    "hpsv3 text": ("hpsv3:a.json", '["a"]', "entry 1 is no object"),
    "hpsv3 category": ("hpsv3:a.json", '[{"caption": "a", "category": "a/b"}]', "entry 1: .* cannot name a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_their_line(case, tmp_path):
    name, content, message = BAD[case]
    kind, _, file = name.rpartition(":")
    path = write(tmp_path / file, content)
    with pytest.raises(ValueError, match=message):
        load_suite(f"{kind}:{path}" if kind else str(path))


def test_missing_files_are_refused_with_what_to_name(tmp_path):
    for spec, message in {
        f"{tmp_path}/none.txt": "no such file; give a .txt file", str(tmp_path): "of no known form",
        f"geneval:{tmp_path}": "evaluation_metadata.jsonl", f"dpg:{tmp_path}": "dpg_bench/prompts",
        f"hpsv3:{tmp_path}": "MizzenAI/HPDv3", f"genval:{tmp_path}/a.jsonl": "geneval:FILE",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_suite(spec)


def test_dpg_names_that_the_scorer_cannot_find_are_refused(tmp_path):
    write(tmp_path / "a/x.y.txt", "a")
    with pytest.raises(ValueError, match="up to its first dot"):
        load_suite(f"dpg:{tmp_path / 'a'}")
    for name in ("Cat", "cat"):
        write(tmp_path / f"b/{name}.txt", name)
    with pytest.raises(ValueError, match="the id 'cat' is taken by"):
        load_suite(f"dpg:{tmp_path / 'b'}")
    write(tmp_path / "c/cat.txt", " \n")
    with pytest.raises(ValueError, match=r"cat\.txt has nothing to see"):
        load_suite(f"dpg:{tmp_path / 'c'}")


def test_a_part_of_a_suite_has_all_categories_and_grows(tmp_path):
    records = [{"prompt": f"{c}{i}", "id": f"{c}{i}", "category": c} for c in "abc" for i in range(4)]
    suite = load_suite(str(write(tmp_path / "a.jsonl", lines(*records))))
    parts = [[prompt.id for prompt in take(suite, num).prompts] for num in (3, 4, 7, 12)]
    assert parts[:3] == [["a0", "b0", "c0"], ["a0", "a1", "b0", "c0"], ["a0", "a1", "a2", "b0", "b1", "c0", "c1"]]
    assert parts[3] == [record["id"] for record in records]
    for num in (0, 13):
        with pytest.raises(ValueError, match=rf"--num {num}: a.jsonl has 12 prompts"):
            take(suite, num)
