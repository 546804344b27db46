"""lm-eval reads and writes in a folder of the test, never the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
