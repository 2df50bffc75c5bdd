"""Shared set-up: one thread, so that results do not depend on the machine, and the toys on the path."""

import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="specdec-tests-")  # measurements of toys are of no use later
