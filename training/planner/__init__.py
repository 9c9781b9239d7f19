"""The layout planner: memory, time, cost and MFU of a training run before it is submitted (arXiv 2502.10248, 6.2.1)."""
