"""Optimizers against plain versions and torch's own, the law latent -> parameter, averages, schedules."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fake_quantize
from scipy.optimize import linprog
from torch import Tensor

import train_gpt as t

Grads = dict[str, Tensor]


def config(**variables: object) -> t.Hyperparameters:
    base = {"PRESET": "tiny", "VOCAB_SIZE": 256, "PRECISION": "fp64", "DEVICE": "cpu", "COMPILE": 0, "NUM_LAYERS": 3}
    exact = {"MATRIX_CODEC": "exact", "FP_STORAGE": "exact", "SCALAR_CODEC": "exact"}
    return t.load_config({name: str(value) for name, value in {**base, **exact, **variables}.items()})


def group_rates(trainer: Trainer) -> dict[str, float]:
    return {name: group.rate for name, group in trainer.optimizer.groups.items()}


class Trainer:
    """A model with its weights and optimizer, fed with made-up gradients."""

    def __init__(self, **variables: object) -> None:
        self.h = config(**variables)
        rt = t.start_runtime(self.h)
        self.model = t.build_model(self.h, rt, t.BYTE_BOS)
        self.parameters = dict(self.model.named_parameters())
        self.weights = t.Weights(self.model)
        generator = torch.Generator().manual_seed(0)
        for bank in self.weights.banks.values():
            bank.latent.copy_(torch.randn(bank.latent.shape, generator=generator, dtype=bank.latent.dtype))
        self.weights.materialize(0.0)
        self.optimizer = t.Optimizer(self.h, rt, self.weights)
        self.roles = t.role_table(self.model)

    def latent(self, name: str) -> Tensor:
        bank, index = self.weights.where[name]
        return bank.latent[index]

    def latents(self) -> Grads:
        return {name: self.latent(name).clone() for name in self.parameters}

    def gradients(self, seed: int, without: tuple[str, ...] = ()) -> Grads:
        """Random gradients of very different sizes, set in the parameters but for those `without`."""
        generator, grads = torch.Generator().manual_seed(seed), {}
        for name, parameter in self.parameters.items():
            size = 10.0 ** torch.randint(-4, 3, (), generator=generator).item()
            grads[name] = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * size
            parameter.grad = None if name in without else grads[name].clone()
        return {name: grad for name, grad in grads.items() if name not in without}

    def step(self, rate: float = 1.0, momentum: float = 0.9, average: bool = False, progress: float = 0.5) -> None:
        self.optimizer.step(rate, momentum, average, progress)

    def group(self, *groups: str) -> list[str]:
        return [name for name, role in self.roles.items() if role.group in groups]


# ---- Newton-Schulz

FIVE = t.POLYNOMIALS["jordan"](5)


def matrices(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (1, 8), (8, 1), (96, 128), (40, 100), (1, 1)])
def test_orthogonalize_brings_singular_values_to_one(shape: tuple[int, int]) -> None:
    x = matrices(4, *shape) * torch.tensor([1e-4, 1.0, 10.0, 1e5], dtype=torch.float64).view(4, 1, 1)
    y = t.orthogonalize(x, FIVE)
    values = torch.linalg.svdvals(y)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert values.min() > 0.6 and values.max() < 1.3
    # the nearest semi-orthogonal matrix U V^T, roughly: same singular vectors
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ vh.mT
    off = inner - torch.diag_embed(inner.diagonal(0, -2, -1))
    assert off.abs().max() < 1e-8 and inner.diagonal(0, -2, -1).min() > 0.6


def test_orthogonalize_keeps_zero_and_treats_each_matrix_alone() -> None:
    x = matrices(5, 12, 20)
    x[1] = 0
    x[3] *= 1e6
    together = t.orthogonalize(x, FIVE)
    assert together[1].count_nonzero() == 0 and together.isfinite().all()
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], t.orthogonalize(x[i : i + 1], FIVE), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(t.orthogonalize(x.mT.contiguous(), FIVE), together.mT, rtol=1e-10, atol=1e-11)


def test_orthogonalize_runs_the_asked_number_of_steps() -> None:
    x = matrices(1, 3, 5)
    y = x / x.norm()
    a, b, c = 3.4445, -4.7750, 2.0315
    for steps in range(1, 7):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
        torch.testing.assert_close(t.orthogonalize(x, t.POLYNOMIALS["jordan"](steps)), y, rtol=1e-5, atol=1e-6)


def value_of(polynomial: t.Polynomial, x: np.ndarray) -> np.ndarray:
    a, b, c = polynomial
    return a * x + b * x**3 + c * x**5


@pytest.mark.parametrize("low", [1e-3, 0.03, 0.3, 0.9])
def test_minimax_quintic_has_the_least_largest_error(low: float) -> None:
    """It takes its largest error four times with signs in turn, and no other quintic is nearer to 1 (de la Vallee
    Poussin); a linear program over a fine grid finds the same error."""
    grid = np.geomspace(low, 1.0, 4001)
    error = value_of(tuple(t.minimax_quintic(low, 1.0)), grid) - 1
    worst = abs(error).max()
    turns = [sign for sign, group in itertools.groupby(np.sign(error[abs(error) > 0.999 * worst]))]
    assert turns == [-1, 1, -1, 1]
    columns = np.stack((grid, grid**3, grid**5, -np.ones_like(grid)), 1)
    mirrored = columns * [-1, -1, -1, 1]
    sides = np.concatenate((np.ones_like(grid), -np.ones_like(grid)))
    best = linprog([0, 0, 0, 1], np.concatenate((columns, mirrored)), sides, bounds=[(None, None)] * 4)
    assert worst == pytest.approx(best.fun, rel=1e-3, abs=1e-6)


def test_polar_express_is_the_best_of_each_step() -> None:
    """Without room for rounding, a step's image is the next one's interval, symmetric about 1, and quickly nothing."""
    polynomials = t.polar_express(5)
    x = np.geomspace(1e-3, 1.0, 4001)
    left = []
    for at, polynomial in enumerate(polynomials):
        margin = 1.01 if at + 1 < len(polynomials) else 1.0
        x = value_of(polynomial, x * margin)
        assert x.min() > 0 and x.max() == pytest.approx(2 - x.min(), abs=1e-4)
        left.append(x.min())
    assert left == sorted(left) and left[0] > 8e-3 and left[-1] > 0.87  # of 0.001 to begin with
    jordan = np.geomspace(1e-3, 1.0, 4001)
    for polynomial in FIVE:
        jordan = value_of(polynomial, jordan)
    assert abs(x - 1).max() < 0.13 < 0.25 < abs(jordan - 1).max()


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (96, 96)])
def test_polar_express_orthogonalizes(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(matrices(2, *shape), full_matrices=False)
    sizes = torch.logspace(0, -2, min(shape), dtype=torch.float64)  # in Frobenius norm the least is still above 1e-3
    x = (left * sizes) @ right
    values = torch.linalg.svdvals(t.orthogonalize(x, t.polar_express(5)))
    assert (values - 1).abs().max() < 0.13
    low = t.orthogonalize(x.float().bfloat16().float(), t.polar_express(5))
    assert (torch.linalg.svdvals(low) - 1).abs().max() < 0.15


# ---- Muon


@pytest.mark.parametrize("row_norm", [0, 1])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_against_one_matrix_at_a_time(row_norm: int, decay: float) -> None:
    trainer = Trainer(MUON_ROW_NORM=row_norm, MUON_WD=decay, MUON_BACKEND_STEPS=4, MATRIX_LR=0.03)
    want, buffers = trainer.latents(), dict.fromkeys(trainer.parameters, 0.0)
    assert len({trainer.parameters[name].shape for name in trainer.group("matrix")}) >= 3
    for step in range(6):
        rate, momentum = 1.0 - 0.1 * step, 0.8 + 0.02 * step
        grads = trainer.gradients(step)
        trainer.step(rate, momentum)
        for name in trainer.group("matrix"):
            buffers[name] = momentum * buffers[name] + grads[name]
            update = grads[name] + momentum * buffers[name]
            if row_norm:
                update = update / update.norm(dim=1, keepdim=True)
            update = t.orthogonalize(update[None], t.POLYNOMIALS["jordan"](4))[0]
            rows, columns = update.shape
            speed = 0.03 * rate
            want[name] = want[name] * (1 - speed * decay) - speed * max(1, rows / columns) ** 0.5 * update
    for name in trainer.group("matrix"):
        # rows of size 1e-4 feel the epsilon of the row norm
        torch.testing.assert_close(trainer.latent(name), want[name], rtol=1e-4, atol=1e-5)


def test_muon_points_where_torchs_muon_points() -> None:
    """torch.optim.Muon works in bf16 on one tensor: same direction and size, roughly."""
    trainer = Trainer(MUON_ROW_NORM=0, MATRIX_LR=0.5)
    names = trainer.group("matrix")
    twins = {name: torch.nn.Parameter(trainer.latent(name).clone()) for name in names}
    oracle = torch.optim.Muon(list(twins.values()), lr=0.5, weight_decay=0.0, momentum=0.9, adjust_lr_fn="original")
    for step in range(4):
        before = {name: (trainer.latent(name).clone(), twins[name].detach().clone()) for name in names}
        grads = trainer.gradients(step)
        for name in names:
            twins[name].grad = grads[name].clone()
        trainer.step(1.0, 0.9)
        oracle.step()
        for name in names:
            mine = trainer.latent(name) - before[name][0]
            theirs = twins[name].detach() - before[name][1]
            assert torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.995
            assert mine.norm() / theirs.norm() == pytest.approx(1, abs=0.05)


def test_muon_survives_zero_gradients() -> None:
    trainer = Trainer()
    before = trainer.latents()
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trainer.step()
    for name in trainer.group("matrix"):
        assert torch.equal(trainer.latent(name), before[name])


# ---- tables


TABLE = "embed.ngrams.weight"


def table_trainer(**variables: object) -> Trainer:
    orders = {"BIGRAM_HASH_BUCKETS": 11, "BIGRAM_HASH_DIM": 6, "BIGRAM_HASH_ORDERS": "2,3", "BIGRAM_HASH_LR": 0.2}
    return Trainer(**{**orders, **variables})


def sparse_rows(table: Tensor, seed: int) -> Tensor:
    """A gradient of a few rows, some met twice, as an embedding makes it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, table.shape[0], (1, 7), generator=generator)
    rows[0, 3] = rows[0, 0]
    values = torch.randn(7, table.shape[1], generator=generator, dtype=table.dtype) * 10.0**-seed
    return torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=True)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("sparse", [False, True])
def test_tables_take_steps_of_rowwise_adagrad(sparse: bool, clip: float) -> None:
    """A row moves by rate * g / sqrt(sum over steps of mean(g^2)), one without gradient not at all."""
    trainer = table_trainer(GRAD_CLIP_NORM=clip)
    table, want = trainer.parameters[TABLE], trainer.latent(TABLE).clone()
    total, met = torch.zeros(22, 1, dtype=torch.float64), set()
    for step in range(6):
        grads = trainer.gradients(step)
        grads[TABLE] = sparse_rows(table, step).to_dense()
        table.grad = sparse_rows(table, step) if sparse else grads[TABLE].clone()
        if clip:
            norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
            grads[TABLE] *= min(1.0, clip / (norm + 1e-6))
        trainer.step(rate=1.0 - 0.1 * step)
        met |= set(sparse_rows(table, step).coalesce().indices()[0].tolist())
        total += grads[TABLE].square().mean(1, keepdim=True)
        want -= 0.2 * (1.0 - 0.1 * step) * grads[TABLE] / (total.sqrt() + 1e-12)
        torch.testing.assert_close(trainer.latent(TABLE), want, rtol=1e-9, atol=1e-12)
        assert torch.equal(table, trainer.latent(TABLE).float().double()), "exact codec: float32 of the latent"
    assert 7 < len(met) < 22
    untouched = [row for row in range(22) if row not in met]
    assert torch.equal(trainer.latent(TABLE)[untouched], table_trainer().latent(TABLE)[untouched])


@pytest.mark.parametrize("codec", t.CODECS)
@pytest.mark.parametrize("fraction", [0.0, 0.7])
def test_parameters_of_moved_rows_are_those_of_the_whole_table(codec: str, fraction: float) -> None:
    """Quantizing only the rows that moved gives the bits of quantizing all, TERNARY_START_FRACTION or not."""
    early = {"TERNARY_START_FRACTION": fraction} if codec == "ternary" else {}
    trainer = table_trainer(FP_STORAGE=codec, GROUP_SIZE=2, PRECISION="fp32", **early)
    table, (bank, _) = trainer.parameters[TABLE], trainer.weights.where[TABLE]
    before = table.detach().clone()
    for step, progress in enumerate((0.2, 0.5, 0.8, 0.9)):
        trainer.gradients(step)
        table.grad = sparse_rows(table, step)
        trainer.step(progress=progress)
        found = table.detach().clone()
        bank.materialize(quantized=codec != "ternary" or progress >= fraction)
        assert torch.equal(found, table)
        assert not torch.equal(found, before)
        before = found


def test_embedding_makes_the_sparse_gradient_of_its_table() -> None:
    """Rows met in the batch and no others; the numbers of a whole gradient."""
    trainer = table_trainer()
    tokens = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(3))
    loss = trainer.model.loss(tokens, tokens.roll(-1, 1), t.Variant()).total
    loss.backward()
    grad = trainer.parameters[TABLE].grad
    assert grad is not None and grad.is_sparse
    rows, whole = trainer.model.embed.ngrams.rows(tokens, torch.full((2, 2), -1), t.BYTE_BOS)
    assert set(grad.coalesce().indices()[0].tolist()) == set(rows.flatten().tolist())
    step, at = 1e-6, int(rows[whole][0])
    with torch.no_grad():
        trainer.parameters[TABLE][at, 0] += step
    moved = trainer.model.loss(tokens, tokens.roll(-1, 1), t.Variant()).total
    assert float((moved - loss).detach() / step) == pytest.approx(float(grad.to_dense()[at, 0]), rel=1e-4)


# ---- AdamW


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("variables", [{}, {"TIE_EMBEDDINGS": 0}, {"UNTIE_AT_FRACTION": 0.5, "VALUE_RESIDUAL": 1}])
def test_adamw_is_torchs(decay: float, variables: dict[str, object]) -> None:
    """Ten steps with changing rates; some weights lack a gradient at some steps, the head until the fourth."""
    trainer = Trainer(ADAM_WD=decay, BETA1=0.8, BETA2=0.97, ADAM_EPS=1e-6, **variables)
    names = trainer.group("embed", "head", "scalar")
    rates, roles = group_rates(trainer), trainer.roles
    twins = {name: torch.nn.Parameter(trainer.latent(name).clone()) for name in names}
    groups = [{"params": [twins[n]], "lr": 0.0, "weight_decay": decay * roles[n].decay} for n in names]
    oracle = torch.optim.AdamW(groups, betas=(0.8, 0.97), eps=1e-6)
    for step in range(10):
        absent = tuple(n for i, n in enumerate(names) if (step < 4 if n == "head.weight" else (step + i) % 5 == 3))
        grads, scale = trainer.gradients(step, absent), 1 / (1 + step)
        for name, group in zip(names, oracle.param_groups, strict=True):
            twins[name].grad = grads[name].clone() if name in grads else None
            group["lr"] = scale * rates[roles[name].group] * roles[name].lr_mult
        trainer.step(scale)
        oracle.step()
        for name in names:
            torch.testing.assert_close(
                trainer.latent(name),
                twins[name].detach(),
                rtol=1e-12,
                atol=1e-13,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_rates_follow_the_groups() -> None:
    rates = {"MATRIX_LR": 0.1, "SCALAR_LR": 0.2, "EMBED_LR": 0.3, "HEAD_LR": 0.4, "TIED_EMBED_LR": 0.5}
    tied, untied = group_rates(Trainer(**rates)), group_rates(Trainer(**rates, TIE_EMBEDDINGS=0))
    assert tied == {"matrix": 0.1, "scalar": 0.2, "embed": 0.5} | ({"head": 0.4} if "head" in tied else {})
    assert untied == {"matrix": 0.1, "scalar": 0.2, "embed": 0.3, "head": 0.4}


def test_tables_taper_off_and_nothing_else_does() -> None:
    moves = []
    for start, progress in ((1.0, 0.75), (0.5, 0.5), (0.5, 0.75), (0.5, 1.0)):
        trainer = Trainer(BIGRAM_HASH_BUCKETS=50, BIGRAM_HASH_DIM=8, ENGRAM_TAPER_START=start)
        before = trainer.latents()
        trainer.gradients(1)
        trainer.step(progress=progress)
        tables = [name for name, role in trainer.roles.items() if role.group == "table"]
        assert tables
        moves.append({name: trainer.latent(name) - old for name, old in before.items()})
    for name, move in moves[0].items():
        for other, share in zip(moves[1:], (1.0, 0.5, 0.0) if name in tables else (1.0, 1.0, 1.0), strict=True):
            torch.testing.assert_close(other[name], share * move, rtol=1e-12, atol=0)


def test_decay_of_matrices_tapers_off_and_nothing_else_does() -> None:
    """What a step without gradient takes off a matrix, by progress."""
    trainer = Trainer(MUON_WD=0.5, MUON_WD_TAPER_START=0.6, ADAM_WD=0.5)
    matrix, embed = trainer.group("matrix")[0], "embed.weight"
    kept = {}
    for progress in (0.2, 0.6, 0.9, 1.0):
        for name in (matrix, embed):
            trainer.parameters[name].grad = torch.zeros_like(trainer.latent(name))
        before = [trainer.latent(name).clone() for name in (matrix, embed)]
        trainer.step(progress=progress)
        moved = [trainer.latent(name) / old for name, old in zip((matrix, embed), before, strict=True)]
        kept[progress] = [float(part.nanmedian()) for part in moved]
    rates = group_rates(trainer)
    for progress, share in ((0.2, 1.0), (0.6, 1.0), (0.9, 0.25), (1.0, 0.0)):
        want = 1 - 0.5 * rates["matrix"] * share, 1 - 0.5 * rates["embed"]
        assert kept[progress] == pytest.approx(want, rel=1e-5)


def test_scalars_do_not_decay_but_matrices_and_embeddings_do() -> None:
    trainer = Trainer(ADAM_WD=0.5, MUON_WD=0.5)
    before = trainer.latents()
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trainer.step()
    for name, role in trainer.roles.items():
        shrinks = 1.0 if role.group == "scalar" else 1 - trainer.optimizer.groups[role.group].rate * 0.5
        torch.testing.assert_close(trainer.latent(name), before[name] * shrinks, rtol=1e-12, atol=1e-14)


# ---- weights without a gradient


def states_of(trainer: Trainer, name: str) -> list[tuple[str, Tensor]]:
    bank, index = trainer.weights.where[name]
    return [(key, value[index].clone()) for key, value in sorted(bank.state.items())]


def test_weights_without_a_gradient_rest() -> None:
    """No decay, no momentum, no count, although their bank mates move; afterwards they go on as if nothing had been."""
    trainer = Trainer(ADAM_WD=0.2, MUON_WD=0.2, VALUE_RESIDUAL=1)
    resting = ("blocks.1.attn.qkv.weight", "blocks.2.mlp.down.weight", "blocks.1.attn.q_gain", "blocks.2.attn.v_mix")
    for name in resting:
        bank, _ = trainer.weights.where[name]
        assert len(bank.names) > 1, "the case needs bank mates"
    trainer.gradients(0)
    trainer.step()
    latents, states = trainer.latents(), {name: states_of(trainer, name) for name in resting}
    for seed in (1, 2, 3):
        trainer.gradients(seed, resting)
        trainer.step()
    for name, parameter in trainer.parameters.items():
        moved = not torch.equal(trainer.latent(name), latents[name])
        assert moved == (name not in resting), f"{name} {'moved' if moved else 'rested'}"
        if name in resting:
            assert torch.equal(parameter, latents[name].float().double())
            for (key, now), (_, then) in zip(states_of(trainer, name), states[name], strict=True):
                assert torch.equal(now, then), f"{key} of {name} changed without a gradient"


def test_weight_has_a_gradient_if_it_has_one_on_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduction of one of two ranks, the other's part being made up: sums, and the same weights move on both."""
    names = ("embed.weight", "blocks.0.mlp.up.weight", "blocks.1.attn.qkv.weight")
    mine, other = Trainer(), Trainer()
    grads = mine.gradients(0, without=(names[0], names[2])), other.gradients(1, without=(names[1], names[2]))
    sent = [bank.gradient() for bank in other.weights.banks.values()]
    received = iter([*(grad for grad, _ in sent), torch.cat([has.flatten() for _, has in sent]).to(torch.int32)])

    def all_reduce(part: Tensor, op: object = t.dist.ReduceOp.SUM, async_op: bool = False) -> SimpleNamespace:
        part.copy_(torch.maximum(part, next(received)) if op == t.dist.ReduceOp.MAX else part + next(received))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(t.dist, "all_reduce", all_reduce)
    reduced = mine.optimizer.reduced([bank.gradient() for bank in mine.weights.banks.values()])
    found = dict(zip(mine.weights.banks, reduced, strict=True))
    for key, bank in mine.weights.banks.items():
        for i, name in enumerate(bank.names):
            parts = [rank[name] for rank in grads if name in rank]
            assert bool(found[key][1].flatten()[i]) == bool(parts) == (name != names[2])
            assert torch.equal(found[key][0][i], sum(parts, torch.zeros_like(bank.latent[i])))


# ---- the law: parameters are decoded codes of their latents


@pytest.mark.parametrize("codec", t.CODECS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_parameters_are_the_decoded_codes_of_their_latents(codec: str, precision: str) -> None:
    trainer = Trainer(PRECISION=precision, MATRIX_CODEC=codec, FP_STORAGE=codec, SCALAR_CODEC=codec, GROUP_SIZE=12)
    for step in range(3):
        trainer.gradients(step)
        trainer.step()
        for bank in trainer.weights.banks.values():
            value = bank.codec.decode(bank.codec.quantize(bank.latent, bank.tuning))
            for i, parameter in enumerate(bank.parameters):
                assert torch.equal(parameter, value[i].to(parameter.dtype))
                if codec != "exact":
                    assert not torch.equal(parameter, bank.latent[i]), "nothing was quantized"


def test_tuning_reaches_the_parameters() -> None:
    trainer = Trainer(MATRIX_CODEC="ternary")
    bank, index = trainer.weights.where["blocks.1.mlp.up.weight"]
    trainer.weights.materialize(1.0)
    plain = [parameter.detach().clone() for parameter in bank.parameters]
    bank.tuning.multiplier[index] = 2.0
    trainer.weights.materialize(1.0)
    for i, parameter in enumerate(bank.parameters):
        torch.testing.assert_close(parameter, plain[i] * (2.0 if i == index else 1.0), rtol=2**-7, atol=0)


def test_large_bank_is_quantized_in_parts_that_keep_their_places() -> None:
    """Beyond 2M weights a bank is coded part by part: each weight with its own tuning, under its own name."""
    generator, names = torch.Generator().manual_seed(0), ["a", "b", "c"]
    parameters = [torch.nn.Parameter(torch.randn(2, 2**19, generator=generator)) for _ in names]
    h, weights = schedule(GROUP_SIZE=2**19), Trainer().weights
    bank = t.Bank(h, t.Role("int8", "matrix"), names, parameters)
    bank.tuning.multiplier[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0])
    weights.banks = {"large": bank}
    weights.materialize(1.0)
    assert [at for at, _ in bank.coded()] == [0, 2]
    for i, (coded, parameter) in enumerate(zip(t.coded_tensors(weights), parameters, strict=True)):
        alone = fake_quantize(bank.codec, bank.latent[i], t.Tuning(torch.tensor(0.5), torch.tensor(2.0**i)))
        assert coded.name == names[i] and torch.equal(parameter, alone)
        assert (bank.codec.decode_numpy(coded.codes, coded.scales) == alone.numpy()).all()


def test_ternary_weights_are_float_until_their_start() -> None:
    trainer = Trainer(MATRIX_CODEC="ternary", FP_STORAGE="bf16", TERNARY_START_FRACTION=0.4, GROUP_SIZE=64)
    for progress, floating in ((0.0, True), (0.39, True), (0.4, False), (1.0, False)):
        trainer.gradients(0)
        trainer.step(progress=progress)
        for name, parameter in trainer.parameters.items():
            bank, index = trainer.weights.where[name]
            same = torch.equal(parameter, trainer.latent(name))
            if bank.role.codec == "ternary":
                assert same == floating, f"{name} at progress {progress}"
                assert floating or parameter[0].unique().numel() <= 3
            elif bank.role.codec == "bf16":
                assert torch.equal(parameter, trainer.latent(name).bfloat16().double())


# ---- running average


def test_average_is_the_running_mean_of_latents() -> None:
    trainer, want = Trainer(EMA_DECAY=0.75), None
    for step in range(5):
        trainer.gradients(step)
        trainer.step(average=step >= 2)
        if step == 2:
            want = trainer.latents()
        elif want is not None:
            want = {name: 0.75 * want[name] + 0.25 * latent for name, latent in trainer.latents().items()}
        else:
            assert not trainer.weights.swap_average(), "there is no average before its start"
    assert want is not None and trainer.weights.swap_average()
    for name, latent in trainer.latents().items():
        torch.testing.assert_close(latent, want[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("codec", ["ternary", "bf16"])
def test_swapping_the_average_twice_restores_every_bit(codec: str) -> None:
    trainer = Trainer(EMA_DECAY=0.9, MATRIX_CODEC=codec)
    for step in range(3):
        trainer.gradients(step)
        trainer.step(average=True)
    before = trainer.latents(), {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    states = {name: states_of(trainer, name) for name in trainer.parameters}
    assert trainer.weights.swap_average()
    trainer.weights.materialize(1.0)
    swapped = trainer.latents()
    assert all(not torch.equal(swapped[name], before[0][name]) for name in swapped)
    trainer.weights.swap_average()
    trainer.weights.materialize(1.0)
    for name, parameter in trainer.parameters.items():
        assert torch.equal(trainer.latent(name), before[0][name])
        assert torch.equal(parameter, before[1][name])
        assert all(torch.equal(a[1], b[1]) for a, b in zip(states_of(trainer, name), states[name], strict=True))


# ---- clipping


@pytest.mark.parametrize("limit", [0.01, 1.0, 1e6])
def test_clipping_is_torchs(limit: float) -> None:
    """Over all groups together: seen in the first moments after one step, which are the gradients themselves."""
    trainer = Trainer(GRAD_CLIP_NORM=limit, BETA1=0.9)
    grads = trainer.gradients(0)
    twins = [torch.nn.Parameter(grad) for grad in grads.values()]
    for twin in twins:
        twin.grad = twin.detach().clone()
    torch.nn.utils.clip_grad_norm_(twins, limit)
    trainer.step()
    for name, twin in zip(grads, twins, strict=True):
        bank, index = trainer.weights.where[name]
        matrix = bank.role.group == "matrix"
        found = bank.state["momentum"][index] if matrix else bank.state["first"][index] / (1 - 0.9)
        torch.testing.assert_close(found, twin.grad, rtol=1e-9, atol=1e-14)


def test_clipping_counts_only_gradients_that_exist() -> None:
    trainer = Trainer(GRAD_CLIP_NORM=1.0)
    grads = trainer.gradients(0, without=("embed.weight",))
    trainer.step()
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    bank, index = trainer.weights.where["blocks.0.mlp.up.weight"]
    torch.testing.assert_close(
        bank.state["momentum"][index], grads["blocks.0.mlp.up.weight"] / norm, rtol=1e-5, atol=1e-12
    )


# ---- schedules, at points worked out by hand


def schedule(**variables: object) -> t.Hyperparameters:
    base = {"ITERATIONS": 100, "MAX_WALLCLOCK_SECONDS": 0}
    return t.load_config({name: str(value) for name, value in {**base, **variables}.items()})


@pytest.mark.parametrize(
    ("iterations", "limit", "step", "seconds", "want"),
    [
        (100, 0, 0, 0, 0.0),
        (100, 0, 25, 1e9, 0.25),
        (100, 0, 100, 0, 1.0),
        (100, 0, 130, 0, 1.0),
        (0, 600, 10**6, 150, 0.25),
        (0, 600, 0, 700, 1.0),
        (100, 600, 50, 60, 0.5),  # steps are further
        (100, 600, 5, 300, 0.5),  # the clock is further
    ],
)
def test_progress(iterations: int, limit: float, step: int, seconds: float, want: float) -> None:
    h = schedule(ITERATIONS=iterations, MAX_WALLCLOCK_SECONDS=limit)
    assert t.progress_of(h, step, seconds) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("variables", "points"),
    [
        ({"WARMDOWN_FRACTION": 0.5}, {0: 1, 49: 1, 50: 1, 75: 0.5, 99: 0.02, 100: 0, 120: 0}),
        ({"WARMDOWN_FRACTION": 0.5, "LR_FLOOR": 0.2}, {50: 1, 75: 0.6, 100: 0.2, 150: 0.2}),
        ({"WARMDOWN_FRACTION": 1, "LR_FLOOR": 0.1}, {0: 1, 50: 0.55, 100: 0.1}),
        ({"LR_WARMUP_FRACTION": 0.1, "WARMDOWN_FRACTION": 0.2}, {0: 0, 5: 0.5, 10: 1, 80: 1, 90: 0.5, 100: 0}),
        ({"LR_WARMUP_FRACTION": 0.8, "WARMDOWN_FRACTION": 0.5}, {40: 0.5, 60: 0.75, 65: 0.7, 80: 0.4, 90: 0.2}),
        ({"WARMDOWN_ITERS": 20}, {0: 1, 79: 1, 80: 1, 90: 0.5, 99: 0.05, 100: 0, 110: 0}),
        ({"WARMDOWN_ITERS": 20, "LR_FLOOR": 0.5}, {80: 1, 90: 0.75, 100: 0.5, 110: 0.5}),
        ({"WARMDOWN_ITERS": 200}, {0: 0.5, 50: 0.25, 100: 0}),
        ({"WARMDOWN_FRACTION": 0, "LR_FLOOR": 0.3}, {0: 1, 50: 1, 99: 1, 100: 0.3, 110: 0.3}),
    ],
)
def test_rates_by_steps(variables: dict[str, object], points: dict[int, float]) -> None:
    """Extension steps, from 100 on, run at the floor rate."""
    h = schedule(**variables, EXTENSION_STEPS=50)
    for step, want in points.items():
        assert t.rate_scale(h, step, 0.0) == pytest.approx(want, abs=1e-6), f"step {step}"


@pytest.mark.parametrize(
    ("variables", "points"),
    [
        ({"WARMDOWN_FRACTION": 0.25}, {(10, 0): 1, (10, 150): 1, (20, 175): 0.5, (30, 200): 0, (30, 210): 0}),
        # 2 s a step: the last 20 steps begin at 160 s; 4 s a step: at 120 s
        (
            {"WARMDOWN_ITERS": 20},
            {(0, 0): 1, (80, 160): 1, (90, 180): 0.5, (30, 120): 1, (40, 160): 0.5, (101, 202): 0},
        ),
    ],
)
def test_rates_by_the_clock(variables: dict[str, object], points: dict[tuple[int, float], float]) -> None:
    h = schedule(ITERATIONS=0, MAX_WALLCLOCK_SECONDS=200, **variables)
    for (step, seconds), want in points.items():
        assert t.rate_scale(h, step, seconds) == pytest.approx(want, abs=1e-6), f"step {step} at {seconds} s"


def test_warmdown_by_iterations_obeys_whichever_bound_comes_first() -> None:
    h = schedule(ITERATIONS=100, MAX_WALLCLOCK_SECONDS=200, WARMDOWN_ITERS=20)
    assert t.rate_scale(h, 90, 90.0) == pytest.approx(0.5)  # ten steps left, 110 of them by the clock
    assert t.rate_scale(h, 40, 160.0) == pytest.approx(0.5)  # ten left by the clock, sixty by steps


SCHEDULES: list[dict[str, object]] = [
    {"WARMDOWN_FRACTION": 0.5},
    {"WARMDOWN_FRACTION": 0.3, "LR_WARMUP_FRACTION": 0.2, "LR_FLOOR": 0.1},
    {"WARMDOWN_FRACTION": 1, "LR_WARMUP_FRACTION": 1, "LR_FLOOR": 1},
    {"WARMDOWN_ITERS": 300},
    {"WARMDOWN_ITERS": 300, "LR_WARMUP_FRACTION": 0.05, "LR_FLOOR": 0.5},
]


@pytest.mark.parametrize("timed", [False, True], ids=["by steps", "by clock"])
@pytest.mark.parametrize("variables", SCHEDULES, ids=str)
def test_rates_never_jump_and_never_leave_their_range(variables: dict[str, object], timed: bool) -> None:
    limits = {"ITERATIONS": 0, "MAX_WALLCLOCK_SECONDS": 100} if timed else {"ITERATIONS": 1000, "EXTENSION_STEPS": 99}
    h = schedule(**{**limits, **variables})
    rates = [t.rate_scale(h, step, step * 0.1) for step in range(1100)]
    assert all(0 <= rate <= 1 for rate in rates)
    steepest = max(0.001 / (h.lr_warmup_fraction or 1), 1 / (h.warmdown_iters or 1000 * h.warmdown_fraction))
    assert max(abs(a - b) for a, b in zip(rates[1:], rates[:-1], strict=True)) <= steepest * 1.01 + 1e-9
    assert rates[1000:] == [pytest.approx(min(1.0, h.lr_floor), abs=1e-9)] * 100


@pytest.mark.parametrize(("steps", "points"), [(10, {0: 0.8, 5: 0.85, 10: 0.9, 99: 0.9}), (0, {0: 0.9, 7: 0.9})])
def test_muon_momentum_rises_over_its_first_steps(steps: int, points: dict[int, float]) -> None:
    h = schedule(MUON_MOMENTUM=0.9, MUON_MOMENTUM_WARMUP_START=0.8, MUON_MOMENTUM_WARMUP_STEPS=steps)
    assert {step: pytest.approx(want) for step, want in points.items()} == {
        step: t.muon_momentum(h, step) for step in points
    }


def test_batch_stages() -> None:
    h = schedule(BATCH_STAGES="0:1024,0.25:4096,0.5:2048", TRAIN_SEQ_LEN=1024)
    found = [t.stage_at(h.stages, progress) for progress in (0.0, 0.2499, 0.25, 0.49, 0.5, 1.0)]
    assert found == [1024, 1024, 4096, 4096, 2048, 2048]
    assert t.stage_at(schedule(TRAIN_BATCH_TOKENS=8192).stages, 0.7) == 8192


# ---- it trains


def test_a_few_steps_lower_the_loss() -> None:
    """The whole chain on one batch; a wrong sign anywhere would raise it."""
    h = config(PRECISION="fp32", MATRIX_CODEC="ternary", GROUP_SIZE=16)
    rt = t.start_runtime(h)
    model = t.build_model(h, rt, t.BYTE_BOS)
    weights = t.Weights(model)
    weights.materialize(0.0)
    optimizer, losses = t.Optimizer(h, rt, weights), []
    tokens = torch.randint(0, 255, (4, 33), generator=torch.Generator().manual_seed(0))
    for _ in range(25):
        out = model.loss(tokens[:, :-1], tokens[:, 1:], t.Variant())
        losses.append(out.total.item() / 128)
        (out.total / 128).backward()
        optimizer.step(1.0, 0.9, False, 1.0)
        weights.clear_gradients()
    assert losses[0] == pytest.approx(math.log(256), abs=0.1) and losses[-1] < losses[0] - 1.5
