"""CircuitBreaker as its user sees it, on both engines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import gc
import inspect
import itertools
import json
import logging
import os
import pickle
import re
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from conftest import no_threads, nonzero, stored_calls, wait_until

from pybreaker_redis import (
    AsyncCircuitBreaker,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitOpenError,
    Event,
    PermitError,
    Policy,
)
from pybreaker_redis import PolicyError as Refused
from pybreaker_redis._permit import _probes
from pybreaker_redis.embedded import EmbeddedServer

Make = Callable[..., CircuitBreaker]
PATIENT: dict[str, Any] = {"redis_timeout": 20.0}
STRICT: dict[str, Any] = {"lease": 0, **PATIENT}
ONE = Policy(failure_threshold=1, reset_timeout=3600)
PROBING = Policy(failure_threshold=1, reset_timeout=0.001, probe_timeout=3600)


class Boom(Exception):
    """A failure of the guarded service."""


class Answer(Exception):
    """An exception by which the guarded service answers."""


def boom(*_: object) -> None:
    raise Boom("boom")


def raising(exception: BaseException) -> Callable[[], None]:
    """A function that raises this."""

    def function() -> None:
        raise exception

    return function


def half_open(make: Make, **options: Any) -> CircuitBreaker:
    """A breaker whose next call is a probe; its slot would be held for an hour."""
    breaker = make(policy=PROBING, **{**STRICT, **options})
    breaker.acquire().failure()
    wait_until(lambda: breaker.state == "half_open")
    return breaker


def counts(breaker: CircuitBreaker) -> tuple[Any, ...]:
    """Everything that an outcome could change."""
    seen = breaker.snapshot()
    return seen.state, seen.generation, seen.failure_count, seen.success_count, seen.trips, seen.probes_in_flight


def failures(breaker: CircuitBreaker) -> int:
    """The failures in a row."""
    return breaker.snapshot().failure_count


WAYS = ["call", "decorator", "acquire", "block", "generator"]


def one_call(breaker: CircuitBreaker, way: str, func: Callable[[], Any]) -> None:
    """One call of the function, guarded in one of the ways."""
    if way == "call":
        breaker.call(func)
    elif way == "decorator":
        breaker(func)()
    elif way == "block":
        with breaker.acquire():
            func()
    elif way == "acquire":
        permit = breaker.acquire()
        try:
            func()
        except BaseException as error:
            permit.failure(error) if isinstance(error, Boom) else permit.release()
            raise
        permit.success()
    else:

        @breaker
        def stream() -> Iterator[Any]:
            yield func()

        list(stream())


# Calls


def test_call(make_breaker: Make) -> None:
    """call() hands over arguments, result and exception, and counts the failure."""
    breaker = make_breaker(**STRICT)
    assert breaker.call(lambda *args, **kwargs: (args, kwargs), 1, func=2) == ((1,), {"func": 2})
    with pytest.raises(Boom, match="boom"):
        breaker.call(boom)
    assert failures(breaker) == 1


@pytest.mark.parametrize("lease", [0, 60])
def test_trips_and_rejects(make_breaker: Make, lease: float) -> None:
    """The threshold-th failure opens it, and the function does not run any more."""
    breaker = make_breaker(policy=Policy(failure_threshold=3), lease=lease, **PATIENT)
    ran = []
    for _ in range(3):
        with pytest.raises(Boom):
            breaker.call(boom)
    assert breaker.snapshot().state == "open"
    with pytest.raises(CircuitOpenError):
        breaker.call(ran.append, 1)
    assert ran == []


@pytest.mark.parametrize("lease", [0, 60])
def test_success_ends_a_run_of_failures(make_breaker: Make, lease: float) -> None:
    """Failures count in a row: a success between them starts the count again."""
    breaker = make_breaker(policy=Policy(failure_threshold=2), lease=lease, **PATIENT)
    for _ in range(3):
        with pytest.raises(Boom):
            breaker.call(boom)
        breaker.call(int)
    assert breaker.snapshot().state == "closed"


def test_recovers(make_breaker: Make) -> None:
    """After reset_timeout a probe runs, and its success closes the circuit."""
    breaker = half_open(make_breaker)
    assert breaker.call(int) == 0
    assert breaker.snapshot().state == "closed"


def test_probe_fails(make_breaker: Make) -> None:
    """A probe that fails opens the circuit again."""
    breaker = half_open(make_breaker)
    with pytest.raises(Boom):
        breaker.call(boom)
    assert (breaker.snapshot().state, breaker.snapshot().trips) == ("open", 2)


def test_decorator(make_breaker: Make) -> None:
    """The decorated function keeps its name, signature and text, and knows its breaker."""
    breaker = make_breaker(**STRICT)

    @breaker
    def search(query: str, *, limit: int = 3) -> str:
        """Search."""
        return query * limit

    assert search("a", limit=2) == "aa"
    assert (search.__name__, search.__doc__) == ("search", "Search.")
    assert list(inspect.signature(search).parameters) == ["query", "limit"]
    assert search.breaker is breaker


def test_decorated_function_rejects(make_breaker: Make) -> None:
    """The decorator guards like call()."""
    guarded = make_breaker(policy=ONE, **STRICT)(boom)
    with pytest.raises(Boom):
        guarded()
    with pytest.raises(CircuitOpenError):
        guarded()


def test_decorated_method(make_breaker: Make) -> None:
    """A decorated method is bound like any other."""
    breaker = make_breaker(**STRICT)

    class Client:
        @breaker
        def me(self) -> Client:
            return self

    client = Client()
    assert client.me() is client


def test_open_error(make_breaker: Make) -> None:
    """A rejection says who, in which state and for how long, also after pickling."""
    breaker = make_breaker("search", policy=ONE, **STRICT)
    breaker.acquire().failure()
    with pytest.raises(CircuitOpenError) as caught:
        breaker.acquire()
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert isinstance(error, CircuitBreakerError)
        assert (error.name, error.state) == ("search", "open")
        assert 3000 < error.retry_after <= 3600
        assert "'search' is open (failure_threshold); retry after 3" in str(error)


def test_open_error_of_the_fast_path(make_breaker: Make) -> None:
    """A rejection by the view alone carries the same."""
    breaker = make_breaker("search", policy=ONE, lease=600, **PATIENT)
    breaker.acquire().failure()
    with pytest.raises(CircuitOpenError) as caught:
        breaker.call(int)
    assert (caught.value.name, caught.value.state) == ("search", "open")
    assert 3000 < caught.value.retry_after <= 3600


def test_open_error_in_half_open(make_breaker: Make) -> None:
    """With all slots taken a rejection says to come back after as long as the probe has been out, at least 0.1 s."""
    breaker = half_open(make_breaker)
    probe = breaker.acquire()
    with pytest.raises(CircuitOpenError) as caught:
        breaker.acquire()
    assert caught.value.state == "half_open"
    assert 0.1 <= caught.value.retry_after < breaker._now() - probe.started + 1.0  # its slot would be held for an hour
    probe.release()


# Blocks and permits


def test_block(make_breaker: Make) -> None:
    """A permit's block counts as a call: an exception out of it is a failure, its end a success."""
    breaker = make_breaker(**STRICT)
    permit = breaker.acquire()
    with contextlib.suppress(Boom), permit as entered:
        assert entered is permit
        assert not permit.settled
        raise Boom
    assert permit.settled
    assert failures(breaker) == 1
    with breaker.acquire():
        pass
    assert failures(breaker) == 0


def test_block_rejects(make_breaker: Make) -> None:
    """A rejected block does not run, and a later one counts as ever."""
    breaker = make_breaker(policy=ONE, **STRICT)
    breaker.acquire().failure()
    with pytest.raises(CircuitOpenError), breaker.acquire():
        pytest.fail("it ran")
    breaker.reset()
    with pytest.raises(Boom), breaker.acquire():
        raise Boom
    assert breaker.snapshot().state == "open"


def test_failure_inside_a_block(make_breaker: Make) -> None:
    """permit.failure() in a block overrules its good end."""
    breaker = make_breaker(**STRICT)
    with breaker.acquire() as permit:
        permit.failure(Boom())
    assert failures(breaker) == 1


def test_success_inside_a_block(make_breaker: Make) -> None:
    """permit.success() in a block overrules the exception that ends it."""
    breaker = make_breaker(**STRICT)
    breaker.acquire().failure()
    with contextlib.suppress(Boom), breaker.acquire() as permit:
        permit.success()
        raise Boom
    assert failures(breaker) == 0


def test_release_inside_a_block(make_breaker: Make) -> None:
    """permit.release() in a block overrules the exception that ends it."""
    breaker = make_breaker(**STRICT)
    breaker.acquire().failure()
    with contextlib.suppress(Boom), breaker.acquire() as permit:
        permit.release()
        raise Boom
    with breaker.acquire() as permit:
        permit.release()
    assert failures(breaker) == 1


def test_nested_blocks(make_breaker: Make) -> None:
    """Nested blocks of one breaker end with their own permits."""
    breaker = make_breaker(**STRICT)
    with contextlib.suppress(Boom), breaker.acquire() as outer:
        with breaker.acquire() as inner:
            pass
        assert (inner.settled, outer.settled) == (True, False)
        raise Boom
    assert failures(breaker) == 1


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("end", ["success", "failure", "release", "block"])
def test_a_settled_permit_has_no_block(make_breaker: Make, end: str, lease: float) -> None:
    """A permit whose call has ended can neither be entered nor settled, and counts once."""
    breaker = make_breaker(lease=lease, **PATIENT)
    permit = breaker.acquire()
    if end == "block":
        with permit:
            pass
    else:
        getattr(permit, end)()
    before = breaker.counts
    with pytest.raises(PermitError, match="already settled"), permit:
        pytest.fail("it ran")
    with pytest.raises(PermitError, match="already settled"):
        permit.failure()
    assert breaker.counts == before
    assert sum(nonzero(before).values()) == 1


@pytest.mark.parametrize("probing", [False, True])
def test_a_block_within_itself(make_breaker: Make, probing: bool) -> None:
    """A permit that is entered is not entered again, and its own block goes on."""
    breaker = half_open(make_breaker) if probing else make_breaker(**STRICT)
    with breaker.acquire() as permit:
        with pytest.raises(PermitError, match="entered"), permit:
            pytest.fail("it ran")
        assert not permit.settled
    assert permit.settled
    assert breaker.snapshot().state == "closed"


@pytest.mark.parametrize("end", ["success", "failure", "release"])
def test_second_settle(make_breaker: Make, end: str) -> None:
    """A permit is settled once, however it was."""
    permit = make_breaker(**STRICT).acquire()
    getattr(permit, end)()
    assert permit.settled
    for again in ("success", "failure", "release"):
        with pytest.raises(PermitError, match="already settled"):
            getattr(permit, again)()


def test_permit_outcomes(make_breaker: Make) -> None:
    """success, failure and release count as success, failure and nothing."""
    breaker = make_breaker(**STRICT)
    breaker.acquire().failure(Boom())
    breaker.acquire().failure()
    breaker.acquire().release()
    assert failures(breaker) == 2
    breaker.acquire().success()
    assert failures(breaker) == 0


def test_released_probe(make_breaker: Make) -> None:
    """A released probe frees its slot at once."""
    breaker = half_open(make_breaker)
    breaker.acquire().release()
    assert breaker.snapshot().probes_in_flight == 0
    breaker.acquire().release()


def test_interleaved_blocks(make_breaker: Make) -> None:
    """Blocks in two generators of one thread that end in the order of their start keep their own permits."""
    breaker = make_breaker(**STRICT)

    def work() -> Iterator[Any]:
        with breaker.acquire() as permit:
            yield permit

    first, second = work(), work()
    permits = [next(first), next(second)]
    with pytest.raises(Boom):
        first.throw(Boom())
    assert [permit.settled for permit in permits] == [True, False]
    assert failures(breaker) == 1
    next(second, None)
    assert permits[1].settled


def test_exit_stack(make_breaker: Make) -> None:
    """An ExitStack enters and leaves a permit like a with statement."""
    breaker = make_breaker(**STRICT)
    with contextlib.suppress(Boom), contextlib.ExitStack() as stack:
        permit = stack.enter_context(breaker.acquire())
        raise Boom
    assert permit.settled
    assert failures(breaker) == 1


@pytest.mark.parametrize("error", [None, Boom()])
def test_exit_of_a_permit_that_was_never_entered(make_breaker: Make, error: Boom | None) -> None:
    """The exit of a permit settles it, entered or not: as a probe, and while the circuit is closed."""
    breaker = half_open(make_breaker)
    with contextlib.suppress(Boom), contextlib.ExitStack() as stack:
        stack.push(permit := breaker.acquire())
        if error is not None:
            raise error
    assert (permit.settled, breaker.snapshot().state) == (True, "open" if error else "closed")
    breaker = make_breaker("fast", lease=3600, **PATIENT)
    for _ in range(2):
        breaker.acquire().__exit__(None, error, None)
    assert nonzero(breaker.counts) == ({"failures": 2} if error else {"successes": 2})


def test_delegated_block(make_breaker: Make) -> None:
    """A class that enters a permit in its own __enter__ and leaves it in its own __exit__ guards its block."""
    breaker = make_breaker(**STRICT)

    class Session:
        def __enter__(self) -> None:
            self._permit = breaker.acquire().__enter__()

        def __exit__(self, *exception: Any) -> None:
            self._permit.__exit__(*exception)

    with pytest.raises(Boom), Session():
        raise Boom
    assert failures(breaker) == 1


def test_context_manager_function(make_breaker: Make) -> None:
    """A block inside a @contextmanager function guards the block of its caller."""
    breaker = make_breaker(**STRICT)

    @contextlib.contextmanager
    def connected() -> Iterator[None]:
        with breaker.acquire():
            yield

    with pytest.raises(Boom), connected():
        raise Boom
    assert failures(breaker) == 1


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("probing", [False, True])
def test_a_lost_permit_warns(make_breaker: Make, probing: bool, lease: float) -> None:
    """A permit that nobody settled says so when it is collected."""
    breaker = half_open(make_breaker, lease=lease) if probing else make_breaker(lease=lease, **PATIENT)
    permits = [breaker.acquire()]
    with pytest.warns(ResourceWarning, match="a permit of circuit breaker 'discovery' was lost: end its call with"):
        permits.clear()


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_guard_loses_a_permit(
    make_breaker: Make, monkeypatch: pytest.MonkeyPatch, way: str, lease: float
) -> None:
    """Successes, failures, interruptions, rejections, probes and shadow mode all settle what they acquire."""
    lost: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lost.append)  # a warning that is an error cannot leave __del__
    options: dict[str, Any] = {"ignore": Answer, "lease": lease, **PATIENT}
    shadow = Policy(failure_threshold=1, enforce=False)
    breakers = [make_breaker("closed", **options), half_open(make_breaker, **options)]
    for name, policy in {"shadow": shadow, "enforced": ONE, "slow": Policy(slow_call_duration=60)}.items():
        breakers.append(make_breaker(name, policy=policy, **options))
    breakers.append(make_breaker("judged", is_failure=boom, **options))
    outcomes = [int, boom, *map(raising, (Answer(), KeyboardInterrupt()))]
    if way == "call":  # which refuses the coroutine, and guards the generator
        outcomes += [coroutine_function, numbers]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a permit", ResourceWarning)
        for breaker in breakers:
            for func in outcomes * 2:
                with contextlib.suppress(Boom, Answer, KeyboardInterrupt, TypeError, CircuitOpenError):
                    one_call(breaker, way, func)
            breaker.close()
        gc.collect()
    assert lost == []


@pytest.mark.parametrize("way", WAYS)
def test_probes_leave_no_marks(way: str) -> None:
    """8,000 probes in one thread leave nothing behind in its context."""
    breaker = CircuitBreaker("marks", policy=Policy(failure_threshold=1, success_threshold=10**6, ttl=3600))
    breaker.force_open(0.001)
    wait_until(lambda: breaker.state == "half_open")
    for _ in range(8000):
        one_call(breaker, way, int)
        assert len(_probes.get()) == 0
    assert breaker.snapshot().state == "half_open"
    assert breaker.counts.successes == 8000


def test_blocks_that_end_in_another_context_leave_no_marks() -> None:
    """Whatever the context that a probe's block is left in, the marks of ended probes do not pile up."""
    breaker = CircuitBreaker("marks", policy=Policy(failure_threshold=1, success_threshold=10**6))
    breaker.force_open(0.001)
    wait_until(lambda: breaker.state == "half_open")
    for _ in range(100):
        permit = breaker.acquire().__enter__()
        contextvars.copy_context().run(permit.__exit__, None, None, None)
        assert len(_probes.get()) <= 1
    assert breaker.counts.successes == 100
    outer, inner = breaker.acquire().__enter__(), breaker.acquire()
    assert inner.probe is None  # part of the probe that runs
    inner.release()
    outer.__exit__(None, None, None)
    assert len(_probes.get()) == 0


@pytest.mark.parametrize("way", WAYS)
def test_breakers_that_ran_a_probe_are_freed(make_breaker: Make, way: str) -> None:
    """200 breakers that each ran a probe in this thread are freed once they are dropped."""
    breakers = [make_breaker(f"dropped-{number}", **STRICT) for number in range(200)]
    for breaker in breakers:
        breaker.force_open(0.001)
    for breaker in breakers:
        wait_until(lambda of=breaker: of.state == "half_open")
        one_call(breaker, way, int)
        assert breaker.state == "closed"
    dropped = [weakref.ref(breaker) for breaker in breakers]
    del breakers, breaker
    gc.collect()
    assert [one for one in dropped if one() is not None] == []


@pytest.mark.parametrize("shell", [CircuitBreaker, AsyncCircuitBreaker])
def test_no_closure_for_a_call(shell: Any) -> None:
    """call() defines no function of its own, for that would be made anew in every call."""
    for method in (shell.call, shell._call_with_permit, shell.acquire):
        assert not method.__code__.co_cellvars
        assert not [one for one in method.__code__.co_consts if isinstance(one, types.CodeType)]


# What counts as what


def test_other_exceptions_are_answers(make_breaker: Make) -> None:
    """An exception outside `failures` is an answer of the service, and ends a run of failures."""
    breaker = make_breaker(failures=(Boom, OSError), **STRICT)
    with pytest.raises(Boom):
        breaker.call(boom)
    assert failures(breaker) == 1
    with pytest.raises(Answer):
        breaker.call(raising(Answer()))
    assert failures(breaker) == 0


def test_answer_of_a_probe_closes(make_breaker: Make) -> None:
    """A probe that gets an answer, if an exception, closes the circuit."""
    breaker = half_open(make_breaker, failures=Boom)
    with pytest.raises(Answer):
        breaker.call(raising(Answer()))
    assert breaker.snapshot().state == "closed"


@pytest.mark.parametrize("ignore", [Answer, (KeyError, Answer)])
def test_ignored_exceptions(make_breaker: Make, ignore: Any) -> None:
    """An ignored exception leaves every counter as it was."""
    breaker = make_breaker(ignore=ignore, **STRICT)
    breaker.acquire().failure()
    before = counts(breaker)
    with pytest.raises(Answer):
        breaker.call(raising(Answer()))
    with pytest.raises(Answer), breaker.acquire():
        raise Answer
    assert counts(breaker) == before


NEITHER = [KeyboardInterrupt, asyncio.CancelledError, concurrent.futures.CancelledError, GeneratorExit, SystemExit]


@pytest.mark.parametrize("kind", NEITHER)
def test_cancellation(make_breaker: Make, kind: type[BaseException]) -> None:
    """A call that was cut short is neither success nor failure, even where all exceptions are failures."""
    breaker = make_breaker(failures=Exception, **STRICT)
    breaker.acquire().failure()
    before = counts(breaker)
    with pytest.raises(kind):
        breaker.call(raising(kind()))
    assert counts(breaker) == before


@pytest.mark.parametrize("kind", [*NEITHER, Answer])
def test_cancelled_probe(make_breaker: Make, kind: type[BaseException]) -> None:
    """A probe that was cut short or ignored gives its slot back at once."""
    breaker = half_open(make_breaker, ignore=Answer)
    for _ in range(3):
        with pytest.raises(kind):
            breaker.call(raising(kind()))
        with pytest.raises(kind), breaker.acquire():
            raise kind
    assert counts(breaker)[0] == "half_open"
    assert breaker.snapshot().probes_in_flight == 0


def test_is_failure(make_breaker: Make) -> None:
    """A result that the predicate calls a failure is handed over, and counts as one."""
    breaker = make_breaker(is_failure=lambda result: result >= 500, **STRICT)
    assert breaker.call(lambda: 503) == 503
    assert failures(breaker) == 1
    assert breaker.call(lambda: 404) == 404
    assert failures(breaker) == 0


def test_is_failure_with_a_lease(make_breaker: Make) -> None:
    """The predicate is asked on the fast path too."""
    breaker = make_breaker(is_failure=bool, policy=Policy(failure_threshold=3), lease=60, **PATIENT)
    for _ in range(3):
        breaker.call(lambda: 1)
    assert breaker.snapshot().state == "open"


@pytest.mark.parametrize("lease", [0, 60])
def test_predicate_that_raises(make_breaker: Make, lease: float) -> None:
    """An exception of the predicate is the caller's, and the call counts as nothing."""
    breaker = make_breaker(is_failure=boom, lease=lease, **PATIENT)
    breaker.acquire().failure()
    before = counts(breaker)
    with pytest.raises(Boom):
        breaker.call(int)
    breaker.flush()
    assert counts(breaker) == before


def test_predicate_that_raises_on_a_probe(make_breaker: Make) -> None:
    """A predicate that raises costs no probe slot."""
    breaker = half_open(make_breaker, is_failure=boom)
    with pytest.raises(Boom):
        breaker.call(int)
    assert (breaker.snapshot().state, breaker.snapshot().probes_in_flight) == ("half_open", 0)


# Generators


def numbers(end: BaseException | None = None) -> Iterator[Any]:
    """Yields what it is sent, and returns "done" or raises."""
    got = yield "first"
    with contextlib.suppress(LookupError):
        got = yield got
    got = yield "last"
    if end:
        raise end
    return "done"


def test_generator_runs_through(make_breaker: Make) -> None:
    """A guarded generator passes on what is sent and thrown, and its return value."""
    guarded = make_breaker(**STRICT)(numbers)
    assert inspect.isgeneratorfunction(guarded)
    results = []

    def outer() -> Iterator[Any]:
        results.append((yield from guarded()))

    generator = outer()
    assert next(generator) == "first"
    assert generator.send("sent") == "sent"
    assert generator.throw(LookupError()) == "last"
    assert next(generator, "end") == "end"
    assert results == ["done"]


@pytest.mark.parametrize("way", ["decorator", "call"])
def test_generator_failure(make_breaker: Make, way: str) -> None:
    """A failure inside a generator counts, however late it comes."""
    breaker = make_breaker(**STRICT)
    generator = breaker(numbers)(Boom()) if way == "decorator" else breaker.call(numbers, Boom())
    assert next(generator) == "first"
    assert failures(breaker) == 0
    with pytest.raises(Boom):
        list(generator)
    assert failures(breaker) == 1


@pytest.mark.parametrize("way", ["decorator", "call"])
def test_generator_success(make_breaker: Make, way: str) -> None:
    """A generator counts as one success, at its end."""
    breaker = half_open(make_breaker)
    generator = breaker(numbers)() if way == "decorator" else breaker.call(numbers)
    next(generator)
    assert (breaker.snapshot().state, breaker.snapshot().probes_in_flight) == ("half_open", 1)
    list(generator)
    assert breaker.snapshot().state == "closed"


@pytest.mark.parametrize("lease", [0, 60])
def test_generator_counts(make_breaker: Make, lease: float) -> None:
    """A decorated generator is one call: a success, a failure, or ignored when it is abandoned."""
    breaker = make_breaker(lease=lease, **PATIENT)
    guarded = breaker(numbers)
    list(guarded())
    with pytest.raises(Boom):
        list(guarded(Boom()))
    abandoned = guarded()
    next(abandoned)
    abandoned.close()
    guarded()  # never started
    assert nonzero(breaker.counts) == {"successes": 1, "failures": 1, "ignored": 1}


@pytest.mark.parametrize("lease", [0, 60])
def test_what_runs_later_is_one_call(make_breaker: Make, lease: float) -> None:
    """A generator that call() returns, and a context manager, count when they have run, and notify once."""
    events: list[Event] = []
    for options in ({}, {"on_call": [events.append]}):
        breaker = make_breaker(lease=lease, **options, **PATIENT)

        @breaker
        @contextlib.contextmanager
        def block() -> Iterator[int]:
            yield 1

        for _ in range(2):
            assert list(breaker.call(numbers)) == list(numbers())
            with block():
                pass
        breaker.call(numbers)  # never started
        assert nonzero(breaker.counts) == {"successes": 4}
    assert [event.kind for event in events] == ["success"] * 4


def test_what_runs_later_takes_no_slot_before_it_runs(make_breaker: Make) -> None:
    """In half open, the function that only makes a generator gives its slot back; the generator is the probe."""
    breaker = make_breaker(policy=Policy(failure_threshold=1, reset_timeout=0.001), **PATIENT)
    with pytest.raises(Boom):
        breaker.call(boom)
    wait_until(lambda: breaker.state == "half_open")
    probe = breaker.call(numbers)
    assert breaker.snapshot().probes_in_flight == 0
    list(probe)
    assert breaker.state == "closed"


def test_generator_result_is_judged(make_breaker: Make) -> None:
    """The predicate sees the return value of a generator."""
    seen: list[Any] = []
    list(make_breaker(is_failure=seen.append, **STRICT)(numbers)())
    assert seen == ["done"]


@pytest.mark.parametrize("end", ["close", "collect", "throw"])
def test_abandoned_generator(make_breaker: Make, end: str) -> None:
    """A generator that is closed, forgotten or cancelled gives its slot back."""
    breaker = half_open(make_breaker)
    generator = breaker(numbers)()
    next(generator)
    assert breaker.snapshot().probes_in_flight == 1
    if end == "close":
        generator.close()
    elif end == "throw":
        with pytest.raises(KeyboardInterrupt):
            generator.throw(KeyboardInterrupt)
    else:
        del generator
        gc.collect()
    assert (breaker.snapshot().state, breaker.snapshot().probes_in_flight) == ("half_open", 0)


@pytest.mark.parametrize("way", ["decorator", "call"])
def test_generator_never_started(make_breaker: Make, way: str) -> None:
    """A generator that never starts holds no slot, and one that starts too late is rejected."""
    breaker = half_open(make_breaker)
    generator = breaker(numbers)() if way == "decorator" else breaker.call(numbers)
    assert breaker.snapshot().probes_in_flight == 0
    breaker.force_open()
    with pytest.raises(CircuitOpenError):
        next(generator)


# Coroutines


async def coroutine_function() -> None:
    """Not for the sync breaker."""


async def async_generator_function() -> Any:
    """Not for the sync breaker either."""
    yield


@pytest.mark.parametrize("function", [coroutine_function, async_generator_function])
def test_decorating_a_coroutine_function(make_breaker: Make, function: Any) -> None:
    """The decorator refuses what it could not guard, and says what could."""
    with pytest.raises(TypeError, match="AsyncCircuitBreaker"):
        make_breaker(**STRICT)(function)


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("function", [coroutine_function, async_generator_function])
def test_calling_a_coroutine_function(make_breaker: Make, function: Any, hidden: bool, lease: float) -> None:
    """call() refuses a coroutine, also one that a lambda returns, and counts nothing."""
    breaker = make_breaker(lease=lease, **PATIENT)
    breaker.acquire().failure()
    before = counts(breaker)
    for _ in range(2):
        with pytest.raises(TypeError, match="AsyncCircuitBreaker"):
            breaker.call((lambda: function()) if hidden else function)
    breaker.flush()
    assert counts(breaker) == before


@pytest.mark.parametrize("function", [coroutine_function, async_generator_function])
def test_coroutine_as_a_probe(make_breaker: Make, function: Any) -> None:
    """A refused coroutine costs no probe slot."""
    breaker = half_open(make_breaker)
    with pytest.raises(TypeError, match="AsyncCircuitBreaker"):
        breaker.call(lambda: function())
    assert (breaker.snapshot().state, breaker.snapshot().probes_in_flight) == ("half_open", 0)


# Listeners


def test_events(make_breaker: Make) -> None:
    """Listeners receive the transitions and on_call every call, each event with the fields of its kind."""
    events: list[Event] = []
    changes: list[Event] = []
    calls: list[Event] = []
    breaker = make_breaker(
        listeners=[events.append, changes.append],
        on_call=[events.append, calls.append],
        policy=ONE,
        ignore=Answer,
        **STRICT,
    )
    breaker.call(int)
    with pytest.raises(Answer):
        breaker.call(raising(answer := Answer()))
    with pytest.raises(Boom):
        breaker.call(raising(failure := Boom()))
    with pytest.raises(CircuitOpenError):
        breaker.call(int)
    assert [event.kind for event in events] == ["success", "ignored", "failure", "state_change", "rejected"]
    assert [event.kind for event in changes] == ["state_change"]
    assert [event.kind for event in calls] == ["success", "ignored", "failure", "rejected"]
    assert {(event.breaker, event.instance) for event in events} == {("discovery", breaker.instance)}
    success, ignored, failed, change, rejected = events
    assert (success.exception, ignored.exception, failed.exception) == (None, answer, failure)
    assert success.generation == ignored.generation == failed.generation
    assert success == Event("success", "discovery", breaker.instance, generation=success.generation)
    assert (change.old, change.new, change.reason) == ("closed", "open", "failure_threshold")
    assert change.counts == {"failure_count": 1, "success_count": 0}
    assert change.source == breaker.snapshot().source
    assert change.generation == breaker.snapshot().generation > failed.generation
    assert rejected.retry_after is not None
    assert 3000 < rejected.retry_after <= 3600


def test_events_on_the_fast_path(make_breaker: Make) -> None:
    """With a long lease both kinds of listeners receive as much."""
    kinds: list[str] = []
    note = [lambda event: kinds.append(event.kind)]
    breaker = make_breaker(listeners=note, on_call=note, policy=ONE, lease=600, **PATIENT)
    for function in (int, int, boom, int, int):
        with contextlib.suppress(Boom, CircuitOpenError):
            breaker.call(function)
    assert kinds == ["success", "success", "failure", "state_change", "rejected", "rejected"]


def test_listener_that_raises(make_breaker: Make, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in a listener is logged, and reaches neither the call nor the next listener."""
    kinds: list[str] = []
    both = [boom, lambda event: kinds.append(event.kind)]
    breaker = make_breaker(listeners=both, on_call=both, **STRICT)
    assert breaker.call(int) == 0
    breaker.force_open()
    assert kinds == ["success", "state_change"]
    records = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(records) == 2
    assert all("'discovery'" in record.getMessage() and record.exc_info for record in records)


def test_listener_that_ends_the_program(make_breaker: Make) -> None:
    """A listener raises SystemExit, which reaches the caller: later events are delivered by the next call."""
    changes: list[str | None] = []

    def stop(event: Event) -> None:
        if event.kind == "failure":
            raise SystemExit

    breaker = make_breaker(policy=ONE, listeners=[lambda event: changes.append(event.new)], on_call=[stop], **STRICT)
    with pytest.raises(SystemExit):
        breaker.call(boom)
    with pytest.raises(CircuitOpenError):
        breaker.call(int)
    assert changes == ["open"]


def test_listener_that_calls_again(make_breaker: Make) -> None:
    """A listener of a failure resets the circuit that it has opened: events arrive in the order they happened."""
    changes: list[str | None] = []

    def restart(event: Event) -> None:
        if event.kind == "failure":
            breaker.reset()

    breaker = make_breaker(policy=ONE, listeners=[lambda event: changes.append(event.new)], on_call=[restart], **STRICT)
    with pytest.raises(Boom):
        breaker.call(boom)
    assert breaker.snapshot().state == "closed"
    assert changes == ["open", "closed"]


def test_coroutine_listener(make_breaker: Make) -> None:
    """The sync breaker refuses a listener that it could not await."""

    async def listener(event: Event) -> None: ...

    for option in ("listeners", "on_call"):
        with pytest.raises(Refused, match="AsyncCircuitBreaker"):
            make_breaker(**{option: [listener]})


def test_transition_is_logged(make_breaker: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A transition is logged once, with its cause."""
    with caplog.at_level(logging.INFO, "pybreaker_redis"):
        make_breaker(policy=ONE, **STRICT).acquire().failure()
    assert [record.getMessage() for record in caplog.records] == [
        "circuit breaker 'discovery': closed -> open (failure_threshold)"
    ]


# Counts


def test_counts_under_threads() -> None:
    """Eight threads count every call, and whoever reads meanwhile sees the counts grow."""
    breaker = CircuitBreaker("counted", lease=60, policy=Policy(failure_threshold=10**6))
    seen = [dataclasses.astuple(breaker.counts)]

    def work(_: int) -> None:
        for number in range(1000):
            with contextlib.suppress(Boom):
                one_call(breaker, WAYS[number % 5], boom if number % 10 < 5 else int)
            if number % 50 == 0:
                with reading:
                    seen.append(dataclasses.astuple(breaker.counts))

    reading = threading.Lock()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert nonzero(breaker.counts) == {"successes": 4000, "failures": 4000}
    assert all(new >= old for one, other in itertools.pairwise(seen) for old, new in zip(one, other, strict=True))


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("way", WAYS)
def test_calls_that_outlast_transitions_are_counted(make_breaker: Make, way: str, lease: float) -> None:
    """The success of a call counts in this process, however many transitions happened while it ran."""
    breaker = make_breaker(lease=lease, **PATIENT)
    breaker.call(int)

    def long() -> None:
        for _ in range(3):
            breaker.force_open()
            breaker.reset()
            breaker.call(int)

    one_call(breaker, way, long)
    assert nonzero(breaker.counts) == {"successes": 5}


@pytest.mark.parametrize("lease", [0, 60])
def test_calls_within_a_probe_are_counted(make_breaker: Make, lease: float) -> None:
    """A call that is part of a probe is counted in this process, and the probe's own outcome decides."""
    breaker = half_open(make_breaker, lease=lease)
    before = breaker.counts
    with breaker.acquire() as probe:
        assert probe.probe is not None
        breaker.call(int)
        with pytest.raises(Boom):
            breaker.call(boom)
        with breaker.acquire() as inner:
            assert (inner.probe, inner.generation) == (None, None)
        assert breaker.snapshot().state == "half_open"
    assert breaker.snapshot().state == "closed"
    assert breaker.counts == dataclasses.replace(before, successes=before.successes + 3, failures=before.failures + 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("lease", [0, 60])
def test_counts_in_a_forked_child(make_breaker: Make, lease: float) -> None:
    """A child counts its own calls from zero, and leaves the parent's counts alone."""
    breaker = make_breaker(lease=lease, policy=Policy(failure_threshold=10), **PATIENT)
    for func in (int, int, boom):
        with contextlib.suppress(Boom):
            breaker.call(func)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            first = breaker.counts
            breaker.call(int)
            code = 0 if (nonzero(first), nonzero(breaker.counts)) == ({}, {"successes": 1}) else 2
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert nonzero(breaker.counts) == {"successes": 2, "failures": 1}


# Looking and steering


def test_force_open(make_breaker: Make) -> None:
    """Forced open rejects, for the given duration."""
    breaker = make_breaker(**STRICT)
    breaker.force_open(1000)
    seen = breaker.snapshot()
    assert (breaker.snapshot().state, seen.forced) == ("open", "open")
    assert seen.retry_after is not None
    assert 900 < seen.retry_after <= 1000
    with pytest.raises(CircuitOpenError):
        breaker.call(int)


def test_force_open_ends(make_breaker: Make) -> None:
    """After a forced open a probe runs."""
    breaker = make_breaker(**STRICT)
    breaker.force_open(0.001)
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    assert breaker.call(int) == 0
    assert (breaker.snapshot().state, breaker.snapshot().forced) == ("closed", None)


def test_force_closed(make_breaker: Make) -> None:
    """Forced closed admits and counts nothing."""
    breaker = make_breaker(policy=ONE, **STRICT)
    breaker.acquire().failure()
    breaker.force_closed(1000)
    with pytest.raises(Boom):
        breaker.call(boom)
    seen = breaker.snapshot()
    assert (seen.state, seen.forced, seen.failure_count) == ("closed", "closed", 0)
    assert seen.forced_until is not None


def test_clear_forced(make_breaker: Make) -> None:
    """clear_forced() ends a forced state: open goes on with a probe, closed as closed."""
    breaker = make_breaker(policy=ONE, **STRICT)
    breaker.force_closed()
    breaker.clear_forced()
    assert (breaker.snapshot().state, breaker.snapshot().forced) == ("closed", None)
    breaker.force_open()
    breaker.clear_forced()
    assert breaker.call(int) == 0
    assert breaker.snapshot().state == "closed"


def test_reset(make_breaker: Make) -> None:
    """reset() closes, and outcomes of calls that run then do not count."""
    breaker = make_breaker(policy=ONE, **STRICT)
    running = breaker.acquire()
    breaker.acquire().failure()
    breaker.reset()
    assert (breaker.snapshot().state, failures(breaker)) == ("closed", 0)
    running.failure()
    assert (breaker.snapshot().state, failures(breaker)) == ("closed", 0)


def test_steering_ends_a_view(make_breaker: Make) -> None:
    """Who steers sees the effect at once, whatever the lease."""
    breaker = make_breaker(lease=600, **PATIENT)
    breaker.call(int)
    breaker.force_open()
    with pytest.raises(CircuitOpenError):
        breaker.call(int)
    breaker.reset()
    assert breaker.call(int) == 0


@pytest.mark.parametrize("duration", [0, -1, 0.0001, 31 * 86400, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize("action", ["force_open", "force_closed"])
def test_duration_out_of_range(make_breaker: Make, action: str, duration: Any) -> None:
    """A duration that makes no sense is refused, and changes nothing."""
    breaker = make_breaker(**STRICT)
    with pytest.raises(Refused, match="duration"):
        getattr(breaker, action)(duration)
    # not the generation: the link of an earlier test's breaker may still renew the document
    assert breaker.snapshot().forced is None
    assert breaker.history() == []


def test_history(make_breaker: Make) -> None:
    """The history has the transitions, newest first, with cause, counts and author."""
    breaker = make_breaker(policy=ONE, **STRICT)
    assert breaker.history() == []
    breaker.acquire().failure()
    breaker.reset()
    breaker.force_open()
    entries = breaker.history()
    assert [(entry.old, entry.new, entry.reason) for entry in entries] == [
        ("closed", "open", "forced"),
        ("open", "closed", "reset"),
        ("closed", "open", "failure_threshold"),
    ]
    assert [entry.failure_count for entry in entries] == [0, 1, 1]
    assert {entry.instance for entry in entries} == {breaker.instance}
    assert entries[0].generation > entries[1].generation > entries[2].generation
    assert entries[0].time >= entries[2].time > 1_700_000_000
    assert breaker.history(2) == entries[:2]


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "1", None])
def test_history_count(make_breaker: Make, count: Any) -> None:
    """history() wants a count of at least 1."""
    with pytest.raises(Refused, match="count"):
        make_breaker(**STRICT).history(count)


def test_flush(make_breaker: Make, client: redis.Redis) -> None:
    """Successes are gathered under a lease, and counted by flush()."""
    rate = Policy(error_rate_threshold=1, minimum_calls=10**6, window=3600)
    breaker = make_breaker(lease=600, policy=rate, **PATIENT)

    def gathered() -> bool:
        breaker.call(int)
        return stored_calls(breaker, client) < breaker.counts.successes

    wait_until(gathered)
    breaker.flush()
    wait_until(lambda: stored_calls(breaker, client) == breaker.counts.successes)


def test_a_success_after_a_failure_is_reported_at_once(make_breaker: Make) -> None:
    """A success that ends a run of failures waits for no lease and for no flush()."""
    breaker = make_breaker(lease=600, **PATIENT)
    breaker.acquire().failure()
    breaker.call(int)
    if breaker.snapshot().source == "memory":  # no other process has to know
        breaker.flush()
    wait_until(lambda: failures(breaker) == 0)


def test_close(make_breaker: Make) -> None:
    """close() reports what was gathered, and the breaker goes on."""
    breaker = make_breaker(lease=600, **PATIENT)
    breaker.acquire().failure()
    breaker.call(int)
    breaker.close()
    assert failures(breaker) == 0
    assert breaker.call(int) == 0


def test_snapshot(make_breaker: Make) -> None:
    """A snapshot has everything, and taking one stores nothing."""
    breaker = make_breaker(policy=ONE, **STRICT)
    empty = breaker.snapshot()
    assert (empty.name, empty.state, empty.generation, empty.failure_count) == ("discovery", "closed", 0, 0)
    assert (empty.last_failure_time, empty.opened_at, empty.retry_after, empty.forced) == (None, None, None, None)
    assert breaker.snapshot() == empty
    breaker.acquire().failure()
    seen = breaker.snapshot()
    assert (seen.state, seen.failure_count, seen.trips, seen.probes_in_flight) == ("open", 1, 1, 0)
    assert (seen.forced, seen.forced_until) == (None, None)
    assert seen.last_failure_time == seen.opened_at
    assert isinstance(seen.opened_at, int)
    assert seen.generation > 0


def test_source(client: redis.Redis) -> None:
    """A snapshot says where the state lives."""
    assert CircuitBreaker("here", redis=client, **STRICT).snapshot().source == "redis"
    assert CircuitBreaker("here", **STRICT).snapshot().source == "memory"


def test_state_is_what_was_read(client: redis.Redis) -> None:
    """`state` is what this process last read; snapshot() asks."""
    held = CircuitBreaker("held", redis=client, lease=600, **PATIENT)
    held.call(int)
    held.flush()  # its first success is reported at once, and the reply to that is read, too
    CircuitBreaker("held", redis=client, policy=ONE, **STRICT).force_open()
    assert (held.state, held.snapshot().state) == ("closed", "open")


# Options


def test_shared_through_redis(client: redis.Redis, server: Any) -> None:
    """Two breakers of one name share their state, made from a client or a URL; another name does not."""
    one = CircuitBreaker("shared", redis=client, policy=ONE, **STRICT)
    one.acquire().failure()
    assert CircuitBreaker("shared", redis=server.url, **STRICT).snapshot().state == "open"
    assert CircuitBreaker("other", redis=server.url, **STRICT).snapshot().state == "closed"


def test_client_that_decodes(server: Any, client: redis.Redis) -> None:
    """A client made with decode_responses serves as well."""
    decoding = redis.Redis.from_url(server.url, decode_responses=True)
    breaker = CircuitBreaker("decoded", redis=decoding, policy=ONE, **STRICT)
    breaker.acquire().failure()
    assert [entry.new for entry in breaker.history()] == ["open"]
    decoding.close()


def test_constructor_sends_nothing(client: redis.Redis) -> None:
    """A new breaker leaves no trace in Redis."""
    CircuitBreaker("silent", redis=client)
    assert client.keys() == []


def test_document_is_json(client: redis.Redis) -> None:
    """The stored document is JSON, under the prefix."""
    breaker = CircuitBreaker("plain", redis=client, prefix="pre", policy=ONE, **STRICT)
    breaker.acquire().failure()
    raw: Any = client.get("pre:plain:state")
    assert json.loads(raw)["state"] == "open"
    assert client.exists("{pre:plain:state}:history") == 1
    assert client.keys("circuit_breaker*") == []


def test_corrupt_document(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A document that nobody can read is logged and counted; the breaker starts closed."""
    breaker = CircuitBreaker("corrupt", redis=client, **STRICT)
    client.set(breaker.keys.state, "{no json")
    assert breaker.call(int) == 0
    assert breaker._corrupt_documents >= 1
    assert breaker.keys.state in caplog.text


@pytest.mark.parametrize("name", ["", "a{b", "a}b", "x" * 513, "\ud800", None, 1, b"bytes"])
def test_bad_names(make_breaker: Make, name: Any) -> None:
    """A name that cannot be a key is refused, and so is such a prefix."""
    with pytest.raises(Refused):
        make_breaker(name)
    with pytest.raises(Refused):
        make_breaker(prefix=name)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lease", -0.1),
        ("lease", 3601),
        ("lease", float("nan")),
        ("lease", True),
        ("lease", "0.1"),
        ("lease", None),
        ("redis_timeout", 0),
        ("redis_timeout", float("inf")),
        ("redis_timeout", None),
        ("on_redis_failure", "half_open"),
        ("on_redis_failure", None),
        ("host", ""),
        ("host", "h" * 201),
        ("host", "h\u00f6st"),
        ("host", "a\nb"),
        ("host", "a\n"),
        ("host", 1),
    ],
)
def test_bad_options(make_breaker: Make, option: str, value: Any) -> None:
    """An option that makes no sense is refused by name."""
    with pytest.raises(Refused, match=option):
        make_breaker(**{option: value})


@pytest.mark.parametrize("option", ["failures", "ignore"])
@pytest.mark.parametrize("value", ["ValueError", 404, int])
def test_what_is_no_exception_is_shown(option: str, value: Any) -> None:
    """The error shows the whole value, not the first letter of a text."""
    with pytest.raises(Refused, match=f"^{option} must be exception types, .* not {re.escape(repr(value))}$"):
        CircuitBreaker("wrong", **{option: value})


@pytest.mark.parametrize("wrong", [1, object(), redis.asyncio.Redis(), ["redis://localhost"]])
def test_wrong_clients(wrong: Any) -> None:
    """What is no sync client is refused, a client of asyncio too."""
    with pytest.raises(Refused, match="redis must be"):
        CircuitBreaker("wrong", redis=wrong)


def test_repr_and_names(make_breaker: Make) -> None:
    """A breaker shows its name."""
    assert repr(make_breaker("search")) == "<CircuitBreaker 'search'>"


@pytest.mark.parametrize("option", ["name", "policy", "host"])
def test_options_are_read_only(make_breaker: Make, option: str) -> None:
    """An option that is assigned would take effect in part, or not at all: it is refused, and stays."""
    breaker = make_breaker(policy=ONE)
    before = getattr(breaker, option)
    with pytest.raises(AttributeError, match=option):
        setattr(breaker, option, Policy())
    assert getattr(breaker, option) is before


@pytest.mark.parametrize("field", ["failure_threshold", "success_threshold", "half_open_max_calls"])
@pytest.mark.parametrize("value", [0, -1, 10**10, 1.0, True, "1", None])
def test_policy_counts(field: str, value: Any) -> None:
    """Counts of a policy are integers of at least 1."""
    with pytest.raises(Refused, match=field):
        Policy(**{field: value})


@pytest.mark.parametrize("field", ["reset_timeout", "probe_timeout", "ttl"])
@pytest.mark.parametrize("value", [0, -1.0, 366 * 86400, float("nan"), float("inf"), True, "1", None])
def test_policy_durations(field: str, value: Any) -> None:
    """Durations of a policy are finite numbers of seconds above 0."""
    with pytest.raises(Refused, match=field):
        Policy(**{field: value})


def test_policy_errors_are_value_errors() -> None:
    """A refused option may be caught as ValueError."""
    with pytest.raises(ValueError, match="ttl"):
        Policy(ttl=0.5)


@pytest.mark.parametrize("given", ["url", "client"])
def test_breakers_share_the_connections_of_a_client(server: EmbeddedServer, client: redis.Redis, given: str) -> None:
    """Fifty breakers that were given the same client, or URL, and ask one after the other need one connection."""
    url = f"{server.url}?client_name=sharing-{given}"
    target = url if given == "url" else redis.Redis.from_url(url)
    breakers = [CircuitBreaker(f"shared-{number}", redis=target, lease=0) for number in range(50)]

    def connections() -> int:
        return sum(one["name"] == f"sharing-{given}" for one in client.client_list())

    for breaker in breakers:
        assert breaker.call(int, "5") == 5
    assert connections() == 1
    breakers[0].close()  # the others open another
    assert [breaker.call(int, "5") for breaker in breakers] == [5] * 50
    for breaker in breakers:
        breaker.close()
    assert all(breaker.snapshot().source == "redis" for breaker in breakers)
    del breaker, breakers, target
    gc.collect()
    wait_until(lambda: connections() == 0)


def test_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of threads, or at the interpreter's end, an outage goes on locally, and the call is as it was."""
    no_threads(monkeypatch)
    breaker = CircuitBreaker("threads", redis="redis://127.0.0.1:1")
    for _ in range(3):
        assert breaker.call(int, "5") == 5
        breaker._redis.link.outage(breaker._line).give_up()  # a retry is due
        with pytest.raises(Boom):
            breaker.call(boom)
    assert breaker.snapshot().source == "local"


def test_without_threads_the_caller_refreshes(monkeypatch: pytest.MonkeyPatch, server: EmbeddedServer) -> None:
    """Where no thread can start, a call reads the state itself, reports, and notifies the listeners."""
    no_threads(monkeypatch)
    received: list[Event] = []
    rate = Policy(failure_threshold=2, error_rate_threshold=1, minimum_calls=10**6)
    options: dict[str, Any] = {"policy": rate, "lease": 0.01, **PATIENT}
    breaker = CircuitBreaker("no threads", redis=server.url, listeners=[received.append], **options)
    other = CircuitBreaker("no threads", redis=server.url, **STRICT)
    other.reset()
    wait_until(lambda: breaker.call(int) == 0 and other.snapshot().calls > 1)
    breaker.acquire().failure()
    wait_until(lambda: breaker.call(int) == 0 and other.snapshot().failure_count == 0)
    other.force_open()

    def rejected() -> bool:
        try:
            breaker.call(int)
        except CircuitOpenError:
            return True
        return False

    wait_until(rejected)
    breaker.reset()
    assert [event.reason for event in received] == ["reset"]
    assert breaker.call(int, "5") == 5


def test_groups_of_exceptions() -> None:
    """A group counts as the worst of what it holds: a failure, else an answer, else nothing."""
    breaker = CircuitBreaker(
        "groups", failures=[ConnectionError], ignore=[KeyError], policy=Policy(failure_threshold=9)
    )

    def fail(*errors: Exception) -> int:
        with pytest.raises(ExceptionGroup):
            breaker.call(_raise, ExceptionGroup("of a TaskGroup", errors))
        breaker.flush()
        return breaker.snapshot().failure_count

    def _raise(error: Exception) -> None:
        raise error

    assert fail(ValueError(), ExceptionGroup("inner", [KeyError(), ConnectionError()])) == 1
    assert fail(KeyError()) == 1
    assert fail(KeyError(), ValueError()) == 0


@pytest.mark.parametrize("failures", [Exception, lambda error: True], ids=["types", "a function"])
def test_a_group_of_what_does_not_count(failures: Any) -> None:
    """Rejections of nested calls, as during a ramp, and ignored errors count for nothing in a group, too."""
    breaker = CircuitBreaker("groups", failures=failures, ignore=KeyError)
    rejected = CircuitOpenError("groups", "closed", 1.0)

    def fan_out(*errors: Exception) -> None:
        raise ExceptionGroup("of a TaskGroup", errors)

    for errors in ([rejected], [KeyError()], [rejected, ExceptionGroup("inner", [KeyError()])]):
        with pytest.raises(ExceptionGroup):
            breaker.call(fan_out, *errors)
    assert breaker.counts.failures == 0
    assert breaker.counts.ignored == 3
    for errors in ([rejected, ValueError()], [CircuitOpenError("another", "open", 1.0)]):
        with pytest.raises(ExceptionGroup):
            breaker.call(fan_out, *errors)
    assert breaker.counts.failures == 2


def test_a_reply_from_before_the_view_was_dropped(server: EmbeddedServer) -> None:
    """What was asked before the view was dropped may have missed a trip: it does not become the view."""
    breaker = CircuitBreaker("overtaken", redis=server.url, **PATIENT)
    exchange, other = breaker._redis.exchange, CircuitBreaker("overtaken", redis=server.url, **PATIENT)

    def late(commands: Any) -> Any:
        replies = exchange(commands)
        breaker._redis.exchange = exchange
        other.force_open(3000)
        breaker._view.drop()
        return replies

    breaker._redis.exchange = late
    with contextlib.suppress(CircuitOpenError):
        breaker.call(int)
    with pytest.raises(CircuitOpenError):
        breaker.call(int)


def test_a_call_reported_slow_before_its_override_ended_counts_once(make_breaker: Make) -> None:
    """A call was reported as slow while it ran; durations are no longer measured at its end: it is one call."""
    rate = Policy(failure_threshold=10**6, error_rate_threshold=0.9, minimum_calls=10**6, window=3600)
    breaker = make_breaker(policy=rate, **STRICT)
    breaker.set_policy(slow_call_duration=0.001)
    permit = breaker.acquire()
    others = 0
    while not breaker.snapshot().slow:
        breaker.call(int)
        others += 1
    breaker.clear_policy()
    permit.failure()
    seen = breaker.snapshot()
    assert (seen.calls, seen.failures) == (others + 1, 1)


def test_a_circuit_that_another_program_opened(client: redis.Redis, server: EmbeddedServer) -> None:
    """The five contract fields alone: it stays open for the policy's reset_timeout, whatever asks first."""
    breaker = CircuitBreaker("gateway", redis=server.url, policy=Policy(reset_timeout=3600.0 / 7), **PATIENT)
    now = client.time()[0]
    opened = {"state": "open", "failure_count": 9, "success_count": 0, "last_failure_time": now, "opened_at": now}
    client.set(breaker.keys.state, json.dumps(opened))
    with pytest.raises(CircuitOpenError) as rejection:
        breaker.call(int)
    assert 100 < rejection.value.retry_after <= 515
    short = CircuitBreaker("gateway-2", redis=server.url, policy=Policy(reset_timeout=2.0), **PATIENT)
    client.set(short.keys.state, json.dumps(opened))
    with contextlib.suppress(CircuitOpenError):
        short.call(int)
    assert short.snapshot().retry_after is not None
    assert json.loads(client.get(short.keys.state)).get("open_ms", 2000) == 2000


def test_history_that_others_wrote(client: redis.Redis, server: EmbeddedServer) -> None:
    """Entries that make no sense are passed over."""
    breaker = CircuitBreaker("scribbled", redis=server.url, **PATIENT)
    breaker.force_open()
    client.xadd(breaker.keys.history, {"a": "b"})
    client.xadd(breaker.keys.history, {"time_ms": "soon"})
    assert [entry.new for entry in breaker.history()] == ["open"]


def test_a_user_without_xadd_leaves_the_history(client: redis.Redis, server: EmbeddedServer) -> None:
    """Only what is no stream is deleted from the history's key."""
    CircuitBreaker("no-xadd", redis=server.url, **PATIENT).force_open()
    client.acl_setuser("scribe", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-xadd"])
    path = server.url.removeprefix("unix://")
    breaker = CircuitBreaker(
        "no-xadd", redis=redis.Redis(unix_socket_path=path, username="scribe", password="x"), **PATIENT
    )
    breaker.reset()
    assert (breaker.snapshot().state, len(breaker.history())) == ("closed", 1)
    client.acl_deluser("scribe")


def test_the_end_of_a_forced_state_reaches_every_watcher(server: EmbeddedServer) -> None:
    """clear_forced() is no transition, and yet a watched view does not outlast it."""
    policy = Policy(reset_timeout=0.01)
    breaker = CircuitBreaker("cleared", redis=server.url, policy=policy, lease=3600, **PATIENT)
    operator = CircuitBreaker("cleared", redis=server.url, policy=policy, redis_timeout=21)  # has a link of its own
    with breaker.watch() as watch:
        wait_until(lambda: watch.active)
        operator.force_open()
        wait_until(lambda: breaker.state == "open")
        operator.clear_forced()

        def admitted() -> bool:
            with contextlib.suppress(CircuitOpenError):
                return bool(breaker.call(int, "5"))
            return False

        wait_until(admitted)
        assert watch.active


@pytest.mark.parametrize("shell", [CircuitBreaker, AsyncCircuitBreaker])
def test_a_breaker_takes_attributes(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """People note something about a breaker, and tests replace its methods; so do subclasses."""
    subclass = type("Mine", (shell,), {"team": "search"})
    for breaker in (shell("a"), subclass("a")):
        assert vars(breaker) == {}  # all else has slots: there may be a breaker for each tenant
        breaker.owner = "ann"
        monkeypatch.setattr(breaker, "reset", lambda: "replaced")
        assert (breaker.owner, breaker.reset()) == ("ann", "replaced")
        monkeypatch.undo()
        assert "reset" not in vars(breaker)
    assert subclass("a").team == "search"
