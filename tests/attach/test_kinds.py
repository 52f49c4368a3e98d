"""Every kind of pipeline that methods attach to, and every way in which one is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.attach.attention import key_bias_of
from tests.support import tiny
from tests.support.pipelines import KINDS, OTHER, PROMPT, TARGETS, Peaks, built, call, controlled, picture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT = {"rtol": 0, "atol": 1e-8}  # in float64; in float32 the descent is chaotic, and rounding differs with the batch


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_pipeline(kind: str) -> None:
    """Edited, repeatable, and the plain pipeline's image bit for bit at strength zero and after use."""
    pipe, options, plain = built(kind)

    def once(**method: Any) -> torch.Tensor:
        if not method:
            return call(pipe, **options)
        with ac.control(pipe, ac.AttentionRegulation(TARGETS, **method)):
            return call(pipe, **options)

    edited = once(strength=1.0)
    assert torch.isfinite(edited).all()
    assert (edited - plain).abs().max() > 0.05
    assert torch.equal(once(strength=0.0), plain)
    assert torch.equal(once(edit_steps=0), plain)
    assert torch.equal(once(strength=1.0), edited)
    assert torch.equal(once(), plain)


def test_two_images_per_prompt_equal_each_alone() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    both = controlled(pipe, count=2, num_images_per_prompt=2)
    for index in range(2):
        alone = controlled(pipe, latents=tiny.latents(1, seed=index))
        torch.testing.assert_close(both[index], alone[0], **EXACT)
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_batch_of_different_prompts_equals_each_alone(images: int, guidance: float) -> None:
    """Different words, different numbers of targets, ends of text at different places."""
    pipe = tiny.pipeline().to(torch.float64)
    targets = [["bag"], ["red ball", "dog", "cat"]]
    options = {"guidance_scale": guidance, "num_images_per_prompt": images}
    batch = controlled(pipe, targets, prompt=[PROMPT, OTHER], count=2 * images, **options)
    for index in range(2 * images):
        which = index // images
        alone = controlled(
            pipe,
            targets[which],
            prompt=[PROMPT, OTHER][which],
            latents=tiny.latents(1, seed=index),
            guidance_scale=guidance,
        )
        torch.testing.assert_close(batch[index], alone[0], **EXACT)


def test_batch_with_one_list_of_targets_for_every_prompt() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    prompts = ["a bag and an apple", "an apple of the black bag"]
    batch = controlled(pipe, TARGETS, prompt=prompts, count=2)
    alone = controlled(pipe, TARGETS, prompt=prompts[1], latents=tiny.latents(1, seed=1))
    torch.testing.assert_close(batch[1], alone[0], **EXACT)


def test_guidance_off_edits_every_row() -> None:
    pipe = tiny.pipeline()
    plain = call(pipe, guidance_scale=1.0, count=2, num_images_per_prompt=2)
    edited = controlled(pipe, guidance_scale=1.0, count=2, num_images_per_prompt=2)
    assert (plain - edited).abs().amax((1, 2, 3)).min() > 0.05


def test_guidance_ended_by_a_callback() -> None:
    """diffusers' dynamic guidance: the batch halves in the middle of the call."""
    pipe = tiny.pipeline()

    def end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    options = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    short, long = (controlled(pipe, edit_steps=steps, **options) for steps in (2, 4))
    assert torch.isfinite(long).all()
    assert not torch.equal(short, long)


def test_negative_prompt() -> None:
    pipe = tiny.pipeline()
    plain = call(pipe, negative_prompt="two dog")
    assert (controlled(pipe, negative_prompt="two dog") - plain).abs().max() > 0.05


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_prompt_embeddings_with_token_ids(guidance: float) -> None:
    """The same as the text where nothing depends on its end."""
    pipe = tiny.pipeline()
    positive, negative = pipe.encode_prompt([PROMPT, OTHER], "cpu", 1, True)
    embeddings = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    ids, words = [[2, 5], [2, 3, 6]], [TARGETS, ["red ball", "dog"]]
    options: dict[str, Any] = {"guidance_scale": guidance, "count": 2}
    with ac.control(pipe, ac.AttentionRegulation(ids, pin_special=False)):
        given = call(pipe, **embeddings, **options)
    with ac.control(pipe, ac.AttentionRegulation(words, pin_special=False)):
        encoded = call(pipe, prompt=[PROMPT, OTHER], **options)
    assert torch.equal(given, encoded)
    pinned = controlled(pipe, ids, **embeddings, **options)
    assert not torch.equal(pinned, given)


def test_prompt_embeddings_of_sdxl() -> None:
    pipe = tiny.pipeline("StableDiffusionXLPipeline", "sdxl")
    positive, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT)
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    with ac.control(pipe, ac.AttentionRegulation([2, 5], pin_special=False)):
        by_id = call(pipe, prompt=None, **given)
    with ac.control(pipe, ac.AttentionRegulation(TARGETS, pin_special=False)):
        assert torch.equal(by_id, call(pipe))


def test_words_need_text() -> None:
    pipe = tiny.pipeline()
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    with pytest.raises(ValueError, match="'bag'.*prompt_embeds.*pass token ids"):
        controlled(pipe, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative)


def test_words_need_a_context_as_long_as_the_tokenizer_makes_it() -> None:
    pipe = tiny.pipeline()
    encode = pipe.encode_prompt

    def long(*args: Any, **kwargs: Any) -> Any:
        return tuple(torch.cat([x, x], 1) for x in encode(*args, **kwargs))

    pipe.encode_prompt = long
    with pytest.raises(ValueError, match=r"context has 32 tokens and the tokenizer makes 16.*pass token ids"):
        controlled(pipe)
    assert torch.isfinite(controlled(pipe, [2, 5, 20])).all()
    assert pipe.encode_prompt is long


@pytest.mark.parametrize("size", [(32, 48), (40, 32), (34, 32)])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_sizes_that_are_not_square(kind: str, size: tuple[int, int]) -> None:
    """Also 34x32 latents, whose 17x16 and 9x8 grids are rounded up."""
    pipe = tiny.pipeline("StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline", kind)
    options: dict[str, Any] = {"size": size}
    if size[0] % 4 == 0:
        options |= {"height": size[0] * tiny.SCALE, "width": size[1] * tiny.SCALE}
    else:
        pipe.check_inputs = lambda *args, **kwargs: None  # which refuses pixels that 8 does not divide
        options |= {"height": size[0] * tiny.SCALE, "width": size[1] * tiny.SCALE}
    plain = call(pipe, **options)
    with ac.capture(pipe, TARGETS) as maps:
        edited = controlled(pipe, **options)
    assert edited.shape == (1, 4, *size)
    assert (edited - plain).abs().max() > 0.05
    for name, layer_maps in maps.items():
        factor = 2 if kind == "sd1" and "mid" not in name else 4 if kind == "sd1" else None
        if factor:
            assert layer_maps.shape[-2:] == (-(-size[0] // factor), -(-size[1] // factor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_half_precision(dtype: torch.dtype, kind: str) -> None:
    """The solver works in float32, so the first step stays close to that of the full-precision pipeline."""
    pipe = tiny.pipeline(kind=kind)
    exact, exact_plain = controlled(pipe, num_inference_steps=1), call(pipe, num_inference_steps=1)
    pipe.to(dtype)
    half = controlled(pipe, num_inference_steps=1)
    assert half.dtype == dtype
    assert torch.isfinite(half).all()
    error = (half - exact).float().norm() / exact.norm()
    assert error < (0.05 if dtype == torch.float16 else 0.2)
    assert (exact - exact_plain).norm() / exact.norm() > error
    plain = call(pipe)
    assert torch.equal(controlled(pipe, strength=0.0), plain)


def test_image_to_image_counts_the_steps_that_it_runs() -> None:
    """strength 0.5 runs 4 of 8 steps: half of the schedule that is left is 2 steps."""
    pipe = tiny.pipeline("StableDiffusionImg2ImgPipeline")

    def run(edit_steps: int | float) -> torch.Tensor:
        with ac.control(pipe, ac.AttentionRegulation(TARGETS, edit_steps=edit_steps)):
            return call(pipe, image=picture(), strength=0.5, num_inference_steps=8)

    assert torch.equal(run(0.5), run(2))
    assert not torch.equal(run(2), run(3))
    assert torch.equal(run(1.0), run(4))


def test_several_calls_in_one_control() -> None:
    """Every call starts afresh: its prompt, its step counter, its average."""
    pipe = tiny.pipeline()
    alone = [controlled(pipe, ["bag"], prompt=prompt) for prompt in (PROMPT, "the red bag")]
    with ac.control(pipe, ac.AttentionRegulation(["bag"])):
        together = [call(pipe, prompt=prompt) for prompt in (PROMPT, "the red bag", PROMPT)]
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert torch.equal(together[2], alone[0])


def test_other_pipelines_on_the_same_unet_are_left_alone() -> None:
    import diffusers

    pipe = tiny.pipeline()
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    options = {"prompt": OTHER, "image": picture(), "strength": 0.75}
    plain = call(other, **options)
    with ac.control(pipe, ac.AttentionRegulation(TARGETS, edit_steps=100)):
        edited = call(pipe)
        assert torch.equal(call(other, **options), plain)
        assert torch.equal(call(pipe), edited)
        with ac.control(other, ac.AttentionRegulation(["dog"])):
            assert not torch.equal(call(other, **options), plain)
            assert torch.equal(call(pipe), edited)
        assert torch.equal(call(other, **options), plain)


def test_hand_written_loop() -> None:
    """A loop over the UNet and the scheduler, whose prompt the handle is told, is what the pipeline draws."""
    pipe = tiny.pipeline()

    @torch.no_grad()
    def loop(handle: Any) -> torch.Tensor:
        latents = tiny.latents()
        embeddings, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        handle.begin(prompt=PROMPT, prompt_embeds=embeddings, negative_prompt_embeds=negative)
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps:
            text = torch.cat([negative, embeddings])
            without, noise = pipe.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=text).sample.chunk(2)
            latents = pipe.scheduler.step(without + 7.5 * (noise - without), timestep, latents).prev_sample
        handle.end()
        return latents

    with ac.control(pipe, ac.AttentionRegulation(TARGETS)) as handle:
        by_hand = loop(handle)
    assert torch.equal(by_hand, controlled(pipe))


@pytest.mark.parametrize("kind", ["tensor", "int"])
def test_several_evaluations_at_one_timestep_are_one_step(kind: str) -> None:
    """As pipelines make them that denoise several views, or guide themselves; each with an average of its own."""
    pipe = tiny.pipeline()
    noises = []
    with ac.control(pipe, ac.AttentionRegulation(TARGETS, edit_steps=1)) as handle, torch.no_grad():
        embeddings, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
        handle.begin(prompt=PROMPT, prompt_embeds=embeddings)
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps[:2]:
            for _ in range(2):
                at = timestep if kind == "tensor" else int(timestep)
                noises.append(pipe.unet(tiny.latents(), at, encoder_hidden_states=embeddings).sample)
    with torch.no_grad():
        plain = [pipe.unet(tiny.latents(), t, encoder_hidden_states=embeddings).sample for t in (751, 501)]
    assert [torch.equal(noise, plain[i // 2]) for i, noise in enumerate(noises)] == [False, False, True, True]
    assert torch.equal(noises[0], noises[1])


def test_rows_are_told_by_their_text() -> None:
    """The halves in calls of their own and three rows per image give each row what it gets in one batch."""
    pipe = tiny.pipeline().to(torch.float64)
    embeddings, negative = (x.double() for x in pipe.encode_prompt(PROMPT, "cpu", 1, True))

    def noise(*text: torch.Tensor) -> torch.Tensor:
        with ac.control(pipe, ac.AttentionRegulation(TARGETS)) as handle, torch.no_grad():
            handle.begin(prompt=PROMPT, prompt_embeds=embeddings, negative_prompt_embeds=negative)
            pipe.scheduler.set_timesteps(4)
            t = pipe.scheduler.timesteps[0]
            latents = tiny.latents().double().expand(len(text), -1, -1, -1)
            return pipe.unet(latents, t, encoder_hidden_states=torch.cat(text)).sample

    both = noise(negative, embeddings)
    with torch.no_grad():
        plain = pipe.unet(tiny.latents().double(), 751, encoder_hidden_states=embeddings).sample
    assert (both[1:] - plain).abs().max() > 0.05
    torch.testing.assert_close(noise(negative), both[:1], **EXACT)
    torch.testing.assert_close(noise(embeddings), both[1:], **EXACT)
    for three in ([0, 1, 1], [1, 0, 0], [1, 0, 1]):
        torch.testing.assert_close(noise(*((negative, embeddings)[i] for i in three)), both[three], **EXACT)


def test_texts_changed_beyond_recognition_go_by_their_order() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    embeddings, negative = (x.double() for x in pipe.encode_prompt(PROMPT, "cpu", 1, True))
    latents, text = tiny.latents().double().expand(2, -1, -1, -1), 1.1 * torch.cat([negative, embeddings])
    with torch.no_grad():
        plain = pipe.unet(latents, 751, encoder_hidden_states=text).sample
        with ac.control(pipe, ac.AttentionRegulation(TARGETS)) as handle:
            handle.begin(prompt=PROMPT, prompt_embeds=embeddings, negative_prompt_embeds=negative)
            found = pipe.unet(latents, 751, encoder_hidden_states=text).sample
    torch.testing.assert_close(found[0], plain[0], **EXACT)
    assert (found[1] - plain[1]).abs().max() > 0.05


def test_a_negative_prompt_that_is_the_prompt() -> None:
    """Their text does not tell the rows apart, so their order does: the unconditional ones come first.

    So what the edit changes grows with the scale itself, and not with the scale less one.
    """
    pipe = tiny.pipeline().to(torch.float64)
    options = {"negative_prompt": PROMPT, "num_inference_steps": 1}
    twice, thrice = (
        controlled(pipe, guidance_scale=scale, **options) - call(pipe, guidance_scale=scale, **options)
        for scale in (2.0, 3.0)
    )
    assert twice.abs().max() > 0.01
    torch.testing.assert_close(thrice, 1.5 * twice, **EXACT)


def test_rows_that_nothing_tells_apart_are_refused() -> None:
    pipe = tiny.pipeline()
    embeddings, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    with ac.control(pipe, ac.AttentionRegulation(TARGETS)) as handle, torch.no_grad():
        handle.begin(prompt=PROMPT, prompt_embeds=embeddings, negative_prompt_embeds=negative)
        pipe.scheduler.set_timesteps(4)
        latents = tiny.latents().expand(3, -1, -1, -1)
        with pytest.raises(ValueError, match=r"3 rows for 1 images with guidance, and none of them carries"):
            pipe.unet(latents, 981, encoder_hidden_states=torch.zeros(3, 16, 16))


def test_key_padding_masks() -> None:
    """Under a mask every method does what it does on the text that is left; other masks are refused."""
    pipe = tiny.pipeline().to(torch.float64)
    embeddings = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].double()
    mask = torch.arange(tiny.LENGTH)[None] < 7  # with the end of text

    def noise(method: Any, text: torch.Tensor, mask: Any = None) -> torch.Tensor:
        with ac.control(pipe, method) as handle, torch.no_grad():
            handle.begin(prompt=None, prompt_embeds=text)
            pipe.scheduler.set_timesteps(4)
            t, latents = pipe.scheduler.timesteps[0], tiny.latents().double()
            return pipe.unet(latents, t, encoder_hidden_states=text, encoder_attention_mask=mask).sample

    layers = ac.by_downsampling(2)
    for method in (
        ac.AttentionRegulation([2, 5]),
        ac.AttentionRegulation.paper([2, 5]),
        ac.EnergyContext(0.02, 0.0),
        ac.Composition([ac.Edit("a dog", 0.5)]),
        ac.Composition([ac.Edit("a dog", 0.5, gamma_attn=0.02)]),
        ac.DenseDiffusion({2: torch.eye(8), 5: 1 - torch.eye(8)}, self_strength=0.0),
        Peaks(),
        ac.AttendAndExcite([2, 5], layers=layers, thresholds={}, text_only=False),
    ):
        short = noise(method, embeddings[:, :7])
        if isinstance(method, ac.AttendAndExcite):
            # It shares the masked columns out as well, which are zero: only that it works.
            assert torch.isfinite(noise(method, embeddings, mask)).all()
            continue
        # The UNet's masks are -10000, and edits of another length are as long as the prompt.
        torch.testing.assert_close(noise(method, embeddings, mask), short, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mask_of_diffusers_is_one_in_every_precision(dtype: torch.dtype) -> None:
    mask = (1 - torch.tensor([[[[True, False]]]]).to(dtype)) * -10000.0
    bias = key_bias_of(mask, 2, 2, "attn2")
    assert bias is not None and bias.tolist() == [[0, -torch.inf]] * 2


def test_masks_of_their_own_for_every_image_token_are_refused() -> None:
    pipe = tiny.pipeline()
    attn = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2

    class Masked:
        def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
            q, k, v = attn.to_q(hidden), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
            mask = torch.zeros(1, 1, q.shape[2], k.shape[2])
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return attn.to_out[0](out.transpose(1, 2).flatten(2))

    attn.set_processor(Masked())
    with pytest.raises(ValueError, match="attention mask .* of its own for every image token"):
        controlled(pipe)


def test_grid_too_small_for_a_centre() -> None:
    pipe = tiny.pipeline()
    method = ac.AttentionRegulation(TARGETS, sigma=8.0)
    with pytest.raises(ValueError, match="holds no centre for sigma 8"), ac.control(pipe, method):
        call(pipe)


@pytest.mark.parametrize("processor", ["AttnProcessor", "SlicedAttnProcessor"])
def test_processors_that_never_make_the_attention_call_are_refused(processor: str) -> None:
    """In `enable`, with the layer's name and a remedy that works."""
    from diffusers.models import attention_processor

    pipe = tiny.pipeline()
    edited = controlled(pipe)
    cls = getattr(attention_processor, processor)
    pipe.unet.set_attn_processor(cls(1) if processor == "SlicedAttnProcessor" else cls())
    with pytest.raises(ValueError, match=rf"down_blocks\.1.* uses {processor}, .*set_attn_processor\(AttnProcessor2_0"):
        controlled(pipe)
    pipe.unet.set_attn_processor(attention_processor.AttnProcessor2_0())
    assert torch.equal(controlled(pipe), edited)


def test_a_layer_that_never_makes_the_attention_call_is_named() -> None:
    """One whose processor nobody knows, at its first evaluation; nothing of that is left for the next."""
    pipe = tiny.pipeline()
    plain, edited = call(pipe), controlled(pipe)

    class Mine:
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
            return hidden_states

    attn = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    own = attn.processor
    attn.set_processor(Mine())
    message = r"down_blocks\.1\.attentions\.0.* runs Mine, which never calls scaled_dot_product_attention"
    with pytest.raises(RuntimeError, match=message), ac.capture(pipe):
        call(pipe)
    for method in (ac.EnergyContext(0.02, 0.02), ac.AttentionRegulation(TARGETS)):
        with pytest.raises(RuntimeError, match=message), ac.control(pipe, method):
            call(pipe)
    attn.set_processor(own)
    assert torch.equal(controlled(pipe), edited)
    assert torch.equal(call(pipe), plain)


def test_unusual_attention_modules() -> None:
    """Group norm, query and key norms, residual connection, rescaling, 4-d input, an image beside the text: none of it
    is ours to repeat, so with an edit that changes nothing the output is the module's own, bit for bit."""
    from diffusers.models.attention_processor import Attention

    from attnctl_fast.attach.attention import Attention as Attending
    from attnctl_fast.attach.call import Site
    from attnctl_fast.attach.intercept import Acts, Place, installed
    from attnctl_fast.attach.layers import Layer
    from attnctl_fast.attach.protocol import Run
    from attnctl_fast.attach.rows import Rows

    torch.manual_seed(0)
    attn = Attention(
        16,
        cross_attention_dim=16,
        heads=2,
        dim_head=8,
        norm_num_groups=4,
        cross_attention_norm="layer_norm",
        qk_norm="layer_norm",
        residual_connection=True,
        rescale_output_factor=1.7,
        bias=True,
    )
    hidden, text = torch.randn(2, 16, 16, 16), torch.randn(2, 9, 16)
    plain = attn(hidden, encoder_hidden_states=text)

    class Same(Run):
        def edit(self, site: Any, attention: Attending) -> torch.Tensor:
            return attention.plain()

    layer = Layer("attn2", "down_blocks.0", 1, attn)
    place = Place(layer)
    place.rows = Rows(2, [1], [0])
    place.now = Acts(edit=(Same(), Site(layer)))
    with torch.no_grad(), installed([place]):
        torch.testing.assert_close(attn(hidden, encoder_hidden_states=text), plain, rtol=0, atol=1e-6)
    assert "forward" not in vars(attn)
