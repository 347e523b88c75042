"""Weight and bias gradient of a linear layer from one product, on a CPU in one dtype: the way of nearly every layer.

The forward pass keeps X' = [1, hot columns of x], so that P = dY^T X' holds the bias gradient in its first column and
dV[o, k] = P[o, 1 + hot_index[o, k]]: dY, the largest tensor of the layer, is read once for both. X' is as wide as the
library computes fast (a multiple of `cost.LANES`); columns that fill it up repeat a hot one and are never read.

In bfloat16, as under autocast, the library adds in float32 and rounds P once, as it rounds the whole weight gradient of
full fine-tuning; a product in float32 of what was cast up would take two and a half times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewtune.tuning.ops.places import SelectedPlaces
from fewtune.tuning.ops.torch_linear import BLOCK, accumulator, columns, gathered_sum


def fusible(x: Tensor, weight: Tensor, values: Tensor, bias: Tensor | None, places: SelectedPlaces) -> bool:
    """Whether the operands are of one dtype, bfloat16 or float32 or more, on a CPU, and the copy is worth its bytes.

    Of bfloat16 operands the values are a float32 master, and so may the bias be.
    """
    dtypes = {x.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
    wide = values.dtype is x.dtype and x.dtype in (torch.float32, torch.float64)
    one = len(dtypes) == 1 and (wide or (x.dtype is torch.bfloat16 and values.dtype is torch.float32))
    return one and x.device.type == "cpu" and places.columns_kept is not None and not torch.compiler.is_compiling()


def fused_keep(x: Tensor, places: SelectedPlaces) -> Tensor:
    """X' [N, W]: a column of ones and the hot columns of x [..., fan_in]."""
    assert places.columns_kept is not None
    kept = columns(x.reshape(-1, x.shape[-1]), places.columns_kept)
    kept[:, 0] = 1
    return kept


def fused_gradients(dy: Tensor, kept: Tensor, places: SelectedPlaces) -> tuple[Tensor, Tensor]:
    """The gradients of a layer's selected connections, shaped as `places.hot_index`, and of its bias, [neurons].

    In the operands' dtype, and in float32 where that is half precision.

    Args:
        dy: dL/dy, [N, neurons].
        kept: what `fused_keep` returned.
        places: the selected connections.
    """
    first = kept[:, : places.product_width]
    step = max(128, BLOCK // places.product_width)
    blocks = [_product(dy, first, places, start, start + step) for start in range(0, places.neurons, step)]
    wide = accumulator(dy, kept)
    dv, db = ((torch.cat(parts) if len(parts) > 1 else parts[0]).to(wide) for parts in zip(*blocks, strict=True))
    if places.rare.numel():
        others = gathered_sum(dy, kept, places.rare_column, dv.dtype, places.rare_rows)
        dv.view(-1).index_copy_(0, places.rare, others)
    return dv, db


def _product(dy: Tensor, x: Tensor, places: SelectedPlaces, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The same of neurons start to stop, the rare connections' entries arbitrary."""
    stop = min(stop, places.neurons)
    product = x.t() @ dy[:, start:stop]
    db = product[0].clone()  # a view would keep the whole product as long as the gradient
    if places.rows is None:
        return product.gather(0, places.product_column[start:stop].t()).t().contiguous(), db
    inside = slice(*torch.searchsorted(places.rows, torch.tensor([start, stop])).tolist())
    return product[places.product_column[inside], places.rows[inside] - start], db
