"""Render the tiny data set: colour emoji as 128x128 pictures with their names as captions.

    python recipes/tiny/make_data.py --font NotoColorEmoji.ttf --out recipes/tiny/data

Needs the `emoji` package (names) and the font of Debian's `fonts-noto-color-emoji`. The set is chosen for a small
model: one code point each (no skin tones, flags or joined sequences), from blocks of Unicode that hold things a
person can name at a glance, and without pictures that are almost the same as one already taken.
"""

import argparse
import json
import random
from pathlib import Path

import emoji
import torch
from PIL import Image, ImageDraw, ImageFont

from asymflow_ft.evaluation.retrieval import thumbnails

SIZE = 128
BITMAP_SIZE = 109  # the one size at which Noto Color Emoji stores its 136x128 bitmaps
MIN_DISTANCE = 0.065  # RMS over Oklab thumbnails: below this two pictures are variants of one drawing
BLOCKS = [  # plants and food, celebration, buildings, animals, clothes, objects, vehicles, newer animals and objects
    (0x1F308, 0x1F308), (0x1F319, 0x1F321), (0x1F32D, 0x1F37F), (0x1F381, 0x1F384), (0x1F388, 0x1F388),
    (0x1F392, 0x1F393), (0x1F399, 0x1F3B8), (0x1F3BA, 0x1F3C1), (0x1F3C5, 0x1F3C8), (0x1F3CD, 0x1F3D9),
    (0x1F3DA, 0x1F3E1), (0x1F3EE, 0x1F3F0), (0x1F400, 0x1F43E), (0x1F451, 0x1F463), (0x1F484, 0x1F484),
    (0x1F48A, 0x1F48E), (0x1F490, 0x1F490), (0x1F499, 0x1F49D), (0x1F4A1, 0x1F4A3), (0x1F4B0, 0x1F4B0),
    (0x1F4BB, 0x1F4BE), (0x1F4D5, 0x1F4DA), (0x1F4E6, 0x1F4E6), (0x1F4EE, 0x1F4FA), (0x1F50B, 0x1F50D),
    (0x1F511, 0x1F514), (0x1F525, 0x1F52D), (0x1F58A, 0x1F58D), (0x1F5FB, 0x1F5FD), (0x1F5FF, 0x1F60F),
    (0x1F680, 0x1F684), (0x1F68C, 0x1F68C), (0x1F691, 0x1F6A4), (0x1F6B2, 0x1F6B2), (0x1F6CB, 0x1F6CB),
    (0x1F6D1, 0x1F6D6), (0x1F6DD, 0x1F6FC), (0x1F941, 0x1F970), (0x1F980, 0x1F9AE), (0x1F9C0, 0x1F9CB),
    (0x1F9E2, 0x1F9FF), (0x1FA70, 0x1FADB),
]  # fmt: skip


def render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji on white, (128, 128) RGB with a margin of 4 pixels."""
    canvas = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((68, 68), character, font=font, embedded_color=True, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {character!r}")
    glyph = canvas.crop(box)
    glyph.thumbnail((SIZE - 8, SIZE - 8), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (SIZE, SIZE), "white")
    page.paste(glyph, ((SIZE - glyph.width) // 2, (SIZE - glyph.height) // 2), glyph)
    return page


def candidates() -> list[tuple[str, str]]:
    """(character, caption) of every single-code-point emoji inside BLOCKS, in code point order."""
    found = {}
    for text, data in emoji.EMOJI_DATA.items():
        bare = text.removesuffix("\ufe0f")
        inside = len(bare) == 1 and any(low <= ord(bare) <= high for low, high in BLOCKS)
        if inside and data["status"] == emoji.STATUS["fully_qualified"]:
            found[bare] = data["en"].strip(":").replace("_", " ").replace("\u2019", "'")
    return sorted(found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    font = ImageFont.truetype(str(args.font), BITMAP_SIZE)
    missing = font.getmask("\U0010fffd").getbbox()
    chosen: list[tuple[str, Image.Image, torch.Tensor]] = []
    for character, caption in candidates():
        if font.getmask(character).getbbox() == missing:
            continue
        image = render(character, font)
        thumbnail = thumbnails([image])[0]
        if all((thumbnail - other).square().mean().sqrt() > MIN_DISTANCE for _, _, other in chosen):
            chosen.append((caption, image, thumbnail))

    (args.out / "images").mkdir(parents=True, exist_ok=True)
    with open(args.out / "metadata.jsonl", "w", encoding="utf-8") as file:
        for caption, image, _ in chosen:
            name = "images/" + "".join(c if c.isalnum() else "_" for c in caption) + ".png"
            image.quantize(256, dither=Image.Dither.NONE).convert("RGB").save(args.out / name, optimize=True)
            file.write(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n")
    prompts = random.Random(0).sample([caption for caption, _, _ in chosen], 100)
    (args.out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"{len(chosen)} pictures and {len(prompts)} prompts for judging in {args.out}")


if __name__ == "__main__":
    main()
