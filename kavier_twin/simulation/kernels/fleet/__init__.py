"""Replicas together: arrivals, routing, closed loops."""
