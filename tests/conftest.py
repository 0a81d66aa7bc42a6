import os

# Or each of several processes takes a GPU's whole memory.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
