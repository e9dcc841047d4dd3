"""Time export and reload of a large ternary model, and its peak memory against the float weights.

    python benchmarks/export_time.py [VAR=VALUE ...]       default: PRESET=ternary, about 75M ternary parameters

The latents are random normal numbers, the hardest case for the compressors: trained weights have more zeros.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_gpt as t

DEFAULT = {"PRESET": "ternary", "NUM_LAYERS": "13", "DEVICE": "cpu"}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    h = t.load_config({**DEFAULT, **dict(word.split("=", 1) for word in sys.argv[1:])})
    weights = t.Weights(t.build_model(h, t.start_runtime(h), 1))
    generator = torch.Generator().manual_seed(1)
    for bank in weights.banks.values():
        if bank.role.group == "matrix":
            bank.latent.normal_(generator=generator)
    count = sum(bank.latent.numel() for bank in weights.banks.values())
    ternary = sum(bank.latent.numel() for bank in weights.banks.values() if bank.role.codec == "ternary")
    began = time.perf_counter()
    artifact = t.write_artifact(h, t.coded_tensors(weights), {})
    written = time.perf_counter()
    t.decode_artifact(artifact.data)
    read = time.perf_counter()
    for row in artifact.table:
        print("stream {:<8} {:<8} {:<8} values {:>10} packed {:>10} stored {:>10}".format(*row))
    print(f"parameters:{count} ternary:{ternary} model_bytes:{len(artifact.data)} threads:{os.cpu_count()}")
    print(f"export_s:{written - began:.1f} reload_s:{read - written:.1f} total_s:{read - began:.1f}")
    print(f"peak_memory_mib:{peak_mib():.0f} float_weights_mib:{4 * count / 2**20:.0f} "
          f"ratio:{peak_mib() / (4 * count / 2**20):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
