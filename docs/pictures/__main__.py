"""Writes every picture and every table of figures of the documentation: `make drawings`."""

from __future__ import annotations

import pathlib

from . import pictures
from .tables import DOCS, filled

for name, text in pictures().items():
    (pathlib.Path(__file__).parent / f"{name}.svg").write_text(text, encoding="utf-8")
for page in DOCS.rglob("*.md"):
    text = page.read_text(encoding="utf-8")
    if (new := filled(text)) != text:
        page.write_text(new, encoding="utf-8")
