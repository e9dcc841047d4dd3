"""Bits per weight of an artifact's trits and small integers by general compressors, by an ideal order-0 coder, by ours.

    python benchmarks/entropy.py runs/RUN_ID/model.pgz...

The order-0 row is -sum log2 p of each tensor's own frequencies and 16 bits for each of them but one: what a perfect
arithmetic coder for one distribution a tensor takes. `lrzip -z` takes part where the program is installed, zstd where
the package zstandard is. One thread each; every coder's output is expanded again and compared.
"""

import lzma
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def lrzip(words: list[str]) -> Callable[[bytes], bytes]:
    """A pass through the program lrzip."""
    return lambda data: subprocess.run(["lrzip", *words, "-Q", "-p", "1"], input=data, capture_output=True).stdout


def general_coders() -> dict[str, Coder]:
    """Compressors of bytes that are there."""
    coders: dict[str, Coder] = {
        "lzma 9e": (lambda d: lzma.compress(d, preset=9 | lzma.PRESET_EXTREME), lzma.decompress)
    }
    if find_spec("brotli"):
        import brotli

        coders["brotli 11"] = (lambda d: brotli.compress(d, quality=11, lgwin=24), brotli.decompress)
    if find_spec("zstandard"):
        import zstandard

        coders["zstd 22"] = (zstandard.ZstdCompressor(22).compress, zstandard.ZstdDecompressor().decompress)
    if shutil.which("lrzip"):
        coders["lrzip -z"] = (lrzip(["-z", "-T"]), lrzip(["-d"]))  # -T: also what lz4 cannot shorten
    return coders


def read(path: str) -> tuple[dict[str, np.ndarray], dict[str, list[list[int]]]]:
    """Values and tensor shapes of each stream of an artifact."""
    header, payload = t.read_header(Path(path).read_bytes())
    h = t.Hyperparameters(**header["config"])
    streams = t.read_streams(header, payload, 2**40, h)
    return streams, t.stream_shapes(header, h, streams.get("rows"))


def order_0_bits(values: np.ndarray, shapes: list[list[int]]) -> float:
    """Of the tensors one after the other."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    bits = 0.0
    for part in np.split(values, ends[:-1]):
        counts = np.bincount(part.astype(np.int64) + 128)
        counts = counts[counts > 0]
        bits += float(-(counts * np.log2(counts / part.size)).sum()) + 16 * (counts.size - 1)
    return bits


def timed(work: Callable[[], bytes]) -> tuple[bytes, float]:
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def rows_of(kind: str, values: np.ndarray, shapes: list[list[int]]) -> list[tuple[str, float, float, float]]:
    """(way, bits per weight, seconds to encode, seconds to decode), the longest first."""
    rows = [("order 0, ideal", order_0_bits(values, shapes) / values.size, np.nan, np.nan)]
    packed = {name: t.PACKINGS[name][0](values) for name in t.packings_of(kind) if name in t.PACKINGS}
    for packing, raw in packed.items():
        for name, (pack, unpack) in general_coders().items():
            data, slow = timed(lambda pack=pack, raw=raw: pack(raw))  # type: ignore[misc]
            back, fast = timed(lambda unpack=unpack, data=data: unpack(data))  # type: ignore[misc]
            assert back == raw, name
            rows.append((f"{packing} + {name}", 8 * len(data) / values.size, slow, fast))
    data, slow = timed(lambda: t.pack_context(values, shapes))
    back, fast = timed(lambda: t.unpack_context(data, values.size, shapes, 128).tobytes())
    assert back == values.tobytes()
    form = (data[0], data[1], data[2], int.from_bytes(data[3:5], "little"))
    own = t.code_length(t.spans_of([t.gather(values, grid) for grid in t.grids(shapes)], form))
    rows.append((f"ours, {8 * len(data) / own - 1:.3%} above its model", 8 * len(data) / values.size, slow, fast))
    return sorted(rows, key=lambda row: -row[1])


def main() -> int:
    for path in sys.argv[1:]:
        streams, shapes = read(path)
        for kind in ("trits", *t.INT_CODECS):
            if kind in streams:
                values = streams[kind]
                print(f"{path}: {kind}, {values.size:,} weights, {np.mean(values == 0):.1%} of them zero\n")
                print("| way | bits per weight | encode, s | decode, s |\n|---|---|---|---|")
                for name, bits, slow, fast in rows_of(kind, values, shapes[kind]):
                    print(f"| {name} | {bits:.4f} | {slow:.2f} | {fast:.2f} |")
                print(flush=True)
    return 0 if sys.argv[1:] else 2


if __name__ == "__main__":
    sys.exit(main())
