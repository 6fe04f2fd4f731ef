"""What the arms of the study start from: the data split, subspaces of several kinds, and an untrained network."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from asymflow_ft.components.color import PixelCodec, rgb_tensor
from asymflow_ft.components.subspace import PixelSubspace, load_subspace
from asymflow_ft.families import family_of, name_of
from asymflow_ft.hub.forms import Converted
from asymflow_ft.hub.provenance import UNKNOWN
from asymflow_ft.hub.write import export
from asymflow_ft.method.align import Grams, pca, procrustes
from asymflow_ft.method.patches import to_tokens

TINY = Path("recipes/tiny")


def split_data(out: Path) -> None:
    """The tiny data without its 100 judged prompts in out/train, those in out/test, and their list."""
    rows = [json.loads(line) for line in open(TINY / "data/metadata.jsonl", encoding="utf-8")]
    shutil.copy(TINY / "data/prompts.txt", _made(out) / "prompts.txt")
    judged = (out / "prompts.txt").read_text(encoding="utf-8").splitlines()
    for name, part in (
        ("train", [row for row in rows if row["text"] not in judged]),
        ("test", [row for row in rows if row["text"] in judged]),
    ):
        for row in part:
            target = out / name / row["file_name"]
            shutil.copy(TINY / "data" / row["file_name"], _made(target.parent) / target.name)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (out / name / "metadata.jsonl").write_text(lines, encoding="utf-8")
    captions = "".join(f"{row['text']}\n" for row in rows if row["text"] not in judged)
    (out / "train_captions.txt").write_text(captions, encoding="utf-8")


@dataclass(frozen=True)
class Space:
    """A pixel representation, as in the recipe's section `pixels`."""

    space: str
    mean: tuple[float, float, float]
    std: float

    def codec(self) -> PixelCodec:
        return PixelCodec(self.space, self.mean, self.std)


# means and standard deviations of the data set, as `asymflow-ft align` reports them
OKLAB = Space("oklab", (0.86, 0.01, 0.02), 0.12)
RGB = Space("rgb", (0.72, 0.608, 0.485), 0.585)


def sums(data: Path, space: Space, base: str) -> Grams:
    """Over all pictures of a folder."""
    family = family_of(base, None)
    vae = family.load_parts(base, ("vae",), torch.float32).vae
    patch = family.pixel_patch(vae)
    grams = Grams.zeros(3 * patch**2, family.latent_dim(vae))
    with torch.no_grad():
        for file in tqdm(sorted((data / "images").iterdir()), desc=f"sums in {space.space}"):
            rgb = rgb_tensor(Image.open(file))[None]
            grams.update(family.encode_latents(vae, rgb), to_tokens(space.codec().encode(rgb), patch))
    return grams


def make_subspaces(data: Path, base: str, out: Path) -> None:
    """Folders of `out`, all fitted to the same pictures.

    procrustes: the method's. unscaled: its basis, s = 1. pca: the R principal directions of the pixels, in order.
    pca_turned: the same subspace, turned inside itself to fit the latents best. random: an arbitrary one. rgb:
    Procrustes in RGB.
    """
    grams = sums(data, OKLAB, base)
    fit = procrustes(grams)
    principal = pca(grams.pixel, len(grams.latent)).flip(1)
    left, _, right = torch.linalg.svd(principal.mT @ grams.cross.mT)
    generator = torch.Generator().manual_seed(0)
    bases = {
        "procrustes": fit.basis, "unscaled": fit.basis, "pca": principal, "pca_turned": principal @ left @ right,
        "random": torch.linalg.qr(torch.randn(fit.basis.shape, generator=generator, dtype=torch.float64)).Q,
    }  # fmt: skip
    for name, basis in bases.items():
        scale = ((basis.mT @ grams.pixel @ basis).trace() / grams.latent.trace()).sqrt()
        scale = torch.ones(()) if name == "unscaled" else scale
        PixelSubspace.from_fit(basis, scale).save_pretrained(out / name)
    fit = procrustes(sums(data, RGB, base))
    PixelSubspace.from_fit(fit.basis, fit.scale).save_pretrained(out / "rgb")


def rule_shift(base: str, subspace: str) -> float:
    """The pixel timestep shift of a subspace: its scale times the base's native shift."""
    family = family_of(base, None)
    native = family.latent_shift(family.load_parts(base, ("scheduler",), torch.float32))
    return native * load_subspace(subspace).scale.item()


def make_scratch(base: str, subspace: str, out: Path) -> None:
    """A converted model whose network was never trained: the architecture of the lifted base with random weights,
    and an output projection of zeros."""
    family, pixels = family_of(base, None), load_subspace(subspace)
    lifted = family.lift(family.load_parts(base, ("transformer",), torch.float32).transformer, pixels)
    torch.manual_seed(0)
    network = type(lifted).from_config(lifted.config)
    torch.nn.init.zeros_(network.proj_out.weight)
    provenance = {
        **UNKNOWN, "family": name_of(family), "pipeline_class": family.PIXEL_PIPELINES[0].__name__,
        "base": base, "dtype": "float32", "pixels": {"space": OKLAB.space, "mean": list(OKLAB.mean), "std": OKLAB.std},
        "settings": {
            "shift": rule_shift(base, subspace), "shift_mode": "static", "default_size": 128,
            "max_sequence_length": 32,
        },
    }  # fmt: skip
    part = out.with_name(out.name + ".network")
    network.save_pretrained(part / "transformer")
    export(Converted(family, pixels, OKLAB.codec(), provenance, folder=part), out, "merged")
    shutil.rmtree(part)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
