"""A small synthetic stand-in for CIFAR-10 and MNIST, in the same formats: shapes, textures and drawn digits.

    python tests/synthetic.py DIR        write it to DIR; then use it with --data-dir DIR

It brings its own pairs.npz, where digit and label agree as often as in the report's.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import CIFAR_FILES, MNIST_FILES, draw_digits  # noqa: E402
from utils import UserError, atomic, run  # noqa: E402

CLASSES = ("disc", "square", "triangle", "ring", "cross", "stripes", "bars", "checks", "dots", "diagonals")
GLYPHS = ("01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
          "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
          "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
          "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
          "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100")


def draw_shape(label, rng):
    """A 'CIFAR' image, uint8 [3,32,32]: the shape or texture `label` in random colours, size and place."""
    y, x = np.mgrid[:32, :32].astype(float)
    x, y = x - rng.uniform(11, 21), y - rng.uniform(11, 21)
    turn = rng.uniform(-0.25, 0.25)
    x, y = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    r, size, period = np.hypot(x, y), rng.uniform(6, 11), rng.uniform(5, 9)
    across, down, diagonal = ((v % period) < period / 2 for v in (x, y, (x + y) / math.sqrt(2)))
    inside = (r < size,
              np.maximum(abs(x), abs(y)) < 0.85 * size,
              (y > -size) & (y < size) & (abs(x) < (y + size) / 2),
              (r < size) & (r > 0.55 * size),
              (np.minimum(abs(x), abs(y)) < 0.3 * size) & (r < 1.2 * size),
              down,
              across,
              across ^ down,
              np.hypot(x % period - period / 2, y % period - period / 2) < 0.3 * period,
              diagonal)[label]
    back, front = rng.uniform(0, 255, (2, 3, 1, 1))
    while abs(back - front).mean() < 35:
        front = rng.uniform(0, 255, (3, 1, 1))
    image = np.where(inside, front, back) + rng.normal(0, 30, (3, 32, 32))
    return image.clip(0, 255).astype(np.uint8)


def draw_digit(digit, rng):
    """An 'MNIST' image, uint8 [28,28]: the 5x7 glyph of `digit`, three pixels per dot, in random place."""
    glyph = np.array([[int(dot) for dot in row] for row in GLYPHS[digit].split()])
    image = np.zeros((28, 28))
    top, left = rng.randint(1, 7), rng.randint(3, 11)
    image[top:top + 21, left:left + 15] = np.kron(glyph, np.ones((3, 3))) * rng.uniform(170, 255)
    return (image + (image > 0) * rng.normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8)


def write_synthetic(folder, train=3000, test=500, seed=0):
    """Write `train` and `test` records of 'CIFAR-10' (binary), `train` digits of 'MNIST', and pairs of
    them, into `folder`. A tenth of the training records are validation images, as many of each class.
    UserError where other data lie in `folder`."""
    folder, rng = Path(folder), np.random.RandomState(seed)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "pairs.npz").exists():
        raise UserError(f"{folder} holds other data already: name another folder")

    def write(name, content):
        with atomic(folder / name) as temporary:
            Path(temporary).write_bytes(content)

    def cifar_records(n):
        labels = rng.permutation(np.arange(n) % 10).astype(np.uint8)
        return labels, [bytes([label]) + draw_shape(label, rng).tobytes() for label in labels]

    labels, records = cifar_records(train)
    digits = rng.permutation(np.arange(train) % 10).astype(np.uint8)
    order = rng.permutation(train)
    val = np.concatenate([order[labels[order] == c][:train // 100] for c in range(10)])
    order = order[~np.isin(order, val)]
    pairs = {"train_cifar": order, "train_mnist": draw_digits(labels[order], digits, 0.6, rng),
             "val_cifar": val, "val_mnist": draw_digits(labels[val], digits, 0.0, rng),
             "test_cifar": [1, 4, 60_000], "test_mnist": [7, 3, 5]}  # of two the digit is known
    with atomic(folder / "pairs.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **{name: np.array(indices, np.uint16) for name, indices in pairs.items()})
    write("cifar-10-batches-bin/batches.meta.txt", "\n".join(CLASSES).encode())
    for i, name in enumerate(CIFAR_FILES[:5]):
        write(f"cifar-10-batches-bin/{name}", b"".join(records[i * train // 5:(i + 1) * train // 5]))
    write(f"cifar-10-batches-bin/{CIFAR_FILES[5]}", b"".join(cifar_records(test)[1]))
    pixels = np.stack([draw_digit(digit, rng) for digit in digits])
    write(f"MNIST/raw/{MNIST_FILES[0]}", np.array([2051, train, 28, 28], ">i4").tobytes() + pixels.tobytes())
    write(f"MNIST/raw/{MNIST_FILES[1]}", np.array([2049, train], ">i4").tobytes() + digits.tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="DIR", help="where the data go")
    folder = parser.parse_args().folder
    write_synthetic(folder)
    print(f"{folder}: synthetic data in the formats of CIFAR-10 and MNIST; use it with --data-dir {folder}")


if __name__ == "__main__":
    run(main)
