"""The pictures of README and of the documentation: what draws them, and what they are drawn from."""

from __future__ import annotations

from .charts import calls, commands, fleet
from .demo import demo
from .timelines import hold, lease, probe, quorum, states, trip

DRAWN = (demo, states, trip, lease, probe, hold, quorum, calls, commands, fleet)


def pictures() -> dict[str, str]:
    """The text of every SVG, by its name."""
    return {draw.__name__: draw().svg() for draw in DRAWN}
