"""The operators' page: every breaker at a glance, one in detail, and actions on it (needs the extra `web`)."""

try:
    from ._app import breakers_app
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the operators' page needs an extra: pip install 'pybreaker_redis[web]' ({error})", name=error.name
    ) from error

__all__ = ["breakers_app"]
