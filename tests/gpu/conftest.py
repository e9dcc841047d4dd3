"""Tests in this folder need an NVIDIA GPU; on other machines each of them is skipped."""

import pytest
import torch


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    """Skip where torch sees no CUDA device. Import CUDA-only packages inside the tests, after this has run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
