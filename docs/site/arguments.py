"""Shows the arguments and fields that a docstring describes as tables of the reference, with types and defaults.

A docstring describes them as `name: meaning`, at the beginning of a line or of a sentence. mkdocstrings reads its own
form of sections, so each docstring is rewritten to that form. What it says is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

from pybreaker_redis._policy import DEFAULTS, RULES, Rule

END_OF_ARGUMENTS = re.compile(r"(?:^|(?<=[.:] ))(?=Raises |Returns |Reads )", re.MULTILINE)


class Arguments(griffe.Extension):
    """The extension of griffe that mkdocs.yml names."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Rewrite every docstring, and spell out the types and defaults that only this package has names for."""
        found = list(_members(pkg))
        named = {one.path: one.value for one in found if one.is_attribute and one.parent.is_module and one.value}
        for one in found:
            if one.path == "pybreaker_redis._policy.Policy":
                _describe_policy(one)
            elif (one.is_class or one.is_function) and one.docstring:
                arguments, fields = _described(one)
                one.docstring.value = rewritten(one.docstring.value, arguments, "Args")
                one.docstring.value = rewritten(one.docstring.value, fields, "Attributes")
            for parameter in one.parameters if one.is_function else []:
                parameter.annotation = _spelled_out(parameter.annotation, named)
                parameter.default = _spelled_out(parameter.default, named)
            if one.is_attribute and one.parent.is_class:
                one.annotation, one.value = _spelled_out(one.annotation, named), _spelled_out(one.value, named)


def rewritten(docstring: str, names: set[str], section: str) -> str:
    """The docstring with a section of mkdocstrings in place of the descriptions of these names."""
    if not names:
        return docstring
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    begins = re.compile(rf"(?:^ *|(?<=[.;] ))((?:{known})(?:,\s+(?:{known}))*):\s", re.MULTILINE)
    prose: list[str] = []
    rows: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        before, *described = begins.split(paragraph)
        prose.append(before)
        if described:
            described[-1], *after = END_OF_ARGUMENTS.split(described[-1], maxsplit=1)
            prose += after
        for written, meaning in zip(described[::2], described[1::2], strict=True):
            text = " ".join(meaning.split())
            rows += [f"    {name}: {text[0].upper()}{text[1:]}" for name in re.split(r",\s+", written)]
    kept = [paragraph for paragraph in prose if paragraph.strip()]
    return "\n\n".join([*kept, "\n".join([f"{section}:", *rows])] if rows else kept)


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
