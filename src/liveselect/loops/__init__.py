"""Selection in other loops than Lightning's: plain torch, Fabric, and the Trainer of Hugging Face.

``HuggingFaceSelection`` is in :mod:`liveselect.loops.hugging_face`, which imports transformers.
"""

from liveselect.loops.driver import Driver

__all__ = ["Driver"]
