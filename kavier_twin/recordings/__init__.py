"""Recorded runs of real engines: reading, replaying and imitating them."""
