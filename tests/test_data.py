"""The data recipe against naive loops, the readers against damaged files, the augmentations against torchvision's."""
import math
import shutil
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.utils import save_image

import data
from utils import UserError


# ---------------------------------------------------------------- composites
def naive_resize(image, size):
    """One channel [n,n], pixel by pixel: blur rows, blur columns, bilinear, floor."""
    n = len(image)
    sigma = (n / size - 1) / 2
    radius = int(4 * sigma + 0.5)
    weights = [math.exp(-(k * k) / (2 * sigma * sigma)) for k in range(-radius, radius + 1)]
    weights = [w / sum(weights) for w in weights]

    def mirror(i):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    blurred = [[sum(w * sum(v * float(image[mirror(y + dy)][mirror(x + dx)]) for dx, v in zip(range(-radius, radius + 1), weights))
                    for dy, w in zip(range(-radius, radius + 1), weights)) for x in range(n)] for y in range(n)]
    out = np.zeros((size, size), np.uint8)
    for y in range(size):
        for x in range(size):
            fy, fx = (y + 0.5) * n / size - 0.5, (x + 0.5) * n / size - 0.5
            y0, x0 = int(fy), int(fx)
            value = ((1 - fy + y0) * ((1 - fx + x0) * blurred[y0][x0] + (fx - x0) * blurred[y0][x0 + 1])
                     + (fy - y0) * ((1 - fx + x0) * blurred[y0 + 1][x0] + (fx - x0) * blurred[y0 + 1][x0 + 1]))
            out[y, x] = math.floor(value + 1e-9)
    return out


@pytest.mark.parametrize("n, size", [(32, 24), (28, 16)])
def test_resize_is_blur_bilinear_floor(n, size):
    images = torch.randint(0, 256, (2, 2, n, n), dtype=torch.uint8)
    resized = data.resize(images, size)
    assert resized.dtype == torch.uint8 and resized.shape == (2, 2, size, size)
    for image, small in zip(images.flatten(0, 1), resized.flatten(0, 1)):
        np.testing.assert_array_equal(small.numpy(), naive_resize(image.tolist(), size))


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_resize_keeps_a_constant_image(value):
    assert (data.resize(torch.full((1, 1, 32, 32), value, dtype=torch.uint8), 24) == value).all()


def test_compose_places_image_digit_and_gray():
    cifar = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    digit = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    images = data.compose(cifar, digit)
    for k in range(3):
        for y in range(40):
            for x in range(40):
                expected = (cifar[k, :, y, x] if y < 24 and x < 24 else
                            digit[k, :, y - 24, x - 24].expand(3) if y >= 24 and x >= 24 else torch.full((3,), 127))
                assert images[k, :, y, x].tolist() == expected.tolist()


def test_splits_sizes_types_and_planted_match(data_dir):
    splits = data.load_splits(data_dir)
    assert [len(split.labels) for split in splits[:3]] == [360, 40, 60]
    for split in splits[:3]:
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 40, 40)
        assert split.labels.dtype == split.digits.dtype == torch.int64
    assert (data.load_splits(data_dir, match_prob=1.0).train.digits == splits.train.labels).all()


def test_match_share_follows_its_formula(tmp_path):
    """In training; in validation and test, where the digits are independent, it is a tenth."""
    data.write_synthetic(tmp_path, train=3000, test=600)
    for match_prob in (0.0, 0.6):
        splits = data.load_splits(tmp_path, match_prob)
        for split, expected in ((splits.train, match_prob + (1 - match_prob) / 10), (splits.val, 0.1), (splits.test, 0.1)):
            deviation = math.sqrt(expected * (1 - expected) / len(split.labels))
            assert abs((split.digits == split.labels).double().mean().item() - expected) < 4 * deviation


def test_val_and_test_do_not_depend_on_match_prob(data_dir):
    one, other = data.load_splits(data_dir, match_prob=0.6), data.load_splits(data_dir, match_prob=0.0)
    for a, b in ((one.val, other.val), (one.test, other.test)):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(one.train.labels, other.train.labels) and not torch.equal(one.train.digits, other.train.digits)


def test_data_seed_decides_the_splits(data_dir):
    a, b, c = (data.load_splits(data_dir, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.val.images, c.val.images)


def test_digit_pictures_show_the_digit(data_dir):
    """Each composite's corner is one of the resized MNIST images of the digit that the split names."""
    images, labels = data.read_mnist(data_dir, data.MNIST_TRAIN)
    known = {small.numpy().tobytes(): label for small, label in zip(data.resize(images, 16), labels)}
    splits = data.load_splits(data_dir)
    corners = {}
    for name, split in (("train", splits.train), ("val", splits.val)):
        corners[name] = {image[0, 24:, 24:].contiguous().numpy().tobytes() for image in split.images}
        for image, digit in zip(split.images, split.digits):
            assert known[image[0, 24:, 24:].contiguous().numpy().tobytes()] == digit
    assert not corners["train"] & corners["val"]  # no validation digit was seen in training


def test_the_check_prints_what_the_splits_hold_and_draws_a_sheet(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--data-dir", str(data_dir), "--sheet", str(tmp_path / "sheet")])
    data.main()
    printed = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    for name, split in zip(("train", "val", "test"), data.load_splits(data_dir)[:3]):
        pixels = split.images.numpy() / 255
        assert printed[f"{name}_images"] == str(len(pixels))
        for key, values in (("mean", pixels.mean((0, 2, 3))), ("std", pixels.std((0, 2, 3), ddof=1))):
            assert printed[f"{name}_{key}"] == " ".join(f"{value:.4f}" for value in values)
        matching = sum(digit == label for digit, label in zip(split.digits.tolist(), split.labels.tolist()))
        assert printed[f"{name}_match_share"] == f"{matching / len(pixels):.4f}"
    assert "synthetic" in printed["source"]
    assert (tmp_path / "sheet").read_bytes().startswith(b"\x89PNG")  # whatever it is called


def test_loading_writes_nothing(data_dir):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    data.load_splits(data_dir)
    assert before == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}


# ---------------------------------------------------------------- readers
def test_cifar_layout(tmp_path):
    """Label byte, then red, green, blue planes, row by row."""
    (tmp_path / "x.bin").write_bytes(bytes([7]) + bytes([1] * 1024) + bytes([2] * 1024) + bytes(range(256)) * 4)
    images, labels = data.read_cifar(tmp_path, ["x.bin"])
    assert labels.tolist() == [7] and images.shape == (1, 3, 32, 32)
    assert (images[0, 0] == 1).all() and (images[0, 1] == 2).all()
    assert images[0, 2, 3, 5] == 3 * 32 + 5


@pytest.mark.parametrize("name", [*data.CIFAR_TRAIN[:1], *data.CIFAR_TEST, *data.MNIST_TRAIN, *data.MNIST_TEST])
@pytest.mark.parametrize("damage", ["one byte short", "empty", "foreign"])
def test_a_damaged_file_is_named(data_dir, tmp_path, name, damage):
    shutil.copytree(data_dir, tmp_path / "d")
    path = tmp_path / "d" / name
    raw = path.read_bytes()
    path.write_bytes({"one byte short": raw[:-1], "empty": b"", "foreign": b"<html>" + raw[6:]}[damage])
    with pytest.raises(UserError, match="expected") as error:
        data.load_splits(tmp_path / "d")
    assert name.split("/")[-1].split("-")[0] in str(error.value)


def test_missing_data_name_files_and_remedy(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")
    monkeypatch.setattr(data, "download_and_extract_archive", offline)
    with pytest.raises(UserError) as error:
        data.load_splits(tmp_path)
    for part in (str(tmp_path), data.CIFAR_TRAIN[0], data.MNIST_TEST[1], "no network", "experiments.sh demo", "--data-dir"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def write_course_folder(folder, size=40, per_class=2):
    for split in ("train", "val"):
        for label, name in enumerate(data.CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(per_class):
                save_image(torch.full((3, size, size), (20 * label + i) / 255), folder / split / name / f"{i}.png")


def test_course_folder(tmp_path):
    write_course_folder(tmp_path, size=28)
    splits = data.load_splits(tmp_path)
    assert splits.classes == data.CLASSES and splits.test is None
    for split in (splits.train, splits.val):
        assert split.images.shape == (20, 3, 28, 28) and (split.digits == -1).all()
        assert (split.images[:, 0, 0, 0] // 20 == split.labels).all()
    assert splits.train.labels[:10].tolist() != sorted(splits.train.labels[:10].tolist())  # mixed


def test_course_folders_of_two_sizes_are_refused(tmp_path):
    write_course_folder(tmp_path / "small", size=28)
    write_course_folder(tmp_path / "large", size=40)
    shutil.rmtree(tmp_path / "small" / "val")
    (tmp_path / "large" / "val").rename(tmp_path / "small" / "val")
    with pytest.raises(UserError, match="train and val images differ in size"):
        data.load_splits(tmp_path / "small")


def test_course_folder_errors(tmp_path):
    write_course_folder(tmp_path)
    odd = tmp_path / "train" / "cat" / "odd.png"
    save_image(torch.zeros(3, 30, 40), odd)
    with pytest.raises(UserError, match=r"odd\.png is 40x30 pixels"):
        data.load_splits(tmp_path)
    odd.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"odd\.png is not a readable PNG"):
        data.load_splits(tmp_path)
    odd.unlink()
    shutil.rmtree(tmp_path / "val" / "cat")
    with pytest.raises(UserError, match="must hold PNGs"):
        data.load_splits(tmp_path)
    shutil.rmtree(tmp_path / "train" / "cat")
    with pytest.raises(UserError, match="9 class folders, expected 10"):
        data.load_splits(tmp_path)


def test_synthetic_data_never_overwrite_real_ones(data_dir, tmp_path):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / data.CIFAR_TRAIN[0]).write_bytes(b"real")
    with pytest.raises(UserError, match="other data"):
        data.write_synthetic(tmp_path)
    assert (tmp_path / data.CIFAR_TRAIN[0]).read_bytes() == b"real"
    assert "synthetic" in data.load_splits(data_dir).source


def test_the_classes_names_come_from_the_data_where_they_are(tmp_path):
    data.write_synthetic(tmp_path, train=400, test=60)
    names = tmp_path / data.CIFAR_NAMES
    assert data.load_splits(tmp_path).classes == data.SYNTHETIC_CLASSES
    for content in (b"airplane\nautomobile\n", b"\xff \xfe"):
        names.write_bytes(content)
        with pytest.raises(UserError, match=r"batches\.meta\.txt has 2 names, expected the 10 class names"):
            data.load_splits(tmp_path)
    names.unlink()
    assert data.load_splits(tmp_path).classes == data.CLASSES


# ---------------------------------------------------------------- augmentations
def assert_same_distribution(ours, oracle):
    """Two-sample Kolmogorov-Smirnov statistic below its 0.1 % limit (conservative for discrete values)."""
    ours, oracle = np.sort(ours), np.sort(oracle)
    values = np.union1d(ours, oracle)
    distance = abs(np.searchsorted(ours, values, "right") / len(ours) - np.searchsorted(oracle, values, "right") / len(oracle))
    assert distance.max() < 1.95 * math.sqrt(1 / len(ours) + 1 / len(oracle))


def boxes(images):
    """height, width, top, left of the zeros in each [N,C,H,W] image of ones; images without any are left out."""
    found = []
    for image in images[:, 0]:
        rows, columns = (image == 0).any(1).nonzero()[:, 0], (image == 0).any(0).nonzero()[:, 0]
        if len(rows):
            h, w = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
            assert (image == 0).sum() == h * w  # one filled rectangle
            found.append((h, w, int(rows[0]), int(columns[0])))
    return np.array(found)


@pytest.mark.parametrize("scale, size", [((0.02, 0.05), (40, 40)), ((0.02, 0.1), (40, 40)), ((0.3, 0.9), (40, 24))])
def test_random_erasing_has_torchvisions_distribution(scale, size):
    n, ones = 3000, torch.ones(1, *size)
    oracle = v2.RandomErasing(p=1.0, scale=scale)
    ours = boxes(data.RandomErasing(1.0, scale)(ones.expand(n, 1, *size).contiguous()))
    theirs = boxes(torch.stack([oracle(ones) for _ in range(n)]))
    assert abs(len(ours) - len(theirs)) < 4 * math.sqrt(n / 2)
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3],
                    lambda b: b[:, 0] * b[:, 1], lambda b: b[:, 0] / b[:, 1]):
        assert_same_distribution(measure(ours), measure(theirs))
    assert len({tuple(box) for box in ours}) > 100  # each image its own


def test_random_erasing_probability_value_and_channels():
    x = torch.rand(2000, 3, 40, 40) + 1
    erased = data.RandomErasing(0.3, value=-5.0)(x)
    changed = (erased != x)
    assert abs(changed.flatten(1).any(1).double().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)
    assert (erased[changed] == -5).all()
    assert (changed[:, 0] == changed[:, 1]).all() and (changed[:, 0] == changed[:, 2]).all()


def test_gaussian_noise_has_torchvisions_distribution():
    x = torch.rand(50, 3, 20, 20)
    for clip in (False, True):
        ours, theirs = data.GaussianNoise(0.3, clip)(x), v2.GaussianNoise(0, 0.3, clip)(x)
        assert_same_distribution((ours - x).flatten().numpy(), (theirs - x).flatten().numpy())
        assert (ours.min() >= 0 and ours.max() <= 1) == clip
    noise = data.GaussianNoise(0.3)(torch.zeros(50, 3, 20, 20)).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(50)
    assert correlation.abs().max() < 5 / math.sqrt(1200)  # drawn for each image on its own


@pytest.mark.parametrize("size", [(40, 40), (24, 36)])
def test_rotation_is_torchvisions_rotation(monkeypatch, size):
    x, angles = torch.rand(5, 3, *size), torch.tensor([-10.0, -3.3, 0.0, 4.7, 10.0])
    monkeypatch.setattr(torch, "rand", lambda n, device: (angles / 10 + 1) / 2)
    for ours, image, angle in zip(data.RandomRotation(10)(x), x, angles):
        theirs = v2.functional.rotate(image, angle.item(), fill=0.0)
        assert (ours == theirs).double().mean() > 0.995  # pixels half way between two may fall to either


def test_rotation_draws_for_each_image():
    bar = torch.zeros(1000, 1, 41, 41)
    bar[:, :, 20] = 1
    rotated = data.RandomRotation(10)(bar)
    slope = (rotated[:, 0, :, 38].argmax(1) - rotated[:, 0, :, 2].argmax(1)) / 36
    degrees = torch.rad2deg(slope.atan())
    assert degrees.abs().max() < 12 and len(slope.unique()) > 5
    assert abs(degrees.std().item() - 20 / math.sqrt(12)) < 0.5


def test_flip_is_the_mirror_image_with_its_probability():
    x = torch.randint(0, 256, (2000, 3, 6, 6), dtype=torch.uint8)
    flipped = data.RandomHorizontalFlip(0.3)(x)
    mirrored = (flipped == v2.functional.horizontal_flip(x)).flatten(1).all(1)
    assert (mirrored | (flipped == x).flatten(1).all(1)).all()
    assert abs(mirrored.double().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_shuffled_digits_change_hands_and_nothing_else(p):
    """Corner i is filled with i: the result tells whose digit each image got."""
    n, batches = 16, 400
    x = torch.randint(0, 256, (n, 3, 40, 40), dtype=torch.uint8)
    x[:, :, 24:, 24:] = torch.arange(n).view(n, 1, 1, 1)
    before, givers = x.clone(), []
    for _ in range(batches):
        y = data.ShuffleDigits(p)(x)
        assert torch.equal(x, before)
        corners = y[:, :, 24:, 24:].flatten(1)
        assert (corners == corners[:, :1]).all()
        y[:, :, 24:, 24:] = x[:, :, 24:, 24:]
        assert torch.equal(y, x)
        givers.append(corners[:, 0].long())
        assert torch.equal(givers[-1].sort()[0], torch.arange(n))  # each digit goes to one image
    givers = torch.stack(givers)
    # an image keeps its digit if it is not chosen, or is the only one that is
    kept = (1 - p) + p * (1 - p) ** (n - 1)
    assert abs((givers == torch.arange(n)).double().mean().item() - kept) < 5 * math.sqrt(p * (1 - p) / (n * batches)) + 1e-12
    # and the others' digits come to it alike often: chi-squared of 16 * 15 pairs, less than 5 standard deviations off
    pairs = torch.bincount((torch.arange(n) * n + givers).flatten(), minlength=n * n).view(n, n).double()
    others = pairs[~torch.eye(n, dtype=torch.bool)]
    assert ((others - others.mean()) ** 2 / others.mean()).sum() < 240 + 5 * math.sqrt(2 * 240)


def test_shift_moves_the_picture_and_repeats_its_border():
    x = torch.randint(0, 256, (300, 3, 40, 40), dtype=torch.uint8)
    y = data.ShiftPicture(2)(x)
    seen = {}
    for before, after in zip(x, y):
        moves = [(down, right) for down in range(-2, 3) for right in range(-2, 3)
                 if torch.equal(after[:, 2:22, 2:22], before[:, 2 - down:22 - down, 2 - right:22 - right])]
        assert len(moves) == 1
        down, right = moves[0]
        seen[moves[0]] = seen.get(moves[0], 0) + 1
        for r in range(24):
            for c in (0, 1, 12, 22, 23):
                assert torch.equal(after[:, r, c], before[:, min(max(r - down, 0), 23), min(max(c - right, 0), 23)])
    assert len(seen) == 25 and max(seen.values()) < 40  # 12 expected
    x[:, :, :24, :24] = y[:, :, :24, :24] = 0
    assert torch.equal(x, y)


def test_flip_picture_mirrors_the_picture_in_place():
    x = torch.randint(0, 256, (2000, 3, 40, 40), dtype=torch.uint8)
    before = x.clone()
    y = data.FlipPicture(0.3)(x)
    mirrored = torch.from_numpy(np.ascontiguousarray(x.numpy()[:, :, :24, 23::-1]))
    same, turned = ((y[:, :, :24, :24] == other).flatten(1).all(1) for other in (x[:, :, :24, :24], mirrored))
    assert (same ^ turned).all()
    assert abs(turned.double().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)
    assert torch.equal(x, before)  # the split's own images stay as they are
    x[:, :, :24, :24] = y[:, :, :24, :24] = 0
    assert torch.equal(x, y)


@pytest.mark.parametrize("size", [8, 20, 24])
def test_shrink_averages_the_pixels_each_new_one_covers(size):
    x = torch.rand(2, 3, 40, 40)
    y = data.Shrink(size)(x)
    assert y.shape == (2, 3, size, size)
    for r in range(size):
        for c in range(size):
            rows, columns = (range(i * 40 // size, -(-(i + 1) * 40 // size)) for i in (r, c))
            covered = torch.stack([x[:, :, i, j] for i in rows for j in columns])
            torch.testing.assert_close(y[:, :, r, c], covered.mean(0))


def test_pipeline_matches_torchvision_and_keeps_the_reports_order():
    x = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8)
    handout = [0.438, 0.435, 0.422], [0.228, 0.225, 0.231]  # its means and standard deviations
    oracle = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*handout)])
    torch.testing.assert_close(data.apply(data.augmentation(flip=0), x), oracle(x))
    # noise comes after normalizing: its standard deviation in the result is sigma, not sigma / std
    noisy = data.apply(data.augmentation(flip=0, noise=0.05), x)
    assert abs((noisy - oracle(x)).std().item() - 0.05) < 0.001
    # erasing comes last: it fills with exactly 0
    erased = data.apply(data.augmentation(flip=0, noise=0.05, erase=1.0), x)
    assert ((erased == 0).flatten(1).sum(1) > 3 * 20).all()
    names = [getattr(step, "__name__", type(step).__name__) for step in data.augmentation(0.5, 5, 0.05, 0.3,
                                                                                            shuffle_digits=1, shift=1,
                                                                                            flip_picture=0.5)]
    assert names == ["ShuffleDigits", "ShiftPicture", "FlipPicture", "RandomHorizontalFlip", "to_float", "RandomRotation", "Normalize", "GaussianNoise", "RandomErasing"]
