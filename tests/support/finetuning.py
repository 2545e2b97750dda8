"""Short runs that start from somebody's checkpoint, in this process."""

import torch
from hydra import compose, initialize_config_dir
from tiny_training import CONF

from ldm.config.schema import register
from ldm.tasks.work.train import train

SHORT = [
    "image_size=64",
    "batch_size=2",
    "max_steps=3",
    "logger=none",
    "trainer=debug",
    "callbacks.samples.num_steps=2",
]


def run(tmp_path, experiment, name, *overrides):
    """The run directory of an experiment, trained in this process."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [f"experiment={experiment}", f"outputs={tmp_path}/outputs", f"name={name}", *SHORT, *overrides]
        train(compose("config", given))
    return tmp_path / "outputs" / name


def getattr_(loaded, part):
    return {"unet": loaded.denoiser.model, "vae": loaded.autoencoder, "text_encoder": loaded.text_encoder}[part]


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(v.nan_to_num(), theirs[k].nan_to_num()) for k, v in ours.items()
    )
