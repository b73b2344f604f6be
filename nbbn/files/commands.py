"""The commands ``stats`` and ``normalize``: what they read, what they print, what they return."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nbbn.arrays import Array
from nbbn.files import images, normalized, progress, summary
from nbbn.files.arrays import ArrayFile, UnreadableError, find
from nbbn.files.summary import Job, Total
from nbbn.moments import Moments

#: Exit codes: everything done; some file could not be read or written; not even tried.
DONE, FAILED, UNUSABLE = 0, 1, 2


def stats(options: argparse.Namespace) -> int:
    """Statistics of all files together, as a table or as JSON; files that cannot be read are named."""
    if any(path.is_dir() or images.is_image(path) for path in options.files) and find_spec("PIL") is None:
        print("images need Pillow: pip install pillow", file=sys.stderr)
        return UNUSABLE
    failed: dict[str, str] = {}
    jobs = [job for path in options.files for job in _jobs(path, options, failed)]
    with progress.bar("statistics", sum(job.size for job in jobs)) as advance:
        total = summary.total_of(jobs, advance)
    failed |= total.failed
    for name, problem in failed.items():
        print(f"{name}: {problem}", file=sys.stderr)
    if options.json:
        print(json.dumps(_record(total, failed, options.range), indent=1))
    elif total.summary is not None:
        print(_table(total, options.range))
    return FAILED if failed else DONE


def normalize(options: argparse.Namespace) -> int:
    """Write the normalized array; if anything goes wrong, say what and leave nothing behind."""
    name = str(options.file)
    try:
        file = _only(find(options.file, options.member))
        name = file.name
        cut = file.cut(options.axis)
        moments = _moments_of(file, options) if options.stats is None else _moments_in(options.stats, cut.channels)
        with progress.bar("normalizing", file.nbytes) as advance:
            normalized.write(file, cut, moments, options.eps, options.output, advance)
    except UnreadableError as error:
        print(f"{name}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{options.output}: cannot be written: {error.strerror or error}", file=sys.stderr)
    else:
        return DONE
    return FAILED


# --- what to read ---------------------------------------------------------------------------------------------------


def _jobs(path: Path, options: argparse.Namespace, failed: dict[str, str]) -> Iterator[Job]:
    """All that there is to do for one argument; what cannot be read goes to `failed`."""
    try:
        if path.is_dir():
            found: list[Path | ArrayFile] = list(images.inside(path))
        else:
            found = [path] if images.is_image(path) else list(find(path, options.member))
    except UnreadableError as error:
        failed[str(path)] = str(error)
        return
    for source in found:
        try:
            if isinstance(source, Path):
                yield summary.of_image(source, options.range)
            else:
                yield from summary.of_array(source, options.axis, options.range)
        except UnreadableError as error:
            failed[source.name if isinstance(source, ArrayFile) else str(source)] = str(error)


def _only(files: list[ArrayFile]) -> ArrayFile:
    if len(files) != 1:
        names = ", ".join(file.name.rpartition(":")[2] for file in files)
        raise UnreadableError(f"expected one array, got {names}; choose with --member")
    return files[0]


def _moments_of(file: ArrayFile, options: argparse.Namespace) -> Moments:
    with progress.bar("statistics", file.nbytes) as advance:
        total = summary.total_of(summary.of_array(file, options.axis, with_range=False), advance)
    if total.summary is None:
        raise UnreadableError(total.failed[file.name])
    return total.summary.moments


def _moments_in(path: Path, channels: int) -> Moments:
    """What ``stats --json`` printed."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        count, mean, m2 = (np.array(record[name]) for name in ("count", "mean", "m2"))
        moments = Moments(count.astype(np.int64), mean.astype(np.float64), m2.astype(np.float64))
    except OSError as error:
        raise UnreadableError(f"--stats {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UnreadableError(f"--stats {path}: expected what `nbbn stats --json` prints: {error!r}") from error
    if moments.count.size != channels:
        raise UnreadableError(f"expected {moments.count.size} channels, as in {path}, got {channels}")
    unusable = (moments.count == 0) | ~np.isfinite(moments.mean) | ~np.isfinite(moments.m2)
    if unusable.any():
        c = int(np.argmax(unusable))
        raise UnreadableError(f"--stats {path}: expected values and finite statistics in every channel, not so in {c}")
    return moments


# --- what to print --------------------------------------------------------------------------------------------------


def _columns(total: Total, with_range: bool) -> dict[str, Array]:
    if total.summary is None:
        return {}
    moments = total.summary.moments
    columns: dict[str, Array] = {"count": moments.count, "mean": moments.mean, "std": moments.std()}
    if with_range:
        nothing = moments.count == 0
        columns["min"] = np.where(nothing, np.nan, total.summary.least)
        columns["max"] = np.where(nothing, np.nan, total.summary.most)
    return columns


def _table(total: Total, with_range: bool) -> str:
    columns = _columns(total, with_range)
    cells = [["channel", *columns]]
    for c, values in enumerate(zip(*columns.values(), strict=True)):
        cells.append([str(c), str(values[0]), *(f"{value:.6g}" for value in values[1:])])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head = f"{len(total.read)} {'array' if len(total.read) == 1 else 'arrays'}, {len(cells) - 1} channels"
    return "\n".join([head, *("  ".join(map(str.rjust, row, widths)) for row in cells)])


def _record(total: Total, failed: dict[str, str], with_range: bool) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they are null."""
    columns = _columns(total, with_range)
    if total.summary is not None:
        columns |= {"var": total.summary.moments.var(), "m2": total.summary.moments.m2}
    lists = {name: [v if math.isfinite(v) else None for v in values.tolist()] for name, values in columns.items()}
    return {"arrays": len(total.read), "channels": len(lists.get("count", ())), "ddof": 0, **lists, "failed": failed}
