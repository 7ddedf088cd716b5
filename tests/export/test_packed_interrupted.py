"""Saving that ends half-way leaves the old file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lq
from tests.attachment.networks import images, quantized, small
from tests.export.damage import saved_model
from tests.export.files import state
from tests.helpers import assert_same

SCRIPT = """
import os, signal, sys

sys.path.insert(0, sys.argv[2])
import torch

torch.set_num_threads(1)
import lq
from lq.export import packed
from tests.export.damage import saved_model

original, packs = packed.pack, []


def pack(parts):
    packs.append(parts)
    if len(packs) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(parts)


packed.pack = pack
lq.save(saved_model(2), sys.argv[1])
"""


def test_a_process_that_is_killed_leaves_the_old_file(saved, tmp_path):
    path, script = tmp_path / "m.safetensors", tmp_path / "script.py"
    path.write_bytes(saved[1])
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(Path(__file__).parents[2])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".unfinished")]  # it was at it
    assert path.read_bytes() == saved[1]
    assert torch.equal(lq.load(path, small(9).eval())(images()), saved[0](images()))
    again = saved_model(2)
    lq.save(again, path)
    assert torch.equal(lq.load(path, small(9).eval())(images()), again(images()))


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("old", [True, False])
def test_an_error_half_way_leaves_the_old_file(error, old, saved, tmp_path, monkeypatch):
    path, packs = tmp_path / "m.safetensors", []
    if old:
        path.write_bytes(saved[1])

    def failing(parts):
        packs.append([p.stat().st_size for p in tmp_path.iterdir() if "unfinished" in p.name])
        if len(packs) == 3:
            raise error
        return b"something"

    monkeypatch.setattr("lq.export.packed.pack", failing)
    model = saved_model(2)
    before = state(model)
    with pytest.raises(type(error)):
        lq.save(model, path)
    assert len(packs) == 3 and all(len(sizes) == 1 for sizes in packs)  # an unfinished file beside it
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"] * old
    assert not old or path.read_bytes() == saved[1]
    assert_same(state(model), before)


def test_a_file_is_replaced_by_a_whole_one(saved, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(saved[1])
    model = saved_model(2, seed=1)
    assert lq.save(model, path) == path.stat().st_size < len(saved[1])
    assert torch.equal(lq.load(path, small(9).eval())(images()), model(images()))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_folder_in_its_place_stays(tmp_path):
    (tmp_path / "m.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="m.safetensors"):
        lq.save(quantized(), tmp_path / "m.safetensors")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "m.safetensors",
        "m.safetensors/inside",
    ]
