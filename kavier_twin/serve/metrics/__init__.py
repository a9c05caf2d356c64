"""The Prometheus exporter: one module a subject."""
