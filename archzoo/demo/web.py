"""The demo as a page, for a browser on this machine; gradio is imported when it is asked for.

Nothing on the page comes from elsewhere, and nothing is reported anywhere: gradio's analytics,
its shared links, its programming interface and its uploads are switched off, and of what else it
would answer only what the page needs is let through (`Narrow`).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from archzoo.demo import page
from archzoo.demo.decoding import (
    PROMPT_LIMIT,
    AtContext,
    History,
    Side,
    at_contexts,
    compare_forms,
    decode,
    state_size,
    summary,
)
from archzoo.demo.memory import differ_by_layer, heads_by_layer, prompt_chunks

LOCAL = ("127.0.0.1", "localhost", "::1")
FRAMES = 8  # a second
TOKENS = 2_000  # that a model writes at most for a page
CONTEXTS = (64, 16_384)  # tokens: what the slider goes over
FORMS_TOKENS = 60  # that each form writes
WAITING = 16  # requests of all visitors together; the model serves one at a time

# What the page asks gradio for, and all that it may.
ASKED = ("assets", "static", "svelte", "theme.css", "config", "favicon.ico", "manifest.json", "")
ASKED_API = ("queue", "heartbeat", "startup-events")


def serve(
    sides: Sequence[Side],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    prompt: str = "",
    max_tokens: int = 250,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        sides: The models.
        host: The address that it listens on; this machine alone can reach 127.0.0.1.
        port: Of that address; 0: any that is free.
        prompt: What the page starts with, and so are the next four.
        max_tokens: The most that each model writes.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens, which the page does not change.
        seed: Of the sampling, the same for every model.

    Raises:
        ValueError: gradio is not installed, or the address cannot be used.
    """
    gradio = import_gradio()
    port = free_port(host, port)
    answers = Answers(sides, top_k)
    built = build(answers, prompt, min(max_tokens, TOKENS), temperature, seed)
    built.queue(api_open=False, max_size=WAITING, default_concurrency_limit=1)
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    guards = [Middleware(Narrow)]
    if host in LOCAL:  # a name of elsewhere that was made to lead here is refused
        hosts = ["127.0.0.1", "localhost", "[::1]", "::1"]
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts))
    built.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inbrowser=False,
        show_error=False,  # what is not a user's is written in the terminal, whole
        allowed_paths=[],
        max_file_size=1,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": guards, "docs_url": None, "redoc_url": None},
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace"]),
        css=page.CSS,
    )
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port} shows the demo; Ctrl-C ends it", flush=True)
    if host not in LOCAL:
        print(
            f"whoever can reach {host} can use it, without a password and without encryption",
            flush=True,
        )
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended")
    finally:
        built.close(verbose=False)


def import_gradio() -> Any:
    """Gradio, told to report nothing.

    Raises:
        ValueError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read at the import
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs gradio: pip install 'archzoo[demo]'") from None
    return gradio


def free_port(host: str, port: int) -> int:
    """The port, or one that is free where it is 0.

    Raises:
        ValueError: It is in use, or the address is none of this machine's.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} must lie in 0 .. 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # as the server will: a port that was just given back is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"host={host!r} port={port} cannot be listened on ({reason}): take another --port, 0 "
            "for any that is free, or --host 127.0.0.1"
        ) from None


class Narrow:
    """Middleware: answers "not found" to everything that the page does not ask for.

    Gradio would take uploads and hand out files; a page of text needs neither.

    Args:
        app: What answers the rest.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Of ASGI."""
        if scope["type"] == "http" and not asked_for(scope["path"]):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("not found", 404)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def asked_for(path: str) -> bool:
    """Whether the page asks for this path."""
    first, _, rest = path.lstrip("/").partition("/")
    if first == "gradio_api":
        return rest.partition("/")[0] in ASKED_API
    return first in ASKED


# ---------------------------------------------------------------------------- the page


def build(answers: Answers, prompt: str, max_tokens: int, temperature: float, seed: int) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        answers: To what is pressed on it.
        prompt: What it starts with, and so are the next three.
        max_tokens: The most that each model writes.
        temperature: Divides the logits before sampling.
        seed: Of the sampling.
    """
    gradio = import_gradio()
    sides = answers.sides
    # One after the other: what is timed shares the machine with nothing of ours.
    alone = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
    # A press while the one before is still answered is not lost: the last one counts.
    alone["trigger_mode"] = "always_last"
    quick: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
    quick["api_visibility"] = "private"
    several_layers = any(map(differ_by_layer, answers.layers))
    top_layer = max(len(layers) for layers in answers.layers) - 1

    with gradio.Blocks(title="archzoo demo", analytics_enabled=False, fill_width=True) as built:
        gradio.Markdown(
            "# archzoo demo\nA model with retention carries a state of constant size from token "
            "to token; attention's cache grows with each. Both continue the same prompt."
        )
        asked = gradio.Textbox(
            prompt,
            label=f"prompt, at most {PROMPT_LIMIT:,} characters",
            lines=2,
            max_length=PROMPT_LIMIT,
            elem_id="prompt",
        )
        with gradio.Row():
            count = gradio.Slider(1, TOKENS, max_tokens, step=1, label="tokens to write")
            heat = gradio.Slider(0, 2, temperature, step=0.05, label="temperature")
            start = gradio.Number(seed, label="seed", precision=0, minimum=0, maximum=2**32 - 1)
        with gradio.Row():
            go = gradio.Button("Generate", variant="primary", elem_id="generate")
            stop = gradio.Button("Stop", elem_id="stop")
        status = gradio.HTML(page.message("Generate lets the models write."), elem_id="status")
        nothing = [History() for _ in sides]
        with gradio.Row():
            cards = []
            for number, side in enumerate(sides):
                with gradio.Column(min_width=300):  # one below the other on a phone
                    drawn = page.card(number, side, "", nothing)
                    cards.append(gradio.HTML(drawn, elem_id=f"card{number}"))
        with gradio.Tab("What each head still holds"):
            gradio.Markdown(
                "The darker a token, the more of it the head's state still holds: "
                "gamma to the power of its distance from the last token."
            )
            layer = gradio.Slider(
                0, top_layer, 0, step=1, label="layer", visible=several_layers, elem_id="layer"
            )
            memories = [gradio.HTML("", elem_id=f"memory{n}") for n in range(len(sides))]
        with gradio.Tab("Context length", elem_id="contexts"):
            gradio.Markdown(
                "How large the state is after so many tokens, and how long the next one takes; "
                "the state is known at once, the time is measured."
            )
            low, high = CONTEXTS
            context = gradio.Slider(
                low, high, 1024, step=64, label="context length in tokens", elem_id="context"
            )
            with gradio.Row():
                measure = gradio.Button("Measure here", elem_id="measure")
                sweep = gradio.Button("Measure the whole curve", elem_id="sweep")
            table = gradio.HTML(answers.contexts(1024), elem_id="table")
        with gradio.Tab("Three forms, one function", elem_id="forms"):
            gradio.Markdown(
                "The parallel and the chunkwise form read the whole text at once, as in training; "
                "the recurrent form carries a state. All three must write the same."
            )
            compare = gradio.Button("Compare", elem_id="compare")
            compared = gradio.HTML("", elem_id="compared")
        texts, stopping = gradio.State([]), gradio.State(Stopping())

        outputs = [status, *cards, *memories, texts]
        inputs = [asked, count, heat, start, layer, stopping]
        for trigger in (go.click, asked.submit):
            trigger(answers.generate, inputs, outputs, show_progress="hidden", **alone)
        stop.click(answers.stop, [stopping], None, **quick)
        layer.change(answers.memories, [texts, layer], memories, **quick)
        context.change(answers.contexts, [context], table, **quick)
        for trigger in (context.release, measure.click):
            trigger(answers.measure, [context], table, **alone)
        sweep.click(answers.sweep, [context], table, **alone)
        compare.click(answers.compare, [asked, heat, start], compared, **alone)
    return built


class Stopping:
    """Whether a visitor wants what is being written to stop."""

    wanted = False


class Answers:
    """What the page's buttons and sliders are answered with.

    Args:
        sides: The models.
        top_k: Sample from the k most likely tokens.
    """

    def __init__(self, sides: Sequence[Side], top_k: int | None = None) -> None:
        self.sides, self.top_k = list(sides), top_k
        self.layers = [heads_by_layer(side.model) for side in sides]
        self.measured: list[dict[int, AtContext]] = [{} for _ in sides]
        low, high = CONTEXTS
        self.lengths = [low << power for power in range((high // low).bit_length())]
        self.curves = [
            [(float(length), float(state_size(side.model, length))) for length in self.lengths]
            for side in sides
        ]

    def generate(
        self,
        prompt: Any,
        max_tokens: Any,
        temperature: Any,
        seed: Any,
        layer: Any,
        stopping: Stopping,
    ) -> Iterator[list[Any]]:
        """The status, a card and a memory a model, and the texts' chunks, again and again.

        Args:
            prompt: Of the text field, and so are the next three of their fields.
            max_tokens: The most that each model writes.
            temperature: Divides the logits before sampling.
            seed: Of the sampling.
            layer: Whose heads are drawn.
            stopping: The visitor's, asked between two tokens.
        """
        stopping.wanted = False
        histories = [History() for _ in self.sides]
        try:
            if not 1 <= int(max_tokens) <= TOKENS:
                raise ValueError(f"tokens to write: {max_tokens} must lie in 1 .. {TOKENS:,}")
            events = decode(
                self.sides,
                prompt or "",
                max_tokens=int(max_tokens),
                temperature=float(temperature),
                top_k=self.top_k if temperature else None,
                seed=int(seed or 0),
            )
            begun = [prompt_chunks(side, prompt) for side in self.sides]

            def frame(status: str) -> list[Any]:
                cards = [
                    page.card(number, side, prompt, histories)
                    for number, side in enumerate(self.sides)
                ]
                chunks = [
                    [*first, *history.chunks]
                    for first, history in zip(begun, histories, strict=True)
                ]
                return [status, *cards, *self.memories(chunks, layer), chunks]

            drawn = 0.0
            for event in events:
                histories[event.side].add(event)
                if time.monotonic() - drawn >= 1 / FRAMES:
                    yield frame(page.message("writing ..."))
                    drawn = time.monotonic()
                if stopping.wanted:
                    break
            yield frame(page.message(" · ".join(summary(self.sides, histories))))
        except (ValueError, TypeError, RuntimeError) as error:
            yield self._refused(error)

    def _refused(self, error: Exception) -> list[Any]:
        nothing = [History() for _ in self.sides]
        cards = [page.card(number, side, "", nothing) for number, side in enumerate(self.sides)]
        return [page.error(str(error)), *cards, *[""] * len(cards), []]

    def stop(self, stopping: Stopping) -> None:
        """Let what is being written end with the next token."""
        stopping.wanted = True

    def memories(self, chunks: list[list[str]], layer: Any) -> list[str]:
        """A drawing a model of what the heads of a layer hold of its text."""
        if len(chunks) != len(self.sides):
            return [""] * len(self.sides)
        return [
            page.memory(side, text, layers[min(max(int(layer or 0), 0), len(layers) - 1)])
            for side, text, layers in zip(self.sides, chunks, self.layers, strict=True)
        ]

    def contexts(self, context: Any) -> str:
        """The table and the charts at a length of text."""
        context = _length(context)
        sizes = [state_size(side.model, context) for side in self.sides]
        return page.contexts(self.sides, context, sizes, self.measured, self.curves)

    def measure(self, context: Any) -> Iterator[str]:
        """The same, with the time of a token measured there."""
        yield from self._measure([_length(context)], context)

    def sweep(self, context: Any) -> Iterator[str]:
        """The same, with the time of a token at lengths over the slider's whole range."""
        yield from self._measure(self.lengths, context)

    def _measure(self, lengths: list[int], context: Any) -> Iterator[str]:
        for side, measured in zip(self.sides, self.measured, strict=True):
            missing = [length for length in lengths if length not in measured]
            try:
                for found in at_contexts(side, missing):
                    measured[found.context] = found
                    yield self.contexts(context)
            except (ValueError, RuntimeError) as error:
                yield page.error(f"{side.name}: {error}") + self.contexts(context)
                return
        yield self.contexts(context)

    def compare(self, prompt: Any, temperature: Any, seed: Any) -> Iterator[str]:
        """What the forms of each model write, model by model.

        Args:
            prompt: Of the text field, and so are the others of their fields.
            temperature: Divides the logits before sampling.
            seed: Of the sampling.
        """
        done = ""
        try:
            for side in self.sides:
                found = compare_forms(
                    side,
                    prompt or "",
                    max_tokens=FORMS_TOKENS,
                    temperature=float(temperature),
                    seed=int(seed or 0),
                )
                done += page.forms(side, prompt, found)
                yield done
        except (ValueError, TypeError, RuntimeError) as error:
            yield done + page.error(str(error))


def _length(context: Any) -> int:
    low, high = CONTEXTS
    return min(max(int(context), low), high)
