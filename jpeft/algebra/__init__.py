"""Adapters as things to calculate with: pure functions from adapters to adapters."""

from jpeft.algebra.arithmetic import interpolate as interpolate
from jpeft.algebra.arithmetic import scale as scale
from jpeft.algebra.arithmetic import subtract as subtract
from jpeft.algebra.combine import combine as combine
from jpeft.algebra.convert import Converted as Converted
from jpeft.algebra.convert import shrink as shrink
from jpeft.algebra.convert import to_lora as to_lora
