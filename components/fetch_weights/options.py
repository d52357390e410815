"""The options of fetch_weights."""

from dataclasses import dataclass

from components.fetch_weights.plan import canonical_size, make_plan
from zhllama.artifacts.manifest import Input, digest_of
from zhllama.errors import InputError
from zhllama.stage.options import NotKeyed, StageOptions


@dataclass(frozen=True, kw_only=True)
class FetchWeights(StageOptions):
    """Fetch weights (Meta's, a Hugging Face model's, a GGUF, an adapter's), verify and publish them as they are."""

    # the address says nothing about the result; what is listed there does (more_inputs)
    source: NotKeyed[str]
    """s3://bucket/prefix, https://host/folder, a folder, or a Hugging Face repository: owner/name or hf://owner/name.
    Of a GGUF, the file's own address (hf://owner/name/model.gguf); of one that was cut into parts, any part's."""
    size: str = ""
    """7b, 13b, 30b (or 33b), 65b: checked against the published SHA-256; any other name, or none: other weights of
    Meta's layout, unless params.json is a published one. Not needed for Hugging Face models and adapters."""
    expect: NotKeyed[str] = ""
    """A sha256sums file (path, s3:// or https:// address): each file of weights must be in it and agree with it."""
    parallel: NotKeyed[int] = 8
    """Parts of 16 MiB fetched side by side, of one file and of several; two more wait in memory."""

    def __post_init__(self) -> None:
        canonical_size(self.size)
        if not self.source:
            raise InputError("--source: empty; give s3://bucket/prefix, https://host/folder, a folder, or owner/name")
        if self.parallel < 1:
            raise InputError(f"--parallel {self.parallel}: at least one part is fetched at a time; give 1 or more")

    def more_inputs(self) -> dict[str, Input]:
        plan = make_plan(self.source, self.size, self.expect)
        listed: list[list[str | int | None]] = []
        for item in plan.items:
            sums = [item.sums[kind][0] if kind in item.sums else None for kind in ("sha256", "md5")]
            listed.append([item.name, item.found.size, item.found.tag, *sums])
        return {"source": Input(plan.source.address, digest_of(listed))}
