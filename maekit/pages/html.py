"""Building blocks of the HTML pages. Each page is one self-contained file, with a phone layout and a dark mode.

Text is `str`, and every function that takes text escapes it. Finished HTML has the type `Html`.
The style of all pages stands in `style.css` beside this file; `document` puts it into the page.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NewType

from PIL import Image

from maekit.images import Pixels
from maekit.system.errors import InputError
from maekit.system.redaction import redact
from maekit.system.text import printable

Html = NewType("Html", str)

# Smaller images are enlarged by an integer factor, so that their patches are visible.
_SMALLEST = 96  # pixels
# Up to this side an image is kept as PNG. Larger images are photographs, and a JPEG takes a tenth of the size.
_EXACT = 64  # pixels
_JPEG: dict[str, Any] = {"quality": 85, "subsampling": 0, "optimize": True}

_STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


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
        f"<title>{escaped(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escaped(title)}</h1>\n<p class="about">{escaped(about)}</p>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
    return page.encode()


def section(heading: str, *parts: Html, level: int = 2) -> Html:
    """Return a section of the page with a heading; level 3 is a subsection."""
    return Html(f"<section>\n<h{level}>{escaped(heading)}</h{level}>\n" + "\n".join(parts) + "\n</section>")


def paragraph(text: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{escaped(text)}</p>")


def note(text: str) -> Html:
    """Return a paragraph that says what is missing and why."""
    return Html(f'<p class="note">{escaped(text)}</p>')


def group(name: str, parts: Iterable[Html]) -> Html:
    """Wrap parts in a box with a CSS class of this file."""
    return Html(f'<div class="{name}">\n' + "\n".join(parts) + "\n</div>")


def scrolling(part: Html) -> Html:
    """Wrap a large picture in a box that scrolls on a small screen."""
    return Html(f'<div class="scroll wide" tabindex="0">{part}</div>')


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Return names and values as a grid of small cards."""
    cards = (f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in pairs)
    return Html('<dl class="facts">\n' + "\n".join(cards) + "\n</dl>")


def details(summary: str, *parts: Html) -> Html:
    """Return a collapsible block, closed at first."""
    return Html(f"<details>\n<summary>{escaped(summary)}</summary>\n" + "\n".join(parts) + "\n</details>")


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

    def align(column: int) -> str:
        return ' class="number"' if column in right else ""

    above = f"<caption>{escaped(caption)}</caption>" if caption else ""
    head = "".join(f'<th scope="col"{align(column)}>{escaped(text)}</th>' for column, text in enumerate(heads))
    body = []
    for number, row in enumerate(rows):
        texts = [f"<b>{escaped(t)}</b>" if (number, column) in bold else escaped(t) for column, t in enumerate(row)]
        body.append(f"<tr>{''.join(f'<td{align(column)}>{text}</td>' for column, text in enumerate(texts))}</tr>")
    return Html(f'<div class="scroll" tabindex="0">{_table(f"<table>{above}", head, body)}</div>')


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
    kind, options = ("png", {}) if is_exact else ("jpeg", _JPEG)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return Html(
        f'<img{" class=exact" if is_exact else ""} width="{width * factor}" height="{height * factor}" '
        f'alt="{escaped(alt)}" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


def figure(part: Html, caption: str, *, first: bool = False) -> Html:
    """Return an image with a caption; in a group of neighbours, `first` makes it larger."""
    name = ' class="first"' if first else ""
    return Html(f"<figure{name}>{part}<figcaption>{escaped(caption)}</figcaption></figure>")


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
    return Html(f'<div class="blank">{escaped(text)}</div>')


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """Return a colour legend; each entry is a CSS colour and a name."""
    items = (f'<li><i style="background: {escaped(colour)}"></i>{escaped(name)}</li>' for colour, name in entries)
    return Html('<ul class="legend">' + "".join(items) + "</ul>")


def image_rows(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Pixels]]]) -> Html:
    """Return rows of images, uint8 `[H, W, 3]` each, under column titles.

    Args:
        titles: column titles.
        rows: caption and images of each row, one image per title.
    """
    widest = max((max(_SMALLEST, images[0].shape[1]) for _, images in rows), default=_SMALLEST)
    head = "".join(f'<th scope="col">{escaped(title)}</th>' for title in titles)
    body = []
    for caption, images in rows:
        named = zip(titles, images, strict=True)
        cells = [f"<td>{picture(pixels, f'{title}: {caption}', exact=True)}</td>" for title, pixels in named]
        body.append(f"<tr>{''.join(cells)}</tr>")
        body.append(f'<tr><td class="caption" colspan="{len(titles)}">{escaped(caption)}</td></tr>')
    return _table(f'<table class="images" style="max-width: {len(titles) * (widest + 4)}px">', head, body)


def _table(start: str, head: str, body: Iterable[str]) -> Html:
    return Html(f"{start}\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table>")


def escaped(text: str) -> str:
    """Return text as HTML. No name turns the direction of what follows it, and no secret of a URL is shown."""
    return html.escape(printable(redact(text)), quote=True)
