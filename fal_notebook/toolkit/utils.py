"""The names that people import from `fal.toolkit.utils`.

Runs in workers; standard library only.
"""

from fal_agent.errors import DownloadError
from fal_agent.runtime.toolkit.downloads import download_file, download_model_weights
from fal_agent.runtime.toolkit.repositories import clone_repository

__all__ = ["DownloadError", "clone_repository", "download_file", "download_model_weights"]
