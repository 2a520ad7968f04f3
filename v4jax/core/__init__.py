"""Floor 0: names, dtypes, quantized tensors and checks that everything else is written in."""
