"""Two services call the same third one: when it fails for one of them, both stop calling it."""

from __future__ import annotations

import multiprocessing
import time

from pybreaker_redis import CircuitBreakerManager, CircuitOpenError, Config, Policy
from pybreaker_redis.embedded import serve

CONFIG = {"payments": Policy(failure_threshold=3, reset_timeout=30)}


def pay(amount: int) -> str:
    raise TimeoutError("payments does not answer")


def orders(url: str) -> None:
    """A busy service: its calls fail, and trip the breaker that both services share."""
    with CircuitBreakerManager.with_redis(Config(services=CONFIG, redis_url=url)) as manager:
        for amount in range(5):
            try:
                manager.call("payments", pay, amount)
            except TimeoutError as error:
                print(f"orders: {error}", flush=True)
            except CircuitOpenError:
                print("orders: rejected", flush=True)


def invoices(url: str) -> None:
    """A quiet service: by itself it would need three timeouts to find out."""
    with CircuitBreakerManager.with_redis(Config(services=CONFIG, redis_url=url)) as manager:
        while manager.get_state("payments") == "closed":
            time.sleep(0.05)
        try:
            manager.call("payments", pay, 7)
        except CircuitOpenError as error:
            print(f"invoices: rejected at once, retry in {error.retry_after:.0f} s", flush=True)


def main() -> None:
    with serve() as url, CircuitBreakerManager.with_redis(Config(redis_url=url)) as manager:
        manager.get_or_create("payments").reset()
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=service, args=(url,)) for service in (invoices, orders)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        print(f"payments is {manager.get_state('payments')}")


if __name__ == "__main__":
    main()
