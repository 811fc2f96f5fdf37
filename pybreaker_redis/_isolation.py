"""Below the quorum, an instance that fails alone opens the circuit for itself only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._memory import LocalEngine
from ._protocol import Reply, Request, State, Steps

Run = Callable[[str, Request], Steps[Reply]]


class Isolation:
    """The state that one instance keeps next to the fleet's, by the same rules with a quorum of one.

    While the fleet is closed this state decides; otherwise the fleet's does, and this one is forgotten.
    make: a new closed engine. run: the engine that decides for the fleet. quorum: the one in force.
    notify: receives each transition of this state.
    """

    def __init__(
        self,
        make: Callable[[], LocalEngine],
        run: Run,
        quorum: Callable[[Reply], int],
        notify: Callable[[dict[str, Any]], None],
    ) -> None:
        self._make, self._run, self._quorum, self._notify = make, run, quorum, notify
        self._own: LocalEngine | None = None

    def forget(self) -> None:
        """What happened to the whole fleet happened to this instance too."""
        self._own = None

    def obey(self, override: dict[str, Any] | None) -> None:
        """A policy override applies here too."""
        if self._own is not None:
            self._own.obey(override)

    @property
    def state(self) -> State:
        """This instance's own state."""
        return "closed" if self._own is None else self._own.state

    def is_open(self) -> bool:
        """Whether this instance is not closed, by its own state."""
        return self.state != "closed"

    def decides_over(self, fleet: Reply) -> bool:
        """The same for a snapshot of the fleet."""
        own = self._own
        return (
            self.is_open() and own is not None and own.fleet_generation >= fleet["generation"] and not _decides(fleet)
        )

    def run(self, name: str, request: Request, common: Request, full: Request) -> Steps[Reply]:
        """The reply to a script call, by the fleet's state and this instance's own.

        common: what goes with the request to the fleet. full: what goes with every request of this instance.
        """
        own = self._own
        if name == "acquire" and own is not None and own.state != "closed":
            fleet = yield from self._run("record", {**full, "generation": 0})
            if self._next_to(fleet) is own:
                mine = self._ask_own(own, "acquire", {**full, **request})
                return {**_isolated(mine, fleet), "admitted": mine["admitted"]}
        reply = yield from self._run(name, {**common, **request})
        own = self._next_to(reply)
        if own is None:
            return reply
        if request.get("generation", 0) < 0:
            mine = self._ask_own(own, "record", {**full, **request})  # the outcome of its own probe
        elif name == "acquire" or reply["applied"]:
            mine = self._ask_own(own, "record", {**full, **request, "generation": own.generation})
        else:
            mine = self._ask_own(own, "record", {**full, "generation": 0})
        return reply if mine["state"] == "closed" else _isolated(mine, reply)

    def _ask_own(self, own: LocalEngine, name: str, request: Request) -> Reply:
        mine = own.run(name, request)
        if change := mine.get("transition"):
            self._notify(change)
        return mine

    def _next_to(self, fleet: Reply) -> LocalEngine | None:
        """This instance's own engine; None while the fleet's state alone decides.

        It belongs to one generation of the fleet: what happened in between, a reset too, happened to this instance.
        """
        if self._quorum(fleet) == 1 or fleet["source"] != "redis" or _decides(fleet):
            self._own = None
        elif self._own is None or self._own.fleet_generation < fleet["generation"]:
            self._own = self._make()
            self._own.fleet_generation = fleet["generation"]
        return self._own


def _isolated(mine: Reply, fleet: Reply) -> Reply:
    """The reply of this instance's own state, with what the fleet's reply said about everything else."""
    rest = {key: fleet.get(key) for key in ("transition", "override", "warning")}
    return {**mine, **rest, "admitted": False, "isolated": True, "source": "isolated"}


def _decides(fleet: Reply) -> bool:
    """Whether the fleet's state holds for an instance that fails alone too."""
    return fleet["state"] != "closed" or fleet.get("forced") is not None
