"""Tests of pybreaker_redis.integrations: the real libraries against real servers."""
