"""What an operator may do to a breaker from the page: what each action needs and means, and how it is carried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._errors import PolicyError
from .._policy import override_request
from .._protocol import LONGEST_NOTE, printable
from .._sync import CircuitBreaker
from .._typed import policy_value

UNITS = {"minutes": 60, "hours": 3600, "days": 86400, "seconds": 1}
POLICY_FIELD = "policy."  # before the name of a policy field in a form


class Order(NamedTuple):
    """One operator's wish. duration: seconds, or None. fields: of the policy override."""

    operator: str | None
    note: str | None = None
    duration: float | None = None
    fields: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Action(NamedTuple):
    """Something that an operator may do. label: on its button. effect: what it means for the fleet, as one sentence.

    timed: whether it may be given an end. needs: what must be given, of "duration", "note" and "fields".
    """

    label: str
    effect: str
    carry_out: Callable[[CircuitBreaker, Order], None]
    timed: bool = False
    needs: tuple[str, ...] = ()


def _who(order: Order) -> dict[str, str | None]:
    return {"operator": order.operator, "note": order.note}


ACTIONS: dict[str, Action] = {
    "force-open": Action(
        "Force open",
        "Every call of the whole fleet is rejected. Afterwards a probe decides.",
        lambda breaker, order: breaker.force_open(order.duration, **_who(order)),
        timed=True,
        needs=("duration", "note"),
    ),
    "force-closed": Action(
        "Force closed",
        "Every call of the whole fleet is admitted, without protection: nothing is counted.",
        lambda breaker, order: breaker.force_closed(order.duration, **_who(order)),
        timed=True,
        needs=("duration", "note"),
    ),
    "clear": Action(
        "Clear forced state",
        "The forced state ends. After forced open the next call probes; after forced closed the circuit stays closed.",
        lambda breaker, order: breaker.clear_forced(**_who(order)),
    ),
    "probe": Action(
        "Probe now",
        "The next call of the fleet probes the service, whatever is left of the open period.",
        lambda breaker, order: breaker.probe(**_who(order)),
    ),
    "reset": Action(
        "Reset",
        "The circuit closes. Its counts, its forced state and its policy override are dropped; the history stays.",
        lambda breaker, order: breaker.reset(**_who(order)),
    ),
    "shadow": Action(
        "Shadow mode",
        "The whole fleet admits every call, but goes on counting, tripping and notifying.",
        lambda breaker, order: breaker.set_policy(duration=order.duration, enforce=False, **_who(order)),
        timed=True,
        needs=("note",),
    ),
    "set-policy": Action(
        "Set policy override",
        "The whole fleet obeys these fields, in addition to those that were set before.",
        lambda breaker, order: breaker.set_policy(duration=order.duration, **order.fields, **_who(order)),
        timed=True,
        needs=("fields", "note"),
    ),
    "clear-policy": Action(
        "End policy override",
        "Every process follows its own policy again. Shadow mode by a policy override ends, too.",
        lambda breaker, order: breaker.clear_policy(**_who(order)),
    ),
}

_MISSING = {
    "duration": "Say for how long.",
    "note": "Give a reason: your colleagues will read it.",
    "fields": "Fill in at least one field of the policy.",
}


def order_from_form(action: str, form: Mapping[str, str], operator: str | None) -> Order:
    """The order that a form gives. Raises PolicyError, in words for the page."""
    fields = {
        name.removeprefix(POLICY_FIELD): policy_value(name.removeprefix(POLICY_FIELD), text)
        for name, text in form.items()
        if name.startswith(POLICY_FIELD) and text.strip()
    }
    duration = _duration(form.get("amount", ""), form.get("unit", "minutes"))
    return checked(action, Order(operator, form.get("note"), duration, fields))


def kept_fields(form: Mapping[str, str], order: Order) -> dict[str, str]:
    """The fields of a form that its confirmation must send again. The reason is the one that will be stored."""
    given = {name: form[name] for name in form if name in ("amount", "unit") or name.startswith(POLICY_FIELD)}
    return {**given, "note": order.note or ""}


def order_from_json(action: str, body: Any, operator: str | None) -> Order:
    """The order that a JSON document gives: duration (seconds), note, fields. Raises PolicyError."""
    if not isinstance(body, dict) or body.keys() - {"duration", "note", "fields"}:
        raise PolicyError('the body must be a JSON object with no more than "duration", "note" and "fields"')
    fields = body.get("fields") or {}
    if not isinstance(fields, dict):
        raise PolicyError(f"fields must be an object of policy fields, not {fields!r}")
    return checked(action, Order(operator, body.get("note"), body.get("duration"), fields))


def checked(action: str, order: Order) -> Order:
    """The order, without what the action does not take. Raises PolicyError unless it has what the action needs."""
    if order.note is not None and (not isinstance(order.note, str) or len(order.note) > LONGEST_NOTE):
        raise PolicyError(f"A reason is a text of at most {LONGEST_NOTE} characters.")
    taken = order._replace(
        note=printable(order.note or "", LONGEST_NOTE).strip() or None,
        duration=order.duration if ACTIONS[action].timed else None,
        fields=order.fields if "fields" in ACTIONS[action].needs else {},
    )
    for need in ACTIONS[action].needs:
        if not getattr(taken, need):
            raise PolicyError(_MISSING[need])
    if taken.fields:
        override_request(taken.fields)
    return taken


def _duration(amount: str, unit: str) -> float | None:
    if not amount.strip():
        return None
    try:
        duration = float(amount) * UNITS[unit]
    except (ValueError, KeyError):
        duration = math.nan
    if not 0 < duration < math.inf:
        raise PolicyError(f"{amount!r} {unit} is not a length of time.")
    return duration
