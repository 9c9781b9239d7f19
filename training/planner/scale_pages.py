"""docs/planner/scale.md and its pictures: what the simulations say of the paper's run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_video.config_io import load_config
from training.config import PRESET_DIR, PretrainConfig
from training.curriculum_config import CURRICULUM_PRESET_DIR, CurriculumConfig, resolve_stages
from training.planner.cluster import Cluster, load_cluster
from training.planner.cost_plots import draw_curriculum, draw_encoding
from training.planner.curriculum_cost import CurriculumCost, cost_curriculum
from training.planner.encoders import encoding_report, plan_encoding
from training.planner.failure_report import failure_report, published_effective
from training.planner.failures import Recovery
from training.planner.imbalance import slowest_factors
from training.planner.mix import step_of
from training.planner.plan import Plan, Refusal, judge
from training.planner.report import Report
from training.planner.scale import gpu_counts, scaling
from training.planner.scale_plots import draw_failures, draw_scaling, draw_stragglers
from training.planner.straggler_report import straggler_report

CLUSTER = "h800_step_video"
# The cluster of Table 6 from its second 540P stage on.
LATE_GPUS = {"t2vi_540_s2": 2000, "t2vi_540_s3": 2000}
_TEXT_TOKENS = 256
_GPUS = "8..10240"
_HEAD = (
    "# Many GPUs, many weeks\n\nWritten by `python -m training.planner.write_tables --simulations`. The 30B of arXiv "
    "2502.10248 on its cluster (`h800_step_video`). What each command assumes stands below its tables. "
    "Scaling is in the paper's layout; `plan scale` without `--layouts this` takes the fastest of all on every number."
)


@dataclass(frozen=True)
class Section:
    """One command's answer."""

    command: str
    report: Report
    picture: str
    draw: Callable[[Path], None]

    def markdown(self) -> str:
        """With the command and the picture."""
        alt = self.report.title.replace("[", "").replace("]", "")
        return f"{self.report.markdown()}\n\n`megatron-video plan {self.command}`\n\n![{alt}]({self.picture})"


def write_pages(folder: Path) -> Path:
    """Write the page and its pictures; its path."""
    sections = list(_sections())
    for section in sections:
        section.draw(folder / section.picture)
    page = folder / "scale.md"
    texts = [_HEAD, *(section.markdown() for section in sections), published_section()]
    page.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return page


def published_section() -> str:
    """Effective training time beside what others published."""
    return (
        "## Failures beside published figures\n\n"
        f"{published_effective().markdown()}\n\n"
        "- Step-Video: the rate is the paper's (Table 5); it tells neither how often it saved nor how long a restart "
        "took, so both are this project's: the best interval, and the restart of `cluster.failures`. The last column "
        "is what its 99 % leaves for one failure, with the steps that are lost.\n"
        "- Llama 3.1 (arXiv 2407.21783, 3.3.4): its own rate, 419 unexpected and 47 planned interruptions in 54 days, "
        "and its storage; restart and interval are ours."
    )


def paper_curriculum() -> CurriculumCost:
    """All stages of the paper's Table 6 and fine-tuning, on as many GPUs as follow from it."""
    curriculum = load_config(CurriculumConfig, "step_video_30b", (), CURRICULUM_PRESET_DIR)
    return cost_curriculum(resolve_stages(curriculum), load_cluster(CLUSTER), _TEXT_TOKENS, LATE_GPUS)


def _sections() -> Iterator[Section]:
    cluster = load_cluster(CLUSTER)
    yield _scaling("t2vi_540_s1", cluster, "scaling_540p.png")
    yield _scaling("t2vi_192_s1", cluster, "scaling_192p.png")
    yield _stragglers("t2vi_540_s1", cluster)
    yield _failures("t2vi_540_s1", cluster)
    yield _curriculum()
    yield _encoders("t2vi_540_s1", cluster, "encoders_540p.png")
    yield _encoders("t2i_256_s2", cluster, "encoders_t2i.png")


def _run(stage: str) -> PretrainConfig:
    return load_config(PretrainConfig, f"step_video_30b_{stage}", (), PRESET_DIR)


def _named(command: str, stage: str) -> str:
    return f"{command} --config step_video_30b_{stage} --cluster {CLUSTER}"


def _scaling(stage: str, cluster: Cluster, picture: str) -> Section:
    """In the paper's layout: the fastest of all on every number of GPUs takes minutes."""
    counts = gpu_counts(_GPUS, cluster.gpus)
    found = scaling(_run(stage), cluster, counts, _TEXT_TOKENS, all_layouts=False)
    report = found.report(f"Scaling of {stage} on {cluster.gpu}")
    command = f"{_named('scale', stage)} --layouts this"
    return Section(command, report, picture, lambda path: draw_scaling(found, path))


def _stragglers(stage: str, cluster: Cluster) -> Section:
    report = straggler_report(_run(stage), cluster, gpu_counts(_GPUS, cluster.gpus), _TEXT_TOKENS, 100, 0)
    return Section(
        _named("stragglers", stage), report, "stragglers_540p.png", lambda path: draw_stragglers(report, path)
    )


def _failures(stage: str, cluster: Cluster) -> Section:
    config = _run(stage)
    plan = judge(config, cluster, step_of(config, _TEXT_TOKENS), config.parallel)
    assert isinstance(plan, Plan)
    seconds = plan.seconds_with_waits(slowest_factors(config, plan.job)[1])
    report = failure_report(config, plan, seconds, 50, 0)
    recovery = Recovery.of(plan.job, plan.gpus, config.checkpoint.asynchronous)
    work = plan.steps * seconds
    return Section(
        _named("failures", stage),
        report,
        "failures_540p.png",
        lambda path: draw_failures(report, recovery, work, path),
    )


def _curriculum() -> Section:
    found = paper_curriculum()
    chosen = " ".join(f"--gpus-of {stage}={gpus}" for stage, gpus in LATE_GPUS.items())
    command = f"curriculum --config step_video_30b --cluster {CLUSTER} {chosen}"
    return Section(command, found.report("step_video_30b"), "curriculum.png", lambda path: draw_curriculum(found, path))


def _encoders(stage: str, cluster: Cluster, picture: str) -> Section:
    found = plan_encoding(_run(stage), cluster, _TEXT_TOKENS, 0.1)
    assert not isinstance(found, Refusal)
    return Section(
        _named("encoders", stage), encoding_report(found, stage), picture, lambda path: draw_encoding(found, path)
    )
