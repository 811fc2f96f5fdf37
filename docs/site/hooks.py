"""What mkdocs does beyond Markdown: pictures within the page, and the version and address of the project."""

from __future__ import annotations

import pathlib
import re
import tomllib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROJECT_FILE = re.compile(r"<!-- file: ([\w.]+) -->")
EXAMPLE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(examples/[\w./]+)\)")
PICTURE = re.compile(r'<img alt="[^"]*" src="(?:\.\./)*(pictures/\w+\.svg)"\s*/?>')


def on_config(config: Any) -> Any:
    """Put the version, and a plain link to the repository, below every page; to the project's page on PyPI if
    pyproject.toml names no repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    addresses = {name.lower(): url for name, url in project.get("urls", {}).items()}
    name, address = "Repository", addresses.get("repository") or addresses.get("source")
    if address is None:
        name, address = "PyPI", addresses["homepage"]
    link = f'<a href="{address}">{name}</a>'
    config.copyright = f"{project['name']} {project['version']} · {project['license']} licence · {link}"
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in a file of the project that a page is; its links to pages of docs/how-to become those of a neighbour. The
    examples are not part of the site: instead of a link, it names their place in the repository."""
    markdown = PROJECT_FILE.sub(
        lambda found: (ROOT / found[1]).read_text(encoding="utf-8").replace("](docs/how-to/", "]("), markdown
    )
    return EXAMPLE.sub(r"\1 (`\2`)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Write each picture into its page, where it follows the theme that the reader chose."""
    return PICTURE.sub(lambda found: (ROOT / "docs" / found[1]).read_text(encoding="utf-8"), html)
