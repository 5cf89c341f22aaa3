"""Layouts of known families, ready to use: tables of rows, and one matcher."""

from jpeft_interop.ready.ready import ready_layout as ready_layout
from jpeft_interop.ready.ready import ready_names as ready_names
