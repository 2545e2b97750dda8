"""The page of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ldm.analysis.figures import plain, plot_loss, plot_loss_by_t, plot_throughput, plot_x0_error, throughput
from ldm.analysis.run import Run, is_run
from ldm.report import page, scores, words
from ldm.untrusted import records

SHOWN, REASONS = 200, 20  # of what was left out: lines, and reasons by number
SMOOTH = 10  # logged points on either side
BY_TIME = "Loss by time"
KEYS = {  # pictures of a run, in the order of the page
    "samples": "Drawn {}, at fixed seeds, each above its caption.",
    "jump_to_x0": "The jump to x0 {}: a column is a step of sampling. Above stands the noisy latent, decoded; below, "
    "what the model already takes the picture for.",
    "jump_to_x0_preview": "Every step of sampling {}, as a linear preview of the latents.",
    "reconstructions": "What the autoencoder keeps {}: pictures, reconstructions, their difference x4, and latents.",
}


def write_run(path: Path, target: Path | None = None) -> Path:
    """Writes report.html of a run directory, whatever became of the run, from its files alone.

    target: another place for it. ConfigError for what is no run, or cannot be written.
    """
    run = Run(path)
    embed = page.Pictures()
    pictures = {key: found for key in KEYS if (found := _picture(embed, run, key))}
    autoencoder = _autoencoder(run)
    if autoencoder is not None and (sheet := _picture(embed, autoencoder, "reconstructions")):
        pictures["reconstructions"] = sheet
    evaluation, file = run.evaluation, run.evaluation_file
    sheets = [embed.embed(p, p.stem.replace("_", " ")) for p in sorted(file.parent.glob("*.png"))] if file else []
    groups, lines = scores.groups(evaluation), _left_out(run)
    return page.write(
        target or run.path / page.NAME,
        "run.html",
        name=run.name,
        introduction=words.introduction(run),
        notice=words.notice(run),
        pictures=pictures,
        figures=figures(run, autoencoder),
        speed=_speed(run),
        course=words.course(run),
        groups=groups,
        has_cards=any(row.card for group in groups for row in group.rows),
        numbers=scores.numbers(evaluation),
        checkpoint=str(evaluation.get("checkpoint", "")),
        sheets=[s for s in sheets if s],
        missing=embed.missing,
        left_out=lines[:SHOWN],
        left_out_count=len(lines),
        reasons=Counter(str(r.get("reason", "no reason given")) for r in lines).most_common(REASONS),
        commands=words.commands(run, path),
        config=(run.path / "config.yaml").read_text(encoding="utf-8", errors="replace"),
        scalars=list(run.scalars().items()),
        about=_about(run),
    )


def figures(run: Run, autoencoder: Run | None = None) -> list[dict[str, Any]]:
    """What can be drawn of a run so far: title, figure, and what to see in it."""
    seen = f"The line is fitted to {SMOOTH} logged points on either side of the training loss."
    if "val/loss" in run.scalars():
        seen += " Dots are the validation loss with one standard error, on the same images and noise every time."
    bright = "Dark early in training, bright late"
    asked: list[tuple[str, Callable[[], Figure], str]] = [
        ("Loss", partial(_bare, plot_loss, run, SMOOTH), seen),
        ("Error of the jump to x0", partial(_bare, plot_x0_error, run), f"{bright}; by noise level, in validation."),
        (BY_TIME, partial(_bare, plot_loss_by_t, run), f"{bright}; t = 0 is data, t = 1 noise."),
        (
            "Throughput",
            partial(_bare, plot_throughput, run),
            "Dots: training alone. Line: with all that it waited for.",
        ),
    ]
    if autoencoder is not None:
        first = partial(_bare, plot_loss, autoencoder, SMOOTH)
        asked.append(("Loss of the autoencoder", first, "The first stage, as above."))
    drawn = [(title, page.svg(make, 9.9 if title == BY_TIME else 4.8), text) for title, make, text in asked]
    return [{"title": t, "svg": s, "text": text, "wide": t == BY_TIME} for t, s, text in drawn if s is not None]


def _bare(plot: Callable[..., Figure], run: Run, *arguments: int) -> Figure:
    """Without the run's name in the legend: the page is this run's."""
    figure, name = plot(run, *arguments), plain(run.name)
    for axes in figure.axes:
        if axes.get_legend() is None:
            continue
        handles, labels = axes.get_legend_handles_labels()
        legend = axes.legend(handles, [label.removeprefix(f"{name}, ") for label in labels])
        legend.set_visible(labels != [name])
    return figure


def _picture(embed: page.Pictures, run: Run, key: str) -> page.Picture | None:
    every = run.pictures(key)
    if every.empty:
        return None
    step, path = every["step"].iloc[-1], every["path"].iloc[-1]
    return embed.embed(path, KEYS[key].format(f"after step {words.count(int(step))}"))


def _autoencoder(run: Run) -> Run | None:
    """The run of the first stage, where this command has trained one of its own."""
    path = run.stages.get("autoencoder", {}).get("path")
    folder = run.find(path) if path else None
    return Run(folder) if folder and is_run(folder) and folder != run.path.resolve() else None


def _speed(run: Run) -> str:
    logged = throughput(run)["logged"].median()
    if logged != logged:
        return ""
    seconds, images = words.training_seconds(run), words.images_seen(run)
    whole = f", {images / seconds:.3g} with validation, pictures and checkpoints" if seconds and images else ""
    return f"It trained at {logged:.3g} images a second (median){whole}."


def _left_out(run: Run) -> list[dict[str, Any]]:
    """Every sample that prepare turned away, with its reason."""
    folder = run.stages.get("prepare", {}).get("path")
    return list(records(run.find(folder) / "rejects.jsonl")) if folder else []


def _about(run: Run) -> list[tuple[str, str]]:
    about = run.about
    versions = about.get("versions")
    rows = [("command", about.get("command")), ("git commit", about.get("git_commit")), ("host", about.get("host"))]
    rows += [("digest", about.get("digest")), ("hardware", words.hardware(run))]
    rows += list(versions.items()) if isinstance(versions, dict) else []
    return [(str(k), str(v)) for k, v in rows if v]
