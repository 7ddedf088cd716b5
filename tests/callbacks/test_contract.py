"""What every callback of lq.callbacks promises, checked on all of them by introspection."""

import inspect
import json
import re
import tempfile
import typing
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

import lq
import lq.callbacks
from lq.attachment.sites import quantizers
from lq.callbacks import (
    ExportModel,
    FineTune,
    FreezeOscillations,
    OptimizeRanges,
    Quantize,
    Reconstruct,
    ReconstructMLP,
    SynthesizeData,
)
from tests.helpers import QUIET, assert_same, cli, fit, hooks, loader, quantizer_ids, steps, tiny, trainer

NOTHING_TO_DO = "ignore:ReconstructMLP found no GELU"  # in the network of these tests
pytestmark = [pytest.mark.filterwarnings(text) for text in (*QUIET, NOTHING_TO_DO)]

CALLBACKS = [
    value
    for _, value in sorted(vars(lq.callbacks).items())
    if inspect.isclass(value) and issubclass(value, pl.Callback)
    if value is not lq.callbacks.Recipe  # stands for others; test_recipe.py compares it with the list of them
]
every = pytest.mark.parametrize("cls", CALLBACKS, ids=lambda cls: cls.__name__)


#: Less work than by default, for callbacks that do much of it.
SMALL: dict[type[pl.Callback], dict[str, Any]] = {
    ExportModel: {"path": str(Path(tempfile.mkdtemp(), "model.safetensors"))},
    FreezeOscillations: {"max_bits": 8},
    OptimizeRanges: {"evaluations": 3},
    Reconstruct: {"iterations": 2},
    ReconstructMLP: {"iterations": 2},
    SynthesizeData: {"shape": (1, 6, 6), "samples": 16, "iterations": 2},
}


def chain(cls: type[pl.Callback], first: Quantize | None = None, **kwargs: Any) -> list[pl.Callback]:
    """The callback with default arguments, behind the Quantize that it builds on (or before it, where it belongs)."""
    quantize = Quantize() if first is None else first
    if cls is Quantize:
        return [cls(**kwargs) if kwargs else quantize]
    made = cls(**{**SMALL.get(cls, {}), **kwargs})
    return [made, quantize] if cls in (ReconstructMLP, SynthesizeData) else [quantize, made]


def arguments(cls: type[pl.Callback]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls).parameters)


def test_all_are_found():
    assert {Quantize, FineTune} <= set(CALLBACKS)


@every
def test_arguments_are_typed_plain_and_have_defaults(cls):
    hints = typing.get_type_hints(cls.__init__)
    for name, parameter in arguments(cls).items():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), name
        assert name in hints and hints[name] is not Any, f"{name} has no type"
        assert parameter.default is not parameter.empty, f"{name} has no default"
        assert json.loads(json.dumps(parameter.default)) == parameter.default, name


@every
def test_arguments_are_documented(cls):
    section = inspect.cleandoc(cls.__doc__).split("Args:\n")[1]
    documented = re.findall(r"^    (\w+): ", section, re.MULTILINE)
    assert documented == list(arguments(cls))


@every
def test_lightning_cli_shows_each_argument_with_its_text(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        cli(options=[f"--trainer.callbacks.help=lq.callbacks.{cls.__name__}"])
    shown = " ".join(capsys.readouterr().out.split())
    section = inspect.cleandoc(cls.__doc__).split("Args:\n")[1]
    for name, text in re.findall(r"^    (\w+): (.+)", section, re.MULTILINE):
        assert f"--trainer.callbacks.{name}" in shown, name
        assert text in shown, name


@every
def test_lightning_cli_builds_it_from_yaml(cls, tmp_path):
    defaults = {name: p.default for name, p in arguments(cls).items()}
    entry = {"class_path": f"lq.callbacks.{cls.__name__}", "init_args": defaults}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [entry]}}))
    built = [c for c in cli(config).trainer.callbacks if type(c) is cls]
    assert len(built) == 1
    for name, value in defaults.items():
        if hasattr(built[0], name):
            assert getattr(built[0], name) == value


@every
@pytest.mark.parametrize(
    ("options", "batches"),
    [({"fast_dev_run": True}, 1), ({"limit_train_batches": 2}, 2), ({"max_epochs": 0}, 0)],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_trainer_options(cls, options, batches):
    module, read = tiny(), []

    class Watched(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    data = torch.utils.data.DataLoader(Watched(*loader().dataset.tensors), batch_size=8)
    fit(module, chain(cls), data, **options)
    assert len(module.seen) == batches
    assert all(q.isfinite().all() for q in steps(module))
    limit = {"fast_dev_run": 8, "limit_train_batches": 16}.get(next(iter(options)), 32)
    assert max(read, default=0) < limit  # calibration keeps to the Trainer's limits too


@every
def test_evaluates_before_and_after_fit(cls):
    module, made = tiny(), trainer(chain(cls, Quantize(activations=None)))
    before = made.validate(module, loader(), verbose=False)[0]["val_loss"]
    attached = {id(quantizer) for quantizer in quantizers(module)}
    assert attached
    made.test(module, loader(), verbose=False)
    assert len(made.predict(module, loader())) == 4
    made.fit(module, loader())
    assert {id(quantizer) for quantizer in quantizers(module)} == attached
    after = made.validate(module, loader(), verbose=False)[0]["val_loss"]
    assert after < before
    assert made.test(module, loader(), verbose=False)[0]["test_loss"] == after
    state = {key: value.clone() for key, value in module.state_dict().items()}
    made.predict(module, loader())
    assert_same(dict(module.state_dict()), state)


@every
def test_evaluation_before_fit_is_that_of_the_float_module(cls):
    made, module = trainer(chain(cls)), tiny()
    assert made.validate(module, loader(), verbose=False) == trainer().validate(tiny(), loader(), verbose=False)
    assert_same(dict(module.state_dict()), dict(tiny().state_dict()))


@every
def test_setup_is_idempotent(cls):
    callbacks, module = chain(cls), tiny()
    made = trainer(callbacks)
    made.strategy.connect(module)
    for callback in callbacks:
        callback.setup(made, module, "fit")
    first, keys, hooked = quantizer_ids(module), list(module.state_dict()), hooks(module)
    for callback in callbacks:
        for stage in ("fit", "validate", "test", "predict"):
            callback.setup(made, module, stage)
    assert (quantizer_ids(module), list(module.state_dict()), hooks(module)) == (first, keys, hooked)


@every
def test_checkpoint_holds_plain_state(cls, tmp_path):
    callbacks, module = chain(cls), tiny()
    made = fit(module, callbacks)
    made.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    for callback in callbacks:
        state = callback.state_dict()
        if state:
            assert_same(checkpoint["callbacks"][callback.state_key], state)
    assert {k for k in checkpoint["state_dict"] if k.endswith("log2_step")}


VARIANTS = [(Quantize, {}), *[(cls, {}) for cls in CALLBACKS if cls is not Quantize]]
VARIANTS += [
    (FineTune, {"distill": 1.0}),
    (FineTune, {"dampening": 0.1}),
    (FineTune, {"lr": 0.01, "schedule": "cosine"}),
]


@pytest.mark.parametrize(("cls", "kwargs"), VARIANTS, ids=lambda v: getattr(v, "__name__", None) or ",".join(v))
def test_no_trace_after_fit(cls, kwargs):
    module, reference = tiny(), tiny()
    made = fit(module, chain(cls, **kwargs))
    lq.attach(reference, 8, 8)
    assert hooks(module) == hooks(reference)
    assert [n for n, _ in module.named_modules()] == [n for n, _ in reference.named_modules()]
    assert sorted(module.state_dict()) == sorted(reference.state_dict())
    assert type(module) is type(reference)
    assert all(q.tap is None for n, q in module.named_modules() if hasattr(q, "tap"))
    extra = set(vars(module)) ^ set(vars(reference))
    assert not extra, extra
    assert made.strategy.lightning_module is module


@pytest.mark.parametrize("generator", [False, True], ids=["global", "own"])
@every
def test_batches_are_the_same_with_and_without(cls, generator):
    seen, states = [], []
    for with_it in (False, True):
        module = tiny()
        own = torch.Generator().manual_seed(5) if generator else None
        data = loader(shuffle=True, generator=own)
        pl.seed_everything(7, verbose=False)
        fit(module, chain(cls) if with_it else [], data, max_epochs=2)
        seen.append(module.seen)
        states.append((torch.get_rng_state(), own.get_state() if own else 0))
    assert_same(seen[0], seen[1])
    assert not torch.equal(seen[0][0], next(iter(loader()))[0])  # it was shuffled
    assert_same(states[0], states[1])


@every
def test_same_import_path_as_recipes(cls):
    assert cls.__module__.startswith("lq.callbacks.")
    assert Path(inspect.getfile(cls)).parent.name == "callbacks"
