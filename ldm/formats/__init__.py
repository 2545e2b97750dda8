"""Other people's checkpoints, in and out: `ldm.formats.checkpoint` has `read`, `write` and `kind`."""
