"""The command for the day of the first GPU runs, all of it but the GPU: tiny, with nothing compiled."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments/012_gpu/run.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_part_measures_and_one_that_fails_is_a_row(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    usual, stages = script.sampling, ("training", "sampling", "steps")

    def sampling(results, how, count):
        if how == "blocks":
            raise torch.OutOfMemoryError("no room\nfor it")
        usual(results, how, count)

    monkeypatch.setattr(script, "sampling", sampling)
    size = replace(script.TOY, model=[*script.TOY.model, "model.block_channels=[16]", "model.attention_levels=[true]"])
    results = script.measure(size, minutes=5, peak=1e12, stages=stages)
    found = {(row["case"], row["what"]): row["value"] for row in results.rows}
    failed = {key: value for key, value in found.items() if key[1] == "failed"}
    assert failed == {("1 at once, blocks", "failed"): "OutOfMemoryError: no room for it"}
    whats = {what for _, what in found}
    assert {"images/s", "mfu", "speed of diffusers eager", "speed of diffusers compiled", "ms a step"} <= whats
    assert {"share of the time that waits for data", "task=plan, GiB"} <= whats
    assert all(row["verdict"] == "" for row in results.rows)  # a toy meets no goal
    results.write(tmp_path / "toy.csv")
    assert len((tmp_path / "toy.csv").read_text().splitlines()) == len(results.rows) + 1


def test_what_there_is_no_time_for_is_left_out(script):
    rows = script.measure(script.TOY, minutes=0).rows
    assert len(rows) == 5 and {(row["what"], row["value"]) for row in rows} == {("left out", "the minutes were over")}


def test_flops_are_those_of_stable_diffusion(script):
    """Forward 2 x 401.7 GMACs at 512 pixels, as counted elsewhere; the backward pass is twice that."""
    node = script.composed(*script.Size().model)["model"]
    assert script.flops(node, 64) == pytest.approx(3 * 2 * 401.1e9, rel=2e-3)
