r"""Draw many prompts with several seeds and methods, split over processes, judge the pictures and sum up.

    python -m attnctl_fast.evaluate --model shapes --method plain regulation --seeds 64 --out sweep
    accelerate launch --num_processes 2 -m attnctl_fast.evaluate --model path/or/hub-id \
        --method plain regulation energy --prompts prompts.jsonl --seeds 4 --clip path/to/clip --out sweep

Each process draws its share of the pictures with a pipeline of its own on its own device, one at a time and each from
the noise of its own seed: on one kind of device, with one number of threads, pictures are the same whatever the
number of processes. On a CPU, `accelerate launch --multi_gpu --num_processes 2` starts two.

`--prompts` is a text file with one prompt a line, or with one JSON object a line where prompts have targets, pairs,
groups or seeds of their own: `{"prompt": "a red ball and a dog", "targets": ["ball", "dog"]}`. Without it, `--model
shapes` draws its own scenes of two objects, one for each seed. `--method` takes several methods; `plain` is the
pipeline alone, which the others are compared with on the same prompts and seeds.

The folder `--out` then holds `pictures`, what every process wrote as it went (`results-RANK.jsonl`), and at the end
`results.jsonl`, one row per picture, `summary.json`, and `report.html` to look at. After a kill or an interruption the
same command goes on with what is missing, on any number of processes; other settings are refused, and so is a second
sweep while one is at work in the folder. A picture that cannot be drawn or judged is a row with its error and is tried
again by the next run. The folder must be one that all processes see.

`attnctl-fast reproduce table1` is this sweep with the prompts, seeds and methods of a paper's table.

The exit status is 0, 1 if pictures or scores failed, 2 for a mistake, 130 when interrupted; launchers of several
processes turn all but 0 into 1.
"""

from .main import main, reproduce

__all__ = ["main", "reproduce"]
