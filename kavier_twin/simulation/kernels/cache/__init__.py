"""One replica's prefix cache: its blocks, their keys, what is evicted."""
