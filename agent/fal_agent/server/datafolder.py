"""The folder that `/data` means on this host: what a notebook keeps there with `sync_dir`.

Runs in the agent, in threads. Contents come as blobs, which are used up here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fal_agent.errors import ResourceError
from fal_agent.mirror.folder import Mirror
from fal_agent.mirror.manifests import piece_blob

if TYPE_CHECKING:
    from pathlib import Path

    from fal_agent.server.blobs import BlobStore

__all__ = ["DataFolder"]


class DataFolder:
    """The data root of a host.

    Args:
        root: where it is.
        blobs: where contents arrive.
    """

    def __init__(self, root: Path, blobs: BlobStore) -> None:
        self.root, self._blobs = root, blobs

    def step(self, directory: str, manifest: str, force: bool = False) -> dict[str, Any]:
        """Go on making a folder hold what a manifest says; see `fal_agent.mirror.folder.Mirror.step`.

        Returns:
            What the mirror does; or, where it refuses or a piece came and could not be kept, "state" is
            "refused", with "message", and "kind": "value" if the request is wrong, else "resources".
        """
        try:
            return self._step(directory, manifest, force)
        except ResourceError as error:
            return {"state": "refused", "kind": "resources", "message": str(error)}
        except ValueError as error:
            return {"state": "refused", "kind": "value", "message": str(error)}

    def _step(self, directory: str, manifest: str, force: bool) -> dict[str, Any]:
        answer = Mirror(self.root, directory, self._blobs.path).step(manifest, force=force)
        if answer["state"] == "missing":
            self._raise_refusal([piece_blob(piece) for piece in answer["pieces"]])
        elif answer["state"] == "manifest":
            self._raise_refusal([manifest])
        elif answer["state"] in ("done", "same"):
            self._blobs.remove([manifest])
        return answer

    def _raise_refusal(self, names: list[str]) -> None:
        reasons = self._blobs.take_refusals(names)
        if reasons:
            raise ResourceError(f"{reasons[0]}. What has arrived stays: a second try sends the rest")
