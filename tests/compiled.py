"""Loads the compiled loops: in the process whose children run commands, once for all of them."""

import torch

from mergekit_pcb.core import fused

for kind in (torch.float32, torch.bfloat16, torch.float16):
    fused.compiled("cpu", kind)
