"""What to do about an error of Redis, in one line."""

from __future__ import annotations

import re

from .._board import clean
from ..wire.url import without_password

_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"HELLO must be called|NOAUTH|Authentication required",
        "it wants a password: put it into the URL, as in redis://:PASSWORD@HOST or redis://USER:PASSWORD@HOST",
    ),
    (r"WRONGPASS|invalid username-password", "the user name or the password in the URL is wrong"),
    (r"NOPERM|no permissions|\+cluster\|slots", "`pybreaker-redis doctor` prints the rights that a user needs"),
    (r"^MOVED|MOVED \d", "this is a node of a cluster: write redis+cluster:// instead of redis://"),
    (r"CERTIFICATE_VERIFY_FAILED", "the URL may name the authority, as in rediss://HOST?ssl_ca_certs=FILE"),
    (r"refused|No such file", "is it running there? --redis or REDIS_URL names another server"),
    (r"not known|resolution|getaddrinfo|No address", "no such host: --redis or REDIS_URL names another server"),
)
_NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|RECORD_LAYER|record layer|Timeout connecting|timed out", re.IGNORECASE)
_PERHAPS_TLS = re.compile(r"Connection closed|reset by peer|Protocol Error", re.IGNORECASE)


def explained(error: Exception, url: str) -> str:
    """The error of the server at a URL, and what to do."""
    text = clean(str(error) or repr(error))
    found = next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), None)
    if found is None and url.startswith("rediss") and _NO_TLS.search(text):
        found = "is this a port without TLS? Then write redis:// instead of rediss://"
    if found is None and not url.startswith("rediss") and _PERHAPS_TLS.search(text):
        found = "is this a port with TLS? Then write rediss:// instead of redis://"
    shown = f"Redis at {without_password(url)} does not answer, or refuses: {text}"
    return f"{shown}\n-> {found}" if found else shown
