"""The documentation says what is: every code block runs, every message exists, every page is reached.

A page's Python blocks run one after the other in one namespace, in a folder of their own, with little work: few
batches, few iterations, a small timm network. A block whose first line is ``# name.py`` or ``# name.yaml`` is also
written to that file, for the shell blocks behind it.
"""

import ast
import contextlib
import functools
import importlib.util
import inspect
import pickle
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

import lq
import lq.callbacks
from lq.cli import main as command
from tests.helpers import tiny

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
PAGES = sorted(
    path
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]
    if not {"_build", "generated", "gallery"} & set(path.relative_to(ROOT).parts)
)
#: What pages need that is in no extra of lq's users.
NEEDS = {"hydra.md": "hydra", "first_hour.md": "hydra", "deploy.md": "openvino"}


#: Networks with the same names of layers, that take less time.
_SMALL = {"resnet18": "test_resnet", "tf_efficientnet_lite0": "test_resnet"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[tuple[str, str]]:
    """Languages and contents of a page's code blocks."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


# --- what a page finds when it begins ---------------------------------------------------------------------------------


class Mine(L.LightningModule):
    """The reader's module, around a timm ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def network() -> Any:
    import timm

    return timm.create_model("test_resnet").eval()


def reader() -> dict[str, Any]:
    """What pages call "yours"."""
    torch.manual_seed(0)
    images, classes = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    data = torch.utils.data.TensorDataset(images, classes)
    return {
        "module": Mine(),
        "datamodule": L.LightningDataModule.from_datasets(data, batch_size=8),
        "model": network(),
        "batches": [(images[:8], classes[:8]), (images[8:], classes[8:])],
        "images": images[:2],
        "MyModule": Mine,
        "my_timm_model": network,
    }


def write_photos(folder: Path) -> None:
    """A folder of JPEGs, one folder a class."""
    from PIL import Image

    values = torch.Generator().manual_seed(0)
    for kind in ("bird", "food", "insect", "mammal", "vehicle"):
        (folder / kind).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(256, (48, 64, 3), generator=values, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / kind / f"{i}.jpg")


def at_most(function: Callable[..., Any], limits: dict[str, int], **others: Any) -> Callable[..., Any]:
    """The function, with numbers that are not above the limits, and other arguments where none are given."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in others}
        given = signature.bind(*args, **kwargs).arguments
        for name, limit in limits.items():
            value = given.get(name, signature.parameters[name].default)
            by_position = name in given and name not in kwargs
            if not by_position and (value is None or value > limit):
                kwargs[name] = limit
        return function(*args, **kwargs, **{name: value for name, value in others.items() if name not in kwargs})

    return limited


@pytest.fixture
def little_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Another folder, short runs, no progress bars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    short = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    monkeypatch.setattr(L.Trainer, "__init__", at_most(L.Trainer.__init__, {"max_epochs": 2}, **quiet, **short))
    for cls, limits in {
        lq.callbacks.Reconstruct: {"iterations": 2, "search_iterations": 1, "samples": 16},
        lq.callbacks.SynthesizeData: {"iterations": 2, "samples": 16},
        lq.callbacks.Quantize: {"calibration_samples": 64},
        lq.callbacks.AllocateBits: {"samples": 16},
    }.items():
        monkeypatch.setattr(cls, "__init__", at_most(cls.__init__, limits))
    monkeypatch.setattr(lq, "reconstruct", at_most(lq.reconstruct, {"iterations": 2}))
    import timm

    create = timm.create_model
    without_network = {"pretrained": False}
    monkeypatch.setattr(
        timm, "create_model", lambda name, **more: create(_SMALL.get(name, name), **(more | without_network))
    )
    write_photos(tmp_path / "photos")
    trained = create("test_resnet", num_classes=5).state_dict()
    torch.save({"state_dict": {f"model.{key}": value for key, value in trained.items()}}, tmp_path / "float.ckpt")
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:  # modules that a page has written
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


# --- running ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Only what lq warns of is an error: documented code has nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in (lq.NoEffectWarning, lq.DivergenceWarning):
            warnings.simplefilter("error", category)
        yield


def write_named(block: str, folder: Path) -> str:
    """Write a block that begins with the name of a file; the name."""
    found = re.match(r"# (\w+\.(?:py|yaml))\n", block)
    if found:
        (folder / found[1]).write_text(block, encoding="utf-8")
    return found[1] if found else ""


def run_python(block: str, names: dict[str, Any], folder: Path, page: str) -> None:
    name = write_named(block, folder)
    if name and "__main__" in block:
        return  # a script, run by a shell block
    exec(compile(block, f"{page}:{name or 'python'}", "exec"), names)


def run_shell(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        program, arguments = words[0], words[1:]
        if program == "python" and (folder / arguments[0]).is_file():
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(str(folder / arguments[0]), run_name="__main__")
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), line
        elif program == "lq" and ">" in arguments:
            *arguments, _, name = arguments
            with (folder / name).open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                assert command(arguments) == 0, line
        elif program == "lq":
            assert command(arguments) == 0, line
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
        else:
            assert program in ("pip", "git", "cd", "source"), f"{line!r} is of a kind that this test cannot check"
            for extra in re.findall(r"(?:lq-lightning|\.)\[([\w,]+)\]", line):
                declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
                assert set(extra.split(",")) <= set(declared), line


def pages_with_code() -> list[Any]:
    """Pages; of the tutorials, which train and export several networks, all but the first are slow."""
    slow = {path for path in (DOCS / "tutorials").glob("*.md") if path.name != "trainer.md"}
    marks = {path: [pytest.mark.slow] if path in slow else [] for path in PAGES}
    return [pytest.param(path, marks=marks[path], id=named(path)) for path in PAGES if blocks(path)]


@pytest.mark.parametrize("path", pages_with_code())
def test_code_of_a_page_runs(path: Path, little_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name in NEEDS and importlib.util.find_spec(NEEDS[path.name]) is None:
        pytest.skip(f"{NEEDS[path.name]} is not installed")
    if path.parent.name == "tutorials":
        first = next(block for _, block in blocks(DOCS / "tutorials" / "trainer.md") if block.startswith("# digits.py"))
        write_named(first, little_work)
    names: dict[str, Any] = {"__name__": "page", **(reader() if path.parent.name != "tutorials" else {})}
    with quietly():
        for language, block in blocks(path):
            if language == "python":
                if path.parent.name != "tutorials":
                    names["module"] = Mine()  # each block is about the reader's own
                run_python(block, names, little_work, path.name)
            elif language == "yaml":
                assert isinstance(yaml.safe_load(block), dict)
                assert write_named(block, little_work), "a configuration begins with the name of its file"
            elif language == "bash":
                run_shell(block, little_work, monkeypatch)
            else:
                assert language in ("text", "toctree"), f"a block of {language!r} would not be checked"


def test_a_wrong_block_is_found(little_work: Path) -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        run_python("import lq\nlq.nonsense()\n", {}, little_work, "page")
    with pytest.raises(AssertionError):
        run_shell("make nonsense\n", little_work, pytest.MonkeyPatch())
    with pytest.raises(AssertionError):
        run_shell("pip install 'lq-lightning[nonsense]'\n", little_work, pytest.MonkeyPatch())


# --- what pages say ---------------------------------------------------------------------------------------------------


def strings() -> list[str]:
    """Literal pieces of all strings in lq and its callbacks; of f-strings, what stands between the values."""
    found = []
    for path in [*(ROOT / "lq").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [re.sub("\0+", "\0", text) for text in found]


def test_messages_of_the_troubleshooting_page_exist() -> None:
    texts = strings()
    headings = re.findall(
        r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(headings) > 30
    of_torch = {heading for heading in headings if heading.startswith("Serialization of parametrized modules")}
    quantized = lq.attach(tiny().net, 8, None)
    with pytest.raises(RuntimeError, match=re.escape(next(iter(of_torch)))):
        pickle.dumps(quantized)
    gone = [heading for heading in headings if heading not in of_torch and not any(heading in text for text in texts)]
    assert not gone


def test_every_page_is_reached_and_links_go_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not re.match(r"https?:|.*generated/|.*gallery/", target):
                assert (path.parent / target).exists(), f"{named(path)} links to {target}"


@pytest.fixture(scope="module")
def pages() -> Any:
    spec = importlib.util.spec_from_file_location("generated_pages", DOCS / "_ext" / "generated_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_of_a_method(pages: Any) -> None:
    shown = [name for methods in pages.METHODS.values() for method in methods.values() for name in method.recipes]
    assert sorted(shown) == lq.recipe_names()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_begins_with_what_it_is_for(path: Path) -> None:
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    labels = re.findall(r"^# (Source|Use|Measured|Time|Command): \S", header, flags=re.MULTILINE)
    assert labels == ["Source", "Use", "Measured", "Time", "Command"]
    assert f'lq.recipe("{path.stem}"' in header.replace("\n#  ", "")


def test_method_pages_are_what_the_code_says(pages: Any) -> None:
    made = pages.pages()
    assert "Nagel et al., Up or Down?" in made["methods/adaround.rst"]
    assert "Deviates: differences are those of logarithms" in made["methods/mrecg.rst"]
    assert pages.module_of("estimators.noise_scale").__name__.endswith("estimators.noise_scale")
    assert hasattr(pages.module_of("noise_scale"), "WidthLearner")
    assert not pages.module_of("noise_scale").__name__.startswith("lq.callbacks")
    assert pages.module_of("callbacks.noise_scale") is sys.modules["lq.callbacks.noise_scale"]
    with pytest.raises(LookupError, match="no module of lq ends in 'nonsense'"):
        pages.module_of("nonsense")


def test_the_reference_has_every_public_name(pages: Any) -> None:
    lines = {line.strip() for line in pages.reference_page().splitlines()}
    for package in (lq, lq.callbacks):
        assert set(pages.public(package)) <= lines
    assert {name for names in pages.GROUPS.values() for name in names} <= set(pages.public(lq))
    assert {"attach", "LqError"} <= set(pages.public(lq))


def test_the_picture_is_made_of_the_results(tmp_path: Path) -> None:
    script = runpy.run_path(str(DOCS / "accuracy_by_width.py"))
    found = script["scores"]((DOCS / "results.md").read_text(encoding="utf-8"))
    assert found["best_ptq"]["W3A3"] == 90.5
    script["main"](tmp_path / "picture.svg")
    for path in (tmp_path / "picture.svg", DOCS / "_static" / "accuracy_by_width.svg"):
        assert 1_000 < path.stat().st_size < 100_000


def test_the_readme_is_one_screen_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
