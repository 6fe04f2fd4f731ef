"""docs/performance_tried.py still runs, its rows stand in docs/performance.md, and unequal results end it."""

import re
import runpy
from importlib import import_module

import pytest
import torch

from asymflow_ft.method import asymflow
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "docs/performance_tried.py"
ROW = re.compile(r"\| `(\w+)`: (.+?) \| [^|]+ m?s[^|]* \| [^|]+ m?s[^|]* \| [\d.]+ \| \de[-+]\d\d \|")


@pytest.fixture
def run(monkeypatch):
    """Runs the script as a command does."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import_module("performance_pairs")  # before a test plants errors in the package, which it shall not see
    threads = torch.get_num_threads()

    def run(*arguments):
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
        return runpy.run_path(str(SCRIPT), run_name="__main__")

    yield run
    torch.set_num_threads(threads)


def test_every_row_can_be_made_and_is_in_the_docs(run, capsys):
    names = run("--small")["ROWS"]
    rows = [ROW.fullmatch(line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert all(rows) and list(dict.fromkeys(row[1] for row in rows)) == list(names)
    page = (REPOSITORY / "docs/performance.md").read_text()
    listed = re.findall(r"^\| `(\w+)`: ", page, re.MULTILINE)
    assert {name: listed.count(name) for name in names} == {name: [r[1] for r in rows].count(name) for name in names}


@pytest.mark.parametrize("factor", [1.001, torch.nan])
def test_results_that_differ_end_it(run, monkeypatch, factor):
    project = asymflow.project
    monkeypatch.setattr(asymflow, "project", lambda *given: factor * project(*given))  # the package's own use alone
    with pytest.raises(SystemExit, match="recovery: one projection in the place of two: results differ by"):
        run("recovery", "--small")


def test_unknown_names_are_told(run, capsys):
    with pytest.raises(SystemExit):
        run("recovry", "--small")
    assert "no row is named recovry; there are recovery, colour" in capsys.readouterr().err
