"""Find the names that Python code takes from outside and those it makes, from its syntax tree.

Runs in the notebook. The code's top level is followed in the order it runs: a name is read from
outside unless it is certain to have been bound before. Function bodies run later, if at all; the
names they need are kept apart, and Python's own symbol tables tell which these are.
"""

from __future__ import annotations

import ast
import functools
import symtable
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Names", "names_of"]

_SWALLOWING = frozenset({"suppress", "raises", "assertRaises"})  # context managers that cut their body short


@dataclass
class Names:
    """What a piece of code has to do with names.

    Attributes:
        certain: read while nothing in the code may have bound them.
        uncertain: read where the code may or may not have bound them.
        deferred: read in bodies of functions, not certain to be bound when the function is made.
        binds: bound at the top level, in some case.
        assured: bound at the top level whenever the code runs to its end.
        deletes: deleted at the top level, in some case.
        imports: modules imported anywhere, by full name.
    """

    certain: set[str] = field(default_factory=set)
    uncertain: set[str] = field(default_factory=set)
    deferred: set[str] = field(default_factory=set)
    binds: set[str] = field(default_factory=set)
    assured: set[str] = field(default_factory=set)
    deletes: set[str] = field(default_factory=set)
    imports: set[str] = field(default_factory=set)

    @property
    def reads(self) -> set[str]:
        """Names that the code may take from outside."""
        return self.certain | self.uncertain | self.deferred


def names_of(python: str, filename: str = "<cell>") -> Names:
    """Analyse Python code; `await` may stand at its top level.

    Raises:
        SyntaxError: it is not Python.
        ValueError: it holds null bytes.
    """
    tree = ast.parse(python, filename=filename)
    augmented = {node.target for node in ast.walk(tree) if isinstance(node, ast.AugAssign)}
    flow = _Flow(
        Names(),
        _function_tables(symtable.symtable(python, filename, "exec")),
        augmented={target.id for target in augmented if isinstance(target, ast.Name)},
        fading=_deleted_by_functions(tree),
    )
    flow.annotations_wait = sys.version_info >= (3, 14) or _imports_annotations(tree)
    flow.visit(tree)
    flow.names.assured = flow.definite
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            flow.names.imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            flow.names.imports.add(node.module)
    return flow.names


def _deleted_by_functions(tree: ast.AST) -> set[str]:
    """Names that a function deletes at the top level, by a `global` statement."""
    found: set[str] = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = list(ast.walk(function))
            shared = {name for node in inside if isinstance(node, ast.Global) for name in node.names}
            found |= shared & {
                node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del)
            }
    return found


class _Flow(ast.NodeVisitor):
    """Follows code in the order it runs: a module, or a class body or comprehension in it."""

    def __init__(
        self,
        names: Names,
        tables: dict[tuple[str, int], list[symtable.SymbolTable]],
        parent: _Flow | None = None,
        *,
        augmented: set[str],
        fading: set[str],
        is_comprehension: bool = False,
    ) -> None:
        self.names = names
        self.annotations_wait: bool = parent is not None and parent.annotations_wait
        self._tables, self._augmented = tables, augmented
        self._fading = fading  # names that any call may delete
        self._parent = parent
        self._is_comprehension = is_comprehension
        self.definite: set[str] = set()
        self.possible: set[str] = set()

    # ------------------------------------------------------------ what happens to a name

    def load(self, name: str) -> None:
        """The code reads a name."""
        if name in self.definite:
            return
        if self._parent is not None:
            self._parent.load(name)
        elif name in self.possible:
            self.names.uncertain.add(name)
        else:
            self.names.certain.add(name)

    def store(self, name: str) -> None:
        """The code binds a name."""
        if self._parent is not None or name not in self._fading:
            self.definite.add(name)
        self.possible.add(name)
        if self._parent is None:
            self.names.binds.add(name)

    def delete(self, name: str) -> None:
        """The code deletes a name."""
        self.definite.discard(name)
        if self._parent is None:
            self.names.deletes.add(name)

    def load_later(self, names: Iterable[str], stores: Iterable[str] = ()) -> None:
        """A function was made that reads names, and binds others by a `global` statement."""
        module = self._module
        module.names.deferred |= set(names) - module.definite
        module.possible.update(stores)
        module.names.binds.update(stores)

    @property
    def _module(self) -> _Flow:
        return self if self._parent is None else self._parent._module  # noqa: SLF001 - its own class

    # ------------------------------------------------------------ what may or may not run

    def maybe(self, *steps: Callable[[], None]) -> None:
        """Visit alternatives, one of which may run, or none."""
        self.one_of([*((step, False) for step in steps), (lambda: None, False)])

    def one_of(self, alternatives: Sequence[tuple[Callable[[], None], bool]]) -> None:
        """Visit alternatives, one of which runs; what is certain after each is certain afterwards.

        Args:
            alternatives: each with whether it always ends by raising.
        """
        before = self.definite
        results = []
        for step, raises in alternatives:
            self.definite = before.copy()
            step()
            if not raises:
                results.append(self.definite)
        self.definite = set.intersection(*results) if results else before

    def block(self, body: Sequence[ast.AST]) -> tuple[Callable[[], None], bool]:
        """Give statements as an alternative."""
        return lambda: self.visit_all(body), _raises(body)

    def visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        """Visit nodes in order."""
        for node in nodes:
            if node is not None:
                self.visit(node)

    # ------------------------------------------------------------ names

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.store(node.id)
            return
        self.load(node.id)
        if isinstance(node.ctx, ast.Del):
            self.delete(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit_all([node.value, *node.targets])

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.load(node.target.id)
        self.visit_all([node.value, node.target])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None or not isinstance(node.target, ast.Name):
            self.visit_all([node.value, node.target])
        self.visit_annotations([node.annotation])

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        owner = self
        while owner._is_comprehension and owner._parent is not None:
            owner = owner._parent
        if owner is self:
            self.visit(node.target)
        else:
            self.definite.add(node.target.id)
            owner.maybe(lambda: owner.store(node.target.id))

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name != "*":
                self.store(alias.asname or alias.name.split(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.visit_Import(node)

    # ------------------------------------------------------------ expressions

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self.maybe(lambda: self.visit_all(node.values[1:]))

    def visit_Compare(self, node: ast.Compare) -> None:
        self.visit_all([node.left, node.comparators[0]])
        self.maybe(lambda: self.visit_all(node.comparators[1:]))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self.one_of([self.block([node.body]), self.block([node.orelse])])

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._visit_comprehension(node.generators, [node.elt])

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self._visit_comprehension(node.generators, [node.elt])

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._visit_comprehension(node.generators, [node.elt])

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._visit_comprehension(node.generators, [node.key, node.value])

    def _visit_comprehension(
        self, generators: Sequence[ast.comprehension], results: Sequence[ast.AST]
    ) -> None:
        self.visit(generators[0].iter)  # the outermost iterable belongs to the scope around
        around = self if self._is_comprehension else self._module  # a class body's names are not seen inside
        inner = _Flow(
            self.names,
            self._tables,
            around,
            augmented=self._augmented,
            fading=self._fading,
            is_comprehension=True,
        )
        for index, generator in enumerate(generators):
            inner.visit_all([generator.iter] if index else [])
            inner.visit_all([generator.target, *generator.ifs])
        inner.visit_all(results)

    # ------------------------------------------------------------ functions and classes

    def visit_annotations(self, annotations: Iterable[ast.AST | None]) -> None:
        """Annotations are evaluated where they stand, or later if at all."""
        if self.annotations_wait:
            for annotation in annotations:
                self.load_later(_every_name(annotation))
        else:
            self.visit_all(annotations)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.visit_all([*node.decorator_list, *node.args.defaults, *node.args.kw_defaults])
        every = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            node.args.vararg,
            node.args.kwarg,
        ]
        annotations = [node.returns, *(argument.annotation for argument in every if argument is not None)]
        self._with_type_parameters(node, lambda: self.visit_annotations(annotations))
        self.store(node.name)
        self._visit_body(node.name, node.lineno)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit_all([*node.args.defaults, *node.args.kw_defaults])
        self._visit_body("lambda", node.lineno)

    def _visit_body(self, name: str, line: int) -> None:
        for table in self._tables.get((name, line), ()):
            self.load_later(*_outer_names(table, self._augmented))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_all(node.decorator_list)
        bases = [*node.bases, *(keyword.value for keyword in node.keywords)]
        self._with_type_parameters(node, lambda: self.visit_all(bases))
        body = _Flow(self.names, self._tables, self._module, augmented=self._augmented, fading=self._fading)
        body.definite.update(_type_parameters(node))
        body.visit_all(node.body)
        self.store(node.name)

    def visit_TypeAlias(self, node: Any) -> None:
        self.load_later(_every_name(node.value) - set(_type_parameters(node)))
        self.visit(node.name)

    def _with_type_parameters(self, node: Any, step: Callable[[], None]) -> None:
        own = set(_type_parameters(node)) - self.definite
        self.definite |= own
        step()
        self.definite -= own

    # ------------------------------------------------------------ statements

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.one_of([self.block(node.body), self.block(node.orelse)])

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)
        self.maybe(lambda: self.visit_all([node.msg]))

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self.definite -= _unbound_in(node.body)  # a later round of the loop meets what an earlier one left
        self.maybe(lambda: self.visit_all([node.target, *node.body]))
        self.maybe(lambda: self.visit_all(node.orelse))

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self.visit_For(node)

    def visit_While(self, node: ast.While) -> None:
        self.definite -= _unbound_in(node.body)
        self.visit(node.test)
        self.maybe(lambda: self.visit_all(node.body))
        self.maybe(lambda: self.visit_all(node.orelse))

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.visit_all([item.context_expr, item.optional_vars])
        if any(_may_swallow(item.context_expr) for item in node.items):
            self.definite -= _unbound_in(node.body)
            self.maybe(lambda: self.visit_all(node.body))
        else:
            self.visit_all(node.body)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        self.visit_With(node)

    def visit_Try(self, node: Any) -> None:
        before = self.definite.copy()
        main = self.block([*node.body, *node.orelse])
        self.one_of(
            [
                main,
                *((functools.partial(self._visit_handler, node, h), _raises(h.body)) for h in node.handlers),
            ]
        )
        after = self.definite
        self.definite = before - _unbound_in([*node.body, *node.handlers, *node.orelse])
        self.visit_all(node.finalbody)
        self.definite |= after - _unbound_in(node.finalbody)

    def _visit_handler(self, node: ast.Try, handler: ast.ExceptHandler) -> None:
        self.definite -= _unbound_in(node.body)
        self.visit(handler)

    def visit_TryStar(self, node: Any) -> None:
        self.visit_Try(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.visit_all([node.type])
        if node.name is not None:
            self.store(node.name)
        self.visit_all(node.body)
        self.definite.discard(node.name or "")  # Python deletes it at the end of the handler

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        for case in node.cases:  # a pattern may bind names and fail in the end
            tried: list[ast.AST | None] = [case.pattern, case.guard]
            self.maybe(functools.partial(self.visit_all, tried))
        cases = [self.block([case.pattern, *case.body]) for case in node.cases]
        last = node.cases[-1]
        takes_all = (
            last.guard is None and isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None
        )
        self.one_of(cases if takes_all else [*cases, (lambda: None, False)])

    def visit_MatchAs(self, node: ast.MatchAs | ast.MatchStar) -> None:
        self.generic_visit(node)
        if node.name is not None:
            self.store(node.name)

    def visit_MatchStar(self, node: ast.MatchStar) -> None:
        self.visit_MatchAs(node)

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        self.generic_visit(node)
        if node.rest is not None:
            self.store(node.rest)


# ---------------------------------------------------------------- functions, from Python's symbol tables


def _function_tables(top: symtable.SymbolTable) -> dict[tuple[str, int], list[symtable.SymbolTable]]:
    """Find the tables of all functions by name and line; those that share both are not told apart."""
    found: dict[tuple[str, int], list[symtable.SymbolTable]] = {}
    for table in _tables_within(top):
        if table.get_type() == "function":
            found.setdefault((table.get_name(), table.get_lineno()), []).append(table)
    return found


def _tables_within(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from _tables_within(child)


def _outer_names(table: symtable.SymbolTable, augmented: set[str]) -> tuple[set[str], set[str]]:
    """Give the module's names that a function, or one inside it, reads, and those it binds.

    Args:
        table: the function's.
        augmented: names before `+=` and the like anywhere, which reads them; symbol tables do not tell.
    """
    reads, stores = set(), set()
    for scope in (table, *_tables_within(table)):
        for symbol in scope.get_symbols():
            falls_through = (
                scope.get_type() == "class" and symbol.is_local()
            )  # read before the class binds it
            is_read = symbol.is_referenced() or symbol.get_name() in augmented
            if is_read and (symbol.is_global() or falls_through):
                reads.add(symbol.get_name())
            is_bound = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
            if symbol.is_declared_global() and is_bound:
                stores.add(symbol.get_name())
    return reads, stores


# ---------------------------------------------------------------- small questions to a tree


def _imports_annotations(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
        for node in tree.body
    )


def _every_name(node: ast.AST | None, context: type[ast.expr_context] = ast.Load) -> set[str]:
    if node is None:
        return set()
    return {
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, context)
    }


def _unbound_in(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that statements delete: by `del`, or at the end of `except ... as name`."""
    names = set()
    for node in nodes:
        names |= _every_name(node, ast.Del)
        names |= {part.name for part in ast.walk(node) if isinstance(part, ast.ExceptHandler) and part.name}
    return names


def _raises(body: Sequence[ast.AST]) -> bool:
    return bool(body) and isinstance(body[-1], ast.Raise)


def _type_parameters(node: Any) -> list[str]:
    """Names of `def f[T]` and the like, which Python 3.12 brought."""
    return [parameter.name for parameter in getattr(node, "type_params", ())]


def _may_swallow(expression: ast.AST) -> bool:
    if not isinstance(expression, ast.Call):
        return False
    called = expression.func
    return getattr(called, "attr", getattr(called, "id", "")) in _SWALLOWING
