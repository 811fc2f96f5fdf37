"""The public names of the integrations, with members and parameters. A missing extra is an error, never a skip."""

from __future__ import annotations

import pytest
from test_public_names import check_module, modules_of


@pytest.mark.parametrize("module", modules_of("test-integrations"))
def test_public_names(module: str) -> None:
    """They are those in tests/test_public_names.json."""
    check_module(module)
