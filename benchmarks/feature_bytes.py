"""What each feature costs a packaged script in bytes: extracted, minified and wrapped with it and without.

    python benchmarks/feature_bytes.py [--base PRESET=attn] [--devices cuda,cpu] [VARIABLE=VALUE[,VARIABLE=VALUE] ...]

A row for each argument, by default for FEATURES; in a value, a semicolon stands for a comma. Nothing is run or proved:
build_submission.py does that. Some 20 s of a core for each row.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_submission as b

FEATURES = (
    "MATRIX_CODEC=ternary",
    "MATRIX_CODEC=int6,GROUP_SIZE=128",
    "EXPORT_MODE=competition_gptq",
    "EMA_DECAY=0.997",
    "BIGRAM_HASH_BUCKETS=4096",
    "INDUCTION_ORDERS=1;2;3",
    "SMEAR_GATE=12",
    "ATTN_GATE=12",
    "XSA_LAYERS=9",
    "ATTN_WINDOW=512",
    "DOC_MASK=1",
    "RECURRENCE_LAYERS=3-5",
    "CURRICULUM_STAGES=0:4;0.3:2;0.6:1",
    "RESIDUAL=plain",
    "RESIDUAL=hc",
    "RESIDUAL=mhc",
    "RESIDUAL=mhc,MHC_MODE=sinkhorn,MHC_N=4,MHC_LOGITS=dynamic",
    "LAYER_PATTERN=nsa",
    "LAYER_PATTERN=skc",
    "RMT_SEGMENT=256",
    "MOE_EXPERTS=4",
    "SLIDING_EVAL=1",
    "TEMP_SCALING=1",
    "TTT_SCOPE=lora",
    "TTT_SCOPE=global",
    "EVAL_ENGRAM=1",
    "NGRAM_CACHE=1",
    "MAX_EVAL_SECONDS=600",
)


def size(source: b.Source, words: list[str], devices: str) -> tuple[int, int, int]:
    """Lines, bytes minified and bytes wrapped of a configuration's script. Raises BuildError."""
    options = b.options_of(["--dce", "--out", "nowhere", "--devices", devices])
    made = b.extract(source, dict(word.split("=", 1) for word in words), options)
    return b.lines_of(made.text), len(made.short), len(made.script)


def main() -> int:
    parser = argparse.ArgumentParser(description="what each feature costs a packaged script in bytes")
    parser.add_argument("features", nargs="*", default=FEATURES)
    parser.add_argument("--base", default="PRESET=attn")
    parser.add_argument("--devices", default="cuda,cpu")
    options = parser.parse_args()
    source, base = b.Source(Path(b.__file__).with_name("train_gpt.py")), options.base.split(",")
    print(
        "| on top | lines | minified | wrapped | more lines | more bytes | s |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    without = None
    for feature in ["", *options.features]:
        words = [*base, *(word.replace(";", ",") for word in feature.split(",") if word)]
        began = time.perf_counter()
        try:
            found = size(source, words, options.devices)
        except Exception as error:  # a feature that the base excludes: its row says why
            if not feature:
                raise
            print(f"| `{feature}` | | | | | {str(error).splitlines()[0]} | |", flush=True)
            continue
        without = without or found
        more = f"{found[0] - without[0]:+,} | {found[2] - without[2]:+,}" if feature else " | "
        cells = f"{found[0]:,} | {found[1]:,} | {found[2]:,} | {more} | {time.perf_counter() - began:.0f}"
        print(f"| {f'`{feature}`' if feature else options.base} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
