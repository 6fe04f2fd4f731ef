"""The demo without its page: what is drawn, in which order, for whom, and the folder of a Space."""

import sys
import threading
import time

import pytest
import torch
import yaml
from diffusers import Flux2Transformer2DModel
from packaging.requirements import Requirement

from asymflow_ft import demo
from asymflow_ft.cli import main
from asymflow_ft.families import flux2
from asymflow_ft.hub.space import space_files
from asymflow_ft.method.patches import to_tokens

SETTINGS = demo.Settings("red apple", "blurry", 64, 96, 3, 4.0, 7)


@pytest.fixture(scope="module")
def base(tiny_base):
    return flux2.load_parts(tiny_base, ("vae", "transformer", "scheduler"), torch.float32)


def changed(**values):
    return demo.Settings(**(vars(SETTINGS) | values))


def test_every_step_is_seen_and_the_picture_is_that_of_sample(pipeline):
    previews = []

    def look(pipe, step, timestep, tensors):
        rgb = pipe.codec.decode(tensors["clean"])[0] / 2 + 0.5
        previews.append((255 * rgb).round().byte().permute(1, 2, 0).numpy().tobytes())
        return {}

    (expected,) = pipeline(
        "red apple", "blurry", 96, 64, 3, 4.0, generator=torch.Generator().manual_seed(7), callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["clean"],
    ).images  # fmt: skip
    first, *steps, last = demo.Studio(pipeline).draw(SETTINGS)
    assert first.done == 0 and first.picture is None
    assert [shown.picture.tobytes() for shown in steps] == previews and len(set(previews)) == 3
    assert [shown.text for shown in steps] == [f"step {i} of 3" for i in (1, 2, 3)]
    assert [shown.done for shown in steps] == pytest.approx([0.33, 0.66, 0.99])
    assert last.done == 1 and last.picture.tobytes() == expected.tobytes() and last.picture.size == (64, 96)
    assert last.text.startswith("seed 7, 64x96, 3 steps in ") and last.base_picture is None


def test_large_previews_are_made_small(pipeline, monkeypatch):
    monkeypatch.setattr(demo, "PREVIEW", 32)
    *_, step, last = demo.Studio(pipeline).draw(changed(steps=1))
    assert step.picture.size == (21, 32) and last.picture.size == (64, 96)


def test_the_base_starts_from_the_projected_noise(pipeline, base):
    noise = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(7))
    projected = (to_tokens(noise, 16) @ pipeline.subspace.basis).mT.unflatten(2, (6, 4))
    embeds, negative = (
        pipeline.encode_prompt(text, max_sequence_length=32)[0] for text in (SETTINGS.prompt, SETTINGS.negative)
    )
    with torch.no_grad():
        (expected,) = base(
            prompt_embeds=embeds, negative_prompt_embeds=negative, latents=projected, height=96, width=64,
            num_inference_steps=3, guidance_scale=4.0,
        ).images  # fmt: skip
    shown = list(demo.Studio(pipeline, base, flux2).draw(SETTINGS))
    assert shown[-1].base_picture.tobytes() == expected.tobytes()
    assert [one.text for one in shown[4:7]] == [f"base, step {i} of 3" for i in (1, 2, 3)]
    assert {one.picture.tobytes() for one in shown[4:]} == {shown[-1].picture.tobytes()}
    assert [one.done for one in shown] == sorted(one.done for one in shown)


@pytest.mark.parametrize("network", ["pixels", "base"])
def test_closing_ends_the_drawing_and_lets_the_next_begin(network, pipeline, base):
    studio = demo.Studio(pipeline, base, flux2)
    calls = []
    hooked = base if network == "base" else pipeline
    hook = hooked.transformer.register_forward_pre_hook(lambda *_: calls.append(threading.get_ident()))
    drawing = studio.draw(changed(steps=20))
    while not calls:
        next(drawing)
    drawing.close()
    after = len(calls)
    *_, last = studio.draw(changed(steps=2))
    hook.remove()
    assert last.done == 1
    threads = list(dict.fromkeys(calls))
    assert len(threads) == 2 and calls == sorted(calls, key=threads.index)
    assert calls.count(threads[0]) <= after + 2  # the step in hand, with its pass for guidance


def test_two_visitors_take_turns(pipeline):
    studio, calls, pictures = demo.Studio(pipeline), [], {}
    hook = pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(threading.get_ident()))

    def visit(seed):
        *_, last = studio.draw(changed(seed=seed))
        pictures[seed] = last.picture.tobytes()

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in (1, 2)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    hook.remove()
    threads = list(dict.fromkeys(calls))
    assert len(calls) == 12 and len(threads) == 2 and calls == sorted(calls, key=threads.index)
    assert pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"width": 70}, "height 96 and width 70 must be multiples of 16; the nearest are 96 and 64"),
        ({"height": 0}, "a picture of 64x0 cannot be drawn"),
        ({"width": 65536, "height": 65536}, "may be 4,194,304 at most, such as 2048x2048"),
        ({"steps": 0}, "at least one step"),
    ],
)
def test_what_cannot_be_drawn_is_said(change, message, pipeline):
    studio = demo.Studio(pipeline)
    with pytest.raises(ValueError, match=message):
        list(studio.draw(changed(**change)))
    assert list(studio.draw(changed(steps=1)))[-1].done == 1


def test_a_base_of_another_kind_is_refused(pipeline, base):
    other = dict(base.components)
    small = dict(base.transformer.config) | {"joint_attention_dim": 96, "num_layers": 1, "num_single_layers": 1}
    other["transformer"] = Flux2Transformer2DModel.from_config(small)
    with pytest.raises(ValueError, match=r"--base is not what the model was made from: .* \(96, 128\).* \(192, 128\)"):
        demo.Studio(pipeline, type(base)(**other), flux2)


def test_without_gradio_the_install_line_comes_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for options in ([], ["--export-space", str(tmp_path / "space")]):
        start = time.perf_counter()
        assert main(["demo", "no/such-model", *options]) == 1
        assert "pip install 'asymflow-ft[demo]'" in capsys.readouterr().err
        assert time.perf_counter() - start < 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", [None, "some/base"])
def test_a_space_serves_the_model_with_this_module(base, monkeypatch):
    licence = {"license": "other", "license_name": "flux-non-commercial", "license_link": "https://example.org/l"}
    versions = {"asymflow-ft": "0.1.0", "torch": "2.13.0+cpu"}
    files = space_files("me/my-model", base, "bfloat16", licence, "6.31.0", versions)
    assert sorted(files) == ["README.md", "app.py", "requirements.txt"]
    _, front, page = files["README.md"].split("---\n")
    assert yaml.safe_load(front) == licence | {
        "title": "my-model", "sdk": "gradio", "sdk_version": "6.31.0", "app_file": "app.py", "tags": ["asymflow"],
        "python_version": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "models": ["me/my-model", *([base] if base else [])],
    }  # fmt: skip
    assert "https://huggingface.co/me/my-model" in page and "Licence of the model: flux-non-commercial." in page
    needed = {one.name: str(one.specifier) for one in map(Requirement, files["requirements.txt"].split())}
    assert needed == {"asymflow-ft": "==0.1.0", "torch": "==2.13.0"}
    served = {}
    monkeypatch.setattr(demo, "serve", lambda model, base=None, dtype=None: served.update(of=(model, base, dtype)))
    exec(files["app.py"], {})
    assert served == {"of": ("me/my-model", base, "bfloat16")}
