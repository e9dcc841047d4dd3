"""Fixtures that several test files share: tiny data, a tiny job's variables, and the program run as a user runs it."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests import the script as a module: import train_gpt

import torch  # noqa: E402

import train_gpt  # noqa: E402

# MLX brings no fast BLAS to Linux; with torch's, if that is there first, its matrix products take a 27th of the time.
BLAS = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
if BLAS.is_file():
    ctypes.CDLL(str(BLAS), mode=ctypes.RTLD_GLOBAL)

# Many small operations on one thread beat the same on two, and the runner starts one process for each core.
torch.set_num_threads(1)

# What a subprocess keeps of this environment: enough to start Python and find libraries, no variable of the program.
KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
TRAIN_TOKENS, VAL_TOKENS = (24_000, 16_000), (6_000,)  # tokens of each shard
BOS = 255


def scramble(model: Any) -> Any:
    """The network with float64 parameters all random, of a size at which each of them matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.7 + 0.3 * noise)
    return model


def fake_quantize(codec: Any, w: Any, tuning: Any) -> Any:
    """The value the forward pass uses for latent w; its straight-through gradient is the identity."""
    return codec.decode(codec.quantize(w, tuning))


def small_stages(preset: str) -> dict[str, str]:
    """Stages, segments, layers and tables of a preset that has some, for windows of 16, steps of 64, two layers."""
    values = train_gpt.PRESETS[preset]
    small = {"batch_stages": "0:64", "curriculum_stages": "0:2,0.5:1", "rmt_segment": "8"}
    small |= {"recurrence_layers": "0-1", "hc_start": "1", "bigram_hash_buckets": "64"}
    stride = {"SLIDING_EVAL_STRIDE": "4"} if "sliding_eval" in values else {}
    return stride | {name.upper(): text for name, text in small.items() if name in values}


# Jobs that switch on other residual topologies, on the same terms.
TOPOLOGIES: dict[str, dict[str, str]] = {
    "hyper-connections, n-grams": {
        "RESIDUAL": "hc", "HC_LEARN": "keep,write,bias,read,mix", "BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_DIM": "8",
        "VALUE_EMBED": "1", "ATTN_INIT": "mimetic", "BACKOUT": "0", "UNET_SKIPS": "1", "STOCHASTIC_DEPTH": "0.2",
    },
    "mhc, dynamic, feedback": {
        "RESIDUAL": "mhc", "MHC_N": "3", "MHC_MODE": "sinkhorn", "MHC_LOGITS": "dynamic", "MHC_GATE": "token",
        "MHC_GATE_NOISE": "0.1", "MHC_LOG_EVERY": "3", "LAYER_PATTERN": "SA", "CAPSULE_DIM": "8", "CAPSULE_NUM": "3",
        "SKC_BLOCK_SIZE": "8", "CAPSULE_BANK": "1", "FEEDBACK_PASSES": "1", "FEEDBACK_DIM": "8",
    },
    "mhc lite, experts": {"RESIDUAL": "mhc", "MHC_LOG_EVERY": "0", "MOE_EXPERTS": "2", "MOE_LAYER_FRAC": "1"},
}  # fmt: skip
# Jobs that switch on what SKC adds, each with state, noise or structure that changes during the run.
SKC_KINDS: dict[str, dict[str, str]] = {
    "skc, bank, feedback, engram": {
        "LAYER_PATTERN": "SA", "CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "SKC_BLOCK_SIZE": "8", "CAPSULE_BANK": "1",
        "FEEDBACK_PASSES": "1", "FEEDBACK_DIM": "8", "BIGRAM_HASH_BUCKETS": "64", "BIGRAM_HASH_DIM": "8",
        "ENGRAM_INJECT_LAYER": "1", "CURRICULUM_STAGES": "0:4,0.3:2,0.6:1", "TERNARY_NOISE_SCALE": "0.02",
        "TERNARY_NOISE_FRACTION": "0.7", "STOCHASTIC_DEPTH": "0.2", "SMEAR_GATE": "8",
    },
    "experts, loops, parallel": {
        "LAYER_PATTERN": "P", "CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "SKC_BLOCK_SIZE": "8", "MOE_EXPERTS": "3",
        "MOE_LAYER_FRAC": "1", "MOE_START_FRACTION": "0.3", "RECURRENCE_LAYERS": "0-1",
        "RECURRENCE_START_FRACTION": "0.5", "MUON_WD": "0.1",
    },
    "memory, carried": {
        "LAYER_PATTERN": "AS", "CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "SKC_BLOCK_SIZE": "8", "RMT_SEGMENT": "16",
        "RMT_TOKENS": "3", "RMT_BPTT": "2", "DOC_MASK": "1", "BATCH_MODE": "streams", "CARRY_TRAIN": "1",
        "CARRY_EVAL": "1", "LABEL_SMOOTHING": "0.1",
    },
    "sparse attention": {
        "LAYER_PATTERN": "N", "NSA_BLOCK": "4", "NSA_STRIDE": "2", "NSA_SELECT_BLOCK": "4", "NSA_SELECT": "4",
        "NSA_WINDOW": "4", "DOC_MASK": "1", "CURRICULUM_STAGES": "0:2,0.5:1",
    },
    "koopman, carried": {
        "LAYER_PATTERN": "K", "CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "SKC_BLOCK_SIZE": "8", "CAPSULE_BANK": "1",
        "BATCH_MODE": "streams", "CARRY_TRAIN": "1", "CARRY_EVAL": "1", "SHARED_BLOCKS": "1",
    },
}  # fmt: skip

WORDS = {
    "determiner": "the a this every some one no the the",
    "adjective": "small green old quiet heavy bright naïve slow cold wooden curious round",
    "noun": "river machine letter house bird window garden café teacher song table mountain cloud number",
    "verb": "finds carries opens follows sees builds leaves counts moves answers hides paints",
    "adverb": "slowly again today often never gladly there twice",
    "join": "and but because while so until",
}


def sentence(choose: random.Random) -> str:
    """One English-like sentence; a few words hold characters of two and three bytes."""

    def word(kind: str) -> str:
        return choose.choice(WORDS[kind].split())

    def noun_phrase() -> str:
        middle = [word("adjective")] if choose.random() < 0.5 else []
        return " ".join([word("determiner"), *middle, word("noun")])

    text = f"{noun_phrase()} {word('verb')} {noun_phrase()}"
    if choose.random() < 0.3:
        text += f" {word('adverb')}"
    if choose.random() < 0.3:
        text += f" {word('join')} {noun_phrase()} {word('verb')} {noun_phrase()}"
    if choose.random() < 0.1:
        text += f" — {choose.randrange(2000)} times"
    return text[0].upper() + text[1:] + "."


def document(choose: random.Random) -> str:
    """A few paragraphs of sentences."""
    paragraphs = [" ".join(sentence(choose) for _ in range(choose.randint(2, 5))) for _ in range(choose.randint(1, 4))]
    return "\n\n".join(paragraphs)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """One shard in the field's format: 256 little-endian int32 words, then uint16 tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def write_byte_data(folder: Path) -> None:
    """Byte-token shards of generated documents, each document after a BOS; the same bytes on every machine."""
    choose = random.Random(20240520)
    folder.mkdir(parents=True, exist_ok=True)
    for split, sizes in (("train", TRAIN_TOKENS), ("val", VAL_TOKENS)):
        tokens = bytearray()
        while len(tokens) < sum(sizes):
            tokens += bytes([BOS]) + document(choose).encode("utf-8")
        stream, at = np.frombuffer(bytes(tokens), np.uint8), 0
        for number, size in enumerate(sizes):
            write_shard(folder / f"fineweb_{split}_{number:06d}.bin", stream[at : at + size])
            at += size


@pytest.fixture(scope="session")
def byte_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of byte-token shards (VOCAB_SIZE=256, BOS=255): 40,000 training tokens in two, 6,000 for validation."""
    folder = tmp_path_factory.mktemp("data") / "synthetic_byte256"
    write_byte_data(folder)
    return folder


@pytest.fixture
def tiny_env(byte_data: Path, tmp_path: Path) -> dict[str, str]:
    """Variables of a job of a second on byte_data, with its run folders in the test's own folder."""
    return {
        "PRESET": "tiny",
        "VOCAB_SIZE": "256",
        "DATA_PATH": str(byte_data),
        "OUT_DIR": str(tmp_path / "runs"),
        "RUN_ID": "run",
        "DEVICE": "cpu",
        "COMPILE": "0",
    }


def clean_environment(env: dict[str, str]) -> dict[str, str]:
    """The environment of a subprocess: `env`, one thread, and little else, whatever this shell has set."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **env}


def command_line(args: Sequence[str], nproc: int = 1) -> list[str]:
    """The words that start the program with `args`, under torchrun for several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train_gpt.py"), *args]


RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_cli() -> RunCli:
    """The real command in a process of its own: run_cli(args, env, nproc=1, timeout=120) -> CompletedProcess.

    A command that outlives its timeout is ended with all its ranks, and subprocess.TimeoutExpired is raised.
    """

    def run(
        args: Sequence[str], env: dict[str, str], nproc: int = 1, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        command = command_line(args, nproc)
        with subprocess.Popen(
            command,
            env=clean_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # torchrun ends its ranks, too
                try:
                    out, err = process.communicate(timeout=40)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    out, err = process.communicate()
                raise subprocess.TimeoutExpired(command, timeout, out, err) from None
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


@dataclass
class Done:
    """How a job ended and what it wrote; code is minus the signal's number for a killed one."""

    code: int
    out: str
    err: str


class Job:
    """A command that runs in a copy of the job server."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder

    def ended(self) -> bool:
        return (self.folder / "status").is_file()

    def kill(self) -> None:
        """End it as a power cut would; no harm if it has ended by itself."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 60) -> Done:
        """Its end; a job that takes longer is killed and fails the test with what it wrote."""
        limit = time.monotonic() + timeout
        while not self.ended() and time.monotonic() < limit:
            time.sleep(0.005)
        hangs = not self.ended()
        if hangs:
            self.kill()
        out, err = ((self.folder / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
        assert not hangs, f"still running after {timeout} s; it wrote:\n{out}\n{err}"
        return Done(int((self.folder / "status").read_text()), out, err)


class JobServer:
    """Starts the program's commands in milliseconds instead of the seconds that importing torch takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        env = clean_environment({"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"})
        script = str(ROOT / "tests" / "job_server.py")
        self.process = subprocess.Popen(
            [sys.executable, script], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(self, env: dict[str, str], args: Sequence[str] = (), hook: Sequence = (), cwd: str = ".") -> Job:
        """Begin a command; `hook` names a function of job_server.HOOKS and its arguments."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        paths = {name: str(folder / name) for name in ("out", "err", "status")}
        request = {"args": list(args), "env": clean_environment(env), "hook": list(hook), "cwd": cwd, **paths}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        return Job(int(self.process.stdout.readline()), folder)

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="session")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    server = JobServer(tmp_path_factory.mktemp("jobs"))
    yield server
    server.close()


@pytest.fixture
def start_job(job_server: JobServer) -> Callable[..., Job]:
    """start_job(env, args=(), hook=()) -> Job that runs."""
    return job_server.start


@pytest.fixture
def run_job(job_server: JobServer) -> Callable[..., Done]:
    """run_job(env, args=(), hook=(), timeout=60) -> Done. The same program as run_cli, without its start-up time."""

    def run(env: dict[str, str], args: Sequence[str] = (), hook: Sequence = (), timeout: float = 60) -> Done:
        return job_server.start(env, args, hook).wait(timeout)

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def free_port_number() -> int:
    return free_port()


@pytest.fixture
def run_ranks(job_server: JobServer) -> Callable[..., list[Done]]:
    """run_ranks(env, ranks=2, args=(), hooks={rank: hook}, timeout=60, cwd=".") -> list[Done], one for each rank.

    Sets torchrun's variables without torchrun, which would end the other ranks when one fails: here each rank has to
    end by itself, as under a cluster's own launcher. "{rank}" in a value
    or in cwd stands for the rank, for what only one has.
    """

    def run(
        env: dict[str, str],
        ranks: int = 2,
        args: Sequence[str] = (),
        hooks: dict[int, Sequence] | None = None,
        timeout: float = 60,
        cwd: str = ".",
    ) -> list[Done]:
        meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        jobs = []
        for rank in range(ranks):
            own = {name: value.replace("{rank}", str(rank)) for name, value in env.items()}
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting}
            where = cwd.replace("{rank}", str(rank))
            jobs.append(job_server.start({**own, **place}, args, (hooks or {}).get(rank, ()), where))
        try:
            return [job.wait(timeout) for job in jobs]
        finally:
            for job in jobs:
                job.kill()

    return run


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} in metrics.jsonl is not JSON")


@pytest.fixture
def read_metrics() -> Callable[..., list[dict[str, Any]]]:
    """read_metrics(run folder, kind="") -> the objects of metrics.jsonl (of one kind), read as strict JSON."""

    def read(folder: Path, kind: str = "") -> list[dict[str, Any]]:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        objects = [json.loads(line, parse_constant=refuse_constant) for line in lines]
        return [found for found in objects if not kind or found["kind"] == kind]

    return read
