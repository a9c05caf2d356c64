"""What the daemon is made of: sources and feeds, the twin of each pool, its scores and checkpoints."""
