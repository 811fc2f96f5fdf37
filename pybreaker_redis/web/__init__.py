"""The operators' page: every breaker at a glance, one in detail, and actions on it (needs the extra `web`)."""

from ._app import breakers_app

__all__ = ["breakers_app"]
