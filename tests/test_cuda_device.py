"""Arrays on a device as geometry and address: nothing is read, so host memory can stand in, and no GPU is needed."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest

import nbbn
from nbbn import arrays, checks, layout
from nbbn.cuda import device, dlpack, libraries

VALUES = np.arange(60, dtype=np.float32).reshape(3, 4, 5)


class Interface:
    """Any library's array with the CUDA array interface."""

    def __init__(self, values, **changes):
        self.values = values
        self.__cuda_array_interface__ = {
            "shape": values.shape, "strides": values.strides, "typestr": values.dtype.str,
            "data": (values.ctypes.data, False), "version": 3, "stream": 7,
        } | changes  # fmt: skip


class CuPyArray:
    """The attributes of CuPy's arrays that are asked for."""

    def __init__(self, values):
        self.data = SimpleNamespace(ptr=values.ctypes.data)
        self.device = SimpleNamespace(id=1)
        self.shape, self.strides, self.dtype = values.shape, values.strides, values.dtype


CuPyArray.__module__ = "cupy"


@pytest.mark.parametrize("make", [Interface, CuPyArray])
@pytest.mark.parametrize("values", [VALUES, VALUES[:, ::2, 1:], VALUES.T, VALUES[::-1], VALUES[:0]])
def test_geometry(make, values):
    array = device.view("x", make(values))
    assert (array.shape, array.ndim, array.size, array.itemsize) == (values.shape, values.ndim, values.size, 4)
    assert array.dtype == np.float32
    assert array.kind.name == "float32"
    assert array.address == values.ctypes.data
    if values.size:
        assert array.strides == values.strides
        assert array.flags.c_contiguous == values.flags.c_contiguous
        turned = array.transpose((2, 0, 1))
        assert turned.strides == values.transpose(2, 0, 1).strides
        assert turned.address == array.address


def test_what_the_interface_leaves_out():
    array = device.view("x", Interface(VALUES, strides=None))
    assert array.strides == VALUES.strides
    assert array.stream() == 7
    assert array.device is None
    assert device.view("x", CuPyArray(VALUES)).device == 1
    assert device.view("x", Interface(VALUES, stream=None)).stream() == 0
    frozen = device.view("x", Interface(VALUES, data=(VALUES.ctypes.data, True)))
    with pytest.raises(ValueError, match="out: expected a writable array"):
        checks.output(frozen, frozen)
    with pytest.raises(TypeError, match="x: expected a plain array, got a masked one"):
        device.view("x", Interface(VALUES, mask=VALUES))
    with pytest.raises(TypeError, match="x: expected native byte order"):
        device.view("x", Interface(VALUES, typestr=">f4"))


def test_canonical_views_do_not_read():
    for values in (VALUES, VALUES.T, VALUES[:, :, ::-1]):
        array = device.view("x", Interface(values))
        order = layout.canonical(array, 1)
        expected = layout.canonical(values, 1).view(values)
        got = order.view(array)
        if expected is None:
            assert got is None
        else:
            assert (got.shape, got.strides) == (expected.shape, expected.strides)


def test_devices_are_told_apart():
    first, second = device.view("x", Interface(VALUES)), device.view("x", CuPyArray(VALUES))
    with pytest.raises(TypeError, match="weight: expected an array on CUDA device 0, as x is, got one on CUDA"):
        checks.same_place(first, weight=second)
    with pytest.raises(TypeError, match="weight: expected an array in host memory, as x is, got one on CUDA device 1"):
        checks.same_place(VALUES, weight=second)
    checks.same_place(first, weight=first, bias=None)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "bool", "int32", "uint8"])
def test_capsules_as_jax_makes_and_takes_them(kind):
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(24).reshape(2, 3, 4).astype(kind)
    seen = dlpack.look(x.__dlpack__())
    assert seen.address == x.unsafe_buffer_pointer()
    assert (seen.shape, seen.strides) in [((2, 3, 4), (12, 4, 1)), ((2, 3, 4), None)]
    assert seen.dtype.name == kind
    assert seen.device == 0
    dlpack.free()
    before = len(dlpack._handed_over)
    # what is handed over is a GPU's memory there, and the host's here
    memory = np.zeros(24 * seen.dtype.itemsize + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][: 24 * seen.dtype.itemsize]
    memory[:] = np.asarray(x).reshape(-1).view(np.uint8)
    turned = Handed(memory, (4, 2, 3), (1, 12, 4), seen.dtype)
    y = jax.dlpack.from_dlpack(turned)
    assert y.unsafe_buffer_pointer() == memory.ctypes.data, "nothing was copied"
    assert str(y.dtype) == kind
    assert (np.asarray(y) == np.asarray(x).transpose(2, 0, 1)).all()
    assert len(dlpack._handed_over) == before + 1
    del y
    gc.collect()
    assert len(dlpack._handed_over) == before
    assert len(dlpack._given_back) == 1
    dlpack.free()
    turned.__dlpack__()  # nobody takes it
    assert len(dlpack._handed_over) == before


class Handed:
    """Host memory, handed over."""

    def __init__(self, memory, shape, strides, dtype):
        self.memory, self.shape, self.strides, self.dtype = memory, shape, strides, dtype

    def __dlpack_device__(self):
        return dlpack.CPU, 0

    def __dlpack__(self, **_):
        place = self.memory.ctypes.data
        return dlpack.capsule(place, self.shape, self.strides, self.dtype, self.__dlpack_device__(), self.memory)


def test_where_an_array_of_jax_is():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((4, 3))
    assert not arrays.has_cuda_memory(x)
    assert type(arrays.any_array("x", x)) is np.ndarray
    with pytest.raises(jax.errors.TracerArrayConversionError):  # inside a compiled function there are no values
        jax.jit(nbbn.batch_stats)(x)


def test_pytorch_tensors():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1)[::2]
    array = device.view("x", tensor)
    assert (array.shape, array.strides) == ((3, 3, 4), (8, 80, 20))
    assert array.address == tensor.data_ptr()
    assert array.kind.name == "float32"
    for dtype, kind in (
        (torch.bfloat16, "bfloat16"),
        (torch.half, "float16"),
        (torch.bool, "bool"),
        (torch.int64, "int64"),
    ):
        assert device.view("x", tensor.to(dtype)).kind.name == kind
    assert device.view("x", tensor.to(torch.complex64)).kind is None
    with pytest.raises(TypeError, match=r"x: .*requires grad; pass x.detach\(\)"):
        device.view("x", tensor.clone().requires_grad_())
    with pytest.raises(TypeError, match=r"x: expected a plain strided tensor, got layout torch.sparse_coo"):
        device.view("x", torch.eye(3).to_sparse())
    library = libraries.library_of(tensor)
    assert library.contiguous(tensor).is_contiguous()
    assert library.contiguous(tensor.contiguous()).data_ptr() != tensor.contiguous().data_ptr()
    target = torch.zeros(5)
    library.fill(target, np.arange(5.0))
    assert library.to_host(target).tolist() == [0, 1, 2, 3, 4]
    library.assign(target, torch.ones(5))
    assert library.transpose(tensor, (1, 0, 2)).shape == (3, 3, 4)
    assert library.broadcast(torch.ones(1, 4), (3, 4)).shape == (3, 4)
