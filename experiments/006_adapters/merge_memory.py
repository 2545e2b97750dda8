"""How much memory merging takes: peak resident memory of `ldm.merge` in a process of its own, by method and layout.

    python experiments/006_adapters/merge_memory.py --width 64 --folder /tmp/merge_memory

The network has Stable Diffusion 1.5's structure, that many channels at its finest level (its own are 320) and random
weights; text encoder and autoencoder are small beside it. Writes merge_memory.csv beside this file. Linux.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
MIB = 2**20
LAYOUTS = {"ldm": "{}-ours", "diffusers": "{}-folder", "compvis": "{}.safetensors"}
RANK = 16


def make(folder: Path, width: int, seed: int) -> None:
    """One model in every layout."""
    from ldm.checkpoints.components import build_components
    from ldm.checkpoints.save import save_states
    from ldm.text.tokenizer import build_tokenizer

    config = {
        "image_size": 512,
        "model": {"_target_": "ldm.models.unet.UNet", "block_channels": [width, 2 * width, 4 * width, 4 * width]},
        "autoencoder": {"_target_": "ldm.autoencoders.kl.AutoencoderKL", "block_channels": [32, 64, 64, 64]},
        "text_encoder": {"_target_": "ldm.text.clip.CLIPText", "vocab_size": 560, "layers": 2},
        "scheduler": {"_target_": "ldm.diffusion.schedulers.ScaledLinear", "beta_start": 0.00085, "beta_end": 0.012},
        "parameterization": {"_target_": "ldm.diffusion.parameterizations.Eps"},
    }
    parts = build_components(config, device="meta")
    parts.text_encoder.set_tokenizer(build_tokenizer(["a red cat"], 560))
    generator = torch.Generator().manual_seed(seed)
    states = {
        part: {k: torch.rand(v.shape, generator=generator).mul_(0.02) for k, v in module.state_dict().items()}
        for part, module in parts.modules().items()
    }
    generator.manual_seed(0)  # one autoencoder for all
    states["vae"] = {k: torch.rand(v.shape, generator=generator) for k, v in states["vae"].items()}
    states["vae"] |= {"latents.mean": torch.zeros(4), "latents.scale": torch.full((4,), 1 / 0.18215)}
    for format, name in LAYOUTS.items():
        save_states(parts, states, folder / name.format(seed), format)
    largest = max(v.nbytes for state in states.values() for v in state.values())
    (folder / "largest.json").write_text(json.dumps(largest / MIB))


def measure(arguments: dict) -> None:
    """Merges and prints the peak above what the imports took."""
    import ldm.checkpoints.load
    from ldm.checkpoints.merge import merge

    ldm.checkpoints.load.build_components({"module": "autoencoder", "autoencoder": AUTOENCODER}, device="meta")
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merge(**arguments)
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024))


AUTOENCODER = {"_target_": "ldm.autoencoders.kl.AutoencoderKL", "block_channels": [32, 32]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--make", type=int)
    parser.add_argument("--measure")
    options = parser.parse_args()
    if options.make is not None:
        make(options.folder, options.width, options.make)
    elif options.measure:
        measure(json.loads(options.measure))
    else:
        run(options.folder, options.width)


def run(folder: Path, width: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    common = [sys.executable, __file__, "--folder", str(folder), "--width", str(width)]
    for seed in (1, 2, 3):
        subprocess.run([*common, "--make", str(seed)], check=True)
    os.sync()  # pages that are not on the disk yet cannot be given back
    largest = json.loads((folder / "largest.json").read_text())
    note(["method", "layout", "output MiB", "peak RSS above baseline MiB", "largest tensor MiB"], "w")
    for method, count, layouts in (
        ("sum", 2, list(LAYOUTS)),
        ("sum", 3, ["ldm"]),
        ("add_difference", 3, list(LAYOUTS)),
        ("extract", 2, ["ldm"]),
        ("lora", 2, list(LAYOUTS)),
    ):
        for layout in layouts:
            inputs = [str(folder / LAYOUTS[layout].format(seed)) for seed in (1, 2, 3)[:count]]
            output = folder / ("lora.safetensors" if method == "extract" else LAYOUTS[layout].format("out"))
            if method == "lora":
                inputs[1] = str(folder / "lora.safetensors")
            asked = {"checkpoints": inputs, "output": str(output), "method": method}
            if method == "extract":
                asked["rank"] = RANK
            done = subprocess.run([*common, "--measure", json.dumps(asked)], check=True, capture_output=True, text=True)
            files = [output] if output.is_file() else [p for p in output.rglob("*") if p.is_file()]
            size = sum(p.stat().st_size for p in files) / MIB
            note([f"{method} of {count}", layout, round(size), round(float(done.stdout)), round(largest)])
            if method != "extract":
                shutil.rmtree(output) if output.is_dir() else output.unlink()
    shutil.rmtree(folder)


def note(row: list, mode: str = "a") -> None:
    """A line of the table, at once: a run that is cut short leaves what it measured."""
    print(*row, sep=",", flush=True)
    with (HERE / "merge_memory.csv").open(mode, newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)


if __name__ == "__main__":
    main()
