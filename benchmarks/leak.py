"""train_gpt.py with the mistake of the SKC stack's published origin: what a block reads includes the block itself.

    PRESET=local LAYER_PATTERN=skc ... python benchmarks/leak.py

Shows what a look into the future buys, in loss that nobody could decode. Spectra, capsules, bank and sketches of block
j are read from the state after block j instead of before it. Everything else, evaluation included, is train_gpt.py.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

causal = t.remember


def leaky(
    sums: Tensor, hold: Tensor, old: t.BlockState, blocks: t.Blocks, write: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, t.BlockState]:
    """t.remember, but each block sees the state that its own tokens have entered."""
    seen, new = causal(sums, hold, old, blocks, write)
    kept = hold.to(seen.dtype) * blocks.keep.view(*blocks.keep.shape[:2], *[1] * (seen.ndim - 2))
    return kept * seen + write(blocks.joined(sums.to(seen.dtype), old.open), kept), new


if __name__ == "__main__":
    t.remember = leaky
    sys.exit(t.main(sys.argv[1:], dict(os.environ)))
