"""What a prompt leaves behind: keys and values of full attention, states of linear attention."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.types import pytree_dataclass


@pytree_dataclass
class PromptCache:
  """A fixed-size cache after some tokens; the leading axes count the full and the linear layers.

  k, v: [Lf, B, C, Hkv * hd], keys normalised and rotated, in the compute dtype; heads are merged
  because splitting them in a loop over layers is a copy of the cache on a TPU.
  conv: [Ll, B, K-1, c] last inputs [q | k | v] of the convolutions.
  state: [Ll, B, Hv, dk, dv] float32 recurrent states.
  mask: [B, C], slots that may be attended to, the first ones of every row. length: [B], the next
  free slot. position: [B], the rotary position (same on all three axes) of the next token.
  """

  k: Float[Array, 'Lf B C heads']
  v: Float[Array, 'Lf B C heads']
  conv: Float[Array, 'Ll B taps channels']
  state: Float[Array, 'Ll B Hv dk dv']
  mask: Bool[Array, 'B C']
  length: Int[Array, 'B']
  position: Int[Array, 'B']
