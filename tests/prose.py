"""Reads the English of README, documentation, docstrings and messages, and says which sentences are too long.

    python tests/prose.py [--longest] [PATH ...]

Prints each problem with its place. --longest: also prints the mean of each document and its three longest sentences.
test_prose.py runs the same check.

A sentence may have 30 words, and those of a document 16 on average. Code, tables, headings and comments are left out;
a piece of code within a sentence is one word. A document is a page, or the docstrings of a module, or its messages, or
what stands above the functions of a Lua file.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import pathlib
import re
import statistics
import sys
import textwrap
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOST_WORDS = 30
MOST_MEAN = 16
SHORTEST, FEW = 3, 5  # words of a sentence, and sentences of a document, that have a mean
PAGES = ["*.md", ".github/**/*.md", "docs/**/*.md", "examples/*.md"]
MODULES = ["pybreaker_redis/**/*.py", "pytest_pybreaker_redis.py"]
LEFT_OUT = {
    "CHANGELOG.md": "a list of changes, not prose",
}

_CODE = "\N{WHITE SQUARE}"  # stands for a piece of code or an address: one word
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
_CONTAINERS = ("!!!", "???", "===")  # of Markdown; their text is indented
_TERM = re.compile(r"(?:\w[\w*]*(?:, | or | and |=))*\w+\.?\s?: ")  # an argument and its meaning, in a docstring
# A full stop, question or exclamation mark before a space. Not that of an abbreviation, nor three dots that go on.
_END = re.compile(r"(?:(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\.\.)\.|\.\.\.(?= [A-Z])|[!?…])[\"')\]]*(?= )")

# The words that the project gave up, in the sense that it gave up, with what to say instead. Other senses stay.
RETIRED = {
    # not: three failures in a row; the row of a table
    r"rows? (?:of (?:failures|trips|successes|errors|slow calls|outcomes)|ends?)": "a run, or failures in a row",
    r"told|heard": "notified",
    r"beside": "in the background",
    # not: a landing page
    r"(?:in[ -])?flights?|t(?:ake|akes|ook|aken|aking) off|land(?:s|ed|ing(?! page))?": "permit, started, finished",
    # not: a fresh view, which is young enough to decide by
    r"fresh (?:document|breaker|circuit|state|key|one)s?": "new",
    # not: the verb, as in "overrides the default"; nor an argument of that name
    r"(?<!policy )(?<!may )(?<!can )(?<!to )overrides?(?= is| was| has| ends| of|[.,;]|$)": "policy override",
    # not: "only", as in "an outage of that breaker alone"
    r"(?:is|are|was|were|be|been|being|decides?|runs?|works?|goes on|left) alone": "without Redis, or below the quorum",
}


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One sentence, and the document and line where its paragraph begins."""

    document: str
    line: int
    text: str

    @property
    def words(self) -> int:
        """How many words it has."""
        return sum(any(letter.isalnum() or letter == _CODE for letter in word) for word in self.text.split())


# From text to sentences -----------------------------------------------------------------------------


def plain(text: str) -> str:
    """A paragraph without its markup. Code and addresses become one word each."""
    text = re.sub(r"(`+)(?:(?!\1).)+?\1", _CODE, text)
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\[([^\]]*)\]\((?:[^()]|\([^)]*\))*\)", r"\1", text)
    text = re.sub(r"<?\b[a-z+]+://\S+?(?=[.,;:)]?(?:\s|$))", _CODE, text)
    text = re.sub(r"<[^<>]+>", " ", text)
    return re.sub(r"(?<!\w)([*_]{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)", r"\2", text)


def sentences(text: str) -> list[str]:
    """The sentences of one paragraph."""
    text = " ".join(plain(text).split())
    ends = [0, *(found.end() for found in _END.finditer(text)), len(text)]
    found = [text[start:end].strip() for start, end in itertools.pairwise(ends)]
    return [one for one in found if re.search(rf"[\w{_CODE}]", one)]


def paragraphs_of_page(text: str) -> Iterator[tuple[int, str]]:
    """The paragraphs and list items of a Markdown page, with their lines."""
    text = re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    start, lines, fence, in_list = 0, [], "", False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        stripped = line.strip()
        if stripped and not line.startswith("  "):
            in_list = bool(_ITEM.match(line)) or stripped.startswith(_CONTAINERS)
        if line.startswith("    ") and not in_list and not lines:
            continue  # code
        if fence:
            fence = "" if stripped.startswith(fence) else fence
            continue
        if opens := re.match(r"(`{3,}|~{3,})", stripped):
            fence, stripped = opens[1], ""
        if stripped.startswith(("|", "#", "::: ", *_CONTAINERS)) or re.fullmatch(r"[-=*_ ]{3,}", stripped):
            stripped = ""
        if lines and (not stripped or _ITEM.match(line)):
            yield start, " ".join(lines)
            lines = []
        if stripped:
            start = start if lines else number
            lines.append(_ITEM.sub("", line, count=1).strip())


def paragraphs_of_docstring(text: str) -> Iterator[tuple[int, str]]:
    """Its paragraphs, list items and arguments. What stands indented after an empty line is code, or a table."""
    start, lines, is_code = 0, [], False
    for number, line in enumerate([*text.splitlines(), ""]):
        if not line.strip():
            is_code = False
        elif line.startswith("    ") and not lines and not _ITEM.match(line):
            is_code = True
        if lines and (not line.strip() or _ITEM.match(line) or _TERM.match(line)):
            yield start, " ".join(lines)
            lines = []
        if line.strip() and not is_code:
            start = start if lines else number
            lines.append(_ITEM.sub("", line, count=1).strip())


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The docstrings of a module, its classes and functions, with their first lines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The texts in the code that have the form of a sentence: four words or more, no markup of a query or a page."""
    documented = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and ast.get_docstring(node) is not None
        and isinstance(node.body[0], ast.Expr)
    }
    within = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    for node in ast.walk(tree):
        if node in documented or node in within:
            continue
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else _CODE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        if re.search(rf"(?:[a-z,{_CODE}]+ ){{3}}[a-z]", text) and not re.search(r"[{}<>;$]\s*\n|\A\s*[{<#]", text):
            yield node.lineno, text


def all_sentences() -> dict[str, list[Sentence]]:
    """The sentences of each document."""
    found: dict[str, list[Sentence]] = {}

    def add(document: str, line: int, text: str) -> None:
        found.setdefault(document, []).extend(Sentence(document, line, one) for one in sentences(text))

    for path in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        if name not in LEFT_OUT:
            for line, text in paragraphs_of_page(path.read_text(encoding="utf-8")):
                add(name, line, text)
    for path in (path for pattern in MODULES for path in sorted(ROOT.glob(pattern))):
        name, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
        for line, docstring in docstrings(tree):
            for below, text in paragraphs_of_docstring(docstring):
                add(f"{name}, docstrings", line + below, text)
        for line, message in messages(tree):
            for paragraph in re.split(r"\n\s*\n", textwrap.dedent(message)):
                add(f"{name}, messages", line, paragraph)
    for path in sorted((ROOT / "lua").glob("*.lua")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        for comment in re.finditer(r"(?m)^(?:-- .*\n)+(?=function )", text):
            line = text.count("\n", 0, comment.start()) + 1
            add(f"{name}, comments", line, re.sub(r"(?m)^-- ", "", comment[0]))
    return found


# What is wrong with them ----------------------------------------------------------------------------


def mean_of(ours: list[Sentence]) -> float:
    """The words of a sentence on average; 0 for too few sentences. Run-in headings are no sentences."""
    words = [one.words for one in ours if one.words >= SHORTEST]
    return statistics.fmean(words) if len(words) >= FEW else 0.0


def problems(found: dict[str, list[Sentence]]) -> Iterator[str]:
    """What is wrong, one line for each problem, with its place."""
    for document, ours in found.items():
        for one in ours:
            place = f"{document}:{one.line}"
            if one.words > MOST_WORDS:
                yield f"{place}: {one.words} words: {one.text}"
            for pattern, instead in RETIRED.items():
                for word in re.findall(rf"\b(?:{pattern})\b", one.text, re.IGNORECASE):
                    yield f"{place}: {word!r} (say: {instead}): {one.text}"
        if mean_of(ours) > MOST_MEAN:
            yield f"{document}: {mean_of(ours):.1f} words per sentence on average"


def main() -> int:
    arguments = [one for one in sys.argv[1:] if one != "--longest"]
    found = {
        document: ours
        for document, ours in all_sentences().items()
        if not arguments or any(document.startswith(argument) for argument in arguments)
    }
    for document, ours in found.items() if "--longest" in sys.argv else ():
        print(f"{document}: {mean_of(ours):.1f} words in {len(ours)} sentences")
        for one in sorted(ours, key=lambda one: -one.words)[:3]:
            print(f"    {one.line}: {one.words}: {one.text}")
    lines = list(problems(found))
    print("\n".join(lines))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
