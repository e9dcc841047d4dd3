"""What a float model loses by each way of quantizing it after training, and the bytes of its file.

    python benchmarks/export_modes.py RUN_FOLDER [--ways "float;GPTQ, LQER"] [NAME=VALUE ...]

Takes the last checkpoint of a run that trained in float and gives its weights the codecs of EXPORT_MODE
competition_gptq, each time from the float latents: rounded to the nearest, clipped, by GPTQ, with LQER. Scores what is
read back from each file on the run's validation split. NAME=VALUE changes variables of all rows.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t

WAYS: dict[str, dict[str, str]] = {
    "float": {},
    "nearest": {"EXPORT_MODE": "mixed", "CODEC_MAP": "matrix:int6"},
    "CLIP_SIGMA=3": {"EXPORT_MODE": "mixed", "CODEC_MAP": "matrix:int6", "CLIP_SIGMA": "3"},
    "CLIP_SIGMA=4": {"EXPORT_MODE": "mixed", "CODEC_MAP": "matrix:int6", "CLIP_SIGMA": "4"},
    "CLIP_SIGMA=12": {"EXPORT_MODE": "mixed", "CODEC_MAP": "matrix:int6", "CLIP_SIGMA": "12"},
    "CLIP_SEARCH": {"EXPORT_MODE": "mixed", "CODEC_MAP": "matrix:int6", "CLIP_SEARCH": "1"},
    "GPTQ": {"EXPORT_MODE": "competition_gptq", "LQER_RANK": "0"},
    "GPTQ, search": {"EXPORT_MODE": "competition_gptq", "LQER_RANK": "0", "CLIP_SEARCH": "1"},
    "GPTQ of own text": {"EXPORT_MODE": "competition_gptq", "LQER_RANK": "0", "GPTQ_SOURCE": "self"},
    "GPTQ, LQER": {"EXPORT_MODE": "competition_gptq"},
    "GPTQ, 12": {"EXPORT_MODE": "competition_gptq", "LQER_RANK": "0", "CLIP_SIGMA": "12"},
    "GPTQ, LQER, 12": {"EXPORT_MODE": "competition_gptq", "CLIP_SIGMA": "12"},
}


class Row(NamedTuple):
    """One way's figures; the training clock's seconds that it took."""

    bpb: float
    in_memory: float
    size: int
    seconds: float


def session_of(folder: Path, changes: dict[str, str]) -> tuple[t.Session, t.TrainState]:
    """A run as its checkpoint left it, under other variables of the export."""
    h = t.load_config({"ENV_FILE": str(folder / "config.env"), "MAX_WALLCLOCK_SECONDS": "0", **changes})
    rt = t.start_runtime(h)
    s = t.open_session(h, rt, folder, t.Log(folder / "export", False))
    path = t.find_checkpoint(dataclasses.replace(h, resume="auto"), folder / "checkpoints")
    if path is None:
        raise t.UserError(f"{folder} has no checkpoint")
    return s, load_latents(s, path)


def load_latents(s: t.Session, path: Path) -> t.TrainState:
    """The checkpoint's latents, by name: banks are other ones under other codecs."""
    tree: dict[str, Any] = t.torch.load(path, map_location=s.rt.device, weights_only=True)
    for saved in tree["banks"].values():
        for name, latent in zip(saved["names"], saved["latent"], strict=True):
            bank, i = s.weights.where[name]
            bank.latent[i] = latent
    return t.TrainState(tree["step"], variant=t.Variant(*tree["variant"]))


def measure(folder: Path, changes: dict[str, str]) -> Row:
    """Quantize, score, write, read, score."""
    s, state = session_of(folder, changes)
    s.weights.materialize(1.0)
    began = time.monotonic()
    t.quantize_trained(s, lambda: time.monotonic() - began)
    seconds = time.monotonic() - began
    memory = t.Scorer(s.h, s.rt, s.model, s.table).score(s.validation, state.variant)
    data = t.write_artifact(s.h, t.coded_tensors(s.weights), s.prints).data
    t.load_weights(s.model, t.decode_artifact(data)[1])
    score = t.Scorer(s.h, s.rt, s.model, s.table).score(s.validation, state.variant)
    return Row(score.bpb, abs(score.bpb - memory.bpb), len(data), seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Score a float checkpoint under each way of quantizing it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("changes", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--ways", default=";".join(WAYS), help="some of them, with semicolons between, float first")
    arguments = parser.parse_intermixed_args(argv)
    if unknown := set(arguments.ways.split(";")) - set(WAYS):
        parser.error(f"no such way: {', '.join(sorted(unknown))}; there are {'; '.join(WAYS)}")
    more = dict(change.split("=", 1) for change in arguments.changes if "=" in change)
    plain = {name: value for name, value in more.items() if name != "CODEC_MAP"}  # which would set training's codecs
    print(f"{'way':<18}{'val_bpb':>10}{'gap':>10}{'in memory':>12}{'model_bytes':>13}{'seconds':>9}")
    try:
        base = None
        for name in arguments.ways.split(";"):
            changes = WAYS[name]
            row = measure(arguments.folder, {**changes, **more} if changes else plain)
            base = row.bpb if base is None else base
            gap, same = row.bpb - base, f"{row.in_memory:.0e}"
            print(f"{name:<18}{row.bpb:>10.5f}{gap:>+10.5f}{same:>12}{row.size:>13}{row.seconds:>9.2f}", flush=True)
    except (OSError, t.UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
