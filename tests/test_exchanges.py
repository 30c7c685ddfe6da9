"""What passes on a connection is followed, so that its sudden end is told for what it is."""

from __future__ import annotations

import itertools

import pytest

from fal_notebook.forwarding.exchanges import KEPT, Ending, Exchanges

GET = b"GET /a HTTP/1.1\r\nHost: app\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 4\r\n\r\nbody"
CHUNKED = POST.partition(b"\r\n")[0] + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED += b"4\r\nbody\r\na;x=y\r\n0123456789\r\n0\r\nT: r\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
STREAMED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
FRAME = b"\x82\x04data"
LONG_FRAME = b"\x82\x7e\x01\x00" + bytes(256)


def cuts(data: bytes) -> list[list[bytes]]:
    """Give the data as it may come: in two pieces, at any place; and byte by byte."""
    halves = [[data[:at], data[at:]] for at in range(1, len(data))]
    return [[data], *halves, [bytes([byte]) for byte in data]]


def ending(exchanges: Exchanges, *, is_broken: bool = False) -> Ending:
    return exchanges.ending(is_broken=is_broken)


@pytest.mark.parametrize("request_", [GET, POST, CHUNKED])
@pytest.mark.parametrize("answer", [OK, STREAMED, EMPTY, CONTINUE + OK])
def test_a_connection_is_idle_after_an_answer_however_it_is_cut(request_: bytes, answer: bytes) -> None:
    for asked, answered in itertools.product(cuts(request_)[::7], cuts(answer)):
        exchanges = Exchanges()
        for _ in range(2):
            for piece in asked:
                exchanges.ask(piece)
            assert ending(exchanges) is Ending.UNANSWERED
            assert not exchanges.awaits_request
            for piece in answered[:-1]:
                exchanges.answer(piece)
                assert ending(exchanges) is Ending.CUT
            exchanges.answer(answered[-1])
            assert ending(exchanges) is Ending.IDLE


@pytest.mark.parametrize("request_", [GET, POST, CHUNKED])
def test_a_request_is_kept_until_its_answer_begins(request_: bytes) -> None:
    for asked in cuts(request_):
        exchanges = Exchanges()
        for number, piece in enumerate(asked, 1):
            exchanges.ask(piece)
            assert exchanges.kept == b"".join(asked[:number])
            assert exchanges.awaits_request == (number < len(asked))

        assert exchanges.again()
        exchanges.answer(OK[:1])
        assert not exchanges.again()


def test_a_request_is_sent_again_twice_at_most() -> None:
    exchanges = Exchanges()
    for _ in range(2):
        exchanges.ask(GET)
        assert [exchanges.again() for _ in range(3)] == [True, True, False]
        exchanges.answer(OK)


def test_a_large_request_is_not_kept() -> None:
    exchanges = Exchanges()
    exchanges.ask(b"POST / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n")
    exchanges.ask(bytes(KEPT))

    assert not exchanges.again()
    assert exchanges.kept == b""
    assert ending(exchanges) is Ending.UNANSWERED


def test_an_answer_to_head_has_no_body() -> None:
    exchanges = Exchanges()
    exchanges.ask(GET.replace(b"GET", b"HEAD"))
    exchanges.answer(OK[:-2])

    assert ending(exchanges) is Ending.IDLE


@pytest.mark.parametrize("is_broken", [False, True])
def test_an_answer_without_a_length_ends_with_the_connection(is_broken: bool) -> None:
    exchanges = Exchanges()
    exchanges.ask(GET)
    exchanges.answer(b"HTTP/1.1 200 OK\r\n\r\nas long as")

    assert ending(exchanges, is_broken=is_broken) is (Ending.CUT if is_broken else Ending.WHOLE)


@pytest.mark.parametrize(
    "answer", [OK.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), OK.replace(b"1.1", b"1.0")]
)
def test_the_last_answer_of_a_connection_is_whole(answer: bytes) -> None:
    exchanges = Exchanges()
    exchanges.ask(GET)
    exchanges.answer(answer)

    assert ending(exchanges) is Ending.WHOLE


def test_a_websocket_session_can_be_told_farewell_between_frames_alone() -> None:
    for answered in cuts(SWITCHED + FRAME + LONG_FRAME):
        exchanges = Exchanges()
        exchanges.ask(UPGRADE)
        for piece in answered:
            exchanges.answer(piece)
        assert ending(exchanges) is Ending.SESSION_CUT
        exchanges.ask(b"whatever a client sends in its frames")
        exchanges.answer(FRAME[:3])
        assert ending(exchanges) is Ending.CUT
        exchanges.answer(FRAME[3:] + b"\x88\x02\x03\xe8")
        assert ending(exchanges) is Ending.WHOLE


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ([b"\x16\x03\x01 a TLS client"], []),
        ([b"GET /\r\n"], []),
        ([GET + GET], []),
        ([GET, GET], []),
        ([POST + b"more"], []),
        ([POST.replace(b"4", b"four")], []),
        ([CHUNKED.replace(b"4\r\n", b"x4\r\n")], []),
        ([GET.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: gzip\r\n\r\n")], []),
        ([b"GET /" + bytes(100_000)], []),
        ([GET], [b"220 not HTTP\r\n"]),
        ([GET], [OK, OK]),
        ([GET], [OK + b"more"]),
        ([GET], [OK.replace(b"200", b"2xx")]),
        ([POST[:-1]], [OK]),
        ([], [OK]),
    ],
)
def test_what_is_not_plain_http_is_not_followed(asked: list[bytes], answered: list[bytes]) -> None:
    exchanges = Exchanges()
    for piece in asked:
        exchanges.ask(piece)
    for piece in answered:
        exchanges.answer(piece)

    exchanges.ask(b"GET / HTTP/1.1\r\n\r\n")
    assert ending(exchanges) is Ending.UNKNOWN
    assert not any((exchanges.is_idle, exchanges.awaits_request, exchanges.again()))
