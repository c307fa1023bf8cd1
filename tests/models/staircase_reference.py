"""Latent reasoning without any optimisation: float64 NumPy, one sequence, one token, one layer at a
time.

Written from the definition of a Qwen3.5 layer; no code is shared with the package.
"""

from __future__ import annotations

import numpy as np


def f64(tree):
  if isinstance(tree, dict):
    return {name: f64(leaf) for name, leaf in tree.items()}
  return np.asarray(tree, np.float64)


def layer(params, types, index):
  """Parameters of layer `index` of a stack with `types`."""

  def pick(tree):
    return {k: pick(v) if isinstance(v, dict) else v[row] for k, v in tree.items()}

  row = list(types[:index]).count(types[index])
  return pick(params[types[index]])


def norm(x, w, eps):
  return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * (1 + w)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def rotate(c, x, position):
  """x [heads, hd] at the rotary position (time, row, column)."""
  dims = c.rotary_dims
  half = dims // 2
  angle = np.zeros(half)
  for i in range(half):
    axis = 0
    if i % 3 == 1 and i < 3 * c.mrope_section[1]:
      axis = 1
    if i % 3 == 2 and i < 3 * c.mrope_section[2]:
      axis = 2
    angle[i] = position[axis] * c.rope_theta ** (-2 * i / dims)
  a, b, rest = x[:, :half], x[:, half:dims], x[:, dims:]
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], 1)


def full(c, p, memory, x, position):
  """Gated attention of one token; memory = (keys, values) of the tokens before it, as lists."""
  q, gate = np.split((x @ p['q']['kernel']).reshape(c.heads, 2 * c.head_dim), 2, 1)
  k = (x @ p['k']['kernel']).reshape(c.kv_heads, c.head_dim)
  v = (x @ p['v']['kernel']).reshape(c.kv_heads, c.head_dim)
  q = rotate(c, norm(q, p['q_norm']['scale'], c.eps), position)
  k = rotate(c, norm(k, p['k_norm']['scale'], c.eps), position)
  keys, values = memory[0] + [k], memory[1] + [v]
  out = np.zeros((c.heads, c.head_dim))
  for h in range(c.heads):
    j = h // (c.heads // c.kv_heads)
    score = np.array([q[h] @ key[j] for key in keys]) / np.sqrt(c.head_dim)
    weight = np.exp(score - score.max())
    out[h] = sum(w * value[j] for w, value in zip(weight / weight.sum(), values))
  return (out * sigmoid(gate)).reshape(-1) @ p['o']['kernel'], (keys, values)


def linear(c, p, memory, x, position):
  """Gated delta rule of one token; memory = (last inputs of the convolution, state per head)."""
  window = np.concatenate([memory[0], (x @ p['qkv']['kernel'])[None]])
  mixed = silu((window * p['conv']['kernel']).sum(0))
  nk, nv, dk, dv = c.linear_key_heads, c.linear_value_heads, c.linear_key_dim, c.linear_value_dim
  q, k, v = np.split(mixed, [nk * dk, 2 * nk * dk])
  q, k, v = q.reshape(nk, dk), k.reshape(nk, dk), v.reshape(nv, dv)
  q = q / np.sqrt(np.square(q).sum(-1, keepdims=True) + 1e-6) / np.sqrt(dk)
  k = k / np.sqrt(np.square(k).sum(-1, keepdims=True) + 1e-6)
  beta = sigmoid(x @ p['b']['kernel'])
  decay = np.exp(
    -np.exp(p['log_decay']) * np.log1p(np.exp(x @ p['a']['kernel'] + p['dt_bias']))
  )
  z = (x @ p['z']['kernel']).reshape(nv, dv)
  out, states = np.zeros((nv, dv)), []
  for h in range(nv):
    j = h // (nv // nk)
    state = memory[1][h] * decay[h]
    state = state + np.outer(k[j], beta[h] * (v[h] - state.T @ k[j]))
    o = state.T @ q[j]
    out[h] = o / np.sqrt(np.square(o).mean() + c.eps) * p['out_norm']['scale'] * silu(z[h])
    states.append(state)
  return out.reshape(-1) @ p['out']['kernel'], (window[1:], states)


def step(c, kind, p, memory, x, position):
  """One token through one layer: (its state after the layer, the layer's memory after it)."""
  mixer = full if kind == 'full' else linear
  y, memory = mixer(c, p, memory, norm(x, p['input_norm']['scale'], c.eps), position)
  x = x + y
  h = norm(x, p['post_norm']['scale'], c.eps)
  return x + (silu(h @ p['gate']['kernel']) * (h @ p['up']['kernel'])) @ p['down']['kernel'], memory


def nothing(c, kind):
  """Memory of a layer before the first token."""
  if kind == 'full':
    return [], []
  heads = np.zeros((c.linear_value_heads, c.linear_key_dim, c.linear_value_dim))
  return np.zeros((c.conv - 1, c.conv_channels)), list(heads)


def read(c, layers, embeddings, positions):
  """A prompt [S, D] at `positions` [3, S]: (states after the last layer, memory of every layer)."""
  memories = [nothing(c, kind) for kind in c.layer_types]
  out = []
  for x, position in zip(embeddings, positions.T):
    for i, kind in enumerate(c.layer_types):
      x, memories[i] = step(c, kind, layer(layers, c.layer_types, i), memories[i], x, position)
    out.append(x)
  return np.stack(out), memories


def latents(params, vlm, config, memories, position):
  """[Z, D] latents of one sequence whose layers remember `memories`; `position`: of the first."""
  c, stairs = config.vlm, config.staircase
  params, lower, memories = f64(params), f64(vlm)['text']['layers'], list(memories)
  types, relay = c.layer_types, stairs.relay_depth

  def run(i, x, memory, k):
    own = i >= relay
    p = layer(params['layers'], types[relay:], i - relay) if own else layer(lower, types, i)
    return step(c, types[i], p, memory, x, (position + k,) * 3)

  def last(x):
    return norm(x, params['norm']['scale'], c.eps)

  steps, z = params['steps'], []
  if stairs.mode == 'serial':
    x = params['query']
    for k in range(stairs.latents):
      x = x + steps[k]
      for i in range(c.layers):
        x, memories[i] = run(i, x, memories[i], k)
      x = last(x)
      z.append(x)
    return np.stack(z)

  x = params['query']
  for i in range(relay):
    x, _ = run(i, x, memories[i], 0)
  if stairs.mode == 'parallel':
    for k in range(stairs.latents):
      y = x + steps[k]
      for i in range(relay, c.layers):
        y, _ = run(i, y, memories[i], k)
      z.append(last(y))
    return np.stack(z)

  states = [x + steps[0]]
  for i in range(relay, c.layers):
    while len(states) < stairs.latents and relay + len(states) * stairs.stagger == i:
      states.append((states[-1] if stairs.stagger else x) + steps[len(states)])
    memory = memories[i]
    for k in range(len(states)):
      states[k], memory = run(i, states[k], memory, k)
  return np.stack([last(y) for y in states])
