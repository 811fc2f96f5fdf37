"""Starts a Redis, a search service and two instances of the application, and lets the service fail for a while."""

from __future__ import annotations

import collections
import itertools

from _running import Service, free_port, program, request, wait_until

from pybreaker_redis.embedded import serve


def main() -> None:
    with serve() as redis_url, Service() as service:
        ports = [str(free_port()), str(free_port())]
        common = {"REDIS_URL": redis_url, "SEARCH_URL": service.url}
        start = ("uvicorn", "fastapi_httpx.app:app", "--log-level", "warning", "--port")
        with program(*start, ports[0], **common), program(*start, ports[1], **common):
            instances = [f"http://127.0.0.1:{port}" for port in ports]
            for instance in instances:
                wait_until(lambda instance=instance: request(f"{instance}/health").status == 200)
            turns = itertools.cycle(instances)

            def search() -> int:
                return request(f"{next(turns)}/search?q=x").status

            def count(phase: str) -> None:
                before = len(service.refused) + len(service.answered)
                answers = collections.Counter(search() for _ in range(20))
                asked = len(service.refused) + len(service.answered) - before
                print(f"{phase}: {dict(answers)}; the service got {asked} of 20 requests", flush=True)

            count("search is up")
            service.down = True
            count("search is down")
            rejection = request(f"{instances[0]}/search?q=x")
            print(f"a rejection: {rejection.status}, Retry-After: {rejection.headers['Retry-After']}")
            print("both instances:", *(request(f"{instance}/health").body for instance in instances))
            service.down = False
            wait_until(lambda: [search(), search()] == [200, 200])
            count("search is up again")


if __name__ == "__main__":
    main()
