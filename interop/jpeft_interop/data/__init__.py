"""From files of examples to batches: read, split, tokenise into rows, shuffle and batch."""

from jpeft_interop.data.batches import in_order as in_order
from jpeft_interop.data.batches import shuffled as shuffled
from jpeft_interop.data.errors import DataError as DataError
from jpeft_interop.data.labels import Labels as Labels
from jpeft_interop.data.labels import labels_of as labels_of
from jpeft_interop.data.read import read as read
from jpeft_interop.data.read import read_labelled as read_labelled
from jpeft_interop.data.records import Conversation as Conversation
from jpeft_interop.data.records import Document as Document
from jpeft_interop.data.records import Labelled as Labelled
from jpeft_interop.data.records import Message as Message
from jpeft_interop.data.records import Record as Record
from jpeft_interop.data.rows import IGNORE as IGNORE
from jpeft_interop.data.rows import Rows as Rows
from jpeft_interop.data.rows import packed as packed
from jpeft_interop.data.rows import padded as padded
from jpeft_interop.data.rows import size_of as size_of
from jpeft_interop.data.rows import truncated as truncated
from jpeft_interop.data.split import split as split
