"""A checkpoint folder is what its tensors are, and the facade loads no more than drawing needs."""

import subprocess
import sys
from dataclasses import replace

import pytest

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import find, read_config
from ldm.checkpoints.load import load_any
from ldm.checkpoints.save import save_any
from tests.support.merge_models import model, nodes

NODE = {"_target_": "ldm.training.latent_diffusion.LatentDiffusion", "caption_dropout": 0.1}


@pytest.mark.parametrize("module", ["latent_diffusion", "autoencoder", NODE, None])
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_is_whole_where_its_tensors_are_whatever_it_says_of_its_training(whole, module, tmp_path):
    made = model(0)
    config = {**nodes(), "module": module}  # runs of autoencoders describe networks too
    parts = replace(made, config=config) if whole else Components(made.autoencoder, config=config)
    save_any(parts, tmp_path / "a", "ldm")
    assert (read_config(find(tmp_path / "a")).get("module") is None) == (module is None)
    assert (load_any(tmp_path / "a").denoiser is not None) == whole


def test_the_facade_loads_nothing_of_training():
    heavy = ["lightning", "webdataset", "wandb", "pandas", "matplotlib", "transformers", "ldm.training"]
    code = f"import sys; from ldm import Pipeline; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
