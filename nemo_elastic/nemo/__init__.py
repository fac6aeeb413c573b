"""NeMo side of the package: the only place that imports `nemo.*` and `lightning`."""

import nemo_elastic.mcore  # noqa: F401, before NeMo, which imports Megatron: see `mcore.runtime.login_node`
