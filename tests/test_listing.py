"""`asymflow-ft families`: what is listed is tested, refusals say why, and no other code knows names."""

import json
import re
from inspect import signature

import pytest

from asymflow_ft import cli, families
from tests.conftest import REPOSITORY
from tests.families import conftest, test_base, test_training

DIFFUSERS = "diffusers"
REFUSED = {
    "Wan": ("WanPipeline", {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}, "several frames"),
    "LTX": ("LTXImageToVideoPipeline", {"transformer": "LTXVideoTransformer3DModel"}, "several frames"),
    "Hunyuan": ("HunyuanVideo15Pipeline", {"vae": "AutoencoderKLHunyuanVideo15"}, "several frames"),
    "SVD": ("StableVideoDiffusionPipeline", {"unet": "UNetSpatioTemporalConditionModel"}, "several frames"),
    "SD 1.5": ("StableDiffusionPipeline", {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}, "U-Net"),
    "SDXL": ("StableDiffusionXLPipeline", {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}, "U-Net"),
    "RAE": ("RAEDiTPipeline", {"transformer": "RAEDiT2DModel", "vae": "AutoencoderRAE"}, "representation encoder"),
    "aMUSEd": ("AmusedPipeline", {"transformer": "UVit2DModel", "vqvae": "VQModel"}, "discrete tokens"),
    "GLM": ("GlmImagePipeline", {"transformer": "GlmImageTransformer2DModel", "vae": "AutoencoderKL"}, "discrete tok"),
    "sprint": ("SanaSprintPipeline", {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC"}, "distilled"),
    "PixArt": (
        "PixArtSigmaPipeline",
        {"transformer": "PixArtTransformer2DModel", "vae": "AutoencoderKL", "scheduler": "DDPMScheduler"},
        "noise prediction",
    ),
    "pixels": ("PRXPixelPipeline", {"transformer": "PRXTransformer2DModel"}, "pixels already.*init_from"),
    "ours": (["pipeline_x", "PixelPipeline"], {"transformer": "X", "subspace": "PixelSubspace"}, "pixels already"),
    "unknown": (
        "Lumina2Pipeline",
        {"transformer": "Lumina2Transformer2DModel", "vae": "AutoencoderKL", "scheduler": "FlowMatchEulerDiscrete"},
        r"is a Lumina2Pipeline; asymflow-ft converts \w+Pipeline, .*can be added",
    ),
}  # fmt: skip
# of models, in any form: klein-4B, FLUX.2, Flux2Pipeline, z_image, Qwen3, SD3.5
NAMES = re.compile(r"flux|klein|qwen|z.?image|sd3|sd.3|stable.?diffusion|sana|lumina|wan ?\d|hunyuan", re.IGNORECASE)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_told_why(case, tmp_path):
    name, parts, message = REFUSED[case]
    index = {
        "_class_name": name,
        **{part: [DIFFUSERS, kind] for part, kind in parts.items()},
        "safety_checker": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        families.family_of(str(tmp_path))


def test_folders_without_a_pipeline_are_told_what_they_are(tmp_path, tiny_base):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "janus", "architectures": ["JanusForConditional"]})
    )
    with pytest.raises(ValueError, match=r"transformers model \(janus\).*discrete tokens"):
        families.family_of(str(tmp_path))
    with pytest.raises(ValueError, match=r"one part alone.*one level up"):
        families.family_of(f"{tiny_base}/transformer")
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        families.family_of(f"{tiny_base}/model_index.json")


def test_the_command_lists_what_the_tests_state(capsys, tiny_base):
    assert cli.main(["families"]) == 0
    printed = capsys.readouterr().out
    for family in families._MODULES:
        for named in (families.name_of(family), *family.PIPELINES, *map("{0[0]} ({0[1]})".format, family.CHECKPOINTS)):
            assert named in printed
    tests = [(name, test) for file in (test_base, test_training) for name, test in vars(file).items()]
    laws = [name for name, test in tests if name.startswith("test_") and "tiny" in signature(test).parameters]
    assert list(families.LAWS) == laws
    assert conftest.NAMES == [families.name_of(family) for family in families._MODULES]
    assert cli.main(["families", tiny_base]) == 0
    assert f"{tiny_base} can be converted" in capsys.readouterr().out
    assert cli.main(["families", f"{tiny_base}/vae"]) == 1


def test_nothing_outside_families_knows_a_family():
    """Neither in code nor in comments; a family's own names are found too, should NAMES not know them. The paper's
    tables and the benchmark's architectures are of models by name."""
    own = {
        name for family in families._MODULES
        for name in (families.name_of(family), *family.PIPELINES, family.TRANSFORMER.__name__, family.ADAPTER_CLASS)
    }  # fmt: skip
    files = [file for file in (REPOSITORY / "asymflow_ft").rglob("*.py") if file.parent.name != "families"]
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    assert len(files) > 40
    told = [at for at in lines if at[0] not in ("paper.py", "architectures.py") and '"--arch"' not in at[1]]
    assert not [at for at in told if NAMES.search(at[1]) or any(name in at[1] for name in own)]
