"""Arrays on a device as geometry and address: nothing is read, so host memory can stand in, and no GPU is needed."""

from types import SimpleNamespace

import numpy as np
import pytest

from nbbn import checks, layout
from nbbn.cuda import device, libraries

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


def test_jax_arrays_are_refused_with_advice():
    array = type("Array", (), {"__module__": "jaxlib._jax", "__cuda_array_interface__": {}})()
    with pytest.raises(TypeError, match=r"x: .*JAX array on a CUDA device; pass cupy.from_dlpack\(x\)"):
        device.view("x", array)


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
