"""The state space recurrence of Mamba-2, evaluated chunk by chunk as matrix products.

For every head, with ``a_t = dt_t * A`` and state ``h`` ``[p, n]``:

    h_t = exp(a_t) h_{t-1} + (dt_t x_t) B_t^T,        y_t = h_t C_t

Source: the state space duality algorithm (Mamba-2, arXiv 2405.21060, section 6). The result does not depend on the
chunk length, so it is chosen here for speed. ``C B^T``, the chunk states and the carried-in part are products of whole
groups (all heads of a group share B and C); only the decayed ``C B^T`` is made per head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scan_chunk_length(length: int, head_dim: int, state_dim: int) -> int:
    """Chunk length that balances the ``[Q, Q]`` work in a chunk (grows with Q) with the states (``p n / Q``)."""
    balanced = 2 ** round(math.log2(max(math.sqrt(head_dim * state_dim), 1.0)))
    return max(1, min(length, max(16, min(128, balanced))))


def chunk_scan(x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None, chunk: int):
    """Scan ``x`` ``[b, s, h, p]`` with steps ``dt`` and log decays ``a`` ``[b, s, h]``, ``B``, ``C`` ``[b, s, g, n]``.

    Returns ``y`` ``[b, s, h, p]`` and the final states ``[b, h, p, n]``. All tensors have one dtype, which is also that
    of the arithmetic.
    """
    b, s, h, p = x.shape
    g, n = B.shape[2:]
    r, q = h // g, chunk
    c = -(-s // q)
    if c * q != s:
        x, dt, a, B, C = (
            torch.nn.functional.pad(t, (0,) * (2 * t.dim() - 4) + (0, c * q - s)) for t in (x, dt, a, B, C)
        )
    x = x.reshape(b, c, q, g, r, p)
    dt = dt.reshape(b, c, q, g, r)
    cum = a.reshape(b, c, q, g, r).cumsum(2)
    B = B.reshape(b, c, q, g, n).transpose(2, 3)
    C = C.reshape(b, c, q, g, n).transpose(2, 3)

    scores = (C @ B.transpose(-1, -2)).unsqueeze(3)  # [b, c, g, 1, q, q]
    per_head = cum.permute(0, 1, 3, 4, 2)  # [b, c, g, r, q]
    future = torch.full((q, q), -math.inf, dtype=x.dtype, device=x.device).triu(1)
    decay = (per_head.unsqueeze(-1) - per_head.unsqueeze(-2) + future).exp()
    u = (x * dt.unsqueeze(-1)).permute(0, 1, 3, 4, 2, 5)  # [b, c, g, r, q, p]
    within = (scores * decay) @ u

    to_end = (cum[:, :, -1:] - cum).exp()
    carried = (x * (dt * to_end).unsqueeze(-1)).transpose(2, 3).reshape(b, c, g, q, r * p)
    added = carried.transpose(-1, -2) @ B  # [b, c, g, r p, n]
    whole = cum[:, :, -1].exp().unsqueeze(-1).expand(b, c, g, r, p).reshape(b, c, g, r * p, 1)
    state = x.new_zeros(b, g, r * p, n) if initial_states is None else initial_states.reshape(b, g, r * p, n)
    before = []
    for i in range(c):
        before.append(state)
        state = torch.addcmul(added[:, i], whole[:, i], state)
    before_chunk = torch.stack(before, dim=1)
    from_past = (C @ before_chunk.transpose(-1, -2)).reshape(b, c, g, q, r, p).transpose(2, 3)
    y = within.permute(0, 1, 4, 2, 3, 5) + from_past * cum.exp().unsqueeze(-1)
    return y.reshape(b, c * q, h, p)[:, :s], state.reshape(b, h, p, n)
