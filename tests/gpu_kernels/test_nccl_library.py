"""NCCL itself, through CuPy, without a GPU: what is asked of it is there, and what it refuses is told."""

import threading

import pytest

from gpu_kernels import nccl
from gpu_kernels.nccl import Nccl, new_meeting
from rapydli_flow.errors import DeviceFault, MissingDependency, RunLost

pytestmark = pytest.mark.filterwarnings("default")  # of CuPy, where it finds no driver


class NoCard:
    stream = 0

    def use(self):
        pass


@pytest.fixture(scope="module")
def library():
    try:
        return nccl.library()
    except MissingDependency as error:
        pytest.skip(str(error))


def test_a_meeting(library):
    one, other = new_meeting(), new_meeting()
    assert isinstance(one, bytes)
    assert len(one) == 128
    assert one != other


def test_numbers_of_dtypes_and_sums(library):
    for dtype, number in nccl._TYPES.items():
        assert getattr(library, f"NCCL_{dtype.upper()}") == number
    assert (library.NCCL_UINT8, library.NCCL_SUM) == (nccl._BYTES, nccl._SUM)


def test_what_a_communicator_is_asked_for(library):
    """Of one that met nobody: the library is called, and refuses."""
    way = object.__new__(Nccl)
    way._nccl, way._aborted, way._lock = library, False, threading.Lock()
    way._communicator = library.NcclCommunicator.__new__(library.NcclCommunicator)
    for ask in (
        lambda: way.all_reduce(NoCard(), [(16, 16, 1)], "float32"),
        lambda: way.swap(NoCard(), [(0, 16, 1)], []),
        lambda: way.swap(NoCard(), [], [(0, 16, 1)]),
    ):
        with pytest.raises(DeviceFault, match=r"NCCL refused \(NCCL_ERROR_INVALID_ARGUMENT"):
            ask()
    with pytest.raises(RunLost, match=r"another card is gone \(NCCL_ERROR_INVALID_ARGUMENT"):
        way.check()
    way.all_reduce(NoCard(), [], "float32")  # a group of nothing is begun, and ended
    way.abort()


def test_without_a_card_it_refuses(library, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceFault, match=r"^NCCL refused \(NCCL_ERROR_UNHANDLED_CUDA_ERROR.*Each rank needs a GPU"):
        Nccl(NoCard(), new_meeting(), 0, 1, lambda waited_s: None)
