"""Build a record folder: the training script cut down to one configuration, with its artifact, logs and papers.

    python build_submission.py --dce PRESET=attn --out records/my_record     extract and prove the script
    python build_submission.py --dce --from runs/RUN --out records/my_record --seeds 1337,42,7    the whole record

The extractor is a partial evaluator over the syntax tree. It freezes every configuration field that stays the same
during a run, keeps the registry entries that `Hyperparameters.used()` names, folds conditions, look-ups, constant
arguments and attributes, and deletes what nothing reaches any more, to a fixed point; then it minifies and wraps. It
knows no function of the script by name; what it relies on is written in the source's CONFIG section:

- `Hyperparameters` (a frozen dataclass), `load_config` and `used()`; a configuration changes by dataclasses.replace.
- `PACKAGED`, a constant that is set to True: code that a submission does not need stands behind it.
- `UserError`: a mistake of the user's. A packaged script runs where the full one ran, and does not look for them.
- No dynamic attributes, no changing globals; properties and assertions have no effects beside their value.
- Annotations are true: what mypy accepts is taken for the type of a name, a field, a result and of what a loop goes
  through. `strict=True` of zip is an assertion.

Then a function that one place calls is put there (`Unfold`) and a value where it is used (`Direct`), as far as nothing
is computed in another order that anybody could tell: what a function keeps alive it may keep for longer.

What is left is given short names (`Naming`) and wrapped: by LZMA, or as digits that a decoder of 500 bytes turns into
the text again (`MIXER`; it takes some seconds of a core at each start).
"""

from __future__ import annotations

import argparse
import ast
import base64
import builtins
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import importlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import types
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

ALWAYS_KEPT = ("SEED", "RUN_ID", "DATA_PATH", "TOKENIZER_PATH", "MAX_WALLCLOCK_SECONDS")
CONFIG_CLASS, LOADER, CHECKED = "Hyperparameters", "load_config", ("UserError", "ValueError")
SECTION = "\n# ==== "
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class BuildError(Exception):
    """A build that cannot be made, or must not be; told in one line."""


class Unknown(Exception):
    """A value that is not known at build time."""


# ==== values and literals ====

PURE_BUILTINS = frozenset(
    [
        "abs",
        "all",
        "any",
        "ascii",
        "bool",
        "bytes",
        "dict",
        "divmod",
        "enumerate",
        "filter",
        "float",
        "frozenset",
        "int",
        "isinstance",
        "len",
        "list",
        "map",
        "max",
        "min",
        "range",
        "repr",
        "reversed",
        "round",
        "set",
        "sorted",
        "str",
        "sum",
        "tuple",
        "type",
        "zip",
    ]
)
PURE_MODULES = {
    "math",
    "itertools",
    "operator",
    "functools",
    "re",
    "fnmatch",
    "collections",
    "dataclasses",
    "contextlib",
}
# Methods of builtin values, arrays and tensors that only look; a method of the program's own is judged by its body.
PURE_METHODS = frozenset(
    [
        "get",
        "items",
        "keys",
        "values",
        "split",
        "rsplit",
        "join",
        "strip",
        "lstrip",
        "rstrip",
        "lower",
        "upper",
        "format",
        "encode",
        "decode",
        "count",
        "index",
        "startswith",
        "endswith",
        "partition",
        "rpartition",
        "removeprefix",
        "removesuffix",
        "casefold",
        "title",
        "isdigit",
        "intersection",
        "union",
        "difference",
        "tolist",
        "item",
        "numel",
        "size",
        "dim",
        "float",
        "double",
        "int",
        "long",
        "bool",
        "cpu",
        "detach",
        "sum",
        "mean",
        "amax",
        "amin",
        "max",
        "min",
        "any",
        "all",
        "abs",
        "clone",
        "_asdict",
        "_replace",
        "copy",
        "total",
        "most_common",
        "square",
        "sqrt",
        "is_file",
        "stat",
        "read_text",
        "max_memory_allocated",
        "getrusage",
        "get_device_name",
        "elements",
        "reshape",
        "view",
        "flatten",
        "unsqueeze",
        "squeeze",
        "hexdigest",
        "digest",
        "with_name",
        "with_suffix",
    ]
)
# What takes an attribute's name as a text.
NAMERS = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "register_buffer", "get_submodule"}
NAMERS |= {"register_parameter", "register_module", "add_module", "get_parameter", "get_buffer"}
EATERS = ("tuple", "list", "dict", "set", "any", "all", "sum", "sorted", "max", "min", "frozenset")  # of iterables
EFFECTS = ("rand", "normal", "bernoulli", "multinomial", "copyto", "fill", "put")  # functions of torch and numpy
PURE_CALLS = {
    "int.from_bytes",
    "time.monotonic",
    "time.perf_counter",
    "time.time",
    "Path",
    "slice",
    "zlib.crc32",
    "hashlib.sha256",
}
SOMETHING = {"Tensor", "tuple", "list", "dict", "set", "int", "float", "bool", "str", "bytes", "Path"}  # is not None
PURE_CALLS |= {"torch.cuda." + name for name in ("device_count", "is_available", "get_device_name", "memory_allocated")}


def literal(node: ast.AST | None) -> Any:
    """The value of a literal scalar or tuple. Raises Unknown."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -literal(node.operand)
    if isinstance(node, ast.Tuple):
        return tuple(literal(element) for element in node.elts)
    raise Unknown


def is_literal(node: ast.AST | None) -> bool:
    if node.__class__ is ast.Constant or node.__class__ not in (ast.UnaryOp, ast.Tuple):
        return node.__class__ is ast.Constant
    try:
        literal(node)
    except Unknown:
        return False
    return True


def same(a: Any, b: Any) -> bool:
    """Equal in value and type, all the way down: 1, True and 1.0 are three values, and so are 0.0 and -0.0."""
    return type(a) is type(b) and repr(a) == repr(b)


def lifted(value: Any) -> ast.expr:
    """A literal that makes this value. Raises Unknown for what has none."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.copysign(1, value) < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        if isinstance(value, float) and math.isnan(value):
            raise Unknown
        return ast.Constant(value)
    if type(value) is tuple:
        return ast.Tuple([lifted(part) for part in value], ast.Load())
    if type(value) is list:
        return ast.List([lifted(part) for part in value], ast.Load())
    if type(value) is dict:
        return ast.Dict([lifted(key) for key in value], [lifted(part) for part in value.values()])
    raise Unknown


def dotted(node: ast.AST) -> str:
    """a.b.c of a chain of attributes on a name, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


PLAIN_PARTS = {"id", "attr", "name", "asname", "arg", "module", "level", "ctx", "op", "ops", "kind", "type_comment"}
PLAIN_PARTS |= {"conversion", "simple", "is_async"}  # of nodes: no nodes
PARTS: dict[type, tuple[str, ...]] = {
    kind: tuple(name for name in kind._fields if name not in PLAIN_PARTS)
    for kind in vars(ast).values()
    if isinstance(kind, type) and issubclass(kind, ast.AST)
} | {ast.Constant: (), ast.Global: (), ast.Nonlocal: (), ast.arg: ("annotation",), ast.keyword: ("value",)}
PARTS[ast.ExceptHandler] = ("type", "body")


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree but contexts and operators, a node before its parts; several times as fast as ast.walk."""
    work = [node]
    while work:
        one = work.pop()
        if one is not None:
            yield one
            held = one.__dict__
            for name in PARTS[one.__class__]:
                part = held.get(name)
                if part.__class__ is list:
                    work += part
                elif part is not None:
                    work.append(part)


def children(node: ast.AST) -> list[ast.AST]:
    """The nodes right below one."""
    found, held = list[Any](), node.__dict__
    for name in PARTS[node.__class__]:
        part = held.get(name)
        if part.__class__ is list:
            found += [p for p in part if p is not None]
        elif part is not None:
            found.append(part)
    return found


class Rewriter:
    """ast.NodeTransformer, several times as fast: methods are looked up once a class, and only parts are visited."""

    def __init_subclass__(cls) -> None:
        cls.rules = {kind: getattr(cls, name, None) for kind, name in VISITORS.items()}

    rules: dict[type, Callable | None]

    def visit(self, node: Any) -> Any:
        rule = self.rules[node.__class__]
        return self.generic_visit(node) if rule is None else rule(self, node)

    def generic_visit(self, node: Any) -> Any:
        held = node.__dict__
        for name in PARTS[node.__class__]:
            part = held.get(name)
            if part.__class__ is list:
                part[:] = self.visited(part)
            elif part is not None:
                new = self.visit(part)
                if new is None:
                    del held[name]
                else:
                    held[name] = new
        return node

    def visited(self, nodes: list[Any]) -> list[Any]:
        found = list[Any]()
        for node in nodes:
            new = node if node is None else self.visit(node)
            if new.__class__ is list:
                found += new
            elif new is not None or node is None:
                found.append(new)
        return found


VISITORS = {kind: "visit_" + kind.__name__ for kind in PARTS}


def cloned(node: Any) -> Any:
    """A copy of a tree. Contexts and operators are shared: the parser makes one of each, and the minifier hangs its
    whole tree on them."""
    if node.__class__ is list:
        return [cloned(part) for part in node]
    if not isinstance(node, ast.AST) or not node._fields:
        return node
    new = node.__class__.__new__(node.__class__)
    new.__dict__.update({name: cloned(part) for name, part in node.__dict__.items()})
    return new


def parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


# ==== the source and its configuration ====


class Source:
    """A script, its syntax tree, and its CONFIG section as a module of its own, run without the rest."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        head = ast.parse(self.text.split(SECTION + "2.")[0])
        head.body = [node for node in head.body if not isinstance(node, ast.Import | ast.ImportFrom) or self.own(node)]
        self.config = types.ModuleType("submission_config")
        sys.modules[self.config.__name__] = self.config  # dataclasses looks annotations up there
        exec(compile(head, str(path), "exec"), self.config.__dict__)

    @staticmethod
    def own(node: ast.Import | ast.ImportFrom) -> bool:
        """Whether an import is of the standard library."""
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        return all(name.split(".")[0] in sys.stdlib_module_names for name in names)

    def load(self, environ: dict[str, str]) -> Any:
        """The Hyperparameters of an environment. Raises BuildError for what the script would refuse."""
        try:
            return self.config.load_config(environ)
        except self.config.UserError as error:
            raise BuildError(str(error)) from None

    def sections(self) -> dict[str, tuple[int, int]]:
        """First and last line of each section by name."""
        lines = self.text.split("\n")
        starts = [(i, line.split()[3]) for i, line in enumerate(lines, 1) if line.startswith(SECTION.strip() + " ")]
        ends = [start - 1 for start, _ in starts[1:]] + [len(lines)]
        return {"HEAD": (1, starts[0][0] - 1), **{name: (start, end) for (start, name), end in zip(starts, ends)}}


class Frozen:
    """A configuration of which only the fields that never change are known; any other raises Unknown when read."""

    def __init__(self, h: Any, open_fields: frozenset[str]) -> None:
        self.__dict__.update(known=dataclasses.asdict(h), open=open_fields, kind=type(h))

    def __getattr__(self, name: str) -> Any:
        if name in self.open:
            raise Unknown
        if name in self.known:
            return self.known[name]
        member = self.kind.__dict__.get(name)
        if isinstance(member, property) and member.fget:
            return member.fget(self)
        if callable(member):
            return types.MethodType(member, self)
        raise Unknown

    def asdict(self) -> dict[str, Any]:
        """All fields; reading an open one raises Unknown."""
        return Partly({name: value for name, value in self.known.items() if name not in self.open})


def as_dict(value: Any) -> dict[str, Any]:
    """dataclasses.asdict, of a frozen configuration, too."""
    return Frozen.asdict(value) if isinstance(value, Frozen) else dataclasses.asdict(value)


class Partly(dict):
    """A dict of which some keys are unknown."""

    def __missing__(self, key: str) -> Any:
        raise Unknown


# ==== names: what is bound where ====


def parameters(args: ast.arguments) -> list[ast.arg]:
    """All parameters, those with stars left out."""
    return [*args.posonlyargs, *args.args, *args.kwonlyargs]


def starred(args: ast.arguments) -> list[ast.arg]:
    return [arg for arg in (args.vararg, args.kwarg) if arg]


def pairs(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Simple targets of an assignment, each with its value where it is at hand."""
    if isinstance(target, ast.Starred):
        yield from pairs(target.value, None)
    elif isinstance(target, ast.Tuple | ast.List):
        parts: list[Any] = [None] * len(target.elts)
        if isinstance(value, ast.Call):  # which of a call's results it is
            parts = [ast.Subscript(value, ast.Constant(place), ast.Load()) for place in range(len(target.elts))]
        if isinstance(value, ast.Tuple) and len(value.elts) == len(parts):
            whole = not any(isinstance(part, ast.Starred) for part in [*target.elts, *value.elts])
            parts = list(value.elts) if whole else parts
        for element, part in zip(target.elts, parts):
            yield from pairs(element, part)
    else:
        yield target, value


def stores(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """(target, value or None) of what one statement or expression itself assigns."""
    if isinstance(node, ast.Assign):
        several = len(node.targets) > 1 and isinstance(node.value, ast.Dict | ast.List | ast.Set | ast.Call)
        value = None if several and not getattr(node.value, "args", None) else node.value  # one container, two names
        for target in node.targets:
            yield from pairs(target, value)
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, ast.AugAssign | ast.For):
        yield from pairs(node.target, None)
    elif isinstance(node, ast.NamedExpr):
        yield node.target, None
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield from pairs(node.optional_vars, None)
    elif isinstance(node, ast.Delete):
        for target in node.targets:
            yield from pairs(target, None)


FUNCTIONS = {ast.FunctionDef, ast.AsyncFunctionDef}
HOLDERS = FUNCTIONS | {ast.Lambda}


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a scope's own code: not of functions, classes and lambdas in it, whose first node is given."""
    body = [node.body] if isinstance(node, ast.Lambda) else getattr(node, "body", [node])
    work: list[Any] = list(body)
    while work:
        one = work.pop()
        if one is None:
            continue
        yield one
        kind = one.__class__
        if kind in HOLDERS:
            work += [] if kind is ast.Lambda else one.decorator_list
            work += [*one.args.defaults, *one.args.kw_defaults]
            continue
        held = one.__dict__
        for name in ("decorator_list", "bases") if kind is ast.ClassDef else PARTS[kind]:
            part = held.get(name)
            if part.__class__ is list:
                work += part
            elif part is not None:
                work.append(part)


BINDERS = {
    ast.Assign,
    ast.AnnAssign,
    ast.AugAssign,
    ast.For,
    ast.NamedExpr,
    ast.withitem,
    ast.Delete,
    ast.ExceptHandler,
}
BINDERS |= {ast.Global, ast.Nonlocal, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef}


def bindings(node: ast.AST, nodes: Iterable[ast.AST] | None = None) -> dict[str, list[ast.AST | None]]:
    """Name -> what is bound to it in a scope, None for what is not at hand. Comprehensions are scopes of their own."""
    found: dict[str, list[ast.AST | None]] = defaultdict(list)
    for one in inside(node) if nodes is None else nodes:
        if one.__class__ not in BINDERS:
            continue
        for target, value in stores(one):
            if isinstance(target, ast.Name):
                found[target.id].append(value)
        if isinstance(one, Definition):
            found[one.name].append(one)
        elif isinstance(one, ast.Import | ast.ImportFrom):
            for alias in one.names:
                found[(alias.asname or alias.name).split(".")[0]].append(one)
        elif isinstance(one, ast.ExceptHandler) and one.name:
            found[one.name].append(None)
        elif isinstance(one, ast.Global | ast.Nonlocal):
            for name in one.names:
                found[name] += [None, None]
    return found


# ==== facts: what the whole program says about functions, attributes and classes ====


class Outside(NamedTuple):
    """Names that other modules know."""

    all: frozenset[str]
    bases: frozenset[str]  # attributes of their classes from which the program's derive


def external_names(tree: ast.Module) -> Outside:
    """Attributes that objects of imported modules and builtin types have: such a name says nothing about its owner."""
    found = {name for kind in vars(builtins).values() if isinstance(kind, type) for name in dir(kind)}
    bases = set[str]()
    modules = dict[str, Any]()
    for node in walk(tree):
        aliases = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
        whole = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        inner = [f"{node.module}.{a.name}" for a in aliases] if isinstance(node, ast.ImportFrom) else []
        for name, alias in zip([*whole, *(inner or [a.name for a in aliases])], [None] * len(whole) + list(aliases)):
            with suppress(ImportError, ValueError):
                module = importlib.import_module(name)
                modules[(alias.asname or alias.name) if alias else name] = module
    for module in modules.values():
        found |= set(dir(module))
        for kind in vars(module).values():
            found |= set(dir(kind)) if isinstance(kind, type) else set()
    for base in {dotted(b) for n in walk(tree) if isinstance(n, ast.ClassDef) for b in n.bases}:
        with suppress(AttributeError, KeyError):
            head, *rest = base.split(".")
            kind = functools.reduce(getattr, rest, modules[head])
            bases |= set(dir(kind)) | own_attributes(kind)
    return Outside(frozenset(found | bases), frozenset(bases))


def own_attributes(kind: Any) -> set[str]:
    """Attributes that a class of another module, or one from which it derives, gives to its objects."""
    found = set[str]()
    for one in inspect.getmro(kind) if isinstance(kind, type) else ():
        with suppress(OSError, TypeError):  # written in C
            found |= set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", inspect.getsource(one)))
    return found


def is_tuple_class(node: ast.ClassDef | None) -> bool:
    """Whether a class is a NamedTuple or a dataclass: its annotated names are the parameters of its constructor."""
    if node is None:
        return False
    marks = [dotted(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
    return "dataclass" in [m.split(".")[-1] for m in marks] or "NamedTuple" in map(dotted, node.bases)


def is_class_variable(node: ast.AnnAssign) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "ClassVar" for n in walk(node.annotation))


def class_fields(node: ast.ClassDef) -> dict[str, ast.expr | None]:
    """Fields and defaults of a NamedTuple or dataclass."""
    if not is_tuple_class(node):
        return {}
    own = [n for n in node.body if isinstance(n, ast.AnnAssign) and not is_class_variable(n)]
    return {n.target.id: n.value for n in own if isinstance(n.target, ast.Name)}


def steps(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block and of those in it, but not of functions and classes in it."""
    for node in body:
        yield node
        if not isinstance(node, Definition):
            for part in ("body", "orelse", "finalbody"):
                yield from steps(getattr(node, part, ()))
            for handler in getattr(node, "handlers", ()):
                yield from steps(handler.body)


def definitions(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under its conditions included."""
    for node in body:
        if isinstance(node, ast.If):
            yield from definitions(node.body)
            yield from definitions(node.orelse)
        else:
            yield node


FOREIGN = "."  # the class of an object that certainly is none of the program's
FOREIGN_TYPES = {
    "Foreign",  # of a class of another module
    "Tensorial",  # a tensor or an array, or what such a one, or a function of torch and numpy, gives
    "Tensor",
    "Path",
    "str",
    "int",
    "float",
    "bool",
    "bytes",
    "dict",
    "list",
    "set",
    "defaultdict",
    "Counter",
}


TENSORS = {"Tensor", "Tensorial", "np.ndarray"}
# Methods of tensors and arrays that only look, beside those of PURE_METHODS.
LOOKING_METHODS = {
    "add", "addcmul", "addmm", "amax", "argmax", "argmin", "argsort", "astype", "baddbmm", "bfloat16", "bmm",
    "chunk", "clamp", "contiguous", "cos", "cummax", "cumsum", "diagonal", "diff", "div", "dot", "eq", "erfinv",
    "exp", "expand", "expand_as", "floor", "gather", "ge", "gt", "half", "index_select", "isfinite", "isnan", "le",
    "lerp", "log", "log2", "log_softmax", "logsumexp", "lt", "masked_fill", "matmul", "mul", "movedim", "narrow",
    "ne", "neg", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "norm", "outer", "permute", "pow",
    "prod", "ravel", "repeat", "repeat_interleave", "relu", "roll", "round", "rsqrt", "scatter", "searchsorted",
    "select", "sigmoid", "sin", "softmax", "std", "sub", "t", "tanh", "tile", "to", "tobytes", "topk", "transpose",
    "tril", "triu", "type_as", "unbind", "unflatten", "unfold", "unique", "var", "where",
}  # fmt: skip
TENSORIAL, FOREIGN_OBJECT = ast.Name("Tensorial", ast.Load()), ast.Name("Foreign", ast.Load())


class Facts:
    """An inventory of a program: definitions, calls by name, attribute reads and stores."""

    def __init__(self, tree: ast.Module, external: Outside) -> None:
        self.tree, self.external, self.bases = tree, external.all, external.bases
        self.defs = {n.name: n for n in definitions(tree.body) if isinstance(n, Definition)}
        self.classes = {name: n for name, n in self.defs.items() if isinstance(n, ast.ClassDef)}
        self.methods: dict[str, list[tuple[str, Function]]] = defaultdict(list)
        for name, node in self.classes.items():
            for method in (m for m in node.body if isinstance(m, Function)):
                self.methods[method.name].append((name, method))
        self.ups = {name: self.find_ancestors(name) for name in self.classes}
        self.cache: dict[Any, Any] = {}
        self.families: dict[str, frozenset[str]] = {}
        self.program_bases = {dotted(base) for kind in self.classes.values() for base in kind.bases}
        self.fields = {name: class_fields(node) for name, node in self.classes.items()}
        self.given: dict[str, list[tuple[str, ast.expr | None]]] = defaultdict(
            list
        )  # attribute -> (class, value there)
        for name, node in self.classes.items():
            for one in node.body:
                if isinstance(one, Definition):
                    self.given[one.name].append((name, None))
                for target, value in stores(one):
                    if isinstance(target, ast.Name) and target.id not in self.fields[name]:
                        self.given[target.id].append((name, value))

    def scan(self) -> Facts:
        """Look at every node once."""
        self.nodes = list(walk(self.tree))
        kinds: dict[type, list[Any]] = defaultdict(list)
        for node in self.nodes:
            kinds[node.__class__].append(node)
        self.calls: dict[str, list[ast.Call]] = defaultdict(list)  # by name, or by attribute with a dot in front
        self.escaped: Counter[str] = Counter()  # names and .attributes that are read other than to be called
        self.escapees: dict[str, set[str]] = defaultdict(set)  # attribute -> classes of which it is read like that
        self.loads: Counter[str] = Counter()  # .attributes read in any way, and names
        self.bound: dict[str, list[ast.expr | None]] = defaultdict(list)  # names -> what is bound to them anywhere
        self.readers: dict[str, set[str]] = defaultdict(
            set
        )  # attribute -> classes of objects it is read of, "" unknown
        self.stored: dict[str, list[tuple[ast.Attribute, ast.expr | None]]] = defaultdict(list)
        self.texts: set[str] = set()  # names of attributes that are given as texts
        self.owner: dict[int, str] = {}  # node -> its class
        self.modules: dict[str, str] = {}
        self.pure_imports: set[str] = set()
        self.foreign_classes: set[str] = set()  # imported names of classes
        self.looks = {id(part) for node in self.nodes if node.__class__ in LOOKING for part in looked_at(node)}
        self.reads: dict[str, list[ast.Attribute]] = defaultdict(list)
        for node in filter(is_load, kinds[ast.Attribute]):
            self.reads[node.attr].append(node)
        self.nonlocals = {name for n in kinds[ast.Global] + kinds[ast.Nonlocal] for name in n.names}
        called, types_only, local = set[int](), set[int](), set[str]()
        self.arguments: dict[int, ast.expr] = {}  # names that a method reads -> their annotation there
        self.noted: dict[str, list[tuple[str, ast.expr]]] = defaultdict(list)  # attribute -> (class, annotation)
        for name, owner in self.classes.items():
            self.owner |= {id(n): name for n in walk(owner)}
        for one in (n for n in kinds[ast.AnnAssign] if id(n) in self.owner):
            name, path = self.owner[id(one)], dotted(one.target)
            at_top = one in self.classes[name].body
            self.noted[path if at_top else path.removeprefix("self.")].append((name, one.annotation))
        for _, method in (m for named in self.methods.values() for m in named):
            hinted = {a.arg: a.annotation for a in parameters(method.args) if a.annotation}
            if hinted:
                names = [n for n in walk(method) if n.__class__ is ast.Name and n.id in hinted]  # type: ignore[attr-defined]
                self.arguments |= {id(n): hinted[n.id] for n in names}  # type: ignore[attr-defined]
        self.module_types = {dotted(n.target): n.annotation for n in self.tree.body if isinstance(n, ast.AnnAssign)}
        for node in kinds[ast.Call]:
            called.add(id(node.func))
            self.note_call(node)
        for node in kinds[ast.Import]:
            self.modules |= {a.asname or a.name.split(".")[0]: a.name for a in node.names}
        for node in kinds[ast.ImportFrom]:
            imported = {a.asname or a.name for a in node.names}
            self.foreign_classes |= {n for n in imported if n[0].isupper()} - set(self.defs)
            self.pure_imports |= imported if node.module in PURE_MODULES else set()
        functions: list[Function] = [n for n in self.nodes if n.__class__ in FUNCTIONS]  # type: ignore[misc]
        local |= {node.arg for node in kinds[ast.arg]}
        local |= {n.name for node in functions for n in node.body if isinstance(n, Definition)}
        for node in [n for n in self.nodes if n.__class__ in TYPED]:
            types_only |= {id(n) for part in type_places(node) for n in walk(part)}
        for node in [n for n in self.nodes if n.__class__ in BINDERS]:
            for target, value in stores(node):
                if isinstance(target, ast.Attribute):
                    self.stored[target.attr].append((target, value))
                elif isinstance(target, ast.Name):
                    local.add(target.id)
                    self.bound[target.id].append(value)
        self.inner: dict[int, list[tuple[ast.Call, int]] | None] = {}  # functions in functions -> their calls
        self.outer: dict[Function, Function] = {}
        for outer in functions:
            for inner in (n for n in steps(outer.body) if isinstance(n, Function)):
                self.inner[id(inner)], self.outer[inner] = self.calls_inside(outer, inner, called), outer
        self.shadowed = local & set(self.defs)  # local names that hide a definition
        called |= self.follow_aliases(called)
        for node in filter(is_load, kinds[ast.Name]):
            if id(node) not in types_only:
                self.loads[node.id] += 1
                self.escaped[node.id] += id(node) not in called
        grown = [n.target for n in kinds[ast.AugAssign] if isinstance(n.target, ast.Attribute)]
        grown = [n for n in grown if not all(value is None or is_own(value) for _, value in self.stored[n.attr])]
        for node in [*filter(is_load, kinds[ast.Attribute]), *grown]:  # others may see what is done to the latter
            if id(node) not in types_only:
                owner = node.__dict__.get("receiver", "")
                self.loads["." + node.attr] += 1
                self.readers[node.attr].add(owner)
                self.escaped["." + node.attr] += id(node) not in called
                self.escapees[node.attr] |= set() if id(node) in called else {owner}
        return self

    def outermost(self, function: Function) -> Function:
        """The function of the module, or the method, in which a function is; itself if it is one."""
        while function in self.outer:
            function = self.outer[function]
        return function

    def calls_inside(self, outer: Function, one: Function, called: set[int]) -> list[tuple[ast.Call, int]] | None:
        """All calls of a function that is defined in another one; None if it is read in another way."""
        names = [n for n in walk(outer) if isinstance(n, ast.Name) and n.id == one.name]
        again = any(one.name in {a.arg for a in parameters(f.args)} for f in walk(outer) if hasattr(f, "args")
                    and isinstance(f.args, ast.arguments))  # fmt: skip
        if one.decorator_list or again or len(bindings(outer)[one.name]) > 1 or any(id(n) not in called for n in names):
            return None
        aims = {id(n) for n in names}
        return [(c, 0) for c in self.calls[one.name] if id(c.func) in aims]

    def follow_aliases(self, called: set[int]) -> set[int]:
        """`name = f` or `name = torch.compile(f)`, for a name that is only called: its calls are f's.

        Returns the nodes of f there, which then are no other reads of it.
        """
        found, maybe = (
            set[int](),
            {n: aliased(v[0]) for n, v in self.bound.items() if len(v) == 1 and n not in self.defs},
        )
        maybe = {name: aims for name, aims in maybe.items() if aims and self.calls.get(name)}
        names = [n for n in self.nodes if n.__class__ in (ast.Name, ast.arg)] if maybe else []
        others = {n.arg if isinstance(n, ast.arg) else n.id for n in names if isinstance(n, ast.arg)  # type: ignore
                  or (isinstance(n.ctx, ast.Load) and id(n) not in called)}  # type: ignore[attr-defined]  # fmt: skip
        for name, aims in maybe.items():
            aims = aims if name not in others else []
            keys = {"." + a.attr if isinstance(a, ast.Attribute) else a.id for a in aims}
            if len(keys) == 1:
                self.calls[keys.pop()] += self.calls[name]
                found |= {id(a) for a in aims}
        return found

    def taken_apart(self) -> set[int]:
        """Numbers of names to which the parts of what some call gives are bound, where it may be any object."""
        if "apart" not in self.cache:
            found = self.cache["apart"] = set[int]()
            for node in self.nodes:
                if node.__class__ is ast.Assign and isinstance(node.value, ast.Call):  # type: ignore[attr-defined]
                    sizes = {len(t.elts) for t in node.targets if isinstance(t, ast.Tuple | ast.List)}  # type: ignore
                    found |= sizes if sizes and not self.gives_tuple(node.value) else set()  # type: ignore[attr-defined]
        return self.cache["apart"]

    def gives_tuple(self, node: ast.Call) -> bool:
        """Whether a call is of another module, or of a function that says it gives a plain tuple."""
        name, method = dotted(node.func), node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = (
            [m for _, m in self.methods.get(method, ())] if method else [self.defs[n] for n in [name] if n in self.defs]
        )
        receiver = node.func.__dict__.get("receiver", "")
        if receiver in self.classes:
            called = [m for c, m in self.methods.get(method, ()) if c in self.family(receiver)]
        if (promised := node.__dict__.get("promised")) and ast.unparse(promised)[:6] == "tuple[":
            return True
        if (
            method
            and not called
            and (kind := self.attribute_kind(receiver, method) if receiver in self.classes else "")
        ):
            called = [m for c, m in (*self.methods["forward"], *self.methods["__call__"]) if c in self.family(kind)]
        if not called:
            return not self.stored[method] if method else hasattr(builtins, name) or name in self.pure_imports
        promised = all(isinstance(f, Function) and f.returns and ast.unparse(f.returns)[:6] == "tuple[" for f in called)
        results = [n.value for f in called for n in inside(f) if isinstance(n, ast.Return)]
        return promised and not any(self.fields.get(made_kind(result)) for result in results)

    def note_call(self, node: ast.Call) -> None:
        key = node.func.id if isinstance(node.func, ast.Name) else ""
        key = "." + node.func.attr if isinstance(node.func, ast.Attribute) else key
        self.calls[key].append(node)
        if key.strip(".") in NAMERS:
            self.texts |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}

    def names_in(self, function: Function) -> set[str]:
        """Names in a function's body."""
        key = ("names", id(function))
        if key not in self.cache:
            self.cache[key] = {n.id for part in function.body for n in walk(part) if isinstance(n, ast.Name)}
        return self.cache[key]

    def related(self, named: list[tuple[str, Function]]) -> list[list[Function]]:
        """Methods of one name in groups of which a call may mean any: all, if it is not known of what one is called."""
        calls = self.calls["." + named[0][1].name]
        known = {c.func.__dict__.get("receiver", "") for c in calls if isinstance(c.func, ast.Attribute)}
        if not known - {FOREIGN} <= set(self.classes):
            return [[method for _, method in named]]
        groups = list[tuple[set[str], list[Function]]]()
        for owner, method in named:
            near = {c for c in self.classes if owner in self.family(c)}
            for other in [g for g in groups if g[0] & near]:
                groups.remove(other)
                near, method_group = near | other[0], other[1]
                groups.append((near, method_group))
            if groups and groups[-1][0] & near:
                groups[-1][1].append(method)
            else:
                groups.append((near, [method]))
        return [methods for _, methods in groups]

    # -- classes --

    def ancestors(self, name: str) -> list[str]:
        """Program classes that a class derives from, itself first."""
        return self.ups[name]

    def find_ancestors(self, name: str) -> list[str]:
        bases = [dotted(base) for base in self.classes[name].bases]
        return [name, *(a for base in bases if base in self.classes for a in self.find_ancestors(base))]

    def family(self, name: str) -> frozenset[str]:
        """Classes whose code an object can have that is of a class or of one derived from it."""
        if name not in self.families:
            heirs = [c for c in self.classes if name in self.ups[c]]
            self.families[name] = frozenset(a for c in heirs for a in self.ups[c])
        return self.families[name]

    def made(self, name: str) -> bool:
        """Whether an object of a program class, or of one derived from it, can exist."""
        kinds = [c for c in self.classes if name in self.ancestors(c)]
        return any(self.calls[c] or self.escaped[c] for c in kinds)

    def read(self, name: str, kind: str) -> bool:
        """Whether an attribute may be read of an object that has this class's code."""
        known = self.readers.get(name, set())
        known = known - {FOREIGN}
        return name in self.texts or any(one not in self.classes or kind in self.family(one) for one in known)

    def foreign_bases(self, name: str) -> bool:
        """Whether a class derives from one of another module, which may use its attributes and methods."""
        key = ("foreign", name)
        if key not in self.cache:
            self.cache[key] = self.find_foreign(name)
        return self.cache[key]

    def find_foreign(self, name: str) -> bool:
        plain = {"NamedTuple", "object", *(n for n, v in vars(builtins).items() if isinstance(v, type))}
        bases = {dotted(base) for kind in self.ancestors(name) for base in self.classes[kind].bases}
        return bool(bases - plain - set(self.classes))

    def foreign(self, kind: str, name: str) -> bool:
        """Whether a class's method may be called by another module."""
        return name in self.bases and self.foreign_bases(kind)

    def outside(self, name: str) -> bool:
        """Whether an attribute may belong to an object that is none of the program's."""
        return name in self.external or name.startswith("__")

    def foreign_type(self, kind: ast.expr | None) -> bool:
        """Whether a type is none of the program's."""
        name = (type_parts(kind)[0] or dotted(plain_type(kind))) if kind else ""
        return name in FOREIGN_TYPES and name not in self.program_bases

    # -- calls --

    def sites(self, function: Function) -> list[tuple[ast.Call, int]] | None:
        """All calls of a function, with the number of its first parameters that they do not pass; None if unknown."""
        if id(function) in self.inner:
            return self.inner[id(function)]
        if self.defs.get(function.name) is function:
            known = not self.escaped[function.name] and function.name not in self.shadowed
            plain = known and not is_opaque(function)
            return [(call, 0) for call in self.calls[function.name]] if plain else None
        owner = next((c for c, m in self.methods[function.name] if m is function), "")
        marks = [dotted(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list]
        if not owner or "property" in marks or "classmethod" in marks:
            return None
        if function.name == "__init__":
            return self.constructions(owner)
        kind = self.classes[owner]
        if function.name == "forward" and "staticmethod" in marks:  # autograd functions are called by their `apply`
            calls = [c for c in self.calls[".apply"] if dotted(c.func) == f"{owner}.apply"]  # type: ignore[attr-defined]
            return [(call, 1) for call in calls] if len(calls) == self.loads[owner] else None
        if not kind or function.name in self.base_names(owner) or function.name.startswith("__"):
            return None
        if any(self.may_be(one, owner, function.name) is not False for one in self.escapees[function.name]):
            return None
        found = list[tuple[ast.Call, int]]()
        for call in self.calls["." + function.name]:
            receiver = call.func.__dict__.get("receiver", "") if isinstance(call.func, ast.Attribute) else ""
            its = self.may_be(receiver, owner, function.name)
            if its is None:
                return None
            found += [(call, 0 if "staticmethod" in marks else 1)] if its else []
        return found

    def may_be(self, receiver: str, owner: str, name: str) -> bool | None:
        """Whether an attribute of an object of a class is that of another class; None if nothing is known of either."""
        if receiver in self.classes or receiver == FOREIGN:
            return receiver != FOREIGN and owner in self.family(receiver)
        return None if self.outside(name) else True

    def base_names(self, owner: str) -> frozenset[str]:
        """What other modules know of a class of the program that derives from theirs."""
        return self.bases if self.foreign_bases(owner) else frozenset()

    def constructions(self, owner: str) -> list[tuple[ast.Call, int]] | None:
        """All calls of a class, as its constructor sees them."""
        heirs = [c for c in self.classes if owner in self.ancestors(c) and self.maker(c) == owner]
        if any(self.escaped[c] or c in self.shadowed for c in heirs):
            return None
        found = [(call, 1) for c in heirs for call in self.calls[c]]
        for call in self.calls[".__init__"]:
            user = self.owner.get(id(call), "")
            bases = self.ancestors(user)[1:] if user else []
            if next((b for b in bases if any(c == b for c, _ in self.methods["__init__"])), "") == owner:
                found.append((call, 1))
        return found

    def maker(self, name: str) -> str:
        """The class whose __init__ makes objects of a class, or nothing."""
        for one in self.ancestors(name):
            if any(c == one for c, _ in self.methods["__init__"]):
                return one
        return ""

    @staticmethod
    def passed(call: ast.Call, args: ast.arguments, skip: int) -> dict[str, ast.expr | None]:
        """What a call passes for each parameter: an argument, a default, or None for what is not known."""
        names = [a.arg for a in [*args.posonlyargs, *args.args]]
        found: dict[str, ast.expr | None] = dict(zip(names[len(names) - len(args.defaults) :], args.defaults))
        found |= {a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults)}
        found |= dict.fromkeys(names[:skip])
        for place, value in enumerate(call.args, skip):
            if isinstance(value, ast.Starred):
                return {**found, **dict.fromkeys(names[place:]), **dict.fromkeys(a.arg for a in args.kwonlyargs)}
            if place < len(names):
                found[names[place]] = value
        for keyword in call.keywords:
            found |= dict.fromkeys(names[skip + len(call.args) :]) if keyword.arg is None else {}
            found |= {keyword.arg: keyword.value} if keyword.arg else {}
        return found

    def symbol(self, node: ast.AST | None) -> str:
        """A text that stands for a value which is the same wherever it is written, or nothing."""
        if node is None:
            return ""
        if is_literal(node):
            return repr(literal(node))
        name = dotted(node)
        head = name.split(".")[0]
        return name if name and (head in self.modules or (name in self.defs)) else ""

    def agreed(self, values: Sequence[ast.expr | None]) -> ast.expr | None:
        """The one static value that all of these are, or None."""
        symbols = {self.symbol(value) for value in values}
        return values[0] if len(symbols) == 1 and "" not in symbols else None

    def constants(self, function: Function) -> dict[str, ast.expr]:
        """Parameters for which every call passes the same static value."""
        sites = self.sites(function) or self.registry_sites(function)
        if not sites:
            return {}
        calls = [self.passed(call, function.args, skip) for call, skip in sites]
        names = [a.arg for a in parameters(function.args)]
        agreed = {name: self.agreed([call.get(name) for call in calls]) for name in names}
        return {name: value for name, value in agreed.items() if value is not None}

    def registry_sites(self, function: Function) -> list[tuple[ast.Call, int]]:
        """All calls of a function that is an entry of one registry, and nothing else, as `REGISTRY[key](...)`."""
        if self.defs.get(function.name) is not function or function.name in self.shadowed or is_opaque(function):
            return []
        held = [n for n in self.tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and isinstance(n.value, ast.Dict)
                and any(isinstance(v, ast.Name) and v.id == function.name for v in n.value.values)]  # fmt: skip
        if len(held) != 1 or self.escaped[function.name] != 1:
            return []
        name = dotted(next(target for target, _ in stores(held[0])))
        if "registries" not in self.cache:
            calls = [n for n in self.nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
            looked = [part for n in self.nodes if isinstance(n, ast.Compare) for part in n.comparators]
            looked += [n.iter for n in self.nodes if isinstance(n, ast.comprehension | ast.For)]
            self.cache["registries"] = calls, Counter(n.id for n in looked if isinstance(n, ast.Name))
        calls, looks = self.cache["registries"]
        its = [call for call in calls if isinstance(call.func, ast.Subscript) and dotted(call.func.value) == name]
        if self.loads[name] != len(its) + looks[name] or name in self.shadowed:
            return []
        return [(call, 0) for call in [*its, *self.calls[function.name]]]

    # -- attributes --

    def attribute(self, name: str, kinds: frozenset[str] | None) -> ast.expr | None:
        """The static value that everybody gives an attribute, or None."""
        if (name, kinds) not in self.cache:
            values = self.values(name, kinds)
            self.cache[name, kinds] = self.agreed(values) if values else None
        return self.cache[name, kinds]

    def attribute_kind(self, owner: str, name: str) -> str:
        """The program's class that an attribute of a class has, or nothing."""
        return self.class_of(self.attribute_type(owner, name))

    def class_of(self, kind: ast.expr | None) -> str:
        """The program's class that an annotation names, alone or beside None."""
        name = dotted(plain_type(kind)) if kind else ""
        return name if name in self.classes else ""

    def attribute_type(self, owner: str, name: str) -> ast.expr | None:
        """The type of an attribute of a class: as annotated, or by what everybody stores in it."""
        key = ("type", owner, name)
        if key not in self.cache:
            self.cache[key] = self.find_type(self.family(owner), name)
        return self.cache[key]

    def find_type(self, kinds: frozenset[str], name: str) -> ast.expr | None:
        found: list[ast.expr | None] = [kind for owner, kind in self.noted[name] if owner in kinds]
        if not found:
            own = [m for owner, m in self.methods.get(name, ()) if owner in kinds]
            found = [m.returns if marks_of(m) == ["property"] else None for m in own]
        if not found:
            for target, value in self.stored[name]:
                if self.owner.get(id(target)) in kinds or dotted(target.value) != "self":
                    alike = is_none(value) or made_kind(value) == f"self.{name}._replace"
                    found += [] if alike else [self.made_type(value)]
        return agreed_type(found)

    def made_type(self, node: ast.AST | None) -> ast.expr | None:
        """The type of what is stored in an attribute."""
        made = self.defs.get(made_kind(node))
        if isinstance(made, Function):
            return made.returns
        if made_kind(node) in self.foreign_classes:
            return FOREIGN_OBJECT
        return ast.Name(made.name, ast.Load()) if made else self.arguments.get(id(node))

    def stays_empty(self, kind: str, name: str) -> bool:
        """Whether a field of a NamedTuple holds an empty dict in every object; nobody changes what such fields hold."""
        key = ("empty", kind, name)
        if key not in self.cache:
            tuples = name in self.fields[kind] and "NamedTuple" in map(dotted, self.classes[kind].bases)
            own = self.family(kind)
            values = [v for v in self.field_values(kind, name, own) if not is_copy(v, name, own)] if tuples else []
            if not tuples and all(id(n) in self.looks for n in self.reads[name] if self.may_be_of(n, own)):
                values = self.values(name, own)
            self.cache[key] = bool(values) and all(map(is_empty_dict, values))
        return self.cache[key]

    def may_be_of(self, node: ast.Attribute, kinds: frozenset[str]) -> bool:
        """Whether an attribute is read of an object that may be of some classes."""
        receiver = node.__dict__.get("receiver", "")
        return receiver in kinds or not (receiver in self.classes or receiver == FOREIGN)

    def values(self, name: str, kinds: frozenset[str] | None = None) -> list[ast.expr | None]:
        """All values that an attribute is given anywhere, None for an unknown one; only of some classes if named."""
        found: list[ast.expr | None] = [None] * (name in self.texts)
        for target, value in self.stored[name]:
            if isinstance(value, ast.Attribute) and is_copy(value, name, kinds):
                continue
            if kinds is None or self.holder(target) in ("", *kinds):
                found.append(value)
        found += [value for kind, value in self.given.get(name, ()) if kinds is None or kind in kinds]
        for kind in self.classes if kinds is None else kinds & set(self.classes):
            found += self.field_values(kind, name, kinds) if name in self.fields[kind] else []
        return found

    def holder(self, target: ast.Attribute) -> str:
        """The program's class of an object in which something is stored, or nothing."""
        if isinstance(target.value, ast.Name) and target.value.id == "self":
            return self.owner.get(id(target), "")
        known = target.__dict__.get("receiver", "")
        return known if known in self.classes or known == FOREIGN else ""

    def field_args(self, kind: str) -> ast.arguments:
        """The parameters of a NamedTuple's or dataclass's constructor."""
        fields = self.fields[kind]
        defaults = [value for value in fields.values() if value is not None]
        return ast.arguments([], [ast.arg(name) for name in fields], None, [], [], None, defaults)

    def of_another(self, call: ast.Call, kind: str) -> bool:
        """Whether a call of `_replace` is of an object of another class than this."""
        receiver = call.func.__dict__.get("receiver", "") if dotted(call.func)[-9:] == "._replace" else ""
        return receiver in self.classes and kind not in self.family(receiver)

    def field_values(self, kind: str, name: str, kinds: frozenset[str] | None) -> list[ast.expr | None]:
        if self.escaped[kind] or kind in self.shadowed or any(kind in self.ancestors(c)[1:] for c in self.classes):
            return [None]
        args = self.field_args(kind)
        found = [self.passed(call, args, 0).get(name) for call in self.calls[kind]]
        found = [v for v in found if not (isinstance(v, ast.Attribute) and is_copy(v, name, kinds))]
        for call in [*self.calls["._replace"], *self.calls["replace"], *self.calls[".replace"]]:
            if self.of_another(call, kind):
                continue
            given = {k.arg: k.value for k in call.keywords}
            value = given.get(name)
            copied = is_copy(value, name, kinds)
            found += [value] if name in given and not copied else [None] * (None in given)
        return found


def agreed_type(found: Sequence[ast.expr | None]) -> ast.expr | None:
    """The type that all of these are."""
    return found[0] if len({ast.unparse(one) if one else "" for one in found}) == 1 else None


def plain_type(kind: ast.expr) -> ast.expr:
    """A type less None, which has no attributes and no parts."""
    if isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.BitOr):
        parts = [part for part in (kind.left, kind.right) if not is_none(part)]
        return plain_type(parts[0]) if len(parts) == 1 else kind
    return kind


def type_parts(kind: ast.expr | None) -> tuple[str, list[ast.expr]]:
    """(name, arguments) of a generic type."""
    kind = plain_type(kind) if kind else None
    if not isinstance(kind, ast.Subscript):
        return "", []
    inner = kind.slice
    return dotted(kind.value).split(".")[-1], list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]


def generic(name: str, *parts: ast.expr | None) -> ast.expr | None:
    """A type of this name, if all its arguments are known."""
    known = [part for part in parts if part is not None]
    inner = known[0] if len(known) == 1 else ast.Tuple(known, ast.Load())
    return ast.Subscript(ast.Name(name, ast.Load()), inner, ast.Load()) if len(known) == len(parts) else None


def is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_tensorial(kind: ast.expr | None) -> bool:
    """Whether a type is a tensor's or an array's, or of what such ones give."""
    return kind is not None and dotted(plain_type(kind)) in TENSORS


SERIES = {"list", "set", "frozenset", "Iterator", "Iterable", "Sequence", "deque", "Generator"}


def each_type(kind: ast.expr | None) -> ast.expr | None:
    """The type of what comes out of an iterable of a type."""
    name, parts = type_parts(kind)
    if name == "tuple" and len(parts) == 2 and isinstance(parts[1], ast.Constant):
        return parts[0]  # tuple[A, ...]
    if name == "tuple":
        return agreed_type(parts) if parts else None
    return parts[0] if parts and (name in SERIES or name in ("dict", "defaultdict", "Counter")) else None


def part_type(kind: ast.expr | None, index: ast.expr) -> ast.expr | None:
    """The type of a subscript."""
    name, parts = type_parts(kind)
    if isinstance(index, ast.Slice):
        return kind if name in ("list", "Sequence") or (name == "tuple" and is_ellipsis(parts[-1])) else None
    if name in ("dict", "defaultdict"):
        return parts[1]
    if name == "tuple" and not is_ellipsis(parts[-1]):
        place = literal(index) if is_literal(index) else None
        return parts[place] if isinstance(place, int) and -len(parts) <= place < len(parts) else None
    return parts[0] if name in ("list", "Sequence", "tuple") else None


def is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def typed(target: ast.expr, kind: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    """Names of a target, each with its type where that is known."""
    name, parts = type_parts(kind)
    if isinstance(target, ast.Name) and kind is not None:
        yield target.id, kind
    elif isinstance(target, ast.Tuple | ast.List) and name == "tuple" and len(parts) == len(target.elts):
        for one, part in zip(target.elts, parts):
            yield from typed(one, part) if not is_ellipsis(parts[-1]) else ()


def made_kind(node: ast.AST | None) -> str:
    """The name of what a call makes."""
    return dotted(node.func) if isinstance(node, ast.Call) else ""


def aliased(node: ast.AST | None) -> list[ast.Attribute | ast.Name]:
    """The functions of which a value is one, or one compiled; nothing if it may be anything else."""
    if isinstance(node, ast.IfExp):
        parts = [aliased(node.body), aliased(node.orelse)]
        return parts[0] + parts[1] if all(parts) else []
    if isinstance(node, ast.Call) and dotted(node.func) == "torch.compile" and node.args:
        return aliased(node.args[0])
    return [node] if isinstance(node, ast.Attribute | ast.Name) else []


def is_empty_dict(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Dict) and not node.keys


def is_empty_set(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and dotted(node.func) == "set" and not node.args


def is_empty(node: ast.AST | None) -> bool:
    return is_empty_dict(node) or (isinstance(node, ast.List) and not node.elts)


def is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def is_load(node: ast.Name) -> bool:
    return node.ctx.__class__ is ast.Load


def is_copy(node: ast.AST | None, name: str, kinds: frozenset[str] | None) -> bool:
    """Whether a value is made of nothing but that attribute of other objects, of some classes or (None) of any."""
    parts = node.values if isinstance(node, ast.Dict) and node.keys and not any(node.keys) else [node]
    alike = [p for p in parts if isinstance(p, ast.Attribute) and p.attr == name]
    return len(alike) == len(parts) and (kinds is None or all(p.__dict__.get("receiver") in kinds for p in alike))


def marks_of(node: Definition) -> list[str]:
    """Names of a definition's decorators."""
    return [dotted(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]


TYPED = {ast.ExceptHandler, ast.Call, ast.ClassDef, ast.AnnAssign, ast.arg, ast.FunctionDef, ast.AsyncFunctionDef}


def type_places(node: ast.AST) -> list[ast.expr]:
    """Where a node names classes without using them: annotations, handlers, bases, the second part of isinstance."""
    if isinstance(node, ast.ExceptHandler):
        return [node.type] if node.type else []
    if isinstance(node, ast.Call) and dotted(node.func) in ("isinstance", "cast", "suppress"):
        return {"isinstance": node.args[1:], "cast": node.args[:1]}.get(dotted(node.func), node.args)
    return node.bases if isinstance(node, ast.ClassDef) else hints(node)


PLAIN_DECORATORS = {"property", "staticmethod", "classmethod", "torch.no_grad", "dataclass", "dataclasses.dataclass"}


def is_opaque(node: Definition) -> bool:
    """Whether a decorator may read a function's source or signature (a kernel, an operator): it stays as it is."""
    marks = [dotted(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
    return not set(marks) <= PLAIN_DECORATORS


def hints(node: ast.AST) -> list[ast.expr]:
    """Type annotations of one node."""
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    if isinstance(node, ast.arg):
        return [node.annotation] if node.annotation else []
    return [node.returns] if isinstance(node, Function) and node.returns else []


# ==== purity ====


class Purity:
    """Whether code has no effect but its value, so that it may go when nobody wants the value."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.asked = facts, dict[int, bool]()

    def expression(self, node: ast.AST | None) -> bool:
        if isinstance(node, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
        if node is None or isinstance(node, ast.Lambda):
            return True
        if isinstance(node, ast.Call) and not self.call(node):
            return False
        return all(map(self.expression, children(node)))

    def call(self, node: ast.Call) -> bool:
        """Whether what is called is pure; its arguments are looked at apart."""
        name, facts = dotted(node.func), self.facts
        head, _, rest = name.partition(".")
        if any(keyword.arg == "out" for keyword in node.keywords) or name.endswith("_"):
            return False  # what is written into an argument
        if name in facts.defs:
            return name not in facts.shadowed and self.definition(facts.defs[name])
        if isinstance(node.func, ast.Name):
            known = name in PURE_BUILTINS or name in facts.pure_imports or name in PURE_CALLS
            return known and all(map(self.callback, callbacks(node, name)))
        if isinstance(node.func, ast.Subscript):  # dict[str, int]()
            kind = dotted(node.func.value)
            return kind in PURE_BUILTINS or kind in facts.pure_imports
        module = facts.modules.get(head, "")
        if name in PURE_CALLS or (module.split(".")[0] in PURE_MODULES and rest):
            return True
        if module in ("torch", "numpy") and "." not in rest:
            return rest.islower() and not rest.startswith(
                ("set_", "manual", "save", "load", "use_", "compile", "no_", *EFFECTS)
            )
        if not isinstance(node.func, ast.Attribute) or (module and module not in ("torch", "numpy")):
            return False
        if node.func.__dict__.get("tensorial") and node.func.attr in LOOKING_METHODS:
            return True
        kind, name = node.func.__dict__.get("receiver", ""), node.func.attr
        named = facts.methods[name] if kind != FOREIGN else []
        own = [method for owner, method in named if kind not in facts.classes or owner in facts.family(kind)]
        others = not own or (kind not in facts.classes and facts.outside(name))  # may be what is called
        return all(map(self.definition, own)) and (name in PURE_METHODS or not others)

    def callback(self, node: ast.AST) -> bool:
        """Whether it does nothing to call what an expression is."""
        if isinstance(node, ast.Lambda):
            return self.expression(node.body)
        return is_literal(node) or self.call(ast.Call(node, [], []))  # type: ignore[arg-type]

    def definition(self, node: ast.AST) -> bool:
        """Whether calling a function, or making an object of a class, is pure. A recursive one is asked once."""
        if id(node) not in self.asked:
            self.asked[id(node)] = True
            self.asked[id(node)] = self.judge(node)
        return self.asked[id(node)]

    def judge(self, node: ast.AST) -> bool:
        if isinstance(node, ast.ClassDef):
            bases = {dotted(b) for kind in self.facts.ancestors(node.name) for b in self.facts.classes[kind].bases}
            harmless = not self.facts.foreign_bases(node.name) or bases - set(self.facts.classes) == {"nn.Module"}
            return is_tuple_class(node) or harmless and self.construction(node)
        assert isinstance(node, Function)
        plain, foreign = set(marks_of(node)) <= {"property", "staticmethod", "torch.no_grad"}, shared(node)
        return plain and all(self.statement(one, foreign) for one in node.body)

    def construction(self, node: ast.ClassDef) -> bool:
        """Whether making an object does nothing but to set its attributes."""
        maker = self.facts.maker(node.name)
        bodies = [m.body for c, m in self.facts.methods["__init__"] if c == maker]
        sets = [one for body in bodies for one in body if isinstance(one, ast.Assign | ast.AnnAssign)]
        mine = all(
            dotted(t).startswith("self.") for one in sets for t, _ in stores(one) if isinstance(t, ast.Attribute)
        )
        rest = [one for body in bodies for one in body if one not in sets and ast.unparse(one) != "super().__init__()"]
        return mine and all(self.expression(one.value) for one in sets) and self.block(rest, {"self"})

    def statement(self, node: ast.stmt, foreign: set[str]) -> bool:
        """Whether a statement changes local names alone, none that came from outside, and raises nothing."""
        if isinstance(node, ast.Return | ast.Expr):
            return self.expression(node.value)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = [target for target, _ in stores(node)]
            local = all(
                isinstance(t, ast.Name) and not (t.id in foreign and isinstance(node, ast.AugAssign)) for t in targets
            )
            return local and self.expression(node.value)
        if isinstance(node, ast.If):
            return self.expression(node.test) and self.block([*node.body, *node.orelse], foreign)
        if isinstance(node, ast.For):
            local = all(isinstance(target, ast.Name) for target, _ in stores(node))
            return local and self.expression(node.iter) and self.block([*node.body, *node.orelse], foreign)
        return isinstance(node, ast.Pass | ast.Import | ast.ImportFrom | ast.Assert | ast.Continue | ast.Break)

    def block(self, body: Sequence[ast.stmt], foreign: set[str]) -> bool:
        return all(self.statement(one, foreign) for one in body)


def callbacks(node: ast.Call, name: str) -> list[ast.expr]:
    """What a builtin function is given to call."""
    return [*(node.args[:1] if name in ("map", "filter") else []), *(k.value for k in node.keywords if k.arg == "key")]


OWN_VALUES = ast.Constant | ast.BinOp | ast.UnaryOp | ast.Compare | ast.JoinedStr | ast.Tuple
OWN_VALUES |= ast.List | ast.Set | ast.Dict | ast.ListComp | ast.SetComp | ast.DictComp
MAKERS = {"zeros", "ones", "empty", "full", "arange", "tensor", "cat", "stack", "array", "concatenate", "clone"}
MAKERS |= {"zeros_like", "ones_like", "empty_like", "full_like", "sum", "len", "int", "float", "list", "dict", "set"}


def is_own(value: ast.AST | None) -> bool:
    """Whether an expression makes an object that nobody else has, or one that never changes."""
    if isinstance(value, ast.IfExp):
        return is_own(value.body) and is_own(value.orelse)
    if made_kind(value) in ("min", "max"):
        return all(map(is_own, value.args))  # type: ignore[union-attr]
    owner, _, name = made_kind(value).rpartition(".")
    made = isinstance(value, ast.Call) and name in MAKERS and not (owner and name in ("float", "int"))
    return made or isinstance(value, OWN_VALUES)


def shared(function: Function) -> set[str]:
    """Names that a function changes in place, where others may have what they are bound to."""
    nodes = list(inside(function))
    grown = [n.target for n in nodes if n.__class__ is ast.AugAssign]  # type: ignore[attr-defined]
    times = Counter(target.id for target in grown if isinstance(target, ast.Name))
    if not times:
        return set()
    found = {arg.arg for arg in [*parameters(function.args), *starred(function.args)]}
    for name, values in bindings(function, nodes).items():
        told = [value for value in values if value is not None]
        found |= set() if all(map(is_own, told)) and len(values) - len(told) == times[name] else {name}
    return found & set(times)


# ==== folding ====


@dataclasses.dataclass
class Scope:
    """Names that a function binds, and static values of its parameters."""

    bound: dict[str, list[ast.AST | None]]
    constants: dict[str, ast.expr]
    configs: set[str]  # parameters that are configurations
    hides: bool = False  # a comprehension's or class's: its names are not known outside, and nothing of them is
    followed: frozenset[str] = frozenset()  # names that only plain assignments of this scope's own code bind
    captured: frozenset[str] = frozenset()  # names that functions inside see, and may fill
    types: dict[str, ast.expr] = dataclasses.field(default_factory=dict)  # names -> annotations, or as loops say
    flow: dict[str, ast.expr | None] = dataclasses.field(default_factory=dict)  # followed -> literal; None: not None
    known: dict[str, ast.expr | None] = dataclasses.field(default_factory=dict)  # names -> types found out


LOOPERS = {"list", "tuple", "sorted", "reversed", "set", "next", "min", "max", "enumerate", "zip"}


FILLS = {"update", "setdefault", "pop", "popitem", "clear"}  # of dicts


class Fold(Rewriter):
    """One round of evaluation: what is known becomes a literal, what cannot be reached goes."""

    def __init__(self, program: Program, facts: Facts) -> None:
        self.program, self.facts, self.purity, self.number = program, facts, Purity(facts), next(program.numbers)
        self.scopes = [Scope(bindings(facts.tree), {}, set())]
        self.changes, self.asking, self.results = 0, set[str](), dict[int, ast.expr | None]()
        self.typing: dict[int, ast.expr | None] = {}  # types of the parts of what is asked for
        self.owners = list[str]()  # classes around
        self.around = list[str]()  # functions around

    # -- names --

    def find(self, name: str) -> Scope | None:
        """The innermost scope that binds a name; None for a builtin."""
        for scope in reversed(self.scopes):
            if name in scope.bound:
                return scope
        return None

    def is_config(self, node: ast.AST | None) -> bool:
        """Whether an expression is a configuration."""
        if isinstance(node, ast.Name):
            scope = self.find(node.id)
            if scope is None or scope.hides:
                return False
            if scope is self.scopes[0]:
                return False
            values = [v for v in scope.bound[node.id] if not isinstance(v, ast.arg)]
            first = node.id in scope.configs or (len(values) == len(scope.bound[node.id]) and bool(values))
            if not first or node.id in self.asking:  # what depends on itself is what the rest of it is
                return first
            self.asking.add(node.id)
            found = all(self.is_config_value(v) for v in values)
            self.asking.discard(node.id)
            return found
        return self.is_config_value(node)

    def is_config_value(self, node: ast.AST | None) -> bool:
        if isinstance(node, ast.Name):
            return self.is_config(node)
        if isinstance(node, ast.Attribute):
            return node.attr in self.program.config_attributes
        if isinstance(node, ast.Call):
            if is_replace(node):
                return self.is_config(node.args[0])
            return self.returned(node) == CONFIG_CLASS
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Call)
            and isinstance(node.slice, ast.Constant)
        ):
            returned, place = self.returned(node.value), node.slice.value
            kinds = returned[6:-1].split(", ") if returned.startswith("tuple[") else []
            return isinstance(place, int) and CONFIG_CLASS in kinds[place : place + 1]
        return False

    def returned(self, node: ast.Call) -> str:
        """The annotated return type of a program function."""
        made = self.called(node)
        kinds = {ast.unparse(f.returns) if f.returns else "" for f in made}
        return kinds.pop() if len(kinds) == 1 else ""

    def called(self, node: ast.Call) -> list[Function]:
        """The program's functions of which a call means one, where that is known."""
        facts, name = self.facts, dotted(node.func)
        if name in facts.defs and name not in facts.shadowed:
            made = facts.defs[name]
            return [made] if isinstance(made, Function) else []
        if not isinstance(node.func, ast.Attribute) or not (own := self.kind_of(node.func.value)):
            return []
        found = [m for c, m in facts.methods.get(node.func.attr, ()) if c in facts.family(own)]
        if not found and (kind := facts.attribute_kind(own, node.func.attr)) and facts.foreign_bases(kind):
            found = [m for c, m in facts.methods["forward"] if c in facts.family(kind)]
        return found if not facts.stored[node.func.attr] or not facts.methods.get(node.func.attr) else []

    # -- values --

    def value(self, node: ast.AST) -> Any:
        """What an expression is, by Python's own evaluation. Raises Unknown."""
        if is_literal(node):
            return literal(node)
        closed = Closed(self)
        try:
            closed.check(node, frozenset())
        except Unknown:
            node.unknown = self.number  # type: ignore[attr-defined]
            raise
        plain = Spelled(self).visit(cloned(node)) if closed.spelled else node
        with warnings.catch_warnings(action="ignore"):  # an expression that makes no sense is left to run time
            code = compile(ast.fix_missing_locations(ast.Expression(cast(ast.expr, plain))), "<build>", "eval")
        try:
            return eval(code, {"__builtins__": {}, **closed.names, "__config__": self.program.frozen})
        except Unknown:
            raise
        except Exception as error:
            raise Unknown from error

    def name_value(self, name: str) -> Any:
        """The value of a name where it is read. Raises Unknown."""
        scope = self.find(name)
        if scope is None:
            if name in PURE_BUILTINS:
                return getattr(builtins, name)
            raise Unknown
        if scope.hides:
            raise Unknown
        if scope is self.scopes[0]:
            return self.program.module_value(name)
        if name in scope.constants:
            return literal(scope.constants[name])
        if scope is self.scopes[-1] and scope.flow.get(name) is not None:
            return literal(scope.flow[name])
        values = scope.bound[name]
        if len(values) != 1:
            raise Unknown
        return literal(values[0])

    # -- what is known along a block --

    def flows(self, flow: dict[str, ast.expr | None]) -> None:
        self.scopes[-1].flow = flow

    def note(self, node: ast.stmt) -> None:
        """What an assignment makes known of local names."""
        scope = self.scopes[-1]
        for target, value in stores(node) if scope.followed else ():
            if isinstance(target, ast.Name) and target.id in scope.followed:
                value = self.part_of(value) or value
                known = is_literal(value) or (is_empty(value) and target.id not in scope.captured)
                others = {name: v for name, v in scope.flow.items() if name != target.id}
                self.flows(others | ({target.id: value if known else None} if known or self.something(value) else {}))

    def forget(self, *nodes: ast.AST) -> None:
        """Names that some code binds are not known beside it, when it may run often, in part or not at all."""
        scope = self.scopes[-1]
        if scope.flow:
            bound = {
                n.id for node in nodes for n in walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            self.flows({name: value for name, value in scope.flow.items() if name not in bound})

    def told(self, test: ast.expr, truth: bool) -> dict[str, ast.expr | None]:
        """What is known where a condition has come out as true or false."""
        scope = self.scopes[-1]
        known, none = dict(scope.flow), ast.Constant(None)
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) is truth:
            for part in test.values:
                known |= {name: value for name, value in self.told(part, truth).items() if name not in known}
        elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self.told(test.operand, not truth)
        elif isinstance(test, ast.Name) and test.id in scope.followed and truth and test.id not in known:
            known[test.id] = None
        elif isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.left, ast.Name):
            kind, right = test.ops[0], test.comparators[0]
            about_none = (
                isinstance(right, ast.Constant) and right.value is None and isinstance(kind, ast.Is | ast.IsNot)
            )
            if test.left.id in scope.followed and about_none:
                known[test.left.id] = none if isinstance(kind, ast.Is) is truth else None
        return known

    def joined(self, one: dict[str, ast.expr | None], two: dict[str, ast.expr | None]) -> dict[str, ast.expr | None]:
        """What two ways to the same place agree on."""
        alike = dict[str, ast.expr | None]()
        for name in one.keys() & two.keys():
            a, b = one[name], two[name]
            if is_empty(a) or is_empty(b):
                alike |= {name: a} if type(a) is type(b) else {}
            elif a is not None and b is not None:
                alike |= {name: a} if same(literal(a), literal(b)) else {}
            elif all(x is None or literal(x) is not None for x in (a, b)):
                alike[name] = None
        return {name: alike[name] for name in sorted(alike)}

    def branches(self, test: ast.expr, *bodies: list[ast.stmt]) -> list[list[ast.stmt]]:
        """Two blocks of which one runs."""
        starts, made, ends = [self.told(test, True), self.told(test, False)], list[list[ast.stmt]](), list[Any]()
        for start, body in zip(starts, bodies):
            self.flows(start)
            made.append(self.block(body) if body else [])
            if not (made[-1] and isinstance(made[-1][-1], ast.Return | ast.Raise | ast.Continue | ast.Break)):
                ends.append(self.scopes[-1].flow)
        self.flows(self.joined(*ends) if len(ends) == 2 else ends[0] if ends else {})
        return made

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        node.test = self.visit(node.test)
        before = self.scopes[-1].flow
        yes, no = self.told(node.test, True), self.told(node.test, False)
        self.flows(yes)
        node.body = self.visit(node.body)
        self.flows(no)
        node.orelse = self.visit(node.orelse)
        self.flows(before)
        return node

    def attribute_symbol(self, node: ast.Attribute) -> ast.expr | None:
        """The static value of an attribute that everybody sets to the same."""
        name = node.attr
        if self.is_config(node.value) or dotted(node).split(".")[0] in self.facts.modules:
            return None
        own = self.kind_of(node.value)
        kinds = self.facts.family(own) if own else None
        if kinds is None and self.facts.outside(name):
            return None
        if own and self.facts.stays_empty(own, name):
            return ast.Dict([], [])
        methods = [m for c, m in self.facts.methods.get(name, ()) if kinds is None or c in kinds]
        if methods:
            results = [self.constant_result(m) if marks_of(m) == ["property"] else None for m in methods]
            stored = any(kinds is None or self.facts.holder(t) in ("", *kinds) for t, _ in self.facts.stored[name])
            stored |= kinds is None and any(name in fields for fields in self.facts.fields.values())
            return self.facts.agreed(results) if all(results) and not stored else None
        return self.facts.attribute(name, kinds)

    def looked_up(self, node: ast.Attribute) -> ast.expr | None:
        """What a property returns, if that is an expression, in place of its name."""
        own = self.kind_of(node.value)
        found = [m for c, m in self.facts.methods.get(node.attr, ()) if own and c in self.facts.family(own)]
        if len(found) != 1 or marks_of(found[0]) != ["property"] or isinstance(node.ctx, ast.Store):
            return None
        function, name = found[0], found[0].args.args[0].arg
        if own == CONFIG_CLASS or not self.lends(function) or not self.fits(function.body[0].value, {name: node.value}):  # type: ignore
            return None
        body = function.body[0].value  # type: ignore[attr-defined]
        if sum(1 for _ in walk(body)) > 7 and self.facts.loads["." + node.attr] > 1:
            return None
        made = Replace({name: node.value}).visit(cloned(body))
        made.__dict__.setdefault("promised", function.returns)
        return made

    def kind_of(self, node: ast.AST | None) -> str:
        """The program's class of an expression, or nothing: by its construction, or as annotations say."""
        return self.facts.class_of(self.type_of(node))

    def type_of(self, node: ast.AST | None) -> ast.expr | None:
        """The type of an expression, as an annotation; None if unknown."""
        if node is None or (rule := TYPE_RULES.get(node.__class__)) is None:
            return node.__dict__.get("promised") if node else None
        first, key = not self.typing, id(node)
        if key not in self.typing:
            self.typing[key] = rule(self, node) or node.__dict__.get("promised")  # said by a function put there
        found = self.typing[key]
        if first:
            self.typing.clear()  # the tree may change before the next question
        return found

    def type_of_Name(self, node: ast.Name) -> ast.expr | None:
        if node.id == "self" and self.owners and self.owners[-1]:
            return ast.Name(self.owners[-1], ast.Load())
        scope = self.find(node.id)
        if scope is None or scope is self.scopes[0]:
            return self.facts.module_types.get(node.id) if scope else None
        if node.id in scope.types or scope.hides:
            return scope.types.get(node.id)
        values, key = scope.bound[node.id], f"{id(scope)} {node.id}"
        if isinstance(values[0], ast.arg):
            return values[0].annotation
        if key in self.asking or None in values or len(values) > 4:
            return None
        if node.id in scope.known:
            return scope.known[node.id]
        first = not self.asking
        self.asking.add(key)
        scopes = self.scopes
        self.scopes = scopes[: next(i for i, one in enumerate(scopes) if one is scope) + 1]
        own = (f"{node.id}._replace", "dataclasses.replace")  # of the same class as before
        found = agreed_type([self.type_of(v) for v in values if not is_none(v) and made_kind(v) not in own])
        self.scopes = scopes
        self.asking.discard(key)
        if first:  # not in the middle of a question about what depends on it
            scope.known[node.id] = found
        return found

    def type_of_Attribute(self, node: ast.Attribute) -> ast.expr | None:
        if is_tensorial(kind := self.type_of(node.value)):
            return TENSORIAL
        own = self.facts.class_of(kind)
        return self.facts.attribute_type(own, node.attr) if own else None

    def type_of_Subscript(self, node: ast.Subscript) -> ast.expr | None:
        kind = self.type_of(node.value)
        return TENSORIAL if is_tensorial(kind) else part_type(kind, node.slice)

    def type_of_BinOp(self, node: ast.BinOp) -> ast.expr | None:
        return TENSORIAL if any(is_tensorial(self.type_of(part)) for part in (node.left, node.right)) else None

    def type_of_Compare(self, node: ast.Compare) -> ast.expr | None:
        return TENSORIAL if any(is_tensorial(self.type_of(part)) for part in (node.left, *node.comparators)) else None

    def of_arrays(self, node: ast.expr) -> bool:
        """Whether a function is one of torch or numpy that gives no object of the program."""
        head, _, name = dotted(node).partition(".")
        known = self.facts.modules.get(head) in ("torch", "numpy", "torch.nn.functional")
        fit = name.isidentifier() and name.islower() and name not in ("compile", "load", "array_split")
        return known and fit and self.find(head) is self.scopes[0]

    def type_of_IfExp(self, node: ast.IfExp) -> ast.expr | None:
        return agreed_type([self.type_of(part) for part in (node.body, node.orelse) if not is_none(part)])

    def type_of_List(self, node: ast.List | ast.Tuple) -> ast.expr | None:
        return generic("list", agreed_type([self.type_of(one) for one in node.elts])) if node.elts else None

    type_of_Tuple = type_of_List

    def type_of_ListComp(self, node: Any) -> ast.expr | None:
        depth = len(self.scopes)
        for one in node.generators:
            self.scopes.append(self.looped(one))
        found = generic("list", self.type_of(node.elt))
        del self.scopes[depth:]
        return found

    type_of_GeneratorExp = type_of_SetComp = type_of_ListComp

    def looped(self, node: ast.comprehension) -> Scope:
        """The names of one loop of a comprehension, as a scope."""
        types_ = dict(typed(node.target, each_type(self.type_of(node.iter))))
        names = {n.id for n in walk(node.target) if isinstance(n, ast.Name)}
        return Scope({name: [None, None] for name in names}, {}, set(), True, types=types_)

    def type_of_Call(self, node: ast.Call) -> ast.expr | None:
        name, args = dotted(node.func), node.args
        if name in self.facts.classes and name not in self.facts.shadowed:
            return ast.Name(name, ast.Load())
        if name in self.facts.foreign_classes:
            return FOREIGN_OBJECT
        if self.of_arrays(node.func) or (
            isinstance(node.func, ast.Attribute) and is_tensorial(self.type_of(node.func.value))
        ):
            return TENSORIAL
        if is_replace(node):
            return self.type_of(args[0])
        if isinstance(node.func, ast.Name) and args and self.find(name) is None:
            return self.type_of_builtin(name, args)
        if isinstance(node.func, ast.Attribute) and (found := self.type_of_method(node.func)):
            return found
        if called := self.called(node):
            return agreed_type([f.returns for f in called])
        kind, parts = type_parts(self.type_of(node.func))
        scope = self.find(name) if isinstance(node.func, ast.Name) else None
        values = scope.bound[name] if scope and scope is not self.scopes[0] and not scope.hides else []
        aims = aliased(values[0]) if len(values) == 1 and not isinstance(values[0], ast.Name) else []
        if aims and kind != "Callable":
            return agreed_type([self.type_of(ast.Call(aim, [], [])) for aim in aims])
        return parts[-1] if kind == "Callable" else None

    def type_of_builtin(self, name: str, args: list[ast.expr]) -> ast.expr | None:
        """The type of what some functions give that take an iterable."""
        if any(isinstance(arg, ast.Starred) for arg in args):
            return None
        inner = [each_type(self.type_of(arg)) for arg in args] if name in LOOPERS else [None]
        if name in ("list", "tuple", "sorted", "reversed", "set"):
            return generic("list", inner[0])
        if name in ("next", "min", "max"):
            return inner[0] if len(args) == 1 else None
        unknown = ast.Name("object", ast.Load())
        parts = [part or unknown for part in inner]
        if name == "enumerate":
            return generic("list", generic("tuple", unknown, parts[0]))
        return generic("list", generic("tuple", *parts)) if name == "zip" else None

    def type_of_method(self, node: ast.Attribute) -> ast.expr | None:
        """The type of what a container's method gives."""
        if node.attr not in ("values", "items", "keys", "get", "pop", "copy", "_replace"):
            return None
        kind = self.type_of(node.value)
        if node.attr == "_replace":
            return kind if self.facts.class_of(kind) else None
        name, parts = type_parts(kind)
        if name not in ("dict", "defaultdict"):
            return kind if name == "list" and node.attr == "copy" else None
        key, value = parts
        made = {"values": value, "keys": key, "items": generic("tuple", key, value)}
        return generic("list", made[node.attr]) if node.attr in made else kind if node.attr == "copy" else value

    # -- expressions --

    def visit(self, node: ast.AST) -> Any:
        new = super().visit(node)
        if isinstance(new, ast.expr) and not isinstance(getattr(new, "ctx", None), ast.Store | ast.Del):
            return self.reduced(new)
        return new

    def changed(self, node: Any) -> Any:
        self.changes += 1
        return node

    def reduced(self, node: ast.expr) -> ast.expr:
        """An expression as a literal, if it is known and that is no longer; else simplified."""
        if is_literal(node) or isinstance(node, ast.Starred | ast.Slice | ast.Lambda | ast.FormattedValue):
            return node
        try:
            value = self.value(node)
            new = node if type(value) is set and not value else lifted(value)
        except Unknown:
            return self.simplified(node)
        if type(value) is set and not value:
            return node if is_empty_set(node) else self.changed(parsed("set()"))
        size = len(repr(value))
        if not isinstance(node, ast.Call) and size > 60 and size > len(ast.unparse(node)):
            return self.simplified(node)
        if isinstance(node, ast.List | ast.Dict | ast.Set | ast.Tuple):
            return self.simplified(node)
        return self.changed(new)

    def simplified(self, node: ast.expr) -> ast.expr:
        rule = getattr(self, "simplify_" + type(node).__name__, None)
        new = rule(node) if rule else None
        return node if new is None else self.changed(new)

    def truth(self, node: ast.AST) -> bool | None:
        """Whether an expression is true in a condition; None if unknown."""
        try:
            return bool(self.value(node))
        except Unknown:
            if is_empty(node) or (isinstance(node, ast.Name) and node.id in self.empties()):
                return False
            if not isinstance(node, ast.BoolOp):
                parts = node.elts if isinstance(node, ast.Tuple | ast.List) else []
                there = any(not isinstance(part, ast.Starred) for part in parts)
                return True if there and all(map(self.purity.expression, parts)) else None
        deciding, truths = isinstance(node.op, ast.Or), [self.truth(part) for part in node.values]
        if deciding in truths and all(map(self.purity.expression, node.values)):
            return deciding
        return (not deciding) if truths == [not deciding] * len(truths) else None

    def simplify_Name(self, node: ast.Name) -> ast.expr | None:
        scope = self.find(node.id)
        if scope and not scope.hides and node.id in scope.constants:
            value = scope.constants[node.id]
            if is_empty(value) or is_empty_set(value):
                return cloned(value)
            if self.facts.symbol(value) and (is_literal(value) or self.visible(value)):
                return cloned(value)
        if scope and not scope.hides and scope is not self.scopes[0] and len(scope.bound[node.id]) == 1:
            part = self.part_of(scope.bound[node.id][0])
            return part if isinstance(part, ast.Constant) else None
        return None

    def part_of(self, node: ast.AST | None) -> ast.expr | None:
        """A literal that always is this part of what a function of the program returns."""
        if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call) and is_literal(node.slice)):
            return None
        made, place = self.called(node.value), literal(node.slice)
        returns = [n.value for f in made for n in inside(f) if isinstance(n, ast.Return)]
        if not returns or not all(isinstance(r, ast.Tuple) and 0 <= place < len(r.elts) for r in returns):
            return None
        parts = [r.elts[place] for r in returns if isinstance(r, ast.Tuple)]
        if any(isinstance(n, ast.Starred) for r in returns if isinstance(r, ast.Tuple) for n in r.elts):
            return None
        ends = all(isinstance(f.body[-1], ast.Return) for f in made)
        agreed = parts[0] if all(map(is_empty_dict, parts)) else self.facts.agreed(parts)
        return cloned(agreed) if ends and isinstance(agreed, ast.Constant | ast.Dict) else None

    def visible(self, value: ast.expr) -> bool:
        """Whether a module's name means the same here."""
        return self.find(dotted(value).split(".")[0]) is self.scopes[0]

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        node.value = self.visit(node.value)
        kind = self.type_of(node.value)
        head = dotted(node).split(".")[0]
        other = self.facts.foreign_type(kind) or (head in self.facts.modules and self.find(head) is self.scopes[0])
        node.receiver = self.facts.class_of(kind) or FOREIGN * other  # type: ignore[attr-defined]
        node.tensorial = is_tensorial(kind)  # type: ignore[attr-defined]
        return node

    def simplify_Attribute(self, node: ast.Attribute) -> ast.expr | None:
        value = self.attribute_symbol(node)
        known = value is not None and (is_literal(value) or is_empty_dict(value) or self.visible(value))
        if known and self.purity.expression(node.value):
            return cloned(value)
        kind = self.facts.classes.get(made_kind(node.value))
        if kind is not None and "NamedTuple" in map(dotted, kind.bases) and isinstance(node.value, ast.Call):
            given = self.facts.passed(node.value, self.facts.field_args(kind.name), 0)  # a field of what is just made
            parts = [*node.value.args, *(k.value for k in node.value.keywords)]
            if given.get(node.attr) and all(p is given[node.attr] or self.purity.expression(p) for p in parts):
                return given[node.attr]
        return self.looked_up(node)

    def simplify_BoolOp(self, node: ast.BoolOp) -> ast.expr | None:
        is_or, parts = isinstance(node.op, ast.Or), list[ast.expr]()
        for place, part in enumerate(node.values):
            truth = self.truth(part)
            if truth is is_or:  # decides; nothing behind it is looked at
                parts.append(part)
                break
            if truth is None or place + 1 == len(node.values):
                parts.append(part)
        if len(parts) == len(node.values):
            return None
        return ast.BoolOp(node.op, parts) if len(parts) > 1 else parts[0]

    def simplify_IfExp(self, node: ast.IfExp) -> ast.expr | None:
        truth = self.truth(node.test)
        if truth is None:
            alike = ast.dump(node.body) == ast.dump(node.orelse) and self.purity.expression(node.test)
            return node.body if alike else None
        return node.body if truth else node.orelse

    def simplify_Compare(self, node: ast.Compare) -> ast.expr | None:
        """A chain of comparisons less those that are known; identity with None; kinds of device that are not there."""
        sides, kept = [node.left, *node.comparators], list[tuple[ast.expr, ast.cmpop, ast.expr]]()
        for left, op, right in zip(sides, node.ops, sides[1:]):
            truth = self.compared(left, op, right)
            if truth is False and all(map(self.purity.expression, sides)):
                return ast.Constant(False)
            kept += (
                [] if truth and self.purity.expression(left) and self.purity.expression(right) else [(left, op, right)]
            )
        if len(kept) == len(node.ops):
            return None
        if not kept:
            return ast.Constant(True)
        joined = all(a[2] is b[0] for a, b in zip(kept, kept[1:]))
        return ast.Compare(kept[0][0], [op for _, op, _ in kept], [r for _, _, r in kept]) if joined else None

    def compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> bool | None:
        """The truth of one comparison, None if unknown."""
        truth = self.truth(ast.Compare(left, [op], [right]))
        if truth is not None:
            return truth
        if isinstance(op, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
            return isinstance(op, ast.IsNot) if self.something(left) else None
        kind = left.attr if isinstance(left, ast.Attribute) else ""
        known = isinstance(right, ast.Constant) and right.value in self.program.absent
        if isinstance(op, ast.Eq | ast.NotEq) and kind == "type" and known:  # a device's
            return isinstance(op, ast.NotEq)
        if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Name | ast.Dict | ast.Tuple | ast.List):
            return isinstance(op, ast.NotIn) if self.is_empty(right) else None
        if isinstance(left, ast.Attribute) and is_literal(right) and (own := self.kind_of(left.value)):
            found = self.facts.values(left.attr, self.facts.family(own))
            truths = {self.truth(ast.Compare(v, [op], [right])) if v and is_literal(v) else None for v in found}
            return truths.pop() if len(truths) == 1 and not self.facts.methods.get(left.attr) else None
        return None

    def is_empty(self, node: ast.expr) -> bool:
        registry = self.program.registry(node.id) if isinstance(node, ast.Name) and self.visible(node) else node
        return isinstance(registry, ast.Dict) and not registry.keys

    def something(self, node: ast.AST | None, depth: int = 0) -> bool:
        """Whether a value is certainly not None."""
        if node is None or depth > 4:
            return False
        if isinstance(node, ast.Tuple | ast.List | ast.Dict | ast.Set | ast.JoinedStr | ast.Lambda | ast.Compare):
            return True
        if isinstance(node, ast.Constant):
            return node.value is not None
        if isinstance(node, ast.BinOp | ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp):
            return True
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            known = name in self.facts.classes or name in ("nn.Parameter", "torch.tensor", "torch.stack", "torch.empty")
            return known or self.returned(node).split("[")[0] in SOMETHING
        if isinstance(node, ast.Name):
            return self.something_named(node.id, depth)
        if isinstance(node, ast.IfExp):
            return self.something(node.body, depth + 1) and self.something(node.orelse, depth + 1)
        if isinstance(node, ast.Attribute) and (own := self.kind_of(node.value)) and self.facts.fields.get(own):
            values = self.facts.values(node.attr, self.facts.family(own))
            if values and all(v and (v.__dict__.get("there") or self.something(v, depth + 1)) for v in values):
                return True
        if isinstance(node, ast.Attribute) and not self.facts.outside(node.attr):
            values = self.facts.values(node.attr)
            return bool(values) and all(
                isinstance(v, ast.Call | ast.Constant | ast.Tuple | ast.Dict) and self.something(v, depth + 1)
                for v in values
            )
        return False

    def something_named(self, name: str, depth: int) -> bool:
        scope = self.find(name)
        if scope is None or scope.hides or scope is self.scopes[0]:
            return False
        if scope is self.scopes[-1] and name in scope.flow and scope.flow[name] is None:
            return True
        values = scope.bound[name]
        parts = [v for v in values if not isinstance(v, ast.arg)]
        if len(parts) < len(values):
            return name in scope.configs
        return all(
            isinstance(v, ast.expr) and not isinstance(v, ast.Name) and self.something(v, depth + 1) for v in parts
        )

    def simplify_Subscript(self, node: ast.Subscript) -> ast.expr | None:
        """The entry of a dict that is written out, or of a registry, for a known key."""
        key = node.slice
        if not is_literal(key):
            alike = isinstance(node.value, ast.Attribute | ast.BinOp | ast.Constant | ast.Tuple)
            alike &= not isinstance(key, ast.Slice) and self.purity.expression(key)
            return self.any_part(node.value) if alike else None
        if isinstance(node.value, ast.Name) and self.visible(node.value):
            entry = self.program.entry(node.value.id, literal(key))
            fit = isinstance(entry, ast.Name | ast.Attribute) or (
                isinstance(entry, ast.Lambda) and self.closed_lambda(entry)
            )
            return cloned(entry) if entry is not None and fit else None
        if isinstance(node.value, ast.Tuple) and isinstance(key, ast.Constant) and isinstance(key.value, int):
            plain = all(map(self.purity.expression, node.value.elts)) and key.value < len(node.value.elts)
            plain &= not any(isinstance(one, ast.Starred) for one in node.value.elts)
            return node.value.elts[key.value] if plain else None
        if isinstance(node.value, ast.Dict) and all(is_literal(k) for k in node.value.keys):
            found = [v for k, v in zip(node.value.keys, node.value.values) if same(literal(k), literal(key))]
            return found[-1] if found and all(map(self.purity.expression, node.value.values)) else None
        return None

    def any_part(self, node: ast.expr) -> ast.expr | None:
        """The literal that every part of a sequence is."""
        with suppress(Unknown):
            value = self.value(node)
            if isinstance(value, tuple | list | str) and value and all(same(part, value[0]) for part in value):
                return lifted(value[0])
        return None

    def closed_lambda(self, node: ast.Lambda) -> bool:
        """Whether a lambda's free names mean the same here as in the module."""
        own = {a.arg for a in parameters(node.args)}
        free = {n.id for n in walk(node.body) if isinstance(n, ast.Name)} - own
        return all(self.find(name) in (None, self.scopes[0]) for name in free)

    def simplify_Call(self, node: ast.Call) -> ast.expr | None:
        if dotted(node.func) == "cast" and len(node.args) == 2:
            return node.args[1]
        if (inner := self.inlined(node)) is not None:
            return inner
        if dotted(node.func) in self.facts.fields:
            for given in [*node.args, *(k.value for k in node.keywords)]:
                given.__dict__["there"] = self.something(given)
        if (made := self.facts.classes.get(dotted(node.func))) and self.says_nothing(made):
            return ast.Tuple([ast.Constant(None)], ast.Load())
        if isinstance(node.func, ast.Attribute) and node.func.attr == "_replace" and not node.args:
            alike = [k for k in node.keywords if k.arg and self.is_own(k.value, node.func.value, k.arg)]
            if len(alike) == len(node.keywords):  # of none, or of what it is anyway
                return node.func.value
            if alike:
                node.keywords = [k for k in node.keywords if k not in alike]
                return node
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and is_empty_dict(node.func.value):
            return ast.Constant(None) if len(node.args) == 1 and self.purity.expression(node.args[0]) else None
        if dotted(node.func) == "zip" and any(k.arg == "strict" for k in node.keywords):
            node.keywords = [k for k in node.keywords if k.arg != "strict"]  # an assertion
            return node
        if isinstance(node.func, ast.Lambda):
            return self.applied(node.func, node)
        if isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name) and not node.args:
            empty_ones = {"dict": ast.Dict([], []), "list": ast.List([], ast.Load())}  # dict[str, int]() is {}
            if empty_one := cloned(empty_ones.get(node.func.value.id)):
                empty_one.promised = node.func
            return empty_one
        if is_replace(node) and self.is_config(node.args[0]):
            kept = [k for k in node.keywords if k.arg is None or k.arg in self.program.open]
            if len(kept) < len(node.keywords):
                node.keywords = kept
                return node if kept else node.args[0]
        empty = [k for k in node.keywords if k.arg is None and isinstance(k.value, ast.Dict) and not k.value.keys]
        gone = [a for a in node.args if isinstance(a, ast.Starred) and isinstance(a.value, ast.Tuple | ast.List)]
        if empty or gone:
            node.keywords = [k for k in node.keywords if k not in empty]
            node.args = [p for a in node.args for p in (a.value.elts if a in gone else [a])]  # type: ignore[attr-defined]
            return node
        if isinstance(node.func, ast.Name) and node.func.id in EATERS and self.find(node.func.id) is None and node.args:
            one = node.args[0]
            if (
                isinstance(one, ast.GeneratorExp)
                and (self.truth_of_loop(one.generators[0].iter) or self.none_pass(one.generators[0]))
                and self.purity.expression(one.generators[0].iter)
            ):
                node.args[0] = ast.Tuple([], ast.Load())
                return node
        if dotted(node.func) == "isinstance" and len(node.args) == 2 and self.purity.expression(node.args[0]):
            kind = dotted(node.args[1])
            if kind in self.facts.classes and self.visible(node.args[1]) and not self.facts.made(kind):
                return ast.Constant(False)
        path = dotted(node.func).split(".")
        if path[-1] == "is_available" and path[-2:-1] in [[d] for d in self.program.absent]:
            return ast.Constant(False)
        result = self.result(node)
        pure = all(map(self.purity.expression, [*node.args, *(k.value for k in node.keywords)]))
        own = isinstance(node.func, ast.Name) or (
            isinstance(node.func, ast.Attribute) and self.purity.expression(node.func.value)
        )
        if result is None or not (pure and own):
            return None
        return ast.Dict([], []) if is_empty_dict(result) else ast.Constant(literal(result))

    def says_nothing(self, kind: ast.ClassDef) -> bool:
        """Whether a class is a NamedTuple without methods that has lost its last field, too: a tuple serves as well."""
        alone = "NamedTuple" in map(dotted, kind.bases) and all(isinstance(one, ast.Pass) for one in kind.body)
        return alone and kind.name not in self.facts.shadowed and not self.facts.escaped[kind.name]

    def is_own(self, value: ast.expr, node: ast.expr, name: str) -> bool:
        """Whether a value is an object's field, or a copy of that dict, which nobody changes."""
        if isinstance(value, ast.Dict) and len(value.keys) == 1 and value.keys[0] is None:
            held = (
                n.value for n in self.facts.nodes if isinstance(n, ast.Subscript) and not isinstance(n.ctx, ast.Load)
            )
            asked = (n.value for n in self.facts.nodes if isinstance(n, ast.Attribute) and n.attr in FILLS)
            if any(isinstance(n, ast.Attribute) and n.attr == name for n in (*held, *asked)):
                return False
            value = value.values[0]
        same_ = isinstance(value, ast.Attribute) and value.attr == name and isinstance(node, ast.Name)
        return same_ and dotted(value.value) == node.id  # type: ignore[attr-defined]

    def inlined(self, node: ast.Call) -> ast.expr | None:
        """The expression that a function of the program returns, if that is all it does, with the arguments put in."""
        called = self.called(node)
        if len(called) != 1 or not isinstance(called[0].body[-1], ast.Return) or not self.lends(called[0]):
            return None
        function = called[0]
        body, bare = function.body[-1].value, any(isinstance(a, ast.Starred) for a in node.args)  # type: ignore
        if bare or any(k.arg is None for k in node.keywords) or function.name in self.around:
            return None
        method = isinstance(node.func, ast.Attribute)
        given = self.facts.passed(node, function.args, int(method))
        if method:
            named = node.func.attr == function.name  # type: ignore[attr-defined]
            given[function.args.args[0].arg] = node.func.value if named else node.func  # type: ignore[attr-defined]
        sites = self.facts.calls["." * method + function.name] if not method or named else [node, node]
        small = sum(1 for _ in walk(body)) <= 5 + 2 * len(given)
        small |= len(sites) < 4 and method and is_tuple_class(self.facts.classes.get(self.kind_of(node.func.value)))  # type: ignore[attr-defined]
        if (len(sites) > 1 and not small) or not (self.fits(body, given) or self.passes_on(function, body, node)):
            return None
        made = Replace({name: value for name, value in given.items() if value}).visit(cloned(body))
        made.__dict__.setdefault("promised", function.returns)
        return made

    def passes_on(self, function: Function, body: ast.expr, node: ast.Call) -> bool:
        """Whether a function only hands its arguments, in their order, to another one."""
        if not isinstance(body, ast.Call) or body.keywords or node.keywords:
            return False
        method = isinstance(node.func, ast.Attribute)
        names, given = [a.arg for a in function.args.args], [dotted(a) for a in body.args]
        own = method and isinstance(body.func, ast.Attribute) and dotted(body.func.value) == names[0]
        plain = isinstance(body.func, ast.Name) and body.func.id not in names
        known = not method or isinstance(node.func.value, ast.Name)  # type: ignore[attr-defined]
        return known and (own or plain) and given == names[int(method) :] and len(given) == len(node.args)

    def lends(self, function: Function) -> bool:
        """Whether a function is one expression, of its parameters and what everybody sees."""
        own = {a.arg for a in parameters(function.args)}
        plain = len(function.body) == 1 and set(marks_of(function)) <= {"property"} and not starred(function.args)
        if not plain or function.body[0].value is None or function.name.startswith("__"):  # type: ignore[attr-defined]
            return False
        nodes = list(walk(function.body[0]))
        if any(isinstance(n, ast.NamedExpr | ast.Yield | ast.YieldFrom | ast.Await | ast.Lambda) for n in nodes):
            return False
        names = {n.id for n in nodes if isinstance(n, ast.Name)}
        if any(isinstance(n, ast.comprehension) for n in nodes) or {function.name, "super"} & names:
            return False
        inner = self.facts.defs.get(function.name) is function or function.name in self.facts.methods
        return inner and all(self.find(name) in (None, self.scopes[0]) for name in names - own)

    def fits(self, body: ast.expr, given: dict[str, ast.expr | None]) -> bool:
        """Whether arguments can stand where the parameters do: none is computed twice, later, or not at all."""
        uses = Counter(n.id for n in walk(body) if isinstance(n, ast.Name))
        if any(value is None for value in given.values()):
            return False
        moved = [n for n, v in given.items() if v and not isinstance(v, ast.Name | ast.Constant)]
        moved = [n for n in moved if uses[n] or not self.purity.expression(given[n])]
        still = self.purity.expression(body)
        calm = [n for n in moved if still and dotted(given[n] or body)]
        rest = [n for n in moved if n not in calm]
        if not rest:
            return True
        first = [n.id for n in early(body, self.facts.modules)[0]]
        return len(rest) == 1 and uses[rest[0]] == 1 and rest[0] in first and len(moved) == 1

    def applied(self, function: ast.Lambda, call: ast.Call) -> ast.expr | None:
        """A lambda's body with its arguments put in, where each is simple or used at most once and in order."""
        names = [a.arg for a in parameters(function.args)]
        plain = not (starred(function.args) or function.args.defaults or function.args.kw_defaults or call.keywords)
        simple = all(isinstance(a, ast.Name | ast.Constant) or dotted(a) for a in call.args)
        if (
            not plain
            or len(names) != len(call.args)
            or not simple
            or any(isinstance(n, ast.Lambda | ast.comprehension) for n in walk(function.body))
        ):
            return None
        given = dict(zip(names, call.args))
        return Replace(given).visit(cloned(function.body))

    def result(self, node: ast.Call) -> ast.expr | None:
        """The literal that a call returns whatever is passed and whoever is called; it must do nothing else."""
        if isinstance(node.func, ast.Name):
            made = self.facts.defs.get(node.func.id)
            called = [made] if isinstance(made, Function) and node.func.id not in self.facts.shadowed else []
        elif isinstance(node.func, ast.Attribute):
            own = self.kind_of(node.func.value)
            kinds = self.facts.family(own) if own else None
            called = [m for c, m in self.facts.methods.get(node.func.attr, ()) if kinds is None or c in kinds]
            called = (
                [] if self.facts.stored[node.func.attr] or (not own and self.facts.outside(node.func.attr)) else called
            )
        else:
            called = []
        results = [self.constant_result(one) for one in called] if called else []
        if results and all(map(is_empty_dict, results)):
            return results[0]
        return self.facts.agreed(results) if results and all(results) else None

    def constant_result(self, function: Function) -> ast.expr | None:
        if id(function) not in self.results:
            self.results[id(function)] = self.find_result(function)
        return self.results[id(function)]

    def find_result(self, function: Function) -> ast.expr | None:
        own = list(inside(function))
        if any(isinstance(n, ast.Yield | ast.YieldFrom) for n in own) or not self.purity.definition(function):
            return None
        found = [n.value or ast.Constant(None) for n in own if isinstance(n, ast.Return)]
        if not (function.body and isinstance(function.body[-1], ast.Return)):
            found.append(ast.Constant(None))
        if all(map(is_empty_dict, found)):
            return found[0]
        agreed = self.facts.agreed(found)
        return agreed if is_literal(agreed) and isinstance(agreed, ast.Constant) else None

    def simplify_JoinedStr(self, node: ast.JoinedStr) -> ast.expr | None:
        """Known parts become text; neighbouring texts are joined."""
        parts, changed = list[Any](), False
        for part in node.values:
            try:
                text: ast.expr = (
                    ast.Constant(self.value(ast.JoinedStr([part]))) if isinstance(part, ast.FormattedValue) else part
                )
            except Unknown:
                text = part
            changed |= text is not part
            if parts and isinstance(text, ast.Constant) and isinstance(parts[-1], ast.Constant):
                parts[-1], changed = ast.Constant(literal(parts[-1]) + literal(text)), True
            elif not (isinstance(text, ast.Constant) and text.value == ""):
                parts.append(text)
        return ast.JoinedStr(parts) if changed else None

    def simplify_BinOp(self, node: ast.BinOp) -> ast.expr | None:
        """Texts and lists joined with empty ones, dicts with {}; a tuple once."""
        if isinstance(node.op, ast.Add) and isinstance(node.right, ast.Tuple) and not node.right.elts:
            left = node.left.left if isinstance(node.left, ast.BinOp) else node.left
            return node.left if isinstance(left, ast.Tuple) else None
        if isinstance(node.op, ast.Mult) and isinstance(node.left, ast.Tuple) and is_literal(node.right):
            return node.left if same(literal(node.right), 1) else None
        for one, other in ((node.left, node.right), (node.right, node.left)):
            if (
                isinstance(node.op, ast.Add)
                and isinstance(one, ast.Constant)
                and one.value == ""
                and isinstance(other, ast.JoinedStr)
            ):
                return other
            if (
                isinstance(node.op, ast.Add)
                and isinstance(one, ast.List)
                and not one.elts
                and isinstance(other, ast.List | ast.ListComp)
            ):
                return other
            if (
                isinstance(node.op, ast.BitOr)
                and isinstance(one, ast.Dict)
                and not one.keys
                and isinstance(other, ast.Dict | ast.DictComp)
            ):
                return other
        return None

    def simplify_Tuple(self, node: ast.Tuple | ast.List) -> ast.expr | None:
        """Starred tuples and lists that are written out, put in."""
        flat = [isinstance(e, ast.Starred) and isinstance(e.value, ast.Tuple | ast.List) for e in node.elts]
        if not any(flat):
            return None
        elements = [p for e, f in zip(node.elts, flat) for p in (e.value.elts if f else [e])]  # type: ignore[attr-defined]
        return type(node)(elements, ast.Load())

    simplify_List = simplify_Tuple

    def simplify_Dict(self, node: ast.Dict) -> ast.expr | None:
        """{**{...}} put in."""
        empties = self.empties()
        for place, (key, value) in enumerate(zip(node.keys, node.values)):
            if key is None and isinstance(value, ast.Name) and value.id in empties:
                node.values[place] = ast.Dict([], [])
        flat = [k is None and isinstance(v, ast.Dict) for k, v in zip(node.keys, node.values)]
        if not any(flat):
            return None
        items = [p for k, v, f in zip(node.keys, node.values, flat) for p in (zip(v.keys, v.values) if f else [(k, v)])]  # type: ignore
        return ast.Dict([k for k, _ in items], [v for _, v in items])

    # -- scopes --

    def visit_FunctionDef(self, node: Any) -> Any:
        if is_opaque(node):
            return node
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        self.defaults(node.args)
        self.scopes.append(self.scope_of(node))
        self.around.append(node.name)
        node.body = self.block(node.body)
        self.around.pop()
        self.scopes.pop()
        drop_last_return(node)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def defaults(self, args: ast.arguments) -> None:
        args.defaults = [self.visit(d) for d in args.defaults]
        args.kw_defaults = [d and self.visit(d) for d in args.kw_defaults]

    def scope_of(self, node: Function | ast.Lambda) -> Scope:
        nodes = list(inside(node))
        bound = bindings(node, nodes)
        for arg in [*parameters(node.args), *starred(node.args)]:
            bound[arg.arg].insert(0, arg)
        for name in self.facts.nonlocals & set(bound):
            bound[name] += [None, None]
        known = self.facts.constants(node) if isinstance(node, Function) else {}
        followed = self.followed(node, nodes, bound) if isinstance(node, Function) else frozenset()
        flow = {name: value for name, value in known.items() if name in followed and is_literal(value)}
        known = {name: value for name, value in known.items() if len(bound[name]) == 1}
        configs = {a.arg for a in parameters(node.args) if is_config_arg(a)}
        owner = self.facts.owner.get(id(node))
        if owner == CONFIG_CLASS and not isinstance(node, ast.Lambda) and node.args.args:
            configs.add(node.args.args[0].arg)
        noted = [n for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        types_ = {dotted(n.target): n.annotation for n in noted}
        for item in (n for n in nodes if isinstance(n, ast.withitem)):
            kind, name = made_kind(item.context_expr), dotted(item.optional_vars) if item.optional_vars else ""
            if kind in self.facts.foreign_classes and len(bound[name]) == 1:
                types_[name] = FOREIGN_OBJECT
        inner = [n for n in nodes if n.__class__ in HOLDERS or n.__class__ is ast.ClassDef]
        captured = frozenset(n.id for one in inner for n in walk(one) if isinstance(n, ast.Name))
        flow = {name: value for name, value in flow.items() if name not in known}
        parts = {name: [self.part_of(v) or v for v in values] for name, values in bound.items()}
        known |= stays_empty(node, parts) if isinstance(node, Function) else {}
        return Scope(bound, known, configs, False, followed, captured, types_, dict(flow))

    def followed(self, node: Function, nodes: list[ast.AST], bound: dict[str, list[ast.AST | None]]) -> frozenset[str]:
        """Local names that nothing but plain assignments, and calls, bind."""
        loose = set(self.facts.nonlocals) | {arg.arg for arg in starred(node.args)}
        for one in nodes:
            if one.__class__ in BINDERS and one.__class__ not in (ast.Assign, ast.AnnAssign, ast.AugAssign):
                loose |= {target.id for target, _ in stores(one) if isinstance(target, ast.Name)}
                loose |= set(self.named(one))
        return frozenset(bound) - loose

    @staticmethod
    def named(node: Any) -> list[str]:
        """Names that a definition, an import or a handler binds."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        return [node.name] if isinstance(node, Definition | ast.ExceptHandler) and node.name else []

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        self.defaults(node.args)
        self.scopes.append(self.scope_of(node))
        node.body = self.visit(node.body)
        self.scopes.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        node.bases = [self.visit(b) for b in node.bases]
        self.owners.append(node.name if self.facts.defs.get(node.name) is node else "")
        own = bindings(node)
        body = list[ast.stmt]()
        for one in node.body:
            if isinstance(one, Function):  # a method does not see the class's names
                body.append(self.visit(one) if self.scopes[1:] or self.picked(one) else one)
                continue
            self.scopes.append(Scope(own, {}, set(), True))
            body += self.statement(one)
            self.scopes.pop()
        self.owners.pop()
        node.body = body or [ast.Pass()]
        return node

    def comprehension(self, node: Any) -> ast.expr:
        names = {n.id for g in node.generators for n in walk(g.target) if isinstance(n, ast.Name)}
        node.generators[0].iter = self.visit(node.generators[0].iter)  # belongs to the scope around
        own = Scope({name: [None, None] for name in names}, {}, set(), True)
        own.types |= typed(node.generators[0].target, each_type(self.type_of(node.generators[0].iter)))
        self.scopes.append(own)
        for place, generator in enumerate(node.generators):
            generator.iter = self.visit(generator.iter) if place else generator.iter
            own.types |= typed(generator.target, each_type(self.type_of(generator.iter))) if place else {}
            generator.ifs = [i for i in map(self.visit, generator.ifs) if self.truth(i) is not True]
        for part in ("key", "value", "elt"):
            if hasattr(node, part):
                setattr(node, part, self.visit(getattr(node, part)))
        self.scopes.pop()
        if not isinstance(node, ast.GeneratorExp) and (single := self.one_pass(node)):
            return self.changed(single)
        iter_ = node.generators[0].iter
        if self.purity.expression(iter_) and (self.truth_of_loop(iter_) or self.none_pass(node.generators[0])):
            if isinstance(node, ast.DictComp):
                return self.changed(ast.Dict([], []))
            return self.changed(ast.List([], ast.Load())) if isinstance(node, ast.ListComp) else node
        return node

    def one_pass(self, node: Any) -> ast.expr | None:
        """What a comprehension makes whose loops each go through one literal."""
        given = dict[str, ast.expr]()
        for one in node.generators:
            alone = isinstance(one.iter, ast.Tuple | ast.List) and len(one.iter.elts) == 1 and not one.ifs
            if not alone or not isinstance(one.target, ast.Name) or not is_literal(one.iter.elts[0]):
                return None
            given[one.target.id] = one.iter.elts[0]
        parts = [n for part in ("key", "value", "elt") if hasattr(node, part) for n in walk(getattr(node, part))]
        if any(isinstance(n, ast.Lambda | ast.comprehension) for n in parts):
            return None  # which may mean another thing by that name
        made = [Replace(given).visit(getattr(node, part)) for part in ("key", "value", "elt") if hasattr(node, part)]
        if isinstance(node, ast.DictComp):
            return ast.Dict(made[:1], made[1:])
        return ast.Set(made) if isinstance(node, ast.SetComp) else ast.List(made, ast.Load())

    def visit_Starred(self, node: ast.Starred) -> ast.Starred:
        node.value = one = self.visit(node.value)
        if isinstance(one, ast.GeneratorExp) and self.gives_nothing(one.generators[0]):
            node.value = self.changed(ast.Tuple([], ast.Load()))
        return node

    def gives_nothing(self, generator: ast.comprehension) -> bool:
        """Whether a comprehension certainly is empty, and finding that out does nothing else."""
        return self.purity.expression(generator.iter) and (
            self.truth_of_loop(generator.iter) or self.none_pass(generator)
        )

    def none_pass(self, generator: ast.comprehension) -> bool:
        """Whether no element of what a comprehension goes through passes its conditions."""
        if any(self.truth(test) is False for test in generator.ifs):
            return True
        return bool(generator.ifs) and self.truth_of_loop(ast.ListComp(ast.Constant(0), [generator]))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension

    # -- statements --

    chosen: set[int] | None = None  # statements of the module, and methods, to look at; all if None

    def visit_Module(self, node: ast.Module) -> ast.Module:
        node.body = [new for one in node.body for new in (self.statement(one) if self.picked(one) else [one])]
        return node

    def picked(self, node: ast.stmt) -> bool:
        """Whether a statement of the module, or a method, or one of a class's methods, is to be looked at."""
        if self.chosen is None or id(node) in self.chosen:
            return True
        return isinstance(node, ast.ClassDef) and any(id(one) in self.chosen for one in node.body)

    def block(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        """Statements up to the first that never lets the next one run."""
        found = list[ast.stmt]()
        for one in body:
            found += self.statement(one)
            if found and isinstance(found[-1], ast.Return | ast.Raise | ast.Continue | ast.Break):
                break
        if len(found) > 1 and self.at_once(found[-2], found[-1]):
            found[-2:] = [ast.Return(found[-2].value)]  # type: ignore[attr-defined]
        return found or [ast.Pass()]

    def at_once(self, node: ast.stmt, after: ast.stmt) -> bool:
        """Whether two statements are `name = value` and `return name`, of a name that nobody else sees."""
        if not (isinstance(node, ast.Assign) and isinstance(after, ast.Return) and isinstance(after.value, ast.Name)):
            return False
        return [dotted(target) for target in node.targets] == [after.value.id] and after.value.id in self.scopes[
            -1
        ].followed

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        self.drop_empties(node)
        new = self.visit(node)
        found = new if isinstance(new, list) else [] if new is None else [new]
        if empties := self.empties():
            names = (n for one in found for n in walk(one) if isinstance(n, ast.Name) and is_load(n))
            read = {n.id for n in names} & empties
            self.flows({name: value for name, value in self.scopes[-1].flow.items() if name not in read})
        return found

    def empties(self) -> set[str]:
        """Local names that hold an empty dict or list of their own, just made."""
        return {name for name, value in self.scopes[-1].flow.items() if is_empty(value)}

    def drop_empties(self, node: ast.stmt) -> None:
        """Forget empty ones that a statement may fill: it names them more than once, or where it may run often."""
        if not (empties := self.empties()):
            return
        looked = node.test if isinstance(node, ast.If) else node
        counts = Counter(n.id for n in walk(looked) if isinstance(n, ast.Name) and n.id in empties)
        often = isinstance(node, ast.For | ast.While | ast.Try | ast.With | Definition)
        flow = self.scopes[-1].flow
        self.flows({name: value for name, value in flow.items() if counts[name] < 1 + (not often)})

    def visit_Return(self, node: ast.Return) -> ast.Return:
        flow, empties = self.scopes[-1].flow, self.empties()
        put = lambda one: cloned(flow[one.id]) if isinstance(one, ast.Name) and one.id in empties else one  # noqa: E731
        node.value = put(node.value)
        if isinstance(node.value, ast.Tuple):
            node.value.elts = [put(one) for one in node.value.elts]
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        node.value = self.visit(node.value)
        return None if self.purity.expression(node.value) else node

    def visit_Assert(self, node: ast.Assert) -> None:
        return None

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.condition(self.visit(node.test))
        truth = self.truth(node.test)
        if truth is not None:
            self.changes += 1
            return self.spliced(node.body if truth else node.orelse)
        if isinstance(node.test, ast.BoolOp) and self.truth(node.test.values[-1]) is isinstance(node.test.op, ast.Or):
            parts = node.test.values[:-1]  # what they do still counts, what they are does not
            first = ast.BoolOp(node.test.op, parts) if len(parts) > 1 else parts[0]
            chosen = node.body if isinstance(node.test.op, ast.Or) else node.orelse
            return self.changed([ast.Expr(first), *self.spliced(chosen)])
        node.body, node.orelse = self.branches(node.test, node.body, node.orelse)
        if self.complains(node.body) and self.purity.expression(node.test):
            return self.changed(node.orelse or None)
        if self.complains(node.orelse) and self.purity.expression(node.test):
            return self.changed(node.body)
        empty = [all(isinstance(n, ast.Pass) for n in part) for part in (node.body, node.orelse)]
        if all(empty):
            return self.changed(None if self.purity.expression(node.test) else ast.Expr(node.test))
        if empty[0]:
            node.test, node.body, node.orelse = ast.UnaryOp(ast.Not(), node.test), node.orelse, []
        elif empty[1]:
            node.orelse = []
        return node

    def spliced(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        return [n for n in self.block(body) if not isinstance(n, ast.Pass)] if body else []

    def condition(self, node: ast.expr) -> ast.expr:
        """A condition without parts that do not change its truth."""
        if is_not(node) and is_not(node.operand):  # type: ignore[attr-defined]
            return self.changed(node.operand.operand)  # type: ignore[attr-defined]
        if isinstance(node, ast.BoolOp):
            neutral = isinstance(node.op, ast.And)
            parts = list(map(self.condition, node.values))
            kept = [p for p in parts if self.truth(p) is not neutral]
            if len(kept) < len(node.values) or any(a is not b for a, b in zip(parts, node.values)):
                self.changes += 1
                return ast.BoolOp(node.op, kept) if len(kept) > 1 else kept[0] if kept else ast.Constant(neutral)
        return node

    def complains(self, body: Sequence[ast.stmt]) -> bool:
        """Whether all that some statements do is to tell of a mistake of the user's."""
        if not body or not isinstance(body[-1], ast.Raise) or not isinstance(body[-1].exc, ast.Call):
            return False
        known = dotted(body[-1].exc.func) in CHECKED
        return known and all(isinstance(n, ast.Assign) and self.purity.statement(n, set()) for n in body[:-1])

    def visit_For(self, node: ast.For) -> Any:
        node.iter = self.visit(node.iter)
        if self.truth_of_loop(node.iter):
            return self.changed(self.spliced(node.orelse) or None)
        if (only := self.single(node)) is not None:
            return self.changed(self.spliced([ast.Assign([node.target], only), *node.body]))
        scope, types_ = self.scopes[-1], dict(typed(node.target, each_type(self.type_of(node.iter))))
        again = {n.id for one in node.body for n in walk(one) if isinstance(n, ast.Name) and not is_load(n)}
        before = scope.types
        scope.types = before | {n: kind for n, kind in types_.items() if n not in again and not any(scope.bound[n])}
        self.apart(node)
        scope.types = before
        idle = all(isinstance(n, ast.Pass) for n in node.body) and not node.orelse
        named = all(isinstance(target, ast.Name) for target, _ in stores(node))
        return self.changed(None) if idle and named and self.purity.expression(node.iter) else node

    def single(self, node: ast.For) -> ast.expr | None:
        """The one element that a loop goes through, where it goes through to its end."""
        leaves = any(isinstance(n, ast.Break | ast.Continue) for one in node.body for n in walk(one))
        one: ast.expr | None = None
        if isinstance(node.iter, ast.Tuple | ast.List) and len(node.iter.elts) == 1:
            one = node.iter.elts[0]
        elif dotted(node.iter.func if isinstance(node.iter, ast.Call) else node.iter) == "range":
            with suppress(Unknown):
                turns = list(itertools.islice(self.value(node.iter), 2))
                one = ast.Constant(turns[0]) if len(turns) == 1 else None
        return None if leaves or node.orelse or isinstance(one, ast.Starred) else one

    def apart(self, node: ast.For | ast.While) -> None:
        """A loop's parts, each of which may run often or not at all."""
        self.forget(node)
        before = self.scopes[-1].flow
        node.body = self.block(node.body)
        self.flows(dict(before))
        node.orelse = self.block(node.orelse) if node.orelse else []
        self.flows(before)

    def truth_of_loop(self, node: ast.expr) -> bool:
        """Whether there is nothing to loop over."""
        try:
            return not any(True for _ in self.value(node))  # it may be endless
        except (Unknown, TypeError):
            return isinstance(node, ast.List | ast.Tuple) and not node.elts

    def visit_While(self, node: ast.While) -> Any:
        self.forget(node)
        node.test = self.condition(self.visit(node.test))
        if self.truth(node.test) is False:
            return self.changed(self.spliced(node.orelse) or None)
        self.apart(node)
        return node

    def visit_With(self, node: ast.With) -> Any:
        node.items = [self.visit(item) for item in node.items]
        idle = [i for i in node.items if not i.optional_vars and self.does_nothing(i.context_expr)]
        node.body = self.block(node.body)
        self.forget(node)
        if idle:
            node.items = [i for i in node.items if i not in idle]
            return self.changed(node if node.items else node.body)
        return node

    def does_nothing(self, node: ast.expr) -> bool:
        """Whether a context is none, or suppresses nothing but exceptions that are never made."""
        name, args = (dotted(node.func), node.args) if isinstance(node, ast.Call) else ("", [])
        own = [dotted(arg) in self.facts.classes and not self.facts.made(dotted(arg)) for arg in args]
        return name == "nullcontext" or (name == "suppress" and all(own))

    def visit_Try(self, node: ast.Try) -> Any:
        self.forget(node)
        before = self.scopes[-1].flow
        node.body = self.block(node.body)
        self.flows(dict(before))
        handlers = [h for h in node.handlers if self.may_catch(h)]
        for handler in handlers:
            handler.body = self.block(handler.body)
            self.flows(dict(before))
        handlers = [h for h in handlers if not self.complains(h.body)]
        if all(isinstance(h.body[0], ast.Raise) and h.body[0].exc is None for h in handlers):
            handlers = []
        self.changes += len(node.handlers) - len(handlers)
        node.handlers = handlers
        node.orelse = self.block(node.orelse) if node.orelse else []
        self.flows(dict(before))
        node.finalbody = [n for n in self.block(node.finalbody) if not isinstance(n, ast.Pass)]
        self.flows(before)
        if not node.handlers and not node.finalbody:
            return self.changed([*node.body, *node.orelse])
        if not node.handlers and node.orelse:
            node.body, node.orelse = [*node.body, *node.orelse], []
        return node

    def may_catch(self, node: ast.ExceptHandler) -> bool:
        """Whether an exception of a handler's kind can come: one of the program's own must be made somewhere."""
        kind = dotted(node.type) if node.type else ""
        return kind not in self.facts.classes or self.facts.made(kind)

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        self.note(node)
        value, target = node.value, node.targets[0]
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Call):
            known = self.attribute_symbol(value)  # which then is not read of what the call gives
            if known is not None and (is_literal(known) or is_empty_dict(known)):
                node.value = cloned(known)
                return [ast.Expr(value.value), self.changed(node)]
        names = [target, *(target.elts if isinstance(target, ast.Tuple) else [])]
        plain = all(isinstance(name, ast.Name | ast.Tuple) for name in names) and len(node.targets) == 1
        alike = plain and target.__class__ is value.__class__ and ast.unparse(target) == ast.unparse(value)
        return self.changed(None) if alike else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = node.value and self.visit(node.value)
        self.note(node)
        return node

    def plain(self, node: ast.Assign) -> ast.Assign:
        self.note(node)
        return self.changed(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        node.value = self.visit(node.value)
        if isinstance(node.target, ast.Name):
            with suppress(Unknown):
                known = lifted(self.value(ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)))
                return self.plain(ast.Assign([node.target], known))
        self.note(node)
        node.target = self.generic_visit(node.target)  # type: ignore[assignment]
        nothing = isinstance(node.value, ast.Dict) and not node.value.keys and isinstance(node.op, ast.BitOr)
        nothing |= isinstance(node.value, ast.List) and not node.value.elts and isinstance(node.op, ast.Add)
        return self.changed(None) if nothing and isinstance(node.target, ast.Name) else node


TYPE_RULES = {kind: rule for kind in PARTS if (rule := getattr(Fold, "type_of_" + kind.__name__, None))}


def early(node: Any, modules: Container[str]) -> tuple[list[ast.Name], bool]:
    """(names that an expression reads before it does anything else, whether it does nothing else)."""
    if isinstance(node, ast.Name | ast.Constant) or node is None:
        return [node] if isinstance(node, ast.Name) else [], True
    if isinstance(node, ast.Attribute) and dotted(node).split(".")[0] in modules:
        return [], True
    parts: list[Any] = []
    if isinstance(node, ast.Call):
        parts = [node.func, *node.args, *(k.value for k in node.keywords)]
    elif isinstance(node, ast.Tuple | ast.List):
        parts = node.elts
    elif isinstance(node, ast.Attribute | ast.Starred):
        parts = [node.value]
    elif isinstance(node, ast.Subscript):
        parts = [node.value, node.slice]
    elif isinstance(node, ast.BinOp):
        parts = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp):
        parts = [node.operand]
    elif isinstance(node, ast.Slice):
        parts = [node.lower, node.upper, node.step]
    elif isinstance(node, ast.Compare | ast.IfExp | ast.BoolOp):
        parts = [node.left, node.comparators[0]] if isinstance(node, ast.Compare) else children(node)[:1]
        parts = [node.test] if isinstance(node, ast.IfExp) else parts
    found = list[ast.Name]()
    for part in parts:
        names, calm = early(part, modules)
        found += names
        if not calm:
            return found, False
    return found, isinstance(node, ast.Tuple | ast.List | ast.Slice)


def is_replace(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and dotted(node.func) in ("dataclasses.replace", "replace") and bool(node.args)


def is_config_arg(arg: ast.arg) -> bool:
    """Whether a parameter is annotated as a configuration (a registry's lambdas by the registry's annotation)."""
    return isinstance(arg.annotation, ast.Name) and arg.annotation.id == CONFIG_CLASS


LOOKS = {"get", "items", "keys", "values", "copy"}
LOOKERS = {
    "len",
    "bool",
    "any",
    "all",
    "set",
    "list",
    "dict",
    "tuple",
    "sorted",
    "sum",
    "frozenset",
    "min",
    "max",
    "enumerate",
    "zip",
    "map",
}


LOOKING = {ast.Call, ast.Compare, ast.For, ast.comprehension, ast.Subscript, ast.If, ast.While, ast.IfExp, ast.Dict}
LOOKING |= {ast.Starred, ast.keyword}


def looked_at(node: ast.AST) -> list[ast.AST]:
    """Parts of a node that it reads and neither keeps nor changes, if they are containers."""
    if isinstance(node, ast.Call):
        asks = isinstance(node.func, ast.Attribute) and node.func.attr in LOOKS
        looks = isinstance(node.func, ast.Name) and node.func.id in LOOKERS
        return [node.func.value] if asks else node.args if looks else []  # type: ignore
    if isinstance(node, ast.Compare):
        return [right for op, right in zip(node.ops, node.comparators) if isinstance(op, ast.In | ast.NotIn)]
    if isinstance(node, ast.For | ast.comprehension):
        return [node.iter]
    if isinstance(node, ast.Subscript):
        return [node.value] if isinstance(node.ctx, ast.Load) else []
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        return [node.test]
    if isinstance(node, ast.Dict):
        return [value for key, value in zip(node.keys, node.values) if key is None]
    return [node.value] if isinstance(node, ast.Starred) or (isinstance(node, ast.keyword) and not node.arg) else []


def stays_empty(node: Function, bound: dict[str, list[ast.AST | None]]) -> dict[str, ast.expr]:
    """Local names that hold an empty container for good: nothing but looks at them (or takes away from a set)."""
    found: dict[str, ast.expr] = {}
    for name, values in bound.items():
        known = [value for value in values if value is not None]
        if len(known) == 1 and (is_empty(known[0]) or is_empty_set(known[0])):
            found[name] = known[0]  # type: ignore[assignment]
    if not found:
        return found
    looks, lost = {id(part) for one in walk(node) for part in looked_at(one)}, Counter[str]()
    for one in walk(node):
        if isinstance(one, ast.Name) and one.id in found and is_load(one) and id(one) not in looks:
            del found[one.id]
        elif isinstance(one, ast.AugAssign) and isinstance(one.op, ast.Sub):
            lost[dotted(one.target)] += is_empty_set(found.get(dotted(one.target)))
    return {name: value for name, value in found.items() if len(bound[name]) == 1 + lost[name]}


def drop_last_return(node: Function) -> None:
    """A `return` of nothing at the end says nothing."""
    last = node.body[-1] if node.body else None
    if isinstance(last, ast.Return) and (last.value is None or is_none(last.value)):
        node.body.pop()
    node.body = node.body or [ast.Pass()]


class Replace(Rewriter):
    """Put expressions in for names; copies, but where each is put in once."""

    def __init__(self, given: dict[str, ast.expr], once: bool = False) -> None:
        self.given, self.copy = given, (lambda node: node) if once else cloned

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.copy(self.given[node.id]) if node.id in self.given and isinstance(node.ctx, ast.Load) else node


class Closed:
    """Checks that an expression can be evaluated at build time, and collects what its names mean."""

    def __init__(self, fold: Fold) -> None:
        self.fold, self.names, self.spelled = fold, dict[str, Any](), False

    def check(self, node: ast.AST, local: frozenset[str]) -> None:
        """Raises Unknown for what cannot be known."""
        if not local and node.__dict__.get("unknown") == self.fold.number:
            raise Unknown  # as when it was looked at by itself
        if isinstance(node, ast.Name | ast.Attribute) and self.fold.is_config(node):
            self.spelled = True
            return
        if isinstance(node, ast.Name):
            if node.id not in local:
                self.names[node.id] = self.fold.name_value(node.id)
        elif isinstance(node, ast.Attribute):
            self.attribute(node, local)
        elif isinstance(node, ast.Call):
            self.call(node, local)
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            for generator in node.generators:
                self.check(generator.iter, local)
                local |= {n.id for n in walk(generator.target) if isinstance(n, ast.Name)}
                for test in generator.ifs:
                    self.check(test, local)
            for part in [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]:
                self.check(part, local)
        elif isinstance(node, ast.Lambda):
            self.check(node.body, local | {a.arg for a in parameters(node.args)})
        elif isinstance(node, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            raise Unknown
        elif isinstance(node, ast.expr | ast.keyword):
            for child in children(node):
                self.check(child, local)

    def attribute(self, node: ast.Attribute, local: frozenset[str]) -> None:
        """An attribute of a configuration, a constant of a pure module, or a method of a value that only looks."""
        head = dotted(node).split(".")[0]
        module = self.fold.facts.modules.get(head, "")
        if module and self.fold.find(head) is self.fold.scopes[0]:
            if module not in PURE_MODULES:
                raise Unknown
            self.names[head] = importlib.import_module(module)
            return
        if self.fold.is_config(node.value):
            self.spelled = True
            return
        if node.attr not in PURE_METHODS:
            raise Unknown
        self.check(node.value, local)

    def call(self, node: ast.Call, local: frozenset[str]) -> None:
        name = dotted(node.func)
        if name == "dataclasses.asdict" and len(node.args) == 1 and self.fold.is_config(node.args[0]):
            self.spelled = True
            return
        if name in self.fold.facts.defs and name not in local and self.fold.find(name) is self.fold.scopes[0]:
            self.names[name] = self.fold.program.pure_function(name)
        elif isinstance(node.func, ast.Attribute) and not self.fold.is_config(node.func.value):
            if dotted(node.func).split(".")[0] not in self.fold.facts.modules and node.func.attr not in PURE_METHODS:
                raise Unknown
            self.check(node.func, local)
        else:
            self.check(node.func, local)
        for part in [*node.args, *(k.value for k in node.keywords)]:
            self.check(part, local)


class Spelled(Rewriter):
    """Expressions that are the configuration, as one name."""

    def __init__(self, fold: Fold) -> None:
        self.fold = fold

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if dotted(node.func) == "dataclasses.asdict" and self.fold.is_config(node.args[0]):
            return parsed("__config__.asdict()")
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Name("__config__", ast.Load()) if self.fold.is_config(node) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Name("__config__", ast.Load()) if self.fold.is_config(node) else self.generic_visit(node)  # type: ignore


# ==== sweeping: what nobody reads ====


class Sweep(Rewriter):
    """One round of removal: local names, attributes, parameters and fields that are never read."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.purity, self.changes = facts, Purity(facts), 0
        self.local: list[tuple[set[str], Counter[str]]] = []  # own names and reads of the functions around
        self.asked = set[int]()  # statements that are tried

    def dead(self, target: ast.expr, value: ast.expr | None = None) -> bool:
        """Whether nothing reads a target, which is no part of a module's state either."""
        if isinstance(target, ast.Name):
            own, reads = self.local[-1] if self.local else (set(), Counter())
            return target.id in own and not reads[target.id]
        if not isinstance(target, ast.Attribute) or target.attr in self.facts.texts:
            return False
        kind = self.facts.owner.get(id(target), "")
        if made_kind(value).startswith("nn."):
            return False
        if dotted(target.value) == "self" and kind in self.facts.classes:
            if self.facts.read(target.attr, kind):
                return False
        elif self.facts.loads["." + target.attr]:
            return False
        if dotted(target.value).split(".")[0] in self.facts.modules:  # another module may read it
            return False
        own_self = isinstance(target.value, ast.Name) and target.value.id == "self" and kind in self.facts.classes
        if own_self:  # a base of another module reads what it knows
            return not (self.facts.foreign_bases(kind) and target.attr in self.facts.bases)
        return not self.facts.outside(target.attr) and self.purity.expression(target.value)

    def visit_FunctionDef(self, node: Any) -> Any:
        if is_opaque(node):
            return node
        if self.local and not self.local[-1][1][node.name] and not node.decorator_list:
            self.changes += 1
            return None
        self.drop_results(node)
        nodes, bound = list(walk(node)), bindings(node)
        reads = Counter(n.id for n in nodes if n.__class__ is ast.Name and is_load(n))  # type: ignore[arg-type,attr-defined]
        free = {name for n in nodes if n.__class__ in (ast.Global, ast.Nonlocal) for name in n.names}  # type: ignore[attr-defined]
        reads.update(shared(node))  # others see what is done there
        self.local.append(((set(bound) | {a.arg for a in parameters(node.args)}) - free, reads))
        self.generic_visit(node)
        self.local.pop()
        self.changes += Joined(node, self.facts.modules).changes
        drop_last_return(node)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def drop_results(self, node: Function) -> None:
        """Results that no call takes are not made."""
        if "taken" not in self.facts.cache:
            self.facts.cache["taken"] = {id(n.value) for n in self.facts.nodes if isinstance(n, ast.Expr)}
        sites = [] if self.local else self.facts.sites(node)
        if sites and all(id(call) in self.facts.cache["taken"] for call, _ in sites):
            for one in (n for n in inside(node) if isinstance(n, ast.Return) and n.value):
                if not is_none(one.value) and self.purity.expression(one.value):
                    one.value, self.changes = None, self.changes + 1

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        fields, outer, self.local = class_fields(node), self.local, []
        node.body = [one for one in node.body if not (isinstance(one, Function) and self.hidden(node, one))]
        node.body = [one for one in node.body if not self.idle(node, one, fields)]
        self.generic_visit(node)
        self.local = outer
        node.body = node.body or [ast.Pass()]
        node.bases = [base for base in node.bases if not self.empty(dotted(base))]
        return node

    def empty(self, name: str) -> bool:
        """Whether a class of the program says nothing at all, but who its heirs are."""
        kind = self.facts.classes.get(name)
        if kind is None or kind.bases or kind.keywords or not isinstance(kind.body[0], ast.Pass):
            return False
        bases = {id(base) for heir in self.facts.classes.values() for base in heir.bases}
        return all(id(n) in bases for n in self.facts.nodes if isinstance(n, ast.Name) and n.id == name)

    def hidden(self, kind: ast.ClassDef, method: Function) -> bool:
        """Whether every object of a class has another method under this one's name."""
        facts, name = self.facts, method.name
        if facts.defs.get(kind.name) is not kind or name.startswith("__") or facts.foreign(kind.name, name):
            return False
        family = [facts.classes[c] for c in facts.family(kind.name)]
        if any("classmethod" in marks_of(m) for c in family for m in c.body if isinstance(m, Function)):
            return False  # which may make an object of any of them
        owners, above = {owner for owner, _ in facts.methods[name]}, {made_kind(n.value) for n in facts.reads[name]}
        above = "super" in above or any(dotted(n.value) in facts.classes for n in facts.reads[name])  # type: ignore
        if "bare" not in facts.cache:
            owners_ = [n.value for n in facts.nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
            facts.cache["bare"] = Counter(n.id for n in owners_)
        bare = facts.cache["bare"]
        heirs = [c for c in facts.classes if kind.name in facts.ancestors(c)]
        heirs = [c for c in heirs if facts.calls[c] or facts.escaped[c] > bare[c]]  # `c.name` makes no object
        return not above and all(next(a for a in facts.ancestors(c) if a in owners) != kind.name for c in heirs)

    def given_by(self, kind: str) -> set[str]:
        """Names that a class's body gives values."""
        return {dotted(t) for one in self.facts.classes[kind].body for t, v in stores(one) if v is not None}

    def idle(self, kind: ast.ClassDef, node: ast.stmt, fields: dict[str, Any]) -> bool:
        """Whether a statement of a class's body gives nothing: a declaration, or a value that nobody reads."""
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            return False
        targets = [t for t, _ in pairs(node.targets[0] if isinstance(node, ast.Assign) else node.target, None)]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if any(name in fields or self.facts.loads["." + name] or name.startswith("__") for name in names):
            return False
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return True
        known = self.facts.bases if self.facts.foreign_bases(kind.name) else frozenset()
        heirs = [c for c in self.facts.classes if kind.name in self.facts.ancestors(c) and self.facts.calls[c]]
        escaped = any(self.facts.escaped[c] for c in self.facts.classes if kind.name in self.facts.ancestors(c))
        ups = [next((a for a in self.facts.ancestors(c) if names[0] in self.given_by(a)), "") for c in heirs]
        alone = len(names) == 1 and not self.facts.loads[names[0]]
        if alone and heirs and not known and not escaped and kind.name not in ups:
            return True
        return not any(self.facts.loads[name] or name in known for name in names)

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        kept = [t for t in node.targets if isinstance(t, ast.Tuple | ast.List) or not self.dead(t, node.value)]
        if len(node.targets) > 1 and kept and len(kept) < len(node.targets):
            self.changes, node.targets = self.changes + 1, kept
        if len(node.targets) > 1:
            return node
        parts = list(pairs(node.targets[0], node.value))
        if all(self.dead(target, value) for target, value in parts):
            self.changes += 1
            return None if self.purity.expression(node.value) else ast.Expr(node.value)
        if any(value is None for _, value in parts):
            return node
        if len(parts) == 1 or not isinstance(node.value, ast.Tuple) or len(parts) != len(node.value.elts):
            return node
        stay = [(t, v) for t, v in parts if v is not None and not (self.dead(t, v) and self.purity.expression(v))]
        if len(stay) == len(parts):
            return node
        self.changes += 1
        if len(stay) == 1:
            return ast.Assign([stay[0][0]], stay[0][1])
        return ast.Assign([ast.Tuple([t for t, _ in stay], ast.Store())], ast.Tuple([v for _, v in stay], ast.Load()))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        self.generic_visit(node)
        if not self.local:
            return node
        plain = self.visit_Assign(ast.Assign([node.target], node.value)) if node.value else None
        return node if isinstance(plain, ast.Assign) and plain.targets == [node.target] else plain

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self.generic_visit(node)
        if self.dead(node.target) and self.purity.expression(node.value):
            self.changes += 1
            return None
        return node

    def visit_NamedExpr(self, node: ast.NamedExpr) -> ast.expr:
        self.generic_visit(node)
        return node.value if self.dead(node.target) else node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.ExceptHandler:
        self.generic_visit(node)
        if node.name and self.local and not self.local[-1][1][node.name]:
            node.name = None
        return node

    def visit_Import(self, node: Any) -> Any:
        if self.local and id(node) not in self.asked:
            reads = self.local[-1][1]
            node.names = [a for a in node.names if reads[(a.asname or a.name).split(".")[0]]]
        return node if node.names else None

    visit_ImportFrom = visit_Import

    def visit_Try(self, node: Any) -> Any:
        self.asked |= {id(one) for one in node.body}  # whether an import fails may be what it is for
        return self.generic_visit(node)

    visit_With = visit_Try

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "finalbody", "orelse"):
            part = getattr(node, name, None)
            if name == "body" and part == [] and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


class Joined:
    """`name = value` and a next statement whose first step is to read that name, which nobody else does: one."""

    def __init__(self, function: Function, modules: Container[str]) -> None:
        self.changes, self.modules, bound = 0, modules, bindings(function)
        nodes = list(walk(function))
        functions = [f for f in nodes if isinstance(f, Function | ast.Lambda) and f is not function]
        inner = {id(n) for f in functions for n in walk(f) if n is not f}
        counts = Counter(n.id for n in nodes if n.__class__ is ast.Name and is_load(n))  # type: ignore[arg-type,attr-defined]
        kept = {name for n in nodes if isinstance(n, ast.Global | ast.Nonlocal) for name in n.names}
        self.own = set(bound) - kept - {n.id for f in functions for n in walk(f) if isinstance(n, ast.Name)}
        self.once = {n for n, values in bound.items() if len(values) == 1 and counts[n] == 1} - kept
        for node in (n for n in nodes if isinstance(n, ast.stmt | ast.ExceptHandler)):
            for part in ("body", "orelse", "finalbody"):
                body = getattr(node, part, None)
                if isinstance(body, list) and body and id(body[0]) not in inner:
                    self.join(body)

    def join(self, body: list[ast.stmt]) -> None:
        for place in range(len(body) - 2, -1, -1):
            one, after = body[place : place + 2]
            target = one.targets[0] if isinstance(one, ast.Assign) and len(one.targets) == 1 else None
            if not isinstance(target, ast.Name) or not (target.id in self.once or self.last(target.id, after)):
                continue
            if any(found.id == target.id for found in self.first_reads(after)):
                Replace({target.id: one.value}, once=True).visit(after)  # type: ignore[attr-defined]
                del body[place]
                self.changes += 1

    def last(self, name: str, node: ast.stmt) -> bool:
        """Whether a statement reads a local name once, and nobody does after it before it has another value."""
        ends = isinstance(node, ast.Return) or (isinstance(node, ast.Assign) and dotted(node.targets[0]) == name)
        reads = sum(isinstance(n, ast.Name) and n.id == name and is_load(n) for n in walk(node))
        return ends and reads == 1 and name in self.own

    def first_reads(self, node: ast.stmt) -> list[ast.Name]:
        """Names that a simple statement reads before it does anything else."""
        whole = isinstance(node, ast.Return | ast.Expr | ast.Assign | ast.AnnAssign)
        whole &= not isinstance(node, ast.Assign) or all(isinstance(t, ast.Name | ast.Tuple) for t in node.targets)
        value = node.value if whole else node.test if isinstance(node, ast.If) else None  # type: ignore[attr-defined]
        value = node.iter if isinstance(node, ast.For) else value
        return early(value, self.modules)[0]


def shrink(facts: Facts) -> int:
    """Drop parameters and fields that nothing reads, and what calls pass for them; how many. Changes the tree."""
    purity, dropped = Purity(facts), 0
    functions = [f for f in facts.defs.values() if isinstance(f, Function)]
    functions += [f for f in facts.nodes if isinstance(f, Function) and id(f) in facts.inner]
    groups = [[f] for f in functions] + [[f] for _, f in facts.methods["__init__"]]
    for name, named in facts.methods.items():
        groups += facts.related(named) if named and not name.startswith("__") else []
    for group in groups:
        sites = [facts.sites(f) for f in group]
        if not group or any(s is None for s in sites):
            continue
        calls = {id(call): (call, skip) for found in sites for call, skip in found or ()}
        for arg in list(parameters(group[0].args)):
            if all(drops(facts, f, arg.arg, group[0]) for f in group) and unpassed(
                calls.values(), group[0].args, arg.arg, purity
            ):
                for call, skip in calls.values():
                    strip_call(call, group[0].args, arg.arg, skip)
                for f in group:
                    strip_parameter(f.args, arg.arg)
                dropped += 1
    for name, kind in facts.classes.items():
        dropped += shrink_fields(facts, purity, name, kind)
    return dropped


def drops(facts: Facts, function: Function, name: str, model: Function) -> bool:
    """Whether a function has a parameter where another one has it, and does not use it."""
    place, own = ([a.arg for a in parameters(f.args)] for f in (model, function))
    if is_opaque(function) or name not in own or own.index(name) != place.index(name):
        return False
    marks = {dotted(d) for d in function.decorator_list}
    first = own.index(name) == 0 and name in ("self", "ctx", "cls")
    forward = function.name in ("forward", "backward", "setup_context") and "staticmethod" in marks
    return not (first or forward or name in facts.names_in(function))


def unpassed(calls: Any, args: ast.arguments, name: str, purity: Purity) -> bool:
    """Whether what calls pass for a parameter is written out and may go."""
    for call, skip in calls:
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            return False
        if not purity.expression(Facts.passed(call, args, skip).get(name)):
            return False
    return True


def strip_call(call: ast.Call, args: ast.arguments, name: str, skip: int) -> None:
    """Take a parameter's argument out of a call."""
    names = [a.arg for a in [*args.posonlyargs, *args.args]]
    place = names.index(name) - skip if name in names else len(call.args)
    if place < len(call.args):
        del call.args[place]
    call.keywords = [k for k in call.keywords if k.arg != name]


def strip_parameter(args: ast.arguments, name: str) -> None:
    for group, defaults in ((args.posonlyargs, []), (args.args, args.defaults), (args.kwonlyargs, args.kw_defaults)):
        for place, arg in enumerate(group):
            if arg.arg == name:
                behind = place - (len(group) - len(defaults))
                if behind >= 0:
                    del defaults[behind]
                del group[place]
                return


def shrink_fields(facts: Facts, purity: Purity, name: str, kind: ast.ClassDef) -> int:
    """Drop fields of a NamedTuple or dataclass that nothing reads, where every object is made in plain sight."""
    if not (fields := class_fields(kind)):
        return 0
    selfless = [n for n in walk(kind) if isinstance(n, ast.Name) and n.id == "self" and isinstance(n.ctx, ast.Load)]
    based = {id(n.value) for n in walk(kind) if isinstance(n, ast.Attribute)}
    derived = any(name in facts.ancestors(c)[1:] for c in facts.classes)
    listed = [dotted(n.value) for n in facts.reads["_fields"]]
    whole = any(facts.loads[n] for n in (".asdict", ".astuple", "._asdict", "asdict"))  # read by no name
    iterated = "NamedTuple" in map(dotted, kind.bases)  # and may be walked beside another's names
    whole = whole or any(iterated or one not in facts.classes or name in facts.family(one) for one in listed)
    if whole or facts.escaped[name] or name in facts.shadowed or derived or any(id(n) not in based for n in selfless):
        return 0
    if "NamedTuple" in map(dotted, kind.bases) and len(fields) in facts.taken_apart():
        return 0
    every = [*facts.calls["._replace"], *facts.calls["replace"], *facts.calls[".replace"]]
    dropped, changes = 0, [call for call in every if not facts.of_another(call, name)]
    for field in list(fields):
        args = facts.field_args(name)
        calls = [(call, 0) for call in facts.calls[name]]
        given = [k.value for call in changes for k in call.keywords if k.arg == field]
        holders = {facts.holder(target) for target, _ in facts.stored[field]}
        read = facts.read(field, name) or not all(one and name not in facts.family(one) for one in holders)
        if read or any(k.arg is None for c in changes for k in c.keywords) or not all(map(purity.expression, given)):
            continue
        alone = "NamedTuple" in map(dotted, kind.bases) and len(kind.body) == 1  # see Fold.says_nothing
        if not unpassed(calls, args, field, purity) or (len(class_fields(kind)) == 1 and not alone):
            continue
        for call, skip in calls:
            strip_call(call, args, field, skip)
        for call in changes:
            call.keywords = [k for k in call.keywords if k.arg != field]
        kind.body = [n for n in kind.body if not (isinstance(n, ast.AnnAssign) and dotted(n.target) == field)]
        kind.body = kind.body or [ast.Pass()]
        facts.fields[name] = class_fields(kind)
        dropped += 1
    return dropped


# ==== reachability ====


GRADIENTS = {
    "backward",
    "grad",
    "vjp",
    "jvp",
    "vhp",
    "hvp",
    "jacobian",
    "hessian",
    "jacrev",
    "jacfwd",
    "grad_and_value",
}


class Reach:
    """What a run can come to, from the statements that a module runs by itself."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.names, self.attributes = facts, set[str](), set[tuple[str, str]]()
        self.families = dict[str, frozenset[str]]()  # class -> classes whose objects may have its methods
        self.kept, self.pending = set[int](), list[ast.AST]()
        self.gradients, self.waiting = False, list[ast.AST]()  # whether any are asked for; what then is called
        guarded = [node for node in facts.tree.body if isinstance(node, ast.If) and self.waits(node)]
        self.guards = {id(inner): node.test for node in guarded for inner in definitions([node])}
        self.units: dict[str, list[ast.stmt]] = defaultdict(list)
        for node in definitions(facts.tree.body):
            for name in self.defines(node):
                self.units[name].append(node)
        for node in facts.tree.body:
            if not self.waits(node):
                self.keep(node)
        while self.pending:
            self.look(self.pending.pop())

    def defines(self, node: ast.stmt) -> list[str]:
        """Names that a statement of the module makes, or configures: a call of a method of one of them."""
        if isinstance(node, Definition):
            return [node.name]
        if isinstance(node, ast.Import | ast.ImportFrom):
            return [(a.asname or a.name).split(".")[0] for a in node.names]
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)
        ):
            return [dotted(node.value.func).split(".")[0]]
        return [target.id for target, _ in stores(node) if isinstance(target, ast.Name)]

    def waits(self, node: ast.stmt) -> bool:
        """Whether a statement only matters if something that it makes is used."""
        if isinstance(node, ast.If):
            return all(
                isinstance(n, Definition | ast.Import | ast.ImportFrom | ast.Assign) for n in definitions([node])
            )
        return bool(self.defines(node)) or isinstance(node, ast.AnnAssign | ast.Expr)

    def keep(self, node: ast.AST) -> None:
        if id(node) not in self.kept:
            self.kept.add(id(node))
            self.pending += [node, self.guards[id(node)]] if id(node) in self.guards else [node]

    def look(self, node: ast.AST) -> None:
        """Note what a node that is kept reads."""
        if isinstance(node, ast.ClassDef):
            for part in [*node.bases, *node.decorator_list, *(n for n in node.body if not isinstance(n, Function))]:
                self.read(part)
            for method in (m for m in node.body if isinstance(m, Function)):
                special = method.name.startswith("__") or self.facts.foreign(node.name, method.name)
                if method.name == "backward" and special and not self.gradients:
                    self.waiting.append(method)
                elif special or self.reaches(method.name, node.name):
                    self.keep(method)
            return
        self.read(node)

    def read(self, node: ast.AST) -> None:
        """Note the names of the module, and attributes, that code reads. A local name is none of the module's."""
        work: list[tuple[ast.AST, frozenset[str]]] = [(node, frozenset())]
        while work:
            one, bound = work.pop()
            if isinstance(one, ast.Name):
                if isinstance(one.ctx, ast.Load) and one.id not in bound:
                    self.name(one.id)
                continue
            if isinstance(one, ast.Attribute):
                self.attribute(one.attr, one.__dict__.get("receiver", ""))
            parts, inner = children(one), bound
            if isinstance(one, Function | ast.Lambda):
                nodes = list(inside(one))
                own = set(bindings(one, nodes)) | {a.arg for a in [*parameters(one.args), *starred(one.args)]}
                own -= {name for n in nodes if n.__class__ is ast.Global for name in n.names}  # type: ignore[attr-defined]
                inner, outer = bound | own, [*one.args.defaults, *filter(None, one.args.kw_defaults)]
                outer += [] if isinstance(one, ast.Lambda) else one.decorator_list
                if isinstance(one, Function) and is_opaque(one):
                    outer += [x for n in walk(one) for x in hints(n)]
                work += [(part, bound) for part in outer]
                parts = [one.body] if isinstance(one, ast.Lambda) else list(one.body)
            elif isinstance(one, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
                targets = {n.id for g in one.generators for n in walk(g.target) if isinstance(n, ast.Name)}
                work.append((one.generators[0].iter, bound))
                inner = bound | targets
            elif isinstance(one, ast.AnnAssign):
                parts = [part for part in (one.target, one.value) if part]
            work += [(part, inner) for part in parts]

    def name(self, name: str) -> None:
        if name not in self.names:
            self.names.add(name)
            self.ask_gradients(name)
            for unit in self.units.get(name, ()):
                self.keep(unit)

    def attribute(self, name: str, receiver: str) -> None:
        """An attribute is read, of an object of a class of the program where that is known."""
        self.ask_gradients(name)
        if receiver == FOREIGN or (name, receiver) in self.attributes:
            return
        self.attributes.add((name, receiver))
        for owner, method in self.facts.methods.get(name, ()):
            if id(self.facts.classes[owner]) in self.kept and self.reaches(name, owner):
                self.keep(method)

    def ask_gradients(self, name: str) -> None:
        """A program that names nothing that gives gradients never runs an autograd function's `backward`."""
        if name in GRADIENTS and not self.gradients:
            self.gradients = True
            for method in self.waiting:
                self.keep(method)

    def reaches(self, name: str, owner: str) -> bool:
        """Whether a method may be what somebody reads."""
        return any((name, kind) in self.attributes for kind in ("", *self.relatives(owner)))

    def relatives(self, owner: str) -> frozenset[str]:
        if owner not in self.families:
            self.families[owner] = frozenset(k for k in self.facts.classes if owner in self.facts.family(k))
        return self.families[owner]

    def prune(self) -> None:
        """Delete what is not reached."""
        self.facts.tree.body = self.left(self.facts.tree.body)

    def left(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        found = list[ast.stmt]()
        for node in body:
            if isinstance(node, ast.If) and self.waits(node):
                node.body, node.orelse = self.left(node.body), self.left(node.orelse)
                if not node.body and not node.orelse:
                    continue
                node.body = node.body or [ast.Pass()]
            elif id(node) not in self.kept:
                continue
            elif isinstance(node, ast.ClassDef):
                node.body = [n for n in node.body if not isinstance(n, Function) or id(n) in self.kept] or [ast.Pass()]
            elif isinstance(node, ast.Import | ast.ImportFrom) and not dotted_future(node):
                node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in self.names]
            found.append(node)
        return found


def dotted_future(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


# ==== unfolding: a function that one place calls is put there ====


class Unfold:
    """Put functions that are called at one place only into that place, where nothing but their name is lost.

    A function may go where its call is the first thing of a statement that has an effect. What it binds gets names
    that nobody has there; a parameter becomes the argument, or a name that is bound to it.
    """

    def __init__(self, facts: Facts, chosen: set[Function] | None) -> None:
        self.facts, self.purity, self.changes = facts, Purity(facts), 0
        self.touched, self.looped = set[Function](), 0  # functions changed in this round; loops around a place
        held = [
            n for n in facts.tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and isinstance(n.value, ast.Dict)
        ]
        self.dicts = {dotted(target) for one in held for target, _ in stores(one)} - facts.shadowed  # the registries
        makers = {id(n) for _, maker in facts.methods["__init__"] for n in walk(maker) if isinstance(n, ast.Attribute)
                  and isinstance(n.value, ast.Name) and n.value.id == maker.args.args[0].arg}  # fmt: skip
        self.changing = {name for name, found in facts.stored.items() if any(id(t) not in makers for t, _ in found)}
        own = [(call, f) for f in self.functions() for call in self.only_call(f) if self.plain(f)]
        self.aims = {id(call): function for call, function in own}
        self.aims |= {id(call): maker for call, maker in self.alone()}
        for function in [n for n in facts.nodes if isinstance(n, Function) and not is_opaque(n)]:
            if not (chosen is None or facts.outermost(function) in chosen or self.calls_one(function, chosen)):
                continue
            bound = bindings(function)  # arrays that are made here: nobody else changes what is read of them
            self.arrays = {
                n for n, v in bound.items() if len(v) == 1 and made_kind(v[0]) in ("np.zeros", "torch.zeros")
            }
            self.inside_block(function, function.body)

    def calls_one(self, function: Function, chosen: set[Function]) -> bool:
        """Whether one of some functions may be put into a function."""
        return any(self.aims.get(id(node)) in chosen for node in walk(function))

    def functions(self) -> list[Function]:
        own = [f for f in self.facts.defs.values() if isinstance(f, Function)]
        methods = [m for name, named in self.facts.methods.items() for _, m in named if not name.startswith("__")]
        return own + methods

    def plain(self, function: Function) -> bool:
        """Whether a function's body may stand elsewhere: it is no generator, and no function in it sees its names."""
        if function.decorator_list or starred(function.args) or isinstance(function, ast.AsyncFunctionDef):
            return False
        bound = bindings(function)
        own = set(bound) | {a.arg for a in parameters(function.args)}
        kept: set[int] = set()
        for node in (n for one in function.body for n in walk(one)):
            names = {n.id for n in walk(node) if isinstance(n, ast.Name)} if isinstance(node, ast.Lambda) else set()
            if isinstance(node, ast.Yield | ast.YieldFrom | ast.Await | ast.Global | ast.Nonlocal | ast.NamedExpr):
                return False
            if isinstance(node, ast.FunctionDef) and not self.closed(node, function, bound):
                return False
            if isinstance(node, ast.ClassDef) or names & own or (isinstance(node, ast.Name) and node.id == "super"):
                return False
            if isinstance(node, ast.Starred):
                kept.add(id(node.value))
            called = node.func if isinstance(node, ast.Call) else None
            if getattr(called, "attr", dotted(called) if called else "") in (*EATERS, "next", "join"):
                kept |= {id(a) for a in node.args}  # type: ignore[attr-defined]
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                kept.add(id(node.value))
            if isinstance(node, ast.GeneratorExp) and id(node) not in kept:
                return False
        return True

    def closed(self, node: ast.FunctionDef, function: Function, bound: dict[str, list[ast.AST | None]]) -> bool:
        """Whether what an inner function sees of the one around never changes once it is there."""
        inner = set(bindings(node)) | {a.arg for a in parameters(node.args)}
        seen = {n.id for n in walk(node) if isinstance(n, ast.Name)} - inner
        args = {a.arg for a in parameters(function.args)}
        once = all(len(bound.get(name, [])) + (name in args) <= 1 for name in seen)
        plain = not node.decorator_list and node in function.body and not inner & (set(bound) | args)
        return once and plain and not any(isinstance(n, Function | ast.Lambda) for one in node.body for n in walk(one))

    def only_call(self, function: Function) -> list[ast.Call]:
        """The one call of a function, if there is one and it can mean no other."""
        sites = self.facts.sites(function) or []
        if len(sites) != 1 or any(isinstance(a, ast.Starred) for a in sites[0][0].args):
            return []
        call = sites[0][0]
        if any(k.arg is None for k in call.keywords) or any(n is call for n in walk(function)):
            return []
        if self.facts.defs.get(function.name) is function:
            return [call] if isinstance(call.func, ast.Name) and call.func.id == function.name else []
        if not isinstance(call.func, ast.Attribute) or call.func.attr != function.name:
            return []
        kind = call.func.__dict__.get("receiver", "")
        owner = self.facts.classes.get(self.facts.owner.get(id(function), ""))
        plain = [one for one in owner.body if not isinstance(one, Definition)] if owner else []
        if any(isinstance(n, ast.Name) and n.id == function.name for one in plain for n in walk(one)):
            return []  # the class has another name for it
        alike = [m for c, m in self.facts.methods[function.name] if kind in self.facts.classes
                 and c in self.facts.family(kind)]  # fmt: skip
        return [call] if alike == [function] and not self.facts.stored[function.name] else []

    def alone(self) -> Iterator[tuple[ast.Call, Function]]:
        """(call, __init__) of classes that are nothing but attributes, where one object is made of each."""
        for name, kind in self.facts.classes.items():
            calls, maker = self.facts.calls[name], kind.body[0]
            if kind.bases or kind.decorator_list or len(kind.body) > 1 or len(calls) != 1 or self.facts.escaped[name]:
                continue
            if isinstance(maker, Function) and maker.name == "__init__" and self.plain(maker):
                yield calls[0], maker

    def scatter(self, caller: Function, node: ast.stmt, call: ast.Call, maker: Function) -> list[ast.stmt] | None:
        """What a statement becomes that makes an object which is never handed on: names for its attributes."""
        target = next((t for t, value in stores(node) if value is call), None)
        whole = isinstance(node, ast.Assign) and len(node.targets) == 1
        if not whole or not isinstance(target, ast.Name) or len(bindings(caller)[target.id]) != 1:
            return None
        reads = {id(n) for n in walk(caller) if isinstance(n, ast.Name) and n.id == target.id and n is not target}
        used = [n for n in walk(caller) if isinstance(n, ast.Attribute) and id(n.value) in reads]
        inner = [f for f in walk(caller) if isinstance(f, Function | ast.Lambda) and f is not caller]
        captured = any(id(n) in reads for f in inner for n in walk(f))
        given = self.facts.passed(call, maker.args, 1)
        own = maker.args.args[0].arg
        given[own] = ast.Name(target.id, ast.Load())
        if len(used) != len(reads) or captured or any(value is None for value in given.values()):
            return None
        selves = {id(n) for n in walk(maker) if isinstance(n, ast.Name) and n.id == own}
        if len([n for n in walk(maker) if isinstance(n, ast.Attribute) and id(n.value) in selves]) != len(selves):
            return None
        made = self.arguments(caller, maker, cloned(maker.body), cast(dict[str, ast.expr], given))
        if made is None:
            return None
        left = [(t, v) for t, v in stores(node) if v is not call]
        ends: list[Any] = [
            ast.Tuple([t for t, _ in left], ast.Store()),
            ast.Tuple([cast(ast.expr, v) for _, v in left], ast.Load()),
        ]
        rest: list[ast.stmt] = [ast.Assign(ends[:1], ends[1])] if len(left) > 1 else []
        rest = [ast.Assign([left[0][0]], cast(ast.expr, left[0][1]))] if len(left) == 1 else rest
        names, new = dict[str, str](), [*made[0], *made[1], *rest]
        parts_ = [n for part in [caller, *new] for n in walk(part)]
        taken = {n.id for n in parts_ if isinstance(n, ast.Name)} | {n.arg for n in parts_ if isinstance(n, ast.arg)}
        for one in [n for part in [caller, *new] for n in walk(part)]:
            if isinstance(one, ast.Attribute) and dotted(one.value) == target.id and one.attr not in names:
                free = one.attr not in taken
                names[one.attr] = one.attr if free else self.fresh(f"{target.id}_{one.attr}", taken)
        change = Scattered(target.id, names)
        caller.body[:] = change.visited(caller.body)
        return change.visited(new)

    # -- places --

    def inside_block(self, caller: Function, body: list[ast.stmt]) -> None:
        place = 0
        while place < len(body):
            one = body[place]
            made = self.unfolded(caller, one)
            if made is not None:
                body[place : place + 1] = made
                self.changes += 1
                self.touched.add(caller)
                place += 0 if one in made else len(made)
                continue
            if not isinstance(one, Definition):
                self.looped += isinstance(one, ast.For | ast.While)
                for handler in getattr(one, "handlers", []):
                    self.inside_block(caller, handler.body)
                for part in ("body", "orelse", "finalbody"):
                    self.inside_block(caller, getattr(one, part, []))
                self.looped -= isinstance(one, ast.For | ast.While)
            place += 1

    def unfolded(self, caller: Function, node: ast.stmt) -> list[ast.stmt] | None:
        """What a statement becomes with a function put into it."""
        if isinstance(node, Definition | ast.While | ast.Try | ast.With):
            return None
        held = node.iter if isinstance(node, ast.For) else node.test if isinstance(node, ast.If) else node
        for call in (n for n in walk(held) if id(n) in self.aims):
            function = self.aims[id(call)]
            if function not in self.touched and self.reaches(held, call) == "there":
                put = self.scatter if function.name == "__init__" else self.put
                made = put(caller, node, call, function)  # type: ignore[arg-type]
                if made is not None:
                    self.touched.add(function)
                    return made
        return None

    def reaches(self, node: Any, aim: ast.AST) -> str:
        """Whether an expression comes to a part of it before it has had any effect: "there", "calm" if it has not
        come to it and nothing has happened, or "no"."""
        if node is aim:
            return "there"
        if isinstance(node, ast.Name) and node.id in self.facts.nonlocals:
            return "no"
        if node is None or isinstance(node, ast.Name | ast.Constant | ast.Lambda):
            return "calm"
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            found = self.reaches(node.value, aim)
            still = is_given(self.facts, node.attr) and node.attr not in self.changing
            still |= dotted(node).split(".")[0] in self.facts.modules or self.is_method(node.attr)
            return found if found != "calm" or still else "no"
        parts: list[Any]
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Return | ast.Expr | ast.keyword):
            if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
                base = node.target.value if isinstance(node.target, ast.Subscript) else node.target
                given = {n.id for n in walk(aim) if isinstance(n, ast.Name)}
                own = isinstance(base, ast.Name) and base.id in self.arrays - given
                if not (own and self.purity.expression(node.target)):
                    return "no"  # what is read first might change
            return self.reaches(node.value, aim) if node.value else "no"
        if isinstance(node, ast.Call):
            parts, last = [node.func, *node.args, *node.keywords], "no"
        elif isinstance(node, ast.Tuple | ast.List):
            parts, last = list(node.elts), "calm"
        elif isinstance(node, ast.Subscript | ast.Starred):
            parts, last = children(node), "no"
            fixed = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Subscript | ast.Name)
            if (
                fixed
                and dotted(node.value.value if isinstance(node.value, ast.Subscript) else node.value) in self.dicts
            ):
                last = "calm"
        elif isinstance(node, ast.Dict) and None not in node.keys:
            parts, last = [part for pair in zip(node.keys, node.values) for part in pair], "calm"
        elif isinstance(node, ast.BinOp):
            parts, last = [node.left, node.right], "no"
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            parts, last = [node.left, node.comparators[0]], "no"
        elif isinstance(node, ast.UnaryOp):
            parts, last = [node.operand], "no"
        elif isinstance(node, ast.IfExp | ast.BoolOp):
            parts, last = [node.test if isinstance(node, ast.IfExp) else node.values[0]], "no"
        else:
            return "no"
        for part in parts:
            found = self.reaches(part, aim)
            if found != "calm":
                return found
        return last

    def is_method(self, name: str) -> bool:
        """Whether an attribute is a method, whose look-up tells nothing."""
        named = self.facts.methods.get(name, ())
        return bool(named) and not any(marks_of(method) for _, method in named) and not self.facts.stored[name]

    # -- putting --

    def put(self, caller: Function, node: ast.stmt, call: ast.Call, function: Function) -> list[ast.stmt] | None:
        body, whole = cloned(function.body), getattr(node, "value", None) is call
        returns = sum(isinstance(n, ast.Return) for n in inside(ast.Module(body, [])))
        at_end = returns == 0 or (returns == 1 and isinstance(body[-1], ast.Return))
        given = self.facts.passed(call, function.args, int(isinstance(call.func, ast.Attribute)))
        if isinstance(call.func, ast.Attribute):
            given[function.args.args[0].arg] = call.func.value
        if any(value is None for value in given.values()):
            return None
        if self.looped and any(isinstance(one, Function) for one in function.body):
            return None  # each turn's inner function would see the last turn's names
        own = [call.func.value] if isinstance(call.func, ast.Attribute) else []
        order = [id(x) for x in (*own, *call.args, *(k.value for k in call.keywords))]  # in which they are computed
        fresh: list[Any] = [v for v in given.values() if id(v) not in order]
        if not all(isinstance(v, ast.Name | ast.Attribute) or is_literal(v) for v in fresh):
            return None  # a default that is made once
        given = dict(sorted(given.items(), key=lambda pair: order.index(id(pair[1])) if id(pair[1]) in order else 99))
        made = self.arguments(caller, function, body, cast(dict[str, ast.expr], given))
        if made is None:
            return None
        start, body = made
        gain = 2 - len(start)  # the head, and the last return or the call's own statement
        if gain < 0:
            return None
        if isinstance(node, ast.Return) and whole:
            falls = not isinstance(body[-1], ast.Return | ast.Raise)
            return [*start, *body, *([ast.Return(ast.Constant(None))] if falls else [])]
        if at_end:
            value = body.pop().value if returns else None  # type: ignore[attr-defined]
            value = value or ast.Constant(None)
            if isinstance(node, ast.Expr) and whole and self.purity.expression(value):
                return [*start, *body]
            Swap(call, value).visit(node)
            return [*start, *body, node]
        name = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not whole or not (isinstance(name, ast.Name) or isinstance(node, ast.Expr)):
            return None
        ended = self.ended(body, name.id if isinstance(name, ast.Name) else "")
        return [*start, *ended] if ended is not None and gain > 1 else None

    def ended(self, body: list[ast.stmt], name: str) -> list[ast.stmt] | None:
        """A block that comes to its end where it returned, with the value bound to a name; None if it cannot."""
        for place, one in enumerate(body):
            if isinstance(one, ast.Return):
                value = one.value or ast.Constant(None)
                last: list[ast.stmt] = [ast.Assign([ast.Name(name, ast.Store())], value)] if name else []
                last = last if name or self.purity.expression(value) else [ast.Expr(value)]
                return [*body[:place], *last]
            if not any(isinstance(n, ast.Return) for n in inside(ast.Module([one], []))):
                continue
            if not isinstance(one, ast.If):
                return None
            leaves = [
                isinstance(part[-1], ast.Return | ast.Raise) if part else False for part in (one.body, one.orelse)
            ]
            rest = body[place + 1 :]
            if not any(leaves) and rest:
                return None
            yes = self.ended([*one.body, *([] if leaves[0] else rest)], name)
            no = self.ended([*one.orelse, *([] if leaves[1] else rest)], name)
            if yes is None or no is None:
                return None
            if not yes:
                yes, no, one.test = no, [], ast.UnaryOp(ast.Not(), one.test)
            one.body, one.orelse = yes, no
            return [*body[:place], *([one] if yes else [])]
        none = ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None))
        return [*body, *([none] if name else [])]

    def arguments(
        self, caller: Function, function: Function, body: list[ast.stmt], given: dict[str, ast.expr]
    ) -> tuple[list[ast.stmt], list[ast.stmt]] | None:
        """(statements that bind parameters, the body with the others replaced and names that nobody has there)."""
        bound = set(bindings(function))
        own, notes = bound | set(given), {a.arg: a.annotation for a in parameters(function.args)}
        uses = Counter(n.id for one in body for n in walk(one) if isinstance(n, ast.Name))
        around = [caller]
        if id(caller) in self.facts.inner:
            around += [f for f in self.facts.nodes if isinstance(f, Function) and any(n is caller for n in walk(f))]
        local = {a.arg for f in around for a in [*parameters(f.args), *starred(f.args)]}.union(*map(bindings, around))
        looped = {n.id for one in body for g in walk(one) if isinstance(g, ast.comprehension)
                  for n in walk(g.target) if isinstance(n, ast.Name)}  # fmt: skip
        for one in (f for f in body if isinstance(f, Function)):
            looped |= set(bindings(one)) | {a.arg for a in parameters(one.args)}  # names of scopes of their own
        if local & (set(uses) - own - looped):
            return None  # a name of the module's, which means something else there
        taken = {n.id for n in walk(caller) if isinstance(n, ast.Name)} | {
            n.arg for n in walk(caller) if isinstance(n, ast.arg)
        }
        simple = {n: v for n, v in given.items() if n not in bound and self.simple(v, uses[n])
                  and dotted(v).split(".")[0] not in looped}  # fmt: skip
        start = list[ast.stmt]()
        imported = {
            a.asname or a.name
            for one in body
            for n in walk(one)
            if isinstance(n, ast.Import | ast.ImportFrom)
            for a in n.names
        }
        names = {n: self.fresh(n, taken | set(uses)) for n in sorted(own - set(simple)) if n in taken}
        if imported & set(names):
            return None
        inner = {n.id for f in function.body if isinstance(f, Function) for n in walk(f) if isinstance(n, ast.Name)}
        seen = {dotted(v).split(".")[0] for n, v in simple.items() if n in inner} & local
        counts = bindings(caller)
        if any(len(counts.get(n, [])) + (n not in counts) > 1 for n in seen):
            return None  # an inner function would see it change
        for name, value in given.items():
            if name in simple:
                continue
            if not uses[name]:
                start += [] if self.purity.expression(value) else [ast.Expr(value)]
                continue
            target = ast.Name(names.get(name, name), ast.Store())
            note = notes.get(name)
            start.append(ast.AnnAssign(target, note, value, 1) if note else ast.Assign([target], value))
        renamed = Renamed(names, simple)
        return start, [renamed.visit(one) for one in body]

    def simple(self, value: ast.expr, uses: int) -> bool:
        """Whether an argument may stand wherever its parameter is read."""
        if isinstance(value, ast.Name | ast.Constant):
            return not (isinstance(value, ast.Name) and value.id in self.facts.nonlocals)
        if not isinstance(value, ast.Attribute) or uses > 3 or not is_given(self.facts, value.attr):
            return False
        return value.attr not in self.changing and self.simple(value.value, uses)

    @staticmethod
    def fresh(name: str, taken: set[str]) -> str:
        return next(new for new in (f"{name}{number}" for number in itertools.count(2)) if new not in taken)


class Direct:
    """Values stand where they are used: no names for other names, none that the next statement alone reads."""

    WIDTH = 110  # of a line that becomes longer

    def __init__(self, facts: Facts, changing: set[str], chosen: set[Function] | None) -> None:
        self.facts, self.purity, self.changing, self.changes = facts, Purity(facts), changing, 0
        self.touched = set[Function]()
        for function in [n for n in facts.nodes if isinstance(n, Function) and not is_opaque(n)]:
            if chosen is None or facts.outermost(function) in chosen:
                before = self.changes
                self.look_at(function)
                self.touched |= {facts.outermost(function)} if self.changes > before else set()

    def look_at(self, function: Function) -> None:
        bound, args = bindings(function), [*parameters(function.args), *starred(function.args)]
        kept = {n for one in walk(function) if isinstance(one, ast.Global | ast.Nonlocal) for n in one.names}
        self.once = {n for n, v in bound.items() if len(v) == 1} - kept - {a.arg for a in args}
        self.local, self.kept, self.fixed = set(bound) | {a.arg for a in args}, kept, {a.arg for a in args} - set(bound)
        self.compared = {n for n in self.once if isinstance(bound[n][0], ast.Compare)}
        inner = [f for f in walk(function) if isinstance(f, Function | ast.Lambda) and f is not function]
        seen = [
            {n.id for n in walk(f) if isinstance(n, ast.Name)} - set(bindings(f)) - {a.arg for a in parameters(f.args)}
            for f in inner
        ]
        self.captured = set[str]().union(*seen)
        inside_ = {id(n) for f in inner for n in walk(f) if n is not f}
        loads = [n for n in walk(function) if isinstance(n, ast.Name) and is_load(n)]
        self.reads = Counter(n.id for n in loads if id(n) not in inside_ or n.id in self.captured)
        self.drop_unread(function)
        for node in walk(function):
            for part in ("body", "orelse", "finalbody"):
                body = getattr(node, part, None)
                if isinstance(body, list) and body and id(body[0]) not in inside_:
                    self.part(body, function)
                    self.drop_last(body, function)
                    self.same_test(body)
                    for place in range(len(body) - 2, -1, -1):
                        self.use(body, place)

    def drop_unread(self, function: Function) -> None:
        """Containers that are made and filled, and never looked at, go."""
        filled = defaultdict[str, list[ast.stmt]](list)
        for one in steps(function.body):
            target = one.targets[0] if isinstance(one, ast.Assign) and len(one.targets) == 1 else None
            target = one.target if isinstance(one, ast.AugAssign) else target
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                filled[target.value.id].append(one)
        for name, bound in bindings(function).items():
            made = isinstance(bound[0], ast.DictComp | ast.ListComp | ast.Dict | ast.List) and len(bound) == 1
            if made and isinstance(bound[0], ast.DictComp | ast.ListComp):  # of containers of their own
                made = isinstance(getattr(bound[0], "value", getattr(bound[0], "elt", None)), ast.List | ast.Constant)
            if not made or not len(filled[name]) == self.reads[name] > 0 or name in self.captured:
                continue
            if all(self.purity.expression(one.value) and self.purity.expression(t.slice)  # type: ignore[attr-defined]
                   for one in filled[name] for t, _ in stores(one)):  # fmt: skip
                Without(filled[name]).visit(function)
                self.reads[name], self.changes = 0, self.changes + 1

    def drop_last(self, body: list[ast.stmt], function: Function) -> None:
        """Copies of a name at the end of a function that nobody reads any more."""
        read = set[str]()
        for place in range(len(body) - 1, -1, -1) if body is function.body else ():
            one = body[place]
            name = one.targets[0] if isinstance(one, ast.Assign) and len(one.targets) == 1 else None
            copied = isinstance(name, ast.Name) and isinstance(one.value, ast.Name)  # type: ignore[attr-defined]
            if copied and name.id in self.local - self.captured - self.kept - read:  # type: ignore[union-attr]
                del body[place]
                self.changes += 1
            read |= {n.id for n in walk(one) if isinstance(n, ast.Name)}

    def same_test(self, body: list[ast.stmt]) -> None:
        """A condition inside itself."""
        for one in body:
            if not isinstance(one, ast.If) or not isinstance(one.test, ast.Name) or one.test.id not in self.compared:
                continue
            for place, inner in enumerate(one.body):
                if any(isinstance(n, ast.Name) and n.id == one.test.id and not is_load(n) for n in walk(inner)):
                    break
                if isinstance(inner, ast.If) and dotted(inner.test) == one.test.id:
                    one.body[place : place + 1] = inner.body
                    self.reads[one.test.id] -= 1
                    self.changes += 1
                    break

    def part(self, body: list[ast.stmt], function: Function) -> None:
        """Give each binding of a name a name of its own, where all are steps of one block and all but one trivial."""
        steps_ = defaultdict[str, list[tuple[int, ast.expr | None]]](list)
        for place, one in enumerate(body):
            if isinstance(one, ast.Assign | ast.AnnAssign):
                for target, value in stores(one):
                    if isinstance(target, ast.Name):
                        steps_[target.id].append((place, value))
        often = {name: bound for name, bound in steps_.items() if len(bound) > 1}
        counts = bindings(function) if often else {}
        args = {a.arg for a in [*parameters(function.args), *starred(function.args)]}
        for name, bound in often.items():
            single = len({place for place, _ in bound}) == len(bound) == len(counts[name]) > 1
            trivial = sum(isinstance(v, ast.Name | ast.Constant) for _, v in bound)
            if not single or trivial + 1 < len(bound) or name in self.captured | args:
                continue
            after = [
                n for one in body[bound[0][0] + 1 :] for n in walk(one) if isinstance(n, ast.Name) and n.id == name
            ]
            if sum(map(is_load, after)) != self.reads[name]:
                continue
            taken = {n.id for n in walk(function) if isinstance(n, ast.Name)} | args
            ends = [*(place for place, _ in bound[1:]), len(body)]
            for place, end in zip(ends, ends[1:]):
                taken.add(new := Unfold.fresh(name, taken))
                names, here, last = Renamed({name: new}, {}), cast(Any, body[place]), cast(Any, body[end : end + 1])
                names.visit(here.targets[0] if isinstance(here, ast.Assign) else here.target)
                for one in body[place + 1 : end]:
                    names.visit(one)
                for one in last:  # where it gets its next value
                    one.value = names.visit(one.value)
            self.changes += 1
            return

    def use(self, body: list[ast.stmt], place: int) -> None:
        """Put what one statement binds where it is read; the statement goes when nothing is left of it."""
        one, rest = body[place], body[place + 1 :]
        if not isinstance(one, ast.Assign | ast.AnnAssign) or one.value is None:
            return
        bound = list(stores(one))
        if not all(isinstance(target, ast.Name) for target, _ in bound):
            return
        whole = isinstance(one.value, ast.Tuple) and len(bound) == len(one.value.elts)
        if isinstance(one, ast.Assign) and (
            len(one.targets) > 1 or not (whole or isinstance(one.targets[0], ast.Name))
        ):
            return
        left, targets = list[tuple[Any, Any]](), {target.id for target, _ in bound}  # type: ignore[attr-defined]
        for target, value in bound:
            name = target.id  # type: ignore[attr-defined]
            fine = name in self.once and value is not None and self.reads[name] > 0
            names = {n.id for n in walk(value) if isinstance(n, ast.Name)} if value else set()
            same_ = isinstance(value, ast.Name) and value.id == name
            if (
                same_
                or fine
                and value is not None
                and not names & targets
                and (self.spread(name, value, rest) or self.join(name, value, rest))
            ):
                self.changes += 1
            else:
                left.append((target, value))
        if not left:
            del body[place]
        elif len(left) < len(bound):
            new = left[0] if len(left) == 1 else [ast.Tuple(list(part), ast.Load()) for part in zip(*left)]
            if len(left) > 1:
                new[0].ctx = ast.Store()  # type: ignore[union-attr]
            body[place] = ast.Assign([new[0]], new[1])

    def spread(self, name: str, value: Any, rest: list[ast.stmt]) -> bool:
        """Put a value that does not change wherever its name is read."""
        if isinstance(value, ast.Call):
            return self.take_apart(name, value, rest)
        whole = value.elts if isinstance(value, ast.Tuple) else [value]
        roots = {n.id for n in walk(value) if isinstance(n, ast.Name)} & self.local
        if name in self.captured and not roots <= self.once | self.fixed:
            return False  # an inner function may run when they have changed
        parts = all(self.still(part, rest) for part in whole)
        if not parts or (self.reads[name] > 8 and not isinstance(value, ast.Name)):
            return False
        reads = [n for one in rest for n in walk(one) if isinstance(n, ast.Name) and n.id == name]
        if len(reads) != self.reads[name]:
            return False
        if isinstance(value, ast.Tuple):  # taken apart there, or it is no gain
            apart = [n.value for one in rest for n in walk(one) if isinstance(n, ast.Subscript) and is_literal(n.slice)]
            if not {id(n) for n in reads} <= {id(n) for n in apart}:
                return False
        self.put(name, value, rest)
        return True

    def put(self, name: str, value: ast.expr, rest: list[ast.stmt]) -> None:
        change = Replace({name: value})
        for one in rest:
            change.visit(one)
        self.reads.update(n.id for _ in range(self.reads[name]) for n in walk(value) if isinstance(n, ast.Name))

    def still(self, node: ast.expr, rest: list[ast.stmt]) -> bool:
        """Whether an expression is a name, a constant, or an attribute that never changes, as long as `rest` runs."""
        if isinstance(node, ast.Attribute):
            known = is_given(self.facts, node.attr) or (node.attr in STILL and not any(map(reshapes, rest)))
            return known and node.attr not in self.changing and self.still(node.value, rest)
        if not isinstance(node, ast.Name):
            return is_literal(node)
        again = {n.id for one in rest for n in walk(one) if isinstance(n, ast.Name) and not is_load(n)}
        again |= {n.arg for one in rest for n in walk(one) if isinstance(n, ast.arg)}
        return node.id not in again and node.id not in self.facts.nonlocals

    def take_apart(self, name: str, value: ast.Call, rest: list[ast.stmt]) -> bool:
        """Fields of a tuple that is made here are what they were given; False, since the tuple may be needed, too."""
        kind = dotted(value.func)
        if kind not in self.facts.fields or "NamedTuple" not in map(dotted, self.facts.classes[kind].bases):
            return False
        given = self.facts.passed(value, self.facts.field_args(kind), 0)
        reads = [n for one in rest for n in walk(one) if isinstance(n, ast.Attribute) and is_load(n)  # type: ignore
                 and isinstance(n.value, ast.Name) and n.value.id == name]  # fmt: skip
        for node in reads:
            new = given.get(node.attr)
            if isinstance(new, ast.Name) and self.still(new, rest):
                for one in rest:
                    Swap(node, cloned(new)).visit(one)
                self.changes += 1
                self.reads[name] -= 1
                self.reads[new.id] += 1
        return False

    def join(self, name: str, value: ast.expr, rest: list[ast.stmt]) -> bool:
        """Put a value into the next statement, if that alone reads it, once, and nothing happens before."""
        if self.reads[name] != 1 or name in self.captured or not rest or not self.purity.expression(value):
            return False
        after = rest[0]
        held: Any = after.iter if isinstance(after, ast.For) else after.test if isinstance(after, ast.If) else after
        held = after.items[0].context_expr if isinstance(after, ast.With) else held
        if isinstance(held, ast.stmt):
            plain = isinstance(held, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr)
            plain |= isinstance(held, ast.AugAssign) and isinstance(held.target, ast.Name)
            held = held.value if plain else None  # type: ignore[attr-defined]
        found = [n for n in walk(held) if isinstance(n, ast.Name) and n.id == name] if held else []
        if any(isinstance(n, ast.Call) and dotted(n.func)[:5] == "time." for n in (*walk(value), *walk(held))):
            return False  # what is computed before a moment is not computed after it
        if len(found) != 1 or not self.comes(held, found[0]):
            return False
        new = Swap(found[0], value)
        room = self.WIDTH - len(name) if held is not found[0] else 10 * self.WIDTH
        if len(ast.unparse(held)) + len(ast.unparse(value)) > room:
            return False
        if held is found[0]:  # the whole of it
            for field in ("value", "iter", "test"):
                if getattr(after, field, None) is held:
                    setattr(after, field, value)
            if isinstance(after, ast.With):
                after.items[0].context_expr = value
            return True
        new.visit(held)
        return True

    def comes(self, node: Any, aim: ast.AST) -> bool:
        """Whether an expression comes to a part of it at most once, and has had no effect before."""
        if node is aim:
            return True
        if isinstance(node, ast.Lambda):
            return False
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            return self.comes(node.generators[0].iter, aim)
        parts = children(node)
        if isinstance(node, ast.Dict):
            parts = [part for pair in zip(node.keys, node.values) for part in pair if part is not None]
        for part in parts:
            if any(n is aim for n in walk(part)):
                return self.comes(part, aim)
            if not self.purity.expression(part):
                return False
        return False


def is_given(facts: Facts, name: str) -> bool:
    """Whether an attribute is a field, or is set by the program; no property or method."""
    own = name in facts.stored or any(name in fields for fields in facts.fields.values())
    return own and name not in facts.methods


def reshapes(node: ast.stmt) -> bool:
    """Whether a statement may give a tensor another shape, type or device."""
    found = (n for n in walk(node) if isinstance(n, ast.Attribute))
    return any((n.attr == "data" and isinstance(n.ctx, ast.Store)) or n.attr in RESHAPING for n in found)


RESHAPING = {"resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "set_", "swapaxes_"}
STILL = {"shape", "dtype", "device", "type", "ndim"}  # of tensors and what they are made of: never assigned


class Without(Rewriter):
    """Statements that go."""

    def __init__(self, gone: Sequence[ast.stmt]) -> None:
        self.gone = {id(one) for one in gone}

    def visited(self, nodes: list[Any]) -> list[Any]:
        left = super().visited([one for one in nodes if id(one) not in self.gone])
        return left or ([ast.Pass()] if nodes else [])


class Scattered(Rewriter):
    """Names for the attributes of one name."""

    def __init__(self, name: str, names: dict[str, str]) -> None:
        self.name, self.names = name, names

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if dotted(node.value) == self.name:
            return ast.Name(self.names[node.attr], node.ctx)
        return self.generic_visit(node)


class Swap(Rewriter):
    """One node for another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: Any) -> Any:
        return self.new if node is self.old else super().visit(node)


class Renamed(Rewriter):
    """Other names, and values for names that are only read."""

    def __init__(self, names: dict[str, str], values: dict[str, ast.expr]) -> None:
        self.names, self.values = names, values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.values:
            return cloned(self.values[node.id])
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.ExceptHandler:
        node.name = self.names.get(node.name, node.name) if node.name else None
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)


# ==== the program as a whole ====


class Program:
    """A script under one configuration, evaluated round by round until nothing changes."""

    def __init__(self, source: Source, h: Any, kept: Sequence[str], devices: Sequence[str], **marks: bool) -> None:
        self.source, self.h = source, h
        self.kept = frozenset(name.lower() for name in kept)
        self.absent = {"cuda", "mps", "cpu"} - set(devices)
        self.tree = ast.parse(source.text)
        self.original = {n.name: n for n in definitions(source.tree.body) if isinstance(n, Definition)}
        self.assigned = {
            target.id: value
            for node in definitions(source.tree.body)
            for target, value in stores(node)
            if isinstance(target, ast.Name) and value is not None
        }
        self.marks = {"PACKAGED": True, **marks}
        real = {name: vars(dataclasses)[name] for name in dataclasses.__all__}
        source.config.__dict__.update(self.marks, dataclasses=types.SimpleNamespace(**{**real, "asdict": as_dict}))
        self.space: dict[str, Any] = dict(source.config.__dict__)  # of functions run at build time
        self.eligible: dict[str, bool] = {}
        self.external, self.numbers = external_names(source.tree), itertools.count(1)
        self.open: frozenset[str] = frozenset()
        self.config_names, self.config_attributes = set[str](), set[str]()
        self.specialize()

    # -- the first step: the configuration's own place, and the registries --

    def specialize(self) -> None:
        used = self.h.used()
        for node in definitions(self.tree.body):
            if isinstance(node, ast.ClassDef) and node.name == CONFIG_CLASS:
                self.freeze(node)
            elif isinstance(node, ast.FunctionDef) and node.name == LOADER:
                node.body, node.args.args[1:], node.args.defaults = self.loading(), [], []
            for target, value in stores(node):
                if isinstance(target, ast.Name) and target.id in self.marks:
                    node.value = ast.Constant(self.marks[target.id])  # type: ignore[attr-defined]
                if isinstance(target, ast.Name) and target.id in used and isinstance(value, ast.Dict):
                    kept = [(k, v) for k, v in zip(value.keys, value.values) if literal(k) in used[target.id]]
                    value.keys, value.values = [k for k, _ in kept], [v for _, v in kept]
            self.type_lambdas(node)
        Marked(self.marks).visit(self.tree)

    def type_lambdas(self, node: ast.stmt) -> None:
        """Annotate the parameters of a registry's lambdas as the registry says."""
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Dict):
            return
        for kind in walk(node.annotation):
            if (
                isinstance(kind, ast.Subscript)
                and dotted(kind.value) == "Callable"
                and isinstance(kind.slice, ast.Tuple)
            ):
                types_ = kind.slice.elts[0]
                if not isinstance(types_, ast.List):
                    continue
                for value in node.value.values:
                    for arg, type_ in zip(parameters(value.args), types_.elts) if isinstance(value, ast.Lambda) else ():
                        arg.annotation = type_

    def freeze(self, node: ast.ClassDef) -> None:
        """The configuration's fields with their values as defaults."""
        values = dataclasses.asdict(self.h)
        for one in node.body:
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one.target.id in values:
                one.value = lifted(values[one.target.id])

    def loading(self) -> list[ast.stmt]:
        """What load_config does in the extracted script: read the variables that stay variables."""
        parts = []
        for field in dataclasses.fields(self.h):
            if field.name in self.kept:
                text = f"environ.get({field.name.upper()!r})"
                known = {"0": False, "1": True, "false": False, "true": True}
                read = f"{known}[{text}.lower()]" if field.type == "bool" else f"{field.type}({text})"
                read = text if field.type == "str" else read
                value = ast.unparse(lifted(dataclasses.asdict(self.h)[field.name]))
                parts.append(
                    f"{field.name}={text} or {value}" if read == text else f"{field.name}={read} if {text} else {value}"
                )
        return ast.parse(f"return {CONFIG_CLASS}({', '.join(parts)})").body

    # -- what is known --

    def survey(self, facts: Facts) -> None:
        """Which fields may change during a run, and what holds configurations."""
        self.config_names = set()
        held: dict[str, set[bool]] = defaultdict(set)
        for function in (n for n in facts.nodes if isinstance(n, Function)):
            own = {a.arg for a in parameters(function.args) if is_config_arg(a)}
            self.config_names |= own
            binders = [node for node in inside(function) if node.__class__ in BINDERS]
            for target, value in (pair for node in binders for pair in stores(node)):
                if isinstance(target, ast.Attribute):
                    copied = isinstance(value, ast.Attribute) and value.attr == target.attr
                    held[target.attr] |= set() if copied else {isinstance(value, ast.Name) and value.id in own}
        for kind in facts.classes.values():
            for one in kind.body:
                if isinstance(one, ast.AnnAssign):
                    held[dotted(one.target)].add(dotted(one.annotation) == CONFIG_CLASS)
        self.config_attributes = {name for name, kinds in held.items() if kinds == {True}}
        self.open = self.changing(facts)
        self.frozen = Frozen(self.h, self.open)

    def changing(self, facts: Facts) -> frozenset[str]:
        """Fields that are variables, or that some dataclasses.replace of a configuration gives another value."""
        found, values = set(self.kept), dataclasses.asdict(self.h)
        makers = [c for c in facts.calls[CONFIG_CLASS] if not {k.arg for k in c.keywords} <= self.kept]
        if any(k.arg is None for call in makers for k in call.keywords) or any(call.args for call in makers):
            return frozenset(values)
        for call in [*facts.calls[".replace"], *facts.calls["replace"]]:
            for keyword in call.keywords if is_replace(call) else ():  # of whatever object
                if keyword.arg is None:
                    return frozenset(values)
                alike = is_literal(keyword.value) and same(literal(keyword.value), values.get(keyword.arg))
                found |= set() if alike or keyword.arg not in values else {keyword.arg}
        return frozenset(found)

    def registry(self, name: str) -> ast.Dict | None:
        """A dict that the module writes out, as it is by now."""
        for node in definitions(self.tree.body):
            for target, value in stores(node):
                if isinstance(target, ast.Name) and target.id == name:
                    return value if isinstance(value, ast.Dict) else None
        return None

    def entry(self, name: str, key: Any) -> ast.expr | None:
        found = self.registry(name)
        if found is None or not all(is_literal(k) for k in found.keys):
            return None
        return next((v for k, v in zip(found.keys, found.values) if same(literal(k), key)), None)

    def module_value(self, name: str) -> Any:
        """The value of a constant of the module, of plain types. Raises Unknown."""
        if name in self.assigned and self.allowed(name):
            value = self.space[name]
            if is_plain(value):
                return value
        raise Unknown

    def pure_function(self, name: str) -> Callable:
        """A function of the program that can be run at build time. Raises Unknown."""
        if isinstance(self.original.get(name), Function) and self.allowed(name):
            return self.space[name]
        raise Unknown

    def allowed(self, name: str) -> bool:
        """Whether a definition uses nothing but plain Python and its like; it is then in `space`."""
        if name not in self.eligible:
            self.eligible[name] = name in self.marks  # while it is asked, it is not
            self.eligible[name] = name in self.marks or self.admit(name)
        return self.eligible[name]

    def admit(self, name: str) -> bool:
        node: ast.AST | None = self.original.get(name) or self.assigned.get(name)
        if node is None or name in (LOADER, CONFIG_CLASS) or (isinstance(node, Function) and node.decorator_list):
            return name in self.source.config.__dict__ and isinstance(node, ast.ClassDef)
        if isinstance(node, ast.ClassDef) and not is_tuple_class(node):
            return name in self.space
        own = {n.arg for n in walk(node) if isinstance(n, ast.arg)} | {name}
        own |= {n.id for n in walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.name for n in walk(node) if isinstance(n, Definition)}
        skipped = {id(x) for n in walk(node) for a in hints(n) for x in walk(a)}
        free = {n.id for n in walk(node) if isinstance(n, ast.Name) and id(n) not in skipped} - own
        if any(isinstance(n, ast.Import | ast.ImportFrom | ast.Yield) for n in walk(node)) or not all(
            map(self.known, free)
        ):
            return False
        if name not in self.space:
            text = ast.unparse(node)
            text = text if isinstance(node, Definition) else f"{name} = {text}"
            try:
                exec("from __future__ import annotations\n" + text, self.space)
            except Exception:  # noqa: BLE001 (what cannot be run at build time is left to run time)
                return False
        return True

    def known(self, name: str) -> bool:
        """Whether a free name of a definition means something harmless."""
        if name in PURE_BUILTINS or name in self.original or name in self.assigned:
            return name in PURE_BUILTINS or self.allowed(name)
        modules = {
            a.asname or a.name: a.name for n in self.source.tree.body if isinstance(n, ast.Import) for a in n.names
        }
        froms = {
            a.asname or a.name: n.module
            for n in self.source.tree.body
            if isinstance(n, ast.ImportFrom)
            for a in n.names
        }
        module = modules.get(name) or froms.get(name)
        if module in (*PURE_MODULES, "numpy", "collections", "typing"):
            made = importlib.import_module(module or "")
            self.space.setdefault(name, made if name in modules else getattr(made, name))
            return True
        return (
            hasattr(builtins, name)
            and isinstance(getattr(builtins, name), type)
            and issubclass(getattr(builtins, name), Exception)
        )

    # -- rounds --

    def run(self, limit: int = 99) -> ast.Module:
        """Rounds until nothing changes; the tree.

        After the first two a round folds only what changed in the one before and what uses the same names; when that
        is little, a whole round shows whether it is the end.
        """
        before, dirty, size, settled = dict[int, Said](), None, 0, False
        for number in range(limit):
            Reach(Facts(self.tree, self.external)).prune()
            facts = Facts(self.tree, self.external).scan()
            self.survey(facts)
            fold = Fold(self, facts)
            fold.chosen = dirty
            fold.visit(self.tree)
            facts = Facts(self.tree, self.external).scan()
            Sweep(facts).visit(self.tree)
            shrink(facts)
            size, last = len(facts.nodes), size
            if settled := settled or 0 < 0.9 * last < size:  # nearly all that goes has gone
                self.unfold()
            units = list(parts_of(self.tree))  # live up to the next round: none of its new ones has an old one's id
            after = {id(node): said(node, before.get(id(node))) for node in units}
            same_ = after.keys() == before.keys() and all(before[key] is one for key, one in after.items())
            if settled and dirty is None and same_:
                break
            dirty = self.touched(facts, before, after) if number else None
            dirty = dirty if dirty and len(dirty) > 0.1 * len(after) else None
            before = after
        return finished(self.tree)

    def unfold(self) -> None:
        """Put functions where they are called, as long as there are such; after a first look at all, where the last
        one has changed something."""
        Terse().visit(self.tree)
        chosen: set[Function] | None = None
        while True:
            unfold = Unfold(Facts(self.tree, self.external).scan(), chosen)
            if unfold.changes:
                chosen = chosen and chosen | set(map(unfold.facts.outermost, unfold.touched))
                Reach(Facts(self.tree, self.external)).prune()
                continue
            direct = Direct(unfold.facts, unfold.changing, chosen)
            if not direct.changes:
                return
            chosen = direct.touched

    def touched(self, facts: Facts, before: dict[int, Said], after: dict[int, Said]) -> set[int]:
        """Statements of the module, and methods, of which more may be known after some change.

        These are what has changed, what names a definition that has, or an attribute that is set to something else,
        and what is called or named otherwise than before.
        """
        dirty, nothing = {key for key, one in after.items() if before.get(key) is not one}, Said([], "", {}, {})
        changes = [(before.get(key, nothing), after[key]) for key in dirty]
        changes += [(before[key], nothing) for key in before.keys() - after.keys()]
        defined, used = set[str](), set[str]()
        for old, new in changes:
            short = min(len(old.outlined), len(new.outlined)) < SHORT  # it may be put in its calls' place, or be known
            defined |= differing(old.sets, new.sets) | ({old.name, new.name} - {"__init__"} if short else set())
            called = differing(old.calls, new.calls)
            used |= called | differing(Counter(old.names()), Counter(new.names()))
            defined |= {field for name in called for field in facts.fields.get(name, ())}
        own = set(facts.defs) | set(facts.methods) | set(facts.stored) | {n for f in facts.fields.values() for n in f}
        defined &= own | set(self.assigned)
        dirty |= {id(maker) for name, maker in facts.methods["__init__"] if name in used}
        return dirty | {key for key, one in after.items() if one.name in used or not defined.isdisjoint(one.names())}


SHORT = 150  # names, numbers and kinds of parts of a definition: some five lines


class Said(NamedTuple):
    """What a statement of the module, or a method, says."""

    outlined: list[Any]
    name: str  # of a definition
    sets: dict[str, list[Any]]  # attributes, and names of the module, with what they are set to
    calls: dict[str, list[Any]]  # what is called, with the arguments

    def names(self) -> Iterator[str]:
        return (one for one in self.outlined if one.__class__ is str)


def said(node: ast.stmt, before: Said | None) -> Said:
    """What a statement says, a class without its methods' code; what it said before, if that is the same."""
    if isinstance(node, ast.ClassDef):
        left: list[Any] = [ast.Name(one.name) if isinstance(one, Function) else one for one in node.body]
        node = ast.ClassDef(node.name, node.bases, node.keywords, left, node.decorator_list)
    outlined = outline(node)
    if before is not None and before.outlined == outlined:
        return before
    sets, calls = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list)
    for one in walk(node):
        if isinstance(one, ast.Call):
            calls[getattr(one.func, "attr", dotted(one.func))] += [outline(part) for part in (*one.args, *one.keywords)]
        for target, value in stores(one) if one.__class__ in BINDERS else ():
            if isinstance(target, ast.Attribute) or one is node:
                sets[dotted(target).split(".")[-1]] += [outline(value or one)]
    return Said(outlined, getattr(node, "name", ""), dict(sets), dict(calls))


def differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> set[str]:
    """Names of which two versions of a definition say something else."""
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


def parts_of(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements of a module, and methods, a class before those that it has."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.ClassDef):
            yield from (one for one in node.body if isinstance(one, Function))


def outline(node: ast.AST) -> list[Any]:
    """All that a tree says, as one list: its nodes' names, numbers and kinds of parts and, as texts, constants."""
    found = list[Any]()
    for one in walk(node):
        if one.__class__ is ast.Constant:
            found.append(repr(one.value))  # type: ignore[attr-defined]
            continue
        found.append(one.__class__)
        for name in one._fields:
            part = one.__dict__.get(name)
            if part.__class__ is list:
                found.append([x if x.__class__ is str else x.__class__ for x in part])
            else:
                found.append(part if part.__class__ is str or part.__class__ is int else part.__class__)
    return found


class Marked(Rewriter):
    """Conditions on the markers alone, decided before anything else: most of a script then is out of reach."""

    def __init__(self, marks: dict[str, bool]) -> None:
        self.marks = marks

    def truth(self, node: ast.expr) -> bool | None:
        if isinstance(node, ast.Name):
            return self.marks.get(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.truth(node.operand)
            return None if inner is None else not inner
        if isinstance(node, ast.BoolOp):
            first = self.truth(node.values[0])  # what comes before a marker might have effects
            return first if first is isinstance(node.op, ast.Or) else None
        return None

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        truth = self.truth(node.test)
        chosen = node.body if truth else node.orelse
        return node if truth is None else chosen or ast.Pass()

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        truth = self.truth(node.test)
        return node if truth is None else node.body if truth else node.orelse


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, texts and containers of them alone."""
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    if type(value) in (tuple, list, set, frozenset):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes, range)


class Finish(Rewriter):
    """Annotations and documentation go, but where a decorator or a class needs them."""

    def visit_FunctionDef(self, node: Any) -> Any:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if not is_opaque(node):
            node.returns = None
            for arg in [*parameters(node.args), *starred(node.args)]:
                arg.annotation = None
            self.generic_visit(node)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        for arg in parameters(node.args):
            arg.annotation = None
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        fields = class_fields(node)
        for place, one in enumerate(node.body):
            if isinstance(one, ast.AnnAssign) and dotted(one.target) in fields:
                one.annotation = ast.Name("object", ast.Load())
            elif isinstance(one, ast.AnnAssign) and one.value is not None:
                node.body[place] = ast.Assign([one.target], one.value)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        self.generic_visit(node)
        return (
            node
            if dotted(node.annotation) == "object"
            else ast.Assign([node.target], node.value)
            if node.value
            else None
        )


class Terse(Rewriter):
    """One statement for several that say the same: conditional values, neighbouring imports."""

    WIDTH = 110  # of a line; a longer one is no easier to read than its parts

    tried = 0  # statements around that handle exceptions

    def generic_visit(self, node: ast.AST) -> ast.AST:
        self.tried += isinstance(node, ast.Try)
        super().generic_visit(node)
        for part in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, part, None), list):
                setattr(node, part, self.block(body))
        self.tried -= isinstance(node, ast.Try)
        return node

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found = list[ast.stmt]()
        for one in reversed(body):
            after = found[0] if found else None
            if isinstance(one, ast.Import) and isinstance(after, ast.Import):
                after.names[:0] = one.names
            elif (short := self.with_default(one, after)) is not None:
                found[0] = short
            elif (short := self.chosen(one, after)) is not None:
                found[: 1 if isinstance(short, ast.Return) and not getattr(one, "orelse", []) else 0] = [short]
            else:
                found.insert(0, one)
        return found

    def with_default(self, node: ast.stmt, after: ast.stmt | None) -> ast.stmt | None:
        """A literal that the next statement may replace, as one conditional value."""
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and is_literal(node.value)):
            return None
        if not isinstance(after, ast.If) or after.orelse or len(after.body) != 1:
            return None
        one, place = after.body[0], ast.unparse(node.targets[0])
        if not isinstance(one, ast.Assign) or [ast.unparse(target) for target in one.targets] != [place]:
            return None
        plain = ast.Name | ast.Attribute | ast.Constant | ast.Compare | ast.BoolOp | ast.UnaryOp
        if self.tried or not all(isinstance(n, plain) for n in walk(after.test)):
            return None  # it might raise, or ask who reads the place
        if any(place == ast.unparse(n) for n in [*walk(after.test), *walk(one.value)]):
            return None
        made = ast.Assign(one.targets, ast.IfExp(after.test, one.value, node.value))
        return made if len(ast.unparse(ast.fix_missing_locations(made))) <= self.WIDTH else None

    def visit_If(self, node: ast.If) -> ast.If:
        self.generic_visit(node)
        inner = node.body[0]
        if len(node.body) == 1 and isinstance(inner, ast.If) and not (inner.orelse or node.orelse):
            node.test, node.body = ast.BoolOp(ast.And(), [node.test, inner.test]), inner.body
        return node

    def chosen(self, node: ast.stmt, after: ast.stmt | None) -> ast.stmt | None:
        """A conditional statement whose two ways do the same with two values, as one with a conditional value."""
        if not isinstance(node, ast.If) or len(node.body) != 1 or len(node.orelse) > 1:
            return None
        one, two = node.body[0], node.orelse[0] if node.orelse else after
        if isinstance(one, ast.Return) and isinstance(two, ast.Return) and one.value and two.value:
            made: ast.stmt = ast.Return(ast.IfExp(node.test, one.value, two.value))
        elif isinstance(one, ast.Assign) and isinstance(two, ast.Assign) and node.orelse:
            if list(map(ast.dump, one.targets)) != list(map(ast.dump, two.targets)):
                return None
            made = ast.Assign(one.targets, ast.IfExp(node.test, one.value, two.value))
        else:
            return None
        return made if len(ast.unparse(ast.fix_missing_locations(made))) <= self.WIDTH else None


def with_tuples(tree: ast.Module) -> ast.Module:
    """The same program with collections.namedtuple for each NamedTuple that is nothing but its fields."""
    names = {alias.asname or alias.name: (node, alias) for node in tree.body if isinstance(node, ast.ImportFrom)
             and node.module == "typing" for alias in node.names if alias.name == "NamedTuple"}  # fmt: skip
    if not names:
        return tree
    own, (line, alias) = names.popitem()
    kinds = [n for n in tree.body if isinstance(n, ast.ClassDef) and own in map(dotted, n.bases)]
    left = any(not isinstance(one, ast.AnnAssign) for kind in kinds for one in kind.body)
    used = {n.id for n in walk(tree) if isinstance(n, ast.Name)}
    new = "namedtuple" if not alias.asname else next(n for n in short_names() if n not in used) if left else own
    for place, node in enumerate(tree.body):
        if node not in kinds or not all(isinstance(one, ast.AnnAssign) for one in node.body):  # type: ignore[attr-defined]
            continue
        assert isinstance(node, ast.ClassDef)
        fields = {dotted(one.target): one.value for one in node.body if isinstance(one, ast.AnnAssign)}
        made = parsed(f"{new}({node.name!r}, {' '.join(fields)!r})")
        assert isinstance(made, ast.Call)
        if given := [value for value in fields.values() if value]:
            made.keywords = [ast.keyword("defaults", ast.Tuple(given, ast.Load()))]
        tree.body[place] = ast.Assign([ast.Name(node.name, ast.Store())], made)
    fresh = ast.ImportFrom("collections", [ast.alias("namedtuple", new if alias.asname else None)], 0)
    line.names = [a for a in line.names if a is not alias or left]
    tree.body[tree.body.index(line) : tree.body.index(line) + 1] = [fresh, *([line] if line.names else [])]
    return ast.fix_missing_locations(tree)


def finished(tree: ast.Module) -> ast.Module:
    if ast.get_docstring(tree, clean=False) is not None:
        tree.body = tree.body[1:]
    tree = Finish().visit(tree)
    Terse().visit(tree)
    left = any(is_opaque(n) for n in walk(tree) if isinstance(n, Function))
    tree.body = [n for n in tree.body if left or not (isinstance(n, ast.ImportFrom) and dotted_future(n))]
    for node in walk(tree):  # a body that lost all its statements
        if isinstance(getattr(node, "body", None), list) and not node.body and not isinstance(node, ast.Module):  # type: ignore
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
    return ast.fix_missing_locations(tree)


# ==== naming: short names, the same for the same thing wherever that can be ====

RARE = 4  # imports that are used no more often keep their names
FILES = (
    io.TextIOWrapper,
    io.BufferedReader,
    io.BytesIO,
    re.Pattern,
    re.Match,
    types.SimpleNamespace,
    type(hashlib.sha256()),
)
PLAIN_VALUES = (
    ast.Constant,
    ast.Tuple,
    ast.List,
    ast.Dict,
    ast.Lambda,
    ast.Compare,
    ast.BinOp,
    ast.ListComp,
    ast.DictComp,
)


GIVES_NAMES = {"setup_context"}  # keywords of a library's function that calls what it is given with names


class Place:
    """A scope: names that it binds, and the scope around it."""

    def __init__(self, node: Any, outer: Place | None, names: set[str]) -> None:
        self.node, self.outer, self.names = node, outer, names
        self.pinned = set[str]()

    def home(self, name: str) -> Place | None:
        """The scope that a name means which is read or bound here; None for a builtin."""
        at: Place | None = self
        while at and (name not in at.names or (isinstance(at.node, ast.ClassDef) and at is not self)):
            at = at.outer
        return at


class Naming:
    """Every use of a name in a program, by what it means; then a short name for each meaning.

    A local name may be any that is not used there for something else. Attributes, fields, methods and parameters that
    are passed by name have one namespace; those stay as they are that an object of another module may have, that a
    text may mean, or that another module may be given.
    """

    def __init__(self, tree: ast.Module, external: Outside) -> None:
        self.tree, self.facts = tree, Facts(tree, external).scan()
        inner = [n for n in self.facts.nodes if isinstance(n, ast.ImportFrom)]
        self.modules = self.facts.modules | {a.asname or a.name: f"{n.module}.{a.name}" for n in inner for a in n.names}
        self.uses: dict[tuple[int, str], list[tuple[Any, str, Place]]] = defaultdict(list)  # -> node, its part, where
        self.places: dict[int, Place] = {}
        self.pinned, self.own_calls, self.keywords, self.loose = (
            self.known_outside(),
            set[int](),
            set[str](),
            set[str](),
        )
        self.module = Place(tree, None, set(bindings(tree)))
        self.named_by_others = [dotted(k.value) or k.value for n in self.facts.nodes if isinstance(n, ast.Call)
                                for k in n.keywords if k.arg in GIVES_NAMES]  # fmt: skip
        self.members = self.own_members() - self.pinned
        self.look_at(tree.body, self.module)
        self.members = (self.members | self.keywords) - self.loose - self.pinned

    # -- what may be renamed --

    def known_outside(self) -> set[str]:
        """Names of attributes and keywords that others than the program know."""
        found = set(self.facts.external) | {n for kind in FILES for n in dir(kind)} | {"_"}
        for node in self.facts.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                found |= set(re.findall(r"[A-Za-z_]\w*", node.value))
            elif isinstance(node, ast.Attribute) and dotted(node).split(".")[0] in self.modules:
                found |= {node.attr, *names_behind(dotted(node), self.modules)}
            elif isinstance(node, Function) and is_opaque(node):
                found |= {n.attr for n in walk(node) if isinstance(n, ast.Attribute)}
            elif isinstance(node, ast.ClassDef) and not is_tuple_class(node) and self.facts.foreign_bases(node.name):
                for target, value in (pair for n in walk(node) for pair in stores(n)):
                    if isinstance(target, ast.Attribute) and not isinstance(value, PLAIN_VALUES):
                        found.add(target.attr)  # a parameter's or module's: part of what it is called in the artifact
        return found

    def own_members(self) -> set[str]:
        """Attributes, methods and fields that the program's classes make."""
        found = set(self.facts.stored) | set(self.facts.methods) | set(self.facts.given)
        found |= {name for fields in self.facts.fields.values() for name in fields}
        reads = {n.attr for n in self.facts.nodes if isinstance(n, ast.Attribute)}
        listing = {"asdict", "_asdict", "fields", "_fields", "__dict__"} & {*reads, *self.facts.loads}
        return {n for n in found if not n.startswith("__")} if not listing else set()

    def is_own(self, node: ast.expr, place: Place) -> bool:
        """Whether what is called is certainly the program's, and takes no keywords that it does not name."""
        if isinstance(node, ast.Name):
            home = place.home(node.id)
            made = self.facts.defs.get(node.id) if home is self.module else None
            named = made.args.kwarg is None if isinstance(made, Function) else isinstance(made, ast.ClassDef)
            return named and node.id not in self.facts.shadowed
        if not isinstance(node, ast.Attribute):
            return False
        methods = [m for _, m in self.facts.methods.get(node.attr, ())]
        known = node.attr in self.members and methods and node.attr not in self.facts.stored
        return node.attr == "_replace" or bool(known and not any(m.args.kwarg for m in methods))

    def is_foreign(self, node: ast.expr, place: Place) -> bool:
        """Whether what is called certainly is none of the program's."""
        head = dotted(node).split(".")[0]
        if head in self.modules and place.home(head) is self.module:
            return True
        if isinstance(node, ast.Name):
            return place.home(node.id) is None
        facts = self.facts
        own = isinstance(node, ast.Attribute) and (facts.methods.get(node.attr) or facts.stored.get(node.attr))
        return isinstance(node, ast.Attribute) and not own and not facts.given.get(node.attr)

    # -- reading a program --

    def use(self, node: Any, part: str, name: str, place: Place) -> None:
        home = place.home(name)
        if home is not None:
            self.uses[id(home), name].append((node, part, place))
            self.places[id(home)] = home

    def inner(self, node: Any, outer: Place) -> Place:
        """The scope of a function or lambda, with its parameters looked at."""
        args = [*parameters(node.args), *starred(node.args)]
        free = {n for one in inside(node) if isinstance(one, ast.Global | ast.Nonlocal) for n in one.names}
        place = Place(node, outer, (set(bindings(node)) | {a.arg for a in args} | walrus(node)) - free)
        if getattr(node, "name", node) in self.named_by_others:
            place.pinned |= {a.arg for a in args}
        if isinstance(node, Function) and is_opaque(node):
            place.pinned |= {n.id for n in walk(node) if isinstance(n, ast.Name)} | {a.arg for a in args}
        for arg in args:
            self.use(arg, "arg", arg.arg, place)
            self.look_at(arg.annotation, outer)
        self.look_at([*node.args.defaults, *node.args.kw_defaults], outer)
        return place

    def look_at(self, node: Any, place: Place) -> None:
        if isinstance(node, list):
            for one in node:
                self.look_at(one, place)
            return
        rule = getattr(self, "look_" + type(node).__name__, None)
        if rule:
            rule(node, place)
        elif node is not None:
            for one in children(node):
                self.look_at(one, place)

    def look_Name(self, node: ast.Name, place: Place) -> None:
        self.use(node, "id", node.id, place)

    def look_FunctionDef(self, node: Any, place: Place) -> None:
        self.look_at([*node.decorator_list, node.returns], place)
        self.use(node, "name", node.name, place)
        self.look_at(node.body, self.inner(node, place))

    def look_Lambda(self, node: ast.Lambda, place: Place) -> None:
        self.look_at(node.body, self.inner(node, place))

    def look_ClassDef(self, node: ast.ClassDef, place: Place) -> None:
        self.look_at([*node.decorator_list, *node.bases, *node.keywords], place)
        self.use(node, "name", node.name, place)
        declared = {dotted(one.target) for one in node.body if isinstance(one, ast.AnnAssign)}
        self.look_at(node.body, Place(node, place, set(bindings(node)) | declared))

    def look_comprehension(self, node: Any, place: Place) -> None:
        names = {n.id for g in node.generators for n in walk(g.target) if isinstance(n, ast.Name)}
        own = Place(node, place, names)
        for number, one in enumerate(node.generators):
            self.look_at(one.iter, own if number else place)
            self.look_at([one.target, *one.ifs], own)
        self.look_at([getattr(node, part, None) for part in ("key", "value", "elt")], own)

    look_ListComp = look_SetComp = look_DictComp = look_GeneratorExp = look_comprehension

    def look_NamedExpr(self, node: ast.NamedExpr, place: Place) -> None:
        at = place
        while isinstance(at.node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) and at.outer:
            at = at.outer
        self.use(node.target, "id", node.target.id, at)
        self.look_at(node.value, place)

    def look_Call(self, node: ast.Call, place: Place) -> None:
        given = {k.arg for k in node.keywords if k.arg}
        if given and (self.is_own(node.func, place) or is_replace(node)):
            self.keywords |= given
            self.own_calls |= {id(k) for k in node.keywords}
        elif given and not self.is_foreign(node.func, place):
            self.loose |= given
        for one in children(node):
            self.look_at(one, place)

    def look_Import(self, node: Any, place: Place) -> None:
        for alias in node.names:
            self.use(alias, "asname", (alias.asname or alias.name).split(".")[0], place)
            if "." in alias.name and not alias.asname:
                place.pinned.add(alias.name.split(".")[0])

    look_ImportFrom = look_Import

    def look_Global(self, node: Any, place: Place) -> None:
        for at, name in enumerate(node.names):
            self.use((node, at), "names", name, place)

    look_Nonlocal = look_Global

    def look_ExceptHandler(self, node: ast.ExceptHandler, place: Place) -> None:
        if node.name:
            self.use(node, "name", node.name, place)
        self.look_at([node.type, *node.body], place)

    # -- choosing --

    def rename(self) -> ast.Module:
        """Give every meaning its name: a function's names a, b, c ... as they come, the module's by how often they are
        used, so that the same letters come in the same places."""
        self.map, taken = (
            self.member_names(),
            defaultdict[int, set[str]](set),
        )  # taken: in a scope something is called so
        rest, names = list[tuple[int, str]](), tuple(itertools.islice(short_names(), 2000))
        for (home, name), uses in self.uses.items():
            if (fixed := self.fixed(self.places[home], name, uses)) is None:
                rest.append((home, name))
            else:
                self.give(home, name, fixed, taken)
        late = {key: self.places[key[0]] is self.module for key in rest}
        for key in sorted(rest, key=lambda key: (late[key], -len(self.uses[key]) * late[key], key[1] * late[key])):
            used = set().union(*(taken[at] for at in self.live(key[0], self.uses[key])))
            self.give(*key, next(name for name in names if name not in used), taken)
        for node in self.facts.nodes:
            if isinstance(node, ast.Attribute):
                node.attr = self.map.get(node.attr, node.attr)
            elif isinstance(node, ast.keyword) and node.arg and id(node) in self.own_calls:
                node.arg = self.map.get(node.arg, node.arg)
        return self.tree

    def member_names(self) -> dict[str, str]:
        """Members with their short names, those first that are used most."""
        counts = Counter(n.attr for n in self.facts.nodes if isinstance(n, ast.Attribute))
        counts += Counter(n.arg for n in self.facts.nodes if isinstance(n, ast.keyword) and n.arg)
        spare = (name for name in short_names() if name not in self.pinned)
        return dict(zip(sorted(self.members, key=lambda name: (-counts[name], name)), spare))

    def fixed(self, home: Place, name: str, uses: list[Any]) -> str | None:
        """The name that something must have, if it is not free."""
        if isinstance(home.node, ast.ClassDef):
            return self.map.get(name, name)
        if name in home.pinned or name.startswith("__") or any(name in place.pinned for _, _, place in uses):
            return name
        if isinstance(home.node, Function | ast.Lambda) and any(part == "arg" for _, part, _ in uses):
            return self.map.get(name, name) if name in self.keywords | self.loose else None
        if not any(part == "asname" and node.asname for node, part, _ in uses) and len(uses) < RARE:
            return name if any(part == "asname" for _, part, _ in uses) else None
        return None

    def live(self, home: int, uses: list[tuple[Any, str, Place]]) -> set[int]:
        """Scopes in which a name means something: where it is used, and those around up to its own."""
        found = {home}
        for _, _, place in uses:
            at: Place | None = place
            while at is not None and id(at) != home:
                found.add(id(at))
                at = at.outer
        return found

    def give(self, home: int, name: str, new: str, taken: dict[int, set[str]]) -> None:
        uses = self.uses[home, name]
        for at in self.live(home, uses):
            taken[at].add(new)
        for node, part, _ in uses:
            if part == "names":
                node[0].names[node[1]] = new
            elif part == "asname":
                node.asname = new if new != node.name else None
            else:
                setattr(node, part, new)


def named(text: str, external: Outside) -> ast.Module:
    """A program with short names."""
    return Naming(ast.parse(text), external).rename()


def short_names() -> Iterator[str]:
    """a, b, ... Z, then two letters."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for size in itertools.count(1):
        for name in map("".join, itertools.product(letters, repeat=size)):
            if not iskeyword(name) and not hasattr(builtins, name):
                yield name


def walrus(node: ast.AST) -> set[str]:
    """Names that expressions assign in a function, those in its comprehensions included."""
    return {n.target.id for n in inside(node) if isinstance(n, ast.NamedExpr)}


@functools.cache
def attributes_at(path: str) -> frozenset[str]:
    """Attributes of a module or class of that path, and of the classes in it."""
    head, *rest = path.split(".")
    with suppress(Exception):
        found = importlib.import_module(head)
        for name in rest:  # what a module imports only when it is asked for costs seconds, and none of its is handled
            found = vars(found)[name] if isinstance(found, types.ModuleType) else getattr(found, name)
        inner = vars(found).values() if isinstance(found, types.ModuleType) else []
        kinds = [found, *(kind for kind in inner if isinstance(kind, type))]
        if isinstance(found, types.ModuleType | type):
            return frozenset(name for kind in kinds for name in dir(kind))
    return frozenset()


def names_behind(name: str, modules: dict[str, str]) -> frozenset[str]:
    head, _, rest = name.partition(".")
    return attributes_at(f"{modules[head]}.{rest}")


# ==== minifying and wrapping ====

RAW_LZMA = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": lc, "lp": lp, "pb": pb}
    for lc, lp, pb in ((3, 0, 0), (4, 0, 0), (2, 0, 0), (1, 0, 0), (0, 0, 0), (3, 0, 2), (3, 1, 0), (0, 0, 2))
]
OPEN = "lzma.decompress({data},3,None,[{{'id':33}}])"  # a decoder needs no more of the filter than its name
# Kernels are compiled from their source: a program without a file hands it to linecache.
LISTED = "import linecache\nlinecache.cache['t']=len(s),None,s.splitlines(1),'t'\n"


def minified(text: str, named: bool = False) -> str:
    """The same program in fewer characters. Raises BuildError where python-minifier is not installed."""
    try:
        import python_minifier
    except ImportError:
        raise BuildError(
            "minifying needs python-minifier: pip install -r requirements-dev.txt, or --no-minify"
        ) from None
    kept = python_minifier.RemoveAnnotationsOptions(  # operators and kernels read those that are left
        remove_return_annotations=False, remove_argument_annotations=False, remove_variable_annotations=False
    )
    return python_minifier.minify(
        text,
        rename_globals=not named,
        rename_locals=not named,
        remove_literal_statements=True,
        hoist_literals=False,
        remove_annotations=kept,
    )


@functools.cache
def packed(text: str) -> bytes:
    """The smallest raw LZMA stream of a text."""
    return min((lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=[f]) for f in RAW_LZMA), key=len)


def wrap_none(text: str) -> bytes:
    return text.encode()


def loader(data: str, listed: bool) -> str:
    return f"import lzma\ns={OPEN.format(data=data)}.decode()\n{started(listed)}"


def started(listed: bool) -> str:
    """The end of a wrapper: run the program s."""
    return f"{LISTED}exec(compile(s,'t','exec'))\n" if listed else "exec(s)\n"


def quoted(stream: bytes) -> str:
    """A Latin-1 string literal of a stream: what ends it, or is no character of a source, is escaped."""
    text = stream.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r")
    body = text.rstrip("'")
    ends = ("'" * (len(text) - len(body))).replace("'''", "''\\'")  # the last of them may not meet the literal's end
    ends = ends[:-1] + "\\'" if (len(text) - len(body)) % 3 else ends
    text = body.replace("'''", "''\\'") + ends
    text = re.sub("\0(?=[0-7])", r"\\x00", text).replace("\0", "\\0")
    return "'''" + text + "'''.encode('l1')"


def wrap_latin1(text: str) -> bytes:
    """A Latin-1 source whose one string is the stream."""
    return ("#coding:l1\n" + loader(quoted(packed(text)), is_listed(text))).encode("latin-1")


# A model of text as mixtures of what followed in several contexts C (none, 1 to 6 characters, words, the shape of the
# code, what stands before the innermost open bracket (Q), the line's begin) gives the probability of each bit to an
# arithmetic decoder. Floats are added, multiplied and divided alone, which comes out the same on every machine. T is
# the logistic function's inverse, W are weights by how often a context was met: A by the bits before and how long the
# word is so far, B by the character before. Of a context and the bits before: (probability, times met, which weight).
MIXER = r"""import re,bisect
def f(g,n,o=''):
 T=[];Q=[];h=-11.7;v=0;r=1;M={};c=128;W=[[.2]*36 for k in range(512)]
 for k in range(1,65536):T+=[h];h+=65536/k/(65536-k)
 S=lambda x:(bisect.bisect(T,x)+.5)/65537
 while len(o)<n:
  t=o[-50:];x=t[-1:];w=re.split('\\W+',t)[-3:];s=re.sub('\\w+','a',t)+'!'
  Q=[w[1:]]*(x in'([{')+Q[x in')]}':];B=W[c+256];c=1
  C=[M.setdefault(str(k),{})for k in['',*[t[-k:]for k in(1,2,3,4,6)],w[2:],
w[::2],s[-5:],s[-9:],Q[:1]+[s[-3:]],o[o.rfind('\n'):][:8]+x]]
  while c<128:
   A=W[c+128*len(w[-1][:2])];j=a=b=0;J=[]
   for k in C:
    p,d,i=k.get(c,(.5,0,0));i+=j;x=T[int(p*65534)];J+=(i,x,p,d,k),;a+=A[i]*x;b+=B[i]*x;j+=3
   while r<1<<24:r*=253;v=v*253+next(g,0)
   m=int(r*S((a+b)/2));y=v<m;a=(y-S(a))*.02;b=(y-S(b))*.02
   if y:r=m
   else:r-=m;v-=m
   for i,x,p,d,k in J:A[i]+=a*x;B[i]+=b*x;k[c]=p+(y-p)/(d+1.4),d+(d<25),1+(d>0)
   c=c*2+y
  o+=chr(c-128)
 return o
"""
DIGITS = [byte for byte in range(256) if byte not in b"\0\r\\"]  # what needs no escape in a string


def contexts(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(the numbers of the contexts of each character, as MIXER has them; how long its word is so far, 2 at most)."""
    part = MIXER[MIXER.index("  t=o") : MIXER.index("  while c")].replace("{}", "len(M)")
    start = "M={};Q=[];c=0;W=range(512);found=[]"
    head = f"import re\ndef f(text):\n {start}\n for k in range(len(text)):\n  o=text[:k]\n"
    space: dict[str, Any] = {}
    exec(f"{head}{part}  found+=[*C,len(w[-1][:2])],\n return found\n", space)
    found = np.array(space["f"](text))
    return found[:, :-1], found[:, -1]


def turns(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which key comes where if equal ones stand together, where each group begins, the groups' sizes)."""
    both = np.sort(keys * len(keys) + np.arange(len(keys)))
    order = both % len(keys)
    starts = np.flatnonzero(np.diff(both // len(keys), prepend=-1))
    return order, starts, np.diff(starts, append=len(keys))


def waves(starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(turn, places of the groups' members whose turn it is), the largest group first."""
    starts, sizes = starts[np.argsort(-sizes, kind="stable")], np.sort(sizes)
    for turn, count in enumerate((len(sizes) - np.searchsorted(sizes, np.arange(sizes[-1]), "right")).tolist()):
        yield turn, starts[:count] + turn


def probabilities(keys: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how likely each of the contexts of each bit takes it to be 1, which weight that has), flat.

    keys: (bits * contexts,) numbers of contexts together with the bits before. What is known of one hangs on what
    came there before alone, so the histories go on at once; the few long ones each by itself.
    """
    order, starts, _ = turns(keys)
    times = order // (len(keys) // len(bits))
    again = np.diff(times, prepend=-1) == 0  # the same context twice, which learns once
    again[starts] = False
    visit = np.cumsum(~again, dtype=np.int32) - 1
    starts, y = visit[starts], bits[times[~again]]
    sizes = np.diff(starts, append=len(y))
    p, now, long = np.full(len(y), 0.5), np.full(len(starts), 0.5), sizes > 2000
    for turn, places in waves(starts[~long], sizes[~long]):
        p[places] = now = now[: len(places)]
        now = now + (y[places] - now) / (min(turn, 25) + 1.4)
    for start, end in zip(starts[long], starts[long] + sizes[long]):
        one = 0.5
        for turn, bit in enumerate(y[start:end].tolist()):
            p[start + turn] = one
            one += (bit - one) / (min(turn, 25) + 1.4)
    found, weight = np.empty(len(keys)), np.empty(len(keys), np.int8)
    found[order] = p[visit]
    weight[order] = np.minimum(np.arange(len(y)) - np.repeat(starts, sizes), 2)[visit]
    return found, weight


def chances(text: str) -> tuple[list[float], list[int]]:
    """(how likely MIXER takes each bit of a text to be 1, the bits), to the last digit.

    Weights, too, hang on what came where the same ones were used alone.
    """
    numbers, lengths = contexts(text)
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) + 128
    before, bits = codes[:, None] >> np.arange(7, 0, -1), (codes[:, None] >> np.arange(6, -1, -1) & 1).ravel()
    count, size = numbers.shape[1], bits.size
    p, weight = probabilities((numbers[:, None] * 128 + before[:, :, None]).ravel(), bits)
    k = np.arange(1, 65535)
    inverse = np.cumsum(np.r_[-11.7, 65536 / k / (65536 - k)])  # MIXER's T

    def logistic(values: np.ndarray) -> np.ndarray:
        return (np.searchsorted(inverse, values, "right") + 0.5) / 65537

    x = inverse[(p * 65534).astype(np.int64)].reshape(size, count)
    weight = weight.reshape(size, count) + np.arange(count, dtype=np.int8) * 3
    rows = np.r_[(before + 128 * lengths[:, None]).ravel(), np.repeat(np.r_[128, codes[:-1]] + 256, 7)]
    order, starts, sizes = turns(rows)
    weights, sums, bit = np.full((len(starts), 3 * count), 0.2), np.empty(2 * size), bits.astype(float)
    for _, places in waves(starts, sizes):
        at = order[places] % size
        which = weight[at] + np.arange(len(places))[:, None] * (3 * count)
        w, inputs = weights.ravel()[which], x[at]
        total = np.add.accumulate(w * inputs, axis=1)[:, -1]  # one after the other, as a loop adds
        sums[order[places]] = total
        weights.ravel()[which] = w + ((bit[at] - logistic(total)) * 0.02)[:, None] * inputs
    return logistic((sums[:size] + sums[size:]) / 2).tolist(), bits.tolist()


def mixed(text: str) -> bytes:
    """The stream from which MIXER makes an ASCII text: digits to the base 253, each as its DIGITS."""
    low, span, size, parts = 0, 1, 0, list[int]()  # parts: 64 digits each, and what is carried over
    for chance, bit in zip(*chances(text)):
        while span < 1 << 24:
            span, low, size = span * 253, low * 253, size + 1
            if size % 64 == 0:
                parts, low = [*parts, low], 0
        middle = int(span * chance)
        low, span = (low, middle) if bit else (low + middle, span - middle)
    low += functools.reduce(lambda number, part: number * 253**64 + part, parts, 0) * 253 ** (size % 64)
    unit = 253 ** int(math.log(span, 253))  # digits at the end that may be anything are zeros, which need not be told
    number, digits = (low + span - 1) // unit * unit if (low + span - 1) // unit * unit >= low else low, list[int]()
    for _ in range(size):
        number, digit = divmod(number, 253)
        digits.append(DIGITS[digit])
    return bytes(digits[::-1]).rstrip(b"\1")


def wrap_mixed(text: str) -> bytes:
    """A Latin-1 source with a decoder and what it decodes; 4 to 9 s of a core at every start."""
    plain = text.encode("ascii", "backslashreplace").decode()
    if ast.dump(ast.parse(plain)) != ast.dump(ast.parse(text)):
        raise BuildError("the wrapper `mixed` is for ASCII outside of plain strings; take --wrapper latin1")
    decoder = f"import zlib\nexec(zlib.decompress({quoted(deflated(MIXER))},-15))\n"
    made = f"s=f((c-1-(c>13)-(c>92)for c in {quoted(mixed(plain))}),{len(plain)})\n"
    return f"#coding:l1\n{decoder}{made}{started(is_listed(text))}".encode("latin-1")


def deflated(text: str) -> bytes:
    tool = zlib.compressobj(9, zlib.DEFLATED, -15)
    return tool.compress(text.encode()) + tool.flush()


def wrap_base85(text: str) -> bytes:
    data = f"base64.b85decode('{base64.b85encode(packed(text)).decode()}')"
    return ("import base64\n" + loader(data, is_listed(text))).encode()


def wrap_zip(text: str) -> bytes:
    """A zip file with a __main__.py, which Python runs as it is."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        member = zipfile.ZipInfo("__main__.py", (1980, 1, 1, 0, 0, 0))
        member.compress_type = zipfile.ZIP_DEFLATED
        file.writestr(member, "import sys\n__file__=sys.argv[0]\n" + text, compresslevel=9)
    return buffer.getvalue()


WRAPPERS: dict[str, Callable[[str], bytes]] = {
    "none": wrap_none, "latin1": wrap_latin1, "zip": wrap_zip, "base85": wrap_base85, "mixed": wrap_mixed,
}  # fmt: skip


def is_listed(text: str) -> bool:
    """Whether a program has kernels that are compiled from its source."""
    return ".jit" in text


def wrapped(text: str, how: str) -> tuple[str, bytes]:
    """(wrapper, script): the one that is asked for, or the smallest."""
    made = {name: wrap(text) for name, wrap in WRAPPERS.items() if how in ("", name)}
    name = min(made, key=lambda name: (len(made[name]), name))
    return name, made[name]


# ==== extraction of one configuration ====


@dataclasses.dataclass(frozen=True)
class Extracted:
    """A script for one configuration: to read, minified, and as it is shipped."""

    h: Any
    text: str
    short: str
    wrapper: str
    script: bytes


def folds(h: Any) -> bool:
    """Whether the data at hand may be case-folded: as its manifest says; where it is not here, it may be."""
    folder = Path(h.data_path)
    if not folder.is_dir():
        return True
    manifest = folder / "manifest.json"
    return manifest.is_file() and bool(json.loads(manifest.read_text()).get("tokenizer", {}).get("casefold"))


def extract(source: Source, environ: dict[str, str], options: Any) -> Extracted:
    """Specialize, minify and wrap. Raises BuildError."""
    h = source.load(environ)
    if not options.dce:
        short = source.text if options.no_minify else minified(source.text)
        return Extracted(h, source.text, short, *wrapped(short, options.wrapper))
    kept = (*ALWAYS_KEPT, *options.keep_env)
    unknown = [name for name in kept if name.lower() not in dataclasses.asdict(h)]
    if unknown:
        raise BuildError(f"--keep-env {unknown[0]} is not a variable of {source.path.name}")
    shaping = sorted(set(map(str.lower, options.keep_env)) & set(source.config.structure_fields()))
    if shaping:
        raise BuildError(
            f"--keep-env {shaping[0].upper()} shapes the network, which the script and its artifacts must agree on; "
            "build one script for each value"
        )
    fields, free = source.config.FIELDS, source.config.NOT_OF_THE_SCORE
    of_score = [n for n in options.keep_env if fields[n].metadata["group"] == "evaluation" and n.lower() not in free]
    if options.eval_only and of_score:  # such a script prints the protocol, which is worked out here
        raise BuildError(
            f"--keep-env {of_score[0]} is part of the protocol that a scoring script states; build one for each value"
        )
    program = Program(source, h, kept, options.devices.split(","), FOLDS=folds(h), SCORES=options.eval_only)
    plain = ast.unparse(program.run())
    text = ast.unparse(with_tuples(ast.parse(plain))) + "\n"
    named_ = "" if options.no_minify else ast.unparse(with_tuples(named(plain, program.external)))
    short = text if options.no_minify else minified(named_, named=True)
    for part in (text, short):
        compile(part, "train_gpt.py", "exec")
    name, script = wrapped(short, options.wrapper)
    return Extracted(h, text, short, name, script)


# ==== the proof ====


def small_job(h: Any) -> dict[str, str]:
    """Variables that make a configuration a job of seconds in which all that it switches on still happens."""
    v = dataclasses.asdict(h)
    layers, heads = min(v["num_layers"], 4), 2
    orders = len(v["bigram_hash_orders"].split(",")) * v["bigram_hash_heads"]
    sizes: dict[str, Any] = {
        "num_layers": layers, "model_dim": 32, "num_heads": heads,
        "num_kv_heads": 1 if v["num_kv_heads"] < v["num_heads"] else heads, "holdout_tokens": 256,
        "train_seq_len": 32, "train_batch_tokens": 256, "micro_batch_tokens": 128, "val_batch_size": 256,
        "max_val_tokens": 700, "eval_streams": 3, "iterations": 8, "max_wallclock_seconds": 0, "train_log_every": 2,
        "sinkhorn_iters": 3, "capsule_dim": 8, "capsule_num": min(v["capsule_num"], 3), "skc_block_size": 8,
        "feedback_dim": 8,
        "bigram_hash_dim": 4 * orders, "nsa_block": 8, "nsa_stride": 4, "nsa_select_block": 8, "nsa_select": 3,
        "nsa_window": 8, "induction_window": 16, "calib_max_evals": 4, "calib_proxy_tokens": 64, "gptq_batches": 2,
        "val_loss_every": 4 if v["val_loss_every"] else 0, "shared_blocks": min(v["shared_blocks"], 2),
        "xsa_layers": layers if v["xsa_layers"] >= v["num_layers"] else min(v["xsa_layers"], 1), "ttt_rank": 2,
        "ngram_cache_tokens": 128, "eval_engram_tokens": 128, "eval_engram_buckets": 64, "sliding_eval_stride": 16,
        "rmt_tokens": 2,
        "precision": "fp32", "save_every": 0, "compile": "0" if v.get("compile") == "0" else "1",
    }  # fmt: skip
    least = {
        "partial_rope_dims": 8,
        "embed_dim": 16,
        "bigram_hash_buckets": 64,
        "attn_window": 16,
        "rmt_segment": 8,
        "rmt_bptt": 2,
        "hc_start": 2,
    }
    least |= {
        "attn_gate": 4,
        "smear_gate": 4,
        "muon_momentum_warmup_steps": 4,
        "eval_seq_len": 32,
        "ttt_chunk_tokens": 32,
    }
    least |= {
        "group_size": 16,
        "yarn_original": 16,
        "value_embed": 1,
        "warmdown_iters": 4,
        "grad_checkpoint": 2,
        "export_proxy_eval": 3,
    }
    sizes |= {name: min(value, v[name]) for name, value in least.items() if v[name]}
    sizes |= {"warmup_steps": min(2, v.get("warmup_steps", 0))}
    sizes |= {"engram_inject_layer": 1} if v["engram_inject_layer"] > 1 else {}
    sizes |= {"backout": 1} if v["backout"] > 1 else {}
    sizes |= {"recurrence_layers": "1-2"} if v["recurrence_layers"] else {}
    sizes |= {"curriculum_stages": "0:4,0.3:2,0.6:1"} if v["curriculum_stages"] else {}
    sizes |= {"batch_stages": "0:128,0.3:192,0.6:256"} if v["batch_stages"] else {}
    return {name.upper(): str(int(x) if isinstance(x, bool) else x) for name, x in sizes.items() if name in v}


RANKS = 2  # of the second small job
ABORTED = (
    "terminate called without an active exception"  # gloo's threads at the end of a rank, seldom, on busy machines
)
JOB_SECONDS = 300  # a small job takes ten to thirty on a free core
DRIVER = """
import contextlib, os, runpy, sys
with contextlib.suppress(ImportError):
    import torch
    torch.compile = lambda function, **options: function  # what is done for it is done, but compiling takes minutes
    notes, backward = open(f"losses{os.environ.get('RANK', '0')}.txt", "w"), torch.Tensor.backward
    def noted(self, *args, **options):
        notes.write(self.item().hex() + "\\n")
        notes.flush()
        return backward(self, *args, **options)
    torch.Tensor.backward = noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


COVERAGE = ("-m", "coverage", "run", "-p", "--include=*/train_gpt.py")
# Runs a script on a CPU up to the end of its first backward pass, if it has one. Where it would launch a kernel on a
# GPU it builds it for a Hopper GPU, from the arguments that it is given; what a kernel would write stays as it was.
BUILDER = """
import os, runpy, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    get_current_stream = lambda self, device: 0
driver.set_active(Hopper())
run, backward = JITFunction.run, torch.Tensor.backward
def build(self, *args, grid, warmup, **options):
    run(self, *args, grid=grid, warmup=True, **options)
    print("built", self.fn.__name__, flush=True)
def last(self, *args, **options):
    backward(self, *args, **options)
    sys.stdout.flush()
    if "coverage" in sys.modules:
        sys.modules["coverage"].Coverage.current().save()
    os._exit(0)
JITFunction.run, torch.Tensor.backward = build, last
torch.compile = lambda function, **options: function
triton.JITFunction = ()  # nothing is one: this is no machine where kernels are missing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Asks for what a small job does not come to: every compressor and packing, and FlashAttention by another's hand.
PROBE = """
import runpy, sys, types
from importlib.util import find_spec
import numpy as np
own = runpy.run_path("train_gpt.py", run_name="probe")
for kind, packings in own.get("STREAM_PACKINGS", {"bytes": ()}).items():
    dtype = own.get("STREAM_TYPES", {}).get(kind, np.dtype("u1"))
    values = np.random.default_rng(0).integers(-1 if dtype.kind != "u" else 0, 2, 3000)
    values = (values | 1 if kind in ("rows", "signs") else values).astype(dtype)
    for name in packings if "PACKINGS" in own else ():
        pack, unpack = own["PACKINGS"][name]
        assert (unpack(pack(values), values.size, dtype) == values).all(), f"{kind} packed as {name}"
    for name, (compress, expand) in own.get("COMPRESSORS", {}).items():
        if find_spec({"zstd": "zstandard", "brotli": "brotli"}.get(name, "sys")):
            assert expand(compress(values.tobytes(), kind), values.nbytes) == values.tobytes(), f"{kind} by {name}"
for package in ("json", "no_package_of_that_name") if "import_problem" in own else ():
    assert bool(own["import_problem"](package)) is (package != "json"), package
flash = [name for name in ("fa3", "fa2") if name in own.get("ATTENTION", {})]
if flash:
    import torch
    def attention(q, k, v, groups, window):
        rows, columns = torch.arange(len(q)).unsqueeze(1), torch.arange(len(q))
        seen = (columns <= rows) & (groups == groups.unsqueeze(1)) & ((window < 0) | (rows - columns <= window))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
    def whole(q, k, v, causal, window_size):
        return torch.stack([attention(*x, torch.zeros(q.shape[1]), window_size[0]) for x in zip(q, k, v)])
    def parts(q, k, v, bounds, same, longest, other, causal, window_size):
        return attention(q, k, v, torch.searchsorted(bounds, torch.arange(len(q)), right=True), window_size[0])
    made = types.ModuleType("flash_attn")
    made.flash_attn_func, made.flash_attn_varlen_func = whole, parts
    sys.modules["flash_attn"] = sys.modules["flash_attn_interface"] = made
    q, k, v = torch.randn(2, 12, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    documents = torch.tensor([[0] * 5 + [1] * 7, [2] * 9 + [3] * 3])
    for name in flash:
        found = own["ATTENTION"][name](q, k, v, 0, documents)
        wanted = [[attention(*x, g, w) for x, g in zip(zip(q, k, v), groups)]
                  for groups in (documents, torch.zeros(2, 12)) for w in [-1, *range(1, 12)]]
        assert any(torch.allclose(found, torch.stack(x), atol=1e-5) for x in wanted), name
print("probed")
"""


def probe(folder: Path, text: str, environ: dict[str, str]) -> None:
    """Run what a script has and no small job on a CPU comes to. Raises BuildError for what is wrong."""
    folder.mkdir()
    (folder / "train_gpt.py").write_text(text)
    (folder / "probe.py").write_text(PROBE)
    run_script(folder, [*COVERAGE, "probe.py"], environ)


def is_kernel(node: Definition) -> bool:
    """Whether a function is Triton's; the module may have another name in a minified script."""
    return any(dotted(mark).endswith(".jit") for mark in node.decorator_list)


def launched(text: str) -> set[str]:
    """Names of the kernels that a script launches."""
    tree = ast.parse(text)
    jitted = {n.name for n in walk(tree) if isinstance(n, Function) and is_kernel(n)}
    calls = (n.func.value for n in walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript))
    return {dotted(value) for value in calls} & jitted


def build_kernels(
    folder: Path, text: str, environ: dict[str, str], words: Sequence[str] = (), coverage: bool = False
) -> str:
    """Build a script's kernels for sm_90; what was built. Raises BuildError with the compiler's words."""
    if not (wanted := launched(text)):
        return ""
    if find_spec("triton") is None:
        return f"{len(wanted)} not built, triton is not installed"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text(text.replace(".is_cuda", ".is_cpu"))
    (folder / "driver.py").write_text(BUILDER)
    try:
        said = run_script(folder, [*(COVERAGE if coverage else ()), "driver.py", "train_gpt.py", *words], environ)
    except BuildError as error:
        raise BuildError(f"kernels of the shipped script cannot be built for sm_90: {error}") from None
    built = set(re.findall(r"^built (\w+)$", said, re.MULTILINE))
    if not built:
        raise BuildError(f"the small job launched none of the script's kernels: {', '.join(sorted(wanted))}")
    left = ", ".join(sorted(wanted - built)) or "none"
    return f"{len(built)} built for sm_90 as the small job launches them; not launched by it: {left}"


def with_kernels(source: Source, small: dict[str, str], made: Extracted, options: Any) -> Extracted:
    """The small job's script, with sparse attention by kernels where it may choose what to compute by."""
    if small.get("NSA_IMPL") != "auto" or "NSA_BACKENDS" not in made.text:
        return made
    return extract(source, {**small, "NSA_IMPL": "triton"}, argparse.Namespace(**{**vars(options), "wrapper": "none"}))


@dataclasses.dataclass(frozen=True)
class Run:
    """What a job left: each loss to the last bit, its log without times, its artifact."""

    losses: list[str]
    log: list[str]
    artifact: bytes


def run_script(folder: Path, command: Sequence[str], environ: dict[str, str]) -> str:
    """What a script says that is run in its folder. Raises BuildError with its last words when it fails."""
    plain = {
        n: v for n, v in os.environ.items() if n in ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV", "OMP_NUM_THREADS")
    }
    environ = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **plain, **environ, "RUN_ID": "proof"}
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environ, capture_output=True, text=True, timeout=JOB_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace").strip()[-500:]
        raise BuildError(f"{folder.name}: the job took more than {JOB_SECONDS} s; it last said: {said}") from None
    if done.returncode:
        said = (
            re.split(r"^E\d{4} ", done.stderr, flags=re.MULTILINE)[0].strip() or done.stdout.strip()
        )  # not torchrun's
        raise BuildError(f"{folder.name}: the job ended with {done.returncode}: {said[-1500:]}")
    return done.stdout


def run_ranks(folder: Path, command: Sequence[str], environ: dict[str, str], ranks: int) -> str:
    """What a script says that is run on some ranks. Raises BuildError with its last words when it fails."""
    if ranks == 1:
        return run_script(folder, command, environ)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--no-python", sys.executable]
    try:
        return run_script(folder, [*start, *command], environ)
    except BuildError as error:
        if ABORTED not in str(error):
            raise
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return run_script(folder, [*start, *command], environ)


def run_job(folder: Path, script: bytes, environ: dict[str, str], coverage: bool = False, ranks: int = 1) -> Run:
    """Run a script in a folder of its own. Raises BuildError with its last words when it fails."""
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes(script)
    (folder / "driver.py").write_text(DRIVER)
    run_ranks(folder, [*(COVERAGE if coverage else ()), "driver.py", "train_gpt.py"], environ, ranks)
    run = folder / "runs" / "proof"
    log = (run / "train.log").read_text().splitlines()
    losses = [word for path in sorted(folder.glob("losses*.txt")) for word in path.read_text().split()]
    return Run(losses, log, (run / "model.pgz").read_bytes())


def scored(
    folder: Path, script: bytes, words: Sequence[str], environ: dict[str, str], coverage: bool = False, ranks: int = 1
) -> str:
    """The score, tokens and bytes that a script says of an artifact, without seconds."""
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes(script)
    said = run_ranks(folder, [*(COVERAGE if coverage else ()), "train_gpt.py", *words], environ, ranks)
    found = re.findall(r"^final_eval .*|^tokens:\d+ bytes:\d+", said, re.MULTILINE)
    if not found:
        raise BuildError(f"{folder.name}: the script told no score, but: {said.strip()[-300:]}")
    return " ".join(found)


MEASURED = re.compile(r"(step:\d+/\d+ |final_\w+ )?(?:train_loss|val_loss):\S+( val_bpb:\S+)?")


def first_difference(full: Run, other: Run) -> str:
    """Where two runs of a job part, in words; nothing if they agree."""
    for number, (a, b) in enumerate(itertools.zip_longest(full.losses, other.losses), 1):
        if a != b:
            return f"loss {number} of {len(full.losses)} is {b}, not {a}"
    one, two = ([m[0] for line in run.log if (m := MEASURED.match(line))] for run in (full, other))
    for a, b in itertools.zip_longest(one, two):
        if a != b:
            return f"the log says {b!r}, not {a!r}"
    if full.artifact != other.artifact:
        return f"the artifact differs ({len(other.artifact)} bytes, {len(full.artifact)})"
    return "" if full.losses or one else "neither run has any loss"


def shape(text: str) -> dict[str, str]:
    """Each definition of a program without its numbers and texts."""
    tree = ast.parse(text)
    for node in walk(tree):
        if isinstance(node, ast.Constant) and not isinstance(node.value, bool | None):
            node.value = 0
    return {getattr(n, "name", "") or ast.unparse(n)[:40]: ast.dump(n) for n in tree.body}


def suspects(one: str, two: str) -> list[str]:
    """Definitions of two programs that differ in more than numbers and texts."""
    a, b = shape(one), shape(two)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def lines_run(folder: Path) -> tuple[set[int], set[int]]:
    """Lines of the script in a folder that its job ran, and those that it did not."""
    for command in (["combine", "-q"], ["json", "-q", "-o", "coverage.json"]):
        subprocess.run([sys.executable, "-m", "coverage", *command], cwd=folder, check=True, capture_output=True)
    (found,) = json.loads((folder / "coverage.json").read_text())["files"].values()
    return set(found["executed_lines"]), set(found["missing_lines"])


def covered(text: str, folders: Sequence[Path]) -> tuple[float, list[str]]:
    """Share of a script's lines that any of its jobs ran, and the others by the definition that they are in."""
    found = [lines_run(folder) for folder in folders]
    run, missed = (set().union(*parts) for parts in zip(*found, strict=True))
    places = {n: node for node in walk(ast.parse(text)) if isinstance(node, Function)
              for n in range(node.lineno, (node.end_lineno or node.lineno) + 1)}  # fmt: skip
    there = [n for n in sorted(missed - run) if n not in places or not is_kernel(places[n])]  # which are built
    missing = Counter(places[n].name if n in places else "module" for n in there)
    return 100 * len(run) / (len(run) + len(there)), [f"{name} ({count})" for name, count in missing.items()]


def job_environment(source: Source, h: Any, options: Any) -> dict[str, str]:
    """All variables of a configuration's small job."""
    data = {
        "DATA_PATH": str(Path(options.proof_data).resolve()),
        "TOKENIZER_PATH": str(Path(options.proof_tokenizer).resolve()),
    }
    small = {**dataclasses_env(source, h), **small_job(h), **data, "VOCAB_SIZE": str(options.proof_vocab)}
    if h.vocab_size in source.config.BYTE_VOCABULARIES:
        small["VOCAB_SIZE"] = str(h.vocab_size)
    return small


def prove(source: Source, environ: dict[str, str], whole: Extracted, options: Any) -> list[str]:
    """Run the full script and the extracted one on a small job; what was shown. Raises BuildError for a difference."""
    small = job_environment(source, whole.h, options)
    made = extract(source, small, argparse.Namespace(**{**vars(options), "wrapper": whole.wrapper}))
    keeps = {name: small[name] for name in (*ALWAYS_KEPT, *options.keep_env) if name in small}
    with tempfile.TemporaryDirectory(prefix="proof_") as name:
        folder = Path(name)
        full = run_job(folder / "full", source.path.read_bytes(), small)
        if options.eval_only:
            return prove_scores(source, small, keeps, made, folder)
        for kind, script, coverage in (("readable", made.text.encode(), True), ("shipped", made.script, False)):
            run = run_job(folder / kind, script, keeps, coverage)
            if difference := first_difference(full, run):
                blamed = ", ".join(suspects(made.text, whole.text)) or "unknown: compare the scripts' definitions"
                raise BuildError(f"the {kind} script is not the full one: {difference}; suspected: {blamed}")
        ranks = RANKS if source.path.name == TARGETS["torch"][0] else 1
        if ranks > 1:
            if not folds(whole.h):  # data of whose manifest nothing is needed: its fingerprint is made
                (folder / "data").mkdir()
                for path in Path(small["DATA_PATH"]).glob("*.bin"):
                    (folder / "data" / path.name).symlink_to(path)
                small, keeps = ({**one, "DATA_PATH": str(folder / "data")} for one in (small, keeps))
            apart = run_job(folder / "full_ranks", source.path.read_bytes(), small, ranks=ranks)
            for kind, script, coverage in (("ranks", made.text.encode(), True), ("shipped_ranks", made.script, False)):
                if difference := first_difference(apart, run_job(folder / kind, script, keeps, coverage, ranks)):
                    raise BuildError(f"on {ranks} ranks the {kind} script is not the full one: {difference}")
        probe(folder / "probe", made.text, keeps)
        on_gpu, folders = with_kernels(source, small, made, options), ["readable", "probe", *["ranks"] * (ranks > 1)]
        kernels = build_kernels(folder / "kernels", on_gpu.short, keeps)
        if kernels and on_gpu is made:
            build_kernels(folder / "kernels_readable", made.text, keeps, coverage=True)
            folders += ["kernels_readable"] * (folder / "kernels_readable").is_dir()
        share, missing = covered(made.text, [folder / name for name in folders])
    other, more = suspects(made.text, whole.text), f", and on {ranks} ranks" if ranks > 1 else ""
    told = [
        f"proof: {len(full.losses) or 'the log of'} losses, scores and artifact ({len(full.artifact)} bytes) of the "
        f"full and the extracted script agree to the last bit on a small job{more}"
    ]
    told += [f"kernels: {kernels}"] if kernels else []
    told.append(f"coverage: {share:.1f}% of the extracted script's lines; not run: {', '.join(missing) or 'none'}")
    told.append(
        f"the small job's script and the shipped one differ in numbers alone, but for: {', '.join(other) or 'nothing'}"
    )
    return told


def prove_scores(
    source: Source, small: dict[str, str], keeps: dict[str, str], made: Extracted, folder: Path
) -> list[str]:
    """Score the full job's artifact by the full script and the extracted one. Raises BuildError for a difference."""
    path = str(folder / "full" / "runs" / "proof" / "model.pgz")
    worlds = (1, RANKS) if source.path.name == TARGETS["torch"][0] else (1,)
    for ranks in worlds:
        places = [folder / f"{kind}_{ranks}" for kind in ("full", "readable", "shipped")]
        expected = scored(places[0], source.path.read_bytes(), ["eval", path], small, ranks=ranks)
        for place, script in zip(places[1:], (made.text.encode(), made.script)):
            found = scored(place, script, [path], keeps, place is places[1], ranks)
            if found != expected:
                raise BuildError(f"the script in {place.name} scores an artifact otherwise: {found}, not {expected}")
    probe(folder / "probe", made.text, keeps)
    share, missing = covered(made.text, [folder / "probe", *(folder / f"readable_{ranks}" for ranks in worlds)])
    kernels = build_kernels(folder / "kernels", made.short, keeps, [path])
    on = " and ".join(map(str, worlds))
    return [
        f"proof: the extracted script scores an artifact of the full one as that does, ranks {on}: {expected}",
        *([f"kernels: {kernels}"] if kernels else []),
        f"coverage: {share:.1f}% of the extracted script's lines; not run: {', '.join(missing) or 'none'}",
    ]


def dataclasses_env(source: Source, h: Any) -> dict[str, str]:
    """All values of a configuration as variables."""
    skipped = {"preset", "env_file", "run_id", "resume", "eval_protocol"}
    values = {n: v for n, v in dataclasses.asdict(h).items() if n not in skipped and v != ""}
    return {n.upper(): str(int(v) if isinstance(v, bool) else v) for n, v in values.items()}


# ==== what it tells ====


def lines_of(text: str) -> int:
    """Lines of code: those that are not empty."""
    return sum(map(bool, text.splitlines()))


def section_sizes(source: Source, text: str) -> list[str]:
    """Bytes by section of the source, before and after; a definition belongs where it stood."""
    lines = source.text.split("\n")
    homes, left = dict[str, str](), Counter[str]()
    sections = source.sections()
    for node in definitions(source.tree.body):
        home = next(name for name, (first, last) in sections.items() if first <= node.lineno <= last)
        names = [node.name] if isinstance(node, Definition) else [dotted(t) for t, _ in stores(node)]
        homes |= dict.fromkeys(names, home)
    for one in definitions(ast.parse(text).body):
        names = [one.name] if isinstance(one, Definition) else [dotted(t) for t, _ in stores(one)]
        left[homes.get(names[0], "HEAD") if names else "HEAD"] += len(ast.unparse(one)) + 1
    rows = [f"{'section':<14}{'before':>9}{'after':>9}"]
    for name, (first, last) in sections.items():
        rows.append(f"{name:<14}{len(chr(10).join(lines[first - 1 : last]).encode()):>9}{left[name]:>9}")
    return rows


def largest(text: str, count: int = 30) -> list[str]:
    """Definitions and methods of a program that take the most bytes, and the share of each."""
    sizes = dict[str, int]()
    for node in ast.parse(text).body:
        name = node.name if isinstance(node, Definition) else ast.unparse(node)[:40].split("\n")[0]
        sizes[name] = len(ast.unparse(node)) + 1
        methods = [n for n in node.body if isinstance(n, Function)] if isinstance(node, ast.ClassDef) else []
        sizes |= {f"{name}.{method.name}": len(ast.unparse(method)) + 1 for method in methods}
    order = sorted(sizes, key=lambda name: (-sizes[name], name))[:count]
    return [f"{name:<44}{sizes[name]:>8}{sizes[name] / len(text):>7.1%}" for name in order]


class Apart(Program):
    """A program whose functions stay where they are: those that were put elsewhere were not dropped."""

    def unfold(self) -> None:
        pass


def explained(source: Source, whole: Extracted, options: Any) -> list[str]:
    """Definitions that are there no more: put where they are called, or dropped, each with what used it."""
    apart = Apart(source, whole.h, (*ALWAYS_KEPT, *options.keep_env), options.devices.split(","),
                  FOLDS=folds(whole.h), SCORES=options.eval_only).run()  # fmt: skip
    kept, there = (
        {n.name for n in definitions(tree.body) if isinstance(n, Definition)} for tree in (ast.parse(whole.text), apart)
    )
    users: dict[str, list[str]] = defaultdict(list)
    nodes = {n.name: n for n in definitions(source.tree.body) if isinstance(n, Definition)}
    for name, node in nodes.items():
        for used in {n.id for n in walk(node) if isinstance(n, ast.Name)} & (nodes.keys() - {name}):
            users[used].append(name)
    rows = []
    for name in nodes.keys() - kept - {entry for entries in whole.h.used().values() for entry in entries}:
        if name in there:
            by = [user for user in users[name] if user in there][:4]
            rows.append(f"put where it is used {name}: by {', '.join(by) or 'the module'}")
            continue
        near = [f"{user} ({'where a condition is decided' if user in there else 'dropped'})" for user in users[name]]
        rows.append(f"dropped {name}: used by {', '.join(near[:4]) or 'registries, commands or nothing'}")
    return sorted(rows)


# ==== the record folder ====


OVER = 3  # a run's exit code when its bytes are over the budget, which `refusals` tells
PAPERS = ("README.md", "submission.json", "train_seed*", "model.pgz*")  # of a record, beside the script


def number(text: str) -> float:
    """The number that a text is, NaN if it is none."""
    return float(text) if re.fullmatch(r"-?\d+\.\d+", text) else math.nan


def refusals(folder: Path, h: Any, code: int) -> tuple[list[str], dict[str, Any]]:
    """Why a run's folder must not be packaged with a script of so many bytes, and its results."""
    why, log, artifact = list[str](), folder / "train.log", folder / "model.pgz"
    found: dict[str, Any] = {"ranks": 1}
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        if m := re.match(r"final_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)", line):
            found |= {"val_loss": number(m[1]), "val_bpb": number(m[2])}
        if m := re.match(r"training done: steps:(\d+) train_time:(\d+)ms", line):
            found |= {"steps": int(m[1]), "train_seconds": int(m[2]) / 1e3}
        if m := re.match(r"model_bytes:(\d+) ", line):
            found["logged_bytes"] = int(m[1])
        if m := re.match(r"(?:device|torch)\S* .*\branks:(\d+)(?: .*\battention:(\w+))?", line):
            found |= {"ranks": int(m[1]), "attention": m[2]}
    if not artifact.is_file() or "val_bpb" not in found:
        return [f"{folder} has no finished run: an artifact and its final score are wanted"], found
    found |= {"bytes_model": artifact.stat().st_size, "bytes_code": code}
    found["bytes_total"] = found["bytes_model"] + found["bytes_code"]
    found["sha256"] = hashlib.sha256(artifact.read_bytes()).hexdigest()
    if found["bytes_total"] > h.hard_budget_bytes:
        why.append(f"budget: {found['bytes_total']} bytes are more than HARD_BUDGET_BYTES={h.hard_budget_bytes}")
    if 0 < h.max_wallclock_seconds < found.get("train_seconds", math.inf):
        took, limit = found.get("train_seconds"), h.max_wallclock_seconds
        why.append(f"time: training took {took} s of MAX_WALLCLOCK_SECONDS={limit:g}")
    if not math.isfinite(found["val_bpb"] + found["val_loss"]):
        why.append(f"log: its score is val_loss:{found['val_loss']} val_bpb:{found['val_bpb']}")
    if found.get("logged_bytes") != found["bytes_model"]:
        why.append(
            f"log: it tells of an artifact of {found.get('logged_bytes')} bytes, there is one of {found['bytes_model']}"
        )
    why += measured_otherwise(folder / "metrics.jsonl", found)
    why += audit_refusals(artifact, h, found["sha256"])
    return why, found if why else {**found, "audit": Path(f"{artifact}.audit.json").read_text()}


def measured_otherwise(metrics: Path, found: dict[str, Any]) -> list[str]:
    """Why a log does not stand for what was measured beside it; a packaged run measures nothing beside its log."""
    if not metrics.is_file():
        return []
    try:
        lines = [line for line in metrics.read_text(errors="replace").splitlines() if '"final_roundtrip"' in line]
        last = json.loads(lines[-1])
        measured = {"val_loss": last["val_loss_nats"], "val_bpb": last["val_bpb"]}
        other = [name for name, value in measured.items() if not abs(value - found[name]) < 1e-7]
    except (ValueError, KeyError, TypeError, IndexError):
        return [f"log: {metrics} has no final score that can be read"]
    return [f"log: its {name} is {found[name]}, in metrics.jsonl it is {measured[name]:.8f}" for name in other]


def refuse(runs: Sequence[Path], h: Any, code: int) -> list[dict[str, Any]]:
    """Results of runs by seed. Raises BuildError with every reason against packaging them."""
    found = [refusals(run, h, code) for run in runs]
    if reasons := [f"{run.name}: {reason}" for run, (why, _) in zip(runs, found) for reason in why]:
        raise BuildError("not packaged; " + "; ".join(reasons))
    return [{"seed": seed_of(run, h), **results} for run, (_, results) in zip(runs, found)]


def audit_refusals(artifact: Path, h: Any, sha256: str) -> list[str]:
    """Why an artifact's audit does not stand for it."""
    audit, how = Path(f"{artifact}.audit.json"), f"ENV_FILE={artifact.parent}/config.env python train_gpt.py audit"
    if not audit.is_file():
        return [f"audit: there is none; {how} {artifact}"]
    try:
        report = json.loads(audit.read_text())
        failed = [one["check"] for one in report["checks"] if one["ok"] not in (True, None)]
        if not report["ok"] or failed or not report["checks"]:
            said = f"{', '.join(failed[:3])}{', …' * (len(failed) > 3)}" if failed else "no check is named"
            return [f"audit: it failed ({said}); {how} {artifact}"]
    except (ValueError, KeyError, TypeError):
        return [f"audit: {audit} cannot be read; {how} {artifact}"]
    if report.get("artifact_sha256") != sha256:
        return ["audit: it was of another artifact"]
    if report.get("protocol") != h.protocol:
        return [f"audit: it was of {report.get('protocol')}, the run's score is of {h.protocol}; {how} {artifact}"]
    return []


def seen_from(out: Path, path: Path) -> Path:
    """A path as it is from a record's folder, if both are in this repository; else the whole path."""
    root, full = Path(__file__).resolve().parent, Path(os.path.abspath(path))
    inside = full.is_relative_to(root) and out.resolve().is_relative_to(root)
    return Path(os.path.relpath(full, out.resolve())) if inside else full


def readme(out: Path, whole: Extracted, rows: list[dict[str, Any]], told: list[str], options: Any) -> str:
    """README.md of a record."""
    root, script, best = (
        Path(__file__).resolve().parent,
        TARGETS[options.target][0],
        min(rows, key=lambda row: row["val_bpb"]),
    )
    defaults = {f.name: f.default for f in dataclasses.fields(whole.h)}
    own = {
        n.upper(): v
        for n, v in dataclasses.asdict(whole.h).items()
        if v != defaults[n] and n not in ("run_id", "env_file")
    }
    lines = [
        f"# {options.name or out.resolve().name}",
        "",
        *([options.blurb, ""] if options.blurb else []),
        "| seed | val_loss | val_bpb | steps | training s | artifact bytes | total bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            str(row.get(k))
            for k in ("seed", "val_loss", "val_bpb", "steps", "train_seconds", "bytes_model", "bytes_total")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if len(rows) > 1:
        parts = [spread([row[k] for row in rows]) for k in ("val_loss", "val_bpb")]
        lines.append("| mean (standard deviation) | " + " | ".join(f"{m} ({d})" for m, d in parts) + " | | | | |")
    maker = Path(options.run or "") / script
    own_runs = bool(options.seeds) or (maker.is_file() and maker.read_bytes() == whole.script)
    by = "this script" if own_runs else f"the whole {script}, of which this script is what its configuration uses"
    if not own_runs and best.get("attention") in ("blocks", "fa2") and whole.h.attn_impl == "auto":
        by += (
            f"; they computed attention by {best['attention']}, which this script does not have: its losses are others"
        )
    start = f"torchrun --standalone --nproc_per_node={best['ranks']}" if best["ranks"] > 1 else "python"
    checks = json.loads(best["audit"])["checks"]
    unknown = ", ".join(one["check"] for one in checks if one["ok"] is None)
    but = f", but for what was not measured: {unknown}" if unknown else ""
    paths = {"DATA_PATH": whole.h.data_path, "TOKENIZER_PATH": whole.h.tokenizer_path}
    data = " ".join(f"{n}={seen_from(out, Path(path))}" for n, path in paths.items() if path)
    how = start if options.dce else f"ENV_FILE=config.env {start}"
    lines += [
        "",
        f"Scores are of the artifact, read back, under `{whole.h.protocol}`; the runs were made by {by}.",
        f"Each artifact passed the audit of its evaluation{but} (`*.audit.json`). "
        f"The artifact here is that of seed {best['seed']} (SHA-256 {best['sha256']}).",
        f"Code: {len(whole.script)} bytes (`{whole.wrapper}` wrapper around {len(whole.short)} characters).",
        "",
    ]
    lines += [
        "## Configuration",
        "",
        "Variables that are not at their default:",
        "",
        "| variable | value |",
        "|---|---|",
    ]
    lines += [f"| {n} | {v} |" for n, v in own.items()]
    lines += ["", "## To reproduce", "", "From this folder:", "",
              "```", "pip install -r requirements.txt",
              *[f"SEED={row['seed']} RUN_ID=seed_{row['seed']} {data} {how} {script}" for row in rows], "```", "",
              f"Log and artifact come to `{whole.h.out_dir}/seed_…/`. The audit is a command of the whole script:", "",
              "```", "cp model.pgz again.pgz  # beside which the new audit comes",
              f"ENV_FILE=config.env {data} python {seen_from(out, root / script)} audit again.pgz", "```", "",
              "## How the script was made", "", *[f"- {line}" for line in told], ""]  # fmt: skip
    return "\n".join(lines)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, of one value 0."""
    return round(statistics.fmean(values), 8), round(statistics.stdev(values), 8) if len(values) > 1 else 0.0


def write_record(out: Path, runs: list[Path], whole: Extracted, told: list[str], options: Any) -> None:
    """Fill a record folder from finished runs. Raises BuildError with every reason against it."""
    rows = refuse(runs, whole.h, len(whole.script))
    best = min(rows, key=lambda row: row["val_bpb"])
    for run, row in zip(runs, rows):
        (out / f"train_seed{row['seed']}.log").write_bytes((run / "train.log").read_bytes())
        own = "model.pgz" if row is best else f"train_seed{row['seed']}"
        (out / f"{own}.audit.json").write_text(row["audit"])
    if best["bytes_model"] <= options.largest_artifact:
        (out / "model.pgz").write_bytes((runs[rows.index(best)] / "model.pgz").read_bytes())
    else:
        (out / "model.pgz.sha256").write_text(f"{best['sha256']}  model.pgz\n")
    loss, bpb = (spread([row[k] for row in rows]) for k in ("val_loss", "val_bpb"))
    results = ("val_loss", "val_bpb", "steps", "train_seconds", "bytes_model", "bytes_total", "sha256")
    submission = {"name": options.name or out.resolve().name, "author": options.author,
        "github_id": options.github_id, "blurb": options.blurb,
        "date": options.date or datetime.date.today().isoformat(), "val_loss": loss[0], "val_bpb": bpb[0],
        **({"val_bpb_std": bpb[1]} if len(rows) > 1 else {}), "seeds": [row["seed"] for row in rows],
        "seed_results": {str(row["seed"]): {k: row.get(k) for k in results} for row in rows},
        **{k: best[k] for k in ("bytes_total", "bytes_code", "bytes_model")}}  # fmt: skip
    (out / "submission.json").write_text(json.dumps(submission, indent=2) + "\n")
    (out / "README.md").write_text(readme(out, whole, rows, told, options))


def seed_of(run: Path, h: Any) -> int:
    """The seed of a run, from its name as --seeds gives it (seed_42), or its config.env, or the configuration."""
    config = run / "config.env"
    found = re.fullmatch(r"seed_(\d+)", run.name)
    if not found and config.is_file():
        found = re.search(r"^SEED=(\d+)", config.read_text(), re.M)
    return int(found[1]) if found else h.seed


def gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def launch(source: Source, out: Path, whole: Extracted, seeds: Sequence[int]) -> list[Path]:
    """Run the extracted script once for each seed, from the record folder, and audit what it made with the full one.

    Returns the runs' folders. Raises BuildError.
    """
    runs = [out / whole.h.out_dir / f"seed_{seed}" for seed in seeds]
    paths = {"DATA_PATH": whole.h.data_path, "TOKENIZER_PATH": whole.h.tokenizer_path}
    data = {name: str(Path(path).resolve()) for name, path in paths.items()}
    (out / "config.env").write_text(source.config.config_env(whole.h))
    data["ENV_FILE"] = str((out / "config.env").resolve())  # for the audit, and for a script that was not extracted
    data |= {name: value for name, value in os.environ.items() if name not in source.config.FIELDS}
    ranks = gpus() if source.path.name == TARGETS["torch"][0] else 1
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    for seed, run in zip(seeds, runs):
        own = {**data, "SEED": str(seed), "RUN_ID": f"seed_{seed}"}
        if subprocess.run([sys.executable, *start, source.path.name], cwd=out, env=own).returncode not in (0, OVER):
            raise BuildError(f"the run with SEED={seed} failed; see {run}")
        if not (run / "config.env").exists():  # which an extracted script does not write: --from reads it
            for name in ("config.env", source.path.name):
                shutil.copy(out / name, run)
    for run in runs:
        subprocess.run([sys.executable, str(source.path), "audit", str(run / "model.pgz")], env=data)
    return runs


# ==== the command ====


# Script and requirements by target.
TARGETS = {"torch": ("train_gpt.py", "requirements.txt"), "mlx": ("train_gpt_mlx.py", "requirements-mac.txt")}


def options_of(argv: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="build_submission.py", description="cut a script down to one configuration")
    add = parser.add_argument
    add("assignments", nargs="*", metavar="VARIABLE=VALUE", help="the configuration, e.g. PRESET=attn")
    add("--dce", action="store_true", help="extract (without it, the script is only minified and wrapped)")
    add("--from", dest="run", default="", metavar="RUN_DIR", help="configuration and results of a finished run")
    add("--out", required=True, metavar="FOLDER", help="the record folder to make")
    add(
        "--target",
        default="torch",
        choices=TARGETS,
        help="the script to cut down: CUDA's and CPUs', or Apple Silicon's",
    )
    add("--devices", default="cuda,cpu", help="kinds of device that the script must run on")
    add(
        "--keep-env",
        default=[],
        type=lambda text: [n for n in text.upper().split(",") if n],
        metavar="NAMES",
        help="also stay variables",
    )
    add("--eval-only", action="store_true", help="a script that scores the artifact that it is given, and cannot train")
    add(
        "--wrapper",
        default="",
        choices=("", *WRAPPERS),
        metavar="NAME",
        help=f"{', '.join(WRAPPERS)}; the smallest by default",
    )
    add("--no-minify", action="store_true", help="leave the script readable")
    add("--explain", action="store_true", help="tell what was dropped, and bytes by section")
    add("--no-proof", action="store_true", help="do not run the small job; the record says so")
    add(
        "--proof-data",
        default="data/datasets/builtin_sp1024",
        help="token shards of the small job (python data/builtin.py)",
    )
    add("--proof-tokenizer", default="data/tokenizers/builtin_1024_bpe.model")
    add("--proof-vocab", type=int, default=1024)
    add("--seeds", default="", help="run the extracted script with these seeds, e.g. 1337,42,7")
    add(
        "--largest-artifact",
        type=int,
        default=20_000_000,
        help="bytes above which only the artifact's checksum goes in",
    )
    for name in ("name", "author", "github-id", "blurb", "date"):
        add(f"--{name}", default="", help=f"{name} in submission.json")
    return parser.parse_intermixed_args(argv)


def assigned(source: Source, options: Any) -> dict[str, str]:
    """The variables of the command line. Raises BuildError for what is none."""
    environ = dict(word.split("=", 1) for word in options.assignments if "=" in word)
    if len(environ) < len(options.assignments):
        unclear = [w for w in options.assignments if "=" not in w]
        raise BuildError(f"{unclear[0]} is not VARIABLE=value" if unclear else "a variable is given twice")
    fields = source.config.FIELDS
    for name in environ.keys() - fields.keys():
        near = difflib.get_close_matches(name.upper(), fields, n=1, cutoff=0.0)[0]
        raise BuildError(f"{name} is not a variable of {source.path.name}; nearest: {near}")
    if "MATCH" in environ:
        raise BuildError("MATCH is worked out by a run; take --from of one, or the MODEL_DIM that its log names")
    return environ


def seeds_of(text: str) -> list[int]:
    """Seeds of a list like 1337,42,7. Raises BuildError."""
    words = text.split(",") if text else []
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise BuildError(f"--seeds {text} is not a list of different seeds like 1337,42,7")
    return [int(word) for word in words]


def check_places(source: Source, h: Any, seeds: Sequence[int], options: Any) -> None:
    """Raise BuildError for a record that cannot be written and for data of the small job that are not there."""
    out = Path(options.out)
    if held := sorted(path.name for pattern in PAPERS for path in out.glob(pattern)):
        raise BuildError(f"--out {out} holds a record already ({held[0]}); remove it, or name another folder")
    for run in (out / h.out_dir / f"seed_{seed}" for seed in seeds):
        if run.exists():
            raise BuildError(f"{run} is there already; remove it, or name another --out")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BuildError(f"--out {out} cannot be written: {above} is {'read-only' if above.is_dir() else 'no folder'}")
    if seeds and not any(Path(h.data_path).glob("*.bin")):
        raise BuildError(f"DATA_PATH={h.data_path} has no shards to train on")
    if options.no_proof:
        return
    hint = "python data/builtin.py makes the default ones; or --no-proof"
    if not any(Path(options.proof_data).glob("*.bin")):
        raise BuildError(f"--proof-data {options.proof_data} has no shards for the small job; {hint}")
    if h.vocab_size not in source.config.BYTE_VOCABULARIES and not Path(options.proof_tokenizer).is_file():
        raise BuildError(f"--proof-tokenizer {options.proof_tokenizer} is not there; {hint}")


def configured(source: Source, environ: dict[str, str], run: Path, options: Any) -> dict[str, str]:
    """The variables with those of a finished run, which must be worth packaging. Raises BuildError."""
    if not (run / "config.env").is_file():
        raise BuildError(f"--from {run} is no folder of a run: it has no config.env")
    own = {**environ, "ENV_FILE": str(run / "config.env")}
    if options.seeds:
        return own
    was, h = (dataclasses.asdict(source.load(one)) for one in ({"ENV_FILE": own["ENV_FILE"]}, own))
    free = {"data_path", "tokenizer_path", "run_id"}
    if other := [n.upper() for n in h if h[n] != was[n] and n not in free]:
        raise BuildError(f"{other[0]} is another than the run's ({was[other[0].lower()]}), whose results these are")
    refuse([run], source.load(own), 0)  # before the work; the code's bytes are known after it
    return own


def check_maker(source: Source, made_by: Path, packaged: bytes) -> None:
    """Raise BuildError for a run of which the folder's own script is neither this one nor what is packaged now."""
    if not made_by.is_file():
        raise BuildError(f"{made_by} is not there, so what made the run is not known; train again")
    if made_by.read_bytes() not in (packaged, source.text.encode()):
        raise BuildError(
            f"{made_by}, which made the run, is not the {source.path.name} that is here, so its results are not those "
            "of the script that is packaged; check out the commit that made it, or train again"
        )


def build(options: Any) -> list[str]:
    """Make a record folder; the lines to tell. Raises BuildError."""
    root, seeds = Path(__file__).resolve().parent, seeds_of(options.seeds)
    script, requirements = TARGETS[options.target]
    source = Source(root / script)
    environ = assigned(source, options)
    kinds = [kind for kind in source.config.FIELDS["DEVICE"].metadata["choices"] if kind != "auto"]
    if unknown := [kind for kind in options.devices.split(",") if kind not in kinds]:
        raise BuildError(f"--devices {unknown[0]} is none of {', '.join(kinds)}")
    if options.eval_only and (seeds or options.run or not options.dce):
        raise BuildError("--eval-only wants --dce, and neither --from nor --seeds: such a script trains nothing")
    if options.run:
        environ = configured(source, environ, Path(options.run), options)
    check_places(source, source.load(environ), seeds, options)
    whole = extract(source, environ, options)
    if options.run and not seeds:
        check_maker(source, Path(options.run) / script, whole.script)
        refuse([Path(options.run)], whole.h, len(whole.script))
    told = [
        f"{source.path.name}: {len(source.text)} bytes; {lines_of(whole.text)} lines and "
        f"{len(whole.text)} bytes extracted, {len(whole.short)} minified, {len(whole.script)} wrapped ({whole.wrapper})"
    ]
    if options.explain:
        told += [
            *section_sizes(source, whole.text),
            *largest(whole.text),
            *(explained(source, whole, options) if options.dce else []),
        ]
    shown = (
        ["the extracted script was not proved (--no-proof)"]
        if options.no_proof
        else prove(source, environ, whole, options)
    )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / script).write_bytes(whole.script)
    (out / f"{Path(script).stem}_readable.py").write_text(whole.text)
    (out / "requirements.txt").write_bytes((root / requirements).read_bytes())
    if seeds or options.run:
        runs = launch(source, out, whole, seeds) if seeds else [Path(options.run)]
        (out / "config.env").write_text(source.config.config_env(whole.h))
        try:
            write_record(out, runs, whole, [told[0], *shown], options)
        except OSError:  # a full disk: what is there is no record
            for path in (path for pattern in PAPERS for path in out.glob(pattern)):
                path.unlink()
            raise
        empty = [n for n in ("author", "github_id", "blurb") if not getattr(options, n)]
        told += [f"submission.json: {', '.join(empty)} left empty; --author, --github-id, --blurb"] if empty else []
    return [*told, *shown, f"written: {out}"]


def main(argv: list[str]) -> int:
    """Build; returns the exit code, 2 for what cannot or must not be built."""
    gc.disable()  # trees of a program are many small objects that live long
    warnings.simplefilter("ignore", FutureWarning)  # torch's, of names that nobody asked for
    try:
        for line in build(options_of(argv)):
            print(line)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'writing the record'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
