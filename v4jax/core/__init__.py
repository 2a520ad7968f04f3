"""Axis letters, dtypes, quantized tensors, errors, and safe file and JSON access, which all other packages use."""
