"""Serving a nested checkpoint: the parent's memory once, any of its budgets by views into it.

`family.py` is the face; `linear.py` multiplies by parts of a weight without copying them, `mamba.py`, `attention.py`
and `mlp.py` are the kinds of layer with their caches (of what `parts.py` hands them), `network.py` puts a budget
together, `sampling.py` picks tokens. `complete.py` answers `requests.py`, several budgets in turn; `written.py` is the
text that comes of it. No Megatron here: the same function is written out once more, and the tests hold it against the
elastic model and the extracted child.
"""

from .complete import complete
from .family import ElasticFamily
from .requests import Phase, Request, think_then_answer

__all__ = ["ElasticFamily", "Phase", "Request", "complete", "think_then_answer"]
