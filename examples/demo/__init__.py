"""The demo: an HTTP service that fails on a schedule, worker processes, and the breaker that they share.

The same death of the service is measured three times: without a breaker, with a private breaker in each process, and
with one breaker in Redis. Nothing is simulated: real processes, real HTTP on loopback, a real server.

Run it with `make demo`, or with `python -m demo` in the folder above.
"""
