"""README, documentation, docstrings and messages are in short sentences and in the project's own words."""

from __future__ import annotations

import ast
import textwrap

import prose
import pytest
from prose import RETIRED, Sentence, problems, sentences

FOUND = prose.all_sentences()


@pytest.mark.parametrize("document", FOUND)
def test_document(document: str) -> None:
    """No sentence is too long, none uses a retired word, and the mean of the document is low."""
    assert list(problems({document: FOUND[document]})) == []


def test_every_kind_is_read() -> None:
    """Pages, docstrings and messages are among the documents, and most of them have several sentences."""
    for name in ("README.md", "docs/how-to/guarding.md", "SECURITY.md"):
        assert len(FOUND[name]) > 10
    for name in ("_policy.py", "_core.py", "config.py"):
        assert len(FOUND[f"pybreaker_redis/{name}, docstrings"]) > 3
        assert len(FOUND[f"pybreaker_redis/{name}, messages"]) > 3
    for name in ("rules", "document"):
        assert len(FOUND[f"lua/{name}.lua, comments"]) > 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? Three! four", ["One.", "Two?", "Three!", "four"]),
        ("It took 0.1 s with Redis 6.2. Then more.", ["It took 0.1 s with Redis 6.2.", "Then more."]),
        ("Use a rate, e.g. 0.5, i.e. a half. Or not.", ["Use a rate, e.g. 0.5, i.e. a half.", "Or not."]),
        ("He said “no.” She (too.) agreed.", ["He said “no.” She (too.)", "agreed."]),
        ('It says "done." Then it ends.', ['It says "done."', "Then it ends."]),
        ("Lists end in ... and go on. Or end in ... Like this.", None),
        ("Call `a.b. C.d()` or ``x ` y. Z``. Then stop.", ["Call □ or □.", "Then stop."]),
        ("See [the page. Yes](a.md#b) and https://example.org/a.b. Next.", ["See the page.", "Yes and □.", "Next."]),
        ("**Bold lead.** Then *italic* and snake_case_name.", ["Bold lead.", "Then italic and snake_case_name."]),
        ("2 * 3 and 4 * 5 stay.", ["2 * 3 and 4 * 5 stay."]),
        ("![A picture. Of a thing](x.svg)", ["A picture.", "Of a thing"]),
    ],
)
def test_sentences(text: str, expected: list[str] | None) -> None:
    """A sentence ends at its stop; not within code, links, numbers and abbreviations."""
    expected = expected or ["Lists end in ... and go on.", "Or end in ...", "Like this."]
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [("one two-and-a-half (three) — four's", 4), ("`some code here` and 0.1 s", 4), ("- / … *", 0), ("a/b c=d", 2)],
)
def test_words(text: str, words: int) -> None:
    """A word has a letter or a digit; a piece of code is one word, and so is what hyphens join."""
    assert Sentence("x", 1, prose.plain(text)).words == words


PAGE = """
# A heading is no sentence

A paragraph over
two lines.
- an item
  that goes on
- another item

  with a paragraph of its own

1. a step
   ```python
   no.prose. Here()
   ```
2. the last step

| a table. | Left out. |
|---|---|

    indented code. Left out.

<!-- a comment. Left
out. -->
!!! note
    The text of a note.


The end.
"""


def test_paragraphs_of_a_page() -> None:
    """Code, tables, headings and comments are left out; each item of a list is a paragraph of its own."""
    assert list(prose.paragraphs_of_page(PAGE)) == [
        (4, "A paragraph over two lines."),
        (6, "an item that goes on"),
        (8, "another item"),
        (10, "with a paragraph of its own"),
        (12, "a step"),
        (16, "the last step"),
        (26, "The text of a note."),
        (29, "The end."),
    ]


DOCSTRING = """The purpose.

name: the first. More of it,
    on a second line.
lease, host: two at once. other: a third.
- an item

    code(here). Left(out)
    more.code()

The end."""


def test_paragraphs_of_a_docstring() -> None:
    """Each argument is a paragraph, with its indented lines; an indented block after an empty line is code."""
    assert [text for _, text in prose.paragraphs_of_docstring(DOCSTRING)] == [
        "The purpose.",
        "name: the first. More of it, on a second line.",
        "lease, host: two at once. other: a third.",
        "an item",
        "The end.",
    ]


def test_messages() -> None:
    """What a user may read is found: constants and f-strings, but neither docstrings nor names nor code."""
    code = '''
    def f(x):
        """This docstring is not a message at all."""
        log.warning("Redis does not answer: %r", x)
        raise ValueError(f"x must be a positive number, not {x!r}" " at all")
        return {"some-key": "a few", "sql": "{\\n select a from b where c"}
    '''
    assert sorted(text for _, text in prose.messages(ast.parse(textwrap.dedent(code)))) == [
        "Redis does not answer: %r",
        "x must be a positive number, not □ at all",
    ]


@pytest.mark.parametrize(
    ("text", "is_retired"),
    [
        ("three failures in a row", False),
        ("the row of failures", True),
        ("when the row ends", True),
        ("the row of a breaker in the table", False),
        ("policy overrides end", False),
        ("the policy override ends", False),
        ("the override ends", True),
        ("this overrides the default", False),
        ("which a subclass may override.", False),
        ("the process is told of it", True),
        ("the permit has landed", True),
        ("a probe in flight", True),
        ("the landing page", False),
        ("while it is alone", True),
        ("of that breaker alone", False),
        ("a fresh document", True),
        ("refreshes a fresh view", False),
        ("beside the call", True),
    ],
)
def test_retired_words(text: str, is_retired: bool) -> None:
    """The sense that was given up is found, and no other."""
    found = list(problems({"x": [Sentence("x", 1, text)]}))
    assert bool(found) == is_retired
    assert all(any(instead in one for instead in RETIRED.values()) for one in found)


def test_long_sentences_and_long_means() -> None:
    """Thirty words are allowed, and one more is not; so are 16 on average."""
    assert not list(problems({"x": [Sentence("x", 1, "word " * 30)]}))
    assert len(list(problems({"x": [Sentence("x", 1, "word " * 31)]}))) == 1
    assert not list(problems({"x": [Sentence("x", 1, "word " * 16)] * 9}))
    assert len(list(problems({"x": [Sentence("x", 1, "word " * 17)] * 9}))) == 1
    headings = [Sentence("x", 1, "Run-in.")] * 50
    assert len(list(problems({"x": [Sentence("x", 1, "word " * 17)] * 9 + headings}))) == 1
