"""The options of reconstruction: their checks, and that each is an argument of the function and of the callback."""

import inspect
import io
import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

import lq
from lq.callbacks import Reconstruct
from lq.errors import SpecError
from lq.reconstruction import Annealed, KLLoss
from lq.reconstruction.options import Options, RunOptions
from lq.reconstruction.rounding import AdaRound, Nearest

NAMES = [field.name for field in fields(Options)]


@pytest.mark.parametrize("of", [lq.reconstruct, Reconstruct], ids=["function", "callback"])
def test_each_is_an_argument_with_its_text(of):
    arguments = inspect.signature(of).parameters
    texts = inspect.cleandoc(of.__doc__).split("Args:\n")[1].split("\n\n")[0]
    for field in fields(Options):
        assert arguments[field.name].default == field.default
        assert texts.count(f"    {field.name}: ") == 1


def test_recipes_reach_each_of_them():
    changed = {"seed": 3, "bias_lr": 0.5, "early_stop": True, "resume": "units.pt", "dtype": "float16"}
    (callback,) = [one for one in lq.recipe("qdrop", **changed) if isinstance(one, Reconstruct)]
    shared = callback.options.shared()
    assert list(shared) == NAMES
    assert {name: shared[name] for name in changed} == changed


def test_one_that_is_set_on_a_callback_is_checked():
    callback = Reconstruct(units="layer")
    callback.iterations = 7
    assert callback.options.iterations == 7 and callback.units == "layer"
    with pytest.raises(SpecError, match="iterations=0 must be at least 1"):
        callback.iterations = 0
    assert callback.iterations == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": "blocks"}, r"units='blocks' is unknown; use one of \('layer', .*\), or a list of module names"),
        ({"units": 3}, "units=3 is unknown"),
        ({"start": ["float"]}, r"start=\['float'\] is unknown; use one of \('float', 'feedback'\)"),
        ({"metric": None}, r"metric=None is unknown; use one of \('modcap', 'loss'\)"),
        ({"activation_mode": "none"}, "activation_mode='none' is unknown"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"search_iterations": -1}, "search_iterations=-1 must be at least 1"),
        ({"step_lr": 0.0}, r"step_lr=0.0 must be positive, regularization=0.0 and bias_lr=0.0 not negative"),
        ({"bias_lr": -1.0}, r"bias_lr=-1.0 not negative"),
        ({"regularization": -1.0}, r"regularization=-1.0 and"),
        ({"rounding": "up"}, "rounding='up' is unknown"),
        ({"loss": "l2"}, "loss='l2' is unknown"),
        ({"drop": 2}, "drop=2.0 is no probability"),
        ({"memory": 0}, "memory=0; give a number of bytes"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; use 'float32', 'bfloat16', 'float16' or None"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is unknown"),
        ({"ranks": 0}, "ranks=0 must be at least 1"),
        ({"batch_size": 30, "ranks": 4}, "batch_size=30 cannot be shared by 4 ranks; give a multiple"),
    ],
)
def test_what_does_not_exist(options, message):
    with pytest.raises(SpecError, match=message):
        RunOptions(**options)


def test_names_stand_for_objects():
    named = RunOptions(rounding="nearest", loss="kl", drop="annealed", memory="2KB", dtype="float16")
    assert (named.rounding_method, named.loss_function, named.drop_schedule) == (Nearest(), KLLoss(), Annealed())
    assert (named.memory_limit, named.kept_dtype) == (2000, torch.float16)
    given = RunOptions(rounding=AdaRound(lr=0.1), loss=KLLoss(), drop=0.25, memory=10.0, dtype=torch.bfloat16)
    assert given.rounding_method is given.rounding and given.loss_function is given.loss
    assert (given.drop_schedule(0.3), given.memory_limit, given.kept_dtype) == (0.25, 10, torch.bfloat16)
    assert replace(given, loss="mse").loss_function != given.loss_function
    with pytest.raises(FrozenInstanceError):
        given.loss = "mse"


@pytest.mark.parametrize(("iterations", "share"), [(20_000, 1), (10_000, 2), (1000, 10), (50, 10), (80_000, 1)])
def test_rates_by_the_number_of_iterations(iterations, share):
    assert Options(iterations=iterations).rates == pytest.approx((1e-3 * share, 1e-4 * share))
    assert Options(rounding=AdaRound(lr=0.3), step_lr=0.2, iterations=iterations).rates == (0.3, 0.2)


def test_means_over_ranks():
    sums = []

    def reduce(tensor, operation):
        sums.append(operation)
        return tensor + 5

    one = torch.tensor(3.0)
    assert RunOptions().mean_over_ranks(one) is one
    assert RunOptions(reduce=reduce).mean_over_ranks(one) is one
    assert RunOptions(reduce=reduce, ranks=2).mean_over_ranks(one) == 4.0
    assert sums == ["sum"]


def test_command_lines_show_each_with_its_text_type_and_default(monkeypatch):
    jsonargparse = pytest.importorskip("jsonargparse")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # names differ between its versions
    parser, shown = jsonargparse.ArgumentParser(), io.StringIO()
    parser.add_class_arguments(Reconstruct, "it")
    parser.print_help(shown)
    text = " ".join(shown.getvalue().split())
    for name in inspect.signature(Reconstruct).parameters:
        entry = inspect.cleandoc(Reconstruct.__doc__).split(f"    {name}: ")[1]
        assert re.search(rf"--it\.{name}[^.]* {re.escape(' '.join(entry.split()[:4]))}", text), name
    assert "optimizer steps for a unit. (type: int, default: 20000)" in text
    assert "(type: Literal['start', 'end'], default: start)" in text
    made = parser.parse_args(["--it.drop=annealed", '--it.units=["a", ["b", "c"]]', "--it.dtype=float16"])
    options = parser.instantiate_classes(made).it.options
    assert (options.drop, options.units, options.dtype) == ("annealed", ["a", ["b", "c"]], "float16")
