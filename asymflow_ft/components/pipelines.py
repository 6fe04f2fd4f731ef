"""Text to image in pixel space: what every family's pipeline shares. A family adds its parts and its network call."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.cache_utils import CacheMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.components.memory import memory_is_full
from asymflow_ft.components.norms import narrow_norms
from asymflow_ft.components.subspace import Cond, PixelModel
from asymflow_ft.method.asymflow import velocity_to_clean
from asymflow_ft.method.guidance import clamp_velocity, guide
from asymflow_ft.method.noise import dynamic_shift, inference_sigmas
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.method.sampling import denoise, prepare_solver

NEGATIVE_PROMPT = "Low quality, worst quality, blurry, deformed, bad anatomy, unclear text"
CFG_SCALE = 4.0
# of condition images, as diffusers' pipelines that take them have it
MIN_CONDITION_SIDE, MAX_CONDITION_ASPECT, MAX_CONDITION_PIXELS = 64, 8, 1024**2


def flow_solver() -> UniPCMultistepScheduler:
    """UniPC for flow matching; the pipeline computes the shifted levels itself, so `flow_shift` stays 1."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)


class PixelPipelineMixin:
    """`__call__` for a pixel-space text-to-image pipeline.

    The class that mixes it in calls `set_up`, and has `output_class`, the static method `predict` (see PixelModel),
    the method `embed(prompts, max_length)` for text embeddings (B, L, E) with zeros in the rows of padding, and the
    config entries

    - shift, shift_mode: timestep shift at `base_pixels`; "static" everywhere, or "sqrt" / "exp" with the size
    - base_pixels, max_pixels, max_shift: the second anchor of a dynamic shift
    - default_size: side of an image when height and width are not given
    - max_sequence_length: text tokens
    - distilled_guidance: the guidance value that a network with embedded guidance sees, else None

    zeros_are_padding: whether the network leaves rows of zeros at the end of a prompt out, or attends to every row.
    """

    zeros_are_padding = False
    model_cpu_offload_seq = "text_encoder->transformer"
    _exclude_from_cpu_offload = ["subspace"]  # its tensors are read without a forward, which no hook would notice
    _callback_tensor_inputs = ["latents", "clean", "prompt_embeds", "negative_prompt_embeds"]
    predict: Callable[..., Tensor]
    embed: Callable[..., Tensor]

    def set_up(self: Any, modules: dict[str, Any], **settings: Any) -> None:
        """Register components and config. The stock __init__ is not run: it would ask for a VAE."""
        DiffusionPipeline.__init__(self)
        if modules["transformer"] is not None:
            narrow_norms(modules["transformer"])
        self.register_modules(**modules)
        self.register_to_config(**settings)

    @property
    def distilled_guidance(self: Any) -> float | None:
        return self.config.distilled_guidance

    @property
    def pixel_model(self: Any) -> PixelModel:
        return PixelModel(self.transformer, self.subspace, type(self).predict, self.distilled_guidance)

    def shift_at(self: Any, height: int, width: int) -> float:
        """The timestep shift that the pipeline's config gives for an image size."""
        c = self.config
        if c.shift_mode == "static":
            return c.shift
        return dynamic_shift(height * width, c.shift_mode, c.base_pixels, c.shift, c.max_pixels, c.max_shift)

    @torch.no_grad()
    def __call__(
        self: Any,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 38,
        guidance_scale: float | None = None,
        orthogonal_guidance: float = 1.0,
        clamp: bool = True,
        shift: float | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 the diffusers signature
        max_sequence_length: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        batch_guidance: bool = False,
    ) -> Any:
        """Draw images.

        Args:
            prompt, negative_prompt: one or a list; a single negative prompt serves all. Or pass `prompt_embeds`
                (B, L, E) and `negative_prompt_embeds`.
            height, width: pixels, multiples of the patch (16); those of the first condition image when not given, or
                else the config's.
            num_inference_steps: solver steps; 38 is the released default, 32 the paper's.
            guidance_scale: above 1 adds an unconditional pass per step; None is 4, or 1 for a network with distilled
                guidance. orthogonal_guidance: 0 = plain guidance, 1 = remove its part along the clean estimate.
            clamp: keep every step's clean estimate inside the display gamut.
            shift: timestep shift; None takes the pipeline's own for this size.
            image: condition images, one or several for every prompt, as `fit_condition` takes them. Text-to-image
                training loses them; docs/data.md says how pairs bring them back.
            generator: CPU or device generator(s) for the noise. latents: the noise itself, (B, 3, H, W) N(0, 1).
            output_type: "pil", "np", "pt" ((B, 3, H, W) in [0, 1]) or "latent" (pixel space, not decoded).
            callback_on_step_end: as in diffusers. Beside `latents` it may ask for `clean`, the step's estimate of the
                image, (B, 3, H, W) in pixel space; `codec.decode` makes it a picture. Changing it changes nothing.
            batch_guidance: predict with and without the prompt in one call on a batch of 2B, not in two: the same
                pictures with more memory, and faster where a call costs more than its work. Where a GPU's memory does
                not suffice, a warning says so, and the rest of this call is drawn with two.

        Returns:
            The family's output class with `.images`, or a tuple with them.

        Raises:
            ValueError: sizes that the patch does not divide, both or neither of prompt and prompt_embeds, noise or
                embeddings of another shape, a condition image that cannot be used, or `batch_guidance` without
                guidance or where the network attends to every row and the two embeddings have different lengths.
        """
        patch = self.subspace.config["patch"]
        images = [] if image is None else image if isinstance(image, list) else [image]
        conditions = [fit_condition(one, patch) for one in images]
        default = (conditions[0].width, conditions[0].height) if conditions else (self.config.default_size,) * 2
        width, height = width or default[0], height or default[1]
        if height % patch or width % patch:
            raise ValueError(
                f"height {height} and width {width} must be multiples of {patch}; "
                f"the nearest are {max(round(height / patch), 1) * patch} and {max(round(width / patch), 1) * patch}"
            )
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either `prompt` or `prompt_embeds`, not both and not neither")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback can ask for {self._callback_tensor_inputs}, not for {sorted(unknown)}")

        device = self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt
        count = len(prompts) if prompts is not None else len(prompt_embeds)
        negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else negative_prompt
        if len(negatives) != count:
            raise ValueError(f"{count} prompts need one negative prompt or {count}, got {len(negatives)}")
        length = max_sequence_length or self.config.max_sequence_length
        if guidance_scale is None:
            guidance_scale = CFG_SCALE if self.distilled_guidance is None else 1.0
        guided = guidance_scale > 1
        if batch_guidance and not guided:
            raise ValueError(
                f"batch_guidance is of predictions with and without the prompt, and guidance_scale {guidance_scale:g} "
                "makes one alone; leave it out, or guide with more than 1"
            )

        def encode(texts: list[str] | None, embeds: Tensor | None) -> Tensor:
            embeds = self.embed(texts, length) if embeds is None else embeds.to(device)
            return embeds.repeat_interleave(num_images_per_prompt, dim=0)

        prompt_embeds = encode(prompts, prompt_embeds)
        negative_prompt_embeds = encode(negatives, negative_prompt_embeds) if guided else None

        shape = (count * num_images_per_prompt, 3, height, width)
        if latents is None:
            # float32 noise from the CPU generator is the same on every device and in every precision
            latents = randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be noise of shape {shape} (B, 3, H, W), got {tuple(latents.shape)}")
        grid = (height // patch, width // patch)
        x = to_tokens(latents.to(device, torch.float32), patch)

        references = [self.codec.encode(rgb_tensor(one)[None]).to(device) for one in conditions]
        model, cached = self.pixel_model, isinstance(self.transformer, CacheMixin)
        clean = x

        def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
            nonlocal clean, batch_guidance

            def conditioned_on(name: str, embeds: Tensor, x_t: Tensor = x_t) -> Tensor:
                images = tuple(one.expand(len(x_t), -1, -1, -1) for one in references)
                with self.transformer.cache_context(name) if cached else nullcontext():
                    cond = Cond(embeds, model.guidance, images)
                    return model.velocity(x_t, sigma.expand(len(x_t), 1, 1), cond, grid)

            level = sigma.expand(len(x_t), 1, 1)
            if batch_guidance:
                both = in_one_batch(prompt_embeds, negative_prompt_embeds, self.zeros_are_padding)
                try:
                    v, v_uncond = conditioned_on("cond_uncond", both, torch.cat([x_t, x_t])).chunk(2)
                except RuntimeError as error:
                    if not memory_is_full(error):
                        raise
                    batch_guidance = False
                if not batch_guidance:  # only here the error is gone, and with it the tensors of the call
                    if cached:
                        self.transformer._reset_stateful_cache()
                    torch.cuda.empty_cache()  # for what allocates past torch; does nothing without CUDA
                    warnings.warn(
                        f"the memory does not suffice for batch_guidance with its batch of {len(both)}, so drawing "
                        "goes on with two calls a step: the same pictures to rounding",
                        stacklevel=2,
                    )
            if not batch_guidance:
                v = conditioned_on("cond", prompt_embeds)
                v_uncond = conditioned_on("uncond", negative_prompt_embeds) if guided else None
            if guided:
                v = guide(v, v_uncond, guidance_scale, x_t - level * v, orthogonal_guidance)
            if clamp:
                v = clamp_velocity(
                    v, x_t, level, lambda x0: to_tokens(self.codec.clamp(to_image(x0, grid, patch)), patch)
                )
            clean = velocity_to_clean(v, x_t, level)
            return v

        sigmas = inference_sigmas(num_inference_steps, self.shift_at(height, width) if shift is None else shift)
        prepare_solver(self.scheduler, sigmas, device)
        with self.progress_bar(total=num_inference_steps) as progress:

            def on_step(i: int, x: Tensor) -> Tensor:
                nonlocal prompt_embeds, negative_prompt_embeds
                progress.update()
                if callback_on_step_end is None:
                    return x
                latents = to_image(x, grid, patch)
                tensors = {
                    "latents": latents,
                    "clean": to_image(clean, grid, patch),
                    "prompt_embeds": prompt_embeds,
                    "negative_prompt_embeds": negative_prompt_embeds,
                }
                asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = tensors | callback_on_step_end(self, i, self.scheduler.timesteps[i], asked)
                prompt_embeds, negative_prompt_embeds = changed["prompt_embeds"], changed["negative_prompt_embeds"]
                return x if changed["latents"] is latents else to_tokens(changed["latents"], patch)

            x = denoise(velocity, x, self.scheduler, sigmas, on_step)

        images = to_image(x, grid, patch)
        if lost := int((~images.isfinite().flatten(1).all(1)).sum()):
            warnings.warn(
                f"{lost} of {len(images)} pictures hold values that are not finite, which come out black: "
                f"{prompt_embeds.dtype} is too narrow for this network, or its weights are damaged",
                stacklevel=2,
            )
        if output_type != "latent":
            # the processor maps [-1, 1] to [0, 1]
            processor = VaeImageProcessor(vae_scale_factor=patch)
            images = processor.postprocess(self.codec.decode(images).cpu(), output_type=output_type)
        self.maybe_free_model_hooks()
        return self.output_class(images=images) if return_dict else (images,)


def in_one_batch(first: Tensor, second: Tensor, zeros_are_padding: bool) -> Tensor:
    """Embeddings (B, L, E) and (B, M, E) as one batch, the shorter ones filled up with rows of zeros.

    Raises:
        ValueError: lengths differ, and the network would attend to the zeros.
    """
    if first.shape[1] != second.shape[1] and not zeros_are_padding:
        raise ValueError(
            f"batch_guidance cannot put a prompt of {first.shape[1]} rows and a negative one of {second.shape[1]} "
            "into one call, for this network attends to every row; pass embeddings of one length, or leave it out"
        )
    return pad_sequence([*first, *second], batch_first=True)


def fit_condition(image: Image.Image, patch: int) -> Image.Image:
    """A condition image in RGB at the size at which the network sees it: reduced to MAX_CONDITION_PIXELS where it has
    more, never enlarged, then cropped in the centre to multiples of the patch. The rules of diffusers' pipelines.

    Raises:
        ValueError: no PIL image, a side below 64 pixels, or more than 8 times as long as wide.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"a condition image must be a PIL image, got {type(image).__name__}; `image` takes one or a list"
        )
    width, height = image.size
    if min(width, height) < MIN_CONDITION_SIDE or max(width, height) > MAX_CONDITION_ASPECT * min(width, height):
        raise ValueError(
            f"a condition image needs sides of at least {MIN_CONDITION_SIDE} pixels and a shape of at most "
            f"{MAX_CONDITION_ASPECT}:1, got {width}x{height}"
        )
    image = image.convert("RGB")
    if width * height > MAX_CONDITION_PIXELS:
        factor = math.sqrt(MAX_CONDITION_PIXELS / (width * height))
        width, height = int(width * factor), int(height * factor)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - width // patch * patch) // 2, (height - height // patch * patch) // 2
    return image.crop((left, top, left + width // patch * patch, top + height // patch * patch))
