"""8-bit weights for inference, through torchao (the extra `int8`).

1. Every matrix becomes int8 with one float32 scale for each row: the weights of linear layers, of attentions' projections, and of token
   embeddings, whose matrix may be that of the output too. scale = largest magnitude of the row / 127.5, without an offset.
2. The rest stays as it is: biases, norms, positions, relative biases, convolutions, recurrent cells of torch, the mix of memories.
3. A product turns the int8 matrix into the dtype of x each time; or, dynamic, rounds every row of x to int8 too, and multiplies integers.

The matrices are parameters of a tensor subclass under their own names, so that the layers' code is that of float weights.
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attention import MultiHeadAttention
from .embedding import TokenEmbedding
from .optional import optional_module

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

Model = TypeVar("Model", bound=nn.Module)


def quantize_int8(model: Model, dynamic: bool = False) -> Model:
    """A copy of model in eval mode with int8 matrices, for inference: it is called, searched and moved like model.

    dynamic: the inputs of products are rounded too, each row with a scale of its own. Embeddings are looked up alike in both.
    Raises MissingModuleError without torchao, and ValueError if the matrices are int8 already, or if the model has attention of torch's
    own class, which reads its weights past torchao: replace_attention(model) first.
    """
    check_float(model, "quantize_int8")
    if any(isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiHeadAttention) for module in model.modules()):
        raise ValueError("model has torch.nn.MultiheadAttention, which cannot read int8 weights: use replace_attention(model) first")
    quantization = torchao_quantization()
    result = copy.deepcopy(model).eval()
    for name, weight in _matrices(result).items():
        rounded = quantization.Int8Tensor.from_hp(weight.detach(), quantization.PerRow())
        _set_matrix(result, name, rounded.qdata, rounded.scale, dynamic)
    return result


def is_int8(model: nn.Module) -> bool:
    """Whether it has int8 matrices."""
    return any(_is_int8(parameter) for parameter in model.parameters())


def check_float(model: nn.Module, what: str) -> None:
    """Raises ValueError, which names what cannot be done, if the model's matrices are int8."""
    if is_int8(model):
        raise ValueError(f"{what} needs a model with float weights: those of this one are int8")


def int8_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state_dict with its matrices as plain int8 tensors, and their scales (rows, 1) under the same names."""
    state: dict[str, Any] = model.state_dict()
    scales = {name: tensor.scale for name, tensor in state.items() if _is_int8(tensor)}
    return {name: tensor.qdata if name in scales else tensor for name, tensor in state.items()}, scales


def load_int8(model: nn.Module, state: dict[str, Tensor], scales: dict[str, Tensor], dynamic: bool) -> None:
    """Puts what int8_tensors returned in place of the matrices of model, which has float ones of the same shapes.

    Raises ValueError, naming the tensor, if one of the matrices is missing, or of another kind. MissingModuleError without torchao.
    """
    matrices = _matrices(model)
    if different := sorted(matrices.keys() ^ scales.keys()):
        raise ValueError(f"the int8 matrices are not those of the model: {', '.join(different[:3])}")
    for name, weight in matrices.items():
        values, scale = state[name], scales[name]
        if values.dtype is not torch.int8 or scale.dtype is not torch.float32 or scale.shape != (len(weight), 1):
            raise ValueError(f"{name} must be int8 with scales ({len(weight)}, 1) float32, got {values.dtype}, {tuple(scale.shape)}")
        _set_matrix(model, name, values.to(weight.device), scale.to(weight.device), dynamic)


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are quantized, (rows, in_features) each, by name."""
    owners = dict(model.named_modules())

    def is_matrix(name: str) -> bool:
        owner, _, own_name = name.rpartition(".")
        return own_name in PROJECTIONS or (own_name == "weight" and isinstance(owners[owner], (nn.Linear, TokenEmbedding)))

    return {name: parameter for name, parameter in model.named_parameters() if is_matrix(name)}


def _set_matrix(model: nn.Module, name: str, values: Tensor, scale: Tensor, dynamic: bool) -> None:
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = getattr(module, own_name)
    rounding = _rounding_of_inputs(weight.device) if dynamic else None
    quantized = _matrix_type()(values, scale, [1, values.shape[1]], weight.dtype, act_quant_kwargs=rounding)
    module.register_parameter(own_name, nn.Parameter(quantized, requires_grad=False))


def _rounding_of_inputs(device: torch.device) -> Any:
    """Symmetric, a scale for each row. Without VNNI, the sums of a CPU's products of 8 bits hold 16, so inputs have 7 there."""
    workflows = optional_module("torchao.quantization.quantize_.workflows", "int8")
    reduce_range = optional_module("torchao.utils", "int8").should_reduce_range(device)
    return workflows.QuantizeTensorToInt8Kwargs(torchao_quantization().PerRow(), reduce_range=reduce_range)


def _is_int8(tensor: Tensor) -> bool:
    return isinstance(getattr(tensor, "qdata", None), Tensor)


@cache
def torchao_quantization() -> Any:
    """The module torchao.quantization. Raises MissingModuleError."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao warns of its CUDA kernels wherever they cannot be loaded
    try:
        return optional_module("torchao.quantization", "int8")
    finally:
        logging.disable(before)


@cache
def _matrix_type() -> Any:
    class Int8Matrix(torchao_quantization().Int8Tensor):  # type: ignore[misc]
        """torchao's tensor with what our layers do besides: split into ranges of rows, and look up rows without turning all to float."""

        def part(self, values: Tensor, scale: Tensor) -> Int8Matrix:
            return Int8Matrix(values, scale, self.block_size, self.dtype, act_quant_kwargs=self.act_quant_kwargs)

    aten = torch.ops.aten

    @Int8Matrix.implements(aten.slice.Tensor)
    def slice_rows(func: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        matrix, options = args[0], args[1:]
        dim, start, end, step = options + (0, None, None, 1)[len(options) :]
        if dim != 0 or step != 1:
            raise NotImplementedError(f"an int8 matrix is only sliced into ranges of rows, not along dim {dim} with step {step}")
        return matrix.part(matrix.qdata[start:end], matrix.scale[start:end])

    @Int8Matrix.implements([aten.split.Tensor, aten.split_with_sizes.default])
    def split(func: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
        matrix, sizes = args[:2]
        parts = zip(matrix.qdata.split(sizes), matrix.scale.split(sizes), strict=True)
        return [matrix.part(values, scale) for values, scale in parts]

    @Int8Matrix.implements(aten.embedding.default)
    def embedding(func: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        matrix, tokens = args[:2]
        return (aten.embedding(matrix.qdata, tokens) * aten.embedding(matrix.scale, tokens)).to(matrix.dtype)

    return Int8Matrix
