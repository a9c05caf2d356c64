"""Host and disk tiers below the prefix cache."""
