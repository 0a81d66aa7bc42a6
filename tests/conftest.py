import os

import hypothesis

# Or each of several processes takes a GPU's whole memory.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

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
