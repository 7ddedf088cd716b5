r"""
What a range rule decides
=========================

A grid of few levels cannot cover all values well. The range rule says where it begins and ends: at the extremes
(min-max), where the error of the values is least (L_p), or by a share of values that may be clipped
(percentile). Here 1 000 weights with two outliers meet grids of 3 bits.
"""

import matplotlib.pyplot as plt
import torch

import lq

torch.manual_seed(0)
values = torch.cat([0.3 * torch.randn(998), torch.tensor([-1.6, 1.9])])

# %%
# Each rule is a string in a :class:`lq.QuantSpec`, and goes wherever a width goes.

figure, axes = plt.subplots(3, 1, figsize=(7, 5), sharex=True)
for axis, rule in zip(axes, ("minmax", "lp", "percentile"), strict=True):
    layer = torch.nn.Linear(1000, 1, bias=False)
    layer.weight.data = values[None].clone()
    model = torch.nn.Sequential(layer)
    lq.attach(model, weights=lq.QuantSpec(3, range=rule), activations=None, first_last=None)
    rounded = layer.weight.detach()[0]
    error = float((rounded - values).square().mean())
    axis.hist(values.numpy(), bins=80, color="#c4b5fd")
    for level in rounded.unique().tolist():
        axis.axvline(level, color="#6d28d9", lw=1)
    axis.set_title(f"{rule}: mean squared error {error:.4f}", fontsize=9)
    axis.set_yticks([])
axes[-1].set_xlabel("value; lines are the levels in use")
figure.tight_layout()
