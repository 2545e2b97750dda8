"""Metrics are asked, all of them, one's own too; evaluation and encoding compute where sampling does."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import here
from few import make_base

import ldm.evaluation.drawing as drawing
import ldm.evaluation.scoring as scoring
import ldm.tasks.work.encode as encoding
import ldm.tasks.work.evaluate as evaluating
from ldm.checkpoints.load import load_any
from ldm.data.shards.splits import open_split
from ldm.errors import ConfigError
from ldm.metrics.evaluation import Drawn, Evaluation
from ldm.metrics.nearest import NearestTraining
from ldm.metrics.reconstruction import Reconstruction
from ldm.metrics.shapes import ShapeScore
from ldm.pictures import to_unit

# Of 8 bits a number, as what is drawn.
REAL = {
    "train": to_unit((torch.arange(6 * 3 * 16 * 16) // 19).to(torch.uint8)).view(6, 3, 16, 16),
    "val": torch.zeros(3, 3, 16, 16),
}


def evaluation(**changes) -> Evaluation:
    given = {
        "splits": list(REAL),
        "real": lambda split, limit: iter(REAL[split][:limit].split(2)),
        "reconstruct": lambda pictures: pictures * 0.5,
        "drawn": {"val": Drawn(REAL["train"][:2], ["a red star on black", "a blue circle on white"])},
        "count": 2,
        "facts": {},
    }
    return Evaluation(**{**given, **changes})


class Mine:
    def __init__(self, given):
        self.given = given

    def score(self, evaluation):
        return self.given


def test_the_three_metrics_say_what_their_updates_say():
    made = evaluation(
        drawn={"seen": Drawn(REAL["train"][:2], ["a red star", "a blue star"])}, facts={"source": "shapes"}
    )
    shape, near, back = ShapeScore(), NearestTraining(), Reconstruction()
    shape.update(REAL["train"][:2], ["a red star", "a blue star"])
    near.add_reference(REAL["train"])
    near.update(REAL["train"][:2])
    back.update(REAL["val"] * 0.5, REAL["val"])
    found = scoring.scores({"a": ShapeScore(), "b": NearestTraining(), "c": Reconstruction()}, made)
    expected = {f"seen/{k}": v for k, v in shape.compute().items()}
    expected |= {f"seen/nearest/{k}": v for k, v in near.compute().items()}
    expected |= {f"reconstruction/{k}": v for k, v in back.compute().items()}
    near.reset()
    near.update(REAL["val"][:2])
    expected |= {f"held_out_val/nearest/{k}": v for k, v in near.compute().items()}
    assert found.keys() == expected.keys()
    assert all(found[k] == pytest.approx(v, nan_ok=True) for k, v in expected.items())
    assert scoring.scores({"a": ShapeScore(), "b": NearestTraining()}, evaluation(drawn={})) == {}


@pytest.mark.parametrize(
    "given, left",
    [
        ({"x": 1, "y": torch.tensor(2.0), "z": np.float32(3)}, {"x": 1.0, "y": 2.0, "z": 3.0}),
        ({"x": math.inf, "y": -math.inf}, {"x": math.inf, "y": -math.inf}),
        ({"x": torch.ones(2)}, "metric.mine: 'x' is Tensor, not a number"),
        ({"x": "1.0"}, "metric.mine: 'x' is str, not a number"),
        ({"x": None}, "NoneType"),
        ({"x": True}, "bool"),
        ({3: 1.0}, "metric.mine: 3 is float, not a number under a name"),
        (0.5, "metric.mine: score gave float, not {name: number}"),
        (None, "metric.mine: score gave NoneType"),
        ({"taken": 2.0}, "metric.mine: another metric has said 'taken' already"),
    ],
)
def test_what_a_metric_gives_is_numbers_or_said_in_a_line(given, left, capsys):
    found = scoring.scores({"metric.first": Mine({"taken": 1.0}), "metric.mine": Mine(given)}, evaluation())
    said = capsys.readouterr().out
    if isinstance(left, dict):
        assert found == {"taken": 1.0, **left} and not said
    else:
        assert found == {"taken": 1.0} and left in said and said.count("\n") == 1


def test_a_metric_that_nothing_would_ask_is_refused():
    node = {"_target_": "torchmetrics.MeanMetric"}
    for given in (node, {"mine": node}):
        with pytest.raises(ConfigError, match=r"metric.*MeanMetric has no method score\(evaluation\)"):
            scoring.built_metrics(given)
    assert scoring.built_metrics({}) == scoring.built_metrics(None) == {}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("evaluated"))


@pytest.mark.slow
def test_a_metric_of_ones_own_is_two_files(base, tmp_path, monkeypatch):
    """conf/metric/x.yaml and a class: alone and beside the others; refused before a run that would end with it."""
    (tmp_path / "mymetrics.py").write_text(
        "class Brightness:\n"
        "    def __init__(self, scale: float = 1.0):\n        self.scale = scale\n\n"
        "    def score(self, evaluation):\n"
        "        means = {h: self.scale * d.pictures.mean() for h, d in evaluation.drawn.items()}\n"
        "        return {f'{h}/brightness': m for h, m in means.items()} | {'odd': float('nan')}\n"
    )
    (tmp_path / "conf" / "metric").mkdir(parents=True)
    (tmp_path / "conf" / "metric" / "x.yaml").write_text("_target_: mymetrics.Brightness\nscale: 0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LDM_ALLOW", "mymetrics")
    asked = [f"--config-dir={tmp_path / 'conf'}", "task=evaluate", f"checkpoint={base}", "num_steps=1", "eval_images=2"]
    alone = here(*asked, "metric=x", f"output={tmp_path / 'alone'}", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    metrics = json.loads((tmp_path / "alone" / "evaluation.json").read_text())["metrics"]
    assert metrics == {"seen/brightness": 0.0, "unseen/brightness": 0.0, "odd": None}
    beside = here(*asked, "+metric@metric.x=x", f"output={tmp_path / 'beside'}", cwd=tmp_path)
    assert beside.returncode == 0, beside.stderr
    metrics = json.loads((tmp_path / "beside" / "evaluation.json").read_text())["metrics"]
    assert metrics["seen/brightness"] == 0.0 and "seen/all" in metrics and "reconstruction/psnr" in metrics
    early = ["experiment=quickstart", "debug=fast_dev_run", "+metric.mine={_target_: torchmetrics.MeanMetric}"]
    refused = here(*early, cwd=tmp_path)
    assert refused.returncode == 2 and "metric.mine=" in refused.stderr and not (tmp_path / "outputs").exists()


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that is not the CPU, on every machine: PyTorch's "meta", which computes shapes and refuses mixtures.

    What comes back from it is noise, in place of numbers that it does not have.
    """
    moved = SimpleNamespace(back=0)
    cpu = torch.Tensor.cpu

    def back(tensor):
        moved.back += tensor.is_meta
        return torch.rand(tensor.shape).to(tensor.dtype) if tensor.is_meta else cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", back)
    return moved


@pytest.mark.slow
def test_encoding_computes_where_the_autoencoder_is(base, elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(encoding, "task_device", lambda: "meta")
    values = {"checkpoint": str(base), "shards": str(base.parent / "shards"), "weights": "ema", "image_size": None}
    values |= {
        "batch_size": 8,
        "data": {"validation_fraction": 0.0, "flip": True, "fields": {}},
        "outputs": str(tmp_path),
    }
    written = encoding.encode_shards(values)
    assert elsewhere.back >= 2 * 4 and written.samples["train"] == 24


@pytest.mark.slow
def test_evaluating_computes_where_the_model_is(base, elsewhere, monkeypatch, tmp_path):
    parts = load_any(base)
    parts.for_sampling().to("meta")
    assert {p.device.type for m in parts.modules().values() for p in m.parameters()} == {"meta"}
    images = {"train": open_split(base.parent / "shards", "train"), "val": open_split(base.parent / "shards", "val")}
    made = drawing.evaluation_of(parts.autoencoder, None, images, 32, {"eval_images": 2, "seed": 0}, None)
    pictures = next(made.real("val", 2))
    assert made.reconstruct(pictures).device == pictures.device == torch.device("cpu") and elsewhere.back == 1
    monkeypatch.setattr(evaluating, "task_device", lambda: "meta")
    seen = {}

    def instead(self, captions, seeds):  # drawing itself is sampling's: tests of task=sample
        seen["device"] = self.pipe.sampler.device.type
        return torch.zeros(len(captions), 3, self.size, self.size, dtype=torch.uint8)

    monkeypatch.setattr(drawing._Draw, "from_noise", instead)
    done = here("task=evaluate", f"checkpoint={base}", "eval_images=2", f"output={tmp_path / 'e'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert seen == {"device": "meta"} and elsewhere.back > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(base, tmp_path):
    done = here(
        "task=evaluate", f"checkpoint={base}", "eval_images=2", "num_steps=2", f"output={tmp_path}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
