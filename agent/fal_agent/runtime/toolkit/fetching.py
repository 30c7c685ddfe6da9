"""Open what a http or https URL stands for.

Runs wherever user code runs; standard library only. Nothing but http and https is ever opened, also after
redirects; each step waits at most a minute; and headers that hold a secret do not follow to another host.
"""

from __future__ import annotations

import http.client
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from fal_agent.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Response", "opened"]

TIMEOUT = 60.0  # seconds for a connection, and for each piece of an answer

_SECRET_HEADERS = ("authorization", "cookie", "proxy-authorization")
_BROKEN = (URLError, OSError, http.client.HTTPException, ValueError)


class Response:
    """An answer whose body is read in pieces.

    Attributes:
        headers: of the answer.
        length: bytes of the body, if the server says.
    """

    def __init__(self, answer: Any, url: str) -> None:
        self.headers = answer.headers
        length = answer.headers.get("Content-Length", "")
        self.length: Optional[int] = int(length) if length.isascii() and length.isdigit() else None
        self._answer, self._url, self._read = answer, url, 0

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes at most; b"" at the end.

        Raises:
            DownloadError: the connection broke, or ended before all was sent.
        """
        try:
            data: bytes = self._answer.read(size if size >= 0 else None)
        except _BROKEN as error:
            raise DownloadError(
                f"{self._url}: the download broke off: {_reason(error)}; try again"
            ) from error
        self._read += len(data)
        if not data and self.length is not None and self._read < self.length:
            raise DownloadError(
                f"{self._url}: the download broke off after {self._read} of {self.length} bytes; try again"
            )
        return data


@contextmanager
def opened(url: str, headers: Optional[Mapping[str, str]] = None) -> Iterator[Response]:
    """Ask for a URL and give the answer.

    Args:
        url: http or https.
        headers: sent along; those that hold secrets only to the URL's own host.

    Raises:
        DownloadError: the URL is another kind, the server cannot be reached, or it refuses.
    """
    shown = _shown(url)
    if _scheme(url) not in ("http", "https"):
        raise DownloadError(f"{shown} cannot be downloaded: only http and https URLs can")
    sent = {"User-Agent": "fal-notebook", "Accept-Encoding": "identity", **(headers or {})}
    try:
        answer = _opener().open(urllib.request.Request(url, headers=sent), timeout=TIMEOUT)  # noqa: S310 - checked
    except HTTPError as error:
        with error:
            raise DownloadError(f"{shown}: the server answered {error.code} {error.reason}") from error
    except _BROKEN as error:
        raise DownloadError(f"{shown} cannot be reached: {_reason(error)}") from error
    with answer:
        yield Response(answer, shown)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only, and keeps secrets at home."""

    def redirect_request(  # noqa: PLR0917 - as in the class above it
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Optional[urllib.request.Request]:
        if _scheme(newurl) not in ("http", "https"):
            raise URLError(f"it redirects to {_shown(newurl)}, and only http and https can be followed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and _origin(newurl) != _origin(req.full_url):
            for name in [*request.headers]:
                if name.lower() in _SECRET_HEADERS:
                    request.remove_header(name)
        return request


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # the usual one would also open files and ftp
    for handler in (
        *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirects),
        *(urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor),
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _origin(url: str) -> tuple[str, Optional[str], Optional[int]]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _shown(url: str) -> str:
    """A URL for a message, without the password and the query, which may be a signature."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a malformed URL"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"[:300]


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(error).__name__
