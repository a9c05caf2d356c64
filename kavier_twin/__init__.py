"""Kavier Twin: a digital twin for fleets of vLLM servers."""

__version__ = "0.1.0"
