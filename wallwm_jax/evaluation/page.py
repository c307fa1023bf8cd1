"""HTML of a self-contained page: inline style, images as data URIs, no script and no link to
anywhere else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from PIL import Image

STYLE = """
:root { --ink: #16202e; --soft: #5b6778; --line: #e3e7ed; --paper: #ffffff; --back: #f5f6f8;
  --accent: #2563c9; --good: #1d7f55; --bad: #b3432b; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header { background: #122036; color: #fff; padding: 40px 24px 72px; }
header > div { max-width: 1080px; margin: 0 auto; }
header h1 { margin: 0 0 6px; font-size: 28px; font-weight: 650; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
header p { margin: 0; color: #b9c5d8; max-width: 76ch; overflow-wrap: anywhere; }
nav { margin-top: 18px; display: flex; flex-wrap: wrap; gap: 6px 18px; }
nav a { color: #dbe6f7; text-decoration: none; font-size: 14px; border-bottom: 1px solid #48618a; }
nav a:hover { color: #fff; border-color: #fff; }
main { max-width: 1128px; margin: 0 auto; padding: 0 24px 64px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px;
  margin-top: -44px; }
.card, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 16px 18px;
  box-shadow: 0 1px 3px rgba(20, 32, 54, .07); }
.card .label { color: var(--soft); font-size: 13px; }
.card .value { font-size: 27px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.card .note { color: var(--soft); font-size: 13px; line-height: 1.4; }
.card.good .value { color: var(--good); }
.card.bad .value { color: var(--bad); }
section { padding: 22px 24px; margin-top: 20px; }
h2 { margin: 0 0 4px; font-size: 19px; letter-spacing: -.01em; }
h3 { margin: 24px 0 6px; font-size: 15px; overflow-wrap: anywhere; }
section > p { margin: 0 0 14px; color: var(--soft); max-width: 84ch; }
figure { margin: 12px 0 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13px; margin: 6px 0 12px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px 7px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; }
th.text, td.text { text-align: left; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
.strip { display: grid; grid-template-columns: 128px minmax(0, 1fr); gap: 3px 10px;
  align-items: center; margin: 8px 0 4px; font-size: 12.5px; }
.strip .row { text-align: right; color: var(--soft); line-height: 1.25; }
.strip .row b { color: var(--ink); font-weight: 600; }
.strip .times { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; text-align: center;
  color: var(--soft); }
.strip img { width: 100%; display: block; image-rendering: pixelated; border-radius: 3px; }
.strip .last { margin-bottom: 8px; }
.clips { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }
.clips img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
details summary { cursor: pointer; color: var(--accent); font-size: 14px; margin-top: 14px; }
.tag { display: inline-block; border-radius: 4px; padding: 0 7px; font-size: 12px;
  font-weight: 600; }
.tag.good { background: #e2f3ea; color: var(--good); }
.tag.bad { background: #f9e7e2; color: var(--bad); }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
section > p.soft, p.soft { color: var(--soft); font-size: 14px; margin: 8px 0; }
section > p.main { color: var(--ink); font-weight: 600; margin: 8px 0; }
code { font-size: .93em; background: var(--back); padding: 1px 5px; border-radius: 4px; }
section > p.sum { color: var(--ink); font-size: 17px; margin: 6px 0; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 5px 0 8px; }
.share { display: flex; height: 18px; border-radius: 5px; overflow: hidden; gap: 2px; }
.share > div { min-width: 4px; }
.share .good, .key.good { background: var(--good); }
.share .bad, .key.bad { background: var(--bad); }
.share .soft, .key.soft { background: #9aa5b4; }
.example { break-inside: avoid; margin-bottom: 18px; }
.example p { margin: 14px 0 0; font-size: 14px; }
.film { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 12px 10px;
  margin-top: 8px; font-size: 12.5px; line-height: 1.35; }
.film img { width: 100%; display: block; border-radius: 4px; margin-bottom: 4px; }
.film img.small { image-rendering: pixelated; }
.film span { overflow-wrap: anywhere; }
.levels { display: grid; grid-template-columns: 96px minmax(0, 1fr); gap: 4px 8px;
  font-size: 12.5px; margin-top: 8px; }
.levels .name { align-self: center; text-align: right; color: var(--soft); }
.levels .name b { color: var(--ink); }
.track { display: grid; }
.track > div { padding: 4px 5px; border-right: 2px solid var(--paper); border-radius: 4px;
  line-height: 1.3; min-height: 26px; overflow: hidden; text-align: center; }
.track .gap { background: repeating-linear-gradient(45deg, #fff, #fff 4px, #e3e7ed 4px,
  #e3e7ed 8px); color: transparent; }
.track .given, .key.given { background: #cfe0fa; }
.track .vlm, .key.vlm { background: #cdebdc; }
.track .template, .key.template { background: #fbe0c8; }
.track .other, .key.other { background: #e3e7ed; }
.share, .track, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
@media (max-width: 640px) { .strip { grid-template-columns: 84px minmax(0, 1fr); }
  section { padding: 18px 14px; } }
@media print {
  body, header { background: #fff; } nav { display: none; }
  header { color: var(--ink); padding: 0 24px 12px; } header p { color: var(--soft); }
  .cards { margin-top: 0; grid-template-columns: repeat(auto-fit, minmax(124px, 1fr)); }
  .card { box-shadow: none; } .card .value { font-size: 22px; } th { white-space: normal; }
  figure, tr, .card, .levels, .share { break-inside: avoid; } h2, h3, thead { break-after: avoid; }
}
"""


def escape(text: object) -> str:
  return html.escape(str(text))


def data_uri(content: bytes, kind: str = 'png') -> str:
  return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def image(content: bytes, alt: str, kind: str = 'png') -> str:
  return f'<img src="{data_uri(content, kind)}" alt="{escape(alt)}">'


def figure(png: bytes, caption: str) -> str:
  """A plot at two thirds of its pixels: sharp on screens of 1.5 pixels per CSS pixel."""
  width = 2 * int.from_bytes(png[16:20], 'big') // 3  # from the PNG header
  shown = image(png, caption).replace('<img ', f'<img width="{width}" ', 1)
  return f'<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>'


def table(
  head: Sequence[str], rows: Iterable[Sequence[object]], text: bool | Collection[int] = False
) -> str:
  """A table; `text` lets long cells wrap instead of scrolling, of all columns or of some."""
  columns = range(len(head)) if isinstance(text, bool) else text
  kinds = [' class="text"' if text and i in columns else '' for i in range(len(head))]

  def line(cells: Sequence[object], tag: str) -> str:
    shown = zip(cells, kinds, strict=True)
    return '<tr>' + ''.join(f'<{tag}{kind}>{escape(x)}</{tag}>' for x, kind in shown) + '</tr>'

  heads, body = line(head, 'th'), ''.join(line(row, 'td') for row in rows)
  return (
    f'<div class="scroll"><table><thead>{heads}</thead><tbody>{body}</tbody></table></div>'
  )


def section(title: str, text: str, *blocks: str) -> str:
  head = f'<h2>{escape(title)}</h2><p>{escape(text)}</p>'
  return f'<section id="{_anchor(title)}">{head}{"".join(blocks)}</section>'


def details(summary: str, block: str) -> str:
  return f'<details><summary>{escape(summary)}</summary>{block}</details>'


def card(label: str, value: str, note: str = '', tone: str = '') -> str:
  return (
    f'<div class="card {escape(tone)}"><div class="label">{escape(label)}</div>'
    f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
  )


def document(
  title: str, subtitle: str, cards: Sequence[str], sections: dict[str, str], footer: str
) -> str:
  """The whole page; `sections` maps titles (for the menu) to their HTML."""
  menu = ''.join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in sections)
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{escape(title)}</title><style>{STYLE}</style></head><body>'
    f'<header><div><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav>{menu}</nav></div></header>'
    f'<main><div class="cards">{"".join(cards)}</div>{"".join(sections.values())}'
    f'<footer>{escape(footer)}</footer></main></body></html>\n'
  )


def _anchor(title: str) -> str:
  return ''.join(c if c.isalnum() else '-' for c in title.lower())


def png(pixels: np.ndarray) -> bytes:
  """PNG of uint8 [H, W, 3]."""
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'png', optimize=True)
  return out.getvalue()


def thumbnail(frame: np.ndarray, alt: str, side: int = 192) -> str:
  """An image of uint8 [H, W, 3]: as it is where it is tiny, else at most `side` px wide and high
  (JPEG)."""
  if max(frame.shape[:2]) <= 64:
    return image(png(frame), alt).replace('<img ', '<img class="small" ', 1)
  shown = Image.fromarray(frame)
  shown.thumbnail((side, side))
  out = io.BytesIO()
  shown.save(out, 'jpeg', quality=85)
  return image(out.getvalue(), alt, 'jpeg')


def gif(frames: np.ndarray, fps: float) -> bytes:
  """Endless animation of uint8 [T, H, W, 3]; the last frame stays for a second."""
  images = [Image.fromarray(frame) for frame in frames]
  durations = [max(20, round(1000 / fps))] * (len(images) - 1) + [1000]
  out = io.BytesIO()
  images[0].save(out, 'gif', save_all=True, append_images=images[1:], duration=durations, loop=0)
  return out.getvalue()


def film_row(frames: np.ndarray, gap: int = 2) -> bytes:
  """PNG of frames uint8 [T, H, W, 3] side by side on white."""
  t, h, w, _ = frames.shape
  row = np.full((h, t * (w + gap), 3), 255, np.uint8)
  for i, frame in enumerate(frames):
    left = i * (w + gap) + gap // 2
    row[:, left : left + w] = frame
  return png(row)
