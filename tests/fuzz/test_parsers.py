"""Whatever stands in a frame, a manifest, a Dockerfile, a requirement or an SSH configuration: an answer or a
clean error, never a crash, and never more than was asked for."""

from __future__ import annotations

import contextlib
import itertools
import posixpath
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from support.fuzzing import corpus, fuzz, mutated, mutated_text

from fal_agent.errors import ConfigurationError, ProtocolError, RequirementError, ResourceError
from fal_agent.framing import FrameDecoder
from fal_agent.mirror.folder import Mirror
from fal_agent.mirror.manifests import Manifest
from fal_agent.requirements import check_line, distribution_name, masked, normalised
from fal_agent.wire import decode, encode
from fal_notebook.dockerfile import copy_add_sources
from fal_notebook.hosts.ssh_config import resolve

FRAMES = corpus("frames")


@fuzz(data=mutated(FRAMES), cuts=st.lists(st.integers(0, 1 << 16), max_size=5))
def test_frames(data: bytes, cuts: list[int]) -> None:
    """The cuts of the stream change nothing, and a message that is understood can be said again."""
    pieces = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    outcomes = []
    for stream in ([data], [data[a:b] for a, b in itertools.pairwise(pieces)]):
        decoder, messages, problem = FrameDecoder(), [], ""
        try:
            for piece in stream:
                for frame in decoder.feed(piece):
                    messages.append((decode(frame), frame.buffers))
        except ProtocolError as error:
            problem = str(error)
        outcomes.append(([message for message, _ in messages], bool(problem)))
        for message, buffers in messages:
            (again,) = FrameDecoder().feed(encode(message, buffers))
            assert decode(again) == message
    if not any(problem for _, problem in outcomes):
        assert outcomes[0] == outcomes[1]


@fuzz(data=mutated(corpus("manifests")))
def test_manifests(data: bytes) -> None:
    """A manifest that is accepted stays inside of its folder."""
    try:
        manifest = Manifest.from_bytes(data)
    except ProtocolError:
        return
    for path in (*manifest.files, *manifest.links, *manifest.keep):
        _assert_inside(path)
    for path, target in manifest.links.items():
        _assert_inside(posixpath.join(posixpath.dirname(path), target), may_be_folder=True)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def _assert_inside(path: str, *, may_be_folder: bool = False) -> None:
    assert not path.startswith("/")
    end = posixpath.normpath(path)
    assert end != "..", path
    assert not end.startswith("../"), path
    assert may_be_folder or end != ".", path


@fuzz(data=mutated(corpus("manifests")), directory=mutated_text(corpus("directories")))
def test_syncing_paths(data: bytes, directory: str) -> None:
    """Whatever a notebook sends, nothing is written beside the data folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        (folder / "manifest").write_bytes(data)
        blobs = {"m": folder / "manifest"}
        with contextlib.suppress(ValueError, OSError, ProtocolError, ResourceError):  # told to the notebook
            Mirror(folder / "data", directory, blobs.get).step("m")
        assert {path.name for path in folder.iterdir()} <= {"data", "manifest"}


@fuzz(text=mutated_text(corpus("dockerfiles")))
def test_dockerfiles(text: str) -> None:
    for source in copy_add_sources(text):
        assert isinstance(source, str)
        assert source in text or re.search(r"[\\\"'`]", text), source


@fuzz(line=mutated_text(corpus("requirements")))
def test_requirements(line: str) -> None:
    """A line that is accepted is one requirement and nothing else to those who install it."""
    assert isinstance(masked(line), str)
    try:
        check_line(line)
    except RequirementError:
        return
    assert "\n" not in line
    assert not line.strip().startswith("-")
    assert re.fullmatch(r"[a-z0-9._-]+", distribution_name(line), re.IGNORECASE)
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return  # uv refuses it as well, with its own words
    assert normalised(line)
    assert distribution_name(line) == canonicalize_name(requirement.name)


@fuzz(text=mutated_text(corpus("ssh_configs")), name=mutated_text(corpus("ssh_names")))
def test_ssh_configurations(text: str, name: str) -> None:
    """A configuration is understood or refused; nothing of it is run, and no name becomes an option."""
    text = re.sub("exec", "excc", text, flags=re.IGNORECASE)  # such commands are the user's own, and are run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config"
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        try:
            target = resolve(name, [path])
        except ConfigurationError:
            return
    assert 0 < target.port < 1 << 16
    assert target.hostname
    assert not target.hostname.startswith("-")
    assert not any(jump.startswith("-") for jump in target.jumps)


@pytest.mark.parametrize("target", ["frames", "manifests", "dockerfiles", "requirements", "ssh_configs"])
def test_every_target_has_a_corpus(target: str) -> None:
    assert len(corpus(target)) >= 3
