"""All that has to be known on the day of the first GPU, in one command.

    python experiments/012_gpu/run.py [--minutes 10] [--peak FLOPS] [--stages gpu_tests,training,sampling,steps]
    python experiments/012_gpu/run.py --toy        # the same, tiny, on a CPU

Each part is guarded: an error, or no time left, is a row with its reason, and the others go on. Writes results.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm import Pipeline
from ldm.build import build
from ldm.checkpoints.components import build_components
from ldm.config.root import conf_dir, plain
from ldm.config.schema import register
from ldm.data.shards.writer import write_dataset
from ldm.data.sources.shapes import ShapesSource
from ldm.diffusion.condition import Condition
from ldm.memory.plan import plan
from ldm.models.block import compile_network
from ldm.tasks.work.encode import encode_shards
from ldm.text.tokenizer import build_tokenizer
from ldm.training.ema import EMA
from ldm.training.run import fit
from ldm.training.run.fit import train_run

HERE = Path(__file__).parent
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, SXM cards, by their makers' sheets
GOALS = {"mfu": 0.41, "speed of diffusers eager": 1.3, "speed of diffusers compiled": 1.0}
BEST = "best of ours"  # the case that the goals are for
STAGES = ("gpu_tests", "training", "sampling", "steps")
WORDS = ["text_encoder=small", "text_encoder.width=768", "text_encoder.heads=12"]  # as wide as CLIP-L, and no download


@dataclass
class Size:
    """How large everything is: Stable Diffusion's own, on a card of 80 GB."""

    device: str = "cuda"
    model: list[str] = field(default_factory=lambda: [*WORDS, "autoencoder.pretrained=null"])
    batches: dict[int, int] = field(default_factory=lambda: {256: 32, 512: 16})  # by pixels
    steps: int = 3  # between two looks at the clock
    rounds: int = 7
    backend: str = "inductor"
    sampling: tuple[str, ...] = ("eager", "blocks", "whole", "graphs")
    drawn: tuple[int, ...] = (1, 8)  # pictures at once
    sampler_steps: int = 20
    run_steps: int = 24
    count: int = 512  # pictures in the data
    trainer: list[str] = field(default_factory=lambda: ["trainer=default", "trainer.precision=bf16-mixed"])


TOY = Size(
    "cpu",
    [
        *("model.block_channels=[16,32]", "model.attention_levels=[true,false]", "model.layers_per_block=1"),
        *("+model.norm_groups=4", "model.num_heads=2", "model.cross_attention_dim=64"),
        *("text_encoder=small_tiny", "autoencoder=kl_tiny"),
    ],
    batches={32: 2},
    steps=1,
    rounds=2,
    backend="eager",
    sampling=("eager", "blocks"),
    drawn=(1,),
    sampler_steps=3,
    run_steps=6,
    count=24,
    trainer=["trainer=debug"],
)


class Results:
    """Rows of what was measured, with what it was measured on, until the time is up."""

    def __init__(self, size: Size, minutes: float, peak: float | None):
        self.size, self.end = size, time.monotonic() + 60 * minutes
        self.machine = machine(size.device)
        self.peak = peak or next((p for n, p in PEAK.items() if n in self.machine["device"]), None)
        self.rows: list[dict[str, Any]] = []

    def add(self, stage: str, case: str, what: str, value: float | str, spread: float | None = None) -> None:
        """spread: (largest - smallest) / median of the rounds."""
        goal = GOALS.get(what) if BEST in case and self.size.device == "cuda" else None
        if what == "mfu" and not any(n in self.machine["device"] for n in ("H100", "H200")):
            goal = None
        number = isinstance(value, float | int)
        verdict = "" if goal is None or not number else "met" if value >= goal else "missed"
        row = {"stage": stage, "case": case, "what": what, "value": f"{value:.4g}" if number else value}
        row |= {"spread": "" if spread is None else f"{spread:.3f}", "goal": goal or "", "verdict": verdict}
        self.rows.append(row)
        print(f"{stage} | {case} | {what}: {row['value']}", flush=True)

    def guarded(self, stage: str, case: str, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives; None, and a row with the reason, where there is no time or it fails."""
        if time.monotonic() > self.end:
            return self.add(stage, case, "left out", "the minutes were over")
        try:
            return function(*args)
        except Exception as error:
            return self.add(stage, case, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
        finally:
            if self.size.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*self.rows[0], *self.machine])
            writer.writeheader()
            writer.writerows({**row, **self.machine} for row in self.rows)
        table = Table(*self.rows[0], title=", ".join(f"{k} {v}" for k, v in self.machine.items()))
        for row in self.rows:
            table.add_row(*map(str, row.values()))
        Console(width=140).print(table)
        print(f"goals: {', '.join(f'{name} >= {goal}' for name, goal in GOALS.items())} (MFU on H100 and H200)")


def machine(device: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "lightning": L.__version__}
    if device == "cpu":
        return {"device": f"CPU toy ({platform.machine()})", "driver": "", "cuda": "", **versions}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda), **versions}


def composed(*overrides: str) -> dict[str, Any]:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return plain(compose("config", ["experiment=sd_base", "logger=none", *overrides]))


# -- tests ------------------------------------------------------------------------------------------------------------


def gpu_tests(results: Results) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "tests/training/test_gpu.py"]
    left = max(10.0, (results.end - time.monotonic()) / 3)  # at most a third: the figures are what the day is for
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=left)
    print(done.stdout[-4000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    last = next((line for line in reversed(done.stdout.splitlines()) if " in " in line), "no summary")
    results.add("gpu_tests", "tests/training/test_gpu.py", "exit", done.returncode)
    for line in [last, *lines]:
        results.add("gpu_tests", "tests/training/test_gpu.py", "says", line[:200])


# -- training ---------------------------------------------------------------------------------------------------------


def diffusers_unet(node: dict[str, Any]) -> nn.Module:
    """diffusers' network of the same architecture, which has the same names."""
    attends = node["attention_levels"]
    return diffusers.UNet2DConditionModel(
        block_out_channels=node["block_channels"],
        layers_per_block=node["layers_per_block"],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        cross_attention_dim=node["cross_attention_dim"],
        attention_head_dim=node["num_heads"],  # its name for the number of heads
        norm_num_groups=node.get("norm_groups", 32),
    )


class Variants:
    """One network eager, compiled by blocks, and whole: the same weights, of which one forward is in use."""

    def __init__(self, network: nn.Module, backend: str):
        self.network, self.forwards = network, {"eager": {}}
        for how in ("blocks", "whole"):
            compile_network(network, how, backend=backend)
            self.forwards[how] = {m: m.__dict__["forward"] for m in network.modules() if "forward" in m.__dict__}
            self.use("eager")

    def use(self, how: str) -> None:
        for module in self.network.modules():
            module.__dict__.pop("forward", None)
        for module, forward in self.forwards[how].items():
            module.forward = forward


class Training:
    """Steps on the same latents with the same optimizer, average and precision, of whichever network."""

    def __init__(self, size: Size, node: dict[str, Any], pixels: int, factor: int):
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.size, self.device, batch, side = size, size.device, size.batches[pixels], pixels // factor
        with torch.device(self.device):
            theirs = diffusers_unet(node).train()
            ours = build(node, "model").to(memory_format=torch.channels_last).train()
        ours.load_state_dict(theirs.state_dict())
        x, eps = torch.randn(2, batch, 4, side, side, device=self.device)
        t, context = torch.rand(batch, device=self.device) * 999, torch.randn(batch, 77, node["cross_attention_dim"])
        context = context.to(self.device)
        self.eps, self.held = eps, {"ours": Updated(ours), "diffusers": Updated(theirs)}
        variants, compiled = Variants(ours, size.backend), torch.compile(theirs, backend=size.backend)

        def our(how: str) -> Callable[[], Tensor]:
            def call() -> Tensor:
                variants.use(how)
                return ours(x, t, Condition(context=context))

            return call

        self.calls = {f"ours {how}": our(how) for how in variants.forwards}
        self.calls |= {"diffusers eager": lambda: theirs(x, t, context).sample}
        self.calls |= {"diffusers compiled": lambda: compiled(x, t, context).sample}

    def forward(self, name: str) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.calls[name]().float()

    def step(self, name: str) -> None:
        F.mse_loss(self.forward(name), self.eps).backward()
        self.held[name.split()[0]].update()

    @torch.no_grad()
    def check(self) -> float:
        """The largest difference of the two eager networks in float32, in deviations of the output."""
        ours, theirs = (self.calls[name]() for name in ("ours eager", "diffusers eager"))
        return float((ours - theirs).abs().max() / theirs.std())

    def answer(self, name: str) -> tuple[Tensor, Tensor]:
        """An output and the gradients' norm, with which equality is judged."""
        network = self.held[name.split()[0]].network
        try:
            output = self.forward(name)
            F.mse_loss(output, self.eps).backward()
            norm = nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
            return output.detach(), norm
        finally:
            network.zero_grad()

    def warm(self, name: str) -> str:
        """The first step also allocates; what does not fit is found out here."""
        self.step(name)
        return name

    def seconds(self, names: list[str], end: float) -> dict[str, list[float]]:
        """Of a step, by name; they take turns, in as many rounds as there is time for."""
        taken: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(self.size.rounds):
            for name in names:
                start = self.now()
                for _ in range(self.size.steps):
                    self.step(name)
                taken[name].append((self.now() - start) / self.size.steps)
            if turn and time.monotonic() > end:
                break
        return taken

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Updated:
    """A network with what a step does to it."""

    def __init__(self, network: nn.Module):
        self.network, self.parameters = network, dict(network.named_parameters())
        self.optimizer = torch.optim.AdamW(list(self.parameters.values()), lr=1e-6, fused=True)
        self.ema = EMA()
        self.ema.start(self.parameters)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.parameters)


def flops(node: dict[str, Any], side: int) -> float:
    """Of one image's forward and backward pass, counted on the meta device."""
    with torch.device("meta"):
        network = build(node, "model")
        given = torch.empty(1, 4, side, side), torch.empty(1)
        context = torch.empty(1, 77, node["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            network(*given, Condition(context=context)).sum().backward()
    return float(counter.get_total_flops())


def training(results: Results, pixels: int) -> None:
    size, case = results.size, f"{pixels} px x {results.size.batches[pixels]}"
    config = composed(*size.model)
    node, factor = config["model"], 2 ** (len(config["autoencoder"]["block_channels"]) - 1)
    made = Training(size, node, pixels, factor)
    exact = made.check()
    results.add("training", f"{case}, ours eager", "largest difference in float32, in deviations", exact)
    if not exact < 1e-2:  # convolutions on a GPU keep ten bits
        raise ArithmeticError(f"not diffusers' network: outputs differ by {exact:.3g}, so nothing is timed")
    good, reference = [], made.answer("diffusers eager")
    for name in made.calls:
        start = time.perf_counter()
        answer = results.guarded("training", f"{case}, {name}", made.answer, name)
        if answer is None:
            continue
        results.add("training", f"{case}, {name}", "seconds to its first gradients", time.perf_counter() - start)
        output = float((answer[0] - reference[0]).abs().max() / reference[0].std())
        norm = float((answer[1] / reference[1] - 1).abs())
        results.add("training", f"{case}, {name}", "largest difference of outputs, in deviations", output)
        if output < 0.1 and norm < 0.05:  # bfloat16 rounds to 2^-8, layer after layer
            good.append(name)
        else:
            results.add("training", f"{case}, {name}", "failed", f"not equal: gradients' norm differs by {norm:.3g}")
    good = [name for name in good if results.guarded("training", f"{case}, {name}", made.warm, name)]
    taken = made.seconds(good, results.end)
    median = {name: statistics.median(values) for name, values in taken.items()}
    work = flops(node, pixels // factor) * size.batches[pixels]
    for name, values in taken.items():
        spread = (max(values) - min(values)) / median[name]
        results.add("training", f"{case}, {name}", "images/s", size.batches[pixels] / median[name], spread)
    best = min((n for n in median if n.startswith("ours")), key=median.__getitem__)
    for name in median:
        label = f"{case}, {name}" if name != best else f"{case}, {BEST}, {name}"
        if results.peak:
            results.add("training", label, "mfu", work / median[name] / results.peak)
        for theirs in [n for n in median if n.startswith("diffusers") and name.startswith("ours")]:
            results.add("training", label, f"speed of {theirs}", median[theirs] / median[name])


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampling(results: Results, how: str, count: int) -> None:
    size = results.size
    pixels = max(size.batches)
    torch._dynamo.reset()
    parts = build_components(composed(*size.model, f"image_size={pixels}"), device=size.device)
    parts.text_encoder.set_tokenizer(build_tokenizer(["a photo of a red cat"], parts.text_encoder.vocab_size))
    parts.folder = Path("random weights")
    nn.init.normal_(parts.network.conv_out.weight, std=0.02)
    parts.autoencoder.latents.mean.zero_()
    parts.autoencoder.latents.scale.fill_(1.0)
    pipe = Pipeline(parts.for_sampling()).to(size.device)
    parts.network.to(torch.bfloat16)
    if how != "eager":
        compile_network(parts.network, how, backend=size.backend)  # as Pipeline.compile does
    times: list[float] = []
    for draw in range(4):  # the first compiles and captures
        start, last, wait = None, None, torch.cuda.synchronize if size.device == "cuda" else lambda: None
        for step in pipe.steps(["a photo of a red cat"] * count, num_steps=size.sampler_steps, seed=[*range(count)]):
            if start is None:  # the first step also reads the prompt
                wait()
                start = time.perf_counter()
            last = step.x_next
        wait()
        assert start is not None and last is not None and last.isfinite().all()
        times += [(time.perf_counter() - start) / (size.sampler_steps - 1)] if draw else []
    median, case = statistics.median(times), f"{pixels} px x {count}, guided, {how}"
    spread = (max(times) - min(times)) / median
    results.add("sampling", case, "ms a step", 1000 * median, spread)
    results.add("sampling", case, "latents/s", count / (median * size.sampler_steps), spread)


# -- what a real run waits for ----------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Of each step after the first few: warnings of synchronisation, and how long the loop waited for its batch."""

    decides = False

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.syncs: list[int] = []
        self._ended = self._caught = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._ended is not None and batch_idx > 3:
            self.waits.append(now - self._ended)
        if trainer.strategy.root_device.type == "cuda" and batch_idx > 3:
            self._caught = warnings.catch_warnings(record=True)
            self.found = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self.syncs.append(sum("synchroniz" in str(w.message) for w in self.found))
            self._caught.__exit__(None, None, None)
            self._caught = None
        now = time.perf_counter()
        if self._ended is not None and batch_idx > 3:
            self.steps.append(now - self._ended)
        self._ended = now


def steps(results: Results) -> None:
    size = results.size
    torch._dynamo.reset()
    pixels = min(size.batches)
    case = f"{pixels} px x {size.batches[pixels]}, a run on latents"
    with tempfile.TemporaryDirectory() as folder:
        latents = encoded(size, pixels, Path(folder))
        asked = [*size.model, *size.trainer, f"image_size={pixels}", f"batch_size={size.batches[pixels]}"]
        asked += [f"shards={latents}", f"max_steps={size.run_steps}", "lr_scheduler=constant", "name=run"]
        asked += [f"callbacks.{name}=null" for name in ("validation", "jump_to_x0", "samples", "checkpoints")]
        asked += [f"trainer.accelerator={'gpu' if size.device == 'cuda' else 'cpu'}", "+stages.encode=true"]
        config, watch = composed(*asked), Watch()
        if size.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with watched(watch):
            train_run(config, lambda digest: Path(folder) / "run")
    if watch.syncs:
        results.add("steps", case, "synchronisations a step", statistics.median(watch.syncs))
        results.add("steps", case, "synchronisations of the worst step", max(watch.syncs))
    results.add("steps", case, "share of the time that waits for data", sum(watch.waits) / sum(watch.steps))
    expected = plan(config).total / 2**30
    results.add("steps", case, "task=plan, GiB", expected)
    if size.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        results.add("steps", case, "peak, GiB", peak)
        results.add("steps", case, "peak over plan", peak / expected)


def encoded(size: Size, pixels: int, folder: Path) -> Path:
    """Shards of latents of pictures made here, by an autoencoder that has hardly been trained."""
    source = ShapesSource(count=size.count, validation=6, unseen=2, image_size=pixels)
    shards = write_dataset(source, folder / "shards", facts=source.facts, identity=source.identity()).output
    quiet = [f"callbacks.{name}=null" for name in ("validation", "reconstructions", "jump_to_x0", "samples")]
    asked = [*size.model, *size.trainer, *quiet, "module=autoencoder", f"shards={shards}", f"image_size={pixels}"]
    asked += ["max_steps=1", "batch_size=2", "callbacks.latent_statistics.num_images=16", "name=autoencoder"]
    run = train_run(composed(*asked), lambda digest: folder / "autoencoder").path
    encode = composed(*size.model, f"shards={shards}", f"checkpoint={run}", f"image_size={pixels}")
    return encode_shards(encode, folder / "latents").output


@contextmanager
def watched(callback: L.Callback) -> Iterator[None]:
    """Within the block every run has this callback too."""
    usual = fit.build

    def with_it(node: Any, path: str = "config", **kwargs: Any) -> Any:
        if path == "trainer":
            kwargs["callbacks"] = [callback, *kwargs["callbacks"]]
        return usual(node, path, **kwargs)

    fit.build = with_it
    try:
        yield
    finally:
        fit.build = usual


def measure(size: Size, minutes: float, peak: float | None = None, stages: tuple[str, ...] = STAGES) -> Results:
    results = Results(size, minutes, peak)
    if "gpu_tests" in stages:
        results.guarded("gpu_tests", "tests/training/test_gpu.py", gpu_tests, results)
    if "training" in stages:
        for pixels in size.batches:
            results.guarded("training", f"{pixels} px", training, results, pixels)
    if "sampling" in stages:
        for count in size.drawn:
            for how in size.sampling:
                results.guarded("sampling", f"{count} at once, {how}", sampling, results, how, count)
    if "steps" in stages:
        results.guarded("steps", "a run on latents", steps, results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--peak", type=float, help="bfloat16 FLOPS of a card that is not among " + ", ".join(PEAK))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--toy", action="store_true", help="tiny, on the CPU")
    asked = parser.parse_args()
    if not asked.toy and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch: --toy runs the same, tiny, on the CPU.")
    unknown = set(asked.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"--stages={','.join(sorted(unknown))} is not known: choose of {','.join(STAGES)}.")
    results = measure(TOY if asked.toy else Size(), asked.minutes, asked.peak, tuple(asked.stages.split(",")))
    results.write(HERE / ("toy.csv" if asked.toy else "results.csv"))


if __name__ == "__main__":
    main()
