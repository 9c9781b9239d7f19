"""What failures, saves and restarts leave of a job's time, in closed form.

Failures of a job come at random with one rate (Poisson), that of one device times their number; each ends the whole
job, may also meet a restart, and takes back what was done behind the newest complete checkpoint. Effective training
time is that of training/effective_time.py: seconds of steps whose work is in the weights over all seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from training.planner.cluster import Cluster
from training.planner.job import Job
from training.planner.stored import checkpoint_bytes

DAY = 86400.0
# Golden section: so many cuts of the interval.
_CUTS = 80


@dataclass(frozen=True)
class Recovery:
    """How one job fails, restarts and saves; seconds."""

    between_failures: float
    """Mean time between unexpected ends of the job; inf: never."""
    between_stops: float
    """The same of planned ones, which come behind a checkpoint."""
    detect: float
    """From a failure until the job is ended."""
    replace: float
    """Until it is started again."""
    startup: Mapping[str, float]
    """From there to its first step, by part."""
    blocked: float
    """That a save holds training up."""
    lag: float
    """From then on until the checkpoint is complete; 0 if training waits for it."""

    @staticmethod
    def of(job: Job, gpus: int, asynchronous: bool) -> Recovery:
        """Of a job on `gpus` devices of its cluster, idle ones included."""
        return Recovery.on(job.cluster, checkpoint_bytes(job), gpus, asynchronous)

    @staticmethod
    def on(cluster: Cluster, size: float, gpus: int, asynchronous: bool) -> Recovery:
        """By a cluster's description.

        Args:
            cluster: with its failures and storage.
            size: bytes of a checkpoint; every device writes an equal part.
            gpus: of the job.
            asynchronous: whether training goes on while files are written.
        """
        faults, storage = cluster.failures, cluster.storage
        written = size / storage.write_bytes_per_second(cluster.nodes)
        blocked = storage.save_overhead_seconds + size / gpus / (cluster.host_gbps * 1e9)
        return Recovery(
            between_failures=mean_between(faults.per_1000_gpu_days, gpus),
            between_stops=mean_between(faults.planned_per_1000_gpu_days, gpus),
            detect=faults.detect_seconds,
            replace=faults.replace_seconds,
            startup={
                "start": faults.start_seconds,
                "load": size / storage.read_bytes_per_second(cluster.nodes),
                "first step": faults.first_step_seconds,
            },
            blocked=blocked if asynchronous else blocked + written,
            lag=written if asynchronous else 0.0,
        )

    @property
    def restart(self) -> float:
        """From a failure to the first step."""
        return self.detect + self.replace + sum(self.startup.values())

    @property
    def planned_stop(self) -> float:
        """From the end of a planned job's last save to the first step of the next one."""
        return self.lag + self.replace + sum(self.startup.values())

    def interval_length(self, training: float) -> float:
        """From one save's end to the next one's; it waits for the one under way."""
        return max(training, self.lag) + self.blocked

    def effective(self, training: float, work: float = math.inf) -> float:
        """Effective training time, 0 to 1, in the mean.

        The time from one complete checkpoint to the next is found from two states: the checkpoint has just become
        complete while the next interval was under way, or the job has just been restarted. For synchronous saves and
        no planned stops this is the complete form of J. T. Daly, Future Generation Computer Systems 22 (2006) 303.

        Args:
            training: seconds of steps between saves.
            work: seconds of steps of the whole run, whose first start counts too.
        """
        length, mean = self.interval_length(training), self.between_failures
        if math.isinf(mean):
            took = length
        else:
            restarted = mean * math.expm1(self.restart / mean)
            after_restart = _with_restarts(training + self.blocked + self.lag, mean, restarted)
            took = -math.expm1(-length / mean) * (mean + restarted + after_restart)
        took *= 1 + self.planned_stop / self.between_stops
        start = 0.0 if math.isinf(work) else sum(self.startup.values()) * training / work
        return training / (took + start)

    def best_interval(self) -> float:
        """Seconds of steps between saves with which the effective time is highest; inf if nothing fails."""
        if math.isinf(self.between_failures):
            return math.inf
        low, high = math.log(1e-3), math.log(20 * self.between_failures)
        ratio = (math.sqrt(5) - 1) / 2
        for _ in range(_CUTS):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            if self.effective(math.exp(left)) < self.effective(math.exp(right)):
                low = left
            else:
                high = right
        return math.exp((low + high) / 2)


def mean_between(per_1000_gpu_days: float, gpus: int) -> float:
    """Seconds between ends of a job on `gpus` devices."""
    rate = per_1000_gpu_days / (1000 * DAY) * gpus
    return 1 / rate if rate else math.inf


def young_interval(blocked: float, between_failures: float) -> float:
    """J. W. Young, Communications of the ACM 17 (1974) 530: the best interval to first order."""
    return math.sqrt(2 * blocked * between_failures)


def daly_interval(blocked: float, between_failures: float) -> float:
    """Daly's higher-order estimate of the same (2006, Eq. 37)."""
    if blocked >= 2 * between_failures:
        return between_failures
    ratio = math.sqrt(blocked / (2 * between_failures))
    return young_interval(blocked, between_failures) * (1 + ratio / 3 + ratio**2 / 9) - blocked


def _with_restarts(seconds: float, mean: float, restart: float) -> float:
    """Mean time until so many seconds have passed without a failure."""
    # Beyond any float: such a job never gets on.
    return (mean + restart) * math.expm1(seconds / mean) if seconds / mean < 700 else math.inf
