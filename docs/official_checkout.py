"""The authors' official code (LakonLab) without its framework, for docs/performance_reference.py.

The files of a checkout are loaded as they are. What they import of mmcv, of their registry and of their checkpoint
loader is put in its place here; their `__init__.py` files, which import all of mmgen, are not run.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import torch

COLOURS = {"type": "OklabColorEncoder", "mean": (0.56, 0.0, 0.01), "std": 0.16}
CHECKPOINTS = {}  # what the official loader finds under a name, and what it writes


class Registry(dict):
    """mmcv's, as far as the official files use one."""

    def register_module(self, **options):
        return lambda kind: self.setdefault(kind.__name__, kind)

    def build(self, config, default_args=None):
        settings = {**(default_args or {}), **config}
        return self[settings.pop("type")](**settings)


OFFICIAL = Registry()


def put(name, folder=None, **contents):
    """A module of these contents, whose submodules are the files in `folder`."""
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    vars(module).update(contents)


def open_checkout(root):
    """Fill OFFICIAL with the classes of a checkout, without its `__init__.py` files, which import all of mmgen."""

    def read(name, **options):  # copies, or in float32 the teacher would share the trained norm_out with the student
        return {key: tensor.clone() for key, tensor in CHECKPOINTS[name].items()}

    def fill(module, state, assign, **options):
        module.load_state_dict(state, strict=False, assign=assign)

    put("mmcv", is_tuple_of=lambda value, kind: True, Config=None, DictAction=None)
    put("mmcv.parallel", is_module_wrapper=lambda module: False)
    put("mmcv.runner", HOOKS=OFFICIAL, Hook=object)
    put("mmcv.runner.fp16_utils", force_fp32=lambda: lambda function: function)
    for name in ("", ".models", ".models.architectures", ".models.architectures.asymflow", ".runner", ".runner.hooks",
                 ".models.architectures.autoencoders", ".models.diffusions", ".utils", ".pipelines"):  # fmt: skip
        put("lakonlab" + name, root / ("lakonlab" + name).replace(".", "/"))
    put("lakonlab.models.builder", MODULES=OFFICIAL, MODELS=OFFICIAL, build_module=OFFICIAL.build)
    schedulers = root / "lakonlab/models/diffusions/schedulers"
    put("lakonlab.models.diffusions.schedulers", schedulers, FlowEulerODEScheduler=object)
    put("lakonlab.runner.timer", default_timers=SimpleNamespace(add_timer=lambda name: None))
    put("lakonlab.runner.checkpoint", _load_cached_checkpoint=read, load_full_state_dict=fill,
        write_checkpoint_to_file=lambda tensors, file: CHECKPOINTS.update({file: tensors}))  # fmt: skip
    put("lakonlab.pipelines.utils", LakonLabMixin=object)
    sys.modules["lakonlab.utils"].get_root_logger = lambda: None
    # what the packages themselves would import, and then the rest
    for file in ("utils.misc", "models.architectures.autoencoders.color_encoders", "models.diffusions.gaussian_flow",
                 "models.diffusions.asymflow", "models.diffusions.sampler", "models.architectures.asymflow.asymflux2",
                 "models.latent_diffusion_text_image", "runner.hooks.ema_hook"):  # fmt: skip
        found = vars(importlib.import_module(f"lakonlab.{file}"))
        package = "models.architectures" if "autoencoders" in file else file.rpartition(".")[0]
        vars(sys.modules[f"lakonlab.{package}"]).update({k: v for k, v in found.items() if not k.startswith("__")})


@OFFICIAL.register_module()
class CheapDistance(torch.nn.Module):
    """Squared error in the place of LPIPS, on both sides."""

    @staticmethod
    def map(image, target):
        return (image - target).square().mean(1, keepdim=True)

    def forward(self, image, target, weight):
        return (self.map(image, target) * weight).mean()


def frozen_network(sizes):
    """Config of their network, which lifts the checkpoint "base" with the subspace "fit"."""
    kind = "AsymFlux2Transformer2DModel"
    return {"type": kind, "pretrained": "base", "pretrained_linear_proj": "fit", "freeze": True, **sizes}


def training_model(sizes, lora_targets, perceptual):
    """Student, teacher and EMA as in their configs/asymflow/asymflux2_klein_32gpus.py, in float32 without dropout."""
    student = {
        **frozen_network(sizes), "freeze_exclude": ["x_embedder", "proj_out", "norm_out", "lora"],
        "freeze_exclude_autocast_dtype": None, "use_lora": True, "lora_rank": 256, "lora_target_modules": lora_targets,
    }  # fmt: skip
    flow = {
        "type": "AsymFlowVR", "denoising": student, "mse_loss_weight": 10.0, "loss_shift": 0.3, "sigma_min": 0.05,
        "num_timesteps": 1, "perceptual_loss": {"type": "CheapDistance"} if perceptual else None,
        "timestep_sampler": {"type": "ContinuousTimeStepSampler", "shift": 17.0, "logit_normal_enable": True},
    }  # fmt: skip
    teacher = {"type": "GaussianFlow", "denoising": frozen_network(sizes), "num_timesteps": 1}
    limits = {"teacher_test_cfg": {"guidance_scale": 1.0}, "diffusion_grad_clip": 200.0}
    return OFFICIAL["LatentDiffusionTextImage"](
        diffusion=flow, teacher=teacher, tie_teacher=True, diffusion_use_ema=True, vae=COLOURS, train_cfg=limits,
        train_cached_latents_as_latents_2=True,
    ).train()  # fmt: skip


def ema_hook():
    average = {"interval": 1, "start_iter": 100, "momentum_policy": "karras", "momentum_cfg": {"gamma": 7.0}}
    return OFFICIAL["ExponentialMovingAverageHook"](("diffusion_ema",), **average)


def drawing_pipeline(sizes):
    """Their pixel pipeline with UniPC and the shift 17 of 1024x1024, without what encodes text."""
    network = OFFICIAL.build(frozen_network(sizes)).eval()
    network.__class__ = type(network).__mro__[1]  # the class that the pipeline takes; the one for training extends it
    scheduler = importlib.import_module("lakonlab.models.diffusions.schedulers.flow_adapter").FlowAdapterScheduler
    kind = importlib.import_module("lakonlab.pipelines.pipeline_pixelflux2_klein").PixelFlux2KleinPipeline
    return kind(scheduler(shift=17.0), OFFICIAL.build(COLOURS), None, None, network)


class Settings(dict):
    __getattr__ = dict.__getitem__


def run_alignment(root, images, loader):
    """Their alignment tool on `images` that the generator function `loader` gives: what it would write to a file."""
    flow = Settings(denoising=Settings(patch_size=16), latent_patch_size=2)
    config = Settings(model=Settings(diffusion=flow, vae=COLOURS), data=Settings(train={}, train_dataloader={}))
    sys.modules["mmcv"].Config = SimpleNamespace(fromfile=lambda file: config)
    put("lakonlab.datasets", build_dataset=lambda config: range(images), build_dataloader=loader)
    sys.modules["lakonlab.models"].build_module = OFFICIAL.build
    options = {"--out": "found", "--num-images": images, "--workers": 0, "--device": "cpu"}
    sys.argv = ["", "config", "--no-progress", *(str(word) for option in options.items() for word in option)]
    put("tools", root / "tools")
    sys.modules.pop("tools.asymflow_subspace_procrustes", None)  # or it would keep the loader of another call
    importlib.import_module("tools.asymflow_subspace_procrustes").main()
    torch.set_grad_enabled(True)  # which the tool turns off
    return CHECKPOINTS.pop("found")
