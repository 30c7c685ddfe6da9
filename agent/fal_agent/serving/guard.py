"""Let through to an app only who may use it, by the app's `app_auth`.

Runs in the process that serves an app, as the outermost layer. What let a request in (a key, a token, the
agent's secret) is taken out of it before the app sees it; secrets are known here by their digests alone.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional
from urllib.parse import quote, unquote, unquote_plus

from fal_agent.serving.refusals import header_values, refuse, refuse_any_origin

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["AGENT_HEADER", "IS_AGENT", "Guard", "GuardPolicy", "digest_of"]

AGENT_HEADER = "x-fal-agent"  # carries the secret by which the agent passes always
IS_AGENT = "fal.agent"  # key of the ASGI scope: whether the agent itself is asking
TOKEN_HEADER = "x-fal-token"  # noqa: S105 - a header's name
TOKEN_QUERY = "token"  # noqa: S105 - a parameter's name
TOKEN_COOKIE = "fal_token_"  # noqa: S105 - what the cookie's name begins with

_MODES = ("", "private", "shared", "public")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]*)?")
_SHOWN = 100  # characters of a header that are repeated to who sent it
_ALONE = "This app is its user's alone"
_LIFTED = (
    'Programs and pages on this machine may use it. app_auth="public" on the app lets everybody in, '
    'app_auth="private" whoever has the key.'
)


def digest_of(secret: str) -> str:
    """Give the SHA-256 of a credential's text, 64 hex digits: "id:secret" of a key, or a token."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class GuardPolicy:
    """Who may use an app.

    Attributes:
        mode: "": programs on this machine, and pages that were loaded from it; "private": who has a key;
            "shared": who has a token; "public": everybody.
        secrets: digests (`digest_of`) of the keys or tokens that are accepted; at least one where the
            mode asks for them.

    Raises:
        ValueError: there is no such mode, or the secrets are none or no digests.
    """

    mode: str = ""
    secrets: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            known = ", ".join(repr(mode) for mode in _MODES)
            raise ValueError(f"an app's guard has no mode {self.mode!r}; it is one of {known}")
        if self.mode in ("private", "shared") and not self.secrets:
            raise ValueError(f"nobody could use a {self.mode} app without secrets; give at least one digest")
        if not all(_DIGEST.fullmatch(secret) for secret in self.secrets):
            raise ValueError("an app's secrets are given as SHA-256 digests, 64 hex digits each")

    def accepts(self, secret: str) -> bool:
        """Say whether a credential is among those accepted; takes as long whichever it is."""
        given = digest_of(secret)
        return sum(hmac.compare_digest(given, known) for known in self.secrets) > 0


class Guard:
    """Refuses who may not use the application within.

    Args:
        application: what is guarded.
        policy: who may use it.
        agent_secret: whoever sends it in the header `x-fal-agent` passes always; "": nobody does.

    Attributes:
        policy: may be replaced at any time; requests that are in already stay.
    """

    def __init__(self, application: ASGIApp, policy: GuardPolicy, agent_secret: str = "") -> None:
        self.policy = policy
        self._application = application
        self._agent = digest_of(agent_secret) if agent_secret else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request or websocket on, or refuse it."""
        if scope["type"] not in {"http", "websocket"}:
            await self._application(scope, receive, send)
            return
        scope = {**scope, IS_AGENT: self._is_agent(scope)}
        scope["headers"] = _without_header(scope, AGENT_HEADER)
        policy = self.policy
        if policy.mode == "public" or scope[IS_AGENT]:
            await self._application(scope, receive, send)
        elif policy.mode == "":
            await self._if_local(scope, receive, send)
        elif _is_preflight(scope):
            await self._application(scope, receive, send)  # browsers send no credentials with it
        elif policy.mode == "private":
            await self._if_key(policy, scope, receive, send)
        else:
            await self._if_token(policy, scope, receive, send)

    def _is_agent(self, scope: Scope) -> bool:
        given = header_values(scope, AGENT_HEADER.encode())
        known = self._agent
        return known is not None and any(hmac.compare_digest(digest_of(one), known) for one in given)

    async def _if_local(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = _why_not_local(scope)
        if reason is None:
            await self._application(scope, receive, send)
        else:
            await refuse(scope, receive, send, status=403, detail=f"{reason}. {_LIFTED}")

    async def _if_key(self, policy: GuardPolicy, scope: Scope, receive: Receive, send: Send) -> None:
        for value in header_values(scope, b"authorization"):
            scheme, _, key = value.strip().partition(" ")
            if scheme.lower() == "key" and policy.accepts(key.strip()):
                scope["headers"] = _without_header(scope, "authorization")
                await self._application(scope, receive, send)
                return
        detail = (
            "This app is private: send the header `Authorization: Key <id>:<secret>` with a key it knows."
        )
        await refuse_any_origin(
            scope, receive, send, status=401, detail=detail, headers=[("WWW-Authenticate", "Key")]
        )

    async def _if_token(self, policy: GuardPolicy, scope: Scope, receive: Receive, send: Send) -> None:
        token = _take_from_query(policy, scope)
        if token is not None:
            await self._application(scope, receive, _remembering(token, scope, send))
            return
        if any(policy.accepts(value) for value in header_values(scope, TOKEN_HEADER.encode())):
            scope["headers"] = _without_header(scope, TOKEN_HEADER)
            await self._application(scope, receive, send)
            return
        if _is_same_origin(scope) and _has_cookie(policy, scope):
            scope["headers"] = _without_token_cookies(scope)
            await self._application(scope, receive, send)
            return
        detail = (
            "This app is shared with those who have its token: add ?token=<token> to the address, or send it "
            "in the header x-fal-token."
        )
        await refuse_any_origin(
            scope, receive, send, status=401, detail=detail, headers=[("WWW-Authenticate", "Token")]
        )


# ---------------------------------------------------------------- from this machine


def _why_not_local(scope: Scope) -> Optional[str]:
    """Say why a request may come from a page elsewhere; None if it cannot.

    A name elsewhere that was made to mean this machine stands in the Host header still, and browsers say
    in Origin which page sends a request that could change something. Of one that only shows something they
    say whether the page is elsewhere, and as a rule which it is.
    """
    hosts = header_values(scope, b"host")
    if len(hosts) != 1 or not _is_loopback(hosts[0]):
        return f"{_ALONE}: the Host header ({_shown(hosts)}) does not name a loopback address"
    origins = header_values(scope, b"origin")
    if not all(_is_loopback(_authority(origin)) for origin in origins):
        return f"{_ALONE}: the request comes from a page elsewhere (Origin: {_shown(origins)})"
    if not origins and _is_shown_elsewhere(scope):
        pages = _shown(header_values(scope, b"referer"))
        return f"{_ALONE}: a page elsewhere asks for it (Sec-Fetch-Site: cross-site, Referer: {pages})"
    return None


def _is_shown_elsewhere(scope: Scope) -> bool:
    """Say whether a page elsewhere asks for an image, a script, a frame or the like.

    `localhost` and `127.0.0.1` are two sites for a browser, so a notebook's page is told by its Referer.
    """
    if "cross-site" not in header_values(scope, b"sec-fetch-site"):
        return False
    if header_values(scope, b"sec-fetch-dest") == ["document"]:
        return False  # a link that somebody follows: what it leads to is shown to them, not to the page
    pages = header_values(scope, b"referer")
    return not pages or not all(_is_loopback(_authority(page)) for page in pages)


def _authority(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


@functools.lru_cache(maxsize=256)
def _is_loopback(authority: str) -> bool:
    """Say whether `host` or `host:port` is this machine by a name that nobody can point elsewhere."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        return False
    host = match["host"].lower()
    if host.startswith("["):
        return _is_address(host[1:-1]) and ipaddress.ip_address(host[1:-1]) == ipaddress.IPv6Address("::1")
    if _is_address(host):
        return ipaddress.ip_address(host).is_loopback
    name = host[:-1] if host.endswith(".") else host
    return name == "localhost" or name.endswith(".localhost")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _shown(values: list[str]) -> str:
    return ", ".join(values)[:_SHOWN] or "none"


def _is_preflight(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "OPTIONS"
        and bool(header_values(scope, b"origin"))
        and bool(header_values(scope, b"access-control-request-method"))
    )


def _is_same_origin(scope: Scope) -> bool:
    """Say whether a request comes from the app's own pages, or from no page.

    Cookies are kept by host, not by port, so pages of other servers on this machine send them too.
    """
    origins = header_values(scope, b"origin")
    hosts = [host.lower() for host in header_values(scope, b"host")]
    return all([origin.partition("://")[2].lower()] == hosts for origin in origins)


# ---------------------------------------------------------------- tokens


def _take_from_query(policy: GuardPolicy, scope: Scope) -> Optional[str]:
    """Give the accepted token that the query holds, and take it out."""
    token, kept = None, []
    for part in scope["query_string"].split(b"&"):
        name, _, value = part.decode("latin-1").partition("=")
        given = unquote_plus(value)
        if unquote_plus(name) == TOKEN_QUERY and policy.accepts(given):
            token = given
        else:
            kept.append(part)
    if token is not None:
        scope["query_string"] = b"&".join(kept)
    return token


def _remembering(token: str, scope: Scope, send: Send) -> Send:
    """Have the answer set the cookie by which a page's further requests come in."""
    name = f"{TOKEN_COOKIE}{digest_of(token)[:12]}"  # apps at other ports have cookies of other names
    value = f"{name}={quote(token, safe='')}; HttpOnly; SameSite=Strict; Path=/"
    if scope["scheme"] == "https":
        value += "; Secure"

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"set-cookie", value.encode("ascii"))]
            message = {**message, "headers": headers}
        await send(message)

    return sending


def _has_cookie(policy: GuardPolicy, scope: Scope) -> bool:
    given = []
    for header in header_values(scope, b"cookie"):
        for part in header.split(";"):
            name, _, value = part.strip().partition("=")
            if name.startswith(TOKEN_COOKIE):
                given.append(unquote(value))
    return any(policy.accepts(value) for value in given)


def _without_token_cookies(scope: Scope) -> list[tuple[bytes, bytes]]:
    headers = []
    for name, value in scope["headers"]:
        if name.lower() != b"cookie":
            headers.append((name, value))
            continue
        parts = [part for part in value.split(b";") if not part.strip().startswith(TOKEN_COOKIE.encode())]
        if parts:
            headers.append((name, b";".join(parts).strip()))
    return headers


def _without_header(scope: Scope, name: str) -> list[tuple[bytes, bytes]]:
    unwanted = name.encode()
    return [(key, value) for key, value in scope["headers"] if key.lower() != unwanted]
