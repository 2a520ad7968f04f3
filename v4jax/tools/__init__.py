"""Floor 6: what it costs, whether it fits, and what is inside."""
