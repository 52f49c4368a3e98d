"""Methods of a user's own, defined here and nowhere else: one that changes attention, the latents and the output, and
one that attends to a second context."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast.methods import Method, Run
from tests.support import tiny, tiny_transformers
from tests.support.graphs import counted_graphs
from tests.support.marks import full
from tests.support.pipelines import PROMPT, call, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers

EXACT = {"rtol": 0, "atol": 1e-8}  # in float64


@dataclass(frozen=True)
class Fade(Method):
    """Scales attention to the text in the conditional rows, the latents, and what the model predicts."""

    attention: float = 1.0
    latents: float = 1.0
    output: float = 1.0
    layers: Any = None

    edits_attention = True

    def start(self, call: Any, sites: Any) -> Run:
        return Fading(self)


class Fading(Run):
    def __init__(self, method: Fade) -> None:
        self.method = method

    def before_denoiser(self, evaluation: Any) -> None:
        if self.method.latents != 1:
            evaluation.latents = evaluation.latents * self.method.latents

    def edit(self, site: Any, attention: Any) -> Tensor:
        return self.method.attention * attention.plain()

    def after_denoiser(self, output: Tensor) -> Tensor:
        return self.method.output * output


@dataclass(frozen=True)
class Away(Method):
    """Goes away from the attention to another text, by as much as `weights` says for every step."""

    text: str
    weights: tuple[float, ...]
    layers: Any = None

    def start(self, call: Any, sites: Any) -> Run:
        return Going(self, call)


class Going(Run):
    def __init__(self, method: Away, call: Any) -> None:
        self.method, self.call = method, call
        self.other = call.encode([method.text]).contexts

    def before_denoiser(self, evaluation: Any) -> None:
        # What depends on the step lies in a tensor: one compiled graph serves all of them.
        self.weight = torch.tensor(self.method.weights[self.call.step]).to(evaluation.text)
        self.active = self.method.weights[self.call.step] != 0
        self.context_of_all = self.other.to(evaluation.text).expand(evaluation.rows.total, -1, -1)

    def more_context(self, site: Any, text: Tensor, context: Tensor) -> Tensor:
        return self.context_of_all

    def attend(self, site: Any, attention: Any) -> None:
        k, v = (attention.rows.take(x) for x in attention.columns(site))
        q = attention.conditional.q
        negative = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        positive = attention.conditional_out
        attention.conditional_out = positive + self.weight * (positive - negative)


def drawn(pipe: Any, *methods: Any, **options: Any) -> Tensor:
    with ac.control(pipe, *methods):
        return call(pipe, **options)


def double() -> Any:
    return tiny.pipeline().to(torch.float64)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_latents_and_output_by_hand(name: str) -> None:
    """The model sees faded latents in all rows, and the scheduler steps from there."""
    pipe = tiny.pipeline(scheduler=tiny.scheduler(name)).to(torch.float64)
    ours = drawn(pipe, Fade(latents=0.9, output=1.1))
    scheduler = pipe.scheduler
    text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    scheduler.set_timesteps(4)
    latents = tiny.latents().double() * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            latents = latents * 0.9
            given = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            noise = 1.1 * pipe.unet(given, t, encoder_hidden_states=torch.cat([negative, text])).sample
            without, noise = noise.chunk(2)
            latents = scheduler.step(without + 7.5 * (noise - without), t, latents).prev_sample
    torch.testing.assert_close(ours, latents, **EXACT)


def test_attention_of_the_conditional_rows() -> None:
    pipe = double()
    before, plain = snapshot(pipe), call(pipe)
    torch.testing.assert_close(drawn(pipe, Fade()), plain, **EXACT)
    outs: list[Tensor] = []
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    hook = pipe.unet.get_submodule(name).register_forward_hook(lambda module, args, out: outs.append(out))
    call(pipe, num_inference_steps=1)
    drawn(pipe, Fade(attention=0.5), num_inference_steps=1)
    hook.remove()
    bias = pipe.unet.get_submodule(name).to_out[0].bias
    torch.testing.assert_close(outs[1][1] - bias, (outs[0][1] - bias) / 2, **EXACT)
    torch.testing.assert_close(outs[1][0], outs[0][0], **EXACT)
    assert snapshot(pipe) == before


def test_the_method_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "own-methods.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "class Sharpen" in block)
    scope: dict[str, Any] = {"ac": ac, "Any": Any, "dataclass": dataclass}
    exec(code, scope)
    pipe = double()
    plain = call(pipe)
    torch.testing.assert_close(drawn(pipe, scope["Sharpen"](1.0)), plain, **EXACT)
    assert (drawn(pipe, scope["Sharpen"](2.0)) - plain).abs().max() > 0.05
    for kind in ("pixart_sigma", "flux"):
        pipe = tiny_transformers.pipeline(kind)
        plain = tiny_transformers.call(kind, pipe)
        for factor, same in ((1.0, True), (2.0, False)):
            with ac.control(pipe, scope["Sharpen"](factor)):
                found = tiny_transformers.call(kind, pipe)
            assert torch.allclose(found, plain, atol=1e-4) == same


def test_rules_of_the_engine_hold_for_it() -> None:
    pipe = tiny.pipeline()
    layers = ["up_blocks.1"]
    with pytest.raises(ValueError, match=r"two of the methods edit up_blocks\.1"):
        ac.enable(pipe, Fade(layers=layers), ac.AttentionRegulation(["bag"]))
    with pytest.raises(ValueError, match="ComposableDiffusion does not go together"):
        ac.enable(pipe, Fade(), ac.ComposableDiffusion(["a dog"]))
    with ac.control(pipe, ac.AttentionRegulation(["bag"], layers=layers)):
        inner = drawn(pipe, Fade(attention=0.5, layers=layers))
    assert torch.equal(inner, drawn(pipe, Fade(attention=0.5, layers=layers)))
    with pytest.raises(ValueError, match="Fade is a class; pass an instance"):
        ac.enable(pipe, Fade)


def test_of_a_single_kind_the_innermost_starts() -> None:
    started = []

    class Single(Method):
        single = True

        def start(self, call: Any, sites: Any) -> Run:
            started.append(self)
            return Run()

    pipe, outer, inner = tiny.pipeline(), Single(), Single()
    with pytest.raises(ValueError, match="two of the methods are Single"):
        ac.enable(pipe, outer, inner)
    with ac.control(pipe, outer), ac.control(pipe, inner):
        call(pipe, num_inference_steps=1)
    call(pipe)
    assert started == [inner]


@pytest.mark.parametrize("together", [full(False), True])
def test_a_second_context(together: bool) -> None:
    """Away from nothing but the prompt itself is the plain picture; one graph serves weights that change."""
    pipe = double()
    plain = call(pipe)
    torch.testing.assert_close(drawn(pipe, Away(PROMPT, (0.5,) * 4)), plain, **EXACT)
    assert torch.equal(drawn(pipe, Away("a dog", (0.0,) * 4)), plain)
    others = (
        [ac.AttentionRegulation(["bag"]), ac.EnergyContext(0.02, 0.02), ac.Composition([ac.Edit("a cat", 0.5)])]
        if together
        else []
    )
    method = Away("a dog", (0.0, 0.5, 0.3, 0.0))
    expected = drawn(pipe, method, *others)
    assert (expected - plain).abs().max() > 0.05
    with counted_graphs(pipe) as graphs:
        for _ in range(2):
            torch.testing.assert_close(drawn(pipe, method, *others), expected, rtol=0, atol=1e-6)
    assert len(graphs) == 1


def test_batches_of_different_prompts() -> None:
    pipe = double()
    method = Fade(attention=0.7, latents=0.98)
    prompts = [PROMPT, "the black cat"]
    batch = drawn(pipe, method, prompt=prompts, count=4, num_images_per_prompt=2)
    for index in range(4):
        alone = drawn(pipe, method, prompt=prompts[index // 2], latents=tiny.latents(1, seed=index))
        torch.testing.assert_close(batch[index], alone[0], **EXACT)
