"""What every test needs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a hub client: no test may reach out
