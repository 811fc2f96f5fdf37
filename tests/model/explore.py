"""An explicit-state search over the protocol: every state that clients, network, crashes and time can bring about.

The in-memory engine is the step function, and with it what the Lua does, for the contract suite shows that both do
the same. A state is the engine's document, the clock, what each client holds, and the messages under way. From each
state every possible step is taken; states that were seen are not entered again. What must always hold is checked at
each step: transitions form a legal path, each under a generation greater than the last and told by one reply alone;
never more live probes than slots; a straggler, a lost or a repeated report of a probe changes nothing; the run of
failures is never longer than the failures of its generation; and gathered successes end no failure that their process
had not read of before they ended. A hold opens the circuit for its time without a trip. Only reports that may do so
extend it, never beyond the longest hold, nor after an operator has let the next caller probe. The circuit opens at
exactly the failure in the window, and at exactly the failed probe, that the policy names.

The steps:
  ask      a client sends acquire (its request is under way)
  end      a client's call ends, perhaps with a hold, and its report is under way
  deliver  any request that is under way is executed; its reply arrives, or is lost
  repeat   a delivered report is executed once more, as a network or a proxy may do
  crash    a client forgets everything: its permit, and that it asked
  advance  the clock jumps to the next deadline of the document
  reset    an operator resets (once)
  probe    an operator lets the next caller probe
  fail over  a replica that lacks the last write takes over

Some clients gather successes instead of reporting each call:
  read     a gatherer reads the document; what it read is under way to it, and arrives late, out of order, or not at all
  succeed  one of its calls ends
  report   it reports the successes that it has gathered; the report arrives late, out of order, or not at all
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

from pybreaker_redis._memory import MemoryEngine

LEGAL = {
    ("closed", "open"): {"failure_threshold", "failures_in_window", "held"},
    ("open", "half_open"): {"timeout"},
    ("half_open", "open"): {"probe_failed", "held"},
    ("half_open", "closed"): {"probe_succeeded"},
}
START_MS = 1_700_000_000_000
HOLD_MS = 8


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far the search goes."""

    clients: int = 3
    transitions: int = 4
    asks: int = 6
    waits: int = 4
    in_flight: int = 2
    repeats: int = 1
    crashes: int = 1
    resets: int = 1
    gatherers: int = 0
    reads: int = 0
    successes: int = 0  # of each gatherer
    failovers: int = 0
    holds: int = 0
    probes: int = 0  # that an operator asks for
    policy: tuple[tuple[str, int], ...] = (
        ("failure_threshold", 2),
        ("success_threshold", 1),
        ("half_open_max_calls", 1),
        ("reset_timeout_ms", 10),
        ("probe_timeout_ms", 7),
    )


@dataclasses.dataclass(frozen=True)
class Message:
    """A request under way. heard: somebody waits for its reply; delivered: it was executed, and may be once more.

    script "read" is what gatherer number `to` has read: generation and failure_number. seen: the seen_failure of a
    report of gathered successes. known: what its process had truly read before the newest of them ended.
    """

    script: str
    heard: bool = False
    generation: int = 0
    probe: int | None = None
    outcome: str = ""
    delivered: bool = False
    to: int = 0
    failure_number: int = 0
    seen: int | None = None
    known: int = 0


@dataclasses.dataclass(frozen=True)
class Client:
    """busy: a request is under way. permit: (generation, probe) of the call that runs."""

    busy: bool = False
    permit: tuple[int, int | None] | None = None


@dataclasses.dataclass(frozen=True)
class Gatherer:
    """A process that gathers successes under one generation; look() and read() are the rule of the client.

    ticks: its successes. reported: those of them that were reported. read_number: the failure_number that it read last;
    read_at: its ticks by then. proved: the number that it had read before its newest success, as far as it knows.
    known: the same in truth, noted by the search as each success ends.
    """

    generation: int = 0
    ticks: int = 0
    reported: int = 0
    read_number: int = 0
    read_at: int = 0
    proved: int = 0
    known: int = 0

    def look(self) -> Gatherer:
        """Whatever has succeeded since the last read came after what was read."""
        return dataclasses.replace(self, proved=self.read_number) if self.ticks > self.read_at else self

    def read(self, generation: int, number: int) -> Gatherer:
        """Take over what was read, unless a newer generation is known; each generation has counts of its own."""
        if generation != self.generation:
            return type(self)(generation, read_number=number) if generation > self.generation else self
        return dataclasses.replace(self.look(), read_number=number, read_at=self.ticks)

    def succeed(self) -> Gatherer:
        """A call ends."""
        return dataclasses.replace(self, ticks=self.ticks + 1, known=self.read_number)

    def report(self) -> tuple[Gatherer, Message]:
        """The report of what was gathered."""
        looked = self.look()
        message = Message("record", False, self.generation, None, "successes", seen=looked.proved, known=self.known)
        return dataclasses.replace(looked, reported=self.ticks), message


@dataclasses.dataclass(frozen=True)
class World:
    """One state. engine is the document as a tuple; now_ms is what the clock has advanced.

    replica: the document without its last write, while a replica may still take over.
    holds, probes: how many there were.
    """

    engine: Any
    now_ms: int
    clients: tuple[Client, ...]
    messages: tuple[Message, ...]
    gatherers: tuple[Gatherer, ...] = ()
    replica: Any = None
    transitions: int = 0
    asks: int = 0
    waits: int = 0
    repeats: int = 0
    crashes: int = 0
    resets: int = 0
    reads: int = 0
    failovers: int = 0
    holds: int = 0
    probes: int = 0
    probed: int = 0  # the generation in which an operator let the next caller probe
    failures: int = 0  # that counted under this generation
    failed_probes: int = 0


class Broken(AssertionError):
    """An invariant does not hold. The arguments: what, and the steps that lead there."""


class Search:
    """Visits every state within the bounds, breadth first."""

    def __init__(self, bounds: Bounds, gatherer: type[Gatherer] = Gatherer) -> None:
        self.bounds = bounds
        self.gatherer = gatherer
        self.policy = dict(bounds.policy)
        self.clock = 0
        self.engine = MemoryEngine(now_ms=lambda: START_MS + self.clock)
        self.steps = 0
        self.transitions: collections.Counter[str] = collections.Counter()
        self.extended = 0  # holds
        self.spared = 0  # reports of gathered successes that left a failure in the run

    def run(self) -> int:
        """How many states there are. Raises Broken, with the path to it."""
        first = World(None, 0, (Client(),) * self.bounds.clients, (), (self.gatherer(),) * self.bounds.gatherers)
        origin: dict[World, tuple[World, str] | None] = {first: None}
        queue = collections.deque([first])
        while queue:
            world = queue.popleft()
            try:
                for step, following in self.following(world):
                    self.steps += 1
                    if following not in origin:
                        origin[following] = world, step
                        queue.append(following)
            except Broken as broken:
                raise Broken(f"{broken}\n" + "\n".join(path_to(world, origin))) from None
        return len(origin)

    # Steps

    def following(self, world: World) -> Iterator[tuple[str, World]]:
        """Every step that can be taken, and where it leads."""
        if world.transitions >= self.bounds.transitions:
            return
        room = sum(not message.delivered for message in world.messages) < self.bounds.in_flight
        seen: set[Client] = set()
        for index, client in enumerate(world.clients):
            if client in seen:  # clients are alike: what one can do from here, the other can too
                continue
            seen.add(client)
            if room and not client.busy and client.permit is None and world.asks < self.bounds.asks:
                asked = send(world, index, Message("acquire", heard=True), Client(busy=True))
                yield f"{index} asks", dataclasses.replace(asked, asks=world.asks + 1)
            if room and client.permit is not None:
                generation, probe = client.permit
                for outcome in ("successes", "failures") if probe is None else ("successes", "failures", ""):
                    report = Message("record", False, generation, probe, outcome)
                    yield f"{index} ends with {outcome or 'nothing'}", send(world, index, report, Client())
                if world.holds < self.bounds.holds:
                    held = send(world, index, Message("record", False, generation, probe, "hold_ms"), Client())
                    yield f"{index} ends with a hold", dataclasses.replace(held, holds=world.holds + 1)
            if (client.permit or client.busy) and world.crashes < self.bounds.crashes:
                yield f"{index} crashes", crash(world, index)
        for message in dict.fromkeys(world.messages):
            yield from self.deliver(world, message)
        for index, gatherer in enumerate(world.gatherers):
            if gatherer not in world.gatherers[:index]:
                yield from self.gather(world, index, gatherer, room)
        if world.failovers < self.bounds.failovers and world.replica is not None:
            yield (
                "a replica takes over",
                dataclasses.replace(world, engine=world.replica, replica=None, failovers=world.failovers + 1),
            )
        deadline = self.next_deadline(world)
        if deadline is not None and world.waits < self.bounds.waits:
            waited = dataclasses.replace(world, now_ms=deadline, waits=world.waits + 1)
            yield f"{deadline - world.now_ms} ms pass", waited
        if world.resets < self.bounds.resets and world.engine is not None:
            after, _ = self.execute(world, "control", {"action": "reset"}, "reset")
            yield "an operator resets", dataclasses.replace(after, resets=world.resets + 1)
        if world.probes < self.bounds.probes and world.engine is not None and world.engine.document.state == "open":
            yield "an operator lets the next caller probe", self.probe(world)

    def probe(self, world: World) -> World:
        after, reply = self.execute(world, "control", {"action": "probe"}, "probe")
        document, now = after.engine.document, START_MS + world.now_ms
        if reply.get("transition") or document.state != "open" or document.open_until_ms > now:
            raise Broken(f"the next caller cannot probe: {document}")
        return dataclasses.replace(after, probes=world.probes + 1, probed=document.generation)

    def gather(self, world: World, index: int, gatherer: Gatherer, room: bool) -> Iterator[tuple[str, World]]:
        """What a gatherer can do."""
        if room and world.engine is not None and world.reads < self.bounds.reads:
            document = world.engine.document
            sent = Message("read", True, document.generation, to=index, failure_number=document.failure_number)
            messages = ordered([*world.messages, sent])
            yield f"gatherer {index} reads", dataclasses.replace(world, messages=messages, reads=world.reads + 1)
        if gatherer.generation and gatherer.ticks < self.bounds.successes:
            yield f"gatherer {index} succeeds", with_gatherer(world, index, gatherer.succeed())
        if room and gatherer.ticks > gatherer.reported:
            after, report = gatherer.report()
            after_world = with_gatherer(world, index, after)
            messages = ordered([*world.messages, report])
            yield f"gatherer {index} reports", dataclasses.replace(after_world, messages=messages)

    def deliver(self, world: World, message: Message) -> Iterator[tuple[str, World]]:
        if message.script == "read":
            rest = list(world.messages)
            rest.remove(message)
            lost = dataclasses.replace(world, messages=ordered(rest))
            taken = world.gatherers[message.to].read(message.generation, message.failure_number)
            yield f"{message} arrives", with_gatherer(lost, message.to, taken)
            yield f"{message} is lost", lost
            return
        if message.delivered:
            if world.repeats < self.bounds.repeats:
                after, reply = self.execute(world, "record", self.request(message), "repeat")
                if reply["applied"] and message.probe is not None:
                    raise Broken(f"a repeated report of a probe was applied: {message}")
                yield f"{message} comes once more", dataclasses.replace(after, repeats=world.repeats + 1)
            return
        after, reply = self.execute(world, message.script, self.request(message), message.script)
        if message.outcome == "hold_ms":
            self.check_hold(world, after, message, reply)
        else:
            self.check_straggler(world, after, message, reply)
        if message.seen is not None:
            self.check_gathered(world, after, message, reply)
        rest = list(world.messages)
        rest.remove(message)
        if message.script == "record":
            if world.repeats < self.bounds.repeats:
                rest.append(dataclasses.replace(message, delivered=True))
            yield f"{message} arrives", dataclasses.replace(after, messages=ordered(rest))
            if message.seen is not None:
                yield f"{message} is lost", dataclasses.replace(world, messages=ordered(rest))
            return
        after = dataclasses.replace(after, messages=ordered(rest))
        if not message.heard:  # its sender has crashed since
            yield f"{message} arrives", after
            return
        waiting = world.clients.index(Client(busy=True))  # clients that wait for the same are alike
        permit = (reply["generation"], reply["probe"]) if reply["admitted"] else None
        yield f"{message} is answered", with_client(after, waiting, Client(permit=permit))
        yield f"the reply to {message} is lost", with_client(after, waiting, Client())

    def request(self, message: Message) -> dict[str, Any]:
        if message.script == "acquire":
            return {}
        counts = {message.outcome: 1} if message.outcome else {}
        if message.outcome == "hold_ms":
            counts = {"hold_ms": HOLD_MS, **({"failures": 1} if message.probe else {})}
        if message.seen is not None:
            counts["seen_failure"] = message.seen
        return {"generation": message.generation, **counts, **({"probe": message.probe} if message.probe else {})}

    # The engine as a function

    def execute(self, world: World, script: str, request: dict[str, Any], cause: str) -> tuple[World, dict[str, Any]]:
        """The world after a script has run, and its reply; checks what must hold of every run."""
        engine = self.engine
        engine._document = copy_of(world.engine.document) if world.engine else None
        self.clock, engine._latest_ms = world.now_ms, 0  # of another world
        reply = engine.run(script, {**request, "policy": self.policy})
        after = dataclasses.replace(world, engine=Frozen(engine._document))
        if world.failovers < self.bounds.failovers and after.engine != world.engine:
            after = dataclasses.replace(after, replica=world.engine)
        if change := reply.get("transition"):
            self.check_transition(world, reply, change, cause)
            after = dataclasses.replace(after, transitions=world.transitions + 1, failures=0, failed_probes=0)
        if reply.get("applied") and request.get("failures") and "hold_ms" not in request:
            after = self.count_failure(world, after, "probe" in request)
        self.check_slots(after)
        self.check_numbers(after)
        return after, reply

    def count_failure(self, world: World, after: World, is_probe: bool) -> World:
        """The circuit opens at exactly the failure that the policy names."""
        opened = after.transitions > world.transitions
        if is_probe:
            failed = world.failed_probes + 1
            if opened != (failed >= self.policy.get("probe_failure_threshold", 1)):
                raise Broken(f"the circuit is {'open' if opened else 'half open'} after {failed} failed probes")
            return after if opened else dataclasses.replace(after, failed_probes=failed)
        failures, most = world.failures + 1, self.policy.get("failures_in_window", 0)
        if not opened and 0 < most <= failures:
            raise Broken(f"the circuit is closed after {failures} failures in the window")
        return after if opened else dataclasses.replace(after, failures=failures)

    def next_deadline(self, world: World) -> int | None:
        """When something next ends by itself, as the clock counts."""
        if world.engine is None:
            return None
        document = world.engine.document
        ends = [document.open_until_ms] if document.state == "open" else list(document.probes.values())
        later = [end - START_MS for end in ends if end - START_MS > world.now_ms]
        return min(later, default=None)

    # Invariants

    def check_transition(self, world: World, reply: dict[str, Any], change: dict[str, Any], cause: str) -> None:
        before = world.engine.document if world.engine else None
        self.transitions[f"{change['from']} > {change['to']} ({change['reason']})"] += 1
        if before is None or change["from"] != before.state or change["to"] != reply["state"]:
            raise Broken(f"a transition that does not fit its states: {change}")
        legal = cause == "reset" or change["reason"] in LEGAL.get((change["from"], change["to"]), ())
        if not legal:
            raise Broken(f"an illegal transition: {change}")
        if not change["generation"] == reply["generation"] > before.generation:
            raise Broken(f"a generation that does not grow: {change} after {before.generation}")

    def check_slots(self, world: World) -> None:
        document = world.engine.document if world.engine else None
        if document is None:
            return
        live = [end for end in document.probes.values() if end > START_MS + world.now_ms]
        if len(live) > self.policy["half_open_max_calls"]:
            raise Broken(f"{len(live)} live probes")
        if live and document.state != "half_open":
            raise Broken(f"probes while {document.state}")

    def check_numbers(self, world: World) -> None:
        document = world.engine.document
        most = document.failure_number if document.state == "closed" else document.failure_count
        if not 0 <= document.failure_count <= most:
            raise Broken(f"a run that is no part of its numbers: {document}")

    def check_gathered(self, before: World, after: World, message: Message, reply: dict[str, Any]) -> None:
        """After gathered successes the run still has each failure that their process had not read of before they ended.

        Not after a replica took over: it lacks failures, and gives their numbers anew.
        """
        if not reply["applied"] or before.failovers:
            return
        was, now = before.engine.document, after.engine.document
        unknown = min(was.failure_count, max(was.failure_number - message.known, 0))
        self.spared += now.failure_count > 0
        if now.failure_count < unknown:
            raise Broken(f"gathered successes ended a later failure: {message}, {was}, {now}")

    def check_hold(self, before: World, after: World, message: Message, reply: dict[str, Any]) -> None:
        """A hold opens for its time, and is no trip while closed. Only a hold can be extended, to max_hold in all."""
        if before.engine is None:
            return
        was, now, time_ms = before.engine.document, after.engine.document, START_MS + before.now_ms
        if was.state == "open":
            may = was.held_generation is not None and message.generation in (was.held_generation, was.generation)
            most = was.open_until_ms - was.open_ms + self.policy["max_hold_ms"]
            until = max(was.open_until_ms, min(time_ms + HOLD_MS, most) if may else 0)
            if (now.open_until_ms, now.generation, now.trips) != (until, was.generation, was.trips):
                raise Broken(f"a hold that extends what it may not: {message}, {was}, {now}")
            if before.probed == was.generation and until > was.open_until_ms:
                raise Broken(f"a late hold takes a probe back: {message}, {was}, {now}")
            self.extended += until > was.open_until_ms
        elif reply["applied"]:
            length = max(HOLD_MS, 0 if was.state == "closed" else self.policy["reset_timeout_ms"])
            trips = was.trips + (was.state == "half_open")
            if (now.state, now.open_until_ms, now.trips) != ("open", time_ms + length, trips):
                raise Broken(f"a hold that is counted wrongly: {message}, {was}, {now}")

    def check_straggler(self, before: World, after: World, message: Message, reply: dict[str, Any]) -> None:
        """A report of another generation, or of a slot that is gone, changes nothing and tells of no transition."""
        if message.script != "record" or before.engine is None:
            return
        document = before.engine.document
        now = START_MS + before.now_ms
        current = message.generation == document.generation
        if message.probe is not None:
            current = current and document.probes.get(message.probe, 0) > now
        else:
            current = current and document.state == "closed"
        if not current and (reply["applied"] or reply.get("transition") or essence(before, now) != essence(after, now)):
            raise Broken(f"a straggler changed something: {message}")


class Frozen:
    """A document that counts as equal to another one with the same fields."""

    def __init__(self, document: Any) -> None:
        self.document = document
        self._fields = frozenset(
            (field.name, _hashable(getattr(document, field.name)))
            for field in dataclasses.fields(document)
            if field.name not in ("change", "hint", "is_new", "now")
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)

    def __repr__(self) -> str:
        return f"{self.document}"


def copy_of(document: Any) -> Any:
    """A document that shares nothing with the other one; deepcopy would take a third of the search."""
    window = document.window and dataclasses.replace(document.window)
    own = {"window": window, "probes": {**document.probes}, "reporters": {**document.reporters}}
    return dataclasses.replace(document, **own, change=document.change and {**document.change})


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(one)) for key, one in value.items()))
    if isinstance(value, (list, tuple, collections.deque)):
        return tuple(_hashable(one) for one in value)
    if dataclasses.is_dataclass(value):
        return tuple(_hashable(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value


def essence(world: World, now: int) -> Any:
    """What a straggler must leave alone: everything but slots that ran out, which the next look clears away."""
    document = world.engine.document
    live = {slot: end for slot, end in document.probes.items() if end > now}
    return document.state, document.generation, document.failure_count, document.success_count, document.trips, live


def ordered(messages: list[Message]) -> tuple[Message, ...]:
    """In no order: any of them may arrive next."""
    return tuple(sorted(messages, key=repr))


def send(world: World, index: int, message: Message, client: Client) -> World:
    world = with_client(world, index, client)
    return dataclasses.replace(world, messages=ordered([*world.messages, message]))


def with_client(world: World, index: int, client: Client, **fields: Any) -> World:
    clients = [*world.clients[:index], client, *world.clients[index + 1 :]]
    return dataclasses.replace(world, clients=tuple(sorted(clients, key=repr)), **fields)


def with_gatherer(world: World, index: int, gatherer: Gatherer) -> World:
    """Gatherers keep their places: what one has read is under way to it."""
    gatherers = (*world.gatherers[:index], gatherer, *world.gatherers[index + 1 :])
    return dataclasses.replace(world, gatherers=gatherers)


def crash(world: World, index: int) -> World:
    """The client is as new; what it has sent goes on, and nobody waits for a reply any more."""
    messages = list(world.messages)
    if world.clients[index].busy:
        messages.remove(Message("acquire", heard=True))
        messages.append(Message("acquire"))
    return with_client(world, index, Client(), crashes=world.crashes + 1, messages=ordered(messages))


def path_to(world: World, origin: dict[World, tuple[World, str] | None]) -> list[str]:
    """The steps from the beginning."""
    steps = []
    while (came := origin[world]) is not None:
        world, step = came
        steps.append(step)
    return steps[::-1]


def explore(bounds: Bounds) -> Search:
    """Search, and print how many states were seen."""
    began = time.monotonic()
    search = Search(bounds)
    states = search.run()
    print(f"{states:,} states, {search.steps:,} steps, {time.monotonic() - began:.1f} s, {bounds}")
    for transition, count in sorted(search.transitions.items()):
        print(f"  {count:>9,}  {transition}")
    return search


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Bounds):
        if field.name != "policy":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    explore(Bounds(**vars(parser.parse_args())))
    sys.exit(0)
