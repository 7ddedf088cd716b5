"""Small models with norms, layers and all that can be between them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with norms whose channels have ranges of very different sizes, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator).mul(1.2).exp())
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(torch.randn(weight.shape, generator=generator))
    return model.eval()


class WrittenOut(nn.Module):
    """RMSNorm as many models write it, on request with a bias."""

    def __init__(self, channels: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        return y if self.bias is None else y + self.bias


class Block(nn.Module):
    """Attention and MLP behind norms; one projection has no bias."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(16), norm(16)
        self.q, self.kv, self.proj = nn.Linear(16, 16), nn.Linear(16, 32, bias=False), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, (k, v) = self.q(y).unflatten(-1, (2, 8)), self.kv(y).unflatten(-1, (2, 2, 8)).unbind(-3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


class Convolutional(nn.Module):
    """Convolutions with GroupNorm, ReLU, a depthwise one, squeeze-and-excitation and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.dw(F.relu(self.norm(self.stem(x)))))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = F.leaky_relu(self.grouped(x * gate))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


class Sequence(nn.Module):
    """Whatever is given, one after the other, by name."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x
