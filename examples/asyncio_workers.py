"""Workers on one queue: while the circuit is open, a worker puts its job back and pauses for `retry_after`."""

from __future__ import annotations

import asyncio
import collections

from pybreaker_redis import AsyncCircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis.embedded import serve

WORKERS, JOBS = 8, 40
counts: collections.Counter[str] = collections.Counter()


async def convert(job: int) -> None:
    """A service that is down for its first 20 calls."""
    counts["calls"] += 1
    await asyncio.sleep(0.002)
    if counts["calls"] <= 20:
        raise ConnectionError("the converter is down")


async def work(breaker: AsyncCircuitBreaker, jobs: asyncio.Queue[int]) -> None:
    while True:
        job = await jobs.get()
        try:
            await breaker.call(convert, job)
            counts["done"] += 1
        except ConnectionError:
            counts["failed"] += 1
            jobs.put_nowait(job)
        except CircuitOpenError as error:
            counts["rejected"] += 1
            jobs.put_nowait(job)
            await asyncio.sleep(error.retry_after)
        finally:
            jobs.task_done()


async def main() -> None:
    with serve() as url:
        # while a probe runs, retry_after is as long as it has been out: at most probe_timeout
        policy = Policy(failure_threshold=4, reset_timeout=0.05, max_reset_timeout=0.1, jitter=0.2, probe_timeout=0.2)
        breaker = AsyncCircuitBreaker("converter", redis=url, policy=policy)
        await breaker.reset()
        jobs: asyncio.Queue[int] = asyncio.Queue()
        for job in range(JOBS):
            jobs.put_nowait(job)
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(work(breaker, jobs)) for _ in range(WORKERS)]
            await jobs.join()
            for worker in workers:
                worker.cancel()
        print(f"{counts['done']} jobs done, {counts['failed']} calls failed, {counts['rejected']} rejected")
        print(f"the breaker is {breaker.state}")
        await breaker.close()


if __name__ == "__main__":
    asyncio.run(main())
