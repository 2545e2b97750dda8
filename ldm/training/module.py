"""What both LightningModules share: optimizer, averaged weights, random draws, and losses summed exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, ClassVar, cast

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.devices import laid_out_like, whole
from ldm.errors import ConfigError
from ldm.training.distributed import processes
from ldm.training.ema import EMA
from ldm.training.randomness import Draws
from ldm.training.totals import Totals, means

OptimizerMaker = Callable[..., torch.optim.Optimizer]  # of a list of (name, parameter), as torch.optim's classes are
LearningRate = Callable[[int], float]  # optimizer step -> factor of the optimizer's learning rate
UNREAD = 1000  # steps; then losses are read even where no callback asks for them
GRADIENT_NORM = "train/gradient_norm"  # before it is clipped, once a step


class Diverged(RuntimeError):
    """A loss or a gradient is no longer a number; nothing of this step, or of a later one, has been saved."""

    everywhere = True  # the sum over all processes says so in each


def is_beside(callback: Any, module: type) -> bool:
    """Whether a callback, or its class, is meant for modules of this class: those that it `watches`; else all.

    Raises ConfigError where `watches` is no class.
    """
    watched = getattr(callback, "watches", module)
    if not isinstance(watched, type):
        name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
        raise ConfigError(
            f"{name}.watches is {watched!r}: name a module's class, ldm.training.latent_diffusion.LatentDiffusion or "
            "ldm.training.autoencoder.AutoencoderTraining; without it the callback is for both."
        )
    return issubclass(module, watched)


class TrainedModule(L.LightningModule):
    """Subclasses say which parts they hold (`parts`) and which of them are trained (`trained_parts`).

    Parts are the units of a checkpoint folder: file name -> attribute.

    optimizer: makes one of a list of (name, parameter), such as partial(torch.optim.AdamW, lr=1e-4).
    lr_scheduler: factor of its learning rate at each step (ldm.training.learning_rate); None: 1.
    ema: averages the trained weights; validation, pictures and checkpoints then use both. None: no average.
    seed: of all that training draws.
    """

    kind: ClassVar[str]  # what stands for it in a run's name: latent_diffusion or autoencoder
    term: ClassVar[type[nn.Module]]  # what its loss terms are
    parts: dict[str, str]
    losses: nn.ModuleDict
    totals: Totals

    def __init__(
        self,
        optimizer: OptimizerMaker,
        lr_scheduler: LearningRate | None = None,
        ema: EMA | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.optimizer, self.lr_scheduler, self.ema = optimizer, lr_scheduler, ema
        self.draws = Draws(batch_size=1, seed=seed)  # of the datamodule's geometry when training starts
        self.last_loss = math.nan  # of the newest step whose losses were read

    @property
    def images_per_step(self) -> int:
        return self.draws.global_batch

    @classmethod
    def check_terms(cls, terms: Mapping[str, Any]) -> None:
        """ConfigError for a loss term that is none of this module's, or has a weight that cannot be."""
        for name, term in terms.items():
            if term is not None and not isinstance(term, cls.term):
                raise ConfigError(
                    f"module.losses.{name} ({type(term).__name__}) is no term of module={cls.kind}, whose terms are "
                    f"{cls.term.__name__}s: leave it out of loss=."
                )
            if term is not None and not 0 <= cast(float, term.weight) < math.inf:
                raise ConfigError(f"module.losses.{name}.weight={term.weight}: a number, at least 0.")

    def take_losses(self, terms: Mapping[str, nn.Module | None]) -> None:
        """Holds the loss terms; those that have tensors become parts of the checkpoint."""
        self.check_terms(terms)
        self.losses = nn.ModuleDict({name: term for name, term in terms.items() if term is not None})
        if not self.losses:
            raise ConfigError("module.losses= has no term, so there is nothing to minimise: leave one of them on.")
        self.parts = {**self.parts, **self.loss_parts}

    def count(self, names: Sequence[str]) -> None:
        """Says what of training is summed: train/loss first."""
        self.totals = Totals([*names, GRADIENT_NORM])

    def read_losses(self) -> None:
        """Brings the losses since the last call to the host, summed over all processes, into `totals.values`.

        All processes call it at the same steps. Diverged, with the step, where a loss or a gradient is no number.
        """
        steps = self.totals.reduce()
        if len(steps) < 2:  # none has ended
            return
        first = self.global_step - (len(steps) - 2)
        names, watched = self.totals.names, [self.totals.names.index(n) for n in ("train/loss", GRADIENT_NORM)]
        wrong = (~steps[:, watched, 0].isfinite()).nonzero().tolist()
        if wrong:
            index, column = wrong[0]
            value = means(names, steps[index])[names[watched[column]]]
            raise Diverged(
                f"the {('training loss', 'norm of the gradients')[column]} is {value} at step {first + index}; the "
                "last good checkpoint is untouched. Lower optimizer.lr, raise lr_scheduler.warmup_steps, use "
                "trainer.precision=32-true, or callbacks.skip_nonfinite.in_a_row=5 to leave out such steps."
            )
        self.last_loss = means(names, steps[-2]).get("train/loss", self.last_loss)

    @property
    def loss_parts(self) -> dict[str, str]:
        """The terms that have tensors of their own, as parts."""
        return {f"loss_{name}": f"losses.{name}" for name, term in self.losses.items() if term.state_dict()}

    def weighed(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sum of the terms' values, each times its weight."""
        return sum(v if self.losses[n].weight == 1 else self.losses[n].weight * v for n, v in values.items())  # type: ignore

    @property
    def trained_parts(self) -> list[str]:
        raise NotImplementedError(f"{type(self).__name__} must name its trained parts.")

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by state-dict name."""
        return {k: p for k, p in self.named_parameters() if p.requires_grad}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluation mode with the averaged weights (the trained ones where there is no average)."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                if self.ema is None:
                    yield
                else:
                    with self.ema.swapped(self.averaged_parameters()):
                        yield
        finally:
            self.train(was_training)

    def validation_values(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Named values, (B,) each, whose means over the valid samples of all ranks and batches are logged."""
        raise NotImplementedError(f"{type(self).__name__} has no validation.")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Those means in Lightning's own loop (`trainer.validate`), on averaged weights, as the callback takes them."""
        valid = batch["valid"]
        count = int(valid.sum())  # 0 in a rank whose share of the data has ended
        with self.averaged():
            values = self.validation_values(batch, batch_idx)
        means = {name: per_sample[valid].sum() / max(1, count) for name, per_sample in values.items()}
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)

    def validation_names(self) -> list[str]:
        raise NotImplementedError(f"{type(self).__name__} has no validation.")

    def validation_pictures(self, values: dict[str, float]) -> dict[str, Image.Image]:
        """Figures of a validation's result."""
        return {}

    def own_options(self) -> dict[str, dict[str, Any]]:
        """Options other than the optimizer's, lr for one: beginning of the parameters' names -> options."""
        return {}

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the trained parameters that `ema` averages, by state-dict name."""
        return self.trained_parameters()

    def clipped_together(self) -> list[list[nn.Parameter]]:
        """Trained parameters, in the sets whose gradients' norms are clipped."""
        return [list(self.trained_parameters().values())]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(list(self.trained_parameters().items()))
        for start, options in self.own_options().items():
            _set_options(optimizer, {p for name, p in self.named_parameters() if name.startswith(start)}, options)
        optimizer.register_load_state_dict_pre_hook(_beside_weights)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_scheduler or (lambda step: 1.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self.draws = Draws.of(self.trainer.datamodule, self.draws.seed)  # type: ignore[attr-defined]
        if self.ema is not None:
            self.ema.start(self.averaged_parameters())

    def gradient_norm(self) -> Tensor:
        """() of all gradients together, on their device: equal in all processes before a step, whose sums they are."""
        return whole(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    @property
    def is_scaled(self) -> bool:
        """Whether the losses are scaled, for float16's gradients (trainer.precision=16-mixed)."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm here, because Lightning refuses fused optimizers under bf16, where nothing is scaled."""
        sets = [[p for p in together if p.grad is not None] for together in self.clipped_together()]
        sets = [together for together in sets if together]
        if not sets:  # the step is left out
            return
        norm = self.gradient_norm()
        # A scaler leaves out what is not finite by itself, and looks for the next scale so.
        self.totals.add(GRADIENT_NORM, norm[None], norm.isfinite()[None] if self.is_scaled else None)
        if self.is_scaled or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for together in sets:
                own = norm if len(sets) == 1 else whole(nn.utils.get_total_norm([p.grad for p in together]))  # type: ignore[misc]
                nn.utils.clip_grads_with_norm_(together, gradient_clip_val, own)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Lightning would keep them until the next forward pass is over: as much memory as what is trained.
        for parameter in self.parameters():
            parameter.grad = None
        if self.ema is not None:
            self.ema.update(self.averaged_parameters())
        self.totals.end_step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        processes.arrived()
        if self.totals.steps > UNREAD:
            self.read_losses()
        self.draws.reseed_layers(self.global_step, batch_idx)

    def on_before_backward(self, loss: Tensor) -> None:
        processes.arrived()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state()
            checkpoint["ema_updates"] = self.ema.updates
            if more := self.ema.more_state():
                checkpoint["ema_others"] = more

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.load(checkpoint["ema"], checkpoint["ema_updates"])
            self.ema.load_more(checkpoint.get("ema_others", {}))


def _beside_weights(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A saved state in memory of its own, each tensor laid out and cut as its weight is: fused steps rely on that."""

    def beside(value: Any, weight: nn.Parameter) -> Any:
        if not isinstance(value, Tensor):
            return value
        return laid_out_like(value, weight.detach()) if value.shape == weight.shape else value.clone()

    weights = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, weights, strict=False))  # torch says it where they are not equally many
    held = {n: {k: beside(v, by_number[n]) for k, v in kept.items()} for n, kept in state["state"].items()}
    return {**state, "state": held}


def _set_options(optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter], options: Mapping[str, Any]) -> None:
    """Gives some of an optimizer's parameters groups of their own, like their old ones but for options it knows."""
    for group in list(optimizer.param_groups):
        chosen = [p in parameters for p in group["params"]]
        if not any(chosen):
            continue
        names = [k for k in ("params", "param_names") if k in group]
        own = {k: v for k, v in options.items() if k in group}
        optimizer.param_groups.append({**group, **own, **{k: [*compress(group[k], chosen)] for k in names}})
        for k in names:
            group[k] = [value for value, moved in zip(group[k], chosen, strict=True) if not moved]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def is_optimizer_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch ended an optimizer step; epochs are whole numbers of steps."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_due(trainer: L.Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """Whether this micro-batch ended a step that is a multiple of `every_n_steps`, or the last one."""
    due = trainer.global_step % every_n_steps == 0 or is_last_step(trainer)
    return is_optimizer_step(trainer, batch_idx) and due


def stopped_early(trainer: L.Trainer) -> bool:
    """Whether a callback (EarlyStopping, Timer) has ended the training, and min_steps and min_epochs let it."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def is_last_step(trainer: L.Trainer) -> bool:
    """Whether no other step follows the one that has just ended."""
    return trainer.global_step == trainer.max_steps or stopped_early(trainer)
