"""Train, export and score the best language model that fits a fixed number of bytes and minutes.

One file holds the whole path from token shards to a scored, packaged artifact. It is configured by environment
variables alone (`--help` lists them), and reads from top to bottom: each section uses only those above it.

    python train_gpt.py                             train, export, reload, score (also under torchrun)
    python train_gpt.py preflight [--full] [--json] check data, disk, device, memory and time; --full: artifact, too
    python train_gpt.py plan                        print the site list, the role table and the packed size
    python train_gpt.py fit [VARIABLE=VALUE ...]    the largest model that fits the bytes, and its steps in the time
    python train_gpt.py eval ARTIFACT               score an artifact on the validation split
    python train_gpt.py audit ARTIFACT              prove that its evaluation is legal; writes JSON beside it
    python train_gpt.py generate ARTIFACT --prompt  continue a text
    python train_gpt.py bench                       time training steps
    python train_gpt.py --help                      every variable with type, default, unit and meaning

Sections: 1 CONFIG, 2 RUNTIME, 3 DATA, 4 CODECS, 5 LAYERS, 6 MIXERS, 7 RESIDUAL, 8 MEMORY, 9 MODEL,
10 OPTIMIZERS, 11 ARTIFACT, 12 EVALUATION, 13 CHECKPOINT, 14 TRAINING, 15 MAIN. At most 11,700 lines.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import operator
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TextIO, cast

# ==== 1. CONFIG ==============================================================
# Gives: `Hyperparameters`, one frozen dataclass read from environment variables, presets, validation, `--help`.
# Needs: the standard library only, so that help and configuration errors answer before torch is imported.

# build_submission.py sets these in the script that it extracts for one configuration. Such a script counts its own
# bytes, and what a submission does not need stands behind `not PACKAGED`; UserError and ValueError are not looked for.
PACKAGED = False
FOLDS = True  # its data may be case-folded
SCORES = False  # it trains nothing, but scores an artifact


class UserError(Exception):
    """A mistake the user can mend; printed as one line, exit code 2."""


class AgreedError(UserError):
    """A UserError that all ranks raise alike; rank 0 prints it."""


class Interrupted(AgreedError):
    """An evaluation was cut short because a signal asks the run to end."""


def var(
    default: Any,
    group: str,
    meaning: str,
    unit: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    when: Callable[[Hyperparameters], bool] | None = None,
) -> Any:
    """Declare one variable: its default, help group, meaning, unit, range, and the condition under which it acts."""
    metadata = {"group": group, "meaning": meaning, "unit": unit, "low": low, "high": high}
    return dataclasses.field(default=default, metadata={**metadata, "choices": choices, "when": when})


BYTE_VOCABULARIES = (256, 260)  # sizes at which tokens are bytes, without a tokenizer file
ROLE_NAMES = ("matrix", "embed", "head", "table", "scalar", "expert", "router", "koopman", "koopman_diagonal", "hc") + (
    *("hc_keep", "mhc", "mhc_mix"),  # keys of ROLE_KINDS
)
HC_PARTS = ("keep", "write", "bias", "read", "mix")
MIXER_LETTERS = {"A": "attn", "N": "nsa", "K": "koopman", "S": "skc", "P": "skc"}  # P: beside its MLP
# Where a backend of NSA other than gather was measured to be the fastest, by compute capability (records/gpu_todo.md).
NSA_FASTEST: dict[tuple[int, int], str] = {}
PATTERNS = {"attn": "A", "nsa": "N", "skc": "S", "hybrid": "KA", "skc_competition": "PPPA"}  # layer patterns, repeated
MATCH_QUANTITIES = ("params", "bytes", "flops")
INT_CODECS = ("int4", "int5", "int6", "int7", "int8")
GROUPED_CODECS = ("ternary", "binary", *INT_CODECS, "fp4")
FLOAT_CODECS = ("bf16", "fp16", "exact")
CODEC_NAMES = (*GROUPED_CODECS, "fp8", *FLOAT_CODECS)
# Kinds of streams in an artifact that codecs make of their codes, and the packings of each kind beside our own coder.
CODEC_STREAMS = {"ternary": "trits", "binary": "signs", "fp4": "fours", "fp8": "bytes", "bf16": "halves",
    "fp16": "halves", "exact": "floats", **{name: name for name in INT_CODECS}}  # fmt: skip
STREAM_PACKINGS = {
    "rows": ("signs",), "trits": ("base3", "bitmask"), "signs": ("signs",), "int4": ("planes",), "int5": ("planes",),
    "int6": ("planes",), "int7": ("planes",), "int8": ("planes",), "fours": ("nibbles",), "bytes": ("planes",),
    "scales": ("planes",), "halves": ("planes",), "floats": ("planes",),
}  # fmt: skip
# What EXPORT_MODE makes of weights after training where CODEC_MAP says nothing else (records/export_modes.md).
EXPORT_MAPS = {
    "ternary": "",
    "competition_gptq": "matrix:int6,expert:int6,embed:int7,head:int7,table:int7,*.gate.weight:int8",
    "mixed": "embed:int7,head:int7,table:int7,*.gate.weight:int8",
}


@dataclass(frozen=True)
class Hyperparameters:
    """Every knob of a run. Field `model_dim` is read from the variable `MODEL_DIM`, and so on for each."""

    # fmt: off
    # Run
    preset: str = var("", "run", "named set of the values below; explicit variables override it")
    env_file: str = var("", "run", "file of KEY=VALUE lines read before the environment (a run's config.env)")
    match: str = var("", "run", "choose MODEL_DIM so that parameters, packed bytes or FLOPs of a token are nearest to "
        "a preset's, with this vocabulary: params, bytes or flops, a colon, its name; empty: MODEL_DIM as it is")
    run_id: str = var("", "run", "name of the run folder; default: date and time")
    out_dir: str = var("runs", "run", "folder of run folders")
    seed: int = var(1337, "run", "seed of initial weights and noise", low=0, high=2**63 - 1)
    resume: str = var("", "run", "auto: continue the run folder's latest checkpoint; or a checkpoint's path")
    save_every: int = var(0, "run", "checkpoint every so many steps; 0: only at the end", "steps", low=0)
    keep_checkpoints: int = var(2, "run", "recent checkpoints to keep", low=1)
    keep_every: int = var(0, "run", "also keep every checkpoint at a multiple of this; 0: none", "steps", low=0)
    device: str = var("auto", "run", "where to compute", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = var("auto", "run", "arithmetic of the forward pass", choices=("auto", "bf16", "fp32", "fp64"))
    compile: str = var("auto", "run", "torch.compile the step; auto: on CUDA only", choices=("auto", "0", "1"))
    compile_mode: str = var("default", "run", "mode handed to torch.compile", when=lambda h: h.may_compile,
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"))
    cpu_threads: int = var(0, "run", "threads of one process on a CPU; 0: torch's choice", low=0, high=1024)
    strict_config: bool = var(False, "run", "fail when a variable is set that has no effect")
    deterministic: bool = var(False, "run", "the same bits in every run on one kind of device, slower there")
    watchdog_seconds: float = var(600.0, "run", "no step for so long is a hang: all stacks are written, the process "
        "ends; 0: never", "s", low=0)
    watchdog_grace_seconds: float = var(1800.0, "run", "more time for what is no step: compilation, saving, export",
        "s", low=0, when=lambda h: h.watchdog_seconds > 0)
    max_nonfinite_steps: int = var(10, "run", "steps in a row without a finite loss and gradient, all left out, that "
        "end the run", "steps", low=1)
    long_run_steps: int = var(5000, "run", "a run of more steps, or of more than an hour, is long: it must have "
        "checkpoints and make use of its GPU", "steps", low=1)
    allow_toy_run: bool = var(False, "run", "let a long run begin that has no checkpoints or wastes its GPU")
    require_free_gpu: bool = var(False, "run", "fail when other processes use the GPU")
    tensorboard: bool = var(False, "run", "metrics also for TensorBoard, in the run folder; needs its package")
    wandb: bool = var(False, "run", "metrics also for Weights & Biases, offline in the run folder; needs its package")
    sample_tokens: int = var(160, "run", "tokens of sample text in the closing summary; 0: none", "tokens", low=0)

    # Data
    data_path: str = var("./data/datasets/builtin_sp1024", "data", "folder of token shards")
    tokenizer_path: str = var("./data/tokenizers/builtin_1024_bpe.model", "data", "sentencepiece model",
        when=lambda h: h.vocab_size not in BYTE_VOCABULARIES)
    vocab_size: int = var(1024, "data", "tokens in the vocabulary; 256 or 260 (published shards): bytes", low=2,
        high=65535)
    train_batch_tokens: int = var(524288, "data", "tokens of one optimizer step over all ranks", "tokens", low=1,
        when=lambda h: not h.batch_stages)
    micro_batch_tokens: int = var(65536, "data", "most tokens of one forward pass on one rank", "tokens", low=1)
    train_seq_len: int = var(1024, "data", "training window", "tokens", low=1)
    batch_mode: str = var("contiguous", "data",
        "contiguous: rows follow one another; streams: each row continues its own; documents: rows start at one",
        choices=("contiguous", "streams", "documents"))
    curriculum_stages: str = var("", "data", "windows as progress:divisor,... of TRAIN_SEQ_LEN, e.g. 0:4,0.15:2,0.4:1")
    batch_stages: str = var("", "data", "batch-size stages as progress:tokens,..., e.g. 0:131072,0.3:262144")
    carry_train: bool = var(False, "data", "carry mixer states from window to window (BATCH_MODE=streams)")
    holdout_tokens: int = var(65536, "data", "training tokens set aside for calibration and model selection", "tokens",
        low=0)

    # Model
    num_layers: int = var(9, "model", "layers, each a mixer and an MLP", low=1, high=1000)
    model_dim: int = var(512, "model", "width of the residual stream", low=2)
    num_heads: int = var(8, "model", "query heads", low=1)
    num_kv_heads: int = var(4, "model", "key and value heads", low=1)
    mlp_mult: float = var(2.0, "model", "MLP hidden width as a multiple of MODEL_DIM", low=0.01)
    mlp_act: str = var("relu2", "model", "MLP nonlinearity", choices=("relu2", "leaky_relu2", "swiglu"))
    layer_pattern: str = var("attn", "model", "mixers of the layers: attn, nsa, skc, hybrid, skc_competition, or "
        "letters that repeat: A attention, N sparse attention, K Koopman, S SKC, P SKC beside its MLP")
    shared_blocks: int = var(0, "model", "blocks that the layers share in turn; 0: each layer its own", low=0)
    recurrence_layers: str = var("", "model", "layers that run again, as first-last, e.g. 3-5; empty: none")
    recurrence_depth: int = var(2, "model", "times that they run", low=2, high=64, when=lambda h: bool(h.looped))
    recurrence_start_fraction: float = var(0.35, "optimizer", "progress from which on they do", "fraction", low=0,
        high=1, when=lambda h: bool(h.looped))
    stochastic_depth: float = var(0.0, "optimizer", "chance that a row skips a sublayer of the last layer; less below",
        low=0, high=0.9)
    residual: str = var("unet", "model", "residual topology: plain, with U-Net skips, hyper-connections, mHC",
        choices=("plain", "unet", "hc", "mhc"))
    unet_skips: bool = var(False, "model", "skips from the first half of the layers on the first lane",
        when=lambda h: h.residual in ("hc", "mhc") and h.num_layers > 1)
    backout: int = var(-1, "model", "layer whose output is taken off the last one's, times a learned factor; -1: none",
        low=-1)
    hc_lanes: int = var(2, "topology", "lanes", low=2, high=16, when=lambda h: h.residual == "hc")
    hc_learn: str = var("keep,write,bias", "topology", "what is learned: keep, write, bias, read, mix; or none",
        when=lambda h: h.residual == "hc")
    hc_keep_init: float = var(1.1**0.5, "topology", "first factor on lanes at each sublayer", low=0,
        when=lambda h: h.residual == "hc")
    hc_keep_per_lane: bool = var(False, "topology", "each lane has a factor of its own",
        when=lambda h: h.residual == "hc" and "keep" in h.hc_learned)
    hc_x0_init: float = var(0.0, "topology", "first factor on the embedding in biases",
        when=lambda h: h.residual == "hc" and "bias" in h.hc_learned)
    hc_bigram_init: float = var(0.05, "topology", "first factor on n-grams in biases",
        when=lambda h: h.residual == "hc" and "bias" in h.hc_learned and h.has_bigram_stream)
    hc_detach: bool = var(False, "topology", "no gradient flows into the embedding through biases",
        when=lambda h: h.residual == "hc" and "bias" in h.hc_learned)
    hc_start: int = var(0, "topology", "layer from which on there is more than one lane", low=0,
        when=lambda h: h.residual == "hc")
    hc_lr: float = var(0.008, "optimizer", "AdamW rate of hyper-connections; five times this for keep", low=0,
        when=lambda h: h.residual == "hc" and bool(h.hc_learned))
    mhc_n: int = var(2, "topology", "streams", low=2, high=8, when=lambda h: h.residual == "mhc")
    mhc_mode: str = var("lite", "topology", "mixing matrices: by Sinkhorn, or lite, a mean of permutations",
        choices=("lite", "sinkhorn"), when=lambda h: h.residual == "mhc")
    mhc_logits: str = var("static", "topology", "mixing of a sublayer: the same for all tokens, or for each its own",
        choices=("static", "dynamic"), when=lambda h: h.residual == "mhc")
    mhc_gate: str = var("scalar", "topology", "share of the mixing: one for a sublayer, or for each token its own",
        choices=("scalar", "token"), when=lambda h: h.residual == "mhc")
    mhc_gate_init: float = var(0.01, "topology", "first share of the mixing", low=1e-6, high=0.999999,
        when=lambda h: h.residual == "mhc")
    mhc_gate_noise: float = var(0.0, "optimizer", "noise on mHC's gate logits in training, standard deviation", low=0,
        when=lambda h: h.residual == "mhc")
    mhc_tau: float = var(1.0, "topology", "temperature that mixing logits are divided by", low=1e-3,
        when=lambda h: h.residual == "mhc")
    mhc_init_offdiag: float = var(-2.0, "topology", "first logits off the diagonal, divided by MHC_TAU",
        when=lambda h: h.residual == "mhc" and h.mhc_mode == "sinkhorn")
    mhc_init_others: float = var(-8.0, "topology", "first logits of permutations but the identity, divided by MHC_TAU",
        when=lambda h: h.residual == "mhc" and h.mhc_mode == "lite")
    mhc_read_apart: float = var(4.0, "topology", "first logit of the stream that a sublayer reads, less of the others",
        when=lambda h: h.residual == "mhc")
    mhc_write_apart: float = var(0.1, "topology", "the same of the stream that a sublayer writes more than the others",
        when=lambda h: h.residual == "mhc")
    sinkhorn_iters: int = var(20, "topology", "iterations of Sinkhorn", low=1,
        when=lambda h: h.residual == "mhc" and h.mhc_mode == "sinkhorn" and h.mhc_n > 2)
    mhc_lr: float = var(0.1, "optimizer", "Adam rate of mHC's reads and writes", low=0,
        when=lambda h: h.residual == "mhc")
    mhc_mix_lr: float = var(0.001, "optimizer", "Adam rate of its mixing and gates", low=0,
        when=lambda h: h.residual == "mhc")
    resid_mix: bool = var(True, "model", "each block mixes the embedding back in, per channel",
        when=lambda h: h.residual in ("plain", "unet"))
    embed_dim: int = var(0, "model", "width of factored embeddings; 0: MODEL_DIM", low=0)
    bigram_hash_buckets: int = var(0, "model", "rows of each hashed n-gram table; 0: no such tables", low=0)
    bigram_hash_dim: int = var(64, "model", "width of a token's hashed n-grams, over all orders", "channels", low=1,
        when=lambda h: h.bigram_hash_buckets > 0)
    bigram_hash_heads: int = var(1, "model", "tables of each order, hashed apart", low=1,
        when=lambda h: h.bigram_hash_buckets > 0)
    engram_inject_layer: int = var(-1, "model", "layer before which hashed n-grams enter through a gate (engram); "
        "-1: they are added to the embedding", low=-1, when=lambda h: h.bigram_hash_buckets > 0)
    bigram_hash_orders: str = var("2", "model", "lengths of hashed n-grams, comma-separated, e.g. 2,3", "tokens",
        when=lambda h: h.bigram_hash_buckets > 0)
    induction_orders: str = var("0", "model", "n-grams whose last followers are looked up, as 1,2,3; 0: none")
    induction_window: int = var(1024, "model", "how far back to look for them", "tokens", low=1,
        when=lambda h: h.induction_orders != "0")
    induction_count: int = var(2, "model", "how many last occurrences of each to look up", low=1,
        when=lambda h: h.induction_orders != "0")
    tie_embeddings: bool = var(True, "model", "output head shares the embedding table")
    untie_at_fraction: float = var(0.0, "model", "progress at which a tied head becomes its own matrix; 0: never",
        "fraction", low=0, high=1)
    tied_embed_init_std: float = var(0.005, "model", "standard deviation of initial embeddings", low=0)
    rope_base: float = var(10000.0, "model", "rotary base", low=1)
    partial_rope_dims: int = var(0, "model", "rotated dimensions of each head; 0: all", "channels", low=0)
    yarn_factor: float = var(1.0, "model", "context extension by YaRN; 1: none", "times", low=1)
    yarn_original: int = var(0, "model", "context the model was trained at; 0: TRAIN_SEQ_LEN", "tokens", low=0,
        when=lambda h: h.yarn_factor > 1)
    qk_norm: bool = var(True, "model", "RMS-normalize queries and keys per head", when=lambda h: h.has_queries)
    attn_init: str = var("uniform", "model", "first queries and keys; mimetic: their product is like the identity",
        choices=("uniform", "mimetic"), when=lambda h: "attn" in h.mixers)
    value_embed: int = var(0, "model", "attention layers, the first and last so many, whose values add a learned row "
        "of each token; 0: none", low=0, when=lambda h: "attn" in h.mixers)
    qk_gain_init: float = var(1.5, "model", "initial learned gain of each query head", low=0,
        when=lambda h: h.has_queries)
    label_smoothing: float = var(0.0, "optimizer", "share of the training target that all tokens have", low=0, high=0.9)
    logit_softcap: float = var(30.0, "model", "logits are cap * tanh(z / cap); 0: no cap", low=0, high=1000)
    value_residual: bool = var(False, "model", "attention layers mix in the first attention layer's values",
        when=lambda h: h.mixers.count("attn") > 1)
    xsa_layers: int = var(0, "model", "last attention layers whose heads drop their part along the token's own value",
        low=0, when=lambda h: "attn" in h.mixers)
    attn_gate: int = var(0, "model", "channels from which each head's output gate is made; 0: no gates", "channels",
        low=0, when=lambda h: "attn" in h.mixers)
    smear_gate: int = var(0, "model", "channels from which a gate for the previous token's embedding is made; 0: none",
        "channels", low=0)
    proj_norm: bool = var(False, "model", "inputs of attention's and MLPs' output projections are normed, with a gain")
    ln_scale: bool = var(False, "model", "normed inputs of layer l are divided by sqrt(l + 1)")
    attn_window: int = var(0, "model", "keys a query may see, itself included; 0: all", "tokens", low=0,
        when=lambda h: "attn" in h.mixers)
    doc_mask: bool = var(False, "model", "attention and induction stay inside their document",
        when=lambda h: h.has_queries or bool(h.matched_orders))
    attn_impl: str = var("auto", "model", "attention backend", choices=("auto", "fa3", "fa2", "blocks", "sdpa"))
    grad_checkpoint: int = var(0, "model", "recompute activations of every k sites in backward; 0: off", "sites", low=0)

    # Native sparse attention
    nsa_block: int = var(32, "nsa", "tokens that one compressed key stands for", "tokens", low=1,
        when=lambda h: "nsa" in h.mixers)
    nsa_stride: int = var(16, "nsa", "tokens from one compressed key to the next", "tokens", low=1,
        when=lambda h: "nsa" in h.mixers)
    nsa_select_block: int = var(64, "nsa", "size of the blocks that queries choose", "tokens", low=1,
        when=lambda h: "nsa" in h.mixers)
    nsa_select: int = var(16, "nsa", "blocks of a query, three of them fixed: its document's first, its own and the "
        "one before", low=3, when=lambda h: "nsa" in h.mixers)
    nsa_window: int = var(512, "nsa", "near keys of a query, itself included", "tokens", low=1,
        when=lambda h: "nsa" in h.mixers)
    nsa_pool: str = var("mlp", "nsa", "compressed keys and values: scaled means, or also an MLP",
        choices=("mlp", "mean"), when=lambda h: "nsa" in h.mixers)
    nsa_gates: str = var("sigmoid", "nsa", "gates of the three branches: each for itself, or shares of one",
        choices=("sigmoid", "softmax"), when=lambda h: "nsa" in h.mixers)
    nsa_impl: str = var("auto", "nsa", "backend: by gathers, by masks over all pairs, or by Triton "
        "kernels (CUDA)", choices=("auto", "gather", "masked", "triton"), when=lambda h: "nsa" in h.mixers)
    nsa_strict: bool = var(False, "nsa", "check before each read that it is not of a later key (COMPILE=0)",
        when=lambda h: "nsa" in h.mixers)

    # Recurrent memory
    rmt_segment: int = var(0, "rmt", "tokens of a segment that reads and writes memory; 0: none", "tokens", low=0)
    rmt_tokens: int = var(8, "rmt", "memory tokens, read before a segment and written after it", "tokens", low=1,
        high=4096,
        when=lambda h: h.rmt_segment > 0)
    rmt_bptt: int = var(4, "optimizer", "gradients are cut before every so many segments", "segments", low=2,
        when=lambda h: h.rmt_segment > 0)
    dataset_state_mode: str = var("full", "run", "what checkpoints hold of carried states: all, or light: none, and "
        "resuming reads the last window again", choices=("full", "light"), when=lambda h: h.carry_train)

    # SKC stack
    skc_block_size: int = var(64, "skc", "positions of a block, a power of two", "tokens", low=1,
        when=lambda h: h.has_blocks)
    skc_conv: int = var(4, "skc", "taps of the causal convolutions", "tokens", low=1, when=lambda h: h.has_scans)
    skc_local: str = var("run", "skc", "local path: its scan runs on, or begins anew with each block",
        choices=("run", "block", "off"), when=lambda h: h.has_skc)
    skc_spectral: bool = var(True, "skc", "spectral path over earlier blocks", when=lambda h: h.has_skc)
    skc_spectral_entropy: float = var(0.01, "optimizer", "weight of the spectral entropy loss", low=0,
        when=lambda h: h.has_skc and h.skc_spectral)
    skc_parallel_residual: bool = var(False, "skc", "SKC and MLP of a layer read the same input",
        when=lambda h: h.has_skc)
    eng_to_skc_mode: str = var("off", "skc", "how the engram's memory also enters SKC layers",
        choices=("off", "bias", "gate"), when=lambda h: h.has_skc and h.has_engram)
    capsule_dim: int = var(128, "skc", "width of Koopman mixer, SKC and capsules, a power of two", "channels", low=1,
        when=lambda h: h.has_scans or h.capsule_bank)
    capsule_num: int = var(32, "skc", "capsules of an SKC layer and of the bank; 0: SKC without capsules", low=0,
        when=lambda h: h.has_skc or h.capsule_bank)
    koopman_rank: int = var(4, "skc", "rank of Koopman couplings", low=1,
        when=lambda h: "koopman" in h.mixers or (h.capsule_bank and h.feedback_passes > 0))
    koopman_rotation: bool = var(True, "skc", "Koopman mixers and the bank work in a basis turned by a Hadamard matrix",
        when=lambda h: "koopman" in h.mixers or h.capsule_bank)
    capsule_bank: bool = var(False, "skc", "capsules with Koopman dynamics between encoder and decoder layers")
    capsule_carry_decay: float = var(0.8, "skc", "what is left of the bank's capsules after TRAIN_SEQ_LEN tokens",
        low=0, high=1, when=lambda h: h.capsule_bank)
    capsule_blend_init: float = var(-5.0, "skc", "first logit of the foreseen part in a later pass's capsules",
        when=lambda h: h.capsule_bank and h.feedback_passes > 0)
    capsule_consistency: float = var(0.005, "optimizer", "weight of the loss of predicted capsules", low=0,
        when=lambda h: h.capsule_bank and h.feedback_passes > 0)
    capsule_speculator: float = var(0.01, "optimizer", "weight of the loss of the last pass foreseen", low=0,
        when=lambda h: h.capsule_bank and h.feedback_passes > 0)
    capsule_speculate: bool = var(False, "evaluation", "capsules foreseen by the bank replace the feedback passes",
        when=lambda h: h.capsule_bank and h.feedback_passes > 0)
    feedback_passes: int = var(0, "skc", "times that the decoder layers run again, with feedback", low=0)
    feedback_every: int = var(1, "skc", "every so many decoder layers read the feedback", "layers", low=1,
        when=lambda h: h.feedback_passes > 0)
    feedback_dim: int = var(64, "skc", "width of feedback", "channels", low=1, when=lambda h: h.feedback_passes > 0)
    feedback_sketch_tokens: int = var(4, "skc", "sketch tokens of a block", low=1, when=lambda h: h.feedback_passes > 0)
    feedback_halt: float = var(0.05, "evaluation", "a block stops when a pass changes its capsules by less; 0: never",
        low=0, when=lambda h: h.capsule_bank and h.feedback_passes > 1)
    moe_experts: int = var(0, "skc", "experts in place of the MLP of the upper layers; 0: none", low=0)
    moe_top_k: int = var(1, "skc", "experts of a token", low=1, when=lambda h: h.moe_experts > 0)
    moe_layer_frac: float = var(0.34, "skc", "share of the layers, from the last down, that have experts", low=0,
        high=1, when=lambda h: h.moe_experts > 0)
    moe_start_fraction: float = var(0.0, "optimizer", "progress from which on there is more than one", "fraction",
        low=0, high=1, when=lambda h: h.moe_experts > 0)
    moe_balance: float = var(0.001, "optimizer", "weight of the load-balance loss", low=0,
        when=lambda h: h.moe_experts > 0)

    # Weights
    matrix_codec: str = var("bf16", "weights", "codec of the big matrices", choices=CODEC_NAMES)
    fp_storage: str = var("bf16", "weights", "codec of embeddings and head", choices=CODEC_NAMES)
    scalar_codec: str = var("fp16", "weights", "codec of gains, scales and mixes", choices=CODEC_NAMES)
    codec_map: str = var("", "weights", "other codecs, name:codec,...: a role's kind (embed:int7), or the start or glob"
        " of a matrix's name (mlp:int6, *.gate.weight:int8); names go before kinds, then the longest entry")
    export_mode: str = var("ternary", "weights", "codecs in the file: as trained; competition_gptq: after float "
        "training, by GPTQ; mixed: matrices as trained, others after training", choices=tuple(EXPORT_MAPS))
    gptq_batches: int = var(16, "optimizer", "batches of MICRO_BATCH_TOKENS whose inputs GPTQ goes by",
        low=1, when=lambda h: h.export_mode == "competition_gptq")
    gptq_source: str = var("train", "optimizer", "what they are: held-out training tokens, or text of the model itself",
        choices=("train", "self"), when=lambda h: h.export_mode == "competition_gptq")
    gptq_reserve_seconds: float = var(30.0, "optimizer", "training clock kept for GPTQ after the steps", "s", low=0,
        when=lambda h: h.export_mode == "competition_gptq" and h.max_wallclock_seconds > 0)
    lqer_rank: int = var(4, "weights", "rank of the int4 correction of the worst quantized matrices; 0: none", low=0,
        when=lambda h: h.export_mode == "competition_gptq")
    lqer_tensors: int = var(3, "weights", "matrices that have it", low=1,
        when=lambda h: h.export_mode == "competition_gptq" and h.lqer_rank > 0)
    group_size: int = var(128, "weights", "weights that share one scale, along the input dimension", low=1,
        when=lambda h: h.any_grouped)
    int_group: int = var(-1, "weights", "the same of integer codecs; 0: a whole row, -1: GROUP_SIZE", low=-1,
        when=lambda h: h.any_integers)
    clip_sigma: float = var(0.0, "weights", "integers clip at so many root mean squares of a group, beyond its largest,"
        " too: coarser steps, of fewer bits when coded; 0: at its largest", low=0, when=lambda h: h.any_integers)
    clip_search: bool = var(False, "weights", "integers clip where the squared error of their group is least",
        when=lambda h: h.any_integers)
    ternary_scale: str = var("absmean", "weights",
        "scale of a ternary group: mean |w|, or least squares for its codes", choices=("absmean", "lstsq"),
        when=lambda h: "ternary" in h.codecs)
    turbo_quant_train: bool = var(False, "weights",
        "weights of small integers are quantized in a basis turned by a Hadamard matrix in each group",
        when=lambda h: h.any_grouped)
    ternary_start_fraction: float = var(0.0, "weights", "train in float until this progress", "fraction", low=0,
        high=1, when=lambda h: "ternary" in h.codecs)

    ternary_noise_scale: float = var(0.0, "weights", "noise on matrices early on, in standard deviations of theirs",
        low=0)
    ternary_noise_fraction: float = var(0.3, "weights", "progress at which that noise has faded", "fraction", low=0,
        high=1, when=lambda h: h.ternary_noise_scale > 0)

    # Optimizer
    iterations: int = var(20000, "optimizer", "steps of the schedule", "steps", low=0)
    extension_steps: int = var(0, "optimizer", "steps after the schedule, at the floor rate", "steps", low=0,
        when=lambda h: h.iterations > 0 and h.lr_floor > 0)
    max_wallclock_seconds: float = var(600.0, "optimizer", "training clock; 0: bound by ITERATIONS only", "s", low=0)
    matrix_lr: float = var(0.04, "optimizer", "Muon rate of matrices", low=0)
    scalar_lr: float = var(0.04, "optimizer", "AdamW rate of gains, scales and mixes", low=0)
    embed_lr: float = var(0.6, "optimizer", "AdamW rate of an untied embedding", low=0,
        when=lambda h: not h.tie_embeddings)
    head_lr: float = var(0.008, "optimizer", "AdamW rate of an untied head", low=0, when=lambda h: h.has_head)
    tied_embed_lr: float = var(0.05, "optimizer", "AdamW rate of a tied embedding", low=0,
        when=lambda h: h.tie_embeddings)
    bigram_hash_lr: float = var(0.07, "optimizer", "Adagrad rate of hashed n-gram tables", low=0,
        when=lambda h: h.bigram_hash_buckets > 0)
    engram_taper_start: float = var(1.0, "optimizer", "progress from which on n-gram tables learn ever less",
        "fraction", low=0, high=1, when=lambda h: h.bigram_hash_buckets > 0)
    koopman_lr: float = var(0.01, "optimizer", "AdamW rate of the bank's dynamics", low=0,
        when=lambda h: h.capsule_bank and h.feedback_passes > 0)
    muon_momentum: float = var(0.95, "optimizer", "Muon momentum", low=0, high=0.9999)
    muon_momentum_warmup_start: float = var(0.85, "optimizer", "Muon momentum at step 0", low=0, high=0.9999,
        when=lambda h: h.muon_momentum_warmup_steps > 0)
    muon_momentum_warmup_steps: int = var(500, "optimizer", "steps from there to MUON_MOMENTUM", "steps", low=0)
    muon_backend_steps: int = var(5, "optimizer", "Newton-Schulz iterations", low=1, high=20)
    muon_coeffs: str = var("jordan", "optimizer", "their polynomials: the same each time, or the best for each",
        choices=("jordan", "polar_express"))
    muon_row_norm: bool = var(True, "optimizer", "normalize the update's rows before Newton-Schulz (MuonEq-R)")
    muon_wd: float = var(0.0, "optimizer", "decoupled weight decay of matrices", low=0)
    muon_wd_taper_start: float = var(1.0, "optimizer", "progress from which on it falls to 0 at the end", "fraction",
        low=0, high=1, when=lambda h: h.muon_wd > 0)
    adam_wd: float = var(0.0, "optimizer", "decoupled weight decay of embeddings and head", low=0)
    beta1: float = var(0.9, "optimizer", "AdamW first beta", low=0, high=0.9999)
    beta2: float = var(0.95, "optimizer", "AdamW second beta", low=0, high=0.99999)
    adam_eps: float = var(1e-8, "optimizer", "AdamW epsilon", low=0)
    grad_clip_norm: float = var(0.0, "optimizer", "clip the global gradient norm to this; 0: off", low=0)
    warmup_steps: int = var(20, "optimizer", "compile warm-up steps outside the clock, undone afterwards", "steps",
        low=0, when=lambda h: h.may_compile)
    lr_warmup_fraction: float = var(0.0, "optimizer", "progress over which rates rise from 0", "fraction", low=0,
        high=1)
    warmdown_iters: int = var(0, "optimizer",
        "steps over which rates fall, by the measured step time; 0: WARMDOWN_FRACTION", "steps", low=0)
    warmdown_fraction: float = var(0.5, "optimizer", "last part of the run over which rates fall", "fraction", low=0,
        high=1, when=lambda h: h.warmdown_iters == 0)
    lr_floor: float = var(0.0, "optimizer", "rate at the end as a share of the peak", "fraction", low=0, high=1)
    ema_decay: float = var(0.0, "optimizer", "decay of the weight average; 0: off", low=0, high=0.99999)
    ema_start_fraction: float = var(0.4, "optimizer", "progress at which averaging starts", "fraction", low=0, high=1,
        when=lambda h: h.ema_decay > 0)

    # Evaluation
    val_batch_size: int = var(524288, "evaluation", "validation tokens of one forward pass on one rank", "tokens",
        low=1)
    val_loss_every: int = var(1000, "evaluation", "validate every so many steps; 0: only at the end", "steps", low=0)
    diag_every: int = var(0, "evaluation", "measure gates, norms and weights every so many steps; 0: never", "steps",
        low=0)
    mhc_log_every: int = var(100, "evaluation", "the same, where there are mHC's streams to measure", "steps", low=0,
        when=lambda h: h.residual == "mhc")
    train_log_every: int = var(200, "evaluation", "log the training loss every so many steps", "steps", low=1)
    max_val_tokens: int = var(0, "evaluation", "validation tokens to score; 0: all", "tokens", low=0)
    eval_seq_len: int = var(0, "evaluation", "evaluation window; 0: TRAIN_SEQ_LEN", "tokens", low=0)
    eval_streams: int = var(64, "evaluation", "contiguous spans of the validation stream, each with its own state",
        low=1)
    sliding_eval: bool = var(False, "evaluation", "overlapping windows: each scored token sees a long context")
    sliding_eval_stride: int = var(64, "evaluation", "tokens scored per sliding window", "tokens", low=1,
        when=lambda h: h.sliding_eval)
    carry_eval: bool = var(False, "evaluation", "carry mixer states from window to window of a stream")
    kv_cache: str = var("exact", "evaluation", "numbers in attention's caches", choices=("exact", "int8", "int4"),
        when=lambda h: h.has_queries)
    turbo_quant_kv: bool = var(False, "evaluation", "those numbers are rounded in a basis turned by a Hadamard matrix",
        when=lambda h: h.has_queries and h.kv_cache != "exact")
    eval_protocol: str = var("", "evaluation", "how the final score is made, named in advance, e.g. "
        "window=1024,stride=64,streams=8,adapters=ttt_lora+ngram; empty: as the variables say")
    max_eval_seconds: float = var(0.0, "evaluation", "most a final evaluation may take, foretold from its first 2%; 0: "
        "unbounded", "s", low=0)
    ngram_cache: bool = var(False, "evaluation", "mix in what followed the same tokens earlier in the stream")
    ngram_cache_orders: str = var("2,3,4,5,6,7,8", "evaluation", "lengths of its n-grams", when=lambda h: h.ngram_cache)
    ngram_cache_tokens: int = var(131072, "evaluation", "last scored tokens of a stream that it remembers", "tokens",
        low=1, high=2**30, when=lambda h: h.ngram_cache)
    ngram_cache_depth: int = var(16, "evaluation", "last occurrences of a context that it counts", low=1, high=4096,
        when=lambda h: h.ngram_cache)
    eval_engram: bool = var(False, "evaluation", "mix in hashed n-gram counts of the stream's scored tokens")
    eval_engram_orders: str = var("2,3,4", "evaluation", "lengths of its n-grams", when=lambda h: h.eval_engram)
    eval_engram_buckets: int = var(65536, "evaluation", "rows of each of its tables; contexts may share one", low=1,
        high=2**30, when=lambda h: h.eval_engram)
    eval_engram_tokens: int = var(131072, "evaluation", "last scored tokens of a stream that it remembers", "tokens",
        low=1, high=2**30, when=lambda h: h.eval_engram)
    eval_engram_depth: int = var(32, "evaluation", "last entries of a row that it counts", low=1, high=4096,
        when=lambda h: h.eval_engram)
    eval_engram_alpha: float = var(1.0, "evaluation", "counts that the lower order gets in Laplace's rule", low=1e-3,
        high=1e3, when=lambda h: h.eval_engram)
    ttt_scope: str = var("off", "evaluation", "what adapts to scored tokens: scalars, low-rank pairs anew for each "
        "document (lora), feedback, SKC's scalars (skc_safe), the capsule bank, everything between phases (global)",
        choices=("off", "scalars", "lora", "feedback", "skc_safe", "capsule_bank", "global", "all"))
    ttt_optimizer: str = var("sgd", "evaluation", "rule of its steps", choices=("sgd", "adam"),
        when=lambda h: h.ttt_scope != "off")
    ttt_lr: float = var(0.01, "evaluation", "rate of its steps", low=0, when=lambda h: h.ttt_scope != "off")
    ttt_momentum: float = var(0.9, "evaluation", "momentum of SGD, kept from chunk to chunk; Adam's first beta", low=0,
        high=0.9999, when=lambda h: h.ttt_scope != "off")
    ttt_clip: float = var(1.0, "evaluation", "bound on a gradient's norm", low=1e-9,
        when=lambda h: h.ttt_scope != "off")
    ttt_epochs: int = var(1, "evaluation", "passes over newly scored tokens", low=1,
        when=lambda h: h.ttt_scope != "off")
    ttt_chunk_tokens: int = var(0, "evaluation", "scored tokens of a stream before it adapts; 0: every chunk", "tokens",
        low=0, when=lambda h: h.ttt_scope not in ("off", "global"))
    ttt_rank: int = var(8, "evaluation", "rank of the pairs", low=1, high=4096, when=lambda h: h.ttt_scope == "lora")
    ttt_phases: int = var(3, "evaluation", "parts of the evaluation, between which all streams meet", low=2, high=1000,
        when=lambda h: h.ttt_scope == "global")
    freeze_packed_engram: bool = var(True, "evaluation", "n-gram tables do not adapt",
        when=lambda h: h.ttt_scope in ("global", "all") and h.bigram_hash_buckets > 0)
    freeze_check_strict: bool = var(True, "evaluation", "fail when an evaluation has changed the model's own weights",
        when=lambda h: h.ttt_scope != "off")
    temp_scaling: bool = var(False, "evaluation", "divide logits by a temperature fitted on held-out training tokens")
    calib_max_seconds: float = var(30.0, "evaluation", "training clock kept for fitting after the steps", "s", low=0,
        when=lambda h: bool(h.fitted))

    # Artifact
    calibrate: bool = var(False, "artifact", "after the last step, fit thresholds and scales of ternary and integer "
        "weights to held-out training tokens", when=lambda h: h.any_grouped)
    calib_at_fraction: float = var(0.0, "artifact", "progress at which that is done once, training going on with what "
        "was found; 0: never", "fraction", low=0, high=1, when=lambda h: h.any_grouped)
    calib_max_evals: int = var(32, "artifact", "most evaluations of one calibration or pruning", low=1,
        when=lambda h: h.calibrates or h.prunes)
    calib_max_candidates: int = var(12, "artifact", "largest tensors that a calibration looks at", "tensors", low=1,
        when=lambda h: h.calibrates)
    calib_proxy_tokens: int = var(4096, "artifact", "held-out training tokens of one evaluation", "tokens", low=1,
        when=lambda h: h.calibrates or h.prunes or h.export_proxy_eval > 0)
    export_proxy_eval: int = var(0, "artifact", "every so many steps, score on held-out training tokens what would be "
        "exported; the best is; 0: the last", "steps", low=0)
    engram_prune: float = var(0.0, "artifact", "share of the n-gram rows, those that matter least, that become zeros",
        "fraction", low=0, high=1, when=lambda h: h.bigram_hash_buckets > 0)
    engram_prune_max_loss: float = var(0.001, "artifact", "most by which that may raise the loss of held-out tokens",
        "nats", low=0, when=lambda h: h.prunes)
    hard_budget_bytes: int = var(16_000_000, "artifact", "most bytes of artifact and code together", "bytes", low=1)
    code_bytes_reserve: int = var(24_000, "artifact", "bytes the unpackaged script counts for", "bytes", low=0)
    # fmt: on

    @property
    def codec_rules(self) -> dict[str, str]:
        """CODEC_MAP as pattern -> codec. Raises UserError."""
        pairs = [part.split(":") for part in self.codec_map.split(",")] if self.codec_map else []
        for pair in pairs:
            if len(pair) != 2 or not pair[0] or pair[1] not in CODEC_NAMES:
                known = f"name:codec,... with codecs {', '.join(CODEC_NAMES)}"
                raise UserError(f"CODEC_MAP={self.codec_map}: {':'.join(pair) or 'an empty entry'} is not {known}")
        return dict(pairs)

    @property
    def export_rules(self) -> dict[str, str]:
        """What EXPORT_MODE and then CODEC_MAP say, as pattern -> codec."""
        pairs = [part.split(":") for part in EXPORT_MAPS[self.export_mode].split(",") if part]
        return {**dict(pairs), **self.codec_rules}

    @property
    def codecs(self) -> tuple[str, ...]:
        """Codecs of this configuration's weights in training and in the file, each once."""
        more = ["int4"] if self.corrects else []
        trained = (self.matrix_codec, self.fp_storage, self.scalar_codec)
        return tuple(dict.fromkeys((*trained, *self.export_rules.values(), *more)))

    @property
    def carries(self) -> bool:
        """Whether sites ever begin from a state: a packaged script writes no text but GPTQ's."""
        writes = self.export_mode == "competition_gptq" and self.gptq_source == "self"
        return not PACKAGED or writes or self.carry_train or self.carry_eval

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """Those that `choose_attention` may take before SDPA; a packaged script is for one machine of the field."""
        found = ("fa3",) if PACKAGED else ("fa3", "fa2", "blocks")
        return found if self.attn_impl == "auto" else (self.attn_impl,) * (self.attn_impl != "sdpa")

    @property
    def corrects(self) -> bool:
        """Whether some quantized matrices have a low-rank correction."""
        return self.export_mode == "competition_gptq" and self.lqer_rank > 0

    @property
    def streams(self) -> tuple[str, ...]:
        """Kinds of streams that its artifact may have."""
        scaled, kinds = set(self.codecs) - set(FLOAT_CODECS), [CODEC_STREAMS[codec] for codec in self.codecs]
        kinds += ["rows"] * bool(self.ngram_orders) + ["scales"] * bool(scaled)
        return tuple(kind for kind in STREAM_PACKINGS if kind in kinds)

    @property
    def any_grouped(self) -> bool:
        """Whether some weights share scales by groups."""
        return bool(set(self.codecs) & set(GROUPED_CODECS))

    @property
    def any_integers(self) -> bool:
        """Whether some weights are integers of at least 4 bits."""
        return bool(set(self.codecs) & set(INT_CODECS))

    @property
    def calibrates(self) -> bool:
        """Whether codecs are calibrated, during training or after it."""
        return self.any_grouped and (self.calibrate or self.calib_at_fraction > 0)

    @property
    def prunes(self) -> bool:
        """Whether rows of n-gram tables are left out of the artifact."""
        return self.engram_prune > 0 and self.bigram_hash_buckets > 0

    @property
    def fitted(self) -> tuple[str, ...]:
        """Variables that have something fitted or chosen on held-out training tokens."""
        wanted = {
            "TEMP_SCALING": self.temp_scaling,
            "CALIBRATE": self.calibrate and self.any_grouped,
            "CALIB_AT_FRACTION": self.calib_at_fraction > 0 and self.any_grouped,
            "EXPORT_PROXY_EVAL": self.export_proxy_eval > 0,
            "ENGRAM_PRUNE": self.prunes,
        }
        return tuple(name for name, on in wanted.items() if on)

    @property
    def step_seconds(self) -> float:
        """Training clock that steps may use: what calibration and GPTQ need is taken off at the start. 0: unbounded."""
        kept = self.calib_max_seconds if set(self.fitted) - {"CALIB_AT_FRACTION"} else 0.0
        kept += self.gptq_reserve_seconds if self.export_mode == "competition_gptq" else 0.0
        return max(1e-3, self.max_wallclock_seconds - kept) if self.max_wallclock_seconds else 0.0

    @property
    def may_compile(self) -> bool:
        """Whether the step could be compiled on some device that this configuration allows."""
        return self.compile == "1" or (self.compile == "auto" and self.device in ("auto", "cuda"))

    @property
    def has_head(self) -> bool:
        """Whether a head matrix of its own exists, now or after UNTIE_AT_FRACTION."""
        return not self.tie_embeddings or self.untie_at_fraction > 0

    @property
    def adam(self) -> tuple[float, float, float]:
        """AdamW's betas and epsilon."""
        return self.beta1, self.beta2, self.adam_eps

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def rope_dims(self) -> int:
        return self.partial_rope_dims or self.head_dim

    @property
    def embed_width(self) -> int:
        return self.embed_dim or self.model_dim

    @property
    def ngram_orders(self) -> tuple[int, ...]:
        """Lengths of the hashed n-grams; empty without tables."""
        return rising_orders("BIGRAM_HASH_ORDERS", self.bigram_hash_orders) if self.bigram_hash_buckets else ()

    @property
    def matched_orders(self) -> tuple[int, ...]:
        """Lengths of the n-grams that induction looks for."""
        return rising_orders("INDUCTION_ORDERS", self.induction_orders) if self.induction_orders != "0" else ()

    @property
    def history(self) -> int:
        """Tokens before a window that its embeddings look at."""
        matched = self.induction_window + self.matched_orders[-1] - 1 if self.matched_orders else 0
        return max(matched, max(self.ngram_orders, default=1) - 1, int(self.smear_gate > 0))

    @property
    def eval_window(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def score_phases(self) -> int:
        """Parts in which spans are scored; between two of them test-time training of all spans takes its steps."""
        return self.ttt_phases if self.ttt_scope == "global" else 1

    @property
    def spans_apart(self) -> bool:
        """Whether test-time training gives every span weights of its own."""
        return self.ttt_scope not in ("off", "lora", "global")

    @property
    def adapting(self) -> dict[str, bool]:
        """Evaluation's adapters, in the order in which they act, and whether this configuration has them."""
        there = {"ttt": self.ttt_scope != "off", "temperature": self.temp_scaling}
        return {**there, "engram": self.eval_engram, "ngram": self.ngram_cache}

    @property
    def protocol(self) -> str:
        """What fixes a score, in the form of EVAL_PROTOCOL."""
        names = [f"ttt_{self.ttt_scope}" if name == "ttt" else name for name, there in self.adapting.items() if there]
        stride = f",stride={self.sliding_eval_stride}" if self.sliding_eval else ""
        carry = ",carry=1" if self.carry_eval else ""
        adapters = f",adapters={'+'.join(names)}" if names else ""
        settings = f",settings={self.settings}" if self.settings else ""
        return f"window={self.eval_window}{stride}{carry},streams={self.eval_streams}{adapters}{settings}"

    @property
    def settings(self) -> str:
        """A short digest of all else that a score depends on and that is not the default; empty where all is."""
        values, named = dataclasses.asdict(self), (*PROTOCOL_PARTS.values(), *PROTOCOL_SWITCHES, *NOT_OF_THE_SCORE)
        found = [
            f"{name}={values[spec.name]}"
            for name, spec in FIELDS.items()
            if (spec.metadata["group"] == "evaluation" or name.startswith("YARN")) and spec.name not in named
            and values[spec.name] != spec.default and not h_ineffective(self, name)
        ]  # fmt: skip
        return hashlib.sha256("\n".join(found).encode()).hexdigest()[:8] if found else ""

    @property
    def named(self) -> bool:
        """Whether EVAL_PROTOCOL, in whatever order, says all that this score depends on."""
        own, said = (protocol_parts(text).get("settings") for text in (self.protocol, self.eval_protocol))
        same = protocol_values(self.protocol) == protocol_values(self.eval_protocol)
        return bool(self.eval_protocol) and same and own == said

    @property
    def letters(self) -> str:
        """The letter of each layer, from LAYER_PATTERN."""
        cycle = PATTERNS.get(self.layer_pattern, self.layer_pattern)
        if not cycle or set(cycle) - set(MIXER_LETTERS):
            known = f"{', '.join(PATTERNS)}, or letters of {''.join(MIXER_LETTERS)}"
            raise UserError(f"LAYER_PATTERN={self.layer_pattern} is unknown; known: {known}")
        cycle = cycle.replace("S", "P") if self.skc_parallel_residual else cycle
        return (cycle * self.num_layers)[: self.num_layers]

    @property
    def mixers(self) -> tuple[str, ...]:
        """Site kind of each layer's mixer."""
        return tuple(MIXER_LETTERS[letter] for letter in self.letters)

    @property
    def measured_every(self) -> tuple[int, ...]:
        """Numbers of steps after which something is measured."""
        every = (self.diag_every, self.mhc_log_every * (self.residual == "mhc"))
        return tuple(n for n in every if n and not PACKAGED)

    @property
    def switches(self) -> bool:
        """Whether the network's structure may change during a run."""
        return self.untie_at_fraction > 0 or self.moe_experts > 0 or bool(self.looped)

    @property
    def has_skips(self) -> bool:
        """Whether layers of the first half are added to those of the second."""
        return self.residual == "unet" or (self.residual in ("hc", "mhc") and self.unet_skips)

    @property
    def mixes_input(self) -> bool:
        """Whether layers mix the embedding into their input."""
        return self.resid_mix and self.residual in ("plain", "unet")

    @property
    def has_bigram_stream(self) -> bool:
        """Whether the embedding's n-grams are at hand beside it."""
        return self.bigram_hash_buckets > 0 and not self.has_engram

    @property
    def hc_learned(self) -> tuple[str, ...]:
        """Names of HC_LEARN."""
        return tuple(name for name in self.hc_learn.split(",") if name != "none")

    @property
    def has_skc(self) -> bool:
        """Whether some layer's mixer is SKC."""
        return "skc" in self.mixers

    @property
    def has_scans(self) -> bool:
        """Whether some layer's mixer is a recurrence with a convolution."""
        return self.has_skc or "koopman" in self.mixers

    @property
    def has_queries(self) -> bool:
        """Whether some layer's mixer is attention, full or sparse."""
        return "attn" in self.mixers or "nsa" in self.mixers

    @property
    def has_ages(self) -> bool:
        """Whether some layer's mixer has to know where documents begin, as a number."""
        return self.has_scans or ("nsa" in self.mixers and self.doc_mask)

    @property
    def has_blocks(self) -> bool:
        """Whether some part works block by block."""
        return self.has_skc or self.capsule_bank or self.feedback_passes > 0

    @property
    def sees_blocks(self) -> bool:
        """Whether some part reads what earlier blocks left."""
        within_layers = self.has_skc and (self.skc_spectral or self.capsule_num > 0)
        return within_layers or self.capsule_bank or self.feedback_passes > 0

    @property
    def has_engram(self) -> bool:
        """Whether hashed n-grams enter through a gate at a layer."""
        return self.bigram_hash_buckets > 0 and self.engram_inject_layer >= 0

    @property
    def feeds(self) -> tuple[str, ...]:
        """Site kind of each layer's second sublayer: mlp, or moe in the upper layers."""
        experts = round(self.moe_layer_frac * self.num_layers) if self.moe_experts else 0
        return ("mlp",) * (self.num_layers - experts) + ("moe",) * experts

    @property
    def looped(self) -> tuple[int, ...]:
        """Layers of RECURRENCE_LAYERS."""
        try:
            ends = [int(end) for end in self.recurrence_layers.split("-")] if self.recurrence_layers else [1, 0]
            first, last = ends if len(ends) == 2 else ends * 2
        except ValueError:
            raise UserError(f"RECURRENCE_LAYERS={self.recurrence_layers} is not first-last, like 3-5") from None
        return tuple(range(first, min(last, self.num_layers) + 1))  # one beyond the last is refused below

    @property
    def stages(self) -> tuple[tuple[float, int], ...]:
        """(progress, tokens a step) pairs of BATCH_STAGES, or the one batch size."""
        found = stages_of("BATCH_STAGES", self.batch_stages, "0:131072,0.3:262144")
        return tuple((at, int(tokens)) for at, tokens in found) or ((0.0, self.train_batch_tokens),)

    @property
    def lengths(self) -> tuple[tuple[float, int], ...]:
        """(progress, window) pairs of CURRICULUM_STAGES, or the one window."""
        stages = stages_of("CURRICULUM_STAGES", self.curriculum_stages, "0:4,0.15:2,0.4:1") or ((0.0, 1),)
        return tuple((at, int(self.train_seq_len / divisor)) for at, divisor in stages)

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """Kinds of sites of this configuration, each once."""
        more = {"engram": self.has_engram, "bank": self.capsule_bank}
        more |= dict.fromkeys(("sketch", "feedback"), self.feedback_passes > 0)
        return tuple(dict.fromkeys((*self.mixers, *self.feeds, *(kind for kind, there in more.items() if there))))

    @property
    def sparse_backends(self) -> tuple[str, ...]:
        """Backends of NSA that a run may choose or fall back to."""
        if "nsa" not in self.mixers:
            return ()
        automatic = self.nsa_impl == "auto"
        chosen = NSA_FASTEST.values() if automatic else (self.nsa_impl,)
        return tuple(dict.fromkeys((*chosen, *["gather"] * (automatic or (self.rmt_segment and "triton" in chosen)))))

    def used(self) -> dict[str, tuple[str, ...]]:
        """Which entries of each registry this configuration reaches; the extractor keeps only those."""
        kinds = {"matrix": True, "embed": True, "head": self.has_head, "table": bool(self.ngram_orders), "scalar": True}
        kinds |= {"koopman": self.capsule_bank and self.feedback_passes > 0}
        kinds |= {"hc": self.residual == "hc"} | dict.fromkeys(("mhc", "mhc_mix"), self.residual == "mhc")
        groups = tuple(name for name, there in kinds.items() if there)
        more = {"koopman_diagonal": kinds["koopman"], "expert": "moe" in self.feeds, "hc_keep": kinds["hc"]}
        more["router"] = more["expert"]
        return {
            "ROLE_KINDS": (*groups, *(name for name, there in more.items() if there)),
            "GROUPS": groups,
            "RULES": ("muon", "adamw", "adagrad") if self.ngram_orders else ("muon", "adamw"),
            "POLYNOMIALS": (self.muon_coeffs,),
            "CODECS": self.codecs,
            "STREAM_TYPES": self.streams,
            "STREAM_PACKINGS": self.streams,
            "CONTEXT_STREAMS": tuple(kind for kind in self.streams if kind in ("trits", *INT_CODECS)),
            "PACKINGS": tuple(dict.fromkeys(name for kind in self.streams for name in STREAM_PACKINGS[kind])),
            "ACTIVATIONS": (self.mlp_act,),
            "SITE_KINDS": self.site_kinds,
            "RESIDUALS": (self.residual,),
            "BATCH_MODES": (self.batch_mode,),
            "NSA_BACKENDS": self.sparse_backends,
            "ATTENTION": (*self.attention_backends, "sdpa"),
            "ADAPTERS": tuple(name for name, there in self.adapting.items() if there),
        }


MAX_TABLE_WEIGHTS = 2**26  # of hashed n-grams: four times what a 16 MB file can hold of one-byte weights


FIELDS = {f.name.upper(): f for f in dataclasses.fields(Hyperparameters)}
# What a name in EVAL_PROTOCOL's adapters sets.
PROTOCOL_ADAPTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temp_scaling": True}, "engram": {"eval_engram": True}, "ngram": {"ngram_cache": True},
    **{f"ttt_{s}": {"ttt_scope": s} for s in FIELDS["TTT_SCOPE"].metadata["choices"] if s != "off"},
}  # fmt: skip


# Fields that the other parts set, what they switch off where they do not name it, and what changes no score.
PROTOCOL_PARTS = {"window": "eval_seq_len", "stride": "sliding_eval_stride", "streams": "eval_streams",
    "carry": "carry_eval"}  # fmt: skip
PROTOCOL_SWITCHES: dict[str, Any] = {"temp_scaling": False, "eval_engram": False, "ngram_cache": False,
    "ttt_scope": "off", "sliding_eval": False}  # fmt: skip
NOT_OF_THE_SCORE = ("eval_protocol", "max_eval_seconds", "val_batch_size", "val_loss_every", "train_log_every",
    "diag_every", "mhc_log_every", "freeze_check_strict", "calib_max_seconds")  # fmt: skip


def protocol_parts(text: str) -> dict[str, str]:
    """The parts of an EVAL_PROTOCOL by name. Raises UserError when one is there twice."""
    pairs = [part.partition("=")[::2] for part in text.split(",")] if text else []
    adapters = [name.split("_")[0] for part, names in pairs if part == "adapters" for name in names.split("+")]
    for listed in ([name for name, _ in pairs], adapters):
        if twice := [name for name, count in Counter(listed).items() if count > 1]:
            raise UserError(f"EVAL_PROTOCOL={text} says {twice[0]} twice; name each part and adapter once")
    return dict(pairs)


def protocol_values(text: str) -> dict[str, Any]:
    """The fields that an EVAL_PROTOCOL fixes; what it does not name is off. Raises UserError."""
    if not text:
        return {}
    parts, known = protocol_parts(text), PROTOCOL_PARTS
    parts.pop("settings", None)
    names = parts.pop("adapters").split("+") if "adapters" in parts else []
    wrong = [name for name in parts if name not in known] + [name for name in names if name not in PROTOCOL_ADAPTERS]
    if wrong or not {"window", "streams"} <= parts.keys():
        raise UserError(
            f"EVAL_PROTOCOL={text}: {wrong[0] + ' is unknown' if wrong else 'window and streams are missing'}; "
            f"known: {', '.join(known)}, adapters of {', '.join(PROTOCOL_ADAPTERS)}; "
            "e.g. window=1024,stride=64,streams=8,adapters=ngram"
        )
    values = PROTOCOL_SWITCHES | {"sliding_eval": "stride" in parts, "carry_eval": False}
    values |= {known[name]: parse_value(known[name].upper(), number) for name, number in parts.items()}
    return functools.reduce(lambda found, name: found | PROTOCOL_ADAPTERS[name], names, values)


def rising_orders(name: str, text: str) -> tuple[int, ...]:
    """Comma-separated n-gram lengths in rising order. Raises UserError."""
    try:
        orders = tuple(int(order) for order in text.split(","))
    except ValueError:
        raise UserError(f"{name}={text} is not a list like 2,3") from None
    if list(orders) != sorted(set(orders)) or orders[0] < 1 or orders[-1] > 255:
        raise UserError(f"{name}={text[:40]} must rise from at least 1 to at most 255")
    return orders


def stages_of(name: str, text: str, example: str) -> tuple[tuple[float, float], ...]:
    """(progress, number) pairs of progress:number,...; they begin at 0 and rise to less than 1. Raises UserError."""
    try:
        pairs = [pair.split(":") for pair in text.split(",")] if text else []
        stages = tuple((float(at), float(number)) for at, number in pairs)
    except ValueError:
        raise UserError(f"{name}={text} is not progress:number,...; try {example}") from None
    times = [at for at, _ in stages]
    if stages and (times[0] != 0.0 or times != sorted({at for at in times if 0 <= at < 1})):
        raise UserError(f"{name}={text} must start at progress 0 and rise to less than 1")
    if any(not 1 <= number < math.inf for _, number in stages):
        raise UserError(f"{name}={text} has a number below 1; try {example}")
    return stages


# Variables of these families are ours alone, so an unknown one is a mistake even when it resembles none of ours.
FAMILIES = "TTT_ NGRAM_ EVAL_ENGRAM_ CURRICULUM_ EMA_ MOE_ MUON_ ADAM_ ROPE_ YARN_ SLIDING_ WARMDOWN_ TERNARY_ SKC_ "
FOREIGN = ("BATCH_SIZE", "COMPILER", "DEVICES", "MODEL_DIR", "SPEED")  # other programs' variables that resemble ours
FAMILY_PREFIXES = tuple(
    (FAMILIES + "INDUCTION_ MHC_ HC_ RMT_ NSA_ ENGRAM_ BIGRAM_ CAPSULE_ FEEDBACK_ CALIB_ GPTQ_").split()
)

# fmt: off
LOCAL_FLOAT: dict[str, Any] = {
    "num_layers": 4, "model_dim": 128, "num_heads": 2, "num_kv_heads": 2, "mlp_mult": 4.0, "mlp_act": "leaky_relu2",
    "residual": "plain", "bigram_hash_buckets": 65536, "bigram_hash_orders": "2,3",
    "induction_orders": "1,2,3", "matrix_lr": 0.025, "tied_embed_lr": 0.025, "muon_backend_steps": 3,
    "iterations": 500000,  # an hour has 36,000 steps: the clock ends the run
    "train_seq_len": 256, "train_batch_tokens": 2048, "micro_batch_tokens": 2048, "val_batch_size": 4096,
    "val_loss_every": 500, "train_log_every": 25, "save_every": 500, "max_wallclock_seconds": 300.0,
    "muon_momentum_warmup_steps": 100,
}
LOCAL_TERNARY: dict[str, Any] = {**LOCAL_FLOAT, "matrix_codec": "ternary", "group_size": 32}
LOCAL_LONG = {name: value for name, value in LOCAL_TERNARY.items() if name != "train_seq_len"}  # 1,024, the default
SP8192: dict[str, Any] = {
    "vocab_size": 8192, "embed_dim": 256, "data_path": "./data/datasets/fineweb10B_sp8192",
    "tokenizer_path": "./data/tokenizers/fineweb_8192_bpe.model", "fp_storage": "fp8", "matrix_codec": "ternary",
}
ENGRAM: dict[str, Any] = {
    "bigram_hash_buckets": 4096, "bigram_hash_dim": 336, "bigram_hash_orders": "2,3,4", "engram_inject_layer": 1,
}
SKC_STACK: dict[str, Any] = {
    **SP8192, **ENGRAM, "layer_pattern": "skc_competition", "partial_rope_dims": 32, "capsule_bank": True,
    "feedback_passes": 1, "mlp_mult": 3.0, "matrix_lr": 0.025, "curriculum_stages": "0:4,0.15:2,0.4:1",
    "warmdown_fraction": 0.35,
}
MAC: dict[str, Any] = {
    **LOCAL_LONG, "num_layers": 8, "model_dim": 192, "num_heads": 6, "num_kv_heads": 2, "mlp_mult": 16.0,
    "train_batch_tokens": 8192, "micro_batch_tokens": 8192, "doc_mask": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "local_float": LOCAL_FLOAT,
    "local": LOCAL_TERNARY,
    "local_hour": {
        **LOCAL_TERNARY, "num_layers": 6, "model_dim": 384, "num_heads": 6,
        "num_kv_heads": 6, "train_batch_tokens": 4096, "micro_batch_tokens": 4096, "val_loss_every": 250,
        "max_wallclock_seconds": 3600.0,
    },
    "attn": {},
    "ternary": {
        **SP8192, "num_layers": 10, "model_dim": 768, "num_heads": 12, "num_kv_heads": 6, "mlp_mult": 4.0,
        "matrix_lr": 0.03,
    },
    "frontier": {
        "vocab_size": 8192, "data_path": "./data/datasets/fineweb10B_sp8192_casefold",
        "tokenizer_path": "./data/tokenizers/fineweb10B_8192_casefold_bpe.model", "export_mode": "competition_gptq",
        "int_group": 0, "clip_sigma": 12.0, "num_layers": 11, "mlp_mult": 4.0, "mlp_act": "leaky_relu2",
        "partial_rope_dims": 16,
        "ln_scale": True, "qk_gain_init": 5.0, "xsa_layers": 11, "attn_gate": 12, "smear_gate": 12, "doc_mask": True,
        "recurrence_layers": "3-5", "residual": "hc", "hc_learn": "write,mix", "hc_start": 8, "hc_keep_init": 1.0,
        "muon_coeffs": "polar_express", "muon_momentum": 0.97, "muon_momentum_warmup_steps": 1500,
        "muon_wd": 0.09, "muon_wd_taper_start": 0.7, "matrix_lr": 0.025, "warmdown_fraction": 0.7, "lr_floor": 0.1,
        "holdout_tokens": 2**20, "ema_decay": 0.9965, "train_seq_len": 2048, "train_batch_tokens": 786432,
        "sliding_eval": True, "ttt_scope": "lora", "ttt_rank": 80, "ttt_optimizer": "adam", "ttt_lr": 0.003,
        "eval_streams": 128, "max_eval_seconds": 600.0,
    },
    "skc": {**SKC_STACK, "num_layers": 12, "model_dim": 768, "num_heads": 12, "num_kv_heads": 6},
    "skc_proxy": {
        **SKC_STACK, "num_layers": 8, "model_dim": 640, "num_heads": 10, "num_kv_heads": 5,
        "train_batch_tokens": 131072,
    },
    "skc_small": {
        **LOCAL_TERNARY, "layer_pattern": "skc", "capsule_dim": 64,
        "capsule_num": 16,
    },
    "hybrid": {
        **SP8192, **ENGRAM, "layer_pattern": "hybrid", "num_layers": 12, "model_dim": 768, "num_heads": 12,
        "num_kv_heads": 6, "mlp_mult": 3.0, "partial_rope_dims": 32, "matrix_lr": 0.025,
    },
    "hybrid_mac": {
        **LOCAL_TERNARY, "layer_pattern": "hybrid", "num_layers": 8,
        "model_dim": 192, "num_heads": 3, "num_kv_heads": 3, "shared_blocks": 2, "moe_experts": 3,
        "moe_layer_frac": 1.0, "capsule_bank": True, "matrix_lr": 0.035,
    },
    "hc": {
        **SP8192, "num_layers": 11, "model_dim": 768, "num_heads": 12, "num_kv_heads": 6, "mlp_mult": 3.0,
        "bigram_hash_buckets": 4096, "bigram_hash_dim": 256, "residual": "hc", "backout": 6, "attn_init": "mimetic",
        "batch_stages": "0:131072,0.33:262144,0.66:393216", "warmdown_fraction": 0.55, "matrix_lr": 0.03,
    },
    "mhc_lite": {**LOCAL_TERNARY, "residual": "mhc"},
    "mhc_static": {**LOCAL_TERNARY, "residual": "mhc", "mhc_mode": "sinkhorn", "mhc_n": 4},
    "mhc_dynamic": {
        **LOCAL_TERNARY, "residual": "mhc", "mhc_mode": "sinkhorn", "mhc_n": 4, "mhc_logits": "dynamic",
    },
    "mhc_d20": {
        **LOCAL_TERNARY, "residual": "mhc", "mhc_mode": "sinkhorn", "mhc_n": 4, "mhc_logits": "dynamic",
        "num_layers": 20, "model_dim": 64, "max_wallclock_seconds": 900.0,
    },
    "rmt": {
        **LOCAL_TERNARY, "rmt_segment": 64, "doc_mask": True, "batch_mode": "streams", "carry_train": True,
        "carry_eval": True,
    },
    "mac_plain": MAC,
    "mac_rmt_mhc_lite": {**MAC, "rmt_segment": 256, "rmt_tokens": 16, "residual": "mhc"},
    "nsa": {
        **LOCAL_LONG, "layer_pattern": "nsa", "doc_mask": True, "nsa_block": 8,
        "nsa_stride": 4, "nsa_select_block": 16, "nsa_select": 4, "nsa_window": 64,
    },
    "nsa_125m": {
        "vocab_size": 8192, "data_path": "./data/datasets/fineweb10B_sp8192",
        "tokenizer_path": "./data/tokenizers/fineweb_8192_bpe.model", "layer_pattern": "nsa", "doc_mask": True,
        "num_layers": 12, "model_dim": 768, "num_heads": 12, "num_kv_heads": 3, "mlp_mult": 5.0,
        "tie_embeddings": False, "train_seq_len": 3072, "train_batch_tokens": 491520, "micro_batch_tokens": 61440,
        "curriculum_stages": "0:1.5,0.5:1", "save_every": 1000, "iterations": 10000, "max_wallclock_seconds": 0.0,
        "hard_budget_bytes": 260_000_000,  # a model to study, not to submit
    },
    "tiny": {
        "precision": "fp32",  # the same numbers on every machine
        "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "train_seq_len": 32,
        "train_batch_tokens": 256, "micro_batch_tokens": 256, "val_batch_size": 512, "holdout_tokens": 256,
        "group_size": 16, "matrix_codec": "ternary", "iterations": 20, "max_wallclock_seconds": 0.0,
        "train_log_every": 5, "sample_tokens": 8, "eval_streams": 4,
    },
}
# fmt: on


BOOLEANS = {"0": False, "1": True, "false": False, "true": True}
PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda text: BOOLEANS[text.lower()],
}


def parse_value(name: str, text: str) -> Any:
    """Turn a variable's text into its field's type and check its range. Raises UserError."""
    spec = FIELDS[name]
    try:
        value = PARSERS[str(spec.type)](text)
    except (ValueError, KeyError):
        raise UserError(f"{name}={text} is not {spec.type}; its default is {spec.default}") from None
    check_range(name, value)
    return value


def check_range(name: str, value: Any) -> None:
    """Raise UserError when a value lies outside its field's range or choices."""
    meta = FIELDS[name].metadata
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{name}={value} is not one of {', '.join(meta['choices'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value} must be a finite number")
    if meta["low"] is not None and value < meta["low"]:
        raise UserError(f"{name}={value} is too small; the least is {meta['low']:g}")
    if meta["high"] is not None and value > meta["high"]:
        raise UserError(f"{name}={value} is too large; the most is {meta['high']:g}")


def read_env_file(path: str) -> dict[str, str]:
    """KEY=VALUE lines of a config.env; comments and blank lines are skipped. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"ENV_FILE={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"ENV_FILE={path} is not UTF-8 text") from None
    pairs = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, found, value = line.partition("=")
        if not found or name not in FIELDS:
            raise UserError(f"{path}:{number}: {line.strip()!r} is not VARIABLE=value of a known variable")
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {name}: {error}; quote the value") from None
        if len(words) > 1:
            raise UserError(f"{path}:{number}: {name} has {len(words)} words; quote the value")
        if words and words[0]:
            pairs[name] = words[0]
    return pairs


def similar_variables(name: str) -> list[str]:
    """The variable that a name was probably meant to be, if any: nearly the same, or one with more words."""
    words = name.split("_")
    longer = [n for n in FIELDS if len(words) > 1 and (n.startswith(name) or set(words) <= set(n.split("_")))]
    near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.85)
    return near or difflib.get_close_matches(name, longer, n=1, cutoff=0.0)


def reject_mistyped(environ: dict[str, str]) -> None:
    """Raise UserError for a variable that is nearly one of ours, or of one of our families but unknown."""
    for name in environ:
        if name in FIELDS:
            continue
        near = [] if name in FOREIGN else similar_variables(name.upper())
        if near or name.startswith(FAMILY_PREFIXES):
            near = near or difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)
            raise UserError(f"{name} is not a variable of this program; nearest: {near[0]} (--help lists all)")


def validate(h: Hyperparameters) -> None:
    """Raise UserError for values that contradict one another."""
    rows = h.train_batch_tokens // h.train_seq_len
    head, kv, stage_tokens = h.head_dim, h.num_kv_heads, [tokens for _, tokens in h.stages]
    windows = [length for _, length in h.lengths]
    shortest = min(windows)
    # fmt: off
    quantity, _, preset = h.match.partition(":")
    problems = (
        (h.match and (quantity not in MATCH_QUANTITIES or preset not in PRESETS),
            f"MATCH={h.match} is not one of {', '.join(MATCH_QUANTITIES)}, a colon and a preset, like params:skc"),
        (h.model_dim % h.num_heads, f"MODEL_DIM={h.model_dim} must be a multiple of NUM_HEADS={h.num_heads}"),
        (h.num_heads % kv, f"NUM_HEADS={h.num_heads} must be a multiple of NUM_KV_HEADS={kv}"),
        (head % 2, f"MODEL_DIM/NUM_HEADS={head} must be even for rotary positions"),
        (h.rope_dims % 2 or h.rope_dims > head, f"PARTIAL_ROPE_DIMS={h.rope_dims} must be even and at most {head}"),
        (any(tokens % h.train_seq_len or tokens < h.train_seq_len for tokens in stage_tokens),
            f"TRAIN_BATCH_TOKENS={stage_tokens} must be a multiple of TRAIN_SEQ_LEN={h.train_seq_len}; "
            f"try {max(1, rows) * h.train_seq_len}"),
        (windows[-1] != h.train_seq_len or any(length < 1 or tokens % length for length in windows
                                               for tokens in stage_tokens),
            f"CURRICULUM_STAGES={h.curriculum_stages} must make windows that divide TRAIN_BATCH_TOKENS={stage_tokens}, "
            f"and end with 1; TRAIN_SEQ_LEN={h.train_seq_len} over its numbers makes {windows}"),
        (h.curriculum_stages and h.batch_mode == "streams",
            "CURRICULUM_STAGES changes the number of rows: not BATCH_MODE=streams"),
        (1 in h.ngram_orders, "BIGRAM_HASH_ORDERS must begin with at least 2: single tokens have the embedding"),
        (max(h.matched_orders, default=0) * math.log2(h.vocab_size + 1) > 62,
            f"INDUCTION_ORDERS={h.induction_orders} are too long for VOCAB_SIZE={h.vocab_size}: a key has 62 bits"),
        (h.ngram_orders and h.bigram_hash_buckets * h.bigram_hash_dim > MAX_TABLE_WEIGHTS,
            f"BIGRAM_HASH_BUCKETS={h.bigram_hash_buckets} rows are too many; at most "
            f"{MAX_TABLE_WEIGHTS // h.bigram_hash_dim} of BIGRAM_HASH_DIM={h.bigram_hash_dim}"),
        (h.ngram_orders and h.bigram_hash_dim % (len(h.ngram_orders) * h.bigram_hash_heads),
            f"BIGRAM_HASH_DIM={h.bigram_hash_dim} must be a multiple of the {len(h.ngram_orders)} BIGRAM_HASH_ORDERS "
            f"times {h.bigram_hash_heads} BIGRAM_HASH_HEADS"),
        (round(h.mlp_mult * h.model_dim) < 1, f"MLP_MULT={h.mlp_mult} leaves an MLP of width 0"),
        (h.batch_stages and h.batch_mode == "streams",
            "BATCH_STAGES needs a fixed number of rows: not BATCH_MODE=streams"),
        (h.carry_train and h.batch_mode != "streams", "CARRY_TRAIN=1 needs BATCH_MODE=streams, so that rows continue"),
        ((h.carry_train or h.carry_eval) and "attn" in h.mixers and not h.attn_window and not h.rmt_segment,
            "CARRY_TRAIN/CARRY_EVAL with attention needs ATTN_WINDOW, or its cache grows without end"),
        (h.rmt_segment and (2 * h.rmt_segment > shortest or (h.carry_train and h.train_seq_len % h.rmt_segment)),
            f"RMT_SEGMENT={h.rmt_segment} must be at most half of TRAIN_SEQ_LEN={h.train_seq_len} and shorter windows, "
            "or no gradient teaches it what to write; and with CARRY_TRAIN=1 divide it"),
        (h.rmt_segment and h.attn_window, "RMT_SEGMENT bounds attention by itself: ATTN_WINDOW must be 0"),
        ((h.carry_train or h.carry_eval) and "nsa" in h.mixers and not h.rmt_segment,
            "CARRY_TRAIN/CARRY_EVAL with sparse attention needs RMT_SEGMENT, or what may be chosen grows without end"),
        ("nsa" in h.mixers and h.nsa_block > (h.rmt_segment or shortest),
            f"NSA_BLOCK={h.nsa_block} must be at most {'RMT_SEGMENT' if h.rmt_segment else 'the shortest window'}="
            f"{h.rmt_segment or shortest}, or there is no compressed key"),
        ("nsa" in h.mixers
            and (h.nsa_block % h.nsa_stride or h.nsa_select_block % h.nsa_stride or h.nsa_select_block < h.nsa_block),
            f"NSA_STRIDE={h.nsa_stride} must divide NSA_BLOCK={h.nsa_block} and NSA_SELECT_BLOCK={h.nsa_select_block}, "
            "and the first be at most the second"),
        (h.nsa_strict and h.compile == "1", "NSA_STRICT=1 needs COMPILE=0"),
        (h.carry_train and h.kv_cache != "exact", "KV_CACHE is for evaluation: not with CARRY_TRAIN=1"),
        (h.turbo_quant_kv and h.has_queries and head & (head - 1),
            f"TURBO_QUANT_KV=1 needs heads of a power of two, not {head}"),
        (h.ngram_cache and rising_orders("NGRAM_CACHE_ORDERS", h.ngram_cache_orders)[0] < 2,
            "NGRAM_CACHE_ORDERS must begin with at least 2"),
        (h.eval_engram and rising_orders("EVAL_ENGRAM_ORDERS", h.eval_engram_orders)[0] < 2,
            "EVAL_ENGRAM_ORDERS must begin with at least 2"),
        (h.carry_eval and h.ttt_scope == "global",
            "TTT_SCOPE=global excludes CARRY_EVAL=1, which carries what other streams have not scored yet"),
        (h.carry_eval and h.sliding_eval, "CARRY_EVAL=1 and SLIDING_EVAL=1 exclude each other"),
        (h.sliding_eval and h.sliding_eval_stride > h.eval_window,
            f"SLIDING_EVAL_STRIDE={h.sliding_eval_stride} must be at most the window {h.eval_window}"),
        (h.micro_batch_tokens < h.train_seq_len,
            f"MICRO_BATCH_TOKENS={h.micro_batch_tokens} must hold a window of TRAIN_SEQ_LEN={h.train_seq_len}"),
        (h.untie_at_fraction and not h.tie_embeddings, "UNTIE_AT_FRACTION needs TIE_EMBEDDINGS=1 to start from"),
        (h.looped and (h.looped[0] < 0 or h.looped[-1] >= h.num_layers),
            f"RECURRENCE_LAYERS={h.recurrence_layers} must lie within the layers 0-{h.num_layers - 1}"),
        (h.recurrence_layers and not h.looped,
            f"RECURRENCE_LAYERS={h.recurrence_layers} must rise, like 3-5"),
        (h.residual == "mhc" and h.num_layers < 2, "RESIDUAL=mhc needs NUM_LAYERS of at least 2"),
        (set(h.hc_learned) - set(HC_PARTS), f"HC_LEARN={h.hc_learn} must name some of {', '.join(HC_PARTS)}"),
        (h.residual == "hc" and h.hc_start >= h.num_layers,
            f"HC_START={h.hc_start} must be less than NUM_LAYERS={h.num_layers}"),
        (h.backout >= max(0, h.num_layers - 1),
            f"BACKOUT={h.backout} must be less than the last layer, NUM_LAYERS-1={h.num_layers - 1}"),
        (h.engram_inject_layer >= h.num_layers,
            f"ENGRAM_INJECT_LAYER={h.engram_inject_layer} must be less than NUM_LAYERS={h.num_layers}"),
        ((h.has_scans or h.capsule_bank) and h.capsule_dim & (h.capsule_dim - 1),
            f"CAPSULE_DIM={h.capsule_dim} must be a power of two; try {2 ** round(math.log2(h.capsule_dim))}"),
        (h.skc_block_size & (h.skc_block_size - 1),
            f"SKC_BLOCK_SIZE={h.skc_block_size} must be a power of two; try {2 ** round(math.log2(h.skc_block_size))}"),
        (h.sees_blocks and not h.carry_train and h.skc_block_size >= h.train_seq_len,
            f"SKC_BLOCK_SIZE={h.skc_block_size} must be less than TRAIN_SEQ_LEN={h.train_seq_len}, or no block of a "
            "window sees another one"),
        (h.capsule_bank and not h.capsule_num, "CAPSULE_BANK=1 needs CAPSULE_NUM of at least 1"),
        (h.has_skc and h.skc_local == "off" and not h.skc_spectral and not h.capsule_num,
            "an SKC layer needs one of SKC_LOCAL, SKC_SPECTRAL=1 and CAPSULE_NUM"),
        (h.feedback_passes and h.skc_block_size % h.feedback_sketch_tokens,
            f"FEEDBACK_SKETCH_TOKENS={h.feedback_sketch_tokens} must divide SKC_BLOCK_SIZE={h.skc_block_size}"),
        (h.moe_experts and h.moe_top_k > h.moe_experts,
            f"MOE_TOP_K={h.moe_top_k} must be at most MOE_EXPERTS={h.moe_experts}"),
        (h.shared_blocks > h.num_layers,
            f"SHARED_BLOCKS={h.shared_blocks} must be at most NUM_LAYERS={h.num_layers}"),
        (h.shared_blocks and 0 < h.xsa_layers < h.mixers.count("attn"),
            "XSA_LAYERS must be 0 or all attention layers where SHARED_BLOCKS are shared"),
        (h.shared_blocks and len(set(h.feeds)) > 1, "MOE_LAYER_FRAC must be 1 where SHARED_BLOCKS are shared"),
        (h.moe_experts and "moe" not in h.feeds, f"MOE_LAYER_FRAC={h.moe_layer_frac} leaves no layer with experts"),
        (h.eng_to_skc_mode != "off" and not h.has_engram, "ENG_TO_SKC_MODE needs an engram: ENGRAM_INJECT_LAYER"),
        (max(h.attn_gate, h.smear_gate) > h.model_dim,
            f"ATTN_GATE and SMEAR_GATE read at most MODEL_DIM={h.model_dim} channels"),
        (h.resume == "auto" and not h.run_id, "RESUME=auto needs the RUN_ID of the run to continue"),
        (not h.iterations and not h.max_wallclock_seconds,
            "ITERATIONS=0 needs MAX_WALLCLOCK_SECONDS, or nothing bounds the run"),
        (h.fitted and h.max_wallclock_seconds and not 0 < h.calib_max_seconds < h.max_wallclock_seconds,
            f"CALIB_MAX_SECONDS={h.calib_max_seconds} must be more than 0 and less than MAX_WALLCLOCK_SECONDS="
            f"{h.max_wallclock_seconds}"),
        (h.fitted and not h.holdout_tokens, f"{', '.join(h.fitted)} needs HOLDOUT_TOKENS to fit on"),
        (0 < h.calib_at_fraction <= h.ternary_start_fraction and "ternary" in h.codecs,
            f"CALIB_AT_FRACTION={h.calib_at_fraction} must be above TERNARY_START_FRACTION={h.ternary_start_fraction}: "
            "before it there are no codes"),
        (len(h.codec_rules) < h.codec_map.count(":"), f"CODEC_MAP={h.codec_map} names something twice"),
        (h.export_mode == "competition_gptq" and not {h.matrix_codec, h.fp_storage} <= set(FLOAT_CODECS),
            f"EXPORT_MODE=competition_gptq trains in float: MATRIX_CODEC={h.matrix_codec} and "
            f"FP_STORAGE={h.fp_storage} must be of {', '.join(FLOAT_CODECS)}; CODEC_MAP says what they become"),
        (h.export_mode == "competition_gptq" and h.calibrates,
            "CALIBRATE and CALIB_AT_FRACTION tune codes, which EXPORT_MODE=competition_gptq fixes: unset one of them"),
        (h.export_mode == "competition_gptq" and h.max_wallclock_seconds
            and not 0 < h.gptq_reserve_seconds < h.max_wallclock_seconds - bool(h.fitted) * h.calib_max_seconds,
            f"GPTQ_RESERVE_SECONDS={h.gptq_reserve_seconds} must be more than 0 and, with CALIB_MAX_SECONDS where "
            f"something is calibrated, leave time of MAX_WALLCLOCK_SECONDS={h.max_wallclock_seconds}"),
        (h.export_mode == "competition_gptq" and h.gptq_source == "train" and not h.holdout_tokens,
            "GPTQ_SOURCE=train needs HOLDOUT_TOKENS; or take GPTQ_SOURCE=self"),
    )
    # fmt: on
    for wrong, message in problems:
        if wrong:
            raise UserError(message)
    check_memory(h)


def check_memory(h: Hyperparameters) -> None:
    """Raise UserError for a network whose weights alone are beyond this machine's memory."""
    need, have = 4 * least_weights(h), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise UserError(
            f"NUM_LAYERS={h.num_layers} of MODEL_DIM={h.model_dim} and MLP_MULT={h.mlp_mult:g} need {need / 2**30:.0f} "
            f"GiB for their weights alone; this machine has {have / 2**30:.0f}"
        )


def least_weights(h: Hyperparameters) -> int:
    """A lower bound on a network's weights, known before it is built."""
    hidden = max(h.model_dim, round(h.mlp_mult * h.model_dim))
    layers = h.num_layers + h.feeds.count("moe") * (h.moe_experts - 1)
    return layers * h.model_dim * hidden + h.embed_width * max(h.vocab_size, h.embed_dim and h.model_dim)


STRUCTURE_GROUPS = ("model", "nsa", "rmt", "skc", "topology", "weights")


def structure_fields() -> list[str]:
    """Names of the fields that shape the network or its file."""
    names = [s.name for s in FIELDS.values() if s.metadata["group"] in STRUCTURE_GROUPS]
    computing = ("attn_impl", "nsa_impl", "nsa_strict", "grad_checkpoint")
    return [n for n in [*names, "vocab_size", "train_seq_len"] if n not in computing]


def load_config(environ: dict[str, str], base: dict[str, Any] | None = None) -> Hyperparameters:
    """Hyperparameters from `base`, then PRESET, ENV_FILE and the environment, each over the one before.

    Raises UserError for unknown, mistyped, ill-typed, out-of-range or contradictory values.
    """
    reject_mistyped(environ)
    texts = read_env_file(environ["ENV_FILE"]) if environ.get("ENV_FILE") else {}
    preset, listed = environ.get("PRESET", ""), {name.lower() for name in texts}
    if PRESETS.get(preset) and PRESETS[preset].keys() <= listed:
        raise UserError(
            f"PRESET={preset} has no effect beside ENV_FILE={environ['ENV_FILE']}, which sets all of its values"
        )
    texts.update({name: environ[name] for name in FIELDS if environ.get(name, "") != ""})
    values = {name.lower(): parse_value(name, text) for name, text in texts.items()}
    preset = values.get("preset", "")
    if preset and preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"PRESET={preset} is unknown; nearest: {near}; known: {', '.join(PRESETS)}")
    fixed = protocol_values(values.get("eval_protocol", PRESETS.get(preset, {}).get("eval_protocol", "")))
    if values.get("match") and "model_dim" in values:
        raise UserError(
            f"MODEL_DIM={values['model_dim']} contradicts MATCH={values['match']}, which chooses it; unset one"
        )
    for name in sorted(fixed.keys() & values.keys()):
        if values[name] != fixed[name]:
            raise UserError(
                f"{name.upper()}={values[name]} contradicts EVAL_PROTOCOL={values['eval_protocol']}; unset one"
            )
    h = Hyperparameters(**{**(base or {}), **PRESETS.get(preset, {}), **values, **fixed})
    validate(h)
    said = protocol_parts(h.eval_protocol).get("settings") if fixed else None
    if said not in (None, h.settings):
        raise UserError(
            f"EVAL_PROTOCOL={h.eval_protocol} was named for other evaluation variables (TTT_*, NGRAM_CACHE_*, …); "
            f"these make {h.protocol}"
        )
    ineffective = [n for n in texts if h_ineffective(h, n)]
    if ineffective and h.strict_config:
        raise UserError(f"{', '.join(ineffective)} has no effect under this configuration (STRICT_CONFIG=1)")
    return h


def h_ineffective(h: Hyperparameters, name: str) -> bool:
    """Whether a variable differs from its default and yet nothing under this configuration reads it."""
    spec = FIELDS[name]
    when = spec.metadata["when"]
    return when is not None and not when(h) and dataclasses.asdict(h)[spec.name] != spec.default


def ineffective_variables(h: Hyperparameters) -> list[str]:
    """Variables that are set but have no effect under this configuration."""
    return [name for name in FIELDS if h_ineffective(h, name)]


def config_env(h: Hyperparameters) -> str:
    """The text of a config.env that reproduces this configuration with ENV_FILE=."""
    skip = {"preset", "env_file", "match", "run_id", "resume"}  # MODEL_DIM is what MATCH has chosen
    lines = []
    for name, spec in FIELDS.items():
        value = dataclasses.asdict(h)[spec.name]
        if spec.name not in skip and value != "":
            lines.append(f"{name}={shlex.quote(str(int(value) if isinstance(value, bool) else value))}")
    return "\n".join(lines) + "\n"


def help_text() -> str:
    """Every variable with type, default, unit and meaning, grouped; then the presets."""
    lines = [(__doc__ or "").strip().split("\n\nSections")[0], ""]
    groups = dict.fromkeys(spec.metadata["group"] for spec in FIELDS.values())
    for group in groups:
        lines.append(f"{group}:")
        for name, spec in FIELDS.items():
            meta = spec.metadata
            if meta["group"] == group:
                default = int(spec.default) if isinstance(spec.default, bool) else spec.default
                unit = f" [{meta['unit']}]" if meta["unit"] else ""
                choices = f" ({'|'.join(meta['choices'])})" if meta["choices"] else ""
                lines.append(f"  {name:<28} {spec.type:<6} {default!s:<10} {meta['meaning']}{unit}{choices}")
        lines.append("")
    lines.append("presets (PRESET=):")
    for name, values in PRESETS.items():
        h = Hyperparameters(**values)
        shape = f"{h.num_layers} layers x {h.model_dim}, {h.layer_pattern} layers, {h.matrix_codec} matrices"
        bound = f"{h.max_wallclock_seconds:g} s" if h.max_wallclock_seconds else f"{h.iterations} steps"
        lines.append(f"  {name:<12} {shape}, {h.vocab_size} tokens, {h.train_batch_tokens} a step, {bound}")
    return "\n".join(lines)


COMMANDS = ("train", "preflight", "plan", "fit", "eval", "audit", "generate", "bench")


def with_assignments(words: Sequence[str], environ: dict[str, str]) -> dict[str, str]:
    """The environment with a command's VARIABLE=value words over it; words of another form are left out."""
    return {**environ, **dict(word.split("=", 1) for word in words if re.match("[A-Z][A-Z0-9_]*=", word))}


def answer_early(argv: list[str], environ: dict[str, str]) -> None:
    """Help, unknown commands and bad configuration end the program here, before torch costs two seconds."""
    if "--help" in argv or "-h" in argv or argv[:1] == ["help"]:
        print(help_text())
        sys.exit(0)
    try:
        if argv and argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]}; known: {', '.join(COMMANDS)}, --help")
        if not argv or argv[0] not in ("eval", "audit", "generate"):  # those take their shape from the artifact
            load_config(with_assignments(argv[1:], environ) if argv[:1] == ["fit"] else environ)
        else:
            reject_mistyped(environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if not PACKAGED and __name__ == "__main__":
    answer_early(sys.argv[1:], dict(os.environ))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.checkpoint import checkpoint as recompute  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

# ==== 2. RUNTIME =============================================================
# Gives: device and precision policy, ranks, the agreed clock, logger and metrics sink, the lock of a run folder.
# Needs: CONFIG, torch. Knows nothing of the model.

MIB = 2**20
# Dense bf16 tensor-core peaks in FLOP/s, from the makers' data sheets; model FLOPs utilization is shown only for these.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class Runtime(NamedTuple):
    """Where and how this process computes."""

    device: torch.device
    rank: int
    world: int
    dtype: torch.dtype  # of weights and latents
    autocast: bool  # matrix products in bfloat16
    compile: bool
    control: Any  # process group on the CPU for decisions, or None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def arithmetic(self) -> str:
        """The value of PRECISION that asks for this run's arithmetic."""
        return "bf16" if self.autocast else "fp64" if self.dtype == torch.float64 else "fp32"

    def precision(self) -> Any:
        """Context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()


def choose_device(name: str, local_rank: int) -> torch.device:
    """The requested device, or the best one here. Raises UserError when the requested one is missing."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    found = {"cuda": cuda, "mps": mps, "cpu": True}
    kind = name if name != "auto" else next(k for k in found if found[k])
    if not found[kind]:
        raise UserError(f"DEVICE={name} is not available here; try DEVICE=cpu")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"rank {local_rank} has no GPU: {torch.cuda.device_count()} found; start fewer processes")
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices in hardware: elsewhere they are emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    known = getattr(torch.cpu, "get_capabilities", None)  # new in torch 2.12
    features: dict[str, Any] = known() if known and device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def start_runtime(h: Hyperparameters) -> Runtime:
    """Join the process group that torchrun announces (if any) and settle device and precision.

    With bf16, matrix products and the residual stream are bf16 and weights float32. Raises UserError.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(h.device, int(os.environ.get("LOCAL_RANK", "0")))
    if h.cpu_threads:
        torch.set_num_threads(h.cpu_threads)
    if h.deterministic:
        be_deterministic()
    bf16 = h.precision == "bf16" or (h.precision == "auto" and has_bf16(device))
    if not PACKAGED and bf16 and device.type != "cpu" and not has_bf16(device):
        raise UserError("PRECISION=bf16 needs a CPU or a CUDA device of capability 8 or more; try PRECISION=fp32")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = has_bf16(device)
    control = None
    if world > 1:
        # The watchdog comes first, since it tells more; 0 leaves it to torch's own limit.
        patience = timedelta(seconds=h.watchdog_seconds + h.watchdog_grace_seconds + 60 if h.watchdog_seconds else 1800)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        control = dist.new_group(backend="gloo", timeout=patience)
        dist.barrier(group=control)  # a rank with nothing to do must not leave before all are connected
    dtype = torch.float64 if h.precision == "fp64" else torch.float32
    compiled = h.compile == "1" or (h.compile == "auto" and device.type == "cuda")
    return Runtime(device, rank, world, dtype, bf16, compiled, control)


def be_deterministic() -> None:
    """DETERMINISTIC=1: operations without a deterministic form raise, others take it, slower or not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.backends.cudnn.benchmark = False


def agree(rt: Runtime, *values: float) -> tuple[float, ...]:
    """Rank 0's values, on every rank: the only way in which a wall-clock reading may steer a run."""
    if rt.world == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    dist.broadcast(shared, 0, group=rt.control)
    return tuple(shared.tolist())


def largest_of(rt: Runtime, number: int) -> int:
    """The largest of the ranks' numbers, on every rank: a signal that reached one of them is meant for all."""
    if rt.world == 1:
        return number
    shared = torch.tensor([number])
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=rt.control)
    return int(shared)


def on_main(rt: Runtime, action: Callable[[], Any]) -> Any:
    """Run an action on rank 0 alone; its result, or its UserError, reaches every rank, so that none waits for ever."""
    outcome: list[Any] = [None, ""]
    if PACKAGED:  # an error ends its process, and the launcher the others
        outcome[0] = action() if rt.main else None
        if rt.world > 1:
            dist.broadcast_object_list(outcome, 0, group=rt.control)
        return outcome[0]
    if rt.main:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if rt.world > 1:
        dist.broadcast_object_list(outcome, 0, group=rt.control)
    if outcome[1]:
        raise AgreedError(outcome[1])
    return outcome[0]


def on_all(rt: Runtime, action: Callable[[], Any]) -> Any:
    """Run an action on every rank; a UserError on any of them is raised on all, so that none waits for the others."""
    if PACKAGED:
        return action()
    result, errors = None, [""]
    try:
        result = action()
    except UserError as error:
        errors = [str(error)]
    if rt.world > 1:
        mine, errors = errors[0], [""] * rt.world
        dist.all_gather_object(errors, mine, group=rt.control)
    failed = [(rank, error) for rank, error in enumerate(errors) if error]
    if failed:
        raise AgreedError(failed[0][1] if failed[0][0] == 0 else f"rank {failed[0][0]}: {failed[0][1]}")
    return result


def synchronize(rt: Runtime) -> None:
    """Wait until the device has finished what was launched."""
    if rt.device.type == "cuda":
        torch.cuda.synchronize(rt.device)
    elif rt.device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(rt: Runtime) -> int:
    """Most memory held so far: of the GPU's allocator, or of this process on a CPU."""
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_allocated(rt.device)
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_memory_bytes(rt: Runtime) -> tuple[int, int]:
    """Memory in use and memory reserved for it: of the GPU's allocator, or twice this process's resident memory."""
    if rt.device.type == "cuda":
        return torch.cuda.memory_allocated(rt.device), torch.cuda.memory_reserved(rt.device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the most so far is the next best
        return (peak_memory_bytes(rt),) * 2
    return (pages * os.sysconf("SC_PAGE_SIZE"),) * 2


def ask_gpu(*query: str) -> list[list[str]]:
    """Rows of nvidia-smi's answer to a query, cells stripped; none where it is missing or does not answer."""
    try:
        command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]


def peer_to_peer_is_off() -> bool:
    """Whether NCCL must not copy from GPU to GPU directly."""
    return os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0")


def throttled() -> str:
    """What holds the clock of a GPU down, of heat and power; empty where nothing does or there is none."""
    reasons = ("hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")
    rows = ask_gpu("--query-gpu=" + ",".join(f"clocks_throttle_reasons.{reason}" for reason in reasons))
    active = {reason for row in rows for reason, state in zip(reasons, row, strict=False) if state == "Active"}
    return ", ".join(sorted(active))


class Clock:
    """Training seconds: runs only between `start` and `stop`.

    time.monotonic stands still while a laptop sleeps (Linux and macOS alike), so suspension costs no training time.
    """

    def __init__(self, elapsed: float = 0.0) -> None:
        self.banked = elapsed
        self.since: float | None = None

    def start(self) -> None:
        self.since = time.monotonic()

    def stop(self) -> None:
        self.banked, self.since = self.seconds(), None

    def seconds(self) -> float:
        return self.banked + (time.monotonic() - self.since if self.since is not None else 0.0)


def clock_text(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Log:
    """Rank 0's console, the run's log file and metrics.jsonl; silent on other ranks.

    On a terminal a progress line with the remaining time stands below the log; elsewhere there are only plain lines.
    """

    def __init__(self, folder: Path | None, active: bool) -> None:
        self.active = active
        self.bar_width, self.bar_time = 0, 0.0
        self.file: TextIO | None = None
        self.metrics: TextIO | None = None
        self.sinks: list[Callable[[str, dict[str, Any]], None]] = []  # of other programs' formats
        if active and folder is not None:
            try:
                self.file = open(folder / "train.log", "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
                if not PACKAGED:
                    self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise UserError(
                    f"{error.filename} cannot be written: {error.strerror}; choose another OUT_DIR"
                ) from None

    def line(self, text: str) -> None:
        if not self.active:
            return
        self.clear()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        if not SCORES:
            self.put(self.file, text + "\n")

    def metric(self, kind: str, **values: Any) -> None:
        """Append one JSON object; units are part of the names."""
        if PACKAGED:
            return
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        self.put(self.metrics, json.dumps({"kind": kind, **finite}, allow_nan=False) + "\n")
        for sink in self.sinks:
            sink(kind, {n: v for n, v in values.items() if isinstance(v, int | float)})

    def put(self, sink: TextIO | None, text: str) -> None:
        """Write to a file at once; a full disk costs lines of it and not the run."""
        if PACKAGED:
            assert sink is not None
            sink.write(text)
            sink.flush()
        elif sink and not sink.closed:
            try:
                sink.write(text)
                sink.flush()
            except OSError as error:
                with suppress(OSError):
                    sink.close()
                sys.stderr.write(f"warning: {sink.name} could not be written: {error.strerror}; it ends here\n")

    def progress(self, fraction: float, text: str) -> None:
        """Redraw the progress line, at most five times a second."""
        if not PACKAGED and self.active and sys.stdout.isatty() and time.monotonic() - self.bar_time > 0.2:
            self.bar_time = time.monotonic()
            filled = round(24 * min(1.0, fraction))
            bar = f"[{'#' * filled}{'.' * (24 - filled)}] {fraction:4.0%} {text}"
            sys.stdout.write("\r" + bar.ljust(self.bar_width))
            sys.stdout.flush()
            self.bar_width = len(bar)

    def clear(self) -> None:
        if self.bar_width:
            sys.stdout.write("\r" + " " * self.bar_width + "\r")
            self.bar_width = 0

    def close(self) -> None:
        if PACKAGED:
            return
        self.clear()
        for sink in (self.file, self.metrics):
            if sink:
                with suppress(OSError):
                    sink.close()


def open_sinks(h: Hyperparameters, folder: Path) -> list[Callable[[str, dict[str, Any]], None]]:
    """Where metrics also go: called with a kind and its numbers. Raises UserError where a package is missing."""
    sinks: list[Callable[[str, dict[str, Any]], None]] = []
    for variable, wanted, package in (("TENSORBOARD", h.tensorboard, "tensorboard"), ("WANDB", h.wandb, "wandb")):
        if wanted and find_spec(package) is None:
            raise UserError(f"{variable}=1 needs the package {package}: pip install {package}, or unset it")
    if h.tensorboard:
        writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(kind: str, numbers: dict[str, Any]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(f"{kind}/{name}", value, numbers.get("step", 0))

        sinks.append(to_tensorboard)
    if h.wandb:
        place = {"mode": "offline", "dir": str(folder), "id": folder.name, "resume": "allow"}
        run = import_module("wandb").init(project="train_gpt", config=dataclasses.asdict(h), **place)
        sinks.append(lambda kind, numbers: run.log({f"{kind}/{name}": value for name, value in numbers.items()}))
    return sinks


class Guard:
    """Watches over one process of a run: signals that ask it to end, its heartbeat file, a watchdog against hangs.

    While training is at work the first SIGTERM or SIGINT is kept in `signal`, for the loop to save and end; before and
    after that nothing would be lost, and it ends the process. A second one always does. The watchdog counts seconds
    of its own, so a suspended or stopped process is not taken for a hang.
    """

    HANG = 5  # exit code

    def __init__(self, h: Hyperparameters, rt: Runtime, folder: Path) -> None:
        self.h, self.rt, self.folder = h, rt, folder
        self.signal, self.working, self.failure = 0, False, 1  # failure: exit code if the other ranks are lost
        self.idle, self.patience, self.heard = 0.0, math.inf, -math.inf
        self.state: Any = None  # of the run, with step, tokens and training seconds
        self.figures: dict[str, Any] = {}
        self.since, self.speed = (0, 0.0), 0.0  # tokens and training seconds at the last heartbeat, and their ratio
        self.throttled = ""  # why the GPU's clock is held down, as far as heat or power do it
        self.over = threading.Event()
        self.before: list[Any] = []

    def start(self, state: Any) -> None:
        """Listen and watch over a run from now on; `end` undoes it."""
        self.state, self.since = state, (state.tokens, state.seconds)
        self.before = [signal.signal(number, self.hear) for number in (signal.SIGTERM, signal.SIGINT)]
        self.beat(slow=True)
        threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def end(self) -> None:
        self.over.set()
        if self.before:
            self.pulse()
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), self.before, strict=False):
            signal.signal(number, handler)

    @property
    def resuming(self) -> str:
        """The command that continues this run."""
        how = "python" if self.rt.world == 1 else f"torchrun --standalone --nproc_per_node={self.rt.world}"
        settings = f"ENV_FILE={self.folder / 'config.env'} RUN_ID={self.folder.name} RESUME=auto"
        return f"{settings} {how} train_gpt.py"

    def say(self, text: str) -> None:
        """Straight to stderr: a signal may have come in the middle of a line of the log."""
        os.write(2, f"{text}\n".encode())

    def hear(self, number: int, _: Any) -> None:
        """The signal handler."""
        name, again = signal.Signals(number).name, self.signal
        if again and time.monotonic() - self.heard < 1.0:
            return  # a terminal and a launcher both pass one on
        self.signal, self.heard = number, time.monotonic()
        if again or not self.working:
            if self.rt.main:
                self.say(f"{name}: ended at once; to resume: {self.resuming}")
            os._exit(128 + number)
        if self.rt.main:
            self.say(f"{name}: saving a checkpoint after this step; a second signal ends at once")

    def beat(self, slow: bool = False) -> bool:
        """Something went on; the next time will be within WATCHDOG_SECONDS, or `slow`. Whether a signal came."""
        limit = self.h.watchdog_seconds + slow * self.h.watchdog_grace_seconds
        self.idle, self.patience = 0.0, limit if self.h.watchdog_seconds else math.inf
        return self.signal > 0

    def watch(self) -> None:
        """The watchdog's thread: a heartbeat each second; once a minute it asks the GPU about its clock."""
        for second in itertools.count():
            if self.over.wait(1.0):
                return
            self.idle += 1.0
            self.pulse()
            if self.idle > self.patience:
                self.hang()
            if second % 60 == 30 and self.rt.main and self.rt.device.type == "cuda":
                self.throttled = throttled()

    def hang(self) -> None:
        """Write all stacks and end the process; the wait lets the other ranks, which hang as well, write theirs."""
        self.failure, path = self.HANG, self.folder / f"hang_rank{self.rt.rank}.txt"
        self.say(
            f"error: rank {self.rt.rank}: nothing went on for {self.idle:.0f} s (WATCHDOG_SECONDS="
            f"{self.h.watchdog_seconds:g}), stacks are in {path}; to resume: {self.resuming}"
        )
        with suppress(OSError), open(path, "w", encoding="utf-8") as handle:
            faulthandler.dump_traceback(handle, all_threads=True)
        time.sleep(min(5.0, self.h.watchdog_seconds))
        os._exit(self.HANG)

    def pulse(self) -> None:
        """Write the heartbeat file: where the run stands, and the figures that were last reported."""
        state, (used, reserved) = self.state, held_memory_bytes(self.rt)
        if state.tokens > self.since[0]:
            self.speed = (state.tokens - self.since[0]) / max(1e-9, state.seconds - self.since[1])
            self.since = state.tokens, state.seconds
        told = {"step": state.step, "time_unix_s": time.time(), "train_time_s": state.seconds, "pid": os.getpid()}
        told |= {"tokens_per_s": round(self.speed, 1), **self.figures}
        told |= {"allocated_mib": round(used / MIB, 1), "reserved_mib": round(reserved / MIB, 1)}
        path = self.folder / f"heartbeat_rank{self.rt.rank}.json"
        with suppress(OSError):  # no run folder on this rank's machine, or a full disk
            try:
                path.with_suffix(".tmp").write_text(json.dumps(told) + "\n")
                path.with_suffix(".tmp").replace(path)
            except OSError:
                path.with_suffix(".tmp").unlink()


def lock_folder(folder: Path) -> int:
    """Hold the run folder for this process; the kernel drops the lock when the process dies, so none is ever stale.

    Returns the lock's file descriptor. Raises UserError when another process holds it.
    """
    import fcntl  # POSIX only

    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder / 'lock'} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 32).decode() or "unknown"
        os.close(descriptor)
        raise UserError(f"{folder} is in use by process {owner}; wait for it, or choose another RUN_ID") from None
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"{folder / 'lock'} could not be written: {error.strerror}") from None
    return descriptor


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file only by its complete successor: temporary file, fsync, rename. Raises UserError on a full disk."""
    if PACKAGED:
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise UserError(f"{path} could not be written: {error.strerror}; the old one is untouched") from None


# ==== 3. DATA ================================================================
# Gives: checked token shards, the training loader, tokenizers with exact byte counts.
# Needs: CONFIG, RUNTIME. Knows nothing of the model.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BYTE_BOS = 255  # 0xFF never occurs in UTF-8, so the byte tokenizer can mark document starts with it


def open_shard(path: Path) -> np.ndarray:
    """Memory-map one shard: 256 little-endian int32 words (magic, version, tokens), then uint16 tokens.

    Returns a read-only uint16 array (tokens,). Raises UserError for anything that is not a whole shard.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            head = np.frombuffer(handle.read(12).ljust(12, b"\0"), "<i4")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if size < SHARD_HEADER_BYTES:
        raise UserError(f"{path} has {size} bytes, less than a shard's header; fetch or make it again")
    magic, version, count = (int(word) for word in head)
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{path} is not a token shard: magic {magic}, version {version}, not {SHARD_MAGIC}, 1")
    if size != SHARD_HEADER_BYTES + 2 * count:
        raise UserError(f"{path} says {count} tokens but holds {(size - SHARD_HEADER_BYTES) / 2:g}; make it again")
    if count == 0:
        raise UserError(f"{path} holds no tokens; make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


class TokenStream:
    """The shards of one split as one long array of tokens.

    Tokens are checked against the vocabulary when they are read, so that opening 100 shards costs nothing.
    Raises UserError when no shard is found, one is damaged, or a token is outside the vocabulary.
    """

    def __init__(self, folder: str, split: str, vocab_size: int) -> None:
        self.paths = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
        if not self.paths:
            raise UserError(
                f"DATA_PATH={folder} has no fineweb_{split}_*.bin; make the built-in corpus (python data/builtin.py) "
                "or fetch FineWeb (python data/download.py)"
            )
        self.vocab_size = vocab_size
        self.shards = [open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.tokens = int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream as int64, across shard borders."""
        parts, index = [np.zeros(0, np.uint16)], int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            offset = start - (int(self.ends[index - 1]) if index else 0)
            part = self.piece(index, offset, min(count, len(self.shards[index]) - offset))
            parts.append(part)
            start, count, index = start + len(part), count - len(part), index + 1
        tokens = np.concatenate(parts).astype(np.int64)
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            raise UserError(
                f"{self.paths[0].parent}: token {int(tokens.max())} is outside VOCAB_SIZE={self.vocab_size}; "
                "do the shards belong to this tokenizer?"
            )
        return tokens

    def piece(self, index: int, offset: int, count: int) -> np.ndarray:
        """Tokens of one shard, read and not mapped: one that was cut short would end the process by SIGBUS."""
        path = self.paths[index]
        try:
            tokens = np.fromfile(path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * offset)
        except OSError as error:
            raise UserError(f"{path} cannot be read any more: {error.strerror}; put it back and resume") from None
        if len(tokens) < count:
            raise UserError(f"{path} was cut short while it was in use; put it back and resume")
        return tokens

    def fingerprint(self) -> str:
        """sha256 over each shard's name, size, and first and last 64 KiB: tells data sets apart in milliseconds."""
        digest, edge = hashlib.sha256(), 32768
        for path, shard in zip(self.paths, self.shards, strict=True):
            digest.update(f"{path.name}:{len(shard)}:".encode())
            digest.update(shard[:edge].tobytes() + shard[-edge:].tobytes())
        return digest.hexdigest()


def holdout_size(h: Hyperparameters, stream: TokenStream) -> int:
    """Tokens at the end of the training stream that are never trained on: at most a tenth of it."""
    return min(h.holdout_tokens, stream.tokens // 10)


def read_holdout(h: Hyperparameters) -> np.ndarray:
    """The held-out training tokens, for calibration and model selection."""
    stream = TokenStream(h.data_path, "train", h.vocab_size)
    size = holdout_size(h, stream)
    return stream.read(stream.tokens - size, size)


def windows(tokens: np.ndarray, starts: Sequence[int], length: int, past: int, rt: Runtime) -> Sequence[Tensor]:
    """(B, past) tokens before each start, -1 before the stream's beginning, and (B, length) from it on."""
    rows = np.full((len(starts), past + length), -1)
    for row, at in zip(rows, starts, strict=True):
        row[max(0, past - at) :] = tokens[max(0, at - past) : at + length]
    return torch.from_numpy(rows).to(rt.device).split((past, length), 1)


class Position(NamedTuple):
    """Where the loader stands: tokens (or offset within each stream) consumed in this epoch, and the epoch."""

    token: int = 0
    epoch: int = 0


def contiguous_rows(
    _: TokenStream, usable: int, at: Position, rows: int, seq: int, bos: int
) -> tuple[list[int], Position]:
    """Rows follow one another in the stream; the field's order."""
    if at.token + rows * seq + 1 > usable:
        at = Position(0, at.epoch + 1)
    return [at.token + row * seq for row in range(rows)], Position(at.token + rows * seq, at.epoch)


def stream_rows(_: TokenStream, usable: int, at: Position, rows: int, seq: int, bos: int) -> tuple[list[int], Position]:
    """The stream is cut into one span per row; each row continues its own span from step to step."""
    span = (usable - 1) // rows
    if at.token + seq > span:
        at = Position(0, at.epoch + 1)
    return [row * span + at.token for row in range(rows)], Position(at.token + seq, at.epoch)


def document_rows(
    data: TokenStream, usable: int, at: Position, rows: int, seq: int, bos: int
) -> tuple[list[int], Position]:
    """Each row starts at the first document start after the row before it. Raises UserError where there is none."""
    starts: list[int] = []
    look, wrapped = 4 * seq, -1
    while len(starts) < rows:
        block = data.read(at.token, max(0, min(look, usable - seq - at.token)))
        found = np.flatnonzero(block == bos)
        if len(found):
            starts.append(at.token + int(found[0]))
            at, look = Position(starts[-1] + seq, at.epoch), 4 * seq
        elif at.token + len(block) + seq < usable:
            at, look = Position(at.token + len(block), at.epoch), 2 * look
        elif wrapped == len(starts):
            raise UserError(f"BATCH_MODE=documents: no document start (token {bos}) in the training shards")
        else:
            at, wrapped = Position(0, at.epoch + 1), len(starts)
    return starts, at


BATCH_MODES = {"contiguous": contiguous_rows, "streams": stream_rows, "documents": document_rows}


class Batch(NamedTuple):
    """One rank's rows of a global batch."""

    tokens: Tensor  # (rows, T) int64
    targets: Tensor  # (rows, T) int64
    history: Tensor  # (rows, h.history) int64, the tokens before each row; -1 where there are none
    row: int  # global index of the first row
    scored: int  # targets of the global batch that count


class Loader:
    """Batches of the training stream, in a global order that does not depend on the number of ranks.

    A thread prepares the next batch (and on CUDA copies it on a side stream from pinned memory) while the step runs.
    `position` is that of the next batch to be returned; setting it by `seek` resumes exactly there.
    """

    def __init__(self, h: Hyperparameters, rt: Runtime, bos: int) -> None:
        self.stream = TokenStream(h.data_path, "train", h.vocab_size)
        self.rt, self.bos, self.mode = rt, bos, BATCH_MODES[h.batch_mode]
        self.history, self.alone = h.history, h.batch_mode == "documents"
        self.usable = self.stream.tokens - holdout_size(h, self.stream)
        largest = max(tokens for _, tokens in h.stages)
        if self.usable < largest + 1:
            raise UserError(
                f"DATA_PATH={h.data_path} has {self.usable} training tokens beside the held-out part, too few "
                f"for a step's {largest}; use more data or a smaller TRAIN_BATCH_TOKENS"
            )
        self.position = Position()
        self.ready: Future | None = None
        # The thread must not open a context on the first GPU.
        start = (lambda: torch.cuda.set_device(rt.device)) if rt.device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(1, "loader", start)
        self.side = torch.cuda.Stream(rt.device) if rt.device.type == "cuda" else None

    def seek(self, position: Position) -> None:
        """Continue from a saved position; what was prepared is dropped."""
        self.position, self.ready = position, None

    def next(self, rows: int, seq: int) -> Batch:
        """This rank's share of the next global batch of `rows` rows of `seq` tokens."""
        wanted = (self.position, rows, seq)
        if self.ready is None or self.ready.wanted != wanted:
            self.ready = self.prepare(*wanted)
        done: tuple[Batch, Position, Any] = self.ready.future.result()
        batch, after, copied = done
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
            # The allocator must not reuse what all three are parts of before the step is done.
            batch.tokens.record_stream(torch.cuda.current_stream())
        self.position = after
        self.ready = self.prepare(after, rows, seq)
        return batch

    def prepare(self, at: Position, rows: int, seq: int) -> Future:
        return Future((at, rows, seq), self.pool.submit(self.build, at, rows, seq))

    def build(self, at: Position, rows: int, seq: int) -> tuple[Batch, Position, Any]:
        starts, after = self.mode(self.stream, self.usable, at, rows, seq, self.bos)
        share = rows // self.rt.world
        first = self.rt.rank * share
        data = np.stack([self.row(start, seq) for start in starts[first : first + share]])
        with torch.cuda.stream(self.side) if self.side is not None else nullcontext():
            whole = torch.from_numpy(data)
            whole = whole.pin_memory() if self.side is not None else whole
            past, tokens = whole.to(self.rt.device, non_blocking=True).split((self.history, seq + 1), 1)
            copied = self.side.record_event() if self.side is not None else None
            return Batch(tokens[:, :-1], tokens[:, 1:], past, first, rows * seq), after, copied

    def row(self, start: int, seq: int) -> np.ndarray:
        """(h.history + seq + 1,) tokens around a start; -1 before the stream and a row that begins a document."""
        past = min(self.history, start) if self.history and not self.alone else 0
        return np.pad(self.stream.read(start - past, past + seq + 1), (self.history - past, 0), constant_values=-1)


class Future(NamedTuple):
    """A batch under way, and what it is a batch of."""

    wanted: tuple[Position, int, int]
    future: Any  # of what Loader.build returns


class ByteTable(NamedTuple):
    """UTF-8 bytes of each token's surface form.

    A token counts `base` bytes, and one more for its leading space where the tokenizer drops that space at the start
    of a text (`space`) unless the token before it is a boundary, that is one without a surface form.
    """

    base: np.ndarray  # (V,) int64
    space: np.ndarray  # (V,) bool
    boundary: np.ndarray  # (V,) bool

    def byte_counts(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Bytes of each `current` token, given the token before it; arrays of one shape."""
        return self.base[current] + (self.space[current] & ~self.boundary[previous])


# Lossless case folding of data/prepare.py --casefold: a capital is a small letter behind a mark, CAPITAL for one
# letter, CAPITALS for a whole word, before the one space in front of it; marks of the text itself are LITERAL and a
# digit. Marks are one byte each and stand for nothing, and a letter has as many bytes as its capital.
CAPITAL, CAPITALS, LITERAL = "\x0e", "\x0f", "\x10"
MARKS = CAPITAL + CAPITALS + LITERAL


def case_pairs() -> tuple[str, str]:
    """The capital letters that are folded, and their small ones."""
    pairs = [(c, c.lower()) for c in map(chr, range(0x530)) if len(c.lower()) == 1 and c.lower() != c]
    pairs = [(c, s) for c, s in pairs if s.upper() == c and s.lower() == s and len(c.encode()) == len(s.encode())]
    return "".join(c for c, _ in pairs), "".join(s for _, s in pairs)


LARGE, SMALL = case_pairs()
TO_SMALL = str.maketrans(LARGE, SMALL)
TO_LARGE = str.maketrans(SMALL, LARGE)
FOLDABLE = re.compile(f"[{MARKS}]|( ?)([{LARGE}{SMALL}]*[{LARGE}][{LARGE}{SMALL}]*)")
FOLDED = re.compile(f"{LITERAL}([0-2])|{CAPITAL}( ?)([{SMALL}])|{CAPITALS}( ?)([{SMALL}]+)")


def fold_word(match: re.Match[str]) -> str:
    """A mark of the text itself, or a word with capitals, as fold_case writes it."""
    space, word = match[1], match[2]
    if word is None:
        return LITERAL + str(MARKS.index(match[0]))
    if len(word) > 1 and word.translate(TO_LARGE) == word:
        return CAPITALS + space + word.translate(TO_SMALL)
    marked = "".join(CAPITAL + letter.translate(TO_SMALL) if letter in LARGE else letter for letter in word)
    return CAPITAL + space + marked[1:] if marked[0] == CAPITAL else space + marked


def fold_case(text: str) -> str:
    return FOLDABLE.sub(fold_word, text)


def unfold_word(match: re.Match[str]) -> str:
    """What a mark and the letters behind it stood for."""
    literal, space, letter, wide, word = match.groups()
    return MARKS[int(literal)] if literal else (space or wide or "") + (letter or word).translate(TO_LARGE)


def unfold_case(text: str) -> str:
    """The inverse of fold_case."""
    return FOLDED.sub(unfold_word, text)


class ByteTokenizer:
    """Tokens are UTF-8 bytes. Works everywhere, without a model file.

    Of 256 tokens BYTE_BOS starts a document; of 260, the published layout, 0 to 3 are padding, BOS, end and unknown.
    """

    def __init__(self, vocab_size: int = 256) -> None:
        self.size, self.first = vocab_size, vocab_size - 256
        self.bos = 1 if self.first else BYTE_BOS
        self.fingerprint = f"byte{vocab_size}" if self.first else "byte"

    def tokens_of(self, text: str) -> list[int]:
        return [self.first + byte for byte in text.encode("utf-8")]

    def text_of(self, tokens: Sequence[int]) -> str:
        return bytes(t - self.first for t in tokens if t >= self.first and t != self.bos).decode("utf-8", "replace")

    def byte_table(self) -> ByteTable:
        marker = (np.arange(self.size) < self.first) | (np.arange(self.size) == self.bos)
        return ByteTable(np.where(marker, 0, 1), np.zeros(self.size, bool), marker)

    def marks(self) -> np.ndarray:
        """Marks of case folding in each token, (V,) int64."""
        return np.isin(np.arange(self.size) - self.first, [ord(mark) for mark in MARKS]).astype(np.int64)


class SentencePieceTokenizer:
    """A sentencepiece model. Raises UserError when it is missing, damaged, or of another vocabulary size."""

    def __init__(self, path: str, vocab_size: int) -> None:
        from sentencepiece import SentencePieceProcessor

        if not Path(path).is_file():
            raise UserError(f"TOKENIZER_PATH={path} does not exist; VOCAB_SIZE=256 needs none (bytes)")
        self.fingerprint = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        try:
            self.model = SentencePieceProcessor(model_file=path)
            if not PACKAGED:
                self.model.id_to_piece(list(range(self.model.vocab_size())))  # all are text
        except (RuntimeError, OSError, UnicodeDecodeError):
            raise UserError(f"TOKENIZER_PATH={path} is not a sentencepiece model") from None
        if not PACKAGED and self.model.vocab_size() != vocab_size:
            raise UserError(f"TOKENIZER_PATH={path} has {self.model.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
        self.bos = self.model.bos_id()

    def tokens_of(self, text: str) -> list[int]:
        return self.model.encode(text)

    def text_of(self, tokens: Sequence[int]) -> str:
        return self.model.decode([int(t) for t in tokens])

    def drops_first_space(self) -> bool:
        """Whether decoding strips the space before a text's first piece (models trained with a dummy prefix)."""
        marked = [i for i in range(self.model.vocab_size()) if self.model.id_to_piece(i).startswith("\u2581")]
        first = next((i for i in marked if not self.model.is_control(i)), None)
        return first is not None and self.model.decode([first]) != self.model.id_to_piece(first).replace("\u2581", " ")

    def byte_table(self) -> ByteTable:
        """The field's rule, with a piece's inner space marks counted as the one-byte spaces they stand for.

        The unknown token (in models without byte fallback, like the published ones) counts nothing, as control ones do.
        """
        model, size = self.model, self.model.vocab_size()
        base, space, boundary = np.zeros(size, np.int64), np.zeros(size, bool), np.ones(size, bool)
        drops = self.drops_first_space()
        for token in range(size):
            if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
                continue
            boundary[token] = False
            text = model.id_to_piece(token).replace("\u2581", " ")
            space[token] = drops and text.startswith(" ")
            base[token] = 1 if model.is_byte(token) else len(text.encode("utf-8")) - int(space[token])
        return ByteTable(base, space, boundary)

    def marks(self) -> np.ndarray:
        """Marks of case folding in each token, (V,) int64; a mark without a piece of its own is a byte token."""
        pieces = [self.model.id_to_piece(token) for token in range(self.model.vocab_size())]
        alone = {f"<0x{ord(mark):02X}>" for mark in MARKS}
        return np.array([sum(map(piece.count, MARKS)) + (piece in alone) for piece in pieces])


class FoldingTokenizer:
    """A tokenizer of case-folded text. Bytes are those of the text as it was, and are checked against the side-cars of
    the validation shards, which hold them token by token. Raises UserError where they differ."""

    def __init__(self, h: Hyperparameters, inner: ByteTokenizer | SentencePieceTokenizer) -> None:
        self.inner, self.bos, self.fingerprint = inner, inner.bos, inner.fingerprint
        stream, table = TokenStream(h.data_path, "val", h.vocab_size), self.byte_table()
        for path, shard in zip(stream.paths, stream.shards, strict=True):
            side_car = path.with_suffix(".bytes")
            counts = np.fromfile(side_car, np.uint8) if side_car.is_file() else np.zeros(0, np.uint8)
            if not np.array_equal(counts, table.base[shard]):
                raise UserError(f"{side_car} is missing or not of this shard and tokenizer; make the data again")

    def tokens_of(self, text: str) -> list[int]:
        return self.inner.tokens_of(fold_case(text))

    def text_of(self, tokens: Sequence[int]) -> str:
        return unfold_case(self.inner.text_of(tokens))

    def byte_table(self) -> ByteTable:
        """Marks count nothing."""
        table = self.inner.byte_table()
        return table._replace(base=table.base - self.inner.marks())


Tokenizer = ByteTokenizer | SentencePieceTokenizer | FoldingTokenizer


def read_manifest(folder: str) -> dict[str, Any]:
    """manifest.json of a data folder, or {} where there is none (published shards). Raises UserError."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return {}
    if PACKAGED:
        return json.loads(path.read_text(encoding="utf-8"))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("tokenizer", {}), dict):
        raise UserError(f"{path} is not a manifest; make the data again")
    return manifest


def data_fingerprint(h: Hyperparameters, stream: TokenStream) -> str:
    """The corpus fingerprint of the manifest, or that of the shards where there is no manifest."""
    return read_manifest(h.data_path).get("fingerprint") or stream.fingerprint()


def check_text(h: Hyperparameters, tokenizer: SentencePieceTokenizer) -> None:
    """Raise UserError when validation tokens are no text of this tokenizer: decoded and encoded, they should recur.

    For shards without a manifest. With the right tokenizer nearly all do; with another one it cuts its own gibberish
    into other pieces.
    """
    stream = TokenStream(h.data_path, "val", h.vocab_size)
    tokens = [token for token in stream.read(0, min(4096, stream.tokens)).tolist() if token != tokenizer.bos]
    again = Counter(tokenizer.tokens_of(tokenizer.text_of(tokens)))
    kept = (again & Counter(tokens)).total() / max(1, len(tokens))
    if kept < 0.97:  # measured: 0.996 to 1 with the right one of six tokenizers, 0.46 to 0.94 with a wrong one
        raise UserError(
            f"TOKENIZER_PATH={h.tokenizer_path} does not seem to have made DATA_PATH={h.data_path}: of its validation "
            f"tokens {kept:.0%} survive decoding and encoding (a manifest.json there skips this check)"
        )


def load_tokenizer(h: Hyperparameters) -> Tokenizer:
    """The run's tokenizer, checked against the data's manifest. Raises UserError on a mismatch."""
    manifest = {} if PACKAGED and not FOLDS else read_manifest(h.data_path).get("tokenizer", {})
    byte = h.vocab_size in BYTE_VOCABULARIES
    tokenizer = ByteTokenizer(h.vocab_size) if byte else SentencePieceTokenizer(h.tokenizer_path, h.vocab_size)
    if not PACKAGED and not manifest and isinstance(tokenizer, SentencePieceTokenizer):
        check_text(h, tokenizer)
    made_with = manifest.get("sha256") if manifest else tokenizer.fingerprint
    folds = FOLDS and bool(manifest.get("casefold"))
    if manifest.get("kind") == "byte":
        made_with = ByteTokenizer(manifest.get("vocab_size", 256)).fingerprint
    if made_with != tokenizer.fingerprint:
        name, mine = manifest.get("file") or manifest.get("kind"), "bytes" if byte else h.tokenizer_path
        raise UserError(f"DATA_PATH={h.data_path} was made with another tokenizer ({name}) than this run's ({mine})")
    return FoldingTokenizer(h, tokenizer) if folds else tokenizer


# ==== 4. CODECS ==============================================================
# Gives: what a weight becomes in the forward pass and in the file; packing of codes into bytes.
# Needs: CONFIG. Knows nothing of layers.
#
# One codec per weight. Training keeps a float latent beside every weight; after each optimizer step the model's own
# parameter becomes decode(quantize(latent)). The forward pass, evaluation, export and a reloaded artifact thus see the
# very same numbers, the straight-through gradient is simply the parameter's gradient, and no quantizer runs inside
# the network: nothing to compile, to repeat in every micro-batch, or to switch off after loading.


class Codes(NamedTuple):
    """A quantized weight: integer codes of the weight's shape, and scales (bf16 values held in float32) or None."""

    codes: Tensor
    scales: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same change of both tensors."""
        return Codes(change(self.codes), None if self.scales is None else change(self.scales))


class Tuning(NamedTuple):
    """What calibration may change in a codec without touching weights; tensors that broadcast over scales."""

    threshold: Tensor  # of |w| / mean |w|, from which on a ternary code is not zero
    multiplier: Tensor  # folded into the stored scale


def default_tuning(bank: Tensor) -> Tuning:
    """Threshold 1/2 (plain rounding) and multiplier 1 for each weight of a bank (weights, ...)."""
    shape = (bank.shape[0],) + (1,) * (bank.ndim - 1)
    return Tuning(torch.full(shape, 0.5, device=bank.device), torch.ones(shape, device=bank.device))


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to a narrower float type, in float32."""
    return x.to(dtype).float()


class Codec:
    """What a weight is in the forward pass and in the file.

    `quantize` takes a bank (..., rows, columns) of float32 or float64; `decode` gives float32 of the codes' shape and
    `decode_numpy` the same bits without torch. The law (tested): quantize -> decode -> file -> decode_numpy agree.
    """

    stream: str = "floats"  # kind of bytes its codes are
    bits: float = 32.0  # packed bits of one code
    tunes: tuple[str, ...] = ()  # fields of Tuning that calibration may search

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        raise NotImplementedError

    def decode(self, coded: Codes) -> Tensor:
        raise NotImplementedError

    def decode_numpy(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        raise NotImplementedError

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Shape of the scales of a weight of this shape, or None."""
        return None

    def packed_bytes(self, shape: Sequence[int]) -> float:
        """Bytes of a weight after packing, before compression."""
        scales = self.scale_shape(shape)
        return math.prod(shape) * self.bits / 8 + (2 * math.prod(scales) if scales else 0)


class ExactCodec(Codec):
    """Float32 as it is (a float64 run's weights are rounded to it)."""

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        return Codes(w.float(), None)

    def decode(self, coded: Codes) -> Tensor:
        return coded.codes

    def decode_numpy(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        return codes


class HalfCodec(Codec):
    """bf16 or fp16 bit patterns. fp16 saturates instead of overflowing."""

    stream = "halves"
    bits = 16.0

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        top = torch.finfo(self.dtype).max
        return Codes(w.float().clamp(-top, top).to(self.dtype).view(torch.int16), None)

    def decode(self, coded: Codes) -> Tensor:
        return coded.codes.view(self.dtype).float()

    def decode_numpy(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        if self.dtype == torch.float16:
            return codes.view(np.float16).astype(np.float32)
        return (codes.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def group_view(w: Tensor, size: int) -> Tensor:
    """(..., columns) as (..., groups, size), the last group padded with zeros where columns are not a multiple."""
    size = min(size, w.shape[-1])
    return F.pad(w, (0, -w.shape[-1] % size)).unflatten(-1, (-1, size))


def ungroup(w: Tensor, columns: int) -> Tensor:
    """The inverse of group_view."""
    return w.flatten(-2)[..., :columns]


class GroupedCodec(Codec):
    """Small integers times one bf16 scale per group along the input dimension (means over real elements only).

    A group of no measurable size (mean |w| < 1e-12) has codes 0. bf16 scales, since fp16 lost accuracy when many
    weights of a group are zero. A vector counts as one row.
    """

    def __init__(self, group: int) -> None:
        self.group = group

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-1], math.ceil(shape[-1] / self.group))

    def decode(self, coded: Codes) -> Tensor:
        assert coded.scales is not None
        columns = coded.codes.shape[-1]
        return coded.codes.float() * coded.scales.repeat_interleave(min(self.group, columns), -1)[..., :columns]

    def decode_numpy(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        assert scales is not None
        columns = codes.shape[-1]
        return codes.astype(np.float32) * np.repeat(scales, min(self.group, columns), axis=-1)[..., :columns]

    def sizes(self, w: Tensor) -> Tensor:
        """Real elements of each group, (groups,)."""
        starts = torch.arange(0, w.shape[-1], self.group, device=w.device)
        return (w.shape[-1] - starts).clamp(max=self.group).to(w.dtype)


class TernaryCodec(GroupedCodec):
    """Codes -1, 0, 1; scale = mean |w| of the group (BitNet b1.58, arXiv 2402.17764, eq. 1-3, per group).

    A code is non-zero where |w| >= threshold * bf16(mean |w|). The stored scale is bf16(s * multiplier), s the mean
    or, with TERNARY_SCALE=lstsq, the least-squares scale <w, q> / <q, q> of the codes q.
    """

    stream = "trits"
    bits = 1.6
    tunes = ("threshold", "multiplier")

    def __init__(self, group: int, lstsq: bool) -> None:
        super().__init__(group)
        self.lstsq = lstsq

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        grouped = group_view(w, self.group)  # (..., rows, groups, G)
        size = grouped.abs()
        mean = size.sum(-1) / self.sizes(w)
        cut = (tuning.threshold * round_to(mean, torch.bfloat16)).to(w.dtype)
        keep = (size >= cut.unsqueeze(-1)) & (mean >= 1e-12).unsqueeze(-1)
        codes = grouped.sign() * keep
        scale = (grouped * codes).sum(-1) / codes.abs().sum(-1).clamp(min=1) if self.lstsq else mean
        stored = round_to(scale * tuning.multiplier, torch.bfloat16)
        return Codes(ungroup(codes, w.shape[-1]).to(torch.int8), stored)


class BinaryCodec(GroupedCodec):
    """Signs; scale = mean |w| of the group, which is nearest in squares (XNOR-Net, arXiv 1603.05279, eq. 6).

    A group of no measurable size has scale 0, since there is no code 0.
    """

    stream = "signs"
    bits = 1.0
    tunes = ("multiplier",)

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        grouped = group_view(w, self.group)
        mean = grouped.abs().sum(-1) / self.sizes(w)
        dead = mean < 1e-12
        codes = torch.where((grouped >= 0) | dead.unsqueeze(-1), 1, -1).to(torch.int8)
        stored = round_to(mean * tuning.multiplier, torch.bfloat16).masked_fill(dead, 0.0)
        return Codes(ungroup(codes, w.shape[-1]), stored)


class IntCodec(GroupedCodec):
    """Symmetric k-bit integers, scale = what the group clips at / (2^(k-1) - 1).

    That is its largest |w|; with CLIP_SIGMA so many root mean squares, beyond the largest, too: the records take 11 to
    14 for six bits, which is a coarser step for the entropy coder; with CLIP_SEARCH that times the one of SHRINKS
    whose codes have the least squared error: a GPTQ without Hessian.
    """

    bits = 8.0  # one symbol a byte: packing below a byte costs 20% after compression
    tunes = ("multiplier",)
    SHRINKS: ClassVar[tuple[float, ...]] = tuple(1 - i / 40 for i in range(20))

    def __init__(self, group: int, width: int, sigma: float = 0.0, search: bool = False) -> None:
        super().__init__(group)
        self.stream, self.top, self.sigma = f"int{width}", 2 ** (width - 1) - 1, sigma
        self.shrinks = self.SHRINKS if search else (1.0,)

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        stored = self.scales(w, tuning)
        return Codes(ungroup(self.nearest(group_view(w, self.group), stored), w.shape[-1]).to(torch.int8), stored)

    def scales(self, w: Tensor, tuning: Tuning) -> Tensor:
        """Stored scales of (..., rows, columns), (..., rows, groups); 0 for a group of no measurable size."""
        grouped, size = group_view(w, self.group), self.sizes(w)
        alive, clip = grouped.abs().sum(-1) / size >= 1e-12, grouped.abs().amax(-1)
        if self.sigma:
            clip = self.sigma * (grouped.square().sum(-1) / size).sqrt()
        best, least = torch.zeros_like(clip, dtype=torch.float32), torch.full_like(clip, math.inf)
        for shrink in self.shrinks:
            stored = round_to(clip * shrink / self.top * tuning.multiplier, torch.bfloat16) * alive
            if len(self.shrinks) == 1:
                return stored
            codes = self.nearest(grouped, stored)
            error = (grouped - codes * stored.unsqueeze(-1)).square().sum(-1)
            better = (error < least) | error.isnan()
            best, least = torch.where(better, stored, best), torch.where(better, error, least)
        return best

    def nearest(self, grouped: Tensor, stored: Tensor) -> Tensor:
        """Codes of (..., groups, G) under stored scales (..., groups), in the weights' dtype."""
        divisor = torch.where(stored > 0, stored, 1.0).unsqueeze(-1).to(grouped.dtype)
        codes = (grouped / divisor).round().clamp(-self.top, self.top)
        return codes * (stored != 0).unsqueeze(-1)


class Fp4Codec(GroupedCodec):
    """float4 e2m1, one bf16 scale per group that puts its largest |w| on 6; halfway cases go to the smaller size."""

    stream = "fours"
    bits = 4.0
    tunes = ("multiplier",)
    SIZES: ClassVar[tuple[float, ...]] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP microscaling formats, table 5
    TABLE: ClassVar[np.ndarray] = np.array((*SIZES, *(-size for size in SIZES)), np.float32)

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        grouped = group_view(w, self.group)
        alive = grouped.abs().sum(-1) / self.sizes(w) >= 1e-12
        stored = round_to(grouped.abs().amax(-1) / 6 * tuning.multiplier, torch.bfloat16) * alive
        divisor = torch.where(stored > 0, stored, 1.0).unsqueeze(-1).to(w.dtype)
        middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(self.SIZES)], device=w.device, dtype=w.dtype)
        size = torch.bucketize((grouped.abs() / divisor).contiguous(), middles) * (stored != 0).unsqueeze(-1)
        codes = size + 8 * ((grouped < 0) & (size > 0))
        return Codes(ungroup(codes, w.shape[-1]).to(torch.uint8), stored)

    def decode(self, coded: Codes) -> Tensor:
        table = torch.from_numpy(self.TABLE).to(coded.codes.device)
        return super().decode(Codes(table[coded.codes.int()], coded.scales))

    def decode_numpy(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        return super().decode_numpy(self.TABLE[codes], scales)


def turned(w: Any, group: int) -> Any:
    """Each group of columns times the orthonormal Hadamard matrix, its own inverse; torch and numpy agree bit for bit.

    Sums of pairs in a fixed order (Yates 1937), since a matrix product may add in any. Weights stay as they are where
    the group is no power of two or does not divide the columns.
    """
    shape, size = w.shape, min(group, w.shape[-1])
    if size & (size - 1) or shape[-1] % size:
        return w
    stack, half = torch.stack if isinstance(w, Tensor) else np.stack, 1
    while half < size:
        w = w.reshape(*shape[:-1], -1, 2, half)
        w, half = stack((w[..., 0, :] + w[..., 1, :], w[..., 0, :] - w[..., 1, :]), -2), 2 * half
    return w.reshape(shape) * float(np.float32(size**-0.5))


class TurnedCodec(Codec):
    """Another codec in a turned basis, where outliers of a group are spread over it (QuaRot, arXiv 2404.00456).

    The rotation is orthonormal, so the straight-through gradient stays the identity.
    """

    def __init__(self, codec: GroupedCodec) -> None:
        self.codec, self.stream, self.bits = codec, codec.stream, codec.bits
        self.tunes = codec.tunes

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        return self.codec.scale_shape(shape)

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        return self.codec.quantize(turned(w, self.codec.group), tuning)

    def decode(self, coded: Codes) -> Tensor:
        return turned(self.codec.decode(coded), self.codec.group)

    def decode_numpy(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        return turned(self.codec.decode_numpy(codes, scales), self.codec.group)


def corrected(w: Any, out: Any, into: Any) -> Any:
    """w (rows, columns) + out^T into, for factors (r, rows) and (r, columns); torch and numpy agree bit for bit."""
    for left, right in zip(out, into, strict=True):  # in a fixed order, which a matrix product would not promise
        w = w + left[:, None] * right[None, :]
    return w


class Fp8Codec(Codec):
    """float8 e4m3 with one bf16 scale per row, chosen so that the row's largest value lands on 448."""

    stream = "bytes"
    bits = 8.0

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-1], 1)

    def quantize(self, w: Tensor, tuning: Tuning) -> Codes:
        wide = w.float()
        scale = round_to(wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448 * tuning.multiplier, torch.bfloat16)
        return Codes((wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale)

    def decode(self, coded: Codes) -> Tensor:
        assert coded.scales is not None
        return coded.codes.view(torch.float8_e4m3fn).float() * coded.scales

    def decode_numpy(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        assert scales is not None
        return E4M3[codes] * scales


def e4m3_table() -> np.ndarray:
    """Value of each of the 256 e4m3 bit patterns, float32 (OCP 8-bit floating point specification, table 1)."""
    pattern = np.arange(256)
    exponent, mantissa = (pattern >> 3) & 15, pattern & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(pattern & 127 == 127, np.nan, np.where(pattern & 128, -size, size)).astype(np.float32)


E4M3 = e4m3_table()


def int_codec(h: Hyperparameters, bits: int) -> Codec:
    """Integers of so many bits; INT_GROUP=0 makes each row a group."""
    group = h.group_size if h.int_group < 0 else h.int_group or 2**30
    return perhaps_turned(h, IntCodec(group, bits, h.clip_sigma, h.clip_search))


def perhaps_turned(h: Hyperparameters, codec: GroupedCodec) -> Codec:
    return TurnedCodec(codec) if h.turbo_quant_train else codec


CODECS: dict[str, Callable[[Hyperparameters], Codec]] = {
    "ternary": lambda h: perhaps_turned(h, TernaryCodec(h.group_size, h.ternary_scale == "lstsq")),
    "binary": lambda h: perhaps_turned(h, BinaryCodec(h.group_size)),
    "int4": lambda h: int_codec(h, 4),
    "int5": lambda h: int_codec(h, 5),
    "int6": lambda h: int_codec(h, 6),
    "int7": lambda h: int_codec(h, 7),
    "int8": lambda h: int_codec(h, 8),
    "fp4": lambda h: perhaps_turned(h, Fp4Codec(h.group_size)),
    "fp8": lambda h: Fp8Codec(),
    "bf16": lambda h: HalfCodec(torch.bfloat16),
    "fp16": lambda h: HalfCodec(torch.float16),
    "exact": lambda h: ExactCodec(),
}


def pack_base3(trits: np.ndarray) -> bytes:
    """Five trits a byte: 243 of 256 values, 1.6 bits a trit."""
    packed = np.zeros(-(-trits.size // 5), np.uint8)
    for i in range(5):
        digit = (trits[i::5] + 1).astype(np.uint8)
        packed[: digit.size] += digit * np.uint8(3**i)
    return packed.tobytes()


def unpack_base3(data: bytes, count: int) -> np.ndarray:
    """The inverse of pack_base3, (count,) int8. Raises ValueError on a wrong length or a byte above 242."""
    packed = np.frombuffer(data, np.uint8)
    if packed.size != -(-count // 5) or (packed.size and packed.max() > 242):
        raise ValueError("base-3 stream does not hold the trits it should")
    table = (np.arange(243, dtype=np.int16)[:, None] // np.array([1, 3, 9, 27, 81]) % 3 - 1).astype(np.int8)
    return table[packed].reshape(-1)[:count]


def pack_bitmask(trits: np.ndarray) -> bytes:
    """One bit a trit (non-zero?), then one bit a non-zero trit (positive?): shorter when most are zero."""
    signs = trits[trits != 0]
    return np.packbits(trits).tobytes() + np.packbits(signs > 0).tobytes()


def unpack_bitmask(data: bytes, count: int) -> np.ndarray:
    """The inverse of pack_bitmask, (count,) int8. Raises ValueError on a wrong length."""
    packed, head = np.frombuffer(data, np.uint8), -(-count // 8)
    mask = np.unpackbits(packed[:head], count=count).view(bool) if packed.size >= head else np.zeros(0, bool)
    filled = int(mask.sum())
    if mask.size != count or packed.size != head + -(-filled // 8):
        raise ValueError("bitmask stream does not hold the trits it should")
    trits = np.zeros(count, np.int8)
    trits[mask] = np.unpackbits(packed[head:], count=filled).astype(np.int8) * 2 - 1
    return trits


def pack_signs(signs: np.ndarray) -> bytes:
    """One bit each of -1 and 1."""
    return np.packbits(signs > 0).tobytes()


def unpack_signs(data: bytes, count: int) -> np.ndarray:
    """The inverse of pack_signs, (count,) int8. Raises ValueError on a wrong length."""
    if len(data) != -(-count // 8):
        raise ValueError("sign stream does not hold the signs it should")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(np.int8) * 2 - 1


def pack_nibbles(codes: np.ndarray) -> bytes:
    """Two numbers below 16 a byte, the first in the lower half."""
    even = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    return (even[::2] | even[1::2] << 4).astype(np.uint8).tobytes()


def unpack_nibbles(data: bytes, count: int) -> np.ndarray:
    """The inverse of pack_nibbles, (count,) uint8. Raises ValueError on a wrong length."""
    if len(data) != -(-count // 2):
        raise ValueError("nibble stream does not hold the numbers it should")
    packed = np.frombuffer(data, np.uint8)
    return np.stack((packed & 15, packed >> 4), 1).reshape(-1)[:count]


def pack_planes(values: np.ndarray) -> bytes:
    """Bytes of equal significance together: exponents compress well, mantissas do not."""
    return values.view(np.uint8).reshape(values.size, values.itemsize).T.tobytes()


def unpack_planes(data: bytes, count: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of pack_planes, (count,). Raises ValueError on a wrong length."""
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"stream of {len(data)} bytes should hold {count} values of {dtype.itemsize} bytes")
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(-1)


STREAM_TYPES: dict[str, np.dtype] = {
    "rows": np.dtype("i1"),  # 1: a tensor's row is in its stream, -1: it is all zeros
    "trits": np.dtype("i1"),
    "signs": np.dtype("i1"),
    "int4": np.dtype("i1"),
    "int5": np.dtype("i1"),
    "int6": np.dtype("i1"),
    "int7": np.dtype("i1"),
    "int8": np.dtype("i1"),
    "fours": np.dtype("u1"),
    "bytes": np.dtype("u1"),
    "scales": np.dtype("<u2"),
    "halves": np.dtype("<i2"),
    "floats": np.dtype("<f4"),
}


# ==== 5. LAYERS ==============================================================
# Gives: the context every layer reads, norm, linear, rotary positions, embedding, MLP, softcapped cross-entropy.
# Needs: CONFIG. Knows nothing of sequence mixing.


class Variant(NamedTuple):
    """Structural switches that change during a run; each combination is compiled before the clock starts."""

    untied: bool = False
    experts: bool = False  # more than the first expert runs
    looped: bool = False  # RECURRENCE_LAYERS run again
    speculates: bool = False  # no feedback passes: the bank foresees their capsules
    measures: bool = False  # sites return diagnostics


class Moment(NamedTuple):
    """Where in training a batch stands. Tensors, since numbers would recompile; noise is keyed by step and rows."""

    progress: Tensor  # 0-dim float32, share of the run that is done
    step: Tensor  # 0-dim int64
    rows: Tensor  # (B,) int64, index of each row in the global batch


class Blocks(NamedTuple):
    """How the tokens of a segment lie in blocks of W positions of the stream, and which documents run through them.

    The segment touches n blocks; a state brings what it had of the first one, and takes away what it has of the last.
    Masks are bool, with a last dimension of 1.
    """

    place: Tensor | None  # (B, n W) the token at each place; None: token i is at place i, the rest empty
    spot: Tensor | None  # (B, T) the place of each token
    first: Tensor  # (B, 1) number of the first block in the stream
    inside: Tensor  # (B, n, W, 1) tokens of the document that ends the block: a summary is made of them
    visible: Tensor  # (B, n, W, 1) tokens of the document that ended the block before: they see older summaries
    keep: Tensor  # (B, n, 1) no document starts in the block, so that older summaries stay
    join: Tensor  # (B, 1) what the state has of the first block belongs to the document that ends it
    done: Tensor  # (B,) blocks that the segment completes
    document: Tensor  # (B,) document that ended the last complete block

    def lay(self, x: Tensor) -> Tensor:
        """(B, T, C) into blocks (B, n, W, C), zeros where there is no token."""
        shape, count = self.inside.shape[1:3], self.inside[0, :, :, 0].numel()
        if self.place is None:
            return (x if x.shape[1] == count else F.pad(x, (0, 0, 0, count - x.shape[1]))).unflatten(1, shape)
        found = x.gather(1, self.place.clamp(0, x.shape[1] - 1).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        there = (self.place >= 0) & (self.place < x.shape[1])
        return (found * there.unsqueeze(-1)).unflatten(1, shape)

    def pick(self, y: Tensor, length: int) -> Tensor:
        """The inverse: (B, n, W, C) at the tokens, (B, T, C)."""
        flat = y.flatten(1, 2)
        if self.spot is None:
            return flat[:, :length]
        return flat.gather(1, self.spot.unsqueeze(-1).expand(-1, -1, y.shape[-1]))

    def joined(self, summary: Tensor, before: Tensor) -> Tensor:
        """Sums over blocks (B, n, ...) with what the state (B, ...) has of the first one."""
        if self.place is None:
            return summary
        extra = before * self.join.view(-1, *[1] * (before.ndim - 1))
        return torch.cat((summary[:, :1] + extra.unsqueeze(1), summary[:, 1:]), 1)

    def after(self, values: Tensor) -> Tensor:
        """Of (B, n + 1, ...) that of the first block which the segment does not complete, (B, ...)."""
        return values[torch.arange(len(values), device=values.device), self.done]


def lay_blocks(width: int, positions: Tensor, documents: Tensor, stream: Any, places: Sequence[int] = ()) -> Blocks:
    """Blocks of `width` positions for tokens at positions and documents (B, T), after a StreamState or None.

    With `places`, the tokens' positions and then that of the next one to come, there may be gaps: they leave blocks
    partly empty, the same ones in all rows.
    """
    rows, length = documents.shape
    aligned, zero = stream is None and not places, documents.new_zeros((rows, 1))
    phase = zero if aligned else positions[:, :1] % width
    if places:
        first = places[0] // width
        slots = torch.tensor(places[:-1], device=documents.device) - first * width
        place = zero.new_full(((places[-2] // width - first + 1) * width,), -1)
        place = place.index_copy(0, slots, torch.arange(length, device=documents.device)).expand(rows, -1)
        spot, done = slots.expand(rows, -1), zero[:, 0] + places[-1] // width - first
    else:
        slots = torch.arange((-(-length // width) if aligned else (length + 2 * width - 2) // width) * width)
        place = slots.to(documents.device) - phase
        spot, done = torch.arange(length, device=documents.device) + phase, (phase[:, 0] + length) // width
    there = (place >= 0) & (place < length)
    laid = torch.where(there, documents.gather(1, place.clamp(0, length - 1)), -1).unflatten(1, (-1, width))
    last = end = zero if aligned else documents[:, :1]  # nothing that counts is before a segment
    if stream is not None:
        last, end = stream.document.unsqueeze(1), stream.block_document.unsqueeze(1)
    ends = torch.cat((end, laid.amax(-1)), 1).cummax(1).values  # documents only rise
    before, end = ends[:, :-1], ends[:, 1:]
    return Blocks(
        None if aligned else place,
        None if aligned else spot,
        positions[:, :1] // width,
        ((laid == end.unsqueeze(-1)) & (laid >= 0)).unsqueeze(-1),
        (laid == before.unsqueeze(-1)).unsqueeze(-1),
        (end == before).unsqueeze(-1),
        end[:, :1] == last,
        done,
        ends.gather(1, done.unsqueeze(1)).squeeze(1),
    )


class Ctx(NamedTuple):
    """What a layer may know besides its input; the same for all layers of one forward pass, but for v0 and memory."""

    bos: int  # the token that starts a document
    tokens: Tensor  # (B, T) int64
    history: Tensor  # (B, h.history) int64, the tokens before those; -1 where there are none
    positions: Tensor  # (B, T) int64, counted from the start of the stream
    documents: Tensor  # (B, T) int64, rises by one at each document start
    age: Tensor | None  # (B, T) int64, tokens of its kind right before it in its document; where a mixer needs it
    fresh: Tensor | None  # (B, T) bool, a document or the stream begins: a recurrence begins anew
    blocks: Blocks | None  # how the tokens lie in blocks, for parts that need it
    rotary: tuple[Tensor, Tensor]  # cosine and sine, each (B, T, 1, rope_dims / 2)
    reads: int  # so many of the first positions are memory that is read
    writes: int  # so many of the last positions are written memory: they see all of the segment
    v0: Tensor | None  # (B, T, Hkv, Dh) values of the first attention layer
    memory: dict[str, Any]  # what sites and passes leave for later ones: values, engram, capsules, ...
    moment: Moment | None  # where in training this batch stands; None in evaluation
    variant: Variant  # structural switches, static
    observe: Callable[[str, Tensor], None] | None  # called with (parameter name, input); eager only
    adapters: (
        dict[str, tuple[Tensor, Tensor]] | None
    )  # parameter name -> low-rank pair (in, r), (r, out), or with B first


class Out(NamedTuple):
    """What a site returns: its output (if any), its next state, what later sites may read, losses, diagnostics.

    Losses are summed over sequences and weighted; diagnostics are made when ctx.variant.measures.
    """

    y: Tensor | None
    state: Any = None
    v0: Tensor | None = None
    memory: dict[str, Any] = {}
    losses: dict[str, Tensor] = {}  # never mutated, like the next
    metrics: dict[str, Tensor] = {}


class Role(NamedTuple):
    """How a parameter is stored and trained: codec, optimizer group, factors on its rate and decay, bound on |w|.

    idle: a gradient of zeros means that no token came by, and leaves the weight alone like no gradient.
    """

    codec: str
    group: str  # key of GROUPS
    lr_mult: float = 1.0
    decay: float = 1.0
    bound: float = math.inf
    idle: bool = False
    export: str = ""  # codec that it gets after training, if another one


class Module(nn.Module):
    """Base of all layers: `kinds` names the role of each parameter that the layer itself owns."""

    kinds: ClassVar[dict[str, str]] = {}

    def ranges(self) -> dict[str, tuple[float, float, float, float]]:
        """Ranges of its diagnostics, see Health."""
        return {}


ROLE_KINDS: dict[str, Callable[[Hyperparameters], Role]] = {
    "matrix": lambda h: Role(h.matrix_codec, "matrix"),
    "embed": lambda h: Role(h.fp_storage, "embed"),
    "head": lambda h: Role(h.fp_storage, "head"),
    "table": lambda h: Role(h.fp_storage, "table"),
    "scalar": lambda h: Role(h.scalar_codec, "scalar", decay=0.0),
    "expert": lambda h: Role(h.matrix_codec, "matrix", idle=True),
    "router": lambda h: Role(h.scalar_codec, "scalar", lr_mult=0.1, decay=0.0),  # at the full rate it is sure at once
    "koopman": lambda h: Role(h.scalar_codec, "koopman", decay=0.0),
    "koopman_diagonal": lambda h: Role(h.scalar_codec, "koopman", decay=0.0, bound=0.989),
    "hc": lambda h: Role(h.scalar_codec, "hc", decay=0.0),
    "hc_keep": lambda h: Role(h.scalar_codec, "hc", lr_mult=5.0, decay=0.0),
    "mhc": lambda h: Role(h.scalar_codec, "mhc", decay=0.0),
    "mhc_mix": lambda h: Role(h.scalar_codec, "mhc_mix", decay=0.0),
}


def fits_pattern(pattern: str, kind: str, name: str, shape: Sequence[int]) -> bool:
    """Whether an entry of CODEC_MAP means a parameter: by its kind, else the start or glob of a matrix's name.

    The name may be without its block: mlp stands for blocks.*.mlp. Vectors (gains) go by their kind only.
    """
    if pattern in ROLE_NAMES:
        return pattern == kind
    names = (name, re.sub(r"^blocks\.\d+\.", "", name))
    return len(shape) > 1 and any(fnmatchcase(n, p) for n in names for p in (pattern, pattern + ".*"))


def role_of(h: Hyperparameters, kind: str, name: str, shape: Sequence[int]) -> Role:
    """The row of one parameter: that of its kind, with the codec that EXPORT_MODE and CODEC_MAP say."""
    role, rules = ROLE_KINDS[kind](h), h.export_rules
    if not h.export_rules:
        return role
    found = [pattern for pattern in rules if fits_pattern(pattern, kind, name, shape)]
    if not found:
        return role
    codec = rules[max(found, key=lambda pattern: (pattern not in ROLE_NAMES, len(pattern)))]
    if h.export_mode == "ternary":
        return role._replace(codec=codec)
    return role._replace(export=codec if codec != role.codec else "")


def keyed_uniform(seed: int, *keys: Tensor) -> Tensor:
    """Numbers in [0, 1), float32, that depend on nothing but the int64 keys, which broadcast (splitmix64).

    The same whatever the number of ranks, the device, and what was drawn before.
    """
    x = torch.full((), seed, dtype=torch.int64, device=keys[0].device)
    for key in keys:
        x = (x ^ key) * -0x61C8864680B583EB
        x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        x = x ^ (x >> 31 & 0x1FFFFFFFF)
    return (x >> 40 & 0xFFFFFF).float() / 2**24


def watched(ctx: Ctx, **parts: Tensor | None) -> dict[str, Tensor]:
    """Diagnostics, if they are wanted: of a gate its mean and the share that is shut or wide open, else the rms."""
    found: dict[str, Tensor] = {}
    for name, part in parts.items() if ctx.variant.measures else ():
        if part is not None and "gate" in name:
            found |= {f"{name}_mean": part.mean(), f"{name}_saturated": ((part < 0.05) | (part > 0.95)).float().mean()}
        elif part is not None:
            found[f"{name}_rms"] = part.square().mean().sqrt()
    return found


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) over the last dimension in three passes forward and backward (F.rms_norm in eager takes eight)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rate = math.sqrt(x.shape[-1]) / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6)
        y = x * rate
        ctx.save_for_backward(y, rate)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, rate = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / -y.shape[-1]
        return torch.addcmul(grad, y, along).mul_(rate)


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, no gain; a zero vector gives zero (Zhang & Sennrich 2019)."""
    if x.device.type == "cpu":
        return RMSNormFunction.apply(x)
    return F.rms_norm(x, (x.shape[-1],), eps=1e-12)  # the default eps shifts small embeddings by 0.4%


class SquaredReLUFunction(torch.autograd.Function):
    """leaky(x)^2 with slope s below zero; its derivative is 2 leaky(x) with slope s^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return F.leaky_relu(x, slope).square()  # not in place: compiled by torch 2.11, the gradient would be zero

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.addcmul(x.new_zeros(()), F.leaky_relu(x, ctx.slope**2), grad, value=2), None


class Linear(Module):
    """y = x W^T (+ x A B where an adapter names this weight). Weight (out, in), no bias."""

    def __init__(self, name: str, inputs: int, outputs: int, kind: str = "matrix") -> None:
        super().__init__()
        self.name = name + ".weight"
        self.kinds = {"weight": kind}  # type: ignore[misc]
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        if ctx.observe is not None:
            ctx.observe(self.name, x)
        y = F.linear(x, self.weight)
        if ctx.adapters is not None and self.name in ctx.adapters:
            down, up = ctx.adapters[self.name]
            y = y + x @ down @ up
        return y


class NormedLinear(Linear):
    """y = (gain rms_norm(x)) W^T: a ternary matrix with an input of known size (Wang et al. 2023, SubLN)."""

    def __init__(self, name: str, inputs: int, outputs: int, kind: str = "matrix") -> None:
        super().__init__(name, inputs, outputs, kind)
        self.kinds = {"weight": kind, "gain": "scalar"}  # type: ignore[misc]
        self.gain = nn.Parameter(torch.empty(inputs))

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        return super().forward(rms_norm(x) * self.gain.to(x.dtype), ctx)


def rotary_frequencies(h: Hyperparameters) -> tuple[np.ndarray, float]:
    """Angular frequency of each rotated pair, (rope_dims / 2,) float64, and the factor on cosine and sine.

    With YARN_FACTOR s > 1 (Peng et al. 2023, section 3.2): pairs that turn more than 32 times within the original
    context keep their frequency, those that turn less than once are slowed by s, a linear ramp between; the factor
    0.1 ln s + 1 sharpens attention.
    """
    pairs = h.rope_dims // 2
    frequencies = h.rope_base ** (-np.arange(pairs) / pairs)
    if h.yarn_factor == 1:
        return frequencies, 1.0
    turns = (h.yarn_original or h.train_seq_len) * frequencies / (2 * math.pi)
    keep = np.clip((turns - 1) / (32 - 1), 0, 1)
    return frequencies * (keep + (1 - keep) / h.yarn_factor), 0.1 * math.log(h.yarn_factor) + 1


class Rotary(Module):
    """Cosine and sine of any position, exact to the last bits of float32; positions start anew every 2^24.

    A float32 angle is off by 4e-3 rad at position 64k. So two tables made in float64, one for the low twelve bits of
    the position and one for the rest, are joined by the addition theorem: e^(i(a+b)) = e^(ia) e^(ib).
    """

    SPLIT: ClassVar[int] = 4096

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        frequencies, self.factor = rotary_frequencies(h)
        for name, step in (("low", 1), ("high", self.SPLIT)):
            angles = np.arange(self.SPLIT)[:, None] * step * frequencies
            table = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], -1))
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)  # (4096, R/2, 2)

    low: Tensor
    high: Tensor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.low[positions % self.SPLIT], self.high[positions // self.SPLIT % self.SPLIT]
        cosine = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
        sine = a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
        return (cosine * self.factor).unsqueeze(-2), (sine * self.factor).unsqueeze(-2)


def turn_(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs (x_i, x_{i + R/2}) of the first R channels by an angle, in place; x (B, T, H, Dh) (Su et al. 2021)."""
    half = cosine.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    first = a.clone()
    a.mul_(cosine).addcmul_(b, sine, value=-1)
    b.mul_(cosine).addcmul_(first, sine)
    return x


class QKVFunction(torch.autograd.Function):
    """Queries (B, T, H, Dh), keys and values (B, T, Hkv, Dh) from their joint projection x (B, T, H + 2 Hkv, Dh).

    Queries and keys get an RMS norm per head, queries a gain (H,), both a rotation R: y = R f x with f = gain / rms(x),
    1 in place of what is switched off. A rotation keeps inner products, so with g = R^T dy and s = <g, x> / rms(x)
    d gain = sum s and dx = f g - x f s / (Dh rms(x)). One function, since autograd of the parts would join and copy.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, cosine: Tensor, sine: Tensor, norm: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv = gain.shape[0], (x.shape[2] - gain.shape[0]) // 2
        qk, wide = x[:, :, : heads + kv], torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=wide)  # (B, T, H + Hkv, 1)
        rate = math.sqrt(x.shape[-1]) / (size + 1e-6) if norm else torch.ones_like(size)
        factor = rate * F.pad(gain, (0, kv), value=1.0).unsqueeze(-1)
        ctx.save_for_backward(x, rate, factor, cosine, sine)
        ctx.norm, ctx.sizes = norm, (heads, kv)
        q, k = turn_(qk * factor, cosine, sine).to(x.dtype).split((heads, kv), 2)
        return q, k, x[:, :, heads + kv :]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, rate, factor, cosine, sine = ctx.saved_tensors
        heads, kv = ctx.sizes
        dx, qk = torch.cat((dq, dk, dv), 2).to(rate.dtype), x[:, :, : heads + kv].to(rate.dtype)
        grad = turn_(dx[:, :, : heads + kv], cosine, -sine)
        along = torch.linalg.vecdot(grad, qk).unsqueeze(-1) * rate
        grad.mul_(factor)
        if ctx.norm:
            grad.addcmul_(qk, along * rate * factor, value=-1 / x.shape[-1])
        return dx.to(x.dtype), along[:, :, :heads].sum((0, 1, 3)), None, None, None


class HashedNgrams(Module):
    """What the last tokens of a document say: one row per n-gram order and head, joined, (B, T, BIGRAM_HASH_DIM).

    An n-gram of tokens x_0 (the current one), x_1, ... has the key ((x_0 + 1) M_1 + x_1 + 1) M_2 + ... mod the prime
    2^31 - 1 with M_j = 16807^(j + 1), other multipliers for each head, and with it the row key mod BIGRAM_HASH_BUCKETS
    of its table (Carter & Wegman 1979); distinct n-grams may share a row. One that would reach past its document's
    start gives zeros.
    """

    PRIME: ClassVar[int] = 2**31 - 1
    kinds: ClassVar[dict[str, str]] = {"weight": "table"}

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.orders, self.heads, self.buckets = h.ngram_orders, h.bigram_hash_heads, h.bigram_hash_buckets
        tables = len(self.orders) * self.heads
        self.weight = nn.Parameter(torch.empty(tables * self.buckets, h.bigram_hash_dim // tables))

    def rows(self, tokens: Tensor, history: Tensor, bos: int) -> tuple[Tensor, Tensor]:
        """Rows of the stacked tables, and whether each n-gram is whole, both (B, T, orders * heads)."""
        length, reach = tokens.shape[1], self.orders[-1] - 1
        stream = torch.cat((history[:, history.shape[1] - reach :], tokens), 1)
        keys, whole = [tokens + 1] * self.heads, tokens >= 0  # memory has no n-grams
        rows: list[Tensor] = []
        wholes: list[Tensor] = []
        for back in range(1, reach + 1):
            before, after = stream[:, reach - back :][:, :length], stream[:, reach - back + 1 :][:, :length]
            whole = whole & (before >= 0) & (after != bos)
            for head in range(self.heads):
                multiplier = pow(16807, back + 1 + 64 * head, self.PRIME)
                keys[head] = (keys[head] * multiplier + before + 1) % self.PRIME
                if back + 1 in self.orders:
                    rows.append(keys[head] % self.buckets + len(rows) * self.buckets)
                    wholes.append(whole)
        return torch.stack(rows, -1), torch.stack(wholes, -1)

    def forward(self, ctx: Ctx) -> Tensor:
        rows, whole = self.rows(ctx.tokens, ctx.history, ctx.bos)
        # Few rows of a large table are met in one step; a compiler and a GPU are better off with whole gradients.
        sparse = rows.device.type == "cpu" and not torch.compiler.is_compiling()
        x = F.embedding(rows, self.weight, sparse=sparse)  # (B, T, orders * heads, BIGRAM_HASH_DIM / their number)
        return (x * whole.unsqueeze(-1)).flatten(-2)


class NgramEmbedding(HashedNgrams):
    """Hashed n-grams as a part of the embedding, (B, T, MODEL_DIM)."""

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__(h)
        self.up = Linear("embed.ngrams.up", h.bigram_hash_dim, h.model_dim)

    def forward(self, ctx: Ctx) -> Tensor:
        return self.up(super().forward(ctx), ctx)


class Smear(Module):
    """x_t + gate * x_{t-1}, gate = amount * sigmoid(W x_t[:SMEAR_GATE]), nothing from another document (SmearGate).

    Of token embeddings, so that the token before a window is enough to continue it.
    """

    kinds: ClassVar[dict[str, str]] = {"amount": "scalar"}

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.width = h.smear_gate
        self.gate = Linear("embed.smear.gate", min(h.smear_gate, h.embed_width), 1, "scalar")
        self.amount = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, weight: Tensor, ctx: Ctx) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings x (B, T, E) with the ones before them, and diagnostics."""
        before = ctx.history[:, -1:]
        first = F.embedding(before.clamp(min=0), weight) * (before >= 0).unsqueeze(-1)
        gate = self.amount * torch.sigmoid(self.gate(x[..., : self.width], ctx)) * (ctx.tokens != ctx.bos).unsqueeze(-1)
        return x + gate.to(x.dtype) * torch.cat((first.to(x.dtype), x[:, :-1]), 1), watched(ctx, smear_gate=gate)


def last_equal(key: Tensor) -> Tensor:
    """For each place of key (B, S) the nearest earlier place in its row with the same key, or -1; O(S log S)."""
    order = key.argsort(dim=1, stable=True)
    ordered = key.gather(1, order)
    again = ordered[:, 1:] == ordered[:, :-1]
    found = torch.full_like(order, -1)
    return found.scatter_(1, order[:, 1:], torch.where(again, order[:, :-1], -1))


class Induction(Module):
    """Induction heads that need not be learned (Olsson et al. 2022): what followed the last times.

    For each order the current n-gram's last INDUCTION_COUNT occurrences within INDUCTION_WINDOW tokens are looked up,
    in the same document with DOC_MASK; a token f after one adds gain * embed(f) + found to the embedding, gain and
    found learned per order and occurrence; where there is none, nothing is added.
    """

    kinds: ClassVar[dict[str, str]] = {"gain": "scalar", "found": "scalar"}

    def __init__(self, h: Hyperparameters, bos: int) -> None:
        super().__init__()
        self.orders, self.window, self.count = h.matched_orders, h.induction_window, h.induction_count
        self.doc_mask, self.vocab_size, self.bos = h.doc_mask, h.vocab_size, bos
        self.gain = nn.Parameter(torch.empty(len(self.orders) * self.count, h.embed_width))
        self.found = nn.Parameter(torch.empty(len(self.orders) * self.count, h.embed_width))

    def followers(self, tokens: Tensor, history: Tensor) -> Tensor:
        """(B, T, orders * count) tokens, latest first; -1 where the n-gram has not been seen so often."""
        stream = torch.cat((history, tokens), 1)
        place, documents = torch.arange(stream.shape[1], device=stream.device), (stream == self.bos).cumsum(1)
        after, key, found = F.pad(stream, (0, 1))[:, 1:], stream + 1, []
        for order in range(1, self.orders[-1] + 1):
            if order > 1:
                before = F.pad(stream, (order - 1, 0), value=-1)[:, : stream.shape[1]] + 1
                key = (key * (self.vocab_size + 1) + before) * (before > 0) * (key > 0)  # 0: reaches past the beginning
            if order in self.orders:
                last = at = last_equal(torch.where(key > 0, key, -1 - place))
                for _ in range(self.count):
                    seen, at = at >= (place - self.window).clamp(min=0), at.clamp(min=0)
                    seen = seen & (documents.gather(1, at) == documents) if self.doc_mask else seen
                    found.append(torch.where(seen, after.gather(1, at), -1))
                    at = torch.where(seen, last.gather(1, at), -1)
        return torch.stack(found, -1)[:, history.shape[1] :]

    def forward(self, ctx: Ctx, embedding: Tensor) -> Tensor:
        """What to add to embeddings (B, T, E), from a table of all followers of all orders."""
        rows = self.followers(ctx.tokens, ctx.history).flatten(0, 1)
        tables = embedding * self.gain.unsqueeze(1) + self.found.unsqueeze(1)  # (orders * count, V, E)
        none = len(self.gain) * self.vocab_size
        starts = torch.arange(0, none, self.vocab_size, device=rows.device)
        table = F.pad(tables.flatten(0, 1), (0, 0, 0, 1))  # the last row stands for no follower
        rows = torch.where(rows < 0, none, rows + starts)
        if rows.device.type == "cpu":  # elsewhere it gains nothing, and MPS has it only since torch 2.10
            return F.embedding_bag(rows, table, mode="sum", padding_idx=none).view(*ctx.tokens.shape, -1)
        return F.embedding(rows, table, none).sum(-2).view(*ctx.tokens.shape, -1)


class Embedding(Module):
    """Token embedding plus induction and hashed n-grams, normalized; factored through EMBED_DIM when that is set.

    Its weight is also the tied output head.
    """

    def __init__(self, h: Hyperparameters, bos: int) -> None:
        super().__init__()
        self.kinds = {"weight": "embed", "value_rows": "embed"}  # type: ignore[misc]
        self.weight = nn.Parameter(torch.empty(h.vocab_size, h.embed_width))
        values = h.num_kv_heads * h.head_dim
        self.value_rows = nn.Parameter(torch.empty(h.vocab_size, values)) if h.value_embed else None
        self.up = Linear("embed.up", h.embed_width, h.model_dim) if h.embed_dim else None
        self.smear = Smear(h) if h.smear_gate else None
        self.ngrams = NgramEmbedding(h) if h.ngram_orders and not h.has_engram else None
        self.induction = Induction(h, bos) if h.matched_orders else None

    def forward(self, ctx: Ctx) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The first residual stream x0, the part e2 of it from n-grams (None without tables), and diagnostics."""
        x, metrics = F.embedding(ctx.tokens, self.weight), {}
        if self.smear is not None:
            x, metrics = self.smear(x, self.weight, ctx)
        if self.induction is not None:
            x = x + self.induction(ctx, self.weight)
        if torch.is_autocast_enabled(x.device.type):
            x = x.bfloat16()  # the residual stream is bf16, too: half the traffic between sites
        if self.up is not None:
            x = self.up(rms_norm(x), ctx)
        e2 = self.ngrams(ctx) if self.ngrams is not None else None
        return rms_norm(x if e2 is None else x + e2), e2, metrics


class Head(Module):
    """From the last hidden state to the rows of the vocabulary: an optional projection, and an own matrix if untied."""

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.down = Linear("head.down", h.model_dim, h.embed_width) if h.embed_dim else None
        self.weight = nn.Parameter(torch.empty(h.vocab_size, h.embed_width)) if h.has_head else None
        self.kinds = {"weight": "head"} if h.has_head else {}  # type: ignore[misc]

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        return self.down(x, ctx) if self.down is not None else x


def added(x: Tensor, weights: Sequence[Tensor], lanes: Sequence[Tensor]) -> Tensor:
    """x plus the sum of weights times lanes; weights (D,) or (B, T, 1)."""
    for weight, lane in zip(weights, lanes, strict=True):
        x = torch.addcmul(x, lane, weight)
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: SquaredReLUFunction.apply(x, 0.0),
    "leaky_relu2": lambda x: SquaredReLUFunction.apply(x, 0.5),
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


class MLP(Module):
    """down(act(up(x))); hidden width MLP_MULT * MODEL_DIM (SwiGLU's up makes gate and value: twice as many rows)."""

    def __init__(self, h: Hyperparameters, layer: int, name: str, kind: str = "matrix") -> None:
        super().__init__()
        hidden = round(h.mlp_mult * h.model_dim)
        self.act = ACTIVATIONS[h.mlp_act]
        self.up = Linear(name + ".up", h.model_dim, hidden * (2 if h.mlp_act == "swiglu" else 1), kind)
        self.down = (NormedLinear if h.proj_norm else Linear)(name + ".down", hidden, h.model_dim, kind)

    def init_state(self, batch: int, dtype: torch.dtype) -> None:
        return None

    def forward(self, x: Tensor, ctx: Ctx, state: None) -> Out:
        return Out(self.down(self.act(self.up(x, ctx)), ctx))


def has_grouped(x: Tensor) -> bool:
    """Whether torch multiplies groups of rows without asking the GPU for their sizes (new in torch 2.10)."""
    return x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")


@torch.library.custom_op("golf::grouped", mutates_args=())
def grouped(x: Tensor, weight: Tensor, counts: Tensor, back: bool) -> Tensor:
    """Rows x (n, a) in order of their expert, each times its expert's weight (E, b, a), or (E, a, b) with back: (n, b).

    counts (E,): rows of each. An operator of its own, since a compiler cannot follow sizes that depend on data.
    """
    if has_grouped(x):
        return F.grouped_mm(x, weight if back else weight.mT, offs=counts.cumsum(0).to(torch.int32))
    y, sizes = x.new_empty((x.shape[0], weight.shape[2 if back else 1])), counts.tolist()
    for w, rows, out in zip(weight, x.split(sizes), y.split(sizes), strict=True):
        torch.mm(rows, w if back else w.T, out=out)
    return y


@torch.library.custom_op("golf::grouped_gradient", mutates_args=())
def grouped_gradient(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Gradient of grouped's weight (E, b, a) from that of its output (n, b) and its rows (n, a)."""
    if has_grouped(x):
        return F.grouped_mm(grad.T, x, offs=counts.cumsum(0).to(torch.int32))
    dw, sizes = grad.new_empty((len(counts), grad.shape[1], x.shape[1])), counts.tolist()
    for out, g, rows in zip(dw, grad.split(sizes), x.split(sizes), strict=True):
        torch.mm(g.T, rows, out=out)
    return dw


grouped.register_fake(lambda x, weight, counts, back: x.new_empty((x.shape[0], weight.shape[2 if back else 1])))
grouped_gradient.register_fake(lambda grad, x, counts: x.new_empty((counts.shape[0], grad.shape[1], x.shape[1])))


def grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    """Gradients of grouped's rows and weights (of the form that is not back)."""
    (x, weight, counts), grad = ctx.saved_tensors, grad.contiguous()
    return grouped(grad, weight, counts, True), grouped_gradient(grad, x, counts), None, None


grouped.register_autograd(
    grouped_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3])
)


class PermutationFunction(torch.autograd.Function):
    """x[order] for a permutation of rows, whose gradient is one, too; autograd would scatter and add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


class MoE(Module):
    """MOE_EXPERTS MLPs of which each token takes MOE_TOP_K (Shazeer et al. 2017; one: Fedus et al. 2021).

    For one expert the weight is the router's probability itself, since renormalizing would leave it no gradient; for
    more they are renormalized. Tokens are sorted by expert and none is dropped. Before MOE_START_FRACTION the first
    expert runs alone; there a single expert's output shrinks about MOE_EXPERTS-fold, until the router has learned to be
    sure. The load-balance loss E sum_e mean probability_e * share_e is made per sequence.
    """

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        self.top_k, self.balance = h.moe_top_k, h.moe_balance
        self.act = ACTIVATIONS[h.mlp_act]
        self.experts = nn.ModuleList(MLP(h, layer, f"{name}.experts.{e}", "expert") for e in range(h.moe_experts))
        self.router = Linear(name + ".router", h.model_dim, h.moe_experts, "router")

    def init_state(self, batch: int, dtype: torch.dtype) -> None:
        return None

    def multiply(self, layers: Sequence[Linear], rows: Tensor, counts: Tensor, ctx: Ctx) -> Tensor:
        """Rows (n, in) in order of their expert, each times its expert's matrix: what Linear does, for all of them."""
        if ctx.observe is not None:
            owners = torch.repeat_interleave(counts)
            for e, layer in enumerate(layers):
                ctx.observe(layer.name, rows[owners == e])
        weights = torch.stack([layer.weight for layer in layers])
        if ctx.adapters is not None:
            pairs = [ctx.adapters.get(layer.name) for layer in layers]
            if any(pair is not None and pair[0].ndim > 2 for pair in pairs):
                raise ValueError("experts take adapters that all rows of a batch share")
            none = torch.zeros_like(weights[0])
            weights = weights + torch.stack([none if pair is None else (pair[0] @ pair[1]).mT for pair in pairs])
        return grouped(rows, weights.to(rows.dtype), counts, False)

    def answers(self, x: Tensor, chosen: Tensor, counts: Tensor, ctx: Ctx) -> Tensor:
        """What each token's experts make of it, (B, T, k, D): rows go to their experts in order, and back."""
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        rows = x.to(dtype).flatten(0, 1)
        rows = rows.repeat_interleave(self.top_k, 0) if self.top_k > 1 else rows
        rows = PermutationFunction.apply(rows, order, inverse)
        up: list[Linear] = [e.up for e in self.experts]  # type: ignore[misc]
        down: list[Linear] = [e.down for e in self.experts]  # type: ignore[misc]
        hidden = self.act(self.multiply(up, rows, counts, ctx))
        if isinstance(down[0], NormedLinear):
            gains = torch.stack([layer.gain for layer in down]).to(dtype)  # type: ignore[misc]
            hidden = rms_norm(hidden) * gains[chosen.flatten()[order]]
        found = self.multiply(down, hidden, counts, ctx)
        return PermutationFunction.apply(found, inverse, order).view(*chosen.shape, -1)

    def forward(self, x: Tensor, ctx: Ctx, state: None) -> Out:
        if not ctx.variant.experts:
            return self.experts[0](x, ctx, state)
        p = self.router(x, ctx).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
        weight, chosen = p.topk(self.top_k, -1)  # (B, T, k)
        weight = weight / weight.sum(-1, keepdim=True) if self.top_k > 1 else weight
        share = F.one_hot(chosen, len(self.experts)).to(p.dtype).sum(2)  # (B, T, E)
        found = self.answers(x, chosen, share.sum((0, 1)).to(torch.int64), ctx)
        y = (found * weight.unsqueeze(-1).to(found.dtype)).sum(2)
        losses, metrics = {}, {}
        if self.balance and ctx.moment is not None:
            balance = len(self.experts) * (p.mean(1) * share.mean(1) / self.top_k).sum()
            losses = {"moe_balance": self.balance * balance}
        if ctx.variant.measures:
            metrics = {f"load_{e}": load for e, load in enumerate((share.mean((0, 1)) / self.top_k).unbind())}
            metrics["router_entropy_nats"] = -(p * p.clamp(min=1e-9).log()).sum(-1).mean()
        return Out(y, losses=losses, metrics=metrics)


class SoftcapCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(cap * tanh(x W^T / cap))[target], rows with target -100 left out.

    With smoothing e the target has 1 - e of the weight and e is spread over all tokens (Szegedy et al. 2016).

    Logits are made a few rows at a time and turned into their own gradient in place, so that the (N, V) matrix never
    exists and each block stays in cache (after Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, 3.2).
    x (N, E), weight (V, E), targets (N,) int64. Returns a 0-dim float32 (float64 for float64 inputs).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float, smoothing: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = max(128, (2**21 if x.device.type == "cpu" else 2**27) // weight.shape[0])
        total, matrix = x.new_zeros((), dtype=wide), weight.to(x.dtype)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        for at in range(0, x.shape[0], rows):
            part = x[at : at + rows]
            z = ((part * (-2 / cap) if cap else part) @ matrix.T).to(wide)
            loss, slope, share = capped_loss_and_slope(z, targets[at : at + rows], cap, smoothing)
            total = total + loss
            slope, share = slope.to(part.dtype), share.to(part.dtype)
            dx[at : at + rows] = (slope @ matrix) * share
            dw += slope.T @ (part * share)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw * grad.to(dw.dtype), None, None, None


def capped_loss_and_slope(
    z: Tensor, targets: Tensor, cap: float, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of cross-entropies of the logits l = z for cap 0, l = cap * tanh(-z / 2) else, z (N, V); z is overwritten.

    Returns the sum, and its gradient by the logits before the cap as (N, V) times (N, 1): the division by the
    partition sum is left to the caller's small matrices. With s = sigmoid(z), many times faster than tanh on a CPU:
    l = cap - 2 cap s, and the cap's derivative is 4 s (1 - s).
    """
    keep = targets >= 0
    index = targets.clamp(min=0).unsqueeze(1)
    below = z.sigmoid_().mul(-2 * cap) if cap else z  # l - cap
    # Under a small cap the largest logit need not be looked for: exp(-2 cap) is still far above the least float32.
    top = below.new_zeros((1, 1)) if 0 < cap <= 40 else below.amax(1, keepdim=True)
    picked = below.gather(1, index) - top
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * (below.mean(1, keepdim=True) - top)
    weight = (below if 0 < cap <= 40 else below - top).exp_()
    norm = weight.sum(1, keepdim=True)
    loss = ((norm.log() - picked).squeeze(1) * keep).sum()
    weight.scatter_add_(1, index, (smoothing - 1) * norm)
    if smoothing:
        weight.sub_(norm * (smoothing / z.shape[1]))
    if cap:
        weight.mul_(z).addcmul_(weight, z, value=-1)
    return loss, weight, keep.unsqueeze(1) * (4.0 if cap else 1.0) / norm


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap * tanh(z / cap), or z for cap 0; at least float32."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return cap * torch.tanh(z / cap) if cap else z


# ==== 6. MIXERS ==============================================================
# Gives: sequence mixers behind one interface: `mixer(h, ctx, state) -> Out`, `init_state(batch, dtype)`.
# Needs: LAYERS. Knows nothing of residual wiring.


def scan_in_place(a: Tensor, b: Tensor, reverse: bool, chunk: int = 32) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along dim 1 from h = 0 (from the end with reverse); uses a and b (B, T, S) up.

    By doubling within chunks: after k rounds b_t is the sum over the last 2^k steps and a_t their product (Hillis &
    Steele 1986). Then the same over the chunks' ends, whose result enters each chunk once. No logarithm: a may be 0.
    """
    length, step = b.shape[1], 1
    if length > chunk:
        pad = (0, 0, -length % chunk, 0) if reverse else (0, 0, 0, -length % chunk)
        a, b = (F.pad(x, pad).unflatten(1, (-1, chunk)) for x in (a, b))  # (B, chunks, chunk, S)
    while step < b.shape[-2]:
        here, there = (slice(None, -step), slice(step, None)) if reverse else (slice(step, None), slice(None, -step))
        b[..., here, :] += a[..., here, :] * b[..., there, :]
        a[..., here, :] = a[..., here, :] * a[..., there, :]
        step *= 2
    if length <= chunk:
        return b
    edge = 0 if reverse else -1
    ends = scan_in_place(a[:, :, edge].clone(), b[:, :, edge].clone(), reverse, chunk)
    before = F.pad(ends, (0, 0, 0, 1))[:, 1:] if reverse else F.pad(ends, (0, 0, 1, 0))[:, :-1]
    b = torch.addcmul(b, a, before.unsqueeze(2)).flatten(1, 2)
    return b[:, -length:] if reverse else b[:, :length]


# Triton kernels of linear_scan and of its gradient: a program walks one row and some channels tile by tile. Within a
# tile the scan is associative: (a1, b1) then (a2, b2) is (a1 a2, a2 b1 + b2). Every number is read and written once, so
# memory bandwidth is the bound.
HAS_TRITON = find_spec("triton") is not None  # asked once: a look-up in forward cannot be compiled
if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def joined_steps(a1, b1, a2, b2):
        return a1 * a2, a2 * b1 + b2

    @triton.jit
    def scan_kernel(a, b, h0, h, length, width, TIME: tl.constexpr, SIZE: tl.constexpr):
        row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        carry = tl.load(h0 + row * width + channel, mask=channel < width, other=0.0)
        for start in range(0, length, TIME):
            step = start + tl.arange(0, TIME)
            there = (step < length)[:, None] & (channel < width)[None, :]
            place = (row * length + step)[:, None] * width + channel[None, :]
            factor = tl.load(a + place, mask=there, other=1.0)
            product, total = tl.associative_scan((factor, tl.load(b + place, mask=there, other=0.0)), 0, joined_steps)
            found = product * carry[None, :] + total
            tl.store(h + place, found, mask=there)
            carry = tl.sum(tl.where((tl.arange(0, TIME) == TIME - 1)[:, None], found, 0.0), 0)

    @triton.jit
    def scan_gradient_kernel(a, h, h0, grad, da, db, length, width, TIME: tl.constexpr, SIZE: tl.constexpr):
        row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        carry = tl.zeros((SIZE,), tl.float32)
        first = tl.load(h0 + row * width + channel, mask=channel < width, other=0.0)
        for start in range(0, length, TIME):
            step = length - 1 - start - tl.arange(0, TIME)  # from the end
            there = (step >= 0)[:, None] & (channel < width)[None, :]
            place = (row * length + step)[:, None] * width + channel[None, :]
            factor = tl.load(a + place + width, mask=there & (step < length - 1)[:, None], other=0.0)
            factor = tl.where((step < 0)[:, None], 1.0, factor)
            product, total = tl.associative_scan(
                (factor, tl.load(grad + place, mask=there, other=0.0)), 0, joined_steps
            )
            g = product * carry[None, :] + total
            before = tl.load(h + place - width, mask=there & (step > 0)[:, None], other=0.0)
            before = tl.where((step == 0)[:, None], first[None, :], before)
            tl.store(db + place, g, mask=there)
            tl.store(da + place, g * before, mask=there)
            carry = tl.sum(tl.where((tl.arange(0, TIME) == TIME - 1)[:, None], g, 0.0), 0)


SCAN_TILE = (64, 32)  # steps and channels of one tile


@torch.library.custom_op("golf::scan", mutates_args=())
def fused_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """linear_scan's h by one kernel, of contiguous float32 tensors."""
    h, (rows, length, width), (time_tile, size) = torch.empty_like(b), b.shape, SCAN_TILE
    scan_kernel[rows, -(-width // size)](a, b, h0, h, length, width, time_tile, size)
    return h


@torch.library.custom_op("golf::scan_gradient", mutates_args=())
def fused_scan_gradient(a: Tensor, h: Tensor, h0: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and b from that of h."""
    da, db, (rows, length, width), (time_tile, size) = torch.empty_like(h), torch.empty_like(h), h.shape, SCAN_TILE
    scan_gradient_kernel[rows, -(-width // size)](a, h, h0, grad, da, db, length, width, time_tile, size)
    return da, db


fused_scan.register_fake(lambda a, b, h0: torch.empty_like(b))
fused_scan_gradient.register_fake(lambda a, h, h0, grad: (torch.empty_like(h), torch.empty_like(h)))


class ScanFunction(torch.autograd.Function):
    """linear_scan on a, b (B, T, S) and h0 (B, S). With g the gradient of h, the scan g_t += a_{t+1} g_{t+1} from the
    end gives the gradient of b; a_t's is g_t h_{t-1}, h0's a_0 g_0."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor, fused: bool) -> Tensor:
        if fused:
            h = fused_scan(a.contiguous(), b.contiguous(), h0.contiguous())
        else:
            first = torch.addcmul(b[:, 0], a[:, 0], h0)
            h = scan_in_place(a.clone(), torch.cat((first.unsqueeze(1), b[:, 1:]), 1), False)
        ctx.save_for_backward(a, h, h0)
        ctx.fused = fused
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, h, h0 = ctx.saved_tensors
        if ctx.fused:
            da, g = fused_scan_gradient(a.contiguous(), h, h0.contiguous(), grad.contiguous())
        else:
            g = scan_in_place(F.pad(a, (0, 0, 0, 1))[:, 1:].clone(), grad.clone(), True)
            da = g * torch.cat((h0.unsqueeze(1), h[:, :-1]), 1)
        return da, g, a[:, 0] * g[:, 0], None


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """First-order diagonal recurrence h_t = a_t * h_{t-1} + b_t.

    a: (B, T, S) or what broadcasts to it, in [0, 1]; b: (B, T, S); h0: (B, S) or None for zeros. Returns h (B, T, S)
    and a copy of the last state (B, S), both in at least float32. O(B T S) work, O(log T) sequential steps. Raises
    ValueError on a shape mismatch.
    """
    wide = torch.promote_types(b.dtype, torch.float32)
    h0 = b.new_zeros((b.shape[0], b.shape[2]), dtype=wide) if h0 is None else h0.to(wide)
    if h0.shape != (b.shape[0], b.shape[2]) or a.shape[-1] not in (1, b.shape[2]):
        raise ValueError(f"linear_scan of a {tuple(a.shape)}, b {tuple(b.shape)}, h0 {tuple(h0.shape)}")
    fused = HAS_TRITON and b.is_cuda and wide == torch.float32
    h = ScanFunction.apply(a.to(wide).expand(b.shape), b.to(wide), h0, fused)
    return h, h[:, -1].clone()


class BlockState(NamedTuple):
    """A memory made of blocks: what is summed up of the open block, and what that block sees of earlier ones."""

    open: Tensor  # (B, ...)
    seen: Tensor  # (B, ...)


def remember(
    sums: Tensor, hold: Tensor, old: BlockState, blocks: Blocks, write: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, BlockState]:
    """s_{j+1} = hold_j s_j + write(sums_j, hold_j), hold_j = hold where no document starts in block j, else 0.

    sums: (B, n, ...) over the tokens of each block here; hold broadcasts to what is seen. Returns what each block sees,
    s_0 .. s_{n-1} (B, n, ...) in at least float32, and the next state (the old one if nothing is carried).
    """
    sums = blocks.joined(sums.to(old.open.dtype), old.open)
    kept = hold.to(old.seen.dtype) * blocks.keep.view(*blocks.keep.shape[:2], *[1] * (old.seen.ndim - 1))
    written = write(sums, kept)
    h, _ = linear_scan(kept.expand(written.shape).flatten(2), written.flatten(2), old.seen.flatten(1))
    states = torch.cat((old.seen.unsqueeze(1), h.view(written.shape)), 1)
    if blocks.place is None:
        return states[:, :-1], old
    started = torch.cat((sums, torch.zeros_like(sums[:, :1])), 1)
    return states[:, :-1], BlockState(blocks.after(started), blocks.after(states))


def capsule_mean(sums: Tensor) -> Tensor:
    """Weighted means (..., N, S) from sums of weighted values and weights (..., N, S + 1); no weight gives zeros."""
    return sums[..., :-1] / (sums[..., -1:] + 1e-6)


def route_sums(routes: Tensor, values: Tensor, blocks: Blocks) -> Tensor:
    """Sums over blocks of routes (B, n, W, N) times values (B, n, W, S), and of routes: (B, n, N, S + 1)."""
    return (routes * blocks.inside).mT @ F.pad(values, (0, 1), value=1.0)


def hadamard(n: int) -> Tensor:
    """The orthonormal n x n Hadamard matrix, its own inverse (Sylvester's construction); n a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(n)


class Turn(Module):
    """x H over the last dimension, of CAPSULE_DIM channels; x itself where KOOPMAN_ROTATION is off."""

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.register_buffer("rotation", hadamard(h.capsule_dim) if h.koopman_rotation else None, persistent=False)

    rotation: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else x @ self.rotation.to(x.dtype)


class CausalConv(Module):
    """y_t = sum_k w_k x_{t-k} per channel, within the document; the state is the last SKC_CONV - 1 inputs."""

    kinds: ClassVar[dict[str, str]] = {"taps": "scalar"}

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.empty(count, width))

    def forward(self, x: Tensor, ctx: Ctx, tail: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, T, S), and the next tail: a copy, since a view would keep all of x in memory."""
        assert ctx.age is not None
        whole, taps, past = torch.cat((tail.to(x.dtype), x), 1), self.taps.to(x.dtype), len(self.taps) - 1
        y = x * taps[0]
        for k in range(1, past + 1):
            seen = (ctx.age >= k).unsqueeze(-1).to(x.dtype) * taps[k]
            y = torch.addcmul(y, whole[:, past - k :][:, : x.shape[1]], seen)
        return y, whole[:, x.shape[1] :].clone()


class Cache(NamedTuple):
    """Keys or values of what came before as KV_CACHE stores them."""

    codes: Tensor  # (B, S, Hkv, Dh) numbers, or int8; or (B, S, Hkv, Dh / 2) pairs of 4 bits
    scale: Tensor  # (B, S, Hkv, 1) float32, or nothing (B, S, Hkv, 0)

    def shrunk(self, start: int) -> Cache:
        """Without what came before `start`. A copy, or the whole history stays in memory, with strides that change."""
        return Cache(*(part[:, start:].clone(memory_format=torch.contiguous_format) for part in self))


def following(old: Tensor, new: Tensor) -> Tensor:
    """Both, one after the other, in the type of what is new: a state begins empty and in that of the weights."""
    return torch.cat((old.to(new.dtype), new), 1)


class Cacher(Module):
    """Between keys or values (B, T, Hkv, Dh) and a Cache: one scale for each token and head, the greatest number's.

    A number is off by at most half a step, max |x| / 254 or / 14. In a basis turned by a Hadamard matrix
    (TURBO_QUANT_KV) a few large channels are spread over all, and half a step is smaller.
    """

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.top = {"exact": 0, "int8": 127, "int4": 7}[h.kv_cache]
        turns = self.top > 0 and h.turbo_quant_kv
        self.register_buffer("rotation", hadamard(h.head_dim) if turns else None, persistent=False)

    rotation: Tensor | None

    def store(self, x: Tensor) -> Cache:
        if not self.top:
            return Cache(x, x[..., :0])
        x = x.float() if self.rotation is None else x.float() @ self.rotation.float()
        scale = (x.abs().amax(-1, keepdim=True) / self.top).clamp(min=1e-12)
        codes = (x / scale).round().clamp(-self.top, self.top).to(torch.int8)
        if self.top == 7:
            codes = (codes[..., ::2] << 4) | (codes[..., 1::2] & 15)
        return Cache(codes, scale)

    def read(self, cache: Cache, dtype: torch.dtype) -> Tensor:
        if not self.top:
            return cache.codes.to(dtype)
        codes = cache.codes
        if self.top == 7:  # arithmetic shifts bring the signs back
            codes = torch.stack((codes >> 4, (codes << 4) >> 4), -1).flatten(-2)
        x = codes.float() * cache.scale
        return (x if self.rotation is None else x @ self.rotation.float()).to(dtype)

    def add(self, old: Cache, x: Tensor) -> tuple[Tensor, Cache]:
        """All keys or values, new ones as they are, and the cache that holds them."""
        new = self.store(x)
        return following(self.read(old, x.dtype), x), Cache(*map(following, old, new))


class AttentionState(NamedTuple):
    """Keys, values and documents of what came before; S grows up to the window."""

    k: Cache
    v: Cache
    documents: Tensor  # (B, S)


def document_bounds(documents: Tensor) -> Tensor:
    """Where the documents of rows laid end to end begin and end, int32, rising to B T, for kernels of variable length.

    documents (B, T). As many as a batch of documents of 64 tokens would need, at least 256: a fixed length compiles
    once, and kernels begin a block for each that is not there. Tokens beyond the last bound belong to none.
    """
    rows, length = documents.shape
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    most = min(rows * length, max(256, rows * length // 64))
    return torch.searchsorted(starts.cumsum(0), torch.arange(1, most + 2, device=starts.device)).int()


def by_flash(package: Any, q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    """A FlashAttention package's kernel; of variable length where documents (B, T) bound what is seen.

    Tokens of too many documents get NaN: training leaves such a step out, and no score hides it.
    """
    ways = {"causal": True, "window_size": (window - 1 if window else -1, 0 if window else -1)}
    if documents is None:
        out = package.flash_attn_func(q, k, v, **ways)
        return out[0] if isinstance(out, tuple) else out
    bounds, flat, longest = document_bounds(documents), [x.flatten(0, 1) for x in (q, k, v)], q.shape[1]
    out = package.flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, **ways)
    out = out[0] if isinstance(out, tuple) else out
    beyond = torch.arange(len(out), device=out.device) >= bounds[-1]
    return out.masked_fill(beyond.view(-1, 1, 1), math.nan).view(q.shape)


def flash3(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    import flash_attn_interface

    return by_flash(flash_attn_interface, q, k, v, window, documents)


def flash2(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    import flash_attn

    return by_flash(flash_attn, q, k, v, window, documents)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Torch's attention on (B, T, H, Dh) tensors; mask (B or 1, 1, T, S), True where a key may be seen."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class Part(NamedTuple):
    """Queries start..stop and the keys first..last that they may see, all of them those from sure_from to sure_to."""

    start: int
    stop: int
    first: int
    last: int
    sure_from: int
    sure_to: int


class Ranges(NamedTuple):
    """Which keys queries may see: those from low up to, not including, high (B or 1, T); neither ever falls along T.

    And of the first M keys those where `front` is True: memory, which no part begins before.
    """

    low: Tensor
    high: Tensor
    parts: tuple[Part, ...]
    front: Tensor | None = None  # (B or 1, T, M) bool

    def hides(self, queries: slice, keys: slice) -> Tensor:
        """(B or 1, t, s) bool, True where a key is not seen; False of a query that sees none: `sees` mends that."""
        low, high = self.low[:, queries, None], self.high[:, queries, None]
        key = torch.arange(keys.start, keys.stop, device=low.device)
        hidden = ((key < low) | (key >= high)) & (low < high)
        if self.front is None:
            return hidden
        front = ~self.front[:, queries, keys]
        return torch.cat((front.expand(len(hidden), -1, -1), hidden[..., front.shape[-1] :]), -1)

    def read(self, keys: int) -> Tensor:
        """(B or 1, T, keys) bool, the keys that an attention by parts reads."""
        shape = (*torch.broadcast_shapes(self.low.shape, self.high.shape), keys)
        found = torch.zeros(shape, dtype=torch.bool, device=self.low.device)
        for part in self.parts:
            some, own = slice(part.start, part.stop), slice(part.first, part.last)
            found[:, some, own] = ~self.hides(some, own)
            found[:, some, part.sure_from : part.sure_to] = True
        found &= self.sees().unsqueeze(-1)
        if self.front is not None:
            found[..., : self.ahead] = self.front
        return found

    @property
    def ahead(self) -> int:
        """M."""
        return 0 if self.front is None else self.front.shape[-1]

    def of(self, part: Part, x: Tensor) -> Tensor:
        """A part's keys or values, memory first, of x (B, Hkv, S, Dh)."""
        own = x[:, :, part.first : part.last]
        return own if self.front is None else torch.cat((x[:, :, : self.ahead], own), 2)

    def sees(self) -> Tensor:
        """(B or 1, T) bool, whether a query sees a key."""
        return self.low < self.high

    def counted(self) -> Tensor:
        """(B or 1, T) int64, how many keys each query sees, counted in the masks."""
        found = []
        for part in self.parts:
            queries = slice(part.start, part.stop)
            found.append((~self.hides(queries, slice(part.first, part.last))).sum(-1) * self.sees()[:, queries])
        seen = torch.cat(found, 1)
        return seen if self.front is None else seen + self.front.sum(-1)

    def shares(self, q: Tensor, k: Tensor, part: Part) -> Tensor:
        """A part's softmax of q k^T (B, Hkv, t G, s), in at least float32; q (B, Hkv, t G, Dh), k as `of` gives it."""
        scores = q @ k.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        grid, shift = scores.unflatten(2, (part.stop - part.start, -1)), self.ahead - part.first
        own = ((part.first, part.sure_from, shift), (part.sure_to, part.last, shift))
        for first, last, shift in ((0, self.ahead, 0), *own):
            if first < last:
                hidden = self.hides(slice(part.start, part.stop), slice(first, last))
                grid[..., first + shift : last + shift].masked_fill_(hidden[:, None, :, None], -math.inf)
        return scores.softmax(-1)


RANGE_KEPT = 2**24  # shares of a layer that are kept for the backward pass; more are made again
RANGE_STEP = 128  # queries of a part on a CPU: their shares stay in its cache


def ranges_of(
    low: Tensor, high: Tensor, exact: bool, bounds: Callable[[int], tuple[int, int]], window: int = 0
) -> Ranges:
    """Ranges of queries in parts; query i sees at most keys bounds(i), and exactly those if `exact`.

    Elsewhere than on a CPU there are few parts: each is a piece of a graph to compile.
    """
    length = max(low.shape[1], high.shape[1])
    parts: list[Part] = []
    step = max(RANGE_STEP, -(-length // 16)) if low.device.type != "cpu" else min(RANGE_STEP, window or RANGE_STEP)
    for start in range(0, length, step):
        stop = min(length, start + step)
        (first, sure_to), (sure_from, last) = bounds(start), bounds(stop - 1)
        sure = (sure_from, sure_to) if exact and sure_from < sure_to else (first, first)
        parts.append(Part(start, stop, first, last, *sure))
    return Ranges(low, high, tuple(parts))


def by_groups(x: Tensor, groups: int) -> Tensor:
    """(B, T, H, Dh) as (B, groups, T H / groups, Dh), contiguous: a group's heads read the same keys."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3).contiguous()


def by_heads(x: Tensor, length: int) -> Tensor:
    """The inverse."""
    return x.unflatten(2, (length, -1)).transpose(1, 2).flatten(2, 3)


class RangedAttentionFunction(torch.autograd.Function):
    """Softmax attention of queries over ranges of keys, zero for a query that sees none, by matrix products.

    q (B, T, H, Dh), k and v (B, S, Hkv, Dh). Also returns, if `blocks` describes them, the importance of blocks for
    NSA's choice (B, Hkv, T, J) float32. On a CPU with bf16 and a few hundred tokens torch's fused kernel takes twice as
    long. dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = dS K, dK = dS^T Q; P is kept if there is little of it, else made
    again as in FlashAttention (Dao et al. 2022).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, front: Any, how: tuple
    ) -> tuple[Tensor, Tensor]:
        parts, blocks = how
        ranges, ctx.scale, groups = Ranges(low, high, parts, front), q.shape[-1] ** -0.5, k.shape[2]
        ctx.parts, pairs = parts, sum((part.stop - part.start) * (part.last - part.first) for part in parts)
        keeps, (length, heads) = pairs * q.shape[0] * q.shape[2] <= RANGE_KEPT, q.shape[1:3]
        q, k, v = by_groups(q * ctx.scale, groups), by_groups(k, groups), by_groups(v, groups)
        kept: list[Tensor] = []
        y, importance = torch.empty_like(q), [q.new_empty(0, dtype=torch.float32)]
        for part in parts:
            some = slice(part.start * heads // groups, part.stop * heads // groups)
            p = ranges.shares(q[:, :, some], ranges.of(part, k), part)
            if blocks is not None:
                importance = [*importance, importance_of(p, ranges.sees()[:, part.start : part.stop], *blocks)]
            p = p.to(v.dtype)
            y[:, :, some] = p @ ranges.of(part, v)
            kept += [p] if keeps else []
        y = by_heads(y, length) * ranges.sees()[:, :, None, None]
        ctx.save_for_backward(q, k, v, y, low, high, front, *kept)
        found = torch.cat(importance[1:], 2) if blocks is not None else importance[0]
        ctx.mark_non_differentiable(found)
        return y, found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        q, k, v, y, low, high, front, *kept = ctx.saved_tensors
        ranges, (length, heads), groups = Ranges(low, high, ctx.parts, front), y.shape[1:3], k.shape[1]
        grad = grad * ranges.sees()[:, :, None, None]
        dy, along = by_groups(grad, groups), by_groups(torch.linalg.vecdot(grad, y).unsqueeze(-1), groups)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, part in enumerate(ctx.parts):
            some = slice(part.start * heads // groups, part.stop * heads // groups)
            keys = ranges.of(part, k)
            p = kept[number] if kept else ranges.shares(q[:, :, some], keys, part).to(v.dtype)
            ds = (dy[:, :, some] @ ranges.of(part, v).mT).sub_(along[:, :, some]).mul_(p)
            dq[:, :, some] = ds @ keys
            for total, found in ((dk, ds.mT @ q[:, :, some]), (dv, p.mT @ dy[:, :, some])):
                total[:, :, part.first : part.last] += found[:, :, ranges.ahead :]
                if ranges.ahead:
                    total[:, :, : ranges.ahead] += found[:, :, : ranges.ahead]
        return by_heads(dq * ctx.scale, length), dk.transpose(1, 2), dv.transpose(1, 2), None, None, None, None


def ranged_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, blocks: Any = None) -> tuple[Tensor, Tensor]:
    """RangedAttentionFunction."""
    return RangedAttentionFunction.apply(q, k, v, ranges.low, ranges.high, ranges.front, (ranges.parts, blocks))


def block_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Attention by matrix products, causal or to all keys."""
    place, keys = torch.arange(q.shape[1], device=q.device).unsqueeze(0), k.shape[1]
    high = place + 1 if causal else torch.full_like(place, keys)
    return ranged_attention(q, k, v, ranges_of(0 * place, high, True, lambda i: (0, i + 1 if causal else keys)))[0]


def importance_of(p: Tensor, seen: Tensor, block: int, stride: int, size: int, count: int, skip: int) -> Tensor:
    """How important `count` blocks of `size` tokens are, (B, Hkv, t, count), by shares p of blocks (B, Hkv, t G, s).

    The sum of the shares of compressed blocks, each times the part of it that lies in the block, over the group's heads
    (Yuan et al. 2025, equation 9 read 0-based); `seen` (B or 1, t) says which queries see any. The first `skip` shares
    are memory's.
    """
    p = p[..., skip:]
    p = (p.unflatten(2, (seen.shape[1], -1)).sum(3) * seen[:, None, :, None]).float()
    starts = torch.arange(0, size, stride, device=p.device)
    inside = (size - starts).clamp(max=block).float() / block
    grid = F.pad(p, (0, count * len(starts) - p.shape[-1])).unflatten(-1, (count, -1))
    here = (grid * inside).sum(-1)  # of blocks that begin in it; the rest of their shares is the next one's
    return here + F.pad((grid.sum(-1) - here).clamp(min=0), (1, 0))[..., :-1]


# Causal attention of (B, T, H, Dh) tensors within a window (0: all) and documents (B, T) or None, without cache.
ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]] = {
    "fa3": flash3,
    "fa2": flash2,
    "blocks": lambda q, k, v, window, documents: block_attention(q, k, v),
    "sdpa": lambda q, k, v, window, documents: sdpa(q, k, v, None, True),  # windows, documents take the masked path
}
ATTENTION_PACKAGES = {"fa3": "flash_attn_interface", "fa2": "flash_attn"}


def import_problem(package: str) -> str:
    """Why a package cannot be imported (one that was built for another torch is there and yet fails), or nothing."""
    try:
        import_module(package)
    except (ImportError, OSError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def kernel_problem(h: Hyperparameters, rt: Runtime) -> str:
    """What NSA's kernels need and do not have here, or nothing."""
    if not HAS_TRITON or (rt.device.type != "cuda" and isinstance(scan_kernel, triton.JITFunction)):  # not interpreted
        return f"the package triton and a CUDA device, or TRITON_INTERPRET=1; this is {rt.device.type}"
    if rt.dtype == torch.float64:
        return "PRECISION=bf16 or fp32"
    if h.head_dim & (h.head_dim - 1) or not 16 <= h.head_dim <= 128:
        return f"heads of 16, 32, 64 or 128, not {h.head_dim}"
    if h.nsa_select_block > 128:
        return f"NSA_SELECT_BLOCK of at most 128, not {h.nsa_select_block}"
    if h.num_heads > 16 * h.num_kv_heads:
        return f"at most 16 heads for each of NUM_KV_HEADS, not {h.num_heads // h.num_kv_heads}"
    return ""


def choose_sparse(h: Hyperparameters, rt: Runtime) -> tuple[str, str]:
    """The backend of sparse attention and why: what NSA_FASTEST has for this GPU, else gather. Raises UserError."""
    if h.nsa_strict and rt.compile:
        raise UserError("NSA_STRICT=1 needs COMPILE=0")
    name, problem = h.nsa_impl, kernel_problem(h, rt)
    if name == "triton" and problem:
        raise UserError(f"NSA_IMPL=triton needs {problem}; try NSA_IMPL=auto")
    if name != "auto":
        return name, "requested" + "; near keys behind memory by gather" * (name == "triton" and h.rmt_segment > 0)
    fastest = NSA_FASTEST.get(torch.cuda.get_device_capability(rt.device)) if rt.device.type == "cuda" else None
    if fastest == "triton" and problem:
        return "gather", f"kernels need {problem}"
    return (fastest, "measured to be the fastest here") if fastest else ("gather", "nothing is measured to be faster")


def with_backends(h: Hyperparameters, rt: Runtime) -> tuple[Hyperparameters, str]:
    """The configuration with the backends that it runs on, and in words which and why. Raises UserError."""
    backend, why = choose_attention(h, rt)
    h, text = dataclasses.replace(h, attn_impl=backend), f"{backend} ({why})"
    if "nsa" not in h.mixers:
        return h, text
    backend, why = choose_sparse(h, rt)
    return dataclasses.replace(h, nsa_impl=backend), f"{text} sparse attention:{backend} ({why})"


def choose_attention(h: Hyperparameters, rt: Runtime) -> tuple[str, str]:
    """The attention backend of a run and why: FlashAttention 3, then 2, then SDPA; blocks on a CPU. Raises UserError.

    FlashAttention needs bf16 on CUDA, and serves full and windowed causal attention, with DOC_MASK by its kernels of
    variable length; blocks serve full attention over at most 1,024 tokens, since they keep a number for each pair.
    """
    on_gpu = rt.autocast and rt.device.type == "cuda"
    if PACKAGED:
        known = [name for name in ATTENTION_PACKAGES if on_gpu and name in ATTENTION]
        return next((name for name in known if not import_problem(ATTENTION_PACKAGES[name])), "sdpa"), "packaged"
    short = not h.attn_window and not h.doc_mask and max(h.train_seq_len, h.eval_window) <= 1024
    if h.attn_impl == "blocks" and not short:
        raise UserError("ATTN_IMPL=blocks is for ATTN_WINDOW=0, DOC_MASK=0, at most 1024 tokens; try ATTN_IMPL=auto")
    if h.attn_impl != "auto":
        package = ATTENTION_PACKAGES.get(h.attn_impl)
        problem = import_problem(package) or ("" if on_gpu else "no bf16 on CUDA here") if package else ""
        if problem:
            raise UserError(
                f"ATTN_IMPL={h.attn_impl} needs the package {package} and bf16 on CUDA ({problem}); try ATTN_IMPL=auto"
            )
        return h.attn_impl, "requested"
    if rt.autocast and rt.device.type == "cpu" and short:
        return "blocks", "bf16 and short windows on a CPU"
    if not on_gpu:
        return "sdpa", "no bf16 on CUDA"
    hopper, problems = torch.cuda.get_device_capability(rt.device)[0] == 9, list[str]()
    for name, package in ATTENTION_PACKAGES.items():
        problem = import_problem(package) if name != "fa3" or hopper else "for compute capability 9 only"
        if not problem:
            return name, f"{package} is installed"
        problems.append(f"{package}: {problem}")
    return "sdpa", "; ".join(problems)


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """y (B, T, H, Dh) less its part along the token's own value v (B, T, Hkv, Dh), per head (XSA); of v = 0 none."""
    heads = y.unflatten(2, (v.shape[2], -1))  # (B, T, Hkv, H / Hkv, Dh)
    own = F.normalize(v, dim=-1, eps=1e-6).unsqueeze(3)
    return (heads - (heads * own).sum(-1, keepdim=True) * own).flatten(2, 3)


class Attention(Module):
    """Causal grouped-query attention with partial rotary positions (Ainslie et al. 2023; Su et al. 2021).

    Queries and keys are RMS-normalized per head, queries times a learned gain. With VALUE_RESIDUAL, later layers use
    v <- s v + (1 - s) v0, s = sigmoid(learned), v0 the first attention layer's values (Zhou et al. 2024). VALUE_EMBED's
    layers add a learned multiple of the token's row in one table that they share.
    """

    kinds: ClassVar[dict[str, str]] = dict.fromkeys(("q_gain", "v_mix", "v_rows"), "scalar")

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = h.num_heads, h.num_kv_heads, h.head_dim
        self.window, self.doc_mask, self.qk_norm = h.attn_window, h.doc_mask, h.qk_norm
        self.backend = "sdpa" if h.attn_impl == "auto" else h.attn_impl
        self.qkv = Linear(name + ".qkv", h.model_dim, (h.num_heads + 2 * h.num_kv_heads) * h.head_dim)
        projection = NormedLinear if h.proj_norm else Linear
        self.proj = projection(name + ".proj", h.num_heads * h.head_dim, h.model_dim)
        self.q_gain = nn.Parameter(torch.empty(h.num_heads))
        places = [i for i, kind in enumerate(h.mixers) if kind == "attn"]
        blocks = h.shared_blocks or h.num_layers
        later = [place for place in places[1:] if place % blocks == layer % blocks]
        self.value_residual = h.value_residual
        self.v_mix = nn.Parameter(torch.empty(1)) if h.value_residual and later else None
        valued = [*places[: h.value_embed], *places[max(0, len(places) - h.value_embed) :]]
        here = any(place % blocks == layer % blocks for place in valued)
        self.v_rows = nn.Parameter(torch.empty(1)) if h.value_embed and here else None
        self.xsa = h.xsa_layers > 0 and layer in places[len(places) - min(h.xsa_layers, len(places)) :]
        self.gate = Linear(name + ".gate", h.attn_gate, h.num_heads, "scalar") if h.attn_gate else None
        self.carries = h.carries
        if h.carries:
            self.cacher = Cacher(h)

    def init_state(self, batch: int, dtype: torch.dtype) -> AttentionState:
        empty = self.cacher.store(self.q_gain.new_zeros((batch, 0, self.kv_heads, self.head_dim), dtype=dtype))
        return AttentionState(empty, empty, self.q_gain.new_zeros((batch, 0), dtype=torch.int64))

    def forward(self, x: Tensor, ctx: Ctx, state: AttentionState | None) -> Out:
        qkv = self.qkv(x, ctx).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 Hkv, Dh)
        q, k, v = QKVFunction.apply(qkv, self.q_gain, *ctx.rotary, self.qk_norm)
        v0 = (v if ctx.v0 is None else ctx.v0) if self.value_residual else None
        if self.v_mix is not None and ctx.v0 is not None:
            share = torch.sigmoid(self.v_mix).to(v.dtype)
            v = share * v + (1 - share) * ctx.v0
        if self.v_rows is not None:
            v = v + self.v_rows.to(v.dtype) * ctx.memory["values"].to(v.dtype).view(v.shape)
        y, state = self.attend(q, k, v, ctx, state)
        y = without_own_value(y, v) if self.xsa else y
        gate = None
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(x[..., : self.gate.weight.shape[1]], ctx))
            y = y * (2 * gate).unsqueeze(-1).to(y.dtype)
        return Out(self.proj(y.flatten(-2), ctx), state, v0, metrics=watched(ctx, gate=gate))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState | None]:
        """Attend to the state's keys and the new ones; the new state keeps what a later query may still see."""
        masks = self.window or self.doc_mask if self.backend == "sdpa" else self.doc_mask and ctx.writes
        if (state is None or not self.carries) and not masks:
            writes, documents = (0, ctx.documents) if self.doc_mask else (ctx.writes, None)  # both take the mask below
            text, last = slice(k.shape[1] - writes), q[:, k.shape[1] - writes :]  # torch is slow for these few
            y = ATTENTION[self.backend](q[:, text], k[:, text], v[:, text], self.window, documents)
            return torch.cat((y, block_attention(last, k, v, causal=False)), 1) if writes else y, None
        if state is None or not self.carries:
            return sdpa(q, k, v, self.mask(ctx.documents, ctx.documents, ctx.writes), False), None
        (k, keys), (v, values) = self.cacher.add(state.k, k), self.cacher.add(state.v, v)
        documents = torch.cat((state.documents, ctx.documents), 1)
        y = sdpa(q, k, v, self.mask(ctx.documents, documents, ctx.writes), False)
        start = max(0, k.shape[1] - self.window + 1) if self.window else 0
        keys, values = (keys.shrunk(start), values.shrunk(start)) if start else (keys, values)
        return y, AttentionState(keys, values, documents[:, start:].contiguous())

    def mask(self, documents: Tensor, key_documents: Tensor, writes: int) -> Tensor:
        """(B or 1, 1, T, S) bool: not later, within the window, in the same document; the last `writes` see later."""
        length, keys = documents.shape[1], key_documents.shape[1]
        query = torch.arange(keys - length, keys, device=documents.device).unsqueeze(1)
        key = torch.arange(keys, device=documents.device)
        seen = (key <= query) | (query >= keys - writes)
        if self.window:
            seen = seen & (key > query - self.window)
        if self.doc_mask:
            seen = seen & (documents.unsqueeze(2) == key_documents.unsqueeze(1))
        return seen.unsqueeze(-3) if seen.ndim == 3 else seen[None, None]


class SelectedAttentionFunction(torch.autograd.Function):
    """Softmax attention of each query over its own blocks of keys, gathered some queries at a time.

    q (B, T, H, Dh), k and v (B, S, Hkv, Dh), chosen (B, Hkv, T, n) numbers of blocks of `size` keys, -1: none; a query
    sees those of their keys from low up to, not including, high (B or 1, T). The block of key high - 1 is chosen.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, low: Tensor, high: Tensor, size: int
    ) -> Tensor:
        step = RANGE_STEP if q.device.type == "cpu" else max(RANGE_STEP, -(-q.shape[1] // 16))
        ctx.sizes, ctx.scale, ctx.length = (k.shape[2], size, step), q.shape[-1] ** -0.5, k.shape[1]
        q = (q * ctx.scale).unflatten(2, (k.shape[2], -1)).transpose(1, 2).contiguous()  # (B, Hkv, T, G, Dh)
        k, v = (lay_keys(x, size) for x in (k, v))  # (B Hkv J, size Dh)
        y = torch.empty_like(q)
        for start in range(0, q.shape[2], step):
            some = slice(start, start + step)
            rows, hidden = chosen_keys(chosen[:, :, some], low[:, some], high[:, some], len(k), size)
            keys, values = (x.index_select(0, rows).view(*hidden.shape, -1) for x in (k, v))
            y[:, :, some] = shares_of_few(q[:, :, some], keys, hidden).to(v.dtype) @ values
        ctx.save_for_backward(q, k, v, y, chosen, low, high)
        return y.transpose(1, 2).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        q, k, v, y, chosen, low, high = ctx.saved_tensors
        groups, size, step = ctx.sizes
        dy = grad.unflatten(2, (groups, -1)).transpose(1, 2).contiguous()
        along = torch.linalg.vecdot(dy, y).unsqueeze(-1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, q.shape[2], step):
            some = slice(start, start + step)
            rows, hidden = chosen_keys(chosen[:, :, some], low[:, some], high[:, some], len(k), size)
            keys, values = (x.index_select(0, rows).view(*hidden.shape, -1) for x in (k, v))
            p = shares_of_few(q[:, :, some], keys, hidden).to(v.dtype)
            ds = (dy[:, :, some] @ values.mT).sub_(along[:, :, some]).mul_(p)
            dq[:, :, some] = ds @ keys
            dk.index_add_(0, rows, (ds.mT @ q[:, :, some]).view(len(rows), -1))
            dv.index_add_(0, rows, (p.mT @ dy[:, :, some]).view(len(rows), -1))
        dk, dv = (pick_keys(x, grad.shape[0], groups, size)[:, : ctx.length] for x in (dk, dv))
        return (dq * ctx.scale).transpose(1, 2).flatten(2, 3), dk, dv, None, None, None, None


def lay_keys(x: Tensor, size: int) -> Tensor:
    """Keys (B, S, Hkv, Dh) as blocks (B Hkv J, size Dh), the last one filled up with zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).transpose(1, 2).contiguous()
    return x.view(-1, size * x.shape[-1])


def pick_keys(x: Tensor, rows: int, groups: int, size: int) -> Tensor:
    """The inverse, (B, J size, Hkv, Dh)."""
    return x.view(rows, groups, len(x) // (rows * groups) * size, -1).transpose(1, 2)


def chosen_keys(chosen: Tensor, low: Tensor, high: Tensor, blocks: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows among all `blocks` (B Hkv t n), and which of their keys are not seen, (B, Hkv, t, n size) bool."""
    rows, groups = chosen.shape[:2]
    each = torch.arange(0, blocks, blocks // (rows * groups), device=chosen.device).view(rows, groups, 1, 1)
    place = chosen.unsqueeze(-1) * size + torch.arange(size, device=chosen.device)
    seen = (place >= low[:, None, :, None, None]) & (place < high[:, None, :, None, None])
    return (chosen.clamp(min=0) + each).flatten(), ~(seen & (chosen >= 0).unsqueeze(-1)).flatten(-2)


def shares_of_few(q: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """Softmax of q keys^T (B, Hkv, t, G, s); q (B, Hkv, t, G, Dh), keys (B, Hkv, t, s, Dh), hidden (B, Hkv, t, s)."""
    scores = q @ keys.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill_(hidden.unsqueeze(-2), -math.inf).softmax(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges) -> Tensor:
    """RangedAttentionFunction by torch's attention with a mask for all pairs."""
    mask = ~ranges.hides(slice(0, q.shape[1]), slice(0, k.shape[1]))
    return sdpa(q, k, v, mask[:, None], False) * ranges.sees()[:, :, None, None].to(q.dtype)


def masked_compressed(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, blocks: tuple) -> tuple[Tensor, Tensor]:
    """The same with the importance of blocks."""
    length, groups = q.shape[1], k.shape[2]
    whole, scale = Part(0, length, 0, k.shape[1], 0, 0), q.shape[-1] ** -0.5
    with torch.no_grad():
        p = ranges.shares(by_groups(q * scale, groups), by_groups(k, groups), whole)
        importance = importance_of(p, ranges.sees(), *blocks)
    return masked_attention(q, k, v, ranges) if k.shape[1] else torch.zeros_like(q), importance


def masked_selected(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, ranges: Ranges, size: int) -> Tensor:
    """SelectedAttentionFunction by torch's attention with a mask for all pairs and heads."""
    blocks = -(-k.shape[1] // size)
    taken = (chosen.unsqueeze(-1) == torch.arange(blocks, device=q.device)).any(-2)  # (B, Hkv, T, J)
    mask = taken.repeat_interleave(size, -1)[..., : k.shape[1]]
    mask = mask & ~ranges.hides(slice(0, q.shape[1]), slice(0, k.shape[1]))[:, None]
    return sdpa(q, k, v, mask.repeat_interleave(q.shape[2] // k.shape[2], 1), False)


# Triton kernels of the same attentions, after FlashAttention (Dao et al. 2022). The heads of a group read the same
# keys, so a program packs them with some queries into one matrix: row r is query r // PADDED, head r % PADDED of the
# group, PADDED being the GROUP's heads rounded up to a power of two. Scores are multiplied by log2(e), softmax is in
# base 2; matrix products take the inputs' type (bf16) and add up in float32. A forward pass leaves the logarithm of
# each row's sum (lse), with which a backward pass makes the shares again: a kernel for dQ, one for dK and dV. Each
# number is written by the program that owns it: there are no atomics, and the result is the same each time.
if HAS_TRITON:

    @triton.jit
    def product(a, b, total):
        return tl.dot(a, b, total, input_precision="tf32x3")  # of float32 nearly float32; bf16 is not touched by it

    @triton.jit
    def load_rows(x, place, there, WIDTH: tl.constexpr):
        return tl.load(x + place[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=there[:, None], other=0.0)

    @triton.jit
    def store_rows(x, place, there, value, WIDTH: tl.constexpr):
        tl.store(x + place[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], value, mask=there[:, None])

    @triton.jit
    def packed_rows(start, length, groups, GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
        """Queries from `start` on: of each row its query, whether it exists, its place in (B, T, H)."""
        token, head = start + tl.arange(0, ROWS) // PADDED, tl.arange(0, ROWS) % PADDED
        base = tl.program_id(2).to(tl.int64) * length
        return token, (token < length) & (head < GROUP), ((base + token) * groups + tl.program_id(1)) * GROUP + head

    @triton.jit
    def row_ranges(low, high, token, length):
        there = token < length
        return tl.load(low + token, mask=there, other=0), tl.load(high + token, mask=there, other=0)

    @triton.jit
    def tile_ranges(low, high, start, stop):
        """Of queries start..stop: the first key that one sees, those that all see (from, to), the last one's end."""
        return tl.load(low + start), tl.load(low + stop - 1), tl.load(high + start), tl.load(high + stop - 1)

    @triton.jit
    def softmax_step(scores, values, peak, total, found):
        """One tile of a softmax over many (Milakov & Gimelshein 2018): the rows' maximum, sum and weighted values."""
        higher = tl.maximum(peak, tl.max(scores, 1))  # finite from the start on, so a row may see nothing
        p, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(peak - higher)
        found = product(p.to(values.dtype), values, found * shrink[:, None])
        return higher, total * shrink + tl.sum(p, 1), found

    @triton.jit
    def query_step(scores, keys, values, dy, lse, along, found):
        """dS K of one tile."""
        p = tl.exp2(scores - lse[:, None])
        ds = p * (product(dy, values.T, tl.zeros_like(scores)) - along[:, None])
        return product(ds.to(keys.dtype), keys, found)

    @triton.jit
    def key_step(scores, values, queries, dy, lse, along, dk, dv):
        """dS^T Q and P^T dO of one tile of queries, all matrices turned: scores (keys, rows)."""
        p = tl.exp2(scores - lse[None, :])
        ds = p * (product(values, dy.T, tl.zeros_like(scores)) - along[None, :])
        return product(ds.to(queries.dtype), queries, dk), product(p.to(dy.dtype), dy, dv)

    @triton.jit
    def row_gradients(grad, y, along, place, there, WIDTH: tl.constexpr):
        """dO and its inner product with O, which is also kept for the kernel of dK and dV."""
        dy = load_rows(grad, place, there, WIDTH)
        inner = tl.sum(dy.to(tl.float32) * load_rows(y, place, there, WIDTH).to(tl.float32), 1)
        tl.store(along + place, inner, mask=there)
        return dy, inner

    @triton.jit
    def ranged_kernel(
        q, k, v, low, high, y, lse, length, keys, groups, span, scale,
        GROUP: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """Attention over ranges, grid (tiles of queries, Hkv, B), the last queries first: they tend to see the most.

        4 Dh FLOPs for each pair of a query's head and a key; K and V are read once for ROWS rows, 4 Dh bytes a key:
        ROWS FLOPs a byte, of L2 mostly. So matrix units bound it, and at Dh = 64 as much the exponentials.
        """
        row, tile = tl.program_id(2).to(tl.int64), tl.num_programs(0) - 1 - tl.program_id(0)
        start = tile * (ROWS // PADDED)
        token, there, place = packed_rows(start, length, groups, GROUP, PADDED, ROWS)
        low, high, queries = low + row * span, high + row * span, load_rows(q, place, there, WIDTH)
        begin, end = row_ranges(low, high, token, length)
        first, sure, unsure, last = tile_ranges(low, high, start, tl.minimum(start + ROWS // PADDED, length))
        peak, total = tl.full((ROWS,), -1e30, tl.float32), tl.zeros((ROWS,), tl.float32)
        found = tl.zeros((ROWS, WIDTH), tl.float32)
        for at in range(first, last, KEYS):
            key = at + tl.arange(0, KEYS)
            there_key, place_key = key < keys, (row * keys + key) * groups + tl.program_id(1)
            scores = product(queries, load_rows(k, place_key, there_key, WIDTH).T, tl.zeros((ROWS, KEYS), tl.float32))
            scores *= scale
            if (at < sure) | (at + KEYS > unsure):
                seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            values = load_rows(v, place_key, there_key, WIDTH)
            peak, total, found = softmax_step(scores, values, peak, total, found)
        total = tl.where(total == 0, 1.0, total)
        store_rows(y, place, there, found / total[:, None], WIDTH)
        tl.store(lse + place, peak + tl.log2(total), mask=there)

    @triton.jit
    def ranged_query_kernel(
        q, k, v, low, high, y, lse, grad, along, dq, length, keys, groups, span, scale,
        GROUP: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """dQ of ranged_kernel and rowsum(dO O), by the same loop: 6 Dh FLOPs a pair for the same bytes."""
        row, tile = tl.program_id(2).to(tl.int64), tl.num_programs(0) - 1 - tl.program_id(0)
        start = tile * (ROWS // PADDED)
        token, there, place = packed_rows(start, length, groups, GROUP, PADDED, ROWS)
        low, high, queries = low + row * span, high + row * span, load_rows(q, place, there, WIDTH)
        dy, inner = row_gradients(grad, y, along, place, there, WIDTH)
        sums = tl.load(lse + place, mask=there, other=float("inf"))
        begin, end = row_ranges(low, high, token, length)
        first, sure, unsure, last = tile_ranges(low, high, start, tl.minimum(start + ROWS // PADDED, length))
        found = tl.zeros((ROWS, WIDTH), tl.float32)
        for at in range(first, last, KEYS):
            key = at + tl.arange(0, KEYS)
            there_key, place_key = key < keys, (row * keys + key) * groups + tl.program_id(1)
            k_tile, v_tile = load_rows(k, place_key, there_key, WIDTH), load_rows(v, place_key, there_key, WIDTH)
            scores = product(queries, k_tile.T, tl.zeros((ROWS, KEYS), tl.float32)) * scale
            if (at < sure) | (at + KEYS > unsure):
                seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            found = query_step(scores, k_tile, v_tile, dy, sums, inner, found)
        store_rows(dq, place, there, found * (scale * 0.6931471805599453), WIDTH)

    @triton.jit
    def ranged_key_kernel(
        q, k, v, low, high, lse, grad, along, seers, dk, dv, length, keys, groups, span, scale, tiles, splits,
        GROUP: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """A split's part of dK and dV, grid (tiles x splits, Hkv, B): the queries that see a tile are neighbours.

        8 Dh FLOPs a pair; q, dO and two numbers a row are read once for KEYS keys, 4 Dh bytes a row: 2 KEYS FLOPs a
        byte. Few keys and many queries (compressed keys) leave too few tiles, hence splits: dk and dv are (splits, B,
        S, Hkv, Dh) float32. `seers` (B, tiles, 4): the first query that sees a key, those that see all, the end.
        """
        row, tile, split = tl.program_id(2).to(tl.int64), tl.program_id(0) % tiles, tl.program_id(0) // tiles
        key = tile * KEYS + tl.arange(0, KEYS)
        there_key, place_key = key < keys, (row * keys + key) * groups + tl.program_id(1)
        k_tile, v_tile = load_rows(k, place_key, there_key, WIDTH), load_rows(v, place_key, there_key, WIDTH)
        seers += (row * tiles + tile) * 4
        begin, sure, unsure, end = tl.load(seers), tl.load(seers + 1), tl.load(seers + 2), tl.load(seers + 3)
        share = tl.cdiv(tl.cdiv(end - begin, ROWS // PADDED), splits) * (ROWS // PADDED)
        begin += split * share
        dk_tile, dv_tile = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
        for start in range(begin, tl.minimum(end, begin + share), ROWS // PADDED):
            token, there, place = packed_rows(start, length, groups, GROUP, PADDED, ROWS)
            queries, dy = load_rows(q, place, there, WIDTH), load_rows(grad, place, there, WIDTH)
            sums, inner = tl.load(lse + place, mask=there, other=float("inf")), tl.load(along + place, there, 0.0)
            scores = product(k_tile, queries.T, tl.zeros((KEYS, ROWS), tl.float32)) * scale
            if (start < sure) | (start + ROWS // PADDED > unsure):
                first, last = row_ranges(low + row * span, high + row * span, token, length)
                seen = (key[:, None] >= first[None, :]) & (key[:, None] < last[None, :])
                scores = tl.where(seen, scores, float("-inf"))
            dk_tile, dv_tile = key_step(scores, v_tile, queries, dy, sums, inner, dk_tile, dv_tile)
        place_key += split.to(tl.int64) * tl.num_programs(2) * keys * groups
        store_rows(dk, place_key, there_key, dk_tile * (scale * 0.6931471805599453), WIDTH)
        store_rows(dv, place_key, there_key, dv_tile, WIDTH)

    @triton.jit
    def importance_kernel(
        q, k, lse, low, high, importance, length, keys, groups, span, scale, count,
        BLOCK: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
        GROUP: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """importance_of by the forward pass's lse, grid (tiles of queries, Hkv, B); where nothing is seen it stays 0.

        A tile is the compressed blocks (SIZE / STRIDE, padded to SLOTS) of BLOCKS selection blocks. 2 Dh FLOPs a pair;
        of the bytes most are those written, 4 a query, group and selection block: 1 for 2 Dh FLOPs at 16 heads.
        """
        EACH: tl.constexpr = SIZE // STRIDE
        TIME: tl.constexpr = ROWS // PADDED
        row, start = tl.program_id(2).to(tl.int64), (tl.num_programs(0) - 1 - tl.program_id(0)) * TIME
        token, there, place = packed_rows(start, length, groups, GROUP, PADDED, ROWS)
        low, high, queries = low + row * span, high + row * span, load_rows(q, place, there, WIDTH)
        sums = tl.load(lse + place, mask=there, other=float("inf"))
        begin, end = row_ranges(low, high, token, length)
        first, sure, unsure, last = tile_ranges(low, high, start, tl.minimum(start + TIME, length))
        number, slot = tl.arange(0, BLOCKS * SLOTS) // SLOTS, tl.arange(0, BLOCKS * SLOTS) % SLOTS
        inside = tl.minimum(SIZE - slot * STRIDE, BLOCK).to(tl.float32) / BLOCK  # of it in the block where it begins
        some, block = start + tl.arange(0, TIME), tl.arange(0, BLOCKS)
        out = ((row * groups + tl.program_id(1)) * length + some)[:, None] * count
        carry = tl.zeros((TIME,), tl.float32)
        for at in range(first // EACH, tl.where(first < last, (last - 1) // EACH + 2, 0), BLOCKS):
            key = (at + number) * EACH + slot
            keys_tile = load_rows(k, (row * keys + key) * groups + tl.program_id(1), key < keys, WIDTH)
            p = product(queries, keys_tile.T, tl.zeros((ROWS, BLOCKS * SLOTS), tl.float32)) * scale - sums[:, None]
            if (at * EACH < sure) | ((at + BLOCKS) * EACH > unsure) | (SLOTS > EACH):
                seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None]) & (slot < EACH)[None, :]
                p = tl.where(seen, p, float("-inf"))
            p = tl.sum(tl.reshape(tl.exp2(p), (TIME, PADDED, BLOCKS * SLOTS)), 1)  # (TIME, keys)
            own = tl.sum(tl.reshape(p * inside[None, :], (TIME, BLOCKS, SLOTS)), 2)
            after = tl.sum(tl.reshape(p * (1 - inside)[None, :], (TIME, BLOCKS, SLOTS)), 2)
            before = tl.gather(after, tl.broadcast_to(tl.maximum(block - 1, 0)[None, :], (TIME, BLOCKS)), 1)
            before = tl.where((block == 0)[None, :], carry[:, None], before)
            carry = tl.sum(tl.where((block == BLOCKS - 1)[None, :], after, 0.0), 1)
            kept = (some < length)[:, None] & (at + block < count)[None, :]
            tl.store(importance + out + at + block[None, :], own + before, mask=kept)

    @triton.jit
    def chosen_keys_of(chosen, begin, end, SIZE: tl.constexpr, KEYS: tl.constexpr):
        """Keys (KEYS,) of a block, -1: none, and which of them a query sees; KEYS is SIZE padded."""
        slot = tl.arange(0, KEYS)
        key = tl.load(chosen) * SIZE + slot  # of no block below 0, and so below `begin`
        return key, (key >= begin) & (key < end) & (slot < SIZE)

    @triton.jit
    def selected_kernel(
        q, k, v, chosen, low, high, y, lse, length, keys, groups, span, scale, count,
        GROUP: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """Attention over chosen blocks, grid (T, Hkv, B), a program for a query and its group's heads.

        4 Dh G FLOPs for each key, whose K and V are 4 Dh bytes: G FLOPs a byte, so L2's bandwidth is the bound: count
        SIZE 4 Dh bytes a query and group (256 kB at 16 x 64 x 64). Neighbours run at once and share many blocks.
        """
        row, token = tl.program_id(2).to(tl.int64), tl.program_id(0)
        _, there, place = packed_rows(token, length, groups, GROUP, PADDED, PADDED)
        queries = load_rows(q, place, there, WIDTH)
        begin, end = tl.load(low + row * span + token), tl.load(high + row * span + token)
        chosen += ((row * groups + tl.program_id(1)) * length + token) * count
        peak, total = tl.full((PADDED,), -1e30, tl.float32), tl.zeros((PADDED,), tl.float32)
        found = tl.zeros((PADDED, WIDTH), tl.float32)
        for i in range(count):
            key, seen = chosen_keys_of(chosen + i, begin, end, SIZE, KEYS)
            place_key = (row * keys + key) * groups + tl.program_id(1)
            scores = product(queries, load_rows(k, place_key, seen, WIDTH).T, tl.zeros((PADDED, KEYS), tl.float32))
            scores = tl.where(seen[None, :], scores * scale, float("-inf"))
            peak, total, found = softmax_step(scores, load_rows(v, place_key, seen, WIDTH), peak, total, found)
        total = tl.where(total == 0, 1.0, total)
        store_rows(y, place, there, found / total[:, None], WIDTH)
        tl.store(lse + place, peak + tl.log2(total), mask=there)

    @triton.jit
    def selected_query_kernel(
        q, k, v, chosen, low, high, y, lse, grad, along, dq, length, keys, groups, span, scale, count,
        GROUP: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """dQ of selected_kernel and rowsum(dO O), by the same loop: 6 Dh G FLOPs a key for the same bytes."""
        row, token = tl.program_id(2).to(tl.int64), tl.program_id(0)
        _, there, place = packed_rows(token, length, groups, GROUP, PADDED, PADDED)
        queries = load_rows(q, place, there, WIDTH)
        dy, inner = row_gradients(grad, y, along, place, there, WIDTH)
        sums = tl.load(lse + place, mask=there, other=float("inf"))
        begin, end = tl.load(low + row * span + token), tl.load(high + row * span + token)
        chosen += ((row * groups + tl.program_id(1)) * length + token) * count
        found = tl.zeros((PADDED, WIDTH), tl.float32)
        for i in range(count):
            key, seen = chosen_keys_of(chosen + i, begin, end, SIZE, KEYS)
            place_key = (row * keys + key) * groups + tl.program_id(1)
            k_tile, v_tile = load_rows(k, place_key, seen, WIDTH), load_rows(v, place_key, seen, WIDTH)
            scores = product(queries, k_tile.T, tl.zeros((PADDED, KEYS), tl.float32)) * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            found = query_step(scores, k_tile, v_tile, dy, sums, inner, found)
        store_rows(dq, place, there, found * (scale * 0.6931471805599453), WIDTH)

    @triton.jit
    def selected_key_kernel(
        q, k, v, low, high, lse, grad, along, readers, starts, owners, parts, sums, length, keys, groups, span, scale,
        blocks, segments, CHUNK: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
        ROWS: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """dK and dV of a block by CHUNK of the queries that chose it, grid (chunks,): see `readers_of`.

        8 Dh FLOPs for a row and key; a gathered query costs its q and dO, 4 Dh G bytes, once for SIZE keys: 2 SIZE
        FLOPs a byte, 128 at 64: near the balance of matrix units and L2. sums: (2, chunks, SIZE, Dh) float32.
        """
        owner, chunk = tl.load(owners + tl.program_id(0)), tl.program_id(0)
        if owner == segments * blocks:
            return
        row, group, block = (owner // (blocks * groups)).to(tl.int64), owner // blocks % groups, owner % blocks
        begin = tl.load(starts + owner) + (chunk - tl.load(parts + owner)) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(starts + owner + 1))
        slot, head = tl.arange(0, KEYS), tl.arange(0, ROWS) % PADDED
        key = block * SIZE + slot
        there_key, place_key = (slot < SIZE) & (key < keys), (row * keys + key) * groups + group
        k_tile, v_tile = load_rows(k, place_key, there_key, WIDTH), load_rows(v, place_key, there_key, WIDTH)
        dk_tile, dv_tile = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
        for at in range(begin, end, ROWS // PADDED):
            item = at + tl.arange(0, ROWS) // PADDED
            token, there = tl.load(readers + item, mask=item < end, other=0), (item < end) & (head < GROUP)
            place = ((row * length + token) * groups + group) * GROUP + head
            queries, dy = load_rows(q, place, there, WIDTH), load_rows(grad, place, there, WIDTH)
            lse_rows, inner = tl.load(lse + place, there, float("inf")), tl.load(along + place, there, 0.0)
            first, last = row_ranges(low + row * span, high + row * span, token, length)
            scores = product(k_tile, queries.T, tl.zeros((KEYS, ROWS), tl.float32)) * scale
            seen = (key[:, None] >= first[None, :]) & (key[:, None] < last[None, :])
            scores = tl.where(seen, scores, float("-inf"))
            dk_tile, dv_tile = key_step(scores, v_tile, queries, dy, lse_rows, inner, dk_tile, dv_tile)
        place_key = chunk.to(tl.int64) * SIZE + slot
        store_rows(sums, place_key, slot < SIZE, dk_tile * (scale * 0.6931471805599453), WIDTH)
        place_key += tl.num_programs(0).to(tl.int64) * SIZE
        store_rows(sums, place_key, slot < SIZE, dv_tile, WIDTH)

    @triton.jit
    def chunk_sum_kernel(
        sums, parts, out, keys, groups, blocks, SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
    ):
        """The sum of each block's chunks (chunks, SIZE, Dh), in its place in (B, S, Hkv, Dh), grid (B Hkv J, tiles).

        4 bytes a number and chunk: with all that a chunk's program reads, 4 Dh G CHUNK bytes, hardly any.
        """
        owner, item = tl.program_id(0), tl.program_id(1) * TILE + tl.arange(0, TILE)
        first, last = tl.load(parts + owner), tl.load(parts + owner + 1)
        sums += first.to(tl.int64) * SIZE * WIDTH + item
        total = tl.zeros((TILE,), tl.float32)
        for _ in range(first, last):
            total += tl.load(sums, mask=item < SIZE * WIDTH, other=0.0)
            sums += SIZE * WIDTH
        row, group, key = (owner // (blocks * groups)).to(tl.int64), owner // blocks % groups, item // WIDTH
        there = (key < SIZE) & (owner % blocks * SIZE + key < keys)
        place = (row * keys + owner % blocks * SIZE + key) * groups + group
        tl.store(out + place * WIDTH + item % WIDTH, total, mask=there)


class Tile(NamedTuple):
    """What a kernel's program works on at a time, and how: rows are queries times heads."""

    rows: int
    keys: int
    warps: int
    stages: int


# For head sizes up to 64, and above. Sizes near those of torch's FlexAttention on an H100 at which ptxas spills no
# register and two programs or eight warps fit on a multiprocessor; none is measured yet. Rows, keys: powers of two.
NSA_TILES = {
    "ranged": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3)),
    "ranged_query": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    "ranged_key": (Tile(64, 64, 4, 3), Tile(32, 128, 8, 2)),
    "importance": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3)),
    "selected": (Tile(16, 64, 2, 3), Tile(16, 64, 4, 3)),  # its keys are those of a block, its rows those of a query
    "selected_key": (Tile(64, 64, 4, 3), Tile(64, 64, 8, 2)),  # its keys are those of a block
}
NSA_CHUNK = 256  # queries that chose a block, for one program: 1 MiB to read at 16 x 64, of which 32 KiB of sums come
NSA_PROGRAMS = 528  # of dK and dV at least, by splits where keys are few: four for each multiprocessor of an H100
CHUNK_SUM_TILE = 1024  # numbers


def nsa_tile(kernel: str, q: Tensor) -> Tile:
    """A kernel's tile, in float32 of half the size, which needs as much shared memory.

    Four warps suffice for that: with eight of them Triton 3.6 made the kernel of dK and dV read outside its tensors.
    """
    rows, keys, warps, stages = tile = NSA_TILES[kernel][q.shape[-1] > 64]
    return tile if q.element_size() == 2 else Tile(rows // 2, keys // 2, min(4, warps), stages)


def nsa_sizes(q: Tensor, k: Tensor, low: Tensor) -> tuple[int, int, int, int, float]:
    """Arguments of all kernels: T, S, Hkv, the step from one row's bounds to the next one's, the scale in base 2."""
    step = low.shape[1] if len(low) > 1 else 0
    return q.shape[1], k.shape[1], k.shape[2], step, q.shape[-1] ** -0.5 / math.log(2)


def nsa_shape(q: Tensor, k: Tensor, least: int = 1) -> tuple[int, int, int]:
    """Constants of all kernels: a group's heads, padded, and their size."""
    group = q.shape[2] // k.shape[2]
    return group, max(least, triton.next_power_of_2(group)), q.shape[3]


def bounds_of(ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Low and high as kernels take them: int32, contiguous, of the same shape."""
    low, high = torch.broadcast_tensors(ranges.low, ranges.high)
    return low.int().contiguous(), high.int().contiguous()


def same_shape(*tensors: Tensor) -> tuple[Tensor, ...]:
    """New contiguous tensors."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def output_and_lse(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("golf::ranged", mutates_args=())
def fused_ranged(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over ranges and its lse (B, T, H), of contiguous tensors."""
    tile, shape, (y, lse) = nsa_tile("ranged", q), nsa_shape(q, k), output_and_lse(q)
    grid = (triton.cdiv(q.shape[1], tile.rows // shape[1]), k.shape[2], len(q))
    args = (q, k, v, low, high, y, lse, *nsa_sizes(q, k, low), *shape, tile.rows, tile.keys)
    ranged_kernel[grid](*args, num_warps=tile.warps, num_stages=tile.stages)
    return y, lse


def seers_of(low: Tensor, high: Tensor, keys: int, size: int) -> Tensor:
    """(B or 1, tiles, 4) int32, of tiles of `size` keys: the first query that sees one, those that see all, the end."""
    start = torch.arange(0, keys, size, device=low.device, dtype=torch.int32).expand(len(low), -1).contiguous()
    stop = (start + size).clamp(max=keys)
    pairs = ((high, start, True), (high, stop, False), (low, start, True), (low, stop, False))
    return torch.stack([torch.searchsorted(x, edge, right=right, out_int32=True) for x, edge, right in pairs], -1)


@torch.library.custom_op("golf::ranged_gradient", mutates_args=())
def fused_ranged_gradient(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, y: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    tile, shape, sizes, along = (
        nsa_tile("ranged_query", q),
        nsa_shape(q, k),
        nsa_sizes(q, k, low),
        torch.empty_like(lse),
    )
    (dq,), (rows, keys, groups, width) = same_shape(q), k.shape
    grid = (triton.cdiv(q.shape[1], tile.rows // shape[1]), groups, rows)
    args = (q, k, v, low, high, y, lse, grad, along, dq, *sizes, *shape, tile.rows, tile.keys)
    ranged_query_kernel[grid](*args, num_warps=tile.warps, num_stages=tile.stages)
    tile = nsa_tile("ranged_key", q)
    tiles, seers = triton.cdiv(keys, tile.keys), seers_of(low, high, keys, tile.keys).expand(rows, -1, -1).contiguous()
    longest = triton.cdiv(q.shape[1], tile.rows // shape[1])
    splits = min(triton.cdiv(NSA_PROGRAMS, max(1, tiles * groups * rows)), longest)
    parts = q.new_empty((2, splits, rows, keys, groups, width), dtype=torch.float32)
    args = (q, k, v, low, high, lse, grad, along, seers, *parts, *sizes, tiles, splits, *shape, tile.rows, tile.keys)
    ranged_key_kernel[tiles * splits, groups, rows](*args, num_warps=tile.warps, num_stages=tile.stages)
    dk, dv = (part.sum(0).to(k.dtype) for part in parts)
    return dq, dk, dv


@torch.library.custom_op("golf::importance", mutates_args=())
def fused_importance(q: Tensor, k: Tensor, lse: Tensor, low: Tensor, high: Tensor, blocks: list[int]) -> Tensor:
    """importance_of by lse, of keys without memory; `blocks`: the arguments of it from `block` to `count`."""
    (block, stride, size, count), tile, shape = blocks, nsa_tile("importance", q), nsa_shape(q, k)
    importance = q.new_zeros((len(q), k.shape[2], q.shape[1], count), dtype=torch.float32)
    slots = triton.next_power_of_2(size // stride)
    form = (block, stride, size, slots, max(1, tile.keys // slots))
    grid = (triton.cdiv(q.shape[1], tile.rows // shape[1]), k.shape[2], len(q))
    args = (q, k, lse, low, high, importance, *nsa_sizes(q, k, low), count, *form, *shape, tile.rows)
    importance_kernel[grid](*args, num_warps=tile.warps, num_stages=tile.stages)
    return importance


@torch.library.custom_op("golf::selected", mutates_args=())
def fused_selected(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, low: Tensor, high: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Attention over chosen blocks (int32) and its lse (B, T, H), of contiguous tensors."""
    tile, (y, lse) = nsa_tile("selected", q), output_and_lse(q)
    form = (*nsa_shape(q, k, 16), size, max(16, triton.next_power_of_2(size)))
    args = (q, k, v, chosen, low, high, y, lse, *nsa_sizes(q, k, low), chosen.shape[-1], *form)
    selected_kernel[q.shape[1], k.shape[2], len(q)](*args, num_warps=tile.warps, num_stages=tile.stages)
    return y, lse


class Readers(NamedTuple):
    """Who chose each block (B Hkv J): the choice turned around, and how that work is cut into chunks."""

    queries: Tensor  # int32, by block and then by query
    starts: Tensor  # (blocks + 1,) int32, where a block's queries begin
    owners: Tensor  # (chunks,) int32, a chunk's block; the number of blocks: none
    parts: Tensor  # (blocks + 1,) int32, a block's first chunk


def readers_of(chosen: Tensor, blocks: int, chunk: int) -> Readers:
    """Of chosen (B, Hkv, T, n) among `blocks` of each row and group.

    The first block is read by all, others by few, so lists are cut into chunks of at most `chunk` queries, a program
    for each: at most so many that their number needs no look at the lists, which would be a wait for the device.
    """
    rows, groups, length, count = chosen.shape
    all_blocks, device = rows * groups * blocks, chosen.device
    base = torch.arange(0, all_blocks, blocks, device=device, dtype=torch.int32).view(rows, groups, 1, 1)
    ordered, place = torch.where(chosen >= 0, chosen + base, all_blocks).flatten().sort(stable=True)
    each = torch.arange(all_blocks + 1, device=device, dtype=torch.int32)
    starts = torch.searchsorted(ordered, each, out_int32=True)
    parts = F.pad(((starts.diff() + chunk - 1) // chunk).cumsum(0), (1, 0))
    most = torch.arange(chosen.numel() // chunk + all_blocks, device=device)
    owners = torch.searchsorted(parts[1:], most, right=True, out_int32=True)
    return Readers((place // count % length).int(), starts, owners, parts.int())


@torch.library.custom_op("golf::selected_gradient", mutates_args=())
def fused_selected_gradient(grad: Tensor, saved: list[Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `saved` is what selected_kernel read and wrote."""
    q, k, v, chosen, low, high, y, lse = saved
    tile, sizes, along = nsa_tile("selected", q), nsa_sizes(q, k, low), torch.empty_like(lse)
    (dq, dk, dv), block = same_shape(q, k, v), (size, max(16, triton.next_power_of_2(size)))
    args = (*saved, grad, along, dq, *sizes, chosen.shape[-1], *nsa_shape(q, k, 16), *block)
    selected_query_kernel[q.shape[1], k.shape[2], len(q)](*args, num_warps=tile.warps, num_stages=tile.stages)
    (rows, keys, groups, width), tile = k.shape, nsa_tile("selected_key", q)
    blocks, segments = triton.cdiv(keys, size), rows * groups
    readers = readers_of(chosen, blocks, NSA_CHUNK)
    chunks = len(readers.owners)
    sums = q.new_empty((2, chunks, size * width), dtype=torch.float32)
    inputs = (q, k, v, low, high, lse, grad, along, *readers, sums, *sizes, blocks, segments, NSA_CHUNK)
    selected_key_kernel[(chunks,)](
        *inputs, *nsa_shape(q, k), tile.rows, *block, num_warps=tile.warps, num_stages=tile.stages
    )
    grid = (segments * blocks, triton.cdiv(size * width, CHUNK_SUM_TILE))
    for part, out in zip(sums, (dk, dv), strict=True):
        chunk_sum_kernel[grid](part, readers.parts, out, keys, groups, blocks, size, width, CHUNK_SUM_TILE)
    return dq, dk, dv


fused_ranged.register_fake(lambda q, k, v, low, high: output_and_lse(q))
fused_ranged_gradient.register_fake(lambda q, k, v, low, high, y, lse, grad: same_shape(q, k, v))
fused_importance.register_fake(
    lambda q, k, lse, low, high, blocks: q.new_empty((len(q), k.shape[2], q.shape[1], blocks[3]), dtype=torch.float32)
)
fused_selected.register_fake(lambda q, k, v, chosen, low, high, size: output_and_lse(q))
fused_selected_gradient.register_fake(lambda grad, saved, size: same_shape(*saved[:3]))


class FusedRangedFunction(torch.autograd.Function):
    """Attention over ranges by kernels; also returns lse, with which the importance of blocks is found."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        y, lse = fused_ranged(q, k, v, low, high)
        ctx.save_for_backward(q, k, v, low, high, y, lse)
        ctx.mark_non_differentiable(lse)
        return y, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        return *fused_ranged_gradient(*ctx.saved_tensors, grad.contiguous()), None, None


class FusedSelectedFunction(torch.autograd.Function):
    """Attention over chosen blocks by kernels."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, low: Tensor, high: Tensor, size: int
    ) -> Tensor:
        inputs = (q.contiguous(), k.contiguous(), v.contiguous(), chosen.int().contiguous(), low, high)
        y, lse = fused_selected(*inputs, size)
        ctx.save_for_backward(*inputs, y, lse)
        ctx.size = size
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return *fused_selected_gradient(grad.contiguous(), list(ctx.saved_tensors), ctx.size), None, None, None, None


def fused_compressed(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, blocks: tuple) -> tuple[Tensor, Tensor]:
    """RangedAttentionFunction by kernels, with the importance of blocks."""
    (low, high), k = bounds_of(ranges), k.to(q.dtype)  # what a state keeps may be wider than bf16
    y, lse = FusedRangedFunction.apply(q, k, v.to(q.dtype), low, high)
    (*form, skip) = blocks
    with torch.no_grad():
        low, high = ((bound - skip).clamp(min=0) for bound in (low, high))
        return y, fused_importance(q.contiguous(), k[:, skip:].contiguous(), lse, low, high, form)


def fused_chosen(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, ranges: Ranges, size: int) -> Tensor:
    """SelectedAttentionFunction by kernels."""
    return FusedSelectedFunction.apply(q, k.to(q.dtype), v.to(q.dtype), chosen, *bounds_of(ranges), size)


def fused_near(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges) -> Tensor:
    """RangedAttentionFunction by kernels; with memory in front, which they cannot read, without them."""
    if ranges.front is not None:
        return NSA_BACKENDS["gather"].near(q, k.to(q.dtype), v.to(q.dtype), ranges)
    return FusedRangedFunction.apply(q, k.to(q.dtype), v.to(q.dtype), *bounds_of(ranges))[0]


class NSABackend(NamedTuple):
    """How NSA's branches attend: to compressed keys, with the importance of blocks, to chosen blocks, to near keys."""

    compressed: Callable[[Tensor, Tensor, Tensor, Ranges, tuple], tuple[Tensor, Tensor]]
    selected: Callable[[Tensor, Tensor, Tensor, Tensor, Ranges, int], Tensor]
    near: Callable[[Tensor, Tensor, Tensor, Ranges], Tensor]


NSA_BACKENDS: dict[str, NSABackend] = {
    "gather": NSABackend(
        ranged_attention,
        lambda q, k, v, chosen, ranges, size: SelectedAttentionFunction.apply(
            q, k, v, chosen, ranges.low, ranges.high, size
        ),
        lambda q, k, v, ranges: ranged_attention(q, k, v, ranges)[0],
    ),
    "masked": NSABackend(masked_compressed, masked_selected, masked_attention),
    "triton": NSABackend(fused_compressed, fused_chosen, fused_near),
}


class Choice(NamedTuple):
    """The blocks that queries chose (-1: none) and the shares of the compressed blocks on them, (B, Hkv, T, n) each."""

    blocks: Tensor
    importance: Tensor
    close: Tensor  # (B, Hkv, T, 1) bool, the best one that was left is worse by less than 1e-6: rounding may decide


@torch.no_grad()
def best_blocks(importance: Tensor, tokens: Ranges, size: int, count: int) -> Choice:
    """The `count` blocks of `size` tokens that each query reads, by importance (B, Hkv, T, J); of equals the first.

    Always among them: the block in which the query's document begins, its own and the one before; none from outside.
    """
    blocks = importance.shape[-1]
    found: list[Choice] = []
    block = torch.arange(blocks, device=importance.device)
    first, last = (bound[:, None, :, None] // size for bound in (tokens.low, tokens.high - 1))
    for part in tokens.parts:
        some = slice(part.start, part.stop)
        first_here, last_here, here = first[:, :, some], last[:, :, some], importance[:, :, some].contiguous()
        # The bits of a float that is not negative order like its value; below them the number, the lower the better.
        key = here.view(torch.int32).long() << 31 | (blocks - 1 - block)
        key = torch.where((block == first_here) | (block >= last_here - 1), key | 1 << 62, key)
        key = torch.where((block < first_here) | (block > last_here), -1, key)
        best, order = key.topk(min(count + 1, blocks), -1)
        shares, free = here.gather(-1, order), (best >= 0) & (best < 1 << 62)
        close = torch.zeros_like(free[..., :1])
        if blocks > count:
            close = (free[..., -2:].all(-1) & (shares[..., -2] - shares[..., -1] < 1e-6)).unsqueeze(-1)
        chosen, shares = torch.where(best < 0, -1, order)[..., :count], (shares * (best >= 0))[..., :count]
        more = (0, max(0, count - blocks))
        found.append(Choice(F.pad(chosen, more, value=-1), F.pad(shares, more), close))
    return Choice(*(torch.cat(parts, 2) for parts in zip(*found, strict=True)))


class NSAState(NamedTuple):
    """What NSA keeps of the past: all that may still be chosen, and what a window or an open block needs.

    Where a segment reads memory, its keys and values come first in each branch; of the selected one it ends a block.
    """

    keys: Cache  # of the selected branch
    values: Cache
    block_keys: Tensor  # (B, C, Hkv, Dh), compressed
    block_values: Tensor
    open_keys: Tensor  # (B, < NSA_BLOCK, Hkv, Dh), of tokens from the next compressed block on
    open_values: Tensor
    near_keys: Tensor  # (B, < NSA_WINDOW, Hkv, Dh)
    near_values: Tensor


class Views(NamedTuple):
    """What queries of text may see: of compressed blocks, of all tokens, of the selected and of the near keys."""

    blocks: Ranges
    tokens: Ranges
    keys: Ranges  # tokens and what lies before them, memory
    near: Ranges


def portion(part: Tensor, whole: Tensor) -> Tensor:
    """The share of True in `part` among those in `whole`; 0 of none."""
    return part.sum() / whole.sum().clamp(min=1)


class BlockPool(Module):
    """One key or value of each NSA_BLOCK tokens, every NSA_STRIDE: their mean, and of NSA_POOL=mlp plus an MLP of them.

    The MLP reads them one after the other, with a learned vector added for each place in the block. Keys' means are
    multiplied by `scale`, sqrt(NSA_BLOCK): by so much a mean of unlike keys is shorter than each, and scores of blocks
    that are so small hardly tell one from another (records/2026-11-22_needle).
    """

    kinds: ClassVar[dict[str, str]] = {"place": "scalar"}

    def __init__(self, h: Hyperparameters, name: str, scale: float) -> None:
        super().__init__()
        self.size, self.stride, self.mlp, self.scale = h.nsa_block, h.nsa_stride, h.nsa_pool == "mlp", scale
        if self.mlp:
            self.place = nn.Parameter(torch.empty(h.nsa_block, h.head_dim))
            self.up = Linear(name + ".up", h.nsa_block * h.head_dim, h.head_dim)
            self.down = Linear(name + ".down", h.head_dim, h.head_dim)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """(B, S, Hkv, Dh) to (B, C, Hkv, Dh), block i of the tokens from i NSA_STRIDE on."""
        if x.shape[1] < self.size:
            return x[:, :0]
        blocks = x.unfold(1, self.size, self.stride).mT  # (B, C, Hkv, l, Dh)
        mean = blocks.mean(-2) * self.scale
        if not self.mlp:
            return mean
        inner = self.up((blocks + self.place.to(x.dtype)).flatten(-2), ctx)
        return mean + self.down(F.relu(inner).square(), ctx)


class NSA(Module):
    """Native sparse attention (Yuan et al. 2025, arXiv 2502.11089): compressed, selected and near keys, each gated.

    Query t of a document sees, in branches with keys and values of their own: the compressed blocks that lie in the
    document up to t; the tokens up to t of the blocks that best_blocks chose by the first branch's shares; and the
    last NSA_WINDOW tokens. y = sum_c g_c o_c with three gates a head, made by an MLP; sigmoids, or NSA_GATES=softmax.
    A branch that sees nothing is zero. Memory of RMT that a segment reads has keys in each branch, which all queries of
    its document see; what is written sees in each branch what the last token does, of the selected keys all.
    """

    kinds: ClassVar[dict[str, str]] = {"q_gain": "scalar"}
    BRANCHES: ClassVar[tuple[str, ...]] = ("compressed", "selected", "near")

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        self.h, width = h, h.head_dim
        self.backend = NSA_BACKENDS["gather" if h.nsa_impl == "auto" else h.nsa_impl]
        self.ahead = h.rmt_tokens if h.rmt_segment else 0
        self.lead = -(-self.ahead // h.nsa_select_block) * h.nsa_select_block  # memory has blocks of its own
        self.qkv = Linear(name + ".qkv", h.model_dim, (h.num_heads + 6 * h.num_kv_heads) * width)
        projection = NormedLinear if h.proj_norm else Linear
        self.proj = projection(name + ".proj", h.num_heads * width, h.model_dim)
        self.q_gain = nn.Parameter(torch.empty(h.num_heads))
        self.key_pool = BlockPool(h, name + ".key_pool", math.sqrt(h.nsa_block))
        self.value_pool = BlockPool(h, name + ".value_pool", 1.0)
        self.cacher = Cacher(h)
        self.gate_in = Linear(name + ".gate_in", h.model_dim, width)
        self.gate = Linear(name + ".gate", width, 3 * h.num_heads)

    def init_state(self, batch: int, dtype: torch.dtype) -> NSAState:
        empty = self.q_gain.new_zeros((batch, 0, self.h.num_kv_heads, self.h.head_dim), dtype=dtype)
        cache = self.cacher.store(empty)
        return NSAState(cache, cache, *[empty] * 6)

    def forward(self, x: Tensor, ctx: Ctx, state: NSAState | None) -> Out:
        h, old = self.h, self.init_state(x.shape[0], x.dtype) if state is None else state
        qkv = self.qkv(x, ctx).unflatten(-1, (-1, h.head_dim))  # (B, T, H + 6 Hkv, Dh)
        q, k, v = QKVFunction.apply(qkv, self.q_gain, *ctx.rotary, h.qk_norm)
        new_keys, new_values = k.chunk(3, 2), v.chunk(3, 2)
        keys, values, new = self.appended(old, new_keys, new_values, ctx)
        text = slice(ctx.reads, x.shape[1] - ctx.writes)
        views = self.views(keys.shape[1] - self.lead, new.near_keys.shape[1] - self.ahead, ctx)
        found, choice = self.attend(q[:, text], keys, values, new, views, ctx)
        if ctx.reads or ctx.writes:
            held = ((new.block_keys, new.block_values), (keys, values), (new.near_keys, new.near_values))
            pairs = zip(new_keys, new_values, held, (views.blocks, views.keys, views.near), found, strict=True)
            found = tuple(self.around(q, *pair, ctx) for pair in pairs)
        gates = self.gates(x, F.pad(views.blocks.sees(), (ctx.reads, ctx.writes), value=True), ctx)
        mixed = added(found[0] * gates[0], gates[1:], found[1:])
        metrics = self.measured([gate[:, text] for gate in gates], choice, views) if ctx.variant.measures else {}
        return Out(self.proj(mixed.flatten(-2), ctx), None if state is None else self.kept(new), metrics=metrics)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, new: NSAState, views: Views, ctx: Ctx
    ) -> tuple[tuple[Tensor, ...], Choice]:
        """What the branches give queries of text (B, T, H, Dh), and the blocks of text that these chose."""
        h, size = self.h, self.h.nsa_select_block
        form = (h.nsa_block, h.nsa_stride, size, (keys.shape[1] - self.lead + size - 1) // size, self.ahead)
        coarse, importance = self.backend.compressed(q, new.block_keys, new.block_values, views.blocks, form)
        choice = best_blocks(importance, views.tokens, size, h.nsa_select)
        if h.nsa_strict:
            self.check(views, choice.blocks, new, ctx)
        fine = self.backend.selected(q, keys, values, self.behind(choice.blocks), views.keys, size)
        return (coarse, fine, self.backend.near(q, new.near_keys, new.near_values, views.near)), choice

    def behind(self, chosen: Tensor) -> Tensor:
        """Chosen blocks of text with those of memory before them."""
        count = self.lead // self.h.nsa_select_block
        if not count:
            return chosen
        memory = torch.arange(count, device=chosen.device).expand(*chosen.shape[:-1], -1)
        return torch.cat((memory, torch.where(chosen >= 0, chosen + count, -1)), -1)

    def around(
        self, q: Tensor, k: Tensor, v: Tensor, held: tuple[Tensor, Tensor], view: Ranges, y: Tensor, ctx: Ctx
    ) -> Tensor:
        """What a branch gives memory that is read, the text y, and memory that is written."""
        reads, stop, length = ctx.reads, q.shape[1] - ctx.writes, y.shape[1]
        parts = [sdpa(q[:, :reads], k[:, :reads], v[:, :reads], None, True), y] if reads else [y]
        if ctx.writes:
            last = slice(length - 1, length)
            seen = ~view.hides(last, slice(0, held[0].shape[1])) & view.sees()[:, last, None]  # (B or 1, 1, S)
            keys, values = (torch.cat((old, x[:, stop:]), 1) for old, x in zip(held, (k, v), strict=True))
            parts += [sdpa(q[:, stop:], keys, values, F.pad(seen, (0, ctx.writes), value=True)[:, None], False)]
        return torch.cat(parts, 1)

    def appended(
        self, old: NSAState, k: Sequence[Tensor], v: Sequence[Tensor], ctx: Ctx
    ) -> tuple[Tensor, Tensor, NSAState]:
        """All keys and values that may be chosen, and what the state is made of; new ones (B, T, Hkv, Dh) a branch."""
        reads, stop = ctx.reads, k[0].shape[1] - ctx.writes
        fill = (0, 0, 0, 0, self.lead - self.ahead if reads else 0, 0)
        keys, key_cache = self.cacher.add(old.keys, F.pad(k[1][:, :stop], fill))
        values, value_cache = self.cacher.add(old.values, F.pad(v[1][:, :stop], fill))
        raw = (old.open_keys, old.open_values, old.near_keys, old.near_values)
        new = (k[0][:, reads:stop], v[0][:, reads:stop], k[2][:, :stop], v[2][:, :stop])
        parts = [*map(following, raw, new)]
        pooled = (self.key_pool(parts[0], ctx), self.value_pool(parts[1], ctx))
        block_keys = torch.cat((following(old.block_keys, k[0][:, :reads]), pooled[0]), 1)
        block_values = torch.cat((following(old.block_values, v[0][:, :reads]), pooled[1]), 1)
        return keys, values, NSAState(key_cache, value_cache, block_keys, block_values, *parts)

    def kept(self, new: NSAState) -> NSAState:
        """Of all that a later query may see."""
        begin = new.keys.codes.shape[1] - self.lead - new.open_keys.shape[1]  # the first of the open keys
        done = (new.block_keys.shape[1] - self.ahead) * self.h.nsa_stride - begin
        near = max(self.ahead, new.near_keys.shape[1] - self.h.nsa_window + 1)
        opened = (part[:, done:].contiguous() for part in (new.open_keys, new.open_values))
        nearest = (torch.cat((part[:, : self.ahead], part[:, near:]), 1) for part in new[6:])
        return NSAState(*new[:4], *opened, *nearest)

    def views(self, total: int, near: int, ctx: Ctx) -> Views:
        """What queries may see: of `total` tokens, the last ones new, of which the near keys are the last `near`."""
        h, ahead, text = self.h, self.ahead, slice(ctx.reads, ctx.tokens.shape[1] - ctx.writes)
        before = total - (text.stop - text.start)
        place = torch.arange(before, total, device=ctx.tokens.device).unsqueeze(0)
        exact, shift = ctx.age is None or not h.doc_mask, total - near - ahead
        begin = 0 * place if ctx.age is None or exact else place - ctx.age[:, text]
        later = begin > 0  # another document than that of memory

        def whole(query: Any) -> Any:
            return (query - h.nsa_block + 1) // h.nsa_stride + 1

        blocks = ranges_of(
            (ahead + (begin + h.nsa_stride - 1) // h.nsa_stride) * later,
            ahead + whole(place).clamp(min=0),
            exact,
            lambda i: (0, ahead + max(0, whole(before + i))),
        )
        tokens = ranges_of(begin, place + 1, exact, lambda i: (0, before + i + 1))
        low = torch.where(later, begin + self.lead, self.lead - ahead)
        nearest = ranges_of(
            torch.maximum(begin, place - h.nsa_window + 1) - shift,
            place + 1 - shift,
            exact,
            lambda i: (max(ahead, before + i - h.nsa_window + 1 - shift), before + i + 1 - shift),
            h.nsa_window,
        )
        front = ~later.unsqueeze(-1).expand(-1, -1, ahead) if ahead else None
        return Views(blocks, tokens, Ranges(low, self.lead + tokens.high, ()), nearest._replace(front=front))

    def gates(self, x: Tensor, seen: Tensor, ctx: Ctx) -> tuple[Tensor, ...]:
        """Three of (B, T, H, 1); where no compressed block is seen (B or 1, T) its gate is 0, and not counted."""
        inner = F.relu(self.gate_in(x, ctx)).square()
        logits = self.gate(inner, ctx).unflatten(-1, (-1, 3))  # (B, T, H, 3)
        unseen = F.pad(~seen[..., None, None], (0, 2))
        if self.h.nsa_gates == "softmax":
            gates = logits.masked_fill(unseen, -math.inf).softmax(-1)
        else:
            gates = torch.sigmoid(logits).masked_fill(unseen, 0.0)
        return gates.to(x.dtype).split(1, -1)

    def check(self, views: Views, chosen: Tensor, new: NSAState, ctx: Ctx) -> None:
        """NSA_STRICT: raise RuntimeError if a branch is about to read a later key, or one of another document."""
        h, size, length, device = self.h, self.h.nsa_select_block, chosen.shape[2], chosen.device
        coarse, near = (
            torch.arange(n, device=device) - self.ahead for n in (new.block_keys.shape[1], new.near_keys.shape[1])
        )
        total, key = new.keys.codes.shape[1] - self.lead, self.behind(chosen)
        place = torch.arange(total - length, total, device=device).view(1, 1, length, 1)
        begin = 0 * place
        if ctx.age is not None and h.doc_mask:
            begin = place - ctx.age[:, None, ctx.reads :][:, :, :length, None]
        _, hidden = chosen_keys(key, views.keys.low, views.keys.high, key.shape[0] * key.shape[1], size)
        picked = (key.unsqueeze(-1) * size + torch.arange(size, device=device)).flatten(-2) - self.lead
        latest, start = near + total - len(near) + self.ahead, coarse * h.nsa_stride
        spans = (  # of each key whether it is read, and of which tokens it is, the first and the last; below 0: memory
            (views.blocks.read(len(coarse)).unsqueeze(1), start, start + h.nsa_block - 1, coarse < 0),
            (~hidden, picked, picked, picked < 0),
            (views.near.read(len(near)).unsqueeze(1), latest, latest, near < 0),
        )
        for branch, (read, first, last, memory) in zip(self.BRANCHES, spans, strict=True):
            if bool((read & torch.where(memory, begin > 0, (last > place) | (first < begin))).any()):
                raise RuntimeError(f"NSA reads a later key, or one of another document, in its {branch} branch")

    def measured(self, gates: Sequence[Tensor], choice: Choice, views: Views) -> dict[str, Tensor]:
        """How the gates share, what is chosen, and how many keys a query reads, foreseen and counted."""
        h, tokens = self.h, views.tokens
        share = torch.cat([*gates], -1).float()
        share = share / (share.sum(-1, keepdim=True) + 1e-12)  # (B, T, H, 3)
        entropy = -(share * (share + 1e-12).log()).sum(-1) / math.log(3)
        most = share.amax(-1)
        found = {
            "gate_entropy": entropy.mean(),
            "gate_max": most.mean(),
            "gate_collapsed": (most > 0.95).float().mean(),
        }
        found |= {f"share_{name}": part.mean() for name, part in zip(self.BRANCHES, share.unbind(-1), strict=True)}
        first, last = (bound // h.nsa_select_block for bound in (tokens.low, tokens.high - 1))
        first, last = first[:, None, :, None], last[:, None, :, None]
        there = last - first + 1
        free = (choice.blocks > first) & (choice.blocks < last - 1) & (there > h.nsa_select)
        weak = free & (choice.importance * h.num_kv_heads / h.num_heads < 0.5 / there)
        count, picky = (choice.blocks >= 0).float().sum(-1), (there > h.nsa_select).expand_as(choice.close)
        found |= {"blocks": count.mean(), "blocks_most": count.amax(), "weak_choices": portion(weak, free)}
        found["close_choices"] = portion(choice.close, picky)
        found["unchosen"] = self.unchosen(choice.blocks, free, first, last - 1, there > h.nsa_select)
        found["fallbacks"] = count.new_tensor(self.ahead > 0 and h.nsa_impl == "triton")  # branches not by kernels
        return {**found, **self.reads(choice.blocks, views)}

    def ranges(self) -> dict[str, tuple[float, float, float, float]]:
        """Gates that leave one branch alone are of no use."""
        return {
            "gate_entropy": (0.5, 1.0, 0.2, 1.001), "gate_max": (1 / 3, 0.9, 0.0, 0.97),
            "gate_collapsed": (0.0, 0.01, 0.0, 0.5),
        }  # fmt: skip

    def unchosen(self, chosen: Tensor, free: Tensor, first: Tensor, last: Tensor, picky: Tensor) -> Tensor:
        """Share of the blocks that some query could leave out, between first and last, that none of them chose."""
        rows, groups, length, _ = chosen.shape
        edges = torch.zeros(rows, groups, length + 2, device=chosen.device)
        taken = edges.scatter_add(2, chosen.clamp(min=0).flatten(2), free.float().flatten(2))
        first, last, picky = (part.expand(rows, groups, length, 1).squeeze(-1) for part in (first, last, picky))
        edges = edges.scatter_add(2, first + 1, picky.float()).scatter_add(2, last.clamp(min=0), -picky.float())
        open_ = edges.cumsum(2) > 0
        return portion(open_ & (taken == 0), open_)

    def reads(self, chosen: Tensor, views: Views) -> dict[str, Tensor]:
        """Keys of a group that a query reads, by the formula from its document's length and counted in the masks."""
        h, begin, end = self.h, views.tokens.low, views.tokens.high
        size, stride = h.nsa_select_block, h.nsa_stride
        first, last, age = begin // size, (end - 1) // size, end - begin
        inner = ((last - first + 1).clamp(max=h.nsa_select) - 2) * size  # the first and the own block may be cut off
        selected = torch.where(first == last, age, (first + 1) * size - begin + inner + end - last * size)
        compressed = ((age - (-begin) % stride - h.nsa_block) // stride + 1).clamp(min=0)
        foreseen = compressed + selected + age.clamp(max=h.nsa_window) + 3 * self.ahead * (begin == 0)
        chosen = self.behind(chosen)
        _, hidden = chosen_keys(chosen, views.keys.low, views.keys.high, chosen.shape[0] * chosen.shape[1], size)
        done = views.blocks.counted() + views.near.counted() + (~hidden).float().sum(-1).mean(1)
        return {"reads_foreseen": foreseen.float().mean(), "reads_done": done.float().mean()}


class KoopmanState(NamedTuple):
    """What a Koopman mixer keeps of the past."""

    tail: Tensor  # (B, SKC_CONV - 1, S) last inputs of the convolution
    h: Tensor  # (B, S)


class Koopman(Module):
    """A diagonal recurrence in the basis rotated by H: h_t = a_t h_{t-1} + (1 - a_t) g_t (H u_t), u = conv(W_in x).

    g = sigmoid(W_g x), a = exp(-softplus(W_dt x)) = sigmoid(-W_dt x), 0 at a document's start. Then the low-rank
    coupling h + (h V) U^T, back by H, and a normed output projection.
    """

    kinds: ClassVar[dict[str, str]] = {"u": "scalar", "v": "scalar"}

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        self.width, self.taps = h.capsule_dim, h.skc_conv
        self.inputs = Linear(name + ".inputs", h.model_dim, 3 * h.capsule_dim)
        self.conv = CausalConv(h.capsule_dim, h.skc_conv)
        self.u = nn.Parameter(torch.empty(h.capsule_dim, h.koopman_rank))
        self.v = nn.Parameter(torch.empty(h.capsule_dim, h.koopman_rank))
        self.proj = NormedLinear(name + ".proj", h.capsule_dim, h.model_dim)
        self.turn = Turn(h)

    def init_state(self, batch: int, dtype: torch.dtype) -> KoopmanState:
        tail = self.u.new_zeros((batch, self.taps - 1, self.width), dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return KoopmanState(tail, self.u.new_zeros((batch, self.width), dtype=wide))

    def forward(self, x: Tensor, ctx: Ctx, state: KoopmanState | None) -> Out:
        assert ctx.fresh is not None
        given = self.init_state(x.shape[0], x.dtype) if state is None else state
        u, gate, pace = self.inputs(x, ctx).chunk(3, -1)  # (B, T, S) each
        u, tail = self.conv(u, ctx, given.tail)
        keep, gate = torch.sigmoid(-pace.to(given.h.dtype)), torch.sigmoid(gate)
        seen = keep * ~ctx.fresh.unsqueeze(-1)
        h, last = linear_scan(seen, (1 - seen) * gate * self.turn(u), given.h)
        mixed = self.turn(h + h @ self.v @ self.u.mT)
        y = self.proj(mixed, ctx)
        metrics = watched(ctx, gate=gate, keep_gate=keep)
        return Out(y, None if state is None else KoopmanState(tail, last), metrics=metrics)


class SKCState(NamedTuple):
    """What an SKC layer keeps of the past; parts that are off are empty."""

    tail: Tensor  # (B, SKC_CONV - 1, S) last inputs of the convolution
    local: Tensor  # (B, S) the local scan
    spectrum: BlockState  # (B, W, S) each
    capsules: BlockState  # (B, N, S + 1) and (B, N, S)


class SKC(Module):
    """Spectral Koopman capsules, block-causal: a local path, spectra and capsules of earlier blocks, summed.

    v = g s with s = W_s n, g = sigmoid(W_g n), n the normed input.
    Local: conv(s) and the scan of (1 - a) v with a learned decay a per channel.
    Spectral: U_j = H V_j of block j, Z_{j+1} = L Z_j + (1 - L) U_j, block b reads H (G Z_b), L and G per frequency.
    Capsules: r_t = softmax_n(-((p_t - c_n) / w_n)^2 / 2 + sigmoid(l) W_r norm(v_t)), p_t the place in the block;
    C_{j+1} = lambda C_j + (1 - lambda) P_j with P_j = sum r v / sum r; block b reads sum_n r_tn F(C_b)_n with
    F(C) = (1 - gamma)(C + M C) + gamma tanh(C + M C), M = U V^T / max(1, |U| |V|) over capsules.
    Output: W_o (gain norm(local + spectral + capsules)). ENG_TO_SKC_MODE adds the engram's memory to s or g's logits.
    """

    # fmt: off
    kinds: ClassVar[dict[str, str]] = dict.fromkeys((
        "local_decay", "decay", "gain", "z0", "centre", "breadth", "route_logit", "hold", "u", "v", "bend",
    ), "scalar")
    # fmt: on

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        width, block, count = h.capsule_dim, h.skc_block_size, h.capsule_num
        self.h, self.shape = h, (block, width, count)
        self.inputs = Linear(name + ".inputs", h.model_dim, 2 * width)
        reached = h.shared_blocks or layer >= h.engram_inject_layer
        informed = h.eng_to_skc_mode != "off" and reached
        self.engram = Linear(name + ".engram", h.bigram_hash_dim, width) if informed else None
        self.proj = NormedLinear(name + ".proj", width, h.model_dim)
        if h.skc_local != "off":
            self.conv, self.local_decay = CausalConv(width, h.skc_conv), nn.Parameter(torch.empty(width))
        if h.skc_spectral:
            self.decay, self.gain, self.z0 = (nn.Parameter(torch.empty(block, width)) for _ in range(3))
            self.register_buffer("transform", hadamard(block), persistent=False)
        if count:
            self.router = Linear(name + ".router", width, count)
            self.centre, self.breadth = nn.Parameter(torch.empty(count)), nn.Parameter(torch.empty(count))
            self.route_logit, self.bend = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
            self.hold = nn.Parameter(torch.empty(count, width))
            self.u, self.v = (nn.Parameter(torch.empty(count, SKC.RANK)) for _ in range(2))

    RANK: ClassVar[int] = 8
    transform: Tensor

    def init_state(self, batch: int, dtype: torch.dtype) -> SKCState:
        (block, width, count), wide = self.shape, torch.promote_types(dtype, torch.float32)
        local, spectral, zeros = self.h.skc_local != "off", self.h.skc_spectral, self.proj.gain.new_zeros
        open_spectrum = zeros((batch, block if spectral else 0, width), dtype=wide)
        return SKCState(
            zeros((batch, self.h.skc_conv - 1 if local else 0, width), dtype=dtype),
            zeros((batch, width if local else 0), dtype=wide),
            BlockState(open_spectrum, self.z0.to(wide).expand(batch, -1, -1) if spectral else open_spectrum),
            BlockState(zeros((batch, count, width + 1), dtype=wide), zeros((batch, count, width), dtype=wide)),
        )

    def forward(self, x: Tensor, ctx: Ctx, state: SKCState | None) -> Out:
        assert ctx.blocks is not None
        old = self.init_state(x.shape[0], x.dtype) if state is None else state
        s, gate = self.gated(x, ctx)  # (B, T, S) each
        v, held = gate * s, None
        grid = ctx.blocks.lay(v)  # (B, n, W, S)
        near, new = self.local(s, v, ctx, old)
        paths: dict[str, Tensor] = {"local": near} if near is not None else {}
        if self.h.skc_spectral:
            read, new = self.spectral(grid, ctx.blocks, new)
            paths["spectral"] = ctx.blocks.pick(read * ctx.blocks.visible, x.shape[1])
        if self.shape[2]:
            read, held, new = self.capsules(grid, ctx, new)
            paths["capsules"] = ctx.blocks.pick(read * ctx.blocks.visible, x.shape[1])
        mixed = torch.stack([*paths.values()]).sum(0).to(x.dtype)
        wanted = self.h.skc_spectral and self.h.skc_spectral_entropy > 0 and ctx.moment is not None
        losses = {"spectral_entropy": self.entropy_loss(grid, ctx.blocks)} if wanted else {}
        metrics = watched(ctx, gate=gate, **paths, memory=held)
        return Out(self.proj(mixed, ctx), None if state is None else new, losses=losses, metrics=metrics)

    def gated(self, x: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """s and g = sigmoid(W_g x)."""
        s, gate = self.inputs(x, ctx).chunk(2, -1)
        if self.engram is not None and "engram" in ctx.memory:  # layers that share a block may lie before it
            extra = self.engram(ctx.memory["engram"], ctx)
            s, gate = (s + extra, gate) if self.h.eng_to_skc_mode == "bias" else (s, gate + extra)
        return s, torch.sigmoid(gate)

    def local(self, s: Tensor, v: Tensor, ctx: Ctx, old: SKCState) -> tuple[Tensor | None, SKCState]:
        """The path over nearby tokens."""
        if self.h.skc_local == "off":
            return None, old
        assert ctx.fresh is not None
        y, tail = self.conv(s, ctx, old.tail)
        goes_on = ~ctx.fresh
        if self.h.skc_local == "block":
            goes_on = goes_on & (ctx.positions % self.shape[0] > 0)
        a = torch.sigmoid(self.local_decay).to(old.local.dtype)
        h, last = linear_scan(a * goes_on.unsqueeze(-1), (1 - a) * v, old.local)
        return y + h, old._replace(tail=tail, local=last)

    def spectral(self, grid: Tensor, blocks: Blocks, old: SKCState) -> tuple[Tensor, SKCState]:
        """What each block sees of earlier blocks' spectra, (B, n, W, S)."""
        transform, hold = self.transform.to(grid.dtype), torch.sigmoid(self.decay)
        sums = transform @ (grid * blocks.inside)
        z, new = remember(sums, hold, old.spectrum, blocks, lambda spectra, _: (1 - hold) * spectra)
        return transform @ (self.gain * z).to(grid.dtype), old._replace(spectrum=new)

    def capsules(self, grid: Tensor, ctx: Ctx, old: SKCState) -> tuple[Tensor, Tensor, SKCState]:
        """What tokens read of earlier blocks' capsules (B, n, W, S), and those (B, n, N, S)."""
        blocks = ctx.blocks
        assert blocks is not None
        routes = self.routes(grid, ctx)  # (B, n, W, N)
        sums, hold = route_sums(routes, grid, blocks), torch.sigmoid(self.hold)
        c, new = remember(sums, hold, old.capsules, blocks, lambda sums, kept: (1 - kept) * capsule_mean(sums))
        size = (self.u.norm() * self.v.norm()).clamp(min=1.0)
        moved, bend = c + (self.u @ (self.v.mT @ c)) / size, torch.sigmoid(self.bend)
        seen = (1 - bend) * moved + bend * moved.tanh()
        return routes @ seen.to(routes.dtype), c, old._replace(capsules=new)

    def routes(self, grid: Tensor, ctx: Ctx) -> Tensor:
        """Each token's shares in the capsules, (B, n, W, N)."""
        block, _, count = self.shape
        place = torch.arange(block, device=grid.device, dtype=grid.dtype) / max(1, block - 1)
        breadth = F.softplus(self.breadth) + 1 / (2 * count)
        near = -0.5 * ((place.unsqueeze(1) - self.centre) / breadth).square()  # (W, N)
        content = self.router(rms_norm(grid.flatten(1, 2)), ctx).view(*grid.shape[:-1], count)
        return (near + torch.sigmoid(self.route_logit) * content).softmax(-1).to(grid.dtype)

    def entropy_loss(self, grid: Tensor, blocks: Blocks) -> Tensor:
        """Weighted relu(0.8 ln S - H(p)), p the channels' shares of the spectra's energy, summed over sequences.

        H is orthonormal, so the spectra have the energy of the values.
        """
        energy = (grid * blocks.inside).square().sum((1, 2), dtype=torch.promote_types(grid.dtype, torch.float32))
        p = energy / (energy.sum(-1, keepdim=True) + 1e-12)
        entropy = -(p * (p + 1e-12).log()).sum(-1)
        return self.h.skc_spectral_entropy * F.relu(0.8 * math.log(self.shape[1]) - entropy).sum()


class Engram(Module):
    """Packed n-gram memory: y = gate * W_p m, m the hashed n-grams, gate = sigmoid(scale cos(x, W_k m) + bias).

    scale is learned within [0.1, 4]. The memory goes on to SKC layers that want it.
    """

    kinds: ClassVar[dict[str, str]] = {"sharpness": "scalar", "bias": "scalar"}

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        self.table = HashedNgrams(h)
        self.key = Linear(name + ".key", h.bigram_hash_dim, h.model_dim)
        self.value = Linear(name + ".value", h.bigram_hash_dim, h.model_dim)
        self.sharpness, self.bias = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def init_state(self, batch: int, dtype: torch.dtype) -> None:
        return None

    def forward(self, x: Tensor, ctx: Ctx, state: None) -> Out:
        memory = self.table(ctx)
        alike = (rms_norm(x) * rms_norm(self.key(memory, ctx))).mean(-1, keepdim=True)  # the cosine; 0 of a zero vector
        scale = 0.1 + 3.9 * torch.sigmoid(self.sharpness)
        gate = torch.sigmoid(scale * alike + self.bias)
        y = gate.to(x.dtype) * self.value(memory, ctx)
        return Out(y, memory={"engram": memory}, metrics=watched(ctx, gate=gate))


# ==== 7. RESIDUAL ============================================================
# Gives: how sites read from and write to the residual stream: open, read, write, close.
# Needs: LAYERS. Does not know what a site computes.


class Site(NamedTuple):
    """One step of the network: `block` and `kind` name the parameters, `id` the state; loops, passes repeat layers.

    `sub` is the sublayer, which with the layer indexes residual parameters, so that layers which share a block have
    scales of their own; a site with sub < 0 adds its output as is. A site that stands beside another one has its input.
    """

    id: int
    kind: str
    layer: int
    loop: int = 0
    pass_: int = 0
    sub: int = 0
    block: int = 0
    beside: bool = False
    visits: int = 1  # of all sites with these parameters at this layer

    @property
    def label(self) -> str:
        """Its name among diagnostics: layer, kind, and which loop or pass, if not the first."""
        return (
            f"{self.layer}.{self.kind}"
            + f".loop{self.loop}" * (self.loop > 0)
            + f".pass{self.pass_}" * (self.pass_ > 0)
        )

    @property
    def visit(self) -> tuple[int, int, int]:
        """Which run through its layer a site belongs to."""
        return (self.layer, self.loop, self.pass_)


class Stream(NamedTuple):
    """The residual state R, immutable: lanes (B, T, D) each, x0, and what was kept or made once on the way."""

    lanes: tuple[Tensor, ...]
    x0: Tensor
    skips: tuple[Tensor, ...] = ()  # first lane after each layer of the first half
    early: tuple[Tensor, ...] = ()  # first lane after layer BACKOUT
    made: tuple = ()  # what a topology makes once for a forward pass
    notes: tuple[Tensor, ...] = ()  # what a topology measures on the way


class PlainResidual(Module):
    """x <- x + scale * f(norm x), and what all topologies have in common, on their first lane.

    At a layer's first site x <- m0 x + m1 x0 with RESID_MIX. With skips, layers of the first half store their outputs
    for the second half, last in first out: there a layer begins with x <- x + skip * stored, per channel (the field's
    baseline), in every loop and pass; a layer that is repeated stores its last output. At the end x <- x - b * (x after
    layer BACKOUT). Parameters are indexed by (layer, sublayer), shared over loops.
    """

    kinds: ClassVar[dict[str, str]] = dict.fromkeys(("scale", "mix", "skip", "backout"), "scalar")

    def __init__(self, h: Hyperparameters, sites: Sequence[Site]) -> None:
        super().__init__()
        self.h, self.count, self.lanes = h, 1, 1  # lanes at the start and later on
        # Sublayers that read, in order: beside another site there is nothing to read.
        readers = sorted({2 * site.layer + site.sub for site in sites if site.sub >= 0 and not site.beside})
        self.order = {o: place for place, o in enumerate(readers)}
        self.first = {site.visit: site.id for site in reversed(sites) if site.sub >= 0}
        self.last = {site.visit: site.id for site in sites if site.sub >= 0}
        self.depth = h.num_layers // 2 if h.has_skips else 0
        self.build(h, sites)
        self.mix = nn.Parameter(torch.empty(h.num_layers, 2, h.model_dim)) if h.mixes_input else None
        self.skip = nn.Parameter(torch.empty(self.depth, h.model_dim)) if self.depth else None
        self.backout = nn.Parameter(torch.empty(1)) if h.backout >= 0 else None

    def build(self, h: Hyperparameters, sites: Sequence[Site]) -> None:
        """The parameters of this topology alone."""
        self.scale = nn.Parameter(torch.empty(h.num_layers, 2, h.model_dim))

    def open(self, x0: Tensor, e2: Tensor | None, ctx: Ctx) -> Stream:
        """R before the first site, from the embedding x0 and the part e2 of it that comes from n-grams."""
        early = () if self.backout is None else (x0,)
        return self.prepare(Stream((x0,) * self.count, x0, (x0,) * self.depth, early), e2, ctx)

    def prepare(self, r: Stream, e2: Tensor | None, ctx: Ctx) -> Stream:
        return r

    def fuses(self, x: Tensor) -> bool:
        """Whether kernels make reads and writes of several lanes; of more than four, sums would not fit registers."""
        return HAS_TRITON and x.is_cuda and self.lanes <= 4 and x.dtype in (torch.float32, torch.bfloat16)

    def read(self, r: Stream, site: Site, ctx: Ctx) -> tuple[Tensor, Stream, Any]:
        """The input of a site before its norm, R, and what write is to know of this reading."""
        if self.first.get(site.visit) == site.id:
            x, place = r.lanes[0], site.layer - self.depth
            if self.skip is not None and 0 <= place < self.depth:
                x = torch.addcmul(x, r.skips[self.depth - 1 - place], self.skip[place].to(x.dtype))
            if self.mix is not None:
                mix = self.mix[site.layer].to(x.dtype)
                x = torch.addcmul(x * mix[0], r.x0, mix[1])
            r = r._replace(lanes=(x, *r.lanes[1:]))
        return self.gather(r, site, ctx)

    def gather(self, r: Stream, site: Site, ctx: Ctx) -> tuple[Tensor, Stream, Any]:
        return r.lanes[0], r, None

    def write(self, r: Stream, site: Site, y: Tensor, link: Any) -> Stream:
        """R after a site's output y (B, T, D)."""
        r = r._replace(lanes=self.spread(r, site, y.to(r.x0.dtype), link))
        if self.last.get(site.visit) == site.id:
            if site.layer < self.depth:
                r = r._replace(skips=(*r.skips[: site.layer], r.lanes[0], *r.skips[site.layer + 1 :]))
            if self.backout is not None and site.layer == self.h.backout:
                r = r._replace(early=(r.lanes[0],))
        return r

    def spread(self, r: Stream, site: Site, y: Tensor, link: Any) -> tuple[Tensor, ...]:
        if site.sub < 0:
            return (r.lanes[0] + y, *r.lanes[1:])
        return (torch.addcmul(r.lanes[0], y, self.scale[site.layer, site.sub].to(y.dtype)),)

    def close(self, r: Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """The output (B, T, D), the mean of the lanes, and diagnostics."""
        x = functools.reduce(torch.add, r.lanes) / len(r.lanes) if len(r.lanes) > 1 else r.lanes[0]
        x = x if self.backout is None else torch.addcmul(x, r.early[0], -self.backout.to(x.dtype))
        return x, self.measured(r)

    def measured(self, r: Stream) -> dict[str, Tensor]:
        return {}


def vectors(scalars: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Each scalar as a vector (D,) in the dtype of `like`, in order.

    The gradient of a product with it is then a column sum, as cheap as a channel scale's, and one sum over (scalars, D)
    gives all of them: a reduction of a whole activation for each scalar was most of the cost of hyper-connections.
    """
    return scalars.unsqueeze(-1).expand(*scalars.shape, like.shape[-1]).to(like.dtype).flatten(0, -2).unbind(0)


def blended(weights: Sequence[Tensor], lanes: Sequence[Tensor]) -> Tensor:
    """The sum of weights times lanes; weights (D,) or (B, T, 1)."""
    return added(lanes[0] * weights[0], weights[1:], lanes[1:])


# Triton kernels of a read or a write, out_k = sum_j w_kj x_j of lanes, a sublayer's output and, with biases, x0 and e2,
# and of its gradients. The compiler puts the sums that are gradients of w off and joins them across layers, up to 100
# activations in one kernel, and takes 1.7 times the plain backward pass (records/2026-11-26_h200). Here a program walks
# tiles and adds up its share of them: each number is read and written once, and memory bandwidth is the bound. With
# APART > 0 the first APART inputs are nearly alike: out_k = x_k + sum_j w_kj c_j, c_j = x_j - x_0 for 0 < j < APART.
if HAS_TRITON:

    @triton.jit
    def load_lanes(xs, place, there):
        """Each of the inputs in float32."""
        found = ()  # type: tuple
        for j in tl.static_range(len(xs)):
            found = found + (tl.load(xs[j] + place, mask=there, other=0.0).to(tl.float32),)
        return found

    @triton.jit
    def more_sums(sums, slopes, x, APART):
        """The sums that are gradients of w, with those of a tile; nothing is wanted of w_k0 where x_0 is the base."""
        found = ()  # type: tuple
        for k in tl.static_range(len(slopes)):
            for j in tl.static_range(len(x)):
                value = x[j] - x[0] if j < APART else x[j]
                found = found + (sums[k * len(x) + j] + slopes[k] * value,)
        return found

    @triton.jit
    def no_sums(count, TILE):
        found = ()  # type: tuple
        for _ in tl.static_range(count):
            found = found + (tl.zeros((TILE,), tl.float32),)
        return found

    @triton.jit
    def lanes_kernel(xs, outs, w, size, APART: tl.constexpr, TILE: tl.constexpr):
        count: tl.constexpr = len(xs)
        place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        there = place < size
        x = load_lanes(xs, place, there)
        for k in tl.static_range(len(outs)):
            total = x[k] if APART else tl.load(w + k * count) * x[0]
            for j in tl.static_range(1, count):
                total += tl.load(w + k * count + j) * (x[j] - x[0] if j < APART else x[j])
            tl.store(outs[k] + place, total, mask=there)

    @triton.jit
    def lanes_gradient_kernel(xs, grads, founds, w, dw, size, APART: tl.constexpr, TILE: tl.constexpr):
        count: tl.constexpr = len(xs)
        sums = no_sums(len(grads) * count, TILE)
        for start in range(tl.program_id(0) * TILE, size, tl.num_programs(0) * TILE):
            place = start + tl.arange(0, TILE)
            there = place < size
            x, slopes = load_lanes(xs, place, there), load_lanes(grads, place, there)
            sums, first = more_sums(sums, slopes, x, APART), slopes[0]
            if APART == 0:
                first = tl.load(w) * slopes[0]
                for k in tl.static_range(1, len(grads)):
                    first += tl.load(w + k * count) * slopes[k]
            for j in tl.static_range(1, count):
                down = tl.load(w + j) * slopes[0]
                for k in tl.static_range(1, len(grads)):
                    down += tl.load(w + k * count + j) * slopes[k]
                if j < APART:
                    first -= down
                    down = down + slopes[j] if j < len(grads) else down
                tl.store(founds[j] + place, down, mask=there)
            tl.store(founds[0] + place, first, mask=there)
        for i in tl.static_range(len(grads) * count):
            tl.store(dw + tl.program_id(0) * (len(grads) * count) + i, tl.sum(sums[i]))


LANES_PROGRAMS = 1056  # eight for each multiprocessor of an H100


def contiguous(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in xs]


def lanes_tile(sums: int) -> int:
    """Numbers of a tile: each thread holds the 4 or 8 of its share for each of the sums."""
    return 1024 if sums <= 10 else 512


@torch.library.custom_op("golf::lanes", mutates_args=())
def fused_lanes(w: Tensor, inputs: list[Tensor], apart: int) -> list[Tensor]:
    """Reads or lanes after a write, one for each row of w (K, C) float32, of C contiguous inputs (B, T, D)."""
    outs, size, tile = [torch.empty_like(inputs[0]) for _ in w], inputs[0].numel(), lanes_tile(len(w))
    lanes_kernel[(triton.cdiv(size, tile),)](tuple(inputs), tuple(outs), w, size, apart, tile)
    return outs


@torch.library.custom_op("golf::lanes_gradient", mutates_args=())
def fused_lanes_gradient(w: Tensor, inputs: list[Tensor], grads: list[Tensor], apart: int) -> list[Tensor]:
    """Gradients of w and of each of the inputs."""
    found, size, tile = [torch.empty_like(x) for x in inputs], inputs[0].numel(), lanes_tile(w.numel())
    programs = min(LANES_PROGRAMS, triton.cdiv(size, tile))
    dw = w.new_empty((programs, *w.shape))
    lanes_gradient_kernel[(programs,)](tuple(inputs), tuple(grads), tuple(found), w, dw, size, apart, tile)
    return [dw.sum(0), *found]


fused_lanes.register_fake(lambda w, inputs, apart: [torch.empty_like(inputs[0]) for _ in w])
fused_lanes_gradient.register_fake(
    lambda w, inputs, grads, apart: [torch.empty_like(w), *(torch.empty_like(x) for x in inputs)]
)


def keep_lanes(ctx: Any, inputs: tuple, **_: Any) -> None:
    """What the gradient needs."""
    ctx.save_for_backward(inputs[0], *inputs[1])
    ctx.apart = inputs[2]


def lanes_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor, list[Tensor], None]:
    """No autograd function: at the start lanes are the same tensor, which the compiler does not take from one."""
    w, *inputs = ctx.saved_tensors
    dw, *found = fused_lanes_gradient(w, inputs, contiguous(grads), ctx.apart)
    return dw, found, None


fused_lanes.register_autograd(lanes_backward, setup_context=keep_lanes)


class HyperConnections(PlainResidual):
    """HC_LANES lanes (Zhu et al. 2024, arXiv 2409.19606), most of them frozen: the form that won on modded-nanogpt.

    Sublayer o reads lane o mod n, o counted among those that read, and then, for each lane k, l_k <- r_o l_k + p_ok y +
    b_ok, where b_ok = beta x0 + delta e2 for a layer's first sublayer and else is absent. HC_LEARN says which of keep
    (r), write (p), bias (beta, delta), read (sum_j a_oj l_j in place of one lane) and mix (sum_j m_okj l_j in place of
    l_k) are learned. Before layer HC_START there is one lane, and x <- x + y. The embedding holds e2 already, so
    layer 0 has no delta. Where lanes begin they are alike, and what is read has no effect under a norm: that is never
    learned. Sites beside the sublayers read and write lane 0.
    """

    kinds: ClassVar[dict[str, str]] = {
        **PlainResidual.kinds,
        "keep": "hc_keep",
        **dict.fromkeys(("give", "x0_bias", "e2_bias", "take", "cross"), "hc"),
    }

    def build(self, h: Hyperparameters, sites: Sequence[Site]) -> None:
        n, layers, learned = h.hc_lanes, h.num_layers - h.hc_start, h.hc_learned
        self.lanes, self.count = n, n if h.hc_start == 0 else 1
        self.order = {o: place for place, o in enumerate(o for o in self.order if o >= 2 * h.hc_start)}

        def parameter(name: str, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape)) if name in learned else None

        self.keep = parameter("keep", layers, 2, n if h.hc_keep_per_lane else 1)
        self.give = parameter("write", layers, 2, n)
        self.x0_bias = parameter("bias", layers, n)
        delayed = layers - (h.hc_start == 0)
        self.e2_bias = parameter("bias", delayed, n) if h.has_bigram_stream and delayed else None
        self.take, self.cross = parameter("read", len(self.order) - 1, n), parameter("mix", layers, 2, n, n)

    def prepare(self, r: Stream, e2: Tensor | None, ctx: Ctx) -> Stream:
        x0, parts = r.x0, (self.keep, self.give, self.take, self.cross)
        if self.h.hc_detach:
            x0, e2 = x0.detach(), None if e2 is None else e2.detach()
        if self.fuses(x0):
            take = () if self.take is None else self.take.float().unsqueeze(1).unbind(0)
            sources = (x0, *(() if self.e2_bias is None or e2 is None else (e2.to(x0.dtype),)))
            return r._replace(made=(self.matrices(x0).unbind(0), sources, take))
        keep, give, take, cross = (() if part is None else vectors(part, x0) for part in parts)
        biases: tuple[Tensor, ...] = ()
        if self.x0_bias is not None:
            biases = tuple(x0 * beta for beta in vectors(self.x0_bias, x0))
            if self.e2_bias is not None and e2 is not None:
                deltas = vectors(self.e2_bias, x0)
                early = len(biases) - len(deltas)
                late = (torch.addcmul(b, e2.to(b.dtype), d) for b, d in zip(biases[early:], deltas, strict=True))
                biases = (*biases[:early], *late)
        return r._replace(made=(keep, give, take, cross, biases))

    def matrices(self, x0: Tensor) -> Tensor:
        """The weights of each write (2 layers, n, n + 3) float32: of the lanes, the output, x0 and e2."""
        n, layers = self.lanes, self.h.num_layers - self.h.hc_start
        ones = x0.new_ones((layers, 2, n), dtype=torch.float32)
        keep = ones * (self.h.hc_keep_init if self.keep is None else self.keep)
        among = torch.diag_embed(keep) if self.cross is None else keep.unsqueeze(-1) * self.cross
        give = ones if self.give is None else self.give
        biases = [0 * ones, 0 * ones]
        for place, part in enumerate((self.x0_bias, self.e2_bias)):
            if part is not None:  # of first sublayers, and of e2 not of the network's first
                late = torch.stack((part, torch.zeros_like(part)), 1)
                biases[place] = F.pad(late, (0, 0, 0, 0, layers - len(part), 0))
        return torch.cat((among, torch.stack((give, *biases), -1)), -1).flatten(0, 1)

    def gather(self, r: Stream, site: Site, ctx: Ctx) -> tuple[Tensor, Stream, None]:
        if site.sub < 0 or site.layer < self.h.hc_start:
            return r.lanes[0], r, None
        n, place, take = self.lanes, self.order.get(2 * site.layer + site.sub), r.made[2]
        r = r._replace(lanes=r.lanes * n) if len(r.lanes) < n else r
        if place is None or not (place and take):
            return r.lanes[(place or 0) % n], r, None
        if self.fuses(r.x0):
            return fused_lanes(take[place - 1], contiguous(r.lanes), 0)[0], r, None
        return blended(take[(place - 1) * n :][:n], r.lanes), r, None

    def spread(self, r: Stream, site: Site, y: Tensor, link: None) -> tuple[Tensor, ...]:
        n, layer = self.lanes, site.layer - self.h.hc_start
        if site.sub < 0 or layer < 0:
            return (r.lanes[0] + y, *r.lanes[1:])
        o = 2 * layer + site.sub
        if self.fuses(r.x0):
            matrices, sources, _ = r.made
            inputs = (*r.lanes, y, *(sources if self.x0_bias is not None and site.sub == 0 else ()))
            return tuple(fused_lanes(matrices[o][:, : len(inputs)].contiguous(), contiguous(inputs), 0))
        (keep, give, _, cross, biases), found = r.made, []
        for k in range(n):
            lane = blended(cross[(o * n + k) * n :][:n], r.lanes) if cross else r.lanes[k]
            if keep:
                lane = lane * keep[o * n + k if self.h.hc_keep_per_lane else o]
            elif self.h.hc_keep_init != 1:
                lane = lane * self.h.hc_keep_init
            lane = lane + biases[layer * n + k] if biases and site.sub == 0 else lane
            found.append(torch.addcmul(lane, y, give[o * n + k]) if give else lane + y)
        return tuple(found)


def permutations_of(n: int) -> Tensor:
    """Permutation matrices (K, n, n), the identity first: all of them for n <= 4, else all rotations and neighbours'
    exchanges, which generate the rest."""
    if n <= 4:
        orders = list(itertools.permutations(range(n)))
    else:
        orders = [tuple((i + step) % n for i in range(n)) for step in range(n)]
        orders += [(*range(i), i + 1, i, *range(i + 2, n)) for i in range(n - 1)]
    return torch.eye(n)[torch.tensor(orders)]


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """The doubly stochastic matrix that scales exp(logits) (..., n, n) (Sinkhorn 1964), in at least float32.

    Columns and rows are normalized in turn, in logarithms; rows last. For n = 2 the solution is known.
    """
    a = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if a.shape[-1] == 2:
        across = torch.sigmoid((a[..., 0, 1] + a[..., 1, 0] - a[..., 0, 0] - a[..., 1, 1]) / 2)
        return torch.stack((1 - across, across, across, 1 - across), -1).unflatten(-1, (2, 2))
    for _ in range(iterations):
        a = a - a.logsumexp(-2, keepdim=True)
        a = a - a.logsumexp(-1, keepdim=True)
    return a.exp()


class ManifoldConnections(PlainResidual):
    """mHC: MHC_N streams mixed by doubly stochastic matrices, which neither grow nor shrink them (Xie et al. 2025).

    x = sum_j pre_j X_j; X_k <- sum_j B_kj X_j + post_k y, B = I + g (R - I), pre = sigmoid(.), post = 2 sigmoid(.), the
    gate g = sigmoid(.), or sigmoid(. + w norm(X_1 .. X_n)) with MHC_GATE=token. R is made of logits / MHC_TAU: by
    Sinkhorn's iterations, or (MHC_MODE=lite) as a mean of permutation matrices, which needs none. With
    MHC_LOGITS=dynamic the logits are base + alpha W norm(X_1 .. X_n), for each token.

    At the start each sublayer reads one stream alone, in turn, and writes one a little more than the others: from a
    symmetric start all streams get the same gradients and stay the same for ever. Rows of R - I add up to 0, and the
    norm after the reading takes out the sum of pre, so both are made of the differences X_j - X_0: streams are nearly
    the same at first, and gradients taken of X_j itself would be nothing but rounding errors. While streams are exactly
    the same it has no effect which one is read and how they are mixed, nor how before their mean is taken: the first
    sublayer reads stream 0, and neither it nor the last one mixes, unless loops come back to them. Sites beside the
    sublayers read the mean and write all streams alike (R = I).
    """

    kinds: ClassVar[dict[str, str]] = {
        **PlainResidual.kinds,
        **dict.fromkeys(("take", "give"), "mhc"),
        **dict.fromkeys(("gate", "base", "alpha", "look", "gate_look"), "mhc_mix"),
    }

    def build(self, h: Hyperparameters, sites: Sequence[Site]) -> None:
        n, last, wide = h.mhc_n, 2 * h.num_layers - 1, h.mhc_n * h.model_dim
        looped = {site.layer for site in sites if site.loop}
        begins, ends = 0 not in looped, h.num_layers - 1 not in looped
        self.count = self.lanes = n
        self.reads = {o: place - begins for o, place in self.order.items() if o or not begins}
        self.mixes = {o: o - begins for o in range(begins, last + 1 - ends)}
        inner, every = len(self.mixes), permutations_of(n)
        width = len(every) if h.mhc_mode == "lite" else n * n
        self.take, self.give = nn.Parameter(torch.empty(len(self.reads), n)), nn.Parameter(torch.empty(last + 1, n))
        self.gate, self.base = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner, width))
        dynamic, per_token = h.mhc_logits == "dynamic", h.mhc_gate == "token"
        self.alpha = nn.Parameter(torch.empty(inner)) if dynamic else None
        self.look = nn.Parameter(torch.empty(inner, width, wide)) if dynamic else None
        self.gate_look = nn.Parameter(torch.empty(inner, wide)) if per_token else None
        self.by_tokens = dynamic or per_token
        if h.mhc_mode == "lite":
            self.register_buffer("changes", (every - every[0]).flatten(1), persistent=False)

    changes: Tensor  # (K, n n)

    def deviation(self, logits: Tensor) -> Tensor:
        """R - I (..., n, n) of raw logits (..., K), in at least float32; of permutations, the mean of their changes."""
        logits, n = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.h.mhc_tau, self.count
        if self.h.mhc_mode != "lite":
            mixing = sinkhorn(logits.unflatten(-1, (n, n)), self.h.sinkhorn_iters)
            return mixing - torch.eye(n, dtype=mixing.dtype, device=mixing.device)
        with torch.autocast(logits.device.type, enabled=False):
            return (logits.softmax(-1) @ self.changes.to(logits.dtype)).unflatten(-1, (n, n))

    def opened(self, logits: Tensor, sublayers: Tensor, ctx: Ctx) -> Tensor:
        """g of gate logits, in training with noise: one draw for each sublayer, or of one sublayer for each row."""
        if self.h.mhc_gate_noise and ctx.moment is not None:
            rows = ctx.moment.rows
            keys = (sublayers,) if sublayers.ndim else (sublayers.expand_as(rows), rows)
            drawn = keyed_uniform(self.h.seed + 1, ctx.moment.step, *keys)
            normal = math.sqrt(2) * torch.erfinv((2 * drawn - 1).clamp(-0.999999, 0.999999)).to(logits.dtype)
            logits = logits + self.h.mhc_gate_noise * normal.view(*drawn.shape, *[1] * (logits.ndim - drawn.ndim))
        return torch.sigmoid(logits)

    def noted(self, r: Stream, change: Tensor, gate: Tensor, ctx: Ctx) -> Stream:
        """R with the gate's mean, the diagonal's mean and the largest error of a column's sum, if they are wanted."""
        if not ctx.variant.measures:
            return r
        error, diagonal = change.sum(-2).abs().amax(), 1 + change.diagonal(dim1=-2, dim2=-1).mean()
        note = torch.stack((gate.to(error.dtype).mean(), diagonal, error))
        return r._replace(notes=(*r.notes, note))

    def prepare(self, r: Stream, e2: Tensor | None, ctx: Ctx) -> Stream:
        """pre, post, and B of all sublayers at once where it does not depend on the token."""
        pre, give = torch.sigmoid(self.take), 2 * torch.sigmoid(self.give)
        share = pre / pre.sum(1, keepdim=True)
        if self.by_tokens:
            return r._replace(made=(vectors(share[:, 1:], r.x0), vectors(give, r.x0), ()))
        gate = self.opened(self.gate, torch.arange(len(self.gate), device=r.x0.device), ctx)
        change = self.deviation(self.base)
        mixing = (gate[:, None, None] * change)[..., 1:]
        parts = (share[:, 1:], give, mixing)
        made = self.matrices(share, give, mixing) if self.fuses(r.x0) else tuple(vectors(x, r.x0) for x in parts)
        return self.noted(r._replace(made=made), change, gate, ctx)

    def fuses(self, x: Tensor) -> bool:
        return not self.by_tokens and super().fuses(x)

    def matrices(self, share: Tensor, give: Tensor, mixing: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """The weights of each read (1, n) and write (n, n + 1) float32: of the differences X_j - X_0, and of y."""
        before = min(self.mixes, default=0)
        mixing = F.pad(mixing, (1, 0, 0, 0, before, len(give) - before - len(mixing)))  # X_0 has no difference
        write = torch.cat((mixing, give.unsqueeze(-1)), -1).float()
        return share.float().unsqueeze(1).unbind(0), write.unbind(0)

    def gather(self, r: Stream, site: Site, ctx: Ctx) -> tuple[Tensor, Stream, tuple]:
        if site.sub < 0:
            return functools.reduce(torch.add, r.lanes) / self.count, r, ((), ())
        m, o = self.count - 1, 2 * site.layer + site.sub
        row, place = self.reads.get(o), self.mixes.get(o)
        if row is None and (place is None or self.fuses(r.x0)):
            return r.lanes[0], r, ((), ())
        if self.fuses(r.x0):
            return fused_lanes(r.made[0][row], contiguous(r.lanes), m + 1)[0], r, ((), ())
        take, _, mixing = r.made
        apart = tuple(lane - r.lanes[0] for lane in r.lanes[1:])
        x = r.lanes[0] if row is None else added(r.lanes[0], take[row * m :][:m], apart)
        if place is None:
            return x, r, ((), ())
        if not self.by_tokens:
            return x, r, (mixing[place * (m + 1) * m :][: (m + 1) * m], apart)
        change, r = self.by_token(r, place, ctx)
        return x, r, (change[..., 1:].to(x.dtype).flatten(-2).unsqueeze(-2).unbind(-1), apart)  # each (B, T, 1)

    def by_token(self, r: Stream, place: int, ctx: Ctx) -> tuple[Tensor, Stream]:
        """g (R - I) of each token (B, T, n, n) for a mixing sublayer, and R with what was noted."""
        seen = rms_norm(torch.cat(r.lanes, -1))  # (B, T, n D)
        logits, gate = self.base[place], self.gate[place].expand(seen.shape[:2])
        if self.gate_look is not None:
            gate = gate + (seen @ self.gate_look[place].to(seen.dtype)).to(gate.dtype)
        if self.look is not None and self.alpha is not None:
            logits = logits + self.alpha[place] * F.linear(seen, self.look[place].to(seen.dtype)).to(logits.dtype)
        gate = self.opened(gate, torch.full((), place, device=seen.device), ctx)
        change = self.deviation(logits)
        return gate[..., None, None] * change, self.noted(r, change, gate, ctx)

    def spread(self, r: Stream, site: Site, y: Tensor, link: tuple) -> tuple[Tensor, ...]:
        if site.sub < 0:
            return tuple(lane + y for lane in r.lanes)
        n, (mixing, apart) = self.count, link
        if self.fuses(r.x0):
            return tuple(fused_lanes(r.made[1][2 * site.layer + site.sub], contiguous((*r.lanes, y)), n))
        give = r.made[1][(2 * site.layer + site.sub) * n :][:n]
        lanes = tuple(torch.addcmul(lane, y, share) for lane, share in zip(r.lanes, give, strict=True))
        if not mixing:
            return lanes
        return tuple(added(lane, mixing[k * (n - 1) :][: n - 1], apart) for k, lane in enumerate(lanes))

    def measured(self, r: Stream) -> dict[str, Tensor]:
        """Mean cosine of pairs of streams; of the sublayers, means and the largest error of this batch."""
        if not r.notes:
            return {}
        gate, diagonal, error = torch.cat([note.view(-1, 3) for note in r.notes]).unbind(-1)
        unit = [F.normalize(lane.to(gate.dtype), dim=-1) for lane in r.lanes]
        among = functools.reduce(torch.add, unit).square().sum(-1).mean()
        similarity = (among - self.count) / (self.count * (self.count - 1))
        found = {"stream_similarity": similarity, "gate": gate.mean(), "diagonal": diagonal.mean()}
        return {**found, "column_error": error.max()}

    def ranges(self) -> dict[str, tuple[float, float, float, float]]:
        """Streams that are alike, or a mixing that is the identity or the mean of all, have learned nothing."""
        return {
            "stream_similarity": (-1.0, 0.2, -1.0, 0.4),
            "gate": (0.3, 0.7, 0.0, 0.99),
            "diagonal": (max(0.4, 1 / self.count + 0.01), 0.8, 1 / self.count + 0.01, 0.9999),
            "column_error": (0.0, 1e-6, 0.0, 0.01),
        }


RESIDUALS: dict[str, Any] = {
    "plain": PlainResidual, "unet": PlainResidual, "hc": HyperConnections, "mhc": ManifoldConnections,
}  # fmt: skip


# ==== 8. MEMORY ==============================================================
# Gives: what re-enters the stack: the capsule bank, and feedback from one pass over the decoder to the next.
# Needs: LAYERS, MIXERS.


class CapsuleBank(Module):
    """Capsules that live along blocks and along passes; everything in the basis rotated by H.

    Along blocks: O^p_b, a scan over summaries of blocks before b of x (pass 0) or of the top of pass p - 1, routed by
    content. What is left of it after each TRAIN_SEQ_LEN tokens is CAPSULE_CARRY_DECAY. Along passes: C^0 = O^0,
    C^p = O^p + sigmoid(blend) (K C^{p-1} - O^p), K c = d c + U V^T c with |K| <= 0.999: |d| < 0.989 by its role, and
    U V^T is shrunk to what is left. Losses: K C^{p-1} against O^p, and K^k C^p against the last pass.
    """

    kinds: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("prototypes", "hold", "gate"), "scalar"),
        **dict.fromkeys(("u", "v", "blend"), "koopman"),
        "diagonal": "koopman_diagonal",
    }

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        self.h, width, count = h, h.capsule_dim, h.capsule_num
        self.router, self.value = (Linear(f"{name}.{part}", h.model_dim, width) for part in ("router", "value"))
        self.again = Linear(name + ".again", h.model_dim, width) if h.feedback_passes else None
        self.proj = Linear(name + ".proj", width, h.model_dim)
        self.prototypes, self.hold = (nn.Parameter(torch.empty(count, width)) for _ in range(2))
        self.gate = nn.Parameter(torch.empty(1))
        if h.feedback_passes:
            self.diagonal, self.blend = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(1))
            self.u, self.v = (nn.Parameter(torch.empty(width, h.koopman_rank)) for _ in range(2))
        self.turn = Turn(h)

    def init_state(self, batch: int, dtype: torch.dtype) -> BlockState:
        shape, wide = (batch, *self.hold.shape), torch.promote_types(dtype, torch.float32)
        sums = self.hold.new_zeros((*shape[:-1], shape[-1] + 1), dtype=wide)
        return BlockState(sums, self.hold.new_zeros(shape, dtype=wide))

    def forward(self, x: Tensor, ctx: Ctx, state: BlockState | None) -> Out:
        assert ctx.blocks is not None
        old, trail = self.init_state(x.shape[0], x.dtype) if state is None else state, ctx.memory.get("capsules", ())
        c, new = self.observed(x, ctx, old)
        losses = {}
        if trail:
            foreseen = self.predict(trail[-1])
            losses = self.losses(trail, foreseen, c) if ctx.moment is not None else {}
            c = c + torch.sigmoid(self.blend) * (foreseen - c)
        if ctx.variant.speculates:
            for _ in range(self.h.feedback_passes):
                c = self.predict(c)
        routes = ctx.blocks.lay(self.routes(x, ctx))
        read = self.turn(routes @ c.to(routes.dtype)) * ctx.blocks.visible
        y = torch.tanh(self.gate).to(x.dtype) * self.proj(ctx.blocks.pick(read, x.shape[1]).to(x.dtype), ctx)
        metrics = watched(ctx, capsules=c, opening=torch.tanh(self.gate))
        return Out(y, None if state is None else new, None, {"capsules": (*trail, c)}, losses, metrics)

    def routes(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Shares of tokens in capsules by content, (B, T, N)."""
        scores = F.linear(self.router(x, ctx), self.prototypes.to(x.dtype)) / math.sqrt(self.prototypes.shape[1])
        return scores.softmax(-1)

    def observed(self, x: Tensor, ctx: Ctx, old: BlockState) -> tuple[Tensor, BlockState]:
        """O of this pass for each block, (B, n, N, S), and the next state."""
        blocks, source = ctx.blocks, ctx.memory.get("top", x)
        assert blocks is not None
        project = self.again if "top" in ctx.memory and self.again is not None else self.value
        values = self.turn(blocks.lay(project(source, ctx)))
        sums = route_sums(blocks.lay(self.routes(source, ctx)), values, blocks)
        number = blocks.first + torch.arange(sums.shape[1], device=x.device)
        width, window = self.h.skc_block_size, self.h.train_seq_len
        crosses = (number * width) // window != ((number + 1) * width) // window
        left = torch.where(crosses, self.h.capsule_carry_decay, 1.0).to(old.seen.dtype)[..., None, None]
        hold = torch.sigmoid(self.hold)

        def write(sums: Tensor, _: Tensor) -> Tensor:
            return left * (1 - hold * blocks.keep.unsqueeze(-1)) * capsule_mean(sums)

        return remember(sums, left * hold, old, blocks, write)

    def predict(self, c: Tensor) -> Tensor:
        """K c, (..., S)."""
        room = 0.999 - self.diagonal.abs().max()
        scale = (room / (self.u.norm() * self.v.norm() + 1e-12)).clamp(0.0, 1.0)
        return self.diagonal * c + scale * (c @ self.v) @ self.u.mT

    def losses(self, trail: tuple[Tensor, ...], foreseen: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """Mean squared errors of predictions per sequence, weighted and summed over sequences."""
        mean, found = seen.shape[0] / seen.numel(), {}
        if self.h.capsule_consistency:
            found["consistency"] = self.h.capsule_consistency * mean * (foreseen - seen.detach()).square().sum()
        if self.h.capsule_speculator and len(trail) == self.h.feedback_passes:
            last = (seen + torch.sigmoid(self.blend) * (foreseen - seen)).detach()
            total = seen.new_zeros(())
            for passes_left, c in zip(range(len(trail), 0, -1), trail, strict=True):
                for _ in range(passes_left):
                    c = self.predict(c)
                total = total + (c - last).square().sum()
            found["speculator"] = self.h.capsule_speculator * mean * total
        return found


class Sketch(Module):
    """FEEDBACK_SKETCH_TOKENS tokens of each block from the top of the last pass, and the memory they make.

    A sketch token is W_f norm(mean of the top over a part of the block); M_{b+1} = gamma M_b + sum k v^T. The page's
    factor eta on the sum would have no gradient, since what is read of M is normed.
    """

    kinds: ClassVar[dict[str, str]] = {"hold": "scalar"}

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        self.parts, self.shape = h.feedback_sketch_tokens, (h.model_dim, h.feedback_dim)
        self.sketch = Linear(name + ".sketch", h.model_dim, h.feedback_dim)
        self.pairs = Linear(name + ".pairs", h.feedback_dim, 2 * h.feedback_dim)
        self.hold = nn.Parameter(torch.empty(1))

    def init_state(self, batch: int, dtype: torch.dtype) -> BlockState:
        (width, inner), wide = self.shape, torch.promote_types(dtype, torch.float32)
        zeros = self.hold.new_zeros
        return BlockState(zeros((batch, self.parts, width + 1), dtype=wide), zeros((batch, inner, inner), dtype=wide))

    def forward(self, x: Tensor, ctx: Ctx, state: BlockState | None) -> Out:
        assert ctx.blocks is not None
        old, blocks = self.init_state(x.shape[0], x.dtype) if state is None else state, ctx.blocks
        grid = F.pad(blocks.lay(ctx.memory["top"]), (0, 1), value=1.0) * blocks.inside  # (B, n, W, D + 1)
        sums = grid.unflatten(2, (self.parts, -1)).sum(3)  # (B, n, m, D + 1)

        def write(sums: Tensor, _: Tensor) -> Tensor:
            means = rms_norm(capsule_mean(sums)).to(x.dtype).flatten(1, 2)
            pairs = self.pairs(self.sketch(means, ctx), ctx).unflatten(1, (-1, self.parts))  # (B, n, m, 2 F)
            k, v = pairs.chunk(2, -1)
            return (k.mT @ v).to(sums.dtype)

        seen, new = remember(sums, torch.sigmoid(self.hold).view(1, 1), old, blocks, write)
        return Out(None, None if state is None else new, memory={"sketch": seen})


class Feedback(Module):
    """y = tanh(gate) W norm(M_b q), q = W_q x: what a token's block may see of the last pass's sketches."""

    kinds: ClassVar[dict[str, str]] = {"gate": "scalar"}

    def __init__(self, h: Hyperparameters, layer: int, name: str) -> None:
        super().__init__()
        self.query = Linear(name + ".query", h.model_dim, h.feedback_dim)
        self.proj = Linear(name + ".proj", h.feedback_dim, h.model_dim)
        self.gate = nn.Parameter(torch.empty(1))

    def init_state(self, batch: int, dtype: torch.dtype) -> None:
        return None

    def forward(self, x: Tensor, ctx: Ctx, state: None) -> Out:
        assert ctx.blocks is not None
        memory = ctx.memory["sketch"]  # (B, n, F, F)
        read = ctx.blocks.lay(self.query(x, ctx)).to(memory.dtype) @ memory
        found = rms_norm(ctx.blocks.pick(read * ctx.blocks.visible, x.shape[1])).to(x.dtype)
        y = torch.tanh(self.gate).to(x.dtype) * self.proj(found, ctx)
        return Out(y, metrics=watched(ctx, opening=torch.tanh(self.gate)))


class Piece(NamedTuple):
    """Tokens start..stop of a window that lie in one segment, `phase` tokens after its beginning."""

    start: int
    stop: int
    phase: int
    reads: int  # memory tokens before them: 0 if the segment goes on
    writes: int  # memory tokens after them: 0 if the segment does not end here, or nothing follows

    def places(self, segment: int, memory: int, width: int) -> tuple[int, ...]:
        """The positions of all tokens and of the next one, memory and text in blocks of their own."""
        before, room = -(-memory // width) * width, -(-segment // width) * width
        text = range(before + self.phase, before + self.phase + self.stop - self.start)
        after = range(before + room, before + room + self.writes)
        follows = text.stop if self.phase + len(text) < segment else after.start
        return (*range(self.reads), *text, *after, after.stop if after else follows)


class SegmentState(NamedTuple):
    """The memory of a stream, and the segment that is open."""

    memory: Tensor  # (B, M, D) written by the last segment; from the segment's begin on, what it reads
    document: Tensor  # (B,) in which it was written; -1: nowhere
    segment: Tensor  # (B, < RMT_SEGMENT) tokens of the open segment
    stream: Any  # StreamState of the open segment


class SegmentMemory(Module):
    """Memory tokens around each segment (Bulatov et al. 2022): read before it, written after it.

    A segment is [read; text; write]; text sees what is read and earlier text, written tokens see everything. The last
    hidden state at the written tokens is what the next segment reads, and the written tokens begin as what was read.
    Where a segment begins in another document than the memory is of, it reads what a stream starts with.
    """

    kinds: ClassVar[dict[str, str]] = dict.fromkeys(("first", "read", "write"), "scalar")

    def __init__(self, h: Hyperparameters) -> None:
        super().__init__()
        self.segment, self.tokens = h.rmt_segment, h.rmt_tokens
        self.first, self.read, self.write = (nn.Parameter(torch.empty(h.rmt_tokens, h.model_dim)) for _ in range(3))

    def pieces(self, length: int, phase: int, goes_on: bool) -> Iterator[Piece]:
        """A window in pieces, after `phase` tokens of an open segment; nothing is written for nobody."""
        start = 0
        while start < length:
            stop = min(length, start + self.segment - phase)
            whole = phase + stop - start == self.segment
            read = whole and (goes_on or stop < length)
            yield Piece(start, stop, phase, 0 if phase else self.tokens, self.tokens * read)
            start, phase = stop, 0

    def around(self, kept: SegmentState, x: Tensor, documents: Tensor, piece: Piece) -> Tensor:
        """The text x (B, T, D) of a piece in its documents (B, T) with what is read and what is to be written."""
        read = rms_norm(kept.memory + self.read).to(x.dtype)
        write = rms_norm(self.known(kept, documents[:, -1]).memory + self.write).to(x.dtype)
        return torch.cat((read[:, : piece.reads], x, write[:, : piece.writes]), 1)

    def known(self, kept: SegmentState, document: Tensor) -> SegmentState:
        """What there is to read in `document` (B,): of another one nothing but the beginning."""
        same = (kept.document == document)[:, None, None]
        return kept._replace(memory=torch.where(same, kept.memory, self.first.to(kept.memory.dtype)), document=document)


# A site is what the residual stream passes, built by (h, layer, parameter name prefix).
SITE_KINDS: dict[str, Any] = {
    "attn": Attention, "nsa": NSA, "koopman": Koopman, "skc": SKC, "mlp": MLP, "moe": MoE,
    "engram": Engram, "bank": CapsuleBank, "sketch": Sketch, "feedback": Feedback,
}  # fmt: skip


# ==== 9. MODEL ===============================================================
# Gives: one network from a configuration: site list, initialization, loss, logits, states, generation.
# Needs: LAYERS to MEMORY. Knows nothing of optimizers and files.


class StreamState(NamedTuple):
    """Where each row of a carried stream stands."""

    position: Tensor  # (B,) int64, tokens so far
    document: Tensor  # (B,) int64, document starts so far
    begin: Tensor  # (B,) int64, position at which the last document began
    block_document: Tensor  # (B,) int64, document that ended the last complete block
    history: Tensor  # (B, h.history) int64, the last tokens; -1 where there were none


class Trace(NamedTuple):
    """What sites leave beside the stream: next states by site id, losses summed over sequences, diagnostics."""

    states: dict[int, Any]
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]

    def add(self, site: Site, out: Out) -> Trace:
        """This trace and what one more site left; losses of what is visited again are means over the visits."""
        losses = {n: loss / site.visits + self.losses.get(n, 0.0) for n, loss in out.losses.items()}
        metrics = {f"{site.label}.{name}": value for name, value in out.metrics.items() if not PACKAGED}
        states = self.states if out.state is None else {**self.states, site.id: out.state}
        return Trace(states, {**self.losses, **losses}, {**self.metrics, **metrics})


def mean_trace(traces: list[Trace]) -> Trace:
    """The last states, and means of losses and diagnostics, of traces with the same names."""
    losses, metrics = (
        {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}
        for parts in ([trace.losses for trace in traces], [trace.metrics for trace in traces])
    )
    return Trace(traces[-1].states, losses, metrics)


class LossOut(NamedTuple):
    """Sums over the batch, to be divided by global counts."""

    total: Tensor  # cross-entropy of all targets, nats
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    state: Any


def variant_at(h: Hyperparameters, progress: float) -> Variant:
    """The structure of the network at a share of the run."""
    return Variant(
        untied=0 < h.untie_at_fraction <= progress,
        experts=h.moe_experts > 0 and progress >= h.moe_start_fraction,
        looped=bool(h.looped) and progress >= h.recurrence_start_fraction,
    )


def final_variant(h: Hyperparameters) -> Variant:
    """The structure of the finished model."""
    return variant_at(h, 1.0)


def scoring_variant(h: Hyperparameters, variant: Variant | None = None) -> Variant:
    """The structure in which a model (the finished one, if none is given) is scored and writes."""
    speculates = h.capsule_speculate and h.capsule_bank and h.feedback_passes > 0
    return (variant or final_variant(h))._replace(speculates=speculates)


def visited_layers(h: Hyperparameters) -> list[tuple[int, int]]:
    """(layer, loop) in the order in which the stream visits them: RECURRENCE_LAYERS as a group, again and again."""
    order = [(layer, 0) for layer in range(h.num_layers)]
    if h.looped:
        again = [(layer, loop) for loop in range(1, h.recurrence_depth) for layer in h.looped]
        order[h.looped[-1] + 1 : h.looped[-1] + 1] = again
    return order


def layer_sites(h: Hyperparameters, layer: int, loop: int, pass_: int) -> Iterator[Site]:
    """The sites of one visit of a layer, without ids."""
    block = layer % h.shared_blocks if h.shared_blocks else layer
    if h.has_engram and layer == h.engram_inject_layer and loop == 0:
        yield Site(0, "engram", layer, 0, pass_, -1, layer)
    if pass_ > 0 and loop == 0 and (layer - h.num_layers // 2) % h.feedback_every == 0:
        yield Site(0, "feedback", layer, 0, pass_, -1, layer)
    yield Site(0, h.mixers[layer], layer, loop, pass_, 0, block)
    yield Site(0, h.feeds[layer], layer, loop, pass_, 1, block, h.letters[layer] == "P")


def plan_sites(h: Hyperparameters, variant: Variant) -> tuple[Site, ...]:
    """The flat list of sites of a configuration, in the order in which the stream passes them.

    The second half of the layers is the decoder: the bank stands before it, and feedback passes run it again. Another
    variant's list is that of the final one with whole visits left out: ids, and so states, stay the same.
    """
    order, half, sites = visited_layers(h), h.num_layers // 2, list[Site]()
    entry = order.index((half, 0))
    for pass_ in range(h.feedback_passes + 1):
        visits = [site for layer, loop in order[entry:] for site in layer_sites(h, layer, loop, pass_)]
        early = [site for layer, loop in order[:entry] for site in layer_sites(h, layer, loop, 0)] if not pass_ else []
        sketch = [Site(0, "sketch", half, 0, pass_, -1, half)] if pass_ else []
        bank = [Site(0, "bank", half, 0, pass_, -1, half)] if h.capsule_bank else []
        sites += [*early, *sketch, *bank, *visits]
    numbered = (site._replace(id=number) for number, site in enumerate(sites))
    there = [site for site in numbered if variant.looped or not site.loop]
    stay = [site for site in there if not (variant.speculates and site.pass_)]
    counts = Counter(
        (site.kind, site.layer) for site in stay if site.kind != "bank"
    )  # its losses are of pairs of passes
    return tuple(site._replace(visits=counts.get((site.kind, site.layer), 1)) for site in stay)


class GPT(Module):
    """Embedding, the sites of the plan along the residual topology, norm, head with softcap.

    Parameters hold the decoded (quantized) weights that forward uses; latents live in the optimizer section.
    """

    def __init__(self, h: Hyperparameters, bos: int) -> None:
        super().__init__()
        self.h, self.bos, self.sites = h, bos, plan_sites(h, final_variant(h))
        speculates = h.capsule_speculate and h.capsule_bank and h.feedback_passes > 0
        loops, ways = (False, True)[: 1 + bool(h.looped)], (False, True)[: 1 + speculates]
        self.plans = {(a, b): plan_sites(h, Variant(looped=a, speculates=b)) for a in loops for b in ways}
        self.embed, self.head, self.rotary = Embedding(h, bos), Head(h), Rotary(h)
        blocks = [nn.ModuleDict() for _ in range(h.num_layers)]
        for site in self.sites:
            if site.kind not in blocks[site.block]:
                name = f"blocks.{site.block}.{site.kind}"
                blocks[site.block][site.kind] = SITE_KINDS[site.kind](h, site.layer, name)
        self.blocks = nn.ModuleList(blocks)
        self.residual = RESIDUALS[h.residual](h, self.sites)
        self.memory = SegmentMemory(h) if h.rmt_segment else None

    def init_state(self, batch: int) -> tuple:
        """States before any token: the stream's place, then one state per site, indexed by site id."""
        stream = self.start_stream(self.no_history(self.embed.weight.new_zeros(batch, dtype=torch.int64)))
        if not self.h.rmt_segment:
            return (stream, *self.site_states(batch))
        return (stream, *self.site_states(batch), self.start_memory(batch))

    def start_memory(self, batch: int) -> SegmentState:
        """Memory before any segment."""
        assert self.memory is not None
        stream = self.start_stream(self.no_history(self.embed.weight.new_zeros(batch, dtype=torch.int64)))
        memory = self.memory.first.detach().expand(batch, -1, -1)
        return SegmentState(memory, stream.document - 1, stream.history[:, :0], stream)

    def site_states(self, batch: int) -> tuple:
        """Each site's state before any token."""
        return tuple(self.site(site).init_state(batch, self.embed.weight.dtype) for site in self.sites)

    def start_stream(self, history: Tensor) -> StreamState:
        """The begin of a stream after other tokens (B, h.history)."""
        zeros = history.new_zeros(history.shape[0])
        return StreamState(zeros, zeros, zeros, zeros, history)

    def no_history(self, like: Tensor) -> Tensor:
        """(B, h.history) of -1, for B rows of int64 as in `like`."""
        return like.new_full((like.shape[0], self.h.history), -1)

    def start_state(self, history: Tensor) -> tuple | None:
        """The state of rows that begin anew, but for the tokens before them (B, h.history); None if h.history is 0.

        It has no site's state, and none comes out.
        """
        return (self.start_stream(history),) if self.h.history and history.shape[1] else None

    def ranges(self) -> dict[str, tuple[float, float, float, float]]:
        """Ranges of all diagnostics that have one, by name."""
        parts = {"residual": self.residual, **{site.label: self.site(site) for site in self.sites}}
        return {f"{label}.{name}": limits for label, part in parts.items() for name, limits in part.ranges().items()}

    def site(self, site: Site) -> Any:
        return self.blocks[site.block][site.kind]  # type: ignore[index]

    def context(
        self,
        tokens: Tensor,
        state: tuple | None,
        variant: Variant,
        moment: Moment | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
        adapters: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Ctx:
        steps, starts = torch.arange(tokens.shape[1], device=tokens.device), tokens == self.bos
        history = self.no_history(tokens) if state is None else state[0].history
        stream = state[0] if self.h.carries and state is not None and len(state) > 1 else None
        positions = steps.unsqueeze(0) if stream is None else stream.position.unsqueeze(1) + steps
        rotary, positions = self.rotary(positions), positions.expand_as(tokens)
        documents = starts.cumsum(1) if stream is None else starts.cumsum(1) + stream.document.unsqueeze(1)
        begins = torch.where(starts, positions, 0).cummax(1).values if self.h.has_ages else None
        if begins is not None and stream is not None:
            begins = begins.clamp(min=stream.begin.unsqueeze(1))
        laid = self.h.has_blocks and self.memory is None
        blocks = lay_blocks(self.h.skc_block_size, positions, documents, stream) if laid else None
        age = positions - begins if begins is not None else None
        fresh = age == 0 if age is not None else None
        rows = self.embed.value_rows
        memory = {} if rows is None else {"values": F.embedding(tokens, rows)}
        return Ctx(
            self.bos, tokens, history, positions, documents, age, fresh, blocks, rotary, 0, 0, None, memory, moment,
            variant, observe, adapters,
        )  # fmt: skip

    def piece_context(self, ctx: Ctx, piece: Piece, stream: StreamState | None) -> Ctx:
        """The context of a piece of a window with its memory tokens, which have no token and no rotary phase."""
        h, text, around = self.h, slice(piece.start, piece.stop), (piece.reads, piece.writes)
        device, rows = ctx.tokens.device, len(ctx.tokens)
        own = ctx.documents[:, text]
        documents = torch.cat((own[:, :1].expand(-1, around[0]), own, own[:, -1:].expand(-1, around[1])), 1)
        starts, count = ctx.tokens[:, text] == self.bos, piece.stop - piece.start
        if piece.reads:  # what is read belongs to the document of the first token
            starts = torch.cat((torch.zeros_like(starts[:, :1]), starts[:, 1:]), 1)
        fresh = F.pad(starts, around)
        places = piece.places(h.rmt_segment, h.rmt_tokens, h.skc_block_size if h.has_blocks else 1)
        positions = torch.tensor(places[:-1], device=device).expand(rows, -1)
        begins = torch.where(fresh, positions, 0).cummax(1).values
        begins = begins if stream is None else begins.clamp(min=stream.begin.unsqueeze(1))
        order = torch.tensor((*range(piece.reads), *range(piece.phase, piece.phase + count), *range(piece.writes)))
        age = torch.minimum(positions - begins, order.to(device)) if h.has_ages else None  # memory is no neighbour
        turned = torch.tensor((*[0] * piece.reads, *range(piece.phase, piece.phase + count), *[0] * piece.writes))
        return ctx._replace(
            tokens=F.pad(ctx.tokens[:, text], around, value=-1),
            history=self.no_history(ctx.tokens) if stream is None else stream.history,
            positions=positions, documents=documents, age=age, fresh=fresh if h.has_ages else None,
            blocks=lay_blocks(h.skc_block_size, positions, documents, stream, places) if h.has_blocks else None,
            rotary=self.rotary(turned.to(device).unsqueeze(0)), reads=piece.reads, writes=piece.writes,
            memory={name: F.pad(part[:, text], (0, 0, *around)) for name, part in ctx.memory.items()},
        )  # fmt: skip

    def run_sites(
        self, sites: Sequence[Site], r: tuple, ctx: Ctx, states: tuple | None, trace: Trace
    ) -> tuple[tuple, Ctx, Trace]:
        """Pass the residual state through some sites; what sites leave goes into the context and the trace."""
        for site in sites:
            seen, r, link = self.residual.read(r, site, ctx)
            if not site.beside:
                stream = seen
                x, ctx = self.site_input(site, stream, ctx)
            out: Out = self.site(site)(x, ctx, None if states is None else states[1 + site.id])
            y = out.y
            if y is not None:
                sizes = watched(ctx, branch=y, stream=stream)
                if sizes:
                    sizes["branch_over_stream"] = sizes["branch_rms"] / (sizes["stream_rms"] + 1e-12)
                    out = out._replace(metrics={**out.metrics, **sizes})
                r = self.residual.write(r, site, self.thinned(site, y, ctx), link)
            ctx = ctx._replace(v0=ctx.v0 if out.v0 is None else out.v0, memory={**ctx.memory, **out.memory})
            trace = trace.add(site, out)
        return r, ctx, trace

    def site_input(self, site: Site, x: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
        """The normed input of a site. Where a block has stopped it stays that of the pass before, and so do its keys,
        values and summaries, which later passes of other blocks see."""
        x = rms_norm(x) / math.sqrt(site.layer + 1) if self.h.ln_scale and site.sub >= 0 else rms_norm(x)
        if not (self.h.feedback_halt and self.h.capsule_bank) or "inputs" not in ctx.memory or site.sub < 0:
            return x, ctx
        inputs, key = ctx.memory["inputs"], (site.layer, site.loop, site.sub)
        if key in inputs:
            x = torch.where(ctx.memory["stopped"], inputs[key], x)
        return x, ctx._replace(memory={**ctx.memory, "inputs": {**inputs, key: x}})

    def thinned(self, site: Site, y: Tensor, ctx: Ctx) -> Tensor:
        """Stochastic depth (Huang et al. 2016): by chance a row's output is left out, or grown to make up."""
        if not self.h.stochastic_depth or ctx.moment is None or site.sub < 0:
            return y
        chance = self.h.stochastic_depth * (site.layer + 1) / self.h.num_layers
        drawn = keyed_uniform(self.h.seed, ctx.moment.step, torch.full_like(ctx.moment.rows, site.id), ctx.moment.rows)
        return y * ((drawn >= chance) / (1 - chance)).to(y.dtype)[:, None, None]

    def run(
        self, sites: Sequence[Site], r: tuple, ctx: Ctx, states: tuple | None, trace: Trace
    ) -> tuple[tuple, Ctx, Trace]:
        """run_sites, with activations recomputed in the backward pass every GRAD_CHECKPOINT sites."""
        every = self.h.grad_checkpoint if torch.is_grad_enabled() else 0
        if not every:
            return self.run_sites(sites, r, ctx, states, trace)
        starts = [i for i, site in enumerate(sites) if not site.beside][::every]
        for start, stop in zip(starts, [*starts[1:], len(sites)], strict=True):
            r, ctx, trace = recompute(self.run_sites, sites[start:stop], r, ctx, states, trace, use_reentrant=False)
        return r, ctx, trace

    def hidden(self, ctx: Ctx, state: tuple | None) -> tuple[Tensor, tuple | None, Trace]:
        """(B, T, D) before the head, the next state (None unless sites' states were given), and what the sites left."""
        carried = self.h.carries and state is not None and len(state) > 1
        x0, e2, metrics = self.embed(ctx)
        if self.h.rmt_segment:
            top, after, trace = self.over_segments(x0, e2, ctx, state if carried else None)
        else:
            top, ctx, trace = self.stack(x0, e2, ctx, state if carried else None)
            after = self.next_sites(trace, state) if state is not None and carried else ()
        if not PACKAGED:
            trace = trace._replace(metrics={**{f"embed.{n}": m for n, m in metrics.items()}, **trace.metrics})
        return top, (self.next_stream(ctx, state[0]), *after) if state is not None and carried else None, trace

    def next_sites(self, trace: Trace, state: tuple) -> tuple:
        """The states of all sites, of those that were left out the old ones."""
        return tuple(trace.states.get(site.id, state[1 + site.id]) for site in self.sites)

    def over_segments(self, x0: Tensor, e2: Tensor | None, ctx: Ctx, state: tuple | None) -> tuple:
        """The stack along the segments of a window, memory from one to the next: (B, T, D), states and memory, trace.

        Gradients flow through RMT_BPTT segments. Losses and diagnostics are means over segments.
        """
        assert self.memory is not None
        kept = self.start_memory(len(x0)) if state is None else state[-1]
        sites = state[1:-1] if state is not None and kept.segment.shape[1] else None
        tops: list[Tensor] = []
        traces: list[Trace] = []
        fresh = self.no_history(ctx.tokens)
        for number, piece in enumerate(self.memory.pieces(x0.shape[1], kept.segment.shape[1], state is not None)):
            if piece.reads:
                kept = self.memory.known(kept, ctx.documents[:, piece.start])
            if number and number % self.h.rmt_bptt == 0:
                kept = kept._replace(memory=kept.memory.detach())
            if state is not None and not piece.writes and sites is None:
                sites = self.site_states(len(x0))
            top, part, trace = self.over_piece(piece, kept, x0, e2, ctx, sites)
            tops.append(top[:, piece.reads : top.shape[1] - piece.writes])
            traces.append(trace)
            if piece.writes:
                sites, memory = None, top[:, -piece.writes :].to(kept.memory.dtype)
                kept = SegmentState(memory, part.documents[:, -1], part.tokens[:, :0], self.start_stream(fresh))
            elif self.h.carries and sites is not None:
                tokens = torch.cat((kept.segment, ctx.tokens[:, piece.start : piece.stop]), 1)
                stream = kept.stream if piece.phase else self.start_stream(fresh)
                sites = self.next_sites(trace, (stream, *sites))
                kept = kept._replace(segment=tokens, stream=self.next_stream(part, stream))
        if state is None:
            return torch.cat(tops, 1), (), mean_trace(traces)
        return torch.cat(tops, 1), (*(sites or self.site_states(len(x0))), kept), mean_trace(traces)

    def over_piece(
        self, piece: Piece, kept: SegmentState, x0: Tensor, e2: Tensor | None, ctx: Ctx, sites: tuple | None
    ) -> tuple[Tensor, Ctx, Trace]:
        """The stack over one piece of a segment and its memory tokens."""
        assert self.memory is not None
        text, stream = slice(piece.start, piece.stop), kept.stream if piece.phase else None
        part = self.piece_context(ctx, piece, stream)
        x = self.memory.around(kept, x0[:, text], ctx.documents[:, text], piece)
        own = None if e2 is None else F.pad(e2[:, text], (0, 0, piece.reads, piece.writes))
        return self.stack(x, own, part, None if sites is None else (stream, *sites))

    def stack(self, x0: Tensor, e2: Tensor | None, ctx: Ctx, states: tuple | None) -> tuple[Tensor, Ctx, Trace]:
        """All sites from the embedding to (B, T, D) before the head, with states in the order of `init_state`."""
        sites, half = self.plans[ctx.variant.looped, ctx.variant.speculates], self.h.num_layers // 2
        entry = next(i for i, site in enumerate(sites) if site.kind == "bank" or site.layer >= half)
        saved, ctx, trace = self.run(sites[:entry], self.residual.open(x0, e2, ctx), ctx, states, Trace({}, {}, {}))
        if ctx.moment is None and self.h.feedback_halt and self.h.capsule_bank and sites[-1].pass_ > 1:
            stopped = torch.zeros_like(ctx.tokens, dtype=torch.bool).unsqueeze(-1)
            ctx = ctx._replace(memory={**ctx.memory, "inputs": {}, "stopped": stopped})
        for pass_ in range(sites[-1].pass_ + 1):
            part = [site for site in sites[entry:] if site.pass_ == pass_]
            r, ctx, trace = self.run(part, saved, ctx, states, trace)
            x, measured = self.residual.close(r)
            top = rms_norm(x)
            if self.h.feedback_passes:
                ctx = self.after_pass(top, ctx)
                top = ctx.memory["top"]
        if not PACKAGED:
            named = {f"residual.{name}": value for name, value in measured.items()}
            trace = trace._replace(metrics={**trace.metrics, **named})
        return top, ctx, trace

    def after_pass(self, top: Tensor, ctx: Ctx) -> Ctx:
        """The context of the next pass: the top of this one; and in evaluation, which blocks stop here.

        A block stops when a pass has changed the capsules that it sees by at most FEEDBACK_HALT of their size. What it
        says is then settled, but a batch is computed as a whole: nothing is saved.
        """
        memory = ctx.memory
        if not (self.h.feedback_halt and self.h.capsule_bank) or "stopped" not in memory:
            return ctx._replace(memory={**memory, "top": top})
        assert ctx.blocks is not None
        stopped, trail = memory["stopped"], memory["capsules"]
        if "top" in memory:
            top = torch.where(stopped, memory["top"], top)
        if len(trail) > 1:
            change, size = (x.norm(dim=(-2, -1)) for x in (trail[-1] - trail[-2], trail[-1]))  # (B, n)
            still = (change <= self.h.feedback_halt * size)[..., None, None] & ctx.blocks.visible
            stopped = stopped | ctx.blocks.pick(still, ctx.tokens.shape[1])
        return ctx._replace(memory={**memory, "top": top, "stopped": stopped})

    def next_stream(self, ctx: Ctx, old: StreamState) -> StreamState:
        """Where the stream stands after a segment."""
        recent = torch.cat((ctx.history, ctx.tokens), 1)[:, ctx.tokens.shape[1] :].clone()
        position, document = ctx.positions[:, -1] + 1, ctx.documents[:, -1].clone()
        ended = old.block_document if ctx.blocks is None else ctx.blocks.document
        begin = old.begin if ctx.age is None else ctx.positions[:, -1] - ctx.age[:, -1]
        return StreamState(position, document, begin, ended, recent)

    def head_name(self, variant: Variant) -> str:
        """Which matrix makes the logits."""
        return "head.weight" if self.h.has_head and (variant.untied or not self.h.tie_embeddings) else "embed.weight"

    def head_weight(self, variant: Variant) -> Tensor:
        own = self.head.weight
        return own if own is not None and self.head_name(variant) == "head.weight" else self.embed.weight

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        variant: Variant,
        state: tuple | None = None,
        moment: Moment | None = None,
        adapters: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> LossOut:
        """Cross-entropy of `targets` (B, T; -100: not scored) after `tokens` (B, T), summed, in nats."""
        ctx = self.context(tokens, state, variant, moment, adapters=adapters)
        x, after, trace = self.hidden(ctx, state)
        x = self.head(x, ctx).flatten(0, 1)
        smoothing = self.h.label_smoothing if moment is not None else 0.0
        head = self.head_weight(variant)
        total = SoftcapCrossEntropy.apply(x, head, targets.flatten(), self.h.logit_softcap, smoothing)
        return LossOut(total, trace.losses, trace.metrics, after)

    def logits(
        self,
        tokens: Tensor,
        variant: Variant,
        state: tuple | None = None,
        last: int = 0,
        adapters: dict[str, tuple[Tensor, Tensor]] | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> tuple[Tensor, tuple | None]:
        """Softcapped logits (B, T, V) in at least float32, of the `last` positions if given, and the state."""
        ctx = self.context(tokens, state, variant, None, observe, adapters)
        x, state, _ = self.hidden(ctx, state)
        x = self.head(x[:, -last:], ctx)
        if observe is not None:
            observe(self.head_name(variant), x)
        return softcap(F.linear(x, self.head_weight(variant)), self.h.logit_softcap), state

    forward = logits  # what torch.func.functional_call runs, for evaluation under other weights


def role_table(model: GPT) -> dict[str, Role]:
    """The one row of each parameter: codec, optimizer group, rate and decay. Raises KeyError if one is missing.

    Raises UserError for an entry of CODEC_MAP that means none.
    """
    rows, h, idle = {}, model.h, set(model.h.codec_rules) - set(ROLE_NAMES)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert isinstance(module, Module)
            full = f"{path}.{name}" if path else name
            place = (module.kinds[name], full, parameter.shape)
            rows[full] = role_of(h, *place)
            if not PACKAGED:
                idle -= {pattern for pattern in idle if fits_pattern(pattern, *place)}
    if idle:
        known = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", n) for n, p in model.named_parameters() if p.ndim > 1)
        raise UserError(f"CODEC_MAP: {min(idle)} names no weight; known: {', '.join((*ROLE_NAMES, *known))}")
    return rows


def initial_value(h: Hyperparameters, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """First value of one parameter, all of them in this one place.

    Output projections start at zero, so that each layer starts as the identity; other matrices uniform with standard
    deviation 1 / sqrt(inputs); head.down starts as the transpose-like small random map that lets logits start near 0.
    A gate that opens from zero has a projection behind it that is zero, too, so it starts a little open.
    """
    leaf = name.rsplit(".", 2)[-2:]
    constants = {"q_gain": h.qk_gain_init, "scale": 1.0, "skip": 1.0, "v_mix": 4.0, "amount": 0.0, "backout": 0.5}
    constants |= {"gain": 0.1 if leaf[0] == "induction" else 1.0, "found": 0.0}
    plain = set(h.mixers) == {"attn"} and not (h.capsule_bank or h.feedback_passes or h.rmt_segment)
    if not plain or h.bigram_hash_buckets or h.value_embed:
        constants |= {"v_rows": 0.5, "value_rows": 0.0, "sharpness": 0.0, "bias": 0.0, "gate": 0.2}
    if not plain:
        constants |= {"local_decay": 1.0, "route_logit": -2.0, "breadth": -2.0, "bend": -4.0, "place": 0.0}
        constants |= {"diagonal": 0.9, "blend": h.capsule_blend_init}
    if not plain and name.endswith("sketch.hold"):
        return torch.full(tuple(shape), 2.0)
    if name == "residual.mix":
        return torch.stack((torch.ones(shape[0], shape[2]), torch.zeros(shape[0], shape[2])), 1)
    if leaf[0] == "residual" and h.residual in ("hc", "mhc") and leaf[-1] not in ("skip", "backout"):
        return initial_connection(h, leaf[-1], shape, generator)
    if leaf[-1] in constants:
        return torch.full(tuple(shape), constants[leaf[-1]])
    if not plain and leaf[-1] in ("decay", "hold"):  # from one block to a training window, evenly over the logarithm
        spread = torch.linspace(0, math.log(max(2, h.train_seq_len / h.skc_block_size)), math.prod(shape)).exp()
        chosen = spread[torch.randperm(math.prod(shape), generator=generator)].view(*shape)
        return torch.logit((1 - 1 / chosen).clamp(0.05, 0.999))
    if not plain and leaf[-1] == "centre":
        return torch.linspace(0, 1, shape[0])
    if not plain and leaf[-1] == "taps":
        return torch.cat((torch.ones(1, shape[1]), torch.zeros(shape[0] - 1, shape[1])))
    if not plain and leaf[0] == "memory":
        return torch.randn(*shape, generator=generator)
    if not plain and leaf[-1] in ("u", "v", "z0"):  # z0: a norm of zeros alone would have a gradient without bound
        size = 1e-3 if leaf[0] == "koopman" else 0.02 if leaf[-1] == "z0" else 0.01 / math.sqrt(shape[-1])
        return torch.randn(*shape, generator=generator) * size
    if name.endswith(".gate.weight"):
        return torch.zeros(*shape)
    if name == "embed.weight" or (name == "head.weight" and h.tie_embeddings):
        return torch.randn(*shape, generator=generator) * h.tied_embed_init_std
    closed = leaf[0] in ("proj", "down") and name.startswith("blocks")
    if closed or leaf[0] == "table" or name in ("head.weight", "embed.ngrams.weight"):
        return torch.zeros(*shape)
    if leaf[0] == "qkv" and h.attn_init == "mimetic":
        return mimetic_qkv(h, shape, generator)
    bound = math.sqrt(3.0 / shape[-1])
    return (torch.rand(*shape, generator=generator) * 2 - 1) * bound


def mimetic_qkv(h: Hyperparameters, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Queries and keys whose product is like a trained network's, 0.7 (Z + I), Z Gaussian (Trockman and Kolter 2023).

    Of each head only, as its width allows: on the space that the keys of its group span, which two power iterations
    bring near the product's largest singular vectors. The paper's other half, values times projection like -I, is left
    out: projections start at zero here.
    """
    width, size = h.head_dim, shape[1]
    keys: list[Tensor] = []
    queries: list[Tensor] = []
    for _ in range(h.num_kv_heads):
        noise = torch.randn(h.num_heads // h.num_kv_heads, size, size, generator=generator) / math.sqrt(size)
        products = 0.7 * (noise + torch.eye(size))
        basis = torch.randn(size, width, generator=generator)
        for _ in range(3):
            basis = torch.linalg.qr(products[0].T @ (products[0] @ basis)).Q  # (D, Dh)
        keys.append(basis.T)
        queries += (products @ basis).mT.unbind()
    values = (torch.rand(len(keys) * width, size, generator=generator) * 2 - 1) * math.sqrt(3.0 / size)
    return torch.cat((*queries, *keys, values))


def initial_connection(h: Hyperparameters, leaf: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """First value of a parameter of hyper-connections or mHC; sublayer o reads lane o mod n."""
    constants = {"keep": h.hc_keep_init, "x0_bias": h.hc_x0_init, "e2_bias": h.hc_bigram_init, "alpha": 0.01}
    constants |= {"gate": math.log(h.mhc_gate_init / (1 - h.mhc_gate_init)), "gate_look": 0.0}
    if h.residual == "hc":
        constants["give"] = 1.0
    if leaf in constants:
        return torch.full(tuple(shape), constants[leaf])
    if leaf == "look":
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])
    if leaf == "base":
        first = torch.eye(h.mhc_n).flatten() if h.mhc_mode == "sinkhorn" else torch.eye(shape[-1])[0]
        other = h.mhc_init_offdiag if h.mhc_mode == "sinkhorn" else h.mhc_init_others
        return ((1 - first) * other).expand(*shape).clone()
    if leaf == "cross":
        return torch.eye(shape[-1]).expand(*shape).clone()
    reads = leaf == "take"  # from the second one on
    chosen = torch.eye(shape[1])[torch.tensor([(o + reads) % shape[1] for o in range(shape[0])], dtype=torch.int64)]
    return chosen if h.residual == "hc" else (h.mhc_read_apart if reads else h.mhc_write_apart) * (2 * chosen - 1)


def parameter_seed(seed: int, name: str) -> int:
    """A seed of its own for each parameter, so that two configurations start shared parameters alike."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def build_model(h: Hyperparameters, rt: Runtime, bos: int, fill: bool = True) -> GPT:
    """A network on its device, freshly initialized (the same numbers on every device and rank) unless fill is False."""
    with torch.device("cpu"):
        torch.set_default_dtype(rt.dtype)
        model = GPT(h, bos)
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters() if fill else ():
            generator = torch.Generator().manual_seed(parameter_seed(h.seed, name))
            parameter.copy_(initial_value(h, name, parameter.shape, generator))
    return model.to(rt.device)


def sample_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row of logits (B, V), (B, 1): greedy for temperature 0, else nucleus sampling."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    above = logits.cpu().double()
    ordered, index = ((above - above.amax(-1, keepdim=True)) / temperature).softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    drop = before >= top_p
    drop[..., 0] = False
    ordered = ordered.masked_fill(drop, 0.0)
    return index.gather(-1, torch.multinomial(ordered, 1, generator=generator)).to(logits.device)


@torch.no_grad()
def continued(
    model: GPT, rt: Runtime, tokens: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> Iterator[Tensor]:
    """Continue texts (B, T) token by token from the mixers' states, without end; yields new tokens (B, 1)."""
    state: tuple | None = model.init_state(len(tokens))
    while True:
        with rt.precision():
            logits, state = model.logits(tokens, scoring_variant(model.h), state, last=1)
        tokens = sample_token(logits[:, -1], temperature, top_p, generator)
        yield tokens


def generate(
    model: GPT, rt: Runtime, prompt: Sequence[int], count: int, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """Continue a prompt; yields each new token."""
    tokens, generator = torch.tensor([list(prompt)], device=rt.device), torch.Generator().manual_seed(seed)
    for token in itertools.islice(continued(model, rt, tokens, temperature, top_p, generator), count):
        yield int(token)


def flops_per_token(model: GPT) -> float:
    """Forward and backward FLOPs of one trained token: 6 a matrix weight, 12 L D T of attention (PaLM, app. B)."""
    h, roles, sizes = model.h, role_table(model), {name: p.numel() for name, p in model.named_parameters()}
    matrices = {name: size for name, size in sizes.items() if roles[name].group == "matrix"}
    total = float(h.vocab_size * h.embed_width)
    total += sum(size for name, size in matrices.items() if not name.startswith("blocks."))
    for site in model.sites:  # a layer counts as often as it is visited, and of its experts those that a token takes
        own = {n: size for n, size in matrices.items() if n.startswith(f"blocks.{site.block}.{site.kind}.")}
        total += sum(size * uses_of(h, name) for name, size in own.items())
    memory = h.rmt_tokens if h.rmt_segment else 0
    length = min(h.train_seq_len, h.rmt_segment or h.train_seq_len)
    sparse = length // h.nsa_stride + h.nsa_select * h.nsa_select_block + h.nsa_window
    keys = {"attn": min(length, h.attn_window or length) + memory, "nsa": min(3 * length, sparse) + 3 * memory}
    more = 1 + 2 * h.rmt_tokens / h.rmt_segment if h.rmt_segment else 1.0
    return more * (6.0 * total + 12.0 * h.model_dim * sum(keys.get(site.kind, 0) for site in model.sites))


def uses_of(h: Hyperparameters, name: str) -> float:
    """How often a token uses a matrix: an expert by its chance; pools once for NSA_STRIDE tokens and each head."""
    if "_pool." in name:
        return h.num_kv_heads / h.nsa_stride
    return h.moe_top_k / h.moe_experts if ".experts." in name else 1.0


# ==== 10. OPTIMIZERS =========================================================
# Gives: latents beside the model's quantized weights, Muon and AdamW over banks of same-shaped weights, schedules, EMA.
# Needs: CODECS, the model's parameters and their roles. Knows nothing of data.

# Quintic Newton-Schulz coefficients that push all singular values towards 1 fast rather than exactly (Jordan 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
Polynomial = tuple[float, float, float]  # a, b, c of a x + b x^3 + c x^5


def minimax_quintic(low: float, high: float) -> np.ndarray:
    """(a, b, c) of the odd quintic p that is nearest to 1 on [low, high], 0 < low < high, in the largest error.

    Remez's exchange: p - 1 takes -E, E, -E, E at both ends and the two points between where p' = 0, until E settles.
    """
    points = np.array([low, low + (high - low) / 3, low + (high - low) * 2 / 3, high])
    error, before = 1.0, 2.0
    while abs(before - error) > 1e-14:
        matrix = np.stack((points, points**3, points**5, [1, -1, 1, -1]), 1)
        a, b, c, found = np.linalg.solve(matrix, np.ones(4))
        error, before = float(found), error
        root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
        points[1:3] = [math.sqrt(max(low**2, min(high**2, (-3 * b + sign * root) / (10 * c)))) for sign in (-1, 1)]
        points.sort()
        if points[2] - points[1] < 1e-9 * high:  # p is 1 to the last digit
            break
    return np.array((a, b, c))


def polar_express(steps: int, low: float = 1e-3) -> tuple[Polynomial, ...]:
    """The best polynomial of each step for singular values from `low` to 1 (Amsel et al. 2025, arXiv 2505.16932).

    Each is the minimax quintic on what the steps before leave of that interval. For bf16 (its section 4.4), steps but
    the last are computed for values 1% larger, which rounding may make, and for no spread of values above 1:40, or
    rounding could turn the sign of some; such a polynomial is scaled until its image is centred on 1.
    """
    found, high = [], 1.0
    for step in range(steps):
        a, b, c = minimax_quintic(max(low, high / 40), high)
        ends = [x * (a + x * x * (b + x * x * c)) for x in (low, high)]
        scale = 2 / sum(ends)  # 1 where no bound was needed
        margin = 1.01 if step + 1 < steps else 1.0
        found.append((a * scale / margin, b * scale / margin**3, c * scale / margin**5))
        low, high = ends[0] * scale, 2 - ends[0] * scale
    return tuple((float(a), float(b), float(c)) for a, b, c in found)


POLYNOMIALS: dict[str, Callable[[int], tuple[Polynomial, ...]]] = {
    "jordan": lambda steps: (NEWTON_SCHULZ,) * steps,
    "polar_express": polar_express,
}


class LowRank(NamedTuple):
    """What is added to a decoded matrix: the codes of factors (1, r, rows) and (1, r, columns)."""

    codec: Codec
    out: Codes
    into: Codes

    def added_to(self, w: Tensor) -> Tensor:
        return corrected(w, *(self.codec.decode(factor)[0].to(w.device) for factor in self[1:]))


class Bank:
    """All weights of one role and shape, stacked: the unit of quantization, optimization and reduction over ranks.

    latent (n, *shape): what the optimizer moves. The model's own parameters are decode(quantize(latent)).
    """

    def __init__(self, h: Hyperparameters, role: Role, names: list[str], parameters: list[nn.Parameter]) -> None:
        self.h, self.role, self.codec, self.names, self.parameters = h, role, CODECS[role.codec](h), names, parameters
        self.latent = torch.stack([p.detach() for p in parameters])
        self.tuning = default_tuning(self.latent)
        self.state: dict[str, Tensor] = {}  # moments and average, made at the first step
        self.fixed: Codes | None = None  # of the whole bank, in place of the latent's own: after GPTQ
        self.corrections: dict[str, LowRank] = {}  # added to what some of its weights decode to

    def slot(self, name: str) -> Tensor:
        """A moment tensor like the latent, zero at first."""
        if name not in self.state:
            self.state[name] = torch.zeros_like(self.latent)
        return self.state[name]

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Stacked gradients, and which weights have one (others must be left alone), (n, 1, ...).

        A table's gradient may be sparse: it then comes as it is, coalesced, a table being alone in its bank.
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self.h.ngram_orders and grads[0].is_sparse:
            return grads[0].coalesce(), torch.ones(1, dtype=torch.bool)
        has = torch.tensor([p.grad is not None for p in self.parameters], device=self.latent.device)
        stacked = torch.stack(grads)
        has = has & stacked.flatten(1).any(1) if self.role.idle else has
        return stacked, has.view(-1, *[1] * (self.latent.ndim - 1))

    def coded(self) -> Iterator[tuple[int, Codes]]:
        """Codes of the bank in parts of at most 2M weights, each with the index of its first tensor.

        Forward pass and export take the same parts: a GPU may sum a mean in another order for another shape.
        """
        step = max(1, 2**21 // self.latent[0].numel())
        for at in range(0, len(self.names), step):
            part = slice(at, at + step)
            if self.h.export_mode == "competition_gptq" and self.fixed is not None:
                yield at, self.fixed.map(operator.itemgetter(part))
                continue
            yield at, self.codec.quantize(self.latent[part], Tuning(*(tuned[part] for tuned in self.tuning)))

    @torch.no_grad()
    def materialize_rows(self, rows: Tensor) -> None:
        """Write what the forward pass uses into some rows of a table: all groups of weights lie within a row."""
        values = self.codec.decode(self.codec.quantize(self.latent[:, rows], self.tuning))[0]
        self.parameters[0].index_copy_(0, rows, values.to(self.latent.dtype))

    @torch.no_grad()
    def materialize(self, quantized: bool) -> None:
        """Write what the forward pass uses into the model's parameters."""
        parts = ((at, self.codec.decode(coded)) for at, coded in self.coded()) if quantized else [(0, self.latent)]
        for at, values in parts:
            for name, parameter, value in zip(self.names[at:], self.parameters[at:], values, strict=False):
                low = self.corrections.get(name) if self.h.corrects and quantized else None
                parameter.copy_(value if low is None else low.added_to(value))

    def settle(self, h: Hyperparameters, fixed: Codes | None = None) -> None:
        """Change to the codec of the file, with these codes if given."""
        if h.export_mode != "ternary" and self.role.export:
            self.role = self.role._replace(codec=self.role.export, export="")
            self.codec = CODECS[self.role.codec](h)
        self.fixed = None if fixed is None else fixed.map(lambda x: x.to(self.latent.device))


class Form(NamedTuple):
    """What a bank's exported weights are made of, and its running average, if there is one."""

    latent: Tensor
    tuning: Tuning
    average: Tensor | None = None


class Weights:
    """All banks of a model; every parameter is in exactly one."""

    def __init__(self, model: GPT) -> None:
        roles, parameters = role_table(model), dict(model.named_parameters())
        groups: dict[str, list[str]] = {}
        for name, role in roles.items():
            key = "/".join([*(str(part) for part in role if part != ""), "x".join(map(str, parameters[name].shape))])
            groups.setdefault(key, []).append(name)
        self.h = model.h
        self.banks: dict[str, Bank] = {
            key: Bank(model.h, roles[names[0]], names, [parameters[name] for name in names])
            for key, names in groups.items()
        }
        self.where = {name: (bank, i) for bank in self.banks.values() for i, name in enumerate(bank.names)}

    @torch.no_grad()
    def disturb(self, progress: float, step: int) -> None:
        """Noise on what the forward pass uses of matrices, for one step, fading to none at TERNARY_NOISE_FRACTION.

        In standard deviations of each matrix; the same on every rank, and after a resume.
        """
        h = self.h
        left = 1 - progress / h.ternary_noise_fraction if h.ternary_noise_fraction else 0.0
        for bank in self.banks.values() if h.ternary_noise_scale and left > 0 else ():
            for name, parameter in zip(bank.names, bank.parameters, strict=True) if bank.role.group == "matrix" else ():
                generator = torch.Generator(parameter.device).manual_seed(parameter_seed(h.seed, f"{name}:{step}"))
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.addcmul_(noise.to(parameter.dtype), parameter.std(), value=h.ternary_noise_scale * left)

    def materialize(self, progress: float, moved: dict[str, Tensor] | None = None) -> None:
        """Quantize all latents into the model; ternary ones only from TERNARY_START_FRACTION on.

        moved: rows of those banks, by key, of which no others have changed since the last time.
        """
        for key, bank in self.banks.items():
            start = self.h.ternary_start_fraction
            early = start > 0 and bank.role.codec == "ternary" and progress < start
            if self.h.ngram_orders and moved and key in moved and bank.role.codec != "ternary":
                bank.materialize_rows(moved[key])
            else:
                bank.materialize(quantized=not early)

    @torch.no_grad()
    def copy_weight(self, source: str, target: str, noise: float = 0.0) -> None:
        """Let one weight start again as a copy of another, with noise of so many standard deviations, its running
        average (if any) as the other's."""
        (old, i), (new, j) = self.where[source], self.where[target]
        new.latent[j] = old.latent[i]
        if noise:
            generator = torch.Generator().manual_seed(parameter_seed(self.h.seed, target))
            drawn = torch.randn(new.latent[j].shape, generator=generator).to(new.latent)
            new.latent[j] += noise * new.latent[j].std() * drawn
        if "ema" in old.state:
            new.state["ema"][j] = old.state["ema"][i]

    def clear_gradients(self) -> None:
        for bank in self.banks.values():
            for parameter in bank.parameters:
                parameter.grad = None

    def swap_average(self) -> bool:
        """Exchange latents and their running average, if there is one; a second call undoes the first."""
        averaged = [bank for bank in self.banks.values() if self.h.ema_decay and "ema" in bank.state]
        for bank in averaged:
            bank.latent, bank.state["ema"] = bank.state["ema"], bank.latent
        return bool(averaged)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within it banks have the file's codecs and round to the nearest; `materialize` gives parameters these."""
        before = {key: (bank.role, bank.codec) for key, bank in self.banks.items() if bank.role.export}
        for key in before:
            self.banks[key].settle(self.h)
        yield
        for key, (role, codec) in before.items():
            self.banks[key].role, self.banks[key].codec = role, codec

    def check_finite(self) -> None:
        """Raise AgreedError where a weight is NaN or infinite; all ranks have the same."""
        wrong = [bank.names[0] for bank in self.banks.values() if not bool(bank.latent.isfinite().all())]
        if wrong:
            raise AgreedError(
                f"training diverged: {', '.join(wrong[:3])} are not finite; nothing is exported, try lower rates"
            )

    def forms(self) -> dict[str, Form]:
        """Each bank's form by its key; it stays as it is until the next optimizer step, whatever `take` puts there."""
        return {key: Form(b.latent, b.tuning, b.state.get("ema")) for key, b in self.banks.items()}

    def take(self, forms: dict[str, Form]) -> None:
        """Let banks have these forms; the model's parameters follow with `materialize`."""
        for key, form in forms.items():
            bank = self.banks[key]
            bank.latent, bank.tuning = form.latent, form.tuning
            if form.average is not None:
                bank.state["ema"] = form.average

    def retune(self, name: str, tuning: dict[str, float]) -> None:
        """Give one weight other values of its codec's tuning, and the model what follows from them."""
        bank, i = self.where[name]
        index = torch.tensor([i], device=bank.latent.device)
        bank.tuning = bank.tuning._replace(
            **{field: bank.tuning[Tuning._fields.index(field)].index_fill(0, index, v) for field, v in tuning.items()}
        )
        bank.materialize(quantized=True)

    @torch.no_grad()
    def prune(self, share: float) -> int:
        """Zero that share of the n-gram rows that are not zero yet, those with the least sum of g^2 w^2; their number.

        g are the row's gradients so far, which Adagrad has summed: half that sum is the diagonal Fisher's estimate of
        what its loss costs (LeCun, Denker & Solla 1989), small for rows that were rarely hit or have a low norm.
        """
        zeroed = 0
        for bank in (bank for bank in self.banks.values() if bank.role.group == "table"):
            costs = (bank.latent.square() * bank.state.get("total", 1.0)).sum(-1).flatten()
            costs = costs.masked_fill(~bank.latent.any(-1).flatten(), math.inf)
            least = costs.argsort(stable=True)[: int(share * costs.isfinite().sum())]
            bank.latent = bank.latent.flatten(0, 1).index_fill(0, least, 0.0).view_as(bank.latent)
            bank.materialize(quantized=True)
            zeroed += len(least)
        return zeroed

    def packed_bytes(self) -> dict[str, float]:
        """Bytes by codec after packing and before compression: a bound known before training."""
        sizes: dict[str, float] = {}
        for bank in self.banks.values():
            name = bank.role.export or bank.role.codec
            size = len(bank.names) * CODECS[name](self.h).packed_bytes(bank.latent.shape[1:])
            sizes[name] = sizes.get(name, 0) + size
        return sizes


def orthogonalize(x: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """Nearest semi-orthogonal matrix of each matrix in x (n, a, b), roughly, by Newton-Schulz; zero stays zero.

    bf16 on CUDA (Jordan 2024); elsewhere in x's dtype. Works on the wide side: (a, b) with a > b is transposed.
    """
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    y = wide.bfloat16() if x.device.type == "cuda" else wide
    if x.device.type != "cuda" and y.shape[-1] >= 2 * y.shape[-2]:
        y = gram_polynomial(y @ y.mT, polynomials) @ y
    else:
        y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for a, b, c in polynomials:
            gram = y @ y.mT
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if x.shape[-2] > x.shape[-1] else y).to(x.dtype)


def gram_polynomial(gram: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """The small square matrix Q with which Newton-Schulz of y / |y| is Q y, from gram = y y^T (n, a, a).

    Each step multiplies y by P = a I + b G + c G^2, and so G by P on both sides: half the work for 4:1 matrices. Needs
    float32: the powers of G would drown in bf16's rounding.
    """
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[:, None, None] + 1e-7  # Frobenius norm of y
    gram, product = gram / size**2, 1 / size
    for step, (a, b, c) in enumerate(polynomials):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor @ product if step else factor * product
        if step + 1 < len(polynomials):
            gram = factor @ gram @ factor
    return product


class Group(NamedTuple):
    """Settings of one optimizer group."""

    rule: str  # key of RULES
    rate: float
    decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0  # Muon's at this step


GROUPS: dict[str, Callable[[Hyperparameters], Group]] = {
    "matrix": lambda h: Group("muon", h.matrix_lr, h.muon_wd),
    "embed": lambda h: Group("adamw", h.tied_embed_lr if h.tie_embeddings else h.embed_lr, h.adam_wd, *h.adam),
    "head": lambda h: Group("adamw", h.head_lr, h.adam_wd, *h.adam),
    "table": lambda h: Group("adagrad", h.bigram_hash_lr),
    "scalar": lambda h: Group("adamw", h.scalar_lr, h.adam_wd, *h.adam),
    "koopman": lambda h: Group("adamw", h.koopman_lr, 0.0, *h.adam),
    "hc": lambda h: Group("adamw", h.hc_lr, 0.0, 0.9, 0.95, h.adam_eps),
    "mhc": lambda h: Group("adamw", h.mhc_lr, 0.0, 0.9, 0.95, 1e-12),  # first gradients of R are some 1e-10
    "mhc_mix": lambda h: Group("adamw", h.mhc_mix_lr, 0.0, 0.9, 0.95, 1e-12),
}


def gradient_sizes(banks: list[Bank], grads: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Norm of the gradient over that of the weights, by optimizer group."""
    sizes: dict[str, list[Tensor]] = {}
    for bank, (grad, _) in zip(banks, grads, strict=True):
        pair = torch.stack(((grad.values() if grad.is_sparse else grad).square().sum(), bank.latent.square().sum()))
        sizes.setdefault(bank.role.group, []).append(pair)
    sums = {group: torch.stack(pairs).sum(0) for group, pairs in sizes.items()}
    return {f"gradient_to_weight.{group}": (g / (w + 1e-30)).sqrt() for group, (g, w) in sums.items()}


def ternary_codes(banks: list[Bank]) -> list[Tensor]:
    """Codes of all ternary weights, bank part by bank part."""
    return [coded.codes for bank in banks if bank.role.codec == "ternary" for _, coded in bank.coded()]


class Optimizer:
    """Muon for matrices, AdamW for everything else, both over banks; the same result on any number of ranks.

    Gradients are summed over ranks once a step; each rank orthogonalizes its share of a bank and gets the others'.
    """

    def __init__(self, h: Hyperparameters, rt: Runtime, weights: Weights) -> None:
        self.h, self.rt, self.weights = h, rt, weights
        self.groups = {name: GROUPS[name](h) for name in dict.fromkeys(b.role.group for b in weights.banks.values())}
        self.polynomials = POLYNOMIALS[h.muon_coeffs](h.muon_backend_steps)
        self.orthogonalize = torch.compile(orthogonalize, dynamic=False) if rt.compile else orthogonalize
        self.finite = torch.tensor(True)  # whether the last step's gradient was, on its device

    @torch.no_grad()
    def step(
        self, rate_scale: float, momentum: float, average: bool, progress: float, measures: bool = False
    ) -> dict[str, Tensor]:
        """Move all latents by the parameters' gradients, then quantize them into the model; diagnostics if wanted."""
        banks = list(self.weights.banks.values())
        grads = [bank.gradient() for bank in banks]
        if self.rt.world > 1:
            grads = self.reduced(grads)
        grads = self.only_finite(grads)
        measures = measures and bool(self.h.measured_every)
        metrics = gradient_sizes(banks, grads) if measures else {}
        if self.h.grad_clip_norm:
            values = [grad.values() if grad.is_sparse else grad for grad, _ in grads]
            norm = torch.stack([value.norm() for value in values]).norm()
            for value in values:
                value.mul_((self.h.grad_clip_norm / (norm + 1e-6)).clamp(max=1))
        ternary = [bank for bank in banks if measures and bank.role.codec == "ternary"]
        moved, before = {}, ternary_codes(banks) if measures else []
        for (key, bank), (grad, has) in zip(self.weights.banks.items(), grads, strict=True):
            group = self.groups[bank.role.group]
            rate = rate_scale * group.rate * bank.role.lr_mult
            if self.h.engram_taper_start < 1 and bank.role.group == "table":
                rate *= tapered(self.h.engram_taper_start, progress)
            decay = group.decay * bank.role.decay
            if self.h.muon_wd_taper_start < 1 and group.rule == "muon":
                decay *= tapered(self.h.muon_wd_taper_start, progress)
            group = group._replace(rate=rate, decay=decay)
            RULES[group.rule](self, bank, grad, has, group._replace(momentum=momentum))
            if self.h.ngram_orders and grad.is_sparse:
                moved[key] = grad.indices()[0]
            if bank.role.bound < math.inf:
                bank.latent.clamp_(-bank.role.bound, bank.role.bound)
            if self.h.ema_decay and average:
                self.average(bank)
        self.weights.materialize(progress, moved)
        if measures and before:
            sizes = torch.cat([c.scales.flatten() for b in ternary for _, c in b.coded() if c.scales is not None])
            metrics |= {"scale_mean": sizes.mean(), "scale_rms": sizes.square().mean().sqrt()}
            after = ternary_codes(banks)
            metrics["churn"] = sum(((a != b).sum() for a, b in zip(before, after, strict=True)), torch.zeros(()))
            metrics["zeros"] = sum(((codes == 0).sum() for codes in after), torch.zeros(()))
            metrics |= {name: metrics[name] / sum(codes.numel() for codes in after) for name in ("churn", "zeros")}
        return metrics

    def reduced(self, grads: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Gradients summed over ranks; a weight has one if it has one on any rank."""
        flags = torch.cat([has.flatten() for _, has in grads]).to(torch.int32)
        works = [dist.all_reduce(grad, async_op=True) for grad, _ in grads]
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        for work in works:
            work.wait()
        parts = flags.bool().split([has.numel() for _, has in grads])
        summed = [grad.coalesce() if grad.is_sparse else grad for grad, _ in grads]
        return [(grad, part.view_as(has)) for grad, (_, has), part in zip(summed, grads, parts, strict=True)]

    def only_finite(self, grads: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The gradients; if a number in them is not finite, zeros that no weight has, and the step changes nothing.

        Decided on the device, without waiting for it; NaN and infinity survive a sum.
        """
        values = [grad.values() if grad.is_sparse else grad for grad, _ in grads]
        self.finite = torch.stack([value.sum() for value in values]).isfinite().all()
        for value in values:
            value.masked_fill_(~self.finite, 0.0)
        return [(grad, has.to(self.finite.device) & self.finite) for grad, has in grads]

    def muon(self, bank: Bank, grad: Tensor, has: Tensor, group: Group) -> None:
        """Nesterov momentum, rows normalized (MuonEq-R), orthogonalized, scaled by sqrt(max(1, rows / columns))."""
        buffer = bank.slot("momentum")
        share = has.to(grad.dtype)
        torch.addcmul(grad, buffer, 1 + share * (group.momentum - 1), out=buffer)
        update = torch.add(grad, buffer, alpha=group.momentum)
        if self.h.muon_row_norm:
            update = update / (update.norm(dim=-1, keepdim=True) + 1e-7)
        speed = group.rate * max(1.0, grad.shape[-2] / grad.shape[-1]) ** 0.5
        if group.decay:
            bank.latent.mul_(1 - share * group.rate * group.decay)
        bank.latent.addcmul_(self.sharded(update), share, value=-speed)

    def sharded(self, update: Tensor) -> Tensor:
        """Orthogonalize a bank, each rank its share."""
        rt, count = self.rt, update.shape[0]
        if rt.world == 1:
            return self.orthogonalize(update, self.polynomials)
        share = -(-count // rt.world)
        padded = F.pad(update, (0, 0, 0, 0, 0, share * rt.world - count))
        mine = self.orthogonalize(padded[rt.rank * share :][:share].contiguous(), self.polynomials)
        dist.all_gather(list(padded.chunk(rt.world)), mine.contiguous())
        return padded[:count]

    def adamw(self, bank: Bank, grad: Tensor, has: Tensor, group: Group) -> None:
        """Decoupled weight decay Adam (Loshchilov & Hutter 2019), steps counted per weight."""
        first, second, has = bank.slot("first"), bank.slot("second"), has.to(grad.dtype)
        if "count" not in bank.state:
            bank.state["count"] = torch.zeros_like(has)
        count = bank.state["count"].add_(has)
        first.lerp_(grad, has * (1 - group.beta1))
        second.lerp_(grad.square(), has * (1 - group.beta2))
        floor = count.clamp(min=1)
        denominator = (second / (1 - group.beta2**floor)).sqrt_().add_(group.eps)
        if group.decay:
            bank.latent.mul_(1 - has * group.rate * group.decay)
        bank.latent.sub_(first / (1 - group.beta1**floor) / denominator * has, alpha=group.rate)

    def adagrad(self, bank: Bank, grad: Tensor, has: Tensor, group: Group) -> None:
        """Row-wise Adagrad (Duchi et al. 2011; one sum per row, Naumov et al. 2019): a rare row keeps its full rate.

        A row without gradient stays as it is, so that a sparse gradient gives what the whole one gives.
        """
        if "total" not in bank.state:
            bank.state["total"] = torch.zeros_like(bank.latent[..., :1])
        rows, values = (grad.indices()[0], grad.values()[None]) if grad.is_sparse else (slice(None), grad)
        total = bank.state["total"][:, rows] + values.square().mean(-1, keepdim=True)
        bank.state["total"][:, rows] = total
        bank.latent[:, rows] -= values * (has.to(total.dtype) * group.rate / (total.sqrt() + 1e-12))

    def average(self, bank: Bank) -> None:
        """Running average of latents: what is averaged is quantized afterwards like any latent."""
        if "ema" not in bank.state:
            bank.state["ema"] = bank.latent.clone()
        bank.state["ema"].lerp_(bank.latent, 1 - self.h.ema_decay)


RULES: dict[str, Callable[[Optimizer, Bank, Tensor, Tensor, Group], None]] = {
    "muon": Optimizer.muon,
    "adamw": Optimizer.adamw,
    "adagrad": Optimizer.adagrad,
}


def progress_of(h: Hyperparameters, step: int, seconds: float) -> float:
    """Share of the run that is done, by steps or by the clock, whichever is further; from 0 to 1."""
    by_steps = step / h.iterations if h.iterations else 0.0
    by_clock = seconds / h.step_seconds if h.step_seconds else 0.0
    return min(1.0, max(by_steps, by_clock))


def rate_scale(h: Hyperparameters, step: int, seconds: float) -> float:
    """Factor on all rates: linear rise, plateau, linear fall to LR_FLOOR."""
    progress = progress_of(h, step, seconds)
    rise = min(1.0, (progress + 1e-9) / h.lr_warmup_fraction) if h.lr_warmup_fraction else 1.0
    if h.warmdown_iters:  # the field's rule: as many steps as WARMDOWN_ITERS at the pace so far
        left = max(0, h.iterations - step) if h.iterations else math.inf
        pace = seconds / max(step, 1)
        if h.step_seconds and pace:
            left = min(left, (h.step_seconds - seconds) / pace)
        fall = min(1.0, left / h.warmdown_iters)
    else:
        fall = min(1.0, (1 - progress) / h.warmdown_fraction) if h.warmdown_fraction else float(progress < 1)
    return min(rise, h.lr_floor + (1 - h.lr_floor) * max(0.0, fall))


def tapered(start: float, progress: float) -> float:
    """A factor that is 1 up to a start, and then falls to 0 at the end."""
    return 1.0 if progress < start or start == 1 else max(0.0, (1 - progress) / (1 - start))


def muon_momentum(h: Hyperparameters, step: int) -> float:
    """Momentum warm-up of Muon over its first steps."""
    share = min(1.0, step / h.muon_momentum_warmup_steps) if h.muon_momentum_warmup_steps else 1.0
    return h.muon_momentum_warmup_start + share * (h.muon_momentum - h.muon_momentum_warmup_start)


def stage_at(stages: Sequence[tuple[float, int]], progress: float) -> int:
    """The number of the last stage that has begun: tokens of a step, or the training window."""
    return [number for at, number in stages if at <= progress][-1]


# ==== 11. ARTIFACT ===========================================================
# Gives: the container that holds a model: deterministic writing, safe reading, exact budget accounting; calibration.
# Needs: CODECS, weights' banks. Reading needs numpy only, and does not care how the model was trained.

ARTIFACT_MAGIC = b"PGZ1"
# What a file of the wrong shape makes our readers raise.
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, EOFError, RuntimeError)
MAX_HEADER_BYTES = 2**20  # JSON; that of a 75M-parameter model has 10 kB
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0, "dict_size": 2**22}]
CHUNK_BYTES = 2**22  # compressed apart from each other, so that all cores work; shorter ones cost 0.1%


def brotli_compress(data: bytes, kind: str) -> bytes:
    """Trits repeat nothing: quality 11 takes 80 times as long as 9 and saves 0.02%; it saves 4% of bf16 tables."""
    import brotli

    return brotli.compress(data, quality=9 if kind == "trits" else 11, lgwin=22)


def brotli_expand(data: bytes, size: int) -> bytes:
    import brotli

    reader, parts, room = brotli.Decompressor(), [b""], size + 1
    while not reader.is_finished() and room > 0:
        try:
            parts.append(reader.process(data, output_buffer_limit=room))
        except brotli.error:
            raise ValueError("brotli stream is damaged") from None
        data, room = b"", room - len(parts[-1])
        if not parts[-1] and not reader.is_finished():
            raise ValueError("brotli stream is cut short")
    return b"".join(parts)


def zstd_compress(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(22, write_content_size=False).compress(data)


def zstd_expand(data: bytes, size: int) -> bytes:
    import zstandard

    try:
        return zstandard.ZstdDecompressor(max_window_size=2 * CHUNK_BYTES).stream_reader(data).read(size + 1)
    except zstandard.ZstdError:
        raise ValueError("zstd stream is damaged") from None


def lzma_compress(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def lzma_expand(data: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(data, max_length=size + 1)


# name -> (compress bytes of a stream kind, expand to at most one byte more than the given size)
COMPRESSORS: dict[str, tuple[Callable[[bytes, str], bytes], Callable[[bytes, int], bytes]]] = {
    "none": (lambda data, kind: data, lambda data, size: data),
    "lzma": (lambda data, kind: lzma_compress(data), lzma_expand),
    "brotli": (brotli_compress, brotli_expand),
    "zstd": (lambda data, kind: zstd_compress(data), zstd_expand),
}
COMPRESSOR_PACKAGES = {"brotli": "brotli", "zstd": "zstandard"}
# stream kinds -> names of packings; a packing is (pack, unpack to `count` values of `dtype`)
PACKINGS: dict[str, tuple[Callable[[np.ndarray], bytes], Callable[[bytes, int, np.dtype], np.ndarray]]] = {
    "base3": (pack_base3, lambda data, count, dtype: unpack_base3(data, count)),
    "bitmask": (pack_bitmask, lambda data, count, dtype: unpack_bitmask(data, count)),
    "signs": (pack_signs, lambda data, count, dtype: unpack_signs(data, count)),
    "nibbles": (pack_nibbles, lambda data, count, dtype: unpack_nibbles(data, count)),
    "planes": (pack_planes, unpack_planes),
}


# Trits and small integers have a coder of ours. Its model: a weight's size is that of its column, as the rows above
# and the layer before show it, times that of its row, as the columns to the left show it; adaptive counts by context
# say how often weights of that expected size are which integer. Its code: range asymmetric numeral systems (Duda 2013,
# arXiv 1311.2540) with interleaved states (Giesen 2014, arXiv 1402.3392). Columns go down the rows one step behind
# their left neighbour, so that a step of numpy codes a whole diagonal. Integers only: bit-exact on every machine.
CONTEXTS = 32
MIXES = ((0, 0), (2, 0), (0, 2), (1, 1), (2, 1), (2, 2))  # what the logarithms of both sizes count for in a context
# 16 log2(n), rounded up, of n in units of 1/4096 of the largest size
LOGS = np.array([((n + 1) ** 16).bit_length() for n in range(2**12 + 1)])
LANE_SYMBOLS = 2**16  # that a state should code, since it costs three bytes


class Frequencies:
    """Adaptive share of each symbol in each context, in 1 / 2^16; both signs are equally likely."""

    def __init__(self, symbols: int) -> None:
        self.counts, self.met = np.zeros((CONTEXTS, symbols), np.int64), [np.zeros(0, np.int64)]
        self.refresh()

    def refresh(self) -> None:
        """Count the symbols met since the last time. A context begins with what all of them together have met."""
        symbols, met = self.counts.shape[1], np.concatenate(self.met)
        self.counts += np.bincount(met, minlength=self.counts.size).reshape(self.counts.shape)
        both, self.met = self.counts + self.counts[:, ::-1], [met[:0]]
        whole = both.sum(0) + 1
        weights = 16 * both + 1024 * whole // whole.sum()
        spans = 1 + weights * (2**16 - symbols) // weights.sum(1, keepdims=True)
        spans[:, symbols // 2] += 2**16 - spans.sum(1)
        self.starts = np.concatenate((met[:0], [0], spans.cumsum()))  # of symbol s in context c: [c * symbols + s]


Step = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (contexts, view of values to read or fill) -> their indices


def walk(grid: np.ndarray, form: tuple[int, int, int, int], model: Frequencies, step: Step) -> None:
    """Give each value of a grid (rows, columns) its context, and to `step` one diagonal after the other.

    form: largest size, weights of column and row in the context, mean size in 1/4096 of the largest.
    """
    (rows, columns), (top, by_column, by_row, mean) = grid.shape, form
    flat, symbols, unit = grid.reshape(-1), 2 * top + 1, 2**20 // max(top, 1)
    above, left = np.full(columns, mean << 8), np.full(columns + 1, mean << 8)
    middle = (by_column + by_row) * int(LOGS[mean]) - CONTEXTS
    for t in range(rows + columns - 1):
        if t % 8 == 0:
            model.refresh()
        first, end = max(0, t - rows + 1), min(columns, t + 1)
        lanes, at = slice(first, end), t * columns - (end - 1) * (columns - 1)
        context = by_column * LOGS[above[lanes] >> 8] + by_row * LOGS[left[lanes] >> 8] - middle >> 1
        context = context.clip(0, CONTEXTS - 1)
        index = step(context, flat[at : at + (end - first - 1) * (columns - 1) + 1 : columns - 1][::-1])
        model.met.append(index)
        size = np.abs(index - context * symbols - top) * unit
        left[first + 1 : end + 1] = left[lanes] + ((size - left[lanes]) >> 5)
        above[lanes] += (size - above[lanes]) >> 6


def grids(shapes: list[list[int]]) -> list[tuple[int, int, list[slice]]]:
    """(rows, columns, parts of the stream) of what is coded together: tensors of one width, and all small ones.

    A grid has at least 64 rows and columns, or is nearly square, so that there are few diagonals.
    """
    widths: dict[int, list[slice]] = {}
    rows, at = Counter[int](), 0
    for shape in shapes:
        rows[shape[-1]] += math.prod(shape[:-1])
    for shape in shapes:
        width = shape[-1] if min(shape[-1], rows[shape[-1]]) >= 64 else 0
        widths.setdefault(width, []).append(slice(at, at := at + math.prod(shape)))
    sizes = {width: sum(part.stop - part.start for part in parts) for width, parts in widths.items()}
    columns = {width: width or max(2, min(64, math.isqrt(sizes[width]))) for width in widths}
    return [(-(-sizes[width] // columns[width]), columns[width], parts) for width, parts in widths.items()]


def gather(values: np.ndarray, grid: tuple[int, int, list[slice]]) -> np.ndarray:
    """The values of a grid, (rows, columns) int8, with zeros after the last."""
    rows, columns, parts = grid
    held = np.concatenate([values[part] for part in parts])
    return np.pad(held, (0, rows * columns - held.size)).reshape(rows, columns)


def spans_of(grid_list: list[np.ndarray], form: tuple[int, int, int, int]) -> list[np.ndarray]:
    """Start and span of each value in the order of coding, an array (2, n) uint16 a step."""
    model, found = Frequencies(2 * form[0] + 1), []

    def step(context: np.ndarray, values: np.ndarray) -> np.ndarray:
        index = context * (2 * form[0] + 1) + values + form[0]
        start = model.starts[index]
        found.append(np.stack((start - (context << 16), model.starts[index + 1] - start)).astype(np.uint16))
        return index

    for grid in grid_list:
        walk(grid, form, model, step)
    return found


def code_length(spans: list[np.ndarray]) -> float:
    """-sum log2 p, in bits."""
    return sum(float((16 - np.log2(span, dtype=np.float64)).sum()) for _, span in spans)


def pack_context(values: np.ndarray, shapes: list[list[int]]) -> bytes:
    """Values (n,) int8 of tensors of these shapes: form (5 bytes), states (5 bytes each), 16-bit words."""
    sheets = [gather(values, grid) for grid in grids(shapes)]
    top = max(1, int(np.abs(values.astype(np.int16)).max()))  # of three symbols none takes all of a span's 16 bits
    mean = int(np.abs(values.astype(np.int16)).sum(dtype=np.int64)) * 2**12 // (values.size * max(top, 1))
    sample = [sheet[:: sheet.size // 2**19 + 1] for sheet in sheets]
    _, mix = min((code_length(spans_of(sample, (top, *mix, mean))), mix) for mix in MIXES)
    states, words = np.full(max(8, values.size // LANE_SYMBOLS), 2**24), [np.zeros(0, "<u2")]
    for start, span in reversed(spans_of(sheets, (top, *mix, mean))):
        for at in reversed(range(0, span.size, states.size)):
            part = span[at : at + states.size].astype(np.int64)
            x = states[: part.size]
            full = x >= part << 24
            words.append((x[full] & 65535).astype("<u2"))
            x = np.where(full, x >> 16, x)
            states[: part.size] = (x // part << 16) + x % part + start[at : at + states.size]
    head = bytes([top, *mix]) + mean.to_bytes(2, "little") + states.view(np.uint8).reshape(-1, 8)[:, :5].tobytes()
    return head + np.concatenate(words[::-1]).tobytes()


class Expander:
    """Takes symbols off the states of pack_context. Raises ValueError when words are missing."""

    def __init__(self, data: bytes, count: int, symbols: int) -> None:
        lanes = max(8, count // LANE_SYMBOLS)
        raw = np.frombuffer(data, np.uint8, 5 * lanes, 5).reshape(lanes, 5)
        self.states = np.ascontiguousarray(np.pad(raw, ((0, 0), (0, 3)))).view("<i8")[:, 0]
        self.words, self.at = np.frombuffer(data, "<u2", -1, 5 + 5 * lanes).astype(np.int64), 0
        self.model, self.symbols = Frequencies(symbols), symbols

    def __call__(self, context: np.ndarray, values: np.ndarray) -> np.ndarray:
        index, starts = np.empty(context.size, np.int64), self.model.starts
        for at in range(0, context.size, self.states.size):
            part = context[at : at + self.states.size]
            x = self.states[: part.size]
            slot = (part << 16) + (x & 65535)
            found = starts.searchsorted(slot, "right") - 1
            x = (x >> 16) * (starts[found + 1] - starts[found]) + slot - starts[found]
            short = np.flatnonzero(x < 2**24)
            x[short] = x[short] << 16 | self.words[self.at : self.at + short.size]
            self.at += short.size
            self.states[: part.size], index[at : at + part.size] = x, found
        values[:] = index - context * self.symbols - self.symbols // 2
        return index


CONTEXT_VALUES = 128  # at most of a byte: 99 of 100 trits may be zeros


def unpack_context(data: bytes, count: int, shapes: list[list[int]], largest: int) -> np.ndarray:
    """The inverse of pack_context, (count,) int8. Raises ValueError for what it cannot have made.

    A value takes a sixteenth of a bit at least: time and memory stay in proportion to the bytes read.
    """
    if (
        sum(map(math.prod, shapes)) != count
        or count > CONTEXT_VALUES * len(data)
        or len(data) < 45
        or max(data[1:3]) > 2
    ):
        raise ValueError("context-coded stream does not hold the values it should")
    form, values = (data[0], data[1], data[2], int.from_bytes(data[3:5], "little")), np.empty(count, np.int8)
    if form[0] > largest or form[3] > 2**12:
        raise ValueError("context-coded stream holds values beyond its kind")
    expander = Expander(data, count, 2 * form[0] + 1)
    for rows, columns, parts in grids(shapes):
        sheet, at = np.zeros((rows, columns), np.int8), 0
        walk(sheet, form, expander.model, expander)
        for part in parts:
            values[part], at = sheet.reshape(-1)[at : at + part.stop - part.start], at + part.stop - part.start
    if expander.at != expander.words.size or np.any(expander.states != 2**24):
        raise ValueError("context-coded stream is damaged")
    return values


# Kinds of streams that our coder by context is for, and the largest size of their values.
CONTEXT_STREAMS = {"trits": 1, "int4": 128, "int5": 128, "int6": 128, "int7": 128, "int8": 128}


def compress_best(kind: str, values: np.ndarray, shapes: list[list[int]]) -> tuple[str, str, int, bytes]:
    """(packing, compressor, packed bytes, stored bytes) of the shortest way to store one stream, tensors of `shapes`.

    Stored is a sequence of chunks: length (4 bytes, little-endian) and what CHUNK_BYTES packed bytes became.
    """
    tools = [name for name in COMPRESSORS if name not in COMPRESSOR_PACKAGES or find_spec(COMPRESSOR_PACKAGES[name])]
    packed = {name: PACKINGS[name][0](values) for name in STREAM_PACKINGS[kind]}
    best: tuple[str, str, int, bytes] | None = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # compressors release the interpreter lock
        for packing, tool in [(packing, tool) for packing in packed for tool in tools]:
            data = packed[packing]
            chunks = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
            parts = pool.map(COMPRESSORS[tool][0], chunks, [kind] * len(chunks))
            stored = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
            if best is None or len(stored) < len(best[3]):
                best = (packing, tool, len(data), stored)
    assert best is not None
    if kind in CONTEXT_STREAMS and len(best[3]) * CONTEXT_VALUES > values.size:  # it is slow with sparser ones
        data = pack_context(values, shapes)
        if CONTEXT_VALUES * len(data) >= values.size and len(data) < len(best[3]):
            best = ("context", "none", len(data), data)
    return best


def expand_chunks(tool: str, data: bytes, size: int) -> bytes:
    """The packed bytes, `size` of them, of what compress_best stored. Raises ValueError for any other content."""
    parts, at, left = [], 0, size
    while left > 0:
        length = int.from_bytes(data[at : at + 4], "little")
        parts.append(COMPRESSORS[tool][1](data[at + 4 : at + 4 + length], min(left, CHUNK_BYTES)))
        if len(parts[-1]) != min(left, CHUNK_BYTES):
            raise ValueError(f"a chunk of {length} bytes holds {len(parts[-1])}, not {min(left, CHUNK_BYTES)}")
        at, left = at + 4 + length, left - len(parts[-1])
    if at != len(data):
        raise ValueError("bytes are left over in a stream")
    return b"".join(parts)


def structure_config(h: Hyperparameters) -> dict[str, Any]:
    """The fields that a reader needs to rebuild the network, as far as they are not what they are by default.

    So a default must go on to mean what was there before.
    """
    values = dataclasses.asdict(h)
    return {n: values[n] for n in structure_fields() if values[n] != FIELDS[n.upper()].default}


# Quantization after training. GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds a matrix column by column and moves
# each column's error, as far as inputs are correlated, onto the columns still to come. With the Hessian H = X^T X of
# its inputs, an error E of the weights costs tr(E H E^T). LQER (Zhang et al. 2024, arXiv 2402.02446) adds a thin
# product that is nearest to what is left of the error, here in that very measure.
DAMPING = 0.01  # of H's mean diagonal, on its diagonal, as in the paper: what few inputs tell is not to be trusted
GPTQ_COLUMNS = 128  # columns whose errors wait before they move on to the others in one product


def damped(hessian: Tensor) -> Tensor:
    """(n, columns, columns) that can be inverted; the identity where no input was seen."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    more = torch.where(mean > 0, DAMPING * mean, 1.0)
    return hessian + more[:, None, None] * torch.eye(hessian.shape[-1], device=hessian.device, dtype=hessian.dtype)


def hessian_error(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H E^T) of each weight, (n,)."""
    return (error @ hessian * error).sum((-2, -1))


def gptq(codec: Codec, w: Tensor, hessian: Tensor) -> Codes:
    """Codes of w (n, rows, columns), float, for integer codecs, by GPTQ under hessian (n, columns, columns) float64.

    Scales are what the codec stores: of a whole row from the start, of a smaller group when its first column's turn
    comes. A turned codec is solved in its own basis. Raises LinAlgError for a Hessian that is not finite.
    """
    if isinstance(codec, TurnedCodec):
        group = codec.codec.group
        return gptq(codec.codec, turned(w, group), turned(turned(hessian, group).mT, group))
    assert isinstance(codec, IntCodec)
    left, columns = w.to(torch.float64, copy=True), w.shape[-1]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian)))
    factor = torch.linalg.cholesky(inverse, upper=True)  # row j: what an error in column j asks of the later ones
    whole, tuning = codec.group >= columns, default_tuning(left)
    scales = codec.scales(left, tuning) if whole else None
    codes: list[Tensor] = []
    stored: list[Tensor] = []
    width = GPTQ_COLUMNS if whole else codec.group
    for at in range(0, columns, width):
        stop = min(at + width, columns)
        stored.append(codec.scales(left[..., at:stop], tuning) if scales is None else scales)
        errors = torch.empty_like(left[..., at:stop])
        for j in range(at, stop):
            codes.append(codec.nearest(left[..., j : j + 1], stored[-1][..., 0]))
            scale = stored[-1][..., 0].double()
            errors[..., j - at] = (left[..., j] - codes[-1][..., 0] * scale) / factor[:, j, j, None]
            left[..., j + 1 : stop] -= errors[..., j - at, None] * factor[:, None, j, j + 1 : stop]
        left[..., stop:] -= errors @ factor[:, at:stop, stop:]
    return Codes(torch.cat(codes, -1).to(torch.int8), stored[0] if whole else torch.cat(stored, -1))


def low_rank(codec: Codec, error: Tensor, hessian: Tensor, rank: int) -> LowRank | None:
    """Factors of an error (rows, columns) float64, its best approximation of a rank under hessian, then quantized.

    None where the codec is too coarse for them to help.
    """
    hessian = damped(hessian[None])[0]
    lower = torch.linalg.cholesky(hessian)
    weighted = error @ lower
    basis = torch.linalg.eigh(weighted.mT @ weighted).eigenvectors[:, -rank:]  # (columns, r)
    into = torch.linalg.solve_triangular(lower, basis.mT, upper=False, left=False)  # basis^T lower^-1
    tuning = default_tuning(into[None])
    second = codec.quantize(into[None], tuning)
    into = codec.decode(second)[0].to(error)
    out = torch.linalg.lstsq(into @ hessian @ into.mT, into @ hessian @ error.mT).solution  # best beside those
    found = LowRank(codec, codec.quantize(out[None], tuning), second)
    rest = error - found.added_to(torch.zeros_like(error, dtype=torch.float32)).to(error)
    losses = hessian_error(torch.stack((error, rest)), hessian[None])
    return found if losses[1] < losses[0] else None


class Coded(NamedTuple):
    """One tensor on its way to or from a file."""

    name: str
    codec: str
    codes: np.ndarray
    scales: np.ndarray | None  # float32 holding bf16 values


def coded_tensors(weights: Weights) -> Iterator[Coded]:
    """All tensors as the model's forward pass has them, bank by bank."""
    for bank in weights.banks.values():
        for at, coded in bank.coded():
            codes = coded.codes.cpu().numpy()
            scales = None if coded.scales is None else coded.scales.cpu().numpy()
            for i, name in enumerate(bank.names[at : at + len(codes)]):
                yield Coded(name, bank.role.codec, codes[i], None if scales is None else scales[i])
        for name, low in bank.corrections.items() if weights.h.corrects else ():
            for end, part in zip(FACTORS, low[1:], strict=True):
                assert part.scales is not None
                yield Coded(name + end, "int4", part.codes[0].cpu().numpy(), part.scales[0].cpu().numpy())


FACTORS = (".lqer_out", ".lqer_in")  # ends of the names of a correction's factors


def join_corrections(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decoded weights with corrections added. Raises ValueError for factors that do not fit."""
    named = {name: w for name, w in weights.items() if not name.endswith(FACTORS)}
    bases = [{name.removesuffix(end) for name in weights if name.endswith(end)} for end in FACTORS]
    if bases[0] != bases[1] or not bases[0] <= set(named):
        raise ValueError("a correction is half there")
    for base in sorted(bases[0]):
        out, into = (weights[base + end] for end in FACTORS)
        if (*out.shape, *into.shape) != (len(out), named[base].shape[0], len(out), *named[base].shape[1:]):
            raise ValueError(f"the correction of {base} does not fit")
        named[base] = corrected(named[base], out, into)
    return named


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Upper halves of float32 values that are bf16 already, (n,) uint16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(-1)


def live_rows(codes: np.ndarray) -> np.ndarray:
    """Which rows of a tensor's codes (..., columns) have a bit set, (rows,) bool."""
    raw = np.ascontiguousarray(codes).view(np.uint8)
    return raw.reshape(math.prod(codes.shape[:-1]), -1).max(1) > 0


class Artifact(NamedTuple):
    """A written artifact and where its bytes went: rows (stream, packing, compressor, values, packed, stored)."""

    data: bytes
    table: list[tuple[str, str, str, int, int, int]]


def write_artifact(
    h: Hyperparameters, tensors: Iterator[Coded], prints: dict[str, str], calibration: dict[str, float] | None = None
) -> Artifact:
    """The container: magic, crc32, header length, header (JSON, lzma), streams. Same input, same bytes.

    Where there are tables, rows of zeros (hashed n-grams that never occurred) and their scales are left out, and marked
    in a stream of their own: our coder, which goes by sizes, would take some bits for each of their zeros.
    """
    parts = {kind: bytearray() for kind in STREAM_TYPES}  # growing in place, a third less memory than joined arrays
    index: list[list[Any]] = []
    shapes: dict[str, list[list[int]]] = {kind: [] for kind in STREAM_TYPES}
    for tensor in tensors:
        kind, count = CODECS[tensor.codec](h).stream, math.prod(tensor.codes.shape[:-1])
        live: np.ndarray | slice = slice(None)
        if h.ngram_orders:
            live = marks = live_rows(tensor.codes)
            parts["rows"] += np.where(marks, 1, -1).astype(STREAM_TYPES["rows"]).tobytes()
        codes = tensor.codes.reshape(count, -1)[live]
        shapes[kind] += [list(codes.shape)] if len(codes) else []
        index.append([tensor.name, tensor.codec, *tensor.codes.shape])
        parts[kind] += codes.astype(STREAM_TYPES[kind], copy=False).tobytes()
        if tensor.scales is not None:
            parts["scales"] += bf16_bits(tensor.scales.reshape(count, -1)[live]).tobytes()
    if h.ngram_orders and b"\xff" not in parts["rows"]:
        del parts["rows"]
    rows, payload = [], []
    for kind, data in parts.items():
        if data:
            values = np.frombuffer(data, STREAM_TYPES[kind])
            packing, tool, packed, stored = compress_best(kind, values, shapes[kind])
            rows.append((kind, packing, tool, values.size, packed, len(stored)))
            payload.append(stored)
    own = {"version": 1, "config": structure_config(h), "prints": prints, "calibration": calibration or {}}
    header = {**own, "tensors": index, "streams": rows}
    head = lzma_compress(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    body = len(head).to_bytes(4, "little") + head + b"".join(payload)
    table = [*rows, ("header", "json", "lzma", len(index), 0, len(head) + 12)]
    return Artifact(ARTIFACT_MAGIC + zlib.crc32(body).to_bytes(4, "little") + body, table)


def most_elements(config: dict[str, Any], size: int) -> int:
    """Bound on the weights of a file of `size` bytes, which bounds what a hostile one can make us allocate.

    A byte holds at most 11 untrained ternary weights, some more if few are not zero; rows of tables that no n-gram has
    met take next to nothing.
    """
    dim = FIELDS["BIGRAM_HASH_DIM"].default
    tables = config.get("bigram_hash_buckets", 0) * config.get("bigram_hash_dim", dim)
    return 2**22 + min(tables, MAX_TABLE_WEIGHTS) + 32 * size


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of an artifact. Raises UserError for a foreign, truncated or damaged file."""
    if data[:4] != ARTIFACT_MAGIC:
        raise UserError("not an artifact of this program (wrong magic)")
    body = data[8:]
    if not PACKAGED and zlib.crc32(body) != int.from_bytes(data[4:8], "little"):
        raise UserError("the artifact is truncated or damaged (checksum differs); copy or export it again")
    size = int.from_bytes(body[:4], "little")
    try:
        header = json.loads(lzma_expand(body[4 : 4 + size], MAX_HEADER_BYTES))
    except (ValueError, lzma.LZMAError, EOFError, RecursionError):
        raise UserError("the artifact's header cannot be read") from None
    if not isinstance(header, dict) or header.get("version") != 1:
        raise UserError("the artifact's version is not 1; read it with the program that wrote it")
    return header, body[4 + size :]


def check_header(header: dict[str, Any], size: int) -> dict[str, Any]:
    """The configuration in the header of a file of `size` bytes, if all its values and sizes are sane.

    Raises ValueError or UserError.
    """
    config, shapes = header["config"], [row[2:] for row in header["tensors"]]
    if not isinstance(config, dict) or not isinstance(header["prints"], dict):
        raise ValueError("config and prints must be objects")
    if not all(type(value) is float and 0 < value < math.inf for value in header["calibration"].values()):
        raise ValueError("calibration must be positive numbers")
    if unknown := set(config) - set(structure_fields()):
        raise ValueError(f"it was written by another version ({', '.join(sorted(unknown))})")
    for name, value in config.items():
        text = str(int(value)) if isinstance(value, bool) else str(value)
        if type(parse_value(name.upper(), text)) is not type(value):
            raise ValueError(f"{name} is a {type(value).__name__}")
    names, kinds = [row[0] for row in header["tensors"]], [row[0] for row in header["streams"]]
    if not all(isinstance(name, str) for name in names) or config.get("num_layers", 0) > len(names):
        raise ValueError("its tensors are not those of its configuration")
    if len(set(names)) < len(names) or len(set(kinds)) < len(kinds):
        raise ValueError("a name occurs twice")
    if not all(len(shape) <= 8 and all(type(n) is int and n > 0 for n in shape) for shape in shapes):
        raise ValueError("a tensor has an impossible shape")
    if sum(math.prod(shape) for shape in shapes) > most_elements(config, size):
        raise ValueError("more weights than its bytes can hold")
    return config


def unpack_stream(
    kind: str, packing: str, tool: str, data: bytes, sizes: tuple[int, int], shapes: list[list[int]]
) -> np.ndarray:
    """Values of a stream, sizes of which (values, packed bytes) are plausible. Raises ValueError."""
    if kind not in CONTEXT_STREAMS or packing != "context":
        return PACKINGS[packing][1](expand_chunks(tool, data, sizes[1]), sizes[0], STREAM_TYPES[kind])
    if tool != "none" or len(data) != sizes[1]:
        raise ValueError(f"stream {kind} has impossible sizes")
    return unpack_context(data, sizes[0], shapes, CONTEXT_STREAMS[kind])


def stream_shapes(header: dict[str, Any], h: Hyperparameters, marks: np.ndarray | None) -> dict[str, list[list[int]]]:
    """Shapes (rows, columns) of what the streams hold of tensors, by kind; marks: the stream of rows, if any."""
    shapes, at = {kind: list[list[int]]() for kind in STREAM_TYPES}, 0
    for _, codec, *shape in header["tensors"]:
        count = math.prod(shape[:-1])
        live = count if marks is None else int((marks[at : at + count] > 0).sum())
        shapes[CODECS[codec](h).stream] += [[live, shape[-1]]] if live else []
        at += count
    return shapes


def read_streams(header: dict[str, Any], payload: bytes, limit: int, h: Hyperparameters) -> dict[str, np.ndarray]:
    """Unpacked streams by kind. Checks sizes before it allocates. Raises ValueError or UserError."""
    streams, at = dict[str, np.ndarray](), 0
    for kind, packing, tool, count, packed, stored in header["streams"]:
        if kind not in STREAM_TYPES:
            raise ValueError(f"stream {kind} is of another version of this program; export the model again")
        dtype, marks = STREAM_TYPES[kind], streams.get("rows")
        shapes = stream_shapes(header, h, marks)[kind] if kind in CONTEXT_STREAMS else []
        known = STREAM_PACKINGS[kind] + (("context",) if kind in CONTEXT_STREAMS else ())
        if not PACKAGED and packing not in known:
            raise ValueError(f"stream {kind} cannot be packed as {packing}")
        if not (0 <= count <= limit and 0 <= packed <= 8 + count * dtype.itemsize and stored >= 0):
            raise ValueError(f"stream {kind} has impossible sizes")
        if not PACKAGED and tool in COMPRESSOR_PACKAGES and find_spec(COMPRESSOR_PACKAGES[tool]) is None:
            raise UserError(f"the artifact needs the package {COMPRESSOR_PACKAGES[tool]}; install it")
        streams[kind] = unpack_stream(kind, packing, tool, payload[at : at + stored], (count, packed), shapes)
        at += stored
    if at != len(payload):
        raise ValueError("bytes are left over")
    return streams


def take(streams: dict[str, np.ndarray], used: dict[str, int], kind: str, size: int) -> np.ndarray:
    """The next values of a stream."""
    part = streams[kind][used.get(kind, 0) :][:size] if size else np.zeros(0, STREAM_TYPES[kind])
    used[kind] = used.get(kind, 0) + size
    return part


def take_live(
    streams: dict[str, np.ndarray], used: dict[str, int], kind: str, shape: Sequence[int], live: np.ndarray | None
) -> np.ndarray:
    """The next values of a stream in a tensor's shape, with zeros in the rows that do not live (None: all do)."""
    if live is None:
        return take(streams, used, kind, math.prod(shape)).reshape(shape)
    count = int(live.sum())
    part = take(streams, used, kind, count * shape[-1])
    whole = np.zeros((live.size, shape[-1]), part.dtype)
    whole[live] = part.reshape(count, shape[-1])
    return whole.reshape(shape)


def decode_artifact(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and float32 weights by name. Needs no torch arithmetic. Raises UserError for any file it cannot read."""
    header, payload = read_header(data)
    try:
        # A packaged script reads what it has written itself.
        base = load_config({}) if PACKAGED else Hyperparameters(**check_header(header, len(data)))
        streams = read_streams(header, payload, most_elements(header["config"], len(data)), base)
        weights, used = {}, dict[str, int]()
        # Older files have marks of rows without tables, too.
        marked = (not PACKAGED or bool(base.ngram_orders)) and "rows" in streams
        for name, codec_name, *shape in header["tensors"]:
            codec = CODECS[codec_name](base)
            count, scale_shape = math.prod(shape[:-1]), codec.scale_shape(shape)
            live = take(streams, used, "rows", count) > 0 if marked else None
            codes, scales = take_live(streams, used, codec.stream, shape, live), None
            if scale_shape:
                bits = take_live(streams, used, "scales", scale_shape, live).astype(np.uint32)
                scales = (bits << 16).view(np.float32)
            weights[name] = codec.decode_numpy(np.ascontiguousarray(codes), scales)
        weights = join_corrections(weights) if base.corrects else weights
    except (lzma.LZMAError, UserError, *MALFORMED) as error:
        told = ascii(str(error))[1:-1][:200]  # it may quote the file: one line, no control characters
        raise UserError(f"the artifact cannot be decoded: {told}") from None
    if any(used.get(kind, 0) != stream.size for kind, stream in streams.items()):
        raise UserError("the artifact cannot be decoded: streams and tensors do not match")
    return header, weights


def read_artifact(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """decode_artifact of a file. Raises UserError naming it."""
    try:
        return decode_artifact(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_weights(model: GPT, weights: dict[str, np.ndarray]) -> None:
    """Make decoded floats a network's parameters; nothing is quantized again. Raises UserError for other tensors."""
    parameters = dict(model.named_parameters())
    if {n: tuple(p.shape) for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        wrong = sorted(set(parameters) ^ set(weights)) or ["shapes"]
        raise UserError(f"the artifact's tensors do not fit the network: {', '.join(wrong[:3])}")
    for name, parameter in parameters.items():
        parameter.data = torch.from_numpy(weights[name]).to(parameter)  # on a CPU the same memory


class Proxy:
    """Loss on fixed windows, spread over the held-out training tokens, of the model as its weights stand.

    It stands in for validation, which nothing may be chosen on; asked at most `evals` times, and not after the clock
    `seconds` has come to `limit`, as far as the slowest evaluation yet can tell.
    """

    def __init__(self, model: GPT, rt: Runtime, variant: Variant, seconds: Callable[[], float], limit: float) -> None:
        h, held = model.h, read_holdout(model.h)
        length = min(h.eval_window, h.calib_proxy_tokens, len(held) - 1)
        count = max(1, min(h.calib_proxy_tokens, len(held) - 1) // length)
        starts = np.linspace(0, len(held) - 1 - length, count).astype(np.int64).tolist()
        self.history, self.rows = windows(held, starts, length + 1, h.history, rt)
        self.model, self.rt, self.variant, self.seconds, self.limit = model, rt, variant, seconds, limit
        self.evals, self.most, self.slowest = 0, h.calib_max_evals, 0.0

    def spent(self) -> bool:
        """Whether no further evaluation may be asked for."""
        return self.evals >= self.most or self.seconds() + 2 * self.slowest >= self.limit

    @torch.no_grad()
    def losses(self) -> np.ndarray:
        """Nats a token of each window, float64."""
        began, found = self.seconds(), []
        for at in range(len(self.rows)):
            row, state = self.rows[at : at + 1], self.model.start_state(self.history[at : at + 1])
            with self.rt.precision():
                found.append(float(self.model.loss(row[:, :-1], row[:, 1:], self.variant, state).total))
        self.evals, self.slowest = self.evals + 1, max(self.slowest, self.seconds() - began)
        return np.array(found) / (self.rows.shape[1] - 1)

    def loss(self) -> float:
        """Nats a token."""
        return float(self.losses().mean())


def gain(before: np.ndarray, after: np.ndarray) -> float:
    """How much lower the mean loss of windows has become, less the standard error of the windows' differences.

    Without that the best of some trials on few tokens is luck: validation loss rose (records/calibration.md).
    """
    lower = before - after
    return float(lower.mean() - (lower.std(ddof=1) / math.sqrt(len(lower)) if len(lower) > 1 else 0.0))


# Where thresholds were found to be good, and the scales around 1, in steps that a few evaluations can walk.
TUNING_GRIDS: dict[str, tuple[float, ...]] = {
    "threshold": (0.02, 0.06, 0.1, 0.15, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8),
    "multiplier": (0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05, 1.075, 1.1, 1.15, 1.2, 1.25, 1.3),
}


class Calibration:
    """Search of codecs' tuning, one tensor after the other, that lowers the proxy loss; what is there is the first.

    The CALIB_MAX_CANDIDATES largest tensors are moved once, to see how much the loss changes; then the best two steps
    and the best one step of each value are walked, tensors whose loss changed most first. Only what lowers the loss, by
    more than chance would (`gain`), is kept, so the end is never worse than the beginning, whenever it comes.
    """

    def __init__(self, weights: Weights, proxy: Proxy) -> None:
        self.weights, self.proxy = weights, proxy
        self.found: dict[str, dict[str, float]] = {}  # tuning by tensor
        self.seen: set[tuple[str, float, float]] = set()
        self.before, self.losses = math.nan, np.full(1, math.nan)  # proxy loss without `found`, and of windows with it

    @property
    def best(self) -> float:
        """Proxy loss with what was found."""
        return float(self.losses.mean())

    def run(self) -> Calibration:
        """Search until all is walked or the proxy is spent."""
        if self.proxy.spent():
            return self
        self.losses = self.proxy.losses()
        self.before = self.best
        tunable = [name for name, (bank, _) in self.weights.where.items() if bank.codec.tunes]
        tunable.sort(key=lambda name: -self.weights.where[name][0].latent[0].numel())
        changes: dict[str, float] = {}
        for name in tunable[: self.weights.h.calib_max_candidates]:
            base, (bank, _) = self.best, self.weights.where[name]
            changes[name] = abs(self.move(name, bank.codec.tunes[0], 2) - base)
        for name in sorted(changes, key=lambda name: -changes[name]):
            for field in self.weights.where[name][0].codec.tunes:
                self.walk(name, field)
        return self

    def walk(self, name: str, field: str) -> None:
        """Two steps at a time and then one, up and down, as long as the loss falls."""
        for step in (2, -2, 1, -1):
            best = math.inf
            while self.best < best:
                best = self.best
                self.move(name, field, step)

    def move(self, name: str, field: str, steps: int) -> float:
        """The loss with one value so many steps along its grid (the best if that cannot be); kept if it is the best."""
        bank, i = self.weights.where[name]
        now = {part: round(float(values[i]), 6) for part, values in zip(Tuning._fields, bank.tuning, strict=True)}
        grid = TUNING_GRIDS[field]
        at = min(range(len(grid)), key=lambda k: abs(grid[k] - now[field])) + steps
        moved = {**now, field: grid[min(max(at, 0), len(grid) - 1)]}
        key = (name, moved["threshold"], moved["multiplier"])
        if key in self.seen or moved == now or self.proxy.spent():
            return self.best
        self.seen.add(key)
        self.weights.retune(name, moved)
        losses = self.proxy.losses()
        if gain(self.losses, losses) > 0:
            self.losses, self.found[name] = losses, moved
        else:
            self.weights.retune(name, now)
        return float(losses.mean())


def prunable_share(weights: Weights, proxy: Proxy) -> tuple[float, float, float]:
    """The share of n-gram rows to prune: ENGRAM_PRUNE or the first of its halves that the proxy loss can bear.

    Returns it, and the proxy loss before and after; (0, nan, nan) when there is no time. The weights stay as they are.
    """
    h, share, before, after = weights.h, weights.h.engram_prune, math.nan, math.nan
    whole = {key: form for key, form in weights.forms().items() if weights.banks[key].role.group == "table"}
    if not proxy.spent():
        before = after = proxy.loss()
    while share > h.engram_prune / 32 and not proxy.spent():
        weights.prune(share)
        loss = proxy.loss()
        weights.take(whole)
        if loss <= before + h.engram_prune_max_loss:
            return share, before, loss
        share /= 2
    return 0.0, before, after


class Budget(NamedTuple):
    """Bytes that count against HARD_BUDGET_BYTES."""

    model_bytes: int
    code_bytes: int
    packaged: bool  # whether the script counts itself, or the reserve stands in for it
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.code_bytes


def account(h: Hyperparameters, model_bytes: int) -> Budget:
    """Exact budget of an artifact: with this script's own size if it is a packaged one, else with the reserve."""
    code = len(Path(__file__).read_bytes()) if PACKAGED else h.code_bytes_reserve
    return Budget(model_bytes, code, PACKAGED, h.hard_budget_bytes)


# ==== 12. EVALUATION =========================================================
# Gives: one scoring engine for every way of evaluating; adapters plug into it.
# Needs: DATA (byte counts), MODEL. Does not know how the model was trained.
#
# The validation stream is cut into contiguous spans, each with its own carried state and adapter state. Every chunk
# of a span is scored first, under no_grad, and only then may adapters learn from it: this is the one loop in the
# program that reads validation tokens, so "score first, adapt later" holds by construction. Ranks and batches take
# whole spans, so results depend on neither.


class Distribution(NamedTuple):
    """A normalized distribution over the vocabulary at each position."""

    log_probs: Tensor  # (B, n, V)
    parts: Any = None  # what the adapter that made it wants to see again when it learns

    def log_prob(self, targets: Tensor) -> Tensor:
        """log p of targets (B, n), nats."""
        return self.log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def full(self, positions: slice = slice(None)) -> Tensor:
        """log p of every token (B, m, V) at some of the positions."""
        return self.log_probs[:, positions]


class Chunk(NamedTuple):
    """Equally long windows of several spans: the last `scored` positions are to be scored."""

    spans: list[int]
    tokens: Tensor  # (B, T)
    targets: Tensor | None  # (B, T); None while predictions are made
    scored: int
    starts: list[int]  # stream index of each row's first scored token
    history: Tensor  # (B, h.history) the tokens before the windows; -1 where there are none
    carry: tuple | None = None  # the network's state before the chunk, a row for each span


class Entry(NamedTuple):
    """A line of the ledger: the span's tokens from first to stop were scored, or learned from, in this order."""

    kind: str  # score or learn
    span: int
    first: int
    stop: int
    version: int  # chunks that the span's adapters had learned from before


class Carry(NamedTuple):
    """The network's state after the spans' last chunk, a row for each span that goes on; None where none is carried."""

    spans: list[int]
    state: tuple | None


class Adapter:
    """What may change predictions during evaluation. Each span has a state of its own, passed in and returned.

    `begin` gives a span's first state; `lora` hands low-rank pairs to the network, `weights` other values of its
    parameters; `wrap` turns the distribution of a chunk into another normalized one; `learn` is called after the chunk
    has been scored, with what `wrap` returned, unless it was its span's last. All that an adapter remembers is in these
    states, of numbers, arrays, tensors, and dicts and tuples of them, which the audit compares. An adapter that learns
    across spans sets `phases` > 1: the spans are then walked in that many parts, and between two parts `merge` sees
    what all spans of all ranks `offer` of their states, on the CPU.
    """

    phases: int = 1

    def memory(self, scorer: Scorer) -> int:
        """Bytes that a span's state will take, where they matter."""
        return 0

    def work(self, scorer: Scorer, rows: int) -> int:
        """Bytes that it takes to predict a chunk of so many spans, where they matter."""
        return 0

    def begin(self, scorer: Scorer) -> Any:
        return None

    def lora(self, states: list[Any], chunk: Chunk) -> dict[str, tuple[Tensor, Tensor]] | None:
        return None

    def weights(self, states: list[Any], chunk: Chunk) -> dict[str, Tensor] | None:
        return None

    def wrap(self, states: list[Any], chunk: Chunk, given: Distribution) -> Distribution:
        return given

    def learn(self, states: list[Any], chunk: Chunk, given: Distribution) -> list[Any]:
        return states

    def offer(self, state: Any) -> Any:
        return map_state(state, lambda tensor: tensor.cpu())

    def merge(self, states: dict[int, Any], offers: dict[int, Any]) -> dict[int, Any]:
        """The states of this rank's spans after all spans have met, by what each offered."""
        return states


def chunk_rows(chunk: Chunk, rows: list[int]) -> Chunk:
    """Some rows of a chunk."""
    spans, starts = ([part[i] for i in rows] for part in (chunk.spans, chunk.starts))
    targets = None if chunk.targets is None else chunk.targets[rows]
    carry = take_rows(chunk.carry, rows)
    return Chunk(spans, chunk.tokens[rows], targets, chunk.scored, starts, chunk.history[rows], carry)


class Deadline:
    """How fast an evaluation is, and whether it will be in time."""

    def __init__(self, began: float, limit: float, tokens: int, say: Callable[[str], None]) -> None:
        self.began, self.limit, self.tokens, self.say = began, limit, tokens, say
        self.done, self.foretold, self.first = 0, 0.0, (0, 0.0)
        self.asked: Callable[[], bool] = lambda: False

    def add(self, tokens: int) -> None:
        """So many tokens were scored; after the first 2% it is foretold how long all will take.

        What the first chunk took says nothing about the others: kernels are chosen and memory is taken in it.
        """
        if PACKAGED and not self.limit:
            return
        now, before = time.monotonic(), self.done
        self.done += tokens
        if not before:
            self.first = (self.done, now)
        elif self.limit and not self.foretold and self.done >= 0.02 * self.tokens:
            pace = (now - self.first[1]) / (self.done - self.first[0])
            self.foretold = now - self.began + pace * (self.tokens - self.done)
            self.say(f"evaluation will take about {self.foretold:.0f} s, MAX_EVAL_SECONDS={self.limit:g}")

    def late(self) -> bool:
        out_of_time = self.limit > 0 and max(self.foretold, time.monotonic() - self.began) > self.limit
        return (not PACKAGED and self.asked()) or out_of_time


class TemperatureAdapter(Adapter):
    """p^(1/tau) renormalized; tau was fitted on held-out training tokens before training's clock ended."""

    def begin(self, scorer: Scorer) -> float:
        return scorer.calibration.get("temperature", 1.0)

    def wrap(self, states: list[float], chunk: Chunk, given: Distribution) -> Distribution:
        return Distribution((given.full() / states[0]).log_softmax(-1))


def fit_temperature(
    h: Hyperparameters, rt: Runtime, model: GPT, holdout: np.ndarray, seconds: Callable[[], float], limit: float
) -> float | None:
    """tau in [0.5, 2] with the least loss on held-out training tokens, by golden-section search on log tau.

    holdout (at least one window and one token,) int64. Ends before the clock `seconds` reaches `limit`, as far as the
    pace so far can tell, with the best so far, or None when there was no time at all.
    """
    began, slowest, window = seconds(), 0.0, h.eval_window
    starts = range(0, min(len(holdout) - window, max(8192, window)), window)
    flat: list[Tensor] = []
    targets: list[Tensor] = []
    for start in starts:
        before = seconds()
        if before + 2 * slowest > (began + limit) / 2 or before >= limit:  # half of the time is for the search
            break
        history, row = windows(holdout, [start], window + 1, h.history, rt)
        with torch.no_grad(), rt.precision():
            logits, _ = model.logits(row[:, :-1], scoring_variant(h), model.start_state(history))
        flat, targets = [*flat, logits[0]], [*targets, row[0, 1:]]
        slowest = max(slowest, seconds() - before)
    low, high, ratio, fitted = -math.log(2), math.log(2), (math.sqrt(5) - 1) / 2, False
    for _ in range(20):
        before = seconds()
        if not flat or before + 2 * slowest > limit:
            break
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        losses = [
            sum(float(F.cross_entropy(z / math.exp(x), y)) for z, y in zip(flat, targets, strict=True))
            for x in (left, right)
        ]
        low, high = (low, right) if losses[0] < losses[1] else (left, high)
        slowest, fitted = max(slowest, seconds() - before), True
    return math.exp((low + high) / 2) if fitted else None


class NgramKind(NamedTuple):
    """What an n-gram adapter remembers and how it counts."""

    orders: tuple[int, ...]
    buckets: int  # rows of each order's table
    tokens: int  # positions remembered
    depth: int  # newest entries of a row that are counted
    alpha: float  # counts for the lower order by Laplace's rule; 0: one for each token seen (Moffat's PPM-C)
    exact: bool  # entries of other contexts in the same row do not count


class NgramState(NamedTuple):
    """One span's tables: chains of positions, the newest first, as in a Lempel-Ziv window."""

    tokens: np.ndarray  # (M,) int32, scored tokens by position modulo M
    heads: np.ndarray  # (orders, buckets) int32, the newest position of a row; -1: none
    before: np.ndarray  # (orders, M) int32, the position before it in its row
    checks: np.ndarray  # (orders, M) uint64, the whole hash of its context
    tail: np.ndarray  # (longest context,) int64, the last tokens scored; -1 before the span
    absorbed: int  # positions so far
    gate: np.ndarray  # (bins, 2) float64: evidence for the n-grams, and tokens seen
    trust: float  # log odds of the mixture against the model alone


class NgramAdapter(Adapter):
    """p = (1 - c) p_model + c p_ngram, p_ngram from counts of what the span's scored tokens were followed by.

    A row holds what followed its contexts, and one look-up gives counts of all tokens: p_ngram is normalized whatever
    shares a row. Orders are interpolated from the longest down, each leaving its escape e to the next and the last one
    to the model: p_k(v) = (n_k(v) + e_k' p_(k-1)(v)) / (n_k + e_k'). Only tokens that were seen are touched, and the
    sum over all is exactly 1. c = trust x w: w is learned by expectation maximization for each kind of place (longest
    order found, whether it is certain, the model's entropy) from places already scored; trust is the posterior of the
    mixture against the model alone (Bayes), by which the mixture fades where it has lost.
    """

    ENTROPIES: ClassVar[tuple[float, ...]] = (0.5, 1.5, 3.0)  # nats between kinds of places
    PRIOR: ClassVar[tuple[float, float]] = (1.0, 20.0)  # evidence and tokens that a bin starts with
    LIMIT: ClassVar[float] = 5.0  # of trust's log odds, so that it can change its mind
    BLOCK: ClassVar[int] = 64  # positions whose counts of the whole vocabulary are held in float64 at a time

    def __init__(self, kind: NgramKind) -> None:
        self.kind = kind

    def memory(self, scorer: Scorer) -> int:
        positions = self.positions(scorer)
        return len(self.kind.orders) * (4 * self.rows(scorer) + 12 * positions) + 4 * positions

    def work(self, scorer: Scorer, rows: int) -> int:
        """Four arrays of the size of a chunk's logits, one row's look-up, and counts of two blocks of its positions."""
        size = rows * scorer.step * scorer.h.vocab_size * scorer.rt.dtype.itemsize
        found = 24 * len(self.kind.orders) * scorer.step * self.kind.depth
        return 4 * size + found + 16 * min(self.BLOCK, scorer.step) * scorer.h.vocab_size

    def positions(self, scorer: Scorer) -> int:
        return min(self.kind.tokens, max(stop - start for start, stop in scorer.spans))

    def rows(self, scorer: Scorer) -> int:
        """Rows of a table; one that tells contexts apart has two for each position."""
        return self.kind.buckets or 2 * self.positions(scorer)

    def begin(self, scorer: Scorer) -> NgramState:
        count, size = len(self.kind.orders), self.positions(scorer)
        bins = np.tile(np.array(self.PRIOR), (count * 2 * (len(self.ENTROPIES) + 1), 1))
        heads = np.full((count, self.rows(scorer)), -1, np.int32)
        tables = np.full((count, size), -1, np.int32), np.zeros((count, size), np.uint64)
        tail = np.full(self.kind.orders[-1] - 1, -1)
        return NgramState(np.zeros(size, np.int32), heads, *tables, tail, 0, bins, 0.0)

    def hashes(self, tail: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """(orders, n) uint64: the context of each order that ends with each input."""
        both, found = np.concatenate((tail, inputs)).astype(np.uint64) + np.uint64(1), []
        value = np.zeros(len(inputs), np.uint64)
        for back in range(self.kind.orders[-1] - 1):
            at = len(tail) - back
            value = (value ^ both[at : at + len(inputs)]) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(29)
            if back + 2 in self.kind.orders:
                found.append(value)
        return np.stack(found)

    def look_up(self, state: NgramState, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that followed each context, (orders, n, depth), -1 where none; and each order's places."""
        hashes, size = self.hashes(state.tail, inputs), len(state.tokens)
        order = np.arange(len(hashes))[:, None]
        at = state.heads[order, hashes % np.uint64(state.heads.shape[1])]
        found = np.full((*hashes.shape, self.kind.depth), -1, np.int32)
        for step in range(self.kind.depth):
            there = (at >= 0) & (at >= state.absorbed - size)
            if not there.any():
                break
            slot = at % size
            same = there & (state.checks[order, slot] == hashes) if self.kind.exact else there
            found[..., step] = np.where(same, state.tokens[slot], -1)
            at = np.where(there, state.before[order, slot], -1)
        return found, order

    def counts(self, state: NgramState, inputs: np.ndarray, out: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """p_ngram's own part goes into out (n, V); what is left to the model (n,), and the kind of place (n,) or -1."""
        found, order = self.look_up(state, inputs)
        there, ordered = found >= 0, np.sort(found, -1)
        total = there.sum(-1)  # (orders, n)
        distinct = ((ordered[..., 1:] != ordered[..., :-1]) & (ordered[..., 1:] >= 0)).sum(-1) + (ordered[..., 0] >= 0)
        lower = np.where(total > 0, self.kind.alpha or distinct, 1.0)
        escape = lower / (total + lower)
        left = np.cumprod(escape[::-1], 0)[::-1]  # what this order and those above leave
        weight = left / np.where(total > 0, escape * (total + lower), 1.0)
        weights, vocabulary = np.broadcast_to(weight[..., None], found.shape), out.shape[1]
        for at in range(0, len(inputs), self.BLOCK):
            part = slice(at, min(at + self.BLOCK, len(inputs)))
            places = np.arange(part.stop - at)[None, :, None] * vocabulary + found[:, part]
            seen, size = there[:, part], (part.stop - at) * vocabulary
            flat = np.bincount(places[seen], weights[:, part][seen], size)
            out[part] = torch.from_numpy(flat.reshape(-1, vocabulary))
        longest = np.where(total > 0, order, -1).max(0)
        sure = np.take_along_axis(distinct, np.maximum(longest, 0)[None], 0)[0] == 1
        return left[0], np.where(longest >= 0, 2 * longest + sure, -1)

    def wrap(self, states: list[NgramState], chunk: Chunk, given: Distribution) -> Distribution:
        logs, inputs = given.full(), chunk.tokens[:, -chunk.scored :].cpu().numpy()
        entropy = -(logs.exp() * logs).sum(-1).cpu().numpy()
        level = np.searchsorted(self.ENTROPIES, entropy)  # (B, n)
        seen = torch.empty_like(logs)
        rows = [self.counts(*row) for row in zip(states, inputs, seen, strict=True)]
        place = np.stack([row[1] for row in rows])
        place = np.where(place >= 0, place * (len(self.ENTROPIES) + 1) + level, -1)
        share = np.stack([state.gate[row, 0] / state.gate[row, 1] for state, row in zip(states, place, strict=True)])
        share = np.where(place >= 0, share, 0.0)
        trust = np.array([[1 / (1 + math.exp(-state.trust))] for state in states])
        arrays = (np.stack([row[0] for row in rows]), share, share * trust)
        left, alone, mixed = (torch.from_numpy(array).to(logs) for array in arrays)
        kept, added = torch.log1p(-mixed * (1 - left))[..., None], (mixed[..., None] * seen).log_()
        both = torch.logaddexp(logs + kept, added, out=added)
        return Distribution(both, (logs, seen, left, alone, torch.from_numpy(place)))

    def learn(self, states: list[NgramState], chunk: Chunk, given: Distribution) -> list[NgramState]:
        assert chunk.targets is not None
        logs, seen, left, share, place = given.parts
        targets = chunk.targets[:, -chunk.scored :]
        model, ngram = (Distribution(part).log_prob(targets).double().exp() for part in (logs, seen.log()))
        ngram = ngram + left * model
        both = (1 - share) * model + share * ngram
        evidence, gain = share * ngram / both, (both / model).log().sum(1)
        inputs = chunk.tokens[:, -chunk.scored :]
        arrays = [part.cpu().numpy() for part in (inputs, targets, evidence, gain, place)]
        return [self.absorb(state, *row) for state, *row in zip(states, *arrays, strict=True)]

    def absorb(
        self,
        state: NgramState,
        inputs: np.ndarray,
        targets: np.ndarray,
        evidence: np.ndarray,
        gain: float,
        place: np.ndarray,
    ) -> NgramState:
        """The state after scored tokens, which are put into its tables in place."""
        hashes, size = self.hashes(state.tail, inputs), len(state.tokens)
        keep = slice(max(0, len(inputs) - size), None)  # a chunk may be longer than what is remembered
        at = (state.absorbed + np.arange(len(inputs)))[keep]
        for order, row in enumerate(hashes % np.uint64(state.heads.shape[1])):
            bucket = row[keep].astype(np.int64)
            by = np.argsort(bucket, kind="stable")
            last = np.append(bucket[by][1:] != bucket[by][:-1], True)
            first = np.append(True, last[:-1])
            state.before[order, at[by] % size] = np.where(first, state.heads[order, bucket[by]], np.roll(at[by], 1))
            state.heads[order, bucket[by][last]] = at[by][last]
            state.checks[order, at % size] = hashes[order, keep]
        state.tokens[at % size] = targets[keep]
        known, gate = place >= 0, state.gate.copy()
        np.add.at(gate, place[known], np.stack((evidence[known], np.ones(known.sum())), -1))
        tail = np.concatenate((state.tail, inputs))[len(inputs) :]
        trust = min(self.LIMIT, max(-self.LIMIT, state.trust + float(gain)))
        return state._replace(tail=tail, absorbed=state.absorbed + len(inputs), gate=gate, trust=trust)


def ngram_cache(h: Hyperparameters) -> NgramAdapter:
    """Exact contexts of several lengths, backing off."""
    orders = rising_orders("NGRAM_CACHE_ORDERS", h.ngram_cache_orders)
    return NgramAdapter(NgramKind(orders, 0, h.ngram_cache_tokens, h.ngram_cache_depth, 0.0, True))


def eval_engram(h: Hyperparameters) -> NgramAdapter:
    """Hashed rows that contexts share, smoothed by Laplace's rule."""
    orders = rising_orders("EVAL_ENGRAM_ORDERS", h.eval_engram_orders)
    sizes = (h.eval_engram_buckets, h.eval_engram_tokens, h.eval_engram_depth)
    return NgramAdapter(NgramKind(orders, *sizes, h.eval_engram_alpha, False))


class Sample(NamedTuple):
    """One row of a scored chunk, to learn from."""

    tokens: Tensor  # (1, T)
    targets: Tensor  # (1, T), -100 where there is nothing to learn
    carry: tuple | None


class Adapted(NamedTuple):
    """What a span has learned: values of parameters or of low-rank pairs, and the optimizer's averages."""

    values: dict[str, Tensor]
    mean: dict[str, Tensor]  # of gradients
    square: dict[str, Tensor]  # of their squares, for Adam
    steps: int
    kept: tuple[Sample, ...]  # scored, not learned from yet


TTT_LORA_TARGETS = re.compile(r"blocks\.\d+\.(attn|mlp)\.(qkv|proj|up|down)\.weight")


def ttt_names(h: Hyperparameters, model: GPT) -> list[str]:
    """Parameters in TTT_SCOPE. Raises UserError when there are none."""
    roles, found = role_table(model), list[str]()
    frozen = h.freeze_packed_engram
    scopes: dict[str, Callable[[str], bool]] = {
        "scalars": lambda n: roles[n].group not in ("matrix", "embed", "head", "table"),
        "lora": lambda n: TTT_LORA_TARGETS.fullmatch(n) is not None,
        "feedback": lambda n: ".feedback." in n or ".sketch." in n,
        # Not what a recurrence is stable by.
        "skc_safe": lambda n: ".skc." in n and roles[n].group == "scalar" and not re.search(r"decay|hold|diagonal", n),
        "capsule_bank": lambda n: ".bank." in n,
        **dict.fromkeys(("global", "all"), lambda n: not (frozen and roles[n].group == "table")),
    }
    found = [name for name, _ in model.named_parameters() if scopes[h.ttt_scope](name)]
    if not found:
        raise UserError(f"TTT_SCOPE={h.ttt_scope}: this network has no such parameters; try scalars")
    return found


class TestTimeTraining(Adapter):
    """Gradient steps on tokens that were scored, for each span by itself, or (global) between phases for all.

    The model's own parameters are never written: a span's values stand in for them (torch.func.functional_call), or
    low-rank pairs beside them, so that what it learned ends with it. Momentum goes on from chunk to chunk; the carried
    state before a chunk is where its training pass starts, too. With TTT_SCOPE=lora a document's first token resets the
    pairs, and what is learned from its chunk is what stands behind that token.
    """

    def __init__(self, h: Hyperparameters) -> None:
        self.h = h

    @property
    def low_rank(self) -> bool:
        """Whether low-rank pairs learn, and not weights."""
        return self.h.ttt_scope == "lora"

    @property
    def phases(self) -> int:  # type: ignore[override]
        return self.h.score_phases

    def begin(self, scorer: Scorer) -> Adapted:
        self.scorer = scorer
        return self.fresh()

    def fresh(self) -> Adapted:
        """Nothing learned yet: the model's own values, or pairs whose product is zero."""
        own = dict(self.scorer.model.named_parameters())
        values = {name: own[name].detach() for name in ttt_names(self.h, self.scorer.model)}
        if self.low_rank:
            values = {n: part for name, weight in values.items() for n, part in self.first_pair(name, weight).items()}
        zeros = {name: value.new_zeros(()).expand_as(value) for name, value in values.items()}  # which take no memory
        return Adapted(values, zeros, zeros, 0, ())

    def first_pair(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Random numbers into the rank, the same on every machine, and zeros out of it (Hu et al. 2021)."""
        seed = parameter_seed(0, name)  # not SEED, by which a score could be chosen
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(weight.shape[1], self.h.ttt_rank, generator=generator) / math.sqrt(weight.shape[1])
        return {name + ":in": down.to(weight), name + ":out": weight.new_zeros(self.h.ttt_rank, weight.shape[0])}

    def split(self, values: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The network's low-rank pairs."""
        names = [name[:-3] for name in values if name.endswith(":in")]
        return {name: (values[name + ":in"], values[name + ":out"]) for name in names}

    def lora(self, states: list[Adapted], chunk: Chunk) -> dict[str, tuple[Tensor, Tensor]] | None:
        return self.split(stack_values(states)) if self.low_rank and any(state.steps for state in states) else None

    def weights(self, states: list[Adapted], chunk: Chunk) -> dict[str, Tensor] | None:
        return None if self.low_rank or not states[0].steps else states[0].values

    def learn(self, states: list[Adapted], chunk: Chunk, given: Distribution) -> list[Adapted]:
        states = [self.keep(state, chunk_rows(chunk, [i])) for i, state in enumerate(states)]
        ready = [i for i, state in enumerate(states) if self.phases == 1 and self.enough(state)]
        alike: dict[tuple, list[int]] = {}
        for i in ready:
            alike.setdefault(tuple(sample.tokens.shape for sample in states[i].kept), []).append(i)
        for rows in alike.values():
            for i, new in zip(rows, self.adapt([states[i] for i in rows]), strict=True):
                states[i] = new
        return states

    def enough(self, state: Adapted) -> bool:
        """Whether a span has scored as many tokens as it waits for."""
        wanted = self.h.ttt_chunk_tokens
        return not wanted or sum(sample.targets.shape[1] for sample in state.kept) >= wanted

    def keep(self, state: Adapted, row: Chunk) -> Adapted:
        """The state with one more sample, begun anew where a document begins."""
        assert row.targets is not None
        if self.phases > 1 and self.reaches_back(row):
            return state
        targets, kept = row.targets.clone(), state.kept
        targets[:, : -row.scored] = -100
        starts = (targets[0] == self.scorer.model.bos).nonzero().flatten().tolist() if self.low_rank else []
        if starts:
            state, kept = self.fresh(), ()
            targets[:, : starts[-1] + 1] = -100
        return state._replace(kept=(*kept, Sample(row.tokens, targets, row.carry)))

    def reaches_back(self, row: Chunk) -> bool:
        """Whether a window sees tokens of the span before, which that span may not have scored when all meet."""
        begin, first = row.starts[0] + row.scored - row.tokens.shape[1], self.scorer.spans[row.spans[0]][0]
        return first > 0 and begin - self.h.history <= first

    def adapt(self, states: list[Adapted]) -> list[Adapted]:
        """TTT_EPOCHS passes over what the states keep, a step for each chunk, side by side."""
        kept = [state.kept for state in states]
        for _ in range(self.h.ttt_epochs):
            for samples in zip(*kept, strict=True):
                states = self.step(states, samples)
        return [state._replace(kept=()) for state in states]

    def offer(self, state: Adapted) -> tuple[Sample, ...]:
        """The samples alone: values and averages are the same on all ranks, which take the same steps."""
        return map_state(state.kept, lambda tensor: tensor.cpu())

    def merge(self, states: dict[int, Adapted], offers: dict[int, tuple[Sample, ...]]) -> dict[int, Adapted]:
        """One set of values for all spans, after steps on eight of the new samples at a time."""
        if not states:  # a rank may have no span
            return {}
        device = self.scorer.rt.device
        samples = [map_state(s, lambda tensor: tensor.to(device)) for _, kept in sorted(offers.items()) for s in kept]
        by_length: dict[tuple[int, ...], list[Sample]] = {}
        for sample in samples:
            by_length.setdefault(tuple(sample.tokens.shape), []).append(sample)
        groups = [part[at : at + 8] for part in by_length.values() for at in range(0, len(part), 8)]
        shared = [*states.values()][:1]
        for group in groups * self.h.ttt_epochs:
            shared = self.step(shared, group)
        return dict.fromkeys(states, shared[0]._replace(kept=()))

    def step(self, states: list[Adapted], samples: Sequence[Sample]) -> list[Adapted]:
        """One step of each state on its own sample, or of one state on all of them."""
        model, rt = self.scorer.model, self.scorer.rt
        values = stack_values(states) if self.low_rank else states[0].values
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        tokens = torch.cat([sample.tokens for sample in samples])
        targets = torch.cat([sample.targets for sample in samples])
        carry = join_rows([sample.carry for sample in samples])
        call = (tokens, self.scorer.variant, carry, 0, self.split(leaves) if self.low_rank else None)
        with torch.enable_grad(), rt.precision():
            logits, _ = torch.func.functional_call(model, {} if self.low_rank else leaves, call)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            means = losses.sum(1) / (targets >= 0).sum(1).clamp(min=1)  # of each row
            total = means.sum() if self.low_rank else means.mean()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        grads = {n: torch.zeros_like(leaves[n]) if g is None else g.to_dense() if g.is_sparse else g
            for n, g in zip(leaves, found, strict=True)}  # fmt: skip
        return [
            self.update(state, {n: g[i] for n, g in grads.items()} if self.low_rank else grads)
            for i, state in enumerate(states)
        ]

    @torch.no_grad()
    def update(self, state: Adapted, grads: dict[str, Tensor]) -> Adapted:
        """SGD with momentum, or Adam, on a gradient of bounded norm."""
        h, norm = self.h, torch.stack([g.norm() for g in grads.values()]).norm()
        scale, beta, steps = (h.ttt_clip / norm.clamp(min=h.ttt_clip)), h.ttt_momentum, state.steps + 1
        adam = h.ttt_optimizer == "adam"
        mean = {n: beta * state.mean[n] + (1 - beta if adam else 1) * scale * g for n, g in grads.items()}
        if not adam:
            return state._replace(
                values={n: v - h.ttt_lr * mean[n] for n, v in state.values.items()}, mean=mean, steps=steps
            )
        square = {n: 0.95 * state.square[n] + 0.05 * (scale * g).square() for n, g in grads.items()}
        rate = h.ttt_lr * math.sqrt(1 - 0.95**steps) / (1 - beta**steps)
        values = {n: v - rate * mean[n] / (square[n].sqrt() + 1e-8) for n, v in state.values.items()}
        return Adapted(values, mean, square, steps, state.kept)


def stack_values(states: list[Adapted]) -> dict[str, Tensor]:
    """The values of several spans with a batch dimension in front."""
    return {name: torch.stack([state.values[name] for state in states]) for name in states[0].values}


ADAPTERS: dict[str, Callable[[Hyperparameters], Adapter]] = {
    "ttt": TestTimeTraining,
    "temperature": lambda h: TemperatureAdapter(),
    "engram": eval_engram,
    "ngram": ngram_cache,
}


class Score(NamedTuple):
    """Sums over scored tokens."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def merge_changes(changes: list[dict[str, Any] | None]) -> dict[str, Any]:
    """What several adapters change, by parameter name. Raises ValueError when two change the same."""
    merged: dict[str, Any] = {}
    for change in changes:
        if both := merged.keys() & (change or {}).keys():
            raise ValueError(f"two adapters change {', '.join(sorted(both))}; only one may")
        merged |= change or {}
    return merged


# Most logits of one forward pass, which bounds its memory (4 bytes each, twice) whatever VAL_BATCH_SIZE says.
MAX_LOGITS = {"cuda": 2**28, "mps": 2**25, "cpu": 2**24}


class Scorer:
    """Scores token streams with one model and the adapters of a configuration.

    `plain`: without adapters and overlapping windows, for validation during training.
    """

    def __init__(
        self,
        h: Hyperparameters,
        rt: Runtime,
        model: GPT,
        table: ByteTable,
        calibration: dict[str, float] | None = None,
        plain: bool = False,
    ) -> None:
        self.h, self.rt, self.model, self.table, self.calibration = h, rt, model, table, calibration or {}
        self.plain = plain
        self.variant = scoring_variant(h)
        adapters = () if plain else tuple(ADAPTERS[name](h) for name, there in h.adapting.items() if there)
        self.adapters: Sequence[Adapter] = adapters if PACKAGED else list(adapters)
        self.say: Callable[[str], None] = lambda text: None  # told before memory is taken, and how long it will take
        self.limit = 0.0  # seconds; 0: unbounded
        self.began: float | None = None  # time.monotonic() from which they count; None: when scoring begins
        self.asked: Callable[[], bool] = lambda: False  # whether to stop, asked before each chunk
        self.watch: Callable[[str, Chunk, list[list], Distribution], None] | None = None  # sees scores and updates

    def score(
        self,
        tokens: np.ndarray,
        variant: Variant | None = None,
        ledger: list[Entry] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> Score:
        """Score every token of a stream but its first.

        tokens (N,) int64. `ledger` collects what was done, in order; `report` is called with the share done. All
        ranks return the same sums. Raises AgreedError when it takes longer than `limit`, or would by the pace of its
        first 2%.
        """
        checked = not PACKAGED and self.checked
        kept = fingerprint(self.model) if checked else b""
        self.variant, self.ledger = scoring_variant(self.h, variant), [] if ledger is None else ledger
        self.versions = Counter[int]()  # chunks that each span's adapters have learned from
        self.changed = set[str]()  # parameters that adapters have changed for a prediction
        self.tokens, self.spans = tokens, self.cut(len(tokens) - 1)
        count, rt = len(self.spans), self.rt
        mine = range(rt.rank * count // rt.world, (rt.rank + 1) * count // rt.world)
        rows = max(1, min(self.h.val_batch_size, MAX_LOGITS[rt.device.type] // self.h.vocab_size) // self.h.eval_window)
        rows = 1 if self.h.spans_apart and not self.plain else rows
        groups = [list(mine[at : at + rows]) for at in range(0, len(mine), rows)]
        self.foresee_memory(-(-count // rt.world), rows)
        states = {span: [adapter.begin(self) for adapter in self.adapters] for span in mine}
        began = time.monotonic() if self.began is None else self.began
        pace = Deadline(began, self.limit, sum(self.spans[span][1] - self.spans[span][0] for span in mine), self.say)
        if not PACKAGED:
            pace.asked = self.asked
        carries = [Carry(g, self.model.init_state(len(g))) for g in groups] if self.h.carry_eval else []
        known = 1 if self.plain else self.h.score_phases
        phases = known if PACKAGED else max([adapter.phases for adapter in self.adapters], default=1)
        turns = max(-(-(stop - start) // self.step) for start, stop in self.spans)
        sums = np.zeros(6)
        for phase in range(phases):
            part = range(phase * turns // phases, (phase + 1) * turns // phases)
            for g, group in enumerate(groups):
                carry = self.score_group(group, part, (states, carries[g] if self.h.carry_eval else None), sums, pace)
                if carry is not None:
                    carries[g] = carry
                if report:
                    report((phase + (g + 1) / len(groups)) / phases)
            states = self.merge(states) if phase + 1 < phases else states
        if not PACKAGED or self.limit:
            sums[3:] = pace.late(), checked and kept != fingerprint(self.model), not PACKAGED and self.asked()
        if rt.world > 1:
            dist.all_reduce(torch.from_numpy(sums), group=rt.control)
        if not PACKAGED and sums[5]:
            raise Interrupted("the evaluation was interrupted by a signal")
        if self.limit and sums[3]:
            raise AgreedError(
                f"evaluation takes longer than MAX_EVAL_SECONDS={self.limit:g}; use a longer stride, fewer TTT_EPOCHS, "
                "fewer adapters or more ranks"
            )
        if not PACKAGED and sums[4]:
            raise AgreedError("the evaluation changed the model's own weights (FREEZE_CHECK_STRICT=1)")
        return Score(float(sums[0]), int(sums[1]), int(sums[2]))

    def foresee_memory(self, spans: int, rows: int) -> None:
        """Say what the adapters will take for so many spans. Raises UserError when this machine has less."""
        if PACKAGED:
            return
        have, whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 0
        for adapter in self.adapters:
            kept, work = adapter.memory(self) * spans, adapter.work(self, min(rows, spans))
            if kept:
                self.say(
                    f"{type(adapter).__name__}: {kept / MIB:.1f} MiB for {spans} streams, {work / MIB:.1f} MiB more "
                    f"while {min(rows, spans)} of them are scored"
                )
            whole += kept + work
        if whole > have:
            raise UserError(
                f"the adapters need {whole / MIB:.0f} MiB for {spans} streams on each rank, and this machine has "
                f"{have / MIB:.0f}; lower EVAL_STREAMS, EVAL_ENGRAM_BUCKETS, EVAL_ENGRAM_TOKENS or NGRAM_CACHE_TOKENS"
            )

    @property
    def checked(self) -> bool:
        """Whether the model's weights are compared before and after."""
        return self.h.ttt_scope != "off" and not self.plain and self.h.freeze_check_strict

    @property
    def step(self) -> int:
        """Tokens scored at a time."""
        return self.h.sliding_eval_stride if self.h.sliding_eval and not self.plain else self.h.eval_window

    def merge(self, states: dict[int, list]) -> dict[int, list]:
        """The barrier between two phases: adapters that learn across spans see what all of them offer."""
        for i, adapter in enumerate(self.adapters):
            if adapter.phases == 1:
                continue
            mine = {span: adapter.offer(state[i]) for span, state in states.items()}
            parts: list[Any] = [mine] * self.rt.world
            if self.rt.world > 1:
                dist.all_gather_object(parts, mine, group=self.rt.control)
            offers = {span: offer for part in parts for span, offer in part.items()}
            merged = adapter.merge({span: state[i] for span, state in states.items()}, offers)
            for span in states:
                states[span][i] = merged[span]
        return states

    def cut(self, targets: int) -> list[tuple[int, int]]:
        """Contiguous spans of whole chunks (the last may be short), as [first, last + 1) of input positions."""
        chunks = -(-targets // self.step)
        count = min(self.h.eval_streams, chunks)
        edges = [min(targets, i * chunks // count * self.step) for i in range(count + 1)]
        return list(zip(edges[:-1], edges[1:], strict=True))

    def score_group(
        self, group: list[int], turns: Sequence[int], run: tuple, sums: np.ndarray, pace: Deadline
    ) -> Carry | None:
        """Walk some spans, chunk by chunk; `run` is (states by span, carry). Adds to the sums, returns the carry."""
        states, carry = run
        for turn in turns:
            before = carry
            for chunk in self.chunks(group, turn):
                if pace.late():
                    return carry
                mine = [states[span] for span in chunk.spans]
                rows = [before.spans.index(span) for span in chunk.spans] if self.h.carry_eval else []
                start = take_rows(before.state, rows) if self.h.carry_eval else self.model.start_state(chunk.history)
                chunk = chunk._replace(carry=start)
                given, after = self.predict(chunk._replace(targets=None), mine)
                self.note("score", chunk, mine, given[-1])
                sums[:3] += self.tally(chunk, given[-1])
                if self.h.carry_eval and chunk.scored == self.step:  # a shorter chunk ends its span
                    carry = Carry(chunk.spans, after)
                self.learn(chunk, mine, given)
                pace.add(len(chunk.spans) * chunk.scored)
        return carry

    def note(self, kind: str, chunk: Chunk, states: list[list], given: Distribution) -> None:
        """A line of the ledger for each row of a chunk that is being scored or learned from."""
        if PACKAGED:
            return
        for span, at in zip(chunk.spans, chunk.starts, strict=True):
            self.ledger.append(Entry(kind, span, at + 1, at + 1 + chunk.scored, self.versions[span]))
        if self.watch is not None:
            self.watch(kind, chunk, states, given)

    def learn(self, chunk: Chunk, states: list[list], given: list[Distribution]) -> None:
        """Let the adapters learn from a chunk that has been scored, but for rows whose span ends with it."""
        on = [i for i, span in enumerate(chunk.spans) if chunk.starts[i] + chunk.scored < self.spans[span][1]]
        if not on or not self.adapters:
            return
        if len(on) < len(chunk.spans):
            chunk, states = chunk_rows(chunk, on), [states[i] for i in on]
            given = [Distribution(d.log_probs[on], take_rows(d.parts, on)) for d in given]
        self.note("learn", chunk, states, given[-1])
        self.versions.update(chunk.spans)
        for i, adapter in enumerate(self.adapters):
            learned = adapter.learn([state[i] for state in states], chunk, given[1 + i])
            for state, new in zip(states, learned, strict=True):
                state[i] = new

    @torch.no_grad()
    def predict(self, chunk: Chunk, states: list[list]) -> tuple[list[Distribution], tuple | None]:
        """The distributions at the chunk's scored positions, from what came before each of them alone.

        The network's own, then what each adapter made of it; the last one counts.
        """
        if not self.adapters:
            state = chunk.carry if self.h.history or self.h.carry_eval else None
            with self.rt.precision():
                logits, carry = self.model.logits(chunk.tokens, self.variant, state, chunk.scored)
            return [Distribution(logits.log_softmax(-1))], carry
        columns = [[state[i] for state in states] for i in range(len(self.adapters))]
        pairs = merge_changes([a.lora(column, chunk) for a, column in zip(self.adapters, columns, strict=True)])
        weights = merge_changes([a.weights(column, chunk) for a, column in zip(self.adapters, columns, strict=True)])
        self.changed |= pairs.keys() | weights.keys()
        call = (chunk.tokens, self.variant, chunk.carry, chunk.scored, pairs or None)
        with self.rt.precision():
            logits, carry = (
                torch.func.functional_call(self.model, weights, call) if weights else self.model.logits(*call)
            )
        given = [Distribution(logits.log_softmax(-1))]
        for adapter, column in zip(self.adapters, columns, strict=True):
            given.append(adapter.wrap(column, chunk, given[-1]))
        return given, carry

    def chunks(self, group: list[int], turn: int) -> Iterator[Chunk]:
        """The turn-th chunk of each span in the group, those of equal shape together."""
        window = self.h.eval_window
        shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for span in group:
            first = self.spans[span][0] + turn * self.step
            last = min(first + self.step, self.spans[span][1])
            if first < last:
                begin = max(0, first + self.step - window)  # a shorter last chunk sees no further back than others
                shapes.setdefault((last - begin, last - first), []).append((span, last))
        for (length, count), rows in shapes.items():
            begins = [last - length for _, last in rows]
            history, both = windows(self.tokens, begins, length + 1, self.h.history, self.rt)
            starts = [last - count for _, last in rows]
            yield Chunk([s for s, _ in rows], both[:, :-1], both[:, 1:], count, starts, history)

    def tally(self, chunk: Chunk, given: Distribution) -> np.ndarray:
        """Nats, tokens and bytes of a chunk."""
        assert chunk.targets is not None
        targets = chunk.targets[:, -chunk.scored :]
        nats = -float(given.log_prob(targets).cpu().double().sum())
        previous, current = (x[:, -chunk.scored :].cpu().numpy() for x in (chunk.tokens, targets))
        return np.array([nats, current.size, self.table.byte_counts(previous, current).sum()])


class Finding(NamedTuple):
    """One line of an audit; ok is None for what could not be measured."""

    check: str
    ok: bool | None
    found: str


class Reached(Exception):
    """An audited run has scored the position that was asked for."""


class Seen(NamedTuple):
    """What an audited run showed, by the index of the predicted token."""

    vectors: dict[int, Tensor]  # log-probabilities of the whole vocabulary, on the CPU
    states: dict[int, bytes]  # digest of the span's adapters and carry before the chunk
    gap: float  # largest difference between the log-probabilities that were scored and the vectors
    off: float  # largest |logsumexp| of all vectors, wanted or not
    ledger: list[Entry]
    score: Score | None  # None where the run was cut short
    kept: bool  # no adapter changed anything of itself but its spans' states
    changed: set[str]  # parameters that adapters changed for some prediction


class Audit:
    """Whole evaluations of a short stream, with all adapters on, that show whether an evaluation is legal.

    `make` gives a new scorer; tokens (N,) int64 of its stream. Positions are all edges of chunks, spans, documents and
    segments (or as many as fit), and others by chance. Some more lie at the end of `far`, a longer stream that is
    walked as one span; what an evaluation would do beyond it, or where no position was chosen, is not seen.
    """

    def __init__(
        self, make: Callable[[], Scorer], tokens: np.ndarray, positions: int = 200, far: np.ndarray | None = None
    ) -> None:
        self.make, self.tokens, self.choose, self.far = make, tokens, np.random.default_rng(0), far
        self.before = fingerprint(make().model)
        self.whole = self.run(tokens, set(range(1, len(tokens))))
        self.positions = self.some_positions(positions)

    def some_positions(self, count: int) -> list[int]:
        """Positions in rising order, a quarter of them anywhere, the others at edges, some of each kind there is."""
        scorer, last = self.make(), len(self.tokens)
        scored = [entry for entry in self.whole.ledger if entry.kind == "score"]
        ends = {entry.span: entry.stop for entry in scored}
        begins = {entry.span: entry.first for entry in reversed(scored)}
        lengths = [n for n in (scorer.h.eval_window, scorer.h.rmt_segment) if n]
        kinds = [[*begins.values(), *ends.values()], np.flatnonzero(self.tokens == scorer.model.bos).tolist()]
        kinds += [[entry.first for entry in scored], *(list(range(0, last, length)) for length in lengths)]
        chosen = set[int]()
        for kind in kinds:
            near = sorted({at + i for at in kind for i in (-1, 0, 1) if 1 <= at + i < last})
            chosen |= set(self.choose.permutation(near)[: count * 3 // (4 * len(kinds))].tolist())
        others = self.choose.permutation([at for at in range(1, last) if at not in chosen])
        return sorted(chosen | set(others[: max(0, count - len(chosen))].tolist()))

    def run(self, tokens: np.ndarray, wanted: set[int], until: int = 0, adapters: list[Adapter] | None = None) -> Seen:
        """Evaluate and look; ends after the chunk of `until`, if that is given."""
        scorer = self.make()
        if len(tokens) > len(self.tokens):  # the longer stream
            scorer.h = dataclasses.replace(scorer.h, eval_streams=1)
        if adapters is not None:
            scorer.adapters = adapters
        return self.look(scorer, tokens, wanted, until)

    def look(self, scorer: Scorer, tokens: np.ndarray, wanted: set[int], until: int = 0) -> Seen:
        """Run a scorer and keep what it shows."""
        rows_seen, states, ledger, own = dict[int, Tensor](), dict[int, bytes](), list[Entry](), list[bytes]()
        gaps, offs = [0.0], [0.0]

        def watch(kind: str, chunk: Chunk, columns: list[list], given: Distribution) -> None:
            if kind != "score":
                return
            own.append(own[0] if own else own_state(scorer))
            full = given.full()
            if not until:
                targets = chunk.targets[:, -chunk.scored :] if chunk.targets is not None else chunk.tokens
                exact = full.gather(-1, targets[..., None])[..., 0]
                gaps.append(float((given.log_prob(targets) - exact).abs().max()))
                offs.append(float(full.double().logsumexp(-1).abs().max()))
            for row, start in enumerate(chunk.starts):
                inside = wanted.intersection(range(start + 1, start + 1 + chunk.scored))
                if not inside:
                    continue
                digest = fingerprint([columns[row], flatten_state(take_rows(chunk.carry, slice(row, row + 1)))])
                rows_seen.update({index: full[row, index - start - 1].cpu().clone() for index in inside})
                states.update(dict.fromkeys(inside, digest))
            if until in rows_seen:
                raise Reached

        scorer.watch, score = watch, None
        with suppress(Reached):
            score = scorer.score(tokens, ledger=ledger)
        kept, worst = not own or own[0] == own_state(scorer), (float(np.max(gaps)), float(np.max(offs)))
        return Seen(rows_seen, states, *worst, ledger, score, kept, scorer.changed)

    def findings(self) -> list[Finding]:
        """All checks that need no more than a scorer and a stream."""
        far = [] if self.far is None else [self.far_causality(self.far)]
        found = [self.causality(), *far, self.order(), *self.normalization(), *self.scores(), *self.state()]
        return [*found, self.determinism()]

    def causality(self) -> Finding:
        """A token and all after it replaced: its whole vector, and what its chunk was scored with, are the same bits.

        Where adapters meet between phases, what was scored in time before the token is not after it.
        """
        wrong = self.differing(self.tokens, self.whole, self.positions)
        found = f"{len(self.positions)} positions, {len(wrong)} differ" + (f", first {wrong[0]}" if wrong else "")
        return Finding("causality", not wrong, found)

    def far_causality(self, tokens: np.ndarray) -> Finding:
        """The same in the last window of a longer stream, at fewer positions: each costs a walk over all of it."""
        last, count = len(tokens), max(2, len(self.positions) // 25)
        window = np.arange(max(1, last - self.make().h.eval_window), last)
        places = sorted(self.choose.permutation(window)[:count].tolist())
        wrong = self.differing(tokens, self.run(tokens, set(places)), places)
        found = f"{len(places)} positions of the last {len(window)} tokens of {last - 1}, {len(wrong)} differ"
        return Finding("causality: far", not wrong, found)

    def differing(self, tokens: np.ndarray, whole: Seen, positions: list[int]) -> list[int]:
        """Positions where a run with the token and all after it replaced shows something else than the whole one."""
        turn = {at: i for i, e in enumerate(whole.ledger) if e.kind == "score" for at in range(e.first, e.stop)}
        order = np.array([-1, *(turn.get(at, 0) * len(tokens) + at for at in range(1, len(tokens)))])
        meets, wrong, size = any(a.phases > 1 for a in self.make().adapters), list[int](), self.make().h.vocab_size
        for at in positions:
            later = np.arange(len(tokens)) >= at
            later &= (order >= order[at]) | (not meets)
            shift = self.choose.integers(1, size, len(tokens))
            seen = self.run(np.where(later, (tokens + shift) % size, tokens), {at}, at)
            same = seen.states.get(at) == whole.states[at] and torch.equal(seen.vectors[at], whole.vectors[at])
            wrong += [] if same else [at]
        return wrong

    def order(self) -> Finding:
        """Every token is scored once, in order, and before anything learns from it."""
        places, problem = dict[int, int](), ""
        for e in self.whole.ledger:
            reached = places.get(e.span, e.first)
            if e.kind == "learn" and (e.span not in places or e.stop > reached):
                problem = problem or f"tokens {e.first} to {e.stop - 1} were learned from before they were scored"
            elif e.kind == "score":
                if e.first != reached:
                    problem = problem or f"token {e.first} was scored where {reached} was due"
                places[e.span] = e.stop
        scored = Counter(at for e in self.whole.ledger if e.kind == "score" for at in range(e.first, e.stop))
        once = scored == Counter(range(1, len(self.tokens)))
        if not problem and not (once and self.whole.score and self.whole.score.tokens == len(self.tokens) - 1):
            problem = "not every token was scored exactly once"
        return Finding("order", not problem, problem or f"{len(scored)} tokens scored once, in order, before updates")

    def normalization(self) -> list[Finding]:
        """Every distribution, of all tokens, sums to 1: the model's, each adapter's alone, and that of their stack."""
        stacks = {"model": [], **{type(a).__name__: [a] for a in self.make().adapters}}
        runs = {name: self.run(self.tokens, set(), 0, stack) for name, stack in stacks.items()}
        return [
            Finding(
                f"normalization: {name}",
                seen.off <= 1e-5 and seen.gap <= 1e-5,
                f"|logsumexp| {seen.off:.1e}, scored differs {seen.gap:.1e}",
            )
            for name, seen in (*runs.items(), ("all", self.whole))
        ]

    def scores(self) -> list[Finding]:
        """The score is what the vectors say, and the same to the last bit when nobody looks at them."""
        blind, seen = self.make().score(self.tokens), self.whole.score
        assert seen is not None, "a whole run ends with a score"
        nats = -sum(float(vector[self.tokens[at]]) for at, vector in self.whole.vectors.items())
        summed = math.isclose(nats, seen.nats, rel_tol=1e-9)
        return [
            Finding("score: sum", summed, f"{seen.nats:.6f} nats, {nats:.6f} by the vectors"),
            Finding("score: unwatched", blind == seen, f"nats differ by {abs(blind.nats - seen.nats):g}"),
        ]

    def state(self) -> list[Finding]:
        """Evaluations change nothing but their spans' states, and leave none behind."""
        scorer = self.make()
        first, second = (self.look(scorer, self.tokens, set(self.positions)) for _ in range(2))
        clean = self.before == fingerprint(scorer.model)
        alike, h = digest_of(first) == digest_of(second), scorer.h
        beyond = sorted(self.whole.changed - set(ttt_names(h, scorer.model) if h.ttt_scope != "off" else ()))
        changed = f"{len(self.whole.changed)} parameters adapted"
        return [
            Finding("state: weights", clean, "unchanged" if clean else "changed by the evaluation"),
            Finding("state: scope", not beyond, f"{beyond[0]} is not in TTT_SCOPE" if beyond else changed),
            Finding("state: adapters", self.whole.kept, "declared" if self.whole.kept else "an adapter keeps its own"),
            Finding("state: survival", alike, "none survives" if alike else "the next evaluation differs"),
        ]

    def determinism(self) -> Finding:
        """The same again with a new scorer."""
        again = self.run(self.tokens, set(self.whole.vectors))
        same = digest_of(again) == digest_of(self.whole)
        return Finding("determinism", same, "twice the same" if same else "another run shows something else")


def own_state(scorer: Scorer) -> bytes:
    """A digest of what adapters hold beside the states of their spans: in themselves, their classes, the scorer."""
    code = FunctionType | property | classmethod | staticmethod | type
    held = [{name: part for name, part in a.__dict__.items() if part is not scorer} for a in scorer.adapters]
    for kind in [kind for adapter in scorer.adapters for kind in type(adapter).__mro__]:
        held.append(
            {n: part for n, part in kind.__dict__.items() if not (n.startswith("__") or isinstance(part, code))}
        )
    return fingerprint([held, scorer.calibration, sorted(scorer.__dict__)])


def digest_of(seen: Seen) -> bytes:
    """A digest of all that a whole run showed."""
    return fingerprint([sorted(seen.vectors.items()), sorted(seen.states.items()), tuple(seen.score or ())])


def audit_stream(h: Hyperparameters, tokens: np.ndarray) -> np.ndarray:
    """The begin of a stream, long enough for each span to have four chunks, and all together a window and a half."""
    step = h.sliding_eval_stride if h.sliding_eval else h.eval_window
    chunks = max(4, -(-3 * h.eval_window // (2 * step * h.eval_streams)))
    return tokens[: max(h.eval_streams * chunks * step - step // 3, 300) + 1]


def check_bytes(tokenizer: Tokenizer, table: ByteTable, tokens: np.ndarray, part: np.ndarray, used: int) -> Finding:
    """The denominator of bits per byte is the bytes of the text, decoded between tokens that have no surface form.

    `used` is the denominator of a score of the stream `part`; it must be what the same table counts there.
    """
    cuts = np.flatnonzero(table.boundary[tokens])
    if len(cuts) < 2:
        return Finding("bytes", False, "no whole document among the tokens")
    parts = [tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(cuts)]
    decoded = sum(len(tokenizer.text_of(part).encode()) for part in parts)
    total = int(table.byte_counts(tokens[cuts[0] : cuts[-1]], tokens[cuts[0] + 1 : cuts[-1] + 1]).sum())
    due = int(table.byte_counts(part[:-1], part[1:]).sum())
    found = f"{total} counted, {decoded} decoded, {len(parts)} stretches of text; {used} of {due} in the audited score"
    return Finding("bytes", decoded == total and used == due, found)


def flatten_state(state: Any) -> list[Tensor]:
    """The tensors of a state in order."""
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state or () for tensor in flatten_state(part)]


def join_rows(states: Sequence[Any]) -> Any:
    """States of several rows as one with all of them."""
    parts = [flatten_state(state) for state in states]
    joined = iter([torch.cat(group) for group in zip(*parts, strict=True)])
    return map_state(states[0], lambda _: next(joined))


def take_rows(state: Any, rows: Any) -> Any:
    """Some rows of a state: an index, a list of them, or a slice."""
    return map_state(state, lambda tensor: tensor[rows])


def fingerprint(state: Any) -> bytes:
    """A digest of a state or a model: numbers, text, arrays, tensors, and dicts, lists and tuples of them.

    Raises UserError for anything else, whose content cannot be told.
    """
    if isinstance(state, nn.Module):
        state = dict(state.state_dict())
    if isinstance(state, Hyperparameters):
        state = dataclasses.asdict(state)
    if isinstance(state, Tensor):
        state = (
            str(state.dtype),
            tuple(state.shape),
            state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(),
        )
    if isinstance(state, np.ndarray):
        return hashlib.sha256(f"{state.dtype}{state.shape}".encode() + state.tobytes()).digest()
    if isinstance(state, dict):
        state = list(state.items())
    if isinstance(state, list | tuple):
        return hashlib.sha256(b"(" + b"".join(fingerprint(part) for part in state)).digest()
    if not (state is None or isinstance(state, int | float | str | bytes | np.generic)):
        raise UserError(
            f"an adapter keeps a {type(state).__name__}, whose content no audit can compare; keep numbers, text, "
            "arrays, tensors, and dicts, lists and tuples of them"
        )
    return hashlib.sha256(repr(state).encode()).digest()


def map_state(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a model state, keeping its structure."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple):
        parts = [map_state(part, change) for part in state]
        return tuple(parts) if type(state) is tuple else type(state)(*parts)  # the rest are named tuples
    return state


# ==== 13. CHECKPOINT =========================================================
# Gives: atomic checkpoints, exact resume. A checkpoint holds tensors and plain values only and is read without
# executing pickled code. Needs: RUNTIME, optimizer banks.


class Kept(NamedTuple):
    """The best state yet by EXPORT_PROXY_EVAL."""

    loss: float
    step: int
    forms: dict[str, Form]


@dataclass
class TrainState:
    """Everything that changes during training, saved and restored as a whole."""

    step: int = 0
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # training clock
    token_seconds: float = 0.0  # of the slowest recent step, to foresee the next
    position: Position = Position()
    variant: Variant = Variant()
    carry: Any = None  # mixer states of this rank's rows, or None
    prints: dict[str, str] = dataclasses.field(default_factory=dict)  # fingerprints of data and tokenizer
    before: Position = Position()  # of the last batch: resuming with DATASET_STATE_MODE=light reads it again
    calibrated: bool = False  # CALIB_AT_FRACTION has come
    best: Kept | None = None
    skipped: int = 0  # steps that were left out, their loss or gradient not being finite


def pack_checkpoint(h: Hyperparameters, rt: Runtime, state: TrainState, weights: Weights) -> dict[str, Any]:
    """The checkpoint as a tree of tensors and plain values; collective, since carries are gathered from all ranks."""
    banks = {}
    for key, bank in weights.banks.items():
        banks[key] = {"names": bank.names, "latent": bank.latent, "state": bank.state, "tuning": tuple(bank.tuning)}
    return {
        "format": 1,
        "structure": json.dumps(structure_config(h), sort_keys=True),
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "token_seconds": state.token_seconds,
        "position": tuple(state.position),
        "before": tuple(state.before),
        "variant": tuple(state.variant),
        "carry": flatten_state(gather_rows(rt, state.carry if h.dataset_state_mode == "full" else None)),
        "prints": state.prints,
        "calibrated": state.calibrated,
        "skipped": state.skipped,
        "best": state.best and [*state.best[:2], {k: (f.latent, *f.tuning) for k, f in state.best.forms.items()}],
        "banks": banks,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(rt.device) if rt.device.type == "cuda" else None,
    }


def gather_rows(rt: Runtime, state: Any) -> Any:
    """A carried state with the rows of all ranks, in global order."""
    if rt.world == 1 or state is None:
        return state

    def gather(part: Tensor) -> Tensor:
        whole = part.new_empty((part.shape[0] * rt.world, *part.shape[1:]))
        dist.all_gather(list(whole.chunk(rt.world)), part.contiguous())
        return whole

    return map_state(state, gather)


def rebuild_state(like: Any, tensors: list[Tensor]) -> Any:
    """The inverse of flatten_state, with `like` giving the structure."""
    left = iter(tensors)
    return map_state(like, lambda _: next(left))


def save_checkpoint(h: Hyperparameters, rt: Runtime, folder: Path, state: TrainState, weights: Weights) -> None:
    """Write step_*.pt and then `latest` (the file's name), both atomically; drop what KEEP_* does not keep."""
    tree, name = pack_checkpoint(h, rt, state, weights), f"step_{state.step:07d}.pt"

    def write() -> None:
        buffer = io.BytesIO()
        torch.save(tree, buffer)
        write_atomically(folder / name, buffer.getvalue())
        write_atomically(folder / "latest", name.encode())
        for path in sorted(folder.glob(f"step_{'[0-9]' * 7}.pt"))[: -h.keep_checkpoints]:
            if path.name != name and not (h.keep_every and int(path.stem[5:]) % h.keep_every == 0):
                path.unlink()

    on_main(rt, write)


def try_to_save(s: Session, state: TrainState) -> None:
    """save_checkpoint, but a full disk loses the checkpoint and not the run."""
    try:
        save_checkpoint(s.h, s.rt, s.folder / "checkpoints", state, s.weights)
    except UserError as error:
        s.log.line(f"warning: {error}; training goes on without this checkpoint")


def find_checkpoint(h: Hyperparameters, folder: Path) -> Path | None:
    """The checkpoint that RESUME names, or None to start afresh. Raises UserError when a named one is missing."""
    if h.resume == "auto":
        latest = folder / "latest"
        return folder / latest.read_text().strip() if latest.is_file() else None
    if h.resume and not Path(h.resume).is_file():
        raise UserError(f"RESUME={h.resume} does not exist; RESUME=auto takes the run folder's latest")
    return Path(h.resume) if h.resume else None


def check_container(path: Path) -> None:
    """Raise ValueError or BadZipFile for a checkpoint with a damaged part, or with parts larger than the file itself.

    torch looks at no checksum; and what it will allocate is bounded here, before it does.
    """
    with zipfile.ZipFile(path) as container:
        parts = container.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
            raise ValueError("parts are compressed")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("parts overlap")
        if container.testzip():
            raise ValueError("a part is damaged")


def load_checkpoint(h: Hyperparameters, rt: Runtime, path: Path, model: GPT, weights: Weights) -> TrainState:
    """Restore weights, averages, optimizer, random state; returns the run state. Raises UserError for a misfit."""
    try:
        check_container(path)
        tree = torch.load(path, map_location=rt.device, weights_only=True)
        structure, banks, rng = json.loads(tree["structure"]), tree["banks"], tree["rng"].cpu()
        position, variant = Position(*tree["position"]), Variant(*tree["variant"])
        state = TrainState(tree["step"], tree["tokens"], tree["seconds"], tree["token_seconds"], position)
        state.variant, state.before = variant, Position(*tree.get("before", (0, 0)))
        state.prints = {str(name): str(value) for name, value in tree.get("prints", {}).items()}
        state.calibrated, best = bool(tree.get("calibrated")), tree.get("best")
        state.skipped = int(tree.get("skipped", 0))
        if best and h.export_proxy_eval:
            loss, step, forms = best
            state.best = Kept(loss, step, {key: Form(v[0], Tuning(*v[1:])) for key, v in forms.items()})
        for saved in banks.values():
            saved["tuning"] = Tuning(*saved["tuning"])
        values, fields = dataclasses.asdict(h), {n: FIELDS[n.upper()] for n in structure_fields()}
        differ = [n.upper() for n, field in fields.items() if structure.get(n, field.default) != values[n]]
        carry, form = list(tree["carry"]), tree["format"]
        kinds = {key: (bank["latent"].shape, bank["latent"].dtype) for key, bank in banks.items()}
        if type(state.step) is not int or type(state.tokens) is not int:
            raise TypeError("counts are no integers")
        torch.Generator().set_state(rng)  # refuses what is none
    except (OSError, pickle.UnpicklingError, zipfile.BadZipFile, *MALFORMED) as error:
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}); choose an older one") from None
    if form != 1:
        raise UserError(f"{path} has checkpoint format {form}, not 1; resume it with the program that wrote it")
    wanted = {key: (bank.latent.shape, bank.latent.dtype) for key, bank in weights.banks.items()}
    if any(kind[1] != wanted[key][1] for key, kind in kinds.items() if key in wanted):
        differ.append("PRECISION")
    if differ or kinds != wanted:
        raise UserError(f"{path} was made under another configuration; it differs in {', '.join(differ) or 'weights'}")
    if h.carry_train and carry and carry[0].shape[0] * h.train_seq_len != h.train_batch_tokens:
        raise UserError(f"{path} carries {carry[0].shape[0]} rows; TRAIN_BATCH_TOKENS={h.train_batch_tokens} does not")
    for key, bank in weights.banks.items():
        bank.latent, bank.state, bank.tuning = banks[key]["latent"], banks[key]["state"], banks[key]["tuning"]
        if not h.ema_decay:
            bank.state.pop("ema", None)  # nothing would keep it up to date
    torch.set_rng_state(rng)
    if rt.device.type == "cuda" and tree.get("cuda_rng") is not None:
        torch.cuda.set_rng_state(tree["cuda_rng"].cpu(), rt.device)
    if carry and h.carry_train:
        rows = carry[0].shape[0] // rt.world
        share = slice(rt.rank * rows, (rt.rank + 1) * rows)
        form_of = model.init_state(rows)
        if len(flatten_state(form_of)) != len(carry):
            raise UserError(f"{path} carries states of another form; resume it with the program that wrote it")
        state.carry = rebuild_state(form_of, [part[share] for part in carry])
    return state


# ==== 14. TRAINING ===========================================================
# Gives: preflight, the loop, the finish. Everything is a call into the sections above.


class Session(NamedTuple):
    """What one run works with."""

    h: Hyperparameters
    rt: Runtime
    log: Log
    folder: Path
    loader: Loader
    tokenizer: Tokenizer
    model: GPT
    weights: Weights
    optimizer: Optimizer
    validation: np.ndarray
    table: ByteTable
    attention: str
    prints: dict[str, str]  # fingerprints of data and tokenizer
    guard: Guard


def read_validation(h: Hyperparameters) -> np.ndarray:
    """The validation stream, (N,) int64, or its first MAX_VAL_TOKENS + 1 tokens."""
    stream = TokenStream(h.data_path, "val", h.vocab_size)
    count = min(stream.tokens, h.max_val_tokens + 1 if h.max_val_tokens else stream.tokens)
    if count < 2:
        raise UserError(f"DATA_PATH={h.data_path} has fewer than two validation tokens")
    return stream.read(0, count)


def check_shares(h: Hyperparameters, rt: Runtime) -> None:
    """Raise UserError when a batch cannot be shared out evenly over ranks."""
    for tokens, length in ((tokens, length) for _, tokens in h.stages for _, length in h.lengths):
        if (tokens // length) % rt.world:
            raise UserError(
                f"TRAIN_BATCH_TOKENS={tokens} gives {tokens // length} rows of {length} tokens, not a multiple of "
                f"{rt.world} ranks; try {max(1, tokens // length // rt.world) * rt.world * length}"
            )


def open_session(h: Hyperparameters, rt: Runtime, folder: Path, log: Log) -> Session:
    """Check everything that can be checked before any work, then build data, model and optimizer. Raises UserError."""
    check_shares(h, rt)
    tokenizer = load_tokenizer(h)
    validation = read_validation(h)
    loader = Loader(h, rt, tokenizer.bos)
    held = loader.stream.tokens - loader.usable
    if h.fitted and held <= h.eval_window:
        raise UserError(
            f"{', '.join(h.fitted)}: {held} held-out tokens to fit on are too few for a window of {h.eval_window}; "
            "raise HOLDOUT_TOKENS (at most a tenth of the training tokens are held out)"
        )
    if h.export_mode == "competition_gptq" and h.gptq_source == "train" and held <= h.eval_window:
        raise UserError(
            f"GPTQ_SOURCE=train has {held} held-out tokens, too few for a window of {h.eval_window}; raise "
            "HOLDOUT_TOKENS, or take GPTQ_SOURCE=self"
        )
    table = tokenizer.byte_table()
    prints = {"data": data_fingerprint(h, loader.stream), "tokenizer": tokenizer.fingerprint}
    h, attention = with_backends(h, rt)
    model = build_model(h, rt, tokenizer.bos)
    weights = Weights(model)
    weights.materialize(0.0)
    optimizer = Optimizer(h, rt, weights)
    guard = cast(Guard, None if PACKAGED else Guard(h, rt, folder))  # nothing watches over a packaged script
    return Session(
        h, rt, log, folder, loader, tokenizer, model, weights, optimizer, validation, table, attention, prints, guard
    )


def run_folder(h: Hyperparameters, rt: Runtime) -> Path:
    """The run's folder, made by rank 0; the default name is the time, agreed by all ranks. Raises UserError."""
    (stamp,) = agree(rt, float(int(time.time())))
    folder = Path(h.out_dir) / (h.run_id or time.strftime("%Y%m%d-%H%M%S", time.gmtime(stamp)))

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"OUT_DIR={h.out_dir}: {folder} cannot be made: {error.strerror}") from None
        metrics = folder / "metrics.jsonl"
        if not h.resume and metrics.is_file() and metrics.stat().st_size:
            raise UserError(f"{folder} already holds a run; RESUME=auto continues it, another RUN_ID starts a new one")

    on_main(rt, make)
    return folder


def amount_of(h: Hyperparameters, quantity: str) -> float:
    """A network's parameters, bytes packed and not compressed, or FLOPs of a trained token, without its weights."""
    with torch.device("meta"):
        model = GPT(h, 1)
        if quantity == "bytes":
            return sum(Weights(model).packed_bytes().values())
    return flops_per_token(model) if quantity == "flops" else float(sum(p.numel() for p in model.parameters()))


def match_target(h: Hyperparameters) -> float:
    """What MATCH asks for: that of the preset as it is, but with the vocabulary of this run's data."""
    quantity, preset = h.match.split(":")
    return amount_of(dataclasses.replace(Hyperparameters(**PRESETS[preset]), vocab_size=h.vocab_size), quantity)


def is_valid(h: Hyperparameters) -> bool:
    """Whether no values contradict one another."""
    try:
        validate(h)
    except UserError:
        return False
    return True


def matched(h: Hyperparameters) -> Hyperparameters:
    """The configuration with the width that MATCH chooses, heads of a multiple of 8 channels as flash attention wants
    them. Raises UserError where no width is valid."""
    if not h.match:
        return h
    quantity, preset = h.match.split(":")
    unit, most = 8 * h.num_heads, 16 * max(h.model_dim, Hyperparameters(**PRESETS[preset]).model_dim)
    found = [dataclasses.replace(h, model_dim=width) for width in range(unit, most + unit, unit)]
    found, target = [one for one in found if is_valid(one)], match_target(h)
    if not found:
        raise UserError(f"MATCH={h.match}: no multiple of 8 NUM_HEADS={unit} is a valid MODEL_DIM here")
    above = bisect.bisect_left(found, target, key=lambda one: amount_of(one, quantity))
    return min(found[max(0, above - 1) : above + 1], key=lambda one: abs(math.log(amount_of(one, quantity) / target)))


def match_lines(h: Hyperparameters) -> Iterator[str]:
    """What MATCH has chosen and how near it is; nothing without it."""
    if h.match:
        (quantity, preset), target = h.match.split(":"), match_target(h)
        own = amount_of(h, quantity)
        yield f"match:{quantity} MODEL_DIM:{h.model_dim} {own:.0f} of {preset}'s {target:.0f} ({own / target - 1:+.2%})"


def describe(s: Session) -> None:
    """Log what is about to run: versions, device, roles, sizes, variables without effect."""
    h, log, rt = s.h, s.log, s.rt
    if PACKAGED:
        log.line(f"torch {torch.__version__} ranks:{rt.world} precision:{rt.arithmetic} attention:{s.attention}")
        return
    log.line(f"python {sys.version.split()[0]} torch {torch.__version__} numpy {np.__version__}")
    name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else rt.device.type
    name += f" threads:{torch.get_num_threads()}" if rt.device.type == "cpu" else ""
    log.line(
        f"device:{name} ranks:{rt.world} precision:{rt.arithmetic} compile:{int(rt.compile)} attention:{s.attention}"
    )
    log.line(f"train_tokens:{s.loader.usable} val_tokens:{len(s.validation)} data:{h.data_path}")
    log.line(f"data_fingerprint:{s.prints['data']} tokenizer:{s.prints['tokenizer']}")
    for line in (*role_lines(s), *match_lines(h)):
        log.line(line)
    log.metric("start", data=s.prints["data"], tokenizer=s.prints["tokenizer"], protocol=h.protocol, seed=h.seed,
        val_tokens=len(s.validation), parameters=sum(p.numel() for p in s.model.parameters()), device=name,
        flops_per_token=flops_per_token(s.model))  # fmt: skip
    for variable in ineffective_variables(h):
        log.line(f"note: {variable} is set but has no effect under this configuration")


def role_lines(s: Session) -> Iterator[str]:
    """The role table by bank, parameter count and packed bound."""
    yield f"{'role':<10}{'codec':<12}{'rate':>9}{'decay':>7}{'tensors':>9}{'parameters':>12}  shape"
    for bank in s.weights.banks.values():
        role, shape = bank.role, "x".join(map(str, bank.latent.shape[1:]))
        codec = f"{role.codec}>{role.export}" if role.export else role.codec
        group = s.optimizer.groups[role.group]
        rate, decay = group.rate * role.lr_mult, group.decay * role.decay
        count = len(bank.names)
        yield f"{role.group:<10}{codec:<12}{rate:>9.4g}{decay:>7.3g}{count:>9}{bank.latent.numel():>12}  {shape}"
    total = sum(p.numel() for p in s.model.parameters())
    packed = sum(s.weights.packed_bytes().values())
    bound = account(s.h, math.ceil(packed))
    yield (
        f"parameters:{total} packed_bound_bytes:{bound.model_bytes} code_bytes:{bound.code_bytes} "
        f"total_bytes:{bound.total_bytes} budget_bytes:{bound.budget_bytes}"
    )


class StepOut(NamedTuple):
    """What a forward and backward pass of one global batch leaves beside the gradients."""

    nats: Tensor  # summed over this rank's rows
    carry: Any  # mixer states of this rank's rows, or None
    metrics: dict[str, Tensor]  # diagnostics of sites and residual, means over micro-batches and ranks


def make_step(s: Session) -> Callable[[Batch, TrainState, float], StepOut]:
    """The forward and backward pass of one global batch, (batch, run state, progress) -> StepOut.

    Gradients are left in the parameters.
    """
    h, rt = s.h, s.rt
    if rt.compile:  # each structure and length is compiled once, and none may fall back to eager
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    loss_of = torch.compile(s.model.loss, mode=h.compile_mode, dynamic=False) if rt.compile else s.model.loss

    def step(batch: Batch, state: TrainState, progress: float) -> StepOut:
        rows, seq = batch.tokens.shape
        micro = max(1, h.micro_batch_tokens // seq)
        done = torch.tensor(progress, dtype=torch.float32, device=rt.device)
        count = torch.tensor(state.step, device=rt.device)
        total, carries, metrics = torch.zeros((), device=rt.device, dtype=rt.dtype), [], dict[str, Tensor]()
        for at in range(0, rows, micro):
            part = slice(at, min(at + micro, rows))
            carry = take_rows(state.carry, part) if h.carry_train else s.model.start_state(batch.history[part])
            with rt.precision():
                moment = Moment(done, count, torch.arange(part.start, part.stop, device=rt.device) + batch.row)
                out = loss_of(batch.tokens[part], batch.targets[part], state.variant, carry, moment)
            loss = out.total / batch.scored
            for auxiliary in out.losses.values():
                loss = loss + auxiliary / (rows * rt.world)
            (loss * (1 + 0 * loss.detach())).backward()  # times 1, but times NaN if it is not finite: gradients tell it
            total += out.total.detach()
            if h.carry_train:
                carries.append(map_state(out.state, Tensor.detach))
            for name, value in out.metrics.items() if state.variant.measures else ():
                metrics[name] = metrics.get(name, 0.0) + value.detach().float() * len(batch.tokens[part]) / rows
        if state.variant.measures and metrics:
            metrics["step_loss_nats"] = total.detach().float() / batch.tokens.numel()
        if state.variant.measures and rt.world > 1 and metrics:
            means = torch.stack([*metrics.values()])
            dist.all_reduce(means)
            metrics = dict(zip(metrics, means / rt.world, strict=True))
        return StepOut(total, join_states(carries) if h.carry_train else None, metrics)

    return step


def join_states(states: list) -> Any:
    """Put states of consecutive rows together again."""
    if states[0] is None or len(states) == 1:
        return states[0]
    columns = zip(*map(flatten_state, states), strict=True)
    return rebuild_state(states[0], [torch.cat(column) for column in columns])


def compile_warmup(s: Session, step: Callable, state: TrainState) -> None:
    """Run every variant and batch shape before the clock starts, then restore weights and data position."""
    h, position = s.h, s.loader.position
    kept = {
        key: (bank.latent.clone(), {name: moment.clone() for name, moment in bank.state.items()})
        for key, bank in s.weights.banks.items()
    }
    times = (0.0, h.untie_at_fraction, h.moe_start_fraction, h.recurrence_start_fraction, 1.0)
    variants = list(dict.fromkeys((state.variant, *(variant_at(h, time) for time in sorted(times)))))
    variants += [variant._replace(measures=True) for variant in variants if h.measured_every]
    # A carried attention cache has a new length until its window is full.
    fill = 2 + -(-h.attn_window // h.train_seq_len) if h.carry_train else 1
    shapes = [(tokens, length) for _, tokens in h.stages for length in dict(h.lengths).values()]
    plan = [(variant, *shape) for variant in variants for shape in shapes for _ in range(fill)]
    plan += [(state.variant, *shapes[0])] * (h.warmup_steps - len(plan))
    carry = None
    for count, (variant, tokens, length) in enumerate(plan):
        batch = s.loader.next(tokens // length, length)
        if h.carry_train and count % fill == 0:
            carry = s.model.init_state(batch.tokens.shape[0])
        carry = step(batch, TrainState(variant=variant, carry=carry), 0.0).carry
        s.optimizer.step(0.0, 0.0, False, 0.0)
        s.weights.clear_gradients()
    for key, bank in s.weights.banks.items():
        bank.latent.copy_(kept[key][0])
        bank.state = kept[key][1]
    s.weights.materialize(0.0)
    s.loader.seek(position)
    synchronize(s.rt)


class Pace:
    """Bounds how far the CPU runs ahead of the GPU, and foresees the length of the next step.

    A GPU step is known to be over only when its event is; so at most two are in flight, and the stop decision adds
    the slowest recent step for each of those, since training must end before the limit and never after.
    """

    def __init__(self, rt: Runtime, token_seconds: float) -> None:
        self.cuda = rt.device.type == "cuda"
        self.events: list[Any] = []
        self.recent = [token_seconds]

    def mark(self, seconds: float, tokens: int) -> None:
        """Note the end of a step, with the time it took."""
        self.recent = [*self.recent[-63:], seconds / tokens]
        if self.cuda:
            self.events.append(torch.cuda.current_stream().record_event())
            if len(self.events) > 2:
                self.events.pop(0).synchronize()

    def margin(self, tokens: int) -> float:
        """Seconds that must be left for one more step of so many tokens to end in time."""
        return max(self.recent) * tokens * (4 if self.cuda else 2)


def finished(h: Hyperparameters, step: int, seconds: float, margin: float) -> bool:
    """Whether the run has no further step, or no time for one."""
    by_steps = h.iterations > 0 and step >= h.iterations + h.extension_steps
    return by_steps or (h.step_seconds > 0 and seconds + margin >= h.step_seconds)


def train_loop(s: Session, state: TrainState) -> None:
    """Train until the agreed end; the clock stops for validation and saving."""
    h, rt, log = s.h, s.rt, s.log
    step, pace, clock = make_step(s), Pace(rt, state.token_seconds), Clock(state.seconds)
    s.loader.seek(state.position)
    start = progress_of(h, state.step, state.seconds)
    switch_variant(s, state, start)
    if rt.compile and h.warmup_steps:
        log.line(f"warm-up: {h.warmup_steps} steps outside the clock, undone afterwards")
        compile_warmup(s, step, state)
    s.weights.materialize(start)
    if h.carry_train and state.carry is None:
        state.carry = s.model.init_state(stage_at(h.stages, 0.0) // h.train_seq_len // rt.world)
        reread(s, step, state)
    window, health, fresh = LossWindow(state), Health(log, {} if PACKAGED else s.model.ranges()), state.step
    skips, vitals = Skips(s), Vitals(health)
    if not PACKAGED:
        s.guard.working = True
    clock.start()
    while True:
        tokens = stage_at(h.stages, progress_of(h, state.step, clock.seconds()))
        now, margin, size = agree(rt, clock.seconds(), pace.margin(tokens), tokens)
        if not PACKAGED:
            s.guard.signal = largest_of(rt, s.guard.signal) or s.guard.signal
        if (not PACKAGED and s.guard.signal) or finished(h, state.step, now, margin):
            break
        if state.step > fresh:
            pause_for(s, state, clock)
            (now,) = agree(rt, clock.seconds())
        progress = progress_of(h, state.step, now)
        switch_variant(s, state, progress)
        tokens, length = int(size), stage_at(h.lengths, progress)
        batch = s.loader.next(tokens // length, length)
        if h.carry_train and s.loader.position.epoch > state.position.epoch:
            state.carry = s.model.init_state(len(batch.tokens))  # rows begin anew: nothing comes before them
        s.weights.disturb(progress, state.step)
        measures = any((state.step + 1) % every == 0 for every in h.measured_every)
        variant = state.variant._replace(measures=measures)
        carry = state.carry
        out = step(batch, dataclasses.replace(state, variant=variant), progress)
        state.carry = out.carry
        average = h.ema_decay > 0 and progress >= h.ema_start_fraction
        ahead = progress_of(h, state.step + 1, now)  # a resumed run quantizes its weights for the next step, too
        momentum = muon_momentum(h, state.step)
        changed = s.optimizer.step(rate_scale(h, state.step, now), momentum, average, ahead, measures)
        s.weights.clear_gradients()
        state.before, state.position = state.position, s.loader.position
        state.step, state.tokens = state.step + 1, state.tokens + tokens
        pace.mark(clock.seconds() - now, tokens)
        state.token_seconds = max(pace.recent)
        window.add(out.nats, tokens, s.optimizer.finite)
        if h.carry_train and not s.optimizer.finite:
            state.carry = carry  # what the step left may be no better than its loss
        if not PACKAGED:
            skips.look(state, step, batch)
            s.guard.beat()
        if measures:
            metrics = out.metrics | changed
            health.look(state.step, {name: float(value) for name, value in metrics.items()})
            s.guard.figures |= {name: float(metrics[name]) for name in metrics if name.endswith("fallbacks")}
        state.seconds = clock.seconds()
        if not PACKAGED:
            log.progress(progress, f"step {state.step} eta {eta_text(h, state)}")
        if state.step % h.train_log_every == 0 or state.step <= 5:
            report_training(s, state, window, vitals)
    synchronize(rt)
    clock.stop()
    (state.seconds,) = agree(rt, clock.banked)


def reread(s: Session, step: Callable, state: TrainState) -> None:
    """Fill carried states that a light checkpoint left out, from the window before; they know nothing older."""
    if not state.step:
        return
    s.loader.seek(state.before)
    batch = s.loader.next(len(state.carry[0].position) * s.rt.world, s.h.train_seq_len)
    state.carry = step(batch, state, progress_of(s.h, state.step, state.seconds)).carry
    s.weights.clear_gradients()
    s.loader.seek(state.position)
    s.log.line(f"step:{state.step} carried states are made again from the last {s.h.train_seq_len} tokens of each row")


def pause_for(s: Session, state: TrainState, clock: Clock) -> None:
    """Align with the export on the clock; validate and save with the clock stopped; each when it is due."""
    h = s.h
    if h.calib_at_fraction or h.export_proxy_eval:
        align(s, state, clock)
    validates = h.val_loss_every and state.step % h.val_loss_every == 0
    saves = not PACKAGED and h.save_every and state.step % h.save_every == 0
    if not validates and not saves:
        return
    synchronize(s.rt)
    clock.stop()
    state.seconds = clock.banked
    if not PACKAGED:
        s.guard.beat(slow=True)
    with suppress(Interrupted):  # the loop will see the signal, too
        if validates:
            report_validation(s, state)
    if saves:
        try_to_save(s, state)
    if not PACKAGED:
        s.guard.beat()
    clock.start()


class Skips:
    """Counts the steps that the optimizer left out, and ends a run that does nothing else.

    A step's flag is read when the step is over anyway, on a GPU two steps later.
    """

    def __init__(self, s: Session) -> None:
        self.s, self.row, self.flags = s, 0, list[Tensor]()
        self.late = 2 if s.rt.device.type == "cuda" else 0

    def look(self, state: TrainState, step: Callable, batch: Batch) -> None:
        """Raises AgreedError after MAX_NONFINITE_STEPS in a row, with a checkpoint that repeats the last one."""
        if PACKAGED:
            return
        self.flags.append(self.s.optimizer.finite.to("cpu", non_blocking=True))
        self.read(state, self.late)
        if self.row >= self.s.h.max_nonfinite_steps:
            synchronize(self.s.rt)
            self.read(state, 0)
        if self.row >= self.s.h.max_nonfinite_steps:
            self.dump(state, step, batch)

    def read(self, state: TrainState, late: int) -> None:
        """Count all flags but the last few, which may not have arrived."""
        while len(self.flags) > late:
            finite = bool(self.flags.pop(0))
            self.row = 0 if finite else self.row + 1
            state.skipped += not finite

    def dump(self, state: TrainState, step: Callable, batch: Batch) -> None:
        """Run the last step's forward and backward pass again, name what is not finite, save the state before it."""
        s, at, folder = self.s, state.step - 1, self.s.folder / "nonfinite"
        before = dataclasses.replace(state, step=at, position=state.before, skipped=state.skipped - 1)
        nats = float(step(batch, before, progress_of(s.h, at, state.seconds)).nats)
        grads = {n: p.grad.coalesce().values() if p.grad.is_sparse else p.grad for n, p in s.model.named_parameters()
                 if p.grad is not None}  # fmt: skip
        wrong = [name for name, grad in grads.items() if not grad.isfinite().all()]
        s.weights.clear_gradients()
        save_checkpoint(s.h, s.rt, folder, before, s.weights)
        told = {"step": at + 1, "position": tuple(state.before), "loss_nats": repr(nats), "gradients": wrong}
        on_main(s.rt, lambda: write_atomically(folder / "step.json", (json.dumps(told, indent=1) + "\n").encode()))
        raise AgreedError(
            f"loss or gradient was not finite in {self.row} steps in a row, up to step {state.step}; "
            f"RESUME={folder / f'step_{at:07d}.pt'} repeats the last one ({folder / 'step.json'} names its gradients); "
            "lower the rates or set GRAD_CLIP_NORM"
        )


class Health:
    """Writes diagnostics down, and says it when one of them leaves its range or comes back.

    A range is (good from, good to, bad below, bad above); metrics.jsonl has them at the start. A resumed run says anew
    what is amiss.
    """

    def __init__(self, log: Log, ranges: dict[str, tuple[float, float, float, float]]) -> None:
        self.log, self.ranges, self.amiss = log, ranges, set[str]()
        if ranges:
            names = ("good_from", "good_to", "bad_below", "bad_above")
            log.metric("ranges", **{name: dict(zip(names, limits, strict=True)) for name, limits in ranges.items()})

    def look(self, step: int, metrics: dict[str, float]) -> None:
        self.log.metric("diagnostics", step=step, **metrics)
        for name, (good_from, good_to, below, above) in self.ranges.items():
            if name not in metrics:
                continue  # of a loop that has not begun
            amiss = not below <= metrics[name] <= above  # NaN, too
            if amiss != (name in self.amiss):
                self.amiss ^= {name}
                state = f"out of its range {below:g} to {above:g}" if amiss else "back in its range"
                self.log.line(
                    f"health step:{step} {name}:{metrics[name]:.4g} {state}; good: {good_from:g} to {good_to:g}"
                )

    def tell(self, step: int, name: str, amiss: bool, text: str) -> None:
        """A line when something else than a measured range breaks, or comes back."""
        if amiss != (name in self.amiss):
            self.amiss ^= {name}
            self.log.line(f"health step:{step} {text}{'' if amiss else ': well again'}")


class Vitals:
    """Whether a run goes on as it should, judged from its reports.

    The last three speeds within 10% of the median before (the first 30 steps and every change of what a step is left
    out), a loss that falls over 1,000 steps, flat reserved memory, a GPU whose clock nothing holds down.
    """

    STEADY, SPAN = 30, 1000  # steps

    def __init__(self, health: Health) -> None:
        self.health, self.kind = health, Any
        self.speeds, self.losses, self.reserved = list[float](), list[tuple[int, float]](), 0.0

    def look(self, step: int, kind: Any, speed: float, loss: float) -> None:
        """kind: what a step is: another one has another speed."""
        self.losses = [*(pair for pair in self.losses if pair[0] > step - 2 * self.SPAN), (step, loss)]
        new, old = ([x for at, x in self.losses if (at > step - self.SPAN) == recent] for recent in (True, False))
        if step >= 2 * self.SPAN and old:
            before, now = sum(old) / len(old), sum(new) / len(new)
            text = f"train_loss:{now:.4f} over the last {self.SPAN} steps, {before:.4f} over those before: a plateau"
            self.health.tell(step, "plateau", not now < 0.999 * before, text)
        self.speeds = self.speeds if kind == self.kind and step > self.STEADY else []
        self.kind, self.speeds = kind, [*self.speeds[-30:], speed]
        if len(self.speeds) > 6:
            usual, now = np.median(self.speeds[:-3]), np.median(self.speeds[-3:])
            text = f"tok/s:{now:.0f} is not within 10% of the usual {usual:.0f}"
            self.health.tell(step, "speed", not 0.9 * usual <= now <= 1.1 * usual, text)

    def look_at_machine(self, step: int, reserved_mib: float, throttled: str) -> None:
        if step >= self.STEADY:
            self.reserved = self.reserved or reserved_mib
            text = f"reserved_mib:{reserved_mib:.0f} has grown from {self.reserved:.0f}"
            self.health.tell(step, "memory", reserved_mib > 1.05 * self.reserved + 64, text)
        self.health.tell(step, "clock", bool(throttled), f"the GPU's clock is held down by {throttled or 'nothing'}")


class LossWindow:
    """Training loss since the last report, kept on the device until it is read."""

    def __init__(self, state: TrainState) -> None:
        self.losses: list[Tensor] = []
        self.counted: list[Tensor] = []  # tokens of steps that were not left out
        self.tokens, self.step, self.seconds = 0, state.step, state.seconds

    def add(self, nats: Tensor, tokens: int, finite: Tensor) -> None:
        self.losses.append(torch.where(finite, nats, 0.0))
        self.counted.append(finite * tokens)
        self.tokens += tokens

    def mean(self, rt: Runtime, state: TrainState) -> float:
        """Nats a token over all ranks, NaN if every step was left out; the next window begins at this state."""
        total = torch.stack(self.losses).cpu().double().sum()
        if rt.world > 1:
            dist.all_reduce(total, group=rt.control)
        counted = int(torch.stack(self.counted).sum())
        mean = float(total) / counted if counted else math.nan
        self.losses, self.counted, self.tokens = [], [], 0
        self.step, self.seconds = state.step, state.seconds
        return mean


def switch_variant(s: Session, state: TrainState, progress: float) -> None:
    """Turn on structure whose time has come: an untied head starts as a copy of the embedding, experts as nearly copies
    of the first."""
    if not s.h.switches:
        return
    old = state.variant  # what is on stays on, though a resumed run may have become longer
    new = Variant(*(before or now for before, now in zip(old, variant_at(s.h, progress), strict=True)))
    if new == old:
        return
    if new.untied and not old.untied:
        s.weights.copy_weight("embed.weight", "head.weight")
    if new.experts and not old.experts and s.h.moe_start_fraction:
        for name in [name for name in s.weights.where if ".experts." in name and ".experts.0." not in name]:
            s.weights.copy_weight(re.sub(r"experts\.\d+", "experts.0", name), name, noise=0.01)
    state.variant = new
    s.weights.materialize(progress)
    on = [name for name, before, now in zip(Variant._fields, old, new, strict=True) if now and not before]
    s.log.line(f"step:{state.step} from here on: {', '.join(on)}")


def eta_text(h: Hyperparameters, state: TrainState) -> str:
    """Training time that remains at the pace so far."""
    progress = max(1e-6, progress_of(h, state.step, state.seconds))
    return clock_text(state.seconds / progress - state.seconds)


def report_training(s: Session, state: TrainState, window: LossWindow, vitals: Vitals) -> None:
    """One line in the field's format, one metrics object, and what they say about the run's health."""
    h, passed = s.h, max(1e-9, state.seconds - window.seconds)
    speed, steps = window.tokens / passed, state.step - window.step
    loss = window.mean(s.rt, state)
    line = (
        f"step:{state.step}/{h.iterations} train_loss:{loss:.4f} train_time:{state.seconds * 1e3:.0f}ms "
        f"step_avg:{state.seconds * 1e3 / state.step:.2f}ms"
    )
    if PACKAGED:
        s.log.line(line)
        return
    s.log.line(
        f"{line} tok/s:{speed:.0f}{utilization_text(s, speed)} eta:{eta_text(h, state)}"
        f"{f' skipped:{state.skipped}' if state.skipped else ''}"
    )
    reserved_mib = held_memory_bytes(s.rt)[1] / MIB
    progress = progress_of(h, state.step, state.seconds)
    vitals.look(state.step, (state.variant, stage_at(h.stages, progress), stage_at(h.lengths, progress)), speed, loss)
    vitals.look_at_machine(state.step, reserved_mib, s.guard.throttled)
    s.guard.figures |= {"train_loss_nats": loss if math.isfinite(loss) else None}
    s.log.metric(
        "train",
        step=state.step,
        train_loss_nats=loss,
        tokens=state.tokens,
        train_time_s=round(state.seconds, 4),
        step_time_s=round(passed / steps, 6),
        tokens_per_s=round(speed, 1),
        rate_scale=round(rate_scale(h, state.step, state.seconds), 6),
        peak_memory_mib=round(peak_memory_bytes(s.rt) / MIB, 1),
        reserved_mib=round(reserved_mib, 1),
        skipped_steps=state.skipped,
    )


def known_peak(rt: Runtime) -> float:
    """Peak FLOP/s of this GPU, 0 for any other device."""
    name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), 0.0)


def utilization_text(s: Session, speed: float) -> str:
    """Model FLOPs utilization on a known GPU, else nothing."""
    if s.rt.device.type != "cuda":
        return ""
    peak = known_peak(s.rt)
    return f" mfu:{speed * flops_per_token(s.model) / (peak * s.rt.world):.1%}" if peak else ""


def align(s: Session, state: TrainState, clock: Clock) -> None:
    """Between two steps: calibrate once at CALIB_AT_FRACTION; every EXPORT_PROXY_EVAL steps keep what is the best yet.

    A checkpoint of the same step holds what became of it.
    """
    h = s.h
    (now,) = agree(s.rt, clock.seconds())
    progress = progress_of(h, state.step, now)
    if h.calibrates and not state.calibrated and 0 < h.calib_at_fraction <= progress:
        calibrate(s, state, clock, min(now + h.calib_max_seconds, h.step_seconds or math.inf))
        state.calibrated = True
    if h.export_proxy_eval and state.step % h.export_proxy_eval == 0:
        s.weights.swap_average()
        proxy_loss(s, state, clock)
        s.weights.swap_average()
        s.weights.materialize(progress)


def proxy_loss(s: Session, state: TrainState, clock: Clock) -> float:
    """Loss of what would be exported now, by rank 0, and kept as the best if it is; a line and a metrics object."""
    proxy = functools.partial(Proxy, s.model, s.rt, scoring_variant(s.h), clock.seconds, math.inf)
    with s.weights.settled():
        s.weights.materialize(1.0)
        loss: float = on_main(s.rt, lambda: proxy().loss())
    s.weights.materialize(1.0)
    if math.isfinite(loss) and (state.best is None or loss < state.best.loss):
        forms = {key: Form(form.latent.clone(), form.tuning) for key, form in s.weights.forms().items()}
        state.best = Kept(loss, state.step, forms)
    best = state.best.step if state.best else 0
    s.log.line(f"step:{state.step}/{s.h.iterations} export_proxy_loss:{loss:.6f} best_step:{best}")
    s.log.metric("export_proxy", step=state.step, proxy_loss_nats=loss, best_step=best)
    return loss


def calibrate(s: Session, state: TrainState, clock: Clock, limit: float) -> None:
    """Search the codecs' tuning on rank 0 and give all ranks what it found; a line and a metrics object."""
    began = clock.seconds()

    def search() -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        proxy = Proxy(s.model, s.rt, scoring_variant(s.h, state.variant), clock.seconds, limit)
        run = Calibration(s.weights, proxy).run()
        return run.found, {"evals": proxy.evals, "proxy_loss_before_nats": run.before, "proxy_loss_nats": run.best}

    found, told = on_main(s.rt, search)
    for name, tuning in found.items():
        s.weights.retune(name, tuning)
    seconds = clock.seconds() - began
    s.log.line(
        f"step:{state.step}/{s.h.iterations} calibration evals:{told['evals']} seconds:{seconds:.3f} "
        f"tensors:{len(found)} proxy_loss:{told['proxy_loss_before_nats']:.6f} -> {told['proxy_loss_nats']:.6f}"
    )
    s.log.metric("calibration", step=state.step, seconds=round(seconds, 4), **told, tuning=found)


def prune(s: Session, state: TrainState, clock: Clock, limit: float) -> dict[str, Form]:
    """Zero n-gram rows as ENGRAM_PRUNE and its bound allow; returns the tables as they were, if any row became zero."""

    def choose() -> tuple[float, float, float]:
        proxy = Proxy(s.model, s.rt, scoring_variant(s.h, state.variant), clock.seconds, limit)
        return prunable_share(s.weights, proxy)

    share, before, after = on_main(s.rt, choose)
    whole = {key: form for key, form in s.weights.forms().items() if s.weights.banks[key].role.group == "table"}
    rows = s.weights.prune(share)
    s.log.line(f"engram_prune share:{share:g} rows:{rows} proxy_loss:{before:.6f} -> {after:.6f}")
    s.log.metric("engram_prune", share=share, rows=rows, proxy_loss_before_nats=before, proxy_loss_nats=after)
    return whole if rows else {}


def refine(s: Session, state: TrainState, clock: Clock) -> dict[str, Form]:
    """Choose, prune and calibrate what will be exported, on held-out training tokens; returns tables before pruning."""
    h, whole = s.h, dict[str, Form]()
    (now,) = agree(s.rt, clock.seconds())
    later = h.gptq_reserve_seconds if h.export_mode == "competition_gptq" else 0.0
    limit = min(now + h.calib_max_seconds, h.max_wallclock_seconds - later if h.max_wallclock_seconds else math.inf)
    limit -= (limit - now) / 2 if h.temp_scaling else 0.0
    if h.export_proxy_eval:
        best = state.best
        if best and not proxy_loss(s, state, clock) < best.loss:
            s.weights.take(best.forms)
            s.weights.materialize(1.0)
    if h.prunes:
        whole = prune(s, state, clock, limit)
    if h.calibrate and h.calibrates:
        calibrate(s, state, clock, limit)
    return whole


def calibration_batches(s: Session, seconds: Callable[[], float], limit: float) -> Iterator[tuple[Tensor, Tensor]]:
    """At most GPTQ_BATCHES batches of (tokens before (B, h.history), rows (B, EVAL_WINDOW)) for GPTQ.

    Text that the model writes itself begins with a document; the clock may cut it short, but not to nothing.
    """
    h, window = s.h, s.h.eval_window
    rows = max(1, h.micro_batch_tokens // window)
    if h.gptq_source == "self":
        count = rows * h.gptq_batches
        tokens = torch.full((count, 1), s.tokenizer.bos, device=s.rt.device)
        texts, generator = [tokens], torch.Generator().manual_seed(h.seed)
        for token in itertools.islice(continued(s.model, s.rt, tokens, 1.0, 1.0, generator), window - 1):
            texts.append(token)
            if seconds() > limit:
                break
        written = torch.cat(texts, 1)
        yield from zip(s.model.no_history(written).split(rows), written.split(rows), strict=True)
        return
    holdout = read_holdout(h)
    starts = range(0, len(holdout) - window + 1, window)[: rows * h.gptq_batches]
    for at in range(0, len(starts), rows):
        history, tokens = windows(holdout, starts[at : at + rows], window, h.history, s.rt)
        yield history, tokens


def input_hessians(s: Session, names: set[str], seconds: Callable[[], float], limit: float) -> dict[str, Tensor]:
    """X^T X (columns, columns) float64 of the inputs that those weights get, as far as `limit` allows.

    Left out where an input was not finite: its weight is rounded, and the run ends well.
    """
    found, slowest = dict[str, Tensor](), 0.0

    def observe(name: str, x: Tensor) -> None:
        if name in names:
            flat = x.detach().flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False):  # in bf16 it would be no sum of squares any more
                product = (flat.mT @ flat).to(torch.device("cpu") if x.device.type == "mps" else x.device).double()
            found[name] = found[name] + product if name in found else product

    for history, tokens in calibration_batches(s, seconds, (seconds() + limit) / 2):
        before = seconds()
        if before + 2 * slowest > limit:
            break
        with torch.no_grad(), s.rt.precision():
            s.model.logits(tokens, scoring_variant(s.h), s.model.start_state(history), observe=observe)
        slowest = max(slowest, seconds() - before)
    return {name: hessian for name, hessian in found.items() if bool(hessian.isfinite().all())}


def solve_bank(
    bank: Bank, hessians: dict[str, Tensor], seconds: Callable[[], float], limit: float
) -> tuple[Codes, int]:
    """Codes of a whole bank, on the CPU, and how many weights GPTQ made; the others are rounded to the nearest."""
    parts, solved, slowest = list[Codes](), 0, 0.0
    inner = bank.codec.codec if isinstance(bank.codec, TurnedCodec) else bank.codec
    for at, coded in bank.coded():
        before, names = seconds(), bank.names[at : at + len(coded.codes)]
        known = [hessians[name] for name in names if name in hessians]
        if isinstance(inner, IntCodec) and len(known) == len(names) and before + 2 * slowest < limit:
            weights = bank.latent[at : at + len(names)].to(known[0].device)
            with suppress(torch.linalg.LinAlgError):  # rounding has made it indefinite
                coded, solved = gptq(bank.codec, weights, torch.stack(known)), solved + len(names)
            slowest = max(slowest, seconds() - before)
        parts.append(coded.map(Tensor.cpu))
    scales = [part.scales for part in parts if part.scales is not None]
    return Codes(torch.cat([part.codes for part in parts]), torch.cat(scales) if scales else None), solved


def find_corrections(
    s: Session, hessians: dict[str, Tensor], seconds: Callable[[], float], limit: float
) -> dict[str, LowRank]:
    """LQER's factors for the LQER_TENSORS weights whose quantization costs most, as far as time allows."""
    errors, codec, found = dict[str, Tensor](), CODECS["int4"](s.h), dict[str, LowRank]()
    for bank in s.weights.banks.values():
        for at, coded in bank.coded() if bank.fixed is not None else ():
            rest = bank.latent[at : at + len(coded.codes)] - bank.codec.decode(coded)
            errors |= {n: e for n, e in zip(bank.names[at:], rest, strict=False) if n in hessians}
    where = {name: hessian.device for name, hessian in hessians.items()}
    costs = {n: float(hessian_error(e[None].to(where[n]).double(), hessians[n][None])) for n, e in errors.items()}
    for name in sorted(costs, key=lambda name: (-costs[name], name))[: s.h.lqer_tensors]:
        if seconds() < limit:
            with suppress(torch.linalg.LinAlgError):
                low = low_rank(codec, errors[name].to(where[name]).double(), hessians[name], s.h.lqer_rank)
                found |= {name: low} if low is not None else {}
    return found


def solve_gptq(s: Session, seconds: Callable[[], float]) -> tuple[dict[str, Codes], dict[str, LowRank]]:
    """Codes of the banks that GPTQ quantizes, and corrections; ends before the clock reserved for it does."""
    h = s.h
    began, solved, fixed = seconds(), 0, dict[str, Codes]()
    limit = min(began + h.gptq_reserve_seconds, h.max_wallclock_seconds) if h.max_wallclock_seconds else math.inf
    banks = {key: bank for key, bank in s.weights.banks.items() if bank.role.export}
    names = {name for bank in banks.values() if bank.role.export in INT_CODECS for name in bank.names}
    hessians = input_hessians(s, names, seconds, (began + limit) / 2)
    for key, bank in banks.items():
        bank.settle(h)
        fixed[key], count = solve_bank(bank, hessians, seconds, limit)
        bank.settle(h, fixed[key])
        solved += count
    corrections = find_corrections(s, hessians, seconds, limit) if h.lqer_rank else {}
    total = sum(len(bank.names) for bank in banks.values())
    s.log.line(
        f"gptq: {solved} of {total} weights by their inputs' Hessians, the rest to the nearest; corrected: "
        f"{', '.join(corrections) or 'none'}; {seconds() - began:.2f} s"
    )
    return fixed, corrections


def quantize_trained(s: Session, seconds: Callable[[], float]) -> None:
    """EXPORT_MODE: give weights that trained in float the codecs of the file; rank 0 works, all get its codes."""
    fixed, corrections = dict[str, Codes](), dict[str, LowRank]()
    if s.h.export_mode == "competition_gptq":
        fixed, corrections = on_main(s.rt, lambda: solve_gptq(s, seconds))
    for key, bank in s.weights.banks.items():
        bank.settle(s.h, fixed.get(key))
        bank.corrections = {name: low for name, low in corrections.items() if name in bank.names}
    s.weights.materialize(1.0)


def settle(s: Session, state: TrainState) -> tuple[bool, dict[str, float], dict[str, Form]]:
    """Bring the weights into their final form and fit what is fitted on training data, on the training clock.

    Returns whether an average was swapped in, the calibration (temperature, if it is wanted), and unpruned tables.
    """
    h, clock, calibration = s.h, Clock(state.seconds), dict[str, float]()
    clock.start()
    averaged = s.weights.swap_average()
    if not PACKAGED:
        s.weights.check_finite()
    if h.export_mode == "mixed":  # what is chosen below is chosen in the codecs of the file
        for bank in s.weights.banks.values():
            bank.settle(h)
    s.weights.materialize(1.0)
    whole = refine(s, state, clock)
    quantize_trained(s, clock.seconds)
    if h.temp_scaling:
        limit = h.max_wallclock_seconds or math.inf
        tau = on_main(s.rt, lambda: fit_temperature(h, s.rt, s.model, read_holdout(h), clock.seconds, limit))
        calibration["temperature"] = tau or 1.0
        how = "fitted on held-out training tokens" if tau else "not fitted: CALIB_MAX_SECONDS left no time"
        s.log.line(f"temperature:{calibration['temperature']:.4f} {how}")
    clock.stop()
    (state.seconds,) = agree(s.rt, clock.banked)
    if not PACKAGED and 0 < h.max_wallclock_seconds < state.seconds:
        late = state.seconds - h.max_wallclock_seconds
        s.log.line(
            f"warning: training ended {late:.3f} s after MAX_WALLCLOCK_SECONDS: a step took longer than foreseen"
        )
    return averaged, calibration, whole


def report_validation(s: Session, state: TrainState, calibration: dict[str, float] | None = None) -> Score:
    """Score the validation split with the weights as they are; one line, one metrics object.

    During training (no calibration) without what is for the final score alone: adapters and overlapping windows.
    """
    began = time.monotonic()
    scorer = Scorer(s.h, s.rt, s.model, s.table, calibration, plain=calibration is None)
    if not PACKAGED:
        scorer.asked = functools.partial(s.guard.beat, True)
    report = None if PACKAGED else lambda share: s.log.progress(share, "validating")
    score = scorer.score(s.validation, state.variant, report=report)
    average = state.seconds * 1e3 / max(1, state.step)
    s.log.line(
        f"step:{state.step}/{s.h.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
        f"train_time:{state.seconds * 1e3:.0f}ms step_avg:{average:.2f}ms"
    )
    s.log.metric(
        "val",
        step=state.step,
        val_loss_nats=score.loss,
        val_bpb=score.bpb,
        val_tokens=score.tokens,
        val_bytes=score.bytes,
        tokens=state.tokens,
        train_time_s=round(state.seconds, 4),
        eval_time_s=round(time.monotonic() - began, 3),
    )
    return score


REFERENCE = ".reference.npz"  # beside an artifact: what the network that it was written from says


@torch.no_grad()
def outputs_on(rt: Runtime, model: GPT, history: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What tells networks apart at each position of rows (B, T): the argmax, the largest logit and logsumexp."""
    rows, before = (torch.from_numpy(x).to(rt.device) for x in (tokens, history))
    with rt.precision():
        logits = model.logits(rows, scoring_variant(model.h), model.start_state(before))[0].float()
    found = {"argmax": logits.argmax(-1), "top": logits.amax(-1), "logsumexp": logits.logsumexp(-1)}
    return {"history": history, "tokens": tokens, **{name: x.cpu().numpy() for name, x in found.items()}}


def write_reference(s: Session, path: Path) -> None:
    """What the network says in memory at eight places of the validation split, for the audit of its artifact."""
    length = min(s.h.eval_window, len(s.validation) // 2)
    starts = np.linspace(0, len(s.validation) - length, 8).astype(int).tolist()
    history, rows = windows(s.validation, starts, length, s.h.history, s.rt)
    buffer = io.BytesIO()
    np.savez(buffer, **outputs_on(s.rt, s.model, history.cpu().numpy(), rows.cpu().numpy()))  # type: ignore[arg-type]
    write_atomically(path.with_name(path.name + REFERENCE), buffer.getvalue())


def export(s: Session, calibration: dict[str, float]) -> Path:
    """Write the artifact of the averaged (if any) and quantized weights; rank 0 writes, all return its path."""
    path, began = s.folder / "model.pgz", time.monotonic()

    def write() -> None:
        artifact = write_artifact(s.h, coded_tensors(s.weights), s.prints, calibration)
        write_atomically(path, artifact.data)
        if PACKAGED:
            return
        write_reference(s, path)
        s.log.line(
            f"{'stream':<10}{'packing':<10}{'compressor':<12}{'values':>12}{'packed_bytes':>14}{'stored_bytes':>14}"
        )
        for kind, packing, tool, values, packed, stored in artifact.table:
            s.log.line(f"{kind:<10}{packing:<10}{tool:<12}{values:>12}{packed:>14}{stored:>14}")
        s.log.metric("export", seconds=round(time.monotonic() - began, 3), streams=artifact.table)

    on_main(s.rt, write)
    return path


def report_pruned(s: Session, whole: dict[str, Form]) -> None:
    """How many bytes pruning has saved: a file of the tables alone, before and after."""

    def stored() -> int:
        tables = (c for c in coded_tensors(s.weights) if s.weights.where[c.name][0].role.group == "table")
        return len(write_artifact(s.h, tables, {}).data)

    def compare() -> None:
        after, pruned = stored(), s.weights.forms()
        s.weights.take(whole)
        saved = stored() - after
        s.weights.take(pruned)
        s.log.line(f"engram_prune saved_bytes:{saved}")
        s.log.metric("engram_pruned", saved_bytes=saved)

    on_main(s.rt, compare)


def finish(s: Session, state: TrainState) -> int:
    """Average, quantize, score, export, reload, score again, account; returns the exit code."""
    h, log = s.h, s.log
    switch_variant(s, state, 1.0)  # a run that ended early takes its final shape
    if not PACKAGED:
        s.guard.beat(slow=True)
        try_to_save(s, state)
        s.guard.working = False  # from here on nothing is lost that resuming does not make again
        if number := largest_of(s.rt, s.guard.signal):
            return stopped(s, number)
    untouched = {} if PACKAGED else s.weights.forms()
    averaged, calibration, whole = settle(s, state)
    log.line(f"training done: steps:{state.step} train_time:{state.seconds * 1e3:.0f}ms averaged:{int(averaged)}")
    in_memory = report_validation(s, state, calibration)
    path = export(s, calibration)
    if whole and not PACKAGED and h.export_mode != "competition_gptq":  # which has settled tables' codes already
        report_pruned(s, whole)
    began = time.monotonic()
    # Nodes may have disks of their own: rank 0 reads, all decode.
    data = on_main(s.rt, path.read_bytes)
    header, arrays = on_all(s.rt, lambda: decode_artifact(data))
    model = build_model(s.h, s.rt, s.tokenizer.bos, fill=False)
    load_weights(model, arrays)
    scorer = Scorer(s.h, s.rt, model, s.table, header["calibration"])
    if not PACKAGED or h.max_eval_seconds:
        scorer.say, scorer.limit, scorer.began = log.line, h.max_eval_seconds, began
    if not PACKAGED:
        scorer.asked = functools.partial(s.guard.beat, True)
        log.line(f"protocol:{h.protocol}{' (named in advance)' * h.named}")
    budget = account(h, len(data))
    counted = "this script" if budget.packaged else "CODE_BYTES_RESERVE"
    log.line(
        f"model_bytes:{budget.model_bytes} code_bytes:{budget.code_bytes} ({counted}) total_bytes:{budget.total_bytes} "
        f"budget_bytes:{budget.budget_bytes}"
    )
    score = scorer.score(s.validation)
    log.line(f"final_roundtrip val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}")
    log.line(f"final_roundtrip_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} in_memory:{in_memory.loss:.8f}")
    over = budget.total_bytes > budget.budget_bytes
    if not PACKAGED:
        log.metric(
            "final",
            name="final_roundtrip",
            step=state.step,
            val_loss_nats=score.loss,
            val_bpb=score.bpb,
            in_memory_val_loss_nats=in_memory.loss,
            train_time_s=round(state.seconds, 4),
            reload_and_score_s=round(time.monotonic() - began, 3),
            peak_memory_mib=round(peak_memory_bytes(s.rt) / MIB, 1),
            **{k: v for k, v in {**budget._asdict(), "total_bytes": budget.total_bytes}.items() if k != "packaged"},
        )
        closing_summary(s, state, model, score, budget, path)
        s.weights.take(untouched)
    if over:
        log.line(
            f"error: {budget.total_bytes - budget.budget_bytes} bytes over HARD_BUDGET_BYTES; make the model smaller"
        )
    return 3 if over else 0


def closing_summary(s: Session, state: TrainState, model: GPT, score: Score, budget: Budget, path: Path) -> None:
    """What a person wants to know at the end, and a sample of what the reloaded model writes."""
    peak = peak_memory_bytes(s.rt)
    log = s.log
    log.line("-" * 72)
    log.line(f"{'score':<12}{score.bpb:.4f} bits per byte, {score.loss:.4f} nats per token, {score.bytes} bytes scored")
    log.line(f"{'size':<12}{budget.total_bytes} of {budget.budget_bytes} bytes (model {budget.model_bytes})")
    log.line(
        f"{'training':<12}step {state.step}, {clock_text(state.seconds)}, {state.tokens / state.seconds:.0f} tok/s"
    )
    log.line(f"{'memory':<12}peak {peak / MIB:.0f} MiB ({peak / 2**30:.2f} GiB)")
    log.line(f"{'artifact':<12}{path}")
    log.line(f"{'again':<12}ENV_FILE={s.folder / 'config.env'} python train_gpt.py")
    if s.h.sample_tokens and s.rt.main:
        prompt = s.validation[: min(64, s.h.train_seq_len // 2)].tolist()
        limit = max(1, s.h.sample_tokens)
        written = list(generate(model, s.rt, prompt, limit, 0.8, 0.95, s.h.seed))
        log.line(f"{'prompt':<12}{s.tokenizer.text_of(prompt)!r}")
        log.line(f"{'sample':<12}{s.tokenizer.text_of(written)!r}")
    log.line("-" * 72)


class Check(NamedTuple):
    """What preflight has looked at."""

    name: str
    state: str  # ok, warn or fail
    found: str
    fix: str = ""


def judge(name: str, found: str, problem: bool, fix: str, state: str = "fail") -> Check:
    """A Check that is ok, or, with a problem, `state` and how to mend it."""
    return Check(name, state if problem else "ok", found, fix if problem else "")


def disk_free(folder: Path) -> int:
    """Free bytes of the file system that holds a folder (or will)."""
    while not folder.exists():
        folder = folder.absolute().parent
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


TOY_WEIGHTS = 5_000_000  # fewer leave a large GPU idle: 8 x 192 has 4M


def check_long_run(s: Session) -> Check:
    """What long runs have been lost to: no checkpoints, and a GPU that is hardly used.

    ITERATIONS count where no clock ends the run before: with one they are no more than an upper bound.
    """
    h, rt, problems = s.h, s.rt, []
    hour = h.max_wallclock_seconds > 3600 or not h.max_wallclock_seconds
    long = hour and (h.max_wallclock_seconds > 3600 or h.iterations > h.long_run_steps)
    gpu = rt.device.type == "cuda"
    if long and not h.save_every:
        problems.append(("no checkpoints", "set SAVE_EVERY"))
    if long and gpu and has_bf16(rt.device) and not rt.autocast:
        problems.append((f"PRECISION={rt.arithmetic} on a GPU that has bf16", "set PRECISION=auto"))
    weights = sum(p.numel() for p in s.model.parameters())
    large = gpu and torch.cuda.get_device_properties(rt.device).total_memory > 70 * 2**30
    if long and large and weights < TOY_WEIGHTS:
        problems.append((f"{weights} weights on a GPU of more than 70 GiB", "make the model larger"))
    found = ", ".join(found for found, _ in problems) or ("nothing amiss" if long else "not long")
    fix = "; ".join(fix for _, fix in problems) + ", or ALLOW_TOY_RUN=1"
    return judge("long run", found, bool(problems), fix, "fail" if gpu and not h.allow_toy_run else "warn")


def check_gpu(s: Session) -> Iterator[Check]:
    """Driver, other processes on this GPU, NCCL and the attention backend."""
    rt, index = s.rt, ["-i", str(s.rt.device.index or 0)]
    driver = ask_gpu("--query-gpu=driver_version", *index)
    name = torch.cuda.get_device_name(rt.device)
    yield Check("gpu", "ok", f"{name}, driver {driver[0][0] if driver else 'unknown'}, CUDA {torch.version.cuda}")
    others = [f"{pid} ({mib} MiB)" for pid, mib in ask_gpu("--query-compute-apps=pid,used_memory", *index)
              if pid != str(os.getpid())]  # fmt: skip
    found = f"other processes: {', '.join(others) or 'none'}"
    yield judge(
        "free gpu",
        found,
        bool(others),
        "end them, or set CUDA_VISIBLE_DEVICES",
        "fail" if s.h.require_free_gpu else "warn",
    )
    reasons = throttled()
    yield judge("clock", reasons or "not held down", bool(reasons), "mind the cooling", "warn")
    if rt.world > 1:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield judge("nccl", version, peer_to_peer_is_off(), "unset NCCL_P2P_DISABLE: it costs speed", "warn")
    slow = "sdpa" in s.attention and "attn" in s.h.mixers and rt.autocast
    yield judge("attention", s.attention, slow, "install FlashAttention 3 (run_8xh100.sh tells how)", "warn")


def check_start(s: Session) -> Iterator[Check]:
    """What can be known at every start within a second or two."""
    import resource  # POSIX only

    h, stream = s.h, s.loader.stream
    unused = ineffective_variables(h)
    yield judge("configuration", ", ".join(unused) or "every variable acts", bool(unused), "no effect: unset", "warn")
    yield check_long_run(s)
    yield Check("device", "ok", f"{s.rt.device} {s.rt.arithmetic}, {s.rt.world} ranks, attention {s.attention}")
    if s.rt.device.type == "cuda":
        yield from check_gpu(s)
    made = "that of the data's manifest" if read_manifest(h.data_path) else "cuts the data's text alike (no manifest)"
    yield Check("tokenizer", "ok", f"{s.prints['tokenizer'][:16]}, {made}")
    yield Check("data", "ok", f"{len(stream.paths)} shards, {s.loader.usable} tokens, {len(s.validation)} to validate")
    files, least = resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(stream.paths) + 256
    yield judge("open files", f"at most {files}", files < least, f"ulimit -n {least}")
    bound = account(h, math.ceil(sum(s.weights.packed_bytes().values())))
    found = f"{bound.total_bytes} bytes before compression, budget {bound.budget_bytes}"
    yield judge("bytes", found, bound.total_bytes > bound.budget_bytes, "preflight --full or fit tells", "warn")
    # Latents in float32, with moments and an average; the old ones stay until the new one is complete.
    folder = Path(h.out_dir)
    free, one = disk_free(folder), 16 * sum(p.numel() for p in s.model.parameters())
    need = one * (h.keep_checkpoints + 1) + bound.model_bytes
    found = f"OUT_DIR={h.out_dir} has {free / MIB:.0f} MiB free, checkpoints need {need / MIB:.0f} MiB"
    yield judge("disk", found, free < need, "free some, or set OUT_DIR or KEEP_CHECKPOINTS")


def begin_well(s: Session) -> None:
    """Say what check_start finds amiss on rank 0; raises AgreedError if a run must not begin like this."""

    def look() -> None:
        checks = list(check_start(s))
        for check in checks:
            if check.state == "warn" and check.name != "configuration":  # describe names those
                s.log.line(f"warning: {check.name}: {check.found}; {check.fix}")
        refuse(checks)

    on_main(s.rt, look)


def refuse(checks: list[Check]) -> None:
    """Raise UserError if one of them fails."""
    if failed := [check for check in checks if check.state == "fail"]:
        raise UserError("; ".join(f"{check.name}: {check.found}; {check.fix}" for check in failed))


def stopped(s: Session, number: int) -> int:
    """The end that a signal asked for, with everything saved; returns the exit code that a signal has by convention."""
    s.log.line(f"stopped by {signal.Signals(number).name}; to resume: {s.guard.resuming}")
    return 128 + number


def resume(s: Session) -> TrainState:
    """The state that RESUME names, or a new one. Raises UserError where it does not fit."""
    h, rt, log = s.h, s.rt, s.log
    path = on_main(rt, lambda: find_checkpoint(h, s.folder / "checkpoints"))
    if not path:
        return TrainState()
    state: TrainState = on_all(rt, lambda: load_checkpoint(h, rt, path, s.model, s.weights))
    log.line(f"resumed {path} at step:{state.step} train_time:{state.seconds * 1e3:.0f}ms")
    log.metric("resume", step=state.step, train_time_s=state.seconds)
    if state.prints.get("tokenizer", s.prints["tokenizer"]) != s.prints["tokenizer"]:
        raise AgreedError(f"{path} was trained with another tokenizer than TOKENIZER_PATH={h.tokenizer_path}")
    if state.prints.get("data", s.prints["data"]) != s.prints["data"]:
        log.line(f"warning: {path} was trained on other data than DATA_PATH={h.data_path}")
    return state


def train(h: Hyperparameters, rt: Runtime) -> int:
    """A whole run: folder, lock, log, resume, loop, finish. Returns the exit code. Raises UserError."""
    folder = run_folder(h, rt)
    lock = None if PACKAGED else on_main(rt, lambda: lock_folder(folder))
    log: Log = on_all(rt, lambda: Log(folder, rt.main))
    s: Session | None = None
    try:
        s = cast(Session, on_all(rt, lambda: open_session(h, rt, folder, log)))
        if not PACKAGED:
            log.sinks = on_all(rt, lambda: open_sinks(h, folder) if rt.main else [])
            settled = dataclasses.replace(h, precision=rt.arithmetic)  # the next machine might choose another
            on_main(rt, lambda: write_atomically(folder / "config.env", config_env(settled).encode()))
            on_main(rt, lambda: write_atomically(folder / "train_gpt.py", Path(__file__).read_bytes()))
        log.line(f"run:{folder}")
        if not PACKAGED:
            begin_well(s)
        describe(s)
        state = resume(s) if h.resume else TrainState()
        state.prints = s.prints
        if not PACKAGED:
            s.guard.start(state)
        train_loop(s, state)
        if not PACKAGED and s.guard.signal:
            try_to_save(s, state)
            return stopped(s, s.guard.signal)
        return finish(s, state)
    except RuntimeError as error:
        if PACKAGED or s is None or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        found = f"another rank ended or cannot be reached, its own output may say why ({str(error).splitlines()[0]})"
        s.guard.say(f"error: rank {rt.rank}: {found}; to resume: {s.guard.resuming}")
        return s.guard.failure
    finally:
        if s is not None and not PACKAGED:
            s.guard.end()
        log.close()
        if lock is not None and rt.main:
            os.close(lock)


# ==== 15. MAIN ===============================================================
# Gives: the command line. Needs: all of the above.


def plan(h: Hyperparameters, rt: Runtime) -> int:
    """Print the site list, the role table of every parameter and the FLOPs of a token, without data."""
    model, log = build_model(h, rt, 1), Log(None, rt.main)
    for line in match_lines(h):
        log.line(line)
    log.line(f"{'id':>4} {'kind':<10}{'layer':>6}{'loop':>6}{'pass':>6}")
    for site in model.sites:
        log.line(f"{site.id:>4} {site.kind:<10}{site.layer:>6}{site.loop:>6}{site.pass_:>6}")
    log.line(f"{'parameter':<34}{'shape':<14}{'codec':<9}{'group':<8}{'rate x':>7}{'decay x':>8}")
    shapes = {name: "x".join(map(str, p.shape)) for name, p in model.named_parameters()}
    for name, role in role_table(model).items():
        log.line(f"{name:<34}{shapes[name]:<14}{role.codec:<9}{role.group:<8}{role.lr_mult:>7g}{role.decay:>8g}")
    packed = Weights(model).packed_bytes()
    log.line("packed bytes: " + " ".join(f"{codec}:{size:.0f}" for codec, size in packed.items()))
    total = account(h, math.ceil(sum(packed.values())))
    log.line(f"total_bytes:{total.total_bytes} budget_bytes:{total.budget_bytes}")
    log.line(f"parameters:{sum(p.numel() for p in model.parameters())} flops_per_token:{flops_per_token(model):.4g}")
    return 0


class Spread(NamedTuple):
    """How trained weights of one kind vary: a weight is Gaussian times exp(row + column + element), three Gaussians
    of these standard deviations. Columns' scales alone explain the heavy tails of trained matrices."""

    rows: float
    columns: float
    elements: float


# Measured with `fit --like` on checkpoints of PRESET=local after 407 steps (ternary) and 497 (int6, int7 tables), 150 s
# each on one core, and averaged. Whole artifacts of weights drawn like this were 1.2% longer than the trained ternary
# one (its bf16 tables make the difference, trits are right to 0.01%) and 0.5% shorter than the int6 one. A kind is a
# matrix's last name before .weight, else the role's group.
SPREADS = {
    "qkv": Spread(0.21, 0.17, 0.0),
    "proj": Spread(0.075, 0.083, 0.05),
    "up": Spread(0.083, 0.17, 0.05),
    "down": Spread(0.05, 0.215, 0.06),
    "embed": Spread(0.07, 0.097, 0.0),
    "head": Spread(0.07, 0.097, 0.0),
    "table": Spread(0.356, 0.026, 0.0),
    "matrix": Spread(0.2, 0.2, 0.05),  # of other layers
    "scalar": Spread(0.5, 0.5, 0.0),
}
# By vocabulary and order: distinct n-grams of a million tokens of English web text (published FineWeb tokenizers), and
# the power of the tokens with which they grow up to four million.
DISTINCT_TOKENS = 10**6
DISTINCT: dict[int, dict[int, tuple[int, float]]] = {
    1024: {2: (108_114, 0.385), 3: (451_152, 0.698), 4: (709_748, 0.848)},
    2048: {2: (162_043, 0.487), 3: (534_299, 0.754), 4: (771_933, 0.882)},
    4096: {2: (220_101, 0.558), 3: (607_155, 0.795), 4: (818_339, 0.906)},
    8192: {2: (273_309, 0.607), 3: (655_386, 0.82), 4: (843_815, 0.915)},
}


def kind_of(name: str, role: Role) -> str:
    """Which entry of SPREADS a parameter has."""
    leaf = name.split(".")[-2] if role.group == "matrix" and "." in name else role.group
    return leaf if leaf in SPREADS else "matrix" if role.group == "matrix" else "scalar"


def spread_of(w: Tensor) -> Spread:
    """The Spread of trained weights (n, rows, columns); rows of zeros, which nothing trained, are left out."""
    rows = w.square().mean(-1, keepdim=True).sqrt()
    alive = (rows > 1e-8).squeeze(-1)
    x = torch.where(alive.unsqueeze(-1), w / rows.clamp(min=1e-8), 0.0)
    columns = (x.square().sum(-2) / alive.sum(-1, keepdim=True).clamp(min=1)).sqrt().clamp(min=1e-8)  # (n, columns)
    fourth = (x / columns.unsqueeze(-2))[alive].pow(4).mean()  # 3 for a Gaussian

    def deviation(sizes: Tensor, averaged: float) -> float:
        """Of logarithms of root mean squares, less what the mean of so many squares varies by itself."""
        return math.sqrt(max(0.0, float(sizes.log().var()) - 1 / (2 * averaged)))

    elements = math.sqrt(max(0.0, math.log(float(fourth) / 3)) / 4)
    return Spread(
        deviation(rows[alive], w.shape[-1]), deviation(columns, float(alive.sum(-1).float().mean())), elements
    )


def spreads_like(path: str) -> dict[str, Spread]:
    """SPREADS as a checkpoint has them, kind by kind. Raises UserError."""
    try:
        banks = torch.load(path, map_location="cpu", weights_only=True)["banks"]
        kinds: dict[str, list[tuple[Spread, int]]] = {}
        for key, bank in banks.items():
            role = Role(*key.split("/")[:2])
            w = bank["state"].get("ema", bank["latent"]).float()
            if w.ndim == 3 and role.group != "scalar":
                kinds.setdefault(kind_of(bank["names"][0], role), []).append((spread_of(w), w.numel()))
    except (OSError, pickle.UnpicklingError, *MALFORMED) as error:
        raise UserError(f"--like {path} is not a readable checkpoint ({type(error).__name__})") from None
    means = {k: np.average([s for s, _ in found], 0, [n for _, n in found]) for k, found in kinds.items()}
    return {**SPREADS, **{kind: Spread(*mean.round(3).tolist()) for kind, mean in means.items()}}


def untrained_share(h: Hyperparameters, tokens: float) -> float:
    """The share of hashed n-grams' rows that no n-gram of so many training tokens falls into: they stay zero."""
    found, nearest = [], min(DISTINCT, key=lambda size: abs(math.log(size / h.vocab_size)))
    for order in h.ngram_orders:
        distinct, power = DISTINCT[nearest][min(order, 4)]
        found.append(math.exp(-distinct * (tokens / DISTINCT_TOKENS) ** power / h.bigram_hash_buckets))
    return sum(found) / len(found) if found else 0.0


def drawn_like(shape: Sequence[int], spread: Spread, generator: torch.Generator) -> Tensor:
    """Weights of a shape with this Spread."""

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    sizes = spread.rows * noise(*shape[:-1], 1) + spread.columns * noise(*[1] * (len(shape) - 1), shape[-1])
    return noise(*shape) * (sizes + spread.elements * noise(*shape)).exp() / math.sqrt(shape[-1])


def corrections_like(h: Hyperparameters, shapes: dict[str, tuple[int, ...]]) -> Iterator[Coded]:
    """LQER's factors of the largest weights: which ones are the worst, only training can tell."""
    largest = sorted(shapes, key=lambda name: -math.prod(shapes[name]))
    generator = np.random.default_rng(0)
    for name in largest[: h.lqer_tensors if h.export_mode == "competition_gptq" and h.lqer_rank else 0]:
        for end, size in zip(FACTORS, shapes[name], strict=True):
            w = generator.standard_normal((h.lqer_rank, size))
            codes = np.rint(7 * w / np.abs(w).max(-1, keepdims=True)).astype(np.int8)
            scales = generator.random(CODECS["int4"](h).scale_shape(codes.shape) or ())
            yield Coded(name + end, "int4", codes, scales.astype(np.float32))


def stream_sizes(h: Hyperparameters, tensors: Iterable[tuple[str, Sequence[int]]]) -> Counter[str]:
    """Values of each stream that tensors (codec, shape) have, were none of their rows all zeros."""
    sizes = Counter[str]()
    for name, shape in tensors:
        codec = CODECS[name](h)
        sizes.update({codec.stream: math.prod(shape), "rows": math.prod(shape[:-1])})
        sizes["scales"] += math.prod(codec.scale_shape(shape) or (0,))
    return sizes


SAMPLE_VALUES = 2**19  # of each kind of stream are compressed to foresee its size


def coded_like(weights: Weights, spreads: dict[str, Spread], untrained: float, limit: float) -> Iterator[Coded]:
    """What an artifact of trained weights would hold; of each tensor as many rows as leave `limit` codes a stream."""
    values: Counter[str] = Counter()
    for bank in weights.banks.values():
        values[bank.codec.stream] += bank.latent.numel()
    for bank in weights.banks.values():
        share = min(1.0, limit / values[bank.codec.stream])
        for name, parameter in zip(bank.names, bank.parameters, strict=True):
            shape = [*parameter.shape]
            shape[0] = math.ceil(share * shape[0]) if len(shape) > 1 else shape[0]
            generator = torch.Generator().manual_seed(parameter_seed(weights.h.seed, name))
            w = drawn_like(shape, spreads[kind_of(name, bank.role)], generator)[None]
            if bank.role.group == "table":
                w = w * (torch.rand(1, shape[0], 1, generator=generator) >= untrained)
            coded = bank.codec.quantize(w, default_tuning(w))
            yield Coded(
                name, bank.role.codec, coded.codes[0].numpy(), None if coded.scales is None else coded.scales[0].numpy()
            )


class Speed(NamedTuple):
    """How fast a machine trains: seconds of a FLOP in forward and backward passes, of a parameter in the optimizer."""

    flop_seconds: float
    parameter_seconds: float
    source: str


def measured_speed(h: Hyperparameters, rt: Runtime) -> Speed:
    """Time passes over as many rows as take a second (at most MICRO_BATCH_TOKENS), and an optimizer step, twice."""
    model = build_model(h, rt, 1)
    weights = Weights(model)
    weights.materialize(1.0)
    optimizer = Optimizer(h, rt, weights)
    loss_of = torch.compile(model.loss, mode=h.compile_mode, dynamic=False) if rt.compile else model.loss
    rows, most = 1, max(1, h.micro_batch_tokens // h.train_seq_len)

    def passes() -> float:
        tokens = torch.randint(h.vocab_size, (rows, h.train_seq_len + 1), device=rt.device)
        past = torch.full((rows, h.history), -1, device=rt.device)
        synchronize(rt)
        began = time.perf_counter()
        with rt.precision():
            loss = loss_of(tokens[:, :-1], tokens[:, 1:], final_variant(h), model.start_state(past)).total
        (loss / tokens.numel()).backward()
        synchronize(rt)
        return time.perf_counter() - began

    passes()  # allocates, compiles
    while passes() < 1.0 and rows < most:
        rows = min(2 * rows, most)
        passes()
    seconds = min(passes(), passes()) / (rows * h.train_seq_len)
    steps = []
    for _ in range(3):
        began = time.perf_counter()
        optimizer.step(0.0, h.muon_momentum, False, 0.0)
        synchronize(rt)
        steps.append(time.perf_counter() - began)
    parameters = sum(p.numel() for p in model.parameters())
    return Speed(seconds / flops_per_token(model), min(steps) / parameters, f"timed on {rt.device} with {rows} rows")


def named_speed(name: str, mfu: float) -> Speed:
    """The speed of GPUs given as H100 or H100x8 at a model FLOPs utilization, optimizer included. Raises UserError."""
    kind, _, count = name.partition("x")
    if kind not in PEAK_FLOPS or not (count or "1").isdigit() or int(count or "1") < 1:
        raise UserError(f"--gpu {name} is not one of {', '.join(PEAK_FLOPS)}, with x and a number, like H100x8")
    return Speed(1 / (PEAK_FLOPS[kind] * int(count or "1") * mfu), 0.0, f"{name} at {mfu:.0%} of its peak")


class Foreseen(NamedTuple):
    """What fits into the training clock."""

    steps: float
    tokens: float
    seconds: float


def foresee(h: Hyperparameters, speed: Speed) -> Foreseen:
    """Steps and tokens until the clock or ITERATIONS end, a hundredth of the run after the other."""
    with torch.device("meta"):
        models = {
            loops: GPT(h if loops else dataclasses.replace(h, recurrence_layers=""), 1) for loops in (True, False)
        }
    flops, parts = {loops: flops_per_token(model) for loops, model in models.items()}, 100
    fixed = speed.parameter_seconds * sum(p.numel() for p in models[True].parameters())
    steps = tokens = seconds = 0.0
    for part in range(parts):
        progress = (part + 0.5) / parts
        batch = stage_at(h.stages, progress)
        step_seconds = batch * flops[variant_at(h, progress).looped] * speed.flop_seconds + fixed
        by_clock = h.step_seconds / parts / step_seconds if h.step_seconds else math.inf
        more = min(by_clock, (h.iterations or math.inf) / parts)
        steps, tokens, seconds = steps + more, tokens + more * batch, seconds + more * step_seconds
    return Foreseen(steps, tokens, seconds)


class Candidate(NamedTuple):
    """A configuration, the steps that it has time for, and what its artifact takes by kind of stream."""

    h: Hyperparameters
    parameters: int
    time: Foreseen
    streams: dict[str, int]

    @property
    def budget(self) -> Budget:
        return account(self.h, sum(self.streams.values()))

    @property
    def fits(self) -> bool:
        return self.budget.total_bytes <= self.budget.budget_bytes


def weigh(h: Hyperparameters, spreads: dict[str, Spread], speed: Speed, limit: float = math.inf) -> Candidate:
    """A configuration's Candidate, bytes foreseen from at most `limit` codes of each stream."""
    with torch.device("meta"):
        model = GPT(h, 1)
        weights = Weights(model)
    for bank in weights.banks.values():
        bank.settle(h)
    prints = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("data", "tokenizer")}
    expected = foresee(h, speed)
    shapes = {name: tuple(bank.latent.shape[1:]) for name, (bank, _) in weights.where.items()}
    corrections = [*corrections_like(h, shapes)]
    drawn = [*coded_like(weights, spreads, untrained_share(h, expected.tokens), limit), *corrections]
    table = write_artifact(h, iter(drawn), prints).table
    part = stream_sizes(h, [(coded.codec, coded.codes.shape) for coded in drawn])
    whole = stream_sizes(h, [(coded.codec, coded.codes.shape) for coded in corrections])
    whole.update(stream_sizes(h, [(weights.where[name][0].role.codec, shape) for name, shape in shapes.items()]))
    streams = {kind: round(stored * (whole[kind] or 1) / (part[kind] or 1)) for kind, *_, stored in table}
    return Candidate(h, sum(p.numel() for p in model.parameters()), expected, streams)


FIT_BY = {"width": "MODEL_DIM", "layers": "NUM_LAYERS", "buckets": "BIGRAM_HASH_BUCKETS"}


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Do what was asked for and note the memory of its results."""
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and part.layout == torch.strided:
                self.note(part.untyped_storage())
        return result

    def note(self, storage: Any) -> None:
        if storage not in self.known:
            size = storage.nbytes()
            self.known[storage] = size
            weakref.finalize(storage, self.drop, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def drop(self, size: int) -> None:
        self.live -= size


class Memory(NamedTuple):
    """Bytes at the peak of training and of an evaluation's forward pass, of which `kept` are there all the time."""

    kept: int
    training: int
    evaluation: int


def foreseen_memory(h: Hyperparameters, rt: Runtime) -> Memory:
    """The real network and optimizer take a step of the largest batch in tensors without contents.

    Eager: torch.compile saves some of it. What libraries take for themselves comes on top.
    """
    tokens, passes = max(tokens for _, tokens in h.stages) // rt.world, list[tuple[int, int]]()
    for length in sorted(set(dict(h.lengths).values())):  # shorter windows are more rows, and each has its own state
        micro = max(1, h.micro_batch_tokens // length)
        passes += [(min(micro, tokens // length), length)] * min(2, -(-tokens // length // micro))
    with FakeTensorMode(), Meter() as meter, torch.device(rt.device):
        torch.set_default_dtype(rt.dtype)
        model = GPT(h, 1)
        torch.set_default_dtype(torch.float32)
        weights = Weights(model)
        weights.materialize(1.0)
        optimizer = Optimizer(h, rt, weights)
        optimizer.step(0.0, h.muon_momentum, h.ema_decay > 0, 1.0)
        kept = meter.peak = meter.live
        for rows, length in passes:
            with rt.precision():
                loss = foreseen_pass(h, model, rows, length).total
            loss.backward()
            del loss
        optimizer.step(0.0, h.muon_momentum, h.ema_decay > 0, 1.0)
        weights.clear_gradients()
        training, meter.peak = meter.peak, meter.live
        rows = max(1, min(h.val_batch_size, MAX_LOGITS[rt.device.type] // h.vocab_size) // h.eval_window)
        inputs = torch.zeros((min(rows, h.eval_streams), h.eval_window), dtype=torch.long)
        with torch.no_grad(), rt.precision():
            logits = model.logits(inputs, scoring_variant(h), model.start_state(model.no_history(inputs)))[0]
            logits.log_softmax(-1)
        return Memory(kept, training, meter.peak)


def foreseen_pass(h: Hyperparameters, model: GPT, rows: int, length: int) -> LossOut:
    """The forward pass of so many rows, in the network's final form."""
    tokens = torch.zeros((rows, length + 1), dtype=torch.long)
    start = model.init_state(rows) if h.carry_train else model.start_state(torch.full((rows, h.history), -1))
    moment = Moment(torch.ones(()), torch.zeros((), dtype=torch.long), torch.arange(rows))
    return model.loss(tokens[:, :-1], tokens[:, 1:], final_variant(h), start, moment)


class Fitter:
    """A search over the values of one variable under the environment's configuration."""

    def __init__(self, environ: dict[str, str], options: Any) -> None:
        self.environ, self.variable, self.h = environ, FIT_BY[options.by], load_config(environ)
        if options.by == "buckets" and not self.h.ngram_orders:
            raise UserError("fit --by buckets needs hashed n-grams: BIGRAM_HASH_BUCKETS of at least 1")
        if self.h.match:
            raise UserError(f"fit chooses sizes by itself; unset MATCH={self.h.match}")
        # Flash attention wants heads of a multiple of 8 channels.
        sizes = {"width": (8 * self.h.num_heads, self.h.model_dim), "layers": (1, self.h.num_layers)}
        unit, self.now = sizes.get(options.by, (1024, self.h.bigram_hash_buckets))
        self.unit = options.step or unit
        self.spreads = spreads_like(options.like) if options.like else SPREADS
        self.speed = named_speed(options.gpu, options.mfu) if options.gpu else Speed(0.0, 0.0, "")
        self.seen: dict[int, Candidate] = {}
        self.counted: set[int] = set()  # those of which every byte was made

    def config(self, value: int) -> Hyperparameters | None:
        """The configuration with another value, if it is a valid one."""
        try:
            return load_config({**self.environ, self.variable: str(value)})
        except UserError:
            return None

    def fits(self, value: int) -> bool:
        """Whether a valid value is foreseen to fit."""
        if value not in self.seen:
            h = load_config({**self.environ, self.variable: str(value)})
            self.seen[value] = weigh(h, self.spreads, self.speed, SAMPLE_VALUES)
        return self.seen[value].fits

    def surely_fits(self, value: int) -> bool:
        """The same, every byte counted."""
        if value not in self.counted:
            h = load_config({**self.environ, self.variable: str(value)})
            self.seen[value] = weigh(h, self.spreads, self.speed)
            self.counted.add(value)
        return self.seen[value].fits

    def values(self) -> list[int]:
        """Valid values in rising order, up to one that is too large to fit, if there is one."""
        found, low, top = list[int](), self.unit, self.unit * math.ceil(self.now / self.unit)
        while found or top <= 64 * self.now + self.unit:
            new = [value for value in range(low, top + 1, self.unit) if self.config(value)]
            found += new
            if found and (not new or not self.fits(found[-1])):
                break
            low, top = top + self.unit, 2 * top
        return found

    def largest(self) -> int | None:
        """The largest value that fits, foreseen by bisection and then counted on whole models; None: none does."""
        values = self.values()
        low, high = 0, len(values)  # values before `low` fit, from `high` on they don't
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.fits(values[middle]) else (low, middle)
        while low > 0 and not self.surely_fits(values[low - 1]):
            low -= 1
        while low < len(values) and self.may_fit(values[low]) and self.surely_fits(values[low]):
            low += 1
        return values[low - 1] if low else None

    def may_fit(self, value: int) -> bool:
        """Whether a value is too near to the budget for a forecast to decide."""
        self.fits(value)
        return self.seen[value].budget.total_bytes <= 1.02 * self.h.hard_budget_bytes

    def lines(self, value: int | None) -> Iterator[str]:
        """A table of all candidates."""
        kinds = list(dict.fromkeys(kind for candidate in self.seen.values() for kind in candidate.streams))
        heads = [*kinds, "total_bytes", "steps", "tokens", "per_param"]
        yield f"{self.variable:<20}{'parameters':>11}" + "".join(f"{head:>12}" for head in heads)
        for tried, found in sorted(self.seen.items()):
            rate = found.time.tokens / found.parameters
            numbers = [
                *(found.streams.get(kind, 0) for kind in kinds),
                found.budget.total_bytes,
                round(found.time.steps),
            ]
            cells = [*map(str, numbers), f"{found.time.tokens:.4g}", f"{rate:.1f}"]
            mark = "  counted" * (tried in self.counted) + ", the largest that fits" * (tried == value)
            yield f"{tried:<20}{found.parameters:>11}" + "".join(f"{cell:>12}" for cell in cells) + mark


def fit(options: Any, environ: dict[str, str]) -> int:
    """Print the largest model within the byte budget, beside others, with the steps that the clock leaves each; one
    JSON line at the end. Returns 0, or 3 when nothing fits. Raises UserError."""
    fitter = Fitter(with_assignments(options.variables, environ), options)
    rt, timed = start_runtime(fitter.h), not options.gpu
    if rt.world > 1:
        raise UserError("fit runs in one process; for several GPUs try --gpu H100x8")
    if timed:
        fitter.speed = measured_speed(fitter.h, rt)
    value, log = fitter.largest(), Log(None, rt.main)
    if timed and value not in (None, fitter.now):  # others' times are scaled from the configuration as it was given
        found = fitter.seen[value]
        fitter.speed = measured_speed(found.h, rt)
        fitter.seen[value] = found._replace(time=foresee(found.h, fitter.speed))
    log.line(f"weights like {options.like or 'those of trained local models'}; time: {fitter.speed.source}")
    for line in fitter.lines(value):
        log.line(line)
    result: dict[str, Any] = {"variable": fitter.variable, "value": value, "budget_bytes": fitter.h.hard_budget_bytes}
    if value is not None:
        found = fitter.seen[value]
        budget, expected = found.budget, found.time
        result |= {"parameters": found.parameters, "streams": found.streams, "model_bytes": budget.model_bytes}
        result |= {"code_bytes": budget.code_bytes, "total_bytes": budget.total_bytes, "steps": round(expected.steps)}
        result |= {"tokens": round(expected.tokens), "tokens_per_parameter": expected.tokens / found.parameters}
        result |= {"train_time_s": expected.seconds, "speed": fitter.speed.source}
    print(json.dumps(result))
    return 0 if value is not None else 3


def check_tokens(s: Session) -> Check:
    """Read every token once: one out of range would be met after hours, or never."""
    for stream in (s.loader.stream, TokenStream(s.h.data_path, "val", s.h.vocab_size)):
        for start in range(0, stream.tokens, 2**22):
            stream.read(start, min(2**22, stream.tokens - start))
    return Check("tokens", "ok", f"all below VOCAB_SIZE={s.h.vocab_size}")


def memory_of(device: torch.device) -> int:
    """Bytes that a device has free for this process: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return free[0] if free else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory_foreseen(s: Session) -> Check:
    """Whether a step and an evaluation's pass fit into memory; asked before anything of that size is tried."""
    plain = dataclasses.replace(s.h, attn_impl="sdpa" if s.rt.device.type == "cuda" else s.h.attn_impl)
    need, free = foreseen_memory(plain, s.rt), memory_of(s.rt.device)
    found = (
        f"{free / MIB:.0f} MiB free; training needs about {need.training / MIB:.0f}, of which {need.kept / MIB:.0f} "
        f"always, evaluation {need.evaluation / MIB:.0f}"
    )
    fix = "lower MICRO_BATCH_TOKENS or VAL_BATCH_SIZE, or set GRAD_CHECKPOINT=1"
    return judge("memory", found, max(need.training, need.evaluation) > free, fix)


def check_time(s: Session) -> Iterator[Check]:
    """Steps and tokens in the training clock, from a few steps' time, and how much of a known GPU they use."""
    speed = measured_speed(s.h, s.rt)
    ahead = foresee(s.h, speed._replace(flop_seconds=speed.flop_seconds / s.rt.world))
    found = f"{ahead.steps:.0f} steps, {ahead.tokens:.0f} tokens in {ahead.seconds:.0f} s ({speed.source})"
    yield judge("time", found, ahead.steps < 1, "raise MAX_WALLCLOCK_SECONDS or lower TRAIN_BATCH_TOKENS")
    peak = known_peak(s.rt)
    if peak:
        used = 1 / (speed.flop_seconds * peak)
        long = ahead.steps > s.h.long_run_steps or ahead.seconds > 3600
        state = "warn" if s.h.allow_toy_run or not long else "fail"
        fix = "larger MICRO_BATCH_TOKENS or model, PRECISION=bf16, COMPILE=1, or ALLOW_TOY_RUN=1"
        yield judge("utilization", f"{used:.1%} of the GPU's peak", used < 0.1, fix, state)


def check_artifact(s: Session) -> Check:
    """Write a whole artifact with the real codecs, of weights that vary as trained ones do, and read it back."""
    began = time.monotonic()
    ahead = untrained_share(s.h, DISTINCT_TOKENS)
    artifact = write_artifact(s.h, coded_like(s.weights, SPREADS, ahead, math.inf), s.prints)
    wrote = time.monotonic() - began
    decode_artifact(artifact.data)
    total = account(s.h, len(artifact.data))
    found = (
        f"{total.total_bytes} bytes of {total.budget_bytes}; written in {wrote:.1f} s, read in "
        f"{time.monotonic() - began - wrote:.1f} s"
    )
    return judge("artifact", found, total.total_bytes > total.budget_bytes, "make the model smaller (fit)", "warn")


def preflight(h: Hyperparameters, rt: Runtime, full: bool, as_json: bool) -> int:
    """Check everything that a run needs without training; a table or JSON. Raises UserError if anything fails."""
    log = Log(None, rt.main and not as_json)
    s: Session = on_all(rt, lambda: open_session(h, rt, Path(h.out_dir), log))
    checks = on_main(rt, lambda: [*check_start(s), check_tokens(s), check_memory_foreseen(s)])
    checks += [check for check in check_time(s) if checks[-1].state == "ok"]
    checks += on_main(rt, lambda: [check_artifact(s)]) if full else []
    for check in checks:
        log.line(f"{check.state:<5} {check.name:<14}{check.found}{f'; {check.fix}' if check.fix else ''}")
    if as_json and rt.main:
        ok = all(check.state != "fail" for check in checks)
        print(json.dumps({"ok": ok, "checks": [check._asdict() for check in checks]}))
    on_main(rt, lambda: refuse(checks))
    log.line("preflight: ok")
    return 0


def open_artifact(
    path: str, environ: dict[str, str]
) -> tuple[Hyperparameters, Runtime, GPT, Tokenizer, dict[str, float]]:
    """A model from an artifact under the environment's data and evaluation settings. Raises UserError.

    The network's structure comes from the artifact; a variable that contradicts it is an error.
    """
    header, arrays = read_artifact(path)
    h = load_config(environ) if PACKAGED else config_of(path, header, arrays, environ)
    rt = start_runtime(h)
    tokenizer = load_tokenizer(h)
    if header["prints"].get("tokenizer") != tokenizer.fingerprint:
        raise UserError(f"{path} was trained with another tokenizer than TOKENIZER_PATH={h.tokenizer_path}")
    if SCORES and (header["config"], header["prints"]["tokenizer"]) != (structure_config(h), tokenizer.fingerprint):
        sys.exit(f"{path} is of another network or tokenizer than this script's")
    h, _ = with_backends(h, rt)
    model = build_model(h, rt, tokenizer.bos, fill=False)
    load_weights(model, arrays)
    return h, rt, model, tokenizer, header["calibration"]


def config_of(
    path: str, header: dict[str, Any], arrays: dict[str, np.ndarray], environ: dict[str, str]
) -> Hyperparameters:
    """The configuration that an artifact's header and the environment make together. Raises UserError."""
    # Training's batch does not matter here, but must not contradict the window either.
    config = {n: FIELDS[n.upper()].default for n in structure_fields()} | header["config"]
    window = parse_value("TRAIN_SEQ_LEN", environ.get("TRAIN_SEQ_LEN") or str(config["train_seq_len"]))
    h = load_config(environ, {**config, "train_batch_tokens": window, "micro_batch_tokens": window})
    values, written = dataclasses.asdict(h), dataclasses.asdict(Hyperparameters(**config))
    for name in structure_fields():
        if values[name] != written[name] and not name.startswith("yarn"):  # a longer context at evaluation is allowed
            raise UserError(
                f"{name.upper()}={values[name]} contradicts the artifact, which has {written[name]}; unset it"
            )
    if least_weights(h) > sum(array.size for array in arrays.values()):
        raise UserError(f"{path}: its tensors are too small for its configuration")
    return h


def evaluate_command(path: str, environ: dict[str, str]) -> int:
    """Score an artifact on the validation split of DATA_PATH."""
    called = time.monotonic()
    h, rt, model, tokenizer, calibration = open_artifact(path, environ)
    if h.temp_scaling and "temperature" not in calibration:
        raise UserError(f"TEMP_SCALING=1: {path} holds no temperature; it was trained without TEMP_SCALING=1")
    log = Log(None, rt.main)
    validation = read_validation(h)
    began = time.monotonic()
    scorer = Scorer(h, rt, model, tokenizer.byte_table(), calibration)
    scorer.say, scorer.limit, scorer.began = log.line, h.max_eval_seconds, called
    log.line(f"protocol:{h.protocol}{' (named in advance)' * h.named}")
    score = scorer.score(validation, report=None if PACKAGED else lambda share: log.progress(share, "scoring"))
    seconds = time.monotonic() - began
    log.line(f"final_eval val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    log.line(
        f"tokens:{score.tokens} bytes:{score.bytes} eval_time:{seconds * 1e3:.0f}ms tok/s:{score.tokens / seconds:.0f}"
    )
    return 0


def check_fidelity(scorer: Scorer, path: str) -> Finding:
    """How near the reloaded network is to the one that wrote the artifact, on the windows of its reference."""
    try:
        with np.load(path + REFERENCE, allow_pickle=False) as stored:
            there = {name: stored[name] for name in stored.files}
        here = outputs_on(scorer.rt, scorer.model, there["history"], there["tokens"])
        agree_share = float((here["argmax"] == there["argmax"]).mean())
        apart = max(float(np.abs(here[name] - there[name]).max()) for name in ("top", "logsumexp"))
    except FileNotFoundError:
        return Finding("fidelity", None, f"not measured: no {path}{REFERENCE}, which the training run writes")
    except MALFORMED as error:
        raise UserError(
            f"{path}{REFERENCE} cannot be read ({type(error).__name__}); train again, or remove it"
        ) from None
    found = (
        f"argmax agrees at {agree_share:.4%} of {here['argmax'].size} positions, logits differ by at most {apart:.2e}"
    )
    return Finding("fidelity", agree_share >= 0.999, found)


AUDIT_MARKS = {True: "ok  ", False: "FAIL", None: "?   "}


def audit_command(path: str, positions: int, environ: dict[str, str]) -> int:
    """Prove that an artifact's evaluation is legal; prints a table, writes ARTIFACT.audit.json, 4 if anything fails."""
    h, rt, model, tokenizer, calibration = open_artifact(path, environ)
    if rt.world > 1:
        raise UserError("audit runs in one process; start it without torchrun")
    log, table, validation = Log(None, rt.main), tokenizer.byte_table(), read_validation(h)
    short = dataclasses.replace(h, eval_streams=min(3, h.eval_streams), freeze_check_strict=False)
    stream = audit_stream(short, validation)
    far = validation[: 4 * len(stream)]
    log.line(
        f"protocol:{h.protocol} audited on the first {len(stream) - 1} of {len(validation) - 1} tokens in "
        f"{short.eval_streams} streams, and at the end of the first {len(far) - 1} in one"
    )
    audit = Audit(lambda: Scorer(short, rt, model, table, calibration), stream, positions, far)
    used = audit.whole.score.bytes if audit.whole.score else 0
    findings = [*audit.findings(), check_bytes(tokenizer, table, validation, stream, used)]
    findings.append(check_fidelity(audit.make(), path))
    for finding in findings:
        log.line(f"{AUDIT_MARKS[finding.ok]} {finding.check:<34}{finding.found}")
    ok, unknown = all(finding.ok is not False for finding in findings), [f.check for f in findings if f.ok is None]
    report = {"artifact_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "protocol": h.protocol, "ok": ok,
        "tokens": len(stream) - 1, "far_tokens": len(far) - 1, "of": len(validation) - 1, "positions": audit.positions,
        "checks": [f._asdict() for f in findings]}  # fmt: skip
    write_atomically(Path(path + ".audit.json"), (json.dumps(report, indent=1) + "\n").encode())
    missing = f" but for what was not measured: {', '.join(unknown)};" if unknown else ","
    log.line(f"audit: {'passed' if ok else 'FAILED'}{missing} written to {path}.audit.json")
    return 0 if ok else 4


def generate_command(path: str, options: Any, environ: dict[str, str]) -> int:
    """Stream a continuation of the prompt."""
    _, rt, model, tokenizer, _ = open_artifact(path, environ)
    if not rt.main:
        return 0
    if options.prompt != options.prompt.encode(errors="replace").decode():
        raise UserError("--prompt is not text in UTF-8")
    shown, tokens = "", [tokenizer.bos, *tokenizer.tokens_of(options.prompt)]
    written: list[int] = []
    print(options.prompt, end="", flush=True)
    for token in generate(model, rt, tokens, options.tokens, options.temperature, options.top_p, options.seed):
        written.append(token)
        text = tokenizer.text_of(tokens[1:] + written)[len(tokenizer.text_of(tokens[1:])) :]
        if text.startswith(shown) and not text.endswith("\ufffd"):  # wait for the rest of a split character
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return 0


class Stopwatch:
    """Training steps of one configuration, timed part by part."""

    def __init__(self, h: Hyperparameters, rt: Runtime) -> None:
        self.s = open_session(h, rt, Path(h.out_dir), Log(None, False))
        self.step, self.times = make_step(self.s), list[np.ndarray]()
        self.state = TrainState(variant=final_variant(h))
        if h.carry_train:
            self.state.carry = self.s.model.init_state(h.train_batch_tokens // h.train_seq_len // rt.world)

    def run(self) -> None:
        """One step: seconds of data, forward and backward, optimizer."""
        s, h, marks = self.s, self.s.h, [time.perf_counter()]
        batch = s.loader.next(h.train_batch_tokens // h.train_seq_len, h.train_seq_len)
        marks.append(time.perf_counter())
        self.state.carry = self.step(batch, self.state, 0.0).carry
        synchronize(s.rt)
        marks.append(time.perf_counter())
        s.optimizer.step(1.0, h.muon_momentum, False, 0.0)
        s.weights.clear_gradients()
        synchronize(s.rt)
        self.times.append(np.diff([*marks, time.perf_counter()]))

    def result(self) -> dict[str, float]:
        """Medians, the first three steps left out."""
        middle = np.median(np.array(self.times[3:]), axis=0)
        parts = dict(zip(("data_s", "forward_backward_s", "optimizer_s"), middle.round(6).tolist(), strict=True))
        return {**parts, "tokens_per_s": round(self.s.h.train_batch_tokens / float(middle.sum()), 1)}


def bench(h: Hyperparameters, rt: Runtime, steps: int, other: dict[str, str] | None) -> int:
    """Time training steps on the configured data, one JSON object on stdout.

    With other variables, steps of that configuration in turn, and the ratio of this one's tokens/s to that one's:
    median and quartiles over pairs of steps.
    """
    watches = [Stopwatch(h, rt)]
    if other:
        versus = matched(load_config({**os.environ, **other}))
        watches.append(Stopwatch(versus, start_runtime(versus) if rt.world == 1 else rt))
    for _ in range(steps + 3):
        for watch in watches:
            watch.run()
    result: dict[str, Any] = {**watches[0].result(), "peak_memory_mib": round(peak_memory_bytes(rt) / MIB, 1)}
    if other:
        one, two = (np.array(w.times[3:]).sum(1) / w.s.h.train_batch_tokens for w in watches)
        result |= {"other": watches[1].result(), "ratio": np.percentile(two / one, (25, 50, 75)).round(4).tolist()}
    if rt.main:
        print(json.dumps(result))
    return 0


def number(kind: type, low: float, high: float = 2.0**62) -> Callable[[str], Any]:
    """A parser of numbers in a range, for argparse."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # NaN, too
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low:g}" + (f" to {high:g}" if high < 2.0**62 else "")
    return parse


def assignment(word: str) -> str:
    """A VARIABLE=value word, for argparse."""
    if not with_assignments([word], {}):
        raise ValueError
    return word


def parse_command(argv: list[str]) -> Any:
    """The command line's words; configuration comes from the environment."""
    import argparse

    parser = argparse.ArgumentParser(prog="train_gpt.py", description="see --help for the variables")
    commands = parser.add_subparsers(dest="command")
    for name in ("train", "plan"):
        commands.add_parser(name)
    checker = commands.add_parser("preflight")
    checker.add_argument("--full", action="store_true")
    checker.add_argument("--json", action="store_true")
    commands.add_parser("eval").add_argument("artifact")
    auditor = commands.add_parser("audit")
    auditor.add_argument("artifact")
    auditor.add_argument("--positions", type=number(int, 1), default=200)
    writer = commands.add_parser("generate")
    writer.add_argument("artifact")
    writer.add_argument("--prompt", default="")
    writer.add_argument("--tokens", type=number(int, 1), default=200)
    writer.add_argument("--temperature", type=number(float, 0), default=0.8)
    writer.add_argument("--top-p", type=number(float, 0, 1), default=0.95)
    writer.add_argument("--seed", type=number(int, 0), default=1337)
    fitter = commands.add_parser("fit")
    fitter.add_argument("variables", nargs="*", type=assignment, metavar="VARIABLE=VALUE")
    fitter.add_argument("--by", choices=FIT_BY, default="width")
    fitter.add_argument("--step", type=number(int, 1), default=0)
    fitter.add_argument("--gpu", default="", metavar="H100x8")
    fitter.add_argument("--mfu", type=number(float, 0.001, 1), default=0.4)
    fitter.add_argument("--like", default="", metavar="CHECKPOINT")
    timer = commands.add_parser("bench")
    timer.add_argument("--steps", type=number(int, 1), default=20)
    timer.add_argument("--ratio", nargs="+", default=[], metavar="VARIABLE=VALUE")
    options, rest = parser.parse_known_args(argv)
    if options.command == "fit" and all(with_assignments([word], {}) for word in rest):  # after options, too
        options.variables, rest = [*options.variables, *rest], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(argv: list[str], environ: dict[str, str]) -> int:
    """Run one command; returns the exit code (2: a mistake of the user's, told in one line)."""
    options = parse_command(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console of another encoding must not end a run at its last line
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if options.command == "eval":
            return evaluate_command(options.artifact, environ)
        if options.command == "audit":
            return audit_command(options.artifact, options.positions, environ)
        if options.command == "generate":
            return generate_command(options.artifact, options, environ)
        if options.command == "fit":
            return fit(options, environ)
        h = matched(load_config(environ))
        rt = start_runtime(h)
        if options.command == "preflight":
            return preflight(h, rt, options.full, options.json)
        if options.command == "plan":
            return plan(h, rt)
        if options.command == "bench":
            if unclear := [pair for pair in options.ratio if "=" not in pair]:
                raise UserError(f"bench --ratio takes VARIABLE=value, not {unclear[0]}")
            return bench(h, rt, options.steps, dict(pair.split("=", 1) for pair in options.ratio))
        return train(h, rt)
    except BrokenPipeError:  # the reader has seen enough; what is still in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, AgreedError):
            print(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def leave_code(code: int, environ: dict[str, str]) -> int:
    """Put the exit code where tools/supervise.sh looks for it: torchrun makes 1 of every failure."""
    if path := environ.get("EXIT_CODE_FILE"):
        with suppress(OSError):
            Path(path).write_text(str(code))
    return code


def run_packaged(environ: dict[str, str]) -> int:
    """All that a packaged script does: train, or score the artifact that it is given."""
    try:
        if SCORES:
            return evaluate_command([*sys.argv[1:], "model.pgz"][0], environ)
        h = load_config(environ)
        return train(h, start_runtime(h))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    if PACKAGED:
        sys.exit(run_packaged(dict(os.environ)))
    else:
        sys.exit(leave_code(main(sys.argv[1:], dict(os.environ)), dict(os.environ)))
