"""The command line: ``attrib-zoo demo | list | layers | explain | app | fit | evaluate | reproduce | doctor ...``."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from attrib_zoo import __version__
from attrib_zoo.cli.configs import check_configs
from attrib_zoo.errors import AttribZooError, shown
from attrib_zoo.training.signals import stay_deaf, stoppable

_METHODS = "one or more of attrib-zoo list, or package.module:Class of your own (default: gradcam, or the explainer's)"

_NAMES = ("demo", "list", "layers", "explain", "app", "fit", "evaluate", "reproduce", "doctor", "completion")

_ABOUT = """\
Which image regions made the model decide? Explains torchvision and timm classifiers.

  attrib-zoo demo                                see it work: offline, minutes
  attrib-zoo explain photo.jpg --model resnet50  a heat map over your photograph
  attrib-zoo fit --model resnet50 --data images/ --output ttame.safetensors
                                                 an explainer for your model
"""

_EVALUATE = """\
Measure methods on a folder of images, each explained for what the model decides: average drop (ad) and increase
in confidence (ic), ROAD (road), insertion and deletion ... Controls stand beside them. Writes one HTML page,
tables, plots, and per-image results that a second run continues.

  attrib-zoo evaluate --model resnet50 --data photos/ --method gradcam,scorecam --output results/
"""

_EXPLAIN = """\
Show which regions of each photograph speak for a class: an overlay PNG for each photograph and method,
one picture that compares them if there are several methods, and a table of what the model saw.

  attrib-zoo explain cat.jpg dogs/ --model resnet50
  attrib-zoo explain cat.jpg --model resnet50 --target "tabby"
  attrib-zoo explain cat.jpg --model vit_base_patch16_224 --method gradcam,ttame --explainer ttame.safetensors
  attrib-zoo explain photos/ --model resnet50 --no-pictures --maps safetensors --workers 4 --skip-bad --resume
"""

_APP = """\
Serve a page on which photographs are explained: drop one, see the model's classes, choose one or two of them and up to
four methods, and compare the maps over the photograph. Needs Gradio: pip install 'attrib_zoo[app]'.

  attrib-zoo app --model resnet50
  attrib-zoo app --model resnet50 --explainer ttame.safetensors --port 8000
"""

_FIT = """\
Train an explainer for your model on a folder of images. No labels are needed: what is explained is the model's
own decision. The model itself does not change. Images of all classes that matter should be in the folder.

  attrib-zoo fit --model resnet50 --data images/ --output ttame.safetensors
  attrib-zoo fit --model resnet50 --weights mine.pth --data images/ --max-steps 1000 --output ttame.safetensors
"""

_REPRODUCE = """\
Run a paper's experiments: its images, splits, training, methods and measures; our rows stand beside the printed.
PAPER is ttame or lcam (on ImageNet), or sise (on PASCAL VOC 2007). Takes days for a whole paper; everything
continues where it stopped. docs/how-to/reproduce.md says what it needs.

  attrib-zoo reproduce ttame --backbone resnet50 --data imagenet/ --output results/
  attrib-zoo reproduce sise --backbone vgg16 --data voc/ --output results/ --methods Grad-CAM,SISE
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 interrupted, 2 an error, reported in one sentence."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    with stoppable(), _plain_warnings(debug):
        try:
            check_configs(arguments)
            options = _parser().parse_args(arguments)
            told = _command(options.command)(options[options.command])
            if told:  # of several processes, only the first prints
                print(shown(told))
        except ArgumentError as error:
            return _fail(_usage(error, arguments), debug)
        except AttribZooError as error:
            return _fail(_sentence(error), debug)
        except KeyboardInterrupt as stop:
            signal = getattr(stop, "signal", None)
            said = f"stopped by {signal}" if signal else "interrupted"
            print(shown(f"{said}; {stop}" if stop.args else said), file=sys.stderr)
            if argv is None:  # the process ends here; another Ctrl-C must not cut into that
                stay_deaf()
            return 1
        except Exception as error:
            hint = "this should not happen; --debug shows where"
            return _fail(f"{type(error).__name__}: {error} ({hint})", debug)
    return 0


def _command(name: str) -> Callable[[Any], str]:
    # Imported here: they load torch and the model libraries, a wait that only commands with work to do should pay.
    from attrib_zoo.cli import app, completion, demo, doctor, evaluate, explain, fit, layers, reproduce, shared

    return {
        "demo": demo.demo,
        "list": shared.overview,
        "explain": explain.explain,
        "app": app.app,
        "fit": fit.fit,
        "evaluate": evaluate.evaluate,
        "layers": layers.layers,
        "reproduce": reproduce.reproduce,
        "doctor": doctor.doctor,
        "completion": lambda options: completion.completion(options, _parser()),
    }[name]


# ---------------------------------------------------------------------- options


def _parser() -> ArgumentParser:
    parser = _plain("attrib-zoo", _ABOUT, version=__version__)
    commands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND", title="commands")
    commands.add_subcommand("demo", _demo(), help="train, explain and measure on planted evidence; needs no files")
    commands.add_subcommand("list", _list(), help="the methods, what they are for and what they cost")
    commands.add_subcommand("layers", _layers_of(), help="which layers of a model can be explained")
    commands.add_subcommand("explain", _explain(), help="heat maps over photographs")
    commands.add_subcommand("app", _app(), help="a page to try a model and its methods on")
    commands.add_subcommand("fit", _fit(), help="train an explainer for a model on a folder of images")
    commands.add_subcommand("evaluate", _evaluate(), help="measure methods on a folder of images")
    commands.add_subcommand("reproduce", _reproduce(), help="run the experiments of a paper")
    commands.add_subcommand("doctor", _doctor(), help="versions, devices, caches, and what is missing")
    commands.add_subcommand("completion", _completion(), help="a script that completes commands in your shell")
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in one column of names and one of descriptions, as wide as the terminal and no wider than a page."""

    def __init__(self, prog: str) -> None:
        width = shutil.get_terminal_size((100, 24)).columns
        super().__init__(prog, max_help_position=28, width=min(100, max(60, width)))
        self._action_max_length = 16  # otherwise the names of commands are not counted

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are filled; commands, which are indented, stay on their lines."""
        parts = text.strip().split("\n\n")
        return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in parts) + "\n"


def _plain(prog: str | None, about: str, **more: Any) -> ArgumentParser:
    return ArgumentParser(
        prog=prog,
        description=about,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
        **more,
    )


def _demo() -> ArgumentParser:
    parser = _plain(
        None,
        "Train a tiny classifier on scenes whose evidence is known, fit T-TAME for it, and compare with Grad-CAM.\n"
        "Offline, on the CPU, under three minutes.",
    )
    parser.add_argument("--output", default="attrib-zoo-demo", metavar="FOLDER", help="where the picture goes")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, metavar="N", help="another seed, other scenes")
    _debug(parser)
    return parser


def _list() -> ArgumentParser:
    parser = _plain(None, "List the methods, what they are for and what they cost.")
    _debug(parser)
    return parser


def _doctor() -> ArgumentParser:
    parser = _plain(
        None, "Print versions, devices, caches and extras, and what is missing: the first lines of a report."
    )
    _debug(parser)
    return parser


def _completion() -> ArgumentParser:
    parser = _plain(
        None,
        "Print a script that completes commands, options and names of methods.\n\n"
        '  eval "$(attrib-zoo completion bash)"      in ~/.bashrc',
    )
    parser.add_argument("shell", metavar="SHELL", help="bash or zsh")
    _debug(parser)
    return parser


def _layers_of() -> ArgumentParser:
    parser = _plain(None, "List the layers of a model that can be explained, and which of them is whose default.")
    parser.add_argument("model", metavar="MODEL", help="a model of torchvision or else of timm; no weights are loaded")
    parser.add_argument("--size", metavar="HxW", help="of the images, such as 224 or 160x256 (default: the model's)")
    _debug(parser)
    return parser


def _evaluate() -> ArgumentParser:
    parser = _plain(None, _EVALUATE)
    add = parser.add_argument
    _model(parser)
    add("--data", required=True, metavar="FOLDER", help="images to measure on, searched to the bottom")
    add("--output", required=True, metavar="FOLDER", help="where the results go; a second run continues there")
    add("--method", metavar="NAME[,NAME]", help=_METHODS)
    add("--explainer", metavar="FILE[,FILE]", help="trained explainers, made by attrib-zoo fit for this model")
    add("--metrics", default="ad,ic,road", metavar="NAME[,NAME]", help="measures (default: ad,ic,road)")
    add("--boxes", metavar="FILE", help="CSV of path,xmin,ymin,xmax,ymax: what is explained, for ebpg, miou, bbox ...")
    add("--masking", default="auto", metavar="NAME", help="raw (black), standardized (mean colour), blur, auto")
    _layers(parser)
    _shaping(parser)
    add("--max-images", type=PositiveInt, metavar="N", help="the first N images only")
    add("--batch-size", type=PositiveInt, default=16, metavar="N", help="images at once (default: 16)")
    add("--workers", type=NonNegativeInt, default=0, metavar="N", help="processes that read images (default: 0)")
    add("--seed", type=NonNegativeInt, default=0, metavar="N", help="of ties, noise and controls (default: 0)")
    add("--memory", action="store_true", help="on the CPU too, find the memory that each method holds")
    _config(parser)
    _debug(parser)
    return parser


def _explain() -> ArgumentParser:
    parser = _plain(None, _EXPLAIN)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO", help="image files, or folders that are searched to the bottom")
    _model(parser)
    add("--method", metavar="NAME[,NAME]", help=_METHODS)
    add("--explainer", metavar="FILE[,FILE]", help="trained explainers, made by attrib-zoo fit for this model")
    add(
        "--target",
        metavar="CLASS",
        help="index (7, or #7) or name of a class to explain; several with commas (default: the decided one)",
    )
    add("--top-k", type=PositiveInt, default=1, metavar="K", help="explain the K classes ranked first (default: 1)")
    add("--contrast", type=PositiveInt, metavar="K", help="why this class and not the next K, such as 3")
    _layers(parser)
    _shaping(parser)
    add("--colormap", metavar="NAME", help="colours of the maps, by matplotlib's name (default: plasma)")
    add("--alpha", type=float, default=0.8, metavar="X", help="opacity of strong evidence, 0 to 1 (default: 0.8)")
    add("--output", default="explanations", metavar="FOLDER", help="where the results go (default: explanations)")
    add("--no-pictures", action="store_true", help="draw nothing")
    add("--maps", metavar="NAME", help="also write raw maps, float16 as the layer has them: safetensors or npz")
    add("--table", metavar="NAME", help="also write a table: jsonl or parquet (default: jsonl above 64 photographs)")
    add("--batch-size", type=PositiveInt, default=8, metavar="N", help="photographs at once (default: 8)")
    add("--workers", type=NonNegativeInt, default=0, metavar="N", help="processes that read photographs (default: 0)")
    add("--skip-bad", action="store_true", help="leave out files that are no images, and list them, not stop")
    add("--resume", action="store_true", help="continue what was begun in the output folder, if anything was")
    _config(parser)
    _debug(parser)
    return parser


def _app() -> ArgumentParser:
    parser = _plain(None, _APP)
    add = parser.add_argument
    _model(parser)
    add(
        "--method",
        metavar="NAME[,NAME]",
        help="methods that are chosen at first (default: gradcam, or the explainer's)",
    )
    add("--explainer", metavar="FILE[,FILE]", help="trained explainers, made by attrib-zoo fit for this model")
    _layers(parser)
    _shaping(parser)
    add("--host", default="127.0.0.1", metavar="NAME", help="where to listen (default: 127.0.0.1, this machine only)")
    add("--port", type=PositiveInt, default=7860, metavar="N", help="where to listen (default: 7860)")
    _config(parser)
    _debug(parser)
    return parser


def _fit() -> ArgumentParser:
    parser = _plain(None, _FIT)
    add = parser.add_argument
    _model(parser)
    add("--data", required=True, metavar="FOLDER", help="images to train on, searched to the bottom")
    add("--output", required=True, metavar="FILE", help="the explainer, a .safetensors file")
    add(
        "--method",
        default="ttame",
        metavar="NAME",
        help="a trainable method of attrib-zoo list, or package.module:Class (default: ttame)",
    )
    add(
        "--recipe",
        metavar="NAME",
        help="rows, attended, paper or released; auto, the default: one of the first two with few images per class",
    )
    _layers(parser)
    add(
        "--epochs",
        type=PositiveInt,
        metavar="N",
        help="passes over the images (default: what the recipe needs, which is none where it starts from rows)",
    )
    add(
        "--max-steps",
        type=NonNegativeInt,
        metavar="N",
        help="training steps, instead of --epochs; 0: only T-TAME's start",
    )
    add("--schedule", default="auto", metavar="NAME", help="short, paper or auto (default): short below 20 000 steps")
    add("--lr", type=PositiveFloat, metavar="X", help="largest learning rate (default: the schedule's)")
    add("--precision", metavar="NAME", help="bf16-mixed or fp16-mixed, of the model's passes (default: its own)")
    add("--psi", metavar="NAME", help="ttame: other classes of a step: random, batch, own, auto (default: by recipe)")
    add("--batch-size", type=PositiveInt, default=32, metavar="N", help="images per step (default: 32)")
    add("--val", metavar="FOLDER", help="images to measure the explainer on after each epoch")
    add("--seed", type=NonNegativeInt, default=0, metavar="N", help="same seed, same explainer (default: 0)")
    add("--workers", type=NonNegativeInt, default=2, metavar="N", help="processes that read images (default: 2)")
    add("--skip-bad", action="store_true", help="leave out files that are no images instead of stopping")
    add("--checkpoint-dir", metavar="FOLDER", help="save the state there now and then, and when interrupted")
    add("--checkpoint-every", type=PositiveInt, default=500, metavar="N", help="steps between two saves (default: 500)")
    add(
        "--resume",
        metavar="FILE",
        help="continue an interrupted fit from its checkpoint (the file or folder, or an empty folder: from the start)",
    )
    _config(parser)
    _debug(parser)
    return parser


def _reproduce() -> ArgumentParser:
    parser = _plain(None, _REPRODUCE)
    add = parser.add_argument
    add("paper", metavar="PAPER", help="ttame, lcam or sise")
    add("--backbone", required=True, metavar="NAME", help="vgg16, resnet50 or (ttame only) vit_b_16")
    add("--data", required=True, metavar="FOLDER", help="of ImageNet (val/ and train/), or that holds VOCdevkit/")
    add("--output", required=True, metavar="FOLDER", help="where the results go; a second run continues there")
    add("--weights", metavar="FILE", help="of the backbone (default: torchvision's first ImageNet weights)")
    add("--methods", metavar="NAME[,NAME]", help="some rows of the paper only, such as Grad-CAM,T-TAME")
    add("--ablations", action="store_true", help="ttame: also the variants of Table 6")
    add("--test-images", type=PositiveInt, metavar="N", help="images to measure (default: 2000; sise: all)")
    add("--val-images", type=NonNegativeInt, default=2000, metavar="N", help="to watch training on (default: 2000)")
    add("--test-list", metavar="FILE", help="names of the images to measure, instead of random ones")
    add("--val-list", metavar="FILE", help="names of the validation images, instead of random ones")
    add("--labels", metavar="FILE", help="lines 'NAME LABEL' for images that lie in one folder")
    add("--recipe", default="paper", metavar="NAME", help="paper (default) or released, of the trained explainers")
    add("--epochs", type=PositiveInt, metavar="N", help="passes over the training images (default: the paper's)")
    add("--max-steps", type=PositiveInt, metavar="N", help="training steps, instead of --epochs")
    add("--fit-batch-size", type=PositiveInt, metavar="N", help="images per training step (default: the paper's)")
    add("--head-steps", type=PositiveInt, default=500, metavar="N", help="sise without --weights: of the last layer")
    add("--batch-size", type=PositiveInt, default=16, metavar="N", help="images measured at once (default: 16)")
    add("--workers", type=NonNegativeInt, default=2, metavar="N", help="processes that read images (default: 2)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: auto, cuda if there is one)")
    add("--seed", type=NonNegativeInt, default=0, metavar="N", help="of splits, training and draws (default: 0)")
    _config(parser)
    _debug(parser)
    return parser


def _model(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add("--model", required=True, metavar="NAME", help="a model of torchvision or else of timm, such as resnet50")
    add("--weights", metavar="FILE", help="its weights: safetensors or a state dict (default: its pretrained ones)")
    add("--classes", metavar="FILE", help="class names: JSON list, JSON index to name, or a line each")
    add("--score", default="softmax", metavar="NAME", help="softmax (default), or sigmoid: a multi-label model")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: auto, cuda if there is one)")


def _layers(parser: ArgumentParser) -> None:
    text = "layers to read, by name or counted from the end: layer3,layer4 or --layers=-2,-1 (default: the method's)"
    parser.add_argument("--layers", metavar="NAME[,NAME]", help=text)


def _shaping(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--smooth", type=PositiveInt, metavar="N", help="mean over N x N cells of each map, N odd (default: none)")
    add("--scale", metavar="NAME", help="min-max or rank, of each map's values (default: the method's own)")


def _config(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", metavar="FILE", help="a YAML file with any of these options")


def _debug(parser: ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


# ---------------------------------------------------------------------- errors and warnings


def _fail(sentence: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(shown(f"error: {sentence}"), file=sys.stderr)
    return 2


_LACKING = re.compile('Validation failed: Key "(.*)" is required')
"""Older versions of jsonargparse say it like this, and name any one of several."""


def _usage(error: ArgumentError, arguments: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    if text.startswith('Parser key "'):
        key, _, rest = text.removeprefix('Parser key "').partition('": ')
        text = f"--{key.rpartition('.')[2].replace('_', '-')}: {rest}"
    if lacking := _LACKING.match(text):
        text = f"the following arguments are required: {lacking[1]}"
    command = next((word for word in arguments if not word.startswith("-")), "")
    known = command if command in _NAMES else ""
    return f"{text}; see attrib-zoo {known}{' ' * bool(known)}--help"


def _sentence(error: AttribZooError) -> str:
    """The message; an error of a loader process comes with that process's traceback around it."""
    text = str(error).strip()
    if text.startswith("Caught "):
        text = text.splitlines()[-1].partition(": ")[2]
    return text


@contextmanager
def _plain_warnings(debug: bool) -> Iterator[None]:
    """Warnings for users as one line each; those for developers only with ``--debug``."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(shown(f"warning: {message}"), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default" if debug else "ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield
