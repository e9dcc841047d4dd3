"""The shape of train_gpt.py itself: order of sections, nothing unread, no dynamic tricks, bounds on functions."""

from __future__ import annotations

import ast
import dis
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, small_stages

import train_gpt as t

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
FIRST, SECOND = "CONFIG RUNTIME DATA CODECS LAYERS MIXERS RESIDUAL MEMORY", "MODEL OPTIMIZERS ARTIFACT EVALUATION"
SECTIONS = [*FIRST.split(), *SECOND.split(), "CHECKPOINT", "TRAINING", "MAIN"]
BANNER = re.compile(r"# ==== (\d+)\. ([A-Z]+) =+")
BANNERS = [(number, match) for number, line in enumerate(LINES, 1) if (match := BANNER.fullmatch(line))]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def section_of(line: int) -> int:
    """Number of the section that holds a line; 0 for the head of the file."""
    return sum(start <= line for start, _ in BANNERS)


def functions() -> list[Function]:
    return [node for node in ast.walk(TREE) if isinstance(node, Function)]


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def place(node: ast.AST) -> str:
    return f"train_gpt.py:{node.lineno}"  # type: ignore[attr-defined]


# ---- sections ----


def test_sections_stand_in_order_under_their_banners() -> None:
    assert [match[2] for _, match in BANNERS] == SECTIONS
    assert [int(match[1]) for _, match in BANNERS] == list(range(1, 16))
    listed = re.findall(r"(\d+) ([A-Z]+)", (t.__doc__ or "").split("Sections:")[1])
    assert listed == [(match[1], match[2]) for _, match in BANNERS]


def test_every_section_says_what_it_gives_and_needs() -> None:
    for start, match in BANNERS:
        head = list[str]()
        while LINES[start + len(head)].startswith("#"):
            head.append(LINES[start + len(head)])
        text = " ".join(line.lstrip("# ") for line in head)
        assert text.startswith("Gives:"), match[2]
        assert "Needs:" in text or match[2] == "TRAINING", match[2]


def defined_names() -> dict[str, int]:
    """Module-level name -> line of its first definition."""
    found: dict[str, int] = {}
    for node in TREE.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.ClassDef | Function):
            found.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for name in (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)):
            found.setdefault(name.id, node.lineno)
    return found


def global_reads(code: CodeType) -> Iterator[tuple[str, int]]:
    """(name, line) of each global name that some code reads; annotations are text and read nothing."""
    lines = {offset: line for start, end, line in code.co_lines() for offset in range(start, end, 2)}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            yield instruction.argval, lines.get(instruction.offset) or code.co_firstlineno
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from global_reads(constant)


def test_no_section_uses_what_a_later_one_defines() -> None:
    defined = defined_names()
    assert len(defined) > 150 and {"load_config", "CODECS", "GPT", "main"} <= set(defined)
    reads = [(name, line) for name, line in global_reads(compile(SOURCE, "train_gpt.py", "exec")) if name in defined]
    assert len(reads) > 300
    wrong = {
        f"line {line} in section {section_of(line)} uses {name} of section {section_of(defined[name])}"
        for name, line in reads
        if section_of(defined[name]) > section_of(line)
    }
    assert not wrong, sorted(wrong)


# ---- everything is read, nothing is dynamic ----

# Read by name before a Hyperparameters exists: load_config takes them from the environment's texts.
READ_AS_TEXT = {"preset", "env_file"}


def config_reads() -> Iterator[str]:
    """Attributes read of a configuration: h.x, something.h.x, and self.x in Hyperparameters' own properties."""
    skipped = {"validate"}  # checking a value is not using it
    for node in TREE.body:
        own = isinstance(node, ast.ClassDef) and node.name == "Hyperparameters"
        if isinstance(node, Function) and node.name in skipped:
            continue
        parts = [n for n in node.body if isinstance(n, Function)] if own else [node]  # type: ignore[attr-defined]
        for read in (n for part in parts for n in ast.walk(part) if isinstance(n, ast.Attribute)):
            base = read.value
            named = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
            if named == "h" or (own and named == "self"):
                yield read.attr


def test_every_variable_is_read_somewhere() -> None:
    fields = {spec.name for spec in t.FIELDS.values()}
    unread = fields - set(config_reads()) - READ_AS_TEXT
    assert not unread, f"declared and never read: {sorted(unread)}"


def test_every_module_level_name_is_used() -> None:
    """By something else than its own definition."""
    used = set()
    for node in TREE.body:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        used |= names - {node.name} if isinstance(node, ast.ClassDef | Function) else names
    unused = set(defined_names()) - used
    assert not unused, f"defined and never used: {sorted(unused)}"


def calls(*names: str) -> list[ast.Call]:
    return [
        n for n in ast.walk(TREE) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names
    ]


def test_no_evaluated_code_and_no_namespace_tricks() -> None:
    """Each of these also stops the minifier from renaming anything."""
    found = calls("eval", "exec", "vars", "globals", "locals", "__import__", "compile", "dir", "delattr")
    assert not found, [place(call) for call in found]


# (function, attribute) -> why no plain attribute does
DYNAMIC: dict[tuple[Any, ...], str] = {
    ("hasattr", "_fields"): "tells a NamedTuple from a tuple in a state's structure",
    ("getattr", "get_capabilities"): "is missing from older versions of torch",
    ("hasattr", "grouped_mm"): "is missing from older versions of torch",
}


def test_attributes_are_not_looked_up_by_text() -> None:
    for call in calls("getattr", "setattr", "hasattr"):
        text = call.args[1]
        known = isinstance(text, ast.Constant) and (call.func.id, text.value) in DYNAMIC  # type: ignore[attr-defined]
        assert known, f"{place(call)}: {ast.unparse(call)}"


CHANGERS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "clear", "sort"}


def test_no_mutable_globals() -> None:
    """None is bound anew, and no list, dictionary or set of the module is changed in place."""
    found = [place(node) for node in ast.walk(TREE) if isinstance(node, ast.Global)]
    held = [n.value for n in ast.walk(TREE) if isinstance(n, ast.Subscript) and not isinstance(n.ctx, ast.Load)]
    held += [n.value for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr in CHANGERS]
    found += [place(n) for n in held if isinstance(n, ast.Name) and n.id in defined_names()]
    assert not found, found


def writes(node: ast.AST) -> list[ast.Attribute]:
    """Attributes that a piece of code assigns to."""
    return [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]


def test_attributes_of_layers_are_set_when_they_are_built() -> None:
    """What a forward pass leaves travels in its result, and nothing is put into the model from outside."""
    layers, found = {"Module"}, []
    for node in (n for n in TREE.body if isinstance(n, ast.ClassDef)):  # a class stands below its base
        if layers & {base.id for base in node.bases if isinstance(base, ast.Name)}:
            layers.add(node.name)
            methods = [
                part for part in node.body if isinstance(part, Function) and part.name not in ("__init__", "build")
            ]
            found += [w for method in methods for w in writes(method) if ast.unparse(w.value) == "self"]
    assert {"GPT", "Attention", "ManifoldConnections"} < layers
    found += [w for w in writes(TREE) if ast.unparse(w.value).split(".")[-1] == "model"]
    assert not found, [place(write) for write in found]


def test_no_broad_except() -> None:
    for handler in (n for n in ast.walk(TREE) if isinstance(n, ast.ExceptHandler)):
        assert handler.type is not None, f"{place(handler)}: bare except"
        names = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}
        assert not names & {"Exception", "BaseException"}, f"{place(handler)}: {ast.unparse(handler.type)}"
    assert not {Exception, BaseException} & set(t.MALFORMED)


def test_environment_is_read_in_config_runtime_and_main_only() -> None:
    reads = [n for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv", "environb")]
    assert reads
    for read in reads:
        assert section_of(read.lineno) in (1, 2, 15), place(read)


def test_only_the_log_and_the_command_line_print() -> None:
    for call in calls("print"):
        assert section_of(call.lineno) in (1, 15), place(call)
    streams = [n for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr in ("stdout", "stderr")]
    for stream in streams:
        assert section_of(stream.lineno) in (1, 2, 15), place(stream)


def test_forward_passes_do_not_wait_for_numbers() -> None:
    """A number that leaves the device stalls the queue and breaks the graph, but inside a custom operator."""
    operators = [node for node in functions() if any("custom_op" in ast.unparse(d) for d in node.decorator_list)]
    hidden = {id(n) for operator in operators for n in ast.walk(operator)}
    for node in (n for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.attr in ("item", "tolist", "numpy")):
        model = 5 <= section_of(node.lineno) <= 9
        assert not model or id(node) in hidden, f"{place(node)}: {ast.unparse(node)}"


# ---- everything is explained ----


def test_classes_and_functions_say_what_they_are() -> None:
    """But for entries of tables, which their table explains, and what is hardly longer than its name."""
    tables = [n.value for n in TREE.body if isinstance(n, ast.Assign | ast.AnnAssign) and isinstance(n.value, ast.Dict)]
    entries = {n.id for table in tables for n in ast.walk(table) if isinstance(n, ast.Name)}
    for node in TREE.body:
        if isinstance(node, ast.ClassDef) or (isinstance(node, Function) and length(node) > 2):
            assert ast.get_docstring(node) or node.name in entries, f"{place(node)}: {node.name} has no docstring"


def test_everything_is_annotated() -> None:
    """But for Triton's kernels, whose language has no such names."""
    kernels = [node for node in functions() if [d for d in node.decorator_list if ast.unparse(d) == "triton.jit"]]
    for node in (node for node in functions() if node not in kernels):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare and node.returns is not None, f"{place(node)}: {node.name} {bare}"


# ---- bounds ----


def test_file_and_lines_stay_within_bounds() -> None:
    assert len(LINES) <= 11_700
    long = [number for number, line in enumerate(LINES, 1) if len(line) > 120]
    assert not long, long


def test_functions_stay_short() -> None:
    lengths = sorted(length(node) for node in functions())
    assert lengths[len(lengths) // 2] <= 15
    assert sum(size < 30 for size in lengths) >= 0.9 * len(lengths), "nine in ten are under 30 lines"
    code = sum(1 for line in LINES if line.strip())
    longest = {node.name: length(node) for node in functions() if length(node) > 50}
    assert sum(longest.values()) <= 0.1 * code, longest
    assert all(length(node) <= 25 for node in functions() if node.name == "forward"), "forward reads like an equation"


def test_no_block_is_repeated() -> None:
    """Six lines of code that stand in two places will differ one day."""
    code = [(number, line.strip()) for number, line in enumerate(LINES, 1)]
    code = [(number, line) for number, line in code if line and not line.startswith("#")]
    first: dict[tuple[str, ...], int] = {}
    for i, (number, _) in enumerate(code[:-5]):
        block = tuple(line for _, line in code[i : i + 6])
        assert first.setdefault(block, number) == number, f"lines from {first[block]} and {number} on are the same"


def depth(node: ast.AST) -> int:
    """Deepest nesting of blocks below a node; an elif is no deeper than its if."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.AsyncFor, ast.AsyncWith)
    deepest = 0
    for child in ast.iter_child_nodes(node):
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, blocks) and not chained))
    return deepest


def test_functions_are_flat() -> None:
    deep = {node.name: depth(node) for node in functions() if depth(node) > 3}
    assert not deep, deep


def test_functions_take_few_arguments() -> None:
    def count(node: Function) -> int:
        given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return len([name for name in given if name not in ("self", "cls")])

    many = {node.name: count(node) for node in functions() if count(node) > 8 and not node.name.endswith("_kernel")}
    assert not many, many


def test_every_argument_is_used() -> None:
    """An argument that an interface demands but a function has no use for is listed here with its interface."""
    interfaces = {
        "forward": "layers and autograd functions",
        "backward": "autograd functions",
        "setup_context": "autograd functions",
        "__torch_dispatch__": "modes of dispatch",
        **dict.fromkeys(
            ("build", "open", "prepare", "read", "gather", "write", "spread", "close", "measured"),
            "residual topologies",
        ),
        **dict.fromkeys(("begin", "lora", "weights", "wrap", "learn", "memory", "work", "merge"), "adapters"),
        **dict.fromkeys(("quantize", "decode", "decode_numpy", "scale_shape"), "codecs"),
        **dict.fromkeys(("__init__", "init_state"), "sites are built and started alike"),
        **dict.fromkeys((f.__name__ for f in t.BATCH_MODES.values()), "batch modes"),
    }
    for node in functions():
        if node.name in interfaces:
            continue
        arguments = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)} - {"self", "cls", "_"}
        used = {n.id for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name)}
        assert arguments <= used, f"{place(node)}: {node.name} never reads {sorted(arguments - used)}"


def test_no_autograd_function_gives_out_what_it_changed_in_place() -> None:
    """Compiled by torch 2.11, such a function's gradient is zero (records/2026-11-26_h200)."""
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef) and node.name.endswith("Function")]
    forwards = [part for node in classes for part in node.body if isinstance(part, Function) and part.name == "forward"]
    assert len(forwards) > 3
    for node in (inner for outer in forwards for inner in ast.walk(outer) if isinstance(inner, ast.Return)):
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for value in values:
            call = value.func if isinstance(value, ast.Call) else None
            assert not (isinstance(call, ast.Attribute) and call.attr.endswith("_")), place(node)


# ---- used() ----

REGISTRIES: dict[str, dict[str, Any]] = {
    "ROLE_KINDS": t.ROLE_KINDS,
    "GROUPS": t.GROUPS,
    "RULES": t.RULES,
    "POLYNOMIALS": t.POLYNOMIALS,
    "CODECS": t.CODECS,
    "STREAM_TYPES": t.STREAM_TYPES,
    "STREAM_PACKINGS": t.STREAM_PACKINGS,
    "CONTEXT_STREAMS": t.CONTEXT_STREAMS,
    "PACKINGS": t.PACKINGS,
    "ACTIVATIONS": t.ACTIVATIONS,
    "SITE_KINDS": t.SITE_KINDS,
    "RESIDUALS": t.RESIDUALS,
    "BATCH_MODES": t.BATCH_MODES,
    "ATTENTION": t.ATTENTION,
    "NSA_BACKENDS": t.NSA_BACKENDS,
    "ADAPTERS": t.ADAPTERS,
}
# A small job of any preset: structure and codecs stay the preset's, sizes do not.
SMALL = {
    "NUM_LAYERS": "2",
    "MODEL_DIM": "48",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "PARTIAL_ROPE_DIMS": "0",
    "CAPSULE_DIM": "8",
    "ENGRAM_INJECT_LAYER": "0",
    "BACKOUT": "0",
    "VOCAB_SIZE": "256",
    "TRAIN_SEQ_LEN": "16",
    "SKC_BLOCK_SIZE": "4",
    "NSA_BLOCK": "4",
    "NSA_STRIDE": "2",
    "NSA_SELECT_BLOCK": "4",
    "TRAIN_BATCH_TOKENS": "64",
    "MICRO_BATCH_TOKENS": "32",
    "HOLDOUT_TOKENS": "200",
    "MAX_VAL_TOKENS": "200",
    "DEVICE": "cpu",
    "COMPILE": "0",
}
CHOICES = [{"PRESET": name, **small_stages(name)} for name in t.PRESETS]
variable: str
registry: dict[str, Any]
for variable, registry in (("MATRIX_CODEC", t.CODECS), ("FP_STORAGE", t.CODECS), ("MLP_ACT", t.ACTIVATIONS)):
    CHOICES += [{variable: entry} for entry in registry]
for variable, registry in (("RESIDUAL", t.RESIDUALS), ("BATCH_MODE", t.BATCH_MODES)):
    CHOICES += [{variable: entry} for entry in registry]
SKC = {"CAPSULE_DIM": "8", "CAPSULE_NUM": "3", "SKC_BLOCK_SIZE": "4"}
CHOICES += [{"LAYER_PATTERN": pattern, **SKC} for pattern in (*t.MIXER_LETTERS, *t.PATTERNS)]
CHOICES += [{"CAPSULE_BANK": "1", "FEEDBACK_PASSES": "1", **SKC}, {"FEEDBACK_PASSES": "1", **SKC}]
CHOICES += [{"MUON_COEFFS": entry} for entry in t.POLYNOMIALS]
CHOICES += [{"MOE_EXPERTS": "2"}, {"BIGRAM_HASH_BUCKETS": "50", "ENGRAM_INJECT_LAYER": "1"}]
CHOICES += [
    {"LAYER_PATTERN": "N", "NSA_IMPL": "masked"},
    {"RMT_SEGMENT": "8"},
    {"RMT_SEGMENT": "8", "LAYER_PATTERN": "N", "NSA_BLOCK": "4", "NSA_STRIDE": "2", "NSA_SELECT_BLOCK": "4"},
    {"KV_CACHE": "int4"},
]
CHOICES += [{"NGRAM_CACHE": "1"}, {"EVAL_ENGRAM": "1"}, {"TTT_SCOPE": "lora"}, {"TTT_SCOPE": "global"}]
CHOICES += [{"EXPORT_MODE": "competition_gptq"}, {"EXPORT_MODE": "mixed"}, {"CODEC_MAP": "mlp:fp4,embed:int5"}]
CHOICES += [{"TEMP_SCALING": "1"}, {"ATTN_IMPL": "sdpa"}, {"GRAD_CHECKPOINT": "1", "UNTIE_AT_FRACTION": "0.5"}]
CHOICES += [{"TIE_EMBEDDINGS": "0"}, {"BIGRAM_HASH_BUCKETS": "50"}, {"INDUCTION_ORDERS": "1,2"}]


def test_used_speaks_of_all_registries_and_only_of_their_entries() -> None:
    for choice in CHOICES:
        used = t.load_config({**choice, **SMALL}).used()
        assert set(used) == set(REGISTRIES)
        for registry, entries in used.items():
            assert set(entries) <= set(REGISTRIES[registry])


def run_everything(h: t.Hyperparameters) -> None:
    """Train one step, export, reload, score and write a few tokens."""
    rt = t.start_runtime(h)
    tokenizer = t.load_tokenizer(h)
    loader = t.Loader(h, rt, tokenizer.bos)
    model = t.build_model(h, rt, tokenizer.bos)
    weights = t.Weights(model)
    optimizer = t.Optimizer(h, rt, weights)
    weights.materialize(1.0)
    assert t.with_backends(h, rt)[0].attn_impl in t.ATTENTION
    batch = loader.next(4, 16)
    model.loss(batch.tokens, batch.targets, t.final_variant(h)).total.backward()
    optimizer.step(1.0, 0.9, False, 1.0)
    for bank in weights.banks.values():
        bank.settle(h)
    header, arrays = t.decode_artifact(t.write_artifact(h, t.coded_tensors(weights), {}).data)
    t.load_weights(model, arrays)
    temperature = t.fit_temperature(h, rt, model, t.read_holdout(h), lambda: 0.0, 1.0)
    scorer = t.Scorer(h, rt, model, tokenizer.byte_table(), {"temperature": temperature})
    assert np.isfinite(scorer.score(t.read_validation(h)).loss)
    assert len(list(t.generate(model, rt, [tokenizer.bos, 65], 3, 0.8, 0.9, 0))) == 3


def keep_what_is_used(h: t.Hyperparameters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries without the entries that a configuration does not use."""
    used = h.used()
    for registry, entries in REGISTRIES.items():
        monkeypatch.setattr(t, registry, {name: entry for name, entry in entries.items() if name in used[registry]})


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_what_used_leaves_out_is_not_needed(
    choice: dict[str, str], byte_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = t.load_config({**choice, **SMALL, "DATA_PATH": str(byte_data)})
    keep_what_is_used(h, monkeypatch)
    run_everything(h)


@pytest.mark.parametrize("preset", t.PRESETS)
def test_preset_builds_at_its_full_size(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    h = t.load_config({"PRESET": preset})
    keep_what_is_used(h, monkeypatch)
    with torch.device("meta"):
        model = t.GPT(h, 1)
    rows = t.role_table(model)
    assert set(rows) == {name for name, _ in model.named_parameters()}
    assert {role.codec for role in rows.values()} <= set(t.CODECS)
