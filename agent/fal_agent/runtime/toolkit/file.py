"""`fal.toolkit.File` and its kinds: what an app takes in and gives back as a URL.

Runs wherever user code runs; needs pydantic. A file from outside is only ever a http, https or data URL, or
one of this host's own store: no URL opens another file of the host.
"""

from __future__ import annotations

import base64
import binascii
import io
import mimetypes
import os
import tempfile
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Optional, Union, cast
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from fal_agent.errors import FileTooLargeError
from fal_agent.runtime.toolkit.archives import UNPACKED_LIMIT, unpack
from fal_agent.runtime.toolkit.fetching import opened
from fal_agent.runtime.toolkit.files import (
    content_type_of,
    copied,
    data_uri,
    kept_at,
    safe_name,
    url_for,
    written_whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

__all__ = ["DEFAULT_REPOSITORY", "SIZE_LIMIT", "Audio", "CompressedFile", "File", "Video"]

DEFAULT_REPOSITORY = "fal"
IN_MEMORY = "in_memory"
SIZE_LIMIT = 4 << 30  # bytes of a file that is fetched

_OURS = (DEFAULT_REPOSITORY, "fal_v2", "fal_v3", "cdn")  # the platform's names; each is this host's store
_SCHEMES = ("http", "https", "data")


class File(BaseModel):
    """A file by its URL. Where a request holds a plain string for it, that is the URL."""

    url: str = Field(description="The URL where the file can be downloaded from.")
    content_type: Optional[str] = Field(default=None, description="The mime type of the file.")
    file_name: Optional[str] = Field(default=None, description="The name of the file.")
    file_size: Optional[int] = Field(default=None, description="The size of the file in bytes.")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        header = value[5:].partition(",")[0] if value[:5].lower() == "data:" else None
        return {"url": value} if header is None else {"url": value, "content_type": _data_type(header)}

    @field_validator("url")
    @classmethod
    def _of_a_known_kind(cls, url: str) -> str:
        scheme = urlsplit(url[:100]).scheme.lower()
        if scheme not in _SCHEMES and kept_at(url) is None:
            raise ValueError("the URL of a file must be http, https or data")
        return url

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        content_type: Optional[str] = None,
        file_name: Optional[str] = None,
        repository: str = DEFAULT_REPOSITORY,
        **more: Any,
    ) -> Self:
        """Make a file of bytes, with a URL by which others get them.

        Args:
            data: the content.
            content_type: its mime type; default: by the name, else "application/octet-stream".
            file_name: its name; default: one that is not guessed.
            repository: "in_memory": a data: URL, which holds the content. Every other name of the fal
                platform's repositories means the store of this host; its URL is that of the app's server,
                and without a server a data: URL up to 8 MiB, else one of use on this host alone.
            more: other fields of the class.

        Raises:
            ValueError: the repository is unknown.
            OSError: there is no room, or the store cannot be written.
        """
        return cls._made(
            io.BytesIO(data), len(data), content_type, file_name, repository=repository, more=more
        )

    @classmethod
    def from_path(
        cls,
        path: Union[str, os.PathLike[str]],
        content_type: Optional[str] = None,
        repository: str = DEFAULT_REPOSITORY,
        **more: Any,
    ) -> Self:
        """Make a file of a file on this host's disk, with a URL by which others get it; see `from_bytes`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        source = Path(path)
        with source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return cls._made(file, size, content_type, source.name, repository=repository, more=more)

    @classmethod
    def _made(
        cls,
        source: BinaryIO,
        size: int,
        content_type: Optional[str],
        file_name: Optional[str],
        *,
        repository: str,
        more: dict[str, Any],
    ) -> Self:
        if repository not in (*_OURS, IN_MEMORY):
            raise ValueError(
                f"unknown repository {repository!r}; use {DEFAULT_REPOSITORY!r} or {IN_MEMORY!r}"
            )
        kind = content_type or content_type_of(file_name or "")
        name = (
            safe_name(file_name)
            if file_name
            else uuid.uuid4().hex + (mimetypes.guess_extension(kind) or ".bin")
        )
        in_memory = repository == IN_MEMORY
        url = data_uri(source.read(), kind) if in_memory else url_for(source, size, name, kind)
        return cls(url=url, content_type=kind, file_name=name, file_size=size, **more)

    def as_bytes(self) -> bytes:
        """Give the content, fetched if need be.

        Raises:
            DownloadError: it cannot be fetched.
            FileTooLargeError: it is larger than 4 GiB.
            ValueError: the data: URL is malformed.
        """
        with self._opened() as source:
            target = io.BytesIO()
            self._copy(source, target)
            return target.getvalue()

    def save(self, path: Union[str, os.PathLike[str]], overwrite: bool = False) -> Path:
        """Write the content to a file, which appears whole or not at all; gives its path.

        Args:
            path: the file.
            overwrite: replace what is there.

        Raises:
            FileExistsError: the file exists.
            DownloadError, FileTooLargeError, ValueError: as `as_bytes`.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists; pass overwrite=True to replace it")
        with self._opened() as source:
            written_whole(target, lambda file: self._copy(source, file), overwrite=overwrite)
        return target

    def _copy(self, source: BinaryIO, target: BinaryIO) -> None:
        copied(
            source,
            target,
            limit=SIZE_LIMIT,
            too_large=lambda: FileTooLargeError(f"{self.url[:200]} is larger than {SIZE_LIMIT} bytes"),
        )

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        kept = kept_at(self.url)
        if kept is not None:
            with kept.open("rb") as file:
                yield file
        elif self.url[:5].lower() == "data:":
            yield io.BytesIO(_data(self.url))
        else:
            with opened(self.url) as answer:
                yield cast("BinaryIO", answer)  # of which only `read` is wanted


class Video(File):
    """A video by its URL."""


class Audio(File):
    """A piece of sound by its URL."""


class CompressedFile(File):
    """An archive (zip or tar) by its URL. Iterating it gives the paths of the files in it, unpacked.

    They lie in a folder of this object that goes when the object goes. Links in the archive are left
    out; one that would write elsewhere, or unpacks to more than 4 GiB, is refused.
    """

    _folder: Optional[tempfile.TemporaryDirectory[str]] = PrivateAttr(default=None)
    _files: Optional[list[Path]] = PrivateAttr(default=None)

    def __iter__(self) -> Iterator[Path]:  # type: ignore[override] # of its files, not of its fields
        return iter(self._unpacked())

    def __getstate__(self) -> dict[Any, Any]:
        """What is unpacked here stays here."""
        return {**super().__getstate__(), "__pydantic_private__": {"_folder": None, "_files": None}}

    def glob(self, pattern: str) -> Iterator[Path]:
        """Give the paths of the files that match a pattern, such as "**/*.txt".

        Raises:
            DownloadError, FileTooLargeError, ValueError: it cannot be fetched or unpacked.
        """
        files = self._unpacked()
        folder = Path(cast("tempfile.TemporaryDirectory[str]", self._folder).name) / "files"
        matching = set(folder.glob(pattern))
        return (path for path in files if path in matching)

    def _unpacked(self) -> list[Path]:
        if self._files is None:
            folder = tempfile.TemporaryDirectory(prefix="fal-archive-")
            try:
                archive = self.save(Path(folder.name) / "archive")
                target = Path(folder.name) / "files"
                target.mkdir()
                self._files = unpack(archive, target, limit=UNPACKED_LIMIT)
                archive.unlink()
            except BaseException:
                folder.cleanup()
                raise
            self._folder = folder
        return self._files


def _data_type(header: str) -> str:
    kind = header.removesuffix(";base64").strip()
    return unquote(kind) or "text/plain"


def _data(url: str) -> bytes:
    header, comma, text = url[5:].partition(",")
    if not comma:
        raise ValueError("the data: URL has no ',' before its data")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(text)
    try:
        return base64.b64decode(unquote(text), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data: URL is not valid base64: {error}") from error
