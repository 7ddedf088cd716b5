"""Small models of the kinds that quantization has to cope with."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention with separate projections, fused or not, with an optional bias on the scores and norms of q and k."""

    def __init__(self, fused=True, separate=True, bias=False, norm=False):
        super().__init__()
        self.fused, self.scale = fused, 0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(4) if norm else nn.Identity() for _ in range(2))
        self.bias = nn.Parameter(torch.randn(2, 5, 5)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if self.bias is not None:
                scores = scores + self.bias
            x = scores.softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, **options):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn = Attention(**options)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Residual(nn.Module):
    """torchvision's basic block: one activation module, called twice, and an addition in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.head(self.relu(out))


class StandardizedConv(nn.Conv2d):
    """A convolution whose weight is standardized on each call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class OddWeights(nn.Module):
    """Weights that are used by functions: as they are, transposed, by einsum, fixed; and some that do not multiply."""

    def __init__(self):
        super().__init__()
        self.conv = StandardizedConv(3, 4, 3)
        self.register_buffer("blur", torch.ones(4, 1, 2, 2) / 4)
        self.mix = nn.Parameter(torch.randn(4, 6))
        self.expand = nn.Parameter(torch.randn(6, 5, 2))
        self.never_called = nn.Linear(10, 7)
        self.position = nn.Parameter(torch.randn(1, 7))
        self.gain = nn.Parameter(torch.ones(7))
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.conv(x), self.blur, groups=4).mean((2, 3))
        x = torch.einsum("bi,ijk->bjk", x @ self.mix, self.expand).flatten(1)
        return F.linear(x, self.never_called.weight, self.never_called.bias) * self.gain + self.position


class UNet(nn.Module):
    """One level down and up, with a concatenation."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        deep = F.relu(self.deep(F.max_pool2d(skip, 2)))
        return self.out(torch.cat([skip, self.up(deep)], 1))


class Text(nn.Module):
    """An embedding, an LSTM and a decoder that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.decode = nn.Linear(8, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.lstm(self.embed(tokens))[0])


class Loop(nn.Module):
    """Control flow: one layer is called as often as the data say, another on one of two paths."""

    def __init__(self):
        super().__init__()
        self.again, self.positive, self.negative = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max() * 0) + 3):
            x = torch.relu(self.again(x))
        return self.positive(x) if x.sum() >= 0 else self.negative(x)


def made(model, seed=0):
    torch.manual_seed(seed)
    return model().eval() if isinstance(model, type) else model.eval()


def tokens(seed=1):
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))


def images(size=8, seed=1):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))


EXAMPLES = {
    "block": (Block, tokens()),
    "unfused block": (lambda: Block(fused=False, bias=True, norm=True), tokens()),
    "residual": (Residual, images()),
    "odd weights": (OddWeights, images()),
    "u-net": (UNet, images()),
    "text": (Text, torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))),
    "control flow": (Loop, torch.randn(3, 6, generator=torch.Generator().manual_seed(1))),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1, None, False),
        tokens(),
    ),
}
#: One of two paths runs, and calibration says that it does not see the other.
_OTHER_PATH = pytest.mark.filterwarnings(
    r"ignore:1 of \d+ activations were never seen in calibration .negative.input.:lq.errors.NoEffectWarning"
)
every_model = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=_OTHER_PATH) if kind == "control flow" else kind for kind in EXAMPLES]
)


def example(kind):
    make, x = EXAMPLES[kind]
    torch.manual_seed(0)
    return make().eval(), x


def names(structure, role):
    return [site.name for site in structure.sites if site.role == role]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}
