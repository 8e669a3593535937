"""From a plan's data to the micro-batches of one process: samples of the base model beside it, buckets, the cache.

Everything here is collective and may take long: sizes are read, and what a cache lacks is encoded.
"""

from typing import Any

import torch

from difftrain.cache import CachedDataset, build_cache
from difftrain.captions import Captions
from difftrain.data.buckets import BucketPlan
from difftrain.data.facts import left_out
from difftrain.data.items import ImageStream
from difftrain.data.loader import Loader
from difftrain.distributed import is_main
from difftrain.entry import say
from difftrain.pipelines.text_conditioning import TextConditioning
from difftrain.pipelines.truncation import truncated, truncated_captions
from difftrain.plan import Plan
from difftrain.prior import PriorImages, WithPrior

CPU = torch.device("cpu")


def loader_of(plan: Plan, process_index: int, num_processes: int, device: torch.device = CPU, prior: PriorImages | None = None) -> Loader:
    """The loader of one process. device: where what the cache lacks is encoded. prior: samples of the base model, if there are any."""
    recipe, data, buckets = plan.recipe, plan.data, None
    if prior is not None and plan.prior is not None and not isinstance(data, ImageStream):
        data = WithPrior(data, prior, plan.prior.weight)
    if recipe.buckets is not None:
        buckets = recipe.buckets.build().plan(data, plan.transform, recipe.seed, plan.training.batch_size)
        say(buckets.table())
    if is_main():
        tell_unseen(plan)
    loading = recipe.loader.build()
    return Loader(
        data if plan.cache is None else cached(plan, data, buckets, device), plan.transform, seed=recipe.seed,
        batch_size=plan.training.batch_size, micro_batch_size=plan.training.micro_batch_of(num_processes), process_index=process_index,
        num_processes=num_processes, captions=plan.captions, buckets=buckets, num_workers=loading.num_workers, on_error=loading.on_error,
    )


def tell_unseen(plan: Plan) -> None:
    for line in left_out(plan.data):
        say(f"data: {line}")
    for line in cut_off(plan):
        say(f"text: {line}")


def cut_off(plan: Plan) -> list[str]:
    """What text encoders do not read of captions and prompts, a sentence for each place where they come from."""
    if plan.pipeline is None or plan.captions is None:
        return []
    tokenize = plan.pipeline.tokenize
    prompts = {"sampling.prompts": plan.sampling.prompts, "prior.prompts": plan.prior.prompts if plan.prior is not None else None}
    found = [] if isinstance(plan.data, ImageStream) else [truncated_captions(plan.data, plan.captions, tokenize)]
    found += [truncated(texts or [], tokenize, key) for key, texts in prompts.items()]
    if plan.held_out is not None:
        found.append(truncated_captions(plan.held_out, Captions(), tokenize, "captions of validation.data"))
    return [line for line in found if line is not None]


def cached(plan: Plan, data: Any, buckets: BucketPlan | None, device: torch.device) -> CachedDataset:
    """The data with latents and states of captions from the cache. Text encoders go again, when nothing is left for them to do."""
    assert plan.cache is not None
    text = plan.pipeline.text if plan.pipeline is not None and plan.caches_text else None
    if plan.trains_text and plan.cache.text:
        say("cache: text encoders train, so what they make of captions is not cached")
    on_error = plan.recipe.loader.arguments["on_error"]
    made = build_cache(data, plan.transform, plan.encoder, text, plan.captions, plan.cache, buckets, device, on_error)
    if text is not None and isinstance(plan.conditioning, TextConditioning) and plan.pipeline is not None:
        plan.conditioning.to(device).remember()
        plan.pipeline.release_text()
    return made
