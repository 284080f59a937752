"""ingest: write records as a dataset, chunk by chunk, in bounded memory.

    source                                   pieces                      chunks
    {"x": array, "label": array}        ->   slices of the arrays   ->   arrays of `chunk_records` records,
    {"train": {...}, "test": {...}}          (for each split)            compressed by Blosc LZ4, with a CRC32C
    an iterator of records or batches   ->   stacked records

The group's marker says "incomplete" until everything is written, so `load` refuses what a crash left
behind. Every chunk is stored, also one of zeros, so that a lost chunk is found when it is read; the CRC finds
flipped bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from ..errors import DatasetError, DTypeError, SettingError
from ..spec import PLAIN_DTYPES, Array, Spec
from .dataset import FORMAT, MARKER, Dataset, load
from .store import Url, full_url, is_vacant, open_group, replace_attributes

CHUNK_BYTES = 2 * 2**20  # decoded; a page of measurements is in the design's DATA.md: 1-4 MB
CHUNKS = 8  # a small dataset is cut into this many, so that there is something to shuffle

Piece = dict[str, Array]  # some records: one array a field, records on axis 0


@dataclass(frozen=True)
class Part:
    """Records ready to be written as one group: specs of a record, chunk size, and the chunks in order."""

    specs: dict[str, Spec]
    chunk_records: int
    chunks: Iterator[Piece]


def ingest(
    source: Any,
    url: Url,
    *,
    chunk_records: int | None = None,
    overwrite: bool = False,
    compress: bool = True,
    batches: bool = False,
) -> Dataset:
    """Write ``source`` to a path or fsspec URL and return it as a Dataset.

    ``source`` is a dict of arrays with records on axis 0; a dict of splits, each a dict of arrays or an
    iterator of records; or an iterable of records, each a dict of arrays and scalars. With ``batches`` what is
    iterated are batches: dicts of arrays with records on axis 0, of any lengths. Streams are written as they
    come, holding about 16 MB.

    ``chunk_records`` defaults to chunks of about 2 MB, and to an eighth of a small dataset. Raises
    DatasetError for records that are ragged, empty or unlike the first, and where something is at ``url``
    already (unless ``overwrite``, which replaces Zarr groups only); DTypeError for dtypes no network takes.
    """
    if chunk_records is not None and chunk_records < 1:
        raise SettingError(f"ingest: chunk_records={chunk_records} must be 1 or more.")
    url = full_url(url)
    _refuse_to_replace(url, overwrite)
    parts = {name: _part(records, name, chunk_records, batches) for name, records in _splits(source).items()}
    root = open_group(url, "w")
    _mark(root, complete=False)
    for name, part in parts.items():
        group = root.create_group(name) if name else root
        _mark(group, complete=False)
        _write(group, part, compress)
        _mark(group, complete=True)
    _mark(root, complete=True)
    return load(url)


def _refuse_to_replace(url: str, overwrite: bool) -> None:
    if is_vacant(url):
        return
    if not overwrite:
        raise DatasetError(
            f"{url}: there is something at this address, and nothing was touched. "
            "Choose another, or pass overwrite=True to replace a dataset."
        )
    open_group(url)  # raises for what is not a Zarr group: overwrite=True never deletes anything else


def _splits(source: Any) -> dict[str, Any]:
    """What to write, by the name of its group; "" is the root."""
    if not isinstance(source, Mapping):
        if isinstance(source, str | bytes) or not isinstance(source, Iterable):
            raise DatasetError(
                f"ingest: a source is a dict of arrays, a dict of splits, or an iterable of records (dicts), "
                f"not {type(source).__name__}."
            )
        return {"": source}
    nested = [name for name, value in source.items() if isinstance(value, Mapping | Iterator)]
    if nested and len(nested) < len(source):
        flat = next(name for name in source if name not in nested)
        raise DatasetError(
            f"ingest: '{nested[0]}' is a split and '{flat}' is not. A source holds either arrays or splits."
        )
    for name in source:
        _check_name(name)
    return dict(source) if nested else {"": source}


def _part(records: Any, split: str, chunk_records: int | None, batches: bool) -> Part:
    where = f"ingest: split '{split}': " if split else "ingest: "
    if isinstance(records, Mapping):
        arrays = {name: _array(value, f"{where}field '{name}'") for name, value in records.items()}
        lengths = {name: int(array.shape[0]) if array.shape else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise DatasetError(f"{where}arrays have different numbers of records: {told}. Axis 0 is the record.")
        count = next(iter(lengths.values()), 0)
        widest = max((array.nbytes // count for array in arrays.values()), default=1) if count else 1
        step = max(1, CHUNK_BYTES // max(1, widest))
        pieces: Iterator[Piece] = (
            {name: np.asarray(array[lo : lo + step]) for name, array in arrays.items()} for lo in range(0, count, step)
        )
    else:
        pieces = (_piece(record, number, where, batches) for number, record in enumerate(records))
    first = next(pieces, None)
    if first is None:
        raise DatasetError(f"{where}the source has no records.")
    specs = _specs(first, where)
    alike = _alike(chain([first], pieces), specs, where)
    if chunk_records is not None:
        return Part(specs, chunk_records, _rechunk(alike, chunk_records))
    # a stream does not say how long it is: hold back as much as decides between the two rules
    largest = max(1, CHUNK_BYTES // max(1, *(spec.size_bytes for spec in specs.values())))
    held: list[Piece] = []
    count = 0
    for piece in alike:
        held.append(piece)
        count += _length(piece)
        if count > largest * CHUNKS:
            break
    size = min(largest, -(-count // CHUNKS))
    return Part(specs, size, _rechunk(chain(held, alike), size))


def _piece(record: Any, number: int, where: str, batches: bool) -> Piece:
    what = "batch" if batches else "record"
    if not isinstance(record, Mapping):
        raise DatasetError(f"{where}{what} {number} is a {type(record).__name__}; a {what} is a dict of arrays.")
    arrays = {name: _array(value, f"{where}field '{name}' of {what} {number}") for name, value in record.items()}
    if not batches:
        return {name: np.asarray(array)[None] for name, array in arrays.items()}
    lengths = {array.shape[:1] for array in arrays.values()}
    if len(lengths) != 1 or () in lengths:
        told = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DatasetError(f"{where}fields of batch {number} have different numbers of records: {told}.")
    return {name: np.asarray(array) for name, array in arrays.items()}


def _array(value: Any, what: str) -> Any:
    """``value`` itself where it is an array of some kind (NumPy, zarr, h5py: only sliced), or as a NumPy array."""
    if isinstance(value, np.generic) or not hasattr(value, "shape"):
        try:
            return np.asarray(value)
        except ValueError as error:
            raise DatasetError(f"{what} is not an array: {error}.") from error
    return value


def _specs(piece: Piece, where: str) -> dict[str, Spec]:
    """Specs of one record, with the names and dtypes checked."""
    if not piece:
        raise DatasetError(f"{where}records have no fields.")
    for name, array in piece.items():
        _check_name(name)
        if array.dtype.name not in PLAIN_DTYPES:
            raise DTypeError(
                f"{where}field '{name}' has dtype {array.dtype}; a dataset holds {', '.join(PLAIN_DTYPES)}. "
                "Convert it with astype."
            )
    return {name: Spec(array.shape[1:], array.dtype.name) for name, array in piece.items()}


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "/" in name or name.startswith(("__", ".")) or name == "zarr.json":
        raise DatasetError(f"ingest: {name!r} cannot name a field or a split: use a word without '/'.")


def _alike(pieces: Iterable[Piece], specs: dict[str, Spec], where: str) -> Iterator[Piece]:
    """The pieces, each checked against the first record."""
    record = 0
    for piece in pieces:
        if piece.keys() != specs.keys():
            raise DatasetError(
                f"{where}record {record} has fields {', '.join(piece)}, and the first one {', '.join(specs)}."
            )
        for name, spec in specs.items():
            array = piece[name]
            if array.shape[1:] != spec.shape or array.dtype.name != spec.dtype:
                raise DatasetError(
                    f"{where}field '{name}' of record {record} is {array.dtype}{list(array.shape[1:])}, and of the "
                    f"first record {spec.dtype}{list(spec.shape)}. All records have one shape and dtype."
                )
        record += _length(piece)
        yield piece


def _rechunk(pieces: Iterable[Piece], size: int) -> Iterator[Piece]:
    """The same records in pieces of ``size`` (the last may be shorter)."""
    held: list[Piece] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += _length(piece)
        if count < size:
            continue
        joined = _join(held)
        whole = count - count % size
        for lo in range(0, whole, size):
            yield {name: array[lo : lo + size] for name, array in joined.items()}
        held = [{name: array[whole:] for name, array in joined.items()}]
        count -= whole
    if count:
        yield _join(held)


def _join(pieces: list[Piece]) -> Piece:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _length(piece: Piece) -> int:
    return len(next(iter(piece.values())))


def _write(group: zarr.Group, part: Part, compress: bool) -> None:
    codecs = [BloscCodec(cname="lz4", shuffle="shuffle"), Crc32cCodec()] if compress else [Crc32cCodec()]
    size = part.chunk_records
    arrays = {
        name: group.create_array(
            name,
            shape=(size, *spec.shape),
            chunks=(size, *(max(1, extent) for extent in spec.shape)),
            dtype=spec.dtype,
            compressors=codecs,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        for name, spec in part.specs.items()
    }
    count, room = 0, size
    for piece in part.chunks:
        end = count + _length(piece)
        if end > room:
            room *= 2  # doubling: a resize writes metadata
            _resize(arrays, part.specs, room)
        for name, array in arrays.items():
            array[count:end] = piece[name]
        count = end
    _resize(arrays, part.specs, count)


def _resize(arrays: dict[str, zarr.Array], specs: dict[str, Spec], count: int) -> None:
    for name, array in arrays.items():
        array.resize((count, *specs[name].shape))


def _mark(group: zarr.Group, *, complete: bool) -> None:
    replace_attributes(group, MARKER, {"format": FORMAT, "complete": complete})
