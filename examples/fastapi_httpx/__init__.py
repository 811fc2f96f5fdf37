"""A FastAPI application that calls another service by httpx. Two instances of it share one breaker."""
