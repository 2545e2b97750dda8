"""A run as one HTML page with its pictures inside: what was made, how well, how it looks."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from ldm.training.run.directory import read_json

PICTURES = {
    "samples": "Samples at fixed seeds, with their prompts",
    "jump_to_x0": "The film strip: the current latent, and the jump to x0 from it",
    "jump_to_x0_preview": "Every step as a linear preview",
    "x0_error": "How wrong the jump is, by noise level",
    "reconstructions": "What the autoencoder keeps: images, reconstructions, their difference x4, latents",
}
STYLE = "body{font:15px sans-serif;max-width:1100px;margin:2em auto;color:#222}img{max-width:100%}"
STYLE += "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:3px 9px;text-align:right}"
STYLE += "td:first-child,th:first-child{text-align:left}pre{background:#f4f4f4;padding:1em;overflow-x:auto}"


def write_report(run: Path) -> Path:
    """Writes report.html into a run directory, from its files alone."""
    stages = read_json(run / "stages.json")
    body = [f"<h1>{html.escape(run.name)}</h1>", _summary(run), _scores(run, stages), _left_out(run, stages)]
    body += [_pictures(run)]
    if "autoencoder" in stages:
        body.append(_pictures(run / stages["autoencoder"]["path"]))
    body.append(f"<h2>Configuration</h2><pre>{html.escape((run / 'config.yaml').read_text())}</pre>")
    path = run / "report.html"
    page = "\n".join(b for b in body if b)
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(run.name)}</title><style>{STYLE}</style>{page}',
        encoding="utf-8",
    )
    return path


def _summary(run: Path) -> str:
    about, stages = read_json(run / "run.json"), read_json(run / "stages.json")
    rows = [("command", about.get("command")), ("git commit", about.get("git_commit"))]
    rows += [("versions", json.dumps(about.get("versions"))), ("hardware", json.dumps(about.get("hardware")))]
    for name, stage in stages.items():
        details = {k: v for k, v in stage.items() if k in ("samples", "step", "seconds")}
        rows.append((name, f"{stage.get('path', '')} {json.dumps(details)}"))
    cells = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows if v)
    return f"<h2>What was done</h2><table>{cells}</table>"


def _scores(run: Path, stages: dict[str, Any]) -> str:
    if "evaluate" not in stages:
        return ""
    folder = run / stages["evaluate"]["path"]
    metrics = read_json(folder / "evaluation.json").get("metrics", {})
    rows = []
    for name, value in metrics.items():
        if name.endswith(("/low", "/high", "/n", "/chance")):
            continue
        low, high, chance = (metrics.get(f"{name}/{k}") for k in ("low", "high", "chance"))
        interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
        shown = f"{chance:.4f}" if chance is not None else ""
        score = "not finite" if value is None else f"{value:.4f}"
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{score}</td><td>{interval}</td><td>{shown}</td></tr>")
    head = "<tr><th>score</th><th>value</th><th>95 % interval</th><th>chance</th></tr>"
    pictures = "".join(f"<h3>{p.stem}</h3>{_image(p)}" for p in sorted(folder.glob("*.png")))
    return f"<h2>Scores</h2><table>{head}{''.join(rows)}</table>{pictures}"


def _left_out(run: Path, stages: dict[str, Any]) -> str:
    """Every sample that prepare turned away, with its reason."""
    folder = stages.get("prepare", {}).get("path")
    file = run / folder / "rejects.jsonl" if folder else None
    lines = (
        file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        if file and file.is_file() and file.stat().st_size
        else []
    )
    if not lines:
        return ""
    shown = "\n".join(html.escape(line) for line in lines[:200])
    return f"<h2>Left out: {len(lines)}</h2><pre>{shown}</pre>"


def _pictures(run: Path) -> str:
    out = []
    for key, title in PICTURES.items():
        files = sorted((run / "images").glob(f"step-????????_{key}.png"))
        if files:
            step = int(files[-1].name[5:13])
            out.append(f"<h2>{title} (step {step})</h2>{_image(files[-1])}")
    return "".join(out)


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
