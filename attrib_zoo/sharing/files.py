"""A program written to a file: ``.onnx`` by way of ``torch.export``, or ``.pt2``, whole or not at all."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attrib_zoo.errors import DataError, OptionError, UnsupportedModelError, reason
from attrib_zoo.sharing.program import ExplainingModel
from attrib_zoo.training.files import write_whole

OLDEST_OPSET = 18
OUTPUTS = ("logits", "map", "class")
_MOST_BYTES = 2**31 - 2**20  # the limit of a protocol buffer, with room for more than weights
_STEP = 32  # pixels that a free axis is lengthened by for the comparison
_TOLERANCE = {".onnx": 1e-3, ".pt2": 1e-5}
_VALUES_DECIDE = (
    "data-dependent",
    "data dependent",
    "DataDependent",
    "Tensor-likes are not supported",
    "Tensor.item()",
)


def check_path(path: str | os.PathLike[str], opset: int | None) -> Path:
    """The file to write, its kind and its folder checked before anything else is done.

    Raises:
        OptionError: the ending is another one, or does not take an opset.
        DataError: the folder does not exist or is not writable.
    """
    target = Path(path)
    if target.suffix not in _TOLERANCE:
        raise OptionError(f"path: must end in .onnx or .pt2, which says what is written, got {str(path)!r}")
    if opset is not None:
        _check_opset(opset, target)
    folder = target.parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(_unwritable(target, "it is a folder" if target.is_dir() else "no folder to write to"))
    return target


def _check_opset(opset: int, target: Path) -> None:
    if target.suffix != ".onnx":
        raise OptionError(f"opset: belongs to .onnx files, got {opset!r} for {target.name!r}; leave it out")
    newest = _library("onnx").defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest:
        raise OptionError(
            f"opset: must be an integer from {OLDEST_OPSET}, the oldest that torch writes, to {newest}, the newest "
            f"that the installed onnx knows, got {opset!r}; leave it out for the exporter's own"
        )


def write_program(
    program: ExplainingModel,
    images: Tensor,
    path: Path,
    *,
    with_target: bool,
    any_batch: bool,
    any_size: bool | None,
    opset: int | None,
    facts: dict[str, Any],
) -> dict[str, bool]:
    """Trace the program, write it, and compare the file's results with those of the program itself.

    Args:
        program: the result of :meth:`as_module`.
        images: two or more example images, as the program takes them.
        path: checked by :func:`check_path`.
        with_target: whether the file takes the class as a second input.
        any_batch: whether the number of images is free.
        any_size: whether their height and width are; ``None``: where the model allows it.
        opset: of ONNX; ``None`` for the exporter's own.
        facts: JSON-ready, to be kept in the file.

    Returns:
        Which of the axes ``"batch"``, ``"height"`` and ``"width"`` are free.

    Raises:
        UnsupportedModelError: the model cannot be traced or translated, or the file's results differ.
        DataError: the file cannot be written.
    """
    program.by_counting = path.suffix == ".onnx"
    with torch.no_grad(), _quiet():
        inputs = (images, program(images)[2]) if with_target else (images,)
        if any_size is not False and _at_another_size(program, inputs, (2, 3)) is None:
            if any_size:
                name = type(program.model).__name__
                raise UnsupportedModelError(f"any_size: must be left out for {name}, which takes images of one size")
            any_size = False
        try:
            data, free = _made(program, inputs, path.suffix, any_batch, any_size, opset, facts)
        except UnsupportedModelError:
            if any_size is not None:
                raise
            data, free = _made(program, inputs, path.suffix, any_batch, False, opset, facts)
    try:
        write_whole(path, data)
    except OSError as error:
        raise DataError(_unwritable(path, error.strerror)) from error
    return free


def _made(
    program: ExplainingModel,
    inputs: Sequence[Tensor],
    kind: str,
    any_batch: bool,
    any_size: bool | None,
    opset: int | None,
    facts: dict[str, Any],
) -> tuple[bytes, dict[str, bool]]:
    """What the file will hold, compared with the program, and the free axes."""
    traced = _trace(program, inputs, any_batch, any_size)
    free = _free_axes(traced)
    facts = {**facts, "free_axes": [axis for axis, is_free in free.items() if is_free]}
    if kind == ".onnx":
        data, run = _onnx(program, traced, inputs, opset, facts)
    else:
        data, run = _pt2(program, traced, facts)
    if run is not None:
        for others, wanted in _others(program, inputs, any_batch, free):
            _compare(program, wanted, run, others, _TOLERANCE[kind])
    return data, free


def _unwritable(path: Path, why: str | None) -> str:
    return (
        f"path: must be a file in a folder that exists and can be written, got {path} ({why}); make the folder, make "
        "room, or choose another"
    )


# ---------------------------------------------------------------------- tracing


def _trace(
    program: ExplainingModel, inputs: Sequence[Tensor], any_batch: bool, any_size: bool | None
) -> torch.export.ExportedProgram:
    dim: Any = torch.export.Dim
    batch = dim.DYNAMIC if any_batch else dim.STATIC
    side = dim.STATIC if any_size is False else dim.DYNAMIC if any_size else dim.AUTO
    axes = ({0: batch, 2: side, 3: side}, {0: batch})[: len(inputs)]
    try:
        return torch.export.export(program, tuple(inputs), dynamic_shapes=axes, strict=False)
    except Exception as error:  # including whatever the model's own code raises
        raise UnsupportedModelError(_untraceable(type(program.model).__name__, error, any_size)) from error


def _untraceable(name: str, error: Exception, any_size: bool | None) -> str:
    text = f"{type(error).__name__} {error}"
    if any(words in text for words in _VALUES_DECIDE):
        place = re.findall(r'File "([^"]+)", line (\d+)|\(([^()\s]+\.py:\d+) in', text)
        where = next((f", {name}:{line}" if name else f", {both}" for name, line, both in place[::-1]), "")
        return (
            f"model: must do the same for all images to become a program, but {name} decides by the values of a tensor "
            f"(an `if` on a tensor, .item(), .tolist() or the like{where}); write it with torch.where, or explain it "
            "with attribute"
        )
    if "onstraint" in text and any_size:
        return (
            f"any_size: must be left out for {name}, which takes images of one size, or of sizes that divide by "
            f"something ({reason(error)}); leave it out, and the file has the axes free that can be"
        )
    if "onstraint" in text:
        return (
            f"any_batch: must be False for {name}, whose forward pass writes the number of images down, as len(images) "
            "does where images.shape[0] does not"
        )
    return (
        f"model: must be traceable by torch.export to become a program, but {name} is not ({reason(error)}); "
        "torch.export.draft_export says more, and attribute needs no program"
    )


def _free_axes(traced: torch.export.ExportedProgram) -> dict[str, bool]:
    name = traced.graph_signature.user_inputs[0]
    node = next(node for node in traced.graph.nodes if node.name == name)
    shape = node.meta["val"].shape
    return {axis: not isinstance(shape[place], int) for axis, place in (("batch", 0), ("height", 2), ("width", 3))}


# ---------------------------------------------------------------------- kinds of file

_Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _pt2(program: ExplainingModel, traced: torch.export.ExportedProgram, facts: dict[str, Any]) -> tuple[bytes, _Run]:
    """The bytes of the file, and how to run it."""
    buffer = io.BytesIO()
    try:
        torch.export.save(traced, buffer, extra_files={"attrib_zoo.json": json.dumps(facts)})
        module = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    except Exception as error:  # of several classes, most of them private
        name = re.search(r"target='torch\.ops\.([\w.]+)'", str(error))
        raise UnsupportedModelError(
            f"model: must be one whose program torch {torch.__version__} can write to a .pt2 file and read again, but "
            f"it cannot do so with {type(program.model).__name__} ({name[1] if name else reason(error)}); take a newer "
            "torch, or export to .onnx"
        ) from error
    return buffer.getvalue(), lambda inputs: module(*inputs)


def _onnx(
    program: ExplainingModel,
    traced: torch.export.ExportedProgram,
    inputs: Sequence[Tensor],
    opset: int | None,
    facts: dict[str, Any],
) -> tuple[bytes, _Run | None]:
    """The bytes of the file, and how to run it where onnxruntime is installed."""
    for library in ("onnx", "onnxscript"):
        _library(library)
    size = sum(tensor.numel() * tensor.element_size() for tensor in traced.state_dict.values())
    if size > _MOST_BYTES:
        raise UnsupportedModelError(
            f"model: must have less than 2 GB of weights to fit into an .onnx file, got {size / 2**30:.1f} GB; export "
            "to .pt2, or a model in half precision"
        )
    names = ("images", "target")[: len(inputs)]
    try:
        found = torch.onnx.export(
            traced, input_names=names, output_names=OUTPUTS, opset_version=opset, dynamo=True, verbose=False
        )
        proto = found.model_proto  # type: ignore[union-attr]  # None for TorchScript only
    except Exception as error:  # of several classes, most of them private
        raise UnsupportedModelError(
            f"model: must have operators that ONNX has, but {type(program.model).__name__} has others "
            f"({_unsaid(error)}); export to .pt2, or give a newer opset"
        ) from error
    _name_axes(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = "attrib_zoo", json.dumps(facts)
    data: bytes = proto.SerializeToString()
    return data, _runtime(data)


def _unsaid(error: BaseException) -> str:
    """Which operator it was, where the exporter's report says so."""
    chain = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        chain.append(str(error))
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", "\n".join(chain))
    return found[1] if found else reason(error)


def _name_axes(proto: Any) -> None:
    """Replace the tracer's symbols by ``batch``, ``height`` and ``width``."""
    symbols: dict[str, str] = {}
    for place, axis in ((0, "batch"), (2, "height"), (3, "width")):
        symbol = proto.graph.input[0].type.tensor_type.shape.dim[place].dim_param
        if symbol:
            symbols.setdefault(symbol, axis)
    if not symbols:
        return
    words = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = words.sub(lambda found: symbols[found[0]], size.dim_param)


def _runtime(data: bytes) -> _Run | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and where another way is tried nobody need see them
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        found = session.run(None, {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)})
        return [torch.from_numpy(array) for array in found]

    return run


def _others(
    program: ExplainingModel, inputs: Sequence[Tensor], any_batch: bool, free: dict[str, bool]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Inputs that the program was not traced with, along each free axis, and its results for them."""
    if any_batch:
        inputs = [torch.cat([x.flip(0), x[:1]]) for x in inputs]
    yield inputs, program(*inputs)
    axes = [axis for axis, name in ((2, "height"), (3, "width")) if free[name]]
    found = _at_another_size(program, inputs, axes) if axes else None
    if found is not None:
        yield found


def _at_another_size(
    program: ExplainingModel, inputs: Sequence[Tensor], axes: Sequence[int]
) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
    """Inputs with these axes longer, and the program's results; ``None`` where the model refuses."""
    images = inputs[0]
    for axis in axes:
        images = torch.cat([images, images.narrow(axis, 0, min(_STEP, images.shape[axis]))], axis)
    inputs = [images, *inputs[1:]]
    try:
        return inputs, program(*inputs)
    except Exception:  # whatever the model's own code raises
        return None


def _compare(
    program: ExplainingModel, wanted: Sequence[Tensor], run: _Run, inputs: Sequence[Tensor], tolerance: float
) -> None:
    """Check that the file and the program give the same results."""
    try:
        found = run(inputs)
    except Exception as error:  # from the runtime
        raise UnsupportedModelError(
            f"model: must run from the file as it runs in torch, but {type(program.model).__name__} does not "
            f"({reason(error)}); export to the other kind of file, or with any_size=False"
        ) from error
    tolerance *= max(1.0, torch.finfo(wanted[1].dtype).eps / 1e-6)
    for name, one, other in zip(OUTPUTS[:2], wanted, found, strict=False):
        same = one.shape == other.shape
        off = (one.cpu().double() - other.cpu().double()).abs() if same else one.double() * torch.nan
        size = max(1.0, float(one.double().abs().max()))
        # a rounding error may swap two neighbouring ranks
        worst = float(off.mean() if name == "map" and program.scale == "rank" else off.max()) / size
        if not worst <= tolerance:
            raise UnsupportedModelError(
                f"model: must say in the file what it says in torch, but {name} differs by {worst:.2g} (relative to "
                f"{size:.3g}); something in {type(program.model).__name__} was not traced (random numbers, what a pass "
                "leaves behind): take it out"
            )


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            f"path: must end in .pt2 where {name} is not installed; for .onnx files pip install 'attrib_zoo[export]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporters print along the way, which the user can do nothing about."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
