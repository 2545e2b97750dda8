"""The entry point: `python -m ldm.run experiment=NAME [task=TASK] [group=option ...] [key=value ...]`, or `ldm ...`."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.choices import drop_leftovers, said_in_words
from ldm.config import check_keys_are_read, conf_dir, digest, register
from ldm.errors import ConfigError
from ldm.text.reading import NotText, checked

# Free text and paths: quoted before Hydra parses them, so that commas, =, %, brackets and accents just work.
TEXT_KEYS: tuple[str, ...] = ("prompt", "negative_prompt", "subject", "instance_prompt", "class_prompt")
TEXT_KEYS += tuple(f"adapter.textual_inversion.{key}" for key in ("placeholder", "initial_text"))
PATH_KEYS = (
    *("prompts", "images", "output", "outputs", "shards", "checkpoint", "config", "name", "init_image", "mask"),
    *("class_images", "class_shards"),
)
PATH_LIST_KEYS = ("adapters", "checkpoints")  # [PATH,PATH], or one


def main() -> None:
    """Runs, and turns what the person can mend into one line and an exit code: 2 refused, 130 or 75 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that this terminal cannot show end nothing
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted before anything was trained", file=sys.stderr)
        code = 130
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command line. Prints one line to stderr for whatever was refused."""
    if {"--help", "-h"} & set(arguments):
        from ldm.help import help_text

        print(help_text(conf_dir()))
        return 0
    multirun = bool({"-m", "--multirun"} & set(arguments))
    os.environ["LDM_COMMAND"] = shlex.join(["python", "-m", "ldm.run", *arguments])  # for run.json
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing and exiting by itself
    try:
        _refuse_bytes(arguments)
        _refuse_self_launched_sweeps(arguments, multirun)
        arguments = [quoted(said_in_words(a), multirun) for a in arguments]
        if multirun:
            os.environ["LDM_SWEPT"] = " ".join(a.split("=", 1)[0] for a in arguments if "," in a.partition("=")[2])
            arguments.append(f"hydra.sweep.dir={_sweep_directory(arguments)}")
        failures: list[Exception] = []
        _hydra(_holding(failures), arguments)
        if failures:
            raise failures[0]
    except Exception as error:
        return _report(error, arguments)
    return 0


def _holding(failures: list[Exception]) -> Callable[[DictConfig], Any]:
    """The job of a single run keeps its error for `run` to report: Hydra would print a line of its own before it."""

    def held(config: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return job(config)
        try:
            return job(config)
        except Exception as error:
            failures.append(error)
            return None

    return held


def job(config: DictConfig) -> Any:
    """One composed configuration: checked, then handed to its task. In a sweep a refusal is an arm's result."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from ldm.tasks.arms import record

    os.environ.setdefault("WANDB_SILENT", "true")
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    if sweep is None:
        return _perform(config, dict(hydra.runtime.choices), overrides, None)
    directory = str(_arm(sweep, overrides))
    try:
        metrics = _perform(config, dict(hydra.runtime.choices), overrides, sweep)
    except ConfigError as error:
        record(sweep, overrides, directory, "refused", {}, str(error))
        print(f"refused: {' '.join(overrides)}: {error}", file=sys.stderr)
        return None
    record(sweep, overrides, directory, "finished", metrics, "")
    return metrics.get(config.optimized_metric) if config.optimized_metric else None


def _perform(config: DictConfig, choices: dict[str, Any], overrides: list[str], sweep: Path | None) -> dict[str, float]:
    from hydra.utils import get_method

    task = str(choices["task"])
    check_keys_are_read(task, overrides)
    drop_leftovers(config, overrides)
    config.experiment = choices.get("experiment") or task
    function: Callable[..., dict[str, float]] = get_method(config.task._target_)
    return function(config, arm=_arm(sweep, overrides))


def _arm(sweep: Path | None, overrides: list[str]) -> Path | None:
    """An arm's own directory inside the sweep's, named by what it changes."""
    if sweep is None:
        return None
    swept = tuple(f"{k}=" for k in os.environ.get("LDM_SWEPT", "").split())
    changes = [o for o in overrides if o.startswith(swept)] if swept else list(overrides)
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", "_".join(o.replace("=", "-") for o in changes))[:80]
    return sweep / (slug.strip("-") + "-" + digest(changes, 4))


def quoted(argument: str, multirun: bool) -> str:
    """`key=text` with the text quoted for Hydra's grammar, for the keys that hold free text or a path."""
    key, separator, value = argument.partition("=")
    if key in PATH_LIST_KEYS and not multirun and value not in ("", "null"):
        listed = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        items = [m[1] or m[2] or m[3].strip() for m in _ITEM.finditer(listed)]
        return f"{key}=[{','.join(_in_quotes(item) for item in items if item)}]"
    if not separator or key not in (*TEXT_KEYS, *(() if multirun else PATH_KEYS)) or value in ("", "null"):
        return argument
    return f"{key}={_in_quotes(value)}"


_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]+))\s*(?:,|$)""")  # a path with a comma stands in quotes


def _in_quotes(text: str) -> str:
    # In Hydra's quotes only \" and the backslashes right before it are special; ${ would be an interpolation.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped).replace("${", "\\${")
    return f'"{escaped}"'


def _hydra(function: Callable[[DictConfig], Any], arguments: Sequence[str]) -> None:
    import hydra

    register()
    sys.argv = [sys.argv[0], *arguments]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(function)()


def _sweep_directory(arguments: Sequence[str]) -> str:
    """outputs/<name>, or experiment and a digest of what is swept: the same sweep finds its directory again."""
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    changes = sorted(a for a in arguments if "=" in a and not a.startswith(("name=", "outputs=")))
    name = given.get("name") or f"{given.get('experiment', 'sweep')}-sweep-{digest(changes, 6)}"
    return str(Path(given.get("outputs", "outputs")) / name.strip("\"'"))


def _refuse_bytes(arguments: Sequence[str]) -> None:
    """What is typed goes into configurations, recipes and reports, which are texts; so it has to be one."""
    for argument in arguments:
        try:
            checked(argument)
        except NotText as error:
            raise ConfigError(
                f"an argument is {error}: type it in UTF-8 (is the terminal set to another encoding?). A file"
                " or folder with such a name needs another one, or a link: ln -s."
            ) from None


def _refuse_self_launched_sweeps(arguments: Sequence[str], multirun: bool) -> None:
    if multirun and any(a.startswith("trainer=ddp") for a in arguments) and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "-m with trainer=ddp: Lightning would start the whole sweep again in every process. Start one process a "
            "rank from outside, one arm at a time: torchrun --nproc_per_node=N -m ldm.run ... trainer=ddp"
        )


def _report(error: BaseException, arguments: Sequence[str]) -> int:
    from ldm.explain import explain

    stopped = getattr(error, "exit_code", None)
    if stopped is not None:  # training.callbacks.saving.Interrupted
        print(f"{error}. The same command goes on from there.", file=sys.stderr)
        return stopped
    if type(error).__name__ == "Diverged":
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    line = explain(error, arguments, conf_dir())
    if line is None:
        raise error
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
