"""Ports of this machine that lead to apps on hosts."""

from fal_notebook.forwarding.forwarder import Forwarder

__all__ = ["Forwarder"]
