"""The built documentation: its links, its reference, and every page in a real browser that reaches no other host."""

from __future__ import annotations

import contextlib
import functools
import html.parser
import http.server
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

import pybreaker_redis
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.testing import FakeClock

pytest.importorskip("mkdocs", reason="needs the extra `docs`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `webtests`")

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
READINGS = (pybreaker_redis.Event, pybreaker_redis.Counts, pybreaker_redis.Snapshot, pybreaker_redis.HistoryEntry)
CONSTRUCTED = (
    pybreaker_redis.CircuitBreaker,
    pybreaker_redis.CircuitBreakerManager,
    pybreaker_redis.Policy,
    pybreaker_redis.Config,
    pybreaker_redis.Classification,
    EmbeddedServer,
    FakeClock,
)


class Page(html.parser.HTMLParser):
    """The ids, the links and the text of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self._skipped = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note ids and links."""
        self._skipped += tag in ("script", "style")
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)

    def handle_endtag(self, tag: str) -> None:
        """End what is no text of the page."""
        self._skipped -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        """Note the text."""
        if not self._skipped:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The documentation, built strictly."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: pathlib.Path) -> dict[pathlib.Path, Page]:
    """Every page by its file."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def address(site: pathlib.Path) -> Iterator[str]:
    """Where the site is served."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that finds no host but this one."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium on PATH")
    with playwright.sync_playwright() as driver:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        options = [*QUIET, rules, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        with contextlib.closing(driver.chromium.launch(executable_path=CHROMIUM, args=options)) as found:
            yield found


def target_of(page: pathlib.Path, link: str, site: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The file that a link of a page leads to, and the anchor in it."""
    path, _, anchor = link.partition("#")
    path = urllib.parse.unquote(path)
    if not path:
        return page, anchor
    target = site / path.lstrip("/") if path.startswith("/") else page.parent / path
    target = pathlib.Path(os.path.normpath(target))
    return target / "index.html" if target.is_dir() else target, anchor


def test_links_lead_somewhere(site: pathlib.Path, pages: dict[pathlib.Path, Page]) -> None:
    """Every link within the site leads to a page, and every anchor to an id of that page."""
    seen = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are absolute, for the address of the published site
        for link in page.links:
            if urllib.parse.urlsplit(link).scheme:
                continue
            target, anchor = target_of(path, link, site)
            assert target.exists(), (path.relative_to(site), link)
            if anchor and target in pages:
                assert urllib.parse.unquote(anchor) in pages[target].ids | {"__top"}, (path.relative_to(site), link)
            seen += 1
    assert seen > 1000


def test_every_page_is_in_the_navigation(site: pathlib.Path, pages: dict[pathlib.Path, Page]) -> None:
    """A reader reaches every page from the landing page's navigation."""
    home = site / "index.html"
    reached = {target_of(home, link, site)[0] for link in pages[home].links if "://" not in link}
    for path in pages:
        assert path in reached or path.name == "404.html", path.relative_to(site)


def text_of(site: pathlib.Path, pages: dict[pathlib.Path, Page]) -> dict[str, str]:
    """The text of the pages of the reference, by their name."""
    folder = site / "reference"
    return {path.parent.name: " ".join(page.words) for path, page in pages.items() if path.is_relative_to(folder)}


def test_reference_has_every_public_name(site: pathlib.Path, pages: dict[pathlib.Path, Page]) -> None:
    """Each public name has its heading."""
    ids = {one for path, page in pages.items() if path.is_relative_to(site / "reference") for one in page.ids}
    for name in pybreaker_redis.__all__:
        assert f"pybreaker_redis.{name}" in ids


def test_reference_has_every_option(site: pathlib.Path) -> None:
    """Each option of a constructor, and each field of a reading, has a row."""
    tables = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").rglob("*.html"))
    for kind in (*CONSTRUCTED, *READINGS):
        heading = f'id="{kind.__module__.partition("._")[0]}.{kind.__name__}"'
        section = tables[tables.index(heading) :].partition("</table>")[0]
        rows = re.findall(r"<tr[^>]*>\s*<td>\s*<code>(?:<span[^>]*>)?(\w+)<", section)
        assert sorted(rows) == sorted(inspect.signature(kind).parameters), kind.__name__


def test_cells_of_the_reference_stand_alone(site: pathlib.Path) -> None:
    """A description that refers to another class or function is written out, and no type is just "Any"."""
    tables = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").rglob("*.html"))
    assert tables.count("Seconds to wait for a connection to Redis") == 2  # of a breaker, and of a configuration
    assert not re.findall(r"<p>As for \w+[A-Z_]\w*.*", tables)
    assert not re.findall(r"<td>\s*<code>(?:<[^>]*>)*Any(?:<[^>]*>)*</code>", tables)


def test_examples_are_named_by_their_place(pages: dict[pathlib.Path, Page]) -> None:
    """The site has no examples: a page names the folder of the repository instead of linking to it."""
    text = " ".join(word for page in pages.values() for word in page.words)
    assert "examples/fastapi_httpx" in text
    assert not [link for page in pages.values() for link in page.links if "examples/" in link]


def test_reference_has_no_internal_names(site: pathlib.Path, pages: dict[pathlib.Path, Page]) -> None:
    """Nothing that begins with an underscore, and no base class that only this package knows."""
    for name, text in text_of(site, pages).items():
        found = re.findall(r"(?<![\w])_[a-z]\w+|\w+Core\b|BasePermit|BaseWatch|TypeVar|TypeAlias", text)
        assert not found, (name, found)


def watched(context: Any, address: str, troubles: list[str]) -> Any:
    """A page of the browser that notes errors of the console, failed requests, and requests to other hosts."""
    page = context.new_page()
    page.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("requestfailed", lambda request: troubles.append(f"{request.failure}: {request.url}"))
    page.on("response", lambda answer: answer.status >= 400 and troubles.append(f"{answer.status}: {answer.url}"))
    page.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or troubles.append(request.url)
    )
    return page


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_in_a_browser(site: pathlib.Path, address: str, browser: Any, theme: str) -> None:
    """Without a network, every page loads whole, shows its pictures, and fits a telephone."""
    troubles: list[str] = []
    drawn = 0
    with contextlib.closing(browser.new_context(color_scheme=theme, reduced_motion="reduce")) as context:
        page = watched(context, address, troubles)
        for path in sorted(site.rglob("index.html")):
            page.set_viewport_size({"width": 1280, "height": 900})
            page.goto(address + str(path.parent.relative_to(site)).lstrip(".") + "/", wait_until="load")
            scheme = page.evaluate("document.body.getAttribute('data-md-color-scheme')")
            assert scheme == {"light": "default", "dark": "slate"}[theme]
            for picture in page.locator("article svg.picture").all():
                box = picture.bounding_box()
                assert box is not None, path
                assert box["width"] > 300, path
                assert box["height"] > 100, path
                drawn += 1
            broken = page.evaluate("[...document.images].filter(one => !one.naturalWidth).map(one => one.src)")
            assert not broken, path
            page.set_viewport_size({"width": 390, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    # what the test itself ended by going to the next page
    assert not [one for one in troubles if not one.startswith("net::ERR_ABORTED")]
    assert drawn >= 10


def test_pictures_follow_the_theme_that_the_reader_chooses(address: str, browser: Any) -> None:
    """The switch of the page changes the colours of a picture, whatever the system prefers."""
    colour = "getComputedStyle(document.querySelector('svg.picture text')).fill"
    with contextlib.closing(browser.new_context(color_scheme="light")) as context:
        page = context.new_page()
        page.goto(f"{address}concepts/", wait_until="networkidle")
        light = page.evaluate(colour)
        page.locator("label[title=Dark]").click()
        assert page.evaluate("document.body.getAttribute('data-md-color-scheme')") == "slate"
        assert page.evaluate(colour) != light


def test_search_and_next_page(address: str, browser: Any) -> None:
    """A reader finds a page by its words, and the next page by its link."""
    troubles: list[str] = []
    with contextlib.closing(browser.new_context()) as context:
        page = watched(context, address, troubles)
        page.goto(address, wait_until="networkidle")
        page.locator("[data-md-component=search-query]").click()
        page.keyboard.type("quorum")
        page.locator(".md-search-result__link").first.wait_for()
        page.goto(f"{address}tutorial/", wait_until="networkidle")
        page.locator(".md-footer__link--next").click()
        page.wait_for_url("**/how-to/guarding/")
        assert pybreaker_redis.__name__ in page.locator(".md-copyright").inner_text()
    assert not troubles
