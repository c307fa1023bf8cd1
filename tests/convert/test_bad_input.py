"""Checkpoints that must be refused: everything wrong is named at once, and nothing is written."""

import json
import struct

import ml_dtypes
import numpy as np
import public_files as public
import pytest
import safetensors.numpy

from wallwm_jax import weights
from wallwm_jax.config import CodecConfig, ModelConfig, TextConfig, VideoConfig
from wallwm_jax.convert.importer import find_tokenizer, import_weights
from wallwm_jax.convert.plan import FAMILIES, make_plan
from wallwm_jax.convert.source import open_source
from wallwm_jax.types import CheckpointError, ConfigError


def refusal(family, src, **options):
  with pytest.raises(CheckpointError) as caught:
    source = open_source(src, FAMILIES[family].subfolder)
    make_plan(FAMILIES[family], source, **options)
  return str(caught.value)


@pytest.mark.parametrize('family', public.SMALL)
@pytest.mark.parametrize('naming', ['diffusers', 'original'])
def test_missing_extra_misshaped_and_integer_keys_in_one_message(family, naming, tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'src', family, naming)
  entries = FAMILIES[family].module.model(public.SMALL[family])
  # The last ones: no sizes follow from them.
  missing, misshaped, integer = (e.key(naming) for e in entries[-3:])
  del tensors[missing]
  tensors[misshaped] = np.zeros((3, 2), np.float32)
  tensors[integer] = tensors[integer].astype(np.int8)
  tensors['blocks.0.lora_A'] = np.zeros((2, 2), np.float32)
  public.write_checkpoint(src, tensors)
  message = refusal(family, src)
  shape = {e.key(naming): e.shape for e in entries}
  for line in (
    f'{missing}: missing; expected shape {shape[missing]}.',
    f'{misshaped}: expected shape {shape[misshaped]}, got (3, 2).',
    f'{integer}: expected one of F64, F32, F16, BF16, got I8',
    'blocks.0.lora_A: unexpected, got shape (2, 2)',
    '4 problems',
  ):
    assert line in message


def test_damaged_shards_are_named_together_with_wrong_keys(tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  bad = 'blocks.2.ffn.net.2.bias'
  names = sorted(tensors)
  placed = {}
  for i, keys in enumerate((names[:10], names[10:15], names[15:20], names[20:])):
    part = {k: np.zeros(2, np.float32) if k == bad else tensors[k] for k in keys}
    safetensors.numpy.save_file(part, src / f'part{i}.safetensors')
    placed |= {k: f'part{i}.safetensors' for k in keys}
  for file in src.glob('model*'):
    file.unlink()
  whole = (src / 'part0.safetensors').read_bytes()
  (src / 'part0.safetensors').write_bytes(whole[:-8])
  (src / 'part1.safetensors').write_bytes((src / 'part1.safetensors').read_bytes()[:20])
  (src / 'part2.safetensors').unlink()
  placed['not.there'] = 'part3.safetensors'
  (src / 'm.safetensors.index.json').write_text(json.dumps({'weight_map': placed}))
  message = refusal('wan-dit', src)
  for line in (
    f'part0.safetensors: truncated: expected {len(whole)} bytes, got {len(whole) - 8}.',
    'part1.safetensors: truncated or no safetensors',
    'part2.safetensors: named by m.safetensors.index.json, but absent; it should hold',
    names[17],
    "part3.safetensors: expected 'not.there'",
  ):
    assert line in message
  # Keys of whole files are checked all the same, and those of the lost ones are not called missing.
  assert f'{bad}: expected shape (24,), got (2,).' in message
  assert ': missing' not in message and '5 problems' in message


def test_wrong_keys_of_whole_files_stand_beside_a_truncated_one(tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'src', 'wan-dit', shards=3, index=True)
  file = sorted(src.glob('*.safetensors'))[1]
  size = file.stat().st_size
  file.write_bytes(file.read_bytes()[:-1])
  safetensors.numpy.save_file({'stray': np.zeros(3, np.float32)}, src / 'stray.safetensors')
  index = json.loads((src / 'model.safetensors.index.json').read_text())
  index['weight_map']['stray'] = 'stray.safetensors'
  (src / 'model.safetensors.index.json').write_text(json.dumps(index))
  message = refusal('wan-dit', src)
  assert f'{file.name}: truncated: expected {size} bytes, got {size - 1}.' in message
  assert 'stray: unexpected, got shape (3,) in stray.safetensors.' in message
  assert '2 problems' in message and len(tensors) > 10


def test_a_key_in_two_shards_is_named_with_both(tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  key = 'proj_out.bias'
  safetensors.numpy.save_file({key: tensors[key]}, src / 'zz.safetensors')
  message = refusal('wan-dit', src)
  assert f'{key}: expected in one file, found in model-00001-of-00001' in message
  assert 'zz.safetensors' in message
  one = next(src.glob('model*.safetensors'))
  assert make_plan(FAMILIES['wan-dit'], open_source(one)).naming == 'diffusers'


@pytest.mark.parametrize(
  'header, words',
  [
    (b'{"a": ', ['unreadable safetensors header']),
    (b'[1, 2]', ['unreadable safetensors header']),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', ["'a'", 'expected 8 bytes']),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', ["'a'", 'offset']),
    (
      b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
      b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
      ["'a' appears twice"],
    ),
  ],
)
def test_broken_headers(header, words, tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header + bytes(8))
  message = refusal('umt5', path)
  for word in ['x.safetensors', *words]:
    assert word in message


def test_a_huge_header_length_is_not_believed(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(struct.pack('<Q', 1 << 60) + b'{}')
  assert 'truncated or no safetensors' in refusal('umt5', path)


def test_pickles_are_refused_with_the_lines_that_re_save_them(tmp_path):
  path = tmp_path / 'Wan2.2_VAE.pth'
  path.write_bytes(b'PK')
  for src in (path, tmp_path):
    message = refusal('wan-vae', src)
    assert 'weights_only=True' in message and 'Wan2.2_VAE.safetensors' in message
  # The authors keep the pickles of the other models beside the transformer.
  public.small_checkpoint(tmp_path, 'wan-dit', 'original')
  message = refusal('wan-vae', tmp_path)
  assert 'also holds Wan2.2_VAE.pth' in message and 'save_file' in message


def test_nothing_there(tmp_path):
  assert 'found nothing' in refusal('wan-dit', tmp_path / 'nowhere')
  assert 'expected .safetensors files' in refusal('wan-dit', tmp_path)
  (tmp_path / 'x.txt').write_text('')
  assert 'expected a .safetensors file' in refusal('wan-dit', tmp_path / 'x.txt')


@pytest.mark.parametrize('family, other', [('wan-dit', 'wan-vae'), ('wan-vae', 'umt5')])
def test_another_family_is_refused(family, other, tmp_path):
  src, _ = public.small_checkpoint(tmp_path / 'src', other)
  assert f'cannot be converted as {family}' in refusal(family, src)


def test_a_variant_that_is_not_the_experiment_s_is_refused_field_by_field(tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  video = VideoConfig(width=24, layers=3, heads=2, ffn=40, freq_dim=16, prediction='x')
  fitting = ModelConfig(
    video=video, codec=CodecConfig(channels=5), text=TextConfig(width=12), image_size=(48, 48)
  )
  source = open_source(src)
  assert make_plan(FAMILIES['wan-dit'], source, fitting).fields == public.DIT
  message = refusal('wan-dit', src, config=ModelConfig())
  for line in (
    'model.video.width: expected 128 (the experiment), got 24 (the checkpoint).',
    'model.video.layers: expected 4',
    'model.codec.channels: expected 96',
    'model.text.width: expected 64',
  ):
    assert line in message
  del tensors['proj_out.bias']
  public.write_checkpoint(src, tensors)
  message = refusal('wan-dit', src, config=ModelConfig())
  assert 'model.video.width' in message and 'proj_out.bias: missing' in message


def test_a_second_name_with_other_values_is_refused(tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'src', 'umt5')
  tensors['encoder.embed_tokens.weight'] = tensors['shared.weight'] + 1
  public.write_checkpoint(src, tensors)
  assert 'encoder.embed_tokens.weight: expected a copy of shared.weight' in refusal('umt5', src)


def test_the_tokenizer_is_found_or_asked_for(tmp_path):
  src, _ = public.small_checkpoint(tmp_path / 'a' / 'text_encoder', 'umt5')
  (src / 'tokenizer.json').unlink()
  source = open_source(src)
  path, problems = find_tokenizer(source, None)
  assert path is None and 'google/umt5-xxl/tokenizer.json' in problems[0]
  assert '--tokenizer FILE' in refusal('umt5', src, further=problems)
  beside = public.write_tokenizer(tmp_path / 'a' / 'tokenizer')
  assert find_tokenizer(source, None)[0].resolve() == beside
  assert find_tokenizer(source, str(beside))[0] == beside
  assert find_tokenizer(source, str(beside.parent))[0] == beside
  beside.write_text('{"not": "one"}')
  assert 'expected the tokenizer' in find_tokenizer(source, str(beside))[1][0]


def test_a_pipeline_folder_leads_to_its_component(tmp_path):
  public.small_checkpoint(tmp_path / 'pipeline' / 'transformer', 'wan-dit')
  public.small_checkpoint(tmp_path / 'pipeline' / 'vae', 'wan-vae')
  for family in ('wan-dit', 'wan-vae'):
    plan = make_plan(
      FAMILIES[family], open_source(tmp_path / 'pipeline', FAMILIES[family].subfolder)
    )
    assert json.loads(json.dumps(plan.fields)) == json.loads(json.dumps(public.SMALL[family]))


def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch):
  src, _ = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  plan = make_plan(FAMILIES['wan-dit'], open_source(src))

  def fail(done, total):
    if done > total // 2:
      raise OSError('the drive fell off')

  with pytest.raises(OSError, match='fell off'):
    import_weights(plan, tmp_path / 'out', {}, progress=fail)
  assert [p.name for p in tmp_path.iterdir()] == ['src']


def test_a_full_disk_is_a_checkpoint_error_and_leaves_nothing(tmp_path, monkeypatch):
  src, _ = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  plan = make_plan(FAMILIES['wan-dit'], open_source(src))

  async def full(*_, **__):
    raise ValueError('RESOURCE_EXHAUSTED: No space left on device')

  monkeypatch.setattr(weights.arrays.ts, 'open', full)
  with pytest.raises(CheckpointError, match='No space left'):
    import_weights(plan, tmp_path / 'out', {})
  assert [p.name for p in tmp_path.iterdir()] == ['src']


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
  left = tmp_path / '.out.partial' / 'params'
  left.mkdir(parents=True)
  (left / 'half').write_text('x')
  with weights.new_folder(tmp_path / 'out') as folder:
    assert not list(folder.iterdir())
    (folder / 'whole').write_text('y')
    with pytest.raises(CheckpointError, match='another run is writing'):
      with weights.new_folder(tmp_path / 'out'):
        pass
  assert sorted(p.name for p in tmp_path.rglob('*')) == ['out', 'whole']


def test_an_existing_folder_is_not_written_over(tmp_path):
  src, _ = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  plan = make_plan(FAMILIES['wan-dit'], open_source(src))
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').write_text('keep')
  with pytest.raises(CheckpointError, match='expected a new folder'):
    import_weights(plan, tmp_path / 'out', {})
  assert (tmp_path / 'out' / 'mine').read_text() == 'keep'


def test_a_mesh_that_does_not_divide_is_refused_before_writing(tmp_path):
  src, _ = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  plan = make_plan(FAMILIES['wan-dit'], open_source(src))
  with pytest.raises(ConfigError, match='not divisible by 7'):
    import_weights(plan, tmp_path / 'out', {'fsdp': 7})
  assert [p.name for p in tmp_path.iterdir()] == ['src']


def test_bfloat16_tensors_are_views_of_the_file(tmp_path):
  from wallwm_jax.convert.source import MappedFile

  x = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)
  safetensors.numpy.save_file({'x': x}, tmp_path / 'x.safetensors')
  source = open_source(tmp_path / 'x.safetensors')
  y = MappedFile(source.files[0]).array(source.tensors['x'])
  assert public.same_bits(x, y) and not y.flags.owndata and not y.flags.writeable
