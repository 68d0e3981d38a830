"""What the model is trained on: rows of tokens, with what follows each and where documents end."""

from typing import TypedDict

import numpy as np
from jaxtyping import Int32


class Batch(TypedDict):
    """Rows of one host, [B, T] each; a plain dict of numpy arrays.

    tokens_BT: ids; 0 in padding.
    labels_BT: the token that follows in the document, -1 where none is to be predicted: prompts in
      finetuning, a document's last token, padding. Of a document cut at the end of a row it is the
      first token of the next piece.
    segments_BT: number of the document within the row, from 1; 0 is padding. Tokens attend within
      their segment only.
    positions_BT: position within the piece of the document, from 0; 0 in padding.
    """

    tokens_BT: Int32[np.ndarray, "B T"]
    labels_BT: Int32[np.ndarray, "B T"]
    segments_BT: Int32[np.ndarray, "B T"]
    positions_BT: Int32[np.ndarray, "B T"]
