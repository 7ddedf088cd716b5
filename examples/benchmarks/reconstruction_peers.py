"""One tool's reconstruction of a real network, timed: what `reconstruction.py` runs in each tool's own environment.

    PYTHON examples/benchmarks/reconstruction_peers.py TOOL --model NAME --iterations N ...

PYTHON needs torch, timm, safetensors, Pillow and the tool (lq, aimet-torch, brevitas with its examples, or what QDrop's
code imports), and LQ_DATA is the folder with real weights and images. The last line printed is a JSON object: seconds
and process CPU seconds of finding ranges and of reconstruction, the number of units, top-1 in percent.

All tools get the same float network, images, widths, iterations and batch size; the first and last layers have 8 bits.
For AdaRound weights are symmetric per channel; for QDrop they have zero points, and activations of skip paths are
quantized. "ranges" and "reconstruction" are cut alike as far as the tools allow: AIMET's ranges include its analysis of
the network's graph. AIMET has no ranges of activations, and no tool a top-1, where only some layers are reconstructed.
"""

import argparse
import json
import os
from collections.abc import Callable

import torch

from peer_aimet import aimet_adaround
from peer_brevitas import brevitas_adaround
from peer_job import RANGE_IMAGES, Job, job_of, layers_of, tool
from peer_qdrop import qdrop


def lq_adaround(job: Job) -> None:
    """`lq.reconstruct`, a layer at a time."""
    lq_reconstruct(job, units="layer", drop=0.0, activation_mode="float", symmetric=True, skip=False)


def lq_qdrop(job: Job) -> None:
    """`lq.reconstruct` as in the recipe qdrop."""
    lq_reconstruct(job, units="block", drop=0.5, activation_mode="learned", symmetric=False, skip=True)


def lq_reconstruct(job: Job, *, units: str, drop: float, activation_mode: str, symmetric: bool, skip: bool) -> None:
    """Fold, attach, calibrate, reconstruct."""
    lq, options = tool("lq"), job.options
    model = job.net
    lq.fold_batchnorm(model)
    names = [name for name, _ in layers_of(model)][: options.layers or None]
    structure = lq.inspect(model, job.images[:2])
    with job.timed("ranges"):
        lq.attach(model, options.weights, options.activations, structure=structure, symmetric=symmetric, skip=skip)
        lq.calibrate(model, job.batches(RANGE_IMAGES))
    job.score(model, "nearest")
    with job.timed("reconstruction"):
        found = lq.reconstruct(
            model,
            job.batches(),
            units=names if options.layers else units,
            drop=drop,
            activation_mode=activation_mode,
            iterations=options.iterations,
            batch_size=options.batch_size,
            seed=options.seed,
        )
    job.found["units"] = len(found.units)
    job.score(model)


TOOLS: dict[str, Callable[[Job], None]] = {
    "lq_adaround": lq_adaround,
    "aimet": aimet_adaround,
    "brevitas": brevitas_adaround,
    "lq_qdrop": lq_qdrop,
    "qdrop": qdrop,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--model", default="cifar10_resnet20")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=200, help="steps for a unit")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=0, help="only the first layers; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--code", help="checkout of QDrop's repository")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(options.seed)
    job = job_of(options)
    job.score(job.net, "float")
    TOOLS[options.tool](job)
    print(json.dumps(job.found))


if __name__ == "__main__":
    main()
