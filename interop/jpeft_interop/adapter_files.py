"""The core's `jpeft.adapter_files`, by the name that it has here."""

from jpeft.adapter_files import MOST as MOST
from jpeft.adapter_files import NAME as NAME
from jpeft.adapter_files import adapter_file as adapter_file
from jpeft.adapter_files import require_apart as require_apart
