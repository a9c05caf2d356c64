"""The experiments of the Kavier paper, repeated (docs/kavier.md): one module each, and what they share."""
