"""One attention call of the model, in the hands of methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from .rows import Rows

if TYPE_CHECKING:
    from .call import Site

# Not by its name in F: what stands there while a model runs hands the call to methods.
_scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention
_HALF = (torch.float16, torch.bfloat16)


def plain(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale q k^T + key_bias) v, `[B,H,M,d]`; key_bias `[B,N]`."""
    mask = None if key_bias is None else key_bias[:, None, None].to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    return _scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


@torch.compiler.assume_constant_result
def _has_flash(device: int) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def with_logsumexp(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return `plain` and the logsumexp of the logits, `[B,H,M]`, by the fastest attention that gives both."""
    # The derivative of flash attention knows none by the logsumexp.
    plain_half = key_bias is None and q.dtype in _HALF and not (torch.is_grad_enabled() and q.requires_grad)
    plain_half = plain_half and q.shape[1] == k.shape[1]
    if q.is_cuda and plain_half and q.shape[3] % 8 == 0 and _has_flash(q.device.index or 0):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)
        return out, lse
    out, lse = ops.attention(q, k, v, scale=scale, key_bias=key_bias, return_lse=True)
    return out, lse


class Attention:
    """One attention call of the model while methods act on it.

    Attributes:
        q: queries `[R,H,M,d]` that the model attends with.
        k: keys `[R,H,N,d]`, without the columns that methods have added; with fewer heads where the model attends so.
        v: values `[R,H,N,d]`, likewise.
        key_bias: `[R,N]`, added to the scaled logits, or None.
        scale: factor of the logits.
        rows: which rows are conditional.
        module: the attention module.
        moved: the context is not what the model hands to every layer.
        text: of joint attention, the first column of the text and how many it has; then q are the image's queries, and
            k and v hold all columns. None where the text is apart.
        sequence: of joint attention whose rows have one mask, the queries of image and text `[R,H,S,d]`, and the first
            of the image's; None elsewhere.
        beside: of joint attention, keys and values `[R,H,N,d]` of the text that runs beside the prompt's, or None.
        every: attention of that sequence, where somebody has asked for its logsumexp.
        sharpened: the text's keys are not the model's.
        unchanged: all that was asked for is the logsumexp: `every` is the attention.
        probabilities: of the conditional rows, as in `Edited`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        scale: float,
        rows: Rows,
        *,
        module: Any,
        tokens: int | None = None,
        moved: bool = False,
        text: tuple[int, int] | None = None,
        sequence: tuple[Tensor, int] | None = None,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.module, self.text, self.sequence, self.beside = module, text, sequence, beside
        self.every: Tensor | None = None
        self.unchanged = self.sharpened = False
        self._keys_values = k, v
        if tokens is not None and tokens < k.shape[2]:
            k, v = k[:, :, :tokens], v[:, :, :tokens]
        self.q, self.k, self.v = q, k, v
        self.key_bias, self.scale, self.rows, self.moved = key_bias, scale, rows, moved
        self.probabilities: Callable[[Tensor, int, slice], Tensor] | None = None
        self._whole: Tensor | None = None
        self._conditional: Tensor | None = None
        self._unconditional: Tensor | None = None

    def column_ids(self, token_ids: Tensor) -> Tensor:
        """Return the columns of k and v that hold these tokens of the text, of the same shape, padded as they are.

        Tokens beyond the text, padding that the model has left out, are padding here.
        """
        if self.text is None:
            return token_ids
        start, tokens = self.text
        return torch.where((token_ids < 0) | (token_ids >= tokens), -1, token_ids + start)

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the text's columns of keys or values, and the image's; for joint attention of nothing else."""
        assert self.text is not None
        start, tokens = self.text
        image = x[:, :, :start] if start else x[:, :, tokens:]
        return x[:, :, start : start + tokens], image

    def sharpen(self, factor: float | Tensor) -> None:
        """Multiply the logits of the image's rows and the text's columns, those of a text beside it too.

        The other rows of joint attention keep the model's keys.
        """
        start, tokens = self.text or (0, self.k.shape[2])
        before, text, after = self.k.tensor_split((start, start + tokens), 2)
        self.k = torch.cat([before, factor * text, after], 2)
        if self.beside is not None:
            self.beside = factor * self.beside[0], self.beside[1]
        self.sharpened, self.sequence = True, None

    def columns(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return keys and values `[R,H,L,d]` of the contexts that a run added at its site."""
        start, stop = site.columns
        k, v = self._keys_values
        return k[:, :, start:stop], v[:, :, start:stop]

    def _of(self, take: Callable[[Tensor], Tensor], rows: Rows) -> Attention:
        bias = None if self.key_bias is None else take(self.key_bias)
        q, k, v = take(self.q), take(self.k), take(self.v)
        one = Attention(q, k, v, bias, self.scale, rows, module=self.module, moved=self.moved, text=self.text)
        one.probabilities = self.probabilities
        return one

    @property
    def conditional(self) -> Attention:
        """The same of the conditional rows alone."""
        return self._of(self.rows.take, self.rows.alone) if self.rows.others else self

    @property
    def untouched(self) -> bool:
        """Whether nobody has asked for the attention of any row, or set it."""
        return self._whole is None and self._conditional is None and self._unconditional is None

    @property
    def conditional_set(self) -> bool:
        """Whether the attention of the conditional rows has been set."""
        return self._whole is not None or self._conditional is not None

    def plain(self) -> Tensor:
        """Return what the model's own attention of these q, k, v is, `[R,H,M,d]`."""
        return plain(self.q, self.k, self.v, self.key_bias, self.scale)

    def logsumexp(self) -> Tensor:
        """Return the logsumexp of every row's logits, `[R,H,M]`, at least float32.

        The attention that it comes from is `fill`ed in.
        """
        queries, start = (self.q, 0) if self.sequence is None else self.sequence
        out, lse = with_logsumexp(queries, self.k, self.v, self.key_bias, self.scale)
        rows = slice(start, start + self.q.shape[2])
        if self.sequence is not None:
            self.every, self.unchanged = out, self.untouched
        self.fill(out[:, :, rows])
        return lse[:, :, rows]

    def maps(self, token_ids: Tensor | None, tokens: int) -> Tensor:
        """Return attention of all rows to some tokens, mean over heads, `[R,n,M]`, differentiable.

        It is the model's own, which is `fill`ed in.

        Args:
            token_ids: `[R,n]`, padded with -1, or None for every token.
            tokens: how many the text has.
        """
        q, k, scale, bias = self.q, self.k, self.scale, self.key_bias
        if self.text is None:
            out, maps = ops.attention_with_maps(q, k, self.v, token_ids, scale=scale, key_bias=bias)
            self.fill(out)
            return maps
        if token_ids is None:
            token_ids = torch.arange(tokens, device=q.device)
            if tokens != self.text[1]:
                # Those that the model leaves out are padding of every row's own.
                token_ids = token_ids.expand(len(q), -1)
        return ops.maps_from_lse(q, k, self.logsumexp(), self.column_ids(token_ids), scale=scale, key_bias=bias)

    def fill(self, whole: Tensor) -> None:
        """Set the attention of all rows that nobody has set, from that of all rows `[R,H,M,d]`."""
        if self.untouched:
            self._whole = whole
        elif self._conditional is None:
            self._conditional = self.rows.take(whole)
        elif self._unconditional is None:
            self._unconditional = self.rows.rest(whole)

    @property
    def conditional_out(self) -> Tensor:
        """Attention of the conditional rows, `[B,H,M,d]`: the model's own unless methods have set it."""
        if self._conditional is None:
            self._conditional = self.conditional.plain() if self._whole is None else self.rows.take(self._whole)
        return self._conditional

    @conditional_out.setter
    def conditional_out(self, out: Tensor) -> None:
        self.unchanged = False
        # Of a whole that was there, the other rows stay.
        if self._whole is not None and self._unconditional is None:
            self._unconditional = self.rows.rest(self._whole)
        self._conditional, self._whole = out, None

    @property
    def unconditional_out(self) -> Tensor:
        """Attention of the other rows, likewise."""
        if self._unconditional is None:
            rest = self._of(self.rows.rest, self.rows)
            self._unconditional = rest.plain() if self._whole is None else self.rows.rest(self._whole)
        return self._unconditional

    @unconditional_out.setter
    def unconditional_out(self, out: Tensor) -> None:
        self.unchanged = False
        if self._whole is not None and self._conditional is None:
            self._conditional = self.rows.take(self._whole)
        self._unconditional, self._whole = out, None

    @property
    def out(self) -> Tensor:
        """Attention of all rows, `[R,H,M,d]`."""
        if self._whole is None:
            if self.untouched:
                self._whole = self.plain()
            else:
                conditional = self.conditional_out if self.rows.conditional else self.unconditional_out
                rest = self.unconditional_out if self.rows.others else conditional
                # As models read it next, heads within tokens: for them it would be copied once more.
                self._whole = self.rows.merge(conditional.transpose(1, 2), rest.transpose(1, 2)).transpose(1, 2)
        return self._whole

    @out.setter
    def out(self, out: Tensor) -> None:
        self.unchanged = False
        self._whole, self._conditional, self._unconditional = out, None, None


def key_bias_of(mask: Tensor | None, rows: int, tokens: int, name: str) -> Tensor | None:
    """Return an attention mask that is the same for every image token as a key bias `[R,N]`, float32.

    Args:
        mask: boolean (true where a key takes part) or added to the logits; `[R,H,1,N]` or what broadcasts to it. Of
            more than N columns the first ones count.
        rows: R.
        tokens: N.
        name: the layer's.

    Raises:
        ValueError: the mask is another one for every image token.
    """
    if mask is None:
        return None
    if mask.ndim < 2 or mask.shape[-2] != 1:
        raise ValueError(
            f"{name} was given an attention mask {tuple(mask.shape)} of its own for every image token; methods act "
            "under masks of the keys only, [rows, 1, tokens]: leave this layer out, or call the model without that mask"
        )
    while mask.ndim < 4:
        mask = mask[None]
    bias = mask[:, 0, 0, :tokens]
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=bias.device).masked_fill(~bias, -torch.inf)
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    # diffusers masks by -10000 (in bfloat16 -9984), which would count as a row's lowest logit.
    return bias.masked_fill(bias <= -9984, -torch.inf).expand(rows, -1)
