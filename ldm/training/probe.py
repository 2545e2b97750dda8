"""How well a small denoiser of fixed size does on a latent space in a fixed number of steps.

Everything but the latents is fixed: network, scheduler (cosine), parameterization (v), optimizer, draws. A loss a
latent number cannot be compared between spaces that have more or fewer of them; `scores` gives several numbers that
can, and prefers none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.devices import beside, on_device
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.exact import Gaussian
from ldm.diffusion.levels import Level
from ldm.diffusion.loss import Prediction, predict
from ldm.diffusion.parameterizations import V
from ldm.diffusion.schedulers import Cosine
from ldm.diffusion.weightings import Simple
from ldm.metrics.reconstruction import psnr
from ldm.models.unet import UNet
from ldm.training.learning_rate import cosine
from ldm.training.randomness import generator, seed_of, stratified

BATCH = 32
WARMUP = 20  # steps
RATE = 3e-3
TIMES = 16  # t of the held-out loss: middles of as many bins, log SNR from 6 to -6
JUMPS = (0.25, 0.5, 0.75)  # t of the jumps that are decoded


@dataclass(frozen=True)
class Latents:
    """Standardised posteriors: mean and std, (N,C,h,w) each; std 0 for points."""

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, draws: torch.Generator, rows: Tensor | slice = slice(None)) -> Tensor:  # -> (B,C,h,w)
        """x0 of some pictures, as diffusion is trained on it."""
        mean = self.mean[rows]
        return mean + self.std[rows] * torch.randn(mean.shape, generator=draws)


def small_denoiser(channels: int, seed: int) -> Denoiser:
    """The fixed denoiser: widths do not depend on the latents. About 2.3 million weights; its first answer is v = 0,
    which is the answer of whoever knows N(0, 1) only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "probe"))
        network = UNet(
            in_channels=channels,
            out_channels=channels,
            block_channels=(64, 96),
            layers_per_block=1,
            attention_levels=(False, True),
            cross_attention_dim=None,
            head_dim=32,
            num_heads=None,
        )
    return Denoiser(network.to(memory_format=torch.channels_last), Cosine(), V())  # type: ignore[call-overload]


def train_denoiser(data: Latents, steps: int, seed: int, device: str = "cpu") -> Denoiser:
    """The fixed denoiser after `steps` steps of AdamW on 32 latents each: the same, to the bit, of the same inputs."""
    denoiser = small_denoiser(data.mean.shape[1], seed)
    network = denoiser.model
    assert isinstance(network, UNet)
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    draws = generator(seed, "probe", "draws")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(step, min(WARMUP, steps), steps)
        x0 = data.sample(draws, torch.randint(len(data), (BATCH,), generator=draws))
        eps = torch.randn(x0.shape, generator=draws)
        t = denoiser.scheduler.training_time(stratified(seed, "probe", step, range(BATCH), BATCH))
        loss = _predicted(denoiser, x0, eps, t, device).loss(Simple()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval().requires_grad_(False)
    return denoiser


@dataclass(frozen=True)
class HeldOut:
    """Squared errors of the jump to x0 at levels, the mean over latent numbers and pictures; (K,) float64 each.

    gaussian_error: of whoever knows the mean and variance of each channel only, on the same noised latents.
    to_loss: what makes of an error of x0 the loss of the network's output.
    """

    log_snr: Tensor
    error: Tensor
    gaussian_error: Tensor
    to_loss: Tensor

    def loss(self) -> float:
        """The mean over t of |out - v|^2, which training minimises."""
        return float((self.to_loss * self.error).mean())

    def gaussian_loss(self) -> float:
        """`val/gaussian_loss` of training, measured: 1 for latents of mean 0 and variance 1."""
        return float((self.to_loss * self.gaussian_error).mean())

    def nats(self) -> float:
        """Of one latent number, gained over the Gaussian; see `nats_over_gaussian`."""
        return nats_over_gaussian(self.log_snr, self.error, self.gaussian_error)


def nats_over_gaussian(log_snr: Tensor, error: Tensor, gaussian_error: Tensor) -> float:  # (K,) each
    """1/2 int snr (error of the Gaussian's - error) d log snr, by the trapezoid rule over the given levels.

    With the smallest possible errors over all levels it is KL(p || q), p the latents' law and q the Gaussian of the
    same means and variances (Guo, Shamai and Verdu 2005; Verdu 2010, "Mismatched estimation and relative entropy"): by
    so much the log likelihood of whoever knows p is higher, in nats. A network's errors are not the smallest, so it
    gains less (Kingma et al. 2021, section 5: its error integrates to a bound), or less than nothing where it does
    worse. Levels that end at a lowest noise count only what is seen above it: of points the whole gain is infinite.
    """
    order = log_snr.argsort()
    gain = 0.5 * log_snr.exp() * (gaussian_error - error)
    return float(torch.trapezoid(gain[order], log_snr[order]))


def gaussian_of(x0: Tensor) -> Gaussian:  # (N,C,h,w)
    """The Gaussian with the mean and deviation of each channel."""
    return Gaussian(x0.mean(dim=(0, 2, 3), keepdim=True), x0.std(dim=(0, 2, 3), keepdim=True, correction=0))


@torch.no_grad()
def held_out_errors(denoiser: Denoiser, gaussian: Gaussian, x0: Tensor, seed: int, device: str = "cpu") -> HeldOut:
    """Every latent (N,C,h,w) at the same fixed (t, eps)."""
    times = [(i + 0.5) / TIMES for i in range(TIMES)]
    levels = [denoiser.scheduler.level(denoiser.scheduler.snap(t)) for t in times]
    errors = torch.zeros(TIMES, 2, dtype=torch.float64)
    for i, t in enumerate(times):
        draws = generator(seed, "probe", "held out", i)
        for some in x0.split(64):
            made, theirs = _both(denoiser, gaussian, some, t, draws, device)
            for column, jump in enumerate((made.jump, theirs)):
                errors[i, column] += float((jump - made.x0).square().double().mean(dim=(1, 2, 3)).sum())
    errors /= len(x0)
    slopes = [denoiser.parameterization.determinant(level.alpha, level.sigma) / level.sigma for level in levels]
    as_numbers = (
        torch.tensor([float(v) for v in values], dtype=torch.float64) for values in (_log_snr(levels), slopes)
    )
    log_snr, slope = as_numbers
    return HeldOut(log_snr, errors[:, 0], errors[:, 1], slope.square())


@torch.no_grad()
def decoded_jumps(
    denoiser: Denoiser,
    gaussian: Gaussian,
    x0: Tensor,
    pictures: Tensor,
    decode: Callable[[Tensor], Tensor],
    seed: int,
    device: str = "cpu",
) -> dict[str, float]:
    """PSNR in dB of decoded latents x0 (N,C,h,w) against their pictures (N,3,H,W) in [-1, 1].

    none: of x0 as they are; jump: of the jumps to x0, mean over the t of `JUMPS`; gaussian: of the Gaussian's jumps.
    decode: (B,C,h,w) x0 -> (B,3,H,W) in [-1, 1].
    """
    found: dict[str, list[Tensor]] = {"none": [], "jump": [], "gaussian": []}

    def note(name: str, latents: Tensor, some: Tensor) -> None:
        images = decode(latents)
        found[name].append(psnr((images.cpu().float() + 1) / 2, (some + 1) / 2))

    for i, t in enumerate(JUMPS):
        draws = generator(seed, "probe", "jumps", i)
        for some, shown in zip(x0.split(64), pictures.split(64), strict=True):
            made, theirs = _both(denoiser, gaussian, some, t, draws, device)
            note("jump", made.jump, shown)
            note("gaussian", theirs, shown)
            if i == 0:
                note("none", made.x0, shown)
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def scores(errors: HeldOut, decoded: dict[str, float], numbers: int, pixels: int) -> dict[str, float]:
    """What may tell how well a space is diffused. numbers: of a picture's latent, C h w; pixels: of a picture, H W.

    loss, gaussian_loss: as in validation; relative_loss: the first over the second, 1 where nothing was learnt.
    nats_per_pixel: `nats_over_gaussian` of a picture's whole latent, over the picture's pixels; higher is more learnt.
    jump_psnr: dB of decoded jumps to x0 against pictures, which has the autoencoder's own error in it;
    jump_psnr_lost: how far that is below decoded latents; jump_psnr_gained: how far above the Gaussian's jumps.
    """
    return {
        "loss": errors.loss(),
        "gaussian_loss": errors.gaussian_loss(),
        "relative_loss": errors.loss() / errors.gaussian_loss(),
        "nats_per_pixel": errors.nats() * numbers / pixels,
        "jump_psnr": decoded["jump"],
        "jump_psnr_lost": decoded["none"] - decoded["jump"],
        "jump_psnr_gained": decoded["jump"] - decoded["gaussian"],
    }


def _both(
    denoiser: Denoiser, gaussian: Gaussian, x0: Tensor, t: float, draws: torch.Generator, device: str
) -> tuple[Prediction, Tensor]:
    """A network's prediction at one t, and the Gaussian's jump from the same x_t."""
    eps = torch.randn(x0.shape, generator=draws)
    time = denoiser.scheduler.snap(torch.full((len(x0),), t, dtype=torch.float64))
    assert isinstance(time, Tensor)
    made = _predicted(denoiser, x0, eps, time, device)
    known = Gaussian(beside(gaussian.mean, made.x0), beside(gaussian.std, made.x0))
    return made, known.denoise(made.x_t, made.level)


def _predicted(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, device: str) -> Prediction:
    x0, eps = (on_device(v, device) for v in (x0, eps))
    return predict(denoiser, x0, Condition(), denoiser.scheduler.level(t).to(x0.device), eps)


def _log_snr(levels: list[Level]) -> list[float]:
    return [float(level.log_snr) for level in levels]
