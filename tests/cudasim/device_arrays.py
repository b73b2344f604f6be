"""Arrays that live in simulated device memory, with the CUDA array interface: a library for nbbn to dispatch on."""

import numpy as np

from nbbn.cuda import libraries, simulated


class Array:
    """A strided array in simulated device memory."""

    def __init__(self, memory, values, bfloat16=False):
        self.memory, self.values, self.bfloat16 = memory, values, bfloat16

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return libraries.BFLOAT16 if self.bfloat16 else self.values.dtype

    @property
    def __cuda_array_interface__(self):
        values = self.values
        return {
            "shape": values.shape,
            "strides": values.strides,
            "typestr": "<V2" if self.bfloat16 else values.dtype.str,
            "data": (values.ctypes.data, False),
            "version": 3,
            "stream": None,
        }

    def __getitem__(self, index):
        return Array(self.memory, self.values[index], self.bfloat16)

    def get(self):
        """A copy in host memory, bfloat16 as float32."""
        if self.bfloat16:
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        return self.values.copy()


def empty(shape, dtype):
    """A new array, filled with NaN."""
    bfloat16 = dtype is libraries.BFLOAT16
    dtype = np.dtype(np.uint16 if bfloat16 else dtype)
    memory = simulated.MEMORY.allocate(int(np.prod(shape)) * dtype.itemsize)
    return Array(memory, memory.view(dtype).reshape(shape), bfloat16)


def put(values, bfloat16=False):
    """A copy of a NumPy array on the simulated device, in its own order of axes."""
    values = np.asarray(values)
    if bfloat16:
        values = simulated.to_bfloat16(values)
    order = np.argsort([-abs(s) for s in values.strides], kind="stable")
    array = empty([values.shape[a] for a in order], libraries.BFLOAT16 if bfloat16 else values.dtype)
    array.values = array.values.transpose(np.argsort(order))
    array.values[...] = values
    return array


class Library:
    """What nbbn asks of an array library."""

    is_plain = True
    pickles = False  # the copy would not be in simulated memory

    def describe(self, name, value):
        return *libraries._interface(name, value), None

    def empty(self, shape, dtype, number):
        return empty(shape, dtype)

    def address(self, made):
        return made.values.ctypes.data

    def transpose(self, value, order):
        return Array(value.memory, value.values.transpose(order), value.bfloat16)

    def broadcast(self, value, shape):
        return Array(value.memory, np.broadcast_to(value.values, shape), value.bfloat16)

    def contiguous(self, value):
        copy = empty(value.shape, value.dtype)
        copy.values[...] = value.values
        return copy

    def assign(self, target, source):
        target.values[...] = source.values.reshape(target.shape)

    def fill(self, target, values):
        target.values[...] = values

    def to_host(self, value):
        return value.get()

    def stream(self, value, number):
        return 0

    def finished(self, value):
        return value


def register():
    """Let nbbn know of these arrays."""
    libraries.LIBRARIES[__name__.partition(".")[0]] = Library()
