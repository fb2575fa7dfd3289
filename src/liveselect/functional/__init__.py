"""Plain functions on tensors."""

from liveselect.functional.flops import Flops, flops_counted
from liveselect.functional.sampling import gumbel_topk, released_bottomk, uniform_subset

__all__ = ["Flops", "flops_counted", "gumbel_topk", "released_bottomk", "uniform_subset"]
