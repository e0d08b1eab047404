"""A small synthetic data set for the tests, and the scripts on the path."""
import os
import sys
from pathlib import Path

# Threads that wait for each other sleep. If they spin, which is the default, tests on a busy machine take
# several times as long. OpenMP reads this when torch is imported, here and in the scripts that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """400 synthetic training images, 60 test images and 400 digits, in the formats of CIFAR-10 and MNIST."""
    from synthetic import write_synthetic
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, train=400, test=60)
    return folder


def write_course_folder(folder, size=40):
    """Two images a class, in the course's layout; the first pixel tells the class."""
    for split in ("train", "val"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(2):
                image = Image.new("RGB", (size, size), (20 * label + i, 0, 9))
                image.save(folder / split / str(label) / f"img_{i}.png")
    return folder


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def shown(monkeypatch):
    """The figures that analyze.py draws, by their files' names, in place of the files."""
    import analyze
    figures = {}
    monkeypatch.setattr(analyze, "save_figure", lambda figure, path: figures.update({path.name: figure}))
    yield figures
    analyze.pyplot().close("all")
