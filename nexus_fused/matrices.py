"""Which parameters of a model Muon takes, and which are AdamW's."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

_NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # even where a weight of theirs is 2-D


def split_matrices(
    model: nn.Module, *, head: nn.Module | Tensor | Iterable[nn.Module | Tensor] | None
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits a model's parameters into those for torch.optim.Muon and the rest, each one once, in the model's order.

    Muon takes real 2-D weights of hidden layers. The rest are embeddings and what is tied to them, norms, biases,
    convolutions, whatever else does not have two dimensions, and the head. Frozen parameters are in the lists too.

        matrices, rest = split_matrices(model, head=model.lm_head)

    Args:
        head: the output layer. It looks like any other layer, so you must name it; pass None if it is tied to an
            embedding or if there is none. You may name several modules or parameters, such as a position embedding
            that is a bare parameter.

    Raises ValueError if something that you name is not part of the model.
    """
    named = [] if head is None else [head] if isinstance(head, (nn.Module, Tensor)) else list(head)
    parameters = list(model.parameters())
    known, others = {id(p) for p in parameters}, set()
    for part in named:
        of_part = {id(p) for p in ([part] if isinstance(part, Tensor) else part.parameters())}
        if not of_part or not of_part <= known:
            raise ValueError(
                f"head must name modules or parameters of the model, but this is not one, or has no parameters: {part}"
            )
        others |= of_part
    for module in model.modules():
        if isinstance(module, _NO_MATRICES):
            others.update(id(p) for p in module.parameters(recurse=False))
    matrices = [p for p in parameters if p.ndim == 2 and not p.is_complex() and id(p) not in others]
    taken = {id(p) for p in matrices}
    return matrices, [p for p in parameters if id(p) not in taken]
