"""Names, dtypes, quantized tensors and checks that everything else is written in."""
