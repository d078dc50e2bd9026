"""Models of x-transformers under the names and methods of Hugging Face's, so that all that loads those loads these.

A folder holds ``model.safetensors``, the tensors of ``module.state_dict()``, and a ``config.json`` that names the
module and its arguments, of which some are modules themselves::

    {"model_type": "x-transformers", "module": "TransformerWrapper",
     "arguments": {"num_tokens": 32000, "max_seq_len": 2048,
                   "attn_layers": {"module": "Decoder", "arguments": {"dim": 512, "depth": 8, "heads": 8}}}}
"""

from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from dpo_ds.errors import UserError, first_line


class XTransformerConfig(PretrainedConfig):  # type: ignore[misc]
    """What a module of x-transformers is made with."""

    model_type = "x-transformers"

    def __init__(
        self, module: str = "TransformerWrapper", arguments: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Describes a model.

        Args:
            module: name of the outer module, which is always that one.
            arguments: its arguments by name; a module among them is ``{"module": name, "arguments": {...}}``.
            kwargs: what every config may hold.
        """
        self.module, self.arguments = module, arguments or {}
        self.vocab_size, self.max_position_embeddings = (self.arguments.get(of) for of in ("num_tokens", "max_seq_len"))
        self.hidden_size, self.num_attention_heads = self._layers.get("dim"), self._layers.get("heads", 8)
        super().__init__(**kwargs | {"tie_word_embeddings": self.arguments.get("tie_embedding", False)})
        if self.tie_word_embeddings:
            self.logit_scale = self.arguments.get("tie_embedding_scale") or (self.hidden_size or 1) ** -0.5

    @property
    def _layers(self) -> dict[str, Any]:
        described: dict[str, Any] = self.arguments.get("attn_layers", {}).get("arguments", {})
        return described

    @property
    def num_hidden_layers(self) -> int | None:
        """The depth among the arguments, which changes with it."""
        return self._layers.get("depth")

    @num_hidden_layers.setter
    def num_hidden_layers(self, depth: int) -> None:
        self._layers["depth"] = depth


class XTransformerForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A ``TransformerWrapper`` around a ``Decoder``. Its weights' names are those in an ``AutoregressiveWrapper``."""

    config_class = XTransformerConfig
    base_model_prefix = "net"

    def __init__(self, config: XTransformerConfig) -> None:
        """Builds the module.

        Raises:
            UserError: x-transformers is not installed, or the config's module cannot be built.
        """
        super().__init__(config)
        self.net = _built(config)
        if config.tie_word_embeddings:
            embedding = self.get_input_embeddings()
            self.lm_head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
            self._tied_weights_keys = {"lm_head.weight": "net.token_emb.emb.weight"}
            # The module's own multiplies by a weight that may be sharded; to call the head gathers it.
            self.net.to_logits = self._tied_logits  # type: ignore[assignment]
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Returns the logits, ``(batch, length, vocab)``, as the module itself computes them.

        Args:
            input_ids: ``(batch, length)``.
            attention_mask: ``(batch, length)``, 0 on padding, which is to the left; None: none.
        """
        starts = {} if attention_mask is None else {"seq_start_pos": (1 - attention_mask).sum(-1)}
        return CausalLMOutput(logits=self.net(input_ids, return_embeddings=False, **starts))

    def _tied_logits(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.lm_head(hidden) * self.config.logit_scale)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        """Returns the arguments of ``forward``, which keeps nothing from one token to the next."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the embedding of tokens."""
        return cast(nn.Embedding, self.net.get_submodule("token_emb.emb"))

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the head; None where it is no linear layer."""
        head = self.lm_head if self.config.tie_word_embeddings else self.net.to_logits
        return head if isinstance(head, nn.Linear) else None


def register() -> None:
    """Makes the kind known to ``AutoConfig`` and ``AutoModelForCausalLM``."""
    AutoConfig.register(XTransformerConfig.model_type, XTransformerConfig)
    AutoModelForCausalLM.register(XTransformerConfig, XTransformerForCausalLM)


def _built(config: XTransformerConfig) -> nn.Module:
    described = {"module": config.module, "arguments": config.arguments}
    if config.module != "TransformerWrapper" or _named(config.arguments.get("attn_layers")) != "Decoder":
        raise UserError("a model of x-transformers must be a TransformerWrapper whose attn_layers are a Decoder")
    try:
        model = _module(described, outer=True)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"x-transformers cannot build the model of config.json: {first_line(error)}") from error
    if model.sigsoftmax_logits or model.to_mixture is not None or model.has_multiple_heads:
        raise UserError(
            "a model of x-transformers must have one softmax of one linear head: "
            "no sigsoftmax_logits, mixture_of_softmax or num_output_heads"
        )
    return model


def _named(value: object) -> str | None:
    return value.get("module") if isinstance(value, dict) else None


def _module(described: dict[str, Any], *, outer: bool = False) -> nn.Module:
    """Builds a module from its name and arguments, and first the modules among these."""
    kind = _backbone() if outer else getattr(_library(), described["module"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"x-transformers has no module {described['module']}, which config.json names")
    arguments = described.get("arguments", {})
    built = {name: _module(value) if _named(value) else value for name, value in arguments.items()}
    return kind(**built)


def _library() -> Any:
    try:
        import x_transformers
    except ImportError as error:
        raise UserError("the model is one of x-transformers: pip install x-transformers") from error
    return x_transformers


@cache
def _backbone() -> type:
    class Backbone(_library().TransformerWrapper):  # type: ignore[misc]
        """A ``TransformerWrapper`` that is called as Hugging Face's backbones are."""

        def forward(
            self, input_ids: Tensor, *, return_embeddings: bool = True, use_cache: bool = False, **more: Any
        ) -> Tensor | BaseModelOutput:
            found = super().forward(input_ids, return_embeddings=return_embeddings, **more)
            return BaseModelOutput(last_hidden_state=found) if return_embeddings else found

    return Backbone
