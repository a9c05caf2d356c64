"""How wrong the mirror was lately, and whether its figures are trusted."""
