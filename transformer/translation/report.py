"""The demo's result as one HTML page without references to other files: pictures are inlined, there is no script.

Its colors are those of the browser's theme, light or dark, and those of its pictures with them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --page: #f1f5f9; --card: #fff; --text: #1f2937; --muted: #64748b; --line: #e2e8f0; --axis: #94a3b8;
  --accent: #2563eb; --second: #d97706; --third: #15803d; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0b1120; --card: #141c2e; --text: #e5e7eb; --muted: #94a3b8; --line: #2b3850; --axis: #64748b;
    --accent: #60a5fa; --second: #fbbf24; --third: #4ade80; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 8px; }
p { margin: 0 0 14px; }
.lead, .note { color: var(--muted); }
.note { font-size: 14px; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { padding: 24px; margin-top: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.tile { padding: 14px 18px; }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 14px; }
figure { margin: 0 0 8px; overflow-x: auto; }
figure + figure { margin-top: 24px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg { display: block; max-width: 100%; height: auto; }
.steps { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 24px; }
.steps figure { display: flex; flex-direction: column; margin: 0; }
.steps figcaption { margin: 0; }
.steps p { flex: 1; color: var(--muted); font-size: 14px; margin: 2px 0 8px; }
.steps svg { width: 100%; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 12px; }
.gallery figure { margin: 0; }
.gallery svg { width: 100%; border: 1px solid var(--line); }
.gallery figcaption { font-size: 13px; font-weight: 400; text-align: center; margin: 4px 0 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 7px 14px 7px 0; border-top: 1px solid var(--line); }
th { font-weight: 500; color: var(--muted); white-space: nowrap; width: 1%; padding-right: 24px; }
td { overflow-wrap: anywhere; }
ol { margin: 0; padding: 0; list-style: none; }
li { display: grid; grid-template-columns: 92px 1fr; gap: 2px 14px; padding: 12px 0; border-top: 1px solid var(--line); }
li span { color: var(--muted); font-size: 14px; padding-top: 1px; }
li b { font-weight: 600; color: var(--accent); }
@media (max-width: 600px) {
  main { padding: 24px 12px 40px; }
  section { padding: 16px; }
  th, td { display: block; width: auto; white-space: normal; padding: 0; }
  th { padding-top: 8px; }
  td { border-top: 0; padding-bottom: 8px; }
  figure > svg { max-width: none; width: 520px; }
  .wide > svg { width: auto; }
  .steps svg, .gallery svg { width: 100%; }
}
"""


@dataclass(frozen=True)
class Picture:
    """An SVG element with its caption, which is also its text for those who cannot see it."""

    caption: str
    svg: str
    note: str = ""
    wide: bool = False  # on a small screen it is moved, not shrunk

    def element(self) -> str:
        return self.svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(self.caption)}"', 1)


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
        kind = ' class="wide"' if picture.wide else ""
        title = f"<figcaption>{html.escape(picture.caption)}</figcaption>" if len(pictures) > 1 else ""
        items.append(f"<figure{kind}>{title}{picture.element()}</figure>")
    return "\n".join(items)


def steps(pictures: Sequence[Picture]) -> str:
    """Small pictures with their captions and notes, in rows as wide as the page, numbered."""
    items = []
    for number, picture in enumerate(pictures, 1):
        caption, note = html.escape(picture.caption), html.escape(picture.note)
        items.append(f"<figure><figcaption>{number}. {caption}</figcaption><p>{note}</p>{picture.element()}</figure>")
    return f'<div class="steps">{"".join(items)}</div>'


def gallery(pictures: Iterable[Picture], columns: int | None = None) -> str:
    """Small pictures above their captions, side by side: in so many columns, or in as many as there is room for."""
    items = "".join(f"<figure>{picture.element()}<figcaption>{html.escape(picture.caption)}</figcaption></figure>" for picture in pictures)
    style = "" if columns is None else f' style="grid-template-columns: repeat({columns}, minmax(0, 130px))"'
    return f'<div class="gallery"{style}>{items}</div>'


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
