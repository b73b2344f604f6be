"""The command line: ``python -m nbbn info``, ``stats``, ``normalize``, ``warmup`` and ``demo``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import nbbn
from nbbn import checks

#: What `warmup` compiles for: all it can, and what it does unless told.
DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
COMMON = ("float32", "float64", "float16", "bfloat16", "uint8")

#: Packages of the extra `demo`, by the name they are imported under.
_DEMO_NEEDS = ("sklearn", "matplotlib", "rich")
_PICTURE_FORMATS = (".png", ".pdf", ".svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, or 2 if it could not be started as asked."""
    parser = argparse.ArgumentParser(
        prog="python -m nbbn", description="Batch normalization statistics, with Numba CPU kernels."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="versions, CPU features and threads: what a bug report needs",
        description="Print versions, CPU features, threads, threading layer and GPU: what a bug report needs.",
    )
    info.set_defaults(run=_info, parser=info)

    warmup = commands.add_parser(
        "warmup",
        help="compile all kernels now, so that no later process has to: for images and test machines (minutes)",
        description="Compile the kernels of all functions and save them where every later process of this package, on "
        "this kind of processor, finds them: in NUMBA_CACHE_DIR, else beside the package, else in the user's cache.",
    )
    chosen = warmup.add_mutually_exclusive_group()
    chosen.add_argument(
        "--dtype", action="append", choices=DTYPES, help=f"compile for this dtype; repeatable (default: {COMMON})"
    )
    chosen.add_argument("--all", action="store_true", help="compile for every dtype")
    warmup.set_defaults(run=_warmup, parser=warmup)

    demo = commands.add_parser(
        "demo",
        help="train a small network on handwritten digits and measure what its normalization does (under a minute)",
        description=(
            "Train a small convolutional network, written in NumPy with nbbn.BatchNorm, on the 1797 handwritten "
            "digits that scikit-learn ships, and measure what its normalization layers do: single images in "
            "evaluation mode, the forgotten eval(), running statistics that converge and their noise, fine-tuning "
            "with freeze() and recalibrate(), and this machine's speed against NumPy. Prints tables and saves a "
            "picture. Everything but the times is the same in every run with one seed on one machine."
        ),
        epilog="Needs scikit-learn, matplotlib and rich (the extra `demo`). The first run also compiles kernels.",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="seed of all random numbers, >= 0 (default: %(default)s)")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("nbbn-demo.png"),
        metavar="PATH",
        help=f"where to save the picture, as {', '.join(_PICTURE_FORMATS)}; overwritten (default: %(default)s)",
    )
    demo.add_argument("--no-picture", action="store_true", help="print the tables only")
    demo.set_defaults(run=_demo, parser=demo)

    _add_file_commands(commands)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


def _add_file_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stats = commands.add_parser(
        "stats",
        help="count, mean and standard deviation per channel of .npy and .npz files and folders of images",
        description="Print count, mean and standard deviation (population, ddof=0) of each channel of all files "
        "together, as one population. Files are read block by block: memory use does not depend on their size. "
        "Images (Pillow) are read as RGB: three channels of values from 0 to 255.",
        epilog="Exit code: 0; 1 if a file could not be read (it is named, and left out as a whole); 2 if nothing "
        "was tried. Pickled (object) arrays are never loaded.",
    )
    stats.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help=".npy, .npz, an image, or a folder of images"
    )
    _add_array_options(stats)
    stats.add_argument("--range", action="store_true", help="smallest and largest value too (takes longer)")
    stats.add_argument("--json", action="store_true", help="print JSON: also the exact sums, for `normalize --stats`")
    stats.set_defaults(run=_stats, parser=stats)

    normalize = commands.add_parser(
        "normalize",
        help="write (x - mean) / sqrt(var + eps) of a .npy or .npz array, block by block",
        description="Write (x - mean) / sqrt(var + eps), per channel, as .npy: in the dtype of the file, float32 for "
        "integers. The file is read twice, once with --stats; memory use does not depend on its size.",
        epilog="Exit code: 0; 1 if a file could not be read or written: nothing is left behind then; 2 if nothing was "
        "tried.",
    )
    normalize.add_argument("file", type=Path, metavar="FILE", help=".npy, or .npz with one array")
    target = normalize.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "-o", "--output", type=_npy, metavar="OUT.npy", help="overwritten when done; another file than FILE"
    )
    target.add_argument("--in-place", action="store_true", help="replace FILE, a .npy, when done")
    _add_array_options(normalize)
    normalize.add_argument("--eps", type=_eps, default=1e-5, help="added to the variance, >= 0 (default: %(default)s)")
    normalize.add_argument(
        "--stats", type=Path, metavar="JSON", help="what `stats --json` printed, such as of the training set"
    )
    normalize.set_defaults(run=_normalize, parser=normalize)


def _add_array_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--axis", type=_axis, default=1, help="channel axis of arrays; none: one channel (default: %(default)s)"
    )
    parser.add_argument("--member", metavar="NAME", help="of .npz archives, only the array of this name")


def _stats(options: argparse.Namespace) -> int:
    from nbbn.files import commands

    return commands.stats(options)


def _normalize(options: argparse.Namespace) -> int:
    if options.in_place:
        if options.file.suffix != ".npy":
            options.parser.error(f"argument --in-place: expected FILE to be a .npy, got {options.file}; say -o OUT.npy")
        options.output = options.file.resolve()  # a link stays a link
    elif options.output.exists() and options.file.exists() and options.output.samefile(options.file):
        options.parser.error(
            f"argument -o/--output: expected another file than FILE, got the same, {options.output}; "
            "--in-place replaces it"
        )
    from nbbn.files import commands

    return commands.normalize(options)


def _info(options: argparse.Namespace) -> int:
    nbbn.show_config()
    return 0


def _warmup(options: argparse.Namespace) -> int:
    from nbbn.warmup import run

    return run(DTYPES if options.all else options.dtype or COMMON)


def _demo(options: argparse.Namespace) -> int:
    output = None if options.no_picture else options.output
    if output is not None and (problem := _cannot_write(output)):
        options.parser.error(f"argument --output: cannot write {output}: {problem}")
    try:
        from nbbn.demo import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _DEMO_NEEDS:
            raise
        print(
            "the demo needs scikit-learn, matplotlib and rich: pip install scikit-learn matplotlib rich",
            file=sys.stderr,
        )
        return 2
    run(options.seed, output)
    return 0


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)


def _axis(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or none, got {text!r}") from None


def _eps(text: str) -> float:
    try:
        return checks.epsilon(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text!r}") from None


def _npy(text: str) -> Path:
    if not text.endswith(".npy"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .npy, got {text!r}")
    return Path(text)


def _cannot_write(path: Path) -> str | None:
    """Why a picture cannot be saved there, found out before a minute of work; None if it can."""
    if path.suffix.lower() not in _PICTURE_FORMATS:
        return f"expected a name that ends in {', '.join(_PICTURE_FORMATS)}"
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        return error.strerror or str(error)
    if not existed:
        path.unlink()
    return None


if __name__ == "__main__":
    sys.exit(main())
