"""Floor 5: losses, optimizer and the loop that trains a model."""
