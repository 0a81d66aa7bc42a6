import os
import pathlib
import subprocess
import sys

import hypothesis
import pytest

# Or each of several processes takes a GPU's whole memory.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

# PyTorch's builds for CUDA bring it, and its LLVM crashes beside TensorFlow's.
sys.modules["triton"] = None

# Of `test_properties.py`: the same programs each time, or many others. Programs take
# seconds to compile, so time is no sign of a fault.
hypothesis.settings.register_profile(
    "few",
    max_examples=5,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "many",
    hypothesis.settings.get_profile("few"),
    max_examples=17,
    derandomize=False,
)


def pytest_cmdline_main(config):
    """All tests, where no file is named: one run after the other, of new processes.

    TensorFlow never unloads what XLA has compiled, some 10 MB a test: the processes of
    one run for all would come to more than 24 GB.
    """
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not everything or config.option.collectonly:
        return None
    folder = pathlib.Path(__file__).parent
    most = folder / "test_trajectory.py"
    rest = [*sorted({*folder.glob("test_*.py")} - {most}), folder / "accelerators"]
    # What takes longest first, so that no process is left with it alone.
    long = ("test_distribute.py", "test_ledger.py")
    rest.sort(key=lambda path: path.name not in long)
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    runs = (rest[::2], rest[1::2], [most])
    codes = {subprocess.run([*command, *map(str, run)]).returncode for run in runs}
    return max(codes - {pytest.ExitCode.NO_TESTS_COLLECTED}, default=5)
