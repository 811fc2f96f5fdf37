"""Ready-made guards for other libraries: one module and one extra each. None imports the library of another."""

from ._http import retry_after_header

__all__ = ["retry_after_header"]
