"""Every tensor of a Wan video VAE: Wan2.1's and Wan2.2's, diffusers' and the authors' names.

The authors' Wan2.1 files number the blocks of all levels in one flat list, their Wan2.2 files nest
them; diffusers does the same for the encoder. Which of the two follows from `VAEConfig.residual`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from wallwm_jax.config import CodecConfig, VAEConfig
from wallwm_jax.convert.entries import Entry, Layout, Naming
from wallwm_jax.presets import CODECS
from wallwm_jax.types import ConfigError

Shapes = Mapping[str, tuple[int, ...]]

ALIASES: dict[str, str] = {}
IGNORED: tuple[str, ...] = ()

# Parts of a block: our name -> (diffusers' name, the authors').
_RES = {
  'norm1': ('norm1', 'residual.0'),
  'conv1': ('conv1', 'residual.2'),
  'norm2': ('norm2', 'residual.3'),
  'conv2': ('conv2', 'residual.6'),
  'shortcut': ('conv_shortcut', 'shortcut'),
}
_SAME = {'conv': ('resample.1', 'resample.1'), 'time_conv': ('time_conv', 'time_conv')}
_ATTENTION = {'norm': ('norm', 'norm'), 'qkv': ('to_qkv', 'to_qkv'), 'proj': ('proj', 'proj')}


@dataclasses.dataclass(frozen=True)
class _Block:
  """Where a block or layer lives: in diffusers' files, in the authors', among our parameters."""

  diffusers: str
  original: str
  path: str

  def part(self, name: str, names: Mapping[str, tuple[str, str]]) -> _Block:
    diffusers, original = names[name]
    return _Block(
      f'{self.diffusers}.{diffusers}', f'{self.original}.{original}', f'{self.path}/{name}'
    )

  def conv(self, shape: tuple[int, ...], layout: Layout = 'conv') -> Iterator[Entry]:
    for torch, ours, size, how in (
      ('weight', 'kernel', shape, layout),
      ('bias', 'bias', shape[:1], 'same'),
    ):
      keys = (f'{self.diffusers}.{torch}', f'{self.original}.{torch}')
      yield Entry(*keys, shape=size, path=f'{self.path}/{ours}', layout=how)

  def norm(self, channels: int, rank: int = 4) -> Iterator[Entry]:
    shape = (channels, *(1,) * (rank - 1))
    keys = (f'{self.diffusers}.gamma', f'{self.original}.gamma')
    yield Entry(*keys, shape=shape, path=f'{self.path}/scale', layout='squeeze')


def entries(config: CodecConfig) -> list[Entry]:
  """One entry per tensor of the VAE of `config`.

  Raises:
    ConfigError: the codec is not a VAE.
  """
  if config.kind != 'wan':
    raise ConfigError(f"model.codec.kind: expected 'wan' for VAE weights, got {config.kind!r}.")
  vae, z = config.vae, config.channels
  pixels = 3 * vae.patch**2
  return [
    *_coder('encoder', vae, pixels, 2 * z),
    *_Block('quant_conv', 'conv1', 'quant_conv').conv((2 * z, 2 * z, 1, 1, 1)),
    *_Block('post_quant_conv', 'conv2', 'post_quant_conv').conv((z, z, 1, 1, 1)),
    *_coder('decoder', vae, z, pixels),
  ]


def model(fields: Mapping[str, Any]) -> list[Entry]:
  """`entries` of what `infer` returned, also after a trip through JSON."""
  return entries(codec_config(fields['config']))


def codec_config(values: Mapping[str, Any]) -> CodecConfig:
  """The CodecConfig of `dataclasses.asdict`, lists in the place of tuples allowed."""
  vae = {k: tuple(v) if isinstance(v, list) else v for k, v in values['vae'].items()}
  return CodecConfig(**{**values, 'vae': VAEConfig(**vae)})


def infer(
  shapes: Shapes, source_config: Mapping[str, Any] | None = None
) -> tuple[Naming, dict[str, Any]]:
  """Naming and {'config': CodecConfig as a dict} of a checkpoint.

  Every size follows from the shapes; diffusers' config.json, where given, must agree with them. It
  alone holds the latent normalisation: without it, a checkpoint of a public model's exact sizes
  gets that model's published constants (`presets.CODECS`), any other none.

  Raises:
    ConfigError: no Wan VAE, a key missing that a size follows from, an attention layer outside the
      middle, sizes that no VAEConfig describes, or a config.json that says otherwise.
  """
  naming = _naming(shapes)
  residual, kinds = _encoder_levels(shapes, naming)
  convs = ('conv_in', 'conv_out') if naming == 'diffusers' else ('conv1', 'head.2')
  first = _shape(shapes, f'encoder.{convs[0]}.weight')
  widest = _shape(shapes, f'decoder.{convs[0]}.weight')[0]
  z = _shape(shapes, f'{"post_quant_conv" if naming == "diffusers" else "conv2"}.weight')[0]
  base, widths = first[0], [width for _, width, _ in kinds]
  patch = math.isqrt(first[1] // 3)
  if 3 * patch**2 != first[1]:
    raise ConfigError(
      f'encoder.{convs[0]}.weight: expected 3 * patch^2 input channels (RGB), got {first[1]}.'
    )
  mult = tuple(_ratio(w, base, 'encoder level width / first width') for w in widths)
  vae = VAEConfig(
    base=base,
    decoder_base=_ratio(widest, mult[-1], 'decoder width / last multiple'),
    dim_mult=mult,
    res_blocks=kinds[0][0],
    temporal_downsample=tuple(bool(temporal) for _, _, temporal in kinds[:-1]),
    residual=residual,
    patch=patch,
  )
  source = source_config or {}
  if source.get('_class_name', 'AutoencoderKLWan') != 'AutoencoderKLWan':
    source = {}  # the authors keep their VAE beside the config of another model
  _check_source(source, vae, z)
  vae = _with_constants(vae, z, source)
  config = CodecConfig(
    kind='wan', spatial=vae.spatial, temporal=vae.temporal, channels=z, vae=vae
  )
  return naming, {'config': dataclasses.asdict(config)}


def _coder(side: str, vae: VAEConfig, c_in: int, c_out: int) -> Iterator[Entry]:
  """Encoder or decoder: first convolution, levels and middle, norm, last convolution."""
  decoding = side == 'decoder'
  mult = vae.dim_mult[::-1] if decoding else vae.dim_mult
  base = vae.decoder_base if decoding else vae.base
  widths = [base * m for m in ((mult[0] if decoding else 1), *mult)]
  middle, last = widths[0 if decoding else -1], widths[-1]
  yield from _Block(f'{side}.conv_in', f'{side}.conv1', f'{side}/conv_in').conv(
    (widths[0], c_in, 3, 3, 3)
  )
  yield from _levels(side, vae, widths)
  for i, (name, kind) in enumerate((('res_0', _res), ('attn', _attention), ('res_1', _res))):
    diffusers = f'{side}.mid_block.{("resnets.0", "attentions.0", "resnets.1")[i]}'
    yield from kind(_Block(diffusers, f'{side}.middle.{i}', f'{side}/mid/{name}'), middle, middle)
  yield from _Block(f'{side}.norm_out', f'{side}.head.0', f'{side}/norm_out').norm(last)
  yield from _Block(f'{side}.conv_out', f'{side}.head.2', f'{side}/conv_out').conv(
    (c_out, last, 3, 3, 3)
  )


def _levels(side: str, vae: VAEConfig, widths: list[int]) -> Iterator[Entry]:
  decoding = side == 'decoder'
  temporal = vae.temporal_downsample[::-1] if decoding else vae.temporal_downsample
  blocks = vae.res_blocks + decoding
  for i, width in enumerate(widths[1:]):
    # Wan2.1's upsampling convolutions halve the channels.
    halved = decoding and i > 0 and not vae.residual
    c_in = widths[i] // 2 if halved else widths[i]
    for r in range(blocks):
      yield from _res(_block(side, vae, i, r, blocks), c_in if r == 0 else width, width)
    if i == len(widths) - 2:
      return
    sample = _block(side, vae, i, None, blocks)
    c_out = width // 2 if decoding and not vae.residual else width
    yield from sample.part('conv', _SAME).conv((c_out, width, 3, 3))
    if temporal[i]:
      shape = ((2 if decoding else 1) * width, width, 3, 1, 1)
      yield from sample.part('time_conv', _SAME).conv(shape)


def _block(side: str, vae: VAEConfig, i: int, r: int | None, blocks: int) -> _Block:
  """Residual block r of level i, or its resampling (r None)."""
  decoding = side == 'decoder'
  index = blocks if r is None else r
  flat = i * (blocks + 1) + index
  outer, inner = ('upsamples', 'up') if decoding else ('downsamples', 'down')
  original = f'{outer}.{i}.{outer}.{index}' if vae.residual else f'{outer}.{flat}'
  if not decoding and not vae.residual:
    diffusers = f'down_blocks.{flat}'
  elif r is not None:
    diffusers = f'{inner}_blocks.{i}.resnets.{r}'
  else:
    diffusers = f'{inner}_blocks.{i}.{inner}sampler' + ('' if vae.residual else 's.0')
  path = f'{inner}_{i}/' + ('sample' if r is None else f'res_{r}')
  return _Block(f'{side}.{diffusers}', f'{side}.{original}', f'{side}/{path}')


def _res(block: _Block, c_in: int, c_out: int) -> Iterator[Entry]:
  yield from block.part('norm1', _RES).norm(c_in)
  yield from block.part('conv1', _RES).conv((c_out, c_in, 3, 3, 3))
  yield from block.part('norm2', _RES).norm(c_out)
  yield from block.part('conv2', _RES).conv((c_out, c_out, 3, 3, 3))
  if c_in != c_out:
    yield from block.part('shortcut', _RES).conv((c_out, c_in, 1, 1, 1))


def _attention(block: _Block, width: int, _: int) -> Iterator[Entry]:
  yield from block.part('norm', _ATTENTION).norm(width, rank=3)
  yield from block.part('qkv', _ATTENTION).conv((3 * width, width, 1, 1), 'flat')
  yield from block.part('proj', _ATTENTION).conv((width, width, 1, 1), 'flat')


def _naming(shapes: Shapes) -> Naming:
  if 'encoder.conv_in.weight' in shapes and 'decoder.conv_in.weight' in shapes:
    return 'diffusers'
  if 'encoder.conv1.weight' in shapes and 'decoder.conv1.weight' in shapes:
    return 'original'
  raise ConfigError(
    'expected a Wan VAE: keys encoder.conv_in.weight and decoder.conv_in.weight (diffusers) or '
    f'encoder.conv1.weight and decoder.conv1.weight (original), got {len(shapes)} keys such as '
    f'{sorted(shapes)[:3]}. Is this the file of another model?'
  )


def _encoder_levels(shapes: Shapes, naming: Naming) -> tuple[bool, list[tuple[int, int, bool]]]:
  """Whether levels nest, and of every level: residual blocks, width, halves time."""
  outer, inner = (
    (r'down_blocks\.(\d+)', r'(?:\.resnets\.(\d+)|\.downsampler)')
    if naming == 'diffusers'
    else (r'downsamples\.(\d+)', r'\.downsamples\.(\d+)')
  )
  nested = re.compile(rf'encoder\.{outer}{inner}\.(.+)')
  flat = re.compile(rf'encoder\.{outer}()\.(.+)')  # the empty group: no second index
  residual = any(nested.fullmatch(key) for key in shapes)
  conv2 = 'conv2.weight' if naming == 'diffusers' else 'residual.6.weight'
  found: dict[tuple[int, ...], tuple[str, int]] = {}  # position -> (kind, width)
  for key, shape in shapes.items():
    if not (match := (nested if residual else flat).fullmatch(key)):
      continue
    i, r, rest = match.groups()
    position = (int(i), int(r) if r else math.inf)
    if rest == conv2:
      found[position] = ('res', shape[0])
    elif rest == 'time_conv.weight' or (rest == 'resample.1.weight' and position not in found):
      found[position] = ('time' if rest.startswith('time') else 'space', shape[0])
    elif rest.startswith('to_qkv.'):
      raise ConfigError(f'{key}: attention is supported in the middle of the VAE only.')
  levels: list[list[tuple[int, str, int]]] = [[]]
  for position in sorted(found):
    levels[-1].append(found[position])
    if found[position][0] != 'res':
      levels.append([])
  result = [
    (sum(kind == 'res' for kind, _ in level), level[0][1], level[-1][0] == 'time')
    for level in levels
    if level and level[0][0] == 'res'
  ]
  if len(result) != len(levels) or len({blocks for blocks, _, _ in result}) != 1:
    raise ConfigError(
      'expected an encoder of levels with equally many residual blocks, all but the last followed '
      f'by a downsampling, got {[[kind for kind, _ in level] for level in levels]}.'
    )
  return residual, result


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
  if key not in shapes:
    raise ConfigError(f'{key}: missing; the sizes of a Wan VAE cannot be told without it.')
  return tuple(shapes[key])


def _ratio(a: int, b: int, what: str) -> int:
  if a % b:
    raise ConfigError(f'Wan VAE: expected a whole {what}, got {a} / {b}.')
  return a // b


def _check_source(source: Mapping[str, Any], vae: VAEConfig, z: int) -> None:
  """diffusers' config.json against the sizes read from the shapes."""
  if source.get('attn_scales'):
    raise ConfigError(
      f'config.json attn_scales: expected [] (attention in the middle only), got '
      f'{source["attn_scales"]}.'
    )
  expected = {
    'base_dim': vae.base,
    'decoder_base_dim': vae.decoder_base,
    'z_dim': z,
    'dim_mult': list(vae.dim_mult),
    'num_res_blocks': vae.res_blocks,
    'temperal_downsample': list(vae.temporal_downsample),
    'is_residual': vae.residual,
    'patch_size': vae.patch,
    'in_channels': 3 * vae.patch**2,
    'out_channels': 3 * vae.patch**2,
  }
  for name, value in expected.items():
    said = source.get(name)  # diffusers writes null for "the default": base_dim, no patch
    if said is not None and said != value:
      raise ConfigError(
        f'config.json {name}: the tensors have {value}, the file says {said}. Is it the config of '
        'another checkpoint?'
      )


def _with_constants(vae: VAEConfig, z: int, source: Mapping[str, Any]) -> VAEConfig:
  """`vae` with the latent normalisation of config.json, or of the public model of these sizes."""
  if 'latents_mean' in source and 'latents_std' in source:
    mean, std = (tuple(map(float, source[f'latents_{name}'])) for name in ('mean', 'std'))
    public = CODECS['wan2_1'].vae
    if z != len(mean) and (mean, std) == (public.latent_mean, public.latent_std):
      return vae  # diffusers' class default, left as it was in a model with other latents
    if {len(mean), len(std)} != {z}:
      raise ConfigError(
        f'config.json latents_mean, latents_std: expected {z} values each (the latent channels), '
        f'got {len(mean)} and {len(std)}.'
      )
    return dataclasses.replace(vae, latent_mean=mean, latent_std=std)
  for preset in CODECS.values():
    constants = {n: getattr(preset.vae, n) for n in ('latent_mean', 'latent_std')}
    if (preset.kind, preset.channels) == ('wan', z):
      if dataclasses.replace(vae, **constants) == preset.vae:
        return preset.vae
  return vae
