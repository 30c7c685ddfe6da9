"""The names that people import from `fal.toolkit.compilation`.

Runs in workers; standard library only.
"""

from fal_agent.runtime.toolkit.gpu import get_gpu_type
from fal_agent.runtime.toolkit.inductor import (
    load_inductor_cache,
    sync_inductor_cache,
    synchronized_inductor_cache,
)

__all__ = ["get_gpu_type", "load_inductor_cache", "sync_inductor_cache", "synchronized_inductor_cache"]
