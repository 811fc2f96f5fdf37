"""The pictures of the concept pages: states, and what happens over time in processes and in Redis."""

from __future__ import annotations

from collections.abc import Iterable

from .draw import Picture

WIDTH, LEFT, RIGHT, TOP, LANE = 760, 110, 16, 26, 52


class Timeline(Picture):
    """Lanes that share a time axis, from 0 to 100."""

    def __init__(self, lanes: Iterable[str], title: str, description: str) -> None:
        self._lanes = list(lanes)
        self._end = TOP + LANE * len(self._lanes)
        super().__init__(WIDTH, self._end + 36, title, description)
        for name in self._lanes:
            self.text(0, self.y(name) + 4.5, name, "title")
            self.line(LEFT, self.y(name), WIDTH - RIGHT, self.y(name), "rule")

    def x(self, time: float) -> float:
        """Where a time is."""
        return LEFT + (WIDTH - RIGHT - LEFT) * time / 100

    def y(self, lane: str) -> float:
        """Where a lane is."""
        return TOP + LANE * (self._lanes.index(lane) + 0.5) - 8

    def calls(self, lane: str, ended: str, times: Iterable[float]) -> None:
        """Calls of one process that ended alike."""
        for time in times:
            self.mark(self.x(time), self.y(lane), ended)

    def span(self, lane: str, start: float, end: float, text: str, kind: str) -> None:
        """A state that lasts."""
        self.box(self.x(start), self.y(lane) - 12, self.x(end) - self.x(start), 24, text, kind)

    def message(self, time: float, sender: str, receiver: str, kind: str = "") -> None:
        """An arrow between two lanes."""
        down = 1 if self.y(receiver) > self.y(sender) else -1
        self.arrow([(self.x(time), self.y(sender) + 9 * down), (self.x(time), self.y(receiver) - 14 * down)], kind)

    def say(self, lane: str, time: float, text: str, kind: str = "muted small") -> None:
        """A few words above a lane."""
        self.text(self.x(time), self.y(lane) - 14, text, kind)

    def note(self, text: str) -> None:
        """The legend, and a line below it."""
        self.legend(LEFT, self._end + 6)
        self.text(0, self._end + 29, text, "muted small")


def states() -> Picture:
    """The three states and what leads from one to another."""
    picture = Picture(
        760,
        234,
        "The states of a breaker",
        "Closed trips to open. When reset_timeout is over, the next call makes it half open. Successful probes close"
        " it, failed probes open it again. An operator can force it open or closed.",
    )
    picture.box(10, 70, 110, 56, "closed", "good")
    picture.box(325, 70, 110, 56, "open", "bad")
    picture.box(640, 70, 110, 56, "half open", "probe")
    picture.arrow([(120, 88), (325, 88)], "bad")
    picture.text(222, 62, "a trip: failures in a row,", "middle small")
    picture.text(222, 79, "failures in the window, a rate", "middle small")
    picture.arrow([(325, 110), (120, 110)])
    picture.text(222, 128, "force_closed, reset", "middle small muted")
    picture.arrow([(435, 88), (640, 88)], "probe")
    picture.text(537, 62, "reset_timeout is over,", "middle small")
    picture.text(537, 79, "and the next call comes", "middle small")
    picture.arrow([(640, 110), (435, 110)], "bad")
    picture.text(537, 128, "failed probes", "middle small")
    picture.arrow([(695, 126), (695, 190), (65, 190), (65, 126)], "good")
    picture.text(380, 183, "successful probes", "middle small")
    picture.arrow([(65, 70), (65, 22), (380, 22), (380, 70)])
    picture.text(222, 16, "force_open, or a hold: the service said when to come back", "middle small muted")
    picture.text(0, 224, "Each arrow is one transition, made by one script in Redis for all processes.", "muted small")
    return picture


def trip() -> Picture:
    """One trip across three processes."""
    picture = Timeline(
        ["process 1", "process 2", "process 3", "Redis"],
        "One trip across three processes",
        "Three processes call a service that dies. Redis counts their failures together. The third failure opens the"
        " circuit; the process that reported it rejects at once, the two others within two leases.",
    )
    picture.calls("process 1", "answered", (3, 10, 17, 24))
    picture.calls("process 2", "answered", (5, 13, 21, 28))
    picture.calls("process 3", "answered", (2, 9, 16, 23, 30))
    picture.line(picture.x(33), 22, picture.x(33), picture.y("Redis") + 14, "rule")
    picture.text(picture.x(33), 16, "the service dies", "middle small bad")
    for lane, time, count in (("process 2", 36, "1"), ("process 1", 42, "2"), ("process 3", 49, "3")):
        picture.calls(lane, "failed", (time,))
        picture.message(time, lane, "Redis", "bad")
        picture.say("Redis", time + 1, count, "bad small")
    picture.span("Redis", 0.5, 49, "closed, generation 7", "good")
    picture.span("Redis", 49, 99, "open, generation 8", "bad")
    picture.message(51.5, "Redis", "process 3")
    picture.calls("process 3", "rejected", (55, 62, 69, 76, 83, 90, 97))
    picture.say("process 3", 63, "reads it in the reply to its own report")
    picture.message(58, "Redis", "process 2")
    picture.calls("process 2", "rejected", (61, 68, 75, 82, 89, 96))
    picture.say("process 2", 63, "reads it with its next refresh,")
    picture.message(61, "Redis", "process 1")
    picture.calls("process 1", "failed", (54,))
    picture.calls("process 1", "rejected", (65, 72, 79, 86, 93))
    picture.say("process 1", 63, "within two leases at most")
    picture.note("With failure_threshold=3. Three processes that count for themselves would need nine failures.")
    return picture


def lease() -> Picture:
    """What a process does during a lease, and when it ends."""
    picture = Timeline(
        ["calls", "view", "Redis"],
        "A lease",
        "The first call waits for Redis. For one lease, calls are decided by the view alone. The first call after the"
        " lease starts a refresh in the background and nobody waits for it.",
    )
    picture.calls("calls", "answered", (6, 13, 18, 23, 28, 33, 38, 43, 48, 53, 58, 63, 68, 73, 78, 83, 88, 93, 98))
    picture.message(2, "view", "Redis", "probe")
    picture.message(5, "Redis", "view", "probe")
    picture.say("calls", 0, "the first call waits")
    picture.span("view", 5, 45, "a lease (0.1 s): no I/O", "good")
    picture.span("view", 45, 54, "", "hold")
    picture.message(48, "view", "Redis", "probe")
    picture.message(54, "Redis", "view", "probe")
    picture.say("calls", 43, "a refresh starts; this call goes on with the old view")
    picture.span("view", 54, 95, "the next lease", "good")
    picture.span("Redis", 0.5, 99, "closed, generation 7", "good")
    picture.note("A view is at most two leases old. One exchange refreshes the views of all breakers of the process.")
    return picture


def probe() -> Picture:
    """How a circuit recovers."""
    picture = Timeline(
        ["process 1", "process 2", "process 3", "Redis"],
        "A probe",
        "When the open period is over, the next call takes the only slot and probes. Other calls are rejected until"
        " the probe has succeeded. Then the circuit closes for all processes.",
    )
    picture.span("Redis", 0.5, 34, "open (reset_timeout)", "bad")
    picture.span("Redis", 34, 62, "half open: one slot", "probe")
    picture.span("Redis", 62, 99, "closed", "good")
    picture.calls("process 1", "rejected", (4, 11, 18, 25, 32, 40, 48, 56, 64))
    picture.calls("process 2", "rejected", (2, 9, 16, 23, 30))
    picture.calls("process 3", "rejected", (6, 13, 20, 27, 37, 45, 53, 61))
    picture.message(34, "process 2", "Redis", "probe")
    picture.calls("process 2", "probe", (34,))
    picture.line(picture.x(35.5), picture.y("process 2"), picture.x(62), picture.y("process 2"), "probe")
    picture.calls("process 2", "answered", (62,))
    picture.message(62, "process 2", "Redis", "good")
    picture.say("process 2", 35, "takes the slot")
    picture.calls("process 2", "answered", (69, 76, 83, 90, 97))
    picture.message(70, "Redis", "process 1")
    picture.calls("process 1", "answered", (73, 80, 87, 94))
    picture.message(67, "Redis", "process 3")
    picture.calls("process 3", "answered", (70, 78, 86, 94))
    picture.note("If the probing process dies, its slot is free again after probe_timeout.")
    return picture


def hold() -> Picture:
    """What happens when a service says when to come back."""
    picture = Timeline(
        ["service", "process 1", "process 2", "Redis"],
        "A hold",
        "One process is answered 429 with Retry-After: 7. The circuit opens for 7 seconds for every process. Then the"
        " next call probes.",
    )
    picture.calls("process 1", "answered", (3, 12))
    picture.calls("process 2", "answered", (6, 14))
    picture.calls("process 1", "failed", (20,))
    picture.message(20, "service", "process 1", "hold")
    picture.say("service", 17, "429, Retry-After: 7", "hold small")
    picture.message(20, "process 1", "Redis", "hold")
    picture.span("Redis", 0.5, 20, "closed", "good")
    picture.span("Redis", 20, 74, "open for 7 s, reason held", "hold")
    picture.span("Redis", 74, 84, "half open", "probe")
    picture.span("Redis", 84, 99, "closed", "good")
    picture.calls("process 1", "rejected", (28, 37, 46, 55, 64, 72, 80))
    picture.calls("process 2", "answered", (22,))
    picture.calls("process 2", "rejected", (32, 41, 50, 59, 68))
    picture.calls("process 2", "probe", (75,))
    picture.message(75, "process 2", "service", "probe")
    picture.calls("process 2", "answered", (84, 92))
    picture.calls("process 1", "answered", (88, 96))
    picture.note("A hold is not a trip: it does not count towards the back-off. It lasts for max_hold at most.")
    return picture


def quorum() -> Picture:
    """How one bad host is kept from tripping the fleet."""
    picture = Timeline(
        ["host A", "host B", "host C", "Redis"],
        "A quorum of two hosts",
        "Host A fails alone: it opens the circuit for itself only, and the other hosts go on. Once host B fails, too,"
        " two hosts have failed and the circuit opens for the fleet.",
    )
    picture.calls("host A", "failed", (4, 10, 16))
    picture.span("host A", 20, 58, "open for this process only", "hold")
    picture.calls("host B", "answered", (3, 11, 19, 27, 35, 43))
    picture.calls("host C", "answered", (6, 14, 22, 30, 38, 46, 54))
    picture.calls("host B", "failed", (50, 58))
    picture.message(4, "host A", "Redis", "bad")
    picture.message(58, "host B", "Redis", "bad")
    picture.say("Redis", 5, "1 host", "bad small")
    picture.say("Redis", 59, "2 hosts", "bad small")
    picture.span("Redis", 0.5, 58, "closed: one host is no quorum", "good")
    picture.span("Redis", 58, 99, "open for the fleet", "bad")
    for lane, first in (("host A", 64), ("host B", 62), ("host C", 66)):
        picture.calls(lane, "rejected", range(first, 99, 7))
    picture.note("With quorum=2. A host counts once, however many processes it has.")
    return picture
