"""The layout matrix: every parallel layout must train to the numbers of one process (DESIGN 4, contract 1)."""
