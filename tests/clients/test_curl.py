"""curl talks to a spawned app."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

LARGE = 8 << 20  # bytes; more than all buffers on the way


@pytest.fixture(autouse=True)
def needs_curl() -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine: `make setup-system` installs it")


def command(*arguments: Any) -> list[str]:
    return ["curl", "--silent", "--show-error", "--max-time", "60", *map(str, arguments)]


def curl(*arguments: Any) -> str:
    """Give what curl prints."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_json_is_posted_as_the_manuals_show_it(app: Any) -> None:
    for body, path in (({"name": "you", "times": 2}, "/"), ({"text": "hello you", "times": 1}, "/repeat")):
        answer = curl("--json", json.dumps(body), app.url + path)
        assert json.loads(answer)["text"].startswith("hello you")


def test_a_query_needs_no_body(app: Any) -> None:
    assert json.loads(curl("--request", "POST", f"{app.url}/?name=you")) == {"text": "hello you"}


def test_what_is_wrong_is_said_with_its_status(app: Any) -> None:
    said = curl("--write-out", "\n%{http_code}", "--json", '{"times": "x"}', app.url).splitlines()

    assert said[-1] == "422"
    assert [one["loc"] for one in json.loads(said[0])["detail"]] == [["body", "name"], ["body", "times"]]


def test_a_stream_arrives_piece_by_piece(app: Any, gate: str) -> None:
    """The second piece is sent only after the first one was seen."""
    arguments = command("--no-buffer", "--request", "POST", f"{app.url}/drip?gate={gate}")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == 'data: "first"\n'
        curl("--request", "POST", f"{app.url}/open?gate={gate}")
        assert process.stdout.read() == '\ndata: "second"\n\n'
    assert process.returncode == 0


@pytest.mark.parametrize("way", ["length", "chunked"])
def test_a_large_upload_waits_to_be_let_on(app: Any, tmp_path: Path, way: str) -> None:
    """curl asks first, with `Expect: 100-continue`, and here it would wait a minute for the answer."""
    (tmp_path / "large").write_bytes(b"x" * LARGE)
    asks = ["--verbose", "--expect100-timeout", "60", "--header", "Expect: 100-continue"]
    chunked = ["--header", "Transfer-Encoding: chunked"] if way == "chunked" else []
    arguments = command(*asks, *chunked, "--data-binary", f"@{tmp_path}/large", f"{app.url}/size")

    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == {"bytes": LARGE}
    assert "< HTTP/1.1 100 Continue" in done.stderr


def test_several_requests_share_a_connection(app: Any) -> None:
    one = ["--output", "/dev/null", "--write-out", "%{http_code} %{num_connects}\n", "--request", "POST"]
    requests = [(*one, f"{app.url}/?name={number}") for number in range(3)]

    assert curl(*requests[0], "--next", *requests[1], "--next", *requests[2]).splitlines() == [
        "200 1",
        "200 0",
        "200 0",
    ]


def test_a_head_request_gets_the_head(app: Any) -> None:
    url = json.loads(curl("--request", "POST", f"{app.url}/picture"))["url"]

    for address in (f"{app.url}/health", f"{app.url}/openapi.json", url):
        head = curl("--head", address)
        assert head.startswith("HTTP/1.1 200"), address
        assert "content-length:" in head.lower()


def test_options_say_what_is_possible(app: Any) -> None:
    plain = curl("--include", "--request", "OPTIONS", app.url)
    assert plain.startswith("HTTP/1.1 405")
    assert "allow: POST" in plain

    page = ["--header", "Origin: http://localhost:8888", "--header", "Access-Control-Request-Method: POST"]
    asked = curl("--include", "--request", "OPTIONS", *page, app.url)
    assert asked.startswith("HTTP/1.1 200")
    assert "access-control-allow-origin: http://localhost:8888" in asked


def test_whoever_understands_compression_is_answered_too(app: Any) -> None:
    assert json.loads(curl("--compressed", "--json", '{"name": "you"}', app.url)) == {"text": "hello you"}


def test_part_of_an_image_can_be_asked_for(app: Any, tmp_path: Path) -> None:
    url = json.loads(curl("--request", "POST", f"{app.url}/picture?color=blue"))["url"]
    picture = tmp_path / "picture.png"

    curl("--output", picture, "--range", "0-7", url)
    assert picture.read_bytes() == b"\x89PNG\r\n\x1a\n"
    curl("--output", picture, "--continue-at", "-", url)
    assert picture.read_bytes()[-12:] == b"\x00\x00\x00\x00IEND\xaeB`\x82"


def test_http_1_0_and_other_versions_are_understood(app: Any) -> None:
    for version in ("--http1.0", "--http1.1", "--http2"):
        assert json.loads(curl(version, "--json", '{"name": "you"}', app.url)) == {"text": "hello you"}


def test_another_name_in_the_host_header_is_refused(app: Any) -> None:
    """As a web page would send it whose name was made to mean this machine."""
    port = app.url.rpartition(":")[2]
    arguments = ["--resolve", f"rebound.example:{port}:127.0.0.1", f"http://rebound.example:{port}/health"]

    said = curl("--write-out", "\n%{http_code}", *arguments).splitlines()
    assert said[-1] == "403"
    assert "rebound.example" in json.loads(said[0])["detail"]
