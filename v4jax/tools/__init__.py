"""The planner, its cost model, ahead-of-time compilation, and benchmarks."""
