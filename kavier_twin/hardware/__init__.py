"""Step times before any observation: the roofline, measured operators and the fleet file."""
