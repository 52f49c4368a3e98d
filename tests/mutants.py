"""Small faults put into a copy of the tree, one at a time: does a test see each?

    python tests/mutants.py                all of them, two at a time: minutes
    python tests/mutants.py -l             their names
    python tests/mutants.py NAME...        those whose names begin so

The exit status is 1 where one survives or cannot be judged. Run it after taking tests away, and give a new one here
what it is there to see.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300
TREE = ("attnctl_fast", "kernels", "tests", "bench", "examples", "pyproject.toml", "setup.py", "CONTRIBUTING.md")


class Mutant(NamedTuple):
    """`before`, which stands in the file once, replaced by `after`; `tests`: what pytest is given, below tests/."""

    name: str
    file: str
    before: str
    after: str
    tests: str


ATTENTION = "ops/test_attention.py"
REGIONS = "methods/test_regions.py"
GROUPED = "ops/test_grouped_attention.py"
CONTEXT = "ops/test_context_update.py"
GUIDED = "ops/test_normalized_guidance.py"
REGULATION = "ops/test_regulation.py"
KEYED = "ops/test_key_bias.py"
MAPS = "ops/test_maps.py"
TILED = "ops/test_tiled.py"
FROM_LSE = "ops/test_maps_from_lse.py"
TRANSFORMERS = "attach/test_transformers.py"
KERNELS = "kernels/test_operations.py"
RESTORE = "attach/test_restore.py"
KINDS = "attach/test_kinds.py"
NAG = "methods/test_nag.py"
TACA = "methods/test_taca.py"
GUIDANCE = "attach/test_guidance.py"
CASES = "attach/test_cases.py"
WALKS = "attach/test_contexts.py"
LAUNCH = "kernels/test_launch.py -k launched_as_triton_would"

HOST = [
    Mutant(
        "launch: a misaligned tensor takes the kernel of an aligned one",
        "kernels/_launch.py",
        "key[place + index] = x.dtype, address & 15 == 0",
        "key[place + index] = x.dtype",
        LAUNCH,
    ),
    Mutant(
        "launch: another configuration takes the same kernel",
        "kernels/_launch.py",
        "key = [kernel.fn, device, tuple(config), *config.values(), tuple(constants), *constants.values(), *arguments]",
        "key = [kernel.fn, device, tuple(constants), *constants.values(), *arguments]",
        LAUNCH,
    ),
    Mutant(
        "launch: hooks are passed over",
        "kernels/_launch.py",
        "if INTERPRETED or _AMD or _watched(kernel):",
        "if INTERPRETED or _AMD:",
        LAUNCH,
    ),
    Mutant(
        "operations: modes do not see them",
        "attnctl_fast/_observed.py",
        "    torch._C._len_torch_dispatch_stack,\n",
        "",
        "ops/test_library.py -k all_who_look",
    ),
    Mutant(
        "ids: those of inference mode are kept",
        "attnctl_fast/_validate.py",
        "with torch.inference_mode(False):",
        "with torch.inference_mode(torch.is_inference_mode_enabled()):",
        "ops/test_library.py -k moved_to_their_device",
    ),
    Mutant(
        "maps: the table of ids outlives a change of them",
        "attnctl_fast/ops/attention_with_maps.py",
        "state = token_ids._version, tokens, stream",
        "state = tokens, stream",
        f"{MAPS} -k table_of_ids",
    ),
]
OPS = [
    Mutant(
        "attention: no gradient through the logsumexp",
        "attnctl_fast/ops/attention.py",
        "wider_v = F.pad(v, (0, 1), value=1.0)",
        "wider_v = F.pad(v, (0, 1), value=0.0)",
        f"{ATTENTION} -k 'test_attention_gradients and eager'",
    ),
    Mutant(
        "attention: sign of the logsumexp's gradient, off the CPU",
        "attnctl_fast/ops/attention.py",
        "        row = row if grad_lse is None else row - grad_lse\n        grad_logits",
        "        row = row if grad_lse is None else row + grad_lse\n        grad_logits",
        f"{ATTENTION} -k the_form_for_accelerators",
    ),
    Mutant(
        "attention: padded targets have a gradient",
        "attnctl_fast/ops/attention.py",
        "return found if ids.ndim == 1 else found.masked_fill((ids < 0)[:, None, :, None], 0.0)",
        "return found",
        f"{ATTENTION} -k 'gradients_with_the_map_in_memory or padded_targets'",
    ),
    Mutant(
        "attention: key_bias forgotten where columns are left out",
        "attnctl_fast/ops/attention.py",
        "return _of_every_row(mask if key_bias is None else mask + key_bias, q)",
        "return _of_every_row(mask, q)",
        f"{KEYED} -k eager",
    ),
    Mutant(
        "attention: no scale where the map is held",
        "attnctl_fast/ops/attention.py",
        "logits = (scale * q) @ k.mT",
        "logits = q @ k.mT",
        f"{ATTENTION} -k gradients_with_the_map_in_memory",
    ),
    Mutant(
        "attention: half precision is not widened",
        "attnctl_fast/ops/attention.py",
        "    q, k, v = widened(q, k, v)\n    if differentiated(q, k, v, bias):",
        "    if differentiated(q, k, v, bias):",
        f"{ATTENTION} -k 'test_attention and float16 and eager'",
    ),
    Mutant(
        "attention: a NaN row is zero",
        "attnctl_fast/ops/attention.py",
        "    if not lse.bool().all():",
        "    if lse.isinf().all():",
        f"{ATTENTION} -k 'a_nan_query and eager'",
    ),
    Mutant(
        "attention: the key's gradient is not made",
        "attnctl_fast/ops/attention.py",
        "grad_k = grad_logits.mT @ q if needed[1] else grad_k",
        "grad_k = 0 * k if needed[1] else grad_k",
        f"{ATTENTION} -k the_form_for_accelerators",
    ),
    Mutant(
        "target_statistics: squares at the plain scale",
        "attnctl_fast/ops/target_statistics.py",
        "attention_without(q, k, k, target_ids, 2 * scale, impl, double_bias)",
        "attention_without(q, k, k, target_ids, scale, impl, double_bias)",
        f"{ATTENTION} -k 'test_statistics_and_merge and eager and 63-77'",
    ),
    Mutant(
        "target_statistics: logits of padded targets are those of token 0",
        "attnctl_fast/ops/target_statistics.py",
        "    return logits.masked_fill((target_ids < 0)[:, None, :, None], -torch.inf)",
        "    return logits",
        f"{REGULATION} -k 'padded_targets and eager'",
    ),
    Mutant(
        "merge_targets: pinned columns moved the wrong way",
        "attnctl_fast/ops/merge_targets.py",
        "restored = torch.exp(pinned_logits - plain_lse) - torch.exp(pinned_logits - lse)",
        "restored = torch.exp(pinned_logits - lse) - torch.exp(pinned_logits - plain_lse)",
        f"{ATTENTION} -k 'test_statistics_and_merge and eager and 63-77'",
    ),
    Mutant(
        "merge_targets: the rest keeps its weight",
        "attnctl_fast/ops/merge_targets.py",
        "rest = rest_out.to(wide) * rest_weight.unsqueeze(-1)",
        "rest = rest_out.to(wide)",
        f"{ATTENTION} -k 'test_merge_is_stable and eager'",
    ),
    Mutant(
        "gaussian_bias: twice as narrow",
        "attnctl_fast/ops/gaussian_bias.py",
        "** 2) / (2 * sigma**2)\n",
        "** 2) / sigma**2\n",
        f"{ATTENTION} -k gaussian_bias_equals",
    ),
    Mutant(
        "gaussian_bias: one centre more",
        "attnctl_fast/ops/gaussian_bias.py",
        "for p in range(1, int(side / step) + 1)]",
        "for p in range(1, int(side / step) + 2)]",
        f"{ATTENTION} -k gaussian_bias_equals",
    ),
    Mutant(
        "gaussian_bias: one axis's basis for both",
        "attnctl_fast/ops/gaussian_bias.py",
        "(theta.flatten(0, 3) @ basis_x.mT)",
        "(theta.flatten(0, 3) @ basis_y.mT)",
        f"{ATTENTION} -k gaussian_bias_equals",
    ),
    Mutant(
        "context_update: token weights forgotten",
        "attnctl_fast/ops/context_update.py",
        "pull = pull * token_weight.unsqueeze(-1).to(pull.dtype)",
        "pull = pull.clone()",
        f"{CONTEXT} -k 'released_convention or test_update_before'",
    ),
    Mutant(
        "context_update: sign of the norms' energy",
        "attnctl_fast/ops/context_update.py",
        "return pull - gamma_norm * energy.softmax(-1)",
        "return pull + gamma_norm * energy.softmax(-1)",
        f"{CONTEXT} -k minus_the_gradient_of_the_energies",
    ),
    Mutant(
        "context_update: conventions swapped",
        "attnctl_fast/ops/context_update.py",
        "energy = square / 2 if halved else square",
        "energy = square if halved else square / 2",
        f"{CONTEXT} -k 'minus_the_gradient_of_the_energies or released_convention'",
    ),
    Mutant(
        "context_update: a hooked projection is read",
        "attnctl_fast/ops/context_update.py",
        "return own and not to_k._forward_hooks and not to_k._forward_pre_hooks",
        "return own",
        f"{CONTEXT} -k 'only_a_bare_linear or called_and_never_read'",
    ),
    Mutant(
        "attention_with_context_gradient: masked columns are updated",
        "attnctl_fast/ops/attention_with_context_gradient.py",
        "return (out, without_masked(update, key_bias)) if held and",
        "return (out, update) if held and",
        f"{KEYED} -k 'eager and (every_column_is_masked or masked_column_is_no or context)'",
    ),
    Mutant(
        "attention_with_context_gradient: sums of the last tile alone",
        "attnctl_fast/ops/attention_with_context_gradient.py",
        "of_columns[b].add_(e.sum(1, keepdim=True))",
        "of_columns[b].copy_(e.sum(1, keepdim=True))",
        f"{CONTEXT} -k 'logits_of_any_size or (test_attention_with_context_gradient and eager)'",
    ),
    Mutant(
        "attention_with_maps: maps of padded tokens are those of token 0",
        "attnctl_fast/ops/attention_with_maps.py",
        "    if token_ids is not None and token_ids.ndim == 2:\n        padded",
        "    if token_ids is not None and token_ids.ndim == 3:\n        padded",
        f"{MAPS} -k 'ids_and_sharp_maps and eager'",
    ),
    Mutant(
        "attention_with_maps: the heads' mean has the gradient of a sum",
        "attnctl_fast/ops/attention_with_maps.py",
        "grad_maps = grad_maps / q.shape[1]",
        "grad_maps = grad_maps * 1.0",
        f"{MAPS} -k 'test_gradients and eager'",
    ),
    Mutant(
        "attention_with_maps: no scale on a query's gradient",
        "attnctl_fast/ops/attention_with_maps.py",
        ".mul_(scale * total)",
        ".mul_(total)",
        f"{MAPS} -k 'test_gradients and eager'",
    ),
    Mutant(
        "grouped_attention: every sample sees what the first one sees",
        "attnctl_fast/ops/grouped_attention.py",
        "first_group = len(allowed) * torch.arange(batch",
        "first_group = 0 * torch.arange(batch",
        f"{GROUPED} -k eager",
    ),
    Mutant(
        "composed_attention: in place where a gradient needs it",
        "attnctl_fast/ops/composed_attention.py",
        "(Tensor.mul_, Tensor.add_) if alone else",
        "(Tensor.mul_, Tensor.add_) if not alone else",
        f"{CONTEXT} -k 'test_composed_attention_gradients'",
    ),
    Mutant(
        "engine: a model that is spread over processes is called",
        "attnctl_fast/attach/engine.py",
        "        self._check_whole(pipe)\n        self.cover(",
        "        self.cover(",
        "attach/test_transformer_hosts.py -k several_processes",
    ),
    Mutant(
        "attention_with_maps: no scale on a key's gradient",
        "attnctl_fast/ops/attention_with_maps.py",
        "share.mT @ queries, alpha=scale)",
        "share.mT @ queries)",
        f"{MAPS} -k 'test_gradients and eager'",
    ),
    Mutant(
        "joint attention: text columns of another place",
        "attnctl_fast/attach/intercept.py",
        "text=(at, text),",
        "text=(0, text),",
        f"{TRANSFORMERS} -k 'models_own and sd3.5'",
    ),
    Mutant(
        "joint attention: the model's own tokens are taken for text",
        "attnctl_fast/attach/layers.py",
        'return self.before if self.text == "first"',
        'return 0 if self.text == "first"',
        f"{TRANSFORMERS} -k 'models_own and auraflow'",
    ),
    Mutant(
        "joint attention: padding that the model leaves out is image",
        "attnctl_fast/attach/attention.py",
        "return torch.where((token_ids < 0) | (token_ids >= tokens), -1, token_ids + start)",
        "return torch.where(token_ids < 0, -1, token_ids + start)",
        f"{TRANSFORMERS} -k 'models_own and lumina2'",
    ),
    Mutant(
        "segments: a template's tokens are counted as the prompt's",
        "attnctl_fast/attach/tokens.py",
        "        end = len(ids) - self.closing - behind",
        "        end = len(ids) - self.closing",
        "attach/test_segments.py -k 'prompts_own and qwen'",
    ),
    Mutant(
        "joint attention: the text's rows are edited too",
        "attnctl_fast/attach/intercept.py",
        'start = at + text if self.layer.text == "first" else 0',
        "start = 0",
        f"{TRANSFORMERS} -k 'an_edit and schnell'",
    ),
    Mutant(
        "joint attention: a key mask that is another row's",
        "attnctl_fast/attach/intercept.py",
        "of_image = mask[..., start : start + 1, :]",
        "of_image = mask[..., start - 1 : start, :]",
        f"{TRANSFORMERS} -k 'models_own and chroma'",
    ),
    Mutant(
        "joint attention: an attention backend hides the call",
        "attnctl_fast/attach/intercept.py",
        "processor._attention_backend = _native()",
        "pass",
        "attach/test_transformer_hosts.py -k 'backend and regulation-flux'",
    ),
    Mutant(
        "attention: padded targets become the last column before the text",
        "attnctl_fast/attach/attention.py",
        "return torch.where((token_ids < 0) | (token_ids >= tokens), -1, token_ids + start)",
        "return torch.where(token_ids >= tokens, -1, token_ids + start)",
        f"{TRANSFORMERS} -k 'padded_targets'",
    ),
    Mutant(
        "capture: joint maps without the model's mask",
        "attnctl_fast/attach/capture.py",
        "bias = None if one.key_bias is None else taken(one.key_bias, self._kept)",
        "bias = None",
        f"{TRANSFORMERS} -k 'models_own and chroma'",
    ),
    Mutant(
        "evaluation: packed latents take the mask's channels with them",
        "attnctl_fast/attach/evaluation.py",
        "return sample[:, :tokens, : self._channels]",
        "return sample[:, :tokens]",
        f"{TRANSFORMERS} -k 'guided and fill'",
    ),
    Mutant(
        "engine: equal timesteps are one evaluation",
        "attnctl_fast/attach/engine.py",
        "new = stepped and self._own_times",
        "new = False",
        f"{TRANSFORMERS} -k 'rounded_timesteps'",
    ),
    Mutant(
        "engine: the negative prompt by itself is taken for the prompt",
        "attnctl_fast/attach/engine.py",
        "if any(text is other for other in self._others):",
        "if False:",
        f"{TRANSFORMERS} -k 'negative_prompt_that_is_the_prompt'",
    ),
    Mutant(
        "regulate: statistics of other strides",
        "attnctl_fast/ops/regulate.py",
        "x.flatten(0, 1).contiguous() for x in given",
        "x.flatten(0, 1) for x in given",
        "ops/test_regulation.py -k 'any_strides and eager'",
    ),
    Mutant(
        "maps_from_lse: sign of the logsumexp's gradient",
        "attnctl_fast/ops/maps_from_lse.py",
        "dlse.neg_() if needed[2]",
        "dlse if needed[2]",
        f"{FROM_LSE} -k 'they_are_attentions or (test_gradients and eager)'",
    ),
    Mutant(
        "maps_from_lse: a row without columns is not zeros",
        "attnctl_fast/ops/maps_from_lse.py",
        "lse = torch.where(lse.isneginf(), torch.inf, lse)",
        "lse = torch.where(lse.isneginf(), 0.0, lse)",
        f"{FROM_LSE} -k 'row_without_columns and eager'",
    ),
    Mutant(
        "grouped_attention: columns that a row does not see are in its call",
        "attnctl_fast/ops/grouped_attention.py",
        "own, seen = pattern_of_row == i, pattern[group_of_column]",
        "own, seen = pattern_of_row == i, patterns.any(0)[group_of_column]",
        f"{GROUPED} -k 'gathered or nobody_sees'",
    ),
    Mutant(
        "grouped_attention: parts that see the same columns overwrite each other's gradients",
        "attnctl_fast/ops/grouped_attention.py",
        "            x[self.samples, :, self.columns] += made",
        "            x[self.samples, :, self.columns] = made",
        f"{GROUPED} -k every_way",
    ),
    Mutant(
        "tiles: the columns of zeros beside the keys are attended to",
        "attnctl_fast/ops/_tiled.py",
        "[0.0] * tokens + [-torch.inf] * spare",
        "[0.0] * (tokens + spare)",
        TILED,
    ),
    Mutant(
        "tiles: what is beside the keys is left as it was in memory",
        "attnctl_fast/ops/_tiled.py",
        "found[:, :, tokens:] = 0.0",
        "pass",
        TILED,
    ),
    Mutant(
        "tiles: the last rows are in none",
        "attnctl_fast/ops/_tiled.py",
        "for start in range(0, rows, step):",
        "for start in range(0, rows - step + 1, step):",
        TILED,
    ),
    Mutant(
        "tiles: a padded target's bias is added to the last column",
        "attnctl_fast/ops/_tiled.py",
        "more, columns = more[:, real], ids[b, real]",
        "columns = ids[b]",
        TILED,
    ),
    Mutant(
        "tiles: a sample without columns is not zeros",
        "attnctl_fast/ops/_tiled.py",
        "return found if key_bias is None else found.masked_fill_(key_bias.isneginf().all(), 0.0)",
        "return found",
        TILED,
    ),
    Mutant(
        "tiles: a masked context's columns beside the keys are attended to",
        "attnctl_fast/ops/_tiled.py",
        "return F.pad(key_bias, (0, spare), value=-torch.inf)",
        "return F.pad(key_bias, (0, spare))",
        TILED,
    ),
    Mutant(
        "tiles: a product for part of a tensor stays where it was made",
        "attnctl_fast/ops/_tiled.py",
        "        out.copy_(found)",
        "        pass",
        TILED,
    ),
    Mutant(
        "composed_attention: the last context replaces the others",
        "attnctl_fast/ops/_tiled.py",
        "beta=min(i, 1), alpha=share",
        "beta=0, alpha=share",
        TILED,
    ),
    Mutant(
        "attention_with_maps: a small map's heads are summed",
        "attnctl_fast/ops/attention_with_maps.py",
        "index_select(3, token_ids).mean(1).mT",
        "index_select(3, token_ids).sum(1).mT",
        f"{MAPS} -k 'few_words and eager'",
    ),
    Mutant(
        "attention_with_context_gradient: a small map's pull is the rows'",
        "attnctl_fast/ops/attention_with_context_gradient.py",
        "torch._softmax(logits.mT.contiguous(), -1, False)",
        "torch._softmax(logits, -1, False).mT",
        f"{CONTEXT} -k logits_of_any_size",
    ),
    Mutant(
        "maps_from_lse: made at once, a row without columns is not zeros",
        "attnctl_fast/ops/maps_from_lse.py",
        "@ q.mT - _subtracted(lse)",
        "@ q.mT - lse.unsqueeze(2)",
        f"{FROM_LSE} -k 'each_their_own and eager'",
    ),
    Mutant(
        "attention_with_context_gradient: the second tile's pull replaces the first's",
        "attnctl_fast/ops/attention_with_context_gradient.py",
        "beta=0 if first else 1",
        "beta=0",
        f"{CONTEXT} -k logits_of_any_size",
    ),
    Mutant(
        "maps_from_lse: the logsumexp is added",
        "attnctl_fast/ops/maps_from_lse.py",
        "queries.mT, beta=-1, alpha=self._scale",
        "queries.mT, beta=1, alpha=self._scale",
        f"{FROM_LSE} -k eager",
    ),
    Mutant(
        "autocast: what is called directly keeps it",
        "attnctl_fast/ops/_library.py",
        "return operation(*values) if autocast() or observed(values)",
        "return operation(*values) if observed(values)",
        f"{ATTENTION} -k autocast_leaves",
    ),
    Mutant(
        "region_attention: masked columns are extremes",
        "attnctl_fast/ops/region_attention.py",
        "low = seen.masked_fill(left_out, torch.inf).amin(-1, keepdim=True)",
        "low = seen.amin(-1, keepdim=True)",
        f"{KEYED} -k 'extremes_of_regions or (masked_column_is_no and region)'",
    ),
    Mutant(
        "region_attention: pulled from zero and not from the lowest",
        "attnctl_fast/ops/region_attention.py",
        "shared, share * (high - low))",
        "shared, share * high)",
        "ops/test_region_attention.py -k 'any_weight and eager'",
    ),
    Mutant(
        "composed_attention: weights are not normalised",
        "attnctl_fast/ops/composed_attention.py",
        "return [x / total for x in weights]",
        "return list(weights)",
        f"{CONTEXT} -k 'composed_attention and eager'",
    ),
    Mutant(
        "composed_attention: the last context's gradient of q alone",
        "attnctl_fast/ops/composed_attention.py",
        "grads[0] = dq if grads[0] is None else grads[0] + dq",
        "grads[0] = dq",
        f"{CONTEXT} -k 'test_composed_attention_gradients'",
    ),
    Mutant(
        "entmax_attention: the gradient takes the threshold for a constant",
        "attnctl_fast/ops/entmax_attention.py",
        "return (slope * (grad - mean),)",
        "return (slope * grad,)",
        "ops/test_entmax_attention.py -k 'gradients and eager'",
    ),
    Mutant(
        "kernel of entmax_attention: Newton's method ends too early",
        "kernels/entmax_attention.py",
        "tl.static_range(STEPS)",
        "tl.static_range(2)",
        "ops/test_entmax_attention.py -k 'sorted_rows and triton'",
    ),
    Mutant(
        "normalized_guidance: the shared columns count for the prompt only",
        "attnctl_fast/ops/normalized_guidance.py",
        "attended.append(out if shared is None else _merged(out, lse, shared))",
        "attended.append(out if shared is None or attended else _merged(out, lse, shared))",
        f"{GUIDED} -k 'shared and eager'",
    ),
    Mutant(
        "normalized_guidance kernel: the bound is of the guided attention",
        "kernels/normalized_guidance.py",
        "tau * tl.sqrt(tl.sum(positive * positive))",
        "tau * tl.sqrt(tl.sum(guided * guided))",
        f"{GUIDED} -k 'released and triton or bounded and triton'",
    ),
    Mutant(
        "smooth_maps: the border is repeated and not reflected",
        "attnctl_fast/ops/smooth_maps.py",
        "reflected = abs(shift) if",
        "reflected = max(shift, 0) if",
        "ops/test_similarity.py -k 'released_kernel or published_one'",
    ),
    Mutant(
        "smooth_maps: the gradient is smoothed as the maps are",
        "attnctl_fast/ops/smooth_maps.py",
        "return [_forward(grad, grid, taps, True)]",
        "return [_forward(grad, grid, taps)]",
        "ops/test_similarity.py -k 'gradcheck or exact_as_plain'",
    ),
    Mutant(
        "similarity_loss: rows counted from one",
        "attnctl_fast/ops/similarity_loss.py",
        "factor = weight * xp.asarray(counted * place, dtype",
        "factor = weight * xp.asarray(counted * (place + 1), dtype",
        "ops/test_similarity.py -k 'published_one'",
    ),
    Mutant(
        "similarity_loss: a gradient of rows that are not normalised",
        "attnctl_fast/ops/similarity_loss.py",
        "slope = (apart - distance * ours) * (inverse",
        "slope = apart * (inverse",
        "ops/test_similarity.py -k 'gradcheck or published_one'",
    ),
    Mutant(
        "regulate: up the gradient",
        "attnctl_fast/ops/regulate.py",
        "thetas.append(shrunk - (step_size * bias_scale) * descent)",
        "thetas.append(shrunk + (step_size * bias_scale) * descent)",
        f"{REGULATION} -k 'eager_equals_the_textbook'",
    ),
    Mutant(
        "regulate: the average weighs the wrong one",
        "attnctl_fast/ops/regulate.py",
        "average = average + ema * (before - average)",
        "average = before + ema * (average - before)",
        f"{REGULATION} -k 'averaged_with_the_step_before'",
    ),
    Mutant(
        "regulate: samples choose their step together, unasked",
        "attnctl_fast/ops/regulate.py",
        '    if select == "batch":',
        '    if select != "batch":',
        f"{REGULATION} -k 'best_step_per_sample'",
    ),
    Mutant(
        "regulate: a step with NaN losses may be kept",
        "attnctl_fast/ops/regulate.py",
        "best = xp.where(xp.isnan(total), xp.inf, total).argmin(0)",
        "best = total.argmin(0)",
        f"{REGULATION} -k 'nan_losses'",
    ),
    Mutant(
        "objective: sign of the mass term's gradient",
        "attnctl_fast/ops/_objective.py",
        "(self._dense_slope * (measured.mean - self.mass))",
        "(self._dense_slope * (self.mass - measured.mean))",
        f"{REGULATION} -k 'loss_and_all_gradients and eager'",
    ),
    Mutant(
        "objective: the quantile is one order statistic",
        "attnctl_fast/ops/_objective.py",
        "following = min(rank + 1, size - 1)",
        "following = rank",
        f"{REGULATION} -k 'quantile_is_torchs'",
    ),
    Mutant(
        "objective: softmax's gradient without its sum",
        "attnctl_fast/ops/_objective.py",
        "gradient -= gradient.sum(1, keepdims=True) * probabilities",
        "gradient -= 0.0 * probabilities",
        f"{REGULATION} -k 'eager_equals_the_textbook'",
    ),
    Mutant(
        "heads: keys that several share have the gradient's pull of one",
        "attnctl_fast/ops/_heads.py",
        "return x.sum(1).unflatten",
        "return x[:, 0].unflatten",
        "ops/test_heads.py -k 'context and eager'",
    ),
]
TRITON = [
    Mutant(
        "grouped_attention: tiles that nothing connects are listed",
        "kernels/grouped_attention.py",
        "met = (held & some) != 0",
        "met = held != 0",
        f"{GROUPED} -k list_the_tiles",
    ),
    Mutant(
        "grouped_attention: a tile that only some rows see is taken for whole",
        "kernels/grouped_attention.py",
        "((held & every) == held)",
        "((held & some) == held)",
        f"{GROUPED} -k 'list_the_tiles or (under_a_mask and triton)'",
    ),
    Mutant(
        "kernel of attention: targets' logits without scale",
        "kernels/attention.py",
        "special = scale * row_products(",
        "special = row_products(",
        f"{KERNELS} -k 'test_families and target_statistics and one'",
    ),
    Mutant(
        "kernel of attention: a column beyond the last",
        "kernels/attention.py",
        "free2 = columns2 < N",
        "free2 = columns2 <= N",
        f"{KERNELS} -k 'test_shapes and attention and 63-77-40'",
    ),
    Mutant(
        "kernel of attention: sums of earlier tiles are not shrunk",
        "kernels/attention.py",
        "total = total * shrink + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        f"{KERNELS} -k 'test_shapes and attention and (64-333 or 16-512)'",
    ),
    Mutant(
        "kernel of attention: padded targets take part",
        "kernels/_tiles.py",
        "mask=slots < T, other=-1)",
        "mask=slots < T, other=-1) * 0",
        f"{KERNELS} -k 'test_families and biased_attention and own'",
    ),
    Mutant(
        "kernel of attention: every sample has the first one's key_bias",
        "kernels/_tiles.py",
        "return tl.load(ptr + b * N + columns, mask=taken, other=0.0)",
        "return tl.load(ptr + columns, mask=taken, other=0.0)",
        f"{KERNELS} -k 'test_families and bias and key and attention'",
    ),
    Mutant(
        "kernel of attention's gradient: the logsumexp's is forgotten",
        "kernels/_attention_gradients.py",
        "        delta -= tl.load(grad_lse_ptr + head + rows, mask=inside, other=0.0)",
        "        delta -= 0.0",
        f"{KERNELS} -k 'test_families and target_statistics and sharp'",
    ),
    Mutant(
        "kernel of attention's gradient: that of the squares halved",
        "kernels/_attention_gradients.py",
        "grad += 2.0 * grad_square * share * (own - square)",
        "grad += grad_square * share * (own - square)",
        f"{KERNELS} -k 'test_families and target_statistics and one'",
    ),
    Mutant(
        "kernel of attention's gradient: pinned columns move",
        "kernels/_attention_gradients.py",
        "grad = weights * (products - delta) - plain * pinned_delta",
        "grad = weights * (products - delta)",
        f"{KERNELS} -k 'test_families and biased_attention and sharp'",
    ),
    Mutant(
        "add_scaled: weights are rounded to float16 as they are",
        "kernels/_tiles.py",
        "    if DOT.is_fp16():",
        "    if DOT.is_fp64():",
        f"{FROM_LSE} -k 'below_what_float16_holds and triton'",
    ),
    Mutant(
        "kernel of maps_from_lse: an id beyond the columns is written",
        "kernels/maps_from_lse.py",
        "mask = (named & (ids < N))[:, None] & (columns < D)[None, :]",
        "mask = named[:, None] & (columns < D)[None, :]",
        f"{FROM_LSE} -k 'written_nowhere'",
    ),
    Mutant(
        "kernel of attention, backward: rows beyond the last have weights",
        "kernels/_short_gradients.py",
        'lse = tl.load(lse_ptr + head + rows, mask=inside, other=float("inf")) * LOG2_E',
        "lse = tl.load(lse_ptr + head + rows, mask=inside, other=0.0) * LOG2_E",
        "ops/test_key_bias.py -k large_bias",
    ),
    Mutant(
        "kernel of maps_from_lse: padded columns are those of token -1",
        "kernels/maps_from_lse.py",
        "return ids, wanted & (ids >= 0)",
        "return ids, wanted",
        f"{FROM_LSE} -k 'ids_and_sharp_maps and triton'",
    ),
    Mutant(
        "kernel of merge_targets: pinned columns moved the wrong way",
        "kernels/merge_targets.py",
        "restored = tl.exp(logits - plain_top) / plain_total - tl.exp(logits - top) / total",
        "restored = tl.exp(logits - top) / total - tl.exp(logits - plain_top) / plain_total",
        f"{KERNELS} -k 'test_families and merge_targets and sharp'",
    ),
    Mutant(
        "kernel of merge_targets: the gradient of rest_lse is not written",
        "kernels/merge_targets.py",
        "        tl.store(grad_rest_lse_ptr + head * M + rows, of_lse, mask=inside)",
        "        tl.store(grad_rest_lse_ptr + head * M + rows, of_lse, mask=inside & (of_lse > 9))",
        f"{KERNELS} -k 'test_families and merge_targets and sharp'",
    ),
    Mutant(
        "kernel of regulated_attention: rows and columns of the grid swapped",
        "kernels/_gaussian.py",
        "    y, x = rows // width, rows % width\n    targets = tl.arange(0, T_BLOCK)\n    bias",
        "    x, y = rows // width, rows % width\n    targets = tl.arange(0, T_BLOCK)\n    bias",
        f"{KERNELS} -k 'test_families and regulated_attention and power'",
    ),
    Mutant(
        "kernel of regulate: the average weighs the wrong one",
        "kernels/regulate.py",
        "bias += ema * (before - bias)",
        "bias += (1 - ema) * (before - bias)",
        f"{KERNELS} -k 'test_regulate and 63 and 2'",
    ),
    Mutant(
        "kernel of context_update: the paper's norms in the released softmax",
        "kernels/context_update.py",
        "    square = factor * _squares(k_ptr, tokens, taken, ",
        "    square = _squares(k_ptr, tokens, taken, ",
        f"{CONTEXT} -k 'test_update_before_the_projection'",
    ),
    Mutant(
        "kernel of similarity_loss: rows counted from one",
        "kernels/similarity.py",
        "factor = weight * rows.to(tl.float32)\n",
        "factor = weight * (rows + 1).to(tl.float32)\n",
        f"{KERNELS} -k 'test_families and similarity_loss_cosine and sharp'",
    ),
    Mutant(
        "kernel of similarity: columns on the diagonal count",
        "kernels/similarity.py",
        "below = counted[:, None] & (rows[None, :] < rows[:, None])",
        "below = counted[:, None] & (rows[None, :] <= rows[:, None])",
        f"{KERNELS} -k 'test_families and similarity_loss_cosine and sharp'",
    ),
]
ATTACH = [
    Mutant(
        "patch: nothing is put back",
        "attnctl_fast/attach/patching.py",
        "        if top is self._value:\n            self._set(self._before)",
        "        if top is self._value:\n            pass",
        f"{RESTORE} -k 'restored_after_use'",
    ),
    Mutant(
        "patch: accelerate keeps ours",
        "attnctl_fast/attach/patching.py",
        '            owner.__dict__["_old_forward"] = self.inner',
        "            pass",
        f"{RESTORE} -k 'offload'",
    ),
    Mutant(
        "patch: one that was covered leaves itself in the other",
        "attnctl_fast/attach/patching.py",
        "above._before, above.inner = self._before, self.inner",
        "above.inner = self.inner",
        "attach/test_guidance_hosts.py -k 'any_order'",
    ),
    Mutant(
        "intercept: a layer's own forward is lost",
        "attnctl_fast/attach/intercept.py",
        '        if self._bound:\n            own["forward"] = self._before',
        "        pass",
        f"{RESTORE} -k 'own_forward'",
    ),
    Mutant(
        "intercept: PyTorch's function is not put back",
        "attnctl_fast/attach/intercept.py",
        "            F.scaled_dot_product_attention = _real",
        "            pass",
        f"{RESTORE} -k 'restored_after_use'",
    ),
    Mutant(
        "intercept: an adapter's images are edited too",
        "attnctl_fast/attach/intercept.py",
        "    _thread.handler = None\n    place, acts",
        "    place, acts",
        f"{RESTORE} -k 'ip_adapter'",
    ),
    Mutant(
        "intercept: the handler stays after an exception",
        "attnctl_fast/attach/intercept.py",
        "waiting, _thread.handler = _thread.handler is not None, before",
        "waiting = _thread.handler is not None",
        f"{KINDS} -k 'never_makes_the_attention_call_is_named'",
    ),
    Mutant(
        "rows: a negative prompt that is the prompt is edited",
        "attnctl_fast/attach/rows.py",
        "whole = whole[:-1] if first else whole[1:]",
        "whole = whole[:-1] if first else whole[:1]",
        f"{KINDS} -k 'negative_prompt_that_is_the_prompt'",
    ),
    Mutant(
        "rows: the unconditional half where order decides",
        "attnctl_fast/attach/rows.py",
        "return Rows(rows, range(samples) if first else range(samples, rows), range(samples))",
        "return Rows(rows, range(samples), range(samples))",
        f"{KINDS} -k 'beyond_recognition'",
    ),
    Mutant(
        "rows: samples of several images counted as prompts",
        "attnctl_fast/attach/rows.py",
        "        each = context[::images, :length].to(text)",
        "        each = context[:, :length].to(text)",
        f"{KINDS} -k 'two_images or batch_of_different_prompts'",
    ),
    Mutant(
        "scheduler: the model's input is not scaled",
        "attnctl_fast/attach/scheduler.py",
        "return None if scaled is one else scaled.reshape(())",
        "return None",
        f"{GUIDANCE} -k 'by_hand and Euler'",
    ),
    Mutant(
        "evaluation: a move scaled the wrong way",
        "attnctl_fast/attach/evaluation.py",
        "self._own(taken(self._sample, chosen))) / factor",
        "self._own(taken(self._sample, chosen))) * factor",
        f"{GUIDANCE} -k 'by_hand and Euler'",
    ),
    Mutant(
        "evaluation: inpainting's mask is moved",
        "attnctl_fast/attach/evaluation.py",
        "self._channels = family.channels(model) if tap.latents is None else tap.latents.shape[1]",
        "self._channels = self._sample.shape[1]",
        f"{GUIDANCE} -k 'test_kind_of_pipeline and 9'",
    ),
    Mutant(
        "guidance: weights stay frozen",
        "attnctl_fast/attach/guidance.py",
        "owner.get_parameter(name).requires_grad_(True)",
        "owner.get_parameter(name).requires_grad_(False)",
        f"{GUIDANCE} -k 'restored_after_an_exception or lora'",
    ),
    Mutant(
        "guidance: what accelerate loaded stays",
        "attnctl_fast/attach/guidance.py",
        "        if hook is not None:\n            hook.post_forward",
        "        if hook is None:\n            hook.post_forward",
        f"{GUIDANCE} attach/test_guidance_hosts.py -k 'offload'",
    ),
    Mutant(
        "guidance: a mask of the keys is forgotten",
        "attnctl_fast/attach/attention.py",
        "self.v, token_ids, scale=scale, key_bias=bias)",
        "self.v, token_ids, scale=scale)",
        f"{KINDS} -k 'key_padding_masks'",
    ),
    Mutant(
        "engine: evaluations counted as steps",
        "attnctl_fast/attach/engine.py",
        "call.step = call.evaluation // order",
        "call.step = call.evaluation",
        f"{GUIDANCE} -k 'by_hand and Heun'",
    ),
    Mutant(
        "engine: a control taken off within a call goes on",
        "attnctl_fast/attach/engine.py",
        "            call.drop(entry)",
        "            pass",
        f"{WALKS} -k 'disabling_during'",
    ),
    Mutant(
        "engine: the outer control edits",
        "attnctl_fast/attach/engine.py",
        'hooks["edit"][-1] if hooks["edit"] else None',
        'hooks["edit"][0] if hooks["edit"] else None',
        f"{RESTORE} -k 'nested'",
    ),
    Mutant(
        "engine: the class's call is not put back",
        "attnctl_fast/attach/engine.py",
        "_classes.pop(kind).undo()",
        "_classes.pop(kind)",
        f"{RESTORE} -k 'restored_after_use'",
    ),
    Mutant(
        "engine: the scheduler's methods are not put back",
        "attnctl_fast/attach/engine.py",
        "            self._tap.remove()",
        "            pass",
        f"{GUIDANCE} -k 'restored_after_an_exception'",
    ),
    Mutant(
        "engine: encode_prompt is not put back",
        "attnctl_fast/attach/engine.py",
        "        for patch in self._patches:\n            patch.undo()\n        if self._tap",
        "        if self._tap",
        f"{RESTORE} -k 'restored_after_use'",
    ),
    Mutant(
        "engine: views share an average",
        "attnctl_fast/attach/engine.py",
        "            call.view += 1",
        "            call.view += 0",
        f"{KINDS} {CASES} -k 'several_evaluations or panorama'",
    ),
    Mutant(
        "engine: a second evaluation starts from the latents as they were",
        "attnctl_fast/attach/engine.py",
        "            evaluation.replay(self._replayed[1])",
        "            pass",
        f"{GUIDANCE} -k 'second_evaluation'",
    ),
    Mutant(
        "prompts: words are found within words",
        "attnctl_fast/attach/tokens.py",
        "inside = marked and not before.endswith(WORD_END) and before not in learned",
        "inside = False",
        "attach/test_prompts.py",
    ),
    Mutant(
        "prompts: padded with the start of text",
        "attnctl_fast/attach/prompts.py",
        "row + [-1] * (longest - len(row))",
        "row + [0] * (longest - len(row))",
        f"{KINDS} -k 'batch_of_different_prompts'",
    ),
    Mutant(
        "capture: summed over the heads",
        "attnctl_fast/attach/capture.py",
        "return total / heads",
        "return total",
        "attach/test_capture.py -k 'conditional_rows_probabilities'",
    ),
    Mutant(
        "attention: a mask of -10000 is a logit",
        "attnctl_fast/attach/attention.py",
        "bias <= -9984",
        "bias <= -10001",
        f"{KINDS} -k 'key_padding_masks'",
    ),
    Mutant(
        "attention: conditional rows merged as the others",
        "attnctl_fast/attach/attention.py",
        "self.rows.merge(conditional.transpose(1, 2), rest.transpose(1, 2))",
        "self.rows.merge(rest.transpose(1, 2), conditional.transpose(1, 2))",
        "methods/test_attention_regulation.py -k 'only_conditional_rows'",
    ),
    Mutant(
        "layers: the text begins where the image ends, which is filled up",
        "attnctl_fast/attach/layers.py",
        "-(-image // self.fill) * self.fill",
        "image",
        f"{TRANSFORMERS} -k 'zimage and square'",
    ),
    Mutant(
        "rows: the negative prompt that is the prompt stands first, whatever the pipeline stacks",
        "attnctl_fast/attach/rows.py",
        "whole = whole[:-1] if first else whole[1:]",
        "whole = whole[1:]",
        f"{TRANSFORMERS} -k 'prompts_in_lists'",
    ),
    Mutant(
        "engine: a list of prompts is read after the pipeline has written into it",
        "attnctl_fast/attach/engine.py",
        "arguments = {name: list(x) if isinstance(x, list) else x for name, x in arguments.items()}",
        "arguments = dict(arguments)",
        f"{TRANSFORMERS} -k 'prompts_in_lists'",
    ),
    Mutant(
        "guidance: the frames of a video are one map",
        "attnctl_fast/methods/map_guidance.py",
        "if not (frames := self.sites[0].frames):",
        "if (frames := self.sites[0].frames) or True:",
        f"{TRANSFORMERS} -k 'guided and wan'",
    ),
    Mutant(
        "regulation: the bias of a video's frames in another order",
        "attnctl_fast/methods/attention_regulation.py",
        "return bias.unflatten(0, (samples, -1)).movedim(1, -2).flatten(-2)",
        "return bias.unflatten(0, (samples, -1)).flip(1).movedim(1, -2).flatten(-2)",
        f"{TRANSFORMERS} -k 'regulation and wan'",
    ),
    Mutant(
        "attention: in bfloat16 a mask is a logit",
        "attnctl_fast/attach/attention.py",
        "bias <= -9984",
        "bias <= -10000",
        f"{KINDS} -k 'mask_of_diffusers'",
    ),
    Mutant(
        "evaluation: four latents in every token",
        "attnctl_fast/attach/evaluation.py",
        "// self._family.cell**2",
        "// 4",
        f"{TRANSFORMERS} -k 'guided and ltx'",
    ),
    Mutant(
        "segments: LTX's T5 does not see its padding",
        "attnctl_fast/attach/segments.py",
        'length, encoders=("text_encoder",))]',
        'length, encoders=("text_encoder",), masked=True)]',
        "attach/test_text_attention.py -k 'encoders and ltx'",
    ),
]
METHODS = [
    Mutant(
        "nag: unconditional rows are guided too",
        "attnctl_fast/methods/nag.py",
        "method, one = self.method, attention.conditional\n",
        "method, one, rows = self.method, attention, attention.rows.first(len(attention.q))\n",
        f"{NAG} -k 'on_a_unet and sd1-options0'",
    ),
    Mutant(
        "nag: the negative prompt's padding counts",
        "attnctl_fast/methods/nag.py",
        ".masked_fill(mask == 0, -torch.inf)",
        ".masked_fill(mask == 0, 0.0)",
        f"{NAG} -k 'on_a_transformer and pixart'",
    ),
    Mutant(
        "nag: what an edit made is lost",
        "attnctl_fast/methods/nag.py",
        "if attention.conditional_set:",
        "if False:",
        f"{NAG} -k 'beside_other and sd1'",
    ),
    Mutant(
        "beside: the second text is modulated by the prompt's embedding",
        "attnctl_fast/attach/beside.py",
        "torch.cat([given[name], second.pooled.to(given[name])])",
        "torch.cat([given[name], self.rows.take(given[name])])",
        f"{NAG} -k 'on_a_transformer and sd3'",
    ),
    Mutant(
        "beside: the second text has the prompt's gate in joined blocks",
        "attnctl_fast/attach/beside.py",
        "second, module._attnctl_kept = _run(module, second, emb=beside.spread(emb[total:]))",
        "second, module._attnctl_kept = _run(module, second, emb=emb[:total])",
        f"{NAG} -k 'on_a_transformer and flux-parts2'",
    ),
    Mutant(
        "beside: the second text sees the first one",
        "attnctl_fast/attach/intercept.py",
        "beside.rows.take(whole)[:, :, image]], 2)",
        "beside.rows.take(whole)], 2)",
        f"{NAG} -k 'on_a_transformer and sd3'",
    ),
    Mutant(
        "taca: rows of the text are sharpened too",
        "attnctl_fast/attach/intercept.py",
        "if attention.untouched and not attention.sharpened:",
        "key = attention.k\n        if attention.untouched and not attention.sharpened:",
        f"{TACA} -k 'full_matrices and sd3-9'",
    ),
    Mutant(
        "pladis: the unconditional rows stay dense",
        "attnctl_fast/methods/pladis.py",
        "        if rows.others:\n",
        "        if False:\n",
        "methods/test_pladis.py -k 'sorted_rows and sd1'",
    ),
    Mutant(
        "taca: it never ends",
        "attnctl_fast/methods/taca.py",
        "self.active = self.used and (now or evaluation.compiled)",
        "self.active = self.used",
        f"{TACA} -k 'full_matrices and flux-1'",
    ),
    Mutant(
        "Regions: the regions' texts see each other",
        "attnctl_fast/methods/regions.py",
        "acting = (regions[:, None] & regions) != 0",
        "acting = ((regions[:, None] & regions) != 0) | (~image & ~image[:, None] & inside & inside[:, None])",
        f"{REGIONS} -k 'released_scheme and sd3'",
    ),
    Mutant(
        "Regions: image tokens outside of all regions leave the prompt",
        "attnctl_fast/methods/regions.py",
        "share[_regions(codes) > 0] = self.method.base",
        "share[codes > 0] = self.method.base",
        f"{REGIONS} -k 'released_scheme and flux'",
    ),
    Mutant(
        "AttentionRegulation: strength does not decay",
        "attnctl_fast/methods/attention_regulation.py",
        "strength = method.strength * method.decay**call.step if",
        "strength = method.strength if",
        "methods/test_attention_regulation.py -k 'equals_the_published_loop'",
    ),
    Mutant(
        "AttentionRegulation: the average is not kept",
        "attnctl_fast/methods/attention_regulation.py",
        "            site.previous[self.call.view] = found.theta",
        "            pass",
        "methods/test_attention_regulation.py -k 'equals_the_published_loop'",
    ),
    Mutant(
        "AttentionRegulation: the same weights at every step",
        "attnctl_fast/methods/attention_regulation.py",
        "scrambled(keys ^ scrambled(evaluation))",
        "scrambled(keys)",
        "methods/test_attention_regulation.py -k 'drawn_uniformly'",
    ),
    Mutant(
        "EnergyContext: a step goes on from the last one's context",
        "attnctl_fast/methods/energy_context.py",
        "        self._context.reset(evaluation.context_of(text))",
        "        pass",
        f"{WALKS} -k 'by_hand and sd1'",
    ),
    Mutant(
        "EnergyContext: one gamma for both energies",
        "attnctl_fast/methods/energy_context.py",
        "gamma_norm=self._now[1],",
        "gamma_norm=self._now[0],",
        f"{WALKS} -k 'by_hand and sd1'",
    ),
    Mutant(
        "EnergyContext: token weights in every row",
        "attnctl_fast/methods/energy_context.py",
        "weights[list(rows.conditional)] = ",
        "weights[:] = ",
        f"{WALKS} -k 'token_weights'",
    ),
    Mutant(
        "Composition: an edit has its neighbour's share",
        "attnctl_fast/methods/composition.py",
        "out = out + self._now[3 + index] * to_edit",
        "out = out + self._now[2 + index] * to_edit",
        f"{WALKS} -k 'by_hand and sd1'",
    ),
    Mutant(
        "Composition: shares of the unconditional rows swapped",
        "attnctl_fast/methods/composition.py",
        "(share * own.to(share.dtype) + (1 - share) * one)",
        "((1 - share) * own.to(share.dtype) + share * one)",
        f"{WALKS} -k 'by_hand and sd1'",
    ),
    Mutant(
        "AttendAndExcite: the start of text takes its share",
        "attnctl_fast/methods/attend_and_excite.py",
        "return [list(range(1, prompts.length - 1))] * prompts.count",
        "return [list(range(prompts.length - 1))] * prompts.count",
        "methods/test_attend_and_excite.py",
    ),
    Mutant(
        "TSAM: lengths are forgotten",
        "attnctl_fast/methods/tsam.py",
        "lengths=prepared.lengths,",
        "lengths=None,",
        "methods/test_tsam.py",
    ),
    Mutant(
        "SynGen: unrelated words attract",
        "attnctl_fast/methods/syngen.py",
        "return attracted.sum((1, 2)) - repelled.sum((1, 2))",
        "return attracted.sum((1, 2)) + repelled.sum((1, 2))",
        "methods/test_syngen.py",
    ),
    Mutant(
        "CONFORM: a map is its own partner",
        "attnctl_fast/methods/conform.py",
        "positive = same & real & ~itself",
        "positive = same & real",
        "methods/test_conform.py",
    ),
    Mutant(
        "FOCUS: subjects attract",
        "attnctl_fast/methods/focus.py",
        "clamp_min(1) + 1 - between",
        "clamp_min(1) + between",
        "methods/test_focus.py",
    ),
    Mutant(
        "FOCUS: a set's logarithm is of all maps",
        "attnctl_fast/methods/focus.py",
        "/ count.clamp_min(2).log()",
        "/ torch.tensor(float(maps.shape[1])).log()",
        "methods/test_focus.py",
    ),
    Mutant(
        "velocity: the correction climbs",
        "attnctl_fast/methods/velocity_guidance.py",
        "return self.method.strength * sigma",
        "return -self.method.strength * sigma",
        "methods/test_velocity_guidance.py -k 'falls'",
    ),
    Mutant(
        "velocity: noise is corrected as a velocity",
        "attnctl_fast/methods/velocity_guidance.py",
        '"epsilon": alpha,',
        '"epsilon": 1.0,',
        "methods/test_velocity_guidance.py -k 'by_hand'",
    ),
    Mutant(
        "a correction is added twice",
        "attnctl_fast/attach/scheduler.py",
        "        self.moved = self.added = None\n        return",
        "        self.moved = None\n        return",
        "attach/test_transformers.py -k 'corrected_velocities'",
    ),
    Mutant(
        "a text beside the prompt's goes through a cache",
        "attnctl_fast/attach/engine.py",
        "                check_uncached(self.model, name)\n",
        "                pass\n",
        "attach/test_transformer_hosts.py -k caches",
    ),
    Mutant(
        "maps of a layer that a cache left out are left out",
        "attnctl_fast/attach/capture.py",
        "            if site.last:",
        "            if site.maps is not None:",
        "attach/test_transformer_hosts.py -k caches",
    ),
    Mutant(
        "rows that were evaluated apart change places",
        "attnctl_fast/attach/evaluation.py",
        "return self.rows.parts[0].merge(first, second)",
        "return self.rows.parts[0].merge(second, first)",
        "methods/test_velocity_guidance.py -k 'by_hand'",
    ),
    Mutant(
        "DenseDiffusion: areas count the wrong way",
        "attnctl_fast/methods/dense_diffusion.py",
        "1 - self.method.area * self._shares",
        "1 + self.method.area * self._shares",
        "methods/test_dense_diffusion.py -k 'equations'",
    ),
    Mutant(
        "DenseDiffusion: the strength does not fall",
        "attnctl_fast/methods/dense_diffusion.py",
        "strength = call.time() ** method.decay if",
        "strength = 1.0 if",
        "methods/test_dense_diffusion.py -k 'equations'",
    ),
    Mutant(
        "ComposableDiffusion: the unconditional prediction is not taken off",
        "attnctl_fast/methods/composable_diffusion.py",
        "total = total + weight * (one - without)",
        "total = total + weight * one",
        "methods/test_composable_diffusion.py -k 'one_by_one'",
    ),
    Mutant(
        "LatentGuidance: up the gradient",
        "attnctl_fast/methods/latent_guidance.py",
        "latents - size * point.gradient, latents)",
        "latents + size * point.gradient, latents)",
        f"{GUIDANCE} -k 'by_hand and DDIM'",
    ),
    Mutant(
        "LatentGuidance: a bound is always checked at once",
        "attnctl_fast/methods/latent_guidance.py",
        "checked = before if self.method.late_check else point",
        "checked = point",
        f"{GUIDANCE} -k 'by_hand and DDIM'",
    ),
    Mutant(
        "LatentGuidance: one sample's NaN stops none",
        "attnctl_fast/methods/latent_guidance.py",
        "moving = finite if chosen is None else finite & chosen",
        "moving = torch.ones_like(finite) if chosen is None else chosen",
        f"{GUIDANCE} -k 'not_finite'",
    ),
    Mutant(
        "LatentGuidance: every step has one size",
        "attnctl_fast/methods/latent_guidance.py",
        "self._sizes = [method.scale * factor for factor in factors]",
        "self._sizes = [method.scale for factor in factors]",
        "methods/test_attend_and_excite.py -k 'same_latents'",
    ),
]
SWEEP = [
    Mutant(
        "a prompt ends the page's data",
        "attnctl_fast/evaluate/report.py",
        'text.replace("<", "\\\\u003c").replace',
        "text.replace",
        "evaluate/test_report.py -k 'one_element'",
    ),
    Mutant(
        "a prompt is markup",
        "attnctl_fast/evaluate/report.js",
        "element.textContent = text;",
        "element.innerHTML = text;",
        "evaluate/test_report.py -k 'hostile and False'",
    ),
    Mutant(
        "one object is enough",
        "attnctl_fast/evaluate/owl.py",
        '"detected": all(there)',
        '"detected": any(there)',
        "evaluate/test_judges.py -k 'known_boxes'",
    ),
    Mutant(
        "boxes of a picture are those of its padded square",
        "attnctl_fast/evaluate/owl.py",
        "torch.tensor([width, height, width, height])",
        "torch.tensor([width, width, width, width])",
        "evaluate/test_judges.py -k 'known_boxes'",
    ),
    Mutant(
        "many seeds of few prompts look sure",
        "attnctl_fast/evaluate/intervals.py",
        "rests[prompt] += one - ratio * other",
        "rests[prompt] += (one - ratio * other) / len(prompts)",
        "evaluate/test_reproduce.py -k 'intervals'",
    ),
    Mutant(
        "a plain picture of another run counts for the overhead",
        "attnctl_fast/evaluate/summary.py",
        '("place", "seed", "run", "rank")',
        '("place", "seed")',
        "evaluate/test_reproduce.py -k 'overhead_is'",
    ),
    Mutant(
        "a set of pictures is not measured again",
        "attnctl_fast/evaluate/judging.py",
        'if marks.get(row["method"]) == row["files"]',
        'if row["method"] in marks',
        "evaluate/test_judges.py -k 'again'",
    ),
]
MUTANTS = (*OPS, *TRITON, *HOST, *ATTACH, *METHODS, *SWEEP)


def misplaced() -> list[str]:
    """Name the mutants whose text does not stand exactly once where they look for it."""
    return [one.name for one in MUTANTS if (ROOT / one.file).read_text(encoding="utf-8").count(one.before) != 1]


def preload() -> None:
    """Import once what every run of pytest would import, but nothing of the tree's."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    for name in ("diffusers", "transformers", "hypothesis"):
        importlib.import_module(name)


def start(mutant: Mutant, tree: Path) -> int:
    """Run the mutant's tests on a tree that has it, in a process of their own, whose number is returned."""
    path = tree / mutant.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutant.before, mutant.after), encoding="utf-8")
    if child := os.fork():
        return child
    with (tree / "said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.chdir(tree)
    sys.path[0] = str(tree)
    tests = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(mutant.tests)]
    try:
        os._exit(pytest.main(["-x", "-q", "--no-header", "-p", "no:xdist", *tests]))
    finally:
        os._exit(os.EX_SOFTWARE)


def finished(running: dict[int, tuple[Mutant, Path, float]]) -> tuple[int, int | None]:
    """Wait for a process; returns its number and exit status, None where it took too long."""
    while True:
        for child, (_, _, begun) in running.items():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return child, os.waitstatus_to_exitcode(status)
            if time.monotonic() - begun > SECONDS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return child, None
        time.sleep(0.05)


def judged(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, str, float]]:
    """Yield each mutant with its verdict and the seconds it took, as they end."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [Path(folder) / str(number) for number in range(jobs)]
        for tree in trees:
            tree.mkdir()
            for name in TREE:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, tree / name)
        waiting, running = list(reversed(mutants)), {}
        while waiting or running:
            while waiting and trees:
                mutant, tree = waiting.pop(), trees.pop()
                running[start(mutant, tree)] = mutant, tree, time.monotonic()
            child, status = finished(running)
            mutant, tree, begun = running.pop(child)
            shutil.copy(ROOT / mutant.file, tree / mutant.file)
            trees.append(tree)
            said = (tree / "said").read_text(encoding="utf-8").strip().splitlines()[-1:]
            # A write outside of a tensor may end the process.
            crashed = dict.fromkeys((-signal.SIGSEGV, -signal.SIGABRT), "caught")
            verdicts = {0: "SURVIVED", 1: "caught", None: "hung", **crashed}
            found = verdicts.get(status, f"CANNOT BE JUDGED: {status} {said}")
            yield mutant, found, time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-l", "--list", action="store_true")
    parser.add_argument("-j", "--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if not options.names or one.name.startswith(tuple(options.names))]
    if options.list:
        print(*(one.name for one in chosen), sep="\n")
        return 0
    if wrong := misplaced():
        parser.error(f"what these replace does not stand there exactly once: {'; '.join(wrong)}")
    preload()
    left = 0
    for mutant, found, seconds in judged(chosen, options.jobs):
        left += found != "caught"
        print(f"{found:10} {seconds:4.0f} s  {mutant.name}", flush=True)
    print(f"{len(chosen) - left} of {len(chosen)} caught")
    return 1 if left else 0


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    sys.exit(main())
