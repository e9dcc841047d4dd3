"""The machine itself: does this GPU compute what the precision policy relies on?"""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_matmul_agrees_with_float64(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    product = (a.to("cuda", dtype) @ b.to("cuda", dtype)).double().cpu()
    assert (product - a @ b).norm() < tolerance * (a @ b).norm()
