"""A host that sends nonsense ends its own connection with an error, and does nothing else to the notebook."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.errors import HostUnreachableError
from fal_agent.framing import FrameDecoder
from fal_agent.wire import (
    Answer,
    BlobPart,
    Call,
    Display,
    EnvironmentSpec,
    Lane,
    Log,
    Result,
    Welcome,
    decode,
    encode,
)
from fal_notebook.hosts.base import Parcel
from fal_notebook.hosts.client import AgentClient

if TYPE_CHECKING:
    from collections.abc import Callable

WELCOME = encode(Welcome(pid=1, python="3.11.7", root="/"))


class Bomb:
    """What a pickle can do when it is opened."""

    def __reduce__(self) -> Any:
        return Path("/tmp/fal-test-bomb").touch, ()


class HostileHost:
    """Greets, and answers the first call with whatever a test wants."""

    def __init__(self, *, greeting: bytes = WELCOME, answer: Callable[[str], bytes] = lambda _: b"") -> None:
        self.ours, self._theirs = socket.socketpair()
        self._greeting, self._answer = greeting, answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        decoder = FrameDecoder()
        while data := self._theirs.recv(1 << 16):
            for frame in decoder.feed(data):
                message = decode(frame)
                if message.type == "hello":
                    self._theirs.sendall(self._greeting)
                elif message.type == "submit":
                    self._theirs.sendall(self._answer(message.run_id))

    def client(self, **options: Any) -> AgentClient:
        def nobody(_path: str) -> Any:
            raise OSError

        return AgentClient(self.ours, host_name="evil", part_size=1 << 16, dial=nobody, **options)


GREETINGS = {
    "another protocol": b"HTTP/1.1 200 OK\r\n\r\n",
    "a length of 4 GiB": b"fn" + struct.pack(">III", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    "zeros": bytes(4096),
    "a pickle": pickle.dumps(Bomb()),
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS)
def test_who_does_not_greet_as_an_agent_is_refused(greeting: bytes) -> None:
    with pytest.raises(HostUnreachableError, match="no agent of ours, or is out of order"):
        HostileHost(greeting=greeting).client()


def part(blob: str = "b", offset: int = 0, size: int = 4, data: bytes = b"data") -> bytes:
    return encode(BlobPart(blob, offset, size), [data])


ANSWERS: dict[str, Callable[[str], bytes]] = {
    "a buffer that is not there": lambda run: encode(Result(run, [7], seq=1)),
    "a negative buffer": lambda run: encode(Result(run, [-1], seq=1), [b"x"]),
    "a blob that never came": lambda run: encode(Result(run, ["b"], seq=1)),
    "a blob of which half came": lambda run: part(size=8) + encode(Result(run, ["b"], seq=1)),
    "a blob of negative size": lambda _: part(size=-1),
    "more of a blob than there is": lambda _: part(size=2),
    "a part out of order": lambda _: part(offset=4, size=8),
    "a part of a blob that never began": lambda _: part(offset=1 << 62, size=1 << 63),
    "text where a number belongs": lambda _: encode(Log("x", "stdout", seq="many")),  # type: ignore[arg-type]
    "a header of another shape": lambda _: b"fn" + bytes(300),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_call_that_is_answered_with_nonsense_fails_at_once(answer: Callable[[str], bytes]) -> None:
    client = HostileHost(answer=answer).client()
    client.on_lost = lambda *_: pytest.fail("connecting again would bring more of the same")
    received: list[Any] = []
    done = threading.Event()

    def take(event: Any) -> None:
        received.append(event)
        done.set()

    client.submit(call(), take, "run-1")

    assert done.wait(10)
    assert [item.event.type for item in received] == ["failure"]
    assert "'evil'" in received[0].event.message
    assert not client.is_open


def test_what_belongs_to_nobody_is_left_alone() -> None:
    """Events of unknown runs, answers to no question, offers of lanes for no call."""

    def answer(run: str) -> bytes:
        strays = [
            encode(Log("another run", "stdout", seq=1), [b"x"]),
            encode(Result("another run", [0], seq=1), [pickle.dumps(Bomb())]),
            encode(Answer("no question", content={"x": 1})),
            encode(Lane("lane", "/etc/passwd", {"no template": "1"})),
            encode(Display(run, "display", [0], seq=1 << 60), [b"not JSON"]),
        ]
        return b"".join(strays) + encode(Result(run, [0], seq=(1 << 60) + 1), [b"x"])

    client = HostileHost(answer=answer).client()
    received: list[Any] = []
    done = threading.Event()
    client.submit(
        call(), lambda event: (received.append(event), event.event.type == "result" and done.set()), "r"
    )

    assert done.wait(10)
    assert [item.event.type for item in received] == ["display", "result"]
    assert not Path("/tmp/fal-test-bomb").exists()
    client.close()


def test_announcing_much_takes_no_memory() -> None:
    client = HostileHost(answer=lambda _: b"".join(part(f"b{n}", size=1 << 40) for n in range(100))).client()
    client.submit(call(), lambda _: None, "run")
    time.sleep(0.2)

    assert sum(len(whole) for whole, _ in client.blobs._incoming.values()) == 400
    client.close()


def test_a_name_of_data_cannot_lead_out_of_the_folder_of_blobs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "private").write_text("mine")
    host = HostileHost(answer=lambda run: encode(Result(run, ["../private"], seq=1)))
    client = host.client(blob_folder=tmp_path / "blobs")
    received: list[Any] = []
    done = threading.Event()
    client.submit(call(), lambda event: (received.append(event), done.set()), "run")

    assert done.wait(10)
    assert received[0].event.type == "failure"


def call() -> Parcel:
    environment = EnvironmentSpec(python="3.11", layers=[])
    return Parcel(
        call=Call("function", "f", "0" * 32, environment), arguments=[0], buffers=[b"x"], blobs={},
        function_data=[b"x"],
    )  # fmt: skip
