"""What every test needs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a hub client: no test may reach out
# Small matrices gain nothing from threads, and lose much to them on a machine that is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
