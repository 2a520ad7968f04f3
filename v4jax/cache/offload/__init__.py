"""Tiers below the device: host memory and disk, and the manager that moves KV blocks between them."""
