"""A model of the zoo behind lm-eval's interface. Needs the extra `eval`.

lm-eval (EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness) asks three things of a
model: how likely a text is after another one, how likely a text is as a whole, and what the model
writes after a prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from archzoo.checkpoint import Pretrained, check_tokenizer, load, load_adapter
from archzoo.evaluation.likelihood import Pair, Scored, log_likelihoods
from archzoo.generation import generate
from archzoo.tasks.writing import writing_of

UNKNOWN_LENGTH = 2048  # tokens that are read where a checkpoint does not say how many
SETTINGS = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks"}
NO_CONTEXT = (
    "{} has no context, so its first token has no probability: give --prefix, one token that a "
    "text of this model begins after"
)


@register_model("archzoo")
class ArchzooLM(LM):
    r"""A checkpoint of archzoo for lm-eval: likelihoods, and text by recurrent decoding.

    Text is a person's: where the model's task writes numbers otherwise, such as least significant
    digit first, requests are put as the task writes them and answers are put back.

    A text is read in windows of `max_length` tokens, as lm-eval cuts it: each token is predicted
    once, the first of all after `prefix`, and the last window begins early enough to be whole.

    Args:
        checkpoint: A run's directory, a .ckpt file, a directory of archzoo.save_pretrained or
            archzoo.save_adapter, or what `archzoo.checkpoint.load` gave.
        batch_size: Texts that are read or written at once.
        max_length: Tokens that are read of a text at once: of a longer context the beginning is
            dropped. None: the length that the model was trained on, or 2,048 where it does not say.
        prefix: What a text without a context begins after, one token. '': nothing, so that the
            first token of a text is read and not scored. None: a line end, or nothing where that
            is not one token.
        max_gen_toks: The most tokens to write where a task does not say.
        adapter: A directory of archzoo.save_adapter, which is put on the checkpoint; or several.
        base: Where the base of an adapted checkpoint lies. None: where it was.
        device: Such as cpu or cuda. None: a GPU where there is one.
        max_batch_size: For lm-eval's sake; unused.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It holds no tokenizer, or a number is out of its range.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | Pretrained,
        batch_size: int | str | None = 16,
        max_length: int | None = None,
        prefix: str | None = None,
        max_gen_toks: int = 256,
        adapter: str | Sequence[str] = (),
        base: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        found = checkpoint
        if not isinstance(found, Pretrained):
            found = load(found, device or "auto", base)
        for directory in [adapter] if isinstance(adapter, str) else adapter:
            load_adapter(directory, found.model)
        self.model = found.model
        name = "the model" if isinstance(checkpoint, Pretrained) else os.fspath(checkpoint)
        self.tokenizer = check_tokenizer(found.tokenizer, name)
        self.writing = writing_of(self.model.task)
        try:
            self.batch_size = int(16 if batch_size is None else batch_size)
        except ValueError:
            raise ValueError(f"batch_size={batch_size!r} is not a number of texts") from None
        own = self.model.context_length or UNKNOWN_LENGTH
        self.max_length = own if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        for name in ("batch_size", "max_length", "max_gen_toks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.prefix = self._prefix(prefix)
        #: Documents with a context whose beginning was dropped, by the names of their tasks.
        self.truncated: dict[str, set[int | None]] = {}

    def _prefix(self, text: str | None) -> int | None:
        """The token of a prefix; None: there is none."""
        if text == "":
            return None
        try:
            token = self.tokenizer.single("\n" if text is None else text)
        except ValueError:  # a character that it does not know
            token = None
        if token is None and text is not None:
            raise ValueError(
                f"prefix={text!r} is not one token of this model: take another, or '' for none"
            )
        return token

    @property
    def device(self) -> Any:
        return self.model.device

    # ------------------------------------------------------------------------ what lm-eval asks

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context, and whether it is the greedy one."""
        pairs = []
        for request in requests:
            with _of(request):
                pairs.append(self._cut(self.pair(*request.args), request))
        return [(s.log_likelihood, s.greedy) for s in self._score(pairs, disable_tqdm)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """How likely each text is as a whole."""
        windows = []
        for request in requests:
            with _of(request):
                windows.append(self.windows(request.args[0]))
        scored = iter(self._score([pair for each in windows for pair in each], disable_tqdm))
        return [sum(next(scored).log_likelihood for _ in each) for each in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, up to one of the task's strings."""
        alike: dict[str, list[tuple[int, list[int]]]] = {}  # (number, prompt) by their settings
        for number, request in enumerate(requests):
            with _of(request):
                settings = self._settings(request.args[1])
                prompt, limit = self._cut_prompt(request, settings["max_tokens"])
            key = json.dumps(settings | {"max_tokens": limit})
            alike.setdefault(key, []).append((number, prompt))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="writing") as bar:
            for key, rows in alike.items():
                rows.sort(key=lambda row: -len(row[1]))
                for begin in range(0, len(rows), self.batch_size):
                    some = rows[begin : begin + self.batch_size]
                    prompts = [prompt for _, prompt in some]
                    options = json.loads(key)
                    written = generate(self.model, prompts, tokenizer=self.tokenizer, **options)
                    for (number, _), text in zip(some, written.texts or [], strict=True):
                        texts[number] = text
                    bar.update(len(some))
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps beside the results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "prefix": None if self.prefix is None else self.tokenizer.decode([self.prefix]),
        }

    # ------------------------------------------------------------------------ tokens

    def pair(self, context: str, continuation: str) -> Pair:
        """The tokens of a context, and of what follows, as both are written together.

        Blanks at the end of a context are the continuation's, so that subwords that begin with a
        blank are the same as in running text.

        Raises:
            ValueError: There is no context and no prefix, or a character is not in the vocabulary.
        """
        blanks = len(context) - len(context.rstrip()) if context.strip() else 0
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        whole = self._tokens(context + continuation)
        if not context:
            if self.prefix is None:
                raise ValueError(NO_CONTEXT.format(repr(continuation[:40])))
            return [self.prefix], whole
        length = min(len(self._tokens(context)), len(whole) - 1)  # a subword may span both
        return whole[:length], whole[length:]

    def windows(self, text: str) -> list[Pair]:
        """A text in windows of `max_length` tokens, of which each token is scored in one.

        Without a prefix the first token is read and not scored.
        """
        first, tokens = self.prefix, self._tokens(text)
        if first is None and tokens:
            first, *tokens = tokens
        cut = get_rolling_token_windows(tokens, first, self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in cut]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(self.writing.write(text))

    def _cut(self, pair: Pair, request: Instance) -> Pair:
        """A pair of which at most `max_length` tokens are read; the last one never is."""
        context, continuation = pair
        spare = self.max_length + 1 - len(continuation)
        if spare < 1:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, and {self.max_length} are read at "
                f"once: --max_length {len(continuation)} reads longer texts"
            )
        if len(context) > spare:
            self._note(request)
            context = context[-spare:]
        return context, continuation

    def _note(self, request: Instance) -> None:
        self.truncated.setdefault(str(request.task_name), set()).add(request.doc_id)

    def _cut_prompt(self, request: Instance, count: int) -> tuple[list[int], int]:
        """A prompt's tokens, and how many may follow: together `max_length` at most are read.

        The prompt keeps three quarters of those, or more where the task wants fewer new ones.
        """
        tokens = self._tokens(request.args[0])
        if not tokens:
            if self.prefix is None:
                raise ValueError(NO_CONTEXT.format("a prompt"))
            tokens = [self.prefix]
        most = self.max_length + 1  # the last token that is written is not read
        spare = max(most - count, -(-3 * self.max_length // 4))
        if len(tokens) > spare:
            self._note(request)
            tokens = tokens[-spare:]
        return tokens, min(count, most - len(tokens))

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """A task's settings of generation as `generate` takes them."""
        settings = normalize_gen_kwargs(given, self.max_gen_toks)
        if unknown := settings.keys() - SETTINGS:
            raise ValueError(
                f"{', '.join(sorted(unknown))} is not a setting of generation here: there are "
                + ", ".join(sorted(SETTINGS))
            )
        until, temperature = settings["until"], float(settings.get("temperature") or 0.0)
        found = {
            "max_tokens": int(settings["max_gen_toks"]),
            "temperature": temperature,
            "until": [string for string in until if string],
        }
        return found | {
            name: settings[name]
            for name in ("top_k", "top_p")
            if temperature and settings.get(name)
        }

    def _score(self, pairs: list[Pair], disable_tqdm: bool) -> list[Scored]:
        # disable=None: no bar where the output is not a terminal.
        with tqdm(total=len(pairs), disable=disable_tqdm or None, desc="reading") as bar:
            return log_likelihoods(self.model, pairs, self.batch_size, bar.update)


@contextmanager
def _of(request: Instance) -> Iterator[None]:
    """Errors name the task that asked."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"task {request.task_name}: {error}") from error
