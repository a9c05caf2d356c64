"""What caches are worth: how often content comes again, and why it was not found."""
