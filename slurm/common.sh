# shellcheck shell=bash
# Sourced by the batch scripts, with job.env read already: what every batch process of this package needs.

# What `sbatch --export=NONE` said must not hold for the steps of the job too.
export SLURM_EXPORT_ENV=ALL
# Core files of processes with hundreds of gigabytes are no help to anybody.
ulimit -c 0

# mv_supervise MODULE ARGUMENT...: this process becomes the supervisor, so that signals for the batch script reach it.
mv_supervise() {
  # Until Python has its handlers, a warning is passed over rather than fatal: the supervisor looks at the clock too.
  trap '' USR1 TERM
  exec "$MV_HOST_PYTHON" -m "$@"
}
