"""Data against checksums and naive loops, readers against damage, augmentations against torchvision's."""
import hashlib
import math
import os
import pickle
import shutil
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

import data
from conftest import write_course_folder
from synthetic import write_synthetic
from utils import UserError

REAL = Path(os.environ.get("DATA_DIR", "no such folder"))
BINARY, PYTHON, LABELS = "cifar-10-batches-bin", "cifar-10-batches-py", "MNIST/raw/train-labels-idx1-ubyte"


def rows_of(images):
    """The bytes of each image."""
    return [image.contiguous().numpy().tobytes() for image in images]


# ---------------------------------------------------------------- the recipe
def naive_resize(image, size):
    """One channel, uint8 [n,n], pixel by pixel; sums are Python's, in float64, and kept in float32."""
    n = len(image)
    sigma = (n / size - 1) / 2
    radius = int(4 * sigma + 0.5)
    weights = [math.exp(-k * k / (2 * sigma * sigma)) for k in range(-radius, radius + 1)]
    taps = [(k, weight / sum(weights)) for k, weight in enumerate(weights)]

    def kept(value, side):
        return np.array([[value(y, x) for x in range(side)] for y in range(side)], np.float32)

    unit = np.pad(image.astype(np.float32) / np.float32(255), ((radius, radius), (0, 0)), mode="reflect")
    down = kept(lambda y, x: sum(w * float(unit[y + k, x]) for k, w in taps), n)
    down = np.pad(down, ((0, 0), (radius, radius)), mode="reflect")
    both = kept(lambda y, x: sum(w * float(down[y, x + k]) for k, w in taps), n)
    places = [(i + 0.5) * n / size - 0.5 for i in range(size)]
    near = [((int(p), 1 - p % 1), (int(p) + 1, p % 1)) for p in places]
    small = kept(lambda y, x: sum(a * b * float(both[i, j]) for i, a in near[y] for j, b in near[x]), size)
    return np.floor(small * np.float32(255)).astype(np.uint8)


@pytest.mark.parametrize("n, size", [(32, 24), (28, 16)])
def test_resize_is_blur_bilinear_floor_with_the_courses_roundings(n, size):
    images = torch.randint(0, 256, (2, 2, n, n), dtype=torch.uint8)
    for image, small in zip(images.flatten(0, 1), data.resize(images, size).flatten(0, 1)):
        np.testing.assert_array_equal(small.numpy(), naive_resize(image.numpy(), size))


@pytest.mark.skipif(not any((REAL / name).is_dir() for name in (BINARY, PYTHON)) or
                    (REAL / "pairs.npz").exists(), reason="$DATA_DIR has no CIFAR-10")
def test_the_real_files_give_the_reports_own_images(capsys):
    """By data.REPORT_SHA256, computed from the course's published PNGs without this project's code."""
    splits = data.load_splits(REAL)
    data.check(splits)
    assert capsys.readouterr().out.count("are the report's, bit for bit") == 3
    assert hashlib.sha256(splits.val.images.numpy().tobytes()).hexdigest() == (
        "0be03e14d4f01986dddf1ca5244c5f58b82ae549e5f98b28d20b0039c4772ea2")


def test_composites_have_picture_digit_and_gray_in_their_places():
    pictures = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    digits = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    split = data.make_composites((pictures, np.array([7, 8])), np.array([1, 0, 1]),
                                 (digits, np.array([4, 5, 6])), np.array([2, 1, 1]))
    assert split.labels.tolist() == [8, 7, 8] and split.digits.tolist() == [6, 5, 5]
    for image, i, j in zip(split.images, (1, 0, 1), (2, 1, 1), strict=True):
        for y in range(40):
            for x in range(40):
                expected = (pictures[i, :, y, x].tolist() if y < 24 and x < 24 else
                            3 * [digits[j, 0, y - 24, x - 24]] if y >= 24 and x >= 24 else 3 * [127])
                assert image[:, y, x].tolist() == expected


# ---------------------------------------------------------------- the splits
def test_the_splits_hold_every_image_once_and_a_balanced_validation_set(data_dir):
    (pictures, labels), (test_pictures, test_labels), _ = data.read_cifar(data_dir)
    digit_pictures, digits = data.read_mnist(data_dir)
    digit_of = dict(zip(rows_of(digit_pictures), digits.tolist()))
    splits = data.load_splits(data_dir)
    for split in splits[:3]:
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 40, 40)
        assert split.labels.dtype == split.digits.dtype == torch.int64
        corners = rows_of(split.images[:, 0, 24:, 24:])
        assert [digit_of[corner] for corner in corners] == split.digits.tolist()
    (train, val, test), label_of = splits[:3], dict(zip(rows_of(pictures), labels.tolist(), strict=True))
    found = rows_of(train.images[..., :24, :24]) + rows_of(val.images[..., :24, :24])
    assert len(train.images) == 360 and len(label_of) == 400
    assert sorted(found) == sorted(label_of)  # so none is in both
    assert [label_of[image] for image in found] == train.labels.tolist() + val.labels.tolist()
    assert val.labels.bincount().tolist() == [4] * 10
    assert rows_of(test.images[..., :24, :24]) == rows_of(test_pictures)
    assert test.labels.tolist() == test_labels.tolist() and len(test_labels) == 60
    # of two test images the digit is known, see synthetic.py; --match-prob draws those of training anew
    assert rows_of(test.images[[1, 4], 0, 24:, 24:]) == rows_of(digit_pictures[[7, 3]])
    matching = data.load_splits(data_dir, match_prob=1.0)
    assert torch.equal(matching.train.digits, train.labels) and not torch.equal(train.digits, train.labels)
    assert torch.equal(matching.train.images[data.PICTURE], train.images[data.PICTURE])
    assert torch.equal(matching.val.images, val.images) and torch.equal(matching.test.images, test.images)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.6, 1.0])
def test_drawn_digits_match_with_p_and_a_tenth_of_the_rest(p):
    labels, digits = np.random.RandomState(1).randint(0, 10, 20_000), np.arange(1000) % 10
    chosen, share = data.draw_digits(labels, digits, p, np.random.RandomState(2)), p + (1 - p) / 10
    assert abs((digits[chosen] == labels).mean() - share) <= 4 * math.sqrt(share * (1 - share) / 20_000)
    counts = np.bincount(chosen, minlength=1000)  # each image alike often: chi-squared
    assert ((counts - 20) ** 2 / 20).sum() < 1000 + 5 * math.sqrt(2 * 1000)


def test_the_check_prints_what_the_splits_hold_and_draws_a_sheet(data_dir, tmp_path, monkeypatch, capsys):
    before, sheet = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}, tmp_path / "sheet"
    monkeypatch.setattr(sys, "argv", ["data.py", "--data-dir", str(data_dir), "--sheet", str(sheet)])
    data.main()
    printed = capsys.readouterr().out
    for split in data.load_splits(data_dir)[:3]:
        assert hashlib.sha256(split.images.numpy().tobytes()).hexdigest() in printed
        assert f"{np.mean(split.digits.numpy() == split.labels.numpy()):.4f}" in printed
    assert "synthetic" in printed and "report's" not in printed
    assert sheet.read_bytes().startswith(b"\x89PNG")  # whatever it is called
    assert before == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}  # loading writes nothing


# ---------------------------------------------------------------- readers
@pytest.fixture
def copied(data_dir, tmp_path):
    """A copy of the synthetic data to damage."""
    return shutil.copytree(data_dir, tmp_path / "copied")


@pytest.mark.parametrize("name", [f"{BINARY}/data_batch_3.bin", f"{BINARY}/test_batch.bin",
                                  "MNIST/raw/train-images-idx3-ubyte", LABELS, "pairs.npz"])
@pytest.mark.parametrize("damage", ["one byte short", "empty", "foreign"])
def test_a_damaged_file_is_named_in_one_line(copied, name, damage):
    raw = (copied / name).read_bytes()
    content = {"one byte short": raw[:-1], "empty": b"", "foreign": b"<html>" + raw[6:]}[damage]
    (copied / name).write_bytes(content)
    with pytest.raises(UserError, match="expected") as error:
        data.load_splits(copied)
    assert str(copied / name) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def offline(monkeypatch):
    """Downloads fail; the list of the addresses that were asked for."""
    asked = []

    def fail(url, *args, **settings):
        asked.append(url)
        raise URLError("no network")
    for module in ("cifar", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fail)
    return asked


def test_the_python_version_holds_the_same_images_and_is_checked(copied, offline, monkeypatch):
    """Written here, with the checksums that torchvision is to expect."""
    binary, folder, batches = data.load_splits(copied), copied / PYTHON, []
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    for path in sorted((copied / BINARY).glob("*.bin")):
        records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        batches.append(write(path.stem, {"data": records[:, 1:], "labels": records[:, 0].tolist()}))
    name, md5 = write("batches.meta", {"label_names": list(binary.classes)})
    monkeypatch.setattr(CIFAR10, "train_list", batches[:5])
    monkeypatch.setattr(CIFAR10, "test_list", batches[5:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    shutil.rmtree(copied / BINARY)
    python = data.load_splits(copied)
    for a, b in zip(python[:3], binary[:3]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert python.classes == binary.classes and not offline
    write("data_batch_2", {})
    with pytest.raises(UserError, match="CIFAR10 is missing or damaged .*no network"):
        data.load_splits(copied)
    assert len(offline) == 1


def test_missing_data_name_both_layouts_and_a_remedy(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        data.load_splits("data")  # the default folder, which need not be there
    for part in (BINARY, PYTHON, "{train,val}/{0..9}", "no network", "experiments.sh demo"):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and offline


def test_only_the_missing_part_is_downloaded(offline, copied):
    (copied / LABELS).unlink()
    with pytest.raises(UserError, match="MNIST is missing"):
        data.load_splits(copied)
    assert offline and all("cifar" not in url for url in offline)


def test_a_mistyped_folder_is_neither_made_nor_downloaded_into(offline, tmp_path):
    """One that is not there, and one that holds other things."""
    write_course_folder(tmp_path / "course")
    for name in ("dtaa", "course/train"):
        with pytest.raises(UserError, match=f"{name} does not hold CIFAR10"):
            data.load_splits(tmp_path / name)
    assert not offline and [path.name for path in tmp_path.iterdir()] == ["course"]


# ---------------------------------------------------------------- the course's folder
@pytest.mark.parametrize("below", ["", "custom_image_dataset"])
def test_the_courses_folder_is_found_there_or_one_level_down(tmp_path, below):
    write_course_folder(tmp_path / below, size=28)
    splits = data.load_splits(tmp_path)
    assert splits.test is None and splits.classes[3] == "cat"  # folder 3, by CIFAR-10's name
    for split in splits[:2]:
        assert split.images.shape == (20, 3, 28, 28) and (split.digits == -1).all()
        assert (split.images[:, 0, 0, 0] // 20 == split.labels).all() and (split.images[:, 2] == 9).all()
    assert splits.train.labels.tolist() != sorted(splits.train.labels.tolist())  # mixed, for --limit


def test_hidden_and_foreign_files_are_passed_over_and_other_formats_read(tmp_path):
    write_course_folder(tmp_path)
    for folder in (tmp_path, tmp_path / "train", tmp_path / "train/3"):
        (folder / ".ipynb_checkpoints").mkdir()
        for name in (".DS_Store", "._img_0.png", "Thumbs.db"):
            (folder / name).write_bytes(b"no image")
    Image.new("L", (40, 40), 77).save(tmp_path / "train/3/gray.PNG")
    Image.new("RGB", (40, 40), (77, 77, 77)).save(tmp_path / "train/3/photo.jpg")
    images = data.load_splits(tmp_path).train.images
    added = images[images[:, 2, 0, 0] != 9].int()
    assert len(images) == 22 and len(added) == 2 and ((added - 77).abs() <= 2).all()


def test_an_unreadable_image_is_named_in_one_line(tmp_path):
    path = write_course_folder(tmp_path) / "val/7/img_1.png"
    for content in (path.read_bytes()[:60], b"no image", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read") as error:
            data.load_splits(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_two_sizes_are_refused(tmp_path):
    small, large = (write_course_folder(tmp_path / str(size), size) for size in (28, 40))
    shutil.copytree(large / "val", small / "val", dirs_exist_ok=True)
    with pytest.raises(UserError, match="train and val images differ in size"):
        data.load_splits(small)
    Image.new("RGB", (30, 28)).save(small / "train/3/odd.png")
    with pytest.raises(UserError, match=r"odd\.png is 30x28 pixels, expected .*28x28"):
        data.load_splits(small)


@pytest.mark.parametrize("lost, named", [("val", "val has no images of class 0"),
                                         ("val/4", "val has no images of class 4"),
                                         ("train", "does not hold"),
                                         ("train/4", "train has no images of class 4")])
def test_a_missing_split_or_class_is_named(tmp_path, lost, named):
    shutil.rmtree(write_course_folder(tmp_path) / lost)
    with pytest.raises(UserError, match=named):
        data.load_splits(tmp_path)


def test_synthetic_data_never_overwrite_real_ones(tmp_path):
    (tmp_path / BINARY).mkdir()
    (tmp_path / BINARY / "data_batch_1.bin").write_bytes(b"real")
    with pytest.raises(UserError, match="other data"):
        write_synthetic(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["data_batch_1.bin"]


# ---------------------------------------------------------------- augmentations
def assert_share(hits, p):
    """The share of True is `p`, within four standard deviations."""
    assert abs(hits.double().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / hits.numel())


def assert_same_distribution(ours, oracle):
    """Two-sample Kolmogorov-Smirnov statistic below its 0.1 % limit (conservative for discrete values)."""
    values = np.union1d(ours, oracle)
    below, oracle_below = (np.searchsorted(np.sort(x), values, "right") / len(x) for x in (ours, oracle))
    assert abs(below - oracle_below).max() < 1.95 * math.sqrt(1 / len(ours) + 1 / len(oracle))


def boxes(images):
    """Height, width, top, left of the zeros in images of ones; images without any are left out."""
    found = []
    for image in images[:, 0].numpy():
        rows, columns = np.flatnonzero((image == 0).any(1)), np.flatnonzero((image == 0).any(0))
        if len(rows):
            found.append((len(rows), len(columns), rows[0], columns[0]))
            assert (image == 0).sum() == len(rows) * len(columns)  # one filled rectangle
    return np.array(found)


@pytest.mark.parametrize("scale, size", [((0.02, 0.05), (40, 40)), ((0.3, 0.9), (40, 24))])
def test_random_erasing_has_torchvisions_distribution(scale, size):
    n, ones, oracle = 2500, torch.ones(1, *size), v2.RandomErasing(p=1.0, scale=scale)
    ours = boxes(data.random_erasing(ones.expand(n, 1, *size), 1.0, scale))
    theirs = boxes(torch.stack([oracle(ones) for _ in range(n)]))
    assert abs(len(ours) - len(theirs)) < 4 * math.sqrt(n / 2)
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3],
                    lambda b: b[:, 0] * b[:, 1], lambda b: b[:, 0] / b[:, 1]):
        assert_same_distribution(measure(ours), measure(theirs))


def test_random_erasing_probability_value_and_channels():
    x = torch.rand(2000, 3, 40, 40) + 1
    erased = data.random_erasing(x, 0.3, (0.02, 0.05))
    changed = erased != x
    assert_share(changed.flatten(1).any(1), 0.3)
    assert (erased[changed] == 0).all() and (changed == changed[:, :1]).all()


def test_gaussian_noise_has_torchvisions_distribution():
    x = torch.rand(50, 3, 20, 20)
    ours, theirs = data.gaussian_noise(x, 0.3) - x, v2.GaussianNoise(0, 0.3, clip=False)(x) - x
    assert_same_distribution(ours.flatten().numpy(), theirs.flatten().numpy())
    correlation = torch.corrcoef(ours.flatten(1)) - torch.eye(50)
    assert correlation.abs().max() < 5 / math.sqrt(1200)  # drawn for each image on its own


@pytest.mark.parametrize("size", [(40, 40), (24, 36)])
def test_rotation_is_torchvisions(monkeypatch, size):
    x, angles = torch.rand(5, 3, *size), torch.tensor([-10.0, -3.3, 0.0, 4.7, 10.0])
    monkeypatch.setattr(torch, "rand", lambda n, device: (angles / 10 + 1) / 2)
    for ours, image, angle in zip(data.rotation(x, 10), x, angles):
        theirs = v2.functional.rotate(image, angle.item(), fill=0.0)
        assert (ours == theirs).double().mean() > 0.995  # pixels half way between two may fall to either


@pytest.mark.parametrize("flag, side", [("flip", 40), ("flip_picture", 24)])
def test_flips_mirror_the_image_or_only_the_picture_with_their_probability(flag, side):
    x = torch.randint(0, 256, (2000, 3, 40, 40), dtype=torch.uint8)
    mirrored, before = x.clone(), x.clone()
    mirrored[..., :side, :side] = v2.functional.horizontal_flip(x[..., :side, :side])
    y = data.augment(x, **{flag: 0.3})
    same, turned = ((y == data.augment(other)).flatten(1).all(1) for other in (before, mirrored))
    assert (same ^ turned).all() and torch.equal(x, before)  # the split's own images stay as they are
    assert_share(turned, 0.3)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_shuffled_digits_change_hands_and_nothing_else(p):
    """Corner i is filled with i: the result tells whose digit each image got."""
    n, givers, x = 16, [], torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8)
    x[..., 24:, 24:] = torch.arange(n).view(n, 1, 1, 1)
    before = x.clone()
    for _ in range(400):
        y = data.exchange_digits(x, p)
        giver, expected = y[:, 0, 30, 30].long(), before.clone()
        for i in range(n):
            expected[i, :, 24:, 24:] = before[giver[i], :, 24:, 24:]
        assert torch.equal(y, expected) and torch.equal(x, before)
        assert sorted(giver.tolist()) == list(range(n))  # each digit goes to one image
        givers.append(giver)
    givers = torch.stack(givers)
    # an image keeps its digit if it is not chosen, or is the only one that is
    assert_share(givers == torch.arange(n), (1 - p) + p * (1 - p) ** (n - 1))
    # and the others' digits come to it alike often: chi-squared of 16 * 15 pairs, less than 5 deviations off
    pairs = torch.bincount((torch.arange(n) * n + givers).flatten(), minlength=n * n).view(n, n).double()
    others = pairs[~torch.eye(n, dtype=torch.bool)]
    assert ((others - others.mean()) ** 2 / others.mean()).sum() < 240 + 5 * math.sqrt(2 * 240)


def test_shift_moves_the_picture_and_repeats_its_border():
    x = torch.randint(0, 256, (300, 3, 40, 40), dtype=torch.uint8)
    before, shifted, seen = x.clone(), data.shift_picture(x, 2), []
    for image, moved in zip(x.numpy(), shifted.numpy()):
        padded = np.pad(image[:, :24, :24], ((0, 0), (2, 2), (2, 2)), mode="edge")
        moves = [(i, j) for i in range(5) for j in range(5)
                 if (padded[:, i:i + 24, j:j + 24] == moved[:, :24, :24]).all()]
        assert len(moves) == 1
        seen += moves
    assert len(set(seen)) == 25 and max(map(seen.count, seen)) < 40  # each move about 12 times
    assert torch.equal(x, before)
    x[..., :24, :24] = shifted[..., :24, :24] = 0
    assert torch.equal(x, shifted)


def test_the_pipeline_is_torchvisions_in_the_reports_order():
    x = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8)
    oracle = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize([0.438, 0.435, 0.422], [0.228, 0.225, 0.231])])  # the handout's numbers

    ours = data.augment
    torch.testing.assert_close(ours(x), oracle(x))
    # what knows where the picture is comes before the flip
    mirrored = x.clone()
    mirrored[..., :24, :24] = x[..., :24, :24].flip(3)
    torch.testing.assert_close(ours(x, flip=1, flip_picture=1), oracle(mirrored.flip(3)))
    # rotation comes before normalizing: what it brings in is black
    corner = ours(torch.full_like(x, 255), flip=0, rotate=45)[:, 0, 0, 0]
    black, white = (torch.isclose(corner, oracle(torch.full_like(x, v))[:, 0, 0, 0]) for v in (0, 255))
    assert (black ^ white).all() and black.any()
    # noise comes after normalizing: its standard deviation in the result is sigma, not sigma / std
    assert abs((ours(x, flip=0, noise=0.05) - oracle(x)).std().item() - 0.05) < 0.001
    # erasing comes last: it fills with exactly 0
    assert ((ours(x, flip=0, noise=0.05, erase=1.0) == 0).flatten(1).sum(1) > 3 * 20).all()
