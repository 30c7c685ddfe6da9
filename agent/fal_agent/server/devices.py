"""Lend GPUs without holding up the agent: asking the driver takes a moment.

Runs in the agent, on its event loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.server.gpus import GpuLender

__all__ = ["Devices"]


class Devices:
    """The machine's GPUs, lent one request at a time.

    Attributes:
        reason: why the last request that was refused got nothing.
    """

    def __init__(self, lender: GpuLender) -> None:
        self._lender = lender
        self._turn = asyncio.Lock()
        self.reason = ""

    async def lend(self, count: int, model: Optional[str], own_pids: Sequence[int]) -> Optional[list[int]]:
        """Give `count` free devices whose name contains `model`, or None when that many are not free.

        Args:
            count: devices.
            model: part of the name, or None for any.
            own_pids: processes whose use of a device does not make it somebody else's.
        """
        async with self._turn:
            loop = asyncio.get_running_loop()
            lent = await loop.run_in_executor(None, self._lender.lend, count, model, list(own_pids))
            self.reason = "" if lent is not None else self._lender.reason
            return lent

    def release(self, devices: Sequence[int]) -> None:
        """Take devices back."""
        self._lender.release(devices)
