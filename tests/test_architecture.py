"""The layout of the project: what may import what, what is packaged, how long files are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
TORCH_ONLY = sorted((ROOT / "lq").glob("*.py")) + sorted((ROOT / "lq" / "ranges").rglob("*.py"))
FILES = TORCH_ONLY + sorted((ROOT / "callbacks").rglob("*.py"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def python(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def imported(path):
    """Top-level names that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_files_are_found():
    assert {"quantizer.py", "finetune.py", "lp.py"} <= {path.name for path in FILES}


def test_importing_lq_does_not_import_lightning(tmp_path):
    code = (
        "import lq, sys; print(sorted(m for m in sys.modules if m.split('.')[0] in {'lightning', 'pytorch_lightning'}))"
    )
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_callbacks_do_import_lightning(tmp_path):
    done = python("import lq.callbacks, sys; print('lightning' in sys.modules)", tmp_path)
    assert done.stdout.strip() == "True", done.stderr


def test_the_callbacks_folder_cannot_be_imported_by_its_own_name():
    done = python("import callbacks", ROOT)
    assert done.returncode == 1
    assert "ImportError: these callbacks are the package 'lq.callbacks', not 'callbacks'" in done.stderr


@pytest.mark.parametrize("path", TORCH_ONLY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_lightning_in_lq(path):
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


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_links_show_the_same_tree(name):
    link = ROOT / "lq" / name
    assert link.is_symlink()
    assert link.resolve() == (ROOT / name).resolve()


def test_recipes_are_packaged():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert setup["package-data"]["lq.recipes"] == ["*.yaml"]
    assert {path.suffix for path in (ROOT / "recipes").iterdir() if path.is_file()} <= {".yaml", ".py"}
