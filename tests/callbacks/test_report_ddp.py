"""Two ranks: both compare and measure all samples together, the first writes."""

import json

import pytest

from lq.callbacks import CompareToFloat, FineTune, Quantize, ReportQuantization
from tests.helpers import QUIET, fit, loader, run_on_ranks, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import json
import torch
from tests.callbacks.test_report_ddp import chain
from tests.helpers import loader, tiny, trainer

torch.set_num_threads(1)
out = sys.argv[2]
callbacks = chain(f"{out}/r.html")
made = trainer(callbacks, devices=int(sys.argv[1]), strategy="ddp", max_epochs=0)
made.fit(tiny(), loader(batch=4), loader(batch=4))
compared, report = callbacks[1].comparison, callbacks[3].report
found = {"comparison": compared.to_json(), "accuracy": report.accuracy, "samples": report.accuracy_samples}
with open(f"{out}/rank{made.global_rank}.json", "w") as file:
    json.dump(found, file)
made.strategy.barrier()
torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
"""


def chain(path):
    return [Quantize(4, 4), CompareToFloat(), FineTune(), ReportQuantization(save_to=path)]


@pytest.mark.slow
def test_two_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["accuracy"] == second["accuracy"] and first["samples"] == 32
    alone = chain(tmp_path / "alone.html")
    fit(tiny(), alone, loader(batch=8), max_epochs=0)
    one, two = alone[1].comparison, json.loads(first["comparison"])
    assert two["samples"] == one.samples == 32
    for layer in two["layers"]:
        assert layer["alone"]["sqnr"] == pytest.approx(one[layer["name"]].alone.sqnr, abs=0.5)
        other = next(row for row in json.loads(second["comparison"])["layers"] if row["name"] == layer["name"])
        assert other["alone"] == layer["alone"]
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["alone.html", "r.html"]
