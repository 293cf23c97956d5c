"""A grid of cells, each a caption over a stack of strips; the strips' labels stand left of every row."""

from dataclasses import dataclass

from PIL import Image, ImageDraw

from viditq.report.canvas import GREY, INK, PAPER, draw_lines, font, line_height, wrap

MARGIN, CELL_GAP, STRIP_GAP, TEXT_GAP = 32, 28, 6, 8
TITLE, SUBTITLE, CAPTION, NOTE, LABEL = font(22, True), font(14), font(14), font(13, True), font(13)
CAPTION_LINES, LABEL_WIDTH, LABEL_LINES, MIN_CELL = 5, 110, 3, 128


@dataclass(frozen=True)
class Cell:
    """Strips of one prompt from top to bottom, the prompt, and a short note such as a score ("" for none)."""

    strips: list[Image.Image]
    caption: str = ""
    note: str = ""


def draw_grid(cells: list[Cell], columns: int, labels: list[str], title: str, subtitle: str = "") -> Image.Image:
    """Cells from left to right, then down; strips i of all cells carry `labels[i]` and have one size."""
    has_text = any(cell.caption or cell.note for cell in cells)
    cell_width = max(strip.width for cell in cells for strip in cell.strips)
    cell_width = max(MIN_CELL, cell_width) if has_text else cell_width
    wrapped = [wrap(label, LABEL, LABEL_WIDTH, LABEL_LINES) for label in labels]
    gutter = max((round(LABEL.getlength(line)) for lines in wrapped for line in lines), default=0)
    left = MARGIN + (gutter + 2 * TEXT_GAP if gutter else 0)
    width = left + columns * cell_width + (columns - 1) * CELL_GAP + MARGIN
    heading = wrap(title, TITLE, width - 2 * MARGIN, 3)
    remark = wrap(subtitle, SUBTITLE, width - 2 * MARGIN, 3)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    captions = [max(_caption_height(cell, cell_width) for cell in row) for row in rows]
    strips = sum(strip.height + STRIP_GAP for strip in cells[0].strips) - STRIP_GAP
    top = MARGIN + len(heading) * line_height(TITLE) + len(remark) * line_height(SUBTITLE)
    top += TEXT_GAP * bool(heading or remark) * 2
    height = top + sum(captions) + len(rows) * (strips + CELL_GAP) - CELL_GAP + MARGIN

    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw_lines(draw, MARGIN, draw_lines(draw, MARGIN, MARGIN, heading, TITLE), remark, SUBTITLE, GREY)
    for row, caption in zip(rows, captions, strict=True):
        _draw_labels(draw, wrapped, top + caption, [strip.height for strip in row[0].strips])
        for i, cell in enumerate(row):
            _draw_cell(image, cell, left + i * (cell_width + CELL_GAP), top, caption, cell_width)
        top += caption + strips + CELL_GAP
    return image


def _caption_height(cell: Cell, width: int) -> int:
    lines = len(wrap(cell.caption, CAPTION, width, CAPTION_LINES)) * line_height(CAPTION)
    lines += line_height(NOTE) if cell.note else 0
    return lines + TEXT_GAP if lines else 0


def _draw_cell(image: Image.Image, cell: Cell, left: int, top: int, caption: int, width: int) -> None:
    """The caption ends where the strips begin, so that cells of one row line up."""
    draw = ImageDraw.Draw(image)
    text = top + caption - _caption_height(cell, width)
    text = draw_lines(draw, left, text, wrap(cell.caption, CAPTION, width, CAPTION_LINES), CAPTION)
    draw_lines(draw, left, text, [cell.note] if cell.note else [], NOTE, INK)
    top += caption
    for strip in cell.strips:
        image.paste(strip, (left, top))
        top += strip.height + STRIP_GAP


def _draw_labels(draw: ImageDraw.ImageDraw, labels: list[list[str]], top: int, heights: list[int]) -> None:
    """Each label at the middle of its strip."""
    for lines, height in zip(labels, heights, strict=True):
        draw_lines(draw, MARGIN, top + (height - len(lines) * line_height(LABEL)) // 2, lines, LABEL, GREY)
        top += height + STRIP_GAP
