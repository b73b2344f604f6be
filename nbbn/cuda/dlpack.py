"""DLPack: looking at an array of another library, and handing over memory of ours, without a copy.

The structures are those of dlpack.h (version 0.8, the "dltensor" capsules that every library reads).
"""

import ctypes
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbbn.cuda.storage import BFLOAT16

CPU, CUDA = 1, 2  # kDLCPU, kDLCUDA
_NAME = b"dltensor"

# kDLInt and so on; what stands beside bfloat16, bool and complex has no NumPy kind of its own
_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_BFLOAT = 4


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_python = ctypes.pythonapi
_new = _python.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _Destructor)
# of a capsule that is being destroyed: an address, since counting references to it would revive it
_is_valid = _python.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p)
_pointer = _python.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)


@dataclass(frozen=True)
class Seen:
    """An array as its capsule describes it. The library keeps the memory for as long as the capsule lives."""

    capsule: Any
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # in values; None: packed
    dtype: Any
    device: int


def look(capsule: Any) -> Seen:
    """What a capsule holds; it stays unused, so the library is told when it is let go."""
    managed = ctypes.cast(_pointer(id(capsule), _NAME), ctypes.POINTER(_Managed)).contents
    tensor = managed.tensor
    ndim = tensor.ndim
    strides = tuple(tensor.strides[:ndim]) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    return Seen(capsule, address, tuple(tensor.shape[:ndim]), strides, _dtype(tensor.dtype), tensor.device.number)


def _dtype(kind: _Type) -> Any:
    if kind.code == _BFLOAT and kind.bits == 16:
        return BFLOAT16
    letters = {code: letter for letter, code in _CODES.items()}
    if kind.code not in letters or kind.lanes != 1 or kind.bits % 8:
        raise TypeError(f"DLPack type {kind.code} of {kind.bits} bits")
    return np.dtype(f"{letters[kind.code]}{kind.bits // 8}")


#: What was handed over and not yet given back: by address of the structure, all that must stay alive.
_handed_over: dict[int, Any] = {}
#: What was given back, perhaps by a thread in which no memory can be freed.
_given_back: deque[Any] = deque()


def free() -> None:
    """Let go of memory that consumers gave back; in a thread of Python's."""
    while _given_back:
        _given_back.popleft()


@_Deleter
def _give_back(managed: Any) -> None:
    _given_back.append(_handed_over.pop(ctypes.addressof(managed.contents), None))


@_Destructor
def _destroy(capsule: int) -> None:
    if _is_valid(capsule, _NAME):  # nobody took it: whoever does renames it, and calls the deleter himself
        _given_back.append(_handed_over.pop(_pointer(capsule, _NAME), None))


def capsule(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any, device: tuple[int, int],
    keep: Any,
) -> Any:  # fmt: skip
    """Memory as a capsule: strides in values; `keep` lives until the consumer gave the memory back."""
    ndim = len(shape)
    sizes = (ctypes.c_int64 * ndim)(*shape)
    steps = None if strides is None else (ctypes.c_int64 * ndim)(*strides)
    code = _BFLOAT if dtype is BFLOAT16 else _CODES[dtype.kind]
    tensor = _Tensor(
        address, _Device(*device), ndim, _Type(code, 8 * dtype.itemsize, 1),
        ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64)) if steps is not None else None, 0,
    )  # fmt: skip
    managed = _Managed(tensor, None, _give_back)
    place = ctypes.addressof(managed)
    _handed_over[place] = managed, sizes, steps, keep
    return _new(place, _NAME, _destroy)
