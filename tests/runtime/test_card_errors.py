"""What is said where there is no GPU, no driver, no compiler, too little memory, or where a kernel fails."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from small_runs import make_step, records

import rapydli_flow as rf
from gpu_kernels import compile as compiling
from gpu_kernels import launch
from gpu_kernels.card import Box
from gpu_kernels.emulated import Emulated
from gpu_kernels.launch import Card, DeviceFault
from rapydli_flow.cli import main
from rapydli_flow.errors import MissingDependency, TooLittleMemory
from rapydli_flow.runtime import building, card_rank, devices, inventory, workers
from rapydli_flow.runtime.card_rank import CardRank
from rapydli_flow.runtime.devices import device_of
from rapydli_flow.scheduler import make_plan
from rapydli_flow.template import Device
from rapydli_flow.tuner import Tuning

pytestmark = pytest.mark.filterwarnings("ignore:no GPU kernel serves")
HERE = Device("cuda", "A card", target="sm_90a", cores=132, vector_bytes=16, memory_bytes=1 << 30)


@pytest.fixture(scope="module")
def step():
    return make_step(dtype="float32")


@pytest.fixture
def forgotten():
    """What was known of devices before is not known any more, then and afterwards."""
    for known in (devices._named, devices.card_named):
        known.cache_clear()
    yield
    for known in (devices._named, devices.card_named):
        known.cache_clear()


def programs(step, device):
    return make_plan(step, 1).programs(step, Tuning(device))


def bound(program, card):
    """A rank that is started, and fed."""
    rank = CardRank(program, device_of("emulated"), card=card)
    rank.start(0)
    rank.feed({name: np.ones(program.leaves[name].spec.shape, "uint8") for name in program.kind("batch")})
    return rank


def no_library(name):
    raise OSError(name)


def test_without_a_driver(step, monkeypatch, forgotten):
    monkeypatch.setattr(launch.ctypes, "CDLL", no_library)
    monkeypatch.setattr(workers, "_client", lambda: None)  # with a client it asks the workers
    for ask in (
        lambda: rf.fit(step, records(dtype="float32"), steps=1, device="cuda"),
        lambda: rf.predict(step.network, rf.init(step), records(dtype="float32")["x"], device="cuda"),
        lambda: rf.compile(step, device="cuda"),
        lambda: rf.time(step, device="cuda"),
        lambda: rf.stepper(step, device="cuda:1"),
        lambda: rf.autotune(step, budget_s=1, device="cuda"),
    ):
        with pytest.raises(MissingDependency, match=r"no CUDA driver: libcuda\.so\.1 is not there"):
            ask()


class Library:
    """A driver of Python that knows one card, and refuses what it is told to."""

    def __init__(self, refuse="", known="", major=9):
        self.refuse, self.known, self.major, self.blocks = refuse, known, major, []

    def __getattr__(self, name):
        def call(*args):
            if name == "cuDeviceGetAttribute":
                args[0]._obj.value = {75: self.major, 76: 0}.get(args[1].value, 64)
            elif name in ("cuDeviceGetCount", "cuDriverGetVersion"):
                args[0]._obj.value = {"cuDeviceGetCount": 1, "cuDriverGetVersion": 13010}[name]
            elif name == "cuDeviceGetName":
                args[0].value = b"A card"
            elif name == "cuDeviceTotalMem_v2":
                args[0]._obj.value = 1 << 30
            elif name == "cuMemHostAlloc":
                self.blocks.append(np.zeros(args[1].value, np.uint8))
                args[0]._obj.value = self.blocks[-1].ctypes.data
            elif name == "cuMemGetInfo_v2":
                args[0]._obj.value = 1 << 29
            elif name == "cuGetErrorName":
                args[1]._obj.value = self.known.encode()
            return 700 if name == self.refuse else 0

        return call


def with_driver(monkeypatch, *args, **how):
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: Library(*args, **how))


@pytest.mark.parametrize(
    ("refuse", "known", "error", "message"),
    [
        ("cuInit", "CUDA_ERROR_NO_DEVICE", MissingDependency, "no such device .*CUDA_VISIBLE_DEVICES may hide some"),
        ("cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE", MissingDependency, "`rapydli devices` lists those"),
        ("cuInit", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", DeviceFault, "cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
    ],
)
def test_without_a_device(step, monkeypatch, forgotten, refuse, known, error, message):
    with_driver(monkeypatch, refuse, known)
    with pytest.raises(error, match=message):
        rf.fit(step, records(dtype="float32"), steps=1, device="cuda")


def test_a_card_that_is_too_old(step, monkeypatch, forgotten):
    with_driver(monkeypatch, major=7)
    with pytest.raises(
        MissingDependency, match=r"A card has compute capability 7\.0; .* for 8\.0 \(Ampere\) and newer"
    ):
        rf.fit(step, records(dtype="float32"), steps=1, device="cuda")


def test_without_a_compiler(step, monkeypatch, forgotten):
    with_driver(monkeypatch)
    monkeypatch.setattr(compiling, "missing", lambda: "compiling needs numba-cuda. pip install 'rapydli-flow[cuda12]'.")
    with pytest.raises(MissingDependency, match=r"pip install 'rapydli-flow\[cuda12\]'.*Or carry compiled kernels"):
        rf.fit(step, records(dtype="float32"), steps=1, device="cuda")


def test_which_packages_compile(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert "the package numba-cuda, which is not installed" in compiling.missing()
    assert "rapydli-flow[cuda12]" in compiling.missing()


def test_too_little_memory_on_a_card(step, monkeypatch, forgotten):
    with_driver(monkeypatch)
    monkeypatch.setattr(Card, "free_bytes", lambda self: 100)
    with pytest.raises(TooLittleMemory, match=r"100 are free on cuda:0 \(A card\)[\s\S]*largest buffers"):
        rf.fit(step, records(dtype="float32"), steps=1, device="cuda")


@pytest.mark.parametrize(
    ("refuse", "known", "error", "message"),
    [
        ("cuMemAlloc_v2", "CUDA_ERROR_OUT_OF_MEMORY", TooLittleMemory, "the card has too little memory free"),
        ("cuModuleLoadData", "CUDA_ERROR_NO_BINARY_FOR_GPU", DeviceFault, "is for another card than this one"),
        ("cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS", DeviceFault, "Nothing works on it from now on"),
    ],
)
def test_what_the_driver_refuses(refuse, known, error, message):
    card = Card(driver=launch.Driver(Library(refuse, known)))
    cubin = compiling.Cubin(b"\x7fELF", "sm_90a", "kernel", 1, 32, 0, 1)
    with pytest.raises(error, match=message) as raised:
        card.wait() if refuse == "cuStreamSynchronize" else (card.reserve(100), card.load((cubin,)))
    assert getattr(raised.value, "sticky", False) == (known == "CUDA_ERROR_ILLEGAL_ADDRESS")


class Failing(Emulated):
    """A card on which the kernel of a number fails, at the first wait behind it."""

    def __init__(self, number):
        super().__init__()
        self.left, self.dead = number, False

    def prepare(self, request):
        return self.failing(super().prepare(request))

    def prepare_many(self, many, target):
        return self.failing(super().prepare_many(many, target))

    def failing(self, kernel):
        def bind(addresses, *, at=0):
            def launch():
                self.left -= 1
                self.dead = self.dead or self.left == 0

            return launch

        return SimpleNamespace(bind=bind, kernel=kernel)

    def wait(self):
        if self.dead:
            raise DeviceFault("cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700).", sticky=True)


def on_card(program):
    """The kernels of a rank, each with the calls that it is for."""
    rank = CardRank(program, device_of("emulated"))
    found = [calls for part in rank._parts if isinstance(part, card_rank._Run) for calls in part.calls]
    rank.close()
    return found


def failure(program, number):
    """What is said of a kernel that fails in the first step."""
    rank = bound(program, Failing(number))
    with pytest.raises(DeviceFault) as raised:
        rank.step(0, 0)
    assert raised.value.sticky
    rank.close()  # says nothing more
    return str(raised.value)


def test_a_kernel_that_fails_in_the_first_step_is_named(step):
    (program,) = programs(step, device_of("emulated"))
    kernels = on_card(program)
    number = next(i for i, calls in enumerate(kernels) if i > 1 and len(calls) == 1)
    (call,) = kernels[number]
    said = failure(program, number + 1)
    assert said.startswith(f"{call.name} ({call.title}")
    assert f"with {call.choice} on emulated: cuStreamSynchronize: CUDA_ERROR_ILLEGAL" in said


def test_of_a_kernel_for_many_calls_all_are_named(step):
    (program,) = programs(step, device_of("emulated"))
    kernels = on_card(program)
    number = next(i for i, calls in enumerate(kernels) if len(calls) > 1)
    said = failure(program, number + 1)
    assert said.startswith(f"one kernel for {len(kernels[number])} calls: {kernels[number][0].name} (")
    assert all(f"{call.name} ({call.title}, f32[" in said for call in kernels[number])
    assert "on emulated: cuStreamSynchronize: CUDA_ERROR_ILLEGAL" in said


def test_a_kernel_that_fails_later_is_named_where_each_is_waited_for(step, monkeypatch):
    device = device_of("emulated")
    (program,) = programs(step, device)
    kernels = len(on_card(program))
    second = on_card(program)[1][0]
    for wait in (False, True):
        monkeypatch.setattr(card_rank, "settings", lambda wait=wait: SimpleNamespace(cuda_wait=wait))
        rank = bound(program, Failing(kernels + 2))
        rank.step(0, 0)
        with pytest.raises(DeviceFault) as raised:
            rank.step(0, 1)
        assert (f"{second.name} ({second.title}" in str(raised.value)) == wait
        assert ("RAPYDLI_CUDA_WAIT=1" in str(raised.value)) != wait
        rank.close()


def test_a_snapshot_outlives_a_kernel_that_fails(step, monkeypatch, tmp_path):
    data, made = records(dtype="float32"), []

    def card(device):
        made.append(Failing(kernels * 6 + 1) if not made else Emulated())
        return made[-1]

    kernels = len(on_card(programs(step, device_of("emulated"))[0]))
    monkeypatch.setattr(card_rank, "card_of", card)
    with pytest.raises(DeviceFault, match="ILLEGAL_ADDRESS"):
        rf.fit(step, data, steps=9, run_dir=tmp_path, snapshot_every=2, device="emulated")
    assert rf.fit(step, data, steps=9, run_dir=tmp_path, resume=True, device="emulated").steps == 9


def test_devices_without_a_gpu(monkeypatch):
    monkeypatch.setattr(launch.ctypes, "CDLL", no_library)
    done = CliRunner().invoke(main, ["devices", "--no-measure"])
    assert done.exit_code == 0
    assert "cpu" in done.output
    assert "no GPU: no CUDA driver" in done.output
    said = json.loads(CliRunner().invoke(main, ["devices", "--no-measure", "--json"]).output)
    assert [each["name"] for each in said["devices"]] == ["cpu"]
    assert said["without_gpu"].startswith("no CUDA driver")


def test_devices_with_a_gpu(monkeypatch, forgotten):
    with_driver(monkeypatch)
    monkeypatch.setattr(inventory, "missing", lambda: None)
    monkeypatch.setattr(inventory, "measured_peak", lambda device, threads: inventory.Peak(2e12, 1e12, 1))
    monkeypatch.setattr(inventory, "tensor_cores", lambda device: {"bfloat16": 7e14})
    done = CliRunner().invoke(main, ["devices"])
    assert done.exit_code == 0, done.output
    for word in ("cuda:0", "A card", "CUDA 13.1", "2,000 GFLOP/s", "700,000 GFLOP/s", "1,000.0 GB/s", "0.5 GiB"):
        assert word in done.output
    assert "no GPU" not in done.output
    with_driver(monkeypatch, major=7)
    devices.card_named.cache_clear()
    assert "cuda:0: A card has compute capability 7.0" in CliRunner().invoke(main, ["devices"]).output


def test_measured_ceilings_of_a_card():
    peak = inventory.measured_peak(device_of("emulated"), 1)
    assert peak.flops_s > 0
    assert peak.bytes_s > 0
    rates = inventory.tensor_cores(device_of("emulated"))
    assert list(rates) == ["tf32", "bfloat16", "float16"]
    assert min(rates.values()) > 0


def test_cubins_are_built_and_found(step, monkeypatch):
    device, asked = HERE, []
    ((request, choice), *_) = [pair for pair in programs(step, device)[0].requests if not pair[1].reference]
    monkeypatch.setattr(building, "cubins", asked.append)
    building.build(request, choice, device)
    assert asked[0].target == "sm_90a"
    monkeypatch.setattr(building, "kept_cubins", lambda wanted: wanted.key != asked[0].key)
    assert building.built([(request, choice)], device) == [False]
    emulated = device_of("emulated")
    building.build(request, choice, emulated)
    assert building.built([(request, choice)], emulated) == [True]
    assert len(asked) == 1


@pytest.mark.parametrize(("major", "target"), [(8, "sm_80"), (9, "sm_90a"), (10, "sm_100"), (12, "sm_120")])
def test_what_kernels_are_compiled_for(major, target):
    """Only what is Hopper's alone asks for code that runs on no later card."""
    assert Card(0, driver=launch.Driver(Library(major=major))).describe().target == target


def test_what_the_driver_is_asked_for_a_moment_and_a_box():
    """A moment that is not past yet is no error; a box is told in the driver's own order."""
    log, codes = [], [600, 0]

    class Asked(Library):
        def __getattr__(self, name):
            def call(*args):
                if name == "cuMemcpy3DAsync_v2":
                    log.append(np.frombuffer(bytes(args[0]._obj), np.uint64))
                return codes.pop(0) if name == "cuEventQuery" else 0

            return call

    card = Card(0, driver=launch.Driver(Asked()))
    assert [card.mark().passed(), card.mark().passed()] == [False, True]
    card.copy_box(1000, 2000, Box(10, 3, 2, 16, 5, 32, 7))
    (told,) = log
    assert (told[4] & 0xFFFFFFFF, told[6], told[9], told[10]) == (2, 2000, 32, 7)
    assert (told[15] & 0xFFFFFFFF, told[17], told[20], told[21]) == (2, 1000, 16, 5)
    assert tuple(told[22:]) == (10, 3, 2)
    card.copy_box(1000, 2000, Box(0, 3, 2, 16, 5, 32, 7))
    assert len(log) == 1
