"""The description of the page's addresses for programs, as OpenAPI 3.1."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from .._board import GROUPS
from ._access import COOKIE, TOKEN_HEADER
from ._actions import ACTIONS
from ._pages import SORTS

_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "description": "Name, quoted."}
_NUMBER = {"type": ["number", "null"]}
_TEXT = {"type": ["string", "null"]}


def description(root: str, read_only: bool) -> dict[str, Any]:
    """The description of the addresses that answer programs. root: the path under which they are mounted."""
    paths: dict[str, Any] = {
        "/api/breakers": {"get": _list()},
        "/api/breakers/{name}": {"get": _one()},
        "/api/fleet": {"get": _fleet()},
        "/events": {"get": _events()},
    }
    if not read_only:
        paths["/breakers/{name}/{action}"] = {"post": _act()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Circuit breakers of pybreaker_redis",
            "version": importlib.metadata.version("pybreaker_redis"),
        },
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": {"schemas": {"Breaker": _breaker(), "Details": _details(), "Error": _error()}},
    }


def _query(name: str, text: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": text, "schema": schema}


def _view() -> list[dict[str, Any]]:
    return [
        _query("group", "Only breakers of this group.", type="string", enum=list(GROUPS)),
        _query("q", "Only breakers whose names contain this text, in any case.", type="string"),
        _query("sort", "The order.", type="string", enum=list(SORTS), default="urgency"),
    ]


def _answer(text: str, **schema: Any) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _refusals(**texts: str) -> dict[str, Any]:
    return {
        code.removeprefix("_"): _answer(text, **{"$ref": "#/components/schemas/Error"}) for code, text in texts.items()
    }


def _list() -> dict[str, Any]:
    properties = {
        "prefix": {"type": "string"},
        "now": {"type": "number", "description": "The server's clock in unix seconds."},
        "error": {**_TEXT, "description": "Why Redis cannot be read now."},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
        "total": {"type": "integer"},
        "breakers": {"type": "array", "items": {"$ref": "#/components/schemas/Breaker"}},
    }
    return {
        "summary": "All breakers of the prefix, or some of them",
        "parameters": [
            *_view(),
            _query("offset", "Breakers to leave out.", type="integer", minimum=0, default=0),
            _query("limit", "Breakers to return.", type="integer", minimum=0, maximum=1000, default=100),
        ],
        "responses": {
            "200": _answer("The breakers.", type="object", properties=properties, required=list(properties)),
            **_refusals(_400="A parameter makes no sense."),
        },
    }


def _one() -> dict[str, Any]:
    return {
        "summary": "Everything about one breaker",
        "parameters": [_NAME],
        "responses": {
            "200": _answer("The breaker.", **{"$ref": "#/components/schemas/Details"}),
            **_refusals(
                _400="No breaker can have this name.", _404="Nothing is stored.", _503="Redis does not answer."
            ),
        },
    }


def _act() -> dict[str, Any]:
    body = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "duration": {**_NUMBER, "description": "Seconds until the forced state or the policy override ends."},
            "note": {**_TEXT, "maxLength": 200, "description": "Why; kept in the history."},
            "fields": {"type": "object", "description": "Fields of the policy, for set-policy; durations in seconds."},
        },
    }
    token = {
        "name": TOKEN_HEADER,
        "in": "header",
        "required": True,
        "schema": {"type": "string"},
        "description": f"The value of the cookie {COOKIE}, which any GET of the API sets.",
    }
    return {
        "summary": "Act on a breaker, for the whole fleet",
        "parameters": [
            _NAME,
            {"name": "action", "in": "path", "required": True, "schema": {"type": "string", "enum": list(ACTIONS)}},
            token,
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": _answer("The breaker afterwards.", **{"$ref": "#/components/schemas/Details"}),
            "204": {"description": "Done; Redis now stores nothing for this breaker."},
            **_refusals(
                _400="A value makes no sense, or is missing.",
                _403="The token is wrong, or the request comes from another site.",
                _404="Nothing is stored, or there is no such action.",
                _409="The breaker's state does not allow it.",
                _503="Redis does not answer.",
            ),
        },
    }


def _fleet() -> dict[str, Any]:
    properties = {
        "processes": {"type": "array", "items": {"type": "object"}, "description": "The last seen first."},
        "disagreements": {"type": "object", "description": "By breaker: its policies, and the processes of each."},
    }
    return {
        "summary": "The processes that list themselves, and the breakers on whose policy they disagree",
        "responses": {"200": _answer("The fleet.", type="object", properties=properties, required=list(properties))},
    }


def _events() -> dict[str, Any]:
    return {
        "summary": "Server-sent events: what has changed on the board, or on the page of one breaker",
        "parameters": [*_view(), _query("breaker", "Name of the breaker; without it, the board.", type="string")],
        "responses": {"200": {"description": "Events.", "content": {"text/event-stream": {}}}},
    }


def _breaker() -> dict[str, Any]:
    texts, whole = {"type": "string"}, {"type": "integer"}
    fields = {
        **dict.fromkeys(("name", "condition", "state"), texts),
        **dict.fromkeys(("reason", "error", "operator", "note", "override_operator", "override_note"), _TEXT),
        **dict.fromkeys(("until", "since", "override_until", "failure_rate", "slow_rate", "threshold"), _NUMBER),
        **dict.fromkeys(("failures", "probes", "calls", "trips", "health"), whole),
        "override": {"type": "object"},
        "shadow": {"type": "boolean"},
    }
    return {"type": "object", "properties": fields, "required": list(fields)}


def _details() -> dict[str, Any]:
    properties = {
        "breaker": {"$ref": "#/components/schemas/Breaker"},
        "snapshot": {"type": "object", "description": "As CircuitBreaker.snapshot() returns it."},
        "history": {"type": "array", "items": {"type": "object"}, "description": "Newest first."},
        "now": {"type": "number"},
    }
    return {"type": "object", "properties": properties, "required": list(properties)}


def _error() -> dict[str, Any]:
    return {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
