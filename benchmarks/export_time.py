"""Time export and reload of a large ternary model, and its peak memory against the float weights.

    python benchmarks/export_time.py [VAR=VALUE ...]       default: PRESET=ternary, about 75M ternary parameters

The latents are random normal numbers, the hardest case for the compressors: trained weights have more zeros.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_gpt as t

DEFAULT = {"PRESET": "ternary", "NUM_LAYERS": "13", "DEVICE": "cpu"}


def peak_mib() -> float:
    """Peak memory of this process, Python and torch included (0.7 of the weights of the default model)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reload(path: Path, settings: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak memory of making a network from a file, as `eval` does it in a process of its own."""
    h = t.load_config(settings)
    began = time.monotonic()
    model = t.build_model(h, t.start_runtime(h), 1, fill=False)
    t.load_weights(model, t.read_artifact(str(path))[1])
    return time.monotonic() - began, peak_mib()


def main() -> None:
    settings = {**DEFAULT, **dict(word.split("=", 1) for word in sys.argv[1:])}
    h = t.load_config(settings)
    reader = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    reader.submit(int).result()  # started while this process is small: a child inherits its parent's peak
    weights = t.Weights(t.build_model(h, t.start_runtime(h), 1))
    generator = torch.Generator().manual_seed(1)
    for bank in weights.banks.values():
        if bank.role.group == "matrix":
            bank.latent.normal_(generator=generator)
    count = sum(bank.latent.numel() for bank in weights.banks.values())
    ternary = sum(bank.latent.numel() for bank in weights.banks.values() if bank.role.codec == "ternary")
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "model.pgz", time.monotonic()
        artifact = t.write_artifact(h, t.coded_tensors(weights), {})
        t.write_atomically(path, artifact.data)
        written, write_peak = time.monotonic() - began, peak_mib()
        read, read_peak = reader.submit(reload, path, settings).result()
    for row in artifact.table:
        print("stream {:<8} {:<8} {:<8} values {:>10} packed {:>10} stored {:>10}".format(*row))
    print(f"parameters:{count} ternary:{ternary} model_bytes:{len(artifact.data)} threads:{os.cpu_count()}")
    print(f"export_s:{written:.1f} reload_s:{read:.1f} total_s:{written + read:.1f}")
    size = 4 * count / 2**20
    for name, peak in (("export", write_peak), ("reload", read_peak)):
        print(f"{name}_peak_memory_mib:{peak:.0f} float_weights_mib:{size:.0f} ratio:{peak / size:.2f}")


if __name__ == "__main__":
    main()
