"""Stand-in for ByteLevelEncoder until that is merged."""

import hashlib
import json

from zhllama.tokenizer.vocabulary import Vocabulary


class StandIn:
    def __init__(self, artifact):
        from tokenizers import Tokenizer

        self._files = {name: artifact.read(name) for name in artifact.names}
        self._tokenizer = Tokenizer.from_str(self._files["tokenizer.json"].decode())
        self.size = self._tokenizer.get_vocab_size()
        config = json.loads(self._files["tokenizer_config.json"])
        ids = {n: self._tokenizer.token_to_id(config.get(f"{n}_token", "")) for n in ("bos", "eos", "pad")}
        self.bos, self.eos, self.pad = ids.values()
        self.named_pad = self.pad
        self.model = b""

    def vocabulary(self, **facts):
        return Vocabulary(
            self.size,
            hashlib.sha256(self._files["tokenizer.json"]).hexdigest(),
            self.bos,
            self.eos,
            self.pad,
            {},
            **facts,
        )

    def files(self, length, template):
        config = json.loads(self._files["tokenizer_config.json"]) | {
            "chat_template": template,
            "model_max_length": length,
        }
        return {"tokenizer.json": self._files["tokenizer.json"], "tokenizer_config.json": json.dumps(config).encode()}
