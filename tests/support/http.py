"""Requests to apps on this machine: `httpx`, but without reading certificates for each request."""

from __future__ import annotations

import functools

import httpx

__all__ = ["get", "post", "stream"]

get = functools.partial(httpx.get, verify=False)
post = functools.partial(httpx.post, verify=False)
stream = functools.partial(httpx.stream, verify=False)
