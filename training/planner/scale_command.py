"""`megatron-video plan scale | stragglers | failures`: a run on many GPUs, over weeks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_video.errors import BAD_INPUT_EXIT_CODE
from training.planner.arguments import check_at_least, finish, plan_parser, read_run
from training.planner.failure_report import failure_report
from training.planner.failures import Recovery
from training.planner.imbalance import slowest_factors
from training.planner.mix import step_of
from training.planner.plan import Refusal, judge
from training.planner.scale import gpu_counts, scaling
from training.planner.scale_plots import draw_failures, draw_scaling, draw_stragglers
from training.planner.show import show_refusal
from training.planner.straggler_report import straggler_report

_GPUS = "8..10240"
_CONFIG = "a YAML file or preset of pretrain"


def plan_scale(argv: Sequence[str]) -> int:
    """Strong and weak scaling; exit code 2 if no number of GPUs works.

    Raises:
        UserError: bad input.
    """
    parser = plan_parser("scale", "Strong and weak scaling of a run, with what limits it at each size.", _CONFIG)
    parser.add_argument("--gpus", default=_GPUS, help=f"numbers of GPUs: 8,64,512, or FIRST..LAST, doubled ({_GPUS})")
    parser.add_argument(
        "--layouts", choices=("this", "all"), default="all", help="the configured layout, or the fastest of all (all)"
    )
    arguments = parser.parse_args(argv)
    run = read_run(arguments)
    counts = gpu_counts(arguments.gpus, run.cluster.gpus)
    found = scaling(run.config, run.cluster, counts, run.text_tokens, arguments.layouts == "all")
    report = found.report(f"Scaling of {run.config.run.stage} on {run.cluster.gpu}")
    return finish(arguments, report, found.works, lambda path: draw_scaling(found, path))


def plan_stragglers(argv: Sequence[str]) -> int:
    """What the slowest replica costs; exit code 2 if no number of GPUs works.

    Raises:
        UserError: bad input.
    """
    parser = plan_parser("stragglers", "What unequal loads, jitter and slow nodes cost on many GPUs.", _CONFIG)
    parser.add_argument("--gpus", default=_GPUS, help=f"numbers of GPUs: 8,64,512, or FIRST..LAST, doubled ({_GPUS})")
    parser.add_argument("--jobs", type=int, default=100, help="simulated jobs of 20 steps (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (0)")
    arguments = parser.parse_args(argv)
    check_at_least("--jobs", arguments.jobs, 2)
    check_at_least("--seed", arguments.seed, 0)
    run = read_run(arguments)
    counts = gpu_counts(arguments.gpus, run.cluster.gpus)
    report = straggler_report(run.config, run.cluster, counts, run.text_tokens, arguments.jobs, arguments.seed)
    works = any(not row["refused"] for row in report.tables[0].rows)
    return finish(arguments, report, works, lambda path: draw_stragglers(report, path))


def plan_failures(argv: Sequence[str]) -> int:
    """Checkpoint interval against effective training time; exit code 2 if the layout does not work.

    Raises:
        UserError: bad input.
    """
    parser = plan_parser("failures", "Failures, restarts and the interval of checkpoints of a run.", _CONFIG)
    parser.add_argument("--runs", type=int, default=50, help="simulated runs for every interval (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one (0)")
    arguments = parser.parse_args(argv)
    check_at_least("--runs", arguments.runs, 2)
    check_at_least("--seed", arguments.seed, 0)
    run = read_run(arguments)
    plan = judge(run.config, run.cluster, step_of(run.config, run.text_tokens), run.config.parallel, leave_idle=True)
    if isinstance(plan, Refusal):
        print(show_refusal(plan))
        return BAD_INPUT_EXIT_CODE
    seconds = plan.seconds_with_waits(slowest_factors(run.config, plan.job)[1])
    report = failure_report(run.config, plan, seconds, arguments.runs, arguments.seed)
    recovery = Recovery.of(plan.job, plan.gpus, run.config.checkpoint.asynchronous)
    return finish(arguments, report, True, lambda path: draw_failures(report, recovery, plan.steps * seconds, path))
