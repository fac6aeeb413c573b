"""NeMo's and Megatron's chatter, kept for `--verbose`."""

from __future__ import annotations

import logging

from nemo.utils import logging as nemo_logging

NOISY = ("megatron", "lightning", "nemo", "torch", "transformers", "pytorch_lightning")


def quiet() -> None:
    """Errors only, unless the program itself logs at INFO. To be called again after NeMo has set up its own logging."""
    if logging.getLogger("nemo_elastic").isEnabledFor(logging.INFO):
        return
    nemo_logging.setLevel(logging.ERROR)
    for name in [n for n in logging.root.manager.loggerDict if n.split(".")[0] in NOISY]:
        logging.getLogger(name).setLevel(logging.ERROR)
