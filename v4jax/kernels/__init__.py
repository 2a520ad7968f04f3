"""Hot operations. Each folder holds an api, a reference that is the specification, and implementations."""
