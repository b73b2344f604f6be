"""The command `stats` on files that can be read, against NumPy on the whole array."""

import numpy as np
import pytest
from on_disk import expected, matches, stats, values

import nbbn
from nbbn.__main__ import main
from nbbn.files import arrays, blocks, summary


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((17, 3, 5), 1), ((17, 5, 3), -1), ((4, 70), 0), ((90, 3), 1), ((2, 3, 70), 1), ((300,), None), ((1, 2), 1)],
)
def test_statistics_however_the_file_is_cut(tmp_path, capsys, small_blocks, shape, axis, order, dtype):
    x = values(shape, dtype)
    np.save(tmp_path / "x.npy", np.asarray(x, order=order))
    code, record, err = stats(capsys, tmp_path / "x.npy", "--axis", axis, "--range")
    assert (code, err) == (0, "")
    matches(record, x, axis)
    assert main(["normalize", str(tmp_path / "x.npy"), "-o", str(tmp_path / "y.npy"), f"--axis={axis}"]) == 0
    y = np.load(tmp_path / "y.npy")
    assert y.flags.f_contiguous == (order == "F" or len(shape) == 1 or 1 in shape)
    assert y.dtype == np.float32
    mean, var = np.array(record["mean"]), np.array(record["var"])
    np.testing.assert_array_equal(y, nbbn.normalize(x, mean, var, axis=axis))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4", ">i2", bool, np.int64])
def test_dtypes(tmp_path, capsys, small_blocks, dtype):
    x = values((40, 3), dtype)
    np.save(tmp_path / "x.npy", x)
    with nbbn.use_backend("numpy"):  # nothing new to compile: what is tested is reading
        total = summary.total_of(summary.of_array(*arrays.find(tmp_path / "x.npy", None), 1, True))
    assert not total.failed
    _, mean, std, least, most = expected(x, 1)
    m = total.summary.moments
    np.testing.assert_allclose(m.mean, mean.astype(float), rtol=1e-12)
    np.testing.assert_allclose(m.std(), std.astype(float), rtol=1e-12)
    assert (total.summary.least.tolist(), total.summary.most.tolist()) == (least.tolist(), most.tolist())


def test_pieces_cover_the_file_once_in_order():
    for outer in (0, 1, 2, 7):
        for channels in (1, 3, 8):
            for inner in (0, 1, 5, 40):
                for limit in (1, 4, 16, 1000):
                    cut = blocks.Cut(outer, channels, inner, limit)
                    at = 0
                    for i in range(len(cut)):
                        piece = cut[i]
                        assert 0 < piece.size <= limit
                        assert piece.start == at
                        assert (at // inner) % channels == piece.first_channel
                        at += piece.size
                    assert at == outer * channels * inner


@pytest.mark.parametrize("shape", [(1, 2, 3), (500, 3, 1), (4097, 1, 1), (3, 2, 300), (9, 700, 4), (33, 5, 40)])
def test_extremes(shape):
    x = values(shape, np.float32)
    np.testing.assert_array_equal(summary.extremes(x), (x.min((0, 2)), x.max((0, 2))))
    x[-1, -1, -1] = np.nan
    assert np.isnan(summary.extremes(x)).nonzero()[1].tolist() == [shape[1] - 1] * 2


def test_several_files_are_one_population(tmp_path, capsys, small_blocks):
    parts = [values((n, 3), np.float32, seed=n) for n in (50, 1, 7)]
    np.save(tmp_path / "a.npy", parts[0])
    np.savez_compressed(tmp_path / "b.npz", first=parts[1], second=parts[2])
    code, record, _ = stats(capsys, tmp_path / "a.npy", tmp_path / "b.npz", "--range")
    assert code == 0
    assert record["arrays"] == 3
    matches(record, np.concatenate(parts), 1)
    code, record, _ = stats(capsys, tmp_path / "b.npz", "--member", "second", "--range")
    matches(record, parts[2], 1)


def test_table(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.array([[1.0, 10.0], [3.0, 10.0]]))
    assert main(["stats", str(tmp_path / "x.npy")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 array, 2 channels",
        "channel  count  mean  std",
        "      0      2     2    1",
        "      1      2    10    0",
    ]
    assert main(["stats", str(tmp_path / "x.npy"), "--range"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["0", "2", "2", "1", "1", "3"]


def test_empty_arrays_and_values_that_are_not_finite(tmp_path, capsys):
    np.save(tmp_path / "empty.npy", np.zeros((0, 2), np.float32))
    code, record, _ = stats(capsys, tmp_path / "empty.npy", "--range")
    assert code == 0
    assert [record[name] for name in ("count", "std", "min")] == [[0, 0], [None, None], [None, None]]
    np.save(tmp_path / "x.npy", np.array([[1, np.nan], [3, 1]], np.float32))
    code, record, _ = stats(capsys, tmp_path / "x.npy", tmp_path / "empty.npy", "--range")
    assert record["mean"] == [2, None]
    assert record["max"] == [3, None]
    assert main(["normalize", str(tmp_path / "empty.npy"), "-o", str(tmp_path / "y.npy")]) == 0
    assert np.load(tmp_path / "y.npy").shape == (0, 2)


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    pixels = [values((h, w, 3), np.uint8, seed=h) for h, w in ((8, 9), (1, 1), (20, 4))]
    for name, x in zip(("a.png", "b.PNG", "deeper/c.bmp"), pixels, strict=True):
        image.fromarray(x).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder, [x.reshape(-1, 3) for x in pixels]


def test_a_folder_of_images(pictures, capsys):
    folder, pixels = pictures
    code, record, err = stats(capsys, folder, "--range")
    assert (code, err, record["arrays"]) == (0, "", 3)
    matches(record, np.concatenate(pixels), 1)
    code, record, _ = stats(capsys, folder / "a.png", "--range")
    matches(record, pixels[0], 1)


def test_modes_of_images(pictures, capsys):
    from PIL import Image

    folder, _ = pictures
    grey = values((5, 6), np.uint8)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(np.dstack([grey] * 4)).save(folder / "transparent.png")
    for name in ("grey.png", "transparent.png"):
        _, record, _ = stats(capsys, folder / name, "--range")
        matches(record, np.repeat(grey.reshape(-1, 1), 3, 1), 1)
    Image.fromarray(grey.astype(np.uint16) * 200).save(folder / "deep.png")
    (folder / "broken.jpg").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "text.gif").write_text("not an image")
    code, record, err = stats(capsys, folder)
    assert code == 1
    assert record["arrays"] == 5
    assert sorted(record["failed"]) == [str(folder / n) for n in ("broken.jpg", "deep.png", "text.gif")]
    assert "deep.png: expected 8 bits per value, got mode I" in err.replace(";16", "")


def test_images_without_pillow(pictures, capsys, monkeypatch):
    from nbbn.files import commands

    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    assert main(["stats", str(pictures[0])]) == 2
    assert capsys.readouterr().err == "images need Pillow: pip install pillow\n"
