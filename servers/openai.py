"""Any other server that speaks the OpenAI API: attach only.

Nothing is asked that the API does not name, no metrics page is known, and whether a chunk is a
decode step cannot be told: acceptance is a range there, unless the stream itself tells more. Must
not: import the openai SDK, launch.
"""

from __future__ import annotations

from loadgen.protocol import chat_wire, completions_wire
from loadgen.types import Engine

ENGINE = Engine(
    name="openai",
    wires={"completions": completions_wire({}), "chat": chat_wire({})},
    chunk_is_step=None,
    verified="what the server honours is found by asking it; no one server was verified",
)
