"""Submitting jobs to SLURM: batch scripts, the submit command, what runs beside a job, preflight.

Nothing here trains or encodes: jobs call the same commands that a user types. Code that runs on a login node or as the
batch process of a job imports neither torch nor megatron-core.
"""
