"""What torch.compile costs and saves on a CPU: half of Stable Diffusion's U-Net, eager, its blocks, the whole.

    python experiments/012_gpu/compile_cpu.py [ROUNDS]

Latents 4x32x32, batch 2, float32, two threads, random weights, inductor without its caches. A training step is forward,
backward and fused AdamW; a forward is without gradients. First: seconds until the first is done, compilation included,
by the clock and of processors (the C++ compiler's too). Then the candidates take turns. Writes compile_cpu.csv.
"""

import csv
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch._inductor.config as inductor

from ldm.diffusion.condition import Condition
from ldm.models.block import blocks_of, compile_network
from ldm.models.unet import UNet

WIDTHS = (160, 320, 640, 640)
HOW = ("none", "blocks", "whole")


def main(rounds: int = 5) -> None:
    torch.set_num_threads(2)
    inductor.force_disable_caches = True
    g = torch.Generator().manual_seed(0)
    x, context, t = (
        torch.randn(2, 4, 32, 32, generator=g),
        torch.randn(2, 77, 768, generator=g),
        torch.tensor([9.0, 500.0]),
    )
    actions, rows = {}, []
    for how in HOW:
        torch.manual_seed(0)
        network = UNet(block_channels=WIDTHS).to(memory_format=torch.channels_last)
        torch.nn.init.normal_(network.conv_out.weight, std=0.02)
        compile_network(network, how)
        for what, action in made(network, x, t, context).items():
            clock, work = time.perf_counter(), processors()
            action()
            row = {"what": what, "compile": how, "blocks": len(blocks_of(network))}
            row |= {"first_s": f"{time.perf_counter() - clock:.1f}", "first_cpu_s": f"{processors() - work:.1f}"}
            rows.append(row)
            actions[what, how] = action
            print(rows[-1], flush=True)
    times = {key: [] for key in actions}
    for _ in range(rounds):
        for key, action in actions.items():
            start = time.perf_counter()
            action()
            times[key].append(time.perf_counter() - start)
    for row in rows:
        taken = times[row["what"], row["compile"]]
        median = statistics.median(taken)
        row |= {"median_s": f"{median:.3f}", "min_s": f"{min(taken):.3f}", "max_s": f"{max(taken):.3f}"}
        row |= {"of_eager": f"{median / statistics.median(times[row['what'], 'none']):.3f}"}
        row |= {"rounds": rounds, "torch": torch.__version__, "threads": torch.get_num_threads()}
        print(row)
    with (Path(__file__).parent / "compile_cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def made(network, x, t, context):
    """A training step and a forward of a network, as functions of nothing."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step():
        network(x, t, Condition(context=context)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward():
        network(x, t, Condition(context=context))

    return {"training step": step, "forward": forward}


def processors() -> float:
    """Seconds of this process and of those that it has waited for."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(s.ru_utime + s.ru_stime for s in spent)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
