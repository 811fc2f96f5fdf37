"""Many threads on one breaker object: one refresh for all, right counts, and nothing held while others work."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import server_watch
from conftest import stopped, wait_until
from race_workers import (
    FIRM,
    PATIENCE,
    Boom,
    Exchanges,
    boom,
    fine,
    interrupted_at,
    make_stale,
    run_threads,
    signalled_at,
)

from pybreaker_redis import (
    AsyncCircuitBreaker,
    CircuitBreaker,
    CircuitOpenError,
    Event,
    Permit,
    PermitError,
    Policy,
    _clock,
    _core,
    _events,
    _runner,
    _view,
)
from pybreaker_redis._permit import Innermost
from pybreaker_redis._view import Counter as Counting
from pybreaker_redis._view import Successes, Verdict, View
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire import link as link_module
from pybreaker_redis.wire.commands import Command
from pybreaker_redis.wire.route import Routes
from pybreaker_redis.wire.url import client_from_url

MANY = Policy(failure_threshold=1_000_000_000)


def adopt(view: View, taken: Any, sent: float, now: float) -> bool:
    """Let a view adopt a reply at a moment of the test's choice."""
    usual, view.now = view.now, lambda: now
    try:
        return view.adopt(taken, sent)
    finally:
        view.now = usual


def reply(state: str, generation: int, retry_after_ms: int | None = None) -> dict[str, Any]:
    """What a script replied."""
    counts = {"failure_count": 0, "failure_number": 0, "source": "redis"}
    return {"state": state, "generation": generation, "retry_after_ms": retry_after_ms, **counts}


def test_counts_of_32_threads(client: redis.Redis) -> None:
    """Each failure of 32 threads on one breaker is counted, over at most a connection per thread."""
    breaker = CircuitBreaker("threads", redis=client, policy=MANY, lease=0, **FIRM)
    connections = len(client.client_list())

    def work(number: int) -> None:
        for _ in range(20):
            with contextlib.suppress(Boom):
                breaker.call(boom)

    run_threads(32, work)
    assert breaker.snapshot().failure_count == 32 * 20
    assert len(client.client_list()) - connections <= 32 + 1


def test_failures_in_memory_trip_at_exactly_the_threshold() -> None:
    """16 threads fail in memory, where most failures are counted in place: the last one that is needed trips."""
    events: list[Event] = []
    breaker = CircuitBreaker("a", policy=Policy(failure_threshold=16 * 200), listeners=[events.append])
    breaker.call(int)

    def work(number: int) -> None:
        for _ in range(200 - (number == 0)):
            with contextlib.suppress(Boom):
                breaker.call(boom)

    run_threads(16, work)
    assert (breaker.snapshot().failure_count, breaker.snapshot().state) == (16 * 200 - 1, "closed")
    with pytest.raises(Boom):
        breaker.call(boom)
    assert breaker.snapshot().state == "open"
    assert len(events) == 1
    assert breaker.counts.failures == 16 * 200


def test_a_success_ends_the_run_at_any_line_of_a_failure_in_memory() -> None:
    """A success ends in another thread at each line of a failing call: it comes before the failure, or after it."""
    for line in itertools.count():
        breaker = CircuitBreaker("a", policy=Policy(failure_threshold=100), lease=60.0)
        breaker.call(int)
        for _ in range(5):
            fail(breaker)
        if not interrupted_at(line, functools.partial(fail, breaker), functools.partial(breaker.call, int)):
            break
        fail(breaker)
        assert breaker.snapshot().failure_count in (1, 2), f"line {line}"
        assert (breaker.counts.successes, breaker.counts.failures) == (2, 7)
    assert line > 20


def fail(breaker: CircuitBreaker) -> None:
    """A failing call."""
    with contextlib.suppress(Boom):
        breaker.call(boom)


def test_first_calls_share_one_question(server: EmbeddedServer, client: redis.Redis) -> None:
    """64 threads whose first call it is send one command and are all admitted; the first success is reported."""
    server_watch.load_scripts(client)
    breaker = CircuitBreaker("cold", redis=client, lease=60.0, **FIRM)
    with server_watch.Requests(client, f"{server.directory}/r.sock") as requests:
        run_threads(64, lambda number: breaker.call(fine))
    sent = [request for _, key, request in requests.seen if "cold" in key]
    assert len([request for request in sent if "successes" not in request]) == 1
    assert len(sent) <= 2


def test_a_stale_view_is_refreshed_in_the_background(own_server: EmbeddedServer) -> None:
    """While a view is refreshed within its grace 64 threads go on by the old one: nobody waits, nobody is rejected."""
    with redis.Redis.from_url(own_server.url) as client:
        server_watch.load_scripts(client)
        breaker = CircuitBreaker("grace", redis=own_server.url, lease=1200.0, **FIRM)
        breaker.call(fine)
        wait_until(lambda: not breaker._redis.link.wanted and not breaker._redis.link.is_busy())
        exchanges = Exchanges(breaker)
        before = server_watch.commands(client)
        make_stale(breaker, 1.5)
        stale = breaker._view.seen.sent
        with stopped(own_server):
            began = time.monotonic()
            done: list[int] = []
            run_threads(64, lambda number: done.append(breaker.call(fine)))
            assert done == [1] * 64
            assert time.monotonic() - began < FIRM["redis_timeout"] / 2
            wait_until(lambda: exchanges.most >= 1)  # the thread of the link may be slower than all the calls
            assert exchanges.began - exchanges.ended == exchanges.most == 1
        wait_until(lambda: breaker._view.seen.sent > stale)
        wait_until(lambda: exchanges.ended == exchanges.began)
        assert breaker.call(fine) == 1
        sent = server_watch.commands(client) - before
        assert sent["evalsha"] + sent["mget"] <= 2  # one read; calls that came before it ended may ask for another


def test_beyond_the_grace_all_wait_for_one(own_server: EmbeddedServer) -> None:
    """A view older than two leases admits nobody before the one answer that all wait for."""
    with redis.Redis.from_url(own_server.url) as client:
        server_watch.load_scripts(client)
        breaker = CircuitBreaker("old", redis=own_server.url, lease=1200.0, **FIRM)
        breaker.call(fine)
        wait_until(lambda: server_watch.commands(client)["evalsha"] == 2)  # the second reports the first success
        CircuitBreaker("old", redis=client).force_open()
        before = server_watch.commands(client)
        make_stale(breaker, 2.1)  # and redis_timeout
        rejected: list[str] = []

        def call() -> None:
            try:
                breaker.call(fine)
            except CircuitOpenError as error:
                rejected.append(error.state)

        threads = [threading.Thread(target=call, daemon=True) for _ in range(64)]
        with stopped(own_server):
            for thread in threads:
                thread.start()
            time.sleep(0.2)
            assert all(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join(PATIENCE)
        assert rejected == ["open"] * 64
        assert (server_watch.commands(client) - before)["evalsha"] == 1


def test_a_view_ends_on_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed view admits for one lease, is refreshed in the background in the next, and from two on all wait."""
    breaker = CircuitBreaker("on time", redis="redis://127.0.0.1:1", lease=10.0, redis_timeout=3.0)
    view, server, link = breaker._view, breaker._redis, breaker._redis.link
    refreshes: list[float] = []
    clock = [0.0]
    for module in (_clock, _core, _runner, _view, link_module):
        monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    monkeypatch.setattr(server, "soon", lambda member: refreshes.append(clock[0]))

    def at(now: float) -> object:
        clock[0] = now
        try:
            answer = breaker._consult(now)
        except CircuitOpenError:
            return Verdict.REJECT
        if not isinstance(answer, Permit):
            return answer
        answer.release()
        return Verdict.ADMIT

    assert at(0.0) is Verdict.WAIT
    adopt(view, reply("closed", 1), 100.0, 103.0)  # the reply took 3 s: the lease began when the request was sent
    assert max(view.seen.closed_until, view.seen.watched_until) == 110.0
    refreshes.clear()
    assert at(109.9) is Verdict.ADMIT
    assert not refreshes
    assert at(110.0) is Verdict.ADMIT
    assert at(119.9) is Verdict.ADMIT
    assert refreshes == [110.0, 119.9]
    assert at(120.0) is Verdict.WAIT
    link.busy_since = 119.0  # an exchange hangs: for redis_timeout the view serves on
    assert at(122.9) is Verdict.ADMIT
    assert at(123.0) is Verdict.WAIT
    adopt(view, reply("open", 2, 5000), 130.0, 133.0)
    assert at(137.9) is Verdict.REJECT
    assert at(138.0) is Verdict.ASK


def test_an_older_reply_of_the_same_generation_is_dropped() -> None:
    """A reply that arrives after a newer one of its generation does not shorten the lease."""
    view = View(10.0)
    adopt(view, reply("closed", 7), 105.0, 106.0)
    adopt(view, reply("closed", 7), 100.0, 107.0)
    assert max(view.seen.closed_until, view.seen.watched_until) == 115.0


def test_an_older_reply_does_not_undo_a_trip() -> None:
    """A reply of before a trip that arrives after it does not put the view back."""
    view = View(10.0)
    adopt(view, reply("open", 8, 30_000), 105.0, 106.0)
    adopt(view, reply("closed", 7), 100.0, 107.0)
    assert (view.seen.state, view.seen.generation) == ("open", 8)
    assert max(view.seen.closed_until, view.seen.watched_until) == float("-inf")


def test_an_overtaken_reply_does_not_undo_a_trip() -> None:
    """Two requests under way together: the one sent later ran before the trip, and its reply comes last."""
    view = View(10.0)
    adopt(view, reply("closed", 7), 90.0, 91.0)
    adopt(view, reply("open", 8, 30_000), 100.0, 106.0)  # sent first, ran second: it tripped
    adopt(view, reply("closed", 7), 101.0, 107.0)  # sent second, ran first, arrived last
    assert (view.seen.state, view.seen.generation) == ("open", 8)


def test_a_lower_generation_is_taken_when_it_is_newer() -> None:
    """A request sent after the last reply came tells the truth, even if its generation is lower (a clock went back)."""
    view = View(10.0)
    adopt(view, reply("open", 8, 30_000), 100.0, 106.0)
    adopt(view, reply("closed", 7), 106.5, 107.0)
    assert (view.seen.state, view.seen.generation) == ("closed", 7)


@pytest.mark.parametrize("order", ["refusal last", "report last"])
def test_an_overtaken_refusal_does_not_hide_a_free_slot(order: str) -> None:
    """A refresh is sent after the report that ends a probe, but runs before it: the next call asks for the slot."""
    view = View(10.0)
    adopt(view, reply("half_open", 7, 100), 90.0, 91.0)
    report, refresh = (reply("half_open", 7), 100.0), (reply("half_open", 7, 100), 101.0)
    first, last = (report, refresh) if order == "refusal last" else (refresh, report)
    adopt(view, *first, 106.0)
    adopt(view, *last, 107.0)
    assert view.seen.verdict(107.0) is Verdict.ASK
    adopt(view, reply("half_open", 7, 100), 107.5, 108.0)  # asked after both
    assert view.seen.verdict(108.0) is Verdict.REJECT


@pytest.mark.parametrize("has_global_lock", [True, False])
def test_gathering_loses_nothing(monkeypatch: pytest.MonkeyPatch, has_global_lock: bool) -> None:
    """What 32 threads gather while another takes is taken whole, also as it is counted without a global lock."""
    monkeypatch.setattr(_view, "HAS_GLOBAL_LOCK", has_global_lock)
    view = View(10.0)
    adopt(view, reply("closed", 7), 0.0, 0.0)
    taken: list[int] = []
    gathering = threading.Barrier(33)

    def work(number: int) -> None:
        if number < 32:
            for _ in range(2000):
                assert view.gather(7)
            gathering.wait(PATIENCE)
            return
        while gathering.n_waiting < 32:
            taken.append(view.take().get("successes", 0))
        gathering.wait(PATIENCE)

    run_threads(33, work)
    assert sum(taken) + view.take().get("successes", 0) == 32 * 2000


def test_breakers_that_are_made_at_once_share_their_link() -> None:
    """Threads make breakers of one name and URL: one client, one link, and one rule for nested guards."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(50):
            made: list[CircuitBreaker] = []
            ready = threading.Barrier(8)

            def make(_: int, number: int = number, made: list[CircuitBreaker] = made, ready: Any = ready) -> None:
                ready.wait(PATIENCE)
                made.append(CircuitBreaker("made-at-once", redis=f"redis://localhost:1/{number}"))

            run_threads(8, make)
            assert len({breaker._redis for breaker in made}) == 1
            assert len({breaker._innermost for breaker in made}) == 1
    finally:
        sys.setswitchinterval(interval)


def test_a_failure_of_another_thread_sets_no_time_back() -> None:
    """Else a call around the later of two failures would take itself for one without a failure within."""
    times, reading, go = iter([10.0, 11.0]), threading.Event(), threading.Event()

    def now() -> float:
        at = next(times)
        if at == 10.0:
            reading.set()
            go.wait(PATIENCE)
        return at

    innermost = Innermost(now)
    threads = [threading.Thread(target=innermost.failed, args=(None, 0.0)) for _ in range(2)]
    threads[0].start()
    assert reading.wait(PATIENCE)
    threads[1].start()
    threads[1].join(0.2)
    go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert innermost.failed_at == 11.0


@pytest.mark.parametrize("policy", [Policy(), Policy(error_rate_threshold=0.5)])
def test_only_one_thread_reads_a_counter(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    """Whoever reads it holds the breaker's lock, also at the end of the process, while other threads still call."""
    breaker = CircuitBreaker("counters", redis=server.url, policy=policy, **FIRM)
    lock: Any = breaker._view.lock
    held, total = [], Counting.total

    def checked(counter: Counting) -> int:
        view = breaker._view
        if counter in (view.seen.counter, *view._earlier, *breaker._notices._counters.values()):
            held.append(lock._is_owned())
        return total(counter)

    monkeypatch.setattr(Counting, "total", checked)
    for _ in range(3):
        breaker.call(fine)
        with contextlib.suppress(Boom):
            breaker.call(boom)
        assert breaker.counts.failures
    breaker.flush()
    breaker.call(fine)
    breaker._redis._at_exit()
    assert held
    assert all(held)


class Racing(Successes):
    """Another thread's success ends right after each look."""

    __slots__ = ()

    def look(self, now: float) -> int:
        found = super().look(now)
        self.tick()
        return found


def test_a_success_that_ends_during_a_take_waits_for_the_next() -> None:
    """It has no age yet: it must neither fail the report nor be lost."""
    counter = Racing()
    assert [counter.take(now) for now in (1.0, 2.0, 3.0)] == [0, 1, 1]
    assert counter.grown_at == 3.0
    assert counter.total() == 3


def test_a_straggler_gathers_nothing() -> None:
    """A success of an earlier generation is not gathered under the new one, and a new generation starts at none."""
    view = View(10.0)
    adopt(view, reply("closed", 7), 0.0, 0.0)
    view.gather(7)
    adopt(view, reply("closed", 9), 1.0, 1.0)
    view.gather(7)
    assert view.take() == {"generation": 9}
    view.gather(9)
    assert view.take() == {"generation": 9, "successes": 1, "seen_failure": 0}


def test_a_straggling_failure_takes_no_successes_with_it(client: redis.Redis) -> None:
    """Successes gathered under the present generation survive the report of a call from an earlier one."""
    server_watch.load_scripts(client)
    policy = Policy(failure_threshold=3)
    breaker = CircuitBreaker("swept", redis=client, policy=policy, lease=60.0, **FIRM)
    straggler = breaker.acquire()
    breaker.acquire().failure()
    breaker.reset()
    for _ in range(2):
        breaker.acquire().failure()
    for _ in range(10):
        breaker.call(fine)
    straggler.failure()
    breaker.acquire().failure()  # the first one after ten successes
    assert breaker.snapshot().state == "closed"
    assert breaker.snapshot().failure_count == 1


def test_own_failures_are_seen_at_once(client: redis.Redis) -> None:
    """The process whose failure trips rejects its next call without asking, whatever its lease."""
    server_watch.load_scripts(client)
    breaker = CircuitBreaker("own", redis=client, policy=Policy(failure_threshold=1), lease=60.0, **FIRM)
    with contextlib.suppress(Boom):
        breaker.call(boom)
    before = server_watch.commands(client)
    with pytest.raises(CircuitOpenError):
        breaker.call(fine)
    assert (server_watch.commands(client) - before)["evalsha"] == 0


def test_forced_closed_counts_nothing(client: redis.Redis) -> None:
    """While an operator forces closed, failing calls of 8 threads are all admitted and change nothing."""
    breaker = CircuitBreaker("forced", redis=client, policy=Policy(failure_threshold=2), lease=0, **FIRM)
    running = breaker.acquire()
    breaker.force_closed(duration=60.0)
    before = client.get(breaker.keys.state)

    def fail(number: int) -> None:
        for _ in range(5):
            with contextlib.suppress(Boom):
                breaker.call(boom)

    run_threads(8, fail)
    running.failure()
    assert client.get(breaker.keys.state) == before


def test_two_objects_share_through_redis(client: redis.Redis) -> None:
    """Two breakers of one name in one process count together, and one of them is notified of the trip."""
    events: list[Event] = []
    options: dict[str, Any] = {"policy": Policy(failure_threshold=2), "lease": 0, "listeners": [events.append], **FIRM}
    first, second = (CircuitBreaker("twice", redis=client, **options) for _ in range(2))
    first.acquire().failure()
    second.acquire().failure()
    for breaker in (first, second):
        with pytest.raises(CircuitOpenError):
            breaker.acquire()
    changes = [event for event in events if event.kind == "state_change"]
    assert [(event.old, event.new, event.instance) for event in changes] == [("closed", "open", second.instance)]


def test_a_permit_is_settled_once(client: redis.Redis) -> None:
    """Of 16 threads settling one permit one succeeds, and one failure is counted."""
    breaker = CircuitBreaker("permit", redis=client, policy=MANY, lease=0, **FIRM)
    for count in range(1, 21):
        permit, refused = breaker.acquire(), []

        def settle(number: int, permit: Permit = permit, refused: list[int] = refused) -> None:
            try:
                permit.failure()
            except PermitError:
                refused.append(number)

        run_threads(16, settle)
        assert len(refused) == 15
        assert breaker.snapshot().failure_count == count


@pytest.mark.slots(2)
def test_one_probe_among_threads(client: redis.Redis) -> None:
    """Of 32 threads of one breaker object exactly half_open_max_calls run after the open time, per round."""
    policy = Policy(failure_threshold=1, reset_timeout=0.02, half_open_max_calls=2, success_threshold=2)
    for lease in (0, 0.05, 60.0):
        breaker = CircuitBreaker(f"herd-{lease}", redis=client, policy=policy, lease=lease, **FIRM)
        breaker.acquire().failure()
        wait_until(lambda breaker=breaker: breaker.snapshot().retry_after == 0)
        # the view's own end of the open time is up to one round trip later
        wait_until(lambda breaker=breaker: breaker.state == "half_open")
        permits: list[Permit] = []

        def ask(number: int, breaker: CircuitBreaker = breaker, permits: list[Permit] = permits) -> None:
            with contextlib.suppress(CircuitOpenError):
                permits.append(breaker.acquire())

        run_threads(32, ask)
        assert sorted(permit.probe for permit in permits) == [1, 2]
        for permit in permits:
            permit.success()
        assert breaker.snapshot().state == "closed"


@pytest.mark.parametrize("outcome", ["success", "failure", "release"])
def test_a_probe_past_its_deadline_counts_nothing(client: redis.Redis, outcome: str) -> None:
    """A probe that ends after its slot was handed on changes nothing; the probe that holds the slot decides."""
    policy = Policy(failure_threshold=1, reset_timeout=0.01, probe_timeout=0.05)
    first, second = (CircuitBreaker("overdue", redis=client, policy=policy, lease=0, **FIRM) for _ in range(2))
    first.acquire().failure()
    wait_until(lambda: first.snapshot().retry_after == 0)
    overdue = first.acquire()
    wait_until(lambda: first.snapshot().probes_in_flight == 0)
    patient = CircuitBreaker(
        "overdue", redis=client, policy=Policy(failure_threshold=1, probe_timeout=60.0), lease=0, **FIRM
    )
    probe = patient.acquire()
    before = client.get(first.keys.state)
    getattr(overdue, outcome)()
    assert client.get(first.keys.state) == before
    assert second.snapshot().state == "half_open"
    probe.success()
    assert second.snapshot().state == "closed"


@pytest.mark.slots(3)
@pytest.mark.parametrize("outcomes", ["sss", "ssf", "fff", "sfs"])
def test_probes_that_end_together_make_one_transition(client: redis.Redis, outcomes: str) -> None:
    """Of probes that end at the same moment one makes the only transition; what comes after it is ignored."""
    for number in range(8):
        events: list[Event] = []
        policy = Policy(failure_threshold=1, reset_timeout=0.01, half_open_max_calls=3, success_threshold=3)
        options: dict[str, Any] = {"policy": policy, "lease": 0, "listeners": [events.append], **FIRM}
        breakers = [CircuitBreaker(f"end-{outcomes}-{number}", redis=client, **options) for _ in outcomes]
        breakers[0].acquire().failure()
        wait_until(lambda breakers=breakers: breakers[0].snapshot().retry_after == 0)
        permits = [breaker.acquire() for breaker in breakers]
        events.clear()

        def end(index: int, permits: list[Permit] = permits) -> None:
            if outcomes[index] == "s":
                permits[index].success()
            else:
                permits[index].failure()

        run_threads(3, end)
        expected = "open" if "f" in outcomes else "closed"
        assert [event.new for event in events if event.kind == "state_change"] == [expected]
        assert [entry.new for entry in breakers[0].history()] == [expected, "half_open", "open"]
        assert breakers[0].snapshot().failure_count == (2 if "f" in outcomes else 0)


def test_generations_never_repeat(client: redis.Redis) -> None:
    """Transitions made by 16 threads at once, many in one millisecond, each get a generation of their own, growing."""
    breaker = CircuitBreaker("generations", redis=client, lease=0, **FIRM)

    def steer(number: int) -> None:
        for _ in range(5):
            if number % 2:
                breaker.reset()
            else:
                breaker.force_open()

    run_threads(16, steer)
    generations = [entry.generation for entry in breaker.history() if entry.old != entry.new]
    assert len(generations) >= 2
    assert generations == sorted(set(generations), reverse=True)
    assert breaker.snapshot().generation == generations[0]


def test_a_listener_may_outlast_the_lease_and_call(client: redis.Redis) -> None:
    """A listener that outlasts the lease of the view can still use the breaker."""
    called: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "rejected" and not called:
            called.append("listening")
            make_stale(breaker, 3.0)
            with contextlib.suppress(CircuitOpenError):
                breaker.call(fine)
            called.append("called")

    breaker = CircuitBreaker("listener", redis=client, lease=600.0, on_call=[listen], **FIRM)
    breaker.call(fine)
    CircuitBreaker("listener", redis=client).force_open()
    make_stale(breaker, 3.0)

    def call() -> None:
        with contextlib.suppress(CircuitOpenError):
            breaker.call(fine)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(5.0)
    assert called == ["listening", "called"]


def test_a_slow_listener_holds_up_its_own_thread_only(client: redis.Redis) -> None:
    """While a listener of one thread is slow, a call of another thread is answered."""
    listening, go_on = threading.Event(), threading.Event()

    def listen(event: Event) -> None:
        if event.kind == "rejected" and not listening.is_set():
            make_stale(breaker, 3.0)  # the listener has outlasted the view
            listening.set()
            go_on.wait(PATIENCE)

    breaker = CircuitBreaker("slow", redis=client, lease=60.0, on_call=[listen], **FIRM)
    breaker.call(fine)
    CircuitBreaker("slow", redis=client).force_open()
    make_stale(breaker, 3.0)

    def call() -> None:
        with contextlib.suppress(CircuitOpenError):
            breaker.call(fine)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    threads[0].start()
    assert listening.wait(PATIENCE)
    threads[1].start()
    threads[1].join(5.0)
    answered = not threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert answered


def test_events_of_a_refresh_are_delivered_outside_of_its_lock(client: redis.Redis) -> None:
    """A refresh reports a running call that is slow, and trips: while its listener runs, another thread refreshes."""
    slow = Policy(slow_call_duration=0.001, slow_call_rate_threshold=1.0, minimum_calls=1, reset_timeout=3600)
    hang, other_ended = threading.Event(), threading.Event()

    def call() -> None:
        with contextlib.suppress(CircuitOpenError):
            breaker.call(fine)
        other_ended.set()

    def listen(event: Event) -> None:
        make_stale(breaker, 3.0)
        threading.Thread(target=call, daemon=True).start()
        received.append((event.new, event.reason, other_ended.wait(PATIENCE)))

    received: list[tuple[str | None, str | None, bool]] = []
    breaker = CircuitBreaker("outside", redis=client, policy=slow, lease=60.0, listeners=[listen], **FIRM)
    hanging = threading.Thread(target=breaker.call, args=(hang.wait, PATIENCE), daemon=True)
    hanging.start()
    link = breaker._redis.link
    wait_until(breaker._slow_calls.first_overdue)
    wait_until(lambda: not link.wanted and not link.is_busy())  # else that exchange would make the view fresh
    make_stale(breaker, 3.0)
    with pytest.raises(CircuitOpenError):
        breaker.call(fine)
    wait_until(lambda: received)
    hang.set()
    hanging.join(PATIENCE)
    assert received == [("open", "slow_rate", True)]


def test_a_transition_is_notified_though_another_thread_adopts_it_first() -> None:
    """In memory, a second thread calls at any point of the report that closes: each transition is notified once."""
    probing = Policy(failure_threshold=1, reset_timeout=0.001, probe_timeout=3600)
    changes: list[Event] = []
    breaker = CircuitBreaker("adopted", policy=probing, listeners=[changes.append])

    def call(_: int) -> None:
        with contextlib.suppress(CircuitOpenError):
            breaker.call(fine)

    def call_in_a_thread() -> None:
        thread = threading.Thread(target=call, args=(0,))
        thread.start()
        thread.join(0.5)  # where the report holds a lock, the call waits for it
        calling.append(thread)

    calling: list[threading.Thread] = []
    for place in itertools.count():
        changes.clear()
        breaker.acquire().failure()
        wait_until(lambda: breaker.state == "half_open")
        if not signalled_at(place, _runner, breaker.acquire().success, call_in_a_thread):
            break
        calling.pop().join(PATIENCE)
        assert [event.new for event in changes] == ["open", "half_open", "closed"], f"place {place}"
    assert place > 3


def test_quick_successes_never_decrease() -> None:
    """While a slow call is being counted, another thread reads a metric that never decreases: successes - slow."""
    breaker = CircuitBreaker("metric", policy=Policy(failure_threshold=9, slow_call_duration=0.001))
    read: list[int] = []

    def count(_: int) -> None:
        read.append(breaker.counts.successes - breaker.counts.slow_successes)

    def slow_call() -> None:
        breaker.call(time.sleep, 0.002)

    for place in itertools.count():
        if not signalled_at(place, _events, slow_call, functools.partial(run_threads, 1, count)):
            break
    assert place > 2
    assert (breaker.counts.successes, breaker.counts.slow_successes) == (place + 1, place + 1)
    assert read == [0] * place


# Blocks ----------------------------------------------------------------------------------------


def test_blocks_of_two_generators_in_one_thread(client: redis.Redis) -> None:
    """Two suspended blocks in one thread, left in the order they were entered, each settle their own permit."""
    breaker = CircuitBreaker("blocks", redis=client, policy=MANY, lease=0, **FIRM)
    permits = []

    def block() -> Iterator[None]:
        with breaker.acquire() as permit:
            permits.append(permit)
            yield

    first, second = block(), block()
    next(first)
    next(second)
    next(first, None)
    assert [permit.settled for permit in permits] == [True, False]
    next(second, None)
    assert [permit.settled for permit in permits] == [True, True]


@pytest.mark.parametrize("lease", [0, 60.0])
@pytest.mark.parametrize("ends", ["block", "success"])
def test_a_permit_settled_by_two_threads_while_its_block_ends(lease: float, ends: str) -> None:
    """Two threads settle a permit at whichever line of its end in a third one: it counts once, by one of them."""
    breaker = CircuitBreaker("ending", policy=MANY, lease=lease)
    breaker.call(fine)
    refused: list[int] = []

    def try_to(settle: Callable[[], object]) -> None:
        try:
            settle()
        except PermitError:
            refused.append(1)

    for rounds in itertools.count(1):
        permit = breaker.acquire().__enter__()
        end: Callable[[], object] = functools.partial(permit.__exit__, None, None, None)
        if ends == "success":
            end = functools.partial(try_to, permit.success)
        settle = functools.partial(run_threads, 2, lambda _, permit=permit: try_to(permit.failure))
        reached = interrupted_at(rounds - 1, end, settle)
        assert permit.settled
        counts = breaker.counts
        assert counts.successes + counts.failures == 1 + rounds, f"line {rounds}"
        if not reached:
            break
    assert rounds > 2
    attempts = 2 * (rounds - 1) if ends == "block" else 3 * (rounds - 1) + 1
    assert len(refused) == attempts - (counts.failures if ends == "block" else rounds)


def test_a_node_is_lost_while_others_turn_out_to_serve() -> None:
    """One thread loses a cluster's node while another one finds who serves a slot: no error."""
    routes = Routes(client_from_url("redis+cluster://127.0.0.1:1"))

    def send(key: str, reply: Any) -> None:
        """One command that a node answers, or is lost with; nobody lists the slots."""
        steps = routes.exchange([Command(key.encode(), ())])
        with contextlib.suppress(StopIteration):
            next(steps)
            steps.send([reply])
            steps.throw(redis.ConnectionError())

    for rounds in itertools.count():
        for number in range(5):
            send(f"known-{number}", b"reply")
        lose = functools.partial(send, "lost", redis.ConnectionError())
        if not interrupted_at(rounds, lose, functools.partial(send, f"new-{rounds}", b"reply")):
            break
    assert rounds > 5


def test_two_loops_in_two_threads_share_one_asyncio_breaker(server: EmbeddedServer, client: redis.Redis) -> None:
    """Tasks of two loops use one breaker at once: each event is delivered once, by the loop of its own call."""
    received: Counter[tuple[int, str, str]] = Counter()

    async def listen(event: Event) -> None:
        await asyncio.sleep(0)
        received[threading.get_ident(), event.kind, str(event.exception)] += 1

    breaker = AsyncCircuitBreaker("loops", redis=server.url, policy=MANY, lease=0, on_call=[listen], **FIRM)
    threads: dict[int, int] = {}

    async def fail(number: int) -> None:
        raise Boom(number)

    async def one(number: int) -> None:
        for _ in range(10):
            with contextlib.suppress(Boom):
                await breaker.call(fail, number)
            await breaker.call(asyncio.sleep, 0)

    async def main(number: int) -> None:
        await asyncio.gather(*(one(number) for _ in range(8)))
        await breaker.close()

    def work(number: int) -> None:
        threads[number] = threading.get_ident()
        asyncio.run(main(number))

    run_threads(2, work)
    wanted = [(thread, "success", "None") for thread in threads.values()]
    wanted += [(thread, "failure", str(number)) for number, thread in threads.items()]
    assert received == dict.fromkeys(wanted, 80)
    assert (breaker.counts.successes, breaker.counts.failures) == (160, 160)
