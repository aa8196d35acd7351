"""Arrangement of texts as rows of one packed sequence, sorted by length for the attention kernels.

Legend: U texts, P rows of the prefix, R rows of the texts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.modules.attention.text import TextLayout


@dataclass(frozen=True)
class TextPacking:
    """Arrangement of the rows of packed texts (of items or creatives): the prefix, then the texts in layout order.

    order: [U] int64, text indices in layout order; item_of_row, place_of_row: [R] int64, the text of each row and the
    row's position within the text; last_rows: [U] int64, index of each text's last row, counting the P prefix rows.
    """

    layout: TextLayout
    order: Tensor
    item_of_row: Tensor
    place_of_row: Tensor
    last_rows: Tensor

    @staticmethod
    def of(rows: Tensor, has_prefix: Tensor, prefix: int, causal: bool) -> "TextPacking":
        """Arrange texts of `rows` [U] rows each, not counting the prefix.

        has_prefix: [U] bool; prefix: P; causal: see `TextLayout`.
        """
        # Texts without the prefix come first, then those with it (their key is <= -1); in both groups longer texts
        # come first.
        order = torch.argsort(rows - has_prefix * (rows.max() + 1), descending=True, stable=True)
        sizes = rows[order].tolist()
        layout = TextLayout(sizes, prefix, int((~has_prefix).sum()) if prefix else 0, causal)
        # `ends` is in the layout's order, `starts` (of each item, among the R rows) in the caller's order.
        ends = rows[order].cumsum(0)
        item_of_row = torch.repeat_interleave(order, rows[order], output_size=sum(sizes))
        starts = torch.empty_like(ends)
        starts[order] = ends - rows[order]
        position = torch.arange(sum(sizes), device=rows.device) - starts[item_of_row]
        return TextPacking(layout, order, item_of_row, position, prefix + starts + rows - 1)
