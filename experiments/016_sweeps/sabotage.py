"""A callback that breaks single arms of a sweep, as arms break: a learning rate that is none, an error, kill -9.

SABOTAGE: what befalls which arm, {"MinSNR 1": "diverge", ...} by the class of weighting= and seed.
"""

import json
import os
import signal

import lightning as L

from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.module import is_optimizer_step
from ldm.training.run.directory import WritesIntoRun

AT = 2  # optimizer steps after which it happens


class Sabotage(WritesIntoRun, L.Callback):
    decides = False
    watches = LatentDiffusion  # not the autoencoder, which the arms share

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not is_optimizer_step(trainer, batch_idx) or trainer.global_step != AT:
            return
        config = self.run_directory.config
        arm = f"{config['weighting']['_target_'].rsplit('.', 1)[-1]} {config['seed']}"
        what = json.loads(os.environ.get("SABOTAGE", "{}")).get(arm)
        if what == "diverge":
            for scheduler in trainer.lr_scheduler_configs:
                scheduler.scheduler.base_lrs = [1e20 for _ in scheduler.scheduler.base_lrs]
        elif what == "raise":
            raise RuntimeError("something of the user's own went wrong")
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
