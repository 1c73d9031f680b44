from __future__ import annotations

from html.parser import HTMLParser

from diffharness.records import RunRecord
from diffharness.report import html


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def test_a_plain_run_is_whole(plain: RunRecord) -> None:
    text = html.to_html(plain)
    page = Page(text)
    assert page.open == [] and "table" in page.tags
    for part in ("agree", "4.1e-13", "blk.0.attn_q", "diffharness run m.gguf --tokens 512", "16.0312"):
        assert part in text, part


def test_hostile_strings_stay_text(hostile: RunRecord) -> None:
    text = html.to_html(hostile)
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags and not page.attributes & {"src", "href", "onerror", "onload"}
    assert "&lt;script&gt;" in text and "\x1b" not in text
    assert len(text) < 2_000_000
    for part in ("Layers", "Positions", "Metadata that differ", "200 of 300"):
        assert part in text, part
