"""A training step of LoRA: our hooks against peft's layers in diffusers' U-Net, same sizes, in one run.

    python experiments/006_adapters/speed.py [REPEATS]

A U-Net of Stable Diffusion 1's shape and a quarter of its width, latents 4x32x32, batch 2, LoRA of rank 16 on attention
(to_q, to_k, to_v, to_out.0), forward, backward and AdamW. One thread; the candidates take turns. Writes speed.csv.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

import diffusers
import peft
import torch

from ldm.adapters.lora import LoRA
from ldm.diffusion.condition import Condition
from ldm.models.unet import UNet
from ldm.text.null import NullText

WIDTHS = (80, 160, 320, 320)


def main(repeats: int = 15) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = UNet(block_channels=WIDTHS, norm_groups=16).requires_grad_(False).to(memory_format=torch.channels_last)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=WIDTHS, norm_num_groups=16, cross_attention_dim=768, attention_head_dim=8
    )
    theirs.requires_grad_(False)
    x, context, t = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 768), torch.tensor([10.0, 500.0])
    adapter = LoRA(rank=16)
    adapter.attach(ours, NullText())
    theirs.add_adapter(peft.LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in adapter.parameters())
    steps = {
        "ours": stepper(list(adapter.parameters()), lambda: ours(x, t, Condition(context=context))),
        "diffusers + peft": stepper(trained, lambda: theirs(x, t, context).sample),
    }
    times: dict[str, list[float]] = {who: [] for who in steps}
    for repeat in range(repeats + 2):
        for who, step in steps.items():
            start = time.process_time()
            step()
            if repeat > 1:
                times[who].append(time.process_time() - start)
    seconds = {who: statistics.median(values) for who, values in times.items()}
    row = {f"{who}_ms": f"{1000 * value:.1f}" for who, value in seconds.items()}
    row |= {"ratio": f"{seconds['ours'] / seconds['diffusers + peft']:.3f}", "repeats": str(repeats)}
    print(row)
    with (Path(__file__).parent / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)


def stepper(parameters, forward):
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step():
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
