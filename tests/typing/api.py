"""What a user's type checker sees: checked by `mypy --strict`, never run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import assert_type

import aiohttp
import flask
import grpc
import httpx
import httpx2
import requests
import stamina
import tenacity
from django.http import HttpRequest, HttpResponse
from redis import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import ASGIApp

import pybreaker_redis.compat.circuitbreaker as circuitbreaker
import pybreaker_redis.compat.pybreaker as pybreaker
import pybreaker_redis.integrations.aiohttp as integrations_aiohttp
import pybreaker_redis.integrations.django as integrations_django
import pybreaker_redis.integrations.flask as integrations_flask
import pybreaker_redis.integrations.httpx as integrations_httpx
import pybreaker_redis.integrations.httpx2 as integrations_httpx2
import pybreaker_redis.integrations.requests as integrations_requests
import pybreaker_redis.integrations.starlette as integrations_starlette
from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    AsyncPermit,
    AsyncWatch,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerManager,
    CircuitOpenError,
    Classification,
    Clock,
    Config,
    ConfigError,
    Counts,
    Event,
    EventKind,
    ForcedStateError,
    HistoryEntry,
    Listener,
    Permit,
    PermitError,
    Policy,
    PolicyError,
    RedisUnavailableError,
    Snapshot,
    State,
    Watch,
)
from pybreaker_redis.config import load
from pybreaker_redis.embedded import EmbeddedServer, EmbeddedServerError, serve
from pybreaker_redis.instrumentation.logging import LoggingListener
from pybreaker_redis.instrumentation.otel import OpenTelemetryMetrics, OpenTelemetrySpans
from pybreaker_redis.instrumentation.prometheus import PrometheusMetrics
from pybreaker_redis.integrations import retry_after_header
from pybreaker_redis.integrations.aiohttp import CircuitOpenClientError, breaker_middleware, is_callers_fault
from pybreaker_redis.integrations.celery import BreakerTask
from pybreaker_redis.integrations.grpc import (
    FAILURE_CODES,
    BreakerInterceptor,
    CircuitOpenAioRpcError,
    CircuitOpenRpcError,
    FailedCallError,
    aio_interceptors,
)
from pybreaker_redis.integrations.requests import BreakerAdapter, CircuitOpenConnectionError
from pybreaker_redis.integrations.stamina import after_open, unless_open
from pybreaker_redis.integrations.tenacity import retry_unless_open, wait_until_probe
from pybreaker_redis.testing import Breakers, FakeClock, SettableState, aset_state, set_state
from pybreaker_redis.web import breakers_app


def on_event(event: Event) -> None:
    assert_type(event.breaker, str)
    assert_type(event.instance, str)
    assert_type(event.old, State | None)
    assert_type(event.new, State | None)
    assert_type(event.reason, str | None)
    assert_type(event.generation, int | None)
    assert_type(event.counts, dict[str, int] | None)
    assert_type(event.retry_after, float | None)
    assert_type(event.exception, BaseException | None)
    assert_type(event.slow, bool | None)
    assert_type(event.enforced, bool | None)
    assert_type(event.error, str | None)
    kind: EventKind = event.kind
    if kind == "state_change":
        print(event.new)


class ApiError(Exception):
    status: int


def is_server_error(error: ApiError) -> bool:
    return error.status >= 500


CircuitBreaker("discovery", failures=is_server_error, ignore=lambda error: error.status == 404)
Classification(failures=lambda error: error.status >= 500, ignore=is_server_error)
CircuitBreaker("discovery", failures=3)  # type: ignore[arg-type]
listening: list[Listener] = [on_event, print]


class Collector:
    def __call__(self, event: Event) -> str:
        return event.kind


in_memory = CircuitBreaker("discovery")
by_url = CircuitBreaker("discovery", redis="redis://localhost")
breaker = CircuitBreaker(
    "discovery",
    redis=Redis(),
    policy=Policy(failure_threshold=20, success_threshold=2, failures_in_window=9, probe_failure_threshold=2),
    lease=0.5,
    failures=(OSError, ValueError),
    ignore=KeyError,
    is_failure=lambda result: result is None,
    retry_after=lambda ended: 7.5 if isinstance(ended, OSError) else None,
    listeners=[on_event, Collector(), lambda event: event.kind],
    on_redis_failure="open",
    prefix="circuit_breaker",
    on_call=(on_event, Collector()),
)
CircuitBreaker("discovery", on_redis_failure="maybe")  # type: ignore[arg-type]
CircuitBreaker("discovery", on_call=on_event)  # type: ignore[arg-type]
CircuitBreaker("discovery", redis=None, polcy=Policy())  # type: ignore[call-arg]
Policy(failure_threshold="5")  # type: ignore[arg-type]


@breaker
def search(query: str, *, limit: int = 10) -> list[str]:
    return [query] * limit


assert_type(search("x", limit=3), list[str])
search(1)  # type: ignore[arg-type]
search("x", pages=2)  # type: ignore[call-arg]


@breaker
def pages(count: int) -> Iterator[bytes]:
    yield b"" * count


assert_type(pages(2), Iterator[bytes])


def nothing(rejected: CircuitOpenError) -> None:
    print(rejected.retry_after)


@breaker(fallback=nothing)
def found(query: str) -> str:
    return query


@breaker(fallback=lambda rejected: [])
def found_all(query: str) -> list[str]:
    return [query]


class Shop:
    @breaker(fallback=lambda rejected: None)
    def price(self, article: int) -> float:
        return 1.5 * article

    @breaker
    def name(self, article: int) -> str:
        return str(article)

    @classmethod
    @breaker
    def cheapest(cls, article: int) -> str:
        return str(article)

    @breaker
    @classmethod
    def dearest(cls, article: int) -> str:
        return str(article)

    @staticmethod
    @breaker
    def code(article: int) -> str:
        return str(article)

    @breaker
    @staticmethod
    def label(article: int) -> str:
        return str(article)


assert_type(Shop().name(7), str)
assert_type(Shop.cheapest(7), str)
assert_type(Shop.dearest(7), str)
assert_type(Shop.code(7), str)
assert_type(Shop.label(7), str)
Shop().name("x")  # type: ignore[arg-type]
Shop.dearest("x")  # type: ignore[arg-type]
assert_type(found("x"), str | None)
all_of_them: list[str] = found_all("x")
assert_type(Shop().price(7), float | None)
found(1)  # type: ignore[arg-type]
breaker(fallback=3)  # type: ignore[call-overload]


def length(text: str, times: int = 1) -> int:
    return len(text) * times


assert_type(breaker.call(length, "x"), int)
assert_type(breaker.call(length, "x", times=2), int)
assert_type(breaker.call(lambda: 1.5), float)
breaker.call(length, 1)  # type: ignore[arg-type]
breaker.call(length)  # type: ignore[call-arg]


def block() -> int:
    with breaker.acquire() as permit:
        assert_type(permit, Permit)
        permit.failure(OSError("refused"))
        permit.release()
    return 1  # a block may end by an exception, but never swallows one: this line is reached


def returns_from_a_block() -> int:
    with breaker.acquire():
        return 1


def no_block_of_the_breaker() -> None:
    with breaker:  # type: ignore[attr-defined]
        pass


def two_steps() -> None:
    permit = breaker.acquire()
    assert_type(permit, Permit)
    assert_type(permit.settled, bool)
    assert_type(permit.probe, int | None)
    assert_type(permit.generation, int | None)
    assert_type(permit.started, float)
    permit.success()
    permit.failure(ValueError())
    permit.failure()
    permit.release()
    with permit as entered:
        assert_type(entered, Permit)


def looking(count: int) -> None:
    assert_type(breaker.name, str)
    assert_type(breaker.host, str)
    assert_type(breaker.policy, Policy)
    breaker.policy = Policy()  # type: ignore[misc]
    assert_type(breaker.state, str)
    assert_type(breaker.counts, Counts)
    assert_type(breaker.counts.slow_successes, int)
    assert_type(breaker.counts.shadow_rejected, int)
    snapshot = breaker.snapshot()
    assert_type(snapshot, Snapshot)
    assert_type(snapshot.name, str)
    assert_type(snapshot.state, State)
    assert_type(snapshot.generation, int)
    assert_type(snapshot.failure_count, int)
    assert_type(snapshot.success_count, int)
    assert_type(snapshot.last_failure_time, int | None)
    assert_type(snapshot.opened_at, int | None)
    assert_type(snapshot.retry_after, float | None)
    assert_type(snapshot.reason, str | None)
    assert_type(snapshot.changed_at, float | None)
    assert_type(snapshot.error, str | None)
    snapshot.state = "open"  # type: ignore[misc]
    entries = breaker.history(count=count)
    assert_type(entries, list[HistoryEntry])
    assert_type(entries[0].old, State)
    assert_type(entries[0].new, State)
    assert_type(entries[0].time, float)
    assert_type(entries[0].reason, str)


def following() -> None:
    """A later state is another one, whatever an earlier assertion says; else what follows counts as unreachable."""
    assert breaker.state == "closed"
    breaker.force_open()
    assert breaker.state == "open"


def steering() -> None:
    breaker.force_open()
    breaker.force_open(duration=60)
    breaker.force_closed(duration=0.5)
    breaker.clear_forced()
    breaker.probe()
    breaker.reset()
    breaker.flush()
    breaker.set_policy(reset_timeout=10, enforce=False, duration=60)
    breaker.clear_policy()
    with breaker.watch() as watch:
        assert_type(watch, Watch)
        assert_type(watch.active, bool)
    breaker.watch().close()


def policies() -> None:
    policy = Policy(error_rate_threshold=0.5, slow_call_duration=None, quorum=3, enforce=False)
    assert_type(policy.error_rate_threshold, float | None)
    seen = breaker.snapshot()
    assert_type(seen.policy, Policy)
    assert_type(seen.health, int)
    assert_type(seen.failure_rate, float | None)
    assert_type(seen.isolated, bool)


def rejected() -> float:
    try:
        search("x")
    except CircuitOpenError as error:
        assert_type(error.name, str)
        assert_type(error.retry_after, float)
        assert_type(error.reason, str | None)
        assert_type(error.error, str | None)
        print(error.state)
        return error.retry_after
    except CircuitBreakerError:
        raise
    return 0.0


aio = AsyncCircuitBreaker("discovery", redis="redis://localhost", lease=0.5, listeners=[on_event])


@aio
async def fetch(query: str, *, limit: int = 10) -> list[str]:
    return [query] * limit


@aio
async def stream(query: str) -> AsyncIterator[bytes]:
    yield query.encode()


async def cached(rejected: CircuitOpenError) -> int:
    return 1


async def cached_chunks(rejected: CircuitOpenError) -> AsyncIterator[str]:
    yield rejected.name


async def cached_list(rejected: CircuitOpenError) -> list[str]:
    return [rejected.name]


@aio(fallback=cached)
async def fetch_or_cached(query: str) -> bytes:
    return query.encode()


@aio(fallback=nothing)
async def fetch_or_nothing(query: str) -> bytes:
    return query.encode()


@aio(fallback=lambda rejected: [])
async def fetch_all(query: str) -> list[str]:
    return [query]


@aio(fallback=cached_chunks)
async def stream_or_cached(query: str) -> AsyncIterator[bytes]:
    yield query.encode()


@aio(fallback=cached_list)
async def stream_or_list(query: str) -> AsyncIterator[bytes]:
    yield query.encode()


@aio(fallback=nothing)
@contextlib.asynccontextmanager
async def connection(query: str) -> AsyncIterator[bytes]:
    yield query.encode()


class AsyncShop:
    @aio(fallback=nothing)
    async def price(self, article: int) -> float:
        return 1.5 * article

    @aio
    async def name(self, article: int) -> str:
        return str(article)

    @classmethod
    @aio
    async def cheapest(cls, article: int) -> str:
        return str(article)

    @aio
    @staticmethod
    async def code(article: int) -> str:
        return str(article)


async def methods() -> None:
    assert_type(await AsyncShop().name(7), str)
    assert_type(await AsyncShop.cheapest(7), str)
    assert_type(await AsyncShop.code(7), str)


async def fallbacks() -> None:
    assert_type(await fetch_or_cached("x"), bytes | int)
    assert_type(await fetch_or_nothing("x"), bytes | None)
    all_of_them: list[str] = await fetch_all("x")
    print(all_of_them)
    async for chunk in stream_or_cached("x"):
        assert_type(chunk, bytes | str)
    async for chunk in stream_or_list("x"):
        assert_type(chunk, bytes | str)
    async with connection("x") as connected:
        assert_type(connected, bytes)
    assert_type(await AsyncShop().price(7), float | None)
    aio(fallback=nothing)(length)  # type: ignore[arg-type]
    aio(fallback=3)  # type: ignore[call-overload]


async def awaiting() -> None:
    assert_type(await fetch("x", limit=2), list[str])
    await fetch(1)  # type: ignore[arg-type]
    await aio.call(fetch, "x", limt=2)  # type: ignore[call-arg]
    assert_type(await aio.call(fetch, "x"), list[str])
    async for chunk in stream("x"):
        assert_type(chunk, bytes)
    async with aio.acquire() as block:
        assert_type(block, AsyncPermit)
        await block.failure(OSError())
    async with await aio.acquire() as entered:
        assert_type(entered, AsyncPermit)
    permit = await aio.acquire()
    assert_type(permit, AsyncPermit)
    await permit.success()
    aio.acquire().success()  # type: ignore[attr-defined]
    assert_type(aio.state, str)
    assert_type(aio.counts, Counts)
    assert_type(await aio.snapshot(), Snapshot)
    assert_type(await aio.history(count=2), list[HistoryEntry])
    await aio.force_open(duration=60, operator="ann", note="repair")
    await aio.flush()
    await aio.set_policy(window=10)
    await aio.clear_forced()
    await aio.probe(note="repaired")
    async with await aio.watch() as watch:
        assert_type(watch, AsyncWatch)
    await watch.close()


manager = CircuitBreakerManager.with_redis(
    Config(services={"discovery": Policy()}), listeners=[on_event], on_call=[on_event]
)
assert_type(manager, CircuitBreakerManager)
assert_type(manager.call("discovery", length, "x", times=2), int)
manager.call("discovery", length, 1)  # type: ignore[arg-type]
assert_type(manager.get_or_create("discovery"), CircuitBreaker)
assert_type(manager.get_state("discovery"), State)
assert_type(manager.get_all_states(), dict[str, State])
CircuitBreakerManager.with_redis(lisnteners=[on_event])  # type: ignore[call-arg]
CircuitBreakerManager.with_redis(failures=3)  # type: ignore[arg-type]
CircuitBreakerManager(polcy=Policy())  # type: ignore[call-arg]
assert_type(CircuitBreakerManager(redis="redis://localhost"), CircuitBreakerManager)
CircuitBreakerManager("gateway.yaml")
CircuitBreakerManager({"circuit_breaker": {}})
CircuitBreakerManager(3)  # type: ignore[arg-type]
Config(services={"discovery": 3})  # type: ignore[dict-item]


async def managed() -> None:
    async with AsyncCircuitBreakerManager.with_redis() as aio_manager:
        assert_type(await aio_manager.call("discovery", fetch, "x", limit=2), list[str])
        assert_type(aio_manager.get_or_create("discovery"), AsyncCircuitBreaker)
        assert_type(await aio_manager.get_all_states(), dict[str, State])


# Other libraries' interfaces


class OnChange(pybreaker.CircuitBreakerListener):
    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,
        old_state: pybreaker.CircuitBreakerState | None,
        new_state: pybreaker.CircuitBreakerState,
    ) -> None:
        assert_type(new_state.name, str)


compatible = pybreaker.CircuitBreaker(
    fail_max=1,
    reset_timeout=1000,
    exclude=[KeyError, lambda error: isinstance(error, RuntimeError)],
    listeners=[OnChange()],
    state_storage=pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, Redis(), "discovery", lease=0.5, adopt=True),
)
in_process = pybreaker.CircuitBreaker(state_storage=pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED))


@compatible
def compatible_length(text: str) -> int:
    return len(text)


@compatible(__pybreaker_call_async=True)
async def compatible_lookup(text: str) -> int:
    return len(text)


@circuitbreaker.circuit
def circuit_length(text: str) -> int:
    return len(text)


@circuitbreaker.circuit(failure_threshold=3, expected_exception=ConnectionError)
async def circuit_lookup(text: str) -> int:
    return len(text)


async def use_compatible() -> None:
    assert_type(compatible.call(compatible_length, "x"), int)
    assert_type(compatible_length("x"), int)
    assert_type(await compatible_lookup("x"), int)
    assert_type(await compatible.call(compatible_lookup, "x"), int)
    assert_type(compatible.state.name, str)
    assert_type(compatible.fail_counter, int)
    compatible.fail_max = 3
    assert_type([pybreaker.STATE_CLOSED, pybreaker.STATE_OPEN, pybreaker.STATE_HALF_OPEN], list[str])
    try:
        with compatible.calling():
            compatible.open()
    except pybreaker.CircuitBreakerError as error:
        assert_type(error.breaker, pybreaker.CircuitBreaker | None)
    circuitbreaker.configure("redis://localhost", lease=1)
    assert_type(circuit_length("x"), int)
    assert_type(await circuit_lookup("x"), int)
    assert_type(circuitbreaker.CircuitBreakerMonitor.get("x"), circuitbreaker.CircuitBreaker | None)
    states = [circuitbreaker.STATE_CLOSED, circuitbreaker.STATE_OPEN, circuitbreaker.STATE_HALF_OPEN]
    assert_type(states, list[str])
    with circuitbreaker.CircuitBreaker(name="x") as entered:
        assert_type(entered, None)
    caught: type[CircuitBreakerError] = circuitbreaker.CircuitBreakerError
    print(caught)


# Every other public module. What a library without types gives is Any.


class Errors:
    """Each error that this package raises is a CircuitBreakerError; some are of a client's own kind, too."""

    own: tuple[type[CircuitBreakerError], ...] = (
        CircuitOpenError,
        ConfigError,
        ForcedStateError,
        PermitError,
        PolicyError,
        RedisUnavailableError,
        EmbeddedServerError,
    )
    rejections: tuple[type[CircuitOpenError], ...] = (
        integrations_httpx.CircuitOpenTransportError,
        integrations_httpx2.CircuitOpenTransportError,
        CircuitOpenConnectionError,
        CircuitOpenClientError,
        CircuitOpenRpcError,
        CircuitOpenAioRpcError,
    )
    of_httpx: type[httpx.TransportError] = integrations_httpx.CircuitOpenTransportError
    of_requests: type[requests.ConnectionError] = CircuitOpenConnectionError
    of_aiohttp: type[aiohttp.ClientConnectionError] = CircuitOpenClientError


Classification(failures=(OSError,), ignore=KeyError, is_failure=lambda result: result is None)
Classification(failure=OSError)  # type: ignore[call-arg]
assert_type(load("gateway.yaml"), Config)
assert_type(load({"redis": {"pool_size": 5}}), Config)


def a_server() -> str:
    with serve() as url:
        assert_type(url, str)
    with EmbeddedServer(port=0, args=("--maxmemory", "1mb")) as server:
        assert_type(server.url, str)
        assert_type(server.binary, str)
        return server.url


def testing(breakers: Breakers, wanted: SettableState) -> None:
    clock = FakeClock(start=1_700_000_000)
    as_clock: Clock = clock
    assert_type(CircuitBreaker("mail", clock=as_clock), CircuitBreaker)
    clock.advance(30)
    assert_type(breakers.clock, FakeClock)
    in_test = breakers("mail", policy=Policy(failure_threshold=1))
    assert_type(in_test, CircuitBreaker)
    assert_type(breakers.async_breaker("mail", lease=0.5), AsyncCircuitBreaker)
    assert_type(breakers.manager(Config(), failures=OSError), CircuitBreakerManager)
    assert_type(breakers.async_manager(), AsyncCircuitBreakerManager)
    breakers("mail", polcy=Policy())  # type: ignore[call-arg]
    breakers.async_manager(3)  # type: ignore[arg-type]
    set_state(in_test, wanted)
    set_state(in_test, "forced_open", duration=60)
    set_state(in_test, "ajar")  # type: ignore[arg-type]


async def testing_asyncio(breakers: Breakers) -> None:
    await aset_state(breakers.async_breaker("mail"), "half_open")


instrumented = CircuitBreaker(
    "discovery",
    listeners=[PrometheusMetrics(redis="redis://localhost"), OpenTelemetryMetrics(), LoggingListener()],
    on_call=[OpenTelemetrySpans()],
)

blocking = httpx.Client(
    transport=integrations_httpx.BreakerTransport(
        manager, name=integrations_httpx.host_of, until="body", rejected=integrations_httpx.sdk_response
    )
)
asynchronous = httpx.AsyncClient(transport=integrations_httpx.AsyncBreakerTransport(aio, failure_statuses={503}))
integrations_httpx.BreakerTransport(manager, until="later")  # type: ignore[arg-type]
integrations_httpx.BreakerTransport(aio)  # type: ignore[arg-type]
newer = httpx2.Client(transport=integrations_httpx2.BreakerTransport(breaker, name=integrations_httpx2.host_of))
httpx2.AsyncClient(transport=integrations_httpx2.AsyncBreakerTransport(aio))
integrations_httpx2.BreakerTransport(breaker, rejected=integrations_httpx2.sdk_response)
session = requests.Session()
session.mount("https://", BreakerAdapter(manager, name=integrations_requests.host_of))
aiohttp.ClientSession(
    middlewares=[breaker_middleware(aio, name=integrations_aiohttp.host_of, ignore=is_callers_fault)],
)
assert_type(retry_after_header(httpx.Response(503)), float | None)

integrations_flask.install(flask.Flask("app"), manager, health="/health")
assert_type(integrations_flask.circuit_open_handler(CircuitOpenError("discovery", "open", 1.0)), flask.Response)
integrations_starlette.install(Starlette(), manager)
Starlette(exception_handlers={CircuitOpenError: integrations_starlette.circuit_open_handler})


async def who(request: Request) -> str | None:
    return request.headers.get("x-user")


page: ASGIApp = breakers_app("redis://localhost:6379", prefix="p", read_only=False, authorize=who, health=True)
other_page: ASGIApp = breakers_app(Redis(), authorize=lambda request: None)
assert_type(integrations_django.breakers(), CircuitBreakerManager)
assert_type(integrations_django.async_breakers(), AsyncCircuitBreakerManager)
django_parts = (integrations_django.CircuitBreakersConfig, integrations_django.CircuitOpenMiddleware)
django_view: Callable[[HttpRequest], HttpResponse] = integrations_django.health
celery_task: type[BreakerTask] = BreakerTask

codes = FAILURE_CODES | {grpc.StatusCode.INTERNAL}
interceptors = (BreakerInterceptor(manager.get_or_create, failure_codes=codes), *aio_interceptors(aio))
failed_call: type[Exception] = FailedCallError


@stamina.retry(on=unless_open(OSError))
def retried_by_stamina() -> int:
    return 1


@stamina.retry(on=after_open(OSError, jitter=0.5, max=60), attempts=None, timeout=600)
def patient_with_stamina() -> int:
    return 1


@tenacity.retry(retry=retry_unless_open(), wait=wait_until_probe(jitter=0.5))
def retried_by_tenacity() -> int:
    return 1


assert_type(retried_by_stamina() + patient_with_stamina(), int)
assert_type(retried_by_tenacity(), int)
