"""What a layer computes with: kernels (Transformer Engine's and mamba-ssm's, or plain torch), specs, the seam to kinds.

Also what every stack needs at its ends: the vocabulary's padding.
"""
