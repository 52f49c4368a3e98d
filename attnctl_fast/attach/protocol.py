"""The interface between a method and the engine that drives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .attention import Attention
    from .beside import SecondText
    from .call import Call, Site
    from .evaluation import Evaluation
    from .layers import Layer, LayerChoice


class Edited(NamedTuple):
    """Attention that a method edited.

    Attributes:
        out: attention `[B,H,M,d]`.
        probabilities: a function that applies the edit to the scaled logits `[B,m,N]` of one head and of some image
            tokens, a slice of them, for those who look at the maps; None where it leaves them as they are.
    """

    out: Tensor
    probabilities: Callable[[Tensor, int, slice], Tensor] | None = None


class Run:
    """The part of a method that acts during one call of a pipeline.

    Every hook is optional: what a subclass does not define is not called. Hooks on attention may be compiled into the
    model's graph: what depends on the step has to lie in tensors.

    All attributes are read after `before_denoiser`.

    Attributes:
        active: whether the hooks on attention act at this evaluation.
        used: whether they act at any evaluation of the call; a compiled model runs the same graph at all of them.
        beside: a text that is to run through a joint model beside the prompts'; one run of a call may have one, and
            acts on every layer (`Method.everywhere`).
        more_text: contexts `[E,L,C]`, of the conditional rows, that a joint model is to have in its sequence of text
            and image; only the run's own `sequence` sees them, which acts on every layer likewise.
    """

    active: bool = True
    used: bool = True
    beside: SecondText | None = None
    more_text: Tensor | None = None

    def encoded(self, embeddings: Tensor) -> Tensor:
        """Return the prompts' contexts `[samples,N,C]` for the whole call; the given ones are left as they are."""
        return embeddings

    def before_denoiser(self, evaluation: Evaluation) -> None:
        """Prepare an evaluation of the model, or change what it is given."""

    def apart(self) -> bool:
        """Return whether this step's conditional rows are evaluated by themselves, apart from the others."""
        return False

    def denoise(self, evaluation: Evaluation, evaluate: Callable[[], Any]) -> Any:
        """Return the model's output, which `evaluate()` computes."""
        return evaluate()

    def context(self, site: Site, text: Tensor) -> Tensor:
        """Return the context `[R,N,C]` that the layer reads instead of `text`."""
        return text

    def more_context(self, site: Site, text: Tensor, context: Tensor) -> Tensor | None:
        """Return further contexts `[R,L,C]` whose keys and values `attend` wants, or None.

        Args:
            site: the layer.
            text: what the model hands to every layer.
            context: what this layer reads, as other methods have moved it; `text` itself if none has.
        """
        return None

    def keys(self, site: Site, attention: Attention) -> None:
        """Change the keys that the image tokens of all rows attend to, before the edit: `Attention.sharpen`."""

    def edit(self, site: Site, attention: Attention) -> Tensor | Edited:
        """Return attention of the conditional rows in place of the model's, `[B,H,M,d]`; one method per layer may."""
        raise NotImplementedError

    def attend(self, site: Site, attention: Attention) -> None:
        """Look at the attention of all rows, or change it, after the edit."""

    def sequence(self, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> Tensor:
        """Return attention of the conditional rows of a joint model, `[E,H,S,d]`, with `more_text` in the sequence.

        That text stands first where the text does, and last where the image is first.

        Args:
            site: the layer.
            q: queries `[E,H,S,d]` of the whole sequence.
            k: keys, likewise.
            v: values, likewise.
            scale: factor of the logits.
            out: what the model and other methods make of the sequence without `more_text`, zeros in its place.
        """
        raise NotImplementedError

    def after_denoiser(self, output: Tensor) -> Tensor:
        """Return what the model predicts, `[R,C,height,width]`."""
        return output

    def end(self) -> None:
        """End the call, also after an exception."""


def defines(run: Run, hook: str) -> bool:
    """Return whether a run has a hook of its own."""
    return getattr(type(run), hook) is not getattr(Run, hook)


class Method:
    """A way to control a model; subclass it as a frozen dataclass, and give `start`.

    Attributes:
        layers: those that its runs act on, as users name them; None for `default_layers`.
        edits_attention: its runs `edit` attention, which one method per layer may do.
        everywhere: its runs have a site in every layer that it reaches; `Site.chosen` says where the user wants it.
        sends_text: its runs send a text of their own through a joint model, which one method of a call may.
        single: one of the kind acts in a call: that of the innermost control.
        alone: no other method acts in the call.
    """

    layers: LayerChoice = None

    edits_attention: ClassVar[bool] = False
    everywhere: ClassVar[bool] = False
    sends_text: ClassVar[bool] = False
    single: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def reaches(self, layer: Layer) -> bool:
        """Return whether it may act on a layer; on those that attend to the text, unless it says otherwise."""
        return layer.cross

    def default_layers(self, layers: dict[str, Layer]) -> Sequence[str]:
        """Return the layers to act on where the user names none, from those that it reaches, in order of execution."""
        return list(layers)

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        """Raise ValueError unless it can act on this pipeline and these layers; called before anything is changed."""

    def start(self, call: Call, sites: list[Site]) -> Run:
        """Begin a pipeline call, before its first step.

        Raises:
            ValueError: the prompts do not fit the method.
        """
        raise NotImplementedError
