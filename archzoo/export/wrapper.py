"""What makes a one-file model one of Hugging Face's: text that follows the model's own source.

It is a text and no code, for transformers is not among archzoo's dependencies.
"""

IMPORTS = """\
import inspect
from dataclasses import dataclass

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
"""

WRAPPER = '''\
# ---------------------------------------- for Hugging Face's transformers
class ArchzooConfig(PreTrainedConfig):
    """The sizes that the model is built with."""

    model_type = "archzoo"
    attribute_map = {
        "hidden_size": "dim",
        "intermediate_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context_length",
    }

    def __init__(
        self,
        arguments: dict[str, Any] | None = None,  # of Decoder
        context_length: int | None = None,  # tokens of the longest text in training
        **kwargs: Any,
    ) -> None:
        self.arguments = dict(arguments or DECODER)
        self.context_length = context_length
        for name in ("vocab_size", "dim", "depth", "heads", "width"):
            setattr(self, name, self.arguments[name])
        kwargs.setdefault("tie_word_embeddings", bool(self.arguments.get("tie_weights")))
        super().__init__(**kwargs)


class StateCache:
    """The state of a model as what `generate` calls its cache: of constant size where it recurs."""

    is_compileable, is_linear, is_croppable = False, [False], False

    def __init__(self, state: State) -> None:
        self.state, self.length = state, 0

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens that were read."""
        return self.length

    def reorder_cache(self, rows: Tensor) -> None:
        """Pick rows, as beam search does."""
        self.state = reorder(self.state, rows)


CACHE = (  # what this version of transformers calls it
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


@dataclass
class ArchzooOutput(ModelOutput):
    """What a call gives, the state by the name that transformers has for it."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None


class ArchzooForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder for `AutoModelForCausalLM`; its weights go by the decoder's names."""

    config_class = ArchzooConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # what was read cannot be taken back
    _no_split_modules = ["Block"]  # noqa: RUF012  # where device_map shares layers out
    _tied_weights_keys = TIED

    def __init__(self, config: ArchzooConfig) -> None:
        super().__init__(config)
        self.model = Decoder(**config.arguments)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # the decoder has drawn them

    def get_input_embeddings(self) -> Any:
        return self.model.embedding

    def get_output_embeddings(self) -> Any:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,  # (batch, tokens so far), 0 at padding
        labels: Tensor | None = None,  # as input_ids, -100 where there is none
        cache: StateCache | None = None,
        past_key_values: StateCache | None = None,  # the same, by its older name
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> ArchzooOutput:
        """Logits of the token after each token, and with labels the loss of predicting them."""
        if any(weight.is_meta for weight in self.parameters()):
            raise ValueError("weights are offloaded: take a device_map that keeps all in memory")
        cache = past_key_values if cache is None else cache
        keep = use_cache if use_cache is not None else cache is not None
        if cache is None and keep:
            cache = StateCache(self.model.init_state(len(input_ids), input_ids.device))
        seen = input_ids < self.config.vocab_size  # a token for padding may lie behind it
        if attention_mask is not None:
            seen = seen & attention_mask[:, -input_ids.shape[1] :].bool()
        documents = None
        if not seen.all():  # once rows are padded the state knows
            documents, input_ids = torch.where(seen, 0, -1), input_ids.masked_fill(~seen, 0)
        state = None if cache is None else cache.state
        logits, state, aux = self.model(input_ids, state, documents)
        if cache is not None:
            cache.state, cache.length = state, cache.length + input_ids.shape[1]
        loss = None
        if labels is not None:
            wide = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(wide, labels[:, 1:].flatten().to(wide.device))
            if self.training:  # a mixture of experts adds what balances it
                loss = loss + sum(sum(layer.losses.values()) for layer in aux if layer)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return ArchzooOutput(loss, logits, **{CACHE: cache if keep else None})

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The first call makes the state."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the state has not seen of a text, or all of it without one."""
        state = kwargs.get(CACHE)
        if state is not None:
            input_ids = input_ids[:, state.length :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": True if use_cache is None else use_cache,
            CACHE: state,
        }
'''
