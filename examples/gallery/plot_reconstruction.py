r"""
What reconstruction changes
===========================

Nearest rounding treats every weight alone. Reconstruction (here QDrop) learns whether each goes up or down so that the
output of a whole block stays what it was, without labels and without training.
"""

import copy
import sys

import lightning as L
import matplotlib.pyplot as plt
import torch

import lq

sys.path.append("examples")  # run from the root of a clone
from quickstart import Classifier, Digits, fit

L.seed_everything(0, verbose=False)
module, data = Classifier(), Digits()
fit(module, data, 4, [], False)
network = module.model.eval()
images, labels = data.val.tensors
batches = [x for x, _ in list(data.train_dataloader())[:4]]

# %%
# Two bits for weights, four for activations, which is little for nearest rounding.

lq.fold_batchnorm(network)
structure = lq.inspect(network, batches[0][:2])
lq.attach(network, weights=lq.QuantSpec(2, symmetric=False), activations=4, structure=structure, skip=True)
lq.calibrate(network, batches)
nearest = copy.deepcopy(network)
report = lq.reconstruct(network, batches, units="block", iterations=150, seed=0)
print(report)

# %%
# The loss of every unit before and after, and what it means for the digits.


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


figure, axes = plt.subplots(figsize=(7, 4))
units = range(len(report.units))
axes.plot(units, [unit.before for unit in report.units], "o-", label=f"nearest, {accuracy(nearest):.1f} %")
axes.plot(units, [unit.after for unit in report.units], "s-", label=f"QDrop, {accuracy(network):.1f} %")
axes.set(yscale="log", xlabel="unit, first to last", ylabel="loss against the float unit", title="W2A4 on digits")
axes.legend()
axes.grid(alpha=0.3)
