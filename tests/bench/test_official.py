"""The adapters for the authors' own code, on stand-ins with the same files and signatures, made from `reference`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]

REGULATION = """
import torch
from attnctl_fast import ops, reference
from bench.pictures.attention_layers import keys_values, queries
from attnctl_fast.ops.gaussian_bias import full_basis


class AttnProcessorAttnMapEdit:
    def _found(self, logits, ids):
        side = int(logits.shape[2] ** 0.5)
        rows, columns = ops.basis_shape((side, side))
        drawn = torch.rand(logits.shape[1], rows * columns, len(ids))
        theta = drawn.mT.unflatten(2, (columns, rows)).mT[None]
        basis = full_basis((side, side), None, "official", theta)
        bias, _, _ = reference.regulate_full_logits(logits, torch.tensor(ids), theta, basis)
        torch.set_grad_enabled(True)
        torch.autograd.set_detect_anomaly(True)
        return bias, reference.gaussian_bias(theta, basis)

    def _optimise_attention_maps(self, attention_probs, relevant_attn, target_ids, internals, current_step):
        bias, _ = self._found(relevant_attn.flatten(1, 2)[None], target_ids[0])
        side = relevant_attn.shape[1]
        internals.setdefault("ma_attn", []).append(bias[0].mT.unflatten(1, (side, side)))

    def __call__(self, attn, hidden_states, encoder_hidden_states, target_ids, replace_id, internals, current_step,
                 num_edit_steps):
        q = queries(attn, hidden_states)
        k, v = keys_values(attn, encoder_hidden_states)
        best, first = self._found((attn.scale * q @ k.mT)[1:], target_ids[0])
        bias = torch.cat([torch.zeros_like(best), 0.75 * best + 0.25 * first])
        ids, pinned = torch.tensor(target_ids[0]), torch.tensor([0, replace_id])
        out = reference.biased_attention(q, k, v, bias, ids, pinned, attn.scale)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
"""

ENERGY = """
from attnctl_fast import reference
from bench.pictures.attention_layers import keys_values, queries


class EnergyCrossAttnProcessor:
    def _one(self, attn, hidden, context, gamma_attn, gamma_norm):
        k, v = keys_values(attn, context)
        out, pull = reference.attention_with_context_gradient(queries(attn, hidden), k, v, None, attn.scale)
        out, pull, k = (x.transpose(1, 2).flatten(2) for x in (out, pull, k))
        share = k.square().sum(-1, keepdim=True).softmax(1)
        return attn.to_out[0](out), (gamma_attn * pull - gamma_norm * share * k) @ attn.to_k.weight

    def __call__(self, attn, hidden_states, gamma_attn=0.0, gamma_norm=0.0, encoder_hidden_states=None, alpha=(0.0,),
                 edit_prompt_embeds=None, editing_direction=(False,), gamma_attn_comp=(0.0,), gamma_norm_comp=(0.0,)):
        out, moved = self._one(attn, hidden_states, encoder_hidden_states, gamma_attn, gamma_norm)
        edits = []
        if edit_prompt_embeds is not None:
            other, edit = self._one(attn, hidden_states, edit_prompt_embeds, gamma_attn_comp[0], gamma_norm_comp[0])
            out, edits = (out + alpha[0] * other) / (1 + alpha[0]), [edit]
        return out, moved, edits, None
"""

PIPELINE = """
import math
from pytorch_metric_learning import distances, losses
from attnctl_fast import reference
import utils


class StableDiffusionPipelineX_2:
    @staticmethod
    def _compute_self_attn_loss_cos(attention_maps, attention_maps_t_plus_one, latent_opt_config,
                                    self_attn_score_pairs=None, avg_text_sa_norm=None):
        return utils.loss(attention_maps, avg_text_sa_norm, "cosine", 0.2)

    @staticmethod
    def _compute_self_attn_loss_cos_attn_like(attention_maps, attention_maps_t_plus_one, latent_opt_config,
                                              self_attn_score_pairs=None, avg_text_sa_norm=None):
        variant = {"cos_loss": "normalised_cosine", "abs_loss": "absolute"}[latent_opt_config.loss_type]
        return utils.loss(attention_maps, avg_text_sa_norm, variant, latent_opt_config.row_weight)
"""

UTILS = """
import math
from attnctl_fast import reference


def loss(maps, text, variant, weight):
    words = maps[:, :, 1 : 1 + len(text)].flatten(0, 1).mT[None]
    taps = [math.exp(-1), 1.0, math.exp(-1)]
    taps = [x / sum(taps) for x in taps]
    return reference.similarity_loss(words, text, None, maps.shape[:2], taps, variant, weight)[0]
"""

PROCESSORS = """
from attnctl_fast import reference
from bench.pictures.attention_layers import keys_values, queries


class AttnProcessorX_2:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        k, v = keys_values(attn, encoder_hidden_states)
        out, maps = reference.attention_with_maps(queries(attn, hidden_states), k, v, None, False, attn.scale)
        self.attn_data_x = maps[0].mT
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
"""

TEXT = """
import torch
from transformers.models.clip.modeling_clip import CLIPAttention


class CLIPSdpaAttentionX(CLIPAttention):
    def __init__(self, config):
        super().__init__(config)
        self.dummy = 0

    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False):
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        probabilities = (self.scale * q @ k.mT + causal_attention_mask).softmax(-1)
        if self.dummy == 0:
            self.attn_data_x = probabilities.mean(1)[0]
        self.dummy = 1
        return self.out_proj((probabilities @ v).transpose(1, 2).flatten(2)), None
"""

CLONES = {
    "regulation/attention_regulation/attn_processor.py": REGULATION,
    "energy/modules/models/energy_attention.py": ENERGY,
    "code/models/sd1_5/pipeline_stable_diffusion_x_2.py": PIPELINE,
    "code/models/sd1_5/clip_sdpa_attention_x.py": TEXT,
    "code/models/processors.py": PROCESSORS,
    "code/utils.py": UTILS,
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Any:
    from bench.official import released as official
    from bench.official import repository as official_clone
    from bench.official import tsam as official_tsam

    monkeypatch.setattr(official, "TURNS", 1)
    monkeypatch.setattr(official_clone, "LAYER", official_clone.LAYER._replace(heads=1, width=8))
    monkeypatch.setattr(official_clone, "TEXT_WIDTH", 12)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    monkeypatch.setattr(official_tsam, "TEXT_ENCODER", small)
    yield official


def measured(official: Any, folder: Path | None, path: Path | None = None) -> list[dict[str, Any]]:
    from bench.harness import rows

    log = rows.Log(path, {"run": "now"})
    official.measure(folder, log)
    return log.rows


def test_every_function_is_measured_and_agrees(official: Any, tmp_path: Path) -> None:
    clones = write(tmp_path / "clones", CLONES)
    state = torch.random.get_rng_state()
    found = measured(official, clones, tmp_path / "rows.jsonl")
    assert torch.is_grad_enabled() and not torch.is_anomaly_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == found
    assert [row["repository"] for row in found] == (
        ["attention_regulation"] * 2 + ["Energy-Based-CrossAttention"] * 2 + ["T-SAM"] * 5
    )
    for row in found:
        assert row["kind"] == "official" and row["run"] == "now" and row["commit"] is None
        assert row["dtype"] == "float32"
        assert row["agrees"], row
        assert row["agreement"] == f"equal to {row['difference']:.1e}"
        assert "M256" in row["shape"] or row["function"] == "CLIPSdpaAttentionX.forward"
        for name in ("theirs", "ours", "ratio"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    table = official.official_table(found)
    assert table.count("\n| T-SAM |") == 5 and "Not measured" not in table
    assert "| `AttnProcessorAttnMapEdit.__call__` | layer of AttentionRegulation |" in table


def test_a_clone_is_found_by_its_files(official: Any, tmp_path: Path) -> None:
    clones = write(tmp_path, CLONES)
    assert official.find_clones(clones) == {
        "attention_regulation": clones / "regulation",
        "Energy-Based-CrossAttention": clones / "energy",
        "T-SAM": clones / "code",
    }
    assert official.find_clones(clones / "code") == {"T-SAM": clones / "code"}
    skipped = [row for row in measured(official, clones / "energy") if "agrees" not in row]
    assert {row["repository"] for row in skipped} == {"attention_regulation", "T-SAM"}
    assert all(row["skipped"] == f"no clone in {clones / 'energy'}" for row in skipped)


def test_the_commit_of_a_clone(official: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    energy = write(tmp_path, CLONES) / "energy"
    (energy / ".git").mkdir()
    monkeypatch.setattr(official, "git_state", lambda root: f"commit of {root.name}")
    commits = {row["repository"]: row["commit"] for row in measured(official, energy)}
    assert commits == {
        "attention_regulation": None,
        "Energy-Based-CrossAttention": "commit of energy",
        "T-SAM": None,
    }


def test_another_result_is_reported(official: Any, tmp_path: Path) -> None:
    wrong = ENERGY.replace("return out, moved, edits", "return 1.01 * out, moved, edits")
    found = measured(official, write(tmp_path, {"modules/models/energy_attention.py": wrong}))
    rows = [row for row in found if "agreement" in row]
    assert len(rows) == 2 and not any(row["agrees"] for row in rows)
    assert all(0.005 < row["difference"] < 0.02 and row["agreement"].startswith("differ by 1.0e-02") for row in rows)
    assert "differ by 1.0e-02, more than 1e-03 |" in official.official_table(found)
    for out in ("0 * out / 0", "out[:1]"):
        other = ENERGY.replace("return out, moved, edits", f"return {out}, moved, edits")
        clone = write(tmp_path, {"modules/models/energy_attention.py": other})
        found = measured(official, clone, tmp_path / "rows.jsonl")
        assert [row["difference"] for row in found if "agreement" in row] == [None, None]
        assert not any(row["agrees"] for row in found if "agreement" in row)
    assert "NaN" not in (tmp_path / "rows.jsonl").read_text()


def test_an_error_of_theirs_is_a_row(official: Any, tmp_path: Path) -> None:
    broken = REGULATION.replace(
        "        bias, _, _ =", "        torch.set_grad_enabled(True)\n        exit('gone')\n        bias ="
    )
    found = measured(official, write(tmp_path, {"attention_regulation/attn_processor.py": broken}))
    rows = [row for row in found if row["repository"] == "attention_regulation"]
    assert [row["failed"] for row in rows] == ["SystemExit: gone"] * 2
    assert torch.is_grad_enabled() and not torch.is_anomaly_enabled()
    assert "Not measured, failed: SystemExit: gone" in official.official_table(found)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("code/models/processors.py", "import nowhere_installed\n", "No module named 'nowhere_installed'"),
        ("code/models/processors.py", "from torch import gone_from_torch\n", "cannot import name 'gone_from_torch'"),
        ("code/models/processors.py", None, "models/processors.py is not in the clone"),
        ("code/models/processors.py", "import torch\ntorch.gone_from_torch\n", "has no attribute 'gone_from_torch'"),
    ],
)
def test_what_cannot_be_imported_is_skipped(
    official: Any, tmp_path: Path, file: str, change: str | None, reason: str
) -> None:
    clones = write(tmp_path, CLONES)
    if change is None:
        (clones / file).unlink()
    else:
        (clones / file).write_text(change + CLONES[file], encoding="utf-8")
    found = measured(official, clones)
    (skipped,) = (row for row in found if "agrees" not in row)
    assert skipped["function"] == "AttnProcessorX_2.__call__" and reason in skipped["skipped"]
    assert "Not measured, skipped: " in official.official_table(found)


def test_importing_leaves_no_trace(official: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clones = write(tmp_path, CLONES)
    own = type(sys)("utils")
    monkeypatch.setitem(sys.modules, "utils", own)
    measured(official, clones)  # What they import from elsewhere stays.
    before, path, bytecode = dict(sys.modules), list(sys.path), sys.dont_write_bytecode
    assert all(row["agrees"] for row in measured(official, clones))
    assert sys.modules == before and sys.modules["utils"] is own
    assert sys.path == path and sys.dont_write_bytecode == bytecode
    assert not list(clones.rglob("__pycache__"))


def test_an_installed_package_of_the_same_name_is_told_apart(
    official: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = write(tmp_path / "site", {"models/__init__.py": "", "models/processors.py": ""})
    monkeypatch.syspath_prepend(str(installed))
    clones = write(
        tmp_path / "clones", {name: text for name, text in CLONES.items() if "processors" in name or "code" in name}
    )
    (row,) = (row for row in measured(official, clones) if "AttnProcessorX" in row["function"])
    assert "an installed package that hides the clone's models/processors.py" in row["skipped"]


def test_without_a_clone(official: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{folder} is no clone .* modules/models/energy_attention.py"):
            measured(official, folder)
    found = measured(official, None)
    assert [row["skipped"] for row in found] == ["no --official-dir"] * 3
    expected = "Not measured, skipped: no --official-dir (attention_regulation, Energy-Based-CrossAttention, T-SAM)."
    assert official.official_table(found) == expected
    assert official.official_table([]) == ""


def test_bad_input(official: Any, tmp_path: Path) -> None:
    clones = write(tmp_path, CLONES)
    write(clones / "again", {"modules/models/energy_attention.py": ENERGY})
    with pytest.raises(ValueError, match="again and .*energy are both clones of Energy-Based-CrossAttention"):
        official.find_clones(clones)
