"""What a run costs: arithmetic as published, time and exchange by their formulas, data and settings as they are."""

import csv
import functools
import math

import numpy as np
import pytest
import torch
from commands import here
from tiny_training import config
from torch import nn

from ldm.cost.cards import CARDS, Card, card
from ldm.cost.disk import data_of
from ldm.cost.fitting import CONTEXT, GIB, Fittings
from ldm.cost.rates import ByDataSheet, ByTiming
from ldm.cost.step import Network, Step, exchanged, step_of
from ldm.cost.trial import try_steps
from ldm.cost.work import BACKWARD, OPTIMIZER, RECOMPUTED, Counted, Work, micro_batch, work_of
from ldm.data.shards.splits import LATENT_FIELD
from ldm.data.shards.writer import write_dataset, write_shard
from ldm.data.sources.shapes import ShapesSource
from ldm.errors import ConfigError
from ldm.memory.plan import plan
from ldm.memory.simulated import Simulated
from ldm.tasks.work.encode import _item

ENCODER, TEXT, NETWORK = "autoencoder, pictures to latents", "text encoder", "denoising network"
SD15 = ["model=unet_sd15", "autoencoder=kl_f8", "text_encoder=clip_l", "batch_size=1"]
SD21 = ["model=unet_sd21", "autoencoder=kl_f8", "text_encoder=openclip_h", "batch_size=1"]
CLASSES = ["text_encoder=classes", "text_encoder.width=1152", "model.pooled_dim=1152", "model.cross_attention_dim=null"]
DIT = ["model=dit_xl2", "autoencoder=kl_f8", *CLASSES, "batch_size=1", "image_size=256"]
PIXELS = "image_size=32"
FAST = ByDataSheet(Card(80, 100, 10, math.inf, 1, 1), None, 0.5)  # whose memory costs nothing
ALONE = Network(1, 1, 1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "published", "parameters"),  # GFLOP a picture, two a multiplication with its addition; millions
    [
        ([*SD15, "image_size=512"], {NETWORK: 803, BACKWARD: 2407 - 803, ENCODER: 1117, TEXT: 13.3}, 859.5),
        ([*SD21, "image_size=256"], {NETWORK: 181, BACKWARD: 539 - 181, ENCODER: 273, TEXT: 45.1}, 865.9),
        (DIT, {NETWORK: 2 * 118.6}, 675),  # Peebles and Xie 2023, tables 1 and 4; they count multiplications
    ],
    ids=["sd15-512", "sd21-256", "dit_xl2"],
)
def test_arithmetic_and_parameters_are_what_is_published(given, published, parameters):
    values = config(*given)
    parts = work_of(values)
    counted = {name: parts[name].flops / 1e9 for name in published}
    assert counted == pytest.approx(published, rel=0.005)
    network = Simulated(values).module.model
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, rel=2e-3)
    assert RECOMPUTED not in parts


@pytest.mark.slow
def test_recomputation_is_counted_apart():
    """Published at 256 pixels: 180, 537 with gradients, 665 as diffusers recomputes, which keeps a little more."""
    parts = work_of(config(*SD15, "image_size=256", "model.checkpoint=blocks"))
    once = parts[NETWORK].flops + parts[BACKWARD].flops
    assert parts[NETWORK].flops == pytest.approx(180e9, rel=0.005) and once == pytest.approx(537e9, rel=0.005)
    assert once + parts[RECOMPUTED].flops == pytest.approx(665e9, rel=0.03)


@functools.cache
def made(*overrides):
    values = config(PIXELS, *overrides)
    return values, work_of(values), plan(values)


def test_arithmetic_of_more_less_and_other_training():
    """Linear in the batch; less where less is trained; the encoder is gone where latents are made beforehand."""

    def parts(*overrides):
        return work_of(config(PIXELS, *overrides))

    usual = made()[1]
    for name, work in made("batch_size=4")[1].items():
        assert work.flops == 2 * usual[name].flops, name  # of 2
    assert ENCODER not in parts("+stages.encode={}")
    lora = parts("adapter=[lora]")
    assert lora[NETWORK].flops > usual[NETWORK].flops and lora[BACKWARD].flops < 0.8 * usual[BACKWARD].flops
    assert micro_batch(usual).flops == sum(work.flops for work in usual.values())
    assert made("optimizer=muon")[1][OPTIMIZER].flops > 0
    whole = work_of(config(PIXELS, "module=autoencoder"))
    decoder = work_of(config(PIXELS, "module=autoencoder", "module.train_parts=decoder"))
    assert whole[BACKWARD].flops > decoder[BACKWARD].flops > 0


def test_grouped_convolutions_count_their_own_group():
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=8, device="meta"), torch.empty(2, 8, 4, 4, device="meta")
    with Counted() as forward:
        out = layer(x.requires_grad_()).sum()
    with Counted() as backward:
        out.backward()
    assert forward.work.flops == 2 * 2 * 16 * 8 * 9 and backward.work.flops == 2 * forward.work.flops


def test_a_ring_sends_what_rings_send():
    on_one = Network(8, 8, link=100.0, network=1.0)
    assert on_one.all_reduce(1000) == 2 * 7 / 8 * 1000 / 100 and on_one.all_gather(1000) == 7 / 8 * 1000 / 100
    assert Network(16, 8, link=100.0, network=1.0).all_reduce(1000) == 2 * 15 / 16 * 1000 / 8  # 8 cards a host
    assert Network(16, 8, link=100.0, network=25.0).bandwidth == 100  # the links limit
    assert ALONE.all_reduce(1000) == 0


def stepped(*overrides, rates=FAST, network=ALONE, image=0.0, **changes):
    """A step of the tiny model; changes: of keys that no micro-batch depends on."""
    values, parts, memory = made(*overrides)
    return step_of({**values, **changes}, parts, memory, rates, network, image)


def test_time_by_batch_gpus_and_mfu():
    """Twice the GPUs at one global batch: half the hours, as many GPU-hours, where exchanging costs nothing."""
    free = Network(2, 2, math.inf, math.inf)
    one, two = stepped("batch_size=4"), stepped(network=free)
    assert one.seconds == pytest.approx(2 * two.seconds, rel=1e-12) and one.exposed == two.exposed == 0
    assert stepped(accumulate=2).seconds == pytest.approx(one.seconds, rel=1e-12)
    slow = stepped(rates=ByDataSheet(FAST.card, None, 0.25))
    assert slow.compute == pytest.approx(2 * two.compute, rel=1e-12)
    assert two.compute == micro_batch(made()[1]).flops / (10e12 * 0.5)
    assert "arithmetic: 100%" in one.bottleneck


def test_what_is_exchanged_and_what_hides_it():
    pair, (_, _, memory) = Network(2, 2, 1e9, 1e9), made()
    trained = sum(p.trained for p in memory.parts)
    ddp = stepped(network=pair)
    assert ddp.communication == pytest.approx(4 * trained / 1e9) and ddp.exposed == ddp.communication - ddp.behind
    assert "network" in ddp.bottleneck
    several = stepped(network=pair, accumulate=3)
    assert several.communication == ddp.communication and several.behind == ddp.behind  # the last backward pass alone
    assert exchanged(config("trainer=ddp", "trainer.strategy.gradient_compression=bf16"), memory) == 2 * trained
    fsdp = [stepped("gpus=2", "trainer=fsdp", network=pair, accumulate=n) for n in (1, 3)]
    assert fsdp[0].communication == pytest.approx(3 / 2 * 4 * trained / 1e9, rel=1e-6)  # twice weights, once gradients
    assert fsdp[1].communication == pytest.approx(3 * fsdp[0].communication) and fsdp[1].behind == fsdp[1].compute
    starved = Step(compute=1.0, behind=0.5, optimizer=0.5, communication=0.75, data=5.0)
    assert (starved.exposed, starved.seconds) == (0.25, 5.0) and "reading data" in starved.bottleneck
    assert stepped(image=1000.0).data == 2 * 1000.0 / 1e9


def test_latents_on_disk_are_as_large_as_planned(tmp_path):
    values = config("image_size=64")
    data = data_of(values)
    moments = {LATENT_FIELD: np.zeros((8, 16, 16), np.float16)}  # means and variances of 4 channels, a quarter as wide
    samples = [(f"{i:08}", _item(f"{i:08}", "c" * 100, moments, "train").fields) for i in range(40)]
    write_shard(tmp_path / "00000.tar", samples)
    assert (tmp_path / "00000.tar").stat().st_size == pytest.approx(40 * data.latent, rel=0.02)
    assert data_of(config("image_size=64", "data.flip=true")).latent == pytest.approx(2 * data.latent, rel=0.1)
    assert (data.images, data.measured) == (None, False) and data_of(config(PIXELS)).image == pytest.approx(
        data.image / 4
    )


def test_shards_that_are_there_are_looked_at(tmp_path):
    source = ShapesSource(count=20, validation=4, unseen=2)
    shards = write_dataset(source, tmp_path / "shards", facts=source.facts, identity=source.identity()).output
    data = data_of(config(PIXELS, f"shards={shards}"))
    assert (data.images, data.measured, data.cached) == (20, True, False) and 500 < data.image < 5000


def test_settings_fit_and_keep_the_global_batch():
    given = ["image_size=64", "batch_size=16", "trainer.precision=bf16-mixed", "ema=none", "+stages.encode={}"]
    given += ["callbacks.samples=null", "callbacks.jump_to_x0=null"]
    values = config(*given)
    memory = plan(values)
    tries, whole = Fittings(values, memory), memory.total
    found = {}
    for share in (1.0, 0.7, 0.35):
        room = int(share * whole)
        fitting = tries.for_card((room + CONTEXT) / GIB)
        assert fitting is not None
        changed = config(*given, *fitting.overrides)
        assert plan(changed).total <= fitting.total <= room
        assert changed["batch_size"] * changed["accumulate"] == 16
        found[share] = fitting.overrides
    assert found[1.0] == [] and found[0.7] == ["batch_size=8", "accumulate=2"]
    assert found[0.35][:2] == ["frozen_dtype=bfloat16", "+model.checkpoint=blocks"]
    assert tries.for_card(CONTEXT / GIB) is None
    assert tries.all_typed[-1] == "optimizer=adamw8bit"


def test_every_operation_of_a_step_can_be_timed():
    parts = made("optimizer=muon")[1]
    total = sum(parts.values(), Work())
    timed = ByTiming(total, "cpu")
    assert sum(total.times[c] for c in timed.taken) > 0.99 * total.times.total()
    assert timed.seconds(total) == pytest.approx(sum(timed.seconds(work) for work in parts.values()))
    none = ByTiming(total, "cpu", limit=-1.0)  # no time for any: it says nothing
    assert not none.taken and none.seconds(total) == 0


@pytest.mark.parametrize("overrides", [["accumulate=2"], ["module=autoencoder"]])
def test_a_trial_takes_the_memory_that_was_planned(overrides):
    values = config("batch_size=16", PIXELS, *overrides)
    tried = try_steps(values, steps=1)
    assert plan(values).of_step == pytest.approx(tried.bytes, rel=0.15) and tried.seconds > 0


SMALL = ["task=plan", "model=unet_tiny", "autoencoder=kl_tiny", "text_encoder=small_tiny", "image_size=64"]


def test_plan_prints_its_tables_and_writes_only_what_is_asked_for(tmp_path):
    done = here(*SMALL, "batch_size=4", f"output={tmp_path}/plan.csv", "gpus=2", "price=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 110 and "assumed: mosaicml" in done.stdout
    assert "16 GB" in done.stdout and "The bottleneck is" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["plan.csv"]
    rows = {row["what"]: row for row in csv.DictReader((tmp_path / "plan.csv").open())}
    value = {name: row["value"] for name, row in rows.items()}
    assert value["unet"] == value["unet, trained"] == "1001828" and value["weights: unet"] == str(4 * 1001828)
    trained = int(value["unet, trained"]) + int(value["text_encoder, trained"])
    held = [int(value[k]) for k in ("gradients, within the phases", "optimizer", "average")]
    assert held == [4 * trained, 8 * trained, 4 * trained]
    phases = [int(row["value"]) for name, row in rows.items() if name.startswith("phase: ")]
    weights = sum(int(row["value"]) for name, row in rows.items() if name.startswith("weights: "))
    assert int(value["total"]) == weights + 12 * trained + max(phases)
    hours = float(value["a step"]) * 1000 / 3600
    assert float(value["hours"]) == pytest.approx(hours) and float(value["GPU-hours"]) == pytest.approx(2 * hours)
    assert float(value["cost at 3 a GPU-hour"]) == pytest.approx(6 * hours)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image_size=null"], "give image_size=512"),
        (["image_size=65"], "give 64 or"),
        (["trainer.precision=64-true"], "choose 32-true"),
        (["guidance=2.0", "prompt=x"], "is not read by task=plan"),
        (["experiment=finetune", "checkpoint=somebody/model"], "leave it out and name"),
        (["mfu=0"], "mfu=0.0: must be from 0.01 to 1"),
        (["mfu=2"], "mfu=2.0: must be from 0.01 to 1"),
        (["price=-1"], "price=-1.0: must be at least 0"),
        (["gpus=0"], "gpus=0: must be at least 1"),
        (["gpu=a100_80"], "Did you mean 'a100_80gb'"),
        (["verify=true"], "add gpu=here"),
        (["gpu=here", "mfu=0.3"], "leave it out"),
        (["gpu=v100_16gb", "trainer.precision=bf16-mixed"], "use trainer.precision=16-mixed"),
    ],
)
def test_plans_that_cannot_be_made_are_one_line(overrides, message, tmp_path):
    done = here(*SMALL, *overrides, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_cards_are_by_their_data_sheets():
    assert card("a100_40gb", torch.bfloat16).peak(torch.bfloat16) == 312e12
    assert card("h200_141gb", None).peak(None) == 67e12
    assert card("t4_16gb", torch.float16).peak(torch.float16) == 65e12
    assert all(str(found.memory) in name for name, found in CARDS.items())
    with pytest.raises(ConfigError, match="or here"):
        card("tpu", None)
