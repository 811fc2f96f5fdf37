"""Below the quorum, a failing instance opens the circuit for itself only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._memory import LocalEngine
from ._protocol import Reply, Request, State, Steps

Run = Callable[[str, Request], Steps[Reply]]


class Isolation:
    """The state that one instance keeps for itself, by the same rules with a quorum of 1.

    It decides while the fleet's circuit is closed. Any other state of the fleet overrules and discards it.
    make: creates a closed engine. run: asks the fleet's engine. quorum: returns the quorum in force.
    notify: receives each transition of the instance's own state.
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
        """Discard this instance's state: a transition of the fleet supersedes it."""
        self._own = None

    def obey(self, override: dict[str, Any] | None) -> None:
        """Apply a policy override to this instance's state."""
        if self._own is not None:
            self._own.obey(override)

    @property
    def state(self) -> State:
        """This instance's own state."""
        return "closed" if self._own is None else self._own.state

    def is_open(self) -> bool:
        """Whether this instance's own state is open or half open."""
        return self.state != "closed"

    def decides_over(self, fleet: Reply) -> bool:
        """Whether it is, and is not overruled by the fleet's state in this snapshot."""
        own = self._own
        if own is None or own.state == "closed" or _decides(fleet):
            return False
        generation: int = fleet["generation"]
        return own.fleet_generation >= generation

    def run(self, name: str, request: Request, common: Request, full: Request) -> Steps[Reply]:
        """The reply to a script call, from the fleet's state and this instance's.

        common: the fields to add to the request to the fleet. full: the fields to add to any other request.
        """
        own = self._own
        if name == "acquire" and own is not None and own.state != "closed":
            fleet = yield from self._run("record", {**full, "generation": 0})
            if self._own_engine(fleet) is own:
                mine = self._ask_own(own, "acquire", {**full, **request})
                return {**_isolated(mine, fleet), "admitted": mine["admitted"]}
        reply = yield from self._run(name, {**common, **request})
        own = self._own_engine(reply)
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

    def _own_engine(self, fleet: Reply) -> LocalEngine | None:
        """The engine of this instance's state; None while only the fleet's state decides.

        Each generation of the fleet starts a new one: a transition or reset of the fleet applies to this instance too.
        """
        if self._quorum(fleet) == 1 or fleet["source"] != "redis" or _decides(fleet):
            self._own = None
        elif self._own is None or self._own.fleet_generation < fleet["generation"]:
            self._own = self._make()
            self._own.fleet_generation = fleet["generation"]
        return self._own


def _isolated(mine: Reply, fleet: Reply) -> Reply:
    """The reply of this instance's engine, with the transition, policy override and warning of the fleet's reply."""
    rest = {key: fleet.get(key) for key in ("transition", "override", "warning")}
    return {**mine, **rest, "admitted": False, "isolated": True, "source": "isolated"}


def _decides(fleet: Reply) -> bool:
    """Whether the fleet's state overrules that of an instance."""
    return fleet["state"] != "closed" or fleet.get("forced") is not None
