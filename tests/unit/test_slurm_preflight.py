"""Verdicts of preflight: tables, formats of nvidia-smi, halving, results of products, and scores of nodes."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from slurm import allreduce, burn, preflight_gpu
from slurm.job import Job
from slurm.node_scores import append, read, robust_z
from slurm.nodes import main as nodes_command
from slurm.nodes import rank
from slurm.preflight_checks import CHECKS, BadNode, judge, limits, odd_ones_out, old_drivers
from slurm.preflight_network import Group, find_slow_nodes
from slurm.preflight_probes import PROBES, measure, probe_fabric
from slurm.preflight_requests import AllReduceRequest, BurnRequest, HostRequest, read_request, write_request
from slurm.preflight_steps import clock_offsets
from slurm.profile import ClusterProfile, Preflight

# `nvidia-smi nvlink --status` of an H100 PCIe with links bridged in pairs, as shown in public notes on that card: the
# heading of a GPU, then a line a link.
NVLINK = """GPU 0: NVIDIA H100 PCIe (UUID: GPU-6968dfc2-d444-d92c-c36b-6abe53445cb9)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
\t Link 2: <inactive>
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-abcdefab-cdef-abdc-abcd-abababababab)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
\t Link 2: 26.562 GB/s
"""
# Lines of the kernel as NVIDIA's documentation of Xid errors and forum reports quote them.
KERNEL = """[12.3] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.124.06
[99.1] NVRM: Xid (PCI:0000:18:00): 79, pid=1122, GPU has fallen off the bus.
[99.1] NVRM: Xid (PCI:0000:18:00): 79, pid=1122, GPU has fallen off the bus.
[99.4] NVRM: Xid (PCI:0000:2a:00): 31, pid=7, MMU Fault: ENGINE GRAPHICS faulted
"""


def answer(**figures: Any) -> dict[str, dict[str, Any]]:
    return {"figures": figures, "errors": {}}


def test_every_check_names_a_field_of_the_profile_and_a_probe() -> None:
    for check in CHECKS:
        assert hasattr(Preflight(), check.field), check
        assert check.probe in {*PROBES, "clock", "burn"}, check
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_a_figure_is_held_to_the_profile() -> None:
    wanted = limits(Preflight(min_local_write=100.0), 0)
    sound = {check.figure: wanted[check.name] for check in CHECKS if check.name in wanted}
    assert judge("node1", answer(**sound), wanted) == []
    (bad,) = judge("node1", answer(**{**sound, "local_write": 99.0}), wanted)
    text = "writing to the local disk: 99 MB/s, at least 100 MB/s is asked (preflight.min_local_write)"
    assert (bad.check, bad.reason) == ("local write", text)
    (bad,) = judge("node1", answer(**{**sound, "skew_seconds": 2.1}), wanted)
    assert bad.check == "clock"


def test_what_was_not_measured_speaks_against_a_node_unless_it_is_left_out() -> None:
    wanted = limits(Preflight(), 0)
    sound = {check.figure: wanted[check.name] for check in CHECKS if check.name in wanted}
    del sound["local_write"], sound["local_read"]
    told = {"figures": sound, "errors": {"local": "OSError: [Errno 28] No space left on device"}}
    bad = judge("node1", told, wanted)
    assert [finding.check for finding in bad] == ["local write", "local read"]
    assert "not measured: OSError: [Errno 28]" in bad[0].reason
    assert judge("node1", told, limits(Preflight(min_local_write=None, min_local_read=None), 0)) == []


def test_gpus_are_asked_for_only_where_a_job_takes_them() -> None:
    assert "gpus" not in limits(Preflight(), 0)
    assert limits(Preflight(), 8)["gpus"] == 8
    assert "gemm results" in limits(Preflight(), 0, burn=True)
    assert "leftovers" in limits(Preflight(), 8)
    assert "leftovers" not in limits(Preflight(), 2, shared=True)
    (bad,) = [b for b in judge("n", answer(gpus=7), limits(Preflight(), 8)) if b.check == "gpus"]
    assert bad.reason == "GPUs that nvidia-smi shows: 7, at least 8 is asked (preflight.gpus)"


def test_a_probe_that_fails_does_not_hide_the_others() -> None:
    def broken(request: HostRequest) -> dict[str, Any]:
        raise OSError(5, "Input/output error")

    found = measure(HostRequest("f", "t", "l", 1, 1, 1.0, []), {"a": broken, "b": lambda request: {"x": 1}})
    assert found == {"figures": {"x": 1}, "errors": {"a": "OSError: [Errno 5] Input/output error"}}


def test_nodes_that_differ_from_most_are_named() -> None:
    answers = {name: answer(driver="570.1", python="3.12.3") for name in ("n1", "n2", "n3")}
    assert odd_ones_out(answers) == []
    answers["n2"] = answer(driver="565.2", python="3.12.3")
    (bad,) = odd_ones_out(answers)
    assert (bad.name, bad.check) == ("n2", "driver")
    assert "driver 565.2, but 2 of 3 nodes have 570.1" in bad.reason
    assert [b.name for b in old_drivers(answers, "570")] == ["n2"]
    assert old_drivers(answers, None) == old_drivers(answers, "565.2") == []


def test_answers_of_nvidia_smi() -> None:
    cards = preflight_gpu.parse_csv("00000000:18:00.0, 0\n00000000:2A:00.0, 3\n", preflight_gpu.ECC_FIELDS)
    assert preflight_gpu.bad_memory(cards) == {"00000000:2A:00.0": 3}
    without_ecc = preflight_gpu.parse_csv("00000000:18:00.0, [N/A]\n", preflight_gpu.ECC_FIELDS)
    assert preflight_gpu.bad_memory(without_ecc) == {}
    rows = preflight_gpu.parse_csv(
        "00000000:18:00.0, 2, Yes, No\n00000000:2A:00.0, 0, No, No\n", preflight_gpu.ROW_FIELDS
    )
    assert preflight_gpu.failed_rows(rows) == {"00000000:18:00.0": "remapped_rows.pending"}
    assert preflight_gpu.max_count(rows, "remapped_rows.uncorrectable") == 2
    # Idle (0x1) and a power cap (0x4) are no faults; 0x48 is a hardware slowdown by heat.
    clocks = "00000000:18:00.0, 0x0000000000000005\n00000000:2A:00.0, 0x0000000000000048\n"
    found = preflight_gpu.slowdowns(preflight_gpu.parse_csv(clocks, preflight_gpu.CLOCK_FIELDS))
    assert found == {"00000000:2A:00.0": "hardware slowdown, hardware thermal"}
    assert preflight_gpu.parse_csv("", preflight_gpu.APP_FIELDS) == []
    with pytest.raises(RuntimeError, match="nonsense"):
        preflight_gpu.parse_csv("nonsense\n", preflight_gpu.ECC_FIELDS)


def test_links_and_errors_of_the_driver() -> None:
    assert preflight_gpu.active_links(NVLINK) == {"0": 2, "1": 3}
    assert preflight_gpu.xid_lines(KERNEL, [79, 48]) == ["79 on 0000:18:00"]
    assert preflight_gpu.xid_lines(KERNEL, [48]) == []


def test_ports_of_the_fabric(tmp_path: Path) -> None:
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    found = probe_fabric(HostRequest("f", "t", "l", 1, 1, 1.0, []), tmp_path)
    assert found == {"fabric_ports": 1, "fabric_down": {"mlx5_1:1": "1: DOWN"}}


def test_clocks_by_the_line_that_came_soonest() -> None:
    lines = [(100.5, "clock a 100.0\n"), (100.61, "clock a 100.6\n"), (100.2, "clock b 130.0\n"), (1.0, "noise\n")]
    found = clock_offsets(lines)
    assert found == pytest.approx({"a": -0.01, "b": 29.8})


class SimulatedNetwork:
    """Nodes with links of their own rate, and a switch above each half of the cluster."""

    def __init__(self, rates: dict[str, float], between: float = 100.0, several_ranks: bool = False) -> None:
        self.rates, self.between, self.several_ranks = rates, between, several_ranks
        self.asked: list[Group] = []

    def measure(self, groups: Sequence[Group]) -> list[float]:
        assert len({node for group in groups for node in group}) == sum(map(len, groups)), "groups overlap"
        self.asked += groups
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> float:
        if len(group) == 1:
            return 400.0 if self.several_ranks else float("inf")
        halves = {node < "n08" for node in group}
        return min([self.rates[node] for node in group] + ([self.between] if len(halves) > 1 else []))


@pytest.mark.parametrize("count", [3, 4, 5, 8, 13, 16])
def test_halving_names_the_slow_nodes_whichever_they_are(count: int) -> None:
    names = [f"n{index:02d}" for index in range(count)]
    for slow in names:
        network = SimulatedNetwork(
            {name: 1.0 if name == slow else 50.0 for name in names}, several_ranks=count % 2 == 0
        )
        verdict = find_slow_nodes(names, network.measure, 10.0)
        assert [bad.name for bad in verdict.bad] == [slow], (count, slow, network.asked)
        assert verdict.bad[0].sure
        assert verdict.gb_s == 1.0


def test_halving_names_several_slow_nodes() -> None:
    names = [f"n{index:02d}" for index in range(12)]
    draw = random.Random(1)
    for _ in range(50):
        slow = set(draw.sample(names, 2))
        left = list(names)
        found: set[str] = set()
        network = SimulatedNetwork({name: 1.0 if name in slow else 50.0 for name in names})
        # As preflight does: again without those that were named.
        while verdict := find_slow_nodes(left, network.measure, 10.0):
            if not verdict.bad:
                break
            found |= {bad.name for bad in verdict.bad}
            left = [name for name in left if name not in found]
        assert found == slow


def test_what_lies_with_no_single_node_is_said() -> None:
    names = [f"n{index:02d}" for index in range(16)]
    network = SimulatedNetwork(dict.fromkeys(names, 50.0), between=2.0)
    verdict = find_slow_nodes(names, network.measure, 10.0)
    assert verdict.bad == []
    assert verdict.notes[0].startswith("between n00, n01")
    pair = find_slow_nodes(["n00", "n15"], network.measure, 10.0)
    assert [(bad.name, bad.sure) for bad in pair.bad] == [("n00", False), ("n15", False)]


def test_products_of_a_sound_device_are_exact_and_a_wrong_element_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert burn.exact_errors(cpu, 128, torch.float32) == burn.exact_errors(cpu, 128, torch.bfloat16) == 0
    rate, errors = burn.burn_device(cpu, 64, 0.01)
    assert rate > 0
    assert errors == 0

    calls, product = [0], torch.Tensor.__matmul__

    def faulty(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = product(a, b)
        calls[0] += 1
        if calls[0] > 1 and result.shape[1] > 1:
            result[3, 5] += 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", faulty)
    _, errors = burn.burn_device(cpu, 64, 0.01)
    assert errors > 0


def test_requests_survive_their_file(tmp_path: Path) -> None:
    host = HostRequest(str(tmp_path), "token", "/tmp", 1, 2, 3.0, [79])
    assert read_request(HostRequest, write_request(host)) == host
    assert (tmp_path / "token").read_text() == "token"
    products = BurnRequest(str(tmp_path), 8, 1.0, 64)
    assert read_request(BurnRequest, write_request(products)) == products


def test_an_all_reduce_of_one_process_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendezvous, sum and bus bandwidth with one rank; several are measured by tests/slurm."""
    request = AllReduceRequest(str(tmp_path), [socket.gethostname()], 1, 0, 1, 20.0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    thread = threading.Thread(target=allreduce.run_rank, args=(request, 0))
    thread.start()
    thread.join(60)
    # One rank moves nothing over a bus: 2 (n - 1) / n is 0.
    assert json.loads(request.result.read_text()) == {"gb_s": 0.0, "ranks": 1}
    assert request.rendezvous.read_text().split()[0] == socket.gethostname()


def test_drift_against_the_fleet() -> None:
    rates = {f"n{index}": 700.0 + index for index in range(9)}
    z = robust_z({**rates, "slow": 600.0})
    assert z["slow"] < -10
    assert all(abs(value) < 3 for name, value in z.items() if name != "slow")
    # Two nodes cannot outvote each other.
    assert robust_z({"a": 1.0, "b": 100.0}) == {"a": 0.0, "b": 0.0}
    # Alike to the last digit: a difference of a thousandth is no drift.
    assert abs(robust_z({"a": 1000.0, "b": 1000.0, "c": 999.0})["c"]) < 1


def test_scores_are_kept_and_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = tmp_path / "shared"
    profile = ClusterProfile(preflight=Preflight(scores=str(shared)))
    job = Job(
        name="run", kind="pretrain", run_dir=tmp_path / "run", folder=tmp_path / "run" / "slurm" / "1", command=[]
    )
    for start in range(3):
        figures = {f"n{index}": {"gemm_tflops": 700.0 + index, "driver": "570"} for index in range(6)}
        figures["n4"]["gemm_tflops"] = 690.0 - 20 * start
        append(job, profile, figures, [BadNode("n5", "gemm", "slow")])
    own = read(job.slurm_dir / "node_scores")
    assert own == read(shared)
    assert [entry["figures"] for entry in own["n1"]] == [{"gemm_tflops": 701.0}] * 3
    ranked = rank(own, last=10)
    assert ranked[0].node == "n4"
    assert (ranked[0].scores["gemm_tflops"].median, ranked[0].scores["gemm_tflops"].last) == (670.0, 650.0)
    assert next(standing for standing in ranked if standing.node == "n5").refused == 3
    assert nodes_command(["--scores", str(shared)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[:2] == ["n4", "3"]
    assert "worth a look: n4" in printed
    # A line that was cut by a full disk costs itself only.
    with open(shared / "n1.jsonl", "a") as file:
        file.write('{"node": "n1", "fig')
    assert len(read(shared)["n1"]) == 3
