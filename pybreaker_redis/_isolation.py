"""Below the quorum, a failing instance opens the circuit for itself only."""

from __future__ import annotations

from ._events import Notices, logger
from ._memory import LocalEngine, document_for
from ._protocol import Reply, Request, State
from ._view import View


class Isolation:
    """The state that one instance keeps for itself, by the same rules with a quorum of 1.

    It decides while the fleet's circuit is closed. Any other state of the fleet overrules and discards it.
    """

    __slots__ = ("_notices", "_own", "_view")

    def __init__(self, view: View, notices: Notices) -> None:
        self._view, self._notices = view, notices
        self._own: LocalEngine | None = None

    def forget(self) -> None:
        """Discard this instance's state: a transition of the fleet supersedes it."""
        self._own = None

    @property
    def state(self) -> State:
        """This instance's own state."""
        return "closed" if self._own is None else self._own.state

    def decides_over(self, fleet: Reply) -> bool:
        """Whether this instance's own state is not closed, and the fleet's state in this reply does not overrule it."""
        own = self._own
        if own is None or own.state == "closed" or _decides(fleet):
            return False
        return own.fleet_generation >= int(fleet["generation"])

    def admit(self, fleet: Reply, request: Request) -> Reply | None:
        """This instance's reply to acquire; None if the fleet decides. fleet: its state."""
        before, own = self._own, self._own_engine(fleet)
        if own is None or own is not before:
            return None
        mine = self._ask_own(own, "acquire", request)
        return {**_isolated(mine, fleet), "admitted": mine["admitted"]}

    def applied(self, request: Request, fleet: Reply, full: Request) -> Reply:
        """The reply after the fleet has answered a request: the fleet's, or this instance's while it is isolated.

        request: the outcomes, if any; they count here too. full: the policy and the instance.
        """
        own = self._own_engine(fleet)
        if own is None:
            return fleet
        outcomes: Request = {}
        if request.get("generation", 0) < 0:  # of its own probe
            outcomes = request
        elif "admitted" in fleet or fleet.get("applied"):
            outcomes = {**request, "generation": own.generation}
        mine = self._ask_own(own, "record", {**full, **outcomes})
        return fleet if mine["state"] == "closed" else _isolated(mine, fleet)

    def _ask_own(self, own: LocalEngine, name: str, request: Request) -> Reply:
        mine = own.run(name, request)
        if change := mine.get("transition"):
            about = self._notices.name, change["to"], change["reason"]
            logger.warning("circuit breaker %r: %s for this instance only (%s)", *about)
            self._notices.changed(change, "isolated")
        return mine

    def _own_engine(self, fleet: Reply) -> LocalEngine | None:
        """The engine of this instance's state, under the fleet's policy override; None while only the fleet decides.

        Each generation of the fleet starts a new one: a transition or reset of the fleet applies to this instance too.
        """
        if self._view.policy.quorum == 1 or _decides(fleet):
            self._own = None
            return None
        own = self._own
        if own is None or own.fleet_generation < fleet["generation"]:
            own = LocalEngine(document=document_for("closed"), quorum_of_one=True)
            own.fleet_generation = fleet["generation"]
            self._own = own
        own.obey(fleet.get("override"))
        return own


def _isolated(mine: Reply, fleet: Reply) -> Reply:
    """The reply of this instance's engine, with the transition, policy override and warning of the fleet's reply."""
    rest = {key: fleet.get(key) for key in ("transition", "override", "warning")}
    return {**mine, **rest, "admitted": False, "isolated": True, "source": "isolated"}


def _decides(fleet: Reply) -> bool:
    """Whether the fleet's state overrules that of an instance."""
    return fleet["state"] != "closed" or fleet.get("forced") is not None
