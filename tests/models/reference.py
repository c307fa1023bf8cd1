"""A float64 NumPy forward pass of the video tower, written from the equations and independent of
the model code.
"""

import numpy as np


def _linear(p, x):
  return x @ p['kernel'] + p['bias']


def _ln(x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def _modulate(x, m, shift, scale):
  """m [F, 6, D]; x [V, F, P, D]."""
  return _ln(x) * (1 + m[:, scale, None]) + m[:, shift, None]


def _rms(p, x):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale']


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _silu(x):
  return x / (1 + np.exp(-x))


def _rotate(x, angles):
  """x [S, heads, hd], angles [S, pairs]: complex multiplication of interleaved pairs."""
  z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
  out = np.empty_like(x)
  out[..., 0::2], out[..., 1::2] = z.real, z.imag
  return out


def _attention(p, x, context, heads, angles=None, mask=None):
  """x [Sq, D], context [Sk, D]; mask [Sq, Sk] bool."""

  def split(y):
    return y.reshape(len(y), heads, -1)

  q, k = (
    split(_rms(p['q_norm'], _linear(p['q'], x))),
    split(_rms(p['k_norm'], _linear(p['k'], context))),
  )
  v = split(_linear(p['v'], context))
  if angles is not None:
    q, k = _rotate(q, angles), _rotate(k, angles)
  out = np.zeros_like(q)
  for h in range(heads):
    scores = q[:, h] @ k[:, h].T / np.sqrt(q.shape[-1])
    if mask is not None:
      scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, h]
  return _linear(p['o'], out.reshape(len(x), -1))


def _rope_angles(frames, grid, head_dim, theta=1e4):
  spatial = head_dim // 6
  time = head_dim // 2 - 2 * spatial
  rows = []
  for f in range(frames):
    for y in range(grid[0]):
      for x in range(grid[1]):
        rows.append(
          np.concatenate(
            [
              pos * theta ** (-np.arange(n) / n)
              for pos, n in ((f, time), (y, spatial), (x, spatial))
            ]
          )
        )
  return np.array(rows)


def _camera_angles(frame, views, grid, head_dim, table, theta=1e4):
  pairs = head_dim // 2
  view = max(1, pairs // 4)
  spatial = (pairs - view) // 3
  time = pairs - view - 2 * spatial
  rows = []
  for v in range(views):
    for y in range(grid[0]):
      for x in range(grid[1]):
        parts = [
          pos * theta ** (-np.arange(n) / n)
          for pos, n in ((frame, time), (y, spatial), (x, spatial))
        ]
        rows.append(np.concatenate([*parts, table[v]]))
  return np.array(rows)


def video_tower(p, config, z, t, text, sight=None):
  """Prediction of one sample: z [V, F, h, w, C], t [F], text [X, E], sight [V, P, V, P] or None,
  float64.
  """
  c = config.video
  views, frames, h, w, _ = z.shape
  ph, pw = c.patch[1:]
  grid = (h // ph, w // pw)
  x = np.stack(
    [
      [
        [
          z[v, f, r * ph : (r + 1) * ph, s * pw : (s + 1) * pw].ravel()
          for r in range(grid[0])
          for s in range(grid[1])
        ]
        for f in range(frames)
      ]
      for v in range(views)
    ]
  )
  x = _linear(p['patch_embed'], x)
  half = c.freq_dim // 2
  angle = 1000 * t[:, None] * np.exp(-np.log(1e4) * np.arange(half) / half)
  temb = _linear(
    p['time_out'], _silu(_linear(p['time_in'], np.concatenate([np.cos(angle), np.sin(angle)], -1)))
  )
  e6 = _linear(p['time_proj'], _silu(temb)).reshape(frames, 6, c.width)
  gate = _linear(p['view_gate'], _silu(temb))
  context = _linear(p['text_out'], _gelu(_linear(p['text_in'], text)))
  patches, d = x.shape[2:]
  for i in range(c.layers):
    b = _layer(p['blocks'], i)
    m = b['modulation'] + e6
    normed = _modulate(x, m, 0, 1)
    own = np.stack(
      [
        _attention(
          b['self_attn'],
          normed[v].reshape(-1, d),
          normed[v].reshape(-1, d),
          c.heads,
          _rope_angles(frames, grid, c.head_dim),
        ).reshape(frames, patches, d)
        for v in range(views)
      ]
    )
    x = x + own * m[:, 2, None]
    normed, across = _modulate(x, m, 0, 1), np.empty_like(x)
    mask = None if sight is None else sight.reshape(views * patches, views * patches)
    for f in range(frames):
      tokens = normed[:, f].reshape(-1, d)
      angles = _camera_angles(f, views, grid, c.head_dim, p['view_embed']['embedding'])
      across[:, f] = _attention(b['cross_view'], tokens, tokens, c.heads, angles, mask).reshape(
        views, patches, d
      )
    x = x + across * (b['view_gate'] + gate)[:, None]
    normed = _ln(x) * b['norm_cross']['scale'] + b['norm_cross']['bias']
    x = x + _attention(b['cross_attn'], normed.reshape(-1, d), context, c.heads).reshape(x.shape)
    hidden = _gelu(_linear(b['ffn']['up'], _modulate(x, m, 3, 4)))
    x = x + _linear(b['ffn']['down'], hidden) * m[:, 5, None]
  head = p['head']
  shift, scale = head['modulation'][0] + temb, head['modulation'][1] + temb
  y = (_ln(x) * (1 + scale[:, None]) + shift[:, None]) @ head['kernel'] + head['bias']
  out = np.zeros(z.shape[:-1] + (config.codec.channels,))
  for r in range(grid[0]):
    for s in range(grid[1]):
      cell = y[:, :, r * grid[1] + s].reshape(views, frames, ph, pw, -1)
      out[:, :, r * ph : (r + 1) * ph, s * pw : (s + 1) * pw] = cell
  return out


def _layer(tree, i):
  return {
    k: _layer(v, i) if isinstance(v, dict) else np.asarray(v, np.float64)[i]
    for k, v in tree.items()
  }
