"""Labelled sheets of pictures."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 6


def sheet(rows: dict[str, Sequence[Image.Image | None]], columns: Sequence[str] = (), cell: int = 256) -> Image.Image:
    """Pictures in labelled rows.

    Args:
        rows: pictures by row label; None leaves a cell empty. columns: a caption over each column.
        cell: largest side of a cell; pictures are never enlarged.

    Raises:
        ValueError: no pictures.
    """
    pictures = [picture for row in rows.values() for picture in row if picture is not None]
    if not pictures:
        raise ValueError("a sheet needs at least one picture")
    side = min(cell, max(max(picture.size) for picture in pictures))
    font = ImageFont.load_default(max(11, side // 12))
    line = font.size + _MARGIN
    left = max((font.getlength(label) for label in rows), default=0) + 2 * _MARGIN if any(rows) else _MARGIN
    top = line + _MARGIN if columns else _MARGIN
    count = max(len(row) for row in rows.values())
    size = (int(left + count * (side + _MARGIN)), int(top + len(rows) * (side + _MARGIN)))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for j, caption in enumerate(columns[:count]):
        while caption and font.getlength(caption) > side:
            caption = caption[:-1]
        draw.text((left + j * (side + _MARGIN), _MARGIN), caption, fill="black", font=font)
    for i, (label, row) in enumerate(rows.items()):
        y = int(top + i * (side + _MARGIN))
        draw.text((_MARGIN, y + side // 2), label, fill="black", font=font, anchor="lm")
        for j, picture in enumerate(row):
            if picture is not None:
                small = picture.copy()
                small.thumbnail((side, side), Image.Resampling.LANCZOS)
                page.paste(small, (int(left + j * (side + _MARGIN)), y))
    return page


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """Pictures with their captions, `columns` to a row."""
    starts = range(0, len(pictures), columns)
    rows = [sheet({"": pictures[i : i + columns]}, captions[i : i + columns]) for i in starts]
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page
