"""Every verb of the command line as a Python function of the same name, for scripts and notebooks.

    from nemo_elastic.nemo import api

    api.plan("my_parent.yaml").budget("small").parameters
    run = api.train("my_parent.yaml", "runs/mine", overrides=["train.micro_batch_size=2"])
    api.extract(run.nested)
    assert api.verify(run.nested).ok

Functions return small frozen dataclasses (`planned.py`, `results.py`). Bad input raises `ProblemsError` in the words of
the command line, a run that was told to stop raises `Stopped`. `progress` is called with (name, done, total, text), as
`processes/progress.py` says. Megatron and NeMo are loaded by the first function that needs them.

Under torchrun every process calls the same function. A process without a launcher is a run of one process, and may run
one after another. No `__main__` guard is needed: whatever processes a run starts (`train.async_save`,
`data.num_workers`) are forked, and none imports the script again.
"""

from nemo_elastic.nemo.api.before import config, data, plan, starting_config
from nemo_elastic.nemo.api.checks import verify, verify_parent
from nemo_elastic.nemo.api.children import extract, generate, report
from nemo_elastic.nemo.api.results import Finished
from nemo_elastic.nemo.api.steps import nest, quickstart, rank, resolved_run, sort, train
from nemo_elastic.nemo.api.timing import profile
from nemo_elastic.problems import ProblemsError, Stopped
from nemo_elastic.processes.progress import Progress

__all__ = [
    "Finished", "ProblemsError", "Progress", "Stopped", "config", "data", "extract", "generate", "nest", "plan",
    "profile", "quickstart", "rank", "report", "resolved_run", "sort", "starting_config", "train", "verify",
    "verify_parent",
]  # fmt: skip
