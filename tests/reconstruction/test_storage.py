"""Where captured tensors go, by size, and that memory stays within its limit."""

import json
import os
import subprocess
import sys

import pytest
import torch

import lq
from lq.errors import LqError, SpecError
from lq.reconstruction.storage import Storage, dtype_of, memory_in_bytes
from tests.helpers import assert_same
from tests.reconstruction.networks import network, quantized

CPU = torch.device("cpu")


def test_tensors_go_to_files_when_the_limit_is_reached():
    storage = Storage(CPU, 1000)
    first, second, third = (storage.empty((100,), torch.float32) for _ in range(3))
    small = storage.empty((50,), torch.float32)
    assert [s.on_disk for s in (first, second, third, small)] == [False, False, True, False]
    del first
    assert not storage.empty((100,), torch.float32).on_disk  # its room was given back
    assert storage.empty((101,), torch.float32).on_disk
    del second, third, small
    assert not storage.empty((250,), torch.float32).on_disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("limit", [10**6, 1], ids=["memory", "file"])
def test_what_is_written_is_read(limit, dtype):
    storage = Storage(CPU, limit)
    values = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    stored = storage.empty((6, 3, 2), dtype)
    assert stored.on_disk == (limit == 1)
    stored.write(0, values[:4])
    stored.write(4, values[4:])
    assert torch.equal(stored.whole(), values)
    assert torch.equal(stored.rows(slice(1, 5)), values[1:5])
    index = torch.tensor([5, 0, 3, 3])
    assert torch.equal(stored.rows(index), values[index])
    rows = stored.rows(slice(0, 2))
    rows.zero_()
    assert torch.equal(stored.whole(), values)  # what was read is a copy


@pytest.mark.parametrize("limit", [10**6, 1], ids=["memory", "file"])
def test_kept_tensors_are_copies(limit):
    tensor = torch.arange(6.0).view(2, 3)
    stored = Storage(CPU, limit).keep(tensor)
    tensor.zero_()
    assert stored.whole().tolist() == [[0, 1, 2], [3, 4, 5]]
    scalar = Storage(CPU, limit).keep(torch.tensor(3))
    assert scalar.whole() == 3
    assert Storage(CPU, limit).keep(torch.zeros(0, 4)).whole().shape == (0, 4)


def test_files_have_no_name_and_lie_where_they_should(tmp_path):
    stored = Storage(CPU, 1, folder=tmp_path).keep(torch.ones(1000))
    assert stored.on_disk and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        Storage(CPU, 1, folder=tmp_path / "missing").keep(torch.ones(1000))


@pytest.mark.parametrize("units", ["layer", "network"])
def test_files_change_no_result(units):
    found = []
    for memory in ("1GB", 1):
        model, x = network("resnet")
        data = list(x.split(4))
        quantized(model, data)
        report = lq.reconstruct(model, data, units=units, iterations=4, batch_size=4, memory=memory)
        found.append((dict(model.state_dict()), [(u.name, u.before, u.after, list(u.curve)) for u in report.units]))
    assert_same(*found)


SCRIPT = """
import json, resource, sys
import torch
from lq.reconstruction.storage import Storage

torch.set_num_threads(1)
MB, KB = 10**6, 1024


def resident():
    with open("/proc/self/status") as status:
        lines = (line.split(":") for line in status if line.startswith(("RssAnon", "RssFile")))
        return {name: int(value.split()[0]) * KB for name, value in lines}


storage = Storage(torch.device("cpu"), 20 * MB)
values = torch.zeros(10, 50_000)
before, peak_before = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KB
stored = []
for k in range(30):
    room = storage.empty((50, 50_000), torch.float32)
    for start in range(0, 50, 10):
        room.write(start, values.fill_(float(k)))
    stored.append(room)
for k, room in enumerate(stored):
    assert room.rows(slice(20, 30)).mean() == k
    assert room.rows(torch.tensor([0, 49])).mean() == k
after, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KB
print(json.dumps({
    "disk": sum(room.on_disk for room in stored),
    "anon": after["RssAnon"] - before["RssAnon"],
    "file": after["RssFile"] - before["RssFile"],
    "peak": peak - peak_before,
}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells what memory is resident")
def test_far_more_than_the_limit_stays_within_it():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout)
    assert grown["disk"] == 28  # 300 MB in all, of which 20 MB are held in memory
    assert grown["anon"] < 40e6
    assert grown["file"] < 15e6
    assert grown["peak"] < 20e6 + 40e6


@pytest.mark.parametrize(("given", "expected"), [("4GB", 4e9), ("1.5MB", 1.5e6), (100, 100), (2.5, 2)])
def test_limits(given, expected):
    assert memory_in_bytes(given) == expected


@pytest.mark.parametrize("given", [0, -1, True, float("nan"), "8x", "0MB"])
def test_limits_that_are_none(given):
    with pytest.raises(LqError, match=r"give a number of bytes or a size such as '4GB'|budget"):
        memory_in_bytes(given)


def test_no_limit():
    storage = Storage(CPU, memory_in_bytes(float("inf")))
    assert not storage.empty((1000,), torch.float32).on_disk


def test_types_by_name():
    assert dtype_of("float16") is torch.float16 and dtype_of("bfloat16") is torch.bfloat16 and dtype_of(None) is None
    for name in ("half16", "int8", "nn"):
        with pytest.raises(SpecError, match=f"dtype='{name}' is unknown; use 'float32', 'bfloat16', 'float16' or None"):
            dtype_of(name)
