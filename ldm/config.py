"""The root of every configuration: its keys, which task reads which, and the checks made before anything is built."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.errors import ConfigError

TASKS = ("train", "sample", "evaluate", "prepare", "encode", "check", "objective", "convert", "merge", "plan")
MODULES = ("latent_diffusion", "autoencoder")
RECONSTRUCTIONS = ("squared", "absolute", "both")
FROZEN_DTYPES = ("float32", "bfloat16", "float16")


def key(default: Any, tasks: str, text: str) -> Any:
    """A root key: its default, the tasks that read it ("all" or names), and its line in --help."""
    return field(default=default, metadata={"tasks": _readers(tasks), "help": text})


def group(tasks: str, text: str) -> Any:
    """A configuration group: a folder of conf/, chosen by group=option."""
    return field(default=None, metadata={"tasks": _readers(tasks), "help": text, "group": True})


def _readers(tasks: str) -> tuple[str, ...]:
    """The tasks of a list of names; task=plan reads what task=train reads."""
    names = TASKS if tasks == "all" else tuple(tasks.split())
    return (*names, "plan") if "train" in names and "plan" not in names else names


@dataclass
class Root:
    """Every top-level key there is. Anything else, on the command line or in an experiment, is refused."""

    # --- what and where
    name: str | None = key(None, "train", "run directory under `outputs`; default: experiment, digest and seed")
    outputs: str = key("outputs", "all", "folder of all run directories")
    seed: Any = key(0, "train sample evaluate prepare", "an integer; for task=sample also a list, one seed an image")
    # --- data
    shards: str | None = key(
        None, "train encode evaluate check", "folder of tars that task=prepare or task=encode wrote"
    )
    images: str | None = key(None, "train prepare", "folder of captioned images (source=folder)")
    output: str | None = key(
        None, "sample prepare encode evaluate check objective convert merge plan", "what the task writes"
    )
    subject: str | None = key(
        None, "train", 'what templates= speak of, "sks dog": a rare word and what it is; free text'
    )
    instance_prompt: str | None = key(None, "train", 'one caption for all pictures, "a photo of sks dog"; free text')
    class_prompt: str | None = key(
        None, "train", 'caption of the class pictures of experiment=dreambooth, "a photo of a dog"; free text'
    )
    class_images: str | None = key(
        None,
        "train",
        "folder of class pictures, also with captions of their own; missing ones are drawn into it",
    )
    class_shards: str | None = key(None, "train", "latents of class pictures; default: what the stage prior made")
    num_class_images: int = key(100, "train", "class pictures that are held against forgetting")
    prior_weight: float = key(1.0, "train", "weight of the class pictures' loss beside the instance pictures'")
    image_size: int | None = key(None, "train prepare encode", "pixels a side; default: what prepare found out")
    batch_size: int = key(64, "train encode evaluate", "images per step, process and micro-batch")
    accumulate: int = key(1, "train", "micro-batches per optimizer step")
    # --- training
    module: str = key("latent_diffusion", "train", "what is trained: latent_diffusion or autoencoder")
    frozen_dtype: str = key("float32", "train", "of what is not trained, in memory: float32, bfloat16 or float16")
    max_steps: int = key(1000, "train", "optimizer steps; a larger number continues a run of lr_scheduler=constant")
    caption_dropout: float = key(0.1, "train", "share of captions replaced by the empty one, for guidance")
    noises_per_image: int = key(1, "train", "(t, eps) pairs drawn for each encoded image")
    kl_weight: float = key(1e-6, "train", "weight of the KL term (module=autoencoder)")
    reconstruction: str = key("squared", "train", "error of module=autoencoder: squared, absolute or both")
    checkpoint: str | None = key(
        None,
        "train sample evaluate encode convert",
        "run, checkpoint folder, diffusers folder, .safetensors, .ckpt or hub id to start from",
    )
    weights: str = key(
        "ema", "train sample evaluate encode convert merge", "which weights of the checkpoint: ema or raw"
    )
    config: str | None = key(
        None,
        "sample convert train evaluate encode merge",
        "diffusers folder, or run or config.yaml of ours, that says what a single file of unpublished sizes does not",
    )
    adopt: bool | None = key(False, "train", "the architecture is the checkpoint's; null: where checkpoint= is given")
    scheduler_config: Any = key(None, "train", "diffusers' scheduler_config.json of an adopted checkpoint")
    export: str | None = key(None, "train", "also write the result as diffusers or compvis when training ends")
    stages: Any = field(
        default_factory=dict,
        metadata={"tasks": ("train", "plan"), "help": "stages of one command, in order, each with its own changes"},
    )
    # --- sampling
    prompt: str | None = key(None, "sample", "the text; free text, no quoting needed beyond the shell's")
    negative_prompt: str = key("", "sample", "what guidance leads away from")
    prompts: str | None = key(None, "sample", "text file with one prompt a line, instead of prompt=")
    height: int | None = key(None, "sample", "pixels; default: the model's own")
    width: int | None = key(None, "sample", "pixels; default: the model's own")
    num_steps: int | None = key(None, "sample evaluate train objective", "steps; default: the run's own, 30")
    guidance: float | None = key(None, "sample evaluate train", "1 is off; default: the run's own, 7.5")
    guidance_rescale: float | None = key(None, "sample evaluate train", "0.7 for zero-terminal-SNR models; as above, 0")
    eta: float | None = key(None, "sample evaluate", "share of fresh noise, for samplers that have it")
    num_images: int = key(1, "sample", "images per prompt")
    init_image: str | None = key(None, "sample", "picture to start from, or to repaint where mask= is white")
    strength: float | None = key(None, "sample", "share of the steps walked from init_image; 0.8, with a mask 1")
    mask: str | None = key(None, "sample", "picture of init_image's size: white is repainted")
    clip_skip: int = key(0, "sample", "layers of the text encoder left out for the prompt")
    chunked: bool = key(False, "sample", "read prompts longer than the text encoder's in pieces, instead of cutting")
    prompt_weights: bool = key(False, "sample", "(word:1.3), (word) and [word] weigh words")
    tiling: bool = key(False, "sample", "the autoencoder works in tiles, for pictures larger than memory")
    adapters: Any = key(
        None, "sample", "LoRAs, embeddings, hypernetworks and runs of ours on the model: [PATH,PATH:0.8] with weights"
    )
    film_strip: bool = key(False, "sample", "also draw every step's latent above its jump to x0")
    animation: bool = key(False, "sample", "also write the jumps to x0 as a GIF")
    eval_images: int | None = key(None, "train evaluate", "pictures drawn per half of the score; as above, 256")
    optimized_metric: str | None = key(None, "train evaluate", "what names the best arm of a sweep, such as val/loss")
    # --- conversion and merging
    format: str | None = key(None, "convert merge", "ldm, diffusers (a folder) or compvis (.safetensors, .ckpt)")
    dtype: str = key("float32", "convert merge", "of the stored tensors: float32, float16 or bfloat16")
    checkpoints: Any = key(
        None, "merge", "list of what is merged, in any layout; the first is what others are added to"
    )
    method: str = key("sum", "merge", "sum, add_difference (A + ratio (B - C)), lora (A and LoRAs) or extract (a LoRA)")
    ratios: Any = key(
        None, "merge", "list of weights: a checkpoint, a difference or a LoRA each; default: a mean, 1, 1"
    )
    rank: int | None = key(None, "merge", "of an extracted LoRA, or what a sum of LoRAs is cut down to")
    # --- groups
    task: Any = group("all", "what to do")
    experiment: Any = group("all", "a recipe: choices of all the groups below")
    source: Any = group("train prepare", "where prepare's images come from")
    data: Any = group("train encode evaluate check", "how shards are read")
    model: Any = group("train", "the denoising network")
    autoencoder: Any = group("train", "the first stage")
    text_encoder: Any = group("train", "captions to conditions")
    scheduler: Any = group("train objective", "noise schedule")
    parameterization: Any = group("train objective", "what the network predicts")
    weighting: Any = group("train objective", "loss weight over noise levels")
    times: Any = group("train objective", "which noise levels are trained on")
    grid: Any = group("train sample evaluate objective", "spacing of the sampling steps")
    sampler: Any = group("train sample evaluate objective", "solver")
    guider: Any = group("train sample evaluate", "guidance")
    optimizer: Any = group("train", "optimizer")
    lr_scheduler: Any = group("train", "learning rate over steps")
    ema: Any = group("train", "averaged weights")
    templates: Any = group("train", "captions drawn from sentences around subject=")
    masking: Any = group("train", "what an inpainting model learns to repaint")
    adapter: Any = group("train", "what is trained beside a frozen model, one or several: adapter=[lora]")
    trainer: Any = group("train", "Lightning's Trainer: devices, precision, strategy")
    callbacks: Any = group("train", "what is watched, and how often")
    logger: Any = group("train", "W&B offline, online or none; metrics.jsonl is always written")
    metric: Any = group("train evaluate", "what evaluate measures")
    debug: Any = group("all", "fast_dev_run, overfit, profile, anomaly")
    local: Any = group("all", "settings of this machine, not in git")


def register() -> None:
    """Makes Root the schema that conf/config.yaml starts from."""
    ConfigStore.instance().store(name="root", node=Root)


def conf_dir() -> Path:
    """The one folder of configurations: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "conf", here / "conf"):
        if (folder / "config.yaml").is_file() and "ldm.root" in (folder / "config.yaml").read_text().split("\n", 1)[0]:
            return folder
    raise ConfigError(f"the configuration folder conf/ is neither beside nor inside {here}: install ldm again.")


def group_names() -> list[str]:
    return [f.name for f in fields(Root) if f.metadata.get("group")]


def nearest(word: str, known: Sequence[str]) -> str:
    """' Did you mean 'x'?' with a second candidate where it is nearly as near; '' where nothing is."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    ratio = [difflib.SequenceMatcher(None, word, c).ratio() for c in close]
    close = [c for c, r in zip(close, ratio, strict=True) if r > 0.85 * ratio[0]]
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def digest(value: Any, length: int = 8) -> str:
    """A short fingerprint of plain data, the same in every process."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def check_keys_are_read(task: str, overrides: Sequence[str]) -> None:
    """Refuses a command-line key that `task` does not read, naming the tasks that do."""
    by_name = {f.name: f for f in fields(Root)}
    for override in overrides:
        name = override.lstrip("+~").split("=", 1)[0].split(".")[0].split("@")[0].split("/")[0]
        known = by_name.get(name)
        if known is None and not name.startswith("hydra"):
            raise ConfigError(f"{name}= is no key and no group.{nearest(name, list(by_name))} See --help.")
        if known is not None and task not in known.metadata["tasks"]:
            readers = ", ".join(f"task={t}" for t in known.metadata["tasks"])
            raise ConfigError(f"{name}= is not read by task={task}, but by {readers}: leave it out.")


def check(config: DictConfig, task: str | None = None) -> None:
    """Raises one ConfigError that lists every value which cannot be, before anything is built.

    task: its own groups alone are checked, because others may not know what this task's keys may be (a list of seeds).
    """
    others = {f.name for f in fields(Root) if task is not None and task not in f.metadata["tasks"]}
    problems = []
    if config.reconstruction not in RECONSTRUCTIONS:
        problems.append(f"reconstruction={config.reconstruction}: choose one of {', '.join(RECONSTRUCTIONS)}.")
    if config.module not in MODULES:
        problems.append(f"module={config.module}: choose one of {', '.join(MODULES)}.{nearest(config.module, MODULES)}")
    if config.export not in (None, "diffusers", "compvis", "ldm"):
        problems.append(f"export={config.export}: choose diffusers or compvis, or leave it out.")
    if config.weights not in ("ema", "raw"):
        problems.append(f"weights={config.weights}: choose ema or raw.")
    if config.frozen_dtype not in FROZEN_DTYPES:
        problems.append(f"frozen_dtype={config.frozen_dtype}: choose one of {', '.join(FROZEN_DTYPES)}.")
    counts = ("batch_size", "accumulate", "max_steps", "noises_per_image", "num_images", "eval_images", "num_steps")
    for name in (*counts, "num_class_images"):
        if config[name] is not None and config[name] < 1:
            problems.append(f"{name}={config[name]}: must be at least 1.")
    if not 0 <= config.caption_dropout <= 1:
        problems.append(f"caption_dropout={config.caption_dropout}: must lie in [0, 1].")
    if not config.prior_weight >= 0:
        problems.append(f"prior_weight={config.prior_weight}: must be at least 0; 1 is usual.")
    for name, node in plain(config).items():
        if isinstance(node, Mapping) and name not in others:
            problems += check_node(str(name), node)
    if problems:
        raise ConfigError(" ".join(problems))


def check_node(path: str, node: Mapping[str, Any]) -> list[str]:
    """Every `_target_` in a tree against its signature: unknown names, missing ones, values of another type."""
    problems = []
    for name, value in node.items():
        if isinstance(value, Mapping):
            problems += check_node(f"{path}.{name}", value)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Mapping):
                    problems += check_node(f"{path}.{name}[{i}]", item)
    if "_target_" not in node:
        return problems
    target = locate(node["_target_"], path)
    parameters = inspect.signature(target).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _type_hints(target)
    for name, value in node.items():
        if name.startswith("_") and name.endswith("_"):
            continue
        if name not in parameters and not takes_more:
            problems.append(f"{path}.{name}: {node['_target_']} has no such argument.{nearest(name, list(parameters))}")
        elif not fits(value, hints.get(name, Any)):
            problems.append(f"{path}.{name}={value!r}: expected {_show(hints[name])}.")
    if not node.get("_partial_"):
        for name, parameter in parameters.items():
            required = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
            if required and name not in node:
                problems.append(f"{path}.{name} is missing: {node['_target_']} needs it.")
    return problems


def locate(target: str, path: str) -> Callable[..., Any]:
    """The class or function behind a `_target_`."""
    from hydra.utils import get_object

    try:
        return get_object(target)
    except Exception as error:
        raise ConfigError(f"{path}._target_={target}: there is no such class or function ({_cause(error)}).") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can be meant for a parameter with this type hint; unknown hints accept everything."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, (str, typing.TypeVar)):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is not None:
        return _fits_container(value, origin, args)
    if hint is type(None) or value is None:
        return hint is type(None) and value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(hint, type):
        return True
    if isinstance(value, list):
        return issubclass(hint, (list, tuple, Sequence)) and not issubclass(hint, str)
    return isinstance(value, hint) or (isinstance(value, str) and hint.__name__ in ("Path", "PathLike"))


def _fits_container(value: Any, origin: Any, args: tuple[Any, ...]) -> bool:
    if not isinstance(origin, type):
        return True
    if isinstance(value, list):
        if not issubclass(origin, (list, tuple, Sequence)) and origin is not typing.get_origin(typing.Iterable[int]):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args, strict=True))
        return all(fits(v, args[0]) for v in value) if args else True
    if isinstance(value, Mapping):
        return issubclass(origin, Mapping) or origin is dict
    return isinstance(value, origin)


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # hints that name things not importable here: the call itself will tell
        return {}


def _show(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")  # type: ignore[return-value]


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).split("\n")[0]


def plain(config: DictConfig | ListConfig) -> Any:
    """Resolved, plain containers: what is written to disk and into checkpoints."""
    return OmegaConf.to_container(config, resolve=True)
