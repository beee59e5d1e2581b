"""A layer's keys and values in a tensor with room for those that each call brings.

Letters: B batch, T keys that the buffer holds, N keys before the call's own, S keys of the call,
Hkv key/value heads, D head dim.
"""

from typing import NamedTuple

from torch import Tensor

from openpi_opt.pi0.gemma import KeysValues, Past


class BufferedKeysValues(NamedTuple):
    """Keys and values [B, T, Hkv, D] of which the first `filled` rows are valid.

    A call's own rows are written behind them, in place, instead of copying the whole cache for
    every layer and denoising step. Each call overwrites all the rows it reads beyond `filled`, and
    each inference allocates its own buffers, so nothing stale can be seen.
    """

    keys: Tensor
    values: Tensor
    filled: int

    def joined(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Write a call's own [B, S, Hkv, D] -> views of all N + S rows."""
        end = self.filled + keys.shape[1]
        if end > self.keys.shape[1]:
            raise ValueError(
                f"The buffer has {self.keys.shape[1]} rows; {self.filled} are filled and "
                f"{keys.shape[1]} more do not fit."
            )
        self.keys[:, self.filled : end] = keys
        self.values[:, self.filled : end] = values
        return KeysValues(self.keys[:, :end], self.values[:, :end])


def with_room(cache: Past, rows: int) -> BufferedKeysValues:
    """Copy `cache`, [B, N, Hkv, D] each, once, into a buffer with `rows` more rows."""
    filled = cache.keys.shape[1]
    return BufferedKeysValues(_padded(cache.keys, rows), _padded(cache.values, rows), filled)


def _padded(prefix: Tensor, rows: int) -> Tensor:
    batch, filled, heads, width = prefix.shape
    buffer = prefix.new_empty(batch, filled + rows, heads, width)
    buffer[:, :filled] = prefix
    return buffer
