"""Losses, optimizer and the loop that trains a model."""
