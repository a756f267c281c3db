"""Decoding with drafters inside transformers' `generate`: a `Decoder` replaces its decoding loop.

    model.generate(**inputs, custom_generate=decoder)     # one call
    model.generate(**inputs, custom_generate=hedgespec.custom_generate(decoder, streamer=streamer))
    hedgespec.accelerate(model, drafters)                 # every later call, also by a `pipeline`
    hedgespec.restore(model)

`generate` prepares inputs, processors and criteria. They are called as in plain decoding: the processors once for every emitted
token, then the criteria, in order, so that both may keep state. In a batch they are called with all rows. If a processor keeps
state, the rows of a batch advance in step, by the length of the shortest accepted draft. Stateless processors of transformers
are applied row by row, and to the drafters' logits as well; so is any other processor with a true attribute `stateless`, by
which it declares that it keeps nothing from call to call and treats every row by itself.

`entry.py` has the public functions, `loop.py` the decoding loop, `checks.py` what is refused, `processors.py` and
`batch_steps.py` processors and criteria, `results.py` what is returned.
"""

from __future__ import annotations

from hedgespec.integrations.transformers.entry import accelerate, custom_generate, restore
from hedgespec.integrations.transformers.loop import decode
from hedgespec.integrations.transformers.results import HedgeSpecOutput

__all__ = ["HedgeSpecOutput", "accelerate", "custom_generate", "decode", "restore"]
