"""How large the next part of a blob is: large on a quick line, small where others would have to wait.

Runs everywhere.
"""

from __future__ import annotations

__all__ = ["LARGEST", "SMALLEST", "Pace"]

SMALLEST, LARGEST = 16 << 10, 1 << 20  # bytes of one part
_QUICK, _SLOW = 0.004, 0.030  # seconds: below, the next part is made larger; above, smaller


class Pace:
    """The size of the parts of one transfer.

    Args:
        part_size: bytes of the first part.

    Attributes:
        part_size: bytes of the next part.
    """

    def __init__(self, part_size: int) -> None:
        self.part_size = min(max(part_size, SMALLEST), LARGEST)

    def took(self, seconds: float) -> None:
        """Say how long the last part took to leave."""
        if seconds < _QUICK:
            self.part_size = min(self.part_size * 2, LARGEST)
        elif seconds > _SLOW:
            self.part_size = max(self.part_size // 2, SMALLEST)
