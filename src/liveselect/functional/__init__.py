"""Plain functions on tensors."""

from liveselect.functional.flops import forward_flops, matmul_parameters
from liveselect.functional.sampling import gumbel_topk, released_bottomk, uniform_subset

__all__ = ["forward_flops", "gumbel_topk", "matmul_parameters", "released_bottomk", "uniform_subset"]
