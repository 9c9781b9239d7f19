"""The loop around Video-DPO: generated videos are scored, paired, learnt from (arXiv 2502.10248, 4.4 and 9.7)."""
