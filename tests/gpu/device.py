"""Where the tests of this folder run: on a GPU, or on the CPU with ``LQ_GPU_TESTS_ON=cpu``, which tries the tests."""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("LQ_GPU_TESTS_ON", "cuda"))
ACCELERATOR = {"accelerator": "gpu" if DEVICE.type == "cuda" else "cpu", "devices": 1}

needs_gpu = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA GPU here; `make test-gpu` is for one"
)
