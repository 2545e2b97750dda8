"""What each way of fine-tuning Stable Diffusion takes at 512x512, by task=plan's computation: memory.csv.

    python experiments/006_adapters/memory.py      (half an hour; started again it goes on)

Computed, not measured on a GPU. Latents are made beforehand; one picture is decoded at a time while it trains. What a
step takes is a straight line in the batch: it is computed at 1 and 8, the rest follows from the line.
"""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir

from ldm.config.root import conf_dir, plain
from ldm.config.schema import register
from ldm.memory.plan import Plan, plan

GIB = 2**30
ROOM = 15 * GIB  # of 16, one is assumed for CUDA's context and its kernels' workspaces
FAMILIES = {
    "sd15": ["model=unet_sd15", "autoencoder=kl_f8", "text_encoder=clip_l"],
    "sd21": ["model=unet_sd21", "autoencoder=kl_f8", "text_encoder=openclip_h"],
}
METHODS = {
    "whole model": [],
    "LoRA 16, attention": ["adapter=[lora]"],
    "LoRA 16, all layers": ["adapter=[lora]", "adapter.lora.layers=all"],
    "LoRA 16, attention + text encoder": ["adapter=[lora]", "adapter.lora.text_encoder=true"],
    "textual inversion": ["adapter=[textual_inversion]"],
    "hypernetwork": ["adapter=[hypernetwork]"],
}
TWINS = {"whole model": "DreamBooth, whole model", "LoRA 16, attention": "DreamBooth, LoRA 16"}  # two pictures a step
MANY = 8
MIXED = "bf16-mixed"


def cases() -> list[tuple[str, str, str, str, str]]:
    """(family, method, precision, type of frozen parts, what is recomputed), those that say most first."""
    half, full = (MIXED, "bfloat16"), (MIXED, "float32")
    chosen = [("sd15", "whole model", *full, r) for r in ("blocks", "none")]
    chosen += [("sd15", "LoRA 16, attention", *half, r) for r in ("blocks", "none")]
    chosen += [("sd15", method, *half, "blocks") for method in list(METHODS)[2:]]
    chosen += [("sd15", "LoRA 16, attention", *full, r) for r in ("none", "blocks")]
    chosen += [("sd15", "whole model", "32-true", "float32", r) for r in ("none", "blocks")]
    chosen += [("sd21", "whole model", *full, "blocks"), ("sd21", "LoRA 16, attention", *half, "blocks")]
    everything = [("whole model", "32-true", "float32"), ("whole model", *full)]
    everything += [(m, *kept) for m, kept in product(list(METHODS)[1:], (half, full))]
    chosen += [(f, *rest, r) for r, f, rest in product(("none", "blocks", "norms"), FAMILIES, everything)]
    return list(dict.fromkeys(chosen))


def planned(family: str, method: str, precision: str, dtype: str, recompute: str, *more: str) -> Plan:
    given = [*FAMILIES[family], *METHODS[method], f"trainer.precision={precision}", f"frozen_dtype={dtype}"]
    given += [f"model.checkpoint={recompute}", "image_size=512", "stages.prepare=false", *more]
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return plan(plain(compose("config", ["experiment=finetune", *given])))


def rows(case: tuple[str, str, str, str, str], decoded: int) -> list[dict[str, object]]:
    """A row for each optimizer and number of pictures a step."""
    family, method, precision, dtype, recompute = case
    silent = ["callbacks.samples=null", "callbacks.jump_to_x0=null"]
    one, many = (planned(*case, *silent, f"batch_size={b}") for b in (1, MANY))
    first = max(one.phases.values())
    slope = -(-(max(many.phases.values()) - first) // (MANY - 1))
    optimizers = [("adamw", one.optimizer)]
    if method == "whole model":  # AdamW's two float32 numbers a weight become two bytes and two scales for 256 of them
        optimizers.append(("adamw8bit", one.optimizer * 2 // 8 + one.optimizer // 8 * 8 // 256))
    made = []
    for optimizer, state in optimizers:
        held = one.total - first - one.optimizer + state
        for name, pictures in ((method, 1), (TWINS.get(method), 2)):
            if name is None:
                continue
            most = (ROOM - held - (first - slope)) // slope if held + decoded <= ROOM else 0
            total = held + max(first + (pictures - 1) * slope, decoded)
            made.append(
                {
                    "family": family,
                    "method": name,
                    "precision": precision,
                    "frozen_dtype": dtype,
                    "recomputed": recompute,
                    "optimizer": optimizer,
                    "trained": sum(p.trained for p in one.parts),
                    "gib": round(total / GIB, 2),
                    "activations_gib": round(slope / GIB, 3),  # a further picture
                    "largest_batch_16gb": max(0, most // pictures),  # of pictures, or of pairs
                }
            )
    return made


def main() -> None:
    file = Path(__file__).with_suffix(".csv")
    decoded = {}
    for dtype in ("float32", "bfloat16"):
        pictures = ["callbacks.samples.num_prompts=1", "callbacks.jump_to_x0.num_prompts=1"]
        phases = planned("sd15", "LoRA 16, attention", MIXED, dtype, "none", *pictures, "batch_size=1").phases
        decoded[dtype] = phases["1 pictures decoded"]
    done = list(csv.DictReader(file.open())) if file.exists() else []
    keys = {tuple(row[k] for k in ("family", "precision", "frozen_dtype", "recomputed", "method")) for row in done}
    with file.open("a", newline="") as out:
        for case in cases():
            family, method, *rest = case
            if (family, *rest, method) in keys:
                continue
            made = rows(case, decoded[case[3]])
            writer = csv.DictWriter(out, list(made[0]), lineterminator="\n")
            if out.tell() == 0:
                writer.writeheader()
            writer.writerows(made)
            out.flush()
            print(*case, flush=True)


if __name__ == "__main__":
    main()
