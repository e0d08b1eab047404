"""The data of the report: CIFAR-10 images (the label) beside MNIST digits (a distraction), and the augmentations.

    python data.py                             check the data, print what is there, draw results/dataset.png
    python data.py --synthetic data/synthetic  write a small synthetic stand-in in the same formats (no network)

--data-dir (default: $DATA_DIR, else data/) holds cifar-10-batches-bin/*.bin and MNIST/raw/*, which are downloaded
when missing, or the course's own folders {train,val}/<class>/*.png.

A composite is 40x40 RGB, gray 127: a CIFAR-10 image in the top-left 24x24, an MNIST digit in the bottom-right 16x16.
In training the digit equals the label's index with probability match_prob + (1 - match_prob) / 10 (0.64 by default);
in validation and test, digit and label are independent.
"""
import argparse
import math
import os
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import mnist
from torchvision.datasets.folder import default_loader
from torchvision.datasets.utils import download_and_extract_archive

from utils import UserError, atomic, number, run, write_text

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.438, 0.435, 0.422), (0.228, 0.225, 0.231)  # per channel, for images in [0, 1]: the course handout's

CIFAR_URL, CIFAR_MD5 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_TRAIN = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
CIFAR_TEST = ["cifar-10-batches-bin/test_batch.bin"]
CIFAR_NAMES = "cifar-10-batches-bin/batches.meta.txt"
MNIST_TRAIN = ["MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-labels-idx1-ubyte"]
MNIST_TEST = ["MNIST/raw/t10k-images-idx3-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte"]
COMPOSITES = "CIFAR-10 and MNIST composites"
PICTURE = (..., slice(0, 24), slice(0, 24))  # images[PICTURE]: the part of a composite that is the CIFAR-10 image
DIGIT = (..., slice(24, 40), slice(24, 40))  # images[DIGIT]: the part that is the digit
SYNTHETIC_NOTE = "SYNTHETIC.txt"  # its presence marks a folder that --synthetic wrote


class Split(NamedTuple):
    images: torch.Tensor  # uint8 [N,3,40,40]
    labels: torch.Tensor  # int64 [N], the class index
    digits: torch.Tensor  # int64 [N], 0 to 9, or -1 where unknown

    def to(self, device):
        return Split(*(tensor.to(device) for tensor in self))

    def first(self, n):
        """The first `n` samples (all, where there are fewer); their order is random already."""
        return Split(*(tensor[:n] for tensor in self))


class Splits(NamedTuple):
    train: Split
    val: Split
    test: Split | None  # None: the course's test images have no labels
    classes: tuple      # ten names
    source: str         # what the images are, for titles


# ---------------------------------------------------------------- the composites
def resize(images, size):
    """uint8 [N,C,n,n] to uint8 [N,C,size,size], as skimage.transform.resize(..., anti_aliasing=True) does it.

    Gaussian blur with sigma = (n/size - 1)/2 (radius int(4 sigma + 0.5), mirrored borders), bilinear sampling at
    half-pixel centres, floor. Both steps are linear and work on rows and columns alike, so they are one matrix R
    and the result is R @ image @ R.T.
    """
    n = images.shape[-1]
    if n == size:
        return images
    sigma = max(0.0, (n / size - 1) / 2)
    radius = int(4 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / (sigma or 1)) ** 2)
    kernel /= kernel.sum()

    blur = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for offset in range(-radius, radius + 1):
            j = abs(i + offset)                        # mirror at the first pixel ...
            j = 2 * (n - 1) - j if j > n - 1 else j    # ... and at the last
            blur[i, j] += kernel[offset + radius]

    at = ((torch.arange(size).double() + 0.5) * n / size - 0.5).clamp(0, n - 1)
    left = at.long().clamp(max=max(n - 2, 0))
    sample = torch.zeros(size, n, dtype=torch.float64)
    sample[torch.arange(size), left] += 1 - (at - left)
    sample[torch.arange(size), (left + 1).clamp(max=n - 1)] += at - left

    R = sample @ blur
    resized = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for part, result in zip(images.split(500), resized.split(500)):  # float64 is large: some images at a time
        result.copy_((R @ part.double() @ R.T + 1e-9).floor().clamp(0, 255))  # 1e-9: what rounding took from an integer
    return resized


def compose(cifar24, digit16):
    """uint8 [N,3,24,24] and [N,1,16,16] to the uint8 [N,3,40,40] composites."""
    canvas = torch.full((len(cifar24), 3, 40, 40), 127, dtype=torch.uint8)
    canvas[PICTURE] = cifar24
    canvas[DIGIT] = digit16
    return canvas


def load_splits(data_dir, match_prob=0.6, seed=0):
    """Read `data_dir` and build the train, val and test splits, all on the CPU.

    90 % of the training images are `train`, 10 % `val`; the test images are `test`. `seed` decides which, and which
    digit meets which image; val and test do not depend on `match_prob`. MNIST's training digits are split 90/10 as
    well, so that no validation digit was seen in training. Raises UserError for data that are missing or damaged.
    """
    data_dir = Path(data_dir)
    if (data_dir / "train").is_dir() and (data_dir / "val").is_dir():
        return load_course_folder(data_dir)
    download_missing(data_dir)
    cifar24, labels = read_cifar(data_dir, CIFAR_TRAIN, size=24)
    digit16, digit_labels = read_mnist(data_dir, MNIST_TRAIN, size=16)
    test_cifar24, test_labels = read_cifar(data_dir, CIFAR_TEST, size=24)
    test_digit16, test_digit_labels = read_mnist(data_dir, MNIST_TEST, size=16)

    # One random stream a purpose, so that one never shifts another. RandomState's streams are frozen: the same
    # seed gives the same data set under every version of numpy.
    rng = {name: np.random.RandomState([seed, i]) for i, name in enumerate(("split", "train", "val", "test"))}
    order = rng["split"].permutation(len(labels))
    held_out = len(order) // 10
    pools = [rng["split"].permutation(np.flatnonzero(digit_labels == digit)) for digit in range(10)]
    val_pools = [pool[:math.ceil(len(pool) / 10)] for pool in pools]
    train_pools = [pool[math.ceil(len(pool) / 10):] for pool in pools]
    test_pools = [np.flatnonzero(test_digit_labels == digit) for digit in range(10)]

    def split(name, cifar24, labels, digit16, pools, match_prob):
        for digit, pool in enumerate(pools):
            if len(pool) == 0:
                raise UserError(f"{data_dir}/MNIST/raw has too few images of the digit {digit} for the {name} split")
        digits = np.where(rng[name].random_sample(len(labels)) < match_prob, labels,
                          rng[name].randint(0, 10, len(labels)))
        which = rng[name].random_sample(len(labels))
        chosen = np.array([pools[d][int(u * len(pools[d]))] for d, u in zip(digits, which)], dtype=np.int64)
        return Split(compose(cifar24, digit16[torch.from_numpy(chosen)]),
                     torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(digits.astype(np.int64)))

    if held_out == 0:
        raise UserError(f"{data_dir} has {len(order)} training images, expected at least 10")
    train, val = order[held_out:], order[:held_out]
    names = data_dir / CIFAR_NAMES
    classes = tuple(names.read_text(errors="replace").split()) if names.is_file() else CLASSES
    if len(classes) != 10:
        raise UserError(f"{names} has {len(classes)} names, expected the 10 class names, one a line")
    return Splits(split("train", cifar24[torch.from_numpy(train)], labels[train], digit16, train_pools, match_prob),
                  split("val", cifar24[torch.from_numpy(val)], labels[val], digit16, val_pools, 0.0),
                  split("test", test_cifar24, test_labels, test_digit16, test_pools, 0.0),
                  classes,
                  "synthetic data" if (data_dir / SYNTHETIC_NOTE).exists() else COMPOSITES)


# ---------------------------------------------------------------- readers
def download_missing(data_dir):
    """Fetch CIFAR-10 and MNIST into `data_dir` through torchvision, checksums included, where a file is missing."""
    def missing(files):
        return [name for name in files if not (data_dir / name).is_file()]

    socket.setdefaulttimeout(30)
    try:
        if missing(CIFAR_TRAIN + CIFAR_TEST):
            download_and_extract_archive(CIFAR_URL, data_dir, md5=CIFAR_MD5)
        if missing(MNIST_TRAIN + MNIST_TEST):
            mnist.MNIST(data_dir, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: a wrong checksum
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(
            f"missing in {data_dir}: {', '.join(missing(CIFAR_TRAIN + CIFAR_TEST + MNIST_TRAIN + MNIST_TEST))}; the "
            f"download failed ({reason}). Put the unpacked {CIFAR_URL} and MNIST's four unpacked files there, or name their "
            f"folder with --data-dir; 'bash experiments.sh demo' needs no download") from None


def read_cifar(data_dir, files, size=32):
    """CIFAR-10's binary version: records of 1 label byte and 3072 bytes of red, green, blue, each row by row.

    Returns uint8 [N,3,size,size] (tensor) and uint8 [N] (numpy)."""
    images, labels = [], []
    for name in files:
        raw = np.fromfile(data_dir / name, dtype=np.uint8)
        if len(raw) == 0 or len(raw) % 3073:
            raise UserError(f"{data_dir / name} has {len(raw)} bytes, expected a multiple of 3073 (CIFAR-10, binary "
                            f"version): it is truncated or another file. Delete it to download it again")
        records = raw.reshape(-1, 3073)
        if records[:, 0].max() > 9:
            raise UserError(f"{data_dir / name} has the label {records[:, 0].max()}, expected 0 to 9: it is not "
                            f"CIFAR-10's binary version")
        images.append(resize(torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)), size))
        labels.append(records[:, 0].copy())
    return torch.cat(images), np.concatenate(labels)


def read_mnist(data_dir, files, size=28):
    """MNIST's IDX files, images and labels. Returns uint8 [N,1,size,size] (tensor) and uint8 [N] (numpy)."""
    def read(reader, name, header, expected):
        path = data_dir / name
        count = int.from_bytes(path.read_bytes()[4:8], "big") if path.stat().st_size >= header else 0
        size = header + count * (784 if header == 16 else 1)
        if count == 0 or path.stat().st_size != size:
            raise UserError(f"{path} has {path.stat().st_size} bytes, expected {expected}: it is truncated or another "
                            f"file. Delete it to download it again")
        try:
            return reader(str(path))
        except Exception:
            raise UserError(f"{path} is not an IDX file of {expected}") from None

    images = read(mnist.read_image_file, files[0], 16, "16 and 784 for each image its header counts")
    labels = read(mnist.read_label_file, files[1], 8, "8 and 1 for each label its header counts")
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
        raise UserError(f"{data_dir / files[0]} has {len(images)} images of {tuple(images.shape[1:])} and "
                        f"{files[1]} {len(labels)} labels up to {labels.max()}, expected as many 28x28 digits, 0 to 9")
    return resize(images[:, None], size), labels.numpy().astype(np.uint8)


def read_images(paths):
    """PNG files, all of one size, to uint8 [N,3,H,W]; gray and transparent ones become RGB."""
    images = []
    for path in paths:
        try:
            image = torch.from_numpy(np.array(default_loader(str(path)))).permute(2, 0, 1)
        except OSError:  # PIL's errors are OSErrors
            raise UserError(f"{path} is not a readable PNG") from None
        if images and image.shape != images[0].shape or min(image.shape[1:]) < 8:
            size = "all images of one size" if images else "at least 8x8"
            raise UserError(f"{path} is {image.shape[2]}x{image.shape[1]} pixels, expected {size}"
                            + (f" ({images[0].shape[2]}x{images[0].shape[1]})" if images else ""))
        images.append(image)
    return torch.stack(images)


def load_course_folder(data_dir):
    """The course's layout, DIR/{train,val}/<class>/*.png; labels in the order of the folders' names, digits -1."""
    classes = tuple(sorted(path.name for path in (data_dir / "train").iterdir() if path.is_dir()))
    if len(classes) != 10:
        raise UserError(f"{data_dir / 'train'} has {len(classes)} class folders, expected 10")

    def split(name):
        paths = [(path, label) for label, c in enumerate(classes) for path in sorted((data_dir / name / c).glob("*.png"))]
        if len({label for _, label in paths}) != 10:
            raise UserError(f"{data_dir / name} must hold PNGs in each of the folders {', '.join(classes)}")
        labels = torch.tensor([label for _, label in paths])
        order = torch.from_numpy(np.random.RandomState(0).permutation(len(paths)))  # mixed, as Split.first expects
        return Split(read_images([path for path, _ in paths])[order], labels[order], torch.full_like(labels, -1))

    train, val = split("train"), split("val")
    if train.images.shape[1:] != val.images.shape[1:]:
        raise UserError(f"{data_dir}: train and val images differ in size")
    return Splits(train, val, None, classes, f"images of {data_dir}")


# ---------------------------------------------------------------- augmentations
# Batched twins of torchvision.transforms.v2 that run on the device the data live on and draw for each sample on its
# own (torchvision draws once a batch). Each takes and returns float [N,C,H,W]; draws come from torch's global stream.
class ShuffleDigits:
    """Exchanges the digits of composites within the batch: each is chosen with probability `p`, and each chosen one gets
    the corner of another chosen one. That breaks the shortcut without a look at any digit. Before the flip; uint8 or
    float [N,3,40,40]."""

    def __init__(self, p):
        self.p = p

    def __call__(self, x):
        n = len(x)
        draw = torch.rand(n, device=x.device)
        order = draw.argsort()              # the chosen ones first, in random order
        chosen = (draw < self.p).sum()
        place = torch.arange(n, device=x.device)
        giver = torch.empty_like(order)     # each chosen one takes from the next, the last from the first
        giver[order] = order[torch.where(place < chosen, (place + 1) % chosen.clamp(min=1), place)]
        x = x.clone()
        x[DIGIT] = x[DIGIT][giver]
        return x


class ShiftPicture:
    """Moves the picture of each composite, not its digit, by up to `n` pixels up, down, left and right; the pixels at its
    border are repeated. Before the flip; [N,C,40,40] of any type."""

    def __init__(self, n):
        self.n = n

    def __call__(self, x):
        down, right = torch.randint(-self.n, self.n + 1, (2, len(x), 1), device=x.device)
        place = torch.arange(24, device=x.device)
        rows, columns = (place - down).clamp(0, 23), (place - right).clamp(0, 23)
        each = torch.arange(len(x), device=x.device)[:, None, None]
        x = x.clone()
        x[PICTURE] = x[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return x


class RandomHorizontalFlip:
    """Mirrors each image, digit included, with probability `p`. Takes uint8 too."""

    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, x):
        chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < self.p
        return torch.where(chosen, x.flip(3), x)


class FlipPicture(RandomHorizontalFlip):
    """Mirrors the picture of each composite where it is, with probability `p`; the digit stays as it is. [N,C,40,40]."""

    def __call__(self, x):
        x = x.clone()
        x[PICTURE] = super().__call__(x[PICTURE])
        return x


def mirror(flip_picture):
    """The transform that mirrors each image as a run's training did: the picture where it is, or the whole composite."""
    return FlipPicture(1) if flip_picture else RandomHorizontalFlip(1)


class RandomRotation:
    """Turns each image by an angle drawn from [-degrees, degrees] about its centre; nearest pixel, corners 0."""

    def __init__(self, degrees):
        self.degrees = degrees

    def __call__(self, x):
        angle = (torch.rand(len(x), device=x.device) * 2 - 1) * math.radians(self.degrees)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        h, w = x.shape[2:]
        # affine_grid works in [-1, 1] on each axis: h/w and w/h keep the turn a turn where the image is no square
        matrix = torch.stack([torch.stack([cos, -sin * h / w, zero], 1),
                              torch.stack([sin * w / h, cos, zero], 1)], 1)
        grid = F.affine_grid(matrix, x.shape, align_corners=False)
        return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


class Normalize:
    """(x - mean) / std for each channel."""

    def __init__(self, mean=MEAN, std=STD):
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))

    def __call__(self, x):
        if self.mean.device != x.device:
            self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        return (x - self.mean) / self.std


class GaussianNoise:
    """Adds noise of standard deviation `sigma` to each value, after Normalize; `clip` limits the sum to [0, 1]."""

    def __init__(self, sigma, clip=False):
        self.sigma, self.clip = sigma, clip

    def __call__(self, x):
        x = x + self.sigma * torch.randn_like(x)
        return x.clamp(0, 1) if self.clip else x


class RandomErasing:
    """Fills one rectangle an image with `value`, with probability `p`, after Normalize (Zhong et al. 2020).

    Its area is uniform in `scale` (a share of the image), its aspect ratio log-uniform in `ratio`, its place uniform.
    As in torchvision, a rectangle that does not fit is drawn again, up to ten times, then the image is left alone.
    """

    def __init__(self, p=0.3, scale=(0.02, 0.05), ratio=(0.3, 3.3), value=0.0):
        self.p, self.scale, self.ratio, self.value = p, scale, ratio, value

    def __call__(self, x):
        n, _, H, W = x.shape
        area_draw, ratio_draw = torch.rand(2, 10, n, device=x.device)  # ten tries for each image
        chance, top_draw, left_draw = torch.rand(3, n, device=x.device)

        area = H * W * (self.scale[0] + (self.scale[1] - self.scale[0]) * area_draw)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * ratio_draw)
        h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (h < H) & (w < W)
        first = fits.int().argmax(0, keepdim=True)
        h, w, fits = (tensor.gather(0, first)[0] for tensor in (h, w, fits))
        erase = fits & (chance < self.p)

        top, left = (top_draw * (H - h + 1)).floor(), (left_draw * (W - w + 1)).floor()
        rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
        in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None]) & erase[:, None]
        in_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
        return x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], self.value)


def to_float(x):
    """uint8 in [0, 255] to float32 in [0, 1]."""
    return x.to(torch.float32).div_(255)


class Shrink:
    """Averages each image down to `size` by `size`, for faster first epochs (progressive resizing, as in fast.ai's
    DAWNBench entry of 2018). Float [N,C,H,W] to [N,C,size,size]."""

    def __init__(self, size):
        self.size = size

    def __call__(self, x):
        return F.interpolate(x, (self.size, self.size), mode="area")


def augmentation(flip=0.5, rotate=0.0, noise=0.0, erase=0.0, erase_scale=(0.02, 0.05), shuffle_digits=0.0,
                 shift=0, flip_picture=0.0):
    """The training pipeline, uint8 [N,3,H,W] to normalized float32, as a list of functions in the report's order."""
    transforms = [ShuffleDigits(shuffle_digits)] if shuffle_digits else []
    transforms += [ShiftPicture(shift)] if shift else []
    transforms += [FlipPicture(flip_picture)] if flip_picture else []
    transforms += [RandomHorizontalFlip(flip)] if flip else []
    transforms += [to_float]
    transforms += [RandomRotation(rotate)] if rotate else []
    transforms += [Normalize()]
    transforms += [GaussianNoise(noise)] if noise else []
    transforms += [RandomErasing(erase, erase_scale)] if erase else []
    return transforms


def apply(transforms, x):
    """The batch x passed through `transforms`; channels last in memory, the layout that convolutions are fast in."""
    for transform in transforms:
        x = transform(x)
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- the synthetic stand-in
SYNTHETIC_CLASSES = ("disc", "square", "triangle", "ring", "cross", "stripes", "bars", "checks", "dots", "diagonals")
GLYPHS = ("01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
          "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
          "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
          "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
          "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100")


def draw_shape(label, rng):
    """One 'CIFAR' image, uint8 [3,32,32]: the shape or texture `label` in random colours, size and place, with noise."""
    y, x = np.mgrid[:32, :32].astype(float)
    x, y = x - rng.uniform(11, 21), y - rng.uniform(11, 21)
    turn = rng.uniform(-0.25, 0.25)
    x, y = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    r, size, period = np.hypot(x, y), rng.uniform(6, 11), rng.uniform(5, 9)
    across, down, diagonal = ((v % period) < period / 2 for v in (x, y, (x + y) / math.sqrt(2)))
    inside = (r < size, np.maximum(abs(x), abs(y)) < 0.85 * size, (y > -size) & (y < size) & (abs(x) < (y + size) / 2),
              (r < size) & (r > 0.55 * size), (np.minimum(abs(x), abs(y)) < 0.3 * size) & (r < 1.2 * size),
              down, across, across ^ down, np.hypot(x % period - period / 2, y % period - period / 2) < 0.3 * period,
              diagonal)[label]
    back, front = rng.uniform(0, 255, (2, 3, 1, 1))
    while abs(back - front).mean() < 35:
        front = rng.uniform(0, 255, (3, 1, 1))
    image = np.where(inside, front, back) + rng.normal(0, 30, (3, 32, 32))
    return image.clip(0, 255).astype(np.uint8)


def draw_digit(digit, rng):
    """One 'MNIST' image, uint8 [28,28]: the 5x7 glyph of `digit`, three pixels a dot, in random place and strength."""
    glyph = np.array([[int(dot) for dot in row] for row in GLYPHS[digit].split()])
    image = np.zeros((28, 28))
    top, left = rng.randint(1, 7), rng.randint(3, 11)
    image[top:top + 21, left:left + 15] = np.kron(glyph, np.ones((3, 3))) * rng.uniform(170, 255)
    return (image + (image > 0) * rng.normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8)


def write_synthetic(folder, train=3000, test=500, seed=0):
    """Write `train` and `test` records of procedural 'CIFAR-10' and 'MNIST' in the two official formats."""
    folder, rng = Path(folder), np.random.RandomState(seed)
    for name in ("cifar-10-batches-bin", "MNIST/raw"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if (folder / CIFAR_TRAIN[0]).exists() and not (folder / SYNTHETIC_NOTE).exists():
        raise UserError(f"{folder} holds other data already: name another folder")
    write_text(folder / SYNTHETIC_NOTE, "Drawn by 'python data.py --synthetic': a stand-in for CIFAR-10 and MNIST, not "
                                        "those data sets.\n")
    write_text(folder / CIFAR_NAMES, "\n".join(SYNTHETIC_CLASSES) + "\n")

    def write(name, array):
        with atomic(folder / name) as temporary:
            array.tofile(temporary)

    def cifar(n):
        labels = rng.randint(0, 10, n).astype(np.uint8)
        return np.stack([np.concatenate([[label], draw_shape(label, rng).reshape(-1)]) for label in labels]).astype(np.uint8)

    for part, name in zip(np.array_split(cifar(train), 5), CIFAR_TRAIN):
        write(name, part)
    write(CIFAR_TEST[0], cifar(test))
    for n, (images, labels) in ((train, MNIST_TRAIN), (test, MNIST_TEST)):
        digits = rng.permutation(np.arange(n) % 10).astype(np.uint8)
        pixels = np.stack([draw_digit(digit, rng) for digit in digits])
        write(images, np.frombuffer(np.array([2051, n, 28, 28], ">i4").tobytes() + pixels.tobytes(), np.uint8))
        write(labels, np.frombuffer(np.array([2049, n], ">i4").tobytes() + digits.tobytes(), np.uint8))


# ---------------------------------------------------------------- command line
def describe(splits):
    """Print, one figure a line, what the splits hold."""
    print(f"source {splits.source}")
    for name, split in zip(("train", "val", "test"), splits[:3]):
        if split is None:
            continue
        pixels = split.images.permute(1, 0, 2, 3).flatten(1).double() / 255
        print(f"{name}_images {len(split.labels)}")
        print(f"{name}_mean " + " ".join(f"{v:.4f}" for v in pixels.mean(1)))
        print(f"{name}_std " + " ".join(f"{v:.4f}" for v in pixels.std(1)))
        if (split.digits >= 0).any():
            print(f"{name}_match_share {(split.digits == split.labels).double().mean():.4f}")


def draw_sheet(splits, path, rows=3):
    """A labelled contact sheet: a column a class, `rows` rows from train and as many from val."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2 * rows, 10, figsize=(11, 1.3 + 2.55 * rows), layout="constrained")
    figure.suptitle(f"{splits.source}: ten classes, each with a digit in the corner\n"
                    "green: the digit equals the class's index", fontsize=13)
    for first, name, split in ((0, "train", splits.train), (rows, "val", splits.val)):
        for label in range(10):
            for row, i in enumerate((split.labels == label).nonzero()[:rows, 0].tolist()):
                axis = axes[first + row, label]
                axis.imshow(split.images[i].permute(1, 2, 0).numpy())
                digit = split.digits[i].item()
                axis.set_xlabel(f"digit {digit}" if digit >= 0 else "", fontsize=10,
                                color="tab:green" if digit == label else "black")
        for row in range(first, first + rows):
            axes[row, 0].set_ylabel(name, fontsize=11)
    for label, axis in enumerate(axes[0]):
        axis.set_title(f"{label} {splits.classes[label]}", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", metavar="DIR", default=os.environ.get("DATA_DIR", "data"),
                        help="folder of the data; $DATA_DIR sets the default (default: %(default)s)")
    parser.add_argument("--match-prob", type=number(float, 0, 1), default=0.6,
                        help="probability that a training digit is set to the label's index, else it is uniform "
                             "(default: %(default)s)")
    parser.add_argument("--data-seed", type=number(int, 0, 10**9), default=0,
                        help="seed of the splits and of which digit meets which image (default: %(default)s)")
    parser.add_argument("--sheet", metavar="PNG", default="results/dataset.png",
                        help="where the contact sheet goes (default: %(default)s)")
    parser.add_argument("--synthetic", metavar="DIR", help="write a small synthetic data set there, and nothing else")
    args = parser.parse_args()
    if args.synthetic:
        write_synthetic(args.synthetic)
        print(f"{args.synthetic}: synthetic data in the formats of CIFAR-10 and MNIST; "
              f"use it with --data-dir {args.synthetic}")
        return
    splits = load_splits(args.data_dir, args.match_prob, args.data_seed)
    describe(splits)
    draw_sheet(splits, args.sheet)
    print(f"drew {args.sheet}")


if __name__ == "__main__":
    run(main)
