"""Everything that knows redis-py."""
