"""What operators type, on the command line and on the web page: lengths of time, and values of policy fields."""

from __future__ import annotations

import re
from typing import Any

from ._errors import PolicyError
from ._policy import rule_of

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FLAGS = {"true": True, "false": False}
_NONE = ("none", "off")
_KINDS = {
    "flag": "true or false",
    "count": "a whole number",
    "seconds": "a length of time as in 30, 0.5, 250ms, 10m, 2h or 1d",
    "number": "a number",
}


def seconds(text: str) -> float:
    """A length of time in seconds: 30, 0.5, 250ms, 10m, 2h, 1d. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a length of time; write 30, 0.5, 250ms, 10m, 2h or 1d")
    return round(float(found[1]) * _UNITS[found[2]], 3)


def policy_value(name: str, text: str) -> Any:
    """The value of a policy field; its bounds are not checked. Raises PolicyError, in words for the operator."""
    rule, word = rule_of(name), text.strip().lower()
    if rule.optional and word in _NONE:
        return None
    try:
        if rule.kind == "flag":
            return _FLAGS[word]
        if rule.kind == "seconds":
            return seconds(word)
        return int(word) if rule.kind == "count" else float(word)
    except (ValueError, KeyError):
        wanted = _KINDS[rule.kind] + (", or none" if rule.optional else "")
        raise PolicyError(f"{name} must be {wanted}, not {text!r}") from None
