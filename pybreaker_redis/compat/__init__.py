"""Other libraries' interfaces over this engine: change one import, and keep your code.

`pybreaker_redis.compat.pybreaker` and `pybreaker_redis.compat.circuitbreaker`. Each module lists what differs.
"""
