"""The yardsticks: the minimal GPT, the Kneser-Ney n-grams, and the closing summary of a run."""

import importlib
import io
import json
import lzma
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ and records/ are folders of scripts

kneser_ney = importlib.import_module("benchmarks.kneser_ney")
minimal_gpt = importlib.import_module("benchmarks.minimal_gpt")
summary = importlib.import_module("records.summary")
train_gpt = importlib.import_module("train_gpt")

TEXTS = [
    " Leading space, then the quick brown fox jumps over the lazy dog.",
    "The dog sleeps;  the fox   does not.\n\tTabs and lines too.",
    "Ünïcode, ψ, 漢字 and a smile: 🙂.",
    "the fox and the dog and the fox and the dog",
]


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def write_dataset(folder: Path, train: np.ndarray, val: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    half = len(train) // 2
    write_shard(folder / "fineweb_train_000000.bin", train[:half])
    write_shard(folder / "fineweb_train_000001.bin", train[half:])
    write_shard(folder / "fineweb_val_000000.bin", val)
    return folder


def byte_tokens(texts: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join(b"\xff" + text.encode() for text in texts), np.uint8).astype(np.int64)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two small models: one that keeps texts as they are, one that normalizes them and adds a first space."""
    folder = tmp_path_factory.mktemp("tokenizers")
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    paths = {}
    kinds: dict[str, dict[str, Any]] = {"lossless": {**exact, "allow_whitespace_only_pieces": True}, "lossy": {}}
    for name, options in kinds.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 4), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
            bos_id=1, eos_id=2, unk_id=0, hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
        paths[name] = str(folder / f"{name}.model")
        Path(paths[name]).write_bytes(model.getvalue())
    return paths


def encode(tokenizer: str, texts: list[str]) -> np.ndarray:
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    return np.array([token for text in texts for token in [model.bos_id(), *model.encode(text)]])


# ---- Kneser-Ney ------------------------------------------------------------------------------------------------------

Gram = tuple[int, ...]


def slow_counts(tokens: list[int], order: int) -> dict[int, Counter[Gram]]:
    """Counts of the longest grams; of shorter ones, the number of different tokens before each."""
    counts = {order: Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))}
    for k in range(1, order):
        longer = {tuple(tokens[i : i + k + 1]) for i in range(len(tokens) - k)}
        counts[k] = Counter(gram[1:] for gram in longer)
    return counts


def slow_discount(counts: Counter[Gram], count: int) -> float:
    n, j = Counter(counts.values()), min(count, 3)
    found = {0: 0.0}
    for i in (1, 2, 3):
        if n[i] and n[i + 1] and n[1]:
            found[i] = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i]
    if len(found) < 4 or min(found[i] for i in (1, 2, 3)) <= 0:
        found = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
    return found[j]


def slow_probability(counts: dict[int, Counter[Gram]], vocab: int, history: Gram, token: int) -> float:
    """The recursion as it is written in the paper, one token at a time."""
    if len(history) + 1 > max(counts):
        history = history[len(history) + 1 - max(counts) :]
    lower = slow_probability(counts, vocab, history[1:], token) if history else 1 / vocab
    level = counts[len(history) + 1]
    after = {gram[-1]: count for gram, count in level.items() if gram[:-1] == history}
    total = sum(after.values())
    if total == 0:
        return lower
    taken = {word: slow_discount(level, count) for word, count in after.items()}
    share = (after.get(token, 0) - taken.get(token, 0.0)) / total
    return share + sum(taken.values()) / total * lower


def random_corpus(seed: int, length: int, vocab: int) -> np.ndarray:
    """Tokens with structure (each depends on the two before) and skewed frequencies."""
    rng = np.random.default_rng(seed)
    tokens = [0, 1]
    for _ in range(length - 2):
        likely = (3 * tokens[-1] + tokens[-2]) % vocab
        tokens.append(likely if rng.random() < 0.6 else int(vocab * rng.random() ** 2))
    return np.array(tokens)


@pytest.mark.parametrize(("order", "length", "vocab"), [(1, 60, 5), (2, 400, 9), (3, 25, 4), (4, 900, 7), (5, 300, 3)])
def test_kneser_ney_equals_the_slow_recursion(order: int, length: int, vocab: int) -> None:
    tokens = random_corpus(order, length, vocab)
    model = kneser_ney.fit(tokens, order, vocab)
    counts = slow_counts(tokens.tolist(), order)
    stream = random_corpus(99, 40, vocab + 1) % vocab  # other text, with unseen grams
    expected = [slow_probability(counts, vocab, tuple(stream[:i].tolist()), int(stream[i])) for i in range(len(stream))]
    np.testing.assert_allclose(kneser_ney.probabilities(model, stream), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_is_a_distribution_in_every_context(order: int) -> None:
    vocab, rng = 12, np.random.default_rng(order)
    model = kneser_ney.fit(random_corpus(1, 2000, vocab - 2), order, vocab)  # two tokens never seen
    for length in (0, 1, 2, 3, 4, 9):
        for _ in range(10):
            history = rng.integers(0, vocab, length)
            p = kneser_ney.distribution(model, history)
            assert p.min() > 0
            assert abs(p.sum() - 1) < 1e-9
            token = int(rng.integers(vocab))
            in_stream = kneser_ney.probabilities(model, np.append(history, token))[-1]
            assert p[token] == pytest.approx(in_stream, rel=1e-12)


def test_discounts_follow_the_closed_form_and_leave_something_for_the_unseen() -> None:
    counts = np.repeat([0, 1, 2, 3, 4, 5, 70], [5, 400, 150, 80, 50, 9, 9])
    y = 400 / 700
    expected = [0, 1 - 2 * y * 150 / 400, 2 - 3 * y * 80 / 150, 3 - 4 * y * 50 / 80]
    np.testing.assert_allclose(kneser_ney.discounts(counts), expected, rtol=1e-12)
    for times in ([3, 90, 1, 400], [9, 9, 9, 0], [0, 0, 0, 0], [1, 1, 1, 900]):
        found = kneser_ney.discounts(np.repeat([1, 2, 3, 4], times))
        assert (found[1:] > 0).all() and (found <= np.arange(4)).all()


def test_score_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kneser_ney.fit(random_corpus(2, 500, 8), 4, 8)
    stream = random_corpus(3, 101, 8)
    whole = -np.log(kneser_ney.probabilities(model, stream))[1:].sum()  # the first token is given
    for chunk in (1, 7, 100, 1000):
        monkeypatch.setattr(kneser_ney, "SCORE_CHUNK", chunk)
        assert kneser_ney.score(model, stream) == pytest.approx(whole, rel=1e-12)


def test_longer_grams_and_more_text_help() -> None:
    val = random_corpus(5, 2000, 10)
    scores = [
        kneser_ney.score(kneser_ney.fit(random_corpus(4, length, 10), order, 10), val)
        for order, length in ((1, 20000), (2, 20000), (3, 1000), (3, 20000))
    ]
    assert scores == sorted(scores, reverse=True)


def test_kneser_ney_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "toy_byte256", byte_tokens(TEXTS * 20), byte_tokens(TEXTS))
    assert kneser_ney.main(["--data", str(data), "--tokenizer", "byte", "--order", "3", "--train-tokens", "900"]) == 0
    model = kneser_ney.fit(byte_tokens(TEXTS * 20)[:900], 3, 256)
    nats = kneser_ney.score(model, byte_tokens(TEXTS))
    text_bytes = len("".join(TEXTS).encode())
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"train_tokens:900 val_loss:{nats / (text_bytes + len(TEXTS) - 1):.4f}" in line
    assert f"val_bpb:{nats / math.log(2) / text_bytes:.4f}" in line


def test_user_errors_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "toy", byte_tokens(TEXTS), byte_tokens(TEXTS))
    whole = (data / "fineweb_val_000000.bin").read_bytes()
    cases: list[tuple[bytes, list[str], str]] = [
        (whole, ["--tokenizer", str(tmp_path / "none.model")], "does not exist"),
        (whole, ["--tokenizer", "byte", "--order", "0"], "order 0"),
        (whole[:-2], ["--tokenizer", "byte"], f"expected {len(whole)}"),
        (b"\0" * 2000, ["--tokenizer", "byte"], "shard header"),
        (b"", ["--tokenizer", "byte"], "shard header"),
        (whole[:1024] + b"\0\1" * ((len(whole) - 1024) // 2), ["--tokenizer", "byte"], "has token 256"),
    ]
    for shard, arguments, message in cases:
        (data / "fineweb_val_000000.bin").write_bytes(shard)
        assert kneser_ney.main(["--data", str(data), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert kneser_ney.main(["--data", str(tmp_path), "--tokenizer", "byte"]) == 2


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_lossless_tokens_decode_to_the_very_texts(tokenizers: dict[str, str]) -> None:
    vocabulary = kneser_ney.read_vocabulary(tokenizers["lossless"])
    tokens = encode(tokenizers["lossless"], TEXTS)
    assert vocabulary.decode(tokens) == "".join(TEXTS).encode()
    assert kneser_ney.read_vocabulary("byte").decode(byte_tokens(TEXTS)) == "".join(TEXTS).encode()


def test_a_first_space_that_the_tokenizer_added_is_no_text(tokenizers: dict[str, str]) -> None:
    vocabulary = kneser_ney.read_vocabulary(tokenizers["lossy"])
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizers["lossy"])
    normalized = "".join(model.decode(model.encode(text)) for text in TEXTS)
    assert vocabulary.decode(encode(tokenizers["lossy"], TEXTS)) == normalized.encode()


def test_all_byte_counts_agree_with_the_text(tokenizers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kneser_ney, "SCORE_CHUNK", 13)  # several chunks
    for name, path in tokenizers.items():
        tokens, vocabulary = encode(path, TEXTS), kneser_ney.read_vocabulary(path)
        size = len(vocabulary.decode(tokens))
        assert vocabulary.count_bytes(tokens) == size, name
        assert minimal_gpt.count_bytes(tokens, path) == size, name
        table = train_gpt.SentencePieceTokenizer(path, len(vocabulary.pieces)).byte_table()  # else rows do not compare
        assert table.byte_counts(tokens[:-1], tokens[1:]).sum() == size, name
    assert minimal_gpt.count_bytes(byte_tokens(TEXTS), "") == len("".join(TEXTS).encode())


# ---- minimal GPT -----------------------------------------------------------------------------------------------------


def tiny_gpt(num_layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    model = minimal_gpt.make_model(num_layers, 16, 2, 20, 16)
    for weight in model.parameters():  # far from the even start, so that every path matters
        torch.nn.init.normal_(weight, std=0.3)
    return model.double()


def loss_at(model: torch.nn.Module, tokens: torch.Tensor, place: int) -> float:
    """The loss at one position: targets of -100 do not count."""
    targets = torch.full_like(tokens, -100)
    targets[:, place] = 3
    return model(tokens, targets).item()


def test_minimal_gpt_sees_the_past_and_only_the_past() -> None:
    model, place = tiny_gpt(), 7
    tokens = torch.randint(0, 20, (1, 16), generator=torch.Generator().manual_seed(1))
    before = loss_at(model, tokens, place)
    for changed in range(16):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 20
        same = loss_at(model, other, place) == pytest.approx(before, abs=1e-12)
        assert same == (changed > place), changed


def test_minimal_gpt_knows_distance() -> None:
    """Without rotary positions, attention could not tell the order of the tokens before the last one."""
    model = tiny_gpt(num_layers=1)  # deeper layers would know from the causal mask
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    swapped = torch.tensor([[2, 1, 3, 4, 5]])
    assert abs(loss_at(model, tokens, 4) - loss_at(model, swapped, 4)) > 1e-6


def test_minimal_gpt_learns_a_cycle_with_every_parameter() -> None:
    torch.manual_seed(0)
    model = minimal_gpt.make_model(2, 16, 2, 20, 16)
    optimizer = minimal_gpt.make_optimizer(model, 1e-2)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    cycle = torch.arange(17).remainder(5).expand(4, 17)
    losses = [minimal_gpt.train_step(model, optimizer, cycle[:, :-1], cycle[:, 1:]).item() for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(20), abs=0.5)
    assert losses[-1] < 0.3
    assert all(not torch.equal(weight, start[name]) for name, weight in model.named_parameters())


def test_validate_scores_every_token_once() -> None:
    model, tokens = tiny_gpt(), np.random.default_rng(0).integers(0, 20, 43)  # 42 targets: 16 + 16 + 10
    expected = 0.0
    for start, end in ((0, 16), (16, 32), (32, 42)):
        x, y = torch.tensor(tokens[None, start:end]), torch.tensor(tokens[None, start + 1 : end + 1])
        expected += model(x, y).item() * (end - start)
    assert minimal_gpt.validate(model, tokens, 16) == pytest.approx(expected, rel=1e-12)


def test_minimal_gpt_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "toy_byte256", byte_tokens(TEXTS * 10), byte_tokens(TEXTS))
    settings = {"DATA_PATH": str(data), "VOCAB_SIZE": "256", "NUM_LAYERS": "1", "MODEL_DIM": "16", "NUM_HEADS": "2"}
    settings |= {"TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "128", "ITERATIONS": "60", "LEARNING_RATE": "0.01"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    minimal_gpt.main()
    first, middle, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step:1/60 train_loss:5.") and "step_avg:" in middle
    val_loss, val_bpb = (float(last.split(f"{name}:")[1].split()[0]) for name in ("val_loss", "val_bpb"))
    text_bytes = len("".join(TEXTS).encode())
    assert val_loss < 4.5
    assert val_bpb == pytest.approx(val_loss / math.log(2) * (text_bytes + len(TEXTS) - 1) / text_bytes, abs=2e-4)


def test_batches_cover_the_train_split_in_order(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "toy", np.arange(100), np.arange(10))
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]] = minimal_gpt.batches(str(data), 16, 8)
    starts = []
    for _ in range(7):
        tokens, targets = next(stream)
        assert tokens.shape == (2, 8) and torch.equal(targets, tokens + 1)
        starts.append(int(tokens[0, 0]))
    assert starts == [0, 16, 32, 50, 66, 82, 0]  # two shards of 50, then again


# ---- summary ---------------------------------------------------------------------------------------------------------

FINAL = {
    "kind": "final", "name": "final_roundtrip", "val_loss_nats": 1.25, "val_bpb": 1.8125, "model_bytes": 4321,
    "code_bytes": 24000, "total_bytes": 28321, "budget_bytes": 16000000, "train_time_s": 12.5,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished toy run on byte shards."""
    data = write_dataset(tmp_path / "data" / "toy_byte256", byte_tokens(TEXTS * 20), byte_tokens(TEXTS * 3))
    folder = tmp_path / "runs" / "toy"
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = [{"kind": "start"}]
    for step in range(1, 6):
        records.append({"kind": "train", "step": step, "train_loss_nats": 5.0 / step, "train_time_s": 2.5 * step})
    records.append({"kind": "val", "step": 5, "val_loss_nats": 1.2, "val_bpb": 1.75, "train_time_s": 12.5})
    write_records(folder, [*records, FINAL])
    (folder / "config.env").write_text(f"# settings\nDATA_PATH='{data}'\nVOCAB_SIZE=256\nTOKENIZER_PATH=\n")
    return folder


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def rows_of(output: str) -> dict[str, list[str]]:
    """Name of each table row -> its cells."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.lstrip().startswith("val_bpb"))
    name_width = lines[start].index("val_bpb") - 2
    return {line[:name_width].strip(): line[name_width:].split() for line in lines[start + 1 : start + 5]}


def test_summary_compares_on_the_same_bytes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main([str(run_dir)]) == 0
    output = capsys.readouterr().out
    rows = rows_of(output)
    text = "".join(TEXTS * 3).encode()
    assert rows["this run (final_roundtrip)"] == ["1.8125", "1.2500", "4,321", "12.5"]
    xz = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert rows["xz -9e"][:3] == [f"{8 * xz / len(text):.4f}", "-", f"{xz:,}"]
    size = len(brotli.compress(text, quality=11, lgwin=24))
    assert rows["brotli -q 11"][:3] == [f"{8 * size / len(text):.4f}", "-", f"{size:,}"]
    val = byte_tokens(TEXTS * 3)
    nats = kneser_ney.score(kneser_ney.fit(byte_tokens(TEXTS * 20), 2, 256), val)
    expected = [f"{nats / math.log(2) / len(text):.4f}", f"{nats / (len(val) - 1):.4f}"]
    assert rows["bigram model"][:2] == expected
    assert "model_bytes:4321 code_bytes:24000 total_bytes:28321 budget_bytes:16000000" in output
    assert f"{len(text):,} bytes of text" in output
    assert (run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_baselines_are_measured_once_for_a_dataset(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_dir.parent.parent / "data" / "toy_byte256"
    measured: list[str] = []
    for name, measure in list(summary.BASELINES.items()):

        def counted(split: Any, report: Any, name: str = name, measure: Any = measure) -> Any:
            measured.append(name)
            return measure(split, report)

        monkeypatch.setitem(summary.BASELINES, name, counted)
    summary.main([str(run_dir)])
    first = rows_of(capsys.readouterr().out)
    summary.main([str(run_dir)])
    assert rows_of(capsys.readouterr().out) == first
    assert sorted(measured) == ["bigram", "brotli", "xz"]

    (data / "baselines.json").write_text('{"cut off')
    summary.main([str(run_dir)])
    assert len(measured) == 6
    write_shard(data / "fineweb_val_000000.bin", byte_tokens(TEXTS * 2))  # other data: the old figures are void
    summary.main([str(run_dir)])
    assert len(measured) == 9
    with open(run_dir / "config.env", "a") as config:
        config.write("MAX_VAL_TOKENS=50\n")
    capsys.readouterr()
    summary.main([str(run_dir)])
    assert len(measured) == 12
    assert "50 validation tokens" in capsys.readouterr().out


def test_a_data_folder_that_cannot_be_written_to(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir.parent.parent / "data" / "toy_byte256" / "baselines.json").mkdir()
    assert summary.main([str(run_dir)]) == 0
    output = capsys.readouterr().out
    assert "cannot be written" in output and "xz -9e" in rows_of(output)


def test_summary_without_optional_packages(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summary, "brotli", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert summary.main([str(run_dir)]) == 0
    output = capsys.readouterr().out
    assert "brotli is not installed" in output and "matplotlib is not installed" in output
    assert "xz -9e" in output and not (run_dir / "curve.png").exists()


def test_summary_of_an_unfinished_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"kind": "fi')  # killed while it wrote
    assert summary.main([str(run_dir)]) == 0
    assert rows_of(capsys.readouterr().out)["this run (unfinished, step 5)"] == ["1.7500", "1.2000", "-", "12.5"]


def test_summary_errors(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main([str(tmp_path / "nowhere")]) == 2
    assert "give the folder of a run" in capsys.readouterr().err
    good = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text("{broken\n" + good)
    assert summary.main([str(run_dir)]) == 2
    assert "metrics.jsonl:1 " in capsys.readouterr().err
    write_records(run_dir, [{"kind": "train", "step": 1, "train_loss_nats": 5.0, "train_time_s": 1.0}])
    assert summary.main([str(run_dir)]) == 2
    assert "no score yet" in capsys.readouterr().err
    write_records(run_dir, [FINAL])
    (run_dir / "config.env").write_text("DATA_PATH=gone\nVOCAB_SIZE=256\n")
    assert summary.main([str(run_dir)]) == 2
    shown = capsys.readouterr()
    assert "1.8125" in shown.out and "gone" in shown.err  # its own score all the same


def test_summary_with_a_sentencepiece_model(
    run_dir: Path, tokenizers: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_dir.parent.parent / "data" / "toy_sp"
    vocab = len(kneser_ney.read_vocabulary(tokenizers["lossless"]).pieces)
    write_dataset(data, encode(tokenizers["lossless"], TEXTS * 9), encode(tokenizers["lossless"], TEXTS))
    config = f"DATA_PATH={data}\nVOCAB_SIZE={vocab}\nTOKENIZER_PATH={tokenizers['lossless']}\n"
    (run_dir / "config.env").write_text(config)
    assert summary.main([str(run_dir)]) == 0
    text = "".join(TEXTS).encode()
    assert (
        rows_of(capsys.readouterr().out)["xz -9e"][2] == f"{len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)):,}"
    )
