"""The pipeline is exactly as it was after control: by return, by exception, nested, out of order, and with adapters."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_pipeline_kinds import PROMPT, TARGETS, call, controlled

import attnctl_fast as ac

REGULATION = ac.AttentionRegulation(TARGETS)


def snapshot(pipe: Any) -> dict[str, Any]:
    """All of a pipeline that control touches or might: processors by identity, hooks, instance attributes, weights."""
    modules = dict(pipe.unet.named_modules())
    return {
        "processors": {name: id(processor) for name, processor in pipe.unet.attn_processors.items()},
        "children": {name: list(module._modules) for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "hooks": {
            (name, kind): list(hooks)
            for name, module in modules.items()
            for kind, hooks in module.__dict__.items()
            if kind.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        },
        "forwards": {name: module.__dict__.get("forward") for name, module in modules.items()},
        "pipeline": {name: id(value) for name, value in pipe.__dict__.items() if callable(value)},
        "names": sorted(name for name in pipe.__dict__ if not name.startswith("_")),
        "scheduler": sorted(name for name, value in pipe.scheduler.__dict__.items() if callable(value)),
        "requires_grad": {name: p.requires_grad for name, p in pipe.unet.named_parameters()},
        "weights": list(pipe.unet.state_dict()),
        "class": type(pipe),
    }


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        if index == step:
            raise Stop
        return tensors

    return callback


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
    with pytest.raises(ValueError, match="object has no UNet"), ac.capture(object()):
        pass


def test_processors_that_cannot_be_edited() -> None:
    pipe = tiny.pipeline()

    class Mine:
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
            return hidden_states

    pipe.unet.set_attn_processor(Mine())
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="uses Mine, whose attention this library cannot edit"):
        ac.enable(pipe, REGULATION)
    assert snapshot(pipe) == before


def test_processors_replaced_while_control_is_on() -> None:
    """The next call says so, leaving warns, and the new processors stay."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe = tiny.pipeline()
    plain = call(pipe)
    new = AttnProcessor()
    leaving = pytest.warns(RuntimeWarning, match="were replaced under control; the new ones stay")
    with leaving, ac.control(pipe, REGULATION):
        pipe.unet.set_attn_processor(new)
        with pytest.raises(RuntimeError, match=r"down_blocks\.1.* were replaced while control was on.*enter it again"):
            call(pipe)
        with pytest.raises(RuntimeError, match="were replaced while control was on"):
            ac.enable(pipe, ac.AttentionRegulation("bag", layers="mid_block"))
    assert all(processor is new for processor in pipe.unet.attn_processors.values())
    assert "encode_prompt" not in pipe.__dict__
    torch.testing.assert_close(call(pipe), plain, rtol=1e-3, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(controlled(pipe), plain)


def test_unet_replaced_while_control_is_on() -> None:
    pipe = tiny.pipeline()
    old = pipe.unet
    with ac.control(pipe, REGULATION):
        pipe.unet = tiny.unet()
        with pytest.raises(RuntimeError, match=r"pipe\.unet was replaced while control was on"):
            call(pipe)
    assert all(type(processor).__name__ == "AttnProcessor2_0" for processor in old.attn_processors.values())
    call(pipe)


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


def with_ip_adapter(pipe: Any, **options: Any) -> Any:
    pipe.load_ip_adapter(tiny.ip_adapter(pipe), subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def image_embeddings(batch: int = 1) -> dict[str, Any]:
    """Negative and positive embeddings of one image, as the pipeline takes them with guidance on."""
    generator = torch.Generator().manual_seed(4)
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=generator)]}


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
    from attnctl_fast._processors import ControlledProcessor
    from attnctl_fast.methods._base import Edited

    pipe = with_ip_adapter(tiny.pipeline())
    attn = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2

    class Nothing:
        guiding = False

        def at(self, layer: Any) -> Any:
            return self, []

        def conditional(self, rows: int) -> int:
            return 1

        def attend(self, layer: Any, q: Any, k: Any, v: Any, scale: float) -> Any:
            none = torch.zeros(0)
            return Edited(torch.nn.functional.scaled_dot_product_attention(q, k, v), none, none, none)

    torch.manual_seed(0)
    hidden, text, images = torch.randn(2, 256, 16), torch.randn(2, 16, 16), torch.randn(2, 1, 4, 16)
    mask = (torch.rand(1, 1, 32, 32) > 0.5).float()
    for masks in ({}, {"ip_adapter_masks": [mask]}):
        arguments: dict[str, Any] = {"encoder_hidden_states": (text, [images if masks else images[:, 0]])} | masks
        plain = attn(hidden, **arguments)
        own = attn.processor
        processor = ControlledProcessor(own, None, Nothing())  # type: ignore[arg-type]
        processor._set(edited=True)
        attn.set_processor(processor)
        same = attn(hidden, **arguments)
        attn.set_processor(own)
        torch.testing.assert_close(same, plain, rtol=0, atol=1e-6)
        text_only = attn(hidden, encoder_hidden_states=(text, [torch.zeros_like(images[:, 0])]))
        assert (plain - text_only).abs().max() > 0.01
    processor = ControlledProcessor(own, SimpleNamespace(name="here"), Nothing())  # type: ignore[arg-type]
    processor._set(edited=True)
    attn.set_processor(processor)
    with pytest.raises(
        ValueError, match="here has an IP-Adapter but was given text and image embeddings in one tensor"
    ):
        attn(hidden, encoder_hidden_states=torch.cat([text, images[:, 0]], 1))


def test_ip_adapter_under_control() -> None:
    """Its scale can be set, its weights stay part of the UNet, and loading it then is noticed."""
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


def test_ip_adapter_loaded_under_control() -> None:
    pipe = tiny.pipeline()
    with pytest.warns(RuntimeWarning, match="were replaced"), ac.control(pipe, REGULATION):
        call(pipe)
        with_ip_adapter(pipe)
        with pytest.raises(RuntimeError, match="loading an IP-Adapter"):
            call(pipe, **image_embeddings())
    assert type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor).__name__.startswith(
        "IPAdapter"
    )
    expected = with_ip_adapter(tiny.pipeline())
    assert torch.equal(call(pipe, **image_embeddings()), call(expected, **image_embeddings()))
    assert torch.equal(controlled(pipe, **image_embeddings()), controlled(expected, **image_embeddings()))


def test_ip_adapter_unloaded_under_control() -> None:
    pipe = with_ip_adapter(tiny.pipeline())
    with pytest.warns(RuntimeWarning, match="were replaced"), ac.control(pipe, REGULATION):
        pipe.unload_ip_adapter()
        with pytest.raises(RuntimeError, match="were replaced"):
            call(pipe)
    assert torch.equal(call(pipe), call(tiny.pipeline()))


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
