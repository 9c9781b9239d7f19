"""The `megatron-video` command around its subcommands."""

from __future__ import annotations

import subprocess
import sys

PRINTER = """
import sys
from megatron_video.cli import run_command

def main(argv):
    for number in range(200_000):
        print("line", number)

sys.exit(run_command(main, []))
"""


def test_output_that_nobody_reads_to_its_end_ends_without_a_word() -> None:
    printing = subprocess.Popen(
        [sys.executable, "-c", PRINTER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert printing.stdout
    assert printing.stderr
    assert printing.stdout.readline() == "line 0\n"
    printing.stdout.close()
    assert printing.stderr.read() == ""
    assert printing.wait() == 141
