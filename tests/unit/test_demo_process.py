"""Child processes of the demo: streaming, exit codes, and that no descendant outlives a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from training.demo_process import run_streamed

# A parent that starts a rank in a session of its own, as torchrun does, and waits.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
open(sys.argv[1], "w").write(str(child.pid))
child.wait()
"""


def wait_gone(pid: int) -> bool:
    # Half the time that it would live if nobody ended it.
    for _ in range(600):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_output_goes_to_console_and_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = "import os, sys; print(os.environ['X'], '蓝色'); print('oops', file=sys.stderr); sys.exit(3)"
    log = tmp_path / "logs" / "01.log"
    assert run_streamed([sys.executable, "-c", script], log, {"X": "hello"}) == 3
    assert capfd.readouterr().out == "    hello 蓝色\n    oops\n"
    assert log.read_text().splitlines()[-2:] == ["hello 蓝色", "oops"]


def test_kill_reaches_ranks_in_their_own_sessions(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    code = run_streamed([sys.executable, "-c", PARENT, str(marker)], tmp_path / "log", kill_when=marker.exists)
    assert code == -signal.SIGKILL
    assert wait_gone(int((tmp_path / "log").read_text().splitlines()[-1]))


def test_sigterm_ends_the_whole_tree(tmp_path: Path) -> None:
    marker, log = tmp_path / "pid", tmp_path / "log"
    caller = (
        "import sys; from pathlib import Path; from training.demo_process import run_streamed; "
        f"run_streamed([sys.executable, '-c', {PARENT!r}, {str(marker)!r}], Path({str(log)!r}))"
    )
    demo = subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.DEVNULL)
    while not marker.exists() or not marker.read_text():
        time.sleep(0.05)
    os.kill(demo.pid, signal.SIGTERM)
    assert demo.wait(timeout=120) == 128 + signal.SIGTERM
    assert wait_gone(int(marker.read_text()))
