"""What the supervisor of a training decides from what a start left; the starts themselves are in tests/slurm."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_video.errors import UserError
from slurm.allocation import Choice, choose_nodes
from slurm.attempts import Attempt, add_line, new_attempt_folder, read_attempts, record_surroundings, without_progress
from slurm.bad_nodes import add_bad_node, forgive_node, read_bad_nodes
from slurm.job import Job
from slurm.launch import Launch, port, srun_command, training_options, write_task_environment
from slurm.numa import bind_to_gpu, cpus_near, parse_cpus
from slurm.profile import ClusterProfile, Software
from slurm.rank import stacks_file
from slurm.run_files import Marks, checkpoint_steps, has_progressed, latest_checkpoint
from slurm.step import StepEnd
from slurm.supervise import left_already
from slurm.verdict import judge

FAILED = StepEnd(1, 9.0)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = tmp_path / "run" / "slurm" / "0001-first"
    folder.mkdir(parents=True)
    return Job("first", "pretrain", tmp_path / "run", folder, ["-m", "training.pretrain"], nodes=2, cwd=tmp_path)


@pytest.fixture
def attempt(job: Job) -> Path:
    """Folder of a start of two nodes with two ranks each."""
    _, folder = new_attempt_folder(job, "17", 0)
    for number, host in enumerate(("alpha.cluster", "beta.cluster")):
        record = {"node": f"node{number + 1}", "host": host, "ranks": [2 * number, 2 * number + 1]}
        (folder / "nodes" / f"node{number + 1}.json").write_text(json.dumps(record))
        (folder / "nodes" / f"node{number + 1}.log").write_text("step 1\n")
    (folder / "failures").mkdir()
    return folder


def fails(attempt: Path, rank: int, node: str, code: int, error: str = "", when: float = 1.0) -> None:
    record = {"rank": rank, "node": node, "code": code, "error": error, "time": when}
    (attempt / "failures" / f"rank_{rank:05d}.json").write_text(json.dumps(record))


def verdict(attempt: Path, job: Job, end: StepEnd = FAILED, before: Marks | None = None) -> tuple[str, tuple[str, ...]]:
    found = judge(attempt, job.run_dir, job.kind, end, before or Marks.of_run(job.run_dir), time.time() - 60)
    return found.name, found.culprits


def test_the_first_rank_that_failed_decides(attempt: Path, job: Job) -> None:
    fails(attempt, 0, "node1", 1, "RuntimeError: Connection closed by peer", when=2.0)
    fails(attempt, 3, "node2", 1, "RuntimeError: something of its own", when=1.0)
    found = judge(attempt, job.run_dir, job.kind, FAILED, Marks.of_run(job.run_dir), 0)
    assert (found.name, found.culprits, found.suspect) == ("crashed", (), "node2")
    assert "something of its own" in found.reason


def test_a_rank_killed_by_a_signal_comes_before_those_that_fail_because_of_it(attempt: Path, job: Job) -> None:
    fails(attempt, 0, "node1", 1, "RuntimeError: Connection closed by peer")
    (attempt / "nodes" / "node2.log").write_text("E1123 failed (exitcode: -9) local_rank: 0 (pid: 12) of binary\n")
    found = judge(attempt, job.run_dir, job.kind, FAILED, Marks.of_run(job.run_dir), 0)
    assert (found.name, found.suspect) == ("crashed", "node2")


def test_a_task_killed_by_a_signal_comes_first_too(attempt: Path, job: Job) -> None:
    fails(attempt, 0, "node1", 1, "DistBackendError: caused by a remote worker crashing")
    (attempt / "srun.log").write_text("srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Terminated\n")
    found = judge(attempt, job.run_dir, job.kind, FAILED, Marks.of_run(job.run_dir), 0)
    assert (found.name, found.suspect, found.reason) == (
        "crashed",
        "node2",
        "srun: error: node2: task 1: Killed (on node2)",
    )


@pytest.mark.parametrize(
    ("code", "name"), [(2, "bad input"), (3, "diverged"), (143, "stopped"), (75, "hung"), (1, "crashed")]
)
def test_exit_codes_of_ranks(attempt: Path, job: Job, code: int, name: str) -> None:
    fails(attempt, 1, "node1", code)
    assert verdict(attempt, job) == (name, ())


def test_bad_input_is_told_in_the_commands_words(attempt: Path, job: Job) -> None:
    fails(attempt, 0, "node1", 2)
    (attempt / "nodes" / "node1.log").write_text("a line\n[default0]:error: data.shards=[x]: no such folder\n")
    found = judge(attempt, job.run_dir, job.kind, FAILED, Marks.of_run(job.run_dir), 0)
    assert found.reason == "rank 0: error: data.shards=[x]: no such folder (on node1)"


def test_errors_of_the_machine_name_the_node_at_once(attempt: Path, job: Job) -> None:
    fails(attempt, 2, "node2", 1, "AcceleratorError: CUDA error: uncorrectable ECC error encountered")
    assert verdict(attempt, job) == ("crashed", ("node2",))


def test_a_lost_node_is_no_end_though_srun_left_with_0(attempt: Path, job: Job) -> None:
    end = replace(FAILED, code=0)
    assert verdict(attempt, job, end)[0] == "finished"
    # As srun of SLURM 22.05 did in a job with --no-kill, of which the step's only node lost its power.
    (attempt / "srun.log").write_text("srun: error: Node failure on node2\n")
    assert verdict(attempt, job, end) == ("node failed", ("node2",))


def test_a_node_that_takes_no_task_is_to_blame(attempt: Path, job: Job) -> None:
    said = "srun: error: Task launch for StepId=1.2 failed on node node2: Communication connection failure\n"
    (attempt / "srun.log").write_text(said)
    assert verdict(attempt, job) == ("node failed", ("node2",))


def test_the_watchdogs_culprit_by_slurms_name_of_its_node(attempt: Path, job: Job) -> None:
    culprit = {"rank": 3, "host": "beta.cluster", "why": "is silent"}
    line = {"event": "hang", "time": "2999-01-01T00:00:00+00:00", "culprits": [culprit]}
    (job.run_dir / "events.jsonl").write_text(json.dumps(line) + "\n")
    assert verdict(attempt, job) == ("hung", ("node2",))


def test_of_a_silent_step_those_that_write_no_stacks_are_to_blame(attempt: Path, job: Job) -> None:
    end = StepEnd(137, 9.0, silent="no sign of life for 5 s")
    assert verdict(attempt, job, end) == ("hung", ())
    (attempt / "stacks").mkdir()
    for rank, text in enumerate(("Thread 0x1", "Thread 0x2", "Thread 0x3", "")):
        stacks_file(attempt, rank).write_text(text)
    assert verdict(attempt, job, end) == ("hung", ("node2",))


def test_an_old_status_says_nothing(attempt: Path, job: Job) -> None:
    status = job.run_dir / "status.json"
    status.write_text('{"state": "finished"}')
    before = Marks.of_run(job.run_dir)
    fails(attempt, 0, "node1", 1, "ValueError: x")
    assert verdict(attempt, job, before=before)[0] == "crashed"
    status.write_text('{"state": "finished", "step": 7}')
    # torchrun may fail when the training has long come to its end.
    assert verdict(attempt, job, before=before)[0] == "finished"


def checkpoint(run_dir: Path, place: str, step: int, complete: bool = True) -> None:
    folder = run_dir / place / f"step_{step:08d}"
    folder.mkdir(parents=True)
    if complete:
        (folder / "train_state.json").touch()


def test_progress_is_a_newer_complete_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, "checkpoints", 10)
    before = checkpoint_steps(tmp_path)
    assert before == {"checkpoints": 10}
    checkpoint(tmp_path, "checkpoints", 20, complete=False)
    checkpoint(tmp_path, "checkpoints", 5)
    assert not has_progressed(before, checkpoint_steps(tmp_path))
    # The first one of a curriculum's next stage.
    checkpoint(tmp_path, "t2v/checkpoints", 1)
    assert has_progressed(before, checkpoint_steps(tmp_path))
    os.utime(tmp_path / "t2v" / "checkpoints" / "step_00000001", (1e10, 1e10))
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.folder == "t2v/checkpoints/step_00000001"


def test_starts_without_progress_are_counted_from_the_last_that_made_some(job: Job) -> None:
    def add(number: int, verdict: str, progress: bool = False, submission: str = "0001-first") -> None:
        add_line(job, Attempt(f"17.0.{number}", submission, "17", "t", ["node1"], verdict=verdict, progress=progress))

    add(1, "crashed")
    add(2, "crashed", progress=True)
    add(3, "crashed")
    add(4, "stopped")
    add(5, "hung")
    with (job.slurm_dir / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": "torn')
    add(6, "crashed", submission="0002-again")
    known = read_attempts(job.slurm_dir)
    assert [attempt.attempt for attempt in known] == [f"17.0.{number}" for number in range(1, 7)]
    assert [attempt.attempt for attempt in without_progress(known, "0001-first")] == ["17.0.3", "17.0.5"]


def test_a_later_job_of_a_chain_leaves_at_once(job: Job) -> None:
    assert left_already(job) is None
    for name, code in (("STOP", 143), ("NO_RESTART", 1), ("DONE", 0)):
        (job.slurm_dir / name).write_text("why\n")
        assert left_already(job) == code


def test_nodes_are_left_out_for_a_time(tmp_path: Path) -> None:
    add_bad_node(tmp_path, "node2", reason="hung", check="hang", hours=2, job="17")
    entry = add_bad_node(tmp_path, "node2", reason="again", check="crash", hours=1, job="18")
    assert (entry.reason, entry.check) == ("hung", "hang")
    assert list(read_bad_nodes(tmp_path)) == ["node2"]
    assert read_bad_nodes(tmp_path, now=time.time() + 7300) == {}
    assert forgive_node(tmp_path, "node2")
    assert not forgive_node(tmp_path, "node2")
    (tmp_path / "bad_nodes.json").write_text("{")
    with pytest.raises(UserError, match=r"bad_nodes.json is not readable .* remove it"):
        read_bad_nodes(tmp_path)


def test_choice_of_nodes() -> None:
    nodes = ["node1", "node2", "node3", "node4"]
    assert choose_nodes(nodes, {}, {}, 2) == Choice(["node1", "node2"], ["node3", "node4"])
    states = {"node1": "MIXED+DRAIN", "node2": "DOWN*", "node3": "MIXED*", "node4": "MIXED"}
    # One that does not answer may only restart its daemon; one that is drained runs on, but last.
    chosen = choose_nodes(nodes, states, {}, 2)
    assert chosen == Choice(["node3", "node4"], ["node1"], {"node2": "SLURM has it as DOWN*"})
    chosen = choose_nodes(nodes, states, {"node3": "hang: x"}, 2)
    assert chosen is not None
    assert chosen.nodes == ["node1", "node4"]
    assert choose_nodes(nodes, states, {"node3": "hang: x"}, 3) is None


def test_secrets_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hidden")
    monkeypatch.setenv("SITE_VALUE", "hidden")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    record_surroundings(tmp_path, ["SITE_VALUE"])
    text = (tmp_path / "environment.txt").read_text()
    assert "hidden" not in text
    assert "SITE_VALUE=(not written)" in text
    assert "NCCL_IB_HCA=mlx5" in text


@pytest.fixture
def launch(attempt: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setattr("slurm.launch.compress", ",".join)
    return Launch("17.0.1", attempt, ["node1", "node3"], "17", 1, 8, 1795396847.0)


def test_options_of_a_training_with_spares(job: Job) -> None:
    profile = ClusterProfile()
    assert training_options(job, profile) == ["--signal=B:USR1@300", "--requeue"]
    job = Job(**{**asdict(job), "spare_nodes": 1})
    profile.restarts.requeue = False
    assert training_options(job, profile) == ["--signal=B:USR1@300", "--no-requeue", "--no-kill"]


def test_ports_of_starts_and_of_neighbours_differ(launch: Launch) -> None:
    ports = {port(ClusterProfile(), Launch(**{**vars(launch), "job_id": str(job_id)})) for job_id in range(1, 900)}
    assert len(ports) == 899
    assert all(15000 <= number < 30000 for number in ports)


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_the_step_enters_the_container(job: Job, launch: Launch, container: str) -> None:
    profile = ClusterProfile(software=Software(container=container, image="/images/mv.sqsh", mounts=["/data:/data:ro"]))
    words = srun_command(job, profile, launch)
    script = words.index("bash")
    assert {"--kill-on-bad-exit=1", "--wait=300", "--ntasks=2", "--nodelist=node1,node3"} <= {*words}
    if container == "pyxis":
        assert f"--container-mounts={job.run_dir}:{job.run_dir},{job.cwd}:{job.cwd},/data:/data:ro" in words
    else:
        assert words[script - 1] == "/images/mv.sqsh"
        assert words[words.index("apptainer") : words.index("apptainer") + 2] == ["apptainer", "exec"]


def test_the_task_passes_its_ranks_on(job: Job, launch: Launch, tmp_path: Path) -> None:
    """The real script of a task, with `env` for the training: what torchrun and the ranks get."""
    profile = ClusterProfile(environment={"NCCL_IB_HCA": "mlx5_0 mlx5_1"})
    profile.slurm.gpus_per_node, profile.software.setup = 4, ["export FROM_SETUP=1"]
    profile.launch.launcher = "srun"
    profile.software.python = "/usr/bin/env"
    job = Job(**{**asdict(job), "gpus_per_node": 4})
    write_task_environment(job, profile, launch)
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "17", "SLURMD_NODENAME": "node3", "SLURM_LOCALID": "1"}
    environment |= {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NODEID": "1"}
    script = Path(__file__).parents[2] / "slurm" / "training_task.sh"
    # `env -m ...` is no call of env: the array's first word alone is kept.
    text = (launch.attempt / "task.env").read_text()
    (launch.attempt / "task.env").write_text(text + "training=(/usr/bin/env)\n")
    result = subprocess.run(["bash", script, launch.attempt], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    got = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")
    assert [got[name] for name in ranks] == ["5", "1", "8", "4", "1", "node1"]
    assert (got["NCCL_IB_HCA"], got["FROM_SETUP"], got["SLURM_JOB_END_TIME"]) == ("mlx5_0 mlx5_1", "1", "1795396847")
    assert got["TRITON_CACHE_DIR"].endswith("-17/triton")
    assert shlex.split(text.splitlines()[-1].removeprefix("training=(").removesuffix(")"))[1:3] == ["-m", "slurm.rank"]


def test_a_rank_is_bound_to_the_cpus_beside_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_cpus("0-2,8\n") == {0, 1, 2, 8}
    mine = sorted(os.sched_getaffinity(0))
    for number, cpus in enumerate((mine[:1], mine[1:])):
        (tmp_path / "devices" / f"0000:{number}b:00.0").mkdir(parents=True)
        (tmp_path / "devices" / f"0000:{number}b:00.0" / "numa_node").write_text(f"{number}\n")
        (tmp_path / "nodes" / f"node{number}").mkdir(parents=True)
        (tmp_path / "nodes" / f"node{number}" / "cpulist").write_text(",".join(map(str, cpus)) + "\n")
    places = tmp_path / "devices", tmp_path / "nodes"
    assert cpus_near("00000000:0B:00.0", *places) == set(mine[:1])
    assert cpus_near("00000000:FF:00.0", *places) == set()
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        "#!/bin/sh\nprintf '0, GPU-a, 00000000:0B:00.0\\n1, GPU-b, 00000000:1B:00.0\\n'\n"
    )
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    try:
        assert bind_to_gpu(2, *places) == mine
        # One GPU is left of two, so number 0 is the second.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert bind_to_gpu(0, *places) == mine[1:] or len(mine) == 1
        assert sorted(os.sched_getaffinity(0)) == mine[1:] or len(mine) == 1
    finally:
        os.sched_setaffinity(0, mine)
