"""What every h264 encoder of this project is told."""

# x264's AVX-512 code (macroblock trees) reads memory that it has not written: at widths that are no
# multiple of 64 pixels up to 4 % of encodes had other bytes. Up to AVX2 all are the same.
SAME_BYTES = {'x264-params': 'asm=AVX2'}
