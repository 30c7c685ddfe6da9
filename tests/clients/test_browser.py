"""Web pages in a real browser talk to a spawned app, as far as they may."""

from __future__ import annotations

import functools
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.browser import Browser, PageError
from support.client_app import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FOREIGN = "evil.example"  # which the browser takes for this machine, so that it can get there
POST = """await fetch(url, {method: 'POST', headers: {'Content-Type': 'application/json'}, body})
    .then(answer => answer.json())"""
STREAM = """await fetch(`${url}/drip?gate=${gate}`, {method: 'POST'}).then(async answer => {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader(), pieces = [];
    for (let piece; !(piece = await reader.read()).done;) {
        if (!pieces.length) await fetch(`${url}/open?gate=${gate}`, {method: 'POST'});
        pieces.push(piece.value);
    }
    return pieces;
})"""
ECHO = """await new Promise((done, fail) => {
    const socket = new WebSocket(url), answers = [];
    socket.binaryType = 'arraybuffer';
    socket.onerror = () => fail(new Error('refused'));
    socket.onopen = () => { socket.send('text'); socket.send(new Uint8Array([0, 255])); };
    socket.onmessage = ({data}) => {
        answers.push(typeof data == 'string' ? data : [...new Uint8Array(data)]);
        if (answers.length == 2) { socket.close(); done(answers); }
    };
})"""
SHOW = """await new Promise((done, fail) => {
    const element = document.createElement(tag);
    if (tag == 'img') element.referrerPolicy = policy;
    element.onload = () => done([element.naturalWidth, element.naturalHeight]);
    element.onerror = () => fail(new Error('not shown'));
    element.src = url;
    document.body.append(element);
})"""
BLIND = "await fetch(url, {method: 'POST', mode: 'no-cors', body: 'x', credentials: 'include'}), true"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


class Page(BaseHTTPRequestHandler):
    """An empty page at every address, under every name."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def site() -> Iterator[Callable[[str], str]]:
    """A web server on this machine; gives its address under the name that is asked for."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.05))
        thread.start()
        yield lambda name: f"http://{name}:{server.server_port}/"
        server.shutdown()
        thread.join()


def websocket(app: Any) -> str:
    url: str = app.url.replace("http", "ws", 1)
    return f"{url}/ws"


def marks(app: Any) -> list[str]:
    """Who came in so far."""
    answer: list[str] = http.post(f"{app.url}/marks").json()
    return answer


def uses_everything(tab: Any, app: Any, gate: str) -> None:
    """What a page can do that is let in."""
    assert tab.run(POST, url=app.url, body='{"name": "page"}') == {"text": "hello page"}
    assert tab.run(POST, url=f"{app.url}/repeat", body='{"text": "ab", "times": 2}') == {"text": "abab"}
    assert tab.run(STREAM, url=app.url, gate=gate) == ['data: "first"\n\n', 'data: "second"\n\n']
    assert tab.run(ECHO, url=websocket(app)) == ["text", [0, 255]]
    picture = tab.run(POST, url=f"{app.url}/picture", body="{}")
    assert tab.run(SHOW, url=picture["url"], tag="img", policy="") == [64, 48]


def test_a_page_of_the_app_uses_it(app: Any, browser: Browser, site: Callable[[str], str], gate: str) -> None:
    """An endpoint answers a form with a page, whose scripts use the other endpoints."""
    tab = browser.open(site("localhost"))
    tab.submit(f"{app.url}/page")

    assert tab.run("location.origin") == app.url
    assert tab.text == "loaded"
    uses_everything(tab, app, gate)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_page_of_this_machine_uses_it(
    app: Any, browser: Browser, site: Callable[[str], str], gate: str, name: str
) -> None:
    """As a notebook's page is one, from another port and, for the browser, from another site."""
    uses_everything(browser.open(site(name)), app, gate)


def test_the_documentation_of_an_app_can_be_opened(app: Any, browser: Browser) -> None:
    tab = browser.open(f"{app.url}/health")
    assert tab.text == '{"version":"unknown"}'

    tab.go(app.link)
    assert tab.run("document.title").startswith("talks-")


def test_a_page_from_elsewhere_cannot_reach_it(
    app: Any, browser: Browser, site: Callable[[str], str]
) -> None:
    """Not even blindly, by what browsers send without asking first."""
    picture = http.post(f"{app.url}/picture").json()["url"]
    tab = browser.open(site(FOREIGN))
    before = marks(app)

    with pytest.raises(PageError, match="Failed to fetch"):
        tab.run(POST, url=f"{app.url}/mark?by=post", body="{}")
    with pytest.raises(PageError, match="refused"):
        tab.run(ECHO, url=websocket(app))
    for policy in ("", "no-referrer"):
        with pytest.raises(PageError, match="not shown"):
            tab.run(SHOW, url=picture, tag="img", policy=policy)
    with pytest.raises(PageError, match="not shown"):
        tab.run(SHOW, url=f"{app.url}/openapi.json", tag="script", policy="")
    assert tab.run(BLIND, url=f"{app.url}/mark?by=fetch")
    tab.submit(f"{app.url}/mark?by=form", name="page")

    assert "comes from a page elsewhere" in tab.text
    assert marks(app) == before


def test_a_page_from_elsewhere_cannot_frame_it(
    app: Any, browser: Browser, site: Callable[[str], str]
) -> None:
    tab = browser.open(site(FOREIGN))
    tab.run(SHOW, url=f"{app.url}/health?framed", tag="iframe", policy="")
    framed = [one for one in browser.command("Target.getTargets")["targetInfos"] if "framed" in one["url"]]

    assert framed
    frame = browser.tab(framed[0]["targetId"])
    assert "a page elsewhere asks for it" in frame.text


def test_a_name_that_is_made_to_mean_this_machine_reaches_nothing(app: Any, browser: Browser) -> None:
    """For the browser such a page is the app's own, and may read what it answers."""
    port = app.url.rpartition(":")[2]
    tab = browser.open(f"http://{FOREIGN}:{port}/health")
    assert f"the Host header ({FOREIGN}:{port})" in tab.text
    before = marks(app)

    answer = tab.run(POST, url="/mark?by=rebinding", body="{}")
    assert f"the Host header ({FOREIGN}:{port})" in answer["detail"]
    with pytest.raises(PageError, match="refused"):
        tab.run(ECHO, url=f"ws://{FOREIGN}:{port}/ws")
    assert marks(app) == before


def test_a_page_from_elsewhere_uses_a_public_app(
    public_app: Any, browser: Browser, site: Callable[[str], str], gate: str
) -> None:
    uses_everything(browser.open(site(FOREIGN)), public_app, gate)
