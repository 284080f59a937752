"""Where arrays live: a path or an fsspec URL opened as a Zarr v3 group.

Plain paths and ``file://`` URLs go to Zarr's own local store, every other ``scheme://`` to fsspec
(``memory://``, ``s3://``, ``webhdfs://`` ...). Errors: `DatasetNotFound` when nothing is at the
address, `DatasetError` when something else is there, `MissingDependency` when the scheme needs a
package that is not installed, `SettingError` for an unknown scheme.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any, Literal

import zarr
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from ..errors import DatasetError, DatasetNotFound, MissingDependency, SettingError

Url = str | os.PathLike[str]
Mode = Literal["r", "w"]
EVERYWHERE = "*"  # in the place of a host's name: all reach it alike, as far as the store says


def full_url(url: Url) -> str:
    """The address in a form that means the same in every process: local paths become absolute."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return text if "://" in text or "::" in text else os.path.abspath(text)


def open_group(url: Url, mode: Mode = "r") -> zarr.Group:
    """The Zarr v3 group at ``url``. Mode "r" needs it to be there; "w" replaces all that is there."""
    url = full_url(url)
    if mode == "w":
        return zarr.open_group(_store(url, read_only=False), mode="w", zarr_format=3)
    if is_vacant(url):
        raise DatasetNotFound(
            f"{url}: there is nothing at this address. Check it, or write a dataset with rapydli_flow.data.ingest."
        )
    try:
        return zarr.open_group(_store(url, read_only=True), mode="r", zarr_format=3)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{url}: this is not a Zarr v3 group ({error}). Write one with rapydli_flow.data.ingest."
        ) from error


def is_vacant(url: Url) -> bool:
    """Is nothing stored at ``url``: no file, no directory, or an empty directory?"""
    url = full_url(url)
    if _is_local(url):
        if os.path.isdir(url):
            return not os.listdir(url)
        return not os.path.exists(url)
    return bool(sync(_store(url, read_only=True).is_empty("")))


def where(url: Url) -> tuple[str, ...]:
    """The hosts that have what is stored at ``url``, as this process sees it; none where there is nothing.

    A path is on this host, whether it is a disk or mounted: others must be asked there. Other stores do not say.
    """
    url = full_url(url)
    if not _is_local(url):
        return (EVERYWHERE,)
    return () if is_vacant(url) else (socket.gethostname(),)


def chunk_exists(array: zarr.Array, key: str) -> bool:
    """Is the chunk ``key`` of this array stored? Zarr itself reads a missing one as the fill value."""
    return bool(sync((array.store_path / key).exists()))


def replace_attributes(group: zarr.Group, name: str, values: Mapping[str, Any]) -> None:
    """Set one attribute of a group, by one write of its metadata."""
    group.update_attributes({name: dict(values)})


def _is_local(url: str) -> bool:
    return "://" not in url and "::" not in url


def _store(url: str, *, read_only: bool) -> Any:
    if _is_local(url):
        if os.path.isfile(url):
            raise DatasetError(f"{url}: this is a file, and a dataset is a directory. Choose another path.")
        return LocalStore(url, read_only=read_only)
    try:
        return FsspecStore.from_url(url, read_only=read_only)
    except ImportError as error:
        raise MissingDependency(f"{url}: {error}. fsspec needs this package for such URLs: install it.") from error
    except ValueError as error:
        raise SettingError(f"{url}: {error}. Use a path, or a URL whose scheme fsspec knows.") from error
