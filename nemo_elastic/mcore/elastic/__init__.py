"""Elastic Megatron modules: the hybrid stack run as any of its subnets, masked or sliced.

`plan.py` says what a micro-batch runs, `linear.py` and `norm.py` are the cut building blocks, `mixer.py`,
`attention.py` and `mlp.py` the layer kinds, one each (see `kind_modules`), `layers.py`, `stack.py` and `model.py` the
way up, `spec.py` the `ModuleSpec` that puts them together.
"""
