"""What the HTTP integrations share: Retry-After, names, and that none imports the library of another."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from email.utils import formatdate
from typing import Any

import aiohttp
import httpx
import httpx2
import pytest
import requests
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from pybreaker_redis.integrations import retry_after_header
from pybreaker_redis.integrations._http import host_of

LIBRARIES = ("aiohttp", "django", "flask", "httpx", "httpx2", "requests", "starlette")


def of_httpx(status: int, headers: dict[str, str]) -> Any:
    return httpx.Response(status, headers=headers, request=httpx.Request("GET", "http://a"))


def of_httpx2(status: int, headers: dict[str, str]) -> Any:
    return httpx2.Response(status, headers=headers)


def of_requests(status: int, headers: dict[str, str]) -> Any:
    response = requests.Response()
    response.status_code = status
    response.headers.update(headers)
    return response


def of_httpx_error(status: int, headers: dict[str, str]) -> Any:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        of_httpx(status, headers).raise_for_status()
    return caught.value


def of_requests_error(status: int, headers: dict[str, str]) -> Any:
    with pytest.raises(requests.HTTPError) as caught:
        of_requests(status, headers).raise_for_status()
    return caught.value


def of_aiohttp_error(status: int, headers: dict[str, str]) -> Any:
    given: Any = CIMultiDictProxy(CIMultiDict(headers))
    info: Any = None
    return aiohttp.ClientResponseError(info, (), status=status, headers=given)


SOURCES = [of_httpx, of_httpx2, of_requests, of_httpx_error, of_requests_error, of_aiohttp_error]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"Retry-After-Ms": "250", "Retry-After": "7"}, 0.25),
        ({"Retry-After": "7", "RateLimit-Reset": "9"}, 7.0),
        ({"RateLimit-Reset": "9"}, 9.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": ""}, None),
        ({}, None),
    ],
)
def test_retry_after_header(source: Any, headers: dict[str, str], expected: float | None) -> None:
    """Seconds, milliseconds and dates, of responses and errors; what makes no sense is None."""
    assert retry_after_header(source(503, headers)) == expected
    assert retry_after_header(source(429, headers)) == expected


@pytest.mark.parametrize("source", SOURCES)
def test_retry_after_as_a_time(source: Any) -> None:
    """An HTTP date, and a RateLimit-Reset that is a Unix time, become seconds from now."""
    for name, value in [
        ("Retry-After", formatdate(time.time() + 100, usegmt=True)),
        ("RateLimit-Reset", str(time.time() + 100)),
    ]:
        seconds = retry_after_header(source(429, {name: value}))
        assert seconds is not None
        assert 50 < seconds <= 100


def test_other_statuses_ask_for_nothing() -> None:
    """Services send RateLimit-Reset with healthy answers; a redirect may carry Retry-After."""
    headers = {"Retry-After": "7", "RateLimit-Reset": "7"}
    assert retry_after_header(of_httpx(200, headers)) is None
    assert retry_after_header(of_requests(301, headers)) is None
    assert retry_after_header(of_httpx_error(500, headers)) is None
    assert retry_after_header(of_httpx(500, headers), statuses={500}) == 7.0
    assert retry_after_header(httpx.ConnectError("refused")) is None
    assert retry_after_header(ValueError()) is None


class Request:
    """A request with this URL."""

    def __init__(self, url: Any) -> None:
        self.url = url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.example.com/v1?q=1", "api.example.com"),
        ("https://api.example.com:443/", "api.example.com"),
        ("http://API.example.com:8080/", "api.example.com:8080"),
        ("http://api.example.com:443/", "api.example.com:443"),
        ("http://user:secret@api.example.com/", "api.example.com"),
        ("http://[::1]:9200/", "[::1]:9200"),
        ("http://[::1]/", "[::1]"),
        ("http://bücher.example/", "xn--bcher-kva.example"),
    ],
)
def test_host_of(url: str, expected: str) -> None:
    """All clients give a host the same name, without its credentials."""
    prepared = requests.Request("GET", url).prepare()
    for request in (httpx.Request("GET", url), httpx2.Request("GET", url), prepared, Request(URL(url))):
        assert host_of(request) == expected


@pytest.mark.parametrize("module", ["", *LIBRARIES])
def test_importing_one_imports_no_other_library(module: str) -> None:
    """An application that uses one of them need not have the others."""
    name = f"pybreaker_redis.integrations.{module}".rstrip(".")
    others = set(LIBRARIES) - {module}
    code = f"import sys, {name}; print(sorted(set(sys.modules) & {others!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", LIBRARIES)
def test_public_names_have_docstrings(module: str) -> None:
    """Everything that a module offers says what it is for."""
    found = importlib.import_module(f"pybreaker_redis.integrations.{module}")
    for name in found.__all__:
        assert getattr(found, name).__doc__, name
