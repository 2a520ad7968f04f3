"""The device mesh, the sharding rules, the collectives over the mesh, and the start of multi-process runs."""
