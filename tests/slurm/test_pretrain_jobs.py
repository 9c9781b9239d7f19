"""Training jobs on a real SLURM, by their real batch script: warned, requeued, resumed, restarted, refused, stopped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import Cluster
from fault_runs import losses, run
from tiny_shards import write_tiny_shards
from training_jobs import SLOW, TrainingJob, profile, submit_training

from slurm.allocation import waiting_successors
from slurm.bad_nodes import read_bad_nodes
from slurm.job import DONE, NO_RESTART, STOP
from slurm.rank import stacks_file
from slurm.scheduler import job_records

LENGTH = ("training.steps=12", "training.save_every=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_tiny_shards(folder / "shards")
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[int, float]:
    """Loss by step of one process that nothing happens to."""
    result = run(folder, "undisturbed", *LENGTH, faults=[], ranks=1)
    assert result.returncode == 0, result.stdout
    return losses(folder / "undisturbed")


def same_curve(job: TrainingJob, undisturbed: dict[int, float]) -> None:
    assert job.losses() == pytest.approx(undisturbed, rel=1e-6)


def test_a_warned_job_saves_is_requeued_while_the_controller_is_away_and_goes_on(
    cluster: Cluster, folder: Path, undisturbed: dict[int, float]
) -> None:
    job = submit_training(cluster, folder, "warned", *LENGTH, profile=profile(), faults=[SLOW | {"seconds": 1.5}])
    job.wait_for_step(4)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], check=True)
    job.wait_for(lambda: "told to save" in job.log())
    cluster.node("ctld-kill")
    job.wait_for(lambda: "back into the queue" in job.log())
    cluster.node("ctld-start")
    assert job.wait() == "COMPLETED", job.log()
    print(job.log())
    same_curve(job, undisturbed)
    # Saved at the end of the step under way: none was done twice.
    assert job.steps() == [*range(1, 13)]
    assert job_records(job.number)[0]["Restarts"] == "1"
    first, second = job.two_attempts()
    assert (first.verdict, first.action, first.progress) == ("stopped", "leave", True)
    assert "SIGUSR1 from SLURM" in first.reason
    assert (second.attempt, second.verdict, second.step_before) == (f"{job.number}.1.1", "finished", first.step_after)
    assert job.verdict_file(DONE)
    attempt = job.job.folder / "attempts" / first.attempt
    nodes = [json.loads((attempt / "nodes" / f"{node}.json").read_text()) for node in ("node1", "node2")]
    assert sorted(tuple(node["ranks"]) for node in nodes) == [(0, 0), (1, 1)]
    assert all(node["packages"]["torch"] for node in nodes)
    console = [(attempt / "nodes" / f"{node}.log").read_text() for node in ("node1", "node2")]
    assert sorted("new run: weights initialised at random" in text for text in console) == [False, True]
    assert len(list(attempt.glob("ranks/node[12]/*/attempt_0/0/stdout.log"))) == 2
    assert "SLURM_JOB_ID=" in (attempt / "environment.txt").read_text()


def test_a_lost_node_is_replaced_by_a_spare_one_or_else_by_a_requeue(
    cluster: Cluster, folder: Path, undisturbed: dict[int, float]
) -> None:
    quick = profile("launch.launcher=srun")
    # Held in the middle of a step until the node is lost.
    held = {"kind": "sleep", "rank": 0, "step": 5, "seconds": 900}
    spare = submit_training(cluster, folder, "spare", *LENGTH, profile=quick, spares=1, faults=[held])
    plain = submit_training(cluster, folder, "plain", *LENGTH, profile=quick, faults=[held])
    for job in (spare, plain):
        job.wait_for_step(5)
    assert job_records(plain.number)[0]["NodeList"] == "node[1-2]"
    cluster.node("crash", "node2")
    states = [job.wait() for job in (spare, plain)]
    assert states == ["COMPLETED"] * 2, spare.log() + plain.log()
    for job, restarts in ((spare, "0"), (plain, "1")):
        same_curve(job, undisturbed)
        assert job_records(job.number)[0]["Restarts"] == restarts, job.log()
        first, second = job.two_attempts()
        assert (first.nodes, second.nodes) == (["node1", "node2"], ["node1", "node3"])
        assert (first.verdict, second.verdict) == ("node failed", "finished")
        assert "node2" in first.reason
        assert second.checkpoint_before == "checkpoints/step_00000003"
    assert spare.attempts()[0].spares == ["node3"]
    assert list(read_bad_nodes(spare.job.slurm_dir)) == ["node2"]
    cluster.node("start", "node2")


def test_a_hung_rank_is_ended_and_its_node_left_out(
    cluster: Cluster, folder: Path, undisturbed: dict[int, float]
) -> None:
    stopped = {"kind": "send", "rank": 1, "step": 5, "signal": "SIGSTOP"}
    silent = profile("launch.launcher=srun", "heartbeat.step_seconds=25")
    outside = submit_training(
        cluster, folder, "outside", *LENGTH, "faults.hang_seconds=null", profile=silent, spares=1, faults=[stopped]
    )
    hanging = {"kind": "sleep", "rank": 1, "step": 5, "seconds": 600}
    inside = submit_training(
        cluster,
        folder,
        "inside",
        *LENGTH,
        "faults.hang_seconds=15",
        "faults.hang_seconds_start=300",
        profile=profile(),
        faults=[hanging],
    )
    for job, action, restarts in ((outside, "restart", "0"), (inside, "leave", "1")):
        assert job.wait() == "COMPLETED", job.log()
        same_curve(job, undisturbed)
        first, second = job.two_attempts()
        assert (first.verdict, first.action, second.verdict) == ("hung", action, "finished"), job.log()
        assert job_records(job.number)[0]["Restarts"] == restarts
    first, second = outside.attempts()
    assert "no sign of life for 25 s" in first.reason
    assert (first.culprits, second.nodes) == (["node2"], ["node1", "node3"])
    stacks = [stacks_file(outside.job.folder / "attempts" / first.attempt, rank) for rank in (0, 1)]
    assert "train_step.py" in stacks[0].read_text()
    assert not stacks[1].stat().st_size
    # The training's own watchdog knows which rank it was; torchrun says where that ran.
    first, second = inside.attempts()
    culprit = json.loads(
        (inside.job.folder / "attempts" / first.attempt / "nodes" / f"{first.culprits[0]}.json").read_text()
    )
    assert culprit["ranks"] == [1, 1]
    assert first.culprits[0] not in second.nodes
    assert job_records(inside.number)[0]["ExcNodeList"] == first.culprits[0]
    (entry,) = read_bad_nodes(inside.job.slurm_dir).values()
    assert (entry.check, entry.job) == ("hang", inside.number)


def test_what_no_start_can_mend_is_not_started_again(cluster: Cluster, folder: Path) -> None:
    killed = {"kind": "send", "rank": 0, "step": 1, "last": 1, "signal": "SIGKILL"}
    loop = submit_training(
        cluster,
        folder,
        "loop",
        *LENGTH,
        profile=profile("launch.launcher=srun", "restarts.attempts_without_progress=2"),
        faults=[killed],
    )
    wrong = submit_training(cluster, folder, "wrong", "training.stepps=12", profile=profile())
    apart = submit_training(
        cluster,
        folder,
        "apart",
        *LENGTH,
        "training.max_refused_steps=1",
        profile=profile("launch.launcher=srun"),
        faults=[{"kind": "scale", "rank": None, "step": 1, "last": 99, "factor": float("inf")}],
    )
    # Its warning comes before its ranks, in every job of that length.
    brief = profile("restarts.warning_seconds=60", "restarts.attempts_without_progress=2")
    short = submit_training(cluster, folder, "short", *LENGTH, profile=brief, minutes=1)
    jobs = (loop, wrong, apart, short)
    ends = [job.wait() for job in jobs]
    assert ends == ["FAILED"] * 4, "\n".join(job.log() for job in jobs)
    codes = [job_records(job.number)[0]["ExitCode"] for job in jobs]
    assert codes == ["1:0", "2:0", "3:0", "1:0"]
    assert [attempt.verdict for attempt in short.attempts()] == ["out of time"] * 2
    assert job_records(short.number)[0]["Restarts"] == "1"
    assert "before the ranks were started" in short.verdict_file(NO_RESTART)
    assert [attempt.verdict for attempt in loop.attempts()] == ["crashed", "crashed"]
    told = loop.verdict_file(NO_RESTART)
    assert "2 starts in a row left no newer checkpoint" in told
    assert told.count("Killed") == 2
    (only,) = wrong.attempts()
    assert (only.verdict, only.action) == ("bad input", "no restart")
    assert "training.stepps" in wrong.verdict_file(NO_RESTART)
    assert [attempt.verdict for attempt in apart.attempts()] == ["diverged"]
    assert "1 steps in a row had a non-finite loss" in apart.verdict_file(NO_RESTART)


def test_a_chain_goes_on_after_the_limit_and_ends_at_a_stop_file(
    cluster: Cluster, folder: Path, undisturbed: dict[int, float]
) -> None:
    # Signalled by SLURM or by the supervisor's own clock, whichever comes first; two minutes are the shortest limit.
    limited = profile("launch.launcher=srun", "restarts.requeue=false", "restarts.warning_seconds=75")
    # The run's own clock would come before it.
    steps = ("training.steps=900", "training.save_every=500", "faults.wall_time_reserve=1")
    slow = SLOW | {"seconds": 1.0}
    job = submit_training(cluster, folder, "chain", *steps, profile=limited, faults=[slow], chain=3, minutes=2, nodes=1)
    jobs = json.loads((job.job.folder / "submitted.json").read_text())["jobs"]
    assert waiting_successors(job.job.folder, jobs[0]) == jobs[1:]
    cancelled = submit_training(
        cluster, folder, "cancelled", *steps, profile=profile("launch.launcher=srun"), faults=[slow], nodes=1
    )
    cancelled.wait_for_step(2)
    subprocess.run(["scancel", cancelled.number], check=True)
    assert cancelled.wait() == "CANCELLED"
    (attempt,) = cancelled.attempts()
    assert (attempt.verdict, attempt.action) == ("cancelled", "end"), cancelled.log()
    job.wait_for(lambda: bool(job.attempts()))
    (first,) = job.attempts()
    assert (first.verdict, first.action) == ("stopped", "leave"), job.log()
    assert first.reason.startswith(("SIGUSR1 from SLURM", "the end of the job's time"))
    assert first.checkpoint_after == f"checkpoints/step_{first.step_after:08d}"
    job.wait_for_step(first.step_after + 1)
    (job.job.slurm_dir / STOP).touch()
    assert [cluster.wait(number) for number in jobs] == [["FAILED"]] * 3
    assert [job_records(number)[0]["ExitCode"] for number in jobs] == ["143:0"] * 3
    _, second = job.attempts()
    assert (second.verdict, second.action, second.job) == ("stopped", "end", jobs[1])
    assert "nothing to do: there is" in (job.job.folder / f"slurm-{jobs[2]}.out").read_text()
    done = [step for step in job.steps() if step <= 12]
    assert done == [*range(1, len(done) + 1)]
    assert {step: loss for step, loss in job.losses().items() if step <= 12} == pytest.approx(
        {step: undisturbed[step] for step in done}, rel=1e-6
    )
