"""The commands of the command line, one module each: `add_parser` declares the arguments, `run` does the work."""
