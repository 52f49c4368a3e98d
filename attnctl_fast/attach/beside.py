"""A second text in every conditional row of a joint model, which runs through its blocks beside the prompt's.

In attention it stands outside of the first one in the sequence, where a slice parts them. Elsewhere it is either

- "columns": there as well, in a model whose blocks are modulated alike whatever the text says;
- "rows": a row of its own. The batch of texts has R rows and E more, that of pictures R, so that every text is
  modulated by its own pooled embedding, and the pictures by the prompts'. A block that has text and image in one
  sequence gets the second text outside of the first one, and is told where to modulate it otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .rows import Rows

# Of what a model modulates its blocks by.
_OF_TEXTS = ("pooled_projections", "timestep", "guidance")


@dataclass(frozen=True)
class SecondText:
    """The texts that a run wants to have beside the prompts, one for each conditional row.

    context: `[E,N,C]`. pooled: their pooled embeddings `[E,P]`, or None where the model reads none.
    """

    context: Tensor
    pooled: Tensor | None


class Beside:
    """The texts of one evaluation that stand in the sequence outside of the prompts'.

    rows: which rows are conditional. tokens: how many columns each text has. order: where it stands in the sequence.
    stacked: it is a row of its own.
    """

    def __init__(self, rows: Rows, tokens: int, order: str, *, stacked: bool) -> None:
        self.rows, self.tokens, self.first, self.stacked = rows, tokens, order == "first", stacked

    def added(self, given: dict[str, Any], text: str, second: SecondText) -> dict[str, Any]:
        """Return a model's arguments with a second text for every conditional row.

        Args:
            given: the arguments by name.
            text: the name of the contexts.
            second: the text.

        Raises:
            ValueError: it is not as long as the first one, or an IP-Adapter is modulated row by row.
        """
        if self.stacked and not self.first and "ip_adapter_image_embeds" in (given.get("joint_attention_kwargs") or {}):
            raise ValueError(
                "an IP-Adapter of SD 3 takes the time of every row, of which a second text has one of its own; draw "
                "without the adapter's images, or leave out the method with the second text"
            )
        context, own = given[text], second.context
        if own.shape[1:] != context.shape[1:]:
            raise ValueError(
                f"the second text has {own.shape[1]} columns of {own.shape[2]}, but the prompt {context.shape[1]} of "
                f"{context.shape[2]}; let the pipeline encode both, with one max_sequence_length"
            )
        both = torch.cat([context, own.to(context)])
        changed = {**given, text: both if self.stacked else self.folded(both)}
        if isinstance(ids := given.get("txt_ids"), Tensor):
            changed["txt_ids"] = torch.cat([ids, ids], -2)
        for name in _OF_TEXTS if self.stacked else ():
            one = given.get(name)
            if name == "pooled_projections":
                assert second.pooled is not None
                changed[name] = torch.cat([given[name], second.pooled.to(given[name])])
            elif isinstance(one, Tensor) and one.ndim and len(one) == self.rows.total:
                changed[name] = torch.cat([one, self.rows.take(one)])
        return changed

    def lengthened(self, given: dict[str, Any], text: str, more: Tensor) -> dict[str, Any]:
        """Return a model's arguments with more text `[E,L,C]` in the conditional rows, zeros in the others.

        Args:
            given: the arguments by name.
            text: the name of the contexts.
            more: the text, one or several as long as the prompt, each with the prompt's positions.
        """
        context = given[text]
        changed = {**given, text: self.joined(context, self.spread(more.to(context)), 1)}
        if isinstance(ids := given.get("txt_ids"), Tensor):
            again = torch.arange(self.tokens, device=ids.device) % ids.shape[-2]
            changed["txt_ids"] = self.joined(ids, ids.index_select(-2, again), -2)
        return changed

    def parted(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return the sequence without the second text, and that text."""
        n = self.tokens
        if self.first:
            return x.narrow(dim, n, x.shape[dim] - n), x.narrow(dim, 0, n)
        return x.narrow(dim, 0, x.shape[dim] - n), x.narrow(dim, x.shape[dim] - n, n)

    def joined(self, x: Tensor, second: Tensor, dim: int) -> Tensor:
        """Undo `parted`."""
        return torch.cat([second, x] if self.first else [x, second], dim)

    def spread(self, x: Tensor) -> Tensor:
        """Return something of the second texts `[E,..]` as `[R,..]`, zeros in the other rows."""
        return self.rows.merge(x, x.new_zeros(len(self.rows.others), *x.shape[1:]))

    def folded(self, text: Tensor) -> Tensor:
        """Return the batch of texts `[R+E,N,C]` as one of sequences `[R,2N,C]`."""
        total = self.rows.total
        return self.joined(text[:total], self.spread(text[total:]), 1)

    def unfolded(self, text: Tensor) -> Tensor:
        """Undo `folded`."""
        first, second = self.parted(text, 1)
        return torch.cat([first, self.rows.take(second)])


@contextmanager
def running(model: Any, beside: Beside) -> Iterator[None]:
    """Have the blocks of a model take second texts that are rows, within the block of code."""
    put: list[tuple[Any, Any]] = []

    def wrap(module: Any, forward: Any) -> None:
        own = module.__dict__
        before = own.get("forward")
        put.append((module, before))
        # torch.compile cannot look the class's function up, and would take a bound one for another layer.
        own["_attnctl_inner"] = type(module).forward if before is None else before
        own["_attnctl_bound"], own["_attnctl_beside"] = before is not None, beside
        own["forward"] = MethodType(forward, module)

    if not beside.stacked:
        yield
        return
    try:
        for block in model.transformer_blocks:
            wrap(block.norm1, _of_pictures)
        for block in getattr(model, "single_transformer_blocks", ()):
            wrap(block, _joined_block)
            wrap(block.norm, _joined_norm)
            wrap(block.proj_out, _joined_projection)
        wrap(model.norm_out, _of_pictures)
        yield
    finally:
        for module, before in reversed(put):
            own = module.__dict__
            for name in ("forward", "_attnctl_inner", "_attnctl_bound", "_attnctl_beside", "_attnctl_kept"):
                own.pop(name, None)
            if before is not None:
                own["forward"] = before


def _run(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a module's own forward."""
    inner = module._attnctl_inner
    return inner(*args, **kwargs) if module._attnctl_bound else inner(module, *args, **kwargs)


def _of_pictures(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a norm of the pictures with their part of the batch's modulation."""
    args = tuple(one[: len(x)] if isinstance(one, Tensor) else one for one in args)
    kwargs = {name: one[: len(x)] if isinstance(one, Tensor) else one for name, one in kwargs.items()}
    return _run(module, x, *args, **kwargs)


def _joined_block(
    module: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **kwargs: Any
) -> Any:
    """Run a block that has text and image in one sequence: the second text's step is by its own gate."""
    beside: Beside = module._attnctl_beside
    before = beside.spread(encoder_hidden_states[beside.rows.total :])
    texts, pictures = _run(module, hidden_states, beside.folded(encoder_hidden_states), temb, **kwargs)
    first, _ = beside.parted(texts, 1)
    second = before + module.norm._attnctl_kept.unsqueeze(1) * module.proj_out._attnctl_kept
    if second.dtype == torch.float16:
        second = second.clip(-65504, 65504)
    return torch.cat([first, beside.rows.take(second)]), pictures


def _joined_norm(module: Any, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
    """Modulate the second text by its own embedding, and keep its gate."""
    beside: Beside = module._attnctl_beside
    total = beside.rows.total
    first, second = beside.parted(x, 1)
    second, module._attnctl_kept = _run(module, second, emb=beside.spread(emb[total:]))
    first, gate = _run(module, first, emb=emb[:total])
    return beside.joined(first, second, 1), gate


def _joined_projection(module: Any, x: Tensor) -> Tensor:
    """Keep what is projected of the second text."""
    out = _run(module, x)
    _, module._attnctl_kept = module._attnctl_beside.parted(out, 1)
    return out
