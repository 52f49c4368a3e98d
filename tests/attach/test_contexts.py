"""EnergyContext and Composition on pipelines, against a walk over the layers by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import pytest
import torch

import attnctl_fast as ac
from tests.support import tiny
from tests.support.context_walk import EditWalk, Walk
from tests.support.graphs import counted_graphs
from tests.support.marks import full
from tests.support.pipelines import FEW_KINDS, OTHER, PROMPT, a_mask, built, call, picture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT = {"rtol": 0, "atol": 1e-8}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
ADD = ac.Edit("a red ball", 0.8)
MOVED = ac.Edit("a red ball", 0.8, gamma_attn=0.02, gamma_norm=0.03)
LATE = ac.Edit("the blue dog", 0.3, direction=-1, gamma_attn=0.01, start=0.5)


def double(kind: str = "sd1") -> Any:
    pipe = tiny.pipeline(PIPELINES[kind], kind).to(torch.float64)
    for module in pipe.unet.modules():
        if getattr(module, "upcast_attention", False):
            module.upcast_attention = False  # to float32, which would hide what is compared here
    return pipe


def controlled(pipe: Any, *methods: Any, **options: Any) -> torch.Tensor:
    with ac.control(pipe, *methods):
        return call(pipe, **options)


def encoded(pipe: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]


def edit_walk(pipe: Any, edit: ac.Edit, steps: int = 4, samples: int = 1) -> EditWalk:
    texts = encoded(pipe, edit.prompt).expand(samples, -1, -1)
    weight = edit.direction * edit.weight
    return EditWalk(texts, weight, edit.gamma_attn, edit.gamma_norm, int(edit.start * steps))


CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[ac.Edit, ...]]] = {
    "energy": ((ac.EnergyContext(0.02, 0.03),), {"gammas": [(0.02, 0.03)] * 4}, ()),
    "paper": (
        (ac.EnergyContext.paper(0.02, 0.03, alpha=0.1),),
        {"gammas": [(0.02, 0.03)] * 4, "alpha": 0.1, "convention": "paper"},
        (),
    ),
    "schedule": (
        (ac.EnergyContext(0.02, 0.03, schedule=ac.schedules.step(0.5)),),
        {"gammas": [(0.0, 0.0)] * 2 + [(0.02, 0.03)] * 2},
        (),
    ),
    "layers": (
        (ac.EnergyContext(0.02, 0.03, layers=["down_blocks"]),),
        {"gammas": [(0.02, 0.03)] * 4, "layers": ("down_blocks",)},
        (),
    ),
    "composition": ((ac.Composition([ADD, LATE]),), {"gammas": [(0.0, 0.0)] * 4}, (ADD, LATE)),
    "moved edits": ((ac.Composition([MOVED, LATE]),), {"gammas": [(0.0, 0.0)] * 4}, (MOVED, LATE)),
    "energy and composition": (
        (ac.EnergyContext(0.02, 0.03), ac.Composition([ADD])),
        {"gammas": [(0.02, 0.03)] * 4},
        (ADD,),
    ),
    "everything": (
        (ac.Composition([MOVED, LATE]), ac.EnergyContext(0.02, 0.0)),
        {"gammas": [(0.02, 0.0)] * 4},
        (MOVED, LATE),
    ),
}


# Every case on the first kind; the others differ in what layers are made of.
ELSEWHERE = ("energy", "everything")


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (kind, case) if kind == "sd1" or case in ELSEWHERE else full(kind, case)
        for kind, case in itertools.product(PIPELINES, CASES)
    ],
)
def test_equals_a_walk_by_hand(kind: str, case: str) -> None:
    """Over four steps, so the contexts are also reset at each."""
    pipe = double(kind)
    methods, options, edits = CASES[case]
    plain = call(pipe)
    ours = controlled(pipe, *methods)
    with Walk(edits=[edit_walk(pipe, edit) for edit in edits], **options).on(pipe):
        expected = call(pipe)
    torch.testing.assert_close(ours, expected, **EXACT)
    assert (ours - plain).abs().max() > 0.05


def test_token_weights_and_batches_equal_a_walk_by_hand() -> None:
    pipe = double()
    prompts = [PROMPT, OTHER]  # a bag and an apple / the red ball of two dog, and a black cat
    method = ac.EnergyContext(0.02, 0.03, token_weights=[{"bag": 2.5, 5: 0.0}, {"red ball": 3.0}])
    weights = torch.ones(2, tiny.LENGTH, dtype=torch.float64)
    weights[0, 2], weights[0, 5], weights[1, 2:4] = 2.5, 0.0, 3.0
    options = {"prompt": prompts, "num_images_per_prompt": 2, "count": 4}
    ours = controlled(pipe, method, **options)
    with Walk([(0.02, 0.03)] * 4, token_weight=weights.repeat_interleave(2, 0)).on(pipe):
        torch.testing.assert_close(ours, call(pipe, **options), **EXACT)
    assert not torch.allclose(ours, controlled(pipe, ac.EnergyContext(0.02, 0.03), **options))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_batch_of_prompts_and_edits_equals_each_alone(guidance: float) -> None:
    pipe = double()
    prompts, edits = [PROMPT, OTHER], ["a red ball", "the blue dog"]

    def methods(texts: Any) -> tuple[Any, ...]:
        return ac.EnergyContext(0.02, 0.03), ac.Composition([ac.Edit(texts, 0.7, gamma_attn=0.02), LATE])

    batch = controlled(pipe, *methods(edits), prompt=prompts, num_images_per_prompt=2, count=4, guidance_scale=guidance)
    for index in range(4):
        latents = tiny.latents(1, seed=index)
        which = index // 2
        alone = controlled(
            pipe, *methods(edits[which]), prompt=prompts[which], latents=latents, guidance_scale=guidance
        )
        torch.testing.assert_close(batch[index], alone[0], **EXACT)


def test_guidance_off_has_conditional_rows_only() -> None:
    pipe = double()
    ours = controlled(pipe, ac.EnergyContext(0.02, 0.03), ac.Composition([MOVED]), guidance_scale=1.0)
    with Walk([(0.02, 0.03)] * 4, [edit_walk(pipe, MOVED)], guided=False).on(pipe):
        torch.testing.assert_close(ours, call(pipe, guidance_scale=1.0), **EXACT)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_kind_of_pipeline(kind: str) -> None:
    """Moved or composed, repeatable, and the plain image bit for bit with nothing to do and after use."""
    pipe, options, plain = built(kind)
    for methods in (
        [ac.EnergyContext(0, 0)],
        [ac.Composition([ac.Edit("a dog", 0)])],
        [ac.EnergyContext(0.02, 0.02, schedule=ac.schedules.step(9)), ac.Composition([ac.Edit("a dog", start=9)])],
    ):
        assert torch.equal(controlled(pipe, *methods, **options), plain)
    for methods in ([ac.EnergyContext(0.02, 0.03)], [ac.Composition([ADD])]):
        ours = controlled(pipe, *methods, **options)
        assert torch.isfinite(ours).all()
        assert (ours - plain).abs().max() > 0.02
        assert torch.equal(controlled(pipe, *methods, **options), ours)
    assert torch.equal(call(pipe, **options), plain)


@pytest.mark.parametrize("kind", PIPELINES)
def test_composition_is_affine(kind: str) -> None:
    """The prompt composed with itself is the plain pipeline, and a negation undoes an equal conjunction."""
    pipe = double(kind)
    plain = call(pipe)
    for edits in (
        [ac.Edit(PROMPT, 0.4)],
        [ac.Edit(PROMPT, 3.0)],
        [ac.Edit(PROMPT, 0.4, direction=-1)],
        [ADD, ac.Edit(ADD.prompt, ADD.weight, direction=-1)],
    ):
        torch.testing.assert_close(controlled(pipe, ac.Composition(edits)), plain, **EXACT)


@pytest.mark.parametrize("whose", ["pipeline", "method"])
def test_mask(whose: str) -> None:
    """Of the inpainting pipeline's own call, or the method's."""
    if whose == "pipeline":
        pipe = tiny.pipeline("StableDiffusionInpaintPipeline").to(torch.float64)
        options = {"image": picture(), "mask_image": a_mask(), "height": 64, "width": 64, "strength": 1.0}
        method = ac.EnergyContext(0.02, 0.03)
    else:
        pipe, options = double(), {}
        method = ac.EnergyContext(0.02, 0.03, mask=a_mask()[0, 0])
    composition, walked = ac.Composition([MOVED]), [edit_walk(pipe, MOVED)]
    ours = controlled(pipe, method, composition, **options)
    at_latents = torch.nn.functional.interpolate(a_mask().double(), size=(32, 32))
    with Walk([(0.02, 0.03)] * 4, walked, mask=at_latents).on(pipe):
        expected = call(pipe, **options)
    with Walk([(0.02, 0.03)] * 4, walked).on(pipe):
        unmasked = call(pipe, **options)
    torch.testing.assert_close(ours, expected, **EXACT)
    assert (ours - unmasked).abs().max() > 1e-3


def steps_of_unet(pipe: Any, latents: torch.Tensor, handle: ac.pipeline.Handle | None = None) -> torch.Tensor:
    """Two evaluations of the UNet as a pipeline makes them."""
    pipe.scheduler.set_timesteps(4)
    embeddings, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    text = torch.cat([negative, embeddings])
    if handle is not None:
        handle.begin(prompt=PROMPT, prompt_embeds=embeddings, negative_prompt_embeds=negative)
    outs = [
        pipe.unet(torch.cat([latents] * 2), t, encoder_hidden_states=text).sample for t in pipe.scheduler.timesteps[:2]
    ]
    if handle is not None:
        handle.end()
    return torch.stack(outs)


def test_in_place_and_functional_contexts_are_equal_and_gradients_pass() -> None:
    """Without and with gradients; those of the latents against the walk's."""
    pipe = double()
    pipe.unet.requires_grad_(False)
    methods, options, edits = CASES["everything"]

    def gradient(handle: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        latents = tiny.latents().double().requires_grad_()
        out = steps_of_unet(pipe, latents, handle)
        return out.detach(), torch.autograd.grad(out.square().mean(), latents)[0]

    with ac.control(pipe, *methods) as handle:
        with torch.no_grad():
            in_place = steps_of_unet(pipe, tiny.latents().double(), handle)
        functional, ours = gradient(handle)
        with torch.inference_mode():
            inference = steps_of_unet(pipe, tiny.latents().double(), handle)
    with torch.no_grad():
        walked = [edit_walk(pipe, edit) for edit in edits]
    with Walk(edits=walked, **options).on(pipe):
        out, expected = gradient()
    torch.testing.assert_close(in_place, functional, rtol=0, atol=1e-12)
    torch.testing.assert_close(inference, functional, rtol=0, atol=1e-12)
    torch.testing.assert_close(functional, out, **EXACT)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)
    assert expected.abs().max() > 1e-4


REGULATION = ac.AttentionRegulation(["bag", "apple"], edit_steps=0.5)
COMPILED: dict[str, tuple[Any, ...]] = {
    "energy": (ac.EnergyContext(0.02, 0.02, token_weights={"bag": 2.0}, schedule=ac.schedules.linear(0.0)),),
    "composition": (ac.Composition([ADD, ac.Edit("dog", 0.5, start=0.25)]),),
    "both": (ac.EnergyContext(0.02, 0.02, schedule=ac.schedules.step(0.25)), ac.Composition([MOVED, LATE])),
    "regulation": (REGULATION,),
    "everything": (
        REGULATION,
        ac.EnergyContext(0.02, 0.02, schedule=ac.schedules.step(0.25)),
        ac.Composition([MOVED, LATE]),
    ),
}


@pytest.mark.parametrize(
    ("kind", "case", "place"),
    [
        ("sd1", "energy", "in place"),
        ("sd1", "everything", "wrapped"),
        full("sdxl", "everything", "wrapped"),
        *(full("sd1", case, "wrapped") for case in ("energy", "composition", "both", "regulation")),
    ],
)
def test_one_graph_serves_all_steps_and_calls(kind: str, case: str, place: str) -> None:
    """fullgraph, steps whose gammas and weights change, then once more, then under a new control."""
    pipe = double(kind)
    expected = controlled(pipe, *COMPILED[case])
    with counted_graphs(pipe, place) as graphs:
        with ac.control(pipe, *COMPILED[case]):
            ours = [call(pipe) for _ in range(2)]
        ours.append(controlled(pipe, *COMPILED[case]))
    assert len(graphs) == 1
    for image in ours:
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [case if case == "everything" else full(case) for case in COMPILED])
def test_repeated_blocks_compiled(case: str) -> None:
    """A graph for every size of layer, as in the plain pipeline, not for every layer: of 16 blocks here at 3 sizes."""
    pipe = double("sdxl")
    expected = controlled(pipe, *COMPILED[case])
    with counted_graphs(pipe, "blocks") as graphs:
        call(pipe)
        plain = len(graphs)
        for _ in range(2):
            torch.testing.assert_close(controlled(pipe, *COMPILED[case]), expected, rtol=0, atol=1e-6)
    # The first and the last layer, and edited ones, do something else than the others.
    assert len(graphs) - plain <= plain + 3


@pytest.mark.parametrize("schedule", [ac.schedules.step(2), full(ac.schedules.reverse_step(2))])
def test_a_first_layer_outside_the_graph(schedule: Any) -> None:
    """While the others are compiled: to those a step without update is one with gammas of zero."""
    pipe = double()
    methods = (ac.EnergyContext(0.02, 0.02, schedule=schedule), ac.Composition([MOVED, LATE]))
    expected = controlled(pipe, *methods)
    torch._dynamo.reset()
    for block in (pipe.unet.mid_block, pipe.unet.up_blocks[1]):
        block.compile(backend="eager")
    torch.testing.assert_close(controlled(pipe, *methods), expected, rtol=0, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("outer", [None, [], ["up_blocks"]], ids=["alone", "captured", "captured in part"])
def test_disabling_during_a_call(outer: list[str] | None) -> None:
    """Off from the next step on, whatever else keeps processors there."""
    pipe = tiny.pipeline()
    expected = controlled(pipe, ac.EnergyContext(0.05, 0.05, schedule=ac.schedules.reverse_step(2)))
    handle = ac.enable(pipe, ac.EnergyContext(0.05, 0.05))

    def stop(_: Any, step: int, *__: Any) -> Any:
        if step == 1:
            handle.disable()
        return {}

    with ac.capture(pipe, layers=outer or None) if outer is not None else contextlib.nullcontext():
        assert torch.equal(call(pipe, callback_on_step_end=stop), expected)


@pytest.mark.parametrize("method", [ac.EnergyContext(0.05, 0.05), ac.AttentionRegulation(["bag"])])
def test_gradient_checkpointing_is_refused(method: Any) -> None:
    pipe = tiny.pipeline()
    pipe.unet.enable_gradient_checkpointing()
    with ac.control(pipe, method) as handle:
        with torch.no_grad():
            steps_of_unet(pipe, tiny.latents(), handle)
        with pytest.raises(ValueError, match=r"unet\.disable_gradient_checkpointing"):
            steps_of_unet(pipe, tiny.latents(), handle)


def test_steps_of_an_image_to_image_call_that_starts_at_a_repeated_timestep() -> None:
    pipe = tiny.pipeline("StableDiffusionImg2ImgPipeline", scheduler=tiny.scheduler("PNDMScheduler"))
    for strength, steps in ((0.9, 10), (0.8, 9), (0.7, 8), (1.0, 11)):
        options = {"image": picture(), "num_inference_steps": 10, "strength": strength}
        assert torch.isfinite(controlled(pipe, ac.EnergyContext(0.01, 0.01, schedule=[1.0] * steps), **options)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", PIPELINES)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """The first evaluation is as near to float64 as the plain pipeline's is."""
    pipe = tiny.pipeline(PIPELINES[kind], kind).to(dtype)
    methods = (ac.EnergyContext(0.02, 0.03), ac.Composition([MOVED]))
    errors = []
    for on in (methods, ()):
        images = []
        for precision in (torch.float64, dtype):
            pipe.to(precision)
            with ac.control(pipe, *on) if on else contextlib.nullcontext():
                images.append(call(pipe, num_inference_steps=1).double())
        errors.append((images[0] - images[1]).square().mean().sqrt())
    assert errors[0] < 2 * errors[1]


def test_longer_embeddings_and_edits_of_another_length() -> None:
    pipe = double()
    generator = torch.Generator().manual_seed(0)
    embeddings, negative = torch.randn(2, 1, 25, 16, generator=generator, dtype=torch.float64)
    options = {"prompt": None, "prompt_embeds": embeddings, "negative_prompt_embeds": negative}
    ours = controlled(pipe, ac.EnergyContext(0.02, 0.03, token_weights={20: 2.0}), ac.Composition([MOVED]), **options)
    weights = torch.ones(1, 25, dtype=torch.float64)
    weights[0, 20] = 2.0
    with Walk([(0.02, 0.03)] * 4, [edit_walk(pipe, MOVED)], token_weight=weights).on(pipe):
        torch.testing.assert_close(ours, call(pipe, **options), **EXACT)


def test_regulated_layers_read_moved_contexts_and_are_composed() -> None:
    """At the first regulated layer of the first step, whose queries are the plain pipeline's."""
    pipe = double()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    attn = pipe.unet.get_submodule(name)
    regulation = ac.AttentionRegulation(["bag", "apple"], layers=[name])

    def outputs(*methods: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The layer's first output, and the contexts that all layers read in the first evaluation."""
        outs: list[torch.Tensor] = []
        handle = attn.register_forward_hook(lambda module, args, out: outs.append(out))
        contexts: list[torch.Tensor] = []
        hooks = [
            module.to_v.register_forward_pre_hook(lambda module, args: contexts.append(args[0].clone()))
            for n, module in pipe.unet.named_modules()
            if n.endswith("attn2")
        ]
        with ac.control(pipe, *methods) if methods else contextlib.nullcontext():
            call(pipe, num_inference_steps=1)
        for hook in (handle, *hooks):
            hook.remove()
        return outs[0], contexts

    plain, _ = outputs()
    regulated, _ = outputs(regulation)
    composed, _ = outputs(regulation, ac.Composition([ac.Edit(PROMPT, 0.6)]))
    torch.testing.assert_close(composed, (regulated + 0.6 * plain) / 1.6, **EXACT)
    assert (regulated - plain).abs().max() > 0.05
    _, moved = outputs(ac.EnergyContext(0.02, 0.03))
    both, seen = outputs(regulation, ac.EnergyContext(0.02, 0.03))
    torch.testing.assert_close(both, regulated, **EXACT)
    torch.testing.assert_close(seen[1], moved[1], **EXACT)
    assert (moved[1] - moved[0]).abs().max() > 1e-3


def test_lora_offload_and_ip_adapter() -> None:
    """The key projection is called, whatever it has become; the image part of an IP-Adapter stays."""
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe = double()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
    pipe.unet.requires_grad_(False)
    ours = controlled(pipe, ac.EnergyContext(0.02, 0.03))
    pipe.unet.fuse_lora()
    torch.testing.assert_close(controlled(pipe, ac.EnergyContext(0.02, 0.03)), ours, **EXACT)
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.is_meta
    torch.testing.assert_close(controlled(pipe, ac.EnergyContext(0.02, 0.03)), ours, **EXACT)

    pipe = tiny.pipeline().to(torch.float64)
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter(pipe)])
    pipe.to(torch.float64)
    images = [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)]
    plain = call(pipe, ip_adapter_image_embeds=images)
    same = controlled(pipe, ac.Composition([ac.Edit(PROMPT, 0.6)]), ip_adapter_image_embeds=images)
    torch.testing.assert_close(same, plain, **EXACT)
    moved = controlled(pipe, ac.EnergyContext(0.02, 0.03), ip_adapter_image_embeds=images)
    assert (moved - plain).abs().max() > 0.02
    barely = controlled(pipe, ac.EnergyContext(1e-9, 0), ip_adapter_image_embeds=images)
    torch.testing.assert_close(barely, plain, rtol=0, atol=1e-4)


def test_nested_controls_and_restoring() -> None:
    """The inner one of a kind acts, the other kind of the outer one stays; an exception restores everything."""
    pipe = tiny.pipeline()
    processors = {name: module.processor for name, module in pipe.unet.named_modules() if name.endswith("attn2")}
    energy, composition = ac.EnergyContext(0.02, 0.03), ac.Composition([ADD])
    together = controlled(pipe, energy, composition)
    with ac.control(pipe, composition, ac.EnergyContext(0.5, 0.5)):
        assert torch.equal(controlled(pipe, energy), together)
    with pytest.raises(RuntimeError, match="stop"), ac.control(pipe, energy, composition):

        def stop(*_: Any) -> Any:
            raise RuntimeError("stop")

        call(pipe, callback_on_step_end=stop)
    assert {name: pipe.unet.get_submodule(name).processor for name in processors} == processors
    assert "forward" not in vars(pipe.unet)
    assert "encode_prompt" not in vars(pipe) and "prepare_mask_latents" not in vars(pipe)
    assert torch.equal(controlled(pipe, energy, composition), together)


@pytest.mark.parametrize("place", ["wrapped", "in place"])
def test_a_compiled_unet_is_restored(place: str) -> None:
    pipe = tiny.pipeline()
    if place == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    before, forward = pipe.unet._compiled_call_impl, vars(pipe.unet).get("forward")
    with ac.control(pipe, ac.EnergyContext(0.02, 0.03)):
        pass
    assert pipe.unet._compiled_call_impl is before
    assert vars(pipe.unet).get("forward") is forward


BAD_METHODS = {
    "gamma NaN": (lambda: ac.EnergyContext(torch.nan, 0.1), "gamma_attn is nan; it must be a number at least 0"),
    "gamma below zero": (lambda: ac.EnergyContext(0.1, -1), "gamma_norm is -1"),
    "convention": (lambda: ac.EnergyContext(0.1, 0.1, convention="mine"), "convention is 'mine'"),
    "schedule": (lambda: ac.EnergyContext(0.1, 0.1, schedule="fast"), "schedule is 'fast'; pass one of"),
    "schedule of NaN": (lambda: ac.EnergyContext(0.1, 0.1, schedule=[1, torch.nan]), "schedule gives nan at step 1"),
    "mask in words": (lambda: ac.EnergyContext(0.1, 0.1, mask="left"), "mask is str; it must be a tensor"),
    "mask of 4 axes": (lambda: ac.EnergyContext(0.1, 0.1, mask=torch.ones(1, 1, 8, 8)), r"mask is \(1, 1, 8, 8\)"),
    "mask of NaN": (lambda: ac.EnergyContext(0.1, 0.1, mask=torch.full((8, 8), torch.nan)), "mask holds numbers"),
    "token weights": (lambda: ac.EnergyContext(0.1, 0.1, token_weights=2.0), "token_weights is 2.0; pass a mapping"),
    "token weight": (lambda: ac.EnergyContext(0.1, 0.1, token_weights={"bag": "x"}), r"token_weights\['bag'\] is 'x'"),
    "token": (lambda: ac.EnergyContext(0.1, 0.1, token_weights={-1: 2.0}), "token_weights holds -1; its keys"),
    "empty edit": (lambda: ac.Edit(" "), "the edit prompt is ' '; it must say"),
    "no text": (lambda: ac.Edit([]), r"the edit prompt is \[\]"),
    "direction": (lambda: ac.Edit("a", direction=0), r"direction is 0; it must be \+1"),
    "weight": (lambda: ac.Edit("a", -1.0), "weight is -1.0"),
    "start": (lambda: ac.Edit("a", start=1.5), "start is 1.5"),
    "no edits": (lambda: ac.Composition([]), r"edits is \[\]; pass a list"),
    "edits in words": (lambda: ac.Composition(["a"]), "edits holds 'a'; pass Edit"),
    "cancelling": (lambda: ac.Composition([ac.Edit("a", 1.0, direction=-1)]), "sum to 0"),
}


@pytest.mark.parametrize("case", BAD_METHODS)
def test_bad_methods(case: str) -> None:
    make, message = BAD_METHODS[case]
    with pytest.raises(ValueError, match=message):
        make()


BAD_CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown token": (
        ac.EnergyContext(0.1, 0.1, token_weights={"zebra": 2.0}),
        {},
        "token_weights holds 'zebra', which",
    ),
    "token out of range": (
        ac.EnergyContext(0.1, 0.1, token_weights={99: 2.0}),
        {},
        "token_weights holds the token id 99",
    ),
    "mappings": (ac.EnergyContext(0.1, 0.1, token_weights=[{2: 2.0}] * 3), {}, "3 mappings, but there are 1 prompts"),
    "schedule": (ac.EnergyContext(0.1, 0.1, schedule=[1.0] * 3), {}, "schedule holds 3 numbers, but the call has 4"),
    "callable": (
        ac.EnergyContext(0.1, 0.1, schedule=lambda done: 1 / (done - 0.5) if done != 0.5 else torch.inf),
        {},
        "schedule gives inf at step 2",
    ),
    "masks": (ac.EnergyContext(0.1, 0.1, mask=torch.ones(3, 8, 8)), {}, "mask holds 3 masks for 1 images"),
    "proportions": (
        ac.EnergyContext(0.1, 0.1, mask=torch.ones(8, 9)),
        {},
        "mask is 8x9, which has not the proportions",
    ),
    "texts": (ac.Composition([ac.Edit(["a", "b", "c"])]), {}, "an edit holds 3 texts, but there are 1 prompts"),
    "cancelling": (ac.Composition([ac.Edit("a", 1.0, direction=-1), ac.Edit("b", 1.0, start=0.5)]), {}, "sum to 0"),
    "no encoder": (ac.Composition([ADD]), {"embeddings": 16}, "has no text encoder, which edit prompts need"),
    "width": (ac.Composition([ADD]), {"embeddings": 24}, "edits' context has width 16 but the prompt's 24"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    """Reported by the call, before the scheduler has moved; the pipeline works afterwards."""
    method, options, message = BAD_CALLS[case]
    pipe = tiny.pipeline()
    plain = call(pipe)
    encoder = pipe.text_encoder
    options = dict(options)
    if width := options.pop("embeddings", None):
        options = {
            "prompt": None,
            "prompt_embeds": torch.zeros(1, 16, width),
            "negative_prompt_embeds": torch.zeros(1, 16, width),
        }
        if width == 16:
            pipe.text_encoder = None
    stepped: list[int] = []
    with pytest.raises(ValueError, match=message), ac.control(pipe, method):
        call(pipe, callback_on_step_end=lambda *_: stepped.append(1), **options)
    pipe.text_encoder = encoder
    assert not stepped
    assert torch.equal(call(pipe), plain)


def test_two_of_a_kind_are_refused() -> None:
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match="two of the methods are EnergyContext"):
        ac.enable(pipe, ac.EnergyContext(0.1, 0.1), ac.EnergyContext(0.1, 0.1, layers=["mid_block"]))
    with pytest.raises(ValueError, match="'nowhere' matches no layer with text"):
        ac.enable(pipe, ac.EnergyContext(0.1, 0.1, layers=["nowhere"]))
    assert "forward" not in vars(pipe.unet)


def test_presets_are_values() -> None:
    assert ac.EnergyContext.official() == ac.EnergyContext(0.01, 0.02)
    paper = ac.EnergyContext.paper(token_weights={"crown": 2.5})
    assert (paper.convention, paper.alpha, paper.token_weights) == ("paper", 1.0, ((("crown", 2.5),),))
    assert hash(paper) != hash(ac.EnergyContext.official())
    assert ac.Composition([ADD]) == ac.Composition(ADD)
    assert dataclasses.replace(paper, gamma_attn=0.5).token_weights == paper.token_weights
    assert dataclasses.replace(ac.Composition([ADD]), layers=["mid_block"]).edits == (ADD,)
    assert dataclasses.replace(ac.Edit(["a", "b"]), weight=2.0).texts == ("a", "b")


def test_schedules() -> None:
    schedules = ac.schedules
    expected = {
        schedules.constant(): [1, 1, 1, 1, 1],
        schedules.step(0.5): [0, 0, 1, 1, 1],
        schedules.step(3): [0, 0, 0, 1, 1],
        schedules.step(0): [1, 1, 1, 1, 1],
        schedules.reverse_step(0.5): [1, 1, 0, 0, 0],
        schedules.linear(0): [1, 0.8, 0.6, 0.4, 0.2],
        schedules.exponential(32): [1, 2, 4, 8, 16],
        (lambda done: done): [0, 0.2, 0.4, 0.6, 0.8],
        (5, 4, 3, 2, 1): [5, 4, 3, 2, 1],
    }
    for schedule, factors in expected.items():
        assert schedules.factors(schedule, 5) == pytest.approx(factors)
    for make, value, message in (
        (schedules.step, 1.5, "start is 1.5"),
        (schedules.reverse_step, -1, "stop is -1"),
        (schedules.linear, torch.nan, "last is nan"),
        (schedules.exponential, 0.0, "last is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(value)
