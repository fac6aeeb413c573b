"""The state space recurrence of Mamba-2, evaluated chunk by chunk as matrix products, with its own backward.

For every head, with log decay ``a_t = dt_t A``, ``u_t = dt_t x_t`` and a state ``H`` ``[p, n]``:

    H_t = exp(a_t) H_{t-1} + u_t B_t^T,        y_t = H_t C_t + D x_t

In a chunk of Q steps, with ``K_t = a_1 + ... + a_t`` counted from the chunk's start and ``H_0`` the state before it:

    w_i = exp(K_i) H_0 C_i + sum_{j < i} exp(K_i - K_j) (C_i . B_j) u_j        (what comes from earlier steps)
    y_i = w_i + (D + dt_i C_i . B_i) x_i
    H_Q = exp(K_Q) H_0 + sum_j exp(K_Q - K_j) u_j B_j^T

Every exponent is <= 0, so nothing overflows. ``C B^T``, the states and what they add to ``y`` are products over all
heads of a group; only the decayed ``C B^T`` is made per head. The gradient of ``K`` needs no ``[Q, Q]`` array; leaving
a step's effect on itself out of it (``du~``: the gradient through w and H only) keeps strong decays accurate in fp32:

    dK_i = dy_i . w_i - du~_i . u_i,   dK_Q += dH_Q . H_Q,   da_t = sum_{i >= t} dK_i

The result does not depend on Q, which is chosen for speed. Source: Mamba-2 (arXiv 2405.21060, section 6); the
backward is derived here. Letters: b batch, c chunks, q chunk length, g groups, r heads a group, p head dim, n state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunk_scan(
    x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_states: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Scan ``x`` ``[b, s, h, p]`` with steps ``dt`` and log decays ``a`` ``[b, s, h]``, ``B``, ``C`` ``[b, s, g, n]``.

    ``D`` is ``[h, 1]`` or ``[h, p]``, ``initial_states`` ``[b, h, p, n]``. Returns ``y`` ``[b, s, h, p]`` and the final
    states ``[b, h, p, n]``. All tensors have one dtype, which is that of the arithmetic. Any ``chunk`` >= 1 gives the
    same result; ``s`` need not be a multiple of it.
    """
    length = x.shape[1]
    short = -length % chunk
    if short:  # steps with dt = a = 0 leave the state as it is
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, short)) for t in (x, B, C))
        dt, a = (F.pad(t, (0, 0, 0, short)) for t in (dt, a))
    y, final = _ChunkScan.apply(x, dt, a, B, C, D, initial_states, chunk)
    return (y[:, :length] if short else y), final


def _chunked(t: Tensor, q: int, groups: int) -> Tensor:
    """View ``[b, s, h, ...]`` as ``[c, b, q, g, r, ...]``: chunks lead, so that a shift by one chunk is a view."""
    return t.unflatten(1, (-1, q)).unflatten(3, (groups, -1)).transpose(0, 1)


def _by_group(t: Tensor, q: int) -> Tensor:
    """``[b, s, g, n]`` copied to ``[(c b g), q, n]``."""
    return t.unflatten(1, (-1, q)).permute(1, 0, 3, 2, 4).flatten(0, 2)


def _times_by_head(t: Tensor, factor: Tensor | None) -> Tensor:
    """``t * factor`` for ``[c, b, q, g, r, p]`` and ``[c, b, q, g, r]``, laid out as ``[(c b g r), q, p]``."""
    t = t.permute(0, 1, 3, 4, 2, 5)
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    if factor is None:
        out.copy_(t)
    else:
        torch.mul(t, factor.permute(0, 1, 3, 4, 2).unsqueeze(-1), out=out)
    return out.flatten(0, 3)


def _times_by_group(t: Tensor, factor: Tensor) -> Tensor:
    """``t * factor`` for ``[c, b, q, g, r, p]`` and ``[c, b, q, g, r]``, laid out as ``[(c b g), q, (r p)]``."""
    t = t.transpose(2, 3)
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    torch.mul(t, factor.transpose(2, 3).unsqueeze(-1), out=out)
    return out.flatten(0, 2).flatten(-2)


def _decay_by_head(log_decay: Tensor) -> Tensor:
    """``exp(K_i - K_j)`` for j < i, else 0: ``[c, b, q, g, r]`` to ``[(c b g), r, q, q]``."""
    k = log_decay.permute(0, 1, 3, 4, 2).flatten(0, 2).contiguous()
    q = k.shape[-1]
    not_earlier = torch.full((q, q), -math.inf, dtype=k.dtype, device=k.device).triu()
    return torch.sub(k.unsqueeze(-1), k.unsqueeze(-2)).add_(not_earlier).exp_()


def _own_score(B: Tensor, C: Tensor, heads: int) -> Tensor:
    """``C_i . B_i`` for every head: two ``[b, s, g, n]`` to ``[b, s, h]``."""
    return (B * C).sum(-1).repeat_interleave(heads // B.shape[2], dim=-1)


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, a, B, C, D, initial_states, q):
        (batch, length, heads, p), (groups, n) = x.shape, B.shape[2:]
        c, r = length // q, heads // groups
        by_head = (c, batch, groups, r, q, p)
        xc, dtc = _chunked(x, q, groups), _chunked(dt, q, groups)
        log_decay = _chunked(a, q, groups).cumsum(2)
        Bg, Cg = _by_group(B, q), _by_group(C, q)

        mixing = _decay_by_head(log_decay).mul_(torch.bmm(Cg, Bg.transpose(1, 2)).unsqueeze(1))
        within = torch.bmm(mixing.flatten(0, 1), _times_by_head(xc, dtc)).view(by_head)
        del mixing

        to_end = torch.sub(log_decay[:, :, -1:], log_decay).exp_()
        whole = log_decay[:, :, -1].exp().unsqueeze(-1).unsqueeze(-1)  # [c, b, g, r, 1, 1]
        states = x.new_empty(c + 1, batch, groups, r, p, n)
        states[0] = initial_states.unflatten(1, (groups, r))
        carried = _times_by_group(xc, dtc * to_end)
        torch.bmm(carried.transpose(1, 2), Bg, out=states[1:].view(-1, r * p, n))
        for i in range(c):
            states[i + 1].addcmul_(states[i], whole[i])

        from_past = torch.bmm(Cg, states[:-1].view(-1, r * p, n).transpose(1, 2))
        from_past = from_past.view(c, batch, groups, q, r, p).permute(1, 0, 3, 2, 4, 5)
        earlier = x.new_empty(batch, length, heads, p)
        torch.addcmul(
            within.permute(1, 0, 4, 2, 3, 5),
            from_past,
            log_decay.exp().transpose(0, 1).unsqueeze(-1),
            out=earlier.view(batch, c, q, groups, r, p),
        )
        y = torch.addcmul(earlier, x, (dt * _own_score(B, C, heads)).unsqueeze(-1) + D)
        ctx.q = q
        ctx.save_for_backward(x, dt, log_decay, B, C, D, states, earlier)
        return y, states[-1].reshape(batch, heads, p, n).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, log_decay, B, C, D, states, earlier = ctx.saved_tensors
        q = ctx.q
        (batch, length, heads, p), (groups, n) = x.shape, B.shape[2:]
        c, r = length // q, heads // groups
        xc, dtc, dyc = (_chunked(t, q, groups) for t in (x, dt, dy))
        Bg, Cg = _by_group(B, q), _by_group(C, q)
        to_end = torch.sub(log_decay[:, :, -1:], log_decay).exp_()
        whole = log_decay[:, :, -1].exp().unsqueeze(-1).unsqueeze(-1)

        # What chunks hand on: dstates[i] is the gradient of the state before chunk i.
        dy_past = _times_by_group(dyc, log_decay.exp())
        dC = torch.bmm(dy_past, states[:-1].view(-1, r * p, n))
        dstates = torch.empty_like(states)
        torch.bmm(dy_past.transpose(1, 2), Cg, out=dstates[:-1].view(-1, r * p, n))
        dstates[-1] = 0 if dfinal is None else dfinal.unflatten(1, (groups, r))
        for i in reversed(range(c)):
            dstates[i].addcmul_(dstates[i + 1], whole[i])
        dafter = dstates[1:].view(-1, r * p, n)
        dB = torch.bmm(_times_by_group(xc, dtc * to_end), dafter)
        du_past = torch.bmm(Bg, dafter.transpose(1, 2)).view(c, batch, groups, q, r, p)

        # Inside the chunks.
        dy_head = _times_by_head(dyc, None)
        decay = _decay_by_head(log_decay)
        dscores = torch.bmm(dy_head, _times_by_head(xc, dtc).transpose(1, 2)).view(decay.shape).mul_(decay).sum(1)
        mixing = decay.mul_(torch.bmm(Cg, Bg.transpose(1, 2)).unsqueeze(1)).flatten(0, 1)
        du_within = torch.bmm(mixing.transpose(1, 2), dy_head).view(c, batch, groups, r, q, p)
        dy_x = dy * x
        down = dy_x.sum(-1)  # gradient of dt_i C_i . B_i
        dscores.diagonal(dim1=1, dim2=2).copy_(_chunked(down * dt, q, groups).sum(-1).transpose(2, 3).flatten(0, 2))
        dC.baddbmm_(dscores, Bg)
        dB.baddbmm_(dscores.transpose(1, 2), Cg)

        du = x.new_empty(batch, length, heads, p)
        torch.addcmul(
            du_within.permute(1, 0, 4, 2, 3, 5),
            du_past.permute(1, 0, 3, 2, 4, 5),
            to_end.transpose(0, 1).unsqueeze(-1),
            out=du.view(batch, c, q, groups, r, p),
        )
        du_x = (du * x).sum(-1)
        dk = _chunked((dy * earlier).sum(-1) - dt * du_x, q, groups)
        dk[:, :, -1] += (dstates[1:] * states[1:]).sum((-1, -2))
        da = dk.flip(2).cumsum(2).flip(2).transpose(0, 1).reshape(batch, length, heads)
        dB, dC = (t.view(c, batch, groups, q, n).permute(1, 0, 3, 2, 4).reshape(B.shape) for t in (dB, dC))
        own = _own_score(B, C, heads)
        ddt = torch.addcmul(du_x, down, own)
        dx = du.mul_(dt.unsqueeze(-1)).addcmul_(dy, (dt * own).unsqueeze(-1) + D)
        dD = dy_x.sum((0, 1)) if D.shape[1] == p else down.sum((0, 1)).unsqueeze(-1)
        return dx, ddt, da, dB, dC, dD, dstates[0].reshape(batch, heads, p, n), None
