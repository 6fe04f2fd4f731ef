"""A converted model in the browser: a Gradio app with a picture per step, and the folder of a Hugging Face Space."""

import html
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from asymflow_ft.align import to_picture
from asymflow_ft.components.memory import memory_is_full
from asymflow_ft.components.pipelines import CFG_SCALE, NEGATIVE_PROMPT
from asymflow_ft.export import load_pixel_pipeline
from asymflow_ft.families import family_of
from asymflow_ft.hub.cards import card_licence
from asymflow_ft.hub.provenance import versions
from asymflow_ft.hub.space import space_files
from asymflow_ft.training.run import process_state
from asymflow_ft.training.validation import base_noise, prompt_noise

PREVIEW = 512  # pixels; the longer side of a step's picture, so that sending it takes no time
SEEDS = 2**31
INSTALL = "the demo needs Gradio: pip install 'asymflow-ft[demo]'"
CSS = """
.picture img {width: 100%; height: 100%; object-fit: contain}
.state span {display: block; margin-top: 8px}
.state .done {height: 6px; border-radius: 3px; background: var(--border-color-primary)}
.state .done div {height: 100%; border-radius: 3px; background: var(--color-accent)}
"""


@dataclass(frozen=True)
class Settings:
    """What a visitor asked for. width, height: pixels."""

    prompt: str
    negative: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int


@dataclass(frozen=True)
class Shown:
    """How far a drawing is. done: share of all steps, 1 when it is over."""

    text: str
    done: float
    picture: Image.Image | None = None
    base_picture: Image.Image | None = None


class Stopped(Exception):
    """The visitor asked for an end."""


class Studio:
    """The models, and whose turn it is with them: one drawing at a time, however many visitors there are.

    Args:
        pipeline: pixel pipeline. base: the stock pipeline with transformer, VAE and scheduler, or None. family: of the
            base.

    Raises:
        ValueError: the base is not what the pipeline was made from.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, base: DiffusionPipeline | None = None, family: ModuleType | None = None
    ):
        self.pipeline, self.base, self.family = pipeline, base, family
        self._turn = Lock()
        pipeline.set_progress_bar_config(disable=True)
        if base is not None:
            base.set_progress_bar_config(disable=True)
            here = (family.text_dim(pipeline.transformer), pipeline.subspace.config["rank"])
            there = (family.text_dim(base.transformer), family.latent_dim(base.vae))
            if here != there:
                raise ValueError(
                    f"--base is not what the model was made from: its text width and latent channels are {there}, "
                    f"the model's {here}; give the base that the model's card or recipe names"
                )

    def draw(self, settings: Settings) -> Iterator[Shown]:
        """Draw in a thread and tell after each step. Closing the iterator ends the drawing after the step in hand.

        Raises:
            ValueError: settings that cannot be drawn.
        """
        if not settings.prompt.strip():
            raise ValueError("the prompt is empty; describe the picture first")
        most = self.pipeline.config.max_pixels
        if min(settings.width, settings.height) < 1 or settings.width * settings.height > most:
            raise ValueError(
                f"a picture of {settings.width}x{settings.height} cannot be drawn; width times height may be "
                f"{most:,} at most, such as {int(most**0.5)}x{int(most**0.5)}"
            )
        told: SimpleQueue[Shown | Exception] = SimpleQueue()
        stop = Event()
        Thread(target=self._work, args=(settings, told, stop), daemon=True).start()
        try:
            while True:
                news = told.get()
                if isinstance(news, Exception):
                    raise news
                yield news
                if news.done == 1:
                    return
        finally:
            stop.set()

    @torch.no_grad()
    def _work(self, settings: Settings, told: SimpleQueue, stop: Event) -> None:
        with self._turn:
            try:
                self._draw(settings, told, stop)
            except Exception as error:  # raised again where the visitor is told
                told.put(error)

    def _draw(self, settings: Settings, told: SimpleQueue, stop: Event) -> None:
        pipeline, steps, size = self.pipeline, settings.steps, (settings.height, settings.width)
        total = steps if self.base is None else 2 * steps
        noise = prompt_noise(1, size, settings.seed)  # the picture is that of `asymflow-ft sample` with this seed

        def tell(shown: Shown) -> None:
            if stop.is_set():
                raise Stopped
            told.put(shown)

        def on_step(_: Any, i: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
            preview = to_picture(pipeline.codec.decode(tensors["clean"])[0])
            preview.thumbnail((PREVIEW, PREVIEW))
            tell(Shown(f"step {i + 1} of {steps}", 0.99 * (i + 1) / total, preview))
            return {}

        tell(Shown("reading the prompt", 0))
        length = pipeline.config.max_sequence_length
        embeds, negative = (pipeline.embed([text], length) for text in (settings.prompt, settings.negative))
        started = time.perf_counter()
        picture = pipeline(
            prompt_embeds=embeds, negative_prompt_embeds=negative, latents=noise, height=size[0], width=size[1],
            num_inference_steps=steps, guidance_scale=settings.guidance, callback_on_step_end=on_step,
            callback_on_step_end_tensor_inputs=["clean"],
        ).images[0]  # fmt: skip
        summary = f"seed {settings.seed}, {size[1]}x{size[0]}, {steps} steps in {time.perf_counter() - started:.1f} s"
        base_picture = None
        if self.base is not None:

            def on_base_step(i: int) -> None:
                tell(Shown(f"base, step {i + 1} of {steps}", 0.99 * (steps + i + 1) / total, picture))

            started = time.perf_counter()
            (base_picture,), _ = self.family.draw_base(
                self.base, base_noise(noise, pipeline.subspace), embeds, negative[0], size, steps, settings.guidance,
                on_step=on_base_step,
            )  # fmt: skip
            summary += f", base in {time.perf_counter() - started:.1f} s"
        tell(Shown(summary, 1, picture, base_picture))


def open_studio(model: str, base: str | None = None, dtype: str | None = None) -> Studio:
    """Load a converted model, and its latent base to compare with, onto this machine's device.

    Args:
        model, base: folder or Hub id. dtype: "bfloat16" or "float32"; None is bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: one of them cannot be read, or they do not belong together.
    """
    device = process_state().device
    precision = getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    pipeline = load_pixel_pipeline(model, precision).to(device)
    if base is None:
        return Studio(pipeline)
    family = family_of(base)
    parts = family.load_parts(base, ("vae", "transformer", "scheduler"), precision).to(device)
    return Studio(pipeline, parts, family)


def build_app(studio: Studio, title: str) -> Any:
    """The page, as `gradio.Blocks`.

    Raises:
        ValueError: Gradio is not installed.
    """
    gr = _gradio()
    config, patch = studio.pipeline.config, studio.pipeline.subspace.config["patch"]
    guidance = CFG_SCALE if studio.pipeline.distilled_guidance is None else 1.0

    def draw(
        prompt: str, negative: str, width: int | None, height: int | None, steps: int, scale: float,
        at_random: bool, seed: int | None,
    ) -> Iterator[dict]:  # fmt: skip
        used = secrets.randbelow(SEEDS) if at_random else seed
        try:
            if None in (width, height, used):
                raise ValueError("width, height and seed need a number each")
            yield {seed_box: used}
            sent: dict[Any, Image.Image | None] = {}
            for shown in studio.draw(Settings(prompt, negative, width, height, int(steps), scale, used)):
                boxes = {} if shown.picture is None else {picture_box: shown.picture, base_box: shown.base_picture}
                # Gradio names files by content and would write one anew while the browser reads it
                new = {box: picture for box, picture in boxes.items() if box not in sent or sent[box] != picture}
                sent |= new
                yield {state: _bar(shown.text, shown.done)} | new
        except (ValueError, RuntimeError) as error:
            if not isinstance(error, ValueError) and not memory_is_full(error):
                raise
            yield {state: _bar(str(error), 0)}
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(f"## {title}\nDraws in pixel space, without a VAE; every step shows what the picture will be.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(
                    label="Prompt", lines=2, max_lines=8, placeholder="what to draw; Shift+Enter draws", autofocus=True
                )  # fmt: skip
                with gr.Row():
                    start = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Stop", variant="stop")
                negative = gr.Textbox(label="Negative prompt", value=NEGATIVE_PROMPT, lines=2)
                with gr.Row():
                    width, height = (
                        gr.Number(label=name, value=config.default_size, precision=0, step=patch, min_width=120)
                        for name in ("Width", "Height")
                    )
                steps = gr.Slider(1, 100, value=38, step=1, label="Steps")
                scale = gr.Slider(1, 10, value=guidance, step=0.1, label="Guidance (1: off)")
                with gr.Row():
                    seed_box = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=120)
                    at_random = gr.Checkbox(label="New seed each time", value=True, min_width=120)
            with gr.Column(scale=5):
                state = gr.HTML(_bar("ready", 0), elem_classes="state")
                with gr.Row():
                    picture_box, base_box = (
                        gr.Image(
                            label=label, format="png", height=600 if studio.base is None else 480, interactive=False,
                            visible=visible, buttons=["download", "fullscreen"], elem_classes="picture", elem_id=name,
                        )
                        for label, name, visible in (
                            ("Pixel model", "picture", True),
                            ("Latent base, same noise", "base", studio.base is not None),
                        )
                    )  # fmt: skip
        triggers = [start.click, prompt.submit]
        gr.on(triggers, lambda: _bar("waiting for a turn", 0), None, state, queue=False, show_progress="hidden")
        drawing = gr.on(
            triggers, draw,
            [prompt, negative, width, height, steps, scale, at_random, seed_box],
            [picture_box, base_box, state, seed_box], concurrency_limit=1, show_progress="hidden", api_name="draw",
        )  # fmt: skip
        stop.click(lambda: _bar("stopped", 0), None, state, cancels=drawing, queue=False, show_progress="hidden")
    return app


def serve(
    model: str, base: str | None = None, dtype: str | None = None, host: str | None = None, port: int | None = None,
    share: bool = False,
) -> None:  # fmt: skip
    """Open a model and serve its page until Ctrl-C.

    Args:
        model, base, dtype: see open_studio. host, port: None is 127.0.0.1 and the first free port from 7860, or what
            GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say. share: also reachable through Gradio's public address.

    Raises:
        ValueError: Gradio is not installed, or see open_studio.
    """
    _gradio()  # before minutes of loading
    app = build_app(open_studio(model, base, dtype), model)
    app.launch(
        server_name=host, server_port=port, share=share, css=CSS, footer_links=["api"], run_history=False,
        ssr_mode=False,
    )  # fmt: skip


def export_space(model: str, folder: Path, base: str | None = None, dtype: str | None = None) -> None:
    """Write the folder of a Hugging Face Space that serves a model of the Hub with this very module.

    Raises:
        ValueError: a model or base that is no Hub id, a folder with something in it, or no Gradio whose version could
            be written down.
    """
    _gradio()
    for name in (model, base) if base else (model,):
        if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(
                f"a Space reads its models from the Hub, and {name} is a local path or no Hub id such as user/name; "
                "upload it first and give its id"
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--export-space {folder} exists and is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in space_files(model, base, dtype, card_licence(model), version("gradio"), versions()).items():
        (folder / name).write_text(content, encoding="utf-8")


def _bar(text: str, done: float) -> str:
    return f'<div class="done"><div style="width: {done:.1%}"></div></div><span>{html.escape(text)}</span>'


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ValueError(INSTALL) from error
    return gradio
