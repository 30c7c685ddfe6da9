"""Serve the host's store of files over HTTP, for mounting at `/.fal/files` in an app.

Runs in the server of an app. It only reads, and only what the store holds under exactly the digest and name
that are asked for; everything else is not found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, PlainTextResponse
from starlette.routing import Route, Router

from fal_agent.runtime.toolkit.files import content_type_of, find_kept

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["FILES_PATH", "files_route"]

FILES_PATH = "/.fal/files"  # where an app mounts it

_HEADERS = {
    "Cache-Control": "private, max-age=31536000, immutable",  # the digest names the content
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox",  # what somebody uploaded is not to run as a page of the app
}


def files_route() -> Router:
    """Give an ASGI app that answers GET and HEAD, also of ranges, on `/<sha256>/<name>`."""
    route = Route("/{digest}/{name}", _file, methods=["GET", "HEAD"])
    return Router([route], redirect_slashes=False)


async def _file(request: Request) -> Response:
    digest, name = request.path_params["digest"], request.path_params["name"]
    path = await run_in_threadpool(find_kept, digest, name)
    if path is None:
        return PlainTextResponse("no such file", status_code=404)
    headers = {**_HEADERS, "ETag": f'"{digest}"'}
    return FileResponse(path, media_type=content_type_of(name), headers=headers)
