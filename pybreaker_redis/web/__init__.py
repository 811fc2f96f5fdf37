"""The operators' page: every breaker at a glance, one in detail, and actions on it (needs the extra `web`)."""

from .._extras import needs_extra

with needs_extra("the operators' page", "web"):
    import python_multipart  # noqa: F401 - starlette imports it as late as the first form arrives

    from ._app import breakers_app

__all__ = ["breakers_app"]
