"""Benchmarks: each one command (`python -m benchmarks.NAME`), a table and JSON, CPU seconds beside wall seconds."""
