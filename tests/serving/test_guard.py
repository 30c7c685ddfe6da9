"""Who may use an app, by its `app_auth`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from fal_agent.serving.guard import AGENT_HEADER, Guard, GuardPolicy, digest_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

LOCAL = "http://127.0.0.1:8123"


class Inner:
    """An application that remembers what it was asked."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    @property
    def headers(self) -> dict[str, str]:
        """Of the last request."""
        return {name.decode(): value.decode() for name, value in self.scopes[-1]["headers"]}


def ask(guard: Guard, *, method: str = "POST", url: str = f"{LOCAL}/", **options: Any) -> httpx.Response:
    """One request."""

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard)) as client:
            return await client.request(method, url, **options)

    return asyncio.run(send())


def guarded(mode: str, *secrets: str) -> tuple[Guard, Inner]:
    inner = Inner()
    return Guard(inner, GuardPolicy(mode, frozenset(map(digest_of, secrets))), agent_secret="agent's"), inner


@pytest.mark.parametrize("url", [LOCAL, "http://localhost:1/", "http://[::1]:9/", "http://app.localhost/"])
def test_without_auth_whoever_comes_by_the_loopback_address_is_let_in(url: str) -> None:
    guard, _ = guarded("")

    assert ask(guard, url=url).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
    ],
)
def test_without_auth_a_page_from_elsewhere_is_refused_and_told_why(headers: dict[str, str]) -> None:
    guard, inner = guarded("")

    answer = ask(guard, headers=headers)
    assert answer.status_code == 403
    assert "app_auth" in answer.json()["detail"]
    assert inner.scopes == []


@pytest.mark.parametrize("origin", ["http://localhost:8888", "http://127.0.0.1:3000", "http://[::1]"])
def test_without_auth_a_page_of_this_machine_is_let_in(origin: str) -> None:
    guard, _ = guarded("")

    assert ask(guard, headers={"Origin": origin}).status_code == 200


ELSEWHERE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
FOLLOWED = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize(
    "headers",
    [
        ELSEWHERE,
        {**ELSEWHERE, "Referer": "https://evil.example/"},
        {**ELSEWHERE, "Referer": "https://evil.example/http://localhost/"},
        {**ELSEWHERE, "Referer": "http://localhost@evil.example/"},
        {**ELSEWHERE, "Sec-Fetch-Dest": "script"},
        {**FOLLOWED, "Sec-Fetch-Dest": "iframe"},
    ],
)
def test_without_auth_what_a_page_from_elsewhere_shows_is_refused(headers: dict[str, str]) -> None:
    """Browsers send no Origin for images, scripts and frames."""
    guard, inner = guarded("")

    answer = ask(guard, method="GET", headers=headers)
    assert answer.status_code == 403
    assert "Sec-Fetch-Site" in answer.json()["detail"]
    assert inner.scopes == []


@pytest.mark.parametrize(
    "headers",
    [
        {**ELSEWHERE, "Referer": "http://localhost:8888/lab"},  # a notebook's page that shows an image
        {**FOLLOWED, "Sec-Fetch-Dest": "iframe", "Referer": "http://localhost:8888/"},
        {**ELSEWHERE, "Sec-Fetch-Site": "same-origin"},
        {**ELSEWHERE, "Sec-Fetch-Site": "same-site"},  # of another port
        {**ELSEWHERE, "Sec-Fetch-Site": "none"},  # typed in
        FOLLOWED,  # a link: whoever follows it sees the answer, the page does not
        {**ELSEWHERE, "Origin": "http://localhost:8888"},
    ],
)
def test_without_auth_what_a_page_of_this_machine_shows_is_let_in(headers: dict[str, str]) -> None:
    guard, _ = guarded("")

    assert ask(guard, method="GET", headers=headers).status_code == 200


def test_a_key_is_wanted_and_not_passed_on() -> None:
    guard, inner = guarded("private", "me:secret")

    assert ask(guard).status_code == 401
    assert ask(guard).headers["www-authenticate"] == "Key"
    for wrong in ("Key me:other", "Bearer me:secret", "Key ", "Key me:secret2"):
        assert ask(guard, headers={"Authorization": wrong}).status_code == 401, wrong
    assert inner.scopes == []
    assert ask(guard, headers={"Authorization": "key me:secret"}).status_code == 200
    assert "authorization" not in inner.headers


def test_a_token_is_taken_from_the_link_and_then_from_the_cookie() -> None:
    guard, inner = guarded("shared", "the token")

    assert ask(guard).status_code == 401
    assert ask(guard, url=f"{LOCAL}/?token=wrong").status_code == 401
    answer = ask(guard, url=f"{LOCAL}/x?a=1&token=the%20token&b=2")
    assert answer.status_code == 200
    assert inner.scopes[-1]["query_string"] == b"a=1&b=2"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert ask(guard, headers={"Cookie": cookie.partition(";")[0]}).status_code == 200
    assert ask(guard, headers={"x-fal-token": "the token"}).status_code == 200
    assert "x-fal-token" not in inner.headers


def test_everybody_is_let_in_to_a_public_app() -> None:
    guard, _ = guarded("public")

    assert ask(guard, headers={"Host": "any.example", "Origin": "https://any.example"}).status_code == 200


@pytest.mark.parametrize("mode", ["", "private", "shared"])
def test_the_agent_always_passes_and_its_secret_goes_no_further(mode: str) -> None:
    guard, inner = guarded(mode, "x:y")

    headers = {AGENT_HEADER: "agent's", "Host": "elsewhere"}
    assert ask(guard, headers=headers).status_code == 200
    assert AGENT_HEADER not in inner.headers
    assert ask(guard, headers={**headers, AGENT_HEADER: "nobody's"}).status_code in (401, 403)


def test_a_policy_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no mode"):
        GuardPolicy("secret")
    with pytest.raises(ValueError, match="nobody could use"):
        GuardPolicy("private")
    with pytest.raises(ValueError, match="SHA-256"):
        GuardPolicy("private", frozenset(["me:secret"]))
