"""Takes the pictures of the operators' page for the documentation, from a real run: make pictures"""

from __future__ import annotations

import base64
import pathlib

import redis
from playwright.sync_api import Page, expect, sync_playwright

from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.web import breakers_app

from . import scene
from .browser import CHROMIUM, QUIET
from .conftest import served

IMAGES = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "images"


def take(page: Page, name: str) -> None:
    """Write one picture, of what a visitor sees first."""
    page.wait_for_load_state("domcontentloaded")
    expect(page.locator("#status")).to_have_text("Live")
    page.wait_for_timeout(500)
    session = page.context.new_cdp_session(page)
    made = session.send("Page.captureScreenshot", {"format": "webp", "quality": 82})
    (IMAGES / f"{name}.webp").write_bytes(base64.b64decode(made["data"]))
    print(IMAGES / f"{name}.webp")


def main() -> None:
    """A fleet in trouble, its board in the light and one of its breakers in the dark."""
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client, sync_playwright() as playwright:
        scene.build(client)
        who = {"operator": "ann", "note": "The partner moves to another data centre"}
        scene.breaker(client, "billing-partner").force_open(3600, **who)
        scene.breaker(client, "catalog-geo").set_policy(failure_threshold=50, duration=1800, operator="ben")
        scene.breaker(client, "media-events").set_policy(enforce=False, operator="ben", note="dry run")
        app = breakers_app(client, read_only=False, authorize=lambda request: "ann")
        with served(app) as address:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            for name, path, scheme in (
                ("web-board", "/", "light"),
                ("web-breaker", "/breakers/shipping-partner", "dark"),
            ):
                context = browser.new_context(
                    base_url=address, viewport={"width": 1280, "height": 800}, color_scheme=scheme
                )
                page = context.new_page()
                page.goto(path)
                take(page, name)
                context.close()
            browser.close()


if __name__ == "__main__":
    main()
