"""Run a notebook twice, in a plain kernel and with `%%fal` on top of every cell, and compare the outputs.

What may differ between two runs of a plain kernel (addresses, timings, folders) is made equal first;
what is left is a difference that a user would see.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support.kernel import start_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Difference", "Replay", "compare", "differences", "read_notebook", "replay_on", "replay_plain"]

# Cells write files: they begin in a folder of their own, on a host too.
PLACES = """\
import os, sys, sysconfig, tempfile
begun = os.getcwd()
get_ipython().run_line_magic("cd", "-q " + tempfile.mkdtemp(prefix="fal-replay-"))
print("\\n".join([os.getcwd(), begun, sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), sys.prefix,
                 os.path.expanduser("~")]))
del os, sys, sysconfig, tempfile, begun"""
CLEANING = "__import__('shutil').rmtree({folder!r})"
LABELS = ("FOLDER", "BEGUN", "PACKAGES", "STDLIB", "ENVIRONMENT", "HOME")

_ANSI = re.compile(r"\x1b\[[\d;]*m")
_DURATION = r"\d[\d.,]*(?:e[+-]\d+)? ?(?:ns|µs|us|μs|ms|s|min|h|d)\b(?: \d+ ?(?:ns|µs|us|ms|s|min)\b)*"
_NOISE: tuple[tuple[re.Pattern[str], str], ...] = (
    (_ANSI, ""),
    (re.compile(r"0x[0-9a-fA-F]{6,}"), "0x…"),  # addresses
    (re.compile(r"CPU times: .*"), "CPU times: …"),  # %time leaves out parts that were below a microsecond
    (re.compile(rf"Wall time: {_DURATION}"), "Wall time: …"),
    (re.compile(rf"{_DURATION} ± {_DURATION} per loop"), "… per loop"),
    (re.compile(r"(Ran \d+ tests? in )[\d.]+s"), r"\1…s"),
    (re.compile(r"The slowest run took .* longer than the fastest\. .*\n"), ""),
    (re.compile(r"object at [0-9a-f]{12}"), "object at …"),
    (re.compile(r"This process \(pid=\d+\)"), "This process (pid=…)"),
    (re.compile(r"(altair-viz-|display_id=)[0-9a-f]{32}"), r"\1…"),  # random
    # Once per kernel, until somebody touches the filters of warnings, as reading a cell does.
    (re.compile(r"\S*interactiveshell\.py:\d+: UserWarning: To exit: .*\n.*\n"), ""),
    (re.compile(r"/\S*ipykernel_\d+/\d+\.py"), "CELL.py"),  # the file that a cell stands for: its text's hash
    (re.compile(r"\(\d+\.py, line"), "(CELL.py, line"),
    (re.compile(r'(<STDLIB>/[\w./]+", line )\d+'), r"\1…"),  # the host's Python may have another patch level
    (re.compile(r"<dc:date>.*</dc:date>"), "<dc:date>…</dc:date>"),
    (re.compile(r"(id=\"T_|#T_|id=\"T|sk-(?:container-id|estimator-id)-)[0-9a-f]+"), r"\1…"),  # random
    (re.compile(r"\b(?:ipykernel_launcher|__main__)\.py(?= \[-h\]|: error)"), "PROGRAM"),  # sys.argv[0]
    # A group of exceptions is shown by Python, which does not hide the frame of IPython that runs the cell.
    (re.compile(r'(?m)^ *\| +File ".*interactiveshell\.py".*\n *\| +(?:await eval|exec)\(code_obj.*\n'), ""),
)
_BINARY = ("image/png", "image/jpeg", "application/pdf")  # in base 64: nothing to be cleaned, and much of it
# Lines are counted as they stand in the cell, with the magic's.
_LINE = re.compile(
    r"(CELL\.py[:,](?: line )?|CELL\.py\", line |\bon line |at line |Cell In\[\d+\], line )(\d+)"
)
_ARROW = re.compile(r"^-+> ?(\d+)(?: (.*))?$")
_FRAME = re.compile(r"^(?:Cell In\[\d+\], line \d+|File (?P<file>.*?):\d+|  File (?P<plain>.*), line \d+)")


@dataclass
class Replay:
    """What one kernel showed for a notebook.

    Attributes:
        outputs: of each cell, as a front end has them in the end.
        places: text of a folder -> what stands for it.
        lines_before: lines that were put on top of each cell.
    """

    outputs: list[list[dict[str, Any]]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    lines_before: int = 0


@dataclass(frozen=True)
class Difference:
    """One cell whose outputs differ."""

    notebook: str
    number: int
    source: str
    expected: str
    got: str

    def __str__(self) -> str:
        lines = difflib.unified_diff(
            self.expected.splitlines(), self.got.splitlines(), "plain", "%%fal", lineterm="", n=2
        )
        short = (line if len(line) <= 400 else line[:400] + "…" for line in lines)
        bar = "─" * 30
        return f"{bar} {self.notebook}, cell {self.number}\n{self.source}\n{bar}\n" + "\n".join(short)


def read_notebook(path: Path) -> list[str]:
    """Give the code cells of an `.ipynb`, or of a text file in which lines `# %%` divide cells."""
    if path.suffix == ".ipynb":
        import nbformat

        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    else:
        cells = re.split(r"(?m)^# %%.*\n", path.read_text(encoding="utf-8"))[1:]
    return [stripped for cell in cells if (stripped := cell.strip("\n"))]


def replay_plain(cells: Sequence[str]) -> Replay:
    """Run cells in a kernel without the extension."""
    return _replay(cells, ["pass", "pass", PLACES], prefix="")


def replay_on(host: str, cells: Sequence[str], requirements: Sequence[str]) -> Replay:
    """Run cells on a host, each with `%%fal` on top.

    Args:
        host: its name.
        cells: as they are in the notebook.
        requirements: what the session's environment has, besides what every session has.
    """
    needs = " ".join(f"-r {line}" for line in requirements)
    opening = ["%load_ext fal_notebook", f"%fal connect {host}", f"%%fal --fresh {needs}\n{PLACES}"]
    return _replay(cells, opening, prefix="%%fal\n", closing="%fal stop")


def _replay(cells: Sequence[str], opening: Sequence[str], *, prefix: str, closing: str = "pass") -> Replay:
    replay = Replay(lines_before=prefix.count("\n"))
    with start_kernel(extension=False) as kernel:
        for cell in opening:  # as many for each kernel, so that cells have the same numbers
            done = kernel.run(cell, timeout=300)
            assert done.status == "ok", done.outputs
        folder, *others = done.text.splitlines()
        for place, label in zip([folder, *others], LABELS, strict=True):
            replay.places.setdefault(place, label)
        ran = [kernel.run(prefix + cell) for cell in cells]  # outputs may still be updated by later cells
        kernel.run(prefix + CLEANING.format(folder=folder))
        kernel.run(closing)
        replay.outputs = [
            [*cell.outputs, *(_as_output(payload, prefix) for payload in cell.payload)] for cell in ran
        ]
    return replay


def _as_output(payload: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What a reply asks for beside the outputs: the pager, or text for another cell, which runs likewise."""
    data = payload.get("data") or {"text/plain": payload.get("text", "").removeprefix(prefix)}
    return {"output_type": payload["source"], "data": data}


def compare(path: Path, plain: Replay, other: Replay) -> list[Difference]:
    """Give the cells of a notebook whose outputs differ, in order."""
    return list(differences(path.name, read_notebook(path), plain, other))


def differences(name: str, cells: Sequence[str], plain: Replay, other: Replay) -> list[Difference]:
    """As `compare`, for cells."""
    found = []
    for number, source in enumerate(cells):
        is_magic = source.startswith("%%")  # its body is code by itself, with lines of its own
        expected, got = (_as_text(replay, number, counts_lines=not is_magic) for replay in (plain, other))
        if expected != got:
            found.append(Difference(name, number + 1, source, expected, got))
    return found


# ---------------------------------------------------------------- what is compared


def _as_text(replay: Replay, number: int, *, counts_lines: bool) -> str:
    """Give everything that stands below a cell as text, without what may differ."""
    pieces: list[str] = []
    streams: dict[str, str] = {}
    for output in [*replay.outputs[number], {"output_type": "end"}]:
        kind = output["output_type"]
        if kind == "stream":
            streams[output["name"]] = streams.get(output["name"], "") + output["text"]
            continue
        # A plain kernel gathers stdout and stderr apart, so their order is known only around displays.
        cleaned = {name: _clean(text, replay) for name, text in sorted(streams.items())}
        pieces += [f"[{name}]\n{text}" for name, text in cleaned.items() if text]
        streams = {}
        if kind == "error":
            pieces.append(_error_as_text(output, replay))
        elif kind != "end":
            pieces.append(f"[{kind}]\n{_bundle_as_text(output, replay)}")
    text = "\n".join(pieces)
    return text if counts_lines else re.sub(r"(In\[\d+\], line) -?\d+", r"\1 …", text)


def _bundle_as_text(output: dict[str, Any], replay: Replay) -> str:
    shown = []
    for mime, content in sorted(output["data"].items()):
        text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
        shown.append(f"({mime})\n{text if mime in _BINARY else _clean(text, replay)}")
    metadata = json.dumps(output.get("metadata", {}), sort_keys=True)
    return "\n".join([*shown, f"(metadata) {metadata}"])


def _error_as_text(output: dict[str, Any], replay: Replay) -> str:
    """Give an error's name, text, and the user's lines that it went through; not those of libraries."""
    lines = _ANSI.sub("", "\n".join(output["traceback"])).splitlines()
    went_through: list[str] = []
    ours = False
    for line in lines:
        if frame := _FRAME.match(line):
            file = frame["file"] or frame["plain"]
            ours = file is None or not any(part in file for part in ("site-packages", "/lib/python"))
            found = _clean(line, replay) if file is None else ""
        elif (arrow := _ARROW.match(line)) and ours:
            found = f"-> {(arrow[2] or '').strip()}"
        else:
            continue
        if found and found not in went_through[-4:]:  # how deep a recursion goes depends on what calls it
            went_through.append(found)
    return "\n".join([f"[error] {output['ename']}: {_clean(output['evalue'], replay)}", *went_through])


def _clean(text: str, replay: Replay) -> str:
    for place in sorted(replay.places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, f"<{replay.places[place]}>")
    for pattern, replacement in _NOISE:
        text = pattern.sub(replacement, text)
    return _LINE.sub(lambda found: f"{found[1]}{int(found[2]) - replay.lines_before}", text)
