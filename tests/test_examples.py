"""The examples run, and the README's Python parses and names what exists."""

import ast
import json
import logging
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lq
import lq.callbacks

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*")


@pytest.fixture(autouse=True)
def level_of_lightning() -> Iterator[None]:
    """Examples make Lightning quiet, for their process."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def test_quickstart_in_short(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "examples/quickstart.py"))["main"]
    results = {row.name: row for row in main(["--output", str(tmp_path), "--epochs", "3", "--no-progress"])}
    assert results["float"].accuracy > 80
    assert results["W8A8 post-training"].accuracy > results["float"].accuracy - 3
    assert results["W2A2 fine-tuned"].size < results["W4A4 fine-tuned"].size < results["float"].size / 6
    assert (tmp_path / "digits_w2a2.ckpt").is_file()
    assert (tmp_path / "accuracy_vs_size.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quickstart_reaches_its_goals(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "examples/quickstart.py"))["main"]
    accuracy = {row.name: row.accuracy for row in main(["--output", str(tmp_path), "--no-progress"])}
    assert accuracy["float"] >= 97
    assert accuracy["W4A4 fine-tuned"] >= accuracy["float"] - 1
    assert accuracy["W2A2 fine-tuned"] >= accuracy["float"] - 5


def test_benchmark_of_the_training_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = runpy.run_path(str(ROOT / "examples/benchmarks/training_step.py"), run_name="training_step")
    monkeypatch.setitem(benchmark["WORK"], "test_resnet", ({}, 32))
    variants = ["float", "lsq", "learned widths"]
    seconds = benchmark["compare"]("test_resnet", variants, rounds=2)
    assert [len(times) for times in seconds.values()] == [2, 2, 2]
    assert all(time > 0 for times in seconds.values() for time in times)


def test_benchmark_on_a_gpu_tries_its_code_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    benchmark = runpy.run_path(str(ROOT / "examples/benchmarks/gpu.py"), run_name="gpu")
    benchmark["main"](["--device", "cpu", "--tiny", "--json", str(path)])
    found = json.loads(path.read_text())
    variants = ["float", "lq", "lq, no kernels"]
    assert {name: list(rows) for name, rows in found["steps"].items()} == {
        "test_resnet, float32": variants,
        "test_resnet, bfloat16": variants,
    }
    assert all(row["milliseconds"] > 0 for rows in found["steps"].values() for row in rows.values())
    assert found["reconstruction"]["test_resnet"]["units"] > 1
    assert found["sensitivity"]["seconds"] > 0
    assert "sensitivity of test_vit (0 M)" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_benchmark_on_a_gpu_says_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples/benchmarks/gpu.py"), run_name="gpu")["main"]
    with pytest.raises(SystemExit):
        main([])
    assert "no CUDA GPU here; --device cpu --tiny tries the code" in capsys.readouterr().err


def test_readme_python_parses_and_names_what_exists() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lq":
                assert hasattr(lq, node.attr), node.attr
            if isinstance(node, ast.ImportFrom) and node.module == "lq.callbacks":
                assert all(hasattr(lq.callbacks, alias.name) for alias in node.names)


def test_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    assert sys.version_info >= (3, 10)


def test_allocation_of_the_digits_network(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "examples/allocate_bits.py"))["main"]
    found = main(["--output", str(tmp_path), "--epochs", "3"])
    assert found["by layer"] > found["uniform"] + 10
    assert found["by channel"] > found["uniform"] + 10
    assert found["by channel"] > found["float"] - 10
    assert lq.Allocation.load(tmp_path / "channel.json").weights
    for name in ("bits_per_layer", "sensitivity", "pareto_front"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif("LQ_DATA" not in os.environ, reason="LQ_DATA is not set: fine-tuning needs real weights and images")
def test_benchmark_of_finetuning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples/benchmarks")
    main = runpy.run_path(str(ROOT / "examples/benchmarks/finetuning.py"), run_name="finetuning")["main"]
    reader = runpy.run_path(str(ROOT / "examples/benchmarks/real_data.py"), run_name="real_data")["pack"]()
    for split in ("train", "test"):  # the few exact images instead of decoding 60 000
        pixels, labels = reader.cifar10(split)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        torch.save((images, torch.from_numpy(labels)), tmp_path / f"images_{split}.pt")
    few = ["--images", "256", "--threads", str(torch.get_num_threads())]
    main(["float", "--output", str(tmp_path / "float.pt"), "--epochs", "1", *few])
    table = ["table", "--output", str(tmp_path), "--bits", "4", "--steps", "2", "--methods", "ptq", "ste", "lsq", *few]
    main([*table, "--part", "1", "--of", "2"])
    main(table)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    main(table)
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines  # nothing is run twice
    found = {row["run"]["method"]: row["result"] for row in map(json.loads, lines)}
    assert list(found) == ["ptq", "lsq", "float", "ste"]
    assert found["float"]["top1"] > 80
    assert found["float"]["kl"] == 0
    assert all(found[method]["top1"] > 60 and found[method]["kl"] > 0 for method in ("ptq", "ste", "lsq"))
    assert all(found[method]["average_bits"] < 4.1 for method in ("ptq", "ste", "lsq"))
    assert f"| LSQ | {found['lsq']['top1']:.2f} (" in capsys.readouterr().out
