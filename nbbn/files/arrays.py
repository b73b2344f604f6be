"""Arrays in ``.npy`` files and ``.npz`` archives, read as streams of values. No pickles: object arrays are refused."""

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nbbn.arrays import Array, is_data_float, is_data_integer
from nbbn.files.blocks import BLOCK_BYTES, Cut, Piece


class UnreadableError(Exception):
    """A file is not what it should be; the message says why and the caller which."""


@contextmanager
def problems_named() -> Iterator[None]:
    """What goes wrong with a file becomes an `UnreadableError` that says what in one line."""
    try:
        yield
    except OSError as error:
        raise UnreadableError(error.strerror or str(error) or type(error).__name__) from error
    except zlib.error as error:
        raise UnreadableError(f"damaged: {error}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UnreadableError(str(error) or type(error).__name__) from error


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """One array on disk: `name` for messages, and `open`, which gives a stream that starts at its first value.

    `seekable`: whether several threads may each have a stream and jump in it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    open: Callable[[], IO[bytes]]
    seekable: bool

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cut(self, axis: int | None) -> Cut:
        """The values as (outer, channels, inner) in the order they have in the file."""
        if not self.shape:
            raise UnreadableError("expected an array with a channel axis, got a single number")
        shape = self.shape[::-1] if self.fortran_order else self.shape
        limit = max(1, BLOCK_BYTES // self.dtype.itemsize)
        if axis is None:
            return Cut(1, 1, math.prod(shape), limit)
        if len(shape) == 1:
            raise UnreadableError(f"expected at least 2 dimensions, got shape {self.shape}; --axis none: one channel")
        if not -len(shape) <= axis < len(shape):
            raise UnreadableError(f"expected -{len(shape)} <= axis < {len(shape)}, got {axis} for shape {self.shape}")
        position = axis % len(shape)
        if self.fortran_order:
            position = len(shape) - 1 - position
        return Cut(math.prod(shape[:position]), shape[position], math.prod(shape[position + 1 :]), limit)


def pieces(file: ArrayFile, cut: Cut, chosen: range) -> Iterator[tuple[Piece, Array]]:
    """The chosen pieces, one after the other in the same memory, as (outer, channels, inner)."""
    with problems_named(), file.open() as stream:
        buffer = np.empty(min(cut.limit, math.prod(file.shape)), file.dtype)
        if chosen.start:
            stream.seek(cut[chosen.start].start * file.dtype.itemsize, 1)
        for piece in map(cut.__getitem__, chosen):
            yield piece, _read(stream, piece, buffer)
        if not file.seekable:
            stream.read(1)  # an archive looks at its checksum when it comes to the end


def _read(stream: IO[bytes], piece: Piece, buffer: Array) -> Array:
    """The next values of the stream, in `buffer`, as (outer, channels, inner) of native byte order."""
    values = buffer[: piece.size]
    target = values.view(np.uint8)
    filled = 0
    while filled < target.size:
        got: int = stream.readinto(target[filled:])  # type: ignore[attr-defined]
        if not got:
            raise UnreadableError(f"ends early: {target.size - filled} bytes missing after value {piece.start}")
        filled += got
    if not values.dtype.isnative:
        values = values.byteswap(inplace=True).view(values.dtype.newbyteorder("="))
    return values.reshape(piece.outer, piece.channels, piece.inner)


def find(path: Path, member: str | None) -> list[ArrayFile]:
    """The array of a ``.npy`` file, or the arrays (those called `member`) of an ``.npz`` archive."""
    with problems_named():
        return _members(path, member) if path.suffix.lower() == ".npz" else [_npy(path)]


def _npy(path: Path) -> ArrayFile:
    with path.open("rb") as file:
        shape, fortran_order, dtype = _header(file)
        offset = file.tell()
        _long_enough(shape, dtype, file.seek(0, 2) - offset)

    def open_at_values() -> IO[bytes]:
        file = path.open("rb", buffering=0)
        file.seek(offset)
        return file

    return ArrayFile(str(path), shape, dtype, fortran_order, open_at_values, seekable=True)


def _members(path: Path, member: str | None) -> list[ArrayFile]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if member in (None, name, name.removesuffix(".npy"))]
        if not names:
            raise UnreadableError(f"has no array {member!r}, only {', '.join(archive.namelist()) or 'nothing'}")
        return [_member(archive, path, name) for name in names]


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> ArrayFile:
    with archive.open(name) as stream:
        try:
            shape, fortran_order, dtype = _header(stream)
            _long_enough(shape, dtype, archive.getinfo(name).file_size - stream.tell())
        except UnreadableError as error:
            raise UnreadableError(f"array {name.removesuffix('.npy')!r}: {error}") from error

    def open_at_values() -> IO[bytes]:
        with zipfile.ZipFile(path) as archive:
            stream = archive.open(name)  # it keeps the file open until it is closed itself
        _header(stream)
        return stream

    shown = f"{path}:{name.removesuffix('.npy')}"
    return ArrayFile(shown, shape, dtype, fortran_order, open_at_values, seekable=False)


def _long_enough(shape: tuple[int, ...], dtype: np.dtype[Any], there: int) -> None:
    """Whether that many bytes can hold what the header promises."""
    missing = math.prod(shape) * dtype.itemsize - there
    if missing > 0:
        raise UnreadableError(f"ends early: {missing} bytes missing for shape {shape} of {dtype}")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype; the stream then stands at the first value."""
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError:
        raise UnreadableError("not a .npy file") from None
    if version not in {(1, 0), (2, 0)}:  # 3.0 is for names of fields
        raise UnreadableError(f"expected an array of numbers in .npy format 1.0 or 2.0, got {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(stream)
    except Exception as error:  # it parses Python: whatever a damaged text makes of that
        raise UnreadableError("a .npy file with a damaged header") from error
    if not (is_data_float(dtype) or is_data_integer(dtype)):
        raise UnreadableError(f"expected numbers (float16, float32, float64, integers, bool), got dtype {dtype}")
    if any(n < 0 for n in shape):
        raise UnreadableError(f"not a shape: {shape}")
    return shape, fortran_order, dtype
