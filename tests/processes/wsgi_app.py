"""The application for the web server tests. Its answers say, too, what loading it has started."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import process_jobs

before = process_jobs.started()  # the web server's own
import manager_app  # noqa: E402

at_import = {kind: [one for one in now if one not in before[kind]] for kind, now in process_jobs.started().items()}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """One guarded call for each request."""
    body = json.dumps({**manager_app.answer(environ["PATH_INFO"]), "at_import": at_import}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
