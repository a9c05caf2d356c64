"""The tap: makes request records of the OpenAI traffic of a fleet that has none."""
