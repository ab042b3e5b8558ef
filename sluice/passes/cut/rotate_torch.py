"""The dimensions of attention heads in a basis that sorts them, by an exact change of weights.

1. A head's output reaches the output projection as ``W_o A (W_v x + b_v)``, rows of ``A`` the attention weights. Only
   the product ``W_o [W_v | b_v] = U S V^T`` counts, so ``W_o := U S^(1/2)`` and ``[W_v | b_v] := S^(1/2) V^T`` compute
   the same. The last dimensions carry least then: of all heads with one dimension less, the one without the last is
   nearest, for inputs of unit covariance. Scores are ``[W_q | b_q]^T [W_k | b_k]`` in the same way.
2. Where rows of attention weights sum to one, the value bias is a constant: ``b_o += W_o b_v``, ``b_v := 0``.
3. Where this holds is for `sluice.passes.graph.heads_torch` to say; all else stays as it is. So do all weights of a
   network whose outputs on the inputs of its capture change by more than rounding does (`SAME`).

Sources: values and output as one matrix of a head, and their bias as a constant, Elhage et al. 2021; exact changes of
basis before a cut, Ashkboos et al. (SliceGPT, ICLR 2024); SVD of the two products, Lin et al. (MoDeGPT, ICLR 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sluice.passes.graph.capture import captured_leaves
from sluice.passes.graph.heads_torch import Block, Fold, Head, find_pairs
from sluice.passes.graph.tracks_torch import Tracks

__all__ = ["Rotation", "rotate"]

SAME = 1e-4  # of the scale of an output


@dataclass(frozen=True, slots=True)
class Rotation:
    """Two weights whose product stayed: values or scores, heads, dimensions, and whether the value bias went."""

    kind: str
    outer: str
    inner: str
    heads: int
    dims: int
    folded: bool


@torch.no_grad()
def rotate(gm: fx.GraphModule) -> tuple[Rotation, ...]:
    """Change the weights of a captured graph in place; what was changed, nothing where nothing can be."""
    training = gm.training
    gm.eval()
    tracks = Tracks(gm)
    leaves = captured_leaves(gm)
    before = tracks.run(*leaves, enable_io_processing=False)
    pairs = find_pairs(gm, tracks)
    state = gm.state_dict(keep_vars=True)
    kept = {name: state[name].detach().clone() for pair in pairs for name in pair.tensors()}
    done = []
    for pair in pairs:
        if pair.fold is not None:
            _fold(state, pair.fold)
        for head in pair.heads:
            _sort(state, head)
        dims = int(pair.heads[0][0][0][1].shape[1])
        done.append(Rotation(pair.kind, pair.outer, pair.inner, len(pair.heads), dims, pair.fold is not None))
    after = fx.Interpreter(gm).run(*leaves, enable_io_processing=False) if done else before
    if not _same(before, after):
        for name, tensor in kept.items():
            state[name].copy_(tensor)
        done = []
    gm.train(training)
    return tuple(done)


def _same(before: object, after: object) -> bool:
    for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        if isinstance(old, Tensor) and old.is_floating_point() and old.numel():
            known = old.isfinite()
            scale = float(old[known].abs().max()) if bool(known.any()) else 0.0
            if not torch.equal(known, new.isfinite()) or bool(((old - new)[known].abs() > SAME * scale).any()):
                return False
    return True


def _sort(state: dict[str, Tensor], head: Head) -> None:
    """Rule 1, for one head."""
    outer, inner = (torch.cat([_entries(state, block) for block in blocks]).double() for blocks in head)
    (q_outer, r_outer), (q_inner, r_inner) = torch.linalg.qr(outer), torch.linalg.qr(inner)
    left, energy, right = torch.linalg.svd(r_outer @ r_inner.t(), full_matrices=False)
    root = energy.sqrt()
    for blocks, made, old in ((head[0], q_outer @ left * root, outer), (head[1], q_inner @ right.t() * root, inner)):
        whole = torch.zeros_like(old)
        whole[:, : made.shape[1]] = made
        for block, part in zip(blocks, whole.split([len(index) for _, index in blocks]), strict=True):
            _put(state, block, part)


def _fold(state: dict[str, Tensor], fold: Fold) -> None:
    """Rule 2."""
    constant = _entries(state, fold.weight).double() @ _entries(state, fold.bias).double()
    _put(state, fold.into, _entries(state, fold.into).double() + constant)
    _put(state, fold.bias, torch.zeros(fold.bias[1].shape))


def _entries(state: dict[str, Tensor], block: Block) -> Tensor:
    name, index = block
    return state[name].reshape(-1)[index.to(state[name].device)]


def _put(state: dict[str, Tensor], block: Block, values: Tensor) -> None:
    name, index = block
    flat = state[name].detach().reshape(-1).clone()
    flat[index.to(flat.device)] = values.to(flat)
    state[name].copy_(flat.reshape(state[name].shape))
