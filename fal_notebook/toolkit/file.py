"""The names that people import from `fal.toolkit.file`.

Runs in workers; needs pydantic.
"""

from fal_agent.runtime.toolkit.file import Audio, CompressedFile, File, Video

__all__ = ["Audio", "CompressedFile", "File", "Video"]
