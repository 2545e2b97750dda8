"""README's script without a configuration, verbatim: Lightning trains, validates and finds the losses."""

from pathlib import Path

import pytest
import torch

from ldm.data.shards.writer import write_dataset
from ldm.data.sources.shapes import ShapesSource

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_script_of_the_readme(tmp_path, monkeypatch):
    source = ShapesSource(count=24, validation=6, unseen=2)
    write_dataset(source, tmp_path / "shards", facts=source.facts, identity=source.identity())
    script = README.read_text().split("## As a library")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    told: dict = {}
    exec(compile(script, "README.md", "exec"), told)
    logged = told["trainer"].callback_metrics
    assert {"val/loss", "val/loss_by_t/0", "val/x0_error_by_t/9"} <= set(logged)
    assert 0 < logged["val/loss"] < 2, "an untrained network's is about 1, a diverging one's is not"
    assert told["trainer"].global_step == 20 and 0 < told["module"].last_loss < 2
    assert told["images"].shape == (4, 3, 32, 32) and bool(torch.isfinite(told["images"]).all())
