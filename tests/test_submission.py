# ruff: noqa: E501 (programs are one string each)
"""build_submission.py: rules of the evaluator on small programs, expressions at random, wrappers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import build_submission as b  # noqa: E402

HEAD = '''"""A small program with the conventions of the large one."""
from __future__ import annotations
import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, NamedTuple
PACKAGED = False


class UserError(Exception):
    """A mistake."""


@dataclass(frozen=True)
class Hyperparameters:
    seed: int = 7
    width: int = 4
    mode: str = "left"
    on: bool = False
    rate: float = 0.5

    @property
    def double(self) -> int:
        return 2 * self.width

    @property
    def shifted(self) -> int:
        return self.seed + self.width

    def used(self) -> dict[str, tuple[str, ...]]:
        return {"KINDS": (self.mode,)}


def load_config(environ: dict[str, str]) -> Hyperparameters:
    return Hyperparameters(seed=int(environ.get("SEED") or 7))


# ==== 2. REST ====
'''
FOOT = """

if __name__ == "__main__":
    main(load_config({"SEED": "11"}))
"""


def cut(tmp_path: Path, body: str, unfolds: bool = True) -> str:
    """The extracted program; it must print what the whole one prints, and so must the one with short names."""
    path = tmp_path / "program.py"
    path.write_text(HEAD + body + FOOT)
    source = b.Source(path)
    program = b.Program(source, source.load({}), ["SEED"], ["cuda", "cpu"])
    if not unfolds:
        program.unfold = lambda: None  # type: ignore[method-assign]
    plain = b.ast.unparse(program.run())
    told = run_in_process(HEAD + body + FOOT)
    text = b.ast.unparse(b.with_tuples(b.ast.parse(plain)))
    assert run_in_process(text) == told, text
    short = b.ast.unparse(b.with_tuples(b.named(plain, program.external)))
    assert run_in_process(short) == told, short
    return text


def run_in_process(text: str) -> list[str]:
    """What a program prints."""
    told: list[str] = []
    exec(
        compile(text, "program", "exec"),
        {"__name__": "__main__", "print": lambda *a: told.append(" ".join(map(str, a)))},
    )
    return told


# name -> (program, texts that must be gone, texts that must be there)
RULES: dict[str, tuple[str, list[str], list[str]]] = {
    "a condition on a frozen field": (
        "def main(h: Hyperparameters) -> None:\n    if h.on:\n        print('gone')\n    else:\n        print(h.double)\n",
        ["gone", "double", "if h"], ["print(8)"]),
    "a variable stays one": (
        "def main(h: Hyperparameters) -> None:\n    print(h.seed, h.shifted)\n", ["width"], ["h.seed", "SEED"]),
    "effects in a condition stay": (
        "def noisy() -> bool:\n    print('heard')\n    return True\n\n"
        "def main(h: Hyperparameters) -> None:\n    if noisy() and h.on:\n        print('gone')\n",
        ["gone"], ["noisy()"]),
    "effects of arguments stay": (
        "def noisy() -> int:\n    print('heard')\n    return 1\n\ndef idle(x: int) -> None:\n    return None\n\n"
        "def main(h: Hyperparameters) -> None:\n    idle(noisy())\n", [], ["noisy()"]),
    "a parameter that is always the same": (
        "def grow(x: int, by: int = 3, times: int = 1) -> int:\n    print('grow')\n    return x + by * times\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(grow(h.seed, times=5), grow(h.seed + 1, 3, 5))\n",
        ["times", "by"], ["def grow(x)"]),
    "a default that one call overrides": (
        "def grow(x: int, by: int = 3) -> int:\n    print('grow')\n    return x + by\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(grow(h.seed), grow(h.seed, 4))\n", [], ["by"]),
    "a function that is passed around keeps its parameters": (
        "def grow(x: int, by: int = 3) -> int:\n    return x + by\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(grow(h.seed), list(map(grow, [1], [2])))\n", [], ["by"]),
    "a local name hides a definition": (
        "def width(x: int) -> int:\n    return x\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(width(1))\n    def inner(width: Callable) -> int:\n"
        "        return width(2)\n    print(inner(lambda x: 10 * x * h.seed))\n", [], ["width"]),
    "a name that changes": (
        "def main(h: Hyperparameters) -> None:\n    x = 1\n    for i in range(h.seed):\n        x = x + i\n    print(x)\n",
        [], ["x + i"]),
    "a name of a comprehension is its own": (
        "def main(h: Hyperparameters) -> None:\n    x = 5\n    print([x + h.seed for x in range(2)], x)\n", [], ["for x in range(2)"]),
    "a walrus binds in the function": (
        "def main(h: Hyperparameters) -> None:\n    y = 1\n    print([y := i for i in range(h.seed)][-1], y)\n", [], [":="]),
    "a closure that writes": (
        "def main(h: Hyperparameters) -> None:\n    n = 0\n    def more() -> None:\n        nonlocal n\n        n = n + h.seed\n"
        "    more()\n    print(n)\n", [], ["nonlocal n"]),
    "a registry's entries": (
        "def left(h: Hyperparameters) -> int:\n    print('left')\n    return h.seed\n\ndef right(h: Hyperparameters) -> int:\n    return 0\n\n"
        "KINDS: dict[str, Callable[[Hyperparameters], int]] = {'left': lambda h: left(h) + h.width, 'right': right}\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(KINDS[h.mode](h))\n", ["right", "KINDS", "width"], ["left(h) + 4"]),
    "an attribute that is always the same": (
        "class Box:\n    def __init__(self, h: Hyperparameters) -> None:\n        self.top, self.seed_ = h.width, h.seed\n\n"
        "    def show(self) -> int:\n        print('show')\n        return self.top + self.seed_ if self.top else 0\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(Box(h).show())\n", ["top"], ["4 + self.seed_"]),
    "an attribute that is set from outside": (
        "class Box:\n    def __init__(self) -> None:\n        self.top = 1\n\n"
        "def main(h: Hyperparameters) -> None:\n    box = Box()\n    print(box.top)\n    box.top = h.seed\n    print(box.top)\n",
        [], ["box.top = "]),
    "a method of a derived class and super": (
        "class A:\n    def f(self, x: int) -> int:\n        return x + 1\n\nclass B(A):\n    def f(self, x: int) -> int:\n"
        "        return super().f(x) * 2\n\n    def never(self) -> None:\n        print('gone')\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(B().f(h.seed))\n", ["gone"], ["super()"]),
    "a class that is never made": (
        "class A:\n    pass\n\nclass B(A):\n    pass\n\n"
        "def main(h: Hyperparameters) -> None:\n    x = A()\n    print('b' if isinstance(x, B) else 'a')\n", ["isinstance", "class B"], []),
    "a subclass counts as its base": (
        "class A:\n    pass\n\nclass B(A):\n    pass\n\n"
        "def main(h: Hyperparameters) -> None:\n    x = B()\n    print(isinstance(x, A))\n", [], ["isinstance"]),
    "a configuration that changes": (
        "def other(h: Hyperparameters) -> Hyperparameters:\n    return dataclasses.replace(h, on=True, width=4)\n\n"
        "def tell(h: Hyperparameters) -> None:\n    print(h.on, h.width)\n\n"
        "def main(h: Hyperparameters) -> None:\n    tell(h)\n    tell(other(h))\n", ["width"], ["h.on", "on=True"]),
    "a complaint about input goes": (
        "def main(h: Hyperparameters) -> None:\n    if h.seed > 100:\n        raise UserError('gone')\n    print(h.seed)\n",
        ["gone", "UserError"], []),
    "a complaint behind an effect stays": (
        "def main(h: Hyperparameters) -> None:\n    seen = [h.seed]\n    if seen.pop() > 100:\n        raise UserError('kept')\n"
        "    print(seen)\n", [], ["seen.pop()"]),
    "numbers keep their type": (
        "def main(h: Hyperparameters) -> None:\n    flag, one = True, 1.0\n    print(flag, one, -0.0 if h.on else 0.0, 1 == True)\n",
        [], ["1.0"]),
    "what is computed at build time": (
        "def table(n: int) -> tuple[float, ...]:\n    return tuple(math.sqrt(i) for i in range(n))\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(table(h.width))\n", ["sqrt"], ["1.7320508075688772"]),
    "precedence": (
        "def main(h: Hyperparameters) -> None:\n    shift = -h.width\n    print((shift) ** 2, h.seed - shift, -(h.width ** 2))\n", [], []),
    "a loop over nothing": (
        "NAMES: tuple[str, ...] = ()\n\ndef main(h: Hyperparameters) -> None:\n    for name in NAMES:\n        print('gone')\n    print(h.seed)\n",
        ["gone"], []),
    "what stands behind a return": (
        "def main(h: Hyperparameters) -> None:\n    print(h.seed)\n    if not h.on:\n        return\n    print('gone')\n", ["gone"], []),
    "what is written into an argument": (
        "import numpy as np\n\ndef main(h: Hyperparameters) -> None:\n    held = np.zeros(2)\n    np.add(held, h.seed, out=held)\n"
        "    print(held)\n", [], ["out=held"]),
    "a name along a block": (
        "def main(h: Hyperparameters) -> None:\n    x = None\n    if h.on:\n        x = h.seed\n    if x is not None:\n        print('gone')\n"
        "    x = 2\n    x += 3\n    print(x, h.seed)\n", ["gone", "x"], ["print(5"]),
    "a name that a loop changes": (
        "def main(h: Hyperparameters) -> None:\n    x = None\n    for i in range(h.seed):\n        if x is not None:\n            print('kept', x)\n"
        "        x = i\n    print(x is None)\n", [], ["kept", "x is None"]),
    "a name that a try may leave behind": (
        "def main(h: Hyperparameters) -> None:\n    x = 0\n    try:\n        x = 1\n        open('/nowhere')\n    except OSError:\n        print('caught', x)\n"
        "    print(x)\n", [], ["print('caught', x)"]),
    "branches that agree and that do not": (
        "def main(h: Hyperparameters) -> None:\n    if h.seed > 8:\n        a, b = 1, 1\n    else:\n        a, b = 1, 2\n    print(a, b)\n", [], ["print(1, b)"]),
    "after a return for None": (
        "def show(x: int | None, h: Hyperparameters) -> None:\n    if x is None:\n        print('none')\n        return\n    print(0 if x is None else x)\n\n"
        "def main(h: Hyperparameters) -> None:\n    show(h.seed or None, h)\n    show(None, h)\n", ["else x"], ["print(x)"]),
    "an empty dict that nobody fills": (
        "def main(h: Hyperparameters) -> None:\n    found: dict[str, int] = {}\n    if found:\n        print('gone')\n    print({**found, 'a': h.seed})\n",
        ["gone", "found"], []),
    "an empty dict that somebody fills": (
        "def fill(into: dict[str, int], h: Hyperparameters) -> None:\n    into['a'] = h.seed\n\n"
        "def main(h: Hyperparameters) -> None:\n    found: dict[str, int] = {}\n    fill(found, h)\n    if found:\n        print('kept')\n"
        "    more: list[int] = []\n    for i in range(2):\n        if more:\n            print('kept, too')\n        more.append(i)\n", [], ["'kept'", "kept, too"]),
    "an empty list that a function inside fills": (
        "def main(h: Hyperparameters) -> None:\n    def fill() -> None:\n        found.append(h.seed)\n    found: list[int] = []\n    fill()\n"
        "    if found:\n        print('kept', h.seed)\n", [], ["'kept'"]),
    "an attribute of the same name, of another class": (
        "class Piece(NamedTuple):\n    writes: int\n\nclass Context(NamedTuple):\n    at: int\n    writes: int\n\n"
        "def show(c: Context) -> None:\n    print(c.at, c.writes)\n\n"
        "def within(c: Context, p: Piece) -> None:\n    show(c._replace(writes=p.writes))\n\n"
        "def main(h: Hyperparameters) -> None:\n    c = Context(h.seed, 0)\n    show(c)\n    within(c, Piece(h.seed + 1))\n", [], ["c.writes"]),
    "methods of one name, apart by their object": (
        "class A:\n    def f(self, x: int, by: int) -> int:\n        print('A')\n        return x + by\n\nclass B:\n    def f(self, x: int, by: int) -> int:\n        print('B')\n        return x * by\n\n"
        "def main(h: Hyperparameters) -> None:\n    a, b = A(), B()\n    print(a.f(h.seed, 2), b.f(h.seed, h.seed + 1))\n", [], ["return x + 2", "return x * by"]),
    "methods of one name, of who knows what": (
        "class A:\n    def f(self, x: int, by: int) -> int:\n        print('A')\n        return x + by\n\nclass B:\n    def f(self, x: int, by: int) -> int:\n        print('B')\n        return x * by\n\n"
        "def main(h: Hyperparameters) -> None:\n    for each in (A(), B()):\n        print(each.f(h.seed, 2))\n    print(B().f(2, h.seed))\n", [], ["x + 2", "x * by", "print(each.f(h.seed, 2))"]),
    "siblings have attributes of their own": (
        "class Base:\n    pass\n\nclass A(Base):\n    def __init__(self, h: Hyperparameters) -> None:\n        self.up = None\n\n    def show(self, h: Hyperparameters) -> None:\n"
        "        print('gone' if self.up is not None else h.seed)\n\nclass B(Base):\n    def __init__(self, h: Hyperparameters) -> None:\n        self.up = h.seed\n\n"
        "    def show(self, h: Hyperparameters) -> None:\n        print('kept' if self.up else h.seed)\n\n"
        "def main(h: Hyperparameters) -> None:\n    A(h).show(h)\n    B(h).show(h)\n", ["gone"], ["kept"]),
    "a property that is always the same": (
        "class A:\n    @property\n    def step(self) -> int:\n        return 4\n\n    def show(self, h: Hyperparameters) -> None:\n        print(self.step + h.seed)\n\n"
        "def main(h: Hyperparameters) -> None:\n    A().show(h)\n", ["property"], ["4 + h.seed"]),
    "a tuple that is taken apart keeps its fields": (
        "class Trio(NamedTuple):\n    a: int\n    b: int\n    c: int\n\ndef make(h: Hyperparameters) -> Trio:\n    return Trio(h.seed, 1, 2)\n\n"
        "def main(h: Hyperparameters) -> None:\n    x, y, z = make(h)\n    print(x, y, z, make(h).a)\n", [], ["'a b c'"]),
    "a function under another name": (
        "class A:\n    def loss(self, x: int, scale: int = 1) -> int:\n        print('A')\n        return x * scale\n\n"
        "def main(h: Hyperparameters) -> None:\n    a = A()\n    loss_of = a.loss\n    print(loss_of(h.seed, 3))\n", [], ["return x * 3"]),
    "a function under another name that is passed on": (
        "class A:\n    def loss(self, x: int, scale: int = 1) -> int:\n        return x * scale\n\n"
        "def main(h: Hyperparameters) -> None:\n    a = A()\n    loss_of = a.loss\n    print(loss_of(h.seed, 3), list(map(loss_of, [1, 2])))\n", [], ["x * scale"]),
    "what another module may read is still stored": (
        "import decimal\n\ndef main(h: Hyperparameters) -> None:\n    decimal.DefaultContext.prec = h.seed\n    print(decimal.Context().prec)\n", [], [".prec = h.seed"]),
    "nothing is suppressed that never comes": (
        "from contextlib import suppress\n\nclass Odd(Exception):\n    pass\n\n"
        "def main(h: Hyperparameters) -> None:\n    with suppress(Odd):\n        print(h.seed)\n", ["suppress", "Odd"], []),
    "loops and containers tell what their elements are": (
        "class Bank(NamedTuple):\n    size: int\n    rank: int\n\nclass Other:\n    def __init__(self, h: Hyperparameters) -> None:\n        self.rank = h.seed\n\n"
        "class All:\n    def __init__(self, h: Hyperparameters) -> None:\n        self.banks: dict[str, Bank] = {str(i): Bank(h.seed, i) for i in (1, 2)}\n\n"
        "def main(h: Hyperparameters) -> None:\n    for (name, bank), other in zip(All(h).banks.items(), [Other(h), Other(h)], strict=True):\n        print(name, bank.size, other.rank)\n", ["'size rank'", "strict"], ["'size'"]),
    "an element of who knows what keeps its fields": (
        "class Bank(NamedTuple):\n    size: int\n    rank: int\n\n"
        "def main(h: Hyperparameters) -> None:\n    for one in [Bank(h.seed, 1), Counter()]:\n        print(one.rank if len(one) else 0)\n", [], []),
    "what stays empty is empty": (
        "def main(h: Hyperparameters) -> None:\n    rules, idle = {}, set() - set('ab')\n    for i in range(h.seed):\n        if i in rules or rules.get(i):\n            print('gone')\n"
        "        idle -= {x for x in idle if x == i}\n    if idle:\n        print('never', min(idle))\n    print(h.seed)\n", ["rules", "idle", "gone", "never"], []),
    "what is filled is not": (
        "def fill(into: dict) -> None:\n    into['a'] = 1\n\ndef main(h: Hyperparameters) -> None:\n    rules, found = {}, {}\n    found[1] = h.seed\n    fill(rules)\n    print(rules.get('a'), found.get(1))\n", [], ["rules.get", "found.get"]),
    "an attribute that stays empty": (
        "class Bank:\n    def __init__(self, h: Hyperparameters) -> None:\n        self.low, self.high, self.seed_ = {}, {}, h.seed\n\n    def show(self) -> None:\n        print('show')\n        for name, one in self.low.items():\n            print(name, one)\n"
        "        self.high[1] = self.seed_\n        print(self.low.get(3), self.high.get(1))\n\ndef main(h: Hyperparameters) -> None:\n    Bank(h).show()\n", ["low", "items"], ["high.get"]),
    "a function of one expression": (
        "def twice(x: int) -> int:\n    return 2 * x\n\ndef same(x: Any) -> Any:\n    return x\n\ndef noisy(x: int) -> int:\n    print('noisy', x)\n    return x\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(twice(h.seed), same(noisy(h.seed + 1)))\n", ["twice", "same"], ["2 * h.seed", "noisy(h.seed + 1)"]),
    "a function of one expression that would do things twice, later or in another order": (
        "def noisy(x: int) -> int:\n    print('noisy', x)\n    return x\n\ndef square(x: int) -> int:\n    return x * x\n\ndef after(x: int, y: int) -> int:\n    return noisy(y) + x\n\n"
        "def drop(x: int, y: int) -> int:\n    return y + 1\n\ndef main(h: Hyperparameters) -> None:\n    print(square(noisy(h.seed)), after(noisy(h.seed), 1 + h.seed), drop(noisy(h.seed), h.seed))\n",
        [], ["square(noisy(h.seed))", "after(noisy(h.seed)", "drop(noisy(h.seed)"]),
    "a function of one expression, and names that mean something else here": (
        "def scale(h: Hyperparameters) -> int:\n    return h.seed + 1\n\ndef grow(x: Hyperparameters) -> int:\n    return scale(x) * 2\n\ndef fact(n: int) -> int:\n    return 1 if n < 2 else n * fact(n - 1)\n\n"
        "def main(h: Hyperparameters) -> None:\n    def inner(scale: int) -> int:\n        print(scale)\n        return grow(h) + scale\n    print(inner(h.seed), fact(h.seed))\n", [], ["fact(n - 1)"]),
    "a module's call is its forward": (
        "class Base:\n    def __call__(self, x: int) -> int:\n        return self.forward(x)\n\nclass Part(Base):\n    def __init__(self, h: Hyperparameters) -> None:\n        self.by = h.seed\n\n    def forward(self, x: int) -> int:\n        return x + self.by\n\n"
        "class Whole:\n    def __init__(self, h: Hyperparameters) -> None:\n        self.part, self.by = Part(h), 2 * h.seed\n\n    def show(self, x: int) -> None:\n        print(self.part(x), self.by)\n\n"
        "def main(h: Hyperparameters) -> None:\n    Whole(h).show(h.seed)\n", [], []),
    "a loop of one turn": (
        "def main(h: Hyperparameters) -> None:\n    for i in range(1):\n        print(h.seed + i * h.width)\n    for j in range(1):\n        if h.seed > 3:\n            break\n        print('rest')\n", ["for i"], ["for j"]),
    "two statements are one": (
        "def noisy(x: int) -> int:\n    print('noisy', x)\n    return x\n\ndef main(h: Hyperparameters) -> None:\n    a = noisy(h.seed)\n    print(a, noisy(2))\n    b = noisy(3)\n    print(noisy(4), b)\n"
        "    c = noisy(5)\n    for i in (6, 7):\n        print(c, i)\n    d = noisy(8)\n    e = lambda: d\n    print('before', e(), e())\n", ["a = "], ["b = ", "c = ", "d = ", "print(noisy(h.seed), noisy(2))"]),
    "two statements of a name with several values": (
        "def main(h: Hyperparameters) -> None:\n    def grow(x: int) -> tuple[int, int]:\n        x = x + h.seed\n        x = x * 2\n        return x, h.seed\n"
        "    def kept(x: int) -> tuple:\n        x = x + h.seed\n        y = lambda: x\n        x = x * 2\n        return x, y()\n"
        "    a, b = grow(h.seed)\n    (a, b) = (a, b)\n    print(grow(h.seed), kept(h.seed), a, b)\n", ["a, b = (a, b)"], ["return ((x + h.seed) * 2, h.seed)", "x = x * 2"]),
    "attributes and methods that another module's classes do not have": (
        "import argparse\n\nclass Parser(argparse.ArgumentParser):\n    def __init__(self, h: Hyperparameters) -> None:\n        super().__init__()\n        self.index, self.usage = 3, str(h.seed)\n\n    def gather(self) -> int:\n        return 4\n\n"
        "    def format_help(self) -> str:\n        return 'help'\n\ndef main(h: Hyperparameters) -> None:\n    print(Parser(h).format_usage())\n", ["gather"], ["usage", "format_help"]),
    "a method that every object has another of": (
        "class Base:\n    def f(self, x: int) -> int:\n        raise NotImplementedError\n\n    def g(self, x: int) -> int:\n        print('Base')\n        return x\n\n"
        "class A(Base):\n    def f(self, x: int) -> int:\n        print('A')\n        return x\n\n    def g(self, x: int) -> int:\n        return super().g(x) + 1\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(A().f(h.seed), A().g(h.seed))\n", ["NotImplementedError"], ["super().g"]),
    "an unread field": (
        "class Pair(NamedTuple):\n    a: int\n    b: int = 0\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(Pair(h.seed, 5).a)\n", ["Pair"], ["print(h.seed)"]),
    "a method of another module's class that has the name of a pure one": (
        "import hashlib\n\nclass Own:\n    def update(self, x: bytes) -> int:\n        return len(x)\n\n"
        "def main(h: Hyperparameters) -> None:\n    digest = hashlib.sha256()\n    digest.update(str(h.seed).encode())\n    print(digest.hexdigest(), Own().update(b'x'))\n", [], ["digest.update("]),
    "a condition that is a list": (
        "def note(x: int) -> int:\n    print('note', x)\n    return x\n\ndef some(xs: list) -> int:\n    return 1 if [*xs] else 2\n\n"
        "def main(h: Hyperparameters) -> None:\n    if [None, note(1)]:\n        print('yes')\n    if (h.seed, None):\n        print('two')\n    print(some([]), some([h.seed]))\n", ["if (h"], ["note()", "yes"]),
    "a handler that raises again": (
        "def main(h: Hyperparameters) -> None:\n    try:\n        print(h.seed)\n    except ValueError:\n        raise\n", ["try", "except"], ["print"]),
    "an unread field beside a class whose fields are listed": (
        "@dataclass\nclass Pair:\n    a: int\n    b: int = 0\n\nclass Other(NamedTuple):\n    c: int = 1\n    d: int = 2\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(Pair(h.seed, 5).a, Other._fields)\n", ["b: "], ["Pair", "'c d'"]),
    "fields of one class that name another's": (
        "class Pair(NamedTuple):\n    a: int\n    b: int = 0\n\nclass Other(NamedTuple):\n    a: int = 1\n    b: int = 2\n\n"
        "def main(h: Hyperparameters) -> None:\n    p = Pair(h.seed, 5)\n    print([(n, x) for n, x in zip(Other._fields, p)])\n", [], ["Pair"]),
    "what is changed in place under another name": (
        "class Log:\n    def __init__(self, lines: list) -> None:\n        self.lines = lines\n        self.seen = 0\n\n    def note(self, x: int) -> None:\n        self.lines += [x]\n        self.seen += 1\n\n"
        "def grow(xs: list) -> int:\n    ys = xs\n    ys += [1]\n    n = 0\n    n += 1\n    return 0\n\n"
        "def main(h: Hyperparameters) -> None:\n    xs = [h.seed]\n    grow(xs)\n    grow(xs)\n    log = Log(xs)\n    log.note(5)\n    log.note(6)\n    print(xs)\n", ["seen"], ["self.lines += ", "grow(xs)"]),
    "what a builtin function is given to call": (
        "def note(x: int) -> int:\n    print('note', x)\n    return x\n\ndef size(x: int) -> int:\n    return -x\n\n"
        "def main(h: Hyperparameters) -> None:\n    a = list(map(note, [1, h.seed]))\n    b = sorted([2, h.seed], key=note)\n    c = max([3, h.seed], key=lambda x: print(x) or x)\n    d = sorted([4, h.seed], key=size)\n    print(h.seed)\n",
        ["size"], ["map(note", "key=note", "key=lambda"]),
    "an import whose failure is what is asked": (
        "def main(h: Hyperparameters) -> None:\n    try:\n        import decimal\n        import not_there_at_all\n        found = 1\n    except ImportError:\n        found = 0\n    import fractions\n    print(h.seed, found)\n", ["fractions"], ["not_there_at_all"]),
    "a parameter that nothing reads is in the state all the same": (
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, n: int) -> None:\n        super().__init__()\n        self.w, self.idle = nn.Parameter(torch.zeros(n)), torch.ones(n)\n\n"
        "def main(h: Hyperparameters) -> None:\n    print([name for name, _ in Net(h.seed).named_parameters()])\n", ["idle"], ["self.w"]),
    "a field that has the name of a property of the configuration": (
        "class Row(NamedTuple):\n    double: int\n\ndef shown(one: Any) -> None:\n    print(one.double)\n\n"
        "def main(h: Hyperparameters) -> None:\n    for one in [Row(h.seed), Row(2)]:\n        shown(one)\n    shown(h)\n", [], []),
    "a tuple with names under the type of a plain one": (
        "class Trio(NamedTuple):\n    a: int\n    b: int\n\ndef make(n: int) -> tuple[int, int]:\n    print('make')\n    return Trio(n, 1)\n\n"
        "def main(h: Hyperparameters) -> None:\n    x, y = make(h.seed)\n    print(x, Trio(h.seed, 3).a)\n", [], []),
    "a copy of the configuration with values of a dict": (
        "import dataclasses\n\ndef main(h: Hyperparameters) -> None:\n    other = dataclasses.replace(h, **{'width': 9})\n    print(h.width, other.width)\n", [], ["other"]),
    "two names for one empty container": (
        "class Pair:\n    def __init__(self) -> None:\n        self.a = self.b = {}\n\n    def put(self, x: int) -> None:\n        self.a[x] = x\n\n    def held(self, x: int) -> bool:\n        return x in self.b\n\n"
        "def main(h: Hyperparameters) -> None:\n    a = b = {}\n    a[h.seed] = 1\n    c = d = list()\n    c.append(1)\n    pair = Pair()\n    pair.put(h.seed)\n    print(h.seed in b, len(d), pair.held(h.seed), pair.held(2))\n", [], ["in b"]),
    "a tensor of the same kind is itself": (
        "import torch\nfrom torch import Tensor\n\ndef grow(a: Tensor) -> Tensor:\n    b = a.float()\n    b += 1\n    return b\n\n"
        "def main(h: Hyperparameters) -> None:\n    a = torch.zeros(h.seed)\n    grow(a)\n    print(a)\n", [], ["+= 1"]),
    "no gradient is asked for": (
        "import torch\nfrom torch import Tensor\n\nclass Double(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx: Any, x: Tensor) -> Tensor:\n        return 2 * x\n\n    @staticmethod\n    def backward(ctx: Any, dx: Tensor) -> Tensor:\n        return 2 * dx\n\n"
        "def main(h: Hyperparameters) -> None:\n    print(Double.apply(torch.ones(h.seed)))\n", ["backward"], ["2 * x"]),
    "a gradient is asked for": (
        "import torch\nfrom torch import Tensor\n\nclass Double(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx: Any, x: Tensor) -> Tensor:\n        return 2 * x\n\n    @staticmethod\n    def backward(ctx: Any, dx: Tensor) -> Tensor:\n        return 2 * dx\n\n"
        "def main(h: Hyperparameters) -> None:\n    x = torch.ones(h.seed, requires_grad=True)\n    print(torch.autograd.grad(Double.apply(x).sum(), x))\n", [], ["backward"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str, tmp_path: Path) -> None:
    body, gone, there = RULES[name]
    text = cut(tmp_path, body, unfolds=False)
    assert not [part for part in gone if part in text], text
    assert all(part in text for part in there), text
    cut(tmp_path, body)


# name -> (program, texts that must be gone, texts that must be there), with functions put where they are called
UNFOLDED: dict[str, tuple[str, list[str], list[str]]] = {
    "a function that one place calls": (
        "def grown(x: int, by: int) -> int:\n    print('grown')\n    y = x * by\n    print(y)\n    return y + x\n\n"
        "def main(h: Hyperparameters) -> None:\n    y = h.seed\n    z = grown(y + 1, y)\n    print(y, z)\n",
        ["def grown"], ["print('grown')"]),
    "its returns in the middle": (
        "def told(x: int) -> None:\n    if x > 99:\n        print('much')\n        return\n    print('little')\n\n"
        "def size(x: int) -> str:\n    print('size')\n    if x > 9:\n        print('large')\n        return 'L'\n    print('small')\n    return 'S'\n\n"
        "def main(h: Hyperparameters) -> None:\n    told(h.seed)\n    found = size(h.seed)\n    print(found, found)\n",
        ["def told", "def size"], ["else:"]),
    "no function in a loop's condition, in another order, or of two places": (
        "def more(x: int) -> bool:\n    print('more')\n    y = x + 1\n    print(y)\n    return y < 9\n\n"
        "def told(x: int) -> int:\n    print('told', x)\n    y = x\n    print(y)\n    return y\n\n"
        "def twice(x: int) -> int:\n    print('twice')\n    y = x\n    print(y)\n    return y\n\n"
        "def main(h: Hyperparameters) -> None:\n    x = h.seed - 9\n    while more(x):\n        x += 3\n"
        "    print(print('first'), told(x), twice(1), twice(2))\n",
        [], ["while more(", "told(x)", "twice(1)"]),
    "an inner function that sees what changes": (
        "def maker(x: int) -> Callable:\n    y = x\n    def inner() -> int:\n        return y + x\n    y = y + 1\n    return inner\n\n"
        "def main(h: Hyperparameters) -> None:\n    f = maker(h.seed)\n    print(f(), f())\n", [], ["def maker"]),
    "an inner function that sees nothing change": (
        "def maker(x: int) -> Callable:\n    y = x * 2\n    print('made')\n    def inner(z: int) -> int:\n        print(z)\n        return y + z\n    return inner\n\n"
        "def main(h: Hyperparameters) -> None:\n    y = 5\n    f = maker(h.seed)\n    print(f(1), f(y), y)\n", ["def maker"], ["def inner"]),
    "a name for another name, and one that changes": (
        "def main(h: Hyperparameters) -> None:\n    a = h.seed\n    b = a\n    c = b\n    a = a + 1\n    print(a, b, c, c)\n"
        "    d, e = a, b\n    print(d, e, d)\n", ["c =", "d, e", "d ="], ["b = a"]),
    "a value that something changes before it is read": (
        "class Box:\n    def __init__(self, n: int) -> None:\n        self.n = n\n    def grow(self) -> int:\n        self.n += 1\n        print('grow')\n        return self.n\n\n"
        "def main(h: Hyperparameters) -> None:\n    box = Box(h.seed)\n    before = box.n\n    print(box.grow(), before)\n    now = box.n\n    print(now, box.grow())\n    box.grow()\n",
        ["now ="], ["before = "]),
    "an object that is never handed on": (
        "class Pace:\n    def __init__(self, first: int) -> None:\n        self.all = [first]\n        self.sum = 0\n\n"
        "def main(h: Hyperparameters) -> None:\n    sum = 3\n    pace = Pace(h.seed)\n    for i in range(3):\n        pace.all = [*pace.all, i]\n        pace.sum += i\n    print(pace.all, pace.sum, sum, sum)\n",
        ["class Pace", "pace."], []),
    "an object that is handed on": (
        "class Pace:\n    def __init__(self, first: int) -> None:\n        self.all = [first]\n\n"
        "def main(h: Hyperparameters) -> None:\n    pace = Pace(h.seed)\n    kept = [pace]\n    pace.all = [3]\n    print(kept[0].all, kept[0].all)\n", [], ["class Pace"]),
    "a container that is filled and never looked at": (
        "def note(x: int) -> int:\n    print('note', x)\n    return x\n\ndef main(h: Hyperparameters) -> None:\n    idle = {i: [] for i in range(3)}\n    heard = [0] * 3\n    seen = {}\n"
        "    for i in range(3):\n        idle[i] += [h.seed, i]\n        heard[i] += note(i)\n        seen[i] = i\n    print(h.seed, [h.seed], seen)\n",
        ["idle"], ["seen[i] = i"]),
    "a name that an inner function has for itself": (
        "def main(h: Hyperparameters) -> None:\n    def told() -> int:\n        a = 1 + len(str(h.seed))\n        print(a)\n        return a\n    a = 2 + len(str(h.seed))\n    print(a)\n    print(told(), told(), list(map(lambda a: a, [1])))\n",
        ["a = 2"], ["a = 1"]),
    "inner functions of each turn of a loop": (
        "def watch(kept: list, name: str) -> None:\n    print('watch', name)\n    def told() -> str:\n        return name\n    kept.append(told)\n\n"
        "def main(h: Hyperparameters) -> None:\n    kept: list = []\n    for name in ['a', 'b', str(h.seed)]:\n        watch(kept, name)\n    print([f() for f in kept])\n", [], ["def watch"]),
    "the order of arguments": (
        "def note(x: int) -> int:\n    print('note', x)\n    return x\n\ndef two(a: int, b: int = 1) -> int:\n    print('two')\n    c = a * b + a - b\n    print(c)\n    return c\n\n"
        "def main(h: Hyperparameters) -> None:\n    z = two(note(h.seed), note(2))\n    print(z, z)\n", [], []),
    "a default that is made once": (
        "def visit(k: int, seen: list = []) -> int:\n    print('visit', k)\n    seen.append(k)\n    n = len(seen)\n    print(n)\n    return n\n\n"
        "def main(h: Hyperparameters) -> None:\n    for i in range(3):\n        n = visit(i + h.seed)\n        print(n, n)\n", [], ["def visit"]),
    "a literal that a condition asks about, or that stays when it raises": (
        "class Box:\n    def __init__(self, n: int) -> None:\n        self.n = n\n    def low(self) -> bool:\n        print('low')\n        return self.n < 5\n\n"
        "def check(x: int) -> bool:\n    print('check')\n    return {1: True}[x]\n\n"
        "def main(h: Hyperparameters) -> None:\n    box, d = Box(h.seed), {'a': h.seed}\n    box.n = 0\n    if box.low():\n        box.n = h.seed\n    d['a'] = 0\n    if d['a'] < h.seed - 8:\n        d['a'] = h.seed\n"
        "    try:\n        ok = False\n        if check(h.seed):\n            ok = True\n    except KeyError:\n        print('no')\n    print(box.n, d, ok)\n", [], []),
    "a generator that is read later": (
        "def pairs(n: int) -> Iterator[int]:\n    found = (note(i) + n for i in range(2))\n    n = 9\n    print('made')\n    return found\n\ndef note(x: int) -> int:\n    print('note', x)\n    return x\n\n"
        "def main(h: Hyperparameters) -> None:\n    n = h.seed\n    found = pairs(n + 1)\n    n = 5\n    print(list(found), n)\n", [], ["def pairs"]),
    "names that mean something else there": (
        "def low(x: float) -> int:\n    from math import floor\n    print('low')\n    y = floor(x)\n    print(y)\n    return y + floor(x)\n\n"
        "def size(x: int) -> int:\n    print('size', x)\n    y = x + 1\n    return y * x\n\ndef work(x: int) -> int:\n    print('work')\n    y = size(x)\n    print(y)\n    return y + size(y)\n\n"
        "def main(h: Hyperparameters) -> None:\n    floor = h.seed * 2\n    print(floor)\n    z = low(h.seed / 2)\n    size = 5 + h.seed\n    def inner(x: int) -> int:\n        z = work(x)\n        print(z)\n        return z + size\n    print(inner(2), inner(3), z, floor)\n", [], []),
    "attributes with the names of others, in a swap": (
        "class Pace:\n    def __init__(self, rate: int) -> None:\n        self.rate = rate / 2\n        self.first = rate\n\n"
        "def main(h: Hyperparameters) -> None:\n    a, b = h.seed, 3\n    a, b, pace = b, a, Pace(h.seed + len(str(h.seed)))\n    pace.rate += 1\n    for i in range(2):\n        pace.first += i\n    print(pace.rate, pace.first, a, b)\n", ["class Pace"], []),
    "a property, and what another object's maker sets": (
        "class Clock:\n    def __init__(self) -> None:\n        self.laps: list[float] = []\n        self.n = 1\n    @property\n    def seconds(self) -> float:\n        total = 0.0\n        for lap in self.laps:\n            total += lap\n        return total\n\n"
        "class Lid:\n    def __init__(self, clock: Clock) -> None:\n        clock.n = clock.n + 1\n        print('lid')\n\n"
        "def run(clock: Clock, start: float, n: int) -> float:\n    print('run', start)\n    for i in range(n):\n        clock.laps.append(i)\n    return clock.seconds - start\n\n"
        "def main(h: Hyperparameters) -> None:\n    clock = Clock()\n    clock.laps.append(h.rate)\n    print(run(clock, clock.seconds, h.seed), clock.seconds)\n    before = clock.n\n    lids = [Lid(clock), Lid(clock)]\n    print(before, len(lids), before, clock.n)\n", [], ["before = "]),
    "a condition whose name is emptied inside": (
        "def main(h: Hyperparameters) -> None:\n    queue = list(range(h.seed - 10))\n    if queue:\n        queue.pop()\n        if queue:\n            print('more')\n    print(queue)\n", [], []),
    "a tuple that says nothing": (
        "class Nothing(NamedTuple):\n    a: int = 0\n\ndef main(h: Hyperparameters) -> None:\n    seen = Nothing()\n    seen = seen._replace(a=h.seed) if h.seed > 8 else seen\n    print(bool(seen), len(seen))\n", [], []),
    "a property that is an expression": (
        "class Pair(NamedTuple):\n    a: int\n    b: int\n\n    @property\n    def both(self) -> int:\n        return self.a + self.b\n\n"
        "def main(h: Hyperparameters) -> None:\n    pair = Pair(h.seed, 2)\n    print(pair.both, pair.both, pair[0])\n    for one in pair, Pair(3, h.seed):\n        print(one.both)\n", ["both", "class Pair"], ["Pair = namedtuple"]),
    "functions of a registry, each called alike": (
        "def left(x: int, by: int, on: bool) -> int:\n    print('left')\n    return x + by if on else x\n\nOTHERS: dict[str, Callable[[int, int, bool], int]] = {'left': left, 'right': lambda x, by, on: x}\n\n"
        "def main(h: Hyperparameters) -> None:\n    print([OTHERS[k](h.seed, 5, True) for k in OTHERS])\n", ["if on", " else x"], ["x + 5"]),
    "a field that a copy of a configuration changes": (
        "def chosen(h: Hyperparameters) -> Hyperparameters:\n    print('chosen')\n    h = dataclasses.replace(h, width=h.seed)\n    return h\n\n"
        "def shown(h: Hyperparameters) -> None:\n    print('shown')\n    print(h.width, h.mode)\n\n"
        "def main(h: Hyperparameters) -> None:\n    h = chosen(h)\n    shown(h)\n", ["def shown"], ["width"]),
    "a method that its class has under another name": (
        "class Own:\n    def say(self, x: int) -> int:\n        print('say')\n        y = x\n        print(y)\n        return y\n    tell = say\n\n"
        "def main(h: Hyperparameters) -> None:\n    own = Own()\n    y = own.say(h.seed)\n    print(y, own.tell(y))\n", [], ["def say"]),
    "an attribute of what has an effect": (
        "class Out(NamedTuple):\n    x: int\n    none: int | None = None\n\ndef made(x: int) -> Out:\n    print('made')\n    y = x + 1\n    print(y)\n    return Out(y)\n\n"
        "def main(h: Hyperparameters) -> None:\n    nothing = made(h.seed).none\n    print(nothing, made(2).x)\n", ["none"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFOLDED)
def test_unfolding(name: str, tmp_path: Path) -> None:
    body, gone, there = UNFOLDED[name]
    text = cut(tmp_path, body)
    assert not [part for part in gone if part in text], text
    assert all(part in text for part in there), text


@st.composite
def functions(draw: st.DrawFn) -> str:
    """A program of functions that print, return early, change an object and call the ones before them."""
    made = list[str]()

    def value(names: list[str], depth: int = 0) -> str:
        kind = draw(st.integers(0, 9 if depth < 2 else 3))
        if kind < 3 or (kind > 7 and not made):
            return draw(st.sampled_from([*names, "box.n", "2", "pair.a"]))
        if kind == 3:
            return f"note({draw(st.sampled_from(names))})"
        if kind == 4:
            return f"({value(names, depth + 1)} + {value(names, depth + 1)})"
        if kind == 5:
            return f"({value(names, depth + 1)} if {value(names, depth + 1)} > 5 else {value(names, depth + 1)})"
        if kind == 6:
            return f"sum(i * {value(names, depth + 1)} for i in range(3))"
        if kind == 7:
            return f"({value(names, depth + 1)}, {value(names, depth + 1)})[{draw(st.integers(0, 1))}]"
        called = draw(st.integers(0, len(made) - 1))
        return f"f{called}({value(names, depth + 1)}, {value(names, depth + 1)})"

    def block(names: list[str], indent: str, depth: int) -> list[str]:
        lines = list[str]()
        for _ in range(draw(st.integers(1, 4))):
            kind, name = draw(st.integers(0, 7)), draw(st.sampled_from(["x", "y", "z", "a"]))
            if kind < 3:
                lines.append(f"{indent}{name} = {value(names)}")
                names = [*names, name]
            elif kind == 3:
                lines.append(f"{indent}x, y = {value(names)}, {value(names)}")
                names = [*names, "x", "y"]
            elif kind == 4:
                lines.append(f"{indent}box.n = {value(names)} % 11")
            elif kind == 5 and depth < 2:
                lines += [f"{indent}if {value(names)} > 4:", *block(names, indent + "    ", depth + 1)]
                lines += [f"{indent}    return {value(names)}"] if draw(st.booleans()) else []
            elif kind == 6 and depth < 2:
                lines += [f"{indent}for i in range(2):", *block([*names, "i"], indent + "    ", depth + 1)]
            else:
                lines.append(f"{indent}note({value(names)})")
        return lines

    for number in range(draw(st.integers(1, 4))):
        lines = [*block(["a", "b"], "    ", 0), f"    return {value(['a', 'b'])}"]
        made.append("\n".join([f"def f{number}(a: int, b: int) -> int:", *lines, "", ""]))
    main = ["def main(h: Hyperparameters) -> None:", "    a, b = h.seed, 3", *block(["a", "b"], "    ", 0)]
    return "\n".join([*made, *main, f"    print({value(['a', 'b'])}, box.n)", ""])


BOX = """class Box:
    def __init__(self) -> None:
        self.n = 1


class Pair(NamedTuple):
    a: int
    b: int = 2


box, pair = Box(), Pair(4)


def note(x: int) -> int:
    print("note", x)
    box.n += 1
    return x % 7


"""


@settings(max_examples=25, deadline=None)
@given(functions())
def test_any_functions_do_what_they_did(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    cut(tmp_path_factory.getbasetemp(), BOX + text)


VALUES = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-4, 4), st.sampled_from(["", "a", "left"]), st.none())
LEAVES = st.one_of(
    VALUES.map(repr),
    st.sampled_from(
        ["h.seed", "h.width", "h.on", "h.mode", "h.rate", "h.double", "x", "note(1)", "note(0)", "f'{h.width}-{x}'"]
    ),
)


def compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map(lambda p: f"({p[0]} and {p[1]})"), two.map(lambda p: f"({p[0]} or {p[1]})"), inner.map(lambda p: f"(not {p})"),
        two.map(lambda p: f"({p[0]} == {p[1]})"), inner.map(lambda p: f"({p} is not None)"), two.map(lambda p: f"[{p[0]}, {p[1]}]"),
        st.tuples(inner, inner, inner).map(lambda p: f"({p[0]} if {p[1]} else {p[2]})"), inner.map(lambda p: f"str({p})"),
        two.map(lambda p: f"({p[0]}, *[{p[1]}])"), two.map(lambda p: f"{{'a': {p[0]}, **{{'b': {p[1]}}}}}"),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, compound, max_leaves=12))
def test_any_expression_keeps_its_value_and_its_effects(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    body = "def note(x: int) -> int:\n    print('note', x)\n    return x\n\n"
    body += f"def main(h: Hyperparameters) -> None:\n    x = 3\n    print(repr({text}))\n    if {text}:\n        print('yes')\n"
    path = tmp_path_factory.getbasetemp() / "expression.py"
    path.write_text(HEAD + body + FOOT)
    source = b.Source(path)
    tree = b.Program(source, source.load({}), ["SEED"], ["cpu"]).run()
    assert run_in_process(b.ast.unparse(tree)) == run_in_process(HEAD + body + FOOT)


# ---- short names ----

# what is said -> (program, names that must stay, names that must go)
NAMES: dict[str, tuple[str, list[str], list[str]]] = {
    "members, parameters and fields": (
        "from typing import NamedTuple\nclass Pair(NamedTuple):\n    left: int\n    right: int\n\nclass Holder:\n    def __init__(self, pair):\n        self.pair = pair\n"
        "    def added(self, extra, factor=1):\n        return (self.pair.left + extra) * factor\n\n"
        "held = Holder(Pair(right=1, left=2))\nprint(held.added(3, factor=4), held.pair._replace(left=5).left)\n",
        ["_replace"], ["left", "right", "pair", "added", "extra", "factor", "held", "Holder", "self"]),
    "an attribute that other modules' objects have": (
        "from fractions import Fraction\nclass Own:\n    def __init__(self):\n        self.numerator = 1\n        self.own = 2\n\n"
        "for one in (Own(), Fraction(3, 4)):\n    print(one.numerator)\nprint(Own().own)\n", ["numerator"], ["own", "one"]),
    "an attribute that a text names": (
        "class Own:\n    def __init__(self):\n        self.alpha = 1\n        self.beta = 2\nprint(getattr(Own(), 'alpha'), Own().beta, Own().alpha)\n", ["alpha"], ["beta"]),
    "a keyword of nobody knows whom": (
        "def grow(start, width=2, depth=1):\n    return start * width + depth\n\nmade = {'a': grow}\nprint(made['a'](1, width=3), grow(1, depth=4))\n", ["width"], ["depth", "start"]),
    "a keyword of another module's function": (
        "def largest(values, default):\n    return max(values, default=default)\n\nprint(largest([], default=3))\n", ["=3", "default="], ["values"]),
    "keywords that are read as texts": (
        "def show(**given):\n    return sorted(given.items())\n\nprint(show(alpha=1, beta=2))\n", ["alpha", "beta"], ["given"]),
    "scopes": (
        "def outer(x):\n    total = 0\n    def inner(y):\n        nonlocal total\n        total += y + sum(x for x in range(y))\n        return total\n"
        "    inner(3)\n    return [inner(t) for t in (1, 2)], total, (last := x), (lambda x, k=x: x + k + last)(1)\n\nprint(outer(5))\n",
        ["nonlocal"], ["total", "inner", "outer", "last"]),
    "a class's own names": (
        "class Base:\n    size = 3\n    both = (size, size)\n    def double(self):\n        return 2 * self.size\n    again = double\n\n"
        "def size():\n    return 8\nprint(Base().again(), Base.both, size())\n", [], ["size", "double", "again", "both"]),
    "a class of another module's": (
        "import argparse\nclass Parser(argparse.ArgumentParser):\n    def __init__(self):\n        super().__init__()\n        self.usage = 'usage'\n        self.mine = Parser.made()\n"
        "    @staticmethod\n    def made():\n        return argparse.Namespace(word=1)\n    def error(self, message):\n        print('bad')\n\n"
        "p = Parser()\nprint(p.format_usage(), p.mine.word)\np.error(message='x')\n", ["usage", "error", "mine", "word"], ["made"]),
    "what an operator calls by name": (
        "import torch\n@torch.library.custom_op('short::scaled', mutates_args=())\ndef scaled(x: torch.Tensor, by: float) -> torch.Tensor:\n    return x * by\n"
        "def kept(ctx, inputs, **rest):\n    ctx.by = inputs[1]\ndef back(ctx, slope):\n    return slope * ctx.by, None\n"
        "scaled.register_autograd(back, setup_context=kept)\n"
        "@torch.library.custom_op('short::turned', mutates_args=())\ndef turned(x: torch.Tensor) -> torch.Tensor:\n    return -x\n"
        "turned.register_autograd(lambda ctx, slope: -slope, setup_context=lambda ctx, inputs, output: None)\n"
        "start = torch.ones(2, requires_grad=True)\nturned(scaled(start, 3.0)).sum().backward()\nprint(start.grad)\n",
        ["(ctx, inputs, **rest)", "lambda ctx, inputs, output"], ["slope", "start", "kept"]),
    "exceptions, imports, globals": (
        "import math as mathematics\ncount = 0\ndef step():\n    global count\n    import json\n    try:\n        count += mathematics.floor(1.5)\n        json.loads('{')\n    except ValueError as problem:\n"
        "        return type(problem).__name__\n\nprint(step(), count)\n", ["json", "global"], ["count", "mathematics", "problem"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_short_names(name: str) -> None:
    text, stay, go = NAMES[name]
    short = b.ast.unparse(b.named(text, b.external_names(b.ast.parse(text))))
    assert run_in_process(short) == run_in_process(text), short
    words = set(b.re.findall(r"\w+", short))
    assert not words & set(go), short
    assert all(part in short for part in stay), short


# ---- wrappers ----


@pytest.mark.parametrize("how", b.WRAPPERS)
def test_wrapped_script_runs_and_knows_its_file(how: str, tmp_path: Path) -> None:
    text = (
        "import os,sys\nprint(__name__,os.path.getsize(__file__),sys.argv[1],'\\'\\\\\\0\\r\\n\\u00e9'.encode())\n"
        + "#" * 300
    )
    name, script = b.wrapped(text, how)
    path = tmp_path / "train_gpt.py"
    path.write_bytes(script)
    said = subprocess.run([sys.executable, path, "word"], capture_output=True, text=True)
    assert name == how and said.stdout.split()[:3] == ["__main__", str(len(script)), "word"], said.stderr
    assert b.wrapped(text, how)[1] == script


def test_mixed_gives_any_text_back() -> None:
    chance = random.Random(5)
    texts = ["a", "\n", "x=['']\nprint([''],['s'],\"['']\")\n" * 30, "".join(chance.choices("ab(,)'[] \n", k=3000))]
    space: dict[str, Any] = {}
    exec(b.MIXER, space)
    for text in texts:  # the same context under two names, contexts met thousands of times
        digits = (byte - 1 - (byte > 13) - (byte > 92) for byte in b.mixed(text))
        assert space["f"](digits, len(text)) == text


def test_smallest_wrapper_is_taken() -> None:
    text = (ROOT / "build_submission.py").read_text().split("class Facts")[0]
    sizes = {how: len(wrap(text)) for how, wrap in b.WRAPPERS.items()}
    assert len(b.wrapped(text, "")[1]) == min(sizes.values()) == sizes["mixed"] < sizes["latin1"] < sizes["base85"]


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300) | st.lists(st.sampled_from([b"\0", b"7", b"'", b"\r", b"\n", b"\\"])).map(b"".join))
def test_a_stream_is_quoted_as_it_is(stream: bytes) -> None:
    space: dict[str, Any] = {}
    exec(compile(f"#coding:l1\nx={b.quoted(stream)}\n".encode("latin-1"), "quoted", "exec"), space)
    assert space["x"] == stream


@settings(max_examples=15, deadline=None)
@given(st.text(st.characters(max_codepoint=126), max_size=200).map(repr))
def test_what_is_mixed_comes_out_again(text: str) -> None:
    space: dict[str, Any] = {}
    exec(b.MIXER, space)
    stream = b.mixed(text)
    assert space["f"]((b.DIGITS.index(byte) for byte in stream), len(text)) == text
    assert b.quoted(stream).count("\\") <= 1 + stream.count(b"'''")


def test_mixing_needs_no_function_that_another_machine_rounds_otherwise() -> None:
    names = {n.attr for n in b.ast.walk(b.ast.parse(b.MIXER)) if isinstance(n, b.ast.Attribute)}
    assert names == {"bisect", "get", "rfind", "setdefault", "split", "sub"}
    assert not [n for n in b.ast.walk(b.ast.parse(b.MIXER)) if isinstance(n, b.ast.Pow)]


@pytest.mark.parametrize("how", ["latin1", "mixed"])
def test_kernels_find_their_source(how: str, tmp_path: Path) -> None:
    text = "import inspect\nclass triton:\n    jit=staticmethod(inspect.getsource)\n@triton.jit\ndef kernel(x):\n    return x+1\nprint(kernel)\n"
    path = tmp_path / "train_gpt.py"
    path.write_bytes(b.wrapped(text, how)[1])
    said = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert "return x+1" in said.stdout, said.stderr


KERNEL = """
import torch, triton
import triton.language as tl
@triton.jit
def twice(x, y, size, SIZE: tl.constexpr):
    place = tl.arange(0, {width})
    tl.store(y + place, 2 * tl.load(x + place))
@triton.jit
def never(x):
    tl.store(x, 0.0)
def main():
    x = torch.ones(8, requires_grad=True)
    if x.is_cuda:
        twice[(1,)](x, torch.empty(8), 8, 8)
    if len(x) > 8:
        never[(1,)](x)
    x.sum().backward()
    raise SystemExit("the job is ended after its backward pass")
main()
"""


@pytest.mark.skipif(b.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_are_built_for_the_gpu_that_is_not_there(tmp_path: Path) -> None:
    told = b.build_kernels(tmp_path / "good", KERNEL.format(width="SIZE"), {})
    assert told == "1 built for sm_90 as the small job launches them; not launched by it: never"
    with pytest.raises(b.BuildError, match="arange's arguments must be of type tl.constexpr"):
        b.build_kernels(tmp_path / "bad", KERNEL.format(width="size"), {})
    renamed = KERNEL.replace("import torch, triton", "import torch, triton as t").replace("@triton", "@t")
    assert b.launched(renamed) == {"twice", "never"}
    assert b.build_kernels(tmp_path / "none", "print(1)", {}) == ""
    late = KERNEL.replace("    x.sum().backward()\n", "").replace(
        "    if x.is_cuda:", "    x.sum().backward()\n    if x.is_cuda:"
    )
    with pytest.raises(b.BuildError, match="launched none of the script's kernels: never, twice"):
        b.build_kernels(tmp_path / "late", late.format(width="SIZE"), {})


def test_what_a_kernel_says_of_its_variables_is_kept() -> None:
    text = "@triton.jit\ndef kernel(xs, n):\n    count: tl.constexpr = len(xs)\n    return count + n\n"
    assert "count:tl.constexpr=len(xs)" in b.minified(text, named=True)


# ---- the proof, on the real script ----


@pytest.mark.slow  # a real extraction (20 s on a free core) and three jobs: nothing smaller shows that they agree
def test_extracted_script_does_what_the_whole_one_does_and_a_fault_is_found(tmp_path: Path, byte_data: Path) -> None:
    source = b.Source(ROOT / "train_gpt.py")
    options = b.options_of(["--dce", "--out", str(tmp_path / "record"), "--proof-data", str(byte_data)])
    small = b.job_environment(source, source.load({"PRESET": "tiny", "VOCAB_SIZE": "256"}), options)
    made = b.extract(source, small, options)
    keeps = {name: small[name] for name in b.ALWAYS_KEPT if name in small}
    full = b.run_job(tmp_path / "full", source.path.read_bytes(), small)
    assert len(full.losses) >= 8 and len(full.artifact) > 1000
    assert b.first_difference(full, b.run_job(tmp_path / "shipped", made.script, keeps)) == ""
    wrong = b.re.sub(r" momentum = .*", " momentum = 0.5", made.text, count=1)
    assert wrong != made.text
    difference = b.first_difference(full, b.run_job(tmp_path / "wrong", wrong.encode(), keeps))
    assert difference.startswith("loss ")
    assert b.suspects(made.text, wrong) == ["train_loop"]
    record_of(source, made, tmp_path / "record", options)


@pytest.mark.slow  # two extractions and three jobs of the MLX twin
@pytest.mark.skipif(find_spec("mlx") is None, reason="mlx is not installed")
def test_whole_build_of_the_twin(tmp_path: Path, byte_data: Path) -> None:
    out = tmp_path / "record"
    words = ["--dce", "--target", "mlx", "--out", str(out), "--proof-data", str(byte_data), "PRESET=tiny"]
    told = b.build(b.options_of([*words, "VOCAB_SIZE=256", f"DATA_PATH={byte_data}"]))
    assert any(line.startswith("proof: the log of losses, scores and artifact") for line in told)
    assert {path.name for path in out.iterdir()} == {
        "train_gpt_mlx.py",
        "train_gpt_mlx_readable.py",
        "requirements.txt",
    }
    assert "torch" not in (out / "requirements.txt").read_text().replace("without torch", "")


def record_of(source: b.Source, made: b.Extracted, out: Path, options: Any) -> None:
    """Run the extracted script for a seed; its record is whole, and refused when its audit is of another artifact."""
    out.mkdir()
    (out / "train_gpt.py").write_bytes(made.script)
    (run,) = b.launch(source, out, made, [7])
    b.write_record(out, [run], made, ["a line"], options)
    wanted = {"README.md", "submission.json", "train_seed7.log", "model.pgz", "model.pgz.audit.json"}
    assert wanted <= {path.name for path in out.iterdir()}
    told = json.loads((out / "submission.json").read_text())
    assert told["bytes_code"] == len(made.script) and told["seeds"] == [7] and told["val_bpb"] > 1
    audit = json.loads((run / "model.pgz.audit.json").read_text())
    (run / "model.pgz.audit.json").write_text(json.dumps({**audit, "artifact_sha256": "0"}))
    with pytest.raises(b.BuildError, match="audit: it was of another artifact"):
        b.write_record(out, [run], made, [], options)


@pytest.mark.slow  # as above
def test_script_that_only_scores_does_it_as_the_whole_one(tmp_path: Path, byte_data: Path) -> None:
    source = b.Source(ROOT / "train_gpt.py")
    options = b.options_of(["--dce", "--eval-only", "--out", str(tmp_path / "record"), "--proof-data", str(byte_data)])
    small = b.job_environment(source, source.load({"PRESET": "tiny", "VOCAB_SIZE": "256"}), options)
    made = b.extract(source, small, options)
    assert "def train_loop" not in made.text and len(made.script) < 9000
    keeps = {name: small[name] for name in b.ALWAYS_KEPT if name in small}
    b.run_job(tmp_path / "full", source.path.read_bytes(), small)
    told = b.prove_scores(source, small, keeps, made, tmp_path)
    assert "final_eval val_loss:" in told[0]
    wrong = b.dataclasses.replace(made, text=made.text.replace("nats / 0.693", "nats / 0.593"))
    assert wrong.text != made.text
    (tmp_path / "again").mkdir()
    (tmp_path / "full").rename(tmp_path / "again" / "full")
    with pytest.raises(b.BuildError, match="the script in readable_1 scores an artifact otherwise"):
        b.prove_scores(source, small, keeps, wrong, tmp_path / "again")
    other = b.extract(source, {**small, "ROPE_BASE": "5000"}, options)
    with pytest.raises(b.BuildError, match="is of another network or tokenizer than this script's"):
        b.scored(tmp_path / "other", other.script, [str(tmp_path / "again/full/runs/proof/model.pgz")], keeps)


def test_variables_that_shape_the_network_cannot_stay_variables(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dce", "--no-proof", "PRESET=tiny", "--out", "nowhere"]
    words += ["--keep-env", "ITERATIONS,MODEL_DIM", "VOCAB_SIZE=256"]
    assert b.options_of(words).assignments == ["PRESET=tiny", "VOCAB_SIZE=256"]
    assert b.main(words) == 2
    said = capsys.readouterr()
    assert "--keep-env MODEL_DIM shapes the network" in said.out + said.err and not Path("nowhere").exists()


def test_variables_of_the_score_cannot_stay_variables_of_a_scoring_script(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dce", "--eval-only", "--no-proof", "PRESET=tiny", "VOCAB_SIZE=256", "--out", "nowhere", "--keep-env"]
    assert b.main([*words, "ITERATIONS,MAX_VAL_TOKENS"]) == 2
    said = capsys.readouterr().err
    assert "--keep-env MAX_VAL_TOKENS is part of the protocol" in said and not Path("nowhere").exists()


@cache
def whole_source() -> b.Source:
    return b.Source(ROOT / "train_gpt.py")


def a_run(folder: Path) -> tuple[Path, Any]:
    """A finished run as it leaves it, small, and its configuration."""
    h = whole_source().load({"PRESET": "tiny", "MAX_WALLCLOCK_SECONDS": "60", "SEED": "42"})
    folder.mkdir(parents=True)
    (folder / "model.pgz").write_bytes(b"an artifact" * 10)
    (folder / "config.env").write_text("SEED=42\nMODEL_DIM=16\n")
    (folder / "train.log").write_text(
        "device:cpu threads:1 ranks:2 precision:bf16 attention:blocks (short)\ntraining done: steps:40 train_time:6398ms averaged:0\n"
        "model_bytes:110 code_bytes:24000 (CODE_BYTES_RESERVE) total_bytes:24110\n"
        "final_roundtrip_exact val_loss:4.5 val_bpb:2.5 in_memory:4.5\n"
    )
    final = {"kind": "final", "name": "final_roundtrip", "val_loss_nats": 4.5, "val_bpb": 2.500000001}
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "step"}) + "\n" + json.dumps(final) + "\n")
    sha256 = b.hashlib.sha256((folder / "model.pgz").read_bytes()).hexdigest()
    checks = [{"check": "order", "ok": True, "found": ""}, {"check": "fidelity", "ok": None, "found": ""}]
    report = {"artifact_sha256": sha256, "protocol": h.protocol, "ok": True, "checks": checks}
    (folder / "model.pgz.audit.json").write_text(json.dumps(report))
    return folder, h


BROKEN = {  # file, what stands in it, what is put there, what is said
    "another artifact": ("model.pgz", "an", "am", "audit: it was of another artifact"),
    "a longer artifact": ("model.pgz", "an", "ann", "log: it tells of an artifact of 110 bytes, there is one of 120"),
    "other bytes in the log": (
        "train.log",
        "model_bytes:110",
        "model_bytes:111",
        "log: it tells of an artifact of 111",
    ),
    "no bytes in the log": ("train.log", "model_bytes", "bytes", "log: it tells of an artifact of None bytes"),
    "too long": ("train.log", "train_time:6398ms", "train_time:60001ms", "time: training took 60.001 s of MAX_WALL"),
    "no time": ("train.log", "training done", "training", "time: training took None s"),
    "no score": ("train.log", "final_roundtrip_exact", "final", "has no finished run"),
    "a score that is none": ("train.log", "val_bpb:2.5", "val_bpb:nan", "log: its score is val_loss:4.5 val_bpb:nan"),
    "a loss that is no number": (
        "train.log",
        "val_loss:4.5 ",
        "val_loss:abc ",
        "log: its score is val_loss:nan val_bpb:2.5",
    ),
    "a log that is cut off": (
        "train.log",
        "val_bpb:2.5 in_memory:4.5\n",
        "val_bpb:2.",
        "log: its score is val_loss:4.5 val_bpb:nan",
    ),
    "a check that says neither": (
        "model.pgz.audit.json",
        '"order", "ok": true',
        '"order", "ok": "no"',
        "it failed (order)",
    ),
    "another score": ("train.log", "val_bpb:2.5", "val_bpb:2.4", "log: its val_bpb is 2.4, in metrics.jsonl it is 2.5"),
    "another loss": (
        "train.log",
        "val_loss:4.5",
        "val_loss:4.4",
        "log: its val_loss is 4.4, in metrics.jsonl it is 4.5",
    ),
    "torn metrics": ("metrics.jsonl", "2.500000001}", "2.50", "metrics.jsonl has no final score that can be read"),
    "no final metrics": ("metrics.jsonl", "final_roundtrip", "final", "has no final score that can be read"),
    "a failed audit": ("model.pgz.audit.json", '"ok": true, "checks"', '"ok": false, "checks"', "audit: it failed"),
    "a failed check": ("model.pgz.audit.json", '"order", "ok": true', '"order", "ok": false', "it failed (order)"),
    "no checks": ("model.pgz.audit.json", '"checks": [', '"checks": [], "others": [', "it failed (no check is named)"),
    "a torn audit": ("model.pgz.audit.json", '"checks"', '"chec', "model.pgz.audit.json cannot be read"),
    "an audit of another evaluation": ("model.pgz.audit.json", "window=", "window=2", "audit: it was of window=2"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_that_does_not_hold_together_is_refused_with_its_reason(how: str, tmp_path: Path) -> None:
    run, h = a_run(tmp_path / "run")
    assert b.refusals(run, h, 1000)[0] == []
    name, old, new, said = BROKEN[how]
    data = (run / name).read_bytes()
    assert old.encode() in data
    (run / name).write_bytes(data.replace(old.encode(), new.encode()))
    why, _ = b.refusals(run, h, 1000)
    assert said in "; ".join(why)


def test_over_the_budget_or_without_its_files_a_run_is_refused(tmp_path: Path) -> None:
    run, h = a_run(tmp_path / "run")
    assert b.refusals(run, h, h.hard_budget_bytes - 110)[0] == []
    assert b.refusals(run, h, h.hard_budget_bytes - 109)[0][0].startswith("budget: 16000001 bytes are more than")
    for name, said in {"model.pgz.audit.json": "audit: there is none", "train.log": "no finished run"}.items():
        (run / name).unlink()
        assert said in b.refusals(run, h, 0)[0][0]


def test_record_of_two_seeds_tells_each_and_their_mean(tmp_path: Path) -> None:
    (one, h), (two, _) = (a_run(tmp_path / f"seed_{seed}") for seed in (42, 7))
    (two / "config.env").unlink()
    for name, score in (("train.log", "val_bpb:"), ("metrics.jsonl", '"val_bpb": ')):
        (two / name).write_text((two / name).read_text().replace(f"{score}2.5", f"{score}2.25"))
    out = tmp_path / "record"
    out.mkdir()
    options = b.options_of(["--dce", "--seeds", "42,7", "--out", str(out), "--blurb", "a small one"])
    b.write_record(out, [one, two], b.Extracted(h, "text", "short", "none", b"script"), ["a line"], options)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "submission.json", "train_seed42.log", "train_seed7.log", "train_seed42.audit.json", "model.pgz",
        "model.pgz.audit.json",
    }  # fmt: skip
    told = json.loads((out / "submission.json").read_text())
    assert (told["val_bpb"], told["val_bpb_std"], told["seeds"]) == (2.375, 0.1767767, [42, 7])
    assert told["seed_results"]["7"]["val_bpb"] == 2.25 and told["bytes_total"] == 116 and len(told["date"]) == 10
    text = (out / "README.md").read_text()
    assert "were made by this script" in text
    rows, options.seeds = [{"seed": 42, **b.refusals(one, h, 6)[1]}], ""
    whole = b.Extracted(h, "text", "short", "none", b"script")
    assert "they computed attention by blocks, which this" in b.readme(out, whole, rows, [], options)
    (one / "train_gpt.py").write_bytes(whole.script)
    options.run = str(one)  # a run of --seeds, packaged by itself
    assert (
        "were made by this script" in b.readme(out, whole, rows, [], options) and b.seed_of(tmp_path / "seed_7", h) == 7
    )
    assert "SEED=7 RUN_ID=seed_7 DATA_PATH=" in text and "torchrun --standalone --nproc_per_node=2 train_gpt.py" in text
    assert "but for what was not measured: fidelity" in text and "| mean (standard deviation) | 4.5 (0.0) |" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["PRESET=tiny", "LAYERS=3"], "LAYERS is not a variable of train_gpt.py; nearest: "),
        (["PRESET=tiny", "seed"], "seed is not VARIABLE=value"),
        (["SEED=1", "SEED=2"], "a variable is given twice"),
        (["MATCH=params:skc"], "MATCH is worked out by a run"),
        (["PRESET=tiny", "--seeds", "1,x"], "--seeds 1,x is not a list of different seeds"),
        (["PRESET=tiny", "--seeds", "7,42,7"], "--seeds 7,42,7 is not a list of different seeds"),
        (["PRESET=tiny", "--devices", "cuda,tpu"], "--devices tpu is none of cuda, mps, cpu"),
        (["PRESET=tiny", "--proof-data", "nowhere"], "--proof-data nowhere has no shards for the small job"),
        (["--from", "nowhere"], "--from nowhere is no folder of a run"),
        (
            ["PRESET=tiny", "--no-proof", "--seeds", "1", "DATA_PATH=nowhere"],
            "DATA_PATH=nowhere has no shards to train on",
        ),
        (["PRESET=tiny", "--eval-only", "--seeds", "1"], "--eval-only wants --dce, and neither --from nor --seeds"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_work(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert b.main(["--dce", "--out", str(tmp_path / "record"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}") and not (tmp_path / "record").exists()


def test_a_record_is_not_written_over_nor_where_no_folder_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dce", "PRESET=tiny", "--no-proof", "--seeds", "7", "--out"]
    (tmp_path / "a_file").write_text("")
    (tmp_path / "record" / "runs" / "seed_7").mkdir(parents=True)
    assert b.main([*words, str(tmp_path / "a_file" / "record")]) == 2
    assert "a_file is no folder" in capsys.readouterr().err
    assert b.main([*words, str(tmp_path / "record")]) == 2
    assert "seed_7 is there already" in capsys.readouterr().err
    (tmp_path / "record" / "submission.json").write_text("{}")
    assert b.main([*words, str(tmp_path / "record")]) == 2
    assert "holds a record already (submission.json)" in capsys.readouterr().err


def test_results_of_a_run_are_not_given_to_another_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, h = a_run(tmp_path / "run")
    (run / "config.env").write_text(whole_source().config.config_env(h))
    words = ["--dce", "--no-proof", "--out", str(tmp_path / "record"), "--from", str(run)]
    assert b.main([*words, "MAX_WALLCLOCK_SECONDS=0"]) == 2
    assert "MAX_WALLCLOCK_SECONDS is another than the run's (60.0)" in capsys.readouterr().err
    (run / "train.log").write_text((run / "train.log").read_text().replace("6398ms", "60001ms"))
    assert b.main([*words, "DATA_PATH=elsewhere"]) == 2
    assert "not packaged; run: time: training took 60.001 s" in capsys.readouterr().err


def test_results_of_another_script_are_not_packaged(tmp_path: Path) -> None:
    source, made_by = whole_source(), tmp_path / "train_gpt.py"
    with pytest.raises(b.BuildError, match="what made the run is not known"):
        b.check_maker(source, made_by, b"packaged")
    for text in (source.text, "packaged"):
        made_by.write_text(text)
        b.check_maker(source, made_by, b"packaged")
    made_by.write_text(source.text + "x = 1\n")
    with pytest.raises(b.BuildError, match="is not the train_gpt.py that is here"):
        b.check_maker(source, made_by, b"packaged")
