"""The report's data, CIFAR-10 images (the label) beside MNIST digits (a distraction), and the augmentations.

    python data.py        check that the images are the report's own, bit for bit; draw results/sheet.png

A composite is 40x40 RGB, gray 127: a CIFAR-10 image in the top-left 24x24, an MNIST digit in the bottom-right
16x16. In training the digit equals the label's index in 64 % of the images, in validation and test in 10 %.
results/report_pairs.npz says which image and which digit make each composite: the course's published images,
matched against CIFAR-10 and MNIST. train.py's --match-prob draws the training digits anew.

--data-dir (default: $DATA_DIR, else data/) holds one of two layouts:

    cifar-10-batches-bin/ or cifar-10-batches-py/, and MNIST/raw/ (downloaded where they are not there)
    {train,val}/{0..9}/*.png, the course's own folder custom_image_dataset/ (its digits are unknown)
"""
import argparse
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from utils import UserError, add_data_dir, pyplot, run, save_figure, usage_error

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.438, 0.435, 0.422), (0.228, 0.225, 0.231)  # the handout's, for images in [0, 1]
PICTURE = (..., slice(0, 24), slice(0, 24))  # images[PICTURE]: the CIFAR-10 image of each composite
DIGIT = (..., slice(24, 40), slice(24, 40))  # images[DIGIT]: its digit
COMPOSITES, SYNTHETIC = "CIFAR-10 and MNIST composites", "synthetic data"

REPORT_PAIRS = Path(__file__).with_name("results") / "report_pairs.npz"
REPORT_SHA256 = {  # of the course's own files, uint8 bytes; of test, the known ones (388 of the first 1,000)
    ("train", 45000): "d83c5a21f2b4ebd8b62b711e3d5aa6ac88e91106b2240de8f55b6d66b6dbd3bb",
    ("val", 4998): "0be03e14d4f01986dddf1ca5244c5f58b82ae549e5f98b28d20b0039c4772ea2",
    ("test", 3866): "f43b947197ee6d570f138f8b1c2a56197195575d9381fd2ca216f6ecf180247b",
    ("test", 388): "b5b33f4649180a83d02f63ca163510a6fdc281e4c8f20e9e1a1dc4b03c16c3f7"}


class Split(NamedTuple):
    images: torch.Tensor  # uint8 [N,3,40,40]
    labels: torch.Tensor  # int64 [N], the class index
    digits: torch.Tensor  # int64 [N], 0 to 9, or -1 where unknown

    def to(self, device):
        return Split(*(tensor.to(device) for tensor in self))

    def first(self, n):
        """The first `n` samples (all, if `n` is None or there are fewer); their order is random already."""
        return Split(*(tensor[:n] for tensor in self))


class Splits(NamedTuple):
    train: Split
    val: Split
    test: Split | None  # None: the course's test images have no labels
    classes: tuple      # ten names
    source: str         # what the images are, for titles
    fingerprint: str    # SHA-256 of the training images


# ---------------------------------------------------------------- the recipe
def load_splits(data_dir, match_prob=None):
    """Read `data_dir` and build the train, val and test splits, all on the CPU: the report's own 45,000,
    4,998 and 10,000 composites. With `match_prob` the training digits are drawn anew. UserError for data that
    are missing or damaged; exits with 2 where `match_prob` cannot act."""
    data_dir = Path(data_dir)
    if folder := course_folder(data_dir):
        if match_prob is not None:
            usage_error(f"{folder} holds finished images: --match-prob cannot act on them")
        return load_course_folder(folder)
    cifar, cifar_test, classes = read_cifar(data_dir)
    mnist = read_mnist(data_dir)
    synthetic = (data_dir / "pairs.npz").exists()  # synthetic data bring their own
    pairs = read_pairs(data_dir / "pairs.npz" if synthetic else REPORT_PAIRS)
    for (_, labels), name in (cifar, "cifar"), (mnist, "mnist"):
        if len(labels) <= max(pairs[f"train_{name}"].max(), pairs[f"val_{name}"].max()):
            raise UserError(f"{data_dir} has too few training images of {name.upper()}: {len(labels)}")
    train_digits = pairs["train_mnist"]
    if match_prob is not None:
        rng = np.random.RandomState([0, 1])
        train_digits = draw_digits(cifar[1][pairs["train_cifar"]], mnist[1], match_prob, rng)
    test_digits = draw_digits(cifar_test[1], mnist[1], 0.0, np.random.RandomState([0, 3]))
    known = pairs["test_cifar"] < len(test_digits)  # most of the course's test digits are not
    test_digits[pairs["test_cifar"][known]] = pairs["test_mnist"][known]
    train = make_composites(cifar, pairs["train_cifar"], mnist, train_digits)
    val = make_composites(cifar, pairs["val_cifar"], mnist, pairs["val_mnist"])
    test = make_composites(cifar_test, np.arange(len(test_digits)), mnist, test_digits)
    return Splits(train, val, test, classes, SYNTHETIC if synthetic else COMPOSITES, sha256(train.images))


def read_pairs(path):
    """Which image and which digit make each composite: a dict of int64 [N], indices into the two sources."""
    names = [f"{split}_{source}" for split in ("train", "val", "test") for source in ("cifar", "mnist")]
    try:
        with np.load(path) as file:
            return {name: file[name].astype(np.int64) for name in names}
    except Exception as error:  # numpy and zipfile raise many kinds
        raise UserError(f"{path} is damaged ({type(error).__name__}), expected {', '.join(names)}: restore "
                        "it, or write the synthetic data again") from None


def draw_digits(labels, digits, match_prob, rng):
    """An MNIST index for each label, drawn as the course did it: an image of the label's digit with
    probability `match_prob`, else of a uniformly drawn digit. `rng` is a numpy RandomState."""
    match = rng.random_sample(len(labels)) < match_prob
    wanted = np.where(match, labels, rng.randint(0, 10, len(labels)))
    chosen = np.empty(len(labels), np.int64)
    for digit in range(10):
        pool = np.flatnonzero(digits == digit)
        chosen[wanted == digit] = rng.choice(pool, (wanted == digit).sum())
    return chosen


def make_composites(cifar, cifar_index, mnist, mnist_index):
    """The Split of these pairs, on gray. `cifar` and `mnist` are images, uint8 [N,3,24,24] and [M,1,16,16]
    (tensors), each with its labels, int64 (numpy)."""
    (pictures, labels), (digit_pictures, digits) = cifar, mnist
    images = torch.full((len(cifar_index), 3, 40, 40), 127, dtype=torch.uint8)
    images[PICTURE] = pictures[torch.from_numpy(cifar_index)]
    images[DIGIT] = digit_pictures[torch.from_numpy(mnist_index)]
    return Split(images, torch.from_numpy(labels[cifar_index]), torch.from_numpy(digits[mnist_index]))


def resize(images, size):
    """uint8 [N,C,n,n] to uint8 [N,C,size,size], bit for bit as the course did it:
    skimage.transform.resize(image, (size, size), anti_aliasing=True) of a float32 image in [0, 1], times 255,
    cut to uint8.

    A Gaussian blur down the columns, then along the rows, then bilinear sampling at half-pixel centres. Each
    of the three steps adds up in float64 and stores float32. Without this rounding 4 % of the values are one
    lower."""
    n = images.shape[-1]
    sigma = (n / size - 1) / 2
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(np.eye(n), ((radius, radius), (0, 0)), mode="reflect")  # mirrored about the border pixels
    blur = torch.from_numpy(sum(tap * padded[k:k + n] for k, tap in enumerate(taps)))  # blur @ column
    sample = torch.zeros(size, n, dtype=torch.float64)  # sample @ column: the column at `size` places
    for i in range(size):
        place = (i + 0.5) * n / size - 0.5
        sample[i, int(place)] = 1 - place % 1
        sample[i, int(place) + 1] = place % 1

    resized = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for part, result in zip(images.split(500), resized.split(500)):  # float64 is large: some images at a time
        x = part.float() / 255
        x = (blur @ x.double()).float()
        x = (x.double() @ blur.T).float()
        x = (sample @ x.double() @ sample.T).float()
        result.copy_(x * 255)  # cut to uint8, as floor does
    return resized


def sha256(images):
    """SHA-256 of the bytes of a uint8 tensor, in hexadecimal."""
    return hashlib.sha256(images.contiguous().numpy()).hexdigest()


# ---------------------------------------------------------------- readers
CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
LAYOUTS = ("It must hold cifar-10-batches-bin/ or cifar-10-batches-py/ and MNIST/raw/, or the course's "
           "{train,val}/{0..9}/*.png")


def read_cifar(data_dir):
    """CIFAR-10, in its binary or else its Python version. Returns a pair for training and one for test, of
    images, uint8 [N,3,24,24] (tensor, resized), and labels, int64 [N] (numpy); and the class names."""
    folder = data_dir / "cifar-10-batches-bin"
    if folder.is_dir():
        parts = [read_cifar_file(folder / name) for name in CIFAR_FILES]
        names = folder / "batches.meta.txt"
        classes = names.read_text(errors="replace").split() if names.is_file() else CLASSES
        if len(classes) != 10:
            raise UserError(f"{names} has {len(classes)} names, expected the 10 class names, one a line")
    else:
        sets = [through_torchvision("CIFAR10", data_dir, train) for train in (True, False)]
        parts = [(part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for part in sets]
        classes = sets[0].classes
    *train, (test_pictures, test_labels) = parts
    pictures, labels = (np.concatenate(column) for column in zip(*train))
    return ((resize(torch.from_numpy(pictures), 24), labels),
            (resize(torch.from_numpy(test_pictures), 24), test_labels), tuple(classes))


def read_cifar_file(path):
    """A file of the binary version, records of a label byte and 3072 bytes of red, green and blue rows:
    images, uint8 [N,3,32,32], and labels, int64 [N]."""
    raw = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0, np.uint8)
    if len(raw) == 0 or len(raw) % 3073 or raw[::3073].max() > 9:
        raise UserError(f"{path} is missing, truncated or not CIFAR-10's (binary version): expected records "
                        "of 3073 bytes, the first of them 0 to 9. Delete its folder to download CIFAR-10")
    records = raw.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def read_mnist(data_dir):
    """MNIST's training images, uint8 [N,1,16,16] (tensor, resized), and labels, int64 [N] (numpy)."""
    paths = [data_dir / "MNIST/raw" / name for name in MNIST_FILES]
    if not all(path.is_file() for path in paths):
        through_torchvision("MNIST", data_dir)
    images, labels = (np.fromfile(path, np.uint8) for path in paths)
    for path, raw, magic, header, size in ((paths[1], labels, 2049, 8, 1), (paths[0], images, 2051, 16, 784)):
        n = len(labels) - 8
        start = np.array([magic, n], ">i4").tobytes()
        if n < 1 or len(raw) != header + n * size or raw[:8].tobytes() != start or labels[8:].max() > 9:
            raise UserError(f"{path} is truncated or not MNIST's: expected 28x28 images and as many labels. "
                            "Delete it to download it again")
    return resize(torch.from_numpy(images[16:].reshape(-1, 1, 28, 28)), 16), labels[8:].astype(np.int64)


def through_torchvision(name, data_dir, train=True):
    """torchvision's CIFAR10 or MNIST, downloaded where it is not there. UserError where that fails, or where
    `data_dir` is not there or holds only other things: it may be mistyped."""
    default = data_dir.resolve() == Path("data").resolve()
    names = {path.name for path in data_dir.glob("*")}
    ours = {"cifar-10-batches-bin", "cifar-10-batches-py", "MNIST"}
    if not default and (not data_dir.is_dir() or names and not names & ours):
        raise UserError(f"{data_dir} does not hold {name}. {LAYOUTS}. An empty folder is downloaded into")
    import torchvision.datasets  # here, since it takes two seconds to import
    if train:
        print(f"{name}: torchvision looks in {data_dir}, and downloads what is not there", flush=True)
    try:
        return getattr(torchvision.datasets, name)(data_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: a wrong checksum
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"{name} is missing or damaged in {data_dir}, and the download failed ({reason}). "
                        f"{LAYOUTS}. 'bash experiments.sh demo' needs no download") from None


# ---------------------------------------------------------------- the course's own folder
def course_folder(data_dir):
    """The folder that holds the course's train/: `data_dir`, or one in it if it has no CIFAR-10; or None."""
    below = [] if any(data_dir.glob("cifar-10-batches-*")) else sorted(data_dir.glob("*/train"))
    return next((path.parent for path in [data_dir / "train", *below] if path.is_dir()), None)


def load_course_folder(folder):
    """The course's layout, {train,val}/{0..9}/*.png, in random order; the digits are unknown, -1."""
    splits = []
    for name in ("train", "val"):
        of_class = [image_files(folder / name / str(label)) for label in range(10)]
        if not all(of_class):
            raise UserError(f"{folder / name} has no images of class {of_class.index([])}. {LAYOUTS}")
        images = read_images(sum(of_class, []))
        labels = torch.arange(10).repeat_interleave(torch.tensor([len(paths) for paths in of_class]))
        order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
        splits.append(Split(images[order], labels[order], torch.full_like(labels, -1)))
    train, val = splits
    if train.images.shape[1:] != val.images.shape[1:]:
        raise UserError(f"{folder}: train and val images differ in size")
    return Splits(train, val, None, CLASSES, f"images of {folder.resolve().name}", sha256(train.images))


def image_files(folder):
    """The image files of `folder` by name, without hidden ones (._1.png) and other files (Thumbs.db)."""
    from torchvision.datasets.folder import is_image_file
    return sorted(path for path in Path(folder).glob("[!.]*") if is_image_file(path.name))


def read_images(paths):
    """Image files, all of one size, to uint8 [N,3,H,W]; gray and transparent ones become RGB."""
    from torchvision.datasets.folder import default_loader
    images = []
    for path in paths:
        try:
            images.append(torch.from_numpy(np.array(default_loader(str(path)))).permute(2, 0, 1))
        except Exception as error:  # PIL raises many kinds
            raise UserError(f"{path} cannot be read as an image ({type(error).__name__})") from None
        (_, height, width), (_, first_height, first_width) = images[-1].shape, images[0].shape
        if (height, width) != (first_height, first_width) or min(height, width) < 8:
            raise UserError(f"{path} is {width}x{height} pixels, expected {first_width}x{first_height} (as "
                            "the first image) and at least 8x8")
    return torch.stack(images)


# ---------------------------------------------------------------- augmentations
def augment(x, flip=0.0, rotate=0.0, noise=0.0, erase=0.0, erase_scale=(0.02, 0.05), shuffle_digits=0.0,
            shift=0, flip_picture=0.0):
    """Images, uint8 [N,3,H,W], to normalized float32 for the network, through the augmentations that are not
    0. All are off by default, since evaluation calls augment(x). The report's are in its order: flip and
    rotation before normalizing, noise and erasing after. Channels-last memory makes convolutions fast."""
    if shuffle_digits:
        x = exchange_digits(x, shuffle_digits)
    if shift:
        x = shift_picture(x, shift)
    if flip_picture:
        x = x.clone()
        x[PICTURE] = horizontal_flip(x[PICTURE], flip_picture)
    if flip:
        x = horizontal_flip(x, flip)
    x = x.to(torch.float32).div_(255)
    if rotate:
        x = rotation(x, rotate)
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    x = (x - mean) / std
    if noise:
        x = gaussian_noise(x, noise)
    if erase:
        x = random_erasing(x, erase, erase_scale)
    return x.contiguous(memory_format=torch.channels_last)


# Those that torchvision.transforms.v2 has too do the same here, but draw for each image of the batch, where
# torchvision draws once for all. They run on the device of the data.
def exchange_digits(x, p):
    """Exchanges digits within [N,3,40,40]: each image is chosen with probability `p`, and each chosen one
    gets the corner of another chosen one. This breaks the shortcut and needs no digit labels."""
    chosen = (torch.rand(len(x), device=x.device) < p).nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen), device=x.device)]
    x = x.clone()
    digits = x[DIGIT]  # a view
    digits[chosen] = digits[chosen.roll(1)]
    return x


def shift_picture(x, n):
    """Moves the picture of each composite, [N,C,40,40], but not its digit, by up to `n` pixels up, down, left
    and right; the pixels at its border are repeated."""
    down, right = torch.randint(-n, n + 1, (2, len(x), 1), device=x.device)
    place = torch.arange(24, device=x.device)
    rows, columns = (place - down).clamp(0, 23), (place - right).clamp(0, 23)
    each = torch.arange(len(x), device=x.device)[:, None, None]
    x = x.clone()
    x[PICTURE] = x[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return x


def horizontal_flip(x, p):
    """Mirrors each image of [N,C,H,W] with probability `p`."""
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < p
    return torch.where(chosen, x.flip(3), x)


def rotation(x, degrees):
    """Turns each image, float [N,C,H,W], about its centre by up to `degrees` each way; nearest pixel, 0 from
    outside."""
    angle = (torch.rand(len(x), device=x.device) * 2 - 1) * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    h, w = x.shape[2:]
    # affine_grid works in [-1, 1] on each axis: h/w and w/h keep angles where the image is no square
    matrix = torch.stack([torch.stack([cos, -sin * h / w, zero], 1),
                          torch.stack([sin * w / h, cos, zero], 1)], 1)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def gaussian_noise(x, sigma):
    """GaussianNoise (report, section 1.2): adds noise of standard deviation `sigma` to each value, after
    normalizing; the sum is not clipped."""
    return x + sigma * torch.randn_like(x)


def random_erasing(x, p, scale):
    """RandomErasing (section 1.2; Zhong et al. 2020): fills a rectangle of each image of [N,C,H,W] with 0,
    with probability `p`, after normalizing. Its area is uniform in `scale` (shares of the image), its aspect
    ratio log-uniform in [0.3, 3.3], its place uniform. As in torchvision, one that does not fit is drawn
    again, up to ten times."""
    n, _, H, W = x.shape
    area_draw, ratio_draw = torch.rand(2, 10, n, device=x.device)  # ten tries for each image
    chance, top_draw, left_draw = torch.rand(3, n, device=x.device)

    area = H * W * (scale[0] + (scale[1] - scale[0]) * area_draw)
    low, high = math.log(0.3), math.log(3.3)
    ratio = torch.exp(low + (high - low) * ratio_draw)
    h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (h < H) & (w < W)
    first = fits.int().argmax(0, keepdim=True)
    h, w, fits = (tensor.gather(0, first)[0] for tensor in (h, w, fits))
    erase = fits & (chance < p)

    top, left = (top_draw * (H - h + 1)).floor(), (left_draw * (W - w + 1)).floor()
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None]) & erase[:, None]
    in_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
    return x.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


# ---------------------------------------------------------------- the check and its sheet
def check(splits):
    """Print a line per split: its images, how often digit and label match, their checksum. UserError where
    composites are not the report's."""
    print(f"source {splits.source}")
    differing = []
    for name, split in zip(("train", "val", "test"), splits[:3]):
        if split is None:
            continue
        images = split.images
        if name == "test" and splits.source == COMPOSITES:
            with np.load(REPORT_PAIRS) as file:
                known = torch.from_numpy(file["test_cifar"].astype(np.int64))
            images = images[known[known < len(images)]]
        digest, expected, verdict = sha256(images), REPORT_SHA256.get((name, len(images))), ""
        if expected and splits.source == COMPOSITES:
            verdict = f": {len(images)} are {'' if digest == expected else 'not '}the report's, bit for bit"
            differing += [] if digest == expected else [name]
        share = (split.digits == split.labels).double().mean()
        match = f", match share {share:.4f}" if (split.digits >= 0).all() else ""
        print(f"{name} {len(split.labels)} images{match}, SHA-256 {digest}{verdict}", flush=True)
    if differing:
        raise UserError(f"not the report's images: {', '.join(differing)}. The files are not those of "
                        "CIFAR-10 or MNIST: delete them to download them again")


def draw_sheet(splits, path, rows=3):
    """A contact sheet: a column for each class, `rows` rows from train and as many from val."""
    figure, axes = pyplot().subplots(2 * rows, 10, figsize=(11, 1.3 + 2.55 * rows), layout="constrained")
    green = "\ngreen: the digit is the class's number" if (splits.train.digits >= 0).any() else ""
    figure.suptitle(f"{splits.source}, a column for each class{green}", fontsize=13)
    for row in range(2 * rows):
        name, split = ("train", splits.train) if row < rows else ("val", splits.val)
        axes[row, 0].set_ylabel(name, fontsize=11)
        for label, axis in enumerate(axes[row]):
            of_class = (split.labels == label).nonzero()[:, 0]
            i = of_class[row % rows % len(of_class)]
            digit = split.digits[i].item()
            axis.imshow(split.images[i].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{label} {splits.classes[label]}" if row == 0 else "", fontsize=10)
            axis.set_xlabel(f"digit {digit}" if digit >= 0 else "", color="C2" if digit == label else "black")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_data_dir(parser)
    parser.add_argument("--sheet", metavar="PNG", default="results/sheet.png",
                        help="where the contact sheet goes (default: %(default)s, which git ignores)")
    args = parser.parse_args()
    splits = load_splits(args.data_dir)
    check(splits)
    draw_sheet(splits, args.sheet)
    print(f"drew {args.sheet}")


if __name__ == "__main__":
    run(main)
