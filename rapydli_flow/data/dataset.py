"""Dataset: records in a Zarr v3 group, addressed by where they are.

    train.zarr/             a group of splits
      train/                a group of records: arrays of equal length, records on axis 0
        x       (60000, 28, 28, 1) uint8
        label   (60000,) int64
      test/ ...

A Dataset is a small value: an address, a group inside it, and perhaps a subset of its records. It opens
the group when it is first used, in whatever process that is, and pickles as the address alone. Nothing is
kept in memory between reads; `rapydli_flow.data.Feed` has the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr

from .. import markup
from ..errors import DatasetError, DTypeError
from ..spec import Array, Spec
from .chunks import ChunkReader, checked_rows, gather
from .split import split_positions
from .store import Url, full_url, open_group, where

MARKER = "rapydli_flow"  # attribute of a group that `ingest` wrote: {"format": 1, "complete": bool}
FORMAT = 1


@dataclass(frozen=True)
class Contents:
    """What an opened group holds: readers of its arrays by field, and the names of its splits."""

    readers: dict[str, ChunkReader]
    splits: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Records at an address; see `load`. ``subset`` has sorted int64 record numbers, or None for all."""

    url: str
    path: str = ""
    subset: Array | None = None

    @property
    def address(self) -> str:
        """Address and group in one string, for messages."""
        return f"{self.url}/{self.path}" if self.path else self.url

    @cached_property
    def contents(self) -> Contents:
        """The opened group. Raises DatasetNotFound or DatasetError."""
        group = open_group(self.url)
        if self.path:
            group = _inside(group, self.path, self.url)
        return _contents(group, self.address)

    @cached_property
    def readers(self) -> dict[str, ChunkReader]:
        """A chunk reader for each field; DatasetError where this group holds splits and no records."""
        if not self.contents.readers:
            names = ", ".join(self.contents.splits)
            raise DatasetError(
                f"{self.address}: this group holds splits ({names}) and no records of its own. "
                f'Choose one: data["{self.contents.splits[0]}"].'
            )
        return self.contents.readers

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the groups inside this one."""
        return self.contents.splits

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the arrays that make up a record."""
        return tuple(self.readers)

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape (without the record axis) and dtype of one record, by field."""
        return {name: self._spec(reader) for name, reader in self.readers.items()}

    @property
    def chunk_records(self) -> int:
        """Records in a chunk of the field with the largest records."""
        return max(self.readers.values(), key=lambda reader: reader.record_bytes).chunk_records

    @property
    def records(self) -> Array:
        """int64 numbers, in the stored arrays, of this dataset's records."""
        if self.subset is not None:
            return self.subset
        return np.arange(len(self), dtype=np.int64)

    def __len__(self) -> int:
        if self.subset is not None:
            return len(self.subset)
        return next(iter(self.readers.values())).length

    def __getitem__(self, key: str | slice) -> Dataset:
        """``data["train"]`` is a split, ``data[10:20]`` a range of records."""
        if isinstance(key, slice):
            return self.take(np.arange(len(self))[key])
        if not isinstance(key, str):
            raise DatasetError(f"data[{key!r}]: use data.read([{key!r}]) for records, data[lo:hi] for a part.")
        if key in self.contents.splits:
            return Dataset(self.url, f"{self.path}/{key}" if self.path else key)
        if key in self.contents.readers:
            raise DatasetError(f"{self.address}: '{key}' is a field, not a split. Use data.read(rows)['{key}'].")
        raise DatasetError(
            f"{self.address}: there is no split '{key}'. Splits here: {', '.join(self.splits) or 'none'}; "
            f"fields: {', '.join(self.contents.readers) or 'none'}."
        )

    def where(self) -> dict[str, int]:
        """Bytes of the records, decoded, by host that has them, as this process sees it.

        A dataset at a path is on this host; at a URL it is '*', everywhere alike; where there is nothing, nowhere.
        """
        hosts = where(self.url)
        size_bytes = len(self) * sum(reader.record_bytes for reader in self.readers.values()) if hosts else 0
        return dict.fromkeys(hosts, size_bytes)

    def read(self, indices: Any = None, fields: Iterable[str] | None = None) -> dict[str, Array]:
        """The records ``indices`` (0..len-1, any order, repeats allowed; all, if none are given), one array a field.

        Arrays have shape (len(indices), *record). Each chunk that is touched is read once. Raises
        DatasetError for indices that are not there, CorruptChunk for a chunk that cannot be decoded.
        """
        rows = checked_rows(np.arange(len(self)) if indices is None else indices, len(self))
        if self.subset is not None:
            rows = self.subset[rows]
        result = {}
        for name, reader in self.readers_of(fields).items():
            result[name] = np.empty((len(rows), *reader.record_shape), reader.dtype)
            gather(reader.read, rows, reader.chunk_records, result[name])
        return result

    def readers_of(self, fields: Iterable[str] | None) -> dict[str, ChunkReader]:
        """Readers of the named fields (all for None); DatasetError for a field that is not there."""
        if fields is None:
            return self.readers
        fields = tuple(fields)
        for name in fields:
            if name not in self.readers:
                raise DatasetError(f"{self.address}: there is no field '{name}'. Fields: {', '.join(self.readers)}.")
        return {name: self.readers[name] for name in fields}

    def take(self, indices: Any) -> Dataset:
        """The records ``indices`` (0..len-1, each once) as a dataset. Records keep their stored order.

        A boolean mask of the dataset's length selects where it is True.
        """
        chosen = np.asarray(indices)
        if chosen.dtype == np.bool_ and chosen.shape == (len(self),):
            chosen = np.flatnonzero(chosen)
        rows = np.sort(checked_rows(chosen, len(self)))
        if len(rows) == 0:
            raise DatasetError(f"{self.address}: a dataset needs a record, and this selection has none.")
        twice = np.flatnonzero(np.diff(rows) == 0)
        if len(twice):
            raise DatasetError(f"take: record {rows[twice[0]]} is named twice. A dataset holds each record once.")
        return Dataset(self.url, self.path, rows if self.subset is None else self.subset[rows])

    def split(self, fraction: float, *, seed: int = 0, stratify: str | None = None) -> tuple[Dataset, Dataset]:
        """Two datasets by chance: the first has exactly ``round(fraction * len)`` of the records.

        The same seed gives the same parts on every machine. With ``stratify``, the name of a label field,
        each class is divided in this proportion too (largest remainders).
        """
        labels = None
        if stratify is not None:
            labels = self.read(np.arange(len(self)), [stratify])[stratify]
            if labels.ndim != 1:
                raise DatasetError(f"split: '{stratify}' has records of shape {labels.shape[1:]}; a label is a scalar.")
        first, second = split_positions(self.records, fraction, seed=seed, labels=labels)
        return self.take(first), self.take(second)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "path": self.path, "subset": self.subset}

    def __repr__(self) -> str:
        if not self.contents.readers:
            return f"Dataset({self.address!r}, splits: {', '.join(self.splits)})"
        fields = ", ".join(f"{name} {_text(reader)}" for name, reader in self.readers.items())
        return f"Dataset({self.address!r}, {self._count()} records: {fields})"

    def _repr_html_(self) -> str:
        """Fields, records and chunks, or those of each split."""
        if self.contents.readers:
            names = ("field", "record", "dtype", "records a chunk", "bytes a record")
            return markup.title(f"{self._count()} records", self.address) + markup.table(names, self._fields(), right=2)
        rows = [(name, *self[name]._summary()) for name in self.splits]
        head = ("split", "fields", "records", "bytes")
        return markup.title("Dataset", self.address) + markup.table(head, rows, right=2)

    def _fields(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                "scalar" if not reader.record_shape else "\N{MULTIPLICATION SIGN}".join(map(str, reader.record_shape)),
                reader.dtype.name,
                f"{reader.chunk_records:,}",
                f"{reader.record_bytes:,}",
            )
            for name, reader in self.readers.items()
        ]

    def _summary(self) -> tuple[str, str, str]:
        """What a split has, in one row."""
        try:
            if not self.contents.readers:
                return f"splits: {', '.join(self.splits)}", "", ""
            fields = ", ".join(f"{name} {_text(reader)}" for name, reader in self.readers.items())
            size_bytes = len(self) * sum(reader.record_bytes for reader in self.readers.values())
            return fields, self._count(), markup.size(size_bytes)
        except DatasetError as error:  # one bad split must not hide the others
            return str(error), "", ""

    def _count(self) -> str:
        whole = next(iter(self.readers.values())).length
        return str(whole) if self.subset is None else f"{len(self)} of {whole}"

    def _spec(self, reader: ChunkReader) -> Spec:
        try:
            return Spec(reader.record_shape, reader.dtype.name)
        except (DTypeError, TypeError) as error:
            raise DTypeError(f"{self.address}: field '{reader.name}' cannot be fed to a network. {error}") from error


def load(url: Url) -> Dataset:
    """The dataset at a path or fsspec URL.

    Raises DatasetNotFound where nothing is there; DatasetError for what is not a Zarr v3 group, an ingest
    that did not finish, no arrays, no records, or arrays of different lengths.
    """
    data = Dataset(full_url(url))
    _ = data.contents  # opening it checks it
    return data


def _text(reader: ChunkReader) -> str:
    """``uint8[8,8]``: as a Spec prints, but for any dtype."""
    return f"{reader.dtype.name}[{','.join(map(str, reader.record_shape))}]"


def _inside(group: zarr.Group, path: str, url: str) -> zarr.Group:
    try:
        inner = group[path]
    except KeyError:
        raise DatasetError(f"{url}: there is no group '{path}' inside.") from None
    if not isinstance(inner, zarr.Group):
        raise DatasetError(f"{url}: '{path}' is an array, and a dataset is a group of arrays.")
    return inner


def _contents(group: zarr.Group, address: str) -> Contents:
    marker = group.attrs.get(MARKER, {})
    if marker and marker.get("format") != FORMAT:
        raise DatasetError(
            f"{address}: written in dataset format {marker.get('format')}, and this version of rapydli_flow reads "
            f"format {FORMAT}. Upgrade, or ingest it again."
        )
    if marker and not marker.get("complete"):
        raise DatasetError(
            f"{address}: this dataset is incomplete: its ingest did not finish. Ingest it again with overwrite=True."
        )
    arrays = dict(sorted(group.arrays()))
    splits = tuple(sorted(group.group_keys()))
    if not arrays and not splits:
        raise DatasetError(f"{address}: this group holds no arrays. Write records with rapydli_flow.data.ingest.")
    for name, array in arrays.items():
        if array.ndim == 0:
            raise DatasetError(f"{address}: array '{name}' is a scalar; records are on axis 0 of an array.")
    lengths = {name: int(array.shape[0]) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DatasetError(f"{address}: arrays have different numbers of records: {told}. Axis 0 is the record.")
    if arrays and not any(lengths.values()):
        raise DatasetError(f"{address}: this dataset is empty: its arrays ({', '.join(arrays)}) have no records.")
    return Contents({name: ChunkReader(array, name, address, bool(marker)) for name, array in arrays.items()}, splits)
