"""Feature extractors and scorers: the same as the models called by hand, and what is said when they are not there."""

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.evaluation import scorers
from asymflow_ft.evaluation.features import open_features, pixel_features

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP of random weights, that sees 32 x 32 pixels and reads 16 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, 32, 32, 3), generator=g, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in pixels]


def normalised(images):
    rgb = torch.stack([rgb_tensor(image) for image in images]) / 2 + 0.5
    return (rgb - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def batch(images):
    return torch.stack([rgb_tensor(image) for image in images])


def test_clip_features_are_the_models_own(clip, images):
    features = open_features(f"clip:{clip}")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip).get_image_features(normalised(images)).pooler_output
    assert features.dim == 24
    torch.testing.assert_close(features(batch(images)), expected, rtol=1e-4, atol=1e-5)


def test_larger_pictures_are_averaged_down_before_clip_sees_them(clip, images):
    """A chequerboard of single pixels is grey to a network that sees a fourth of the size."""
    features = open_features(f"clip:{clip}")
    board = ((torch.arange(128)[:, None] + torch.arange(128)) % 2 * 2.0 - 1).expand(1, 3, 128, 128)
    grey = torch.zeros(1, 3, 128, 128)
    assert (features(board) - features(grey)).norm() < 0.05 * (features(batch(images)) - features(grey)).norm()


def test_clip_score_is_the_cosine_of_the_embeddings(clip, images, tmp_path):
    texts = ["red cat", "a blue house by the sea", "dog"]
    images[1].save(tmp_path / "one.png")
    scores = scorers.clip_scores(texts, [images[0], tmp_path / "one.png", images[2]], clip, "cpu")
    model, tokenizer = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    with torch.no_grad():
        seen = model.get_image_features(normalised(images)).pooler_output
        for i, text in enumerate(texts):  # one at a time: no padding
            tokens = tokenizer(text, return_tensors="pt").input_ids[:, :16]
            tokens[0, -1] = 1
            said = model.get_text_features(tokens).pooler_output[0]
            expected = (said @ seen[i]) / said.norm() / seen[i].norm()
            assert scores[i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_any_vision_model_of_transformers(tmp_path, images):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(config).eval().save_pretrained(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    ).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path).eval()(normalised(images)).pooler_output
    for kind in ("dinov2", "vision"):
        features = open_features(f"{kind}:{tmp_path}")
        torch.testing.assert_close(features(batch(images)), expected, rtol=1e-4, atol=1e-5)


def test_pixel_features_see_colour_place_and_detail():
    grey = torch.zeros(1, 3, 48, 48)
    left, red, fine = grey.clone(), grey.clone(), grey.clone()
    left[..., :24] = 0.5
    red[:, 0] = 0.5
    fine[..., ::2] = 0.2
    seen = [pixel_features(rgb)[0] for rgb in (grey, left, red, fine)]
    assert seen[0].shape == (60,) and open_features("pixels").dim == 60
    assert seen[0][48:].abs().max() < 1e-4  # a flat picture has no detail
    assert seen[3][48:52].min() > 0.1 and (seen[3][:48] - seen[0][:48]).abs().max() < 0.5
    assert (seen[1] - seen[0])[:48].abs().max() > 1 and (seen[2] - seen[0])[16:48].abs().max() > 0.3
    stripes = ((torch.arange(48) // 4) % 2 * 0.2).expand(1, 3, 48, 48)  # seen only by means over 8 pixels
    detail = pixel_features(stripes)[0, 48:].reshape(3, 4)
    assert detail[:2].max() < 1e-4 and detail[2].min() > 0.1
    assert pixel_features(torch.rand(2, 3, 37, 61)).isfinite().all()


def test_a_function_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def open_mean(device):\n    return lambda rgb: rgb.double().mean((2, 3))\n")
    features = open_features(f"{file}:open_mean")
    rgb = torch.rand(4, 3, 16, 24)
    assert features.dim == 3 and features(rgb).dtype == torch.float32
    torch.testing.assert_close(features(rgb), rgb.mean((2, 3)))


@pytest.mark.parametrize(
    ("body", "message"),
    [("rgb", r"must be a tensor \(B, dim\)"), ("rgb.mean((2, 3)) / rgb.sum()", "not finite"),
     ("rgb.mean((2, 3))[:1]", r"of shape \(2, 3\), got \(1, 3\)")],
)  # fmt: skip
def test_a_function_that_gives_no_features_is_refused(tmp_path, body, message):
    (tmp_path / "bad.py").write_text(f"def bad(device):\n    return lambda rgb: {body}\n")
    with pytest.raises(ValueError, match=message):
        open_features(f"{tmp_path / 'bad.py'}:bad")(torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [("pixel", None, "features 'pixel' are unknown; use pixels, inception, clip:"),
     ("inception", "torch_fidelity", r"pip install 'asymflow-ft\[inception\]'"),
     ("clip:no/such-model", None, "cannot open 'no/such-model'"),
     ("vision:no/such-model", None, "cannot open 'no/such-model'"),
     ("no.py:function", None, "there is no file no.py")],
)  # fmt: skip
def test_names_that_do_not_open(monkeypatch, name, missing, message):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=message):
        open_features(name)


def test_missing_extras_name_the_install_line(monkeypatch, images):
    for package in ("open_clip", "lpips"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delenv(scorers.HPSV3_PYTHON, raising=False)
    with pytest.raises(ValueError, match=r"pip install 'asymflow-ft\[hpsv2\]'"):
        scorers.hpsv2_scores(["a"], images[:1], "cpu")
    with pytest.raises(ValueError, match=r"pip install 'asymflow-ft\[lpips\]'"):
        scorers.open_lpips("cpu")
    with pytest.raises(ValueError, match=r"bin/pip install hpsv3 && export ASYMFLOW_HPSV3_PYTHON="):
        scorers.hpsv3_scores(["a"], images[:1], "cpu")
    for name in ("hpsv2", "hpsv3", "lpips", "clip"):  # and all of it before anything is drawn
        with pytest.raises(ValueError, match="cannot open 'no/clip'" if name == "clip" else "pip install"):
            scorers.check_scorers(["sharpness", name], "no/clip")
    scorers.check_scorers(["sharpness"], "no/clip")


WORDS_AND_SIZE = """
import torch
from PIL import Image

class HPSv3RewardInferencer:
    def __init__(self, device):
        print("loading on", device)

    def reward(self, *, image_paths, prompts):
        if prompts == ["fail"]:
            raise RuntimeError("out of memory")
        return torch.tensor([[Image.open(f).width + len(p) / 100, 9.0] for f, p in zip(image_paths, prompts)])
"""


def test_hpsv3_runs_in_its_own_python(monkeypatch, tmp_path, images):
    """A package of that name that scores by (width + length of the prompt / 100), with noise on its output."""
    (tmp_path / "hpsv3").mkdir()
    (tmp_path / "hpsv3/__init__.py").write_text(WORDS_AND_SIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(scorers.HPSV3_PYTHON, sys.executable)
    images[0].resize((50, 40)).save(tmp_path / "wide.png")
    scores = scorers.hpsv3_scores(["ab", "Katze \u732b\n"], [tmp_path / "wide.png", images[1]], "cpu")
    torch.testing.assert_close(scores, torch.tensor([50.02, 32.08]))
    with pytest.raises(ValueError, match="stopped after 1 of 2 pictures"):
        scorers.hpsv3_scores(["ab", "fail"], images[:2], "cpu")
    monkeypatch.setenv(scorers.HPSV3_PYTHON, str(tmp_path / "no/python"))
    with pytest.raises(ValueError, match="does not run"):
        scorers.hpsv3_scores(["ab"], images[:1], "cpu")
