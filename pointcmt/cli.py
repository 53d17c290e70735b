"""The command line: ``pointcmt COMMAND …``, every option a field of a command's dataclass."""

from __future__ import annotations

import codecs
import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro

# command → module, its options, the function that takes them. Imported when needed: --help must not wait
# for timm
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("studies.demo", "Demo", "demo"),
    "train-teacher": ("recipes.train_teacher", "TrainTeacher", "train_teacher"),
    "train-generator": ("recipes.train_generator", "TrainGenerator", "train_generator"),
    "cache-features": ("recipes.features", "CacheFeatures", "cache_features"),
    "train": ("recipes.train", "Train", "train"),
    "pretrain": ("recipes.pretrain", "Pretrain", "pretrain"),
    "probe": ("recipes.probe", "Probe", "probe"),
    "few-shot": ("recipes.few_shot", "FewShot", "few_shot"),
    "segment": ("recipes.segment", "Segment", "segment"),
    "train-registration": ("recipes.train_registration", "TrainRegistration", "train_registration"),
    "register": ("recipes.register", "Register", "register"),
    "evaluate": ("recipes.evaluate", "Evaluate", "evaluate"),
    "ablate": ("studies.ablate", "Ablate", "ablate"),
    "robustness": ("studies.robustness", "Robustness", "robustness"),
    "report": ("studies.report", "Report", "report"),
    "render-views": ("recipes.render_views", "RenderViews", "render_views"),
    "check-data": ("recipes.check_data", "CheckData", "check_data"),
    "adapters": ("recipes.adapters", "Adapters", "adapters"),
    "doctor": ("recipes.doctor", "Doctor", "doctor"),
}
SUMMARY = {
    "demo": "few labels, many clouds without: what images add on embedded shapes, in three minutes",
    "train-teacher": "stage I: an image teacher, on views projected from points or on a folder of images",
    "train-generator": "stage II: the generator that turns the teacher's features into clouds",
    "cache-features": "compute the teacher's features of all shapes once (train does it where needed)",
    "train": "stage III: a student, plain or with PointCMT",
    "pretrain": "no labels: pictures of the clouds teach a network (Pic@Point, MM-Point, CrossPoint, dense)",
    "probe": "what a network's frozen features are worth: a linear SVM, beside random weights",
    "few-shot": "what they are worth with few labels: K-way N-shot, beside random weights",
    "segment": "a class for each point, of parts and scenes: train, evaluate, use on your own clouds",
    "train-registration": "CMIGNet: the motion between two clouds, on pairs made of any data set",
    "register": "the motion between two clouds in files, and whether it can be trusted",
    "evaluate": "OA, mAcc and accuracy per class of a run, in one pass or by vote",
    "ablate": "students × methods × seeds from one configuration file, with a table and a chart",
    "robustness": "accuracy of students under dropout, jitter, rotation and scale: one JSON, one plot",
    "report": "pictures and one HTML page of the runs in a folder",
    "render-views": "images of meshes (OFF, OBJ, PLY), named as train-teacher --images wants them",
    "check-data": "read a whole data set, say what is in it and what would go wrong, draw each class",
    "adapters": "list the adapters, or prove the one for a network (--check module:Class)",
    "doctor": "versions, device, compiled kernels, adapters, and what is wrong",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: pointcmt COMMAND [OPTIONS]",
        "",
        "Images teach the point-cloud network you already have.",
        "",
    ]
    lines += [f"  {name:<{width}}  {SUMMARY[name]}" for name in COMMANDS]
    lines += [
        "",
        "pointcmt COMMAND --help explains every option.",
        "--debug, after any command, shows the whole traceback of an error.",
        "--import MODULE, after any command, imports your own module (or file.py) first: the adapters,",
        "students, objectives and data sets that it registers are known then.",
        "Several processes (GPUs, or CPUs): torchrun --nproc-per-node N -m pointcmt COMMAND [OPTIONS]",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0 done, what the command returned (register: 3 where the result cannot be trusted), 1
        something was wrong (said in one message on stderr), 2 wrong usage,
        130 interrupted.
    """
    print_in_any_locale()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments, modules = own_modules([argument for argument in arguments if argument != "--debug"])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from pointcmt import __version__

        print(__version__)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        near = ", ".join(difflib.get_close_matches(command, COMMANDS)) or "nothing"
        print(f"pointcmt: there is no command {command!r}; near it: {near}\n\n{usage()}", file=sys.stderr)
        return 2
    module_name, options_name, function_name = COMMANDS[command]
    running = False
    try:
        if modules:
            from pointcmt.recipes.build import import_module

            for name in modules:
                import_module(name)
        module = importlib.import_module(f"pointcmt.{module_name}")
        options_type: type[Any] = getattr(module, options_name)
        function: Callable[[Any], Any] = getattr(module, function_name)
        options = tyro.cli(
            options_type,
            prog=f"pointcmt {command}",
            args=arguments[1:],
            config=(tyro.conf.OmitArgPrefixes,),
        )
        # tyro has seen to types and choices; numbers that are none, such as nan, are seen to here
        from pointcmt.recipes.config import plain, structure

        structure(plain(options), options_type, command)
        from pointcmt.recipes.processes import answering

        running = True
        with answering():
            result = function(options)
        return result if isinstance(result, int) else 0
    except SystemExit as stop:
        if running:  # code of the user's own: an end without a word must not pass for success
            print(f"pointcmt {command}: ended by sys.exit({stop.code!r}) in imported code", file=sys.stderr)
            return 1
        return stop.code if isinstance(stop.code, int) else 2  # tyro: 2 for wrong usage, 0 after --help
    except KeyboardInterrupt:
        again = "the same command" if command == "ablate" else "--resume"
        print(
            f"\npointcmt {command}: interrupted; {again} goes on from the last whole epoch", file=sys.stderr
        )
        return 130
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        else:
            words = str(error) or type(error).__name__
            print(f"pointcmt {command}: {words}\n(--debug shows where)", file=sys.stderr)
        return 1


def print_in_any_locale() -> None:
    """Help, tables and class names hold more than ASCII. An ASCII locale (``LC_ALL=C``, as in containers)
    says nothing about where the text ends, so it gets UTF-8; another one a question mark for what it lacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            ascii_only = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if ascii_only else None, errors="replace")


def own_modules(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without ``--import MODULE``, and the modules."""
    rest, modules, words = [], [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--import":
            modules.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return rest, modules


def run() -> NoReturn:
    """The program: :func:`main`, and the end of a process that a launcher started as one of several."""
    code = main()
    if "WORLD_SIZE" in os.environ:
        from pointcmt.distributed import leave

        leave(code)
    raise SystemExit(code)


if __name__ == "__main__":
    run()
