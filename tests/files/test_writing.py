"""Files: what is read from outside, and writers that end half-way or meet."""

import os
import pickle
import stat
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import lq
from lq.errors import DataError
from lq.files import decompress, parse_json, read_checkpoint, read_text, require_file, whole_file
from tests.attachment.networks import images, quantized, small
from tests.export.files import state
from tests.helpers import assert_same

# --- reading ----------------------------------------------------------------------------------------------------------


def test_text(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path) == "a\r\nb"
    path.write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=r"t, byte 3: it is no text in UTF-8"):
        read_text(path)
    with pytest.raises(DataError, match="t is larger than 3 bytes"):
        read_text(path, limit=3)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="there is no file .*none"):
        require_file(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder; give the name of a file"):
        require_file(tmp_path)
    with pytest.raises(DataError, match="cannot be opened"):
        require_file("a\0b")
    with pytest.raises(lq.RecipeError, match="there is no file"):
        require_file(tmp_path / "none", lq.RecipeError)


@pytest.mark.skipif(os.name != "posix", reason="named pipes are files there alone")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(DataError, match="is no ordinary file, but a pipe, socket or device"):
        read_checkpoint(tmp_path / "pipe.pt")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user that permissions hold for")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "t"
    path.touch()
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be opened: Permission denied"):
        require_file(path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


JSON = {
    "cut": ('{"a": [1, 2', "line 1, column 12: no JSON"),
    "empty": ("", "line 1, column 1: no JSON"),
    "twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000, "nested too deeply"),
    "a huge integer": ("[" + "9" * 10_000 + "]", "an integer of 10000 digits"),
}


@pytest.mark.parametrize("kind", JSON)
def test_texts_that_are_no_json(kind):
    text, message = JSON[kind]
    with pytest.raises(DataError, match=message):
        parse_json(text)


def test_json_of_all_kinds():
    assert parse_json('{"a": [1, -2.5, true, null, "\\u00e9", 18446744073709551615]}') == {
        "a": [1, -2.5, True, None, "é", 2**64 - 1]
    }


def test_decompress():
    packed = zlib.compress(bytes(1000))
    assert decompress(packed, 1000) == bytes(1000)
    for data, limit, message in (
        (packed, 999, "more than 999 bytes"),
        (packed[:-2], 1000, "it is cut"),
        (packed + b"x", 1000, "goes on behind its end"),
        (b"nothing", 1000, "cannot be decompressed"),
    ):
        with pytest.raises(DataError, match=message):
            decompress(data, limit)


def as_archive(compression=zipfile.ZIP_STORED, **parts):
    def make(path, saved):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in parts.items():
                archive.writestr(f"archive/{name}", content)

    return make


def repacked(path, saved):
    """The checkpoint, but its zeros compressed."""
    path.write_bytes(saved)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content + bytes(10_000_000))


def written(change):
    return lambda path, saved: path.write_bytes(change(saved))


def with_object(path, saved):
    torch.save({"state_dict": {"a": torch.ones(2)}, "hyper_parameters": {"folder": Path()}}, path)


CHECKPOINTS = {
    "half": (written(lambda saved: saved[: len(saved) // 2]), "cut or damaged"),
    "without its end": (written(lambda saved: saved[:-100]), "cut or damaged"),
    "without its start": (written(lambda saved: saved[100:]), "torch.save writes archives, which begin otherwise"),
    "text": (written(lambda saved: b"hello, world"), "torch.save writes archives, which begin otherwise"),
    "empty": (written(lambda saved: b""), "it is empty"),
    "a pickle": (written(lambda saved: pickle.dumps({"a": 1})), "no checkpoint of tensors"),
    "a pickle that executes": (written(lambda saved: b"\x80\x04cos\nsystem\n(S'touch executed'\ntR."), "no checkpoint"),
    "an archive of other files": (as_archive(a="b"), "no checkpoint of tensors"),
    "a compressed one": (repacked, "is compressed, which torch.save never writes"),
    "other objects": (with_object, r"no checkpoint of tensors: it holds a pathlib\S* besides tensors and plain values"),
    "missing": (lambda path, saved: None, "there is no file"),
    "a folder": (lambda path, saved: path.mkdir(), "is a folder"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_files_that_are_no_checkpoint(kind, tmp_path, monkeypatch):
    make, message = CHECKPOINTS[kind]
    monkeypatch.chdir(tmp_path)
    torch.save(quantized().state_dict(), tmp_path / "saved.pt")
    path = tmp_path / "m.pt"
    make(path, (tmp_path / "saved.pt").read_bytes())
    for model in (small(9), lq.attach(small(9), 4)):
        before = state(model)
        for source in (path, str(path)):
            with pytest.raises(DataError, match=message) as raised:
                lq.load(source, model)
            assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert_same(state(model), before)
    assert not (tmp_path / "executed").exists()


def test_an_older_form_of_checkpoints(tmp_path):
    model = quantized()
    torch.save(model.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "m.pt"), dict(model.state_dict()))
    assert torch.equal(lq.load(tmp_path / "m.pt", small(9).eval())(images()), model(images()))


# --- writing ----------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def ended_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_leftovers_of_ended_processes_are_removed(tmp_path):
    gone, here = ended_process(), os.getpid()
    for name in (f"f.{gone}", f"f.{here}", f"g.{gone}", f"f.{os.getppid()}", f"f.elsewhere.{gone}.1-1", "f.x"):
        (tmp_path / f"{name}.unfinished").touch()
    with whole_file(tmp_path / "f") as path:
        left = set(names(tmp_path)) - {path.name}
        path.write_text("all")
    kept = {f"g.{gone}", f"f.{os.getppid()}", f"f.elsewhere.{gone}.1-1", "f.x"}
    assert left == {f"{name}.unfinished" for name in kept}
    assert set(names(tmp_path)) == left | {"f"} and (tmp_path / "f").read_text() == "all"


def test_a_killed_writer_is_cleaned_up_after(tmp_path):
    code = (
        "import os, pathlib, signal, sys\nfrom lq.files.writing import whole_file\n"
        "with whole_file(pathlib.Path(sys.argv[1])) as path:\n    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(lq.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], env=env, check=False, timeout=120)
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].endswith(".unfinished")
    with whole_file(tmp_path / "f") as path:
        path.write_text("all")
    assert names(tmp_path) == ["f"]


def test_old_leftovers_are_removed_whoever_wrote_them(tmp_path):
    (other := tmp_path / "f.elsewhere.1.1-1.unfinished").touch()
    os.utime(other, (0, time.time() - 30 * 24 * 3600))
    with whole_file(tmp_path / "f") as path:
        path.write_text("all")
    assert names(tmp_path) == ["f"]


def test_writers_in_threads_do_not_meet(tmp_path):
    """Each has a file of its own, none is removed by another, and the last that ends wins."""
    inside, errors = threading.Barrier(8), []

    def write(i):
        try:
            for _ in range(5):
                with whole_file(tmp_path / "f") as path:
                    inside.wait(60)
                    path.write_text(str(i) * 100_000)
                    inside.wait(60)
                assert len(set((tmp_path / "f").read_text())) == 1
        except Exception as error:  # noqa: BLE001  (told below)
            errors.append(error)
            inside.abort()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(tmp_path) == ["f"]
    assert len((tmp_path / "f").read_text()) == 100_000


def test_models_saved_by_two_threads_to_one_path(tmp_path):
    models = [lq.attach(nn.Sequential(nn.Linear(64, 64)), bits, first_last=None) for bits in (2, 3)]
    path = tmp_path / "m.safetensors"
    threads = [threading.Thread(target=lambda m=m: [lq.save(m, path) for _ in range(10)]) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = lq.load(path, nn.Sequential(nn.Linear(64, 64)))
    assert any(torch.equal(loaded[0].weight, model[0].weight) for model in models)
    assert names(tmp_path) == ["m.safetensors"]


def test_the_last_writer_wins(tmp_path):
    with whole_file(tmp_path / "f") as first:
        with whole_file(tmp_path / "f") as second:
            first.write_text("first")
            second.write_text("second")
        assert (tmp_path / "f").read_text() == "second"
    assert (tmp_path / "f").read_text() == "first" and names(tmp_path) == ["f"]


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
import lq
from lq.export.program import export_program

folder = Path(sys.argv[1])
x = torch.randn(8, 64)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
lq.calibrate(lq.attach(model, 4, 8), [x])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for name, write in {
    "m.safetensors": lambda path: lq.save(model, path),
    "m.pt2": lambda path: export_program(model, x[:2], path),
    "m.onnx": lambda path: lq.export_onnx(model, x[:2], path),
    "m.pt": lambda path: lq.reconstruct(model, [x], units="layer", iterations=2, resume=path),
}.items():
    (folder / name).write_bytes(b"old")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        (folder / name).unlink() if name == "m.pt" else None
        write(folder / name)
    except lq.WriteError as error:
        assert f"{name} cannot be written: File too large" in str(error), error
        assert name == "m.pt" or (folder / name).read_bytes() == b"old"
        assert name == "m.pt" or all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        print(name)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are set as on Unix")
def test_a_full_disk_is_one_error(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, tmp_path], capture_output=True, timeout=300, check=False
    )
    assert run.stdout.decode().split() == ["m.safetensors", "m.pt2", "m.onnx", "m.pt"], run.stderr.decode()[-2000:]
    assert names(tmp_path) == ["m.onnx", "m.pt2", "m.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "'.*folder' cannot be written: it is a folder"),
        ("a\0b", "cannot be written: it is no name of a file"),
        ("none/f", "f cannot be written: No such file or directory"),
        ("a" * 300, "a cannot be written: File name too long"),
    ],
)
def test_what_cannot_be_written(name, message, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(lq.WriteError, match=message), whole_file(tmp_path / name) as path:
        path.write_text("all")
    assert names(tmp_path) == ["folder"]
    with pytest.raises(lq.WriteError, match="it is a folder|it is no name of a file"), whole_file(Path()):
        pass
