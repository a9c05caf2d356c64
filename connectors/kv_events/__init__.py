"""vLLM's KV-cache events, over ZeroMQ. Needs the extra `kv-events` (pyzmq, msgpack)."""
