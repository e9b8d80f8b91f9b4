"""Writing text with a decoder, as a recurrent network or by recomputing everything.

The prompt is read in one pass into a state; then one token a step goes in, and the state comes
back. Retention's state stays as large as it was, attention's grows by a token a step. The other
forms keep nothing and read the whole text again at every step: slow, and the same to rounding,
which ``check`` proves while it writes.
"""

from __future__ import annotations

from archzoo.generation.beams import Beams, beam_search
from archzoo.generation.command import generate_command, report, state_growth
from archzoo.generation.conversation import Conversation
from archzoo.generation.decoding import FormsDisagree, Generation, difference, generate
from archzoo.generation.prompts import Prompts, encode, pad_left
from archzoo.generation.reading import Reading, read_command, read_document
from archzoo.generation.rows import OnToken
from archzoo.generation.sampling import Sampler, probabilities, sample
from archzoo.generation.state_files import load_state, save_state

__all__ = [
    "Beams",
    "Conversation",
    "FormsDisagree",
    "Generation",
    "OnToken",
    "Prompts",
    "Reading",
    "Sampler",
    "beam_search",
    "difference",
    "encode",
    "generate",
    "generate_command",
    "load_state",
    "pad_left",
    "probabilities",
    "read_command",
    "read_document",
    "report",
    "sample",
    "save_state",
    "state_growth",
]
