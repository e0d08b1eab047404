"""A small synthetic data set for the tests, and the scripts on the path."""
import sys
from pathlib import Path

import pytest
import torch

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
