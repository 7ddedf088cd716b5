"""No part of lq that runs at every step waits for a GPU: found without one, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_what_runs_at_every_step_does_not_wait_for_a_gpu():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:anyio",
        "tests/waiting.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    if reason := re.search(r"SKIPPED .*(torch \S+ lacks what a pretended GPU takes: .*)", done.stdout):
        pytest.skip(reason[1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 40
