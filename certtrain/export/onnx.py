"""A trained network for other tools, as ONNX."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from certtrain.bounds.recording import probes
from certtrain.errors import UnsupportedOperation, optional_module, shortened
from certtrain.importing.onnx import evaluator
from certtrain.models.normalize import Normalize
from certtrain.modules import device_of
from certtrain.runtime.files import write_atomically
from certtrain.verification.deployed import Comparison
from certtrain.verification.folding import fold_batch_norm

OPSET = 13  # has all operations of our networks, and is old enough for most verifiers


def export_onnx(model: nn.Module, image_shape: Sequence[int], file: Path) -> None:
    """Write `model` as ONNX: BatchNorm folded, input normalisation inside, any batch size.

    Args:
        model: maps images (B, C, H, W) in [0, 1], the ONNX input `image`, to (B, K), the output `logits`.
        image_shape: (C, H, W).

    Raises:
        MissingDependency: the library onnx is not installed.
        UnsupportedOperation: the network cannot be traced, has an operation that ONNX lacks, or came out as another.
    """
    onnx = optional_module("onnx", "export")
    example = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0), device="cpu")
    folded = fold_batch_norm(model, example.to(device_of(model))).cpu()
    _write_out_the_batch_axis(folded, model)
    content = io.BytesIO()
    try:
        with warnings.catch_warnings():
            # Said to be superseded; but its graphs are plain (Flatten, not Reshape), which verifiers understand best.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                folded,
                (example,),
                content,  # type: ignore[arg-type]  # without dynamo a buffer will do
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = shortened(str(error).partition("\n")[0].partition(" Please feel free")[0], 160)
        raise UnsupportedOperation(f"the network cannot be written as ONNX: {reason}") from error
    written = onnx.load_model_from_string(content.getvalue())
    onnx.checker.check_model(written, full_check=True)
    images = torch.cat([probes(example[:1]), example])  # of another batch size than the exporter has seen
    if not Comparison(folded).agrees(images, evaluator(written, "image")(images)):
        raise UnsupportedOperation("the network cannot be written as ONNX: PyTorch's exporter makes another of it")
    write_atomically(file, lambda target: target.write(content.getvalue()))


def _write_out_the_batch_axis(folded: nn.Module, model: nn.Module) -> None:
    """Constants of the input normalisation as (1, C, 1, 1): alpha-beta-CROWN refuses (C, 1, 1) in its fast mode."""
    for path, module in model.named_modules():
        if isinstance(module, Normalize):
            owner = folded.get_submodule(path)
            for name in ("mean", "std"):
                setattr(owner, name, getattr(owner, name)[None])
