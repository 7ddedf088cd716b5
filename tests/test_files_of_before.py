"""Files that version 0.1.0 wrote (`tests/data/version_0_1`) load as what they were.

They are of `tests.helpers.Tiny`: two checkpoints of a Trainer, a state dict, a packed file, JSON of each kind, and the
file of a reconstruction that was resumed. `outputs.pt` holds what the networks gave for its ``x``.
"""

from pathlib import Path

import pytest
import torch

import lq
from lq.callbacks import load_from_checkpoint
from lq.sites import quantizers
from tests.helpers import Tiny, tiny

DATA = Path(__file__).parent / "data" / "version_0_1"


@pytest.fixture(scope="module")
def outputs():
    return torch.load(DATA / "outputs.pt", weights_only=True)


def text(name):
    return (DATA / name).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")  # of a later version
@pytest.mark.parametrize("name", ["trained", "noise_scale"])
def test_checkpoints_of_a_trainer(name, outputs):
    module = load_from_checkpoint(Tiny, DATA / f"{name}.ckpt").eval()
    torch.testing.assert_close(module(outputs["x"]), outputs[name])


def test_packed_files(outputs):
    net = lq.load(DATA / "packed.safetensors", tiny().net).eval()
    torch.testing.assert_close(net(outputs["x"]), outputs["trained"])


def test_state_dicts(outputs):
    net = lq.load(DATA / "state.pt", tiny().net).eval()
    torch.testing.assert_close(net(outputs["x"]), outputs["state"])


def test_structures():
    found = lq.Structure.from_json(text("structure.json"))
    assert found == lq.inspect(tiny().net.eval(), torch.zeros(2, 1, 6, 6))
    assert len(list(quantizers(lq.attach(tiny().net.eval(), weights=4, activations=4, structure=found)))) > 3


def test_sensitivities_and_allocations():
    sensitivity = lq.Sensitivity.from_json(text("sensitivity.json"))
    allocation = lq.Allocation.from_json(text("allocation.json"))
    net = lq.load(DATA / "state.pt", tiny().net)
    assert lq.allocate(net, sensitivity, 4.0) == allocation


def test_a_reconstruction_and_the_file_it_resumes_from(outputs, tmp_path):
    """All units are finished there: their results are taken over, and nothing is fitted again."""
    before = lq.Reconstruction.from_json(text("reconstruction.json"))
    resume = tmp_path / "resume.pt"
    resume.write_bytes((DATA / "resume.pt").read_bytes())
    net = lq.load(DATA / "state.pt", tiny().net.eval())
    again = lq.reconstruct(net, [outputs["x"]], iterations=8, resume=resume)
    torch.testing.assert_close(net(outputs["x"]), outputs["reconstructed"])
    assert [unit.name for unit in again.units] == [unit.name for unit in before.units]
    assert [unit.after for unit in again.units] == [unit.after for unit in before.units]
