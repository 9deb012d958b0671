"""Environment of every test. Models are fixtures of `tests/model`; plain helpers are in `tests/support`."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models, and a process per core: threads would only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("L2KV_DEMO", "books-5m")  # small, so that pages are drawn fast; test_smollm2 opens on the other
import torch

if not torch.cuda.is_available():  # kernels run in Triton's interpreter, where a test asks for them
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
