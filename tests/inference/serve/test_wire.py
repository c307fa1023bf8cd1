"""The bytes of both dialects, and that nonsense is refused by name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wallwm_jax.inference.serve.wire import NUMPY, OPENPI, decode, encode
from wallwm_jax.types import DataError

# Made with openpi-client 0.1.1 and msgpack-numpy 0.4.8.
GOLDEN = {
  'array': (
    np.arange(3, dtype='<f4'),
    OPENPI,
    '84c40b5f5f6e6461727261795f5fc3c40464617461c40c000000000000803f00000040c4056474797065a33c6634'
    'c40573686170659103',
  ),
  'scalar': (
    np.float32(1.5),
    OPENPI,
    '83c40d5f5f6e7067656e657269635f5fc3c40464617461cb3ff8000000000000c4056474797065a33c6634',
  ),
  'reply': (
    {'actions': np.zeros((1, 2), 'u1')},
    OPENPI,
    '81a7616374696f6e7384c40b5f5f6e6461727261795f5fc3c40464617461c4020000c4056474797065a37c7531c4'
    '057368617065920102',
  ),
  'other': (
    np.arange(3, dtype='<f4'),
    NUMPY,
    '85c4026e64c3c40474797065a33c6634c4046b696e64c400c40573686170659103c40464617461c40c00000000000'
    '0803f00000040',
  ),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_bytes_are_those_of_the_published_clients(name):
  value, style, golden = GOLDEN[name]
  assert encode(value, style).hex() == golden
  found, met = decode(bytes.fromhex(golden))
  assert met == style
  np.testing.assert_equal(found, value)


DTYPES = st.sampled_from(['<f4', '<f8', '>i2', '|u1', '|b1', '<i8', '<U3', '|S2', '<f2'])


@settings(deadline=None, max_examples=100)
@given(
  hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0)), st.sampled_from([OPENPI, NUMPY])
)
def test_arrays_come_back(x, style):
  message = {'a': x, 'rows': [1, 'two', None, 3.0, True], 'b': {'c': x.T.copy().T}}
  found, met = decode(encode(message, style))
  assert met == style
  for got in (found['a'], found['b']['c']):
    np.testing.assert_array_equal(got, x)
    assert got.dtype == x.dtype and got.shape == x.shape
  assert found['rows'] == message['rows']


def array(**changes):
  fields = {'dtype': '<f4', 'data': b'', 'shape': [0]} | changes
  return encode({b'__ndarray__': True} | {k.encode(): v for k, v in fields.items()})


@pytest.mark.parametrize(
  'frame, message',
  [
    (b'', 'expected one msgpack message'),
    (b'\xc1', 'expected one msgpack message'),
    (b'\x81\xa1a', 'expected one msgpack message'),
    (b'\x01\x02', 'expected one msgpack message'),
    (encode({b'__ndarray__': True}), 'expected a dtype'),
    (array(dtype='|O'), 'expected a dtype'),
    (array(data=b'abc'), '0 bytes'),
    (array(shape=[-1]), 'shape of sizes'),
    (array(shape=[2**62, 2**62]), 'bytes'),
    (encode({b'__npgeneric__': True, b'dtype': '<f4', b'data': 'x'}), 'expected a value'),
    (encode({b'nd': True}), 'expected a dtype'),
  ],
)
def test_nonsense_is_refused(frame, message):
  with pytest.raises(DataError, match=message):
    decode(frame)


def test_two_encodings_in_one_message_are_refused():
  other = {b'nd': True, b'type': '<f4', b'kind': b'', b'shape': [0], b'data': b''}
  with pytest.raises(DataError, match='one encoding'):
    decode(encode({'a': np.ones(2), 'b': other}))


def test_what_has_no_encoding_is_refused():
  import ml_dtypes

  for value in (np.ones(2, ml_dtypes.bfloat16), np.array([object()]), np.ones(2, complex)):
    with pytest.raises(DataError, match='Unsupported dtype'):
      encode({'actions': value})
  with pytest.raises(DataError, match='got set'):
    encode({'actions': {1}})


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(frame):
  try:
    decode(frame)
  except DataError:
    pass
