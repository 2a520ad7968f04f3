"""Floor 0: names, dtypes, quantised tensors and checks that everything else is written in."""
