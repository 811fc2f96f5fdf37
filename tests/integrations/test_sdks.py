"""The SDKs of OpenAI and Anthropic, whose clients are httpx2's, against a local endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from conftest import nonzero

from pybreaker_redis import AsyncCircuitBreakerManager, CircuitBreakerManager, CircuitOpenError
from pybreaker_redis.integrations.httpx2 import AsyncBreakerTransport, BreakerTransport, sdk_response

from .service import Service

MESSAGES: Any = [{"role": "user", "content": "hello"}]


def ask_openai(service: Service, client: Any, **options: Any) -> Any:
    sdk = openai.OpenAI(api_key="none", base_url=f"{service.url}/v1", http_client=client, **options)
    return sdk.chat.completions.create(model="m", messages=MESSAGES)


def ask_anthropic(service: Service, client: Any, **options: Any) -> Any:
    sdk = anthropic.Anthropic(api_key="none", base_url=service.url, http_client=client, **options)
    return sdk.messages.create(model="m", max_tokens=9, messages=MESSAGES)


@pytest.mark.parametrize(
    ("ask", "sdk"), [(ask_openai, openai), (ask_anthropic, anthropic)], ids=["openai", "anthropic"]
)
def test_a_rejection_is_not_retried(
    service: Service, manager: CircuitBreakerManager, ask: Callable[..., Any], sdk: Any
) -> None:
    """An answer of 503 ends the call at once; a rejection that is raised would be asked for again and again."""
    service.answer = 500, {}
    breaker = manager.get_or_create(f"127.0.0.1:{service.port}")
    with httpx2.Client(transport=BreakerTransport(manager, rejected=sdk_response)) as client:
        for _ in range(3):
            with pytest.raises(sdk.InternalServerError):
                ask(service, client, max_retries=0)
        assert nonzero(breaker.counts) == {"failures": 3}
        with pytest.raises(sdk.InternalServerError) as caught:
            ask(service, client, max_retries=5)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        assert nonzero(breaker.counts) == {"failures": 3, "rejected": 1}
    with httpx2.Client(transport=BreakerTransport(manager)) as client:
        with pytest.raises(sdk.APIConnectionError) as raised:
            ask(service, client, max_retries=1)
        assert isinstance(raised.value.__cause__, CircuitOpenError)
        assert nonzero(breaker.counts) == {"failures": 3, "rejected": 3}
    assert service.requests == 3


def test_each_retry_is_a_call(service: Service, manager: CircuitBreakerManager) -> None:
    """The SDK's retries are requests: the third opens the circuit, and the rejection ends the call."""
    service.answer = 500, {"retry-after-ms": "1"}
    with (
        httpx2.Client(transport=BreakerTransport(manager, rejected=sdk_response)) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        ask_openai(service, client, max_retries=5)
    assert caught.value.status_code == 503
    assert service.requests == 3


def test_asyncio(service: Service, make_async_manager: Callable[..., AsyncCircuitBreakerManager]) -> None:
    """Likewise."""
    service.answer = 500, {}

    async def run() -> None:
        async with make_async_manager(failure_threshold=1) as manager:
            transport = AsyncBreakerTransport(manager, rejected=sdk_response)
            async with httpx2.AsyncClient(transport=transport) as client:
                sdk = openai.AsyncOpenAI(api_key="none", base_url=f"{service.url}/v1", http_client=client)
                for status in (500, 503):
                    with pytest.raises(openai.InternalServerError) as caught:
                        await sdk.with_options(max_retries=9 * (status == 503)).models.list()
                    assert caught.value.status_code == status
                assert service.requests == 1

    asyncio.run(run())
