"""The page of a run: everything is on it, nothing is from elsewhere, and it is there whatever became of the run."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import here
from PIL import Image
from written_runs import written_run

from ldm.analysis import Run
from ldm.errors import ConfigError
from ldm.report.page import MOST, Pictures, bar
from ldm.report.run import write_run
from ldm.report.scores import groups
from ldm.report.words import duration, notice, training_seconds
from ldm.training.run.directory import write_json
from ldm.training.run.logging import RunLogger

EVIL = "<script>alert('$x_')</script>\"'&{{ 7*7 }}"


class Tags(HTMLParser):
    """Tags that are open where others close, and everything that a browser would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop() if self.open[-1:] == [tag] else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def checked(path: Path) -> str:
    """The page's text, once it is sound: closed tags, no script, nothing from elsewhere."""
    text = path.read_text()
    tags = Tags(text)
    assert tags.open in ([], ["p"]) and "script" not in tags.names
    assert all(f.startswith(("data:image/", "#")) for f in tags.fetched), tags.fetched
    assert "prefers-color-scheme: dark" in text and "viewport" in text and len(text) < 5e6
    return text


def words(text: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL)))


def ran(run: Run, state: str, step: int, **more: str) -> Run:
    write_json(run.path / "status.json", {"state": state, "step": step, "time": 1.0, **more})
    return run


@pytest.mark.slow
def test_every_score_picture_and_key_of_a_real_run_is_on_its_page(tiny_run: Path, tmp_path: Path) -> None:
    text = checked(write_run(tiny_run, tmp_path / "page.html"))
    said, run = words(text), Run(tiny_run)
    assert "U-Net of 1.0 million parameters that predicts v" in said and "64 pictures of 32 x 32 pixels" in said
    assert "for 3 steps (6 images)" in said and "It ran in one go" in said
    for name in (*run.evaluation["metrics"], *run.scalars()):
        assert f" {name} " in said, name
    rows = sum(len(group.rows) for group in groups(run.evaluation))
    assert text.count("<img") == 6 and text.count("<svg") == 5 + rows
    assert " ".join((tiny_run / "config.yaml").read_text().split()) in said
    for line in re.findall(r"<pre>python -m ldm.run (task=.*?)</pre>", text):
        done = here(*[w.strip("'") for w in html.unescape(line).split()], "--cfg", "job", cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_that_was_killed_has_a_page_and_its_command(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    shutil.copytree(
        tiny_run, run, ignore=shutil.ignore_patterns("evaluation*", "stages.json", "report*", "checkpoints")
    )
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[: len(lines) // 2])
    (run / "events.jsonl").write_text((tiny_run / "events.jsonl").read_text().splitlines()[0] + "\n")
    for picture in (run / "images").glob("*samples.png"):
        picture.write_bytes(picture.read_bytes()[:100])
    ran(Run(run), "running", 0)
    done = here("task=report", f"checkpoint={run}", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"report: {run}/report.html\n"
    said = words(checked(run / "report.html"))
    assert "not finished" in said and "1 picture is not shown here" in said
    assert "<h2>Scores" not in (run / "report.html").read_text()
    assert "To go on" in said


STATES = [
    (("stopped", {"reason": "NotFinite: the loss is nan"}), "This run diverged at step 3 of 9: the loss is nan"),
    (("stopped", {"reason": "KeyboardInterrupt: "}), "stopped at step 3 of 9, by Ctrl-C"),
    (("stopped", {"reason": f"Interrupted: {EVIL}"}), f"stopped at step 3 of 9: Interrupted: {EVIL}"),
    (("running", {}), "not finished: it was at step 3 of 9"),
    (("finished", {}), ""),
]


@pytest.mark.parametrize(("state", "said"), STATES)
def test_what_a_reader_has_to_know_first(state, said: str, tmp_path: Path) -> None:
    found = notice(ran(written_run(tmp_path / "a", {"max_steps": 9}), state[0], 3, **state[1]))
    assert said in found and bool(said) == bool(found)


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    """Names, captions, commands, reasons, cards and configurations are shown, not obeyed."""
    run = written_run(tmp_path / EVIL.replace("/", "|"), {"note": EVIL, "model": {"_target_": EVIL}})
    ran(run, "stopped", 3, reason=EVIL)
    RunLogger(run.path).log_picture("samples", Image.new("RGB", (2, 2)), 3, EVIL)
    RunLogger(run.path).log_metrics({EVIL: 1.0}, 3)
    write_json(
        run.path / "run.json", {"command": EVIL, "host": EVIL, "versions": {EVIL: EVIL}, "hardware": {"gpus": [EVIL]}}
    )
    (run.path / "shards").mkdir()
    (run.path / "shards/rejects.jsonl").write_text(json.dumps({"name": EVIL, "reason": EVIL}) + "\nhalf a li")
    write_json(run.path / "stages.json", {"prepare": {"path": "shards", "facts": {"source": EVIL}}})
    (run.path / "evaluation-ema").mkdir()
    card = {EVIL: {EVIL: EVIL}, "odd": 5, "s": {"by": EVIL}}
    write_json(
        run.path / "evaluation-ema/evaluation.json",
        {"metrics": {EVIL: 1, "s": None}, "cards": card, "checkpoint": EVIL},
    )
    text = checked(write_run(run.path))
    assert (
        f'class="notice">{html.escape(f"This run was stopped at step 3: {EVIL}")}'.replace("&#x27;", "&#39;").replace(
            "&quot;", "&#34;"
        )
        in text
    )
    assert EVIL not in text and words(text).count("alert('$x_')") >= 12 and "1 sample could not be used" in words(text)


def test_time_is_spent_between_starts_and_stops(tmp_path: Path) -> None:
    """A killed run is counted up to its last record, and the time in which nothing ran is not."""
    run = written_run(tmp_path / "a")
    events = [(100, "start"), (160, "resume"), (200, "stop"), (500, "resume"), (520, "finish")]
    (run.path / "events.jsonl").write_text("".join(json.dumps({"time": t, "event": e}) + "\n" for t, e in events))
    (run.path / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "time": {t}}}\n' for s, t in [(1, 130), (2, 180)]))
    assert training_seconds(run) == 30 + 40 + 20
    assert [duration(s) for s in (0.44, 45, 237, 3600, 18720, 180000)] == [
        "0.4 s",
        "45 s",
        "3 min 57 s",
        "1 h",
        "5 h 12 min",
        "2 d 2 h",
    ]


def test_cards_are_folded_into_their_scores_and_absent_where_there_are_none() -> None:
    metrics = {"a/x": 0.5, "a/x/low": 0.4, "a/x/high": 0.6, "a/x/n": 8, "a/y": 1.0}
    ((group,), (bare,)) = (groups({"metrics": metrics, **more}) for more in ({"cards": {"a/x": {"by": "VGG"}}}, {}))
    assert [row.card for row in group.rows] == [{"by": "VGG"}, {}] and not any(row.card for row in bare.rows)


def test_a_bar_stands_where_its_numbers_are() -> None:
    """Value, interval and mark on the scale, 1 to 99 of 100 across."""
    drawn = bar(0.5, 0.25, 0.75, (0, 1), mark=0.0)
    places = {k: float(x) for k, x in re.findall(r'class="(\w+)" x="([\d.]+)"', drawn)}
    assert places["value"] == pytest.approx(50 - 0.7) and places["range"] == pytest.approx(25.5)
    assert places["mark"] == pytest.approx(1 - 0.35) and 'width="49.00"' in drawn
    assert "value" not in re.findall(r'class="(\w+)"', bar(None, None, None, (0, 1)))


def test_quantiles_are_a_row_and_all_other_scores_one_each() -> None:
    quantiles = {
        f"a/nearest/{q}": v for q, v in zip(("min", "q05", "q25", "median", "q75", "q95"), range(6), strict=True)
    }
    (group,) = groups({"metrics": {**quantiles, "a/nearest/n": 9, "a/all": 0.5, "a/median": 2.0}})
    assert [row.value for row in group.rows] == ["3", "0.5", "2"] and "1 to 5" in group.rows[0].interval


def test_large_pictures_are_made_smaller_and_a_full_page_says_so(tmp_path: Path) -> None:
    large, embed = tmp_path / "large.png", Pictures()
    Image.effect_noise((2100, 600), 90).convert("RGB").save(large)
    shown = embed.embed(large)
    assert shown is not None and shown.width == 2000 and "large.png" in shown.note
    while embed.embed(large):
        pass
    assert embed.missing == 1 and 0 <= embed.left < MOST
    assert embed.embed(tmp_path / "none.png") is None and embed.missing == 2


def test_what_is_no_run_or_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    run = written_run(tmp_path / "outputs/a")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.yaml").write_text("seed: 0\n")
    for path in (tmp_path / "nothing", half):
        done = here("task=report", f"checkpoint={path}", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "is not a run directory" in done.stderr
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*output=FILE"):
        write_run(run.path, tmp_path / "file" / "page.html")
    assert here("task=report", cwd=tmp_path).stderr.count("\n") == 1


def test_a_page_is_made_of_whatever_the_files_hold(tmp_path: Path) -> None:
    """Somebody else's run, whose files hold what no run writes: a page all the same."""
    run, huge = written_run(tmp_path / "a", {"max_steps": "x", "image_size": [], "model": 5, "adapter": 5}), 10**400
    files = {
        "status.json": {"state": [1], "step": "x", "time": huge, "reason": {"a": 1}},
        "stages.json": {
            "prepare": {"path": "nowhere", "samples": 5, "facts": 7, "seconds": "x"},
            "encode": {"samples": {"train": "x", "val": 1}, "seconds": huge},
            "autoencoder": {"path": "../../etc"},
            "evaluate": {"path": "gone"},
        },
        "run.json": {"command": 5, "versions": [1], "hardware": {"gpus": 3, "cpus": "x"}},
        "evaluation-ema/evaluation.json": {
            "metrics": {
                "a": huge,
                "b": True,
                "c/q05": 1,
                "c/median": None,
                "c/q95": 2,
                "d": 1,
                "d/low": "x",
                "d/n": huge,
            },
            "cards": [1],
            "checkpoint": 5,
        },
    }
    for name, content in files.items():
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text(json.dumps(content))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 1e999, "images": "x", "train/loss": -1e999, "odd": [1]}\n')
        file.write(f'{{"step": {huge}, "images": {huge}, "train/loss": {huge}}}\n')
    (run.path / "events.jsonl").write_text(
        '{"time": 1e999, "event": "start"}\n{"time": "x"}\n{"event": "resume", "step": []}\n'
    )
    said = words(checked(write_run(run.path)))
    assert "not finished" in said and "went on once" in said
