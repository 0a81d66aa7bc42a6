"""Trainings that are killed end as if they had not been."""

import pathlib
import re
import subprocess
import sys


def test_killed_trainings_end_bit_for_bit():
    """A few kills; `python tests/faulty_training.py --kills 50` for more."""
    script = pathlib.Path(__file__).with_name("faulty_training.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "4"], capture_output=True, text=True
    )
    print(done.stdout)  # with the seed
    assert done.returncode == 0, done.stderr[-3000:]
    kills, trainings, equal = re.search(
        r"(\d+) kills .* of (\d+) trainings, of which (\d+) ended equal", done.stdout
    ).groups()
    assert int(kills) >= 4
    assert 0 < int(trainings) == int(equal)
