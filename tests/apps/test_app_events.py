"""Streamed answers, cut anywhere, as events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_notebook.app_events import decoded

SENT = (
    ': a comment\r\nevent: progress\r\nid: 1\r\ndata: {"step": 1}\r\n\r\n'
    "data: plain wörds\n\n"
    'data: {"a":\rdata: 2}\r\r'
    "data:no blank\n\n"
    "retry: 10\n\n"
    'data: "line\u2028inside\x85"\n\n'
    "data\n\n"
    "data: not finished"
).encode()
GOT: list[Any] = [{"step": 1}, "plain wörds", {"a": 2}, "no blank", "line\u2028inside\x85", ""]


@pytest.mark.parametrize("cut", range(len(SENT) + 1))
def test_server_sent_events_survive_any_cut(cut: int) -> None:
    """A cut may be inside a character, between a return and its line feed, or anywhere else."""
    pieces = [SENT[:cut], SENT[cut:]]

    assert list(decoded("text/event-stream; charset=utf-8", pieces)) == GOT


def test_server_sent_events_survive_being_cut_everywhere() -> None:
    assert list(decoded("text/event-stream", [SENT[at : at + 1] for at in range(len(SENT))])) == GOT


def test_an_event_is_given_before_the_next_is_there() -> None:
    def pieces() -> Any:
        yield b"data: 1\n\n"
        pytest.fail("it was not given yet")

    assert next(decoded("text/event-stream", pieces())) == 1


@given(st.lists(st.dictionaries(st.text(), st.text())), st.lists(st.integers(1, 20)))
def test_lines_of_json_survive_any_cuts(values: list[Any], sizes: list[int]) -> None:
    content = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    pieces = []
    for size in sizes:
        pieces.append(content[:size])
        content = content[size:]

    assert list(decoded("application/x-ndjson", [*pieces, content])) == values


def test_lines_of_json_need_no_end_of_the_last_line() -> None:
    assert list(decoded("application/jsonl", [b'{"a": 1}\n\n[2', b"]"])) == [{"a": 1}, [2]]


def test_a_json_answer_is_one_event() -> None:
    assert list(decoded("application/json", [b'{"a":', b" 1}"])) == [{"a": 1}]
    assert list(decoded("application/problem+json", [b"[]"])) == [[]]


def test_what_should_be_json_and_is_not_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        list(decoded("application/json", [b"{"]))


def test_text_comes_as_it_arrives_with_whole_characters() -> None:
    euro = "€".encode()

    assert list(decoded("text/plain", [b"a\n", euro[:1], euro[1:], b"b"])) == ["a\n", "€", "b"]
    assert list(decoded("text/plain", [euro[:1]])) == ["\ufffd"]


def test_an_answer_without_a_type_is_text_as_long_as_it_is() -> None:
    euro = "€".encode()

    assert list(decoded("", [b"a", euro[:2], euro[2:]])) == ["a", "€"]
    assert list(decoded("", [b"a", b"\xff\xfe", b"b"])) == ["a", b"\xff\xfe", b"b"]
    assert list(decoded("", [euro[:2]])) == [euro[:2]]


def test_anything_else_comes_as_bytes() -> None:
    assert list(decoded("image/png", [b"\x89PNG", b"..."])) == [b"\x89PNG", b"..."]
