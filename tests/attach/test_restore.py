"""The pipeline is exactly as it was after control: by return, by exception, nested, out of order, and with adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.attach.call import Site
from attnctl_fast.attach.intercept import Acts, Place, installed
from attnctl_fast.attach.layers import Layer
from attnctl_fast.attach.protocol import Run
from tests.support import tiny
from tests.support.pipelines import (
    PROMPT,
    TARGETS,
    Stop,
    call,
    controlled,
    image_embeddings,
    snapshot,
    stop_at,
    with_ip_adapter,
)

REGULATION = ac.AttentionRegulation(TARGETS)


def test_restored_after_use_and_after_an_exception_in_the_middle() -> None:
    pipe = tiny.pipeline()
    plain = call(pipe)
    before = snapshot(pipe)
    with ac.control(pipe, REGULATION):
        assert snapshot(pipe) != before
        edited = call(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)
    with pytest.raises(Stop), ac.control(pipe, REGULATION):
        call(pipe, callback_on_step_end=stop_at(1))
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)
    assert torch.equal(controlled(pipe), edited)


def test_an_exception_does_not_leak_into_the_next_call() -> None:
    pipe = tiny.pipeline()
    edited = controlled(pipe)
    with ac.control(pipe, REGULATION):
        with pytest.raises(Stop):
            call(pipe, callback_on_step_end=stop_at(0))
        assert torch.equal(call(pipe), edited)


def test_a_new_control_on_a_pipeline_whose_attributes_were_set_keeps_them() -> None:
    pipe = tiny.pipeline()
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: encode(*args, **kwargs)
    mine = pipe.encode_prompt
    before = snapshot(pipe)
    controlled(pipe)
    assert pipe.encode_prompt is mine
    assert snapshot(pipe)["pipeline"] == before["pipeline"]


def test_nested_twice() -> None:
    """The inner control acts on the layers that both name; leaving it restores the outer, leaving that the plain."""
    pipe = tiny.pipeline()
    plain, outer, inner = call(pipe), controlled(pipe, ["bag"]), controlled(pipe, ["apple"])
    before = snapshot(pipe)
    with ac.control(pipe, ac.AttentionRegulation(["bag"])):
        between = snapshot(pipe)
        with ac.control(pipe, ac.AttentionRegulation(["apple"])):
            assert torch.equal(call(pipe), inner)
        assert snapshot(pipe) == between
        assert torch.equal(call(pipe), outer)
        with pytest.raises(Stop), ac.control(pipe, ac.AttentionRegulation(["apple"])):
            call(pipe, callback_on_step_end=stop_at(0))
        assert snapshot(pipe) == between
        assert torch.equal(call(pipe), outer)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)


def test_methods_on_different_layers_act_together() -> None:
    pipe = tiny.pipeline()
    down, up = (ac.AttentionRegulation(TARGETS, layers=[name]) for name in ("down_blocks.1", "up_blocks.1"))
    with ac.control(pipe, down, up):
        together = call(pipe)
    with ac.control(pipe, down), ac.control(pipe, up):
        assert torch.equal(call(pipe), together)
    assert torch.equal(together, controlled(pipe))


def test_disabled_twice_and_out_of_order() -> None:
    pipe = tiny.pipeline()
    plain, second_alone = call(pipe), controlled(pipe, ["apple"])
    before = snapshot(pipe)
    first = ac.enable(pipe, ac.AttentionRegulation(["bag"]))
    second = ac.enable(pipe, ac.AttentionRegulation(["apple"]))
    first.disable()
    first.disable()
    assert torch.equal(call(pipe), second_alone)
    second.disable()
    assert snapshot(pipe) == before
    second.disable()
    assert torch.equal(call(pipe), plain)


def test_disabled_within_a_call() -> None:
    """From the callback of the first step on the pipeline is plain, as with one edited step."""
    pipe = tiny.pipeline()
    before = snapshot(pipe)
    handle = ac.enable(pipe, REGULATION)

    def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        handle.disable()
        return tensors

    image = call(pipe, callback_on_step_end=callback)
    assert snapshot(pipe) == before
    assert torch.equal(image, controlled(pipe, edit_steps=1))


BAD_CONTROL = {
    "no method": ((), "no method was given"),
    "not a method": ((["bag"],), "is not a method"),
    "the same layer twice": (
        (REGULATION, ac.AttentionRegulation(["bag"], layers=["down_blocks"])),
        "two of the methods",
    ),
    "no such layer": ((ac.AttentionRegulation(["bag"], layers=["down_blocks.7"]),), "'down_blocks.7' matches no"),
    "one good, one bad": ((REGULATION, ac.AttentionRegulation(["bag"], layers=["nowhere"])), "'nowhere' matches no"),
}


@pytest.mark.parametrize("case", BAD_CONTROL)
def test_bad_control_changes_nothing(case: str) -> None:
    pipe = tiny.pipeline()
    before = snapshot(pipe)
    methods, message = BAD_CONTROL[case]
    with pytest.raises(ValueError, match=message):
        ac.enable(pipe, *methods)
    assert snapshot(pipe) == before


def test_bad_targets_are_reported_before_the_first_step() -> None:
    pipe = tiny.pipeline()
    steps = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    before = snapshot(pipe)
    with (
        pytest.raises(ValueError, match="'zebra', which is not in the prompt"),
        ac.control(pipe, ac.AttentionRegulation("zebra")),
    ):
        call(pipe)
    assert not steps
    assert snapshot(pipe) == before
    hook.remove()


def test_pipelines_without_cross_attention() -> None:
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = diffusers.DDPMPipeline(unet, tiny.scheduler("DDPMScheduler"))
    with pytest.raises(ValueError, match="UNet of DDPMPipeline has no cross-attention layer; use a text-to-image"):
        ac.enable(pipe, REGULATION)
    with pytest.raises(ValueError, match="object has neither a UNet nor a transformer"), ac.capture(object()):
        pass


def test_processors_replaced_while_control_is_on() -> None:
    """The edit stays, and so do the new processors."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    pipe = tiny.pipeline()
    edited = controlled(pipe)
    new = AttnProcessor2_0()
    with ac.control(pipe, REGULATION):
        assert torch.equal(call(pipe), edited)
        pipe.unet.set_attn_processor(new)
        assert torch.equal(call(pipe), edited)
    assert all(processor is new for processor in pipe.unet.attn_processors.values())
    assert "forward" not in vars(pipe.unet)


def test_unet_replaced_while_control_is_on() -> None:
    pipe = tiny.pipeline()
    old = pipe.unet
    with ac.control(pipe, REGULATION):
        pipe.unet = tiny.unet()
        with pytest.raises(RuntimeError, match=r"pipe\.unet was replaced while control was on"):
            call(pipe)
    assert all(type(processor).__name__ == "AttnProcessor2_0" for processor in old.attn_processors.values())
    call(pipe)


def test_a_layers_own_forward_runs_and_stays() -> None:
    pipe, ran = tiny.pipeline(), []
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    inner = attn.forward

    def mine(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return inner(*args, **kwargs)

    attn.forward = mine
    method = ac.EnergyContext(0.02, 0.03)
    with ac.control(pipe, method):
        found = call(pipe)
    assert len(ran) == 4 and vars(attn)["forward"] is mine
    with ac.control(other := tiny.pipeline(), method):
        assert torch.equal(found, call(other))


def test_user_wrappers_put_on_top_stay() -> None:
    pipe = tiny.pipeline()
    plain = call(pipe)
    handle = ac.enable(pipe, REGULATION)
    inner = pipe.encode_prompt

    def mine(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    pipe.encode_prompt = mine
    handle.disable()
    assert pipe.encode_prompt is mine
    assert torch.equal(call(pipe), plain)


# Adapters


def add_lora(pipe: Any) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        pipe.unet.add_adapter(config)


def test_lora_loaded_before_and_after() -> None:
    before, after = tiny.pipeline(), tiny.pipeline()
    without = controlled(before)
    add_lora(before)
    expected = controlled(before)
    assert (expected - without).abs().max() > 0.05
    with ac.control(after, REGULATION):
        assert torch.equal(call(after), without)
        add_lora(after)
        assert torch.equal(call(after), expected)
        after.unet.disable_adapters()
        assert torch.equal(call(after), without)
        after.unet.enable_adapters()
    assert torch.equal(call(after), call(before))
    plain = call(before)
    assert torch.equal(controlled(before, strength=0.0), plain)


def test_ip_adapter_keeps_its_image_part() -> None:
    pipe = with_ip_adapter(tiny.pipeline())
    before = snapshot(pipe)
    plain = call(pipe, **image_embeddings())
    edited = controlled(pipe, **image_embeddings())
    assert snapshot(pipe) == before
    assert (edited - plain).abs().max() > 0.05
    assert torch.equal(controlled(pipe, strength=0.0, **image_embeddings()), plain)
    assert torch.equal(call(pipe, **image_embeddings()), plain)
    # Without its image part it would be the pipeline without the adapter.
    assert (edited - controlled(tiny.pipeline())).abs().max() > 0.05
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(
        controlled(
            pipe.to(torch.float64),
            **{"ip_adapter_image_embeds": [image_embeddings()["ip_adapter_image_embeds"][0].double()]},
        ),
        controlled(tiny.pipeline().to(torch.float64)),
        rtol=0,
        atol=1e-8,
    )


def test_ip_adapter_image_part_is_exact() -> None:
    """With an edit that changes nothing, the layer's output is that of the adapter's own processor, masks included."""
    pipe = with_ip_adapter(tiny.pipeline())
    mask = (torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for masks in ({}, {"cross_attention_kwargs": {"ip_adapter_masks": [mask[:, None, 0]]}}):
        options = image_embeddings() | masks
        plain = call(pipe, **options)
        same = ac.Composition([ac.Edit(PROMPT, 0.5)])
        with ac.control(pipe, same):
            torch.testing.assert_close(call(pipe, **options), plain, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="has an IP-Adapter but was given text and image embeddings in one tensor"):
        attn = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
        place = Place(layer := Layer("here", "", 1, attn))
        place.now = Acts(contexts=((Run(), Site(layer)),))
        with installed([place]):
            attn(torch.zeros(1, 256, 16), encoder_hidden_states=torch.zeros(1, 20, 16))


def test_ip_adapter_under_control() -> None:
    """Its scale can be set, and its weights stay part of the UNet."""
    pipe = with_ip_adapter(tiny.pipeline())
    pipe.set_ip_adapter_scale(0.2)
    expected = controlled(pipe, **image_embeddings())
    pipe.set_ip_adapter_scale(0.7)
    weights = {name: id(parameter) for name, parameter in pipe.unet.named_parameters()}
    keys = list(pipe.unet.state_dict())
    with ac.control(pipe, REGULATION):
        assert {name: id(parameter) for name, parameter in pipe.unet.named_parameters()} == weights
        assert list(pipe.unet.state_dict()) == keys
        pipe.set_ip_adapter_scale(0.2)
        assert torch.equal(call(pipe, **image_embeddings()), expected)
    assert torch.equal(controlled(pipe, **image_embeddings()), expected)


METHODS = {
    "regulation": REGULATION,
    "energy": ac.EnergyContext(0.02, 0.03),
    "composition": ac.Composition([ac.Edit("a red ball", 0.8)]),
    "guidance": ac.AttendAndExcite(TARGETS, layers=ac.by_downsampling(2)),
}


@pytest.mark.parametrize("method", METHODS)
def test_ip_adapter_loaded_and_unloaded_under_control(method: str) -> None:
    pipe, adapted = tiny.pipeline(), with_ip_adapter(tiny.pipeline())
    with ac.control(adapted, METHODS[method]):
        expected = call(adapted, **image_embeddings())
    with ac.control(pipe, METHODS[method]):
        without = call(pipe)
        with_ip_adapter(pipe)
        assert torch.equal(call(pipe, **image_embeddings()), expected)
        pipe.unload_ip_adapter()
        assert torch.equal(call(pipe), without)
        with_ip_adapter(pipe)
    assert snapshot(pipe)["names"] == snapshot(adapted)["names"]
    assert torch.equal(call(pipe, **image_embeddings()), call(adapted, **image_embeddings()))


@pytest.mark.parametrize("method", METHODS)
def test_offloading_turned_on_and_off_under_control(method: str) -> None:
    """accelerate wraps the UNet's forward and its modules' around what stands there."""
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.pipeline()
    plain = call(pipe)
    with ac.control(pipe, METHODS[method]):
        expected = call(pipe)
        accelerate.cpu_offload(pipe.unet, execution_device="cpu")
        assert torch.equal(call(pipe), expected)
    assert torch.equal(call(pipe), plain)
    with ac.control(pipe, METHODS[method]):
        assert torch.equal(call(pipe), expected)
        accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
        assert torch.equal(call(pipe), expected)
    assert torch.equal(call(pipe), plain)
    assert vars(pipe.unet)["forward"].__func__ is type(pipe.unet).forward  # which accelerate leaves there


def test_cpu_offload_hooks_stay() -> None:
    """accelerate's hooks wrap the modules' forward; control works under them and leaves them."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe = tiny.pipeline()
    expected = controlled(pipe)
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Linear):
            add_hook_to_module(module, ModelHook())
    before = snapshot(pipe)
    assert torch.equal(controlled(pipe), expected)
    assert snapshot(pipe) == before


def test_prompt_as_keyword_or_position() -> None:
    pipe = tiny.pipeline()
    with ac.control(pipe, REGULATION):
        positional = pipe(PROMPT, num_inference_steps=4, output_type="latent", latents=tiny.latents()).images
    assert torch.equal(positional, controlled(pipe))
