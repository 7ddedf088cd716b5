r"""
Widths from one pass over the data
==================================

What would each width of each layer cost? One forward and one backward per batch say so for all of them at once, and a
knapsack gives every layer, or every channel, the width that loses least within a budget.
"""

import copy
import sys

import lightning as L
import matplotlib.pyplot as plt
import torch

import lq

# %%
# The small timm network of ``examples/quickstart.py``, trained on handwritten digits for a few seconds.

sys.path.append("examples")  # run from the root of a clone
from quickstart import Classifier, Digits, fit

L.seed_everything(0, verbose=False)
module, data = Classifier(), Digits()
fit(module, data, 4, [], False)
network = module.model.eval()
batches = list(data.train_dataloader())[:4]

# %%
# Attach, calibrate, measure: the labels are the model's own, so none are needed.

lq.fold_batchnorm(network)
lq.attach(network, weights=4, activations=8, structure=lq.inspect(network, batches[0][0][:2]))
lq.calibrate(network, [x for x, _ in batches])
table = lq.measure_sensitivity(network, batches, "model_fisher", activations=False)

# %%
# Curves of the layers, first to last: at each width, the loss that is expected of it.

weights = [tensor for tensor in table.tensors if tensor.role == "weight"]
figure, axes = plt.subplots(figsize=(7, 4))
for tensor, colour in zip(weights, plt.get_cmap("viridis")(torch.linspace(0, 1, len(weights)).tolist()), strict=True):
    axes.plot(table.widths[1:], tensor.loss[1:], color=colour, lw=1.2)
axes.set(yscale="log", xlabel="bits", ylabel="expected loss", title="Layers, first (dark) to last (bright)")
axes.grid(alpha=0.3)

# %%
# The front: the least expected loss at each mean width, and what the same network then scores on the held-out images.

images, labels = data.val.tensors


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    return 100 * float((model(images).argmax(1) == labels).float().mean())


budgets = [2.0, 2.5, 3.0, 4.0, 5.0]
scores: dict[str, list[float]] = {"layer": [], "channel": []}
for granularity in ("layer", "channel"):
    for budget in budgets:
        found = lq.allocate(network, table, budget, granularity=granularity)
        chosen = copy.deepcopy(network)
        lq.set_bits(chosen, found.weights)
        scores[granularity].append(accuracy(chosen))

figure, axes = plt.subplots(figsize=(7, 4))
for granularity, found_scores in scores.items():
    axes.plot(budgets, found_scores, "o-", label=f"by {granularity}")
axes.set(xlabel="bits per weight", ylabel="accuracy, %", title="Digits, no training, activations of 8 bits")
axes.legend()
axes.grid(alpha=0.3)
