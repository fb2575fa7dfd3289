"""One thread in every process of the tests: models are tiny, and more threads would only wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, and of this one, because torch is imported later

import torch

torch.set_num_threads(1)
