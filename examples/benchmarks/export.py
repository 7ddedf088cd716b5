"""Exported files: their size, whether they say what the model says, and how fast onnxruntime runs them.

    python examples/benchmarks/export.py size       # packed files against the bits that were paid for
    python examples/benchmarks/export.py agreement  # the model against onnxruntime and torch.export on 512 images
    python examples/benchmarks/export.py latency    # against float and onnxruntime's own quantize_static, interleaved

The first two need the folder with real weights and images (LQ_DATA, or --data), the last one does not.
"""

import argparse
import copy
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lq
from lq.attachment.sites import activation_quantizers, quantizers
from real_data import pack

MODELS = ("cifar10_resnet20", "tf_efficientnet_lite0", "vit_tiny_patch16_224")
CIFAR = MODELS[0]
WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "mixed": (4, 8)}


def images(source: Any, name: str, card: Any, count: int, train: bool) -> Tensor:
    """Normalized real images, of the training or of the test set."""
    if name == CIFAR:
        pixels, _ = source.cifar10("train" if train else "test")
        return torch.as_tensor(source.cifar_tensor(pixels[:count], card))
    found = source.ImageSet("calib_ilsvrc_train" if train else "val_nips17_ccby", card)
    return torch.stack([found[i][0] for i in range(min(count, len(found)))])


def quantized(
    net: nn.Module, weights: int, activations: int, batches: list[Tensor], *, mixed: bool = False, **more: Any
) -> nn.Module:
    """A network as callbacks would leave it; `mixed`: widths by channel, by what Fisher information says they cost."""
    lq.fold_batchnorm(net)
    lq.attach(net, weights, activations, structure=lq.inspect(net, batches[0][:2]), **more)
    lq.calibrate(net, batches)
    if mixed:
        table = lq.measure_sensitivity(net, batches, "model_fisher", activations=False)
        lq.set_bits(net, lq.allocate(net, table, float(weights), granularity="channel").weights)
    return net.eval()


def paid(model: nn.Module) -> float:
    """Bytes of weights at their widths, of steps, and of what stays float."""
    total = 4.0 * len(activation_quantizers(model))
    for weight in lq.integer_weights(model).values():
        of_a_channel = weight.codes.numel() / weight.bits.numel()
        total += float(weight.bits.sum()) * of_a_channel / 8 + 4 * int((weight.bits > 0).sum())
    ours = {id(p) for q in quantizers(model) for p in (*q.parameters(), *q.buffers())}
    left = (v for k, v in model.state_dict(keep_vars=True).items() if id(v) not in ours and ".original" not in k)
    return total + float(sum(v.numel() * v.element_size() for v in left))


def size(options: argparse.Namespace) -> None:
    """Packed files."""
    source = pack()
    print("| model | widths | float, bytes | paid for | file | file / paid |\n|---|---|---|---|---|---|")
    for name in options.models:
        card = source.load_model(name)[1]
        batches = list(images(source, name, card, 64, train=True).split(32))
        for label, bits in (("2", 2), ("3", 3), ("4", 4), ("8", 8), ("3 by channel", 3)):
            net = source.load_model(name)[0]
            whole = sum(v.numel() * v.element_size() for v in net.state_dict().values())
            quantized(net, bits, 8, batches, mixed="by" in label)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.safetensors"
                found = lq.save(net, path)
                again = lq.load(path, source.load_model(name)[0]).eval()
                with torch.no_grad():
                    same = torch.equal(again(batches[0]), net(batches[0]))
            row = (name, label, whole, round(paid(net)), found, f"{found / paid(net):.4f}{'' if same else ' DIFFERS'}")
            print(f"| {' | '.join(map(str, row))} |", flush=True)


def agreement(options: argparse.Namespace) -> None:
    """The quantized model against its exported files; and against itself, its sums in double precision.

    A value next to the middle of two levels goes to either, as the last digits of a sum fall out: two programs cannot
    agree more than that.
    """
    import onnxruntime

    source = pack()
    columns = "file, MB", "top-1 alike", "alike in float64", "logits differ by up to", "logits up to", "torch.export"
    print(f"| model | widths | {' | '.join(columns)} |\n|---|---|---|---|---|---|---|---|")
    for name in options.models:
        card = source.load_model(name)[1]
        batches = list(images(source, name, card, 256, train=True).split(32))
        tests = list(images(source, name, card, options.images, train=False).split(32))
        for label in options.widths:
            net = source.load_model(name)[0]
            quantized(net, *WIDTHS[label], batches, mixed=label == "mixed", integer=options.integer)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                report = lq.export_onnx(net, tests[0][:2], Path(folder) / "model.onnx", check=tests)
                lq.export_program(net, tests[0][:2], Path(folder) / "model.pt2")
                loaded = torch.export.load(Path(folder) / "model.pt2").module()
                difference = max(float((loaded(x) - net(x)).abs().max()) for x in tests[:2])
                exact = copy.deepcopy(net).double()
                itself = torch.cat([exact(x.double()).argmax(1) == net(x).argmax(1) for x in tests])
            shown = (
                f"{report.size / 1e6:.2f}",
                f"{100 * (report.agreement or 0.0):.2f} %",
                f"{100 * float(itself.float().mean()):.2f} %",
                f"{report.largest_difference:.2g}",
                f"{report.largest_output:.1f}",
                f"{difference:.1g}",
            )
            print(f"| {name} | {label} | {' | '.join(shown)} |", flush=True)
    print(f"onnxruntime {onnxruntime.__version__}, {options.images} images")


class Batches:
    """Calibration data, as onnxruntime's quantizer wants it."""

    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self._rest: Iterator[dict[str, Any]] = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> Any:
        return next(self._rest, None)


def latency(options: argparse.Namespace) -> None:
    """Medians of interleaved runs."""
    import onnxruntime
    import timm
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    print("| model | threads | batch | float, ms | quantize_static | lq W8A8 | lq W4A8 | W8A8 / static |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        torch.manual_seed(0)
        make: dict[str, Any] = {"zero_init_last": False} if name.startswith("resnet") else {}
        net = timm.create_model(name, **make).eval()
        batches = [torch.randn(4, 3, 224, 224) for _ in range(2)]
        folder = Path(tempfile.mkdtemp())
        lq.fold_batchnorm(net)
        batch = torch.export.Dim("batch")
        made: Any = torch.onnx.export(net, (batches[0],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        made.save(str(folder / "float.onnx"))
        quant_pre_process(str(folder / "float.onnx"), str(folder / "ready.onnx"))
        quantize_static(
            str(folder / "ready.onnx"),
            str(folder / "static.onnx"),
            Batches(made.model.graph.inputs[0].name, batches),
            per_channel=True,
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        for weights in (8, 4):
            ours = quantized(copy.deepcopy(net), weights, 8, batches, integer=True)
            lq.export_onnx(ours, batches[0], folder / f"w{weights}.onnx", check=False)
        for threads in (1, 2):
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = threads
            settings.log_severity_level = 3
            sessions = [
                onnxruntime.InferenceSession(str(folder / f"{file}.onnx"), settings, providers=["CPUExecutionProvider"])
                for file in ("float", "static", "w8", "w4")
            ]
            for size in (1, 16):
                x = torch.randn(size, 3, 224, 224).numpy()
                times: list[list[float]] = [[] for _ in sessions]
                for _ in range(options.repeats + 2):
                    for session, found in zip(sessions, times, strict=True):
                        start = time.perf_counter()
                        session.run(None, {session.get_inputs()[0].name: x})
                        found.append(time.perf_counter() - start)
                whole, static, w8, w4 = (1e3 * float(np.median(found[2:])) for found in times)
                shown = (
                    f"{whole:.1f} | {whole / static:.2f}x | {whole / w8:.2f}x | {whole / w4:.2f}x | {w8 / static:.2f}"
                )
                print(f"| {name} | {threads} | {size} | {shown} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for run, models in ((size, MODELS), (agreement, MODELS), (latency, ("resnet18", "vit_tiny_patch16_224"))):
        part = parts.add_parser(run.__name__, help=run.__doc__)
        part.set_defaults(run=run)
        part.add_argument("--models", nargs="+", default=models)
        part.add_argument("--data", help="folder with real weights and images; by default LQ_DATA")
        part.add_argument("--threads", type=int, default=1, help="of torch")
        if run is agreement:
            part.add_argument("--images", type=int, default=512)
            part.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
            part.add_argument("--integer", action=argparse.BooleanOptionalAction, default=True)
        if run is latency:
            part.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if options.data is not None:
        os.environ["LQ_DATA"] = options.data
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    options.run(options)


if __name__ == "__main__":
    main()
