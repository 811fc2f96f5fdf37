"""Takes the picture of `pybreaker-redis watch` for the documentation, from a real run: make pictures"""

from __future__ import annotations

import io
import pathlib
import re

import redis
import rich.console
import rich.text
from conftest import wait_until
from terminals import Terminal
from web import scene

from pybreaker_redis.embedded import EmbeddedServer

IMAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "images" / "watch.svg"
WIDTH, HEIGHT = 110, 24


def svg(drawn: str) -> str:
    """What a terminal was sent as a picture, with the fonts of the one who looks at it."""
    console = rich.console.Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in drawn.splitlines():
        console.print(rich.text.Text.from_ansi(line, no_wrap=True, overflow="crop"))
    text = console.export_svg(title="pybreaker-redis watch", unique_id="watch")
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)
    return text.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


def main() -> None:
    """A fleet in trouble, a moment after one more trip."""
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        scene.build(client)
        scene.breaker(client, "billing-partner").force_open(3600, operator="ann", note="moving the database")
        scene.breaker(client, "catalog-geo").set_policy(failure_threshold=50, duration=1800, operator="ben")
        shown = Terminal(server.url, "watch", size=(WIDTH, HEIGHT))
        wait_until(lambda: shown.shows("120 breakers"))
        scene.trip(client, "checkout-api")
        wait_until(lambda: shown.shows("checkout-api  closed -> open") and shown.shows("> checkout-api"))
        IMAGE.write_text(svg(shown.drawn))
        shown.end()
    print(IMAGE)


if __name__ == "__main__":
    main()
