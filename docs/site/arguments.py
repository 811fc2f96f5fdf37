"""Shows the arguments and fields that a docstring describes as tables of the reference, with types and defaults.

A docstring describes them as `name: meaning`, at the beginning of a line or of a sentence. mkdocstrings reads its own
form of sections, so each docstring is rewritten to that form. What it says is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import griffe

from pybreaker_redis._policy import DEFAULTS, RULES, Rule

Meanings: TypeAlias = dict[tuple[str, str], str]  # by the class or function, and the argument or field

AS_FOR = re.compile(r"As for (\w+)[.,;]? ?(.*)")
END_OF_ARGUMENTS = re.compile(r"(?:^|(?<=[.:] ))(?=Raises |Returns |Reads )", re.MULTILINE)


class Arguments(griffe.Extension):
    """The extension of griffe that mkdocs.yml names."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Rewrite every docstring, and spell out the types and defaults that only this package has names for."""
        found = list(_members(pkg))
        named = {one.path: one.value for one in found if one.is_attribute and one.parent.is_module and one.value}
        owners = [one for one in found if (one.is_class or one.is_function) and one.docstring]
        owners.sort(key=lambda one: one.path.count("."))  # compat has classes of the same names, further down
        meanings: Meanings = {}
        for one in owners:
            for name, meaning in described(one.docstring.value, set.union(*_described(one)))[1]:
                meanings.setdefault((one.name, name), meaning)
        for one in owners:
            if one.path != "pybreaker_redis._policy.Policy":
                arguments, fields = _described(one)
                one.docstring.value = rewritten(one.docstring.value, arguments, "Args", meanings)
                one.docstring.value = rewritten(one.docstring.value, fields, "Attributes", meanings)
        for one in found:
            if one.path == "pybreaker_redis._policy.Policy":
                _describe_policy(one)
            for parameter in one.parameters if one.is_function else []:
                annotation = _spelled_out(parameter.annotation, named)
                parameter.annotation = None if str(annotation) == "Any" else annotation  # the meaning says more
                parameter.default = _spelled_out(parameter.default, named)
            if one.is_attribute and one.parent.is_class:
                one.annotation, one.value = _spelled_out(one.annotation, named), _spelled_out(one.value, named)


def rewritten(docstring: str, names: set[str], section: str, meanings: Meanings) -> str:
    """The docstring with a section of mkdocstrings in place of the descriptions of these names."""
    prose, rows = described(docstring, names)
    lines = [f"    {name}: {in_full(name, meaning, meanings)}" for name, meaning in rows]
    return "\n\n".join([*prose, "\n".join([f"{section}:", *lines])] if lines else prose)


def described(docstring: str, names: set[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The paragraphs of a docstring without its descriptions of these names, and these: name and meaning."""
    if not names:
        return [docstring], []
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    begins = re.compile(rf"(?:^ *|(?<=[.;] ))((?:{known})(?:,\s+(?:{known}))*):\s", re.MULTILINE)
    prose: list[str] = []
    rows: list[tuple[str, str]] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        before, *found = begins.split(paragraph)
        prose.append(before)
        if found:
            found[-1], *after = END_OF_ARGUMENTS.split(found[-1], maxsplit=1)
            prose += after
        for written, meaning in zip(found[::2], found[1::2], strict=True):
            rows += [(name, sentence(" ".join(meaning.split()))) for name in re.split(r",\s+", written)]
    return [paragraph for paragraph in prose if paragraph.strip()], rows


def in_full(name: str, meaning: str, meanings: Meanings) -> str:
    """The meaning, with the text of the class or function that it refers to: each cell of a table stands alone."""
    refers = AS_FOR.fullmatch(meaning)
    if refers is None or (refers[1], name) not in meanings:
        return meaning
    return f"{meanings[refers[1], name]} {sentence(refers[2])}".rstrip()


def sentence(text: str) -> str:
    """The text with a capital letter."""
    return f"{text[:1].upper()}{text[1:]}"


def _members(owner: griffe.Module | griffe.Class) -> Iterator[griffe.Object]:
    """Everything that a module or class defines itself, and what that defines."""
    for member in owner.members.values():
        if member.is_alias:
            continue
        yield member
        if member.is_module or member.is_class:
            yield from _members(member)


def _described(one: griffe.Class | griffe.Function) -> tuple[set[str], set[str]]:
    """The arguments and the other fields that its docstring may describe. Objects that users only read have no
    arguments: the first field of their class has no default."""
    arguments = {parameter.name for parameter in one.parameters}
    if one.is_function:
        return arguments, set()
    fields = set(one.attributes)
    if "dataclass" in one.labels or any("NamedTuple" in str(base) for base in one.bases):
        first = next(iter(one.attributes.values()))
        return (set(), fields) if first.value is None else (fields, set())
    return arguments, fields - arguments


def _spelled_out(text: griffe.Expr | str | None, named: dict[str, Any]) -> griffe.Expr | str | None:
    """A type or a default with the values of the names that modules of this package give them."""
    if not isinstance(text, griffe.Expr):
        return text
    parts = list(text.iterate(flat=True))
    values = [named.get(part.canonical_path) if isinstance(part, griffe.ExprName) else None for part in parts]
    if not any(values):
        return text
    spelled = "".join(str(value or part) for value, part in zip(values, parts, strict=True)).replace("'", '"')
    spelled = re.sub(r"TypeVar\([^)]*\)", "Any", spelled)
    spelled = re.sub(r"\b[A-Z]\]\[(\w+)\]", r"\1]", spelled)  # of a generic alias: what stands for its variable
    return re.sub(r'\["(\w+)"\]', r"[\1]", spelled)  # a name that its module quotes


def _describe_policy(policy: griffe.Class) -> None:
    """The fields of Policy, from their one declaration."""
    for name, default in DEFAULTS.items():
        policy.attributes[name].value = repr(default)
    rows = [f"    {name}: {rule.meaning} {bounds(rule)}".rstrip() for name, rule in RULES.items()]
    assert policy.docstring is not None
    policy.docstring.value = "\n\n".join([policy.docstring.value, "\n".join(["Args:", *rows])])


def bounds(rule: Rule) -> str:
    """What a field accepts, as a sentence."""
    if rule.kind == "flag" or "0 to 1" in rule.meaning:
        return ""
    most = f" to {rule.most:,g}" if rule.most < 1e6 else ""
    return f"Range: {rule.least:g}{most}." if most else f"At least {rule.least:g}."
