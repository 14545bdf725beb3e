"""Networks, weights and an image that several tests read and none changes."""

import shutil

import numpy as np
import pytest
from inception_networks import narrow
from inception_port import Port
from normalization import settle
from PIL import Image


@pytest.fixture
def tmp_path(tmp_path):
    """Removed after each test: the files are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def network():
    """A narrow network in float64 and evaluation mode."""
    return settle(narrow())


@pytest.fixture(scope="session")
def port():
    """The port in float64, in evaluation mode."""
    return settle(Port())


@pytest.fixture(scope="session")
def small():
    """The port's state dict in float32 with ten classes."""
    return settle(Port(num_classes=10)).float().state_dict()


@pytest.fixture(scope="session")
def image():
    """Landscape, with smooth gradients and with noise."""
    rng = np.random.default_rng(0)
    y, x, channel = np.ogrid[:427, :640, :3]
    waves = 127 * (1 + np.sin(x / (20 + 9 * channel) + y / 31))
    return Image.fromarray(np.clip(waves + rng.normal(0, 25, (427, 640, 3)), 0, 255).astype("u1"))
