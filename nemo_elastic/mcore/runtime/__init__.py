"""The machine as Megatron sees it: shims, processes and their groups, what `auto` means here."""
