"""Two ranks: equal weights on both, as good as one rank's, and a file that both go on from."""

import pytest
import torch

from tests.helpers import QUIET, assert_same, dataset, fit, run_on_ranks, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import torch
from tests.callbacks.test_reconstruct_ddp import METHODS, callbacks, data, losses
from tests.helpers import fit, tiny

torch.set_num_threads(1)
ranks, out = int(sys.argv[1]), sys.argv[2]
options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}


class Ended(Exception):
    pass


def run(name, **other):
    module, chain = tiny(), callbacks(name, **other)
    made = fit(module, chain, data(ranks), max_epochs=0, **options)
    found = {"state": module.state_dict(), "losses": losses(chain), "iterations": iterations(chain)}
    torch.save(found, f"{out}/{name}-{made.global_rank}.pt")
    return made


def iterations(chain):
    return [unit.iterations for unit in chain[1].reconstruction.units]


for name in METHODS:
    run(name)

source = sys.modules["lq.reconstruction.reconstruct"]  # the package's attribute is the function
fit_unit = source.fit_unit


def dying(problem, *args, **kwargs):
    if problem.name == "net.8":
        raise Ended
    return fit_unit(problem, *args, **kwargs)


source.fit_unit = dying
try:
    run("resumed", resume=f"{out}/progress.pt")
except Ended:
    pass
source.fit_unit = fit_unit
made = run("resumed", resume=f"{out}/progress.pt")
made.strategy.barrier()
torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
"""

METHODS = {
    "qdrop": {},
    "fisher": {"loss": "fisher", "drop": 0.0, "activation_mode": "float"},
    "mixed": {"units": "mixed", "metric": "loss", "merges": 1, "search_iterations": 3},
    "network": {"units": "network", "regularization": 1.0, "drop": "annealed"},
    "aph": {"loss": "aph", "drop": 0.0, "over_first": True},
    "dplr": {"loss": "dplr", "drop": 0.0, "start": "feedback"},
    "global": {"loss": "global", "drop": 0.0, "rounding": "ste", "step_lr": None},
    "early": {"early_stop": True, "iterations": 60, "drop": 0.0, "activation_mode": "quantized"},
}


def callbacks(name, **other):
    from lq.callbacks import Quantize, Reconstruct
    from lq.reconstruction.rounding import AdaRound, AnnealingSoftmax

    rounding = AnnealingSoftmax(temperature=(1.0, 1e-6), lr=0.01) if name == "early" else AdaRound(lr=0.05)
    given = {"iterations": 20, "batch_size": 8, "samples": 32, "rounding": rounding, "step_lr": 0.01, "units": "layer"}
    quantize = Quantize(2, 4, first_last=None, symmetric=False, fold_bn=False, calibration_samples=32)
    return [quantize, Reconstruct(**{**given, **METHODS.get(name, {}), **other})]


def data(ranks):
    return torch.utils.data.DataLoader(dataset(32), batch_size=16 // ranks)


def losses(chain):
    return [(unit.name, unit.before, unit.after) for unit in chain[1].reconstruction.units]


def alone(name, seed):
    """Losses of one rank."""
    chain = callbacks(name, seed=seed)
    fit(tiny(), chain, data(1), max_epochs=0)
    return losses(chain)


def test_two_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 2, tmp_path)
    for name in (*METHODS, "resumed"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert_same(second, first)
        start, *others = (alone(name, seed) for seed in range(3))
        both = first["losses"]
        assert [unit for unit, _, _ in both] == [unit for unit, _, _ in start]
        # nearest rounding of the first unit has the loss it has on one rank; what comes then is as good
        if name != "fisher":  # whose labels are drawn by each rank
            assert both[0][1] == pytest.approx(start[0][1], rel=1e-3)
        assert all(after <= before for _, before, after in both)
        worst = max(sum(after for _, _, after in one) for one in (start, *others))
        assert sum(after for _, _, after in both) < 1.15 * worst
        if name == "early":
            assert min(first["iterations"]) < 60
    qdrop, resumed = (torch.load(tmp_path / f"{name}-0.pt", weights_only=True) for name in ("qdrop", "resumed"))
    assert_same(resumed["state"], qdrop["state"])
    assert resumed["losses"] == qdrop["losses"]
