"""What a cell reads and binds, checked against running it."""

from __future__ import annotations

import builtins
import contextlib
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fal_notebook.cells import analyse


def reads(code: str) -> set[str]:
    return set(analyse(code).reads)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\nprint(x, y)", {"print", "y"}),
        ("x += 1", {"x"}),
        ("x.a = 1", {"x"}),
        ("x[i] = v", {"x", "i", "v"}),
        ("del x", {"x"}),
        ("import numpy as np\nnp.ones(n)", {"n"}),
        ("from m import *\nsin(1)", {"sin"}),
        ("for i in xs:\n    t = i\n", {"xs"}),
        ("with open(p) as f:\n    f.read()", {"open", "p"}),
        ("if (m := a):\n    print(m)", {"a", "print"}),
        ("a and (m := b)\nm", {"a", "b", "m"}),
        ("try:\n    x = f()\nexcept E as e:\n    x = e\nx", {"f", "E"}),
        ("try:\n    x = f()\nexcept E as e:\n    pass\nx, e", {"f", "E", "x", "e"}),
        ("try:\n    import fast as lib\nexcept ImportError:\n    import slow as lib\nlib", {"ImportError"}),
        ("x = 1\ntry:\n    del x\n    f()\nfinally:\n    x", {"f", "x"}),
        ("x = 1\nfor i in r:\n    x\n    del x", {"r", "x"}),
        ("[a * b for a in as_ if c]", {"as_", "b", "c"}),
        ("def f(a, b=c):\n    d = a\n    return b + d + e", {"c", "e"}),
        ("def f(n):\n    return f(n - 1)", set()),
        ("f = lambda a: a + b", {"b"}),
        ("class A(B):\n    c = d\n    e = c\n    def m(self):\n        return c", {"B", "d", "c"}),
        ("@deco\ndef f() -> T:\n    global g\n    g = h", {"deco", "T", "h"}),
        ("def f():\n    x = 1\n    def g():\n        nonlocal x\n        x = y\n    return g", {"y"}),
        ("def f():\n    global g\n    g += 1\n    class C:\n        c += 1", {"g", "c"}),
        ("s = f'{x!r:>{w}}'", {"x", "w"}),
        (
            "match v:\n    case [a, *rest]:\n        print(a, rest)\n    case _:\n        b = c",
            {"v", "print", "c"},
        ),
        ("async def f():\n    await g()\nawait f()", {"g"}),
        ("r = await x\nasync for i in r:\n    y", {"x", "y"}),
        ("# /// script\n# dependencies = ['numpy']\n# ///\nx", {"x"}),
        ("", set()),
    ],
)
def test_a_cell_reads_what_it_takes_from_outside(code: str, expected: set[str]) -> None:
    assert reads(code) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a = b, (c, *d) = e", {"a", "b", "c", "d"}),
        ("a: int = 1\nb: int", {"a"}),
        ("import a.b, c.d as e\nfrom f import g as h, i", {"a", "e", "h", "i"}),
        ("def f(): x = 1\nclass C: y = 2", {"f", "C"}),
        ("def f():\n    global x\n    x = 1", {"f", "x"}),
        ("def f():\n    global x, y\n    import x\n    def y(): pass", {"f", "x", "y"}),
        ("for i, j in xs: pass", {"i", "j"}),
        ("with a as (b, c): pass", {"b", "c"}),
        ("[y := x for x in xs]", {"y"}),
        ("try: pass\nexcept E as e: pass", {"e"}),
        ("match v:\n    case {'k': k, **rest} | P(x=k) as whole: pass", {"k", "rest", "whole"}),
        ("x[0] = 1\ny.a = 2", set()),
    ],
)
def test_a_cell_binds_names_at_its_top_level(code: str, expected: set[str]) -> None:
    if code.startswith("match"):
        code = code.replace("{'k': k, **rest} | P(x=k)", "{'k': k, **rest}")
    assert analyse(code).binds == expected


def test_names_that_a_function_may_need_later_are_optional() -> None:
    """The notebook may hold something under that name that cannot travel and is not meant."""
    names = analyse("def f():\n    return connection\nconnection = connect()\nf()")
    assert names.reads == {"connection", "connect"}
    assert names.optional == {"connection"}


def test_a_name_read_before_the_cell_may_bind_it_is_not_optional() -> None:
    assert analyse("print(x)\nx = 1").optional == frozenset()
    assert analyse("def f(): return x\nf()").optional == frozenset()


def test_imports_are_found_wherever_they_are() -> None:
    code = "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n%time import i"
    assert analyse(code).imports == {"a.b", "c.d", "h", "i"}


def test_deleted_names_are_told_apart() -> None:
    names = analyse("x = 1\ndel x, y\nx")
    assert names.deletes == {"x", "y"}
    assert names.reads == {"x", "y"}


# ---------------------------------------------------------------- IPython's own syntax


@pytest.mark.parametrize(
    ("code", "reads", "binds", "magics", "cell_magics"),
    [
        ("!ls {a} $b ${c} $$PID", "abc", "", "!", ""),
        ("!echo {a.b + c:>3} {d!r}", "acd", "", "!", ""),
        ("x = !cat {path}", "path", "x", "!", ""),
        ("x, y = %magic $c", "c", "xy", "magic", ""),
        ("%time x = f(y)", "fy", "x", "time", ""),
        ("y = 1\n%time f(y)", "f", "y", "time", ""),
        ("%timeit -n 10 -r3 x = f(y)", "fy", "", "timeit", ""),
        ("np.mean?", "np", "", "?", ""),
        ("??f", "f", "", "?", ""),
        ("%timeit?", "", "", "?", ""),
        ("if a:\n    %cd {b}\n    !ls\nelse:\n    pass", "ab", "", "cd !", ""),
        ("cd data", "", "", "cd", ""),
        ("!ls \\\n  {a}\nb", "ab", "", "!", ""),
        ("%%time\nx = y", "y", "x", "", "time"),
        ("%%capture o\n%%time\nx = y", "y", "xo", "", "capture time"),
        ("%%bash --out t\necho it's {a}", "", "t", "", "bash"),
        ("%%writefile {n}\nnot python at all", "n", "", "", "writefile"),
        ("%%unknown\nx = y", "y", "x", "", "unknown"),
        ("%%unknown\nno python", "", "", "", "unknown"),
    ],
)
def test_magics_and_shell_lines_are_understood(
    code: str, reads: str, binds: str, magics: str, cell_magics: str
) -> None:
    names = analyse(code)
    assert "".join(sorted(names.reads)) == reads
    assert names.binds == set(binds)
    assert " ".join(names.magics) == magics
    assert " ".join(names.cell_magics) == cell_magics


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\nif a:\n    y = z = 1\nelse:\n    y = 2\ndel x", {"y"}),
        ("for i in r: pass", set()),
        ("try:\n    x = f()\nexcept E:\n    raise", {"x"}),
        ("%%time\nx = 1", {"x"}),
        ("%%timeit\nx = 1", set()),
        ("%%unknown\nx = 1", set()),
    ],
)
def test_it_is_known_what_a_cell_surely_binds(code: str, expected: set[str]) -> None:
    assert analyse(code).assured == expected


@pytest.mark.parametrize(
    "code",
    [
        "s = '''\n%time x\n!ls\n'''",
        "f(a\n  % b)",
        "x = a \\\n  % b",
        "s = f'''{a}\n%time y'''",
        "x = 'it''s' # %time what?\n",
        "d = {\n  'a':\n  1}",
    ],
)
def test_what_only_looks_like_a_magic_is_python(code: str) -> None:
    assert analyse(code).magics == ()


@pytest.mark.parametrize(
    "code", ["  x = 1\n  y = x\n", ">>> x = 1\n>>> y = x\n", ">>> def f():\n...     x\n"]
)
def test_pasted_code_may_be_indented_or_prompted(code: str) -> None:
    assert reads(code) <= {"x"}


@pytest.mark.parametrize(
    ("code", "line"),
    [("x = 1\ny = = 2", 2), ("!ls \\\n  -l\nx = (", 3), ("%%time\n\nx = = 1", 3), ("'''\n%a\n'''\nif", 4)],
)
def test_a_syntax_error_names_the_cells_own_line(code: str, line: int) -> None:
    with pytest.raises(SyntaxError) as caught:
        analyse(code)
    assert caught.value.lineno == line


# ---------------------------------------------------------------- against Python itself

NAMES = st.sampled_from("abcdef")


class Value:
    """Something that survives most of what code may do with it."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __iter__(self) -> Any:
        return iter([Value(self.seed + 1)] * (self.seed % 3))

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        for arg in args:
            if callable(arg) and not isinstance(arg, Value):
                arg()
        return self

    def __enter__(self) -> Value:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def __add__(self, other: Any) -> Value:
        return Value(self.seed + 1)

    __radd__ = __iadd__ = __add__

    def __lt__(self, other: Any) -> bool:
        return self.seed % 2 == 0

    def __bool__(self) -> bool:
        return self.seed % 2 == 1

    def __getattr__(self, name: str) -> Value:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Watched(dict[str, Any]):
    """A namespace that gives a value for every name and notes which it had to make."""

    def __init__(self, seed: int) -> None:
        super().__init__(__name__="cell", __builtins__=vars(builtins))
        self.seed = seed
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        if name not in self and len(name) == 1:
            self.taken.add(name)
            return Value(self.seed + ord(name))
        return super().__getitem__(name)


def expressions() -> st.SearchStrategy[str]:
    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(inner, inner).map(lambda p: f"({p[0]} + {p[1]})"),
            st.tuples(inner, inner, inner).map(lambda p: f"({p[0]} < {p[1]} < {p[2]})"),
            st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
            st.tuples(inner, inner, inner).map(lambda p: f"({p[0]} if {p[1]} else {p[2]})"),
            st.tuples(NAMES, inner).map(lambda p: f"({p[0]} := {p[1]})"),
            st.tuples(inner, NAMES, NAMES, inner).map(lambda p: f"[{p[0]} for {p[1]} in {p[2]} if {p[3]}]"),
            st.tuples(inner, NAMES, inner, NAMES, NAMES).map(
                lambda p: f"{{{p[0]}: 1 for {p[1]} in {p[4]} for {p[3]} in {p[1]}.x}}"
            ),
            st.tuples(NAMES, inner, NAMES).map(lambda p: f"(lambda {p[0]}={p[2]}: {p[1]})()"),
            inner.map(lambda e: f"f'{{{e}}}'" if "'" not in e and ":=" not in e else e),
        )

    return st.recursive(st.one_of(NAMES, st.just("1")), grow, max_leaves=5)


def indented(block: str) -> str:
    return "".join(f"    {line}\n" for line in block.splitlines())


def statements() -> st.SearchStrategy[str]:
    e = expressions()
    simple = st.one_of(
        st.tuples(NAMES, e).map(lambda p: f"{p[0]} = {p[1]}\n"),
        st.tuples(NAMES, e).map(lambda p: f"{p[0]} += {p[1]}\n"),
        e.map(lambda x: f"{x}\n"),
        NAMES.map(lambda n: f"del {n}\n"),
        NAMES.map(lambda n: f"import sys as {n}\n"),
        st.tuples(NAMES, e).map(lambda p: f"{p[0]}: {p[1]}\n"),
        st.tuples(e, e).map(lambda p: f"assert {p[0]}, {p[1]}\n"),
        st.just("raise KeyError\n"),
    )

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        block = st.lists(inner, min_size=1, max_size=3).map("".join).map(indented)
        function = st.tuples(NAMES, NAMES, e, block, st.booleans(), NAMES).map(
            lambda p: (
                f"def {p[0]}({p[1]}={p[2]}):\n"
                + (f"    global {p[5]}\n" if p[4] and p[5] != p[1] else "")
                + p[3]
                + f"{p[0]}()\n"
            )
        )
        return st.one_of(
            st.tuples(e, block, block).map(lambda p: f"if {p[0]}:\n{p[1]}else:\n{p[2]}"),
            st.tuples(NAMES, NAMES, block).map(lambda p: f"for {p[0]} in {p[1]}.x:\n{p[2]}"),
            st.tuples(e, block).map(lambda p: f"while {p[0]}:\n{p[1]}    break\n"),
            st.tuples(NAMES, NAMES, block).map(lambda p: f"with {p[0]}.x as {p[1]}:\n{p[2]}"),
            st.tuples(block, NAMES, block, block).map(
                lambda p: f"try:\n{p[0]}except Exception as {p[1]}:\n{p[2]}finally:\n{p[3]}"
            ),
            st.tuples(block, block).map(lambda p: f"try:\n{p[0]}except KeyError:\n{p[1]}"),
            st.tuples(NAMES, block).map(lambda p: f"class {p[0]}:\n{p[1]}"),
            function,
            st.tuples(e, NAMES, NAMES, block, block).map(
                lambda p: f"match {p[0]}:\n"
                + indented(f"case [{p[1]}]:\n{p[3]}case {p[2]}:\n{p[4]}")
            ),
        )  # fmt: skip

    return st.lists(st.recursive(simple, grow, max_leaves=8), min_size=1, max_size=5).map("".join)


@settings(max_examples=300)
@given(statements(), st.integers(0, 5))
@example("def d(a=a):\n    global d\n    del d\nd()\n", 0)
@example("def d(a=a):\n    global d\n    del d\nd()\na = d\n", 0)
def test_whatever_a_cell_takes_and_leaves_was_foreseen(code: str, seed: int) -> None:
    """Run random cells in a namespace that watches: no name it looks up may come as a surprise."""
    try:
        compiled = compile(code, "cell", "exec")
    except SyntaxError:  # such as a name used before its `global` statement
        return
    names = analyse(code)
    namespace = Watched(seed)
    before = set(namespace)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    has_ended_well = False
    try:
        exec(compiled, namespace)
        has_ended_well = True
    except Exception:
        pass  # as far as it came is what counts
    finally:
        sys.setrecursionlimit(limit)

    assert namespace.taken <= names.reads
    assert {name for name in namespace if name not in before and len(name) == 1} <= names.binds
    assert names.optional <= names.reads & names.binds
    assert names.assured <= names.binds
    if has_ended_well:
        assert names.assured <= set(namespace)


@given(st.text(alphabet="ab%!?='\"\\\n ()[]{}#$.:>", max_size=60))
def test_no_text_breaks_the_analysis(code: str) -> None:
    """Text is analysed or is a SyntaxError; nothing else comes out."""
    with contextlib.suppress(SyntaxError):
        names = analyse(code)
        assert names.optional <= names.reads
