"""The commands `stats` and `normalize`: what cannot be read or written, what is left behind, what it takes."""

import io
import json
import os
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from on_disk import matches, stats, values

import nbbn
from nbbn.__main__ import main
from nbbn.files import arrays, normalized, progress, summary


def truncated(path, name):
    np.save(path / name, values((100, 3), np.float32))
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:-8])


def damaged(path, name):
    """A byte in the middle of a member is wrong: its checksum does not fit."""
    np.savez(path / name, x=values((100, 3), np.float32))
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 255
    (path / name).write_bytes(content)


def wrong_checksum(path, name):
    """Decompresses well, but not to what was compressed: seen only at the end."""
    np.savez_compressed(path / name, x=values((100, 3), np.float32))
    content = bytearray((path / name).read_bytes())
    content[content.index(b"PK\x01\x02") + 16] ^= 255
    (path / name).write_bytes(content)


def header(path, name, text):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (1, 2)})
    (path / name).write_bytes(stream.getvalue().replace(b"(1, 2)", text))


def in_archive(path, name, text):
    header(path, "x", text)
    with zipfile.ZipFile(path / name, "w") as archive:
        archive.write(path / "x", "x.npy")
    (path / "x").unlink()


BAD = {
    "truncated.npy": (truncated, "ends early: 8 bytes missing"),
    "damaged.npz": (damaged, "Bad CRC-32"),
    "checksum.npz": (wrong_checksum, "Bad CRC-32"),
    "text.npy": (lambda p, n: (p / n).write_text("hello"), "not a .npy file"),
    "text.npz": (lambda p, n: (p / n).write_text("hello"), "File is not a zip file"),
    "other.npz": (lambda p, n: zipfile.ZipFile(p / n, "w").close(), "has no array None, only nothing"),
    "pickle.npy": (lambda p, n: np.save(p / n, np.array([[{}]]), allow_pickle=True), "got dtype object"),
    "complex.npy": (lambda p, n: np.save(p / n, np.ones((2, 2), complex)), "got dtype complex128"),
    "flat.npy": (lambda p, n: np.save(p / n, np.ones(3)), "at least 2 dimensions, got shape (3,); --axis none"),
    "scalar.npy": (lambda p, n: np.save(p / n, np.float32(1)), "got a single number"),
    "channels.npy": (lambda p, n: np.save(p / n, np.ones((5, 4), np.float32)), "expected 3 channels, as in"),
    "negative.npy": (lambda p, n: header(p, n, b"(-1,2)"), "not a shape: (-1, 2)"),
    "huge.npy": (lambda p, n: header(p, n, b"(9**9)"), "a .npy file with a damaged header"),
    "short.npz": (lambda p, n: in_archive(p, n, b"(9999999999, 9999999999)"), "array 'x': ends early"),
    "absent.npy": (lambda p, n: None, "No such file or directory"),
    "folder": (lambda p, n: (p / n).mkdir(), "a folder without images"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named_and_stops_nothing_else(tmp_path, capsys, small_blocks, name):
    make, message = BAD[name]
    if name == "folder":
        pytest.importorskip("PIL")
    good = [values((30, 3), np.float32, seed=i) for i in (1, 2)]
    for i, x in enumerate(good):
        np.save(tmp_path / f"{i}.npy", x)
    make(tmp_path, name)
    code, record, err = stats(capsys, tmp_path / "0.npy", tmp_path / name, tmp_path / "1.npy", "--range")
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith(str(tmp_path / name))
    assert message in line
    assert record["arrays"] == 2
    matches(record, np.concatenate(good), 1)  # and nothing of the bad one
    if name not in ("channels.npy", "folder"):
        before = sorted(os.listdir(tmp_path))
        (tmp_path / "out.npy").write_text("before")
        assert main(["normalize", str(tmp_path / name), "-o", str(tmp_path / "out.npy")]) == 1
        assert message in capsys.readouterr().err
        assert (tmp_path / "out.npy").read_text() == "before"
        assert sorted(os.listdir(tmp_path)) == sorted([*before, "out.npy"])


def test_a_file_that_shrinks_while_it_is_read(tmp_path, small_blocks):
    """Some of its jobs succeed, before and after the one that fails: all of it is left out."""
    x = values((50, 3), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", x + 1)
    files = [arrays.find(tmp_path / name, None)[0] for name in ("x.npy", "y.npy")]
    jobs = [job for file in files for job in summary.of_array(file, 1, False)]
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[: len(whole) // 2])
    total = summary.total_of(jobs)
    assert list(total.failed) == [str(tmp_path / "x.npy")]
    assert "ends early" in total.failed[str(tmp_path / "x.npy")]
    assert total.read == [str(tmp_path / "y.npy")]
    assert total.summary.moments.count.tolist() == [50] * 3


def test_a_source_counts_as_a_whole_or_not_at_all():
    def fails():
        raise arrays.UnreadableError("a bad block")

    def works():
        return summary.Summary.of(np.ones((4, 2, 1)), with_range=True)

    jobs = [summary.Job(name, 1, run) for name, run in zip("aaabbc", [works, fails, works] * 2, strict=True)]
    done = []
    total = summary.total_of(jobs, done.append)
    assert total.failed == {"a": "a bad block", "b": "a bad block"}
    assert total.read == ["c"]
    assert total.summary.moments.count.tolist() == [4, 4]
    assert done == [1] * 6


def test_jobs_say_how_large_they_are(tmp_path, small_blocks):
    x = values((17, 3, 5), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x)
    for name, number in (("x.npy", 9), ("x.npz", 1)):  # a row is 60 bytes: one to a piece
        jobs = list(summary.of_array(*arrays.find(tmp_path / name, None), 1, False))
        assert sum(job.size for job in jobs) == x.nbytes
        assert len(jobs) == number


def test_axis_out_of_range(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    code, record, err = stats(capsys, tmp_path / "x.npy", "--axis", "2")
    assert code == 1
    assert "expected -2 <= axis < 2, got 2 for shape (2, 3)" in err
    assert record == {
        "arrays": 0,
        "channels": 0,
        "ddof": 0,
        "failed": {str(tmp_path / "x.npy"): err.split(": ", 1)[1][:-1]},
    }
    assert main(["stats", str(tmp_path / "x.npy"), "--axis", "2"]) == 1
    assert capsys.readouterr().out == ""


# --- normalize ------------------------------------------------------------------------------------------------------


def test_normalize_with_the_statistics_of_another_file(tmp_path, capsys):
    train, test = values((60, 3), np.float32), values((20, 3), np.float32, seed=1)
    np.savez(tmp_path / "train.npz", x=train, labels=np.arange(60))
    np.savez(tmp_path / "test.npz", x=test, labels=np.arange(20))
    _, record, _ = stats(capsys, tmp_path / "train.npz", "--member", "x")
    (tmp_path / "train.json").write_text(json.dumps(record))
    arguments = ["-o", str(tmp_path / "y.npy"), "--eps", "0.5", "--stats", str(tmp_path / "train.json")]
    assert main(["normalize", str(tmp_path / "test.npz"), "--member", "x", *arguments]) == 0
    m = nbbn.batch_stats(train)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), nbbn.normalize(test, m.mean, m.var(), eps=0.5))
    assert main(["normalize", str(tmp_path / "test.npz"), *arguments]) == 1
    assert "expected one array, got x, labels; choose with --member" in capsys.readouterr().err
    np.save(tmp_path / "four.npy", np.ones((2, 4), np.float32))
    assert main(["normalize", str(tmp_path / "four.npy"), *arguments]) == 1
    assert "four.npy: expected 3 channels, as in" in capsys.readouterr().err
    for text in ("{}", "[", '{"count": [1], "mean": ["x"], "m2": [0]}'):
        (tmp_path / "train.json").write_text(text)
        assert main(["normalize", str(tmp_path / "test.npz"), "--member", "x", *arguments]) == 1
        assert "train.json: expected what" in capsys.readouterr().err
    before = (tmp_path / "y.npy").read_bytes()
    for name, value in (("count", 0), ("mean", float("nan"))):
        (tmp_path / "train.json").write_text(json.dumps(record | {name: [*record[name][:2], value]}))
        assert main(["normalize", str(tmp_path / "test.npz"), "--member", "x", *arguments]) == 1
        assert "every channel, not so in 2" in capsys.readouterr().err
    assert (tmp_path / "y.npy").read_bytes() == before


@pytest.mark.parametrize("name", ["x.npy", "link.npy"])
def test_a_file_may_be_normalized_in_its_own_place(tmp_path, name):
    x = values((60, 3), np.float32)
    path = tmp_path / "x.npy"
    np.save(path, x)
    (tmp_path / "link.npy").symlink_to("x.npy")
    mode = path.stat().st_mode
    assert main(["normalize", str(tmp_path / name), "--in-place"]) == 0
    m = nbbn.batch_stats(x)
    np.testing.assert_array_equal(np.load(path), nbbn.normalize(x, m.mean, m.var()))
    assert path.stat().st_mode == mode
    assert (tmp_path / "link.npy").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.npy", "x.npy"]


def test_an_input_is_not_replaced_by_mistake(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", values((60, 3), np.float32))
    (tmp_path / "link.npy").symlink_to("x.npy")
    before = (tmp_path / "x.npy").read_bytes()
    for same in ("x.npy", "./x.npy", str(tmp_path / "x.npy"), "link.npy"):
        with pytest.raises(SystemExit) as exit:
            main(["normalize", "x.npy", "-o", same])
        assert exit.value.code == 2
        assert "-o/--output: expected another file than FILE, got the same" in capsys.readouterr().err
    np.savez("x.npz", x=np.ones((4, 3), np.float32))
    with pytest.raises(SystemExit):
        main(["normalize", "x.npz", "--in-place"])
    assert "--in-place: expected FILE to be a .npy, got x.npz" in capsys.readouterr().err
    assert (tmp_path / "x.npy").read_bytes() == before
    assert sorted(os.listdir()) == ["link.npy", "x.npy", "x.npz"]


def test_output_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "x.npy", values((60, 3), np.float32))
    arguments = ["normalize", str(tmp_path / "x.npy"), "-o"]
    assert main([*arguments, str(tmp_path / "no" / "y.npy")]) == 1
    assert "no/y.npy: cannot be written: No such file or directory" in capsys.readouterr().err

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(normalized.nbbn, "normalize", full)
    assert main([*arguments, str(tmp_path / "y.npy")]) == 1
    assert "y.npy: cannot be written: No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["x.npy"]


ENDLESS = """
import signal, sys, time
from nbbn.files import normalized
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def pieces(*arguments):
    print("writing", flush=True)
    time.sleep(60)
    yield
normalized.pieces = pieces
from nbbn.__main__ import main
sys.exit(main(["normalize", "x.npy", "-o", "y.npy", "--stats", "s.json"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_end_leaves_nothing(tmp_path, capsys, number):
    np.save(tmp_path / "x.npy", values((60, 3), np.float32))
    _, record, _ = stats(capsys, tmp_path / "x.npy")
    (tmp_path / "s.json").write_text(json.dumps(record))
    command = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(os.listdir(tmp_path)) == 3
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode != 0
    assert sorted(os.listdir(tmp_path)) == ["s.json", "x.npy"]


# --- the command line and resources ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats"], "required: FILE"),
        (["stats", "x.npy", "--axis", "one"], "expected an integer or none, got 'one'"),
        (["normalize", "x.npy"], "one of the arguments -o/--output --in-place is required"),
        (["normalize", "x.npy", "-o", "y.npy", "--in-place"], "not allowed with argument"),
        (["normalize", "x.npy", "-o", "y.txt"], "expected a name that ends in .npy, got 'y.txt'"),
        (["normalize", "x.npy", "-o", "y.npy", "--eps", "-1"], "expected a finite number >= 0, got '-1'"),
    ],
)
def test_invalid_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_progress_bar_on_a_terminal_only(monkeypatch, capsys):
    pytest.importorskip("rich")
    with progress.bar("title", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.bar("title", 10) as advance:
        advance(10)
    assert "title" in capsys.readouterr().err


def test_the_number_of_threads_is_what_it_was(tmp_path, capsys, threads):
    np.save(tmp_path / "x.npy", values((60, 3), np.float32))
    nbbn.set_num_threads(threads)
    records = []
    for n in (1, threads):
        nbbn.set_num_threads(n)
        records.append(stats(capsys, tmp_path / "x.npy")[1])
        assert nbbn.get_num_threads() == n
    assert records[0] == records[1]


# ru_maxrss would be that of this process where a child starts as a copy of it
PEAK = """
import sys
from nbbn.__main__ import main
code = main(sys.argv[1:])
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) // 1024, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
def test_memory_does_not_depend_on_the_size_of_the_file(tmp_path):
    """A sparse file of 600 MB, on disk next to nothing; the limit is for 2 GB and more."""
    with (tmp_path / "x.npy").open("wb") as file:
        shape = (4700, 32, 1000)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * int(np.prod(shape)))
    command = [sys.executable, "-c", PEAK, "stats", str(tmp_path / "x.npy"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(done.stdout)["count"] == [4_700_000] * 32
    assert int(done.stderr) < 300
