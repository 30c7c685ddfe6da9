"""The names that people import from `fal.toolkit.pydantic`.

Runs in workers; needs pydantic 2.
"""

from fal_agent.runtime.toolkit.model import FalBaseModel, Field, Hidden

__all__ = ["FalBaseModel", "Field", "Hidden"]
