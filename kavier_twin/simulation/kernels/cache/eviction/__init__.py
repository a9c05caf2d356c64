"""Eviction policies other than vLLM's LRU: one file each, behind `dispatch.py`. What they are: docs/policies.md."""
