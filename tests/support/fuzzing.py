"""Fuzz what reads input from elsewhere: inputs that were worth keeping, changed a little, for a stated time.

`FAL_FUZZ_SECONDS` is the time for each target; without it a few hundred inputs are tried. What fails is kept
in `FAL_FUZZ_DATABASE` and tried first the next time; whoever mends it puts the input into the corpus.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FUZZ", "corpus", "for_a_while", "fuzz", "mutated", "mutated_text"]

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
_LARGEST = 1 << 14  # bytes
SECONDS = float(os.environ.get("FAL_FUZZ_SECONDS") or 0)
_DATABASE = os.environ.get("FAL_FUZZ_DATABASE")
FUZZ = settings(
    max_examples=2000 if SECONDS else 60,
    database=DirectoryBasedExampleDatabase(_DATABASE) if _DATABASE else None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def corpus(target: str) -> list[bytes]:
    """The inputs that are kept for a target."""
    found = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert found, f"the corpus of {target} is empty"
    return found


def mutated(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Seeds with pieces cut out, repeated, replaced or moved, and now and then something of its own."""
    change = st.tuples(
        st.sampled_from(("cut", "repeat", "replace", "splice")),
        st.integers(0, 1 << 16),
        st.integers(0, 64),
        st.binary(max_size=16),
    )
    changed = st.builds(_apply, st.sampled_from(seeds), st.sampled_from(seeds), st.lists(change, max_size=6))
    return st.one_of(changed, changed, changed, st.binary(max_size=300))


def mutated_text(seeds: list[bytes]) -> st.SearchStrategy[str]:
    """The same as text; what is no UTF-8 becomes surrogates, as of a file's name."""
    return st.one_of(mutated(seeds).map(lambda data: data.decode("utf-8", "surrogateescape")), st.text())


def _apply(seed: bytes, other: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    data = seed
    for what, place, length, piece in changes:
        at = place % (len(data) + 1)
        end = at + length
        if what == "cut":
            data = data[:at] + data[end:]
        elif what == "repeat":
            data = data[:end] + data[at:end] * (1 + len(piece)) + data[end:]
        elif what == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        else:
            data = data[:at] + other[place % (len(other) + 1) :][:length] + data[at:]
        data = data[:_LARGEST]
    return data


def for_a_while(once: Callable[[], None]) -> None:
    """Do something again and again until the time for one target is over; once without such a time."""
    end = time.monotonic() + SECONDS
    once()
    while time.monotonic() < end:
        once()


def fuzz(**inputs: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Let a test be called with inputs, for the time of one target."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        run = FUZZ(given(**inputs)(test))

        def fuzzed() -> None:
            for_a_while(run)

        functools.update_wrapper(fuzzed, test)
        del fuzzed.__wrapped__  # pytest would take the inputs for fixtures
        return fuzzed

    return decorate
