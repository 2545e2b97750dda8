"""Whatever is typed wrong ends in one line that says what to do, exit code 2, no traceback, nothing half-written."""

import errno
import os
import stat

import pytest
from commands import here, ldm
from PIL import Image

from ldm.config.explain import explain

FAST = [  # arguments, words of the one line
    (["experiment=quickstrat"], "Did you mean 'quickstart'?"),
    (["model=unet_quikstart"], "Did you mean 'unet_quickstart'?"),
    (["modle=unet_tiny"], "'model'?"),
    (["optimizer.lrr=1"], "Did you mean 'lr'?"),
    (["max_step=10"], "Did you mean 'max_steps'?"),
    (["max_steps=ten"], "max_steps=ten: expected int"),
    (["task=sampel"], "Did you mean 'sample'?"),
    (["task=sample", "max_steps=3"], "is not read by task=sample"),
    (["task=sample", "model=unet_tiny"], "is not read by task=sample"),
    (["+foo=1"], "foo"),
    (["task=prepare", "image_size=64"], "is not read by task=prepare"),
    (["stages=3"], "stages: expected dict, not int."),
    (["trainer={"], "cannot be read"),
    (["task=objective", "shards=x"], "is not read by task=objective"),
    (["task=sample", "grid.rho=5"], "the grid chosen here has no 'rho': choose one that has, grid=karras."),
    (["task=sample", "sampler.solve.order=3"], "sampler=deis|dpmpp"),
    (["task=sample", "guider={rescale: 1}"], "guider= takes the name of an option (apg, autoguidance"),
]
CHECKED = [
    (["batch_size=0"], "batch_size=0: must be at least 1"),
    (
        ["text_encoder=none", "model.cross_attention_dim=${text_encoder.width}", "shards=x"],
        "a value is ${text_encoder.width}, and the text_encoder chosen here has none",
    ),
    (["module=autoencodr"], "Did you mean 'autoencoder'?"),
    (["module=autoencoder", "reconstruction=l2"], "reconstruction=l2: choose one of squared"),
    (["trainer.max_steps=ten"], "trainer.max_steps='ten': expected int"),
    (["optimizer.lr=1e-3x"], "optimizer.lr='1e-3x': expected float"),
    (["+trainer.max_stepz=3"], "Did you mean 'max_steps'?"),
    (["shards=nowhere"], "nowhere"),
    (["experiment=quickstart", "stages=null", "shards=nowhere"], "nowhere"),
    (["task=prepare", "source=folder", "images=nowhere", "output=out"], "nowhere"),
    (["task=sample", "checkpoint=nowhere", "prompt=x"], "there is nothing at this path"),
    (["task=sample", "prompt=x"], "checkpoint=RUN"),
    (["task=prepare", "source=emoji", "source.font=/nowhere.ttf", "output=out"], "nowhere.ttf"),
    (["experiment=quickstart", "parameterization=eps", "scheduler=flow", "debug=fast_dev_run"], "parameterization=v"),
    (["experiment=sd_base", "shards=x"], "autoencoder.pretrained=DIR"),
    (["experiment=sd_base", "shards=x"], "text_encoder.pretrained=DIR"),
    (["task=objective", "sampler=add_back", "grid=karras", "output=out"], "leave grid= out"),
]


def one_line(result, words, cwd):
    assert result.returncode == 2, result.stderr[-2000:] + result.stdout[-500:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and words in lines[0], result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    left = [p for p in cwd.rglob("*") if p.suffix == ".part" or p.name == "config.yaml"]
    assert not left, left


@pytest.mark.parametrize(("arguments", "words"), FAST, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_what_the_composition_refuses(arguments, words, tmp_path):
    one_line(ldm(*arguments, cwd=tmp_path), words, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), CHECKED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_what_the_checks_refuse(arguments, words, tmp_path):
    one_line(here(*arguments, cwd=tmp_path), words, tmp_path)


@pytest.mark.slow
def test_the_second_stage_wants_the_first(tmp_path, tiny_run):
    shards = next((tiny_run.parent / "stages").glob("shards-*"))
    one_line(here("experiment=sd_base_512", f"shards={shards}", cwd=tmp_path), "outputs/sd_base", tmp_path)


@pytest.mark.slow
def test_damaged_data_and_places(tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/00000.tar").write_text("<html>not found</html>" * 50)
    one_line(here("shards=tars", "module=autoencoder", "image_size=32", cwd=tmp_path), "00000.tar", tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.jpg").write_bytes(b"\xff\xd8\xff not an image")
    (tmp_path / "broken/a.txt").write_text("a broken picture")
    result = here("task=prepare", "source=folder", "images=broken", "output=out", cwd=tmp_path)
    one_line(result, "undecodable image (first: a.jpg)", tmp_path)
    (tmp_path / "nocaption").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "nocaption/a.png")
    result = here("task=prepare", "source=folder", "images=nocaption", "output=out", cwd=tmp_path)
    one_line(result, "caption", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_check_says_what_is_wrong_with_a_data_set(tmp_path):
    from ldm.data.shards.writer import write_dataset
    from ldm.data.sources.shapes import ShapesSource

    source = ShapesSource(count=8, validation=4, unseen=2)
    write_dataset(source, tmp_path / "shards", facts=source.facts, identity=source.identity())
    sound = here("task=check", "shards=shards", cwd=tmp_path)
    assert sound.returncode == 0 and sound.stdout.startswith("sound: "), sound.stderr
    tar = tmp_path / "shards/train/00000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1  # inside the first picture
    tar.write_bytes(data)
    one_line(here("task=check", "shards=shards", cwd=tmp_path), "sha256 differs", tmp_path)
    one_line(here("task=check", "shards=nowhere", cwd=tmp_path), "nowhere", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/sys"), reason="needs a place that refuses writing")
def test_output_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is wanted")
    blocked.chmod(stat.S_IRUSR)
    result = here("experiment=quickstart", "debug=fast_dev_run", "outputs=blocked", cwd=tmp_path)
    one_line(result, "outputs=", tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_stepps: 3", "Did you mean 'max_steps'?"),
        ("optimizer: {lrr: 3}", "Did you mean 'lr'?"),
        ("defaults:\n  - override /model: unet_quikstart", "Did you mean 'unet_quickstart'?"),
        ("max_steps: ten", "max_steps=ten"),
        ("max_steps: [3", "not YAML"),
    ],
)
def test_mistakes_inside_an_experiment_file(text, words, tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text(f"# @package _global_\n# Mine.\n{text}\n")
    (tmp_path / "here").mkdir()
    result = here("experiment=mine", "--config-dir", str(tmp_path / "own"), cwd=tmp_path / "here")
    one_line(result, words, tmp_path / "here")
    assert result.stderr.count("\n") == 1, "one line, and nothing else"


def test_no_room_is_one_line_although_the_system_names_no_file():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "outputs=" in (explain(full) or "")


def test_a_key_of_another_option_is_not_its_own_remedy(tmp_path):
    done = here("debug=fast_dev_run", "source.softness=1", cwd=tmp_path)
    assert done.returncode == 2 and "choose one that has, source=shapes" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1,2"]])
def test_outputs_under_a_file(tmp_path, sweep):
    (tmp_path / "file").write_text("")
    done = here("outputs=file/x", "shards=nowhere", *sweep, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
