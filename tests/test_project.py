"""The files for people who work on the project: what they name is there, and CI covers what pyproject.toml promises."""

from __future__ import annotations

import pathlib
import re
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = ["CONTRIBUTING.md", "RELEASING.md", "CODE_OF_CONDUCT.md", "llms.txt", ".github/PULL_REQUEST_TEMPLATE.md"]
MADE = ("build/", "dist/")  # paths that a command makes
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def text(name: str) -> str:
    """The text of a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths(page: str) -> None:
    """Each relative link of the page leads somewhere, and each path in it exists."""
    content = text(page)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^):]+)\)", content)]
    paths = re.findall(r"`([\w.]+/[\w./*-]+|[\w-]+\.(?:md|toml|py|lua|json))`", content)
    for path in [*links, *(path for path in paths if not path.startswith(MADE))]:
        folders = (ROOT, ROOT / "lua", ROOT / "pybreaker_redis", ROOT / "tests", *(ROOT / "tests").glob("*/"))
        assert any(list(folder.glob(path)) for folder in folders), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str) -> None:
    """Each target of make that the page names is in the Makefile."""
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", text(page), re.DOTALL))
    assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= TARGETS


def test_recipe_names_what_is_there() -> None:
    """The recipe for a policy rule names functions and constants that its files have."""
    recipe = text("CONTRIBUTING.md").split("## Add a policy rule")[1].split("\n## ")[0]
    for name, file in {
        "WINDOW_RULES": "pybreaker_redis/_policy.py",
        "policy_field": "lua/request.lua",
        "judges": "lua/request.lua",
        "policy_of": "lua/request.lua",
        "trip_reason": "lua/rules.lua",
        "EVERY_FIELD": "tests/test_config.py",
        "REASONS": "tests/invariants.py",
        "machine": "tests/contract/test_policy_rules.py",
    }.items():
        assert f"`{name}`" in recipe
        assert re.search(rf"\b{name}\b", text(file)), (name, file)


def test_ci_covers_the_classifiers() -> None:
    """CI runs on each Python that pyproject.toml names, from requires-python on, and on each kind of server."""
    prefix = "Programming Language :: Python :: "
    versions = [one.removeprefix(prefix) for one in PYPROJECT["project"]["classifiers"] if one.startswith(prefix)]
    pythons = CI["jobs"]["pythons"]["strategy"]["matrix"]["python"]
    assert pythons == [version for version in versions if re.fullmatch(r"3\.\d+", version)]
    assert PYPROJECT["project"]["requires-python"] == f">={pythons[0]}"
    servers = CI["jobs"]["servers"]["strategy"]["matrix"]["server"]
    assert {re.sub(r"\.\d+$", "", server) for server in servers} >= {
        "redis-6",
        "redis-7",
        "redis-8",
        "valkey-7",
        "valkey-8",
    }
    assert {"redis-6.2", "valkey-7.2"} <= set(servers)


def test_ci_runs_what_contributors_run() -> None:
    """The jobs run .ci/run, which is executable, and targets of the Makefile."""
    steps = [step["run"] for job in CI["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in steps
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert all(step == ".ci/run" or step.removeprefix("make ") in TARGETS for step in steps)


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms(form: pathlib.Path) -> None:
    """Each form has a name, a description, and a field that must be filled in; the labels of fields differ."""
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.stem == "config":
        assert isinstance(content["blank_issues_enabled"], bool)
        return
    assert content["name"]
    assert content["description"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert (
        len({field["id"] for field in fields}) == len({field["attributes"]["label"] for field in fields}) == len(fields)
    )
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_sdist_has_the_project_files() -> None:
    """What the pages above need is in the sdist, too."""
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    root_files = {path.name for path in ROOT.glob("*.md")} | {
        "llms.txt",
        "Makefile",
        "LICENSE",
        ".pre-commit-config.yaml",
    }
    assert root_files | {".github", ".ci", "docs", "tests", "lua", "examples"} <= set(included)
