"""The demo's page in a real browser. Needs `pip install -e '.[browser]'` and Chromium: a system's own is taken if
there is one, else that of `playwright install chromium`."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch
import yaml
from PIL import Image

from asymflow_ft import demo
from asymflow_ft.cli import main
from asymflow_ft.families import flux2
from asymflow_ft.hub.write import export
from tests.converted import as_converted

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# what the page shows over time: (address of the picture, address of the base's picture, state)
RECORD = """() => {
  window.shown = [];
  const look = () => {
    const [picture, base] = ['#picture img', '#base img'].map(name => document.querySelector(name)?.src);
    const now = JSON.stringify([picture, base, document.querySelector('.state .done + span')?.innerText ?? '']);
    if (window.shown.at(-1) !== now) window.shown.push(now);
  };
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""


@pytest.fixture
def page(pipeline, tiny_base, tmp_path):
    from playwright.sync_api import sync_playwright

    export(as_converted(pipeline, tiny_base), tmp_path / "model", "pipeline")
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "pictures"), "HF_HOME": str(tmp_path / "hub")}
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "asymflow_ft.cli", "demo", tmp_path / "model", "--base", tiny_base],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if address := re.search(r"http://127.0.0.1:\d+", line):
                break
        else:
            pytest.fail("the demo did not start:\n" + "".join(lines))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
            page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
            page.goto(address[0])
            page.evaluate(RECORD)
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait()


def fill(page, **values):
    names = {"prompt": "Prompt", "negative": "Negative prompt", "width": "Width", "height": "Height", "seed": "Seed"}
    for key, value in values.items():
        page.get_by_label(names.get(key, f"number input for {key.capitalize()}"), exact=True).fill(str(value))


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def state(page, pattern):
    """The state once it matches."""
    from playwright.sync_api import expect

    line = page.locator(".state .done + span")
    expect(line).to_have_text(re.compile(pattern), timeout=60_000)
    return line.inner_text()


def picture(page, name):
    page.wait_for_function(f"document.querySelector('#{name} img').naturalWidth > 0")  # 0: a broken picture
    return Image.open(io.BytesIO(page.request.get(page.locator(f"#{name} img").get_attribute("src")).body()))


def test_a_visit(page, pipeline, tiny_base):
    fill(page, prompt="red apple", negative="blurry", width=96, steps=6, seed=5)
    page.get_by_label("New seed each time").uncheck()
    press(page, "Draw")
    state(page, "^seed 5, 96x64, 6 steps in .* base in")
    seen = [yaml.safe_load(entry) for entry in page.evaluate("window.shown")]
    previews = {image for image, _, text in seen if text.startswith("step")} - {None}
    assert len(previews) > 2, seen

    base = flux2.load_parts(tiny_base, ("vae", "transformer", "scheduler"), torch.float32)
    *_, expected = demo.Studio(pipeline, base, flux2).draw(demo.Settings("red apple", "blurry", 96, 64, 6, 4.0, 5))
    assert picture(page, "picture").tobytes() == expected.picture.tobytes()
    assert picture(page, "base").tobytes() == expected.base_picture.tobytes()

    fill(page, width=100)
    press(page, "Draw")
    message = "height 64 and width 100 must be multiples of 16; the nearest are 64 and 96"
    page.get_by_test_id("toast-body").get_by_text(message).wait_for()
    state(page, message)
    assert picture(page, "picture").tobytes() == expected.picture.tobytes()
    fill(page, width=96, prompt="")
    press(page, "Draw")
    state(page, "the prompt is empty")
    fill(page, prompt="<b>rocket</b>", steps=2)
    page.get_by_label("Prompt", exact=True).press("Shift+Enter")
    state(page, "^seed 5, 96x64, 2 steps in")


def draw_for_minutes(page):
    fill(page, prompt="rocket", width=512, height=512, steps=100)
    press(page, "Draw")
    state(page, r"^step [2-9] of 100")


def test_a_stopped_or_left_page_frees_the_model_and_seeds_are_new(page):
    draw_for_minutes(page)
    begun = time.perf_counter()
    press(page, "Stop")
    state(page, "^stopped")
    time.sleep(1.5)
    assert state(page, "^stopped$") and page.get_by_test_id("toast-body").count() == 0
    other = page.context.new_page()
    other.goto(page.url)
    draw_for_minutes(other)
    other.close()
    drawn = []
    for _ in range(2):
        fill(page, width=64, height=64, steps=2)
        press(page, "Draw")
        used = re.match(r"seed (\d+), 64x64, 2 steps", state(page, rf"^seed (?!{drawn[-1] if drawn else 'x'},)"))[1]
        assert page.get_by_label("Seed", exact=True).input_value() == used
        drawn.append(used)
    assert drawn[0] != drawn[1]
    assert time.perf_counter() - begun < 40  # either of them alone would take minutes


def test_a_picture_is_sent_once(pipeline, tiny_base):
    """Gradio writes the file of an equal picture anew, which breaks it for a browser that reads it at that moment."""
    base = flux2.load_parts(tiny_base, ("vae", "transformer", "scheduler"), torch.float32)
    app = demo.build_app(demo.Studio(pipeline, base, flux2), "model")
    (draw,) = (event.fn for event in app.fns.values() if event.api_name == "draw")
    sent = {"picture": [], "base": []}
    for news in draw("red apple", "", 64, 64, 3, 4.0, False, 5):
        for box, value in news.items():
            if box.elem_id in sent:
                sent[box.elem_id].append(value)
    assert len(sent["picture"]) >= 3 and len({one.tobytes() for one in sent["picture"]}) == len(sent["picture"])
    assert sent["base"][0] is None and len(sent["base"]) == 2


def test_a_space_is_written_once_and_for_models_of_the_hub(tmp_path, capsys):
    folder = tmp_path / "space"

    def export(model):
        return main(["demo", model, "--export-space", str(folder)])

    assert export("me/model") == 0
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert front["sdk_version"] == version("gradio") and front["models"] == ["me/model"] and "license" not in front
    needed = (folder / "requirements.txt").read_text().split()
    assert f"asymflow-ft=={version('asymflow-ft')}" in needed and f"diffusers=={version('diffusers')}" in needed
    for model, message in [("me/model", "not empty"), (str(tmp_path), "a local path"), ("model", "no Hub id")]:
        assert export(model) == 1 and message in capsys.readouterr().err
