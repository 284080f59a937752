"""Snapshots: named arrays at a step, complete or not there.

    runs/x/snapshots/
      step-00000200/
        manifest.json            appears last, by an atomic rename: without it there is no snapshot
        arrays/                  a Zarr v3 group, one uncompressed single-chunk array a name
          zarr.json
          conv_1.w.momentum/     the array named conv_1/w/momentum
            zarr.json  c.0.0
        blocks/                  while it is written: what each `write_block` wrote, and its CRC

`begin` lays the files out at full size, any number of processes `write_block` their parts of them, and
`commit` checks that the blocks cover every array before it writes the manifest. A chunk is plain bytes in C
order, so blocks go straight to their place in the file: processes never read and rewrite one another's
parts, and every float keeps its bits. Folders are on a file system that all of them see (POSIX rename).

Names are words joined by '/'; the group is flat because a parameter `w` and its slot `w/momentum` are
both arrays, which a Zarr hierarchy cannot nest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ..errors import DTypeError, SnapshotError
from ..spec import Array, Block, Spec

FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Snapshot:
    """A snapshot read back: its step, its arrays by name, and the JSON that was stored with them."""

    step: int
    arrays: dict[str, Array]
    meta: dict[str, Any]


def begin(folder: str | os.PathLike[str], step: int, specs: Mapping[str, Spec]) -> Path:
    """Lay out an incomplete snapshot of arrays with these specs; clears an incomplete one of the same step.

    Raises SnapshotError where this step has a complete snapshot, or for a name that is not words joined by
    '/'; OSError where the disk has no room, before anything is written.
    """
    path = _path(folder, step)
    if (path / "manifest.json").exists():
        raise SnapshotError(f"{path}: step {step} has a complete snapshot already. Remove it, or use another folder.")
    for name in specs:
        if not all(name.split("/")):
            raise SnapshotError(f"snapshot: {name!r} cannot name an array: names are words joined by '/'.")
    if path.exists():
        shutil.rmtree(path)
    (path / "blocks").mkdir(parents=True)
    (path / "arrays").mkdir()
    _put(path / "arrays" / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})
    for name, spec in specs.items():
        array = path / "arrays" / _file_name(name)
        array.mkdir()
        _put(array / "zarr.json", _zarr_metadata(name, spec))
        if spec.size:
            with open(array / _chunk_name(spec), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, spec.size_bytes)
    return path


def write_block(folder: str | os.PathLike[str], step: int, name: str, block: Block, array: Array) -> None:
    """Write ``array`` as the part ``block`` of the array ``name`` of a snapshot that was begun.

    Any process may call it, in any order, also for blocks that another writes too (replicas). Raises
    SnapshotError where the step was not begun, is complete, or the block does not fit the array.
    """
    path = _path(folder, step)
    _refuse_unless_begun(path, step)
    home = path / "arrays" / _file_name(name)
    try:
        spec = _spec_of(json.loads((home / "zarr.json").read_text()))
    except FileNotFoundError:
        raise SnapshotError(f"{path}: this snapshot was begun without an array '{name}'.") from None
    inside = all(0 <= lo <= hi <= size for lo, hi, size in zip(block.lo, block.hi, block.whole, strict=True))
    if block.whole != spec.shape or not inside:
        raise SnapshotError(f"{path}: block {block} of {block.whole} does not fit array '{name}' {spec}.")
    if array.shape != block.shape or array.dtype.name != spec.dtype:
        raise SnapshotError(
            f"{path}: block {block} of array '{name}' {spec} has shape {block.shape}, and was given "
            f"{array.dtype}{list(array.shape)}."
        )
    data = np.ascontiguousarray(array, _stored(spec))
    if data.size:
        with open(home / _chunk_name(spec), "r+b") as file:
            _write_runs(file.fileno(), block, data)
            os.fsync(file.fileno())
    record = {"name": name, "lo": block.lo, "hi": block.hi, "crc32": zlib.crc32(data.tobytes())}
    at = "_".join(map(str, block.lo)) + "-" + "_".join(map(str, block.hi))
    _put(path / "blocks" / f"{_file_name(name)}@{at}.json", record)


def commit(folder: str | os.PathLike[str], step: int, meta: Mapping[str, Any]) -> Path:
    """Make a begun snapshot complete: check that its blocks cover every array, and write the manifest.

    ``meta`` is any JSON. Raises SnapshotError naming an array that is not covered, or where the step was
    not begun.
    """
    path = _path(folder, step)
    text = meta_text(meta)
    _refuse_unless_begun(path, step)
    specs = {}
    for file in sorted((path / "arrays").glob("*/zarr.json")):
        metadata = json.loads(file.read_text())
        specs[str(metadata["attributes"]["name"])] = _spec_of(metadata)
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    for file in sorted((path / "blocks").glob("*.json")):
        record = json.loads(file.read_text())
        blocks[record.pop("name")].append(record)
    for name, spec in specs.items():
        _check_cover(path, name, spec, blocks[name])
    arrays = [
        {
            "name": name,
            "path": f"arrays/{_file_name(name)}",
            "shape": spec.shape,
            "dtype": spec.dtype,
            "blocks": blocks[name],
        }
        for name, spec in specs.items()
    ]
    manifest = {"format": FORMAT, "step": step, "arrays": arrays, "meta": json.loads(text)}
    _put(path / "manifest.json", manifest, durable=True)
    shutil.rmtree(path / "blocks")
    return path


def list_snapshots(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The complete snapshots in a folder, oldest step first; none where there is no such folder."""
    return tuple(path for path in _all_steps(folder) if (path / "manifest.json").exists())


def has_snapshot(folder: str | os.PathLike[str], step: int) -> bool:
    """Is there a complete snapshot of this step?"""
    return (_path(folder, step) / "manifest.json").exists()


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The complete snapshot of the highest step, or None."""
    return next(reversed(list_snapshots(folder)), None)


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Read a complete snapshot, checking the CRC of every block of every array.

    Raises SnapshotError where it is missing, incomplete or of another format, or naming the array whose
    bytes are missing or changed.
    """
    path = Path(path)
    if not path.is_dir():
        raise SnapshotError(f"{path}: there is no snapshot here.")
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise SnapshotError(
            f"{path}: this snapshot is incomplete (it has no manifest.json). latest(folder) is the newest complete one."
        ) from None
    except ValueError as error:
        raise SnapshotError(f"{path}: its manifest.json cannot be read: {error}.") from None
    if manifest.get("format") != FORMAT:
        raise SnapshotError(
            f"{path}: snapshot format {manifest.get('format')}, and this version of rapydli_flow reads {FORMAT}."
        )
    arrays = {entry["name"]: _read_array(path, entry) for entry in manifest["arrays"]}
    return Snapshot(int(manifest["step"]), arrays, manifest["meta"])


def prune(folder: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the newest ``keep`` complete snapshots, and everything incomplete.

    Not while a snapshot is being written. A manifest goes first, so that what is half removed is incomplete.
    """
    kept = list_snapshots(folder)[-max(1, keep) :]
    for path in _all_steps(folder):
        if path not in kept:
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path)


def take_place(made: Path, folder: str | os.PathLike[str]) -> Path:
    """Move a complete snapshot into a folder, and remove all others there, whatever their step; where it is now.

    Both on one file system. A kill on the way leaves a complete snapshot in the folder, the new one or one of
    the older; only where an older one is of the same step there is none for the moment between two renames.
    """
    home, aside = Path(folder) / made.name, made.parent / "replaced"
    shutil.rmtree(aside, ignore_errors=True)
    if home.exists():
        home.rename(aside)
    made.rename(home)
    for path in _all_steps(folder):
        if path != home:
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path)
    shutil.rmtree(made.parent)
    return home


def array_spec(name: str, array: Array) -> Spec:
    """The Spec of an array to be stored; DTypeError naming it for a dtype that snapshots do not hold."""
    try:
        return Spec(array.shape, array.dtype.name)
    except (DTypeError, TypeError) as error:
        raise DTypeError(f"snapshot: array '{name}' has dtype {array.dtype}. {error}") from error


def meta_text(meta: Mapping[str, Any]) -> str:
    """``meta`` as JSON; SnapshotError for what JSON does not hold."""
    try:
        return json.dumps(dict(meta))
    except (TypeError, ValueError) as error:
        raise SnapshotError(f"snapshot: meta is not JSON: {error}. Use dicts, lists, strings and numbers.") from error


def _path(folder: str | os.PathLike[str], step: int) -> Path:
    if step < 0:
        raise SnapshotError(f"snapshot: step {step} must be 0 or more.")
    return Path(folder) / f"step-{step:08d}"


def _all_steps(folder: str | os.PathLike[str]) -> list[Path]:
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _refuse_unless_begun(path: Path, step: int) -> None:
    if (path / "manifest.json").exists():
        raise SnapshotError(f"{path}: the snapshot of step {step} is complete, and is not written any more.")
    if not (path / "blocks").is_dir():
        raise SnapshotError(f"{path}: the snapshot of step {step} was not begun. Call begin(folder, step, specs).")


def _file_name(name: str) -> str:
    """A flat, reversible directory name: ``conv_1/w`` -> ``conv_1.w``; anything unusual is percent-encoded."""
    parts = (quote(part, safe=" ").replace(".", "%2E") for part in name.split("/"))
    joined = ".".join(parts)
    return "%5F" + joined[1:] if joined.startswith("__") else joined


def _chunk_name(spec: Spec) -> str:
    return ".".join(["c", *("0" for _ in spec.shape)])


def _stored(spec: Spec) -> np.dtype[Any]:
    return np.dtype(spec.dtype).newbyteorder("<")


def _zarr_metadata(name: str, spec: Spec) -> dict[str, Any]:
    """zarr.json of an uncompressed array that is one chunk (Zarr v3 core specification)."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": spec.shape,
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in spec.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {"name": name},
    }


def _spec_of(metadata: Mapping[str, Any]) -> Spec:
    return Spec(tuple(metadata["shape"]), metadata["data_type"])


def _put(path: Path, value: Any, durable: bool = False) -> None:
    """Write JSON by an atomic rename, so that a reader sees all of it or none."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.draft")
    with open(draft, "w") as file:
        json.dump(value, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(draft, path)


def _write_runs(descriptor: int, block: Block, data: Array) -> None:
    """Write a block of a C-ordered file: one write for each run of bytes that are neighbours in the file."""
    axis = len(block.whole)  # the axes from here on are whole
    while axis and block.shape[axis - 1] == block.whole[axis - 1]:
        axis -= 1
    axis = max(0, axis - 1)  # a part of one more axis is still one run
    run = prod(block.shape[axis:]) * data.itemsize
    strides = [prod(block.whole[at + 1 :]) * data.itemsize for at in range(len(block.whole))]
    base = sum(lo * stride for lo, stride in zip(block.lo, strides, strict=True))
    view = data.reshape(-1).view(np.uint8).data
    for number, at in enumerate(np.ndindex(*block.shape[:axis])):
        offset = base + sum(i * stride for i, stride in zip(at, strides, strict=False))
        part = view[number * run : (number + 1) * run]
        while part:  # a write may be cut short, at most at 2 GB
            done = os.pwrite(descriptor, part, offset)
            part, offset = part[done:], offset + done


def _check_cover(path: Path, name: str, spec: Spec, blocks: list[dict[str, Any]]) -> None:
    """SnapshotError unless the blocks cover the array exactly."""
    found = [Block(tuple(block["lo"]), tuple(block["hi"]), spec.shape) for block in blocks]
    covered = sum(prod(block.shape) for block in found)
    if covered < spec.size or not found:
        raise SnapshotError(
            f"{path}: array '{name}' is not all written: its blocks hold {covered} of {spec.size} elements "
            f"({', '.join(map(str, found)) or 'no block'}). A rank did not write its part."
        )
    for index, one in enumerate(found):
        for other in found[:index]:
            common = zip(one.lo, one.hi, other.lo, other.hi, strict=True)
            if all(max(lo, low) < min(hi, high) for lo, hi, low, high in common):
                raise SnapshotError(f"{path}: blocks {other} and {one} of array '{name}' overlap.")


def _read_array(path: Path, entry: Mapping[str, Any]) -> Array:
    name, spec = entry["name"], Spec(tuple(entry["shape"]), entry["dtype"])
    flat = np.empty(0, _stored(spec))
    if spec.size:
        try:
            flat = np.fromfile(path / entry["path"] / _chunk_name(spec), _stored(spec))
        except FileNotFoundError:
            raise SnapshotError(f"{path}: the bytes of array '{name}' are missing. {_WAY_OUT}") from None
    if flat.size != spec.size:
        raise SnapshotError(f"{path}: array '{name}' has {flat.size} of its {spec.size} elements. {_WAY_OUT}")
    array = flat.reshape(spec.shape)
    for block in entry["blocks"]:
        part = array[Block(tuple(block["lo"]), tuple(block["hi"]), spec.shape).slices]
        if zlib.crc32(part.tobytes()) != block["crc32"]:
            raise SnapshotError(f"{path}: array '{name}' has changed since it was written (CRC). {_WAY_OUT}")
    return array.astype(spec.dtype, copy=False)


_WAY_OUT = "Use an older snapshot: list_snapshots(folder)."
