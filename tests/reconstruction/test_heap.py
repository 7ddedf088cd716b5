"""Memory that is kept while units are fitted: fewer page faults, and none of it is kept afterwards."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
from lq.reconstruction.heap import kept_memory

SIZE = 16 << 20  # numbers: 64 MB


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(SIZE).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()


outside = faults()
before = resident()
try:
    with kept_memory(torch.device(sys.argv[1])):
        faults()
        inside, held = faults(), resident()
        if sys.argv[2] == "error":
            raise RuntimeError
except RuntimeError:
    pass
after = resident()
print(json.dumps({"outside": outside, "inside": inside, "held": held - before, "after": after - before}))
"""


def measured(device="cpu", end="end", **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", SCRIPT, device, end]
    done = subprocess.run(command, env=clean | environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("end", ["end", "error"])
def test_blocks_are_used_again_and_given_back_in_the_end(end):
    found = measured(end=end)
    assert found["inside"] < found["outside"] / 10
    assert found["held"] > 50e6 > 10e6 > found["after"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("how", [{"device": "meta"}, {"MALLOC_ARENA_MAX": "4"}])
def test_nothing_changes_elsewhere_or_if_the_environment_says_how(how):
    found = measured(**how)
    assert found["inside"] > found["outside"] / 2
