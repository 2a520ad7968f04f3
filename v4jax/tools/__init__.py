"""What it costs, whether it fits, and what is inside."""
