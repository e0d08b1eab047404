"""A small synthetic data set for the tests, and the scripts on the path."""
import os
import sys
from pathlib import Path

# Threads that wait for each other sleep. If they spin, which is the default, and something else runs on the machine, the tests
# take several times as long. OpenMP reads this when torch is imported, here and in the scripts that the tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    import data
    folder = tmp_path_factory.mktemp("data")
    data.write_synthetic(folder, train=400, test=60)
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
    return figures


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")  # those that a test looked at
