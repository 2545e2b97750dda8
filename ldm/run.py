"""The entry point: `python -m ldm.run experiment=NAME [task=TASK] [group=option ...] [key=value ...]`, or `ldm ...`."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.config.choices import drop_leftovers, said_in_words
from ldm.config.root import check_keys_are_read, conf_dir, digest, register
from ldm.errors import ConfigError, Ended
from ldm.sweep.arms import FAILED, Arm, run_arm
from ldm.text.reading import NotText, checked
from ldm.training.distributed.processes import is_first, speaks

# Free text and paths: quoted before Hydra parses them, so that commas, =, %, brackets and accents just work.
TEXT_KEYS: tuple[str, ...] = ("prompt", "negative_prompt", "subject", "instance_prompt", "class_prompt")
TEXT_KEYS += tuple(f"adapter.textual_inversion.{key}" for key in ("placeholder", "initial_text"))
PATH_KEYS = (
    *("prompts", "images", "output", "outputs", "shards", "checkpoint", "config", "name", "init_image", "mask"),
    *("class_images", "class_shards"),
)
WRITING = ("sample", "evaluate", "objective", "prepare", "encode")  # tasks that write into output=DIR
PATH_LIST_KEYS = ("adapters", "checkpoints")  # [PATH,PATH], or one


def main() -> None:
    """Runs, and turns what the person can mend into one line and an exit code.

    0 done; 2 refused, and so was every arm of a sweep; 3 diverged, or an arm of a sweep; 130 Ctrl-C; 75 a signal.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that this terminal cannot show end nothing
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command line. Prints one line to stderr for whatever was refused."""
    if {"--help", "-h"} & set(arguments):
        from ldm.config.help import help_text

        try:
            print(help_text(conf_dir(), arguments))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    os.environ["LDM_COMMAND"] = shlex.join(["python", "-m", "ldm.run", *arguments])  # for run.json
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing and exiting by itself
    multirun = bool({"-m", "--multirun"} & set(arguments))
    failure: BaseException
    try:
        _refuse_bytes(arguments)
        _check_trainer(arguments)
        arguments = [quoted(said_in_words(a), multirun) for a in _in_one_piece(arguments)]
        if multirun:
            arguments = named_sweep(arguments)
        with _stopped_by_signals():
            _hydra(job, arguments)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # a scheduler's signal, the end of a sweep, or Hydra's own
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Ended as ended:
        failure = ended.error
    except Exception as error:
        failure = error
    return _ended_elsewhere(failure) or _report(failure, arguments)


def job(config: DictConfig) -> float | None:
    """One composed configuration: checked, then handed to its task. In a sweep its value is what is optimised."""
    os.environ.setdefault("WANDB_SILENT", "true")
    arm = Arm.current()
    if arm is not None:
        return run_arm(arm, lambda: _perform(config, arm), config.optimized_metric)
    try:
        _perform(config, None)
    except Exception as error:
        raise Ended(error) from error
    return None


def _perform(config: DictConfig, arm: Arm | None) -> dict[str, float]:
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import get_method

    choices, overrides = HydraConfig.get().runtime.choices, list(HydraConfig.get().overrides.task)
    task = str(choices["task"])
    named = () if arm is None else ("name",)  # of the sweep, whatever its arms do
    check_keys_are_read(task, [o for o in overrides if o.partition("=")[0] not in named])
    if task != "train" and not is_first():  # one process does it, whatever started several
        return {}
    drop_leftovers(config, overrides)
    config.experiment = choices.get("experiment") or task
    if arm is not None and task in WRITING:  # into one folder they would write over each other
        config.output = str(Path(config.output) / arm.directory.name if config.output else arm.directory)
    function: Callable[..., dict[str, float]] = get_method(config.task._target_)
    return function(config, arm=arm and arm.directory)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """A scheduler's signal ends the command as Ctrl-C does, with 75; while it trains, at a step boundary."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, _stop) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: Any) -> None:
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
    raise SystemExit(75)


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


def _in_one_piece(arguments: Sequence[str]) -> list[str]:
    """The overrides, then the flags: Hydra's parser reads no override after a flag that follows another override."""
    from hydra._internal.utils import get_args_parser

    overrides, flags = get_args_parser().parse_intermixed_args(arguments).overrides, list(arguments)
    for override in overrides:
        flags.remove(override)
    return [*overrides, *flags]


def named_sweep(arguments: Sequence[str]) -> list[str]:
    """The arguments with the sweep's directory, and with the keys that are the same in all of its arms.

    outputs/<name>, or experiment and a digest of what is swept: the same sweep finds its directory again. What is
    swept is Hydra's to say: a comma may stand in quotes, and range(), glob(), choice() and interval() have none.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = get_args_parser().parse_args(arguments).overrides
    parsed = OverridesParser.create().parse_overrides(given)
    ours = [o for o in parsed if not o.is_hydra_override()]
    fixed = {o.get_key_element(): o for o in ours if not o.is_sweep_override()}
    spaces = [o for o in parsed if o.key_or_group.startswith("hydra.sweeper.params")]
    changes = sorted(str(o.input_line) for o in (*ours, *spaces) if o.key_or_group not in ("name", "outputs"))
    name = str((fixed["name"].value() if "name" in fixed else None) or "")
    experiment = fixed["experiment"].value() if "experiment" in fixed else "sweep"
    name = name or f"{experiment}-sweep-{digest(changes, 6)}"
    base = "" if name.startswith("/") else "${outputs}/"
    added = [f'hydra.sweep.dir="{base}{_in_quotes(name)[1:]}']
    added.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(_in_quotes(k) for k in fixed)}]")
    return [*added, *arguments]


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


def _check_trainer(arguments: Sequence[str]) -> None:
    """Refuses for all arms of a sweep at once what each of them would be refused for."""
    if any(a.startswith("task=") and a != "task=train" for a in arguments):
        return
    if "trainer=ddp" in arguments:
        from ldm.training.distributed.meeting import expect_srun

        expect_srun()
    typed = (a.lstrip("+").partition("=") for a in arguments if a.lstrip("+").startswith("trainer."))
    values = {key.removeprefix("trainer."): value for key, _, value in typed}
    if {"devices", "num_nodes", "strategy"} & values.keys():
        from ldm.training.distributed.strategy import check_trainer

        check_trainer(values)


def _ended_elsewhere(error: BaseException) -> int | None:
    """The exit code for the end of a sweep that a launcher or sweeper of Hydra's reports in words of its own."""
    if "No trials are completed yet" in str(error):  # Optuna, where no arm has a value
        print("no arm of this sweep has a value of optimized_metric=: its results.csv says why.", file=sys.stderr)
        return FAILED
    ended = re.search(r"^ldm\.errors\.Ended: (.*)", str(error), re.MULTILINE)  # submitit: the job's traceback as text
    if not ended:
        return None
    print(ended[1], file=sys.stderr)
    return 130 if "stopped by SIGINT" in ended[1] else 75 if "stopped by SIG" in ended[1] else 2


def _report(error: BaseException, arguments: Sequence[str]) -> int:
    from ldm.config.explain import explain

    code, line = getattr(error, "exit_code", 2), str(error)
    if type(error).__name__ == "Interrupted":
        line = f"{error}. The same command goes on from there."
    elif type(error).__name__ == "Diverged":
        code, line = FAILED, f"stopped: {error}"
    elif type(error).__name__ == "OtherProcess":
        line = f"error: {error}"
    else:
        explained = explain(error, arguments, conf_dir())
        if explained is None:
            raise error
        line = f"error: {explained}"
    if speaks(error):
        print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
