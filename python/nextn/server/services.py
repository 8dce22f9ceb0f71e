"""What the endpoints work with: one frozen object, made once and handed to every router."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from nextn.config.server_args import ServerArgs
from nextn.server.engine_client import EngineClient
from nextn.server.errors import invalid, model_not_found
from nextn.server.metrics import Metrics
from nextn.server.proving import ProvingLine
from nextn.server.sampling import SamplingDefaults
from nextn.text.grammar_compiler import GrammarProver
from nextn.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Services:
    """The server's parts and its configuration.

    tokenizer: None under --skip-tokenizer-init: token ids in and out only
    prover: tries grammars before the engine gets them
    proving: where what the prover has to compile waits
    defaults: sampling parameters for requests that do not say
    """

    args: ServerArgs
    model_path: str
    served_model_name: str
    engine: EngineClient
    metrics: Metrics
    tokenizer: Tokenizer | None
    prover: GrammarProver
    proving: ProvingLine = field(default_factory=ProvingLine)
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    created: int = field(default_factory=lambda: int(time.time()))
    seeds: random.Random = field(default_factory=random.Random)

    def require_tokenizer(self, param: str | None = None, instead: str = "use 'input_ids' of /generate") -> Tokenizer:
        """The tokenizer, or 400 where the server was started without.

        param: the field that needs one, if it is not the whole endpoint
        instead: what to do
        """
        if self.tokenizer is None:
            what = "This endpoint" if param is None else f"'{param}'"
            message = f"{what} needs a tokenizer, and this server was started with --skip-tokenizer-init; {instead}."
            raise invalid(message, param, "no_tokenizer")
        return self.tokenizer

    def check_grammar(self, grammar: str, *, at_once: bool = False) -> None:
        """Raises RequestError where the engine could not hold an output to it. at_once: see ``GrammarProver.check``"""
        ready = self.engine.require_ready()
        self.prover.check(grammar, ready.vocab_size, ready.eos_token_ids, at_once=at_once)

    def translate_grammar(self, ebnf: str, *, at_once: bool = False) -> str:
        """It in Lark. Raises RequestError where it is no grammar. at_once: see ``GrammarProver.check``"""
        ready = self.engine.require_ready()
        return self.prover.to_lark(ebnf, ready.vocab_size, ready.eos_token_ids, at_once=at_once)

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served; a request may leave the name out."""
        if name is not None and name != self.served_model_name:
            raise model_not_found(name, self.served_model_name)

    def new_seed(self) -> int:
        return self.seeds.getrandbits(63)

    def new_id(self, prefix: str) -> str:
        return f"{prefix}-{random.getrandbits(128):032x}"
