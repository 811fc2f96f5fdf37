"""Draws an SVG in the colours of the page's theme; the same calls give the same bytes.

A picture stands alone, as in README, and follows the reader's system. Within a page of the documentation it follows the
theme that the reader chose there. No meaning is carried by a colour alone.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TypeAlias

Scale: TypeAlias = Callable[[float], float]  # from a value to a coordinate

LIGHT = {
    "ink": "#1f2a33",
    "muted": "#5b6873",
    "faint": "#d3dae0",
    "good": "#23754a",
    "bad": "#b3261e",
    "hold": "#8a5a00",
    "probe": "#2059a8",
    "good-fill": "#d9f0e2",
    "bad-fill": "#fadedb",
    "hold-fill": "#fbe8c6",
    "probe-fill": "#d9e6fa",
}
DARK = {
    "ink": "#e3e8ec",
    "muted": "#a3afb9",
    "faint": "#46525c",
    "good": "#6fd39b",
    "bad": "#ff9a91",
    "hold": "#f0bd61",
    "probe": "#8dbbff",
    "good-fill": "#1c4a33",
    "bad-fill": "#5c2521",
    "hold-fill": "#5a4112",
    "probe-fill": "#1f3d6b",
}
RULES = """.picture { font: 13px system-ui, sans-serif; fill: var(--ink); }
.picture .line { stroke: var(--ink); stroke-width: 1.4; fill: none; }
.picture .rule { stroke: var(--faint); stroke-width: 1; fill: none; }
.picture .muted { fill: var(--muted); }
.picture .small { font-size: 12px; }
.picture .title { font-weight: 600; }
.picture .end { text-anchor: end; }
.picture .middle { text-anchor: middle; }
.picture .dot { fill: var(--good); }
"""
COLOURS = ("ink", "muted", "good", "bad", "hold", "probe")


def _colours(selector: str, colours: dict[str, str]) -> str:
    return f"{selector} {{ {' '.join(f'--{name}: {value};' for name, value in colours.items())} }}"


def style() -> str:
    """The rules that every picture begins with."""
    lines = [
        _colours(".picture", LIGHT),
        f"@media (prefers-color-scheme: dark) {{ {_colours('.picture', DARK)} }}",
        _colours("[data-md-color-scheme=default] .picture", LIGHT),
        _colours("[data-md-color-scheme=slate] .picture", DARK),
    ]
    lines += [f".picture .{name} {{ stroke: var(--{name}); }}" for name in COLOURS]
    lines += [f".picture text.{name} {{ stroke: none; fill: var(--{name}); }}" for name in COLOURS]
    lines += [f".picture .{name}-fill {{ fill: var(--{name}-fill); stroke: var(--{name}); }}" for name in COLOURS[2:]]
    return RULES + "\n".join(lines)


def number(value: float) -> str:
    """A coordinate with at most one digit after the point."""
    return f"{value:.1f}".removesuffix(".0")


class Picture:
    """An SVG of the given size. Coordinates are in pixels; `kind` names classes of the style."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self._size = (width, height)
        self._title, self._description = title, description
        self._parts: list[str] = []
        self._rules: list[str] = []
        self._marked: list[str] = []

    def rule(self, css: str) -> None:
        """Add a rule of style for this picture."""
        self._rules.append(css)

    def add(self, tag: str, content: str = "", **attributes: float | str) -> None:
        """Add an element; the underscore of a name such as class_ is dropped, others become hyphens."""
        written = "".join(
            f' {name.rstrip("_").replace("_", "-")}="{number(value) if isinstance(value, int | float) else value}"'
            for name, value in attributes.items()
        )
        self._parts.append(f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>")

    def open(self, **attributes: float | str) -> None:
        """Begin a group."""
        self.add("g", "\0", **attributes)
        self._parts[-1] = self._parts[-1].partition("\0")[0]

    def close(self) -> None:
        """End the group."""
        self._parts.append("</g>")

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """One line of text whose baseline begins at (x, y), or ends there (kind "end"), or is centred ("middle")."""
        self.add("text", html.escape(text), x=x, y=y, **({"class_": kind} if kind else {}))

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        """A straight line."""
        self.add("path", d=f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", class_=kind)

    def arrow(self, points: Sequence[tuple[float, float]], kind: str = "line") -> None:
        """A polygonal line that ends in an arrowhead."""
        path = "L".join(f"{number(x)} {number(y)}" for x, y in points)
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        dx, dy = (x - x0) / length * 7, (y - y0) / length * 7
        left, right = ((x - dx - dy * side, y - dy + dx * side) for side in (0.5, -0.5))
        head = "L".join(f"{number(x)} {number(y)}" for x, y in (left, (x, y), right))
        self.add("path", d=f"M{path}M{head}", class_=f"line {kind}")

    def box(self, x: float, y: float, width: float, height: float, text: str, kind: str) -> None:
        """A rounded rectangle with text in its middle."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=5, class_=f"{kind}-fill")
        self.text(x + width / 2, y + height / 2 + 4.5, text, "middle small")

    def mark(self, x: float, y: float, ended: str) -> None:
        """How a call ended: a dot was answered, a cross failed, a ring was rejected, a diamond probed."""
        self._marked.append(ended)
        if ended == "answered":
            self.add("circle", cx=x, cy=y, r=3.6, class_="good dot")
        elif ended == "rejected":
            self.add("circle", cx=x, cy=y, r=3.6, class_="hold", fill="none", stroke_width=1.6)
        elif ended == "failed":
            self.add("path", d=_cross(x, y), class_="bad", stroke_width=2.2)
        else:
            diamond = f"M{number(x)} {number(y - 6)}l6 6l-6 6l-6 -6z"
            self.add("path", d=diamond, class_="probe probe-fill", stroke_width=1.6)

    def legend(self, x: float, y: float) -> None:
        """Explain the marks that were drawn."""
        for ended in dict.fromkeys(self._marked):
            self.mark(x, y - 4, ended)
            self.text(x + 11, y, ended, "muted small")
            x += 90

    def svg(self) -> str:
        """The text of the file."""
        width, height = self._size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" viewBox="0 0 {width} {height}" role="img"'
                f' aria-label="{html.escape(self._description)}">',
                f"<title>{html.escape(self._title)}</title>",
                "<style>",
                style(),
                *self._rules,
                "</style>",
                *self._parts,
                "</svg>",
                "",
            ]
        )


def _cross(x: float, y: float) -> str:
    return f"M{number(x - 4)} {number(y - 4)}l8 8M{number(x + 4)} {number(y - 4)}l-8 8"
