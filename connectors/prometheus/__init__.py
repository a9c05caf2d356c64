"""What engines and GPUs report of themselves, from a Prometheus server or from the engines directly."""
