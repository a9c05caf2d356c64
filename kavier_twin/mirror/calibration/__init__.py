"""Step times and power fitted to what the mirror observes."""
