"""Measurements in child processes: what fails, dies, hangs or breaks the GPU's context costs its own rows only."""

import os
import signal
import time
from functools import partial

import pytest

pytest.importorskip("triton")
FAR = 60.0


@pytest.fixture
def stages():
    from bench.gpu import stages

    return stages


def fine(name, write):
    write({"name": name, "pid": os.getpid()})


def raises(write):
    write({"name": "before"})
    raise ValueError("no such luck\nat all")


def dies(write):
    os.kill(os.getpid(), signal.SIGKILL)


def ends(write):
    os._exit(3)


def hangs(write):
    time.sleep(FAR)


def run(stages, items, seconds=FAR, check=lambda: None):
    rows = []
    outcome = stages.run(items, time.monotonic() + seconds, rows.append, check)
    return rows, outcome


def item(stages, name, function=None, seconds=FAR):
    return stages.Item({"name": name}, function or partial(fine, name), seconds)


def test_rows_come_in_order_from_one_child(stages):
    rows, outcome = run(stages, [item(stages, "a"), item(stages, "b")])
    assert [row["name"] for row in rows] == ["a", "b"]
    assert len({row["pid"] for row in rows}) == 1 and rows[0]["pid"] != os.getpid()
    assert outcome.left == [] and outcome.compiled == 0


def test_an_error_is_a_row_and_the_next_item_runs_in_the_same_child(stages):
    rows, _ = run(stages, [item(stages, "a"), item(stages, "b", raises), item(stages, "c")])
    assert [row["name"] for row in rows] == ["a", "before", "b", "c"]
    assert rows[2] == {"name": "b", "failed": "ValueError: no such luck"}
    assert rows[0]["pid"] == rows[3]["pid"]


@pytest.mark.parametrize(("end", "said"), [(dies, "by signal 9"), (ends, "with status 3")])
def test_a_child_that_dies_costs_one_item(stages, end, said):
    rows, outcome = run(stages, [item(stages, "a"), item(stages, "b", end), item(stages, "c")])
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert rows[1] == {"name": "b", "failed": f"its process ended {said}"}
    assert rows[0]["pid"] != rows[2]["pid"] and outcome.left == []


def test_an_item_that_hangs_is_ended(stages):
    rows, outcome = run(stages, [item(stages, "a", hangs, 0.3), item(stages, "b")])
    assert rows[0] == {"name": "a", "failed": "no end within 0 s"} and rows[1]["name"] == "b"
    assert outcome.seconds < FAR / 2


def test_a_stage_that_overruns_hands_over(stages):
    rows, outcome = run(stages, [item(stages, "a"), item(stages, "b", hangs), item(stages, "c")], seconds=2)
    assert [row["name"] for row in rows] == ["a"]
    assert [left.row["name"] for left in outcome.left] == ["b", "c"]


def test_a_broken_context_costs_one_item(stages):
    broken = []

    def breaks(write):
        broken.append(True)
        raise RuntimeError("an illegal memory access")

    def check():
        if broken:
            raise RuntimeError("an illegal memory access")

    items = [item(stages, "a"), item(stages, "b", breaks), item(stages, "c"), item(stages, "d")]
    rows, _ = run(stages, items, check=check)
    assert [row["name"] for row in rows] == ["a", "b", "c", "d"] and "failed" in rows[1]
    assert rows[0]["pid"] != rows[2]["pid"] == rows[3]["pid"] and not broken


def test_a_context_that_breaks_unnoticed_fails_the_item_that_broke_it(stages):
    broken = []

    def check():
        if broken:
            raise RuntimeError("an illegal memory access")

    items = [item(stages, "a", lambda write: broken.append(True)), item(stages, "b")]
    rows, _ = run(stages, items, check=check)
    assert rows[0] == {"name": "a", "failed": "RuntimeError: an illegal memory access"} and "failed" not in rows[1]


def test_children_end_with_what_they_started(stages, tmp_path):
    path = tmp_path / "pid"

    def starts(write):
        if os.fork() == 0:
            path.write_text(str(os.getpid()))
            time.sleep(FAR)
        time.sleep(FAR)

    run(stages, [item(stages, "a", starts, 0.5)])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        state = next((x for x in open_status(int(path.read_text())) if x.startswith("State")), "gone")
        if "Z" in state or state == "gone":
            return
        time.sleep(0.05)
    raise AssertionError("a process that a child started is still there")


def open_status(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []
