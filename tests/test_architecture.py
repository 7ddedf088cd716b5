"""The layout of the project: what may import what, what is packaged, how long files are, what is public."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lq
import lq.callbacks

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]

# What each package of lq imports of the others, from the ground up: each names only packages above it.
MAY_IMPORT = {
    "errors": "",
    "files": "errors",
    "options": "",
    "tables": "",
    "configuration": "errors files",
    "structure": "errors files tables",
    "quantizer": "errors files structure",
    "attachment": "errors files options tables structure quantizer",
    "calibration": "errors structure quantizer attachment",
    "sensitivity": "errors files tables structure quantizer attachment",
    "allocation": "errors files tables structure quantizer attachment sensitivity",
    "training": "errors structure quantizer attachment",
    "reconstruction": "errors files options tables structure quantizer attachment calibration allocation",
    "export": "errors files structure quantizer attachment",
    "report": "errors files tables structure quantizer attachment calibration reconstruction",
    "sites": "attachment",
    "cli": "errors files tables configuration structure quantizer attachment calibration sensitivity allocation export "
    "report",
}

# Packages of interchangeable parts, within those: nothing of models is in them.
PARTS = {
    "quantizer/ranges": ("lq.errors", "lq.quantizer.ranges"),
    "quantizer/estimators": ("lq.errors", "lq.quantizer.estimators", "lq.quantizer.rounding"),
    "allocation/solvers": ("lq.errors", "lq.allocation.solvers"),
}


def package(path):
    """Name of the package of lq that a file belongs to."""
    return path.relative_to(ROOT / "lq").parts[0].removesuffix(".py")


def own(folder):
    """Python files below a folder, not those that links in lq/ show."""
    links = ROOT / "lq" / "callbacks", ROOT / "lq" / "recipes"
    return sorted(p for p in (ROOT / folder).rglob("*.py") if not any(link in p.parents for link in links))


LIBRARY = [path for path in own("lq") if path != ROOT / "lq" / "__init__.py"]
FILES = own("lq") + own("callbacks")
each = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def python(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def imported(path):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_files_are_found():
    assert {"quantizer.py", "finetune.py", "lp.py", "data.py"} <= {path.name for path in FILES}
    assert {package(path) for path in LIBRARY} == set(MAY_IMPORT)


def test_the_table_has_no_circles():
    known = set()
    for name, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= known, name
        known.add(name)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_packages_import_what_the_table_says(name):
    found = {
        module.split(".")[1]
        for path in LIBRARY
        if package(path) == name
        for module in imported(path)
        if "lq." in module
    }
    used = found - {name, "callbacks"}
    assert used <= set(MAY_IMPORT[name].split())
    assert used == set(MAY_IMPORT[name].split()), "the table allows what nothing needs"


@pytest.mark.parametrize("folder", PARTS)
def test_interchangeable_parts_know_nothing_of_models(folder):
    for path in own(f"lq/{folder}"):
        others = {module for module in imported(path) if module.startswith("lq.")}
        assert all(module.startswith(PARTS[folder]) for module in others), path.name


def test_importing_lq_loads_nothing(tmp_path):
    """Much less than torch does: names are loaded when they are used."""
    loaded = "import sys; before = set(sys.modules); import {}; print(len(set(sys.modules) - before))"
    ours, torchs = (int(python(loaded.format(name), tmp_path).stdout) for name in ("lq", "torch"))
    assert ours < 1.1 * torchs
    assert ours < 30


def test_names_load_what_they_need(tmp_path):
    """Beside what ``import torch`` has loaded already."""
    code = "import torch, sys; before = set(sys.modules); import lq\n" + "".join(
        f"lq.{name}; print('{name}', *set(sys.modules) - before)\n"
        for name in ("attach", "calibrate", "measure_sensitivity", "export_onnx", "reconstruct")
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    unwanted = {"lightning", "pytorch_lightning", "scipy", "yaml", "onnx", "onnxruntime", "matplotlib", "rich", "timm"}
    for line in done.stdout.splitlines():
        name, *modules = line.split()
        assert not unwanted & {module.split(".")[0] for module in modules}, name
        used = {"export_onnx": {"lq.export"}, "reconstruct": {"lq.export", "lq.reconstruction", "lq.allocation"}}
        packages = {".".join(module.split(".")[:2]) for module in modules}
        assert not packages & ({"lq.export", "lq.reconstruction", "lq.allocation"} - used.get(name, set())), name


def test_every_public_name_is_there():
    assert all(hasattr(lq, name) for name in lq.__all__)
    assert set(lq.__all__) <= set(dir(lq))
    with pytest.raises(AttributeError, match="module 'lq' has no attribute 'quantise'"):
        lq.quantise  # noqa: B018


def test_editors_see_the_names_that_are_loaded():
    """The imports under TYPE_CHECKING and the table of homes say the same."""
    block = next(
        node
        for node in ast.parse((ROOT / "lq" / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    modules = {name for name, home in seen.items() if home == "lq"}
    assert {name: home for name, home in seen.items() if name not in modules} == lq._HOME
    assert modules == set(lq._MODULES)


def parameters(value):
    """Names, kinds and defaults of what a public name takes."""
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[p.name, p.kind.name, _default(p)] for p in found]


def _default(parameter):
    if parameter.default is parameter.empty:
        return None
    return "a function" if inspect.isfunction(parameter.default) else repr(parameter.default)


@pytest.mark.parametrize("module", [lq, lq.callbacks], ids=["lq", "lq.callbacks"])
def test_public_names_take_what_they_took(module):
    """Of version 0.1.0; new names and new arguments with defaults may come, in any place for keyword-only ones."""
    known = json.loads((ROOT / "tests" / "data" / "public_names.json").read_text(encoding="utf-8"))[module.__name__]
    for name, before in known.items():
        now = parameters(getattr(module, name))
        if before is None:
            continue
        same = [p for p in now if p in before]
        assert sorted(map(repr, same)) == sorted(map(repr, before)), name
        assert [p for p in same if p[1] != "KEYWORD_ONLY"] == [p for p in before if p[1] != "KEYWORD_ONLY"], name
        assert all(p[1] == "KEYWORD_ONLY" and p[2] is not None for p in now if p not in before), name


def test_the_callbacks_do_import_lightning(tmp_path):
    done = python("import lq.callbacks, sys; print('lightning' in sys.modules)", tmp_path)
    assert done.stdout.strip() == "True", done.stderr


def test_the_callbacks_folder_cannot_be_imported_by_its_own_name():
    done = python("import callbacks", ROOT)
    assert done.returncode == 1
    assert "ImportError: these callbacks are the package 'lq.callbacks', not 'callbacks'" in done.stderr


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_lightning_in_lq(path):
    if package(path) == "cli":
        pytest.skip("the command runs Trainers")
    found = [name for name in imported(path) if "lightning" in name or name.startswith("lq.callbacks")]
    assert not found


@each
def test_no_assert_statements(path):
    lines = [n.lineno for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Assert)]
    assert not lines


@each
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@each
def test_files_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_packages_are_those_of_the_tree():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {}
    for top, name in (("lq", "lq"), ("callbacks", "lq.callbacks"), ("recipes", "lq.recipes")):
        for path in (ROOT / top).rglob("__init__.py"):  # does not follow the links in lq/
            folder = path.parent
            if not any(part.is_symlink() for part in (folder, *folder.relative_to(ROOT).parents) if part != Path(".")):
                inner = folder.relative_to(ROOT / top).parts
                found[".".join((name, *inner))] = str(folder.relative_to(ROOT))
    assert sorted(setup["packages"]) == sorted(found)
    assert setup["package-dir"] == found


def test_tests_mirror_the_tree():
    """A folder of tests for each package of lq that is one."""
    packages = {
        path.parent.name for path in own("lq") if path.name == "__init__.py" and path.parent.parent == ROOT / "lq"
    }
    assert packages - {"report"} <= {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_links_show_the_same_tree(name):
    link = ROOT / "lq" / name
    assert link.is_symlink()
    assert link.resolve() == (ROOT / name).resolve()


def test_recipes_are_packaged():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert setup["package-data"]["lq.recipes"] == ["*.yaml"]
    assert {path.suffix for path in (ROOT / "recipes").iterdir() if path.is_file()} <= {".yaml", ".py"}
