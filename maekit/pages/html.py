"""Building blocks of the HTML pages. Each page is one self-contained file, with a phone layout and a dark mode.

Text is `str`, and every function that takes text escapes it. Finished HTML has the type `Html`.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NewType

from PIL import Image

from maekit.images import Pixels
from maekit.sheet import encode_png
from maekit.system.errors import InputError

Html = NewType("Html", str)

# Smaller images are enlarged by an integer factor, so that their patches are visible.
_SMALLEST = 96  # pixels
# Up to this side an image is kept as PNG. Larger images are photographs, and a JPEG takes a tenth of the size.
_EXACT = 64  # pixels
_QUALITY = 85

_STYLE = """
:root { color-scheme: light dark; --text: #1d2024; --soft: #5c636c; --line: #d9dde2; --back: #ffffff; --card: #f4f5f7;
  --first: #2060c0; --second: #b8500f; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e9; --soft: #9ba3ad; --line: #3a3f46; --back: #15171a;
  --card: #1e2125; --first: #79adff; --second: #ffa366; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 56px; font: 16px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 44px 0 10px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 24px 0 4px; }
p { margin: 0 0 12px; max-width: 75ch; }
p.about, p.note, figcaption, caption { color: var(--soft); }
p.note { border-left: 3px solid var(--second); padding-left: 10px; }
figure { margin: 0; }
figcaption { font-size: .8rem; line-height: 1.35; padding-top: 3px; }
img, svg { display: block; max-width: 100%; height: auto; }
.exact { image-rendering: pixelated; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 148px), 1fr)); gap: 8px;
  margin: 0; }
dl.facts div { background: var(--card); border-radius: 8px; padding: 8px 12px; }
dl.facts dt { color: var(--soft); font-size: .8rem; }
dl.facts dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; padding-bottom: 6px; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll td:first-child { min-width: 7.5em; }
summary { cursor: pointer; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 20px; }
.charts svg { width: 100%; }
.charts text { fill: var(--soft); font-size: 12px; }
.axis { stroke: var(--line); stroke-width: 1; fill: none; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line-0 { stroke: var(--first); } .line-1 { stroke: var(--second); }
.dot-0 { fill: var(--first); } .dot-1 { fill: var(--second); }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 170px), 1fr)); gap: 16px; }
.row img { width: 100%; max-width: 300px; }
.queries { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 28px 32px; }
.near { display: grid; grid-template-columns: repeat(auto-fill, minmax(70px, 1fr)); gap: 6px; list-style: none;
  margin: 0; padding: 0; }
.near.named { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px 8px; }
.near img { width: 100%; border-radius: 4px; aspect-ratio: 1; object-fit: contain; }
.near .first { grid-column: span 2; grid-row: span 2; }
.near .first img { outline: 3px solid var(--first); outline-offset: -1px; }
.blank { aspect-ratio: 1; border: 1px dashed var(--line); border-radius: 4px; display: grid; place-items: center;
  color: var(--soft); font-size: .75rem; text-align: center; }
.wide img { min-width: min(720px, 200%); max-width: none; width: 100%; border-radius: 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; padding: 0; margin: 6px 0;
  font-size: .85rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
table.images { width: 100%; table-layout: fixed; }
table.images td, table.images th { border: 0; padding: 0 4px 0 0; }
table.images th { font-size: .7rem; }
table.images img { width: 100%; }
table.images .caption { color: var(--soft); font-size: .8rem; padding: 2px 0 14px; overflow-wrap: anywhere; }
"""


class Captioned(NamedTuple):
    """A row of images, uint8 `[H, W, 3]` each, and its caption."""

    caption: str
    images: Sequence[Pixels]


def output_path(out: str, *endings: str) -> Path:
    """Return where a page or picture is to be written.

    Raises:
        InputError: the name has another ending, or is that of a directory.
    """
    path = Path(out)
    if path.suffix.lower() not in endings:
        raise InputError(f"`out` {out}: must end in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(f"`out` {out}: is a directory")
    return path


def document(title: str, about: str, parts: Iterable[Html]) -> bytes:
    """Return a whole page as the bytes of a file.

    Args:
        title: title of the page.
        about: line below the title.
        parts: content, in order from top to bottom.
    """
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_text(title)}</h1>\n<p class="about">{_text(about)}</p>\n' + "\n".join(parts) + "\n</main>\n</body>\n"
        "</html>\n"
    )
    # A file name may contain a lone surrogate, which UTF-8 cannot encode.
    return page.encode("utf-8", "replace")


def section(heading: str, *parts: Html, level: int = 2) -> Html:
    """Return a section of the page with a heading; level 3 is a subsection."""
    return Html(f"<section>\n<h{level}>{_text(heading)}</h{level}>\n" + "\n".join(parts) + "\n</section>")


def paragraph(text: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{_text(text)}</p>")


def note(text: str) -> Html:
    """Return a paragraph that says what is missing and why."""
    return Html(f'<p class="note">{_text(text)}</p>')


def group(name: str, parts: Iterable[Html]) -> Html:
    """Wrap parts in a box with a CSS class of this file."""
    return Html(f'<div class="{name}">\n' + "\n".join(parts) + "\n</div>")


def scrolling(part: Html) -> Html:
    """Wrap a large picture in a box that scrolls on a small screen."""
    return Html(f'<div class="scroll wide" tabindex="0">{part}</div>')


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Return names and values as a grid of small cards."""
    cards = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in pairs)
    return Html('<dl class="facts">\n' + "\n".join(cards) + "\n</dl>")


def details(summary: str, *parts: Html) -> Html:
    """Return a collapsible block, closed at first."""
    return Html(f"<details>\n<summary>{_text(summary)}</summary>\n" + "\n".join(parts) + "\n</details>")


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    numbers: Iterable[int] = (),
    best: Iterable[tuple[int, int]] = (),
) -> Html:
    """Return a table in a box that scrolls if the table is too wide.

    Args:
        heads: column headings.
        rows: rows of cells, one cell per heading.
        caption: caption above the table.
        numbers: indices of right-aligned columns.
        best: (row, column) of each bold cell.
    """
    right, bold = set(numbers), set(best)

    def cell(row: int, column: int, text: str) -> str:
        name = ' class="number"' if column in right else ""
        return f"<td{name}>{f'<b>{_text(text)}</b>' if (row, column) in bold else _text(text)}</td>"

    above = f"<caption>{_text(caption)}</caption>" if caption else ""
    head = "".join(
        f'<th scope="col"{" class=number" if column in right else ""}>{_text(text)}</th>'
        for column, text in enumerate(heads)
    )
    body = "\n".join(
        f"<tr>{''.join(cell(number, column, text) for column, text in enumerate(row))}</tr>"
        for number, row in enumerate(rows)
    )
    return Html(
        f'<div class="scroll" tabindex="0"><table>{above}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody></table></div>"
    )


def picture(pixels: Pixels, alt: str, *, exact: bool | None = None) -> Html:
    """Return an image, uint8 `[H, W, 3]`, embedded in the page.

    Args:
        pixels: the image.
        alt: alternative text.
        exact: True for PNG, False for JPEG; None chooses PNG for small images only.
    """
    height, width, _ = pixels.shape
    is_exact = max(height, width) <= _EXACT if exact is None else exact
    factor = max(1, -(-_SMALLEST // min(height, width))) if is_exact else 1
    kind, data = ("png", encode_png(pixels)) if is_exact else ("jpeg", encode_jpeg(pixels))
    return Html(
        f'<img{" class=exact" if is_exact else ""} width="{width * factor}" height="{height * factor}" '
        f'alt="{_text(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    )


def figure(part: Html, caption: str, *, first: bool = False) -> Html:
    """Return an image with a caption; in a group of neighbours, `first` makes it larger."""
    name = ' class="first"' if first else ""
    return Html(f"<figure{name}>{part}<figcaption>{_text(caption)}</figcaption></figure>")


def neighbours(query: Html, caption: str, near: Iterable[tuple[Html, str]], *, named: bool = False) -> Html:
    """Return a query and its neighbours, nearest first.

    Args:
        query: image of the query.
        caption: caption of the query.
        near: image and caption of each neighbour.
        named: whether captions are long and need more room.
    """
    figures = [figure(query, caption, first=True), *(figure(image, text) for image, text in near)]
    return group("near named" if named else "near", figures)


def blank(text: str) -> Html:
    """Return a placeholder for a missing image."""
    return Html(f'<div class="blank">{_text(text)}</div>')


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """Return a colour legend; each entry is a CSS colour and a name."""
    items = (f'<li><i style="background: {_text(colour)}"></i>{_text(name)}</li>' for colour, name in entries)
    return Html('<ul class="legend">' + "".join(items) + "</ul>")


def image_rows(titles: Sequence[str], rows: Sequence[Captioned]) -> Html:
    """Return rows of images under column titles; each row has one image per title."""
    widest = max((max(_SMALLEST, row.images[0].shape[1]) for row in rows), default=_SMALLEST)
    head = "".join(f'<th scope="col">{_text(text)}</th>' for text in titles)
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td>{picture(pixels, f'{title}: {row.caption}', exact=True)}</td>"
            for title, pixels in zip(titles, row.images, strict=True)
        )
        + f'</tr>\n<tr><td class="caption" colspan="{len(titles)}">{_text(row.caption)}</td></tr>'
        for row in rows
    )
    width = len(titles) * (widest + 4)
    return Html(
        f'<table class="images" style="max-width: {width}px">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody></table>"
    )


def encode_jpeg(pixels: Pixels) -> bytes:
    """Encode a picture, uint8 `[H, W, 3]`, as JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def _text(text: str) -> str:
    return html.escape(text, quote=True)
