"""From options to an artifact. Its place depends on all that decides its items; the answers' place (journal.py) only on
what decides the requests. So `--items 1000`, a look at the card, and `--items 50000` pay for 50,000 items once.
"""

import asyncio
import logging
import math
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from components.generate_instructions.catalogue import SCHEMA, Requests, load_catalogue
from components.generate_instructions.ledger import YIELD, Ledger, Tokens, bought, replayed, usual
from components.generate_instructions.options import GenerateInstructions
from zhllama import storage
from zhllama.artifacts.manifest import Manifest, digest_of
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.conversations import is_conversation
from zhllama.data.instructions import read_instructions
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.stage.run import REPORT

if TYPE_CHECKING:
    from components.generate_instructions.harvest import Harvest
log = logging.getLogger("generate_instructions")
INSTRUCTIONS = "instructions.json"


def generate_instructions(config: GenerateInstructions, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Asks the model, or reads the data sets, and publishes the items, the card and its page."""
    from components.generate_instructions import card
    from components.generate_instructions.dedup import Seen, question
    from components.generate_instructions.harvest import Harvest
    from components.generate_instructions.importer import import_items

    catalogue = load_catalogue()
    if own := inputs.get("catalogue"):
        names = [name for name in own.names if name.endswith((".yaml", ".yml"))]
        if len(names) != 1:
            raise InputError(f"--catalogue {config.catalogue}: {len(names)} YAML files there; give one")
        catalogue = load_catalogue(own.read(names[0]), f"--catalogue {config.catalogue}")
    seeds, against = (list(chain.from_iterable(map(read_instructions, inputs.all(of)))) for of in ("seeds", "against"))
    seen = Seen()
    if turns := next(filter(is_conversation, seeds), None):
        raise InputError(f"--seeds {turns.place}: a conversation cannot be shown as an example; give items of one turn")
    for item in (*seeds, *against):
        seen.add(question(item))
    harvest = Harvest(catalogue, seen, config.items)
    if config.import_from:
        records: Counter[str] = Counter()
        for source in inputs.all("import_from"):
            records.update(import_items(source, harvest))
        if not harvest.items:
            fell = ", ".join(f"{count:,} {rule}" for rule, count in harvest.fallen.items() if count)
            raise InputError(
                f"generate_instructions: --import-from {config.import_from}: no item is left "
                f"({fell or 'there are no records'})"
            )
        content: Mapping[str, Any] = card.imported(config, harvest, dict(records))
    else:
        content = _ask(config, seeds, harvest)
    out.add_json(INSTRUCTIONS, harvest.items)
    out.add_json("card.json", content, beside=True)
    out.add_bytes(REPORT, card.page(content).encode(), beside=True)
    out.facts["summary"] = card.summary(content)
    out.metrics = card.metrics(content)
    return out.publish("instructions")


def _ask(config: GenerateInstructions, seeds: Sequence[Mapping[str, str]], harvest: "Harvest") -> Mapping[str, Any]:
    """The card of what the model wrote."""
    from components.generate_instructions import card
    from components.generate_instructions.client import Api
    from components.generate_instructions.journal import Journal
    from components.generate_instructions.scheduler import RequestScheduler, Stopped

    budget = config.budget
    requests = Requests(harvest.catalogue, config.per_request, seeds, config.seed)
    key = _requests_key(config, requests)
    place = storage.join(storage.normalise(config.store), f"generate_instructions/answers/{key}")
    most = Tokens(requests[0].most_prompt_tokens, config.answer_tokens)
    if limit := budget.stops(Tokens(), most):
        raise InputError(
            f"generate_instructions: --{limit} holds no request: one may take {budget.said(most)}; raise it, or "
            "lower --answer-tokens and --per-request"
        )
    with Journal(place) as journal:
        ledger = replayed(journal.records)
        _announce(config, requests, ledger)
        try:
            run = RequestScheduler(Api(config), requests, journal, ledger, harvest)
            asyncio.run(run.run())
        except Stopped as stopped:
            # now that what was on its way has been kept, the signal does what it always does
            signal.raise_signal(stopped.args[0])
            raise
        finally:
            log.info("the answers are in %s: %s so far", place, budget.said(ledger.charged))
    if not harvest.items:
        samples = "".join(f"; {rule}: {texts[0]!r}" for rule, texts in harvest.samples.items() if texts)
        raise InputError(
            f"generate_instructions: {config.model} gave no usable item in {run.taken} requests; its last answer "
            f"begins {run.last_answer[:120]!r}{samples}; choose another --model, or, if the server has been mended, "
            f"another --seed: these answers are kept in {place}"
        )
    if run.ended != "items" and config.items:
        log.warning("only %d of %d items: %s", len(harvest.items), config.items, card.ENDINGS[run.ended])
    return card.generated(config, harvest, run.ended, ledger)


def _requests_key(config: GenerateInstructions, requests: Requests) -> str:
    """The name of the answers: the digest of all that decides what is asked."""
    value = {name: getattr(config, name) for name in ("model", "temperature", "answer_tokens", "per_request", "seed")}
    value |= {name: getattr(requests.catalogue, name) for name in ("request", "asked", "topics", "task_types")}
    language = str(requests.catalogue.language["name"])
    value |= {"base_url": config.base_url.rstrip("/"), "schema": SCHEMA, "language": language}
    return digest_of(value | {"seeds": requests.seeds, "first": requests[0].messages})[:32]


def _announce(config: GenerateInstructions, requests: Requests, ledger: Ledger) -> None:
    """What it will cost, about, before anything is sent."""
    budget = config.budget
    if came := len(ledger.settled):
        said = budget.said(ledger.charged)
        log.info("%d answers are here already (%s); they are not asked for again", came, said)
    size = sum(len(message["content"].encode()) for message in requests[0].messages)
    one = usual(config.per_request, size, config.answer_tokens)
    if config.items:
        count = math.ceil(config.items / (config.per_request * YIELD))
        said = budget.said(one * count)
        said += "" if budget.priced else " (give --price-prompt and --price-answer for a cost)"
        log.info("estimate for %s items: %s requests, %s", f"{config.items:,}", f"{count:,}", said)
    elif items := bought(budget, config.per_request, one):
        log.info("estimate: the limits buy about %s items", f"{items:,}")
    limits = [f"cost {config.max_cost:g}"] if config.max_cost else []
    limits += [f"{config.max_tokens:,} tokens"] if config.max_tokens else []
    if limits:
        log.info("never more than %s", " or ".join(limits))
