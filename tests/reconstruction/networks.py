"""Networks with everything between units that a model can compute, and how tests look into them."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq
from lq.attachment.float_models import float_copy
from lq.reconstruction.capture import Batches, Capture
from lq.reconstruction.flow import find_flow
from lq.reconstruction.quantized_model import QuantizedModel
from lq.reconstruction.storage import Storage
from lq.reconstruction.units import find_units
from tests.models import Block


class Basic(nn.Module):
    """A residual block, with a projection where the shape changes."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride)) if stride > 1 else None
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.act1(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.act2(out)


class ResNet(nn.Module):
    """A stem, residual blocks, pooling and a head."""

    def __init__(self, blocks=2):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU()
        self.blocks = nn.Sequential(Basic(4, 6, 2), *(Basic(6, 6) for _ in range(blocks - 1)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.act(self.stem(x))).mean((2, 3)))


class Plain(nn.Module):
    """Layers with pooling, a flatten and activation functions between that no module stands for."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        return self.c(F.adaptive_avg_pool2d(F.gelu(self.b(x)), 2).flatten(1))


class InPlace(nn.Module):
    """Outputs that are changed in place before the next layer reads them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x), inplace=True)
        y = self.b(x)
        y += x
        return self.c(F.relu_(y))


class Branches(nn.Module):
    """An output that two later units read, and a sum of branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        left, right = self.b(x.tanh()), self.c(x.sin())
        return self.d(left * right + x)


class Tokens(nn.Module):
    """Patches, a class token, position embeddings, transformer blocks and a head."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Windows(nn.Module):
    """Four windows of each image become rows of the batch, and an image again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, 1, 1), nn.Linear(16, 16), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, -1)
        x = self.b(x).view(n, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
        return self.c(x.mean((2, 3)))


class TimeFirst(nn.Module):
    """Samples along the second dimension, and another argument besides."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor, scale: Tensor, *, shift: float) -> Tensor:
            return self.inner(x) * scale + shift

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))
        self.a, self.b, self.c = nn.Linear(8, 8), self.Scaled(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.transpose(0, 1))
        return self.c(self.b(x, self.scale, shift=0.5).mean(0))


class Frozen(nn.Module):
    """A backbone that runs without gradients, as examples of transfer learning have it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.b(F.relu(self.a(x))).mean((2, 3))
        return self.c(x)


class Gate(nn.Module):
    """A layer whose output decides, by a comparison that has no gradient, what the next one reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x * (self.a(x) > 0).float())


IMAGE, VECTOR, SEQUENCE = (3, 8, 8), (8,), (5, 8)
NETWORKS = {
    "resnet": (ResNet, IMAGE),
    "pooling and flatten": (Plain, IMAGE),
    "in place": (InPlace, VECTOR),
    "branches": (Branches, VECTOR),
    "tokens": (Tokens, IMAGE),
    "windows": (Windows, IMAGE),
    "samples second": (TimeFirst, SEQUENCE),
    "no gradients": (Frozen, IMAGE),
    "a comparison": (Gate, VECTOR),
}


#: Units by name, where what the model says of itself has none that read several arguments.
BY_NAME = {"samples second": ["a", "b", "c"]}


def samples(shape, count=10, seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def network(kind, seed=0):
    """A network in eval mode, and samples of its input's shape."""
    make, shape = NETWORKS[kind]
    torch.manual_seed(seed)
    return make().eval(), samples(shape)


def quantized(model, data, weights=2, activations=4, *, skip=False, **options):
    """`model`, in place, with quantizers everywhere, calibrated on batches."""
    structure = lq.inspect(model, data[0]) if skip else None
    options = {"first_last": None, **options}
    lq.attach(model, weights, activations, structure=structure, skip=skip, **options)
    return lq.calibrate(model, data).eval()


def call(model, batch):
    return model(batch)


class Work:
    """A model cut into units, its float copy, and captures of both."""

    def __init__(self, model, data, units="layer", *, memory=10**9, dtype=None, chunk=4, run=call, folder=None):
        self.model, self.twin, self.data = model, float_copy(model), data
        self.storage = Storage(torch.device("cpu"), memory, folder)
        self.batches = Batches(data, self.storage)
        example = data[0][:2]
        self.units = find_units(QuantizedModel(model), self.twin, units, lambda: run(self.twin, example), example)
        self.flow = find_flow(self.twin, self.units, run, example, 2)
        self.quantized, self.whole = (
            Capture(m, self.units, self.flow, run, self.batches, dtype=dtype, chunk=chunk) for m in (model, self.twin)
        )

    @property
    def names(self):
        return [unit.name for unit in self.units]


@contextmanager
def hooked(module, taken, *, output=False):
    """Note the tensors among what a module is called with, or what it returns."""

    def before(module, args, kwargs):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        taken.append([leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)])

    def after(module, args, result):
        taken.append(result.clone())

    if output:
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def seen(model, name, data, *, output=False):
    """What a module reads or returns, for each batch of a plain run of the model."""
    taken = []
    with hooked(model.get_submodule(name), taken, output=output):
        for batch in data:
            model(batch)
    return taken
