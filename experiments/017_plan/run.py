"""task=plan for five configurations, Stable Diffusion 1 beside its published order, SD 2 beside its published speed.

python experiments/017_plan/run.py [NAME ...]      (minutes; a CSV each, then published.csv)
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SD1 = "model=unet_sd15 autoencoder=kl_f8 text_encoder=clip_l"
SD2 = "model=unet_sd21 autoencoder=kl_f8 text_encoder=openclip_h"
HALF = "trainer.precision=bf16-mixed"
# Model card: 32 hosts x 8 A100, 2 accumulated x 4 pictures; the published configuration recomputes blocks.
V1 = "gpu=a100_40gb gpus=256 batch_size=4 accumulate=2 model.checkpoint=blocks price=4"
# mosaicml/diffusion's README and SD-2-base-*.yaml: 8 A100, micro-batches of 16, latents made beforehand.
MOSAIC = f"{SD2} {HALF} trainer=ddp ema=none gpu=a100_40gb gpus=8 batch_size=16 accumulate=16 +stages.encode={{}}"
PLANS = {
    "sd_base": "experiment=sd_base gpus=64 price=4 dataset_images=2e9",
    "sd_base_512": "experiment=sd_base_512 gpus=64 price=4 dataset_images=2e8",
    "finetune_lora_512": f"experiment=finetune adapter=[lora] {SD1} image_size=512 {HALF} gpu=rtx4090_24gb",
    "dit_xl2": f"model=dit_xl2 autoencoder=kl_f8 text_encoder=clip_l image_size=256 {HALF} trainer=ddp gpus=8 "
    "batch_size=32 max_steps=400000 +stages.encode={}",
    "quickstart": "experiment=quickstart gpu=here verify=true",
    "sd_v1_256": f"experiment=sd_base {V1} max_steps=237000",
    "sd_v1_512": f"experiment=sd_base_512 {V1} max_steps=934000",  # 194,000 + 515,000 + 225,000, up to v1.4
    "sd2_256": f"{MOSAIC} image_size=256 max_steps=550000",
    "sd2_512": f"{MOSAIC} image_size=512 max_steps=850000",
}
PEAK, HOURS, COST = 312e12, 150_000, 600_000  # an A100's in bfloat16; of Stable Diffusion 1


def planned(name: str) -> dict[str, float | str]:
    """What task=plan writes of a configuration, by what it is."""
    file = HERE / f"{name}.csv"
    command = [sys.executable, "-m", "ldm.run", "task=plan", *PLANS[name].split(), f"output={file}"]
    print(f"--- {name}: {' '.join(command[3:])}", flush=True)
    subprocess.run(command, check=True)
    return read(name)


def read(name: str) -> dict[str, float | str]:
    with (HERE / f"{name}.csv").open() as file:
        return {row["what"]: row["value"] for row in csv.DictReader(file)}


def published() -> list[dict[str, object]]:
    """What was published, what the plan says, and how much larger the first is."""
    phases = [read(name) for name in ("sd_v1_256", "sd_v1_512")]
    arithmetic = sum(_flops(p) * float(p["steps"]) * 256 for p in phases)
    useful = sum(_flops(p, once=True) * float(p["steps"]) * 256 for p in phases)
    hours = sum(float(p["GPU-hours"]) for p in phases)
    cost = sum(float(p["cost at 4 a GPU-hour"]) for p in phases)
    speeds = [float(read(name)["pictures a second"]) for name in ("sd2_256", "sd2_512")]
    rows = [
        ("SD 1 to v1.4: GPU-hours of A100", HOURS, hours),
        ("SD 1 to v1.4: cost at 4 a GPU-hour", COST, cost),
        ("SD 1 to v1.4: share of the peak, recomputation counted", arithmetic / (HOURS * 3600 * PEAK), 0.25),
        ("SD 1 to v1.4: share of the peak, recomputation not counted", useful / (HOURS * 3600 * PEAK), ""),
        ("SD 2, 256 pixels, 8 A100: pictures a second", 1100, speeds[0]),
        ("SD 2, 512 pixels, 8 A100: pictures a second", 290, speeds[1]),
    ]
    return [{"what": w, "published": p, "planned": v, "planned/published": v and float(v) / p} for w, p, v in rows]


def _flops(found: dict[str, float | str], once: bool = False) -> float:
    """Of a step of one process; once: without what is recomputed."""
    total = next(float(v) for k, v in found.items() if k.startswith("a step of "))
    return total - (8 * float(found["recomputed in it"]) if once else 0)


def main(asked: list[str]) -> None:
    for name in asked or PLANS:
        planned(name)
    rows = published()
    with (HERE / "published.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print((HERE / "published.csv").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
