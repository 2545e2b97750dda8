"""How two processes exchange gradients: once a step, in what type, and to the same weights."""

import pytest
import torch
import torch.distributed as dist
from commands import metrics
from ranks import on_ranks
from tiny_training import Spy, config, fingerprint, train_watched
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from ldm.checkpoints.folder import all_folders
from ldm.errors import ConfigError
from ldm.training.distributed import processes, strategy
from ldm.training.distributed.strategy import DataParallel

pytestmark = pytest.mark.slow


class Seen(Spy):
    """Keeps the weights at the end."""

    decides = False

    def on_train_end(self, trainer, pl_module):
        self.weights = torch.cat([p.detach().flatten() for p in pl_module.trained_parameters().values()])


def trained(latents, path, *overrides, hook=None):
    """Two processes train three steps and end with the same weights, bit for bit. Of each, what its hook was asked.

    hook: (name of the compression, what to do with it, of the right one).
    """
    asked = [f"shards={latents}", "max_steps=3", "trainer=ddp", "trainer.accelerator=cpu", "callbacks.jump_to_x0=null"]
    settings = config(*asked, "callbacks.samples=null", "callbacks.validation=null", *overrides)

    def train(rank):
        torch.set_num_threads(1)
        notes, seen = [], Seen()
        with pytest.MonkeyPatch.context() as patch, processes.together():
            if hook:
                patch.setitem(strategy.COMPRESSION, hook[0], hook[1](strategy.COMPRESSION[hook[0]], notes))
            train_watched(settings, path, patch, seen)
        return seen.weights.numpy(), notes

    ranks = on_ranks(train)
    if ranks[0].code:
        raise RuntimeError(ranks[0].value)
    (ours, notes), (theirs, _) = (r.value for r in ranks)
    assert (ours == theirs).all()
    return notes


@pytest.fixture(scope="module")
def plain(latents, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "run"
    trained(latents, path)
    return path


def losses(path):
    return [row["train/loss"] for row in metrics(path).values()]


def test_a_static_graph_changes_no_bit(latents, plain, tmp_path):
    trained(latents, tmp_path / "run", "trainer.strategy.static_graph=true")
    assert losses(tmp_path / "run") == losses(plain) and len(losses(plain)) == 3
    assert fingerprint(all_folders(tmp_path / "run")[-1]) == fingerprint(all_folders(plain)[-1])


def test_a_static_graph_that_accumulates_is_refused(latents, tmp_path):
    with pytest.raises(RuntimeError, match=r"static_graph=true with accumulate=2.*leave static_graph out"):
        trained(latents, tmp_path / "run", "trainer.strategy.static_graph=true", "accumulate=2")


def beside_exact(hook, notes):
    """The hook, which also sums what it gets in float32 and notes its largest error in units of what may be."""

    def compared(state, bucket):
        exact = bucket.buffer() / 2
        size = exact.abs()
        dist.all_reduce(exact)
        dist.all_reduce(size)
        made = hook(state, bucket).wait()
        unit = torch.finfo(torch.bfloat16 if hook is bf16_compress_hook else torch.float16).eps / 2
        # A process's share is rounded once, and the sum once.
        notes.append(float(((made - exact).abs() / (2.01 * unit * size + 1e-7)).max()))
        done = torch.futures.Future()
        done.set_result(made)
        return done

    return compared


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_compressed_gradients_are_the_others_rounded(latents, plain, tmp_path, kind):
    asked = f"trainer.strategy.gradient_compression={kind}"
    errors = trained(latents, tmp_path / "run", asked, hook=(kind, beside_exact))
    assert len(errors) >= 3 and 0.05 < max(errors) <= 1
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-2)


def counted(hook, notes):
    return lambda state, bucket: notes.append(bucket.is_last()) or hook(state, bucket)


def test_of_a_step_only_the_last_micro_batch_is_exchanged(latents, tmp_path):
    """As many exchanges of the last bucket as there are steps, not micro-batches."""
    bf16 = "trainer.strategy.gradient_compression=bf16"
    buckets = trained(latents, tmp_path / "run", "accumulate=3", bf16, hook=("bf16", counted))
    assert sum(buckets) == 3


def test_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match=r"gradient_compression=int8 is not known: choose one of none, bf16, fp16"):
        DataParallel(gradient_compression="int8")
