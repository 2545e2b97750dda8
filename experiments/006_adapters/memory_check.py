"""task=plan against this machine: two training steps on the CPU in float32, peak resident memory against the plan.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 python experiments/006_adapters/memory_check.py [blocks]

The two variables make glibc give back what is freed; without them the peak holds gaps too.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from ldm.checkpoints.components import build_components
from ldm.config.root import conf_dir, plain
from ldm.config.schema import register
from ldm.memory.plan import plan
from ldm.training.run.build import build_module

GIVEN = ["model=unet_sd15", "model.block_channels=[96,192,384,384]", "model.cross_attention_dim=128", "ema=none"]
GIVEN += ["autoencoder=kl_f8", "autoencoder.block_channels=[32,64,64,64]", "text_encoder=small", "image_size=256"]
GIVEN += ["batch_size=8", "callbacks=default", "callbacks.samples=null", "callbacks.jump_to_x0=null"]
GIVEN += ["+stages.encode={}", "text_encoder.max_length=32"]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(recompute: str) -> None:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = plain(compose("config", [*GIVEN, f"model.checkpoint={recompute}"]))
    planned = plan(config)
    tiny = torch.nn.Conv2d(8, 8, 3, padding=1)
    tiny(torch.zeros(1, 8, 8, 8)).sum().backward()  # the kernels' libraries are there before the count begins
    before = resident()
    module = build_module(config, build_components(config)).train()
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(2):
        x0 = torch.randn(config["batch_size"], 4, 32, 32)
        cond = module.text_encoder.states(torch.zeros(len(x0), module.text_encoder.max_length, dtype=torch.long))
        prediction = module.predict(x0, cond, torch.rand(len(x0)), torch.randn_like(x0))
        loss = prediction.loss(module.weighting).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # as the module does it
        del loss, cond
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    mib = 2**20
    held = planned.total - max(planned.phases.values())
    print(f"recomputed {recompute}: planned {planned.total / mib:.0f} MiB ({held / mib:.0f} without activations), ")
    print(f"measured {peak / mib:.0f} MiB, ratio {peak / planned.total:.3f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "none")
