"""diffusers' own loop tests over our samplers: python run.py PATH/tests/schedulers [loops.csv]. See README.md."""

from __future__ import annotations

import csv
import importlib
import inspect
import re
import sys
import threading
import unittest
import warnings
from pathlib import Path
from queue import Queue
from types import ModuleType, SimpleNamespace

import diffusers
import torch

from ldm.build import build
from ldm.checkpoints.sampler import solver_of
from ldm.formats.schedulers import _SAMPLERS, nodes

warnings.simplefilter("ignore")
diffusers.utils.logging.set_verbosity(60)
# Why ours is not diffusers' number where the reason is diffusers' own. By class and test; the rest has to pass.
REASONS = {
    "LMSDiscreteScheduler.test_full_loop_with_noise": "begun within its grid theirs has one slope for four weights",
    "LMSDiscreteScheduler.test_full_loop_device_karras_sigmas": "float32 table of theirs (8e-6 of the sum)",
    "DDPMScheduler.test_full_loop_with_noise": "float32 table of theirs (with a float64 one theirs is 387.9669)",
    "*.test_full_loop_with_noise": "float32 sigmas of theirs (1e-6 of the sum, their tolerance 2e-7)",
    "DPMSolverSDEScheduler.*": "torchsde's Brownian tree at float32 sigmas, ours draws for itself",
}
ON_RATIO = ("LMS", "Euler", "Heun", "KDPM2", "DPMSolverSDE")  # classes whose sample is x_t/alpha


class Shim:
    """diffusers' interface over one of our solvers, made from the scheduler's configuration alone."""

    theirs: type

    def __init__(self, made=None, **said):
        self.config = (made or self.theirs(**said)).config  # with every default spelled
        config = {"_class_name": self.theirs.__name__, **self.config}
        made = {key: build(node, key) for key, node in nodes(config).items()}
        self.schedule, self.parameterization = made["scheduler"], made["parameterization"]
        self.solver = solver_of(None, config)
        self.order = getattr(self.theirs, "order", 1)
        self.on_ratio = self.theirs.__name__.startswith(ON_RATIO)
        self.timesteps = self.prk_timesteps = self.plms_timesteps = None
        if "DDPM" in self.theirs.__name__:
            self.set_timesteps(len(self))

    @classmethod
    def from_config(cls, config, **more):
        return cls(cls.theirs.from_config(config, **more))

    def __len__(self):
        return self.config.num_train_timesteps

    def set_timesteps(self, n, device=None, **_):
        self.levels = self.solver.levels(self.schedule, n)
        self.calls, x = [], torch.zeros(1, 1, 2, 2)

        def denoise(x_t, level):
            self.calls.append((float(level.timestep), min(len(walked), len(self.levels) - 2), level))
            return torch.zeros_like(x_t)

        walked = []
        for step in self.solver(denoise, self.levels, x, torch.zeros_like):
            walked.append(step.level)
        self.timesteps = torch.tensor([t for t, _, _ in self.calls])
        runge_kutta = 12 if self.solver.name == "pndm_runge_kutta" else 0
        self.prk_timesteps, self.plms_timesteps = self.timesteps[:runge_kutta], self.timesteps[runge_kutta:]
        self.walk = None

    @property
    def init_noise_sigma(self):
        return torch.tensor(self.levels.start / (self.levels[0].alpha if self.on_ratio else 1.0))

    def _index(self, t):
        """Of the call at this timestep; the second of two that stand beside each other, as theirs."""
        found = [i for i, (told, _, _) in enumerate(self.calls) if abs(told - float(t)) < 1e-3]
        return found[1 if len(found) > 1 and "PNDM" not in self.theirs.__name__ else 0]

    def scale_model_input(self, sample, t=None):
        if not self.on_ratio:
            return sample
        level = self.calls[self._index(t) if self.walk is None else self.call][2]
        return sample * level.alpha

    def add_noise(self, sample, noise, timesteps):
        level = self.calls[self._index(timesteps[0])][2]
        if self.on_ratio:
            return sample + float(level.ratio) * noise
        return level.alpha * sample + level.sigma * noise

    def _start(self, t, sample):
        self.call = self.first = self._index(t)
        self.asked, self.given = Queue(), Queue()
        levels = self.levels[self.calls[self.call][1] :]

        def denoise(x_t, level):
            self.asked.put((x_t, level))
            return self.given.get()

        def noise(like):
            return torch.randn(like.shape, generator=self.generator, dtype=torch.float32).to(like)

        def walk():
            *_, step = self.solver(denoise, levels, sample.clone(), noise)
            self.asked.put((step.x_next, levels[-1]))

        self.walk = threading.Thread(target=walk, daemon=True)
        self.walk.start()
        self.at = self.asked.get()

    def step(self, output, t, sample, *rest, generator=None, **_):
        self.generator = next((r for r in rest if isinstance(r, torch.Generator)), generator)
        if self.walk is None:
            self._start(t, sample)
        x_t, level = self.at
        ours = sample * (level.alpha if self.on_ratio else 1.0)
        x0 = self.parameterization.x0(ours, output, level)
        # The tests scale samples in between: where a step starts, x becomes theirs; half-way, the slope does.
        if self.on_ratio and self.call > self.first and self.calls[self.call][1] == self.calls[self.call - 1][1]:
            x0 = x0 + x_t / level.alpha - sample
        else:
            x_t.copy_(ours)
        self.given.put(x0)
        self.at = self.asked.get()
        self.call += 1
        x, level = self.at
        reached = x / level.alpha if self.on_ratio else x.clone()
        return SimpleNamespace(prev_sample=reached)

    step_prk = step_plms = step


def shimmed(name: str) -> type:
    sys.modules.setdefault("torchsde", ModuleType("torchsde"))
    if name == "DPMSolverSDEScheduler":
        theirs = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    else:
        theirs = getattr(diffusers, name)
    return type(name, (Shim,), {"theirs": theirs})


def outcome(case: type, name: str) -> str:
    """ "" where the test passes, else the line that failed."""
    try:
        getattr(case(name), name)()
    except Exception as error:
        return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:120] or type(error).__name__
    return ""


def main(folder: Path, output: Path) -> None:
    sys.path.insert(0, str(folder.parent.parent))
    package = f"{folder.parent.name}.{folder.name}"
    rows = []
    for file in sorted(folder.glob("test_scheduler_*.py")):
        try:
            module = importlib.import_module(f"{package}.{file.stem}")
        except Exception as error:
            print(f"{file.name} is passed over: {error}")
            continue
        names = [n for n in _SAMPLERS if hasattr(module, n)]
        cases = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, unittest.TestCase)]
        for case in cases:
            tested = [n for n in names if any(c.__name__ == n for c in getattr(case, "scheduler_classes", ()))]
            if case.__module__ != module.__name__ or not tested:
                continue
            found = [n for n in dir(case) if n.startswith("test_") and re.search(r"loop|switch", n)]
            before = {n: outcome(case, n) for n in found}
            kept, classes = {n: getattr(module, n) for n in names}, case.scheduler_classes
            for n in names:
                setattr(module, n, shimmed(n))
            case.scheduler_classes = tuple(getattr(module, c.__name__) for c in classes)
            for n in found:
                said = outcome(case, n)
                key = next((k for k in (f"{tested[0]}.{n}", f"{tested[0]}.*", f"*.{n}") if k in REASONS), None)
                reason = f"{REASONS[key]}; " if said and key else ""
                rows.append((tested[0], n, before[n] == "", said == "", reason + said))
            case.scheduler_classes = classes
            for n, cls in kept.items():
                setattr(module, n, cls)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "test", "theirs", "ours", "reason"))
        writer.writerows(rows)
    passed = sum(ours for _, _, theirs, ours, _ in rows if theirs)
    total = sum(theirs for _, _, theirs, _, _ in rows)
    print(f"{total} of {len(rows)} loops pass with theirs, {passed} of those with ours")
    for name, test, _, ours, reason in rows:
        if not ours:
            print(f"  {name}.{test}: {reason}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).with_name("loops.csv")))
