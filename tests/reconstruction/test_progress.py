"""Going on where another run ended, whatever ended it."""

import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import lq
from lq.attachment.float_models import float_copy
from lq.errors import StateError
from lq.reconstruction.progress import _checksum
from tests.helpers import assert_same
from tests.models import state as state_of
from tests.reconstruction.networks import quantized, samples

SCRIPT = """
import os, signal, sys

sys.path.insert(0, sys.argv[3])
import torch

torch.set_num_threads(1)
from tests.reconstruction.test_progress import prepared, run


def watch(steps, name):
    for step in steps:
        if name == sys.argv[2] and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield step


model, data = prepared()
run(model, data, resume=sys.argv[1], watch=watch)
"""


def prepared(seed=0):
    """A network whose activations have both signs, calibrated on others: zero points will change too."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    data = list(samples((8,), 24).split(8))
    return quantized(model.eval(), [data[0] * 2 + 1], 2, 6), data


def run(model, data, **options):
    given = {"units": "layer", "iterations": 10, "batch_size": 8, "step_lr": 0.01, "bias_lr": 0.01, **options}
    return lq.reconstruct(model, data, **given)


@pytest.fixture(scope="module")
def whole():
    """A run that nothing ended."""
    model, data = prepared()
    return run(model, data), dict(model.state_dict())


def without_seconds(report):
    return [(u.name, u.before, u.after, list(u.curve), u.iterations) for u in report.units]


class Ended(Exception):
    """Ends a run."""


def ended_in(unit, at=3):
    def watch(steps, name):
        for step in steps:
            if name == unit and step == at:
                raise Ended
            yield step

    return watch


def test_a_run_that_was_killed_goes_on_to_the_same_end(whole, tmp_path):
    path = tmp_path / "progress.pt"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(path), "4+5", str(Path(__file__).parents[2])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    saved = torch.load(path, weights_only=True)
    assert [unit["report"]["name"] for unit in saved["units"]] == ["0+1", "2+3"]
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []
    model, data = prepared()
    watched = []
    found = run(model, data, resume=path, watch=lambda steps, name: (watched.append(name), steps)[1])
    assert watched == ["4+5", "6"]  # finished ones are not fitted again
    report, state = whole
    assert_same(dict(model.state_dict()), state)
    assert without_seconds(found) == without_seconds(report)


@pytest.mark.parametrize("activations", ["learned", "float", "quantized"])
@pytest.mark.parametrize("unit", ["0+1", "2+3", "6"])
def test_it_goes_on_from_every_unit(unit, activations, tmp_path):
    model, data = prepared()
    expected = run(model, data, activation_mode=activations)
    state = dict(model.state_dict())
    path = tmp_path / "progress.pt"
    model, data = prepared()
    with pytest.raises(Ended):
        run(model, data, activation_mode=activations, resume=path, watch=ended_in(unit))
    zeros = {key: value for key, value in state.items() if key.endswith("zero_point")}
    start = dict(prepared()[0].state_dict())
    assert any(not torch.equal(value, start[key]) for key, value in zeros.items()) == (activations != "quantized")
    assert path.exists() == (unit != "0+1")
    model, data = prepared()
    found = run(model, data, activation_mode=activations, resume=path)
    assert without_seconds(found) == without_seconds(expected)
    assert_same(dict(model.state_dict()), state)


def test_a_finished_run_is_read_not_repeated(whole, tmp_path):
    path = tmp_path / "deep" / "progress.pt"
    model, data = prepared()
    run(model, data, resume=path)
    assert_same(dict(model.state_dict()), whole[1])
    model, data = prepared()
    found = run(model, data, resume=str(path), watch=ended_in("0+1", 0))
    assert without_seconds(found) == without_seconds(whole[0])
    assert [u.seconds for u in found.units] and all(u.seconds > 0 for u in found.units)
    assert_same(dict(model.state_dict()), whole[1])


def test_the_file_is_whole_at_every_moment(tmp_path, monkeypatch):
    """Writing fails half-way: the file before is still there, and a run goes on from it."""
    path = tmp_path / "progress.pt"
    original, written = torch.save, []

    def failing(content, where, *rest, **options):
        written.append(len(content["units"]))
        if len(written) == 3:
            where.write(b"half of it")
            raise OSError("the disk is full")
        return original(content, where, *rest, **options)

    monkeypatch.setattr(torch, "save", failing)
    model, data = prepared()
    with pytest.raises(OSError, match="disk is full"):
        run(model, data, resume=path)
    monkeypatch.undo()
    assert written == [1, 2, 3]
    assert len(torch.load(path, weights_only=True)["units"]) == 2
    model, data = prepared()
    assert len(run(model, data, resume=path).units) == 4


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"iterations": 11}, "method"),
        ({"rounding": "softmax"}, "method"),
        ({"drop": 0.25}, "method"),
        ({"loss": "fisher"}, "method"),
        ({"seed": 1}, "seed"),
        ({"dtype": torch.float16}, "dtype"),
        ({"units": ["0", "2"]}, "units"),
    ],
)
def test_the_file_of_another_run(change, key, tmp_path):
    path = tmp_path / "progress.pt"
    model, data = prepared()
    with pytest.raises(Ended):
        run(model, data, resume=path, watch=ended_in("2+3"))
    content = path.read_bytes()
    model, data = prepared()
    message = rf"progress.pt belongs to another reconstruction: its {key} is .*, here it is .*; give resume= another"
    with pytest.raises(StateError, match=message):
        run(model, data, resume=path, **change)
    assert path.read_bytes() == content


def test_other_data_and_other_weights_are_another_run(tmp_path):
    path = tmp_path / "progress.pt"
    model, data = prepared()
    with pytest.raises(Ended):
        run(model, data, resume=path, watch=ended_in("2+3"))
    for arguments, key in (
        ((prepared(1)[0], data), "model"),
        ((prepared()[0], [data[1], data[0], data[2]]), "data"),
        ((prepared()[0], data[:2]), "samples"),
    ):
        with pytest.raises(StateError, match=f"belongs to another reconstruction: its {key} is"):
            run(*arguments, resume=path)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04"], ids=["empty", "text", "zip"])
def test_a_corrupt_file(content, tmp_path):
    path = tmp_path / "progress.pt"
    path.write_bytes(content)
    model, data = prepared()
    with pytest.raises(StateError, match="(?s)does not hold the progress of a reconstruction .*or delete the file"):
        run(model, data, resume=path)


@pytest.mark.parametrize("content", [{}, {"units": []}, [1, 2], {"fingerprint": 3, "units": []}], ids=str)
def test_a_file_of_something_else(content, tmp_path):
    path = tmp_path / "progress.pt"
    torch.save(content, path)
    model, data = prepared()
    with pytest.raises(StateError, match="does not hold the progress of a reconstruction|belongs to another"):
        run(model, data, resume=path)


def test_ranks_go_on_from_what_all_of_them_have(tmp_path):
    """A rank that sees more finished units than another forgets them."""
    path = tmp_path / "progress.pt"
    model, data = prepared()
    with pytest.raises(Ended):
        run(model, data, resume=path, watch=ended_in("6"))
    watched = []

    def reduce(tensor, operation):
        return torch.ones_like(tensor) if operation == "min" else tensor  # the other rank has one

    model, data = prepared()
    run(model, data, resume=path, reduce=reduce, watch=lambda steps, name: (watched.append(name), steps)[1])
    assert watched == ["2+3", "4+5", "6"]
    assert len(torch.load(path, weights_only=True)["units"]) == 4


def stopped(path, model, data, **options):
    """A file with the first unit of four."""
    with pytest.raises(Ended):
        run(model, data, resume=path, watch=ended_in("2+3"), **options)
    return path


def scaled(factor):
    """A loss as a function that closes over something."""
    return lambda output, target, weights=None: factor * (output - target).square().mean()


def powered(output, target, weights=None, *, p=2.0):
    return (output - target).abs().pow(p).mean()


class Weighted:
    """A loss as an object that can be called, without a description of itself."""

    weighted = False

    def __init__(self, factor):
        self.factor = torch.tensor(factor)

    def __call__(self, output, target, weights=None):
        return self.factor * (output - target).square().mean()


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (scaled(1.0), scaled(1.0), scaled(2.0)),
        (partial(powered, p=2.0), partial(powered, p=2.0), partial(powered, p=3.0)),
        (Weighted(1.0), Weighted(1.0), Weighted(2.0)),
        (
            lambda output, target, weights=None: (output - target).square().mean(),
            lambda output, target, weights=None: (output - target).square().mean(),
            lambda output, target, weights=None: (output - target).abs().mean(),
        ),
        (lq.reconstruction.LpLoss(2.4), lq.reconstruction.LpLoss(2.4), lq.reconstruction.LpLoss(2.5)),
    ],
    ids=["closure", "partial", "object", "code", "dataclass"],
)
def test_another_loss(one, same, other, tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared(), loss=one)
    with pytest.raises(StateError, match=r"belongs to another reconstruction: its method is .*, here it is"):
        run(*prepared(), resume=path, loss=other)
    assert len(run(*prepared(), resume=path, loss=same).units) == 4


@pytest.mark.parametrize("position", [0, 1, 2])
def test_other_data_in_any_batch(position, tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared())
    model, data = prepared()
    data[position] = data[position].clone()
    data[position][-1, -1] += 1e-6
    with pytest.raises(StateError, match="belongs to another reconstruction: its data is"):
        run(model, data, resume=path)


def test_another_order_of_batches_behind_the_first(tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared())
    model, data = prepared()
    with pytest.raises(StateError, match="belongs to another reconstruction: its data is"):
        run(model, [data[0], data[2], data[1]], resume=path)


def test_other_batches_of_the_same_samples(tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared())
    model, data = prepared()
    with pytest.raises(StateError, match="belongs to another reconstruction: its data is"):
        run(model, torch.cat(data).split(12), resume=path)


def test_another_teacher_and_another_forward(tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared())
    model, data = prepared()
    teacher = float_copy(model)
    assert len(run(prepared()[0], data, resume=path, teacher=float_copy(model)).units) == 4
    teacher[4].weight.data[0, 0] += 1e-6
    with pytest.raises(StateError, match="belongs to another reconstruction: its teacher is"):
        run(prepared()[0], data, resume=path, teacher=teacher)
    with pytest.raises(StateError, match="belongs to another reconstruction: its forward is 'None', here it is"):
        run(prepared()[0], data, resume=path, forward=lambda model, batch: model(batch * 2))


def test_every_flipped_bit_is_found_or_does_not_matter(whole, tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared())
    content = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(30):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        model, data = prepared()
        error = None
        try:
            run(model, data, resume=path)
        except StateError as raised:
            error = raised
        if error is None:
            assert_same(dict(model.state_dict()), whole[1])
        else:
            assert "or delete the file" in str(error)
            refused += 1
    assert refused > 10


def rewritten(path, change):
    """The file with other content, and the checksum of that."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save({**content, "checksum": _checksum(content)}, path)


def _without(tensors):
    del tensors["0.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda units: units[0]["tensors"].update({"0.bias": torch.zeros(1)}), r"0.bias is torch.float32 \(1,\) there"),
        (lambda units: units[0]["tensors"].update({"0.bias": torch.zeros(8).double()}), "0.bias is torch.float64"),
        (lambda units: units[0]["tensors"].update({"0.bias": 1.0}), "0.bias is float there, torch.float32"),
        (lambda units: _without(units[0]["tensors"]), r"unit 0\+1 lacks '0.bias'"),
        (
            lambda units: units[0]["tensors"].update({"2.bias": torch.zeros(8)}),
            r"unit 0\+1 has, for no reason, '2.bias'",
        ),
        (lambda units: units.insert(0, units[0]), r"has '0\+1' as unit 1, expected '2\+3'"),
        (lambda units: units.extend([units[0]] * 4), "holds 5 units, this reconstruction has 4"),
        (lambda units: units[0].pop("report"), "holds no report and tensors of unit 0"),
        (lambda units: units[0]["report"].update(name="6"), r"has '6' as unit 0, expected '0\+1'"),
    ],
    ids=["broadcasts", "type", "no tensor", "missing", "surplus", "repeated", "too many", "no report", "name"],
)
def test_units_that_do_not_fit_leave_the_model_alone(change, message, tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared())
    rewritten(path, lambda content: change(content["units"]))
    model, data = prepared()
    before = state_of(model)
    with pytest.raises(StateError, match=f"{message}.*; give resume= another path, or delete the file"):
        run(model, data, resume=path)
    assert_same(state_of(model), before)


def test_other_widths(tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared())
    model, data = prepared()
    lq.set_bits(model, {"4": 3})
    with pytest.raises(StateError, match="belongs to another reconstruction: its model is"):
        run(model, data, resume=path)


def test_files_of_an_older_format(tmp_path):
    path = stopped(tmp_path / "progress.pt", *prepared())
    content = torch.load(path, weights_only=True)
    torch.save({"fingerprint": content["fingerprint"], "units": content["units"]}, path)
    with pytest.raises(StateError, match="is of format 1, this lq goes on from format 2 alone"):
        run(*prepared(), resume=path)


def test_a_shared_weight_is_restored_by_all_of_its_names(tmp_path):
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        model[2].weight = model[0].weight
        data = list(samples((8,), 24).split(8))
        return quantized(model.eval(), data, 2, 6), data

    model, data = tied()
    run(model, data)
    expected = state_of(model)
    path = tmp_path / "progress.pt"
    with pytest.raises(Ended):
        run(*tied(), resume=path, watch=ended_in("4"))
    model, data = tied()
    found = run(model, data, resume=path)
    assert len(found.units) == 3
    assert_same(state_of(model), expected)
