"""Read from bytecode which globals, modules and state a function uses.

Runs everywhere. What is found holds for every function of the same code, and is kept.
"""

from __future__ import annotations

import dis
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["CodeFacts", "facts"]

_GLOBAL = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_WRITING = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR")
_WRITING_OUTER = ("STORE_DEREF", "DELETE_DEREF")
_BACK_DOORS = frozenset(
    {
        *("globals", "vars", "setattr", "delattr", "exec", "eval", "__dict__", "__setattr__", "__delattr__"),
        *("__globals__", "__closure__", "__defaults__", "__kwdefaults__", "__code__"),
    }
)


@dataclass(frozen=True)
class CodeFacts:
    """What code, and the code nested in it, may touch."""

    globals: tuple[str, ...]  # names looked up or set beyond the function
    stored: frozenset[str]  # those of them that are set or deleted
    names: frozenset[str]  # those, and attributes
    imports: frozenset[tuple[str, int]]  # modules that import statements name, with their levels
    writes: bool  # it may set a global, an attribute, or a variable of the function around it


@functools.lru_cache(maxsize=4096)
def facts(code: CodeType) -> CodeFacts:
    """Read a function's code."""
    found: dict[str, None] = {}
    names: set[str] = set()
    imports: set[tuple[str, int]] = set()
    stored: set[str] = set()
    writes = False
    for part in _with_nested(code):
        names.update(part.co_names)
        constants: list[Any] = [0, None, None]
        for instruction in dis.get_instructions(part):
            name, argument = instruction.opname, instruction.argval
            if name in _GLOBAL:
                found[argument] = None
                if name in _WRITING:
                    stored.add(argument)
            elif name == "IMPORT_NAME":
                level = constants[-2]
                imports.add((argument, level if isinstance(level, int) else 0))
            if name in _WRITING or (name in _WRITING_OUTER and argument in code.co_freevars):
                writes = True
            constants = [*constants[-2:], argument]
    writes = writes or not names.isdisjoint(_BACK_DOORS)
    return CodeFacts(tuple(found), frozenset(stored), frozenset(names), frozenset(imports), writes)


def _with_nested(code: CodeType) -> list[CodeType]:
    parts = [code]
    for part in parts:  # grows meanwhile
        parts.extend(constant for constant in part.co_consts if isinstance(constant, type(code)))
    return parts
