"""Time and peak memory of Stable Diffusion's networks at full size, ours and diffusers', random weights.

    python experiments/005_stable_diffusion/full_size.py            # all, each in a process of its own
    python experiments/005_stable_diffusion/full_size.py PART WHO   # one: a line of JSON

float32, one thread, batch 1: the U-Nets on 32x32 latents, the autoencoder on 256 pixels. The best of three runs after
one to warm up; peak_mib is the process' largest resident set, imports_mib what it was before the network was built.
"""

import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

PARTS = ("sd15_unet", "sd21_unet", "kl_f8")
BUILT = {"sd15_unet": ("model", "unet_sd15"), "sd21_unet": ("model", "unet_sd21"), "kl_f8": ("autoencoder", "kl_f8")}
CONTEXT = {"sd15_unet": 768, "sd21_unet": 1024}


def main() -> None:
    rows = []
    for part in PARTS:
        for who in ("ours", "diffusers"):
            command = [sys.executable, __file__, part, who]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(printed.splitlines()[-1]))
            print(rows[-1], flush=True)
    with (Path(__file__).parent / "full_size.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def one(part: str, who: str) -> dict[str, str | float]:
    torch.set_num_threads(1)
    make, forward = (ours if who == "ours" else diffusers_)(part)
    imports, start = peak_mib(), time.perf_counter()
    network = make().eval()
    build_s, seconds = time.perf_counter() - start, []
    for _ in range(4):
        start = time.perf_counter()
        forward(network)
        seconds.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in network.parameters())
    return {
        "part": part,
        "who": who,
        "parameters": parameters,
        "build_s": round(build_s, 1),
        "forward_s": round(min(seconds[1:]), 2),
        "imports_mib": round(imports),
        "peak_mib": round(peak_mib()),
    }


def ours(part):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from ldm.config.root import conf_dir
    from ldm.diffusion.condition import Condition

    group, name = BUILT[part]
    node = OmegaConf.load(conf_dir() / group / f"{name}.yaml")
    if part == "kl_f8":
        image = torch.rand(1, 3, 256, 256) * 2 - 1
        return lambda: instantiate(node), lambda kl: kl.decode(kl.encode(image).mode())
    x, context = torch.randn(1, 4, 32, 32), Condition(context=torch.randn(1, 77, CONTEXT[part]))
    return lambda: instantiate(node), lambda unet: unet(x, torch.tensor([500.0]), context)


def diffusers_(part):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    if part == "kl_f8":
        image = torch.rand(1, 3, 256, 256) * 2 - 1
        settings = dict(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
        )
        return lambda: AutoencoderKL(**settings), lambda kl: kl.decode(kl.encode(image).latent_dist.mode()).sample
    heads = {"sd15_unet": {"attention_head_dim": 8}}.get(
        part, {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    )
    x, context = torch.randn(1, 4, 32, 32), torch.randn(1, 77, CONTEXT[part])
    return (
        lambda: UNet2DConditionModel(cross_attention_dim=CONTEXT[part], **heads),
        lambda unet: unet(x, 500.0, context).sample,
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(one(*sys.argv[1:])))
    else:
        main()
