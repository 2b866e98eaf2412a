"""A linear layer of ternary weights and int8 activations, with the norm before it (BitNet b1.58, arXiv 2402.17764)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treadle.layers.weight_cache import ModuleWithWeightCache, weight_version
from treadle.ops.precision import without_autocast
from treadle.ops.rms_norm import rms_norm_same_dtype
from treadle.ops.ternary import PackedLayer, dequantized, quantize_weights, ternary_linear
from treadle.ops.ternary_training import normed_ternary_linear

EPS = 1e-8


class BitLinear(ModuleWithWeightCache):
    """y = ternary(W) int8(RMSNorm(x) gain), no bias. fp32 whatever autocast says, but for the products of the gradients: its
    integers are exact, and its scales would not be.

    In evaluation weights are quantised once and kept (`packed` in 2 bits, for decoding row by row).
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = width, out
        self.weight = nn.Parameter(torch.empty(out, width))
        self.gain = nn.Parameter(torch.ones(width))

    def normalize(self, x: Tensor) -> Tensor:
        """RMSNorm(x) gain in fp32: what the rounding to int8 sees; x [..., K] -> [..., K]."""
        return rms_norm_same_dtype(x.float(), self.gain, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if torch.is_grad_enabled() or self.training:
            self.clear_weight_cache()
            return normed_ternary_linear(x, self.gain, self.weight.float(), EPS)
        with without_autocast(x):
            return self._infer(x.float())

    def linear(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n^, W^) whose plain product is the answer up to rounding; for losses that take a matrix. x [..., K], n^
        [..., K], W^ [N, K]."""
        self.clear_weight_cache()
        return dequantized(self.normalize(x), self.weight.float())

    def _infer(self, x: Tensor) -> Tensor:
        w = self.weight
        if w.is_meta or type(w.data) is not Tensor:  # shapes only, or a gathered part
            return ternary_linear(self.normalize(x), w.float())
        return self.packed()(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)

    def packed(self) -> PackedLayer:
        """The weights as inference takes them."""
        return self.cached(self._cache_key(), self._quantized)

    @torch.no_grad()
    def _quantized(self) -> PackedLayer:
        return PackedLayer(*quantize_weights(self.weight.float()), self.gain, EPS)

    def cache_quantized(self, ternary: Tensor, scale: Tensor) -> None:
        """Infers with these (int8 [N, K] and a scalar): a packed file's scale, to the last bit."""
        w = self.weight
        if type(w.data) is Tensor:
            self._weight_cache = (self._cache_key(), PackedLayer(ternary.to(w.device), scale.to(w.device), self.gain, EPS))

    def _cache_key(self) -> tuple[int, int, int, int, torch.device]:
        w, gain = self.weight, self.gain
        return weight_version(w), weight_version(gain), w.data_ptr(), gain.data_ptr(), w.device
