"""Checks of values that come out of a dataset."""

from __future__ import annotations

import numpy as np

from ..errors import DatasetError, DTypeError
from ..spec import Array


def check_labels(values: Array, classes: int, field: str, first_record: int | Array = 0) -> None:
    """Raise DatasetError at the first label that is not one of ``0..classes-1``.

    ``values`` are integer labels of any shape with records on axis 0. ``first_record`` is the number of
    their first record, or, for shuffled records, the number of each. Raises DTypeError for labels that are
    not integers.
    """
    if values.dtype.kind not in "iu":
        raise DTypeError(f"labels of '{field}' are {values.dtype}: class numbers are integers (int64, int32, uint8).")
    if values.size == 0 or (values.min() >= 0 and values.max() < classes):
        return
    at = int(np.flatnonzero((values < 0) | (values >= classes))[0])
    label, row = values.reshape(-1)[at], at // (values.size // len(values))
    record = first_record + row if isinstance(first_record, int) else first_record[row]
    raise DatasetError(
        f"label {label} at record {record} of '{field}' is outside 0..{classes - 1} ({classes} classes). "
        "Classes are numbered from 0: correct the labels, or give the network more outputs."
    )
