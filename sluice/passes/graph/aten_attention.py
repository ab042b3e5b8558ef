"""ATen rules of attention, einsum and embeddings."""

from __future__ import annotations

from torch import fx

from sluice.passes.graph.aten_walk import Args, Walk, unknown, where
from sluice.passes.graph.coupling import Value

__all__ = ["einsum", "embedding", "sdpa"]


def sdpa(w: Walk, n: fx.Node, a: Args) -> Value:
    mask = None if a.get("attn_mask") is None else w.operand(a["attn_mask"])
    return w.coupling.attend(w.operand(a["query"]), w.operand(a["key"]), w.operand(a["value"]), mask, where(n))


def einsum(w: Walk, n: fx.Node, a: Args) -> Value:
    equation, tensors = a["equation"].replace(" ", ""), a["tensors"]
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in terms):
        return unknown(w, n, a)
    factors = [(*w.operand(t), term, w.is_weight(t)) for t, term in zip(tensors, terms, strict=True)]
    return w.coupling.contract(factors, out, where(n, next((t for t in tensors if w.is_weight(t)), None)))


def embedding(w: Walk, n: fx.Node, a: Args) -> Value:
    """Rows are picked by numbers that no cut changes; the columns go on."""
    table, name = w.of(a["weight"]), where(n, a["weight"])
    w.coupling.freeze(table[0], f"{name} picks rows by number")
    w.coupling.produce(table[1])
    return (*w.of(a["indices"]), table[1])
