"""How many runners an app is to have.

Runs in the agent. Counting only: nothing is started here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fal_agent.wire import Scaling

__all__ = ["most_runners", "wanted_runners"]


def most_runners(scaling: Scaling) -> int:
    """The most runners of an app.

    `max_concurrency` if it is given. Without it, what `min_concurrency` and the buffers ask for, and at least
    one: on a machine of one's own, a second copy of a model is there only for who asks for it.
    """
    if scaling.max_concurrency is not None:
        return scaling.max_concurrency
    spare = scaling.concurrency_buffer + math.ceil(scaling.concurrency_buffer_perc / 100)
    return max(1, scaling.min_concurrency) + spare


def wanted_runners(scaling: Scaling, load: int) -> int:
    """The runners that an app should have now.

    As many as `load` requests, in flight or waiting, fill, and the spare ones: `concurrency_buffer` or
    `concurrency_buffer_perc` percent of the load, whichever is more. At least `min_concurrency`, at most
    `most_runners`.
    """
    needed = math.ceil(load / max(1, scaling.max_multiplexing))
    spare = max(scaling.concurrency_buffer, math.ceil(load * scaling.concurrency_buffer_perc / 100))
    return min(max(scaling.min_concurrency, needed + spare), most_runners(scaling))
