"""Qwen3.5's text layers in float64 NumPy: one token after another, one head after another.

Written from the published equations without a look at the model's code: no chunks, no masks, no
stacking. A sequence is a list of calls of `layer`, each of which extends that layer's memory.
"""

import numpy as np


def memories(config):
  """The empty memory of every layer."""
  return [memory(config, kind) for kind in config.layer_types]


def memory(config, kind):
  if kind == 'full':
    return {'k': [], 'v': []}
  shape = (config.linear_value_heads, config.linear_key_dim, config.linear_value_dim)
  return {'inputs': [np.zeros(config.conv_channels)] * (config.conv - 1), 'state': np.zeros(shape)}


def layer_params(params, config, index):
  """float64 parameters of layer `index` from the stacked tree {'linear': ..., 'full': ...}."""
  kind = config.layer_types[index]
  row = config.layer_types[:index].count(kind)

  def take(tree):
    if isinstance(tree, dict):
      return {name: take(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)[row]

  return take(params[kind])


def forward(params, config, x, positions, memory=None):
  """x [S, D] through all layers: {'layers' [L, S, D], 'hidden' [S, D], 'logits' [S, U], 'memory'}.

  params: the tree of the text side. positions: [3, S].
  """
  memory = memories(config) if memory is None else memory
  layers = [layer_params(params['layers'], config, i) for i in range(config.layers)]
  each = np.zeros((config.layers, *x.shape))
  for t in range(len(x)):
    h = np.asarray(x[t], np.float64)
    for i, kind in enumerate(config.layer_types):
      h = layer(layers[i], config, kind, h, positions[:, t], memory[i])
      each[i, t] = h
  hidden = np.stack([norm(h, params['norm']['scale'], config.eps) for h in each[-1]])
  table = params['embed']['embedding'].T if config.tied else params['head']['kernel']
  logits = hidden @ np.asarray(table, np.float64)
  return {'layers': each, 'hidden': hidden, 'logits': logits, 'memory': memory}


def layer(p, config, kind, x, position, memory):
  """One layer on one token x [D] at position (time, row, column); `memory` is extended."""
  mix = full_attention if kind == 'full' else delta_rule
  h = norm(x, p['input_norm']['scale'], config.eps)
  x = x + mix(p, config, h, position, memory)
  h = norm(x, p['post_norm']['scale'], config.eps)
  return x + (silu(h @ p['gate']['kernel']) * (h @ p['up']['kernel'])) @ p['down']['kernel']


def full_attention(p, config, h, position, memory):
  hd = config.head_dim
  keys, values = h @ p['k']['kernel'], h @ p['v']['kernel']
  memory['k'].append(
    [
      rotate(norm(keys[j * hd : (j + 1) * hd], p['k_norm']['scale'], config.eps), config, position)
      for j in range(config.kv_heads)
    ]
  )
  memory['v'].append([values[j * hd : (j + 1) * hd] for j in range(config.kv_heads)])
  both = h @ p['q']['kernel']
  out = []
  for head in range(config.heads):
    q, gate = both[2 * hd * head : 2 * hd * head + hd], both[2 * hd * head + hd :][:hd]
    q = rotate(norm(q, p['q_norm']['scale'], config.eps), config, position)
    shared = head // (config.heads // config.kv_heads)
    logits = np.array([k[shared] @ q for k in memory['k']]) / np.sqrt(hd)
    weights = np.exp(logits - logits.max())
    mean = sum(w * v[shared] for w, v in zip(weights / weights.sum(), memory['v'], strict=True))
    out.append(mean * sigmoid(gate))
  return np.concatenate(out) @ p['o']['kernel']


def rotate(x, config, position):
  """Half-rotation of the first rotary_dims entries; frequency i follows one of the three axes."""
  half = config.rotary_dims // 2
  out = x.copy()
  for i in range(half):
    along = 0
    if i % 3 == 1 and i < 3 * config.mrope_section[1]:
      along = 1
    if i % 3 == 2 and i < 3 * config.mrope_section[2]:
      along = 2
    angle = position[along] * config.rope_theta ** (-2 * i / config.rotary_dims)
    turned = (x[i] + 1j * x[i + half]) * np.exp(1j * angle)
    out[i], out[i + half] = turned.real, turned.imag
  return out


def delta_rule(p, config, h, position, memory):
  del position
  c, taps = config, config.conv
  memory['inputs'] = [*memory['inputs'], h @ p['qkv']['kernel']][-taps:]
  mixed = silu(sum(p['conv']['kernel'][j] * memory['inputs'][j] for j in range(taps)))
  memory['inputs'] = memory['inputs'][1:]
  dk, dv = c.linear_key_dim, c.linear_value_dim
  keys = c.linear_key_heads * dk
  z = h @ p['z']['kernel']
  beta = sigmoid(h @ p['b']['kernel'])
  g = -np.exp(p['log_decay']) * np.log1p(np.exp(h @ p['a']['kernel'] + p['dt_bias']))
  out = []
  for head in range(c.linear_value_heads):
    shared = head // (c.linear_value_heads // c.linear_key_heads)
    q = unit(mixed[shared * dk : (shared + 1) * dk]) / np.sqrt(dk)
    k = unit(mixed[keys + shared * dk : keys + (shared + 1) * dk])
    v = mixed[2 * keys + head * dv : 2 * keys + (head + 1) * dv]
    state = memory['state'][head] * np.exp(g[head])
    state = state + np.outer(k, beta[head] * (v - state.T @ k))
    memory['state'][head] = state
    o = state.T @ q
    o = o / np.sqrt(np.mean(o**2) + c.eps) * p['out_norm']['scale']
    out.append(o * silu(z[head * dv : (head + 1) * dv]))
  return np.concatenate(out) @ p['out']['kernel']


def norm(x, scale, eps):
  return x / np.sqrt(np.mean(x**2) + eps) * (1 + np.asarray(scale, np.float64))


def unit(x):
  return x / np.sqrt(np.sum(x**2) + 1e-6)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)
