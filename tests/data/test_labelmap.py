"""Label files as people have them: colours, other ids, suffixes, folders behind links."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from fastscnn_fast.cli import main
from fastscnn_fast.data.classes import numbered
from fastscnn_fast.data.datasets import Examples
from fastscnn_fast.data.labelmap import LabelMap
from fastscnn_fast.data.sources import DataError, open_source

Pixels = NDArray[np.uint8]
ROAD, CAR, VOID = (128, 64, 128), (64, 0, 128), (0, 0, 0)


def save(path: Path, pixels: NDArray[Any], palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


def example(
    root: Path, labels: NDArray[Any], name: str = "a", palette: list[int] | None = None
) -> None:
    save(root / "train" / "images" / f"{name}.png", np.zeros((*labels.shape[:2], 3), np.uint8))
    save(root / "train" / "labels" / f"{name}.png", labels, palette)


def read(root: Path, table: Any, **more: Any) -> tuple[tuple[str, ...], Pixels]:
    examples = Examples(open_source(root, "train", label_map=table, **more))
    return examples.classes, examples[0].labels


def written(root: Path, text: str) -> Path:
    path = root / "labels.txt"
    path.write_text(text)
    return path


IDS = np.array([[0, 1, 2], [255, 0, 2]], np.uint8)


@pytest.mark.parametrize(
    "text",
    [
        "0 ignore\n1 0\n2 1\n255 2\n",
        "# what\n\n0,ignore\n1,0  # road\n2,1\n255,2\n",
        "0: 255\n1: 0\n2: 1\n255: 2",
        "0 -> IGNORE\n1 => 0\n2 = 1\n255;2",
        "from to\n0\t255\n1\t0\n2\t1\n255\t2",
        "1 0\n2 1\n255 2\n* ignore",
        "'0': 'ignore',\n'1': 0,\n'2': 1,\n'255': 2,",
        json.dumps({"0": None, "1": 0, "2": 1, "255": 2}),
        json.dumps({"0": "ignore", 1: 0, 2: 1, 255: 2}, indent=1),
    ],
)
def test_ids_to_ids(text: str, tmp_path: Path) -> None:
    """0 is ignored, 255 a class."""
    example(tmp_path, IDS)
    classes, labels = read(tmp_path, written(tmp_path, text), num_classes=3)
    assert classes == numbered(3)
    assert labels.tolist() == [[255, 0, 1], [2, 255, 1]]


def test_a_dictionary_says_the_same(tmp_path: Path) -> None:
    example(tmp_path, IDS)
    assert read(tmp_path, {0: None, 1: 0, 2: 1, 255: 2}, num_classes=3)[1].tolist() == [
        [255, 0, 1],
        [2, 255, 1],
    ]
    _, labels = read(tmp_path, {0: "ignore", 1: 0, 2: 1, 255: 2}, num_classes=3, ignore=77)
    assert labels.tolist() == [[77, 0, 1], [2, 77, 1]]
    example(tmp_path, np.array([[ROAD, CAR, VOID]], np.uint8))
    table = {ROAD: "road", CAR: "car", VOID: None}
    assert read(tmp_path, table)[0] == ("road", "car")
    assert read(tmp_path, table)[1].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [
        ("L", 0, 255),
        ("P", 0, 255),
        ("1", 0, 1),
        ("RGB", 0, 255),
        ("RGBA", 0, 255),
        ("LA", 0, 255),
        ("I;16", 7, 65535),
    ],
)
def test_masks_of_two_values_in_any_mode(mode: str, low: int, high: int, tmp_path: Path) -> None:
    """255 is the foreground, also where it is stored as three equal channels."""
    values = np.array([[0, 1, 1], [1, 0, 0]])
    if mode == "I;16":
        image = Image.fromarray(np.where(values, high, low).astype(np.uint16))
    else:
        image = Image.fromarray((values * 255).astype(np.uint8))
        if mode == "P":
            image.putpalette(range(256))
        elif mode != "L":
            image = image.convert(mode)
    example(tmp_path, IDS)
    image.save(tmp_path / "train" / "labels" / "a.png")
    with Image.open(tmp_path / "train" / "labels" / "a.png") as stored:
        assert stored.mode == mode
    _, labels = read(tmp_path, written(tmp_path, f"{low} 0\n{high} 1"), num_classes=2)
    assert labels.dtype == np.uint8 and labels.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("text", "num_classes", "name"),
    [
        ("0 0\n255 1", 1, "class 0"),
        ("0 0\n255 road", None, "road"),
        ("0 background\n255 road", 1, "road"),
        ("* background\n255 road", 1, "road"),
    ],
)
def test_one_class(text: str, num_classes: int | None, name: str, tmp_path: Path) -> None:
    """Which is 1, and its background 0."""
    example(tmp_path, np.array([[0, 255], [255, 0]], np.uint8))
    classes, labels = read(tmp_path, written(tmp_path, text), num_classes=num_classes)
    assert classes == (name,) and labels.tolist() == [[0, 1], [1, 0]]
    with pytest.raises(DataError, match=r"a class must be 0 to 1, 'ignore' or one of background, "):
        read(tmp_path, written(tmp_path, "0 0\n255 2"), num_classes=1)


COLOURS = [
    "128 64 128 road\n64 0 128 car\n0 0 0 ignore",
    "#804080 road\n#400080: car\n#000000 = ignore",
    "name,r,g,b\nroad,128,64,128\ncar,64,0,128\nignore,0,0,0",
    "# label:color_rgb:parts:actions\nroad:128,64,128::\ncar:64,0,128::\nignore:0,0,0::",
    "(128, 64, 128): 'road'\n[64, 0, 128], car\n* ignore",
    "r g b name\n128\t64\t128\troad\n64\t0\t128\tcar\n0\t0\t0\tignore",
    json.dumps({"road": [128, 64, 128], "car": [64, 0, 128], "ignore": [0, 0, 0]}),
]


@pytest.mark.parametrize("text", COLOURS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_to_names(text: str, mode: str, tmp_path: Path) -> None:
    """As tables that come with data sets and tools' exports have them; the names become the classes."""
    ids = np.array([[0, 1, 2], [2, 0, 1]], np.uint8)
    image = Image.fromarray(ids)
    image.putpalette([*ROAD, *CAR, *VOID])
    example(tmp_path, ids)
    image.convert(mode).save(tmp_path / "train" / "labels" / "a.png")
    classes, labels = read(tmp_path, written(tmp_path, text))
    assert classes == ("road", "car")
    assert labels.tolist() == [[0, 1, 255], [255, 0, 1]]
    (tmp_path / "classes.txt").write_text("sky\ncar\nroad")  # whose order then counts
    classes, labels = read(tmp_path, written(tmp_path, text))
    assert classes == ("sky", "car", "road") and labels.tolist() == [[2, 1, 255], [255, 2, 1]]


def test_names_of_several_words(tmp_path: Path) -> None:
    example(tmp_path, np.array([[ROAD, CAR]], np.uint8))
    text = "traffic light (red), 128, 64, 128\n64 0 128 SUV / pick-up 2"
    assert read(tmp_path, written(tmp_path, text))[0] == ("traffic light (red)", "SUV / pick-up 2")


def test_what_has_no_line_is_an_error(tmp_path: Path) -> None:
    example(tmp_path, IDS)
    with pytest.raises(DataError) as raised:
        read(tmp_path, written(tmp_path, "0 0\n255 1"), num_classes=2)
    assert str(raised.value) == (
        f"{tmp_path}/train/labels/a.png: label id 1 (row 0, column 1) is not in {tmp_path}/labels.txt;"
        " a line '* ignore' there is for all that is not"
    )
    example(tmp_path, np.array([[ROAD, (1, 2, 3)]], np.uint8))
    with pytest.raises(
        DataError, match=r"colour \(1, 2, 3\) \(row 0, column 1\) is not in label_map"
    ):
        read(tmp_path, {ROAD: "road"})
    with pytest.raises(DataError, match="labels must be ids, as in the label map, got colours"):
        read(tmp_path, {0: 0, 1: 1}, num_classes=2)
    example(tmp_path, np.array([[1, 2000]], np.uint16))
    with pytest.raises(DataError, match="labels must be colours of 8 bits, as in label_map.*I;16"):
        read(tmp_path, {ROAD: "road"})
    for lossy in ("jpg", "webp"):
        path = tmp_path / "train" / "labels" / "a.png"
        path.unlink(missing_ok=True)
        Image.fromarray(IDS).save(path.with_suffix(f".{lossy}"))
        with pytest.raises(DataError, match="labels must be stored without loss"):
            read(tmp_path, {0: 0, 1: 0, 2: 0, 255: 1}, num_classes=2)
        path.with_suffix(f".{lossy}").unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0\n1 2 3", r"line 2: must be a value and what it means: .*, got '1 2 3'"),
        ("0 0\nroad", "line 2: must be a value and what it means"),
        ("0 0\n1", "line 2: must be a value"),
        (
            "0 0\n\n1 2",
            r"line 3: a class must be 0 to 1, 'ignore' or one of class 0, class 1, got '2'",
        ),
        ("0 0\n1 road", "line 2: a class must be .*got 'road'"),
        ("0 0\n0 1", "line 2: 0 must mean one thing, got 0 and 1"),
        ("0 0\n1 2 3 1", r"line 2: values must be all ids or all colours, got \(1, 2, 3\)"),
        ("0 0\n256 0 0 1", "line 2: values must be 0 to 255, got 256 0 0"),
        ("0 0\n65536 1", "line 2: values must be 0 to 65535, got 65536"),
        ("", "must say what a value of label files means"),
        ("* ignore", "must say what a value of label files means"),
        ('{"0": 0, "1": 1, "0": 1}', r"\['0'\]: 0 must mean one thing, got 0 and 1"),
        ('{"0": 0', "is no JSON object"),
        ("{" * 100_000, "is no JSON object"),
    ],
)
def test_a_map_that_says_nonsense(text: str, message: str, tmp_path: Path) -> None:
    example(tmp_path, IDS)
    (tmp_path / "classes.txt").write_text("class 0\nclass 1")
    with pytest.raises(DataError, match=message):
        read(tmp_path, written(tmp_path, text))


def test_files_that_are_no_maps(tmp_path: Path) -> None:
    example(tmp_path, IDS)
    (tmp_path / "map").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="map: must be text in UTF-8"):
        read(tmp_path, tmp_path / "map", num_classes=2)
    with pytest.raises(FileNotFoundError):
        read(tmp_path, tmp_path / "none", num_classes=2)
    with pytest.raises(DataError, match=r"label_map: names 1 class, --classes says 2"):
        read(tmp_path, {0: "road"}, num_classes=2)
    with pytest.raises(DataError, match=r"--label-map must be left out: streets has its own"):
        open_source("streets", "train", label_map={0: 0})
    with pytest.raises(
        DataError, match=r"--ignore must be 2 to 255.*--label-map may ignore others"
    ):
        open_source(tmp_path, "train", 2, 0)


def test_labels_of_a_file_without_a_map_say_that_there_is_one(tmp_path: Path) -> None:
    example(tmp_path, np.array([[ROAD]], np.uint8))
    with pytest.raises(DataError, match=r"got an image of mode RGB \(--label-map says"):
        open_and_read(tmp_path)


def test_masks_of_one_bit_are_0_and_1_or_what_a_map_says(tmp_path: Path) -> None:
    """Also 255, as viewers show them, where that has a line and 1 has none."""
    bits = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    labels = tmp_path / "train" / "labels"
    for ending, packed in (("png", {}), ("bmp", {}), ("tif", {"compression": "group4"})):
        example(tmp_path, bits)
        (labels / "a.png").unlink()
        path = labels / f"a.{ending}"
        Image.fromarray(bits * 255).convert("1").save(path, **packed)
        with Image.open(path) as image:
            assert image.mode == "1"
        plain = Examples(open_source(tmp_path, "train", 1))
        assert plain[0].labels.dtype == np.uint8 and plain.pixels.tolist() == [2, 4]
        assert np.array_equal(plain[0].labels, bits)
        for table, expected in (
            ({0: 0, 255: 1}, bits),
            ({0: None, 255: 1}, np.where(bits == 1, 1, 255)),
            ({0: 1, 1: 0}, 1 - bits),
            ({0: 1, 1: 0, 255: None}, 1 - bits),
            ({255: 0, "*": None}, np.where(bits == 1, 0, 255)),
            ({(0, 0, 0): 1, (255, 255, 255): 0}, 1 - bits),
        ):
            assert np.array_equal(read(tmp_path, table, num_classes=2)[1], expected), table
        with pytest.raises(DataError, match=r"label id 1 \(row 0, column 1\) is not in label_map"):
            read(tmp_path, {0: 0, 2: 1}, num_classes=2)
        path.unlink()


def test_where_a_map_is_given_no_one_is_told_to_give_one(tmp_path: Path) -> None:
    example(tmp_path, np.array([[0, 255, 255]], np.uint8))
    said = Examples(open_source(tmp_path, "train", 2, label_map={0: None, 255: 0})).absent
    picture = tmp_path / "train" / "images" / "a.png"
    assert said == f"no pixel is of class 1 (1 example, {picture} the first)"


def open_and_read(root: Path, **more: Any) -> Examples:
    return Examples(open_source(root, "train", 3, **more))


def test_names_are_those_of_the_map() -> None:
    table = LabelMap.of({0: "b", 1: "a", 2: None, 3: "b", 4: 0})
    assert table.names == ("b", "a")


@pytest.mark.parametrize(
    ("names", "means", "said"),
    [
        (("1", "2", "3"), "1", "'1', which may be id 0 or 1"),
        (("road", "Ignore"), "ignore", "'ignore', which may be id 1 or 255"),
        (("road", "255"), "255", "'255', which may be id 1 or 255"),
    ],
)
def test_a_class_that_is_called_as_another_is_numbered(
    names: tuple[str, ...], means: str, said: str
) -> None:
    with pytest.raises(DataError, match=rf"label_map\[10\]: .* means no other, got {said}"):
        LabelMap.of({10: means}).table(names, 255)
    assert LabelMap.of({10: "0", 11: "3"}).table(("1", "2", "3"), 255).ids.tolist() == [0, 2]
    assert LabelMap.of({10: "0", 11: "1"}).table(("0", "1"), 255).ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "table"),
    [
        (b"P5 4 1 3\n\0\1\2\3", None),
        (b"P5 4 1 254\n\0\1\2\3", None),
        (b"P2 4 1 15\n0 1 2 3\n", None),
        (
            b"P5 4 1 4000\n" + np.array([0, 9, 99, 3999], ">u2").tobytes(),
            {0: 0, 9: 1, 99: 2, 3999: 3},
        ),
        (b"P2 4 1 4000\n0 9 99 3999\n", {0: 0, 9: 1, 99: 2, 3999: 3}),
        (b"P6 4 1 15\n\0\0\0\1\1\1\2\2\2\3\3\3", {0: 0, 1: 1, 2: 2, 3: 3}),
        (b"P5 4 1 1\n\0\1\2\3", None),  # beyond what it says, but no other ids
    ],
)
def test_maps_of_any_largest_value_hold_the_ids_that_are_stored(
    content: bytes, table: Any, tmp_path: Path
) -> None:
    save(tmp_path / "train" / "images" / "a.png", np.zeros((1, 4, 3), np.uint8))
    (tmp_path / "train" / "labels").mkdir()
    (tmp_path / "train" / "labels" / "a.pgm").write_bytes(content)
    assert read(tmp_path, table, num_classes=4)[1].tolist() == [[0, 1, 2, 3]]


def test_colours_of_a_map_are_brought_to_255(tmp_path: Path) -> None:
    save(tmp_path / "train" / "images" / "a.png", np.zeros((1, 2, 3), np.uint8))
    (tmp_path / "train" / "labels").mkdir()
    (tmp_path / "train" / "labels" / "a.ppm").write_bytes(b"P6 2 1 15\n\0\1\2\3\4\x0f")
    table = {(0, 17, 34): "road", (51, 68, 255): "car"}
    assert read(tmp_path, table)[1].tolist() == [[0, 1]]


def test_deep_negatives_are_no_labels(tmp_path: Path) -> None:
    example(tmp_path, IDS)
    (tmp_path / "train" / "labels" / "a.png").unlink()
    path = tmp_path / "train" / "labels" / "a.tif"
    tifffile.imwrite(path, IDS.astype(np.uint16), photometric="miniswhite")
    with pytest.raises(DataError, match=r"a\.tif: labels must not be a negative"):
        read(tmp_path, {0: 0, 1: 1, 2: 2, 255: None}, num_classes=3)


# --- names and folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["_mask", "_mask.png", "_mask.PNG"])
def test_label_suffix(suffix: str, tmp_path: Path) -> None:
    for name in ("0", "1", "town/2"):
        save(tmp_path / "train" / "images" / f"{name}.png", np.zeros((2, 3, 3), np.uint8))
        save(tmp_path / "train" / "labels" / f"{name}_mask.png", IDS % 3)
        save(tmp_path / "train" / "labels" / f"{name}_colour.png", IDS)  # left alone
    examples = open_and_read(tmp_path, label_suffix=suffix)
    assert [Path(examples.name(i)).name for i in range(3)] == ["0.png", "1.png", "2.png"]
    (tmp_path / "train" / "labels" / "1_mask.png").unlink()
    with pytest.raises(DataError, match=r"images/1\.png: has no labels"):
        open_and_read(tmp_path, label_suffix=suffix)


def test_folders_behind_links(tmp_path: Path) -> None:
    """The split, its folders, theirs, and single files."""
    elsewhere = tmp_path / "elsewhere"
    for name in ("a", "b", "c"):
        save(elsewhere / name / f"{name}.png", np.zeros((2, 3, 3), np.uint8))
        save(elsewhere / "ids" / name / f"{name}.png", IDS % 3)
    images, labels = tmp_path / "data" / "images", tmp_path / "data" / "labels"
    images.mkdir(parents=True)
    for name in ("a", "b"):
        (images / name).symlink_to(elsewhere / name)
    (images / "c").mkdir()
    (images / "c" / "c.png").symlink_to(elsewhere / "c" / "c.png")
    labels.symlink_to(elsewhere / "ids")
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "data")
    examples = open_and_read(root)
    assert [Path(examples.name(i)).stem for i in range(len(examples))] == ["a", "b", "c"]
    assert (examples[0].labels == IDS % 3).all()
    (images / "a2").symlink_to(elsewhere / "a")  # the same folder twice is no circle
    (elsewhere / "ids" / "a2").symlink_to(elsewhere / "ids" / "a")
    assert len(open_and_read(root)) == 4
    (elsewhere / "a" / "back").symlink_to(elsewhere)
    with pytest.raises(DataError, match=r"back/a: is a link in a circle, to .*elsewhere/a"):
        open_and_read(root)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    example(tmp_path, IDS)
    labels = tmp_path / "train" / "labels" / "a.png"
    labels.unlink()
    os.mkfifo(labels)
    with pytest.raises(DataError, match=r"labels/a\.png: is no regular file"):
        open_and_read(tmp_path)
    labels.unlink()
    labels.symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"labels/a\.png: cannot be read: "):
        open_and_read(tmp_path)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("0", "1"):
            mask = rng.choice(np.array([0, 255], np.uint8), (32, 32))
            save(tmp_path / split / "images" / f"{name}.png", np.stack([mask] * 3, -1))
            save(tmp_path / split / "labels" / f"{name}_mask.png", mask)
    table = written(tmp_path, "0 0\n255 1")
    data = [str(tmp_path), "--classes", "2", "--label-map", str(table), "--label-suffix", "_mask"]
    out = tmp_path / "run"
    options = ["-o", str(out), "--batch", "2", "--epochs", "1", "--dtype", "float32"]
    assert main(["train", *data, *options]) == 0
    assert main(["evaluate", *data, "--weights", f"{out}/best.safetensors", *options[-2:]]) == 0
    assert "2 examples, 2 classes" in capsys.readouterr().out
    assert main(["train", *data[:3], "-o", str(tmp_path / "no"), *options[2:]]) == 2
    assert "has no labels" in capsys.readouterr().err
