"""Captions as Wan's pipelines clean them before tokenisation."""

from __future__ import annotations

import html
import re

import ftfy


def clean(caption: str) -> str:
  """`caption` with broken encodings repaired, HTML entities resolved (twice: some were escaped
  twice) and every run of white space one blank.
  """
  text = html.unescape(html.unescape(ftfy.fix_text(caption)))
  return re.sub(r'\s+', ' ', text).strip()
