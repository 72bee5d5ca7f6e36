"""HTML pages taken apart."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from maekit.cli.options import with_flags
from maekit.system.progress import Silent

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page taken apart: its text, its images, its tables, and whether every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" not in self.open:
            self.words.append(data)
            if self.open and {"td", "th"} & set(self.open):
                self.cells[-1][-1] += data

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2]))) for source in sources]


def parse(path: Path) -> Page:
    """Read a page, which must need nothing from elsewhere, name every image, and have one heading of all."""
    found = Page(path)
    names = [tag for tag, _ in found.tags]
    assert not {"script", "link", "iframe", "object", "base"} & set(names)
    for tag, attributes in found.tags:
        assert not {"href", "srcset", "onload", "onerror"} & set(attributes)
        if tag == "img":
            assert re.match(r"data:image/(png|jpeg);base64,", str(attributes["src"]))
            assert attributes["alt"]
    style = found.source[found.source.index("<style>") : found.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert names.count("h1") == 1
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    return found


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(with_flags(text))
