"""Recurrent decoding, shown: models that write the same prompt on, side by side.

What is shown is computed in ``decoding``, which knows of no screen; ``terminal`` draws it with
rich, ``web`` as a page with gradio, which is an extra and imported when the page is asked for.
"""

from __future__ import annotations

from archzoo.demo.command import demo_command

__all__ = ["demo_command"]
