"""All code that uses redis-py."""
