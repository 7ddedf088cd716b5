"""Files of every kind that lq reads, changed at random: each is a clear error, or what it says is what is loaded.

The changes are seeded. Those of bytes are those of packed files; texts of JSON are changed as values too, and packed
files get right checksums around wrong content. Time and memory are bounded for each.
"""

import csv
import io
import json
import random
import sys
import time
import zlib

import pytest
import torch
import yaml
from torch import nn

import lq
from lq.allocation.budget import read_latencies
from lq.attachment.sites import is_attached
from lq.configuration.recipe import recipe_path
from lq.errors import DataError, LqError, RecipeError, StateError
from tests.attachment.networks import images, small
from tests.export.damage import append, cut, flip, insert, overwrite, remove, repeat, saved_model, zero
from tests.export.files import parse, signed, state
from tests.helpers import assert_same

resource = pytest.importorskip("resource")
BYTES = (flip, zero, overwrite, cut, append, insert, remove, repeat)

# Of one file: seconds (of a busy machine) and bytes.
SECONDS, MEMORY = 10, 1 << 30


@pytest.fixture(autouse=True)
def limited():
    """No test may take much more memory than there is in use, where the system can say so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MEMORY, hard))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1024 if sys.platform == "linux" else 1) < MEMORY


def attempt(read, content, path, error=LqError):
    """What `read` returns of a file, or None if it raises a clear error: one of lq's, which names the file."""
    path.write_bytes(content)
    started = time.perf_counter()
    found, message = None, path.name
    try:
        found = read(path)
    except error as raised:
        message = str(raised)
    assert path.name in message and "\n" not in message and len(message) < 2000
    assert time.perf_counter() - started < SECONDS
    return found


def says(given, found):
    """Whether values are those that were given; defaults of what was left out are fine."""
    if isinstance(given, dict):
        return isinstance(found, dict) and all(key in found and says(value, found[key]) for key, value in given.items())
    if isinstance(given, list):
        return isinstance(found, list) and len(found) == len(given) and all(map(says, given, found))
    return given == found or (given != given and found != found)


# --- JSON -------------------------------------------------------------------------------------------------------------

SENSITIVITY = {
    "metric": "fisher", "widths": [2, 4, 8], "samples": 8, "group": 2, "notes": ["as an example"],
    "tensors": [
        {
            "name": name, "role": role, "numel": 12, "channels": channels, "loss": [0.5, 0.25, 1e-9],
            "error": [0.1, float("nan"), 0.0], "group_loss": groups, "group_error": groups,
        }
        for name, role, channels, groups in (
            ("0.weight", "weight", 3, [[0.1, 0.2, 0.3], [1.0, 2, 3]]), ("0.input", "activation", 1, []),
        )
    ],
}  # fmt: skip
ALLOCATION = {
    "weights": {"0": 4, "2": [0, 1, 2, 16]}, "activations": {"2.input": 8}, "loss": 0.5, "bound": 0.25,
    "costs": {"4 bits": "3.5 bits"}, "metric": "fisher", "solver": "exact",
}  # fmt: skip
RECONSTRUCTION = {
    "units": [
        {"name": "0", "before": 1.5, "after": 0.5, "curve": [1.0, 0.5], "iterations": 20, "seconds": 0.5},
        {"name": "1", "before": 2, "after": 1, "curve": [], "iterations": 0, "seconds": 0},
    ],
    "merges": {"metric": "loss", "units": ["0", "1"], "scores": [1.0, 2.0], "merged": ["0", "1"],
               "unchained": [["0", "1"]]},
}  # fmt: skip


def structure():
    return json.loads(lq.inspect(small().eval(), images(1)).to_json())


def reading(kind):
    def read(path):
        return json.loads(kind(path).to_json())

    return read


def by_text(kind):
    def parse_file(path):
        with lq.files.named(path):
            return kind.from_json(lq.files.read_text(path))

    return parse_file


JSON = {
    "structure": (structure, reading(lq.Structure.load)),
    "allocation": (lambda: ALLOCATION, reading(lq.Allocation.load)),
    "sensitivity": (lambda: SENSITIVITY, reading(by_text(lq.Sensitivity))),
    "reconstruction": (lambda: RECONSTRUCTION, reading(by_text(lq.Reconstruction))),
}
VALUES = [
    None, True, False, -1, 0, 3, 1.5, -0.5, 2**62, 10**30, float("nan"), float("inf"), -float("inf"), "", "x", "0",
    "\ud800", "a\0b", "é" * 100, [], [[]], [None], [0, "x"], {}, {"a": 1}, {"": None}, [[1, 2], [3]],
]  # fmt: skip


def places(values, here=()):
    """All places in values, as lists of keys."""
    found = [here] if here else []
    parts = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return found + [place for key, part in parts for place in places(part, (*here, key))]


def changed_values(values, rng):
    """A text of JSON in which something is missing, twice, or of another kind."""
    values = json.loads(json.dumps(values))
    *way, last = rng.choice(places(values))
    owner = values
    for key in way:
        owner = owner[key]
    change = rng.choice(["delete", "replace", "replace", "replace", "copy", "rename", "twice", "nest", "swap"])
    if change == "delete":
        del owner[last]
    elif change == "replace":
        owner[last] = rng.choice(VALUES)
    elif change == "copy" and isinstance(owner, list):
        owner.append(owner[last])
    elif change == "rename" and isinstance(owner, dict):
        owner[rng.choice([last + "s", last[:-1], ""])] = owner.pop(last)
    elif change == "nest":
        owner[last] = [owner[last]]
    elif change == "swap":
        other = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        owner[last], owner[other] = owner[other], owner[last]
    elif change == "twice" and isinstance(last, str):
        return json.dumps(values).replace(f"{json.dumps(last)}:", f"{json.dumps(last)}: 1, {json.dumps(last)}:", 1)
    return json.dumps(values, indent=rng.choice([None, 1]))


@pytest.mark.parametrize("kind", JSON)
def test_json(kind, tmp_path):
    make, read = JSON[kind]
    values = make()
    assert says(values, attempt(read, json.dumps(values).encode(), tmp_path / "f.json"))
    assert says(values, attempt(read, b"\xef\xbb\xbf" + json.dumps(values).encode(), tmp_path / "f.json"))
    rng, errors = random.Random(kind), 0
    for i in range(100):
        text = changed_values(values, rng).encode() if i % 3 else json.dumps(values).encode()
        content = text if i % 3 else rng.choice(BYTES)(text, rng)
        found = attempt(read, content, tmp_path / "f.json")
        errors += found is None
        assert found is None or says(json.loads(content), found)
    assert errors > 40
    for content in (b"", b"[" * 10_000_000, b'{"a":' * 1_000_000, b"9" * 1_000_000, b"\0" * 1000, b"[1e999]"):
        assert attempt(read, content, tmp_path / "f.json") is None


# --- CSV and YAML -----------------------------------------------------------------------------------------------------

LATENCIES = "layer,bits,latency,input_bits\n0,2,1.5,8\n0,4,2.5,8\n0,8,3e-3,8\nnet.1,4,1,\nnet.1,8,2,\n"


def test_latency_tables(tmp_path):
    rng, errors, cells = random.Random(0), 0, LATENCIES.replace("\n", ",\n,").split(",")
    strange = ["", "x", "-1", "nan", "inf", "1e999", "9", "2.5", '"', "\0", "1" * 5000, "0,1", "é", " 4", "bits", "²"]
    for i in range(100):
        content = LATENCIES.encode()
        if i % 2:
            some = list(cells)
            some[rng.randrange(len(some))] = rng.choice(strange)
            content = ",".join(some).replace(",\n,", "\n").encode()
        else:
            content = rng.choice(BYTES)(content, rng)
        found = attempt(read_latencies, content, tmp_path / "t.csv", DataError)
        errors += found is None
        if found is not None:
            expected = {}
            for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")):
                given = row.get("input_bits")
                expected.setdefault(row["layer"], {})[int(row["bits"]), int(given) if given else None] = float(
                    row["latency"]
                )
            assert found == expected and all(0 <= v < float("inf") for t in found.values() for v in t.values())
    assert errors > 30


def test_recipes(tmp_path):
    text = recipe_path("mpqco_finetune").read_bytes()
    values = yaml.safe_load(text)
    rng, errors = random.Random(0), 0
    for i in range(100):
        content = rng.choice(BYTES)(text, rng)
        if i % 2:
            content = changed_values(values, rng).encode()  # JSON is YAML
        found = attempt(lambda path: lq.recipe(str(path)), content, tmp_path / "r.yaml", RecipeError)
        errors += found is None
        if found is not None:
            for callback, entry in zip(found, yaml.safe_load(content)["trainer"]["callbacks+"], strict=True):
                assert entry["class_path"].endswith(f".{type(callback).__name__}")
                for name, value in (entry.get("init_args") or {}).items():
                    have = getattr(callback, name)  # numbers such as 5e-5 are texts in YAML 1.1
                    assert have == (float(value) if isinstance(have, float) else value)
    assert errors > 40


# --- models -----------------------------------------------------------------------------------------------------------


def load(path, saved):
    """True if a file loads into a float and a quantized model; after an error both are as they were, to the bit."""
    done = []
    for model in (small(9).eval(), lq.attach(small(9), lq.QuantSpec(2, range="minmax")).eval()):
        before, attached, kinds = state(model), is_attached(model), [type(part) for part in model.modules()]
        try:
            lq.load(path, model)
            done.append(None)
            for key, value in saved(path).items():
                found = model.state_dict()[key]
                assert torch.equal(found.nan_to_num(7), value.to(found.dtype).nan_to_num(7)), key
        except DataError as error:
            done.append(error)
            assert is_attached(model) is attached and [type(part) for part in model.modules()] == kinds
            assert_same(state(model), before)
    assert (done[0] is None) == (done[1] is None)
    if done[0] is not None:
        raise done[0]
    return True


def by_torch(path):
    found = torch.load(path, weights_only=True)
    return dict(found.get("state_dict", found))


def odd(value, rng):
    """What is not the tensor that was there."""
    return rng.choice(
        [
            None, 3, "x", [1.0], {}, value[None], value.double(), value.to(torch.complex64), value.long(),
            value.to_sparse() if value.ndim else value.bool(), value * torch.nan, value + 100, -value - 1,
            torch.empty(0), value.flatten()[:1].expand(7), torch.zeros(()).expand(10**6, 10**6), value.to("meta"),
        ]
    )  # fmt: skip


def changed_state(saved, rng):
    """A state dict in which an entry is missing, of another kind, or has another name."""
    found, key = dict(saved), rng.choice(list(saved))
    change = rng.choice(["delete", "rename", "odd", "odd", "odd", "more"])
    if change == "more":
        found[rng.choice(["9.input_quantizer.bits", "x.weight", "0.calls.matmul_0_left.bits", "bits", ""])] = found[key]
    elif change == "odd":
        found[key] = odd(found[key], rng)
    else:
        value = found.pop(key)
        found |= {rng.choice([f"{key}s", f"net.{key}", key[1:], 3]): value} if change == "rename" else {}
    return found


@pytest.mark.filterwarnings("ignore")  # torch's, about types of tensors
def test_checkpoints(tmp_path):
    saved = dict(saved_model().state_dict())
    path, rng, errors = tmp_path / "m.ckpt", random.Random(0), 0
    torch.save({"state_dict": saved, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, path)
    whole = path.read_bytes()
    assert attempt(lambda path: load(path, lambda _: saved), whole, path)
    for i in range(120):
        if i % 2:
            torch.save(changed_state(saved, rng), path)
            content = path.read_bytes()
        else:
            content = rng.choice(BYTES)(whole, rng)
        found = attempt(lambda path: load(path, by_torch), content, path, DataError)
        errors += found is None
    assert errors > 70


def test_packed_files(tmp_path):
    model, path = saved_model(), tmp_path / "m.safetensors"
    lq.save(model, path)
    saved, rng, errors = state(lq.load(path, small())), random.Random(0), 0
    header, index, data = parse(path.read_bytes())
    values, metadata = json.loads(zlib.decompress(index)), header["__metadata__"]
    assert attempt(lambda path: load(path, lambda _: saved), path.read_bytes(), path)
    for i in range(150):
        text = changed_values(values, rng) if i % 3 else json.dumps(values)
        if i % 3 == 2:  # in a column: other letters and numbers
            column = rng.randrange(2, len(values))
            some = list(values)
            if isinstance(some[column], str):
                some[column] = rng.choice(BYTES)(some[column].encode() or b"x", rng).decode("latin-1")
            text = json.dumps(some)
        body = data[:-16] if i % 3 else rng.choice(BYTES)(data[:-16], rng)
        content = signed(metadata, text.encode(), body)
        found = attempt(lambda path: load(path, lambda p: anything(p, saved)), content, path, DataError)
        errors += found is None
    assert errors > 80


def anything(path, saved):
    """What a packed file with a right checksum holds, loaded once more: nothing else says it."""
    model = lq.load(path, small(9).eval())
    assert list(model.state_dict()) == list(saved)
    return state(model)


BOMBS = {
    "channels": lambda index: [*index[:5], "100000000", *index[6:]],
    "pruned channels": lambda index: [
        *index[:3],
        "0",
        index[4],
        "10000000000",
        "10000000000,1/float32/0/1",
        *index[7:],
    ],
    "groups": lambda index: [*index[:6], "8,8/float32/1/100000000", *index[7:]],
    "a huge tensor": lambda index: [*index[:8], "9999999999999999,9999999999", *index[9:]],
    "an empty huge tensor": lambda index: [*index[:8], "9999999999999999,0", *index[9:]],
    "many": lambda index: [10**15, *index[1:]],
    "long numbers": lambda index: [*index[:5], "9" * 100_000, *index[6:]],
    "spaces": lambda index: b" " * (1 << 28),
    "lists": lambda index: b"[" * (1 << 26),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_small_files_that_ask_for_much(kind, tmp_path):
    path = tmp_path / "m.safetensors"
    lq.save(lq.attach(nn.Sequential(nn.Linear(8, 8)), 4, None, first_last=None), path)
    header, index, data = parse(path.read_bytes())
    content = signed(header["__metadata__"], BOMBS[kind](json.loads(zlib.decompress(index))), data[:-16])
    assert attempt(lambda path: lq.load(path, nn.Sequential(nn.Linear(8, 8))), content, path, DataError) is None


# --- files to go on from ----------------------------------------------------------------------------------------------


def reconstructed(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    lq.attach(model, 3, first_last=None)
    lq.reconstruct(model, [torch.randn(16, 4)], iterations=2, batch_size=4, resume=path)
    return state(model)


def test_files_to_go_on_from(tmp_path):
    path, rng, errors = tmp_path / "run.pt", random.Random(0), 0
    expected = reconstructed(path)
    whole = path.read_bytes()
    for _ in range(30):
        found = attempt(reconstructed, rng.choice(BYTES)(whole, rng), path, StateError)
        errors += found is None
        assert found is None or assert_same(found, expected) is None
    assert errors > 20
