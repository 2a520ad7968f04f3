"""Hot operations, one folder each: a public API, a float32 reference that specifies the result, implementations."""
