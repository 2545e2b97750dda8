"""Every leaf of a composed configuration either decides a run's result, and its digest, or is listed here."""

import copy
from fnmatch import fnmatch

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.config.check import module_kind
from ldm.config.root import conf_dir, digest, plain
from ldm.config.schema import register
from ldm.errors import ConfigError
from ldm.tasks.work.stages import Stages
from ldm.training.run.directory import RunDirectory
from ldm.training.run.identity import decisive

NOT_DECIDING = [  # root keys and what lies below them
    *("name", "outputs", "output", "task", "experiment", "debug", "local", "stages", "export", "max_steps", "logger"),
    *("optimized_metric", "metric", "eval_images", "loss", "perturbation", "compile", "max_hours", "launcher"),
    "sweep",
    *("num_steps", "guidance", "guidance_rescale", "eta", "sampler", "grid", "guider"),
]
SAMPLING = ["prompt", "negative_prompt", "prompts", "height", "width", "num_images", "init_image", "strength", "mask"]
SAMPLING += ["clip_skip", "chunked", "prompt_weights", "tiling", "adapters", "film_strip", "animation"]
OTHER_TASKS = [
    "gpu",
    "gpus",
    "gpus_per_node",
    "mfu",
    "price",
    "network",
    "storage",
    "dataset_images",
    "verify",
    "length",
]
OTHER_TASKS += ["format", "dtype", "checkpoints", "method", "ratios", "rank"]
OTHER_TASKS += ["denoiser_steps", "denoiser_images"]
BY_CONTENT = ["shards", "images", "source", "checkpoint", "weights", "config", "adopt", "scheduler_config"]
BY_CONTENT += ["templates", "subject", "instance_prompt", "class_shards", "class_images", "class_prompt"]
BY_CONTENT += ["num_class_images", "prior_weight", "data.shards", "data.validation_fraction"]
MACHINE = [f"data.{k}" for k in ("threads", "prefetch", "max_bad", "resume")]
MACHINE += ["data.validation_samples", "data.validation_batch_size"]
MACHINE += [f"trainer.{k}" for k in ("accelerator", "devices", "num_nodes", "strategy", "max_steps", "max_epochs")]
MACHINE += [f"trainer.{k}" for k in ("log_every_n_steps", "limit_val_batches", "num_sanity_val_steps", "benchmark")]
MACHINE += ["trainer.check_val_every_n_epoch", "trainer.val_check_interval"]
MACHINE += [f"trainer.enable_{k}" for k in ("checkpointing", "progress_bar", "model_summary")]
DECIDING = ["trainer.strategy.gradient_compression"]  # though it lies under what is listed
WATCHED = (
    "skip_nonfinite",
    "snapshots",
    "losses",
    "progress",
    "validation",
    "checkpoints",
    "reconstructions",
    "jump_to_x0",
    "samples",
    "scores",
)
WATCHING = [f"callbacks.{k}.[!_]*" for k in WATCHED]  # their classes decide: one of your own may do anything
WATCHING += ["callbacks.scores.metrics*"]  # which train nothing
ADAPTER = ["adapter.*.format"]
EVER = [*NOT_DECIDING, *SAMPLING, *OTHER_TASKS, *BY_CONTENT, *MACHINE, *WATCHING, *ADAPTER]
DIFFUSION = ["model", "text_encoder", "scheduler", "parameterization", "weighting", "times", "caption_dropout"]
DIFFUSION += ["noises_per_image", "masking", "adapter", "frozen_dtype"]
OF = {
    "autoencoder": [*EVER, *DIFFUSION],
    "latent_diffusion": [*EVER, "kl_weight", "reconstruction", "callbacks.latent_statistics.[!_]*"],
}


def composed(*overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def quickstart(stage, *overrides):
    values = plain(Stages(composed("experiment=quickstart", *overrides)).configured(stage))
    return values


def of_experiment(*overrides):
    return plain(composed(*overrides, "image_size=64"))


KINDS = {
    "autoencoder": lambda: quickstart("autoencoder"),
    "diffusion": lambda: quickstart("diffusion"),
    "adapter": lambda: of_experiment("experiment=finetune", "adapter=[lora,textual_inversion]", "checkpoint=x"),
    "dreambooth": lambda: of_experiment("experiment=dreambooth", "checkpoint=x", "class_prompt=a dog"),
    "inpainting": lambda: of_experiment("experiment=inpaint", "checkpoint=x", "trainer=ddp"),
}


def leaves(node, path=()):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, node


def flipped(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return (
        {"x": {"y": 1}} if isinstance(value, dict) else [*value, "x"] if isinstance(value, list) else f"{value or ''}x"
    )


def listed(path, patterns):
    """Whether a key, or one that it lies under, is among the patterns."""
    found = any(fnmatch(".".join(path[: n + 1]), p) for n in range(len(path)) for p in patterns)
    return found and ".".join(path) not in DECIDING


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_decides_or_is_listed(kind):
    values = KINDS[kind]()
    before, wrong, deciding = decisive(values), [], 0
    for path, value in leaves(values):
        if path == ("module", "_target_"):
            continue
        changed = copy.deepcopy(values)
        node = changed
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = flipped(value)
        decides = digest(decisive(changed)) != digest(before)
        deciding += decides
        if decides == listed(path, OF[module_kind(values)]):
            wrong.append((".".join(path), "decides" if decides else "does not decide"))
    assert not wrong and deciding > 30


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("autoencoder", "callbacks.latent_statistics.num_images=16"),
        ("diffusion", "+trainer.gradient_clip_algorithm=value"),
        ("diffusion", "data.epoch_samples=100"),
        ("autoencoder", "stages.autoencoder.kl_weight=1"),
        ("diffusion", "+callbacks.mine={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 1}"),
    ],
)
def test_what_decided_without_being_named(stage, override):
    assert decisive(quickstart(stage, override)) != decisive(quickstart(stage))


def test_equal_runs_are_equal():
    values = of_experiment("experiment=quickstart")
    again = copy.deepcopy(values)
    again["batch_size"] = again["data"]["batch_size"] = values["batch_size"] // 2
    assert decisive(again, world_size=2) == decisive(values)
    again["accumulate"] = again["data"]["accumulate"] = again["trainer"]["accumulate_grad_batches"] = 2
    again["trainer"]["gradient_clip_val"] = int(values["trainer"]["gradient_clip_val"])
    assert digest(decisive(again)) == digest(decisive(values))


def test_compressed_gradients_make_another_run_and_the_usual_ones_the_same_as_ever():
    plain_node, ddp, bf16 = (
        decisive(of_experiment("experiment=finetune", "checkpoint=x", *more))
        for more in ([], ["trainer=ddp"], ["trainer=ddp", "trainer.strategy.gradient_compression=bf16"])
    )
    assert plain_node == ddp != bf16 and "gradient_compression" not in ddp["trainer"]


def test_a_run_of_the_earlier_form_is_refused_in_one_line(tmp_path):
    RunDirectory(tmp_path / "mine", {}, {"module": "autoencoder", "global_batch": 2}).open()
    now = RunDirectory(tmp_path / "mine", {}, decisive(of_experiment("experiment=quickstart")))
    with pytest.raises(ConfigError, match="give another name="):
        now.check_identity()
    assert OmegaConf.create(now.identity)


def test_a_command_of_bytes_that_are_no_text_does_not_hide_who_a_run_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_COMMAND", "python script.py caf\udce9")
    first = RunDirectory(tmp_path / "mine", {}, {"form": 2, "seed": 0})
    first.open()
    first.close()
    with pytest.raises(ConfigError, match="another configuration"):
        RunDirectory(tmp_path / "mine", {}, {"form": 2, "seed": 1}).open()


def test_a_refused_directory_is_not_held(tmp_path):
    RunDirectory(tmp_path / "mine", {}, {"form": 2, "seed": 0}).open()
    other = RunDirectory(tmp_path / "mine", {}, {"form": 2, "seed": 1})
    with pytest.raises(ConfigError):
        other.open()
    RunDirectory(tmp_path / "mine", {}, {"form": 2, "seed": 0}).open()
