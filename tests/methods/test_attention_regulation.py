"""Attention regulation on a layer against an independent loop: full logits, autograd, as the released code works."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attnctl_fast as ac
from attnctl_fast.methods import attention_regulation
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers, by the thousand

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
PROMPT = "a black bag and an apple"  # black bag = 2, 3; apple = 6; end of text = 7


def basis(side_y: int, side_x: int, convention: str) -> torch.Tensor:
    """The Gaussians [centres, height, width] one by one."""
    maps = []
    axes = []
    for side in (side_y, side_x):
        sigma = max(side // 16, 1)
        if convention == "official":
            axes.append((sigma, list(range(2 * sigma, side, 2 * sigma))))
        else:
            axes.append((sigma, [2 * sigma * p - 1 for p in range(1, side // (2 * sigma) + 1)]))
    y = torch.arange(side_y, dtype=torch.float64)[:, None]
    x = torch.arange(side_x, dtype=torch.float64)[None, :]
    (sigma_y, centres_y), (sigma_x, centres_x) = axes
    for centre_y in centres_y:
        for centre_x in centres_x:
            square = (y - centre_y) ** 2 / (2 * sigma_y**2) + (x - centre_x) ** 2 / (2 * sigma_x**2)
            maps.append(torch.exp(-square))
    return torch.stack(maps)


@dataclass
class Loop:
    """The published inner loop on full logits [H,h,w,N] of one sample, with its state over the steps."""

    targets: list[int]
    pinned: list[int]
    convention: str = "official"
    descent: int = 20
    ema: float = 0.25
    decay: float = 0.99
    strength: float = 1.0
    previous: torch.Tensor | None = field(default=None)

    def additive(self, gaussians: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """[h,w,T] per head from theta [H,T,centres]."""
        return torch.einsum("htc,cyx->hyxt", theta, gaussians)

    def loss(self, edited: torch.Tensor, plain: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        heads, height, width, _ = edited.shape
        maps = edited[..., self.targets]
        share = min(1.0, 0.2 * len(self.targets)) / len(self.targets)
        high = torch.quantile(maps.reshape(heads, height * width, -1), 0.9, dim=1)
        mass = maps.sum((1, 2)) / (height * width)
        loss = ((high - 0.9) ** 2).mean() + 80 * ((mass - share) ** 2).mean()
        if self.convention == "official":
            return loss + 0.09 * (theta**2).mean()
        return loss + 0.1 * (edited - plain).square().sum((1, 2, 3)).sqrt().mean()

    def __call__(self, q: Any, k: Any, v: Any, grid: tuple[int, int], theta: Any, step: int) -> torch.Tensor:
        """q [H,M,d], k, v [H,N,d], theta [H,T,centres] -> out [H,M,d]."""
        heads, _, width = q.shape
        scale = width**-0.5
        logits = (q @ k.mT * scale).unflatten(1, grid)
        plain = logits.softmax(-1)
        gaussians = basis(*grid, self.convention)
        factor = scale if self.convention == "paper" else 1.0
        additive = factor * self.additive(gaussians, theta)
        previous = additive if self.previous is None else self.previous
        best, best_loss = None, float("inf")
        with torch.enable_grad():
            for _ in range(self.descent):
                theta = theta.detach().requires_grad_()
                additive = factor * self.additive(gaussians, theta)
                biased = logits.clone()
                biased[..., self.targets] += additive
                loss = self.loss(biased.softmax(-1), plain, theta)
                if loss < best_loss:
                    best, best_loss = additive.detach(), loss.item()
                (gradient,) = torch.autograd.grad(loss, theta)
                theta = theta - heads * 100.0 * gradient
        self.previous = best
        used = self.strength * self.decay**step * (self.ema * previous + (1 - self.ema) * best)
        logits[..., self.targets] += used
        probabilities = logits.softmax(-1)
        probabilities[..., self.pinned] = plain[..., self.pinned]
        return probabilities.flatten(1, 2) @ v


@dataclass
class Seen:
    """Inputs and outputs of one layer at every step, and the initial weights drawn there."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    out: list[torch.Tensor] = field(default_factory=list)
    theta: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def watching(pipe: Any, monkeypatch: pytest.MonkeyPatch, name: str = LAYER) -> Any:
    seen = Seen()

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.hidden.append(args[0])
        seen.text.append(kwargs["encoder_hidden_states"])
        seen.out.append(output)

    prepare = attention_regulation._Regulating.before_denoiser

    def prepared(self: Any, evaluation: Any) -> None:
        prepare(self, evaluation)
        if self.active:
            seen.theta += [site.theta[0] for site in self._sites if site.name == name]

    handle = pipe.unet.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with monkeypatch.context() as patch:
        patch.setattr(attention_regulation._Regulating, "before_denoiser", prepared)
        yield seen
    handle.remove()


def run(pipe: Any, **options: Any) -> torch.Tensor:
    options = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "latent", "latents": tiny.latents()} | options
    options["latents"] = options["latents"].to(pipe.unet.dtype)
    return pipe(**options).images


def layer_by_hand(pipe: Any, hidden: torch.Tensor, text: torch.Tensor, attend: Any) -> torch.Tensor:
    """The layer on one row, `attend(q, k, v)` in place of its attention."""
    attn = pipe.unet.get_submodule(LAYER)
    q, k, v = (
        x.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for x in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
    )
    return attn.to_out[0](attend(q, k, v).transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        (
            {"ema": 0.6, "decay": 0.7, "strength": 0.5, "steps": 7},
            {"ema": 0.6, "decay": 0.7, "strength": 0.5, "descent": 7},
        ),
        ({"pin_special": False}, {"pinned": []}),
        ({"convention": "paper", "pin_special": False}, {"pinned": [], "convention": "paper"}),
    ],
    ids=["official", "other numbers", "not pinned", "paper"],
)
@pytest.mark.parametrize("size", [(32, 32), (32, 48)], ids=["square", "wide"])
def test_edited_layer_equals_the_published_loop(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], loop: dict[str, Any], size: tuple[int, int]
) -> None:
    """In float64, over three edited steps and one after the last."""
    pipe = tiny.pipeline().to(torch.float64)
    grid = (size[0] // 2, size[1] // 2)
    method = ac.AttentionRegulation(["black bag", "apple"], layers=[LAYER], edit_steps=3, seed=3, **options)
    published = Loop(**({"targets": [2, 3, 6], "pinned": [0, 7]} | loop))
    shape = {"height": size[0] * tiny.SCALE, "width": size[1] * tiny.SCALE}
    with ac.control(pipe, method), watching(pipe, monkeypatch) as seen:
        run(pipe, latents=tiny.latents(size=size), **shape)
    assert len(seen.out) == 4
    assert len(seen.theta) == 3
    for step in range(4):
        for row in (0, 1):
            if row == 1 and step < 3:
                theta = seen.theta[step].flatten(2).double()
                expected = layer_by_hand(
                    pipe,
                    seen.hidden[step][row],
                    seen.text[step][row],
                    lambda q, k, v, theta=theta, step=step: published(q, k, v, grid, theta, step),
                )
            else:
                expected = layer_by_hand(
                    pipe, seen.hidden[step][row], seen.text[step][row], F.scaled_dot_product_attention
                )
            torch.testing.assert_close(seen.out[step][row], expected, rtol=1e-8, atol=1e-8)


def test_weights_are_drawn_uniformly_afresh_per_step_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline()
    other = LAYER.replace("down", "up")
    thetas = {}
    for name in (LAYER, other):
        with ac.control(pipe, ac.AttentionRegulation(["bag", "apple"])), watching(pipe, monkeypatch, name) as seen:
            run(pipe)
        thetas[name] = seen.theta
    drawn = torch.stack([*thetas[LAYER], *thetas[other]])
    assert drawn.shape == (4, 2, 2, 7, 7)
    assert len(drawn.flatten(1).unique(dim=0)) == 4
    assert 0 <= drawn.min() < 0.01 < 0.99 < drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("edit_steps", "edited"), [(0, 0), (1, 1), (3, 3), (9, 4), (0.0, 0), (0.1, 1), (0.5, 2), (0.74, 2), (1.0, 4)]
)
def test_last_edited_step(monkeypatch: pytest.MonkeyPatch, edit_steps: int | float, edited: int) -> None:
    pipe = tiny.pipeline()
    method = ac.AttentionRegulation(["bag"], layers=[LAYER], edit_steps=edit_steps)
    with ac.control(pipe, method), watching(pipe, monkeypatch) as seen:
        run(pipe)
    assert len(seen.theta) == edited


@pytest.mark.parametrize(
    ("scheduler", "steps", "evaluations"),
    [
        # (steps asked for, UNet evaluations edited by edit_steps=2)
        ("DDIMScheduler", 4, 2),
        ("DPMSolverMultistepScheduler", 4, 2),
        ("EulerDiscreteScheduler", 4, 2),
        ("UniPCMultistepScheduler", 4, 2),
        ("PNDMScheduler", 4, 2),
        ("HeunDiscreteScheduler", 4, 4),
        ("KDPM2DiscreteScheduler", 4, 4),
    ],
)
def test_steps_of_schedulers(monkeypatch: pytest.MonkeyPatch, scheduler: str, steps: int, evaluations: int) -> None:
    """A count of steps and the share that is the same, where the UNet is evaluated more often than there are steps."""
    pipe = tiny.pipeline(scheduler=tiny.scheduler(scheduler))
    for edit_steps in (2, 0.5):
        method = ac.AttentionRegulation(["bag"], layers=[LAYER], edit_steps=edit_steps)
        with ac.control(pipe, method), watching(pipe, monkeypatch) as seen:
            run(pipe, num_inference_steps=steps)
        assert len(seen.theta) == evaluations
        assert len(seen.out) > len(seen.theta)


def test_only_conditional_rows_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first edited layer of the first step, whose input is still that of the plain pipeline."""
    pipe = tiny.pipeline()
    with watching(pipe, monkeypatch) as plain:
        run(pipe, latents=tiny.latents(2), num_images_per_prompt=2)
    with ac.control(pipe, ac.AttentionRegulation(["bag", "apple"])), watching(pipe, monkeypatch) as edited:
        run(pipe, latents=tiny.latents(2), num_images_per_prompt=2)
    assert torch.equal(plain.hidden[0], edited.hidden[0])
    assert torch.equal(plain.out[0][:2], edited.out[0][:2])
    change = (plain.out[0][2:] - edited.out[0][2:]).abs().amax((1, 2))
    assert change.min() > 0.1


@pytest.mark.parametrize("convention", ["official", "paper"])
def test_regulation_raises_the_targets_and_is_deterministic(convention: str) -> None:
    pipe = tiny.pipeline()
    make = getattr(ac.AttentionRegulation, convention)
    maps, images = [], []
    for methods in ([], [make(["bag", "apple"])], [make(["bag", "apple"])], [make(["bag", "apple"], seed=1)]):
        with contextlib.ExitStack() as stack:
            if methods:
                stack.enter_context(ac.control(pipe, *methods))
            captured = stack.enter_context(ac.capture(pipe, ["bag", "apple"], layers=[LAYER]))
            images.append(run(pipe))
            maps.append(captured[LAYER][0, 0])
    high = [torch.quantile(m.flatten(1), 0.9, dim=1) for m in maps]
    assert (high[1] > high[0] + 0.05).all()
    assert torch.equal(images[1], images[2])
    assert not torch.equal(images[1], images[3])
    assert not torch.equal(images[0], images[1])


def test_generators_are_not_consumed() -> None:
    """Neither the user's generator nor the global one advances more, or less, than in the plain pipeline."""
    pipe = tiny.pipeline(scheduler=tiny.scheduler("DDPMScheduler"))
    states = []
    for strength in (None, 1.0):
        generator = torch.Generator().manual_seed(5)
        torch.manual_seed(6)
        with contextlib.ExitStack() as stack:
            if strength is not None:
                stack.enter_context(ac.control(pipe, ac.AttentionRegulation(["bag"], strength=strength)))
            pipe(PROMPT, num_inference_steps=3, generator=generator, output_type="latent")
        states.append((generator.get_state(), torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_presets() -> None:
    official = ac.AttentionRegulation.official(["bag"])
    assert official == ac.AttentionRegulation(["bag"])
    assert (official.steps, official.step_size, official.ema, official.decay) == (20, 100.0, 0.25, 0.99)
    assert (official.edit_steps, official.pin_special, official.convention) == (0.5, True, "official")
    paper = ac.AttentionRegulation.paper(["bag"], strength=0.5)
    assert (paper.convention, paper.pin_special, paper.strength) == ("paper", False, 0.5)
    assert hash(official) != hash(paper)
    with pytest.raises(AttributeError):
        official.strength = 2.0  # type: ignore[misc]


def test_implementations_agree() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    images = []
    for impl in ("eager", "reference"):
        with ac.use(impl), ac.control(pipe, ac.AttentionRegulation(["bag", "apple"])):
            images.append(run(pipe))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-8)
