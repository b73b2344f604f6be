"""Launch plans: pure functions of geometry and device. No GPU is needed."""

import ctypes
import dataclasses
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from nbbn.cuda import launch, launcher, memory, recipes
from nbbn.cuda.launch import Columns, Device, Layout, Rows
from nbbn.cuda.workspace import PER_THREAD, workspace

H100, SMALL = Device(132, 50 << 20), Device(4, 1 << 18)


def layout(outer, channels, inner, itemsize=4, packed=True):
    """An array in C order at an address that is divisible by 16."""
    most = 16 // itemsize
    rows = launch.alignment(itemsize, most, (0, channels * inner * itemsize if outer > 1 else 0))
    places = (channels * inner * itemsize if outer > 1 else 0, inner * itemsize)
    each = launch.alignment(itemsize, most, places)
    return Layout(outer, channels, inner, itemsize, rows, each if channels > 1 else rows, packed)


SHAPES = [
    (32, 64, 3136), (64, 512, 49), (100352, 64, 1), (1, 1, 1), (1, 3, 7), (4096, 1, 784), (16, 16, 44100), (2, 3, 1025),
    (1, 1, 2**32 + 5), (2**31 + 9, 2, 1), (8, 4096, 1), (7, 260, 4), (1, 100_000, 1), (5, 2, 127), (1, 64, 1_000_000),
]  # fmt: skip


@pytest.mark.parametrize("reduces", [True, False])
@pytest.mark.parametrize("device", [H100, SMALL])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_cover_every_value_and_fit_the_device(shape, itemsize, device, reduces):
    outer, channels, inner = shape
    plan = launch.plan(layout(*shape, itemsize), device, reduces)
    assert 1 <= plan.threads <= launch.COLUMN_THREADS
    assert plan.threads % 32 == 0
    assert plan.blocks < 2**31
    assert plan.lanes * itemsize <= 16
    if isinstance(plan, Rows):
        assert inner % plan.lanes == 0, "no vector crosses the end of a row"
        assert plan.blocks == channels * plan.parts
        assert not reduces or plan.parts <= launch.MOST_PARTS
    else:
        assert plan.channels * inner % plan.lanes == 0, "tiles begin at whole vectors"
        assert channels * inner % plan.lanes == 0, "the last vector of a row is whole"
        assert plan.tiles * plan.channels >= channels > (plan.tiles - 1) * plan.channels
        assert plan.across * plan.lanes == plan.channels * inner
        assert plan.lanes <= launch.COLUMN_LANES
        assert plan.across * plan.deep <= plan.threads
        assert plan.channels * inner <= launch.COLUMN_THREADS // 2 * plan.lanes, "shared memory has room for that"
        assert 1 <= plan.splits <= outer
        assert plan.blocks == plan.tiles * plan.splits


@pytest.mark.parametrize(
    ("shape", "family", "lanes"),
    [
        ((32, 64, 3136), Rows, 4),
        ((64, 512, 49), Columns, 4),  # 7x7: 49 columns are no whole vectors, those of four channels are
        ((100352, 64, 1), Columns, 4),
        ((100352, 63, 1), Columns, 1),
        ((2, 3, 1025), Rows, 1),
        ((32, 512, 196), Rows, 4),
    ],
)
def test_which_family(shape, family, lanes):
    plan = launch.plan(layout(*shape), H100, True)
    assert type(plan) is family
    assert plan.lanes == lanes


def test_a_device_is_filled_where_there_is_work():
    for shape in ((4096, 1, 784), (32, 64, 3136), (100352, 64, 1), (16, 3, 50176)):
        for reduces in (True, False):
            assert launch.plan(layout(*shape), H100, reduces).blocks >= H100.multiprocessors
    # no lane of a 7x7 map's vectors idles
    plan = launch.plan(layout(64, 512, 49), H100, True)
    assert plan.across * plan.deep / plan.threads > 0.9


def test_few_rows_are_not_shared_for_nothing():
    plan = launch.plan(layout(8, 64, 64), H100, True)
    assert plan.blocks <= 64
    assert launch.plan(layout(1, 1, 1), H100, True).blocks == 1


@pytest.mark.parametrize(
    ("shape", "at_once"),
    [
        ((64, 256, 784), True),  # 256 channels of 200 kB on 132 multiprocessors: two turns, 26 MB at one time
        ((128, 512, 196), True),
        ((64, 256, 3136), False),  # 132 channels of 800 kB do not stay in the cache
        ((32, 64, 3136), False),  # half of the multiprocessors would idle
        ((64, 140, 784), False),  # all but 8 of them in the second turn
        ((4, 3, 1024), True),  # little work: not worth a second block, nor a second launch
        ((64, 64, 12544), False),
        ((64, 512, 49), False),  # columns
    ],
)
def test_training_in_one_launch(shape, at_once):
    whole = layout(*shape)
    plan = launch.plan(whole, H100, True)
    assert launch.in_one_launch(whole, plan, H100) is at_once
    if at_once:
        assert plan.parts == 1
        assert plan.threads <= launch.ALONE_THREADS
    assert not launch.in_one_launch(whole, plan, Device(132, 1 << 10))


def test_backward_reads_two_arrays_twice():
    whole = layout(128, 512, 196)
    both = dataclasses.replace(whole, arrays=2)
    for device, at_once in ((H100, True), (Device(132, 24 << 20), False)):
        assert launch.in_one_launch(whole, launch.plan(whole, device, True), device)
        assert launch.in_one_launch(both, launch.plan(both, device, True), device) is at_once


def test_what_a_small_cache_changes():
    """The same device with less cache takes channels apart: nothing is gained by having one for oneself."""
    whole = layout(64, 256, 784)
    assert launch.plan(whole, H100, True).parts == 1
    assert launch.plan(whole, Device(132, 4 << 20), True).parts > 1


def test_what_is_asked_of_a_device():
    asked = SimpleNamespace(MULTIPROCESSOR_COUNT=132, L2_CACHE_SIZE=50 << 20)
    assert Device.of(asked) == H100


def test_alignment():
    assert launch.alignment(4, 4, (256, 64)) == 4
    assert launch.alignment(4, 4, (256, 24)) == 2
    assert launch.alignment(4, 4, (260, 64)) == 1
    assert launch.alignment(2, 8, (256, 16)) == 8
    assert launch.alignment(8, 2, (256, -48)) == 2
    assert launch.alignment(1, 1, (3,)) == 1


def test_gaps_between_channels_need_rows_or_nothing_inside():
    gaps = dataclasses.replace(layout(64, 512, 49), packed=False)
    assert type(launch.plan(gaps, H100, True)) is Rows
    side_by_side = dataclasses.replace(layout(64, 512, 1), packed=False)
    assert type(launch.plan(side_by_side, H100, True)) is Columns


def test_plans_are_frozen_and_found_again():
    plan = launch.plan(layout(32, 64, 3136), H100, True)
    assert launch.plan(layout(32, 64, 3136), H100, True) is plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.parts = 3


# --- launching without Numba -----------------------------------------------------------------------------------------


class Kernel:
    """A dispatcher as numba-cuda 0.30 leaves it after a launch."""

    def __init__(self):
        function = SimpleNamespace(kernel="loaded")
        library = SimpleNamespace(get_cufunc=lambda: function)
        self.overloads = {"signature": SimpleNamespace(_codelibrary=library)}
        self.launched = []

    def __getitem__(self, configuration):
        launches = self.launched

        class Configured:
            stream = "stream"

            def __call__(self, *arguments):
                launches.append((configuration, arguments))

        return Configured()


@pytest.fixture
def core(monkeypatch):
    """cuda.core, that notes what it is asked to launch."""
    launched = []
    module = SimpleNamespace(
        LaunchConfig=lambda grid, block: (grid, block), launch=lambda *arguments: launched.append(arguments)
    )
    monkeypatch.setitem(sys.modules, "cuda.core", module)
    monkeypatch.setattr(launcher, "_is_known", lambda: True)
    monkeypatch.setattr(launcher.memory, "is_only_one_device", lambda: True)
    monkeypatch.setattr(launcher.memory, "queue_of", lambda stream: stream)
    monkeypatch.setattr(launcher.cuda, "current_context", lambda: None, raising=False)
    return launched


def test_numba_launches_once(core):
    kernel, place = Kernel(), launcher.Place(0, 7)
    launch = launcher.Launch(kernel, 12, 256)
    for n in range(3):
        launch(place, n, 0.5)
    assert kernel.launched == [((12, 256, 7), (0, 0.5))]
    assert core == [("stream", (12, 256), "loaded", n, 0.5) for n in (1, 2)]
    launch(launcher.Place(0, 8), 3)
    assert len(kernel.launched) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda patch, kernel: patch.setattr(launcher, "_is_known", lambda: False),
        lambda patch, kernel: patch.setitem(sys.modules, "cuda.core", None),
        lambda patch, kernel: kernel.overloads.clear(),
        lambda patch, kernel: kernel.overloads.update(another=1),
        lambda patch, kernel: vars(kernel.overloads["signature"]).clear(),
    ],
)
def test_numba_launches_always_where_the_rest_is_not_known(monkeypatch, core, change):
    kernel = Kernel()
    change(monkeypatch, kernel)
    launch = launcher.Launch(kernel, 12, 256)
    for n in range(3):
        launch(launcher.Place(0, 0), n)
    assert [arguments for _, arguments in kernel.launched] == [(0,), (1,), (2,)]
    assert core == []


def test_kernels_are_loaded_without_a_launch(core):
    kernel, place = Kernel(), launcher.Place(0, 7)
    kernel.typeof_pyval, compiled = type, []
    kernel.compile = compiled.append
    launch = launcher.Launch(kernel, 12, 256)
    assert not launch.is_ready(place)
    launch.load(place, 1, 0.5)
    assert compiled == [(int, float)]
    assert kernel.launched == []
    launch(place, 1, 0.5)
    assert launch.is_ready(place)


def test_nothing_moves_before_all_kernels_are_loaded(monkeypatch):
    """Ctrl-C while the second kernel compiles: the first, which moves the running arrays, was not launched."""
    happened = []

    class Stopped:
        is_ready = staticmethod(lambda place: False)

        def load(self, *arguments):
            raise KeyboardInterrupt

    normalize = recipes.Affine(Stopped(), (1, 1), (1, 1), (1, 1), 0)
    training = recipes.Training(lambda *arguments: happened.append("moved"), normalize, 4.0)
    with pytest.raises(KeyboardInterrupt):
        training(launcher.Place(None, 0), 256, 256, 512, (1, 2, 3), 0, 0, 1e-5, 0.0, (1024, 2048, 0.1, 1))
    assert happened == []


@pytest.fixture
def several(monkeypatch):
    """Two devices, the second of which is the current one."""
    monkeypatch.setattr(memory, "is_only_one_device", lambda: False)
    current = SimpleNamespace(id=1)
    monkeypatch.setattr(memory.cuda, "get_current_device", lambda: current)
    return current


def test_arrays_that_do_not_say_where_they_are_are_on_the_current_device(several):
    library = SimpleNamespace(stream=lambda owner, device: 5)
    assert launcher.place_of(library, None, None) == (1, 5)
    several.id = 0
    assert launcher.place_of(library, None, None) == (0, 5)
    assert launcher.place_of(library, None, 3) == (3, 5)


def test_threads_have_workspaces_of_their_own_on_their_own_stream(monkeypatch):
    for name in ("zeros", "allocate"):
        monkeypatch.setattr(memory, name, lambda count: np.zeros(1))
    monkeypatch.setattr(memory, "address_of", lambda memory: 256)
    monkeypatch.setattr(memory, "there", lambda device: nullcontext())
    monkeypatch.setitem(vars(sys.modules["nbbn.cuda.workspace"]), "_spaces", {})
    for stream, alike in ((0, True), (PER_THREAD, False)):
        found = []
        other = threading.Thread(target=lambda s=stream, f=found: f.append(workspace(0, s, 1, 1)))
        other.start()
        other.join()
        found.append(workspace(0, stream, 1, 1))
        assert (found[0] is found[1]) is alike


def test_releases(monkeypatch):
    monkeypatch.setattr(launcher.metadata, "version", lambda _: "0.30.4")
    assert not launcher._is_known(), "only if it is asked for"
    monkeypatch.setenv("NBBN_CUDA_CORE_LAUNCH", "1")
    for release, known in (("0.30.4", True), ("0.31.0", False), ("1.0", False)):
        monkeypatch.setattr(launcher.metadata, "version", lambda _, release=release: release)
        assert launcher._is_known() is known


def test_numbers_are_packed_as_kernels_take_them():
    """What cuda.core makes of integers and floats: 8 bytes each, as the kernels' int64 and float64."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler")
    packed = handler.ParamHolder((2**40, -5, 0.1))
    places = ctypes.cast(packed.ptr, ctypes.POINTER(ctypes.c_void_p))
    assert [ctypes.c_int64.from_address(places[k]).value for k in (0, 1)] == [2**40, -5]
    assert ctypes.c_double.from_address(places[2]).value == 0.1
