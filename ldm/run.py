"""The entry point: `python -m ldm.run experiment=NAME [task=TASK] [group=option ...] [key=value ...]`, or `ldm ...`."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.config.choices import said_in_words
from ldm.config.root import conf_dir, digest
from ldm.config.schema import look_in, register, schema, tasks
from ldm.errors import ConfigError, Ended, SweepError
from ldm.launch import OtherProcess, is_first, launch
from ldm.sweep import plugins
from ldm.sweep.arms import FAILED, PRUNED, Arm, ready, run_arm
from ldm.sweep.child import Child, apart
from ldm.text.reading import NotText, checked

FREE_TEXT = ("adapter.textual_inversion.placeholder", "adapter.textual_inversion.initial_text")  # below the root


def main() -> None:
    """Runs, and turns what the person can mend into one line and an exit code.

    0 done; 2 refused, and so was every arm of a sweep; 3 diverged, or an arm of a sweep; 130 Ctrl-C; 75 a signal.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that this terminal cannot show end nothing
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # of `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command line. Prints one line to stderr for whatever was refused."""
    if {"--help", "-h"} & set(arguments):
        from ldm.config.help import help_text

        try:
            overrides, flags = _parsed(arguments)
            look_in(*_folders(flags))
            print(help_text(overrides))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    os.environ["LDM_COMMAND"] = shlex.join(["python", "-m", "ldm.run", *arguments])  # for run.json
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing and exiting by itself
    multirun = bool({"-m", "--multirun"} & set(arguments))

    def compose() -> None:
        _refuse_bytes(arguments)
        overrides, flags = _parsed(arguments)
        register(*_folders(flags))
        _check_trainer(arguments)
        searched = [a for a in overrides if not multirun and a.startswith(("sweep=", "sweep."))]
        if searched:
            raise ConfigError(f"{searched[0]} is of sweeps, and this is one run: python -m ldm.run -m ... sweeps.")
        typed = [quoted(said_in_words(a), multirun) for a in _in_one_piece(arguments, overrides)]
        if multirun:
            plugins.register()
        _hydra(job, named_sweep(typed) if multirun else typed)

    return guarded(compose).code


@dataclass(frozen=True)
class Ending:
    """How something ended: exit code, the line that was printed, whether it would end so again, and in every arm."""

    code: int
    line: str = ""
    final: bool = True
    ends_sweep: bool = False


def guarded(act: Callable[[], None]) -> Ending:
    """Does it; what the person can mend is printed as one line. Other errors are raised."""
    failure: BaseException
    try:
        with _stopped_by_signals():
            act()
        return Ending(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Ending(130, "interrupted")
    except SystemExit as stop:  # a scheduler's signal, the end of a sweep, or Hydra's own
        return Ending(stop.code if isinstance(stop.code, int) else int(bool(stop.code)), "stopped")
    except Ended as ended:
        failure = ended.error
    except Exception as error:
        failure = error
    code = _ended_elsewhere(failure)
    return Ending(code) if code is not None else _report(failure)


def job(config: DictConfig) -> float | None:
    """One composed configuration: checked, then handed to its task. In a sweep its value is what is optimised."""
    os.environ.setdefault("WANDB_SILENT", "true")
    arm = Arm.current()
    if arm is not None:
        return run_arm(arm, lambda: _perform(config, arm), config)
    try:
        _perform(config, None)
    except Exception as error:
        raise Ended(error) from error
    return None


def _perform(config: DictConfig, arm: Arm | None) -> dict[str, float]:
    kind = ready(config, arm)
    if not (kind.in_every_process or is_first()):
        return {}
    if arm is not None and apart():
        return Child(arm, config).numbers()
    return kind.run(config)


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
    """`key=text` with the text quoted for Hydra's grammar, for the keys that hold free text or a path.

    So commas, =, %, brackets and accents just work; but in a sweep commas part the paths.
    """
    key, separator, value = argument.partition("=")
    known = schema().get(key)
    holds = "text" if key in FREE_TEXT else known.about.get("holds") if known else ""
    if not separator or value in ("", "null") or holds not in (("text",) if multirun else ("text", "path", "paths")):
        return argument
    if holds == "paths":
        listed = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        items = [m[1] or m[2] or m[3].strip() for m in _ITEM.finditer(listed)]
        return f"{key}=[{','.join(_in_quotes(item) for item in items if item)}]"
    return f"{key}={_in_quotes(value)}"


_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]+))\s*(?:,|$)""")  # a path with a comma stands in quotes


def _in_quotes(text: str) -> str:
    # In Hydra's quotes only \" and the backslashes right before it are special; ${ would be an interpolation.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped).replace("${", "\\${")
    return f'"{escaped}"'


def _hydra(function: Callable[[DictConfig], Any], arguments: Sequence[str]) -> None:
    import hydra

    sys.argv = [sys.argv[0], *arguments]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(function)()


def _in_one_piece(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The overrides, then the flags: Hydra's parser reads no override after a flag that follows another override."""
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    return [*overrides, *flags]


def _parsed(arguments: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """The overrides, and what Hydra's flags say."""
    from hydra._internal.utils import get_args_parser

    found = get_args_parser().parse_intermixed_args(list(arguments))
    return found.overrides, found


def _folders(flags: argparse.Namespace) -> list[Path]:
    """Of --config-dir."""
    return [Path(flags.config_dir)] if flags.config_dir else []


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
    told = ("name", "outputs", "sweep")  # where, and how many of the arms
    changes = sorted(str(o.input_line) for o in (*ours, *spaces) if o.key_or_group.split(".")[0] not in told)
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
    named = [tasks().get(a.removeprefix("task=")) for a in arguments if a.startswith("task=")]
    if any(kind is None or not kind.in_every_process for kind in named):
        return
    if {"trainer=ddp", "trainer=fsdp"} & set(arguments):
        from ldm.launch import expect_srun

        expect_srun()
    typed = (a.lstrip("+").partition("=") for a in arguments if a.lstrip("+").startswith("trainer."))
    values = {key.removeprefix("trainer."): value for key, _, value in typed}
    if {"num_nodes", "strategy"} & values.keys():
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
    return 130 if "stopped by SIGINT" in ended[1] else 75 if "stopped by " in ended[1] else 2


def _report(error: BaseException) -> Ending:
    from ldm.config.explain import explain

    code, line, final = getattr(error, "exit_code", 2), str(error), True
    if type(error).__name__ == "Interrupted":
        line = str(error) if code == PRUNED else f"{error}. The same command goes on from there."
    elif type(error).__name__ == "Diverged":
        code, line = FAILED, f"stopped: {error}"
    elif isinstance(error, OtherProcess):
        line, final = f"error: {error}", code not in (1, 75)  # it crashed, or was lost
    else:
        explained = explain(error)
        if explained is None:
            raise error
        line = f"error: {explained}"
    if _speaks(error):
        print(line, file=sys.stderr)
    return Ending(code, line, final, isinstance(error, SweepError))


def _speaks(error: BaseException) -> bool:
    if launch().world_size == 1:  # without torch, which would take longer than what was refused
        return not (isinstance(error, OtherProcess) and error.told_here)
    from ldm.training.distributed.processes import speaks

    return speaks(error)


if __name__ == "__main__":
    main()
