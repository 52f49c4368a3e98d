"""The training script of the shapes model: seeded, resumable, and ending in a pipeline that loads."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from attnctl_fast import shapes
from attnctl_fast.shapes.autoencoder import build_vae, standardise_latents
from attnctl_fast.shapes.captions import caption, describe, prompt
from attnctl_fast.shapes.data import TRAINING_SEEDS, make_examples, training_scene
from attnctl_fast.shapes.train import DEFAULTS, Run, Settings, main

TINY = Settings(examples=24, own_vae=True, vae_steps=2, steps=4, vae_batch=4, batch=4, warmup=2)


def train(out: Path, settings: Settings = TINY, **options: Any) -> tuple[Any, Any]:
    return Run(settings, out, progress=False, **options).train()


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    out = tmp_path_factory.mktemp("whole")
    return (out, *train(out, save_every=2))


def test_a_continued_run_equals_an_uninterrupted_one(whole: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, vae, unet = whole
    stopped = Settings(**{**vars(TINY), "stop": 3})
    _, early = train(tmp_path, stopped)
    assert not same(early, unet)
    vae_again, continued = train(tmp_path, resume=True)
    assert same(vae_again, vae)
    assert same(continued, unet)


def test_a_continued_autoencoder_equals_an_uninterrupted_one(
    whole: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    run = Run(TINY, tmp_path, progress=False, save_every=1)
    update, calls = run._update, Counter[str]()

    def dies(*arguments: Any) -> None:
        calls["update"] += 1
        if calls["update"] == 2:
            raise Killed
        update(*arguments)

    monkeypatch.setattr(run, "_update", dies)
    with pytest.raises(Killed):
        run.train()
    vae = Run(TINY, tmp_path, progress=False, resume=True).train_vae(make_examples(TINY.examples, progress=False))
    assert same(vae, whole[1])


def test_an_earlier_step_comes_from_its_snapshot(whole: tuple[Path, Any, Any], tmp_path: Path) -> None:
    out, _, unet = whole
    stopped = Settings(**{**vars(TINY), "stop": 2})
    _, snapshot = train(out, stopped, resume=True)
    _, early = train(tmp_path, stopped)
    assert same(snapshot, early)
    assert not same(snapshot, unet)
    with pytest.raises(ValueError, match=r"past step 3 and kept no snapshot of it: choose from \[2, 4\]"):
        train(out, Settings(**{**vars(TINY), "stop": 3}), resume=True)


def test_the_log_has_a_line_per_step(whole: tuple[Path, Any, Any]) -> None:
    entries = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter(entry["stage"] for entry in entries) == {"vae": TINY.vae_steps, "unet": TINY.steps}
    assert {"step", "of", "denoising", "token", "pixel", "lr", "seconds"} <= set(entries[-1])


def test_a_folder_with_a_run_is_not_overwritten(whole: tuple[Path, Any, Any]) -> None:
    with pytest.raises(ValueError, match="already holds a run: pass --resume"):
        Run(TINY, whole[0])
    with pytest.raises(ValueError, match=r"other settings .*'lr': \(0.001, 0.5\)"):
        Run(Settings(**{**vars(TINY), "lr": 0.5}), whole[0], resume=True)


@pytest.mark.parametrize("model", DEFAULTS)
def test_the_command_trains_and_writes_a_pipeline(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"examples": 8, "steps": 1, "stop": 0, "batch": 2, "measured": 1, "save-every": 1}
    main(
        [model, "--out", str(tmp_path), *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    )
    assert f"wrote {tmp_path / 'weights'}" in capsys.readouterr().out
    pipe = shapes.load_pipeline(model, weights=tmp_path / "weights")
    image = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    card = json.loads((tmp_path / "weights" / "card.json").read_text(encoding="utf-8"))
    assert card["settings"]["examples"] == 8
    assert card["training"][model]["steps"] == 1
    assert "| `2` | " in (tmp_path / "weights" / "README.md").read_text(encoding="utf-8")
    assert set(card["measured"]["detection"]) == {"1", "2", "3"}


def test_latents_are_standardised_and_decode_as_before() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval().requires_grad_(False)
    images = make_examples(64, progress=False).images.float() / 127.5 - 1
    before = vae.encode(images).latent_dist
    decoded = vae.decode(before.mean).sample
    standardise_latents(vae, images)
    after = vae.encode(images).latent_dist
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)
    # The noise of the posterior is scaled with its mean.
    torch.testing.assert_close(
        (after.std / before.std).mean(dim=(0, 2, 3)), 1 / before.mean.std(dim=(0, 2, 3)), atol=1e-4, rtol=1e-3
    )


def test_training_pictures_are_not_those_of_evaluation() -> None:
    assert TRAINING_SEEDS >= 1_000_000
    counts = Counter(len(training_scene(index).objects) for index in range(1000))
    assert counts == {1: 500, 2: 400, 3: 100}


def test_examples_carry_their_masks_on_the_attention_grid() -> None:
    examples = make_examples(20, progress=False)
    assert examples.images.shape == (20, 3, 64, 64)
    assert examples.masks.shape == (20, 3, 256)
    for index, masks in enumerate(examples.masks):
        touched, objects = masks.sum(dim=-1), len(training_scene(index).objects)
        assert (touched[:objects] >= 12).all()
        assert (touched[objects:] == 0).all()


def test_words_of_captions_point_at_their_objects() -> None:
    scene = shapes.scene_for_seed(0, 3)
    assert prompt(scene).text == scene.prompt
    text, words = describe(scene, [2, 0], [False, True])
    assert text == f"a {scene.nouns[2]} and a {scene.colours[0]} {scene.nouns[0]}"
    assert [(text.split()[word.place], word.object, word.noun) for word in words] == [
        (scene.nouns[2], 2, True),
        (scene.colours[0], 0, False),
        (scene.nouns[0], 0, True),
    ]


def test_captions_name_all_some_or_one_of_the_objects_in_any_order() -> None:
    scene = shapes.scene_for_seed(0, 3)
    drawn = [caption(scene, seed) for seed in range(2000)]
    named = Counter(tuple(word.object for word in words if word.noun) for _, words in drawn)
    assert len(named) == 3 + 6 + 6
    shares = Counter(len(objects) for objects in named.elements())
    for count, share in ((1, 0.3), (2, 0.3), (3, 0.4)):
        assert abs(shares[count] / 2000 - share) < 0.04
    colours = [len(words) / sum(word.noun for word in words) - 1 for _, words in drawn]
    assert abs(sum(colours) / 2000 - 0.85) < 0.02
    assert drawn == [caption(scene, seed) for seed in range(2000)]
