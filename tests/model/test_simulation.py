"""The simulation of fleets keeps its promises, as far as a short run can show."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

SIMULATION = pathlib.Path(__file__).parents[2] / "benchmarks" / "fleet_sim.py"


@pytest.mark.long
@pytest.mark.parametrize("rows", ["healthy, 100", "100 x 10/s at 3 %", "8 healthy x 50/s", "dead", "recovering"])
def test_short_simulations(rows: str) -> None:
    """Healthy fleets do not trip, a dead service soon does, and a recovered one is called again."""
    run = subprocess.run([sys.executable, SIMULATION, "--quick", "--only", rows], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout
    assert [line for line in run.stdout.splitlines() if not line.startswith("ok ")] == []
