"""One training step of Stable Diffusion 1's U-Net, ours and diffusers', each in a process of its own.

    python experiments/005_stable_diffusion/training_step.py

Random weights, batch 1, 32x32 latents, float32, AdamW: forward, backward, update. Writes training_step.csv.
"""

import csv
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
STEPS = 2  # the first also allocates the optimizer's state


def ours():
    import yaml

    from ldm.config.root import conf_dir
    from ldm.diffusion.condition import Condition
    from ldm.models.unet import UNet

    node = yaml.safe_load((conf_dir() / "model/unet_sd15.yaml").read_text())
    network = UNet(**{k: v for k, v in node.items() if not k.startswith("_")})
    return network, lambda x, t, context: network(x, t, Condition(context=context))


def diffusers():
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return network, lambda x, t, context: network(x, t, context).sample


def measure(side: str) -> None:
    import torch

    torch.manual_seed(0)
    network, call = {"ours": ours, "diffusers": diffusers}[side]()
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    x, eps, context = torch.randn(1, 4, 32, 32), torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768)
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = (call(x, torch.tensor([500.0]), context) - eps).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in network.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{parameters},{seconds:.2f},{peak:.2f},{torch.__version__},{torch.get_num_threads()}")


def main() -> None:
    rows = []
    for side in ("ours", "diffusers", "ours", "diffusers"):
        done = subprocess.run([sys.executable, __file__, side], capture_output=True, text=True, check=True)
        values = done.stdout.strip().splitlines()[-1].split(",")
        keys = ["parameters", "seconds_second_step", "peak_gib", "torch", "threads"]
        rows.append({"side": side, **dict(zip(keys, values, strict=True)), "machine": platform.processor() or "x86_64"})
        print(rows[-1], flush=True)
    with (HERE / "training_step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
