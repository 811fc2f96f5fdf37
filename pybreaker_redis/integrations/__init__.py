"""Ready-made guards for other libraries. Each has its own module and extra, and imports no other guarded library."""

from ._http import retry_after_header

__all__ = ["retry_after_header"]
