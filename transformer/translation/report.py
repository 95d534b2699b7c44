"""The demo's result as one HTML page without references to other files: images are inlined, there is no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light; --text: #1f2937; --muted: #64748b; --line: #e2e8f0; --accent: #2563eb; --soft: #f1f5f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 8px; }
p { margin: 0 0 14px; }
.lead, .note { color: var(--muted); }
.note { font-size: 14px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 24px; margin-top: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px; }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 14px; }
figure { margin: 0 0 8px; overflow-x: auto; }
figure + figure { margin-top: 24px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 7px 14px 7px 0; border-top: 1px solid var(--line); }
th { font-weight: 500; color: var(--muted); white-space: nowrap; width: 1%; padding-right: 24px; }
td { overflow-wrap: anywhere; }
ol { margin: 0; padding: 0; list-style: none; }
li { display: grid; grid-template-columns: 92px 1fr; gap: 2px 14px; padding: 12px 0; border-top: 1px solid var(--line); }
li span { color: var(--muted); font-size: 14px; padding-top: 1px; }
li b { font-weight: 600; color: var(--accent); }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption, which is also its text for those who cannot see it."""

    caption: str
    png: bytes


def page(title: str, lead: str, tiles: Mapping[str, str], sections: Iterable[str]) -> str:
    """The whole page; `tiles` are the headline numbers, label -> value."""
    head = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>' for label, value in tiles.items()
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n<div class="tiles">{head}</div>\n'
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def section(title: str, note: str, body: str) -> str:
    """A titled card; `body` is HTML, title and note are text."""
    return f'<section>\n<h2>{html.escape(title)}</h2>\n<p class="note">{html.escape(note)}</p>\n{body}\n</section>\n'


def figures(pictures: Sequence[Picture]) -> str:
    """Pictures one below the other; a single one shows no caption of its own, since its section's title says it."""
    items = []
    for picture in pictures:
        caption = html.escape(picture.caption)
        title = f"<figcaption>{caption}</figcaption>" if len(pictures) > 1 else ""
        data = base64.b64encode(picture.png).decode()
        items.append(f'<figure>{title}<img alt="{caption}" src="data:image/png;base64,{data}"></figure>')
    return "\n".join(items)


def translations(rows: Iterable[tuple[str, str, str]]) -> str:
    """A list of (source, translation, reference)."""
    items = []
    for row in rows:
        source, translation, reference = map(html.escape, row)
        items.append(
            f"<li><span>source</span><div>{source}</div><span>translation</span><div><b>{translation}</b></div>"
            f"<span>reference</span><div>{reference}</div></li>"
        )
    return f"<ol>{''.join(items)}</ol>"


def table(rows: Mapping[str, str]) -> str:
    """Two columns, label and value."""
    cells = (f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>" for label, value in rows.items())
    return f"<table>{''.join(cells)}</table>"
