"""Rows moved about: padding between experts for grouped products, packed sequences to rectangles and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def fused_multi_row_padding(
    input: torch.Tensor,  # noqa: A002 (its name there)
    output: torch.Tensor,
    input_row_list: Sequence[int],
    padded_input_row_list: Sequence[int],
) -> None:
    """Consecutive groups of rows, each followed by rows of zeros, into `output`."""
    for source, target in zip(
        torch.split(input, list(input_row_list)), torch.split(output, list(padded_input_row_list)), strict=True
    ):
        target[: len(source)] = source
        target[len(source) :] = 0


def fused_multi_row_unpadding(
    input: torch.Tensor,  # noqa: A002
    output: torch.Tensor,
    input_row_list: Sequence[int],
    unpadded_input_row_list: Sequence[int],
) -> None:
    """The first rows of each group into `output`, one group after the other."""
    for source, target in zip(
        torch.split(input, list(input_row_list)), torch.split(output, list(unpadded_input_row_list)), strict=True
    ):
        target.copy_(source[: len(target)])


def convert_thd_to_bshd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, batch: int, max_seq_len: int) -> torch.Tensor:
    """[t, ...] -> [batch, max_seq_len, ...], zeros after the end of each sequence."""
    bounds = cu_seqlens.tolist()
    output = tensor.new_zeros(batch, max_seq_len, *tensor.shape[1:])
    for i in range(batch):
        output[i, : bounds[i + 1] - bounds[i]] = tensor[bounds[i] : bounds[i + 1]]
    return output


def convert_bshd_to_thd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, t: int) -> torch.Tensor:
    """[batch, max_seq_len, ...] -> [t, ...]; rows behind the last sequence are zeros."""
    bounds = cu_seqlens.tolist()
    output = tensor.new_zeros(t, *tensor.shape[2:])
    for i in range(len(bounds) - 1):
        output[bounds[i] : bounds[i + 1]] = tensor[i, : bounds[i + 1] - bounds[i]]
    return output
