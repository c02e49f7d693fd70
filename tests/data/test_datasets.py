"""Folders, Cityscapes' layout and streets; errors named by file; views that keep labels in place; batches."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import png
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFilter

from fastscnn_fast.data.augmentation import Augmentation
from fastscnn_fast.data.classes import CAMVID_CLASSES, CITYSCAPES_CLASSES, numbered
from fastscnn_fast.data.datasets import Batches, Examples
from fastscnn_fast.data.scenes import street
from fastscnn_fast.data.sources import DataError, Example, Streets, open_source

Pixels = NDArray[np.uint8]
PLAIN = {"scale": (1.0, 1.0), "flip": False, "colour": 0.0}


def save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def blocks(rng: np.random.Generator, height: int, width: int, classes: int = 5) -> Example:
    """Large rectangles whose colour tells their class."""
    small = rng.integers(0, classes, (-(-height // 24), -(-width // 24)), np.uint8)
    labels = small.repeat(24, 0).repeat(24, 1)[:height, :width]
    return Example(np.stack([labels * 50, 250 - labels * 50, labels * 0 + 9], -1), labels)


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """Three examples of five classes in "train", one in a subfolder; 255 is ignored."""
    rng = np.random.default_rng(seed)
    for name in ("a", "b", "town/c"):
        picture, labels = blocks(rng, 40, 56)
        labels[:3] = 255
        save(tmp_path / "train" / "images" / f"{name}.png", picture)
        save(tmp_path / "train" / "labels" / f"{name}.png", labels)
    (tmp_path / "classes.txt").write_text("\ufeffzero\none\n two \nthree\nfour\n\n", "utf-8")
    return tmp_path


def test_folder(folder: Path) -> None:
    examples = Examples(open_source(folder, "train"))
    assert examples.classes == ("zero", "one", "two", "three", "four") and examples.ignore == 255
    assert [Path(examples.name(i)).stem for i in range(len(examples))] == ["a", "b", "c"]
    expected = np.zeros(5, np.int64)
    for picture, labels in (examples[i] for i in range(3)):
        assert picture.shape == (40, 56, 3) and picture.dtype == labels.dtype == np.uint8
        known = labels != 255
        assert np.array_equal(picture[..., 0][known], labels[known] * 50)
        expected += np.bincount(labels[known], minlength=5)
    assert np.array_equal(examples.pixels, expected)


def test_other_names_and_ids(folder: Path) -> None:
    (folder / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt: missing.*--classes"):
        open_source(folder, "train")
    for name in ("a", "b", "town/c"):  # other suffixes, palette labels, another ignored id
        labels = np.asarray(Image.open(folder / "train" / "labels" / f"{name}.png"))
        image = Image.fromarray(np.where(labels == 255, 11, labels))
        image.putpalette(range(33))
        image.save(folder / "train" / "labels" / f"{name}.png")
        picture = folder / "train" / "images" / f"{name}.png"
        Image.open(picture).save(picture.with_suffix(".JPEG"), quality=95)
        picture.unlink()
    examples = Examples(open_source(folder, "train", 11, 11))
    assert examples.classes == numbered(11) and examples.pixels[5:].sum() == 0


def test_memory_limit_and_workers(folder: Path) -> None:
    source = open_source(folder, "train")
    everything = Examples(source, workers=3)
    some = Examples(source, memory=1.5 * 40 * 56 * 4)
    assert [kept is not None for kept in some._kept] == [True, False, False]
    for i in range(3):
        for ours, theirs in zip(everything[i], some[i]):
            assert np.array_equal(ours, theirs)


def broken_pair(folder: Path, name: str, labels: Pixels | bytes | None) -> Path:
    """Adds an example whose labels are as given; the labels' path."""
    save(folder / "train" / "images" / f"{name}.png", np.zeros((40, 56, 3), np.uint8))
    path = folder / "train" / "labels" / f"{name}.png"
    if isinstance(labels, bytes):
        path.write_bytes(labels)
    elif labels is not None:
        save(path, labels)
    return path


def two_bit_png() -> bytes:
    """A grey PNG of 40x56 with two bits a pixel, which Pillow cannot write."""
    return png(56, 40, (b"\0" + b"\x1b" * 14) * 40, depth=2, kind=0)


def test_every_error_is_named_by_file(folder: Path) -> None:
    wrong = np.zeros((40, 56), np.uint8)
    wrong[7, 3] = 5
    small = np.zeros((20, 28), np.uint8)
    colours = np.zeros((40, 56, 3), np.uint8)
    whole = folder / "train" / "labels" / "a.png"
    expected = {
        broken_pair(folder, "range", wrong): r"label id 5 \(row 7, column 3\).*0 to 4.*255",
        broken_pair(folder, "size", small): r"is 20x28, its picture .*size\.png is 40x56",
        broken_pair(folder, "mode", colours): r"8-bit class ids in one channel.*RGB",
        broken_pair(folder, "cut", whole.read_bytes()[:60]): "cannot be read",
        broken_pair(folder, "empty", b""): "cannot be read",
        broken_pair(folder, "short", png(56, 40, (b"\0" + b"\1" * 56) * 4, 8, 0)): "is truncated",
        broken_pair(folder, "few_bits", two_bit_png()): r"8-bit class ids.*raw mode L;2",
    }
    turned = folder / "train" / "images" / "turned.jpg"
    broken_pair(folder, "turned", np.zeros((40, 56), np.uint8))
    turned.with_suffix(".png").unlink()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.new("RGB", (56, 40)).save(turned, exif=exif)
    turned_labels = broken_pair(folder, "turned_labels", None)
    Image.new("L", (56, 40)).save(turned_labels, exif=exif)
    for orientation in (0, 1, 9):  # none of these turns
        upright = broken_pair(folder, f"upright_{orientation}", np.zeros((40, 56), np.uint8))
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (56, 40)).save(folder / "train" / "images" / upright.name, exif=exif)
        Image.new("L", (56, 40)).save(upright, exif=exif)
    (turned.parent / "._a.png").write_bytes(b"what some file systems leave")
    broken_pair(folder, "picture", np.zeros((40, 56), np.uint8))
    picture = folder / "train" / "images" / "picture.png"
    picture.write_bytes(b"no picture")
    with pytest.raises(DataError) as raised:
        Examples(open_source(folder, "train"))
    lines = str(raised.value).splitlines()
    assert len(lines) == 10
    more = {picture: "cannot be read", turned: "a picture .* upright, got EXIF orientation 3"}
    more |= {turned_labels: "labels must be stored upright, got EXIF orientation 3"}
    for path, message in {**expected, **more}.items():
        assert any(re.search(f"{re.escape(str(path))}.*{message}", line) for line in lines)


def test_lossy_labels_are_refused_by_name(folder: Path) -> None:
    """Also where they would pass: ids that come back as ids of other classes."""
    ids = np.asarray(Image.open(folder / "train" / "labels" / "a.png"))
    expected = {}
    for name, words, said in (
        ("a.jpg", {"quality": 100}, "got JPEG"),
        ("b.webp", {"quality": 80}, "got lossy WEBP"),
        ("c.avif", {}, "got AVIF"),
        ("d.tif", {"compression": "jpeg"}, "got TIFF with jpeg inside"),
        (
            "e.webp",
            {"lossless": True},
            "labels must be 8-bit class ids in one channel, got an image of mode RGB"
            " (--label-map says what other values mean)",
        ),
        ("f.png", {}, "got JPEG"),  # whatever its ending says
    ):
        path = broken_pair(folder, f"lossy_{name[0]}", None).with_name(f"lossy_{name}")
        kind = {"format": "JPEG"} if name == "f.png" else {}
        Image.fromarray(ids).save(path, **kind, **words)  # type: ignore[arg-type]
        expected[path] = (
            said if "mode" in said else f"labels must be stored without loss, as in PNG, {said}"
        )
    for name, words in (("g.tif", {"compression": "tiff_lzw"}), ("h.bmp", {})):
        path = broken_pair(folder, f"lossy_{name[0]}", None).with_name(f"lossy_{name}")
        Image.fromarray(ids).save(path, **words)  # type: ignore[arg-type]
    with pytest.raises(DataError) as raised:
        Examples(open_source(folder, "train"))
    assert sorted(str(raised.value).splitlines()) == sorted(
        f"{path}: {said}" for path, said in expected.items()
    )


def test_classes_that_do_not_occur(folder: Path) -> None:
    every = (np.arange(40 * 56) % 5).astype(np.uint8).reshape(40, 56)
    broken_pair(folder, "every", every)
    examples = Examples(open_source(folder, "train"))
    assert examples.absent is None and examples.ignored == 3 * 3 * 56
    names = ["zero", "one", "two", "three", "four", "five", "six"]
    (folder / "classes.txt").write_text("\n".join(names))
    said = Examples(open_source(folder, "train")).absent
    assert said is not None and said.startswith("no pixel is of class five, six (4 examples, /")
    for path in (folder / "train" / "labels").rglob("*.png"):  # masks as many tools write them
        save(path, np.where(np.asarray(Image.open(path)) % 2, 255, 0).astype(np.uint8))
    for count, missing in ((1, "zero"), (2, "one"), (3, "one, two")):
        (folder / "classes.txt").write_text("\n".join(names[:count]))
        said = Examples(open_source(folder, "train")).absent
        assert said is not None and f"is of class {missing} (" in said
        hint = r"99; masks of one or two classes must hold 0 and 1$" if count < 3 else "99$"
        with pytest.raises(DataError, match=f"label id 255 .* nor the ignored id {hint}"):
            Examples(open_source(folder, "train", ignore=99))
        assert (
            "they hold 0 and 255, which is the id that is ignored" in said
            and "1 in masks of one or two classes" in said
        )


def test_one_class_has_masks_of_0_and_1(folder: Path) -> None:
    for path in (folder / "train" / "labels").rglob("*.png"):
        ids = np.asarray(Image.open(path))
        save(path, np.where(ids == 255, 255, ids % 2).astype(np.uint8))
    (folder / "classes.txt").write_text("road")
    examples = Examples(open_source(folder, "train"))
    assert examples.classes == ("road",) and examples.label_names == ("background", "road")
    labels = np.concatenate([examples[k].labels.ravel() for k in range(len(examples))])
    assert examples.pixels.tolist() == [(labels == 0).sum(), (labels == 1).sum()]
    assert examples.absent is None and examples.ignored == (labels == 255).sum() > 0
    with pytest.raises(DataError, match="--ignore must be 2 to 255, beyond the classes .*, got 1"):
        open_source(folder, "train", ignore=1)
    (folder / "classes.txt").write_text("background\nroad")
    assert open_source(folder, "train").classes == ("background", "road")
    assert open_source(folder, "train", 1).classes == ("road",)
    for names in ("road\nbackground", "road\ncar", "background\nroad\ncar"):
        (folder / "classes.txt").write_text(names)
        with pytest.raises(DataError, match="names [23] classes, --classes says 1"):
            open_source(folder, "train", 1)
    (folder / "classes.txt").write_text("road")
    broken_pair(folder, "two", np.full((40, 56), 2, np.uint8))
    with pytest.raises(
        DataError, match=r"label id 2 \(.* neither a class, 0 to 1, nor the ignored id 255; masks"
    ):
        Examples(open_source(folder, "train"))


def test_deep_pictures_are_read_by_the_bits_that_are_said(folder: Path) -> None:
    for path in (folder / "train" / "images").rglob("*.png"):
        grey = np.asarray(Image.open(path))[..., 0].astype(np.uint16)
        path.unlink()
        save(path, grey * 4)
    for bits, scale in ((10, 1.0), (12, 0.25)):
        picture, labels = Examples(open_source(folder, "train", bits=bits))[0]
        expected = (labels * 50 * scale).astype(np.uint8)
        assert np.array_equal(picture[labels != 255], np.stack([expected] * 3, -1)[labels != 255])


def test_pairs_that_are_none(folder: Path) -> None:
    lonely = broken_pair(folder, "lonely", None)
    orphan = folder / "train" / "labels" / "orphan.png"
    save(orphan, np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError) as raised:
        open_source(folder, "train")
    picture = folder / "train" / "images" / lonely.name
    assert str(raised.value).splitlines() == [
        f"{picture}: has no labels",
        f"{orphan}: has no picture",
    ]


def test_nothing_to_learn_from(folder: Path) -> None:
    for root, split, message in (
        (folder / "nowhere", "train", "no such folder"),
        (folder, "val", r"val.images: no such folder"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(root, split)
    for name in ("images", "labels"):
        (folder / "none" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="none: holds no pictures"):
        open_source(folder, "none")
    with pytest.raises(DataError, match=r"names 5 classes, --classes says 7"):
        open_source(folder, "train", 7)
    for count in (0, -3, 30_000_000):
        with pytest.raises(DataError, match=f"--classes must be 1 to 255, got {count}"):
            open_source(folder, "train", count)
    for memory in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"memory must be 0 or more bytes, got {memory}"):
            Examples(open_source(folder, "train"), memory)
    for ignore in (3, 256, -1):
        with pytest.raises(DataError, match=f"--ignore must be 5 to 255.*got {ignore}"):
            open_source(folder, "train", ignore=ignore)
    for path in (folder / "train" / "labels").rglob("*.png"):
        save(path, np.full((40, 56), 255, np.uint8))
    with pytest.raises(DataError, match=r"a\.png.*no pixel has a class"):
        Examples(open_source(folder, "train"))
    save(folder / "train" / "images" / "a.bmp", np.zeros((40, 56, 3), np.uint8))
    with pytest.raises(DataError, match=r"a\.png: has the same name as .*a\.bmp"):
        open_source(folder, "train")


def test_class_names_are_one_a_line(folder: Path) -> None:
    names = folder / "classes.txt"
    for content, problem in (
        (b"a\nb\n\nc\n", "line 3 is empty"),
        (b"a\nb\na\n", "line 3 repeats 'a'"),
        (b"stra\xdfe\n", "must be text in UTF-8"),
        (b"\n", "must have 1 to 255 classes, got 0"),
    ):
        names.write_bytes(content)
        with pytest.raises(DataError, match=problem):
            open_source(folder, "train")


def test_pictures_of_one_size(folder: Path) -> None:
    examples = Examples(open_source(folder, "train"))
    assert examples.sizes == [(40, 56)] * 3
    examples.require_one_size("--size")
    picture, labels = blocks(np.random.default_rng(0), 40, 60)
    save(folder / "train" / "images" / "b.png", picture)
    save(folder / "train" / "labels" / "b.png", labels)
    with pytest.raises(DataError, match=r"--size needs .*a\.png is 40x56, .*b\.png is 40x60"):
        Examples(open_source(folder, "train")).require_one_size("--size")


def test_cityscapes(tmp_path: Path) -> None:
    ids = np.array([[7, 8, 11, 33, 0, 1], [23, 24, 26, 255, 34 - 1, 12]], np.uint8)
    name = "val/ulm/ulm_000001_000019"
    save(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", np.zeros((2, 6, 3), np.uint8))
    labels = tmp_path / f"gtFine/{name}_gtFine_labelIds.png"
    save(labels, ids)
    for other in ("color", "instanceIds", "labelTrainIds"):  # not what is read
        save(tmp_path / f"gtFine/{name}_gtFine_{other}.png", ids)
    examples = Examples(open_source(tmp_path, "val"))
    assert examples.classes == CITYSCAPES_CLASSES
    assert examples[0].labels.tolist() == [[0, 1, 2, 18, 255, 255], [10, 11, 13, 255, 18, 3]]
    save(labels, ids + 1)
    with pytest.raises(DataError, match=r"labelIds\.png: label id 34"):
        Examples(open_source(tmp_path, "val"))


def test_streets() -> None:
    source = open_source("streets:2", "train")
    assert len(source) == 2 and source.classes == CAMVID_CLASSES
    assert len(open_source("streets", "val")) == 100
    small = Streets(2, 7, (60, 80), ignore=255)
    picture, labels = street(8, 60, 80)
    assert np.array_equal(small.read(1).picture, picture)
    assert np.array_equal(small.read(1).labels, np.where(labels == 11, 255, labels))
    assert Examples(small).pixels.sum() == sum((small.read(i).labels != 255).sum() for i in (0, 1))
    with pytest.raises(DataError, match="streets must be followed by a number"):
        open_source("streets:x", "train")


def test_a_folder_called_streets_is_not_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "streets").symlink_to(folder)
    monkeypatch.chdir(here)
    for root in ("streets", Path("streets")):
        with pytest.raises(
            DataError, match=r"say \./streets for the folder, streets:N for N drawn"
        ):
            open_source(root, "train")
    assert len(open_source("./streets", "train")) == 3
    assert len(open_source("streets:5", "train")) == 5


# --- augmentation ----------------------------------------------------------------------------------------


def test_plain_view_is_the_example(seed: int) -> None:
    rng = np.random.default_rng(seed)
    example = blocks(rng, 48, 72)
    while np.array_equal(example.labels, example.labels[:, ::-1]):  # its mirror image must differ
        example = blocks(rng, 48, 72)
    view = Augmentation((48, 72), **PLAIN)(example, rng)
    assert np.array_equal(view.picture, example.picture)
    assert np.array_equal(view.labels, example.labels)
    part = Augmentation((32, 40), **PLAIN)(example, rng)
    assert part.picture.shape == (32, 40, 3) and part.labels.shape == (32, 40)
    large = Augmentation((96, 144), (96, 144), **PLAIN)(example, rng)
    assert large.picture.shape == (96, 144, 3) and np.array_equal(large.labels, example.labels)
    mirrored = Augmentation((48, 72), scale=(1, 1), flip=True, colour=0)
    seen = {np.array_equal(mirrored(example, rng).labels, example.labels) for _ in range(40)}
    assert seen == {True, False}


@pytest.mark.parametrize("size", [None, (96, 144), (75, 100)])
def test_labels_stay_in_place(size: tuple[int, int] | None, seed: int) -> None:
    """The picture's colours tell what the labels must be, in every view, but along edges."""
    rng, checked = np.random.default_rng(seed), 0
    for _ in range(40):
        example = blocks(rng, *rng.integers(40, 120, 2))
        augmentation = Augmentation((64, 96), size, colour=0.0, ignore=255)
        picture, labels = augmentation(example, rng)
        assert picture.shape == (64, 96, 3)
        assert labels.shape == augmentation.label_size(*example.labels.shape)
        shape = labels.shape[::-1]
        seen = np.asarray(Image.fromarray(picture).resize(shape, Image.Resampling.NEAREST))
        found = np.rint(seen[..., 0] / 50)
        image = Image.fromarray(labels)
        least, most = (
            np.asarray(image.filter(f(7))) for f in (ImageFilter.MinFilter, ImageFilter.MaxFilter)
        )
        clear = (least == most) & (labels != 255)
        clear[:3] = clear[-3:] = clear[:, :3] = clear[:, -3:] = False
        assert np.array_equal(found[clear], labels[clear])
        checked += clear.sum()
    assert checked > 1000


def test_beside_the_picture(seed: int) -> None:
    rng = np.random.default_rng(seed)
    example = blocks(rng, 50, 60)
    picture, labels = Augmentation((64, 96), scale=(0.5, 0.5), colour=0.0, ignore=77)(example, rng)
    inside = labels != 77
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert abs(rows - 25) <= 1 and abs(columns - 30) <= 1 and inside.sum() == rows * columns
    mean = example.picture[::16, ::16].mean((0, 1)).astype(np.uint8)
    assert (picture[~inside] == mean).all()


def test_colours_change_pictures_only(seed: int) -> None:
    example = Example(*street(3, 60, 80))
    calm = Augmentation((64, 64), colour=0.0, photo=0.0)
    wild = Augmentation((64, 64), colour=0.4, photo=1.0)
    changed = 0
    for k in range(20):
        views = [a(example, np.random.default_rng((seed, k))) for a in (calm, wild, wild)]
        assert np.array_equal(views[1].picture, views[2].picture)
        changed += not np.array_equal(views[0].picture, views[1].picture)
    assert changed == 20


@pytest.mark.parametrize("size", [None, (96, 144)])
def test_channels_are_viewed_alike(size: tuple[int, int] | None, seed: int) -> None:
    """Each by itself, alpha too, which keeps its values and does not weigh the others."""
    rng = np.random.default_rng(seed)
    picture, labels = street(3, 60, 80)
    alpha = rng.integers(0, 256, (60, 80, 1), np.uint8)

    def view(pixels: Pixels, colour: float) -> Example:
        augmentation = Augmentation((64, 96), size, colour=colour, photo=colour)
        return augmentation(Example(pixels, labels), np.random.default_rng((seed, 1)))

    rgb, rgba = (view(np.dstack(p), 0.3) for p in ((picture,), (picture, alpha)))
    assert rgba.picture.shape == (64, 96, 4) and np.array_equal(rgba.picture[..., :3], rgb.picture)
    plain = [view(picture[..., k : k + 1], 0).picture for k in range(3)]
    plain.append(view(alpha, 0).picture)
    assert plain[0].shape == (64, 96, 1)
    assert np.array_equal(np.dstack(plain), view(np.dstack((picture, alpha)), 0).picture)
    two = np.dstack((picture[..., :1], alpha))
    assert np.array_equal(view(two, 0).picture, np.dstack((plain[0], plain[3])))
    grey, lively = view(two, 0.3), view(two[..., :1], 0.3)
    assert np.array_equal(grey.labels, rgb.labels)
    assert np.array_equal(grey.picture[..., :1], lively.picture)
    assert not np.array_equal(lively.picture, plain[0])


# --- batches ---------------------------------------------------------------------------------------------


def streets(count: int) -> Examples:
    return Examples(Streets(count, 0, (40, 48)))


def test_any_step_any_process_any_time(seed: int) -> None:
    examples, augmentation = streets(5), Augmentation((32, 32), photo=1.0)

    def batches(rank: int = 0, world: int = 1, workers: int = 0) -> Batches:
        return Batches(examples, augmentation, 4, seed, rank=rank, world=world, workers=workers)

    whole = list(batches().steps(0, 6))
    assert whole[0].pictures.shape == (4, 3, 32, 32) and whole[0].labels.shape == (4, 32, 32)
    for workers in (0, 1, 3):
        later = list(batches(workers=workers).steps(2, 6))
        assert len(later) == 4
        for ours, theirs in zip(later, whole[2:]):
            assert all((a == b).all() for a, b in zip(ours, theirs))
    for rank in (0, 1):
        for ours, theirs in zip(batches(rank, 2, 2).steps(0, 6), whole):
            assert all((a == b[2 * rank :][:2]).all() for a, b in zip(ours, theirs))
    assert list(batches(workers=2).steps(3, 3)) == []
    with pytest.raises(
        ValueError, match="batch must be a positive multiple of the 3 processes, got 4"
    ):
        batches(0, 3)


def test_every_epoch_sees_every_example(seed: int) -> None:
    batches = Batches(streets(7), Augmentation((32, 32)), 3, seed)
    order = [batches._pick(k)[1] for k in range(21)]
    epochs = [order[:7], order[7:14], order[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert [batches._pick(k)[1] for k in reversed(range(21))] == order[::-1]
    other = Batches(streets(7), Augmentation((32, 32)), 3, seed + 1)
    assert [other._pick(k)[1] for k in range(21)] != order


def test_extra_examples(seed: int) -> None:
    examples, extra = streets(3), streets(2)
    batches = Batches(examples, Augmentation((32, 32)), 2, seed, extra, 0.25)
    taken = [batches._pick(k)[0] is extra for k in range(2000)]
    assert abs(np.mean(taken) - 0.25) < 0.06
