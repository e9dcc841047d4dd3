"""What a ternary model loses when only its export is turned by Hadamard matrices: squared error and score.

    python benchmarks/rotation.py RUN_FOLDER

Takes the last checkpoint of a run and quantizes its float latents twice, as they were trained and in the turned basis
(TURBO_QUANT_TRAIN=1), and scores both on the run's whole validation split.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Score a checkpoint under the plain and the turned codec.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    try:
        h = t.load_config({"ENV_FILE": str(folder / "config.env")})
        rt, tokenizer = t.start_runtime(h), t.load_tokenizer(h)
        h, _ = t.with_backends(h, rt)
        model = t.build_model(h, rt, tokenizer.bos)
        weights = t.Weights(model)
        path = t.find_checkpoint(dataclasses.replace(h, resume="auto"), folder / "checkpoints")
        if path is None:
            raise t.UserError(f"{folder} has no checkpoint")
        state = t.load_checkpoint(h, rt, path, model, weights)
        print(f"{'codec':<8}{'squared error':>14}{'nats per token':>16}{'bits per byte':>15}")
        for turned in (h.turbo_quant_train, not h.turbo_quant_train):
            for bank in weights.banks.values():
                bank.codec = t.CODECS[bank.role.codec](dataclasses.replace(h, turbo_quant_train=turned))
            weights.materialize(1.0)
            grouped = [bank for bank in weights.banks.values() if bank.role.codec == "ternary"]
            size = sum(float(bank.latent.square().sum()) for bank in grouped)
            made = [torch.stack([p.detach() for p in bank.parameters]) - bank.latent for bank in grouped]
            error = sum(float(part.square().sum()) for part in made) / size
            score = t.Scorer(h, rt, model, tokenizer.byte_table()).score(t.read_validation(h), state.variant)
            print(f"{'turned' if turned else 'plain':<8}{error:>14.4f}{score.loss:>16.4f}{score.bpb:>15.4f}")
    except (OSError, t.UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
