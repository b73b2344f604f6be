"""JAX as nbbn meets it, in simulated device memory: its protocol and its rules, without its compiler.

An array is computed when somebody waits for it, is immutable, has no CUDA array interface, and gives and takes memory
by DLPack capsules; what is taken over is rounded to what JAX holds by default: float64 to float32.
"""

import ctypes
from types import SimpleNamespace

import device_arrays
import numpy as np

from nbbn.cuda import dlpack
from nbbn.cuda.storage import BFLOAT16, packed

GPU = SimpleNamespace(platform="gpu")
READY_STREAM = 77

#: What happened, in order.
EVENTS = []


class Array:
    """An array of float32, bfloat16, bool or integers."""

    def __init__(self, memory, values, bfloat16=False, devices=1):
        self._memory, self._values, self._bfloat16, self._devices = memory, values, bfloat16, devices
        self._ready = False

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: BFLOAT16 if self._bfloat16 else self._values.dtype)

    def devices(self):
        return [GPU] * self._devices

    def block_until_ready(self):
        self._ready = True
        return self

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None):
        assert self._ready or stream is not None, "looked at before it was computed"
        strides = [s // self._values.itemsize for s in self._values.strides]
        return dlpack.capsule(
            self._values.ctypes.data, self._values.shape, strides, self.dtype, (2, 0), SimpleNamespace(memory=self)
        )

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("went through the host")

    def get(self):
        return device_arrays.Array(self._memory, self._values, self._bfloat16).get()


Array.__module__ = "jaxlib._jax"


def put(values, **options):
    made = device_arrays.put(values, **options)
    return Array(made.memory, made.values, made.bfloat16)


def from_dlpack(value):
    """Takes over memory where it lies, and gives it back when the array goes."""
    EVENTS.append("taken")
    kind, number = value.__dlpack_device__()
    assert (kind, number) == (2, 0)
    capsule = value.__dlpack__(stream=READY_STREAM)
    seen = dlpack.look(capsule)
    assert seen.address % 256 == 0, "JAX would copy it"
    dtype = np.dtype(np.uint16) if seen.dtype is BFLOAT16 else seen.dtype
    strides = packed(seen.shape, 1) if seen.strides is None else seen.strides
    memory = (ctypes.c_char * (int(np.prod(seen.shape)) * dtype.itemsize)).from_address(seen.address)
    values = np.frombuffer(memory, dtype)
    values = np.lib.stride_tricks.as_strided(values, seen.shape, [s * dtype.itemsize for s in strides])
    array = Array(capsule, values, seen.dtype is BFLOAT16)
    return array if dtype != np.float64 else put(values.astype(np.float32))


class _Numpy:
    @staticmethod
    def transpose(value, order):
        return put(np.ascontiguousarray(value._values.transpose(order)))

    @staticmethod
    def broadcast_to(value, shape):
        return put(np.ascontiguousarray(np.broadcast_to(value._values, shape)))

    @staticmethod
    def zeros(shape, dtype):
        return put(np.zeros(shape, dtype))


MODULE = SimpleNamespace(dlpack=SimpleNamespace(from_dlpack=from_dlpack), numpy=_Numpy)
