import os
import pathlib

import pytest


@pytest.fixture
def saved_on_tensorflow():
    return pathlib.Path(os.environ["SAVED_ON_TENSORFLOW"])
