"""What a plain layer computes with: Transformer Engine and mamba-ssm where they are, plain torch where not."""
