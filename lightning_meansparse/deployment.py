"""export: a sparsified classifier as one file that runs without this package."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_meansparse.adapter.models import describe
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.surgery import set_alpha

Format = Literal["onnx", "torch"]
METADATA = "meansparse.json"
"""The extra file of a torch.export program that says what it is."""

_ENDINGS = {".onnx": "onnx", ".pt2": "torch"}
_TOLERANCE = 1e-5
_IMAGES = 8  # that the file and the model are shown


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    alpha: float | Mapping[str, float] | None = None,
    input_size: Sequence[int] | None = None,
) -> Path:
    """Write a sparsified classifier as an ONNX model or a ``torch.export`` program.

    The file takes ``pixels``, float32 ``(N, C, H, W)`` in [0, 1] for any N, and gives ``logits``,
    float32 ``(N, classes)``; normalisation and operators are inside, at a fixed α. It is made of a
    copy: the model itself stays as it is. Before it is moved into place, it is loaded again and
    must give the model's logits within 1e-5 of the largest one, for a batch of one and of several.

    An activation on the edge of its band, to the last bits, falls on the other side where another
    runtime rounds otherwise, and moves by the width of the band. In large networks most images have
    such activations. The file must then be as near to the model as the model is to itself in
    float64; in programs of ``torch.export``, which compute alike, there are none.

    Labels, α and everything else that an adapter says are in the file as well: as JSON in ONNX's
    metadata under ``"labels"``, ``"alpha"`` and ``"meansparse"``; in a program as the extra file
    ``meansparse.json``.

    Args:
        model: A `Classifier` with calibrated operators, or a module with one inside.
        path: The file. Its folder is made if there is none.
        format: ``"onnx"`` or ``"torch"``; None goes by the ending, ``.onnx`` or ``.pt2``.
        alpha: As for `set_alpha`; None takes what the model has.
        input_size: ``(C, H, W)``; None takes the classifier's.

    Returns:
        The file.

    Raises:
        TypeError: If ``model`` holds no Classifier, or several.
        ValueError: If the operators are missing or not calibrated, the format or the size is not
            known, or α is out of range.
        ImportError: If onnx, onnxscript or onnxruntime is not installed, for ``"onnx"``.
        RuntimeError: If the model cannot be traced, or the file does not give its logits.

    Examples:
        >>> from lightning_meansparse import calibrate_, export, find_sites
        >>> from lightning_meansparse import load_classifier, sparsify_
        >>> size = (3, 32, 32)
        >>> classifier = load_classifier("timm/test_resnet", pretrained=False, input_size=size)
        >>> sparsify_(classifier, find_sites(classifier, torch.rand(2, 3, 32, 32)), alpha=0.2)
        >>> calibrate_(classifier, [torch.rand(8, 3, 32, 32)])
        >>> file = export(classifier, "model.pt2")
        >>> torch.export.load(file).module()(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 1000])
    """
    file = Path(path)
    kind = _kind(file, format)
    original = _classifier(model)
    wanted = original.input_size if input_size is None else input_size
    size = tuple(wanted) if isinstance(wanted, Sequence) else ()
    if len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(
            f"input_size must be (channels, height, width), got {input_size!r:.80}, and the "
            f"classifier's is {original.input_size}. Give the size of the images."
        )
    classifier = copy.deepcopy(original).cpu().eval().requires_grad_(False)
    if alpha is not None:
        set_alpha(classifier, alpha)
    facts = {
        **describe(classifier).config(),
        "labels": classifier.labels,
        "input_size": list(size),
        "pixels": "float32 (N, C, H, W) in [0, 1]",
    }
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(_IMAGES, *size, generator=generator)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracers deprecate each other's ways
        program = torch.export.export(
            classifier, (pixels,), dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}}
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".meansparse-") as temporary:
            new = Path(temporary) / file.name
            run = (_write_onnx if kind == "onnx" else _write_torch)(program, new, facts)
            found = torch.cat([run(pixels[:1]), run(pixels[1:])])
            _compare(found, classifier, pixels, kind)
            # Weights beyond 2 GB lie in a file of their own, which has to be there first.
            for part in sorted(new.parent.iterdir(), key=lambda part: part == new):
                os.replace(part, file.parent / part.name)
    return file


def _write_torch(program: Any, file: Path, facts: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    torch.export.save(program, file, extra_files={METADATA: json.dumps(facts, indent=2)})
    module: Any = torch.export.load(file).module()
    return lambda pixels: module(pixels)


def _write_onnx(program: Any, file: Path, facts: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    from onnxruntime import InferenceSession

    with redirect_stdout(StringIO()):  # it tells how far it has come
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    alphas = {site["site"]: site["alpha"] for site in facts["sites"]}
    for key, value in {"meansparse": facts, "alpha": alphas, "labels": facts["labels"]}.items():
        made.model.metadata_props[key] = json.dumps(value)
    made.save(file)
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def _compare(found: Tensor, classifier: Classifier, pixels: Tensor, kind: str) -> None:
    """Refuse logits that are not the model's, as far as rounding leaves those certain."""
    wanted = classifier(pixels)
    exact = copy.deepcopy(classifier).double()(pixels.double())
    tolerance = _TOLERANCE * max(1.0, float(wanted.abs().max()))
    # Whether an image has an activation on an edge is chance. Thrice what that did to any image is
    # allowed, and some may differ by more: a file that is wrong is wrong about all of them.
    tolerance = max(tolerance, 3 * float((exact - wanted).abs().max()))
    error = float((found - wanted).abs().amax(1).sort().values[_IMAGES // 4])
    if not error <= tolerance:
        raise RuntimeError(
            f"the {kind} file gives other logits than the model (by {error:.2g}) and was not kept."
        )


def _kind(file: Path, format: Format | None) -> str:
    if format is not None and format not in get_args(Format):
        raise ValueError(f"format must be one of {get_args(Format)}, got {format!r}.")
    kind = format or _ENDINGS.get(file.suffix)
    if kind is None:
        raise ValueError(
            f"path: {file.name!r} ends neither in .onnx nor in .pt2. Give format= as well."
        )
    if file.is_dir():
        raise IsADirectoryError(f"path: {file} is a folder. Name a file to write.")
    for package in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        if find_spec(package) is None:
            raise ImportError(
                f'{package} is not installed: pip install "lightning_meansparse[export]"'
            )
    return kind


def _classifier(model: nn.Module) -> Classifier:
    found = [module for module in model.modules() if isinstance(module, Classifier)]
    if len(found) != 1:
        raise TypeError(
            f"model must be a Classifier or hold one, and {type(model).__name__} has {len(found)}. "
            "Make one, which knows the normalisation: load_classifier(model, mean=..., std=...)."
        )
    return found[0]
