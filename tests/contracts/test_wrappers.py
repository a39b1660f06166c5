"""The contract of every wrapper: a file in predict/wrappers/ is tested by being there."""

import inspect

import pytest
import torch
from torch import Tensor

from helpers.models import tiny_model
from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall, drive, gather
from sfumato.diffuse.run import SeededNoise, Step, sampler_coroutine
from sfumato.errors import UserError
from sfumato.predict.denoiser import evaluate_calls
from sfumato.predict.guidance.guide import guide
from sfumato.predict.guidance.rules.linear import Linear
from sfumato.predict.guidance.weights.constant import Constant
from sfumato.registry import find, names
from sfumato.types import Prediction

WRAPPERS = {name: find("predict.wrappers", name) for name in names("predict.wrappers")}
every = pytest.mark.parametrize("name", WRAPPERS)
MODEL = tiny_model("flow")
SCHEDULE = MODEL.denoiser.process.schedule
SHAPE = (2, 8, 8)


def guided(prompts: list[str], weight: float = 2.0) -> DenoiseFn:
    conditioning, null = MODEL.conditioner(prompts), MODEL.conditioner([None] * len(prompts))
    return guide(
        MODEL.denoiser,
        conditioning,
        [(MODEL.denoiser, null)],
        Constant(weight),
        Linear(),
        SCHEDULE.point,
    )


def off(name: str, ask: DenoiseFn, x: Tensor) -> DenoiseFn:
    return WRAPPERS[name](
        ask, **vars(inspect.getmodule(WRAPPERS[name]))["identity_settings"](x, SCHEDULE.point)
    )


def begin(
    sampler: str, ask: DenoiseFn, seeds: list[int], steps: list[Step]
) -> DenoiseCalls[Tensor | None]:
    draw = SeededNoise(SHAPE, seeds)
    return sampler_coroutine(
        find("diffuse.samplers", sampler)(draw(), MODEL.times(4), SCHEDULE, draw),
        ask,
        4,
        steps.append,
    )


def test_the_folder_is_the_registry() -> None:
    assert {"known_region", "multidiffusion", "feature_cache"} <= WRAPPERS.keys()


@every
def test_a_wrapper_is_a_function_of_denoisers_that_cites_its_source(name: str) -> None:
    inside = inspect.unwrap(WRAPPERS[name])
    assert inspect.isfunction(inside) and inside.__name__ == name and inside.__doc__
    assert next(iter(inspect.signature(inside).parameters)) == "denoise"
    module = inspect.getmodule(inside)
    assert module is not None and module.__doc__ and "arXiv" in module.__doc__
    assert (
        list(inspect.signature(module.identity_settings).parameters) == ["x", "point"]
        and module.identity_settings.__doc__
    )
    # no state
    assert not [
        k
        for k, v in vars(module).items()
        if isinstance(v, list | dict | set | Tensor) and not k.startswith("__")
    ]


@every
@pytest.mark.parametrize("sampler", ["ddim", "heun", "ddpm"])
@torch.inference_mode()
def test_off_it_changes_no_bit_and_no_call(name: str, sampler: str) -> None:
    x, prompts = torch.zeros(2, *SHAPE), ["bag", "ankle boot"]
    seen: list[tuple[list[int], list[Step], Tensor]] = []
    for ask in (guided(prompts), off(name, guided(prompts), x)):
        batches: list[int] = []
        steps: list[Step] = []
        result = drive(
            begin(sampler, ask, [3, 4], steps),
            lambda queries, batches=batches: (
                batches.append(len(queries)),
                evaluate_calls(queries),
            )[1],
        )
        seen.append((batches, steps, result))
    (batches, steps, result), (batches_too, steps_too, result_too) = seen
    assert batches == batches_too and torch.equal(result, result_too)
    for step, other in zip(steps, steps_too, strict=True):
        assert torch.equal(step.prediction.x0, other.prediction.x0) and torch.equal(
            step.prediction.eps, other.prediction.eps
        )


@pytest.mark.invariance
@every
@torch.inference_mode()
def test_runs_put_together_are_the_runs_alone(name: str) -> None:
    x = torch.zeros(1, *SHAPE)

    def run(k: int) -> DenoiseCalls[Tensor | None]:
        return begin("ddim", off(name, guided([["bag"], ["t-shirt/top"]][k]), x), [k], [])

    # rounding: convolutions choose their algorithm by the batch
    both = drive(gather([run(0), run(1)]), evaluate_calls)
    assert all(torch.allclose(both[k], drive(run(k), evaluate_calls), atol=1e-3) for k in range(2))
    assert not torch.allclose(both[0], both[1], atol=0.1)


@every
def test_tensors_that_come_in_are_not_written_to(name: str) -> None:
    x, copies = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)), []

    def remembered(queries: list[DenoiserCall]) -> list[Prediction]:
        result = evaluate_calls(queries)
        copies.extend((p, p.x0.clone(), p.eps.clone()) for p in result)
        return result

    before = x.clone()
    drive(off(name, guided(["bag"]), x)(x, 0.7), remembered)
    assert torch.equal(x, before)
    assert all(torch.equal(p.x0, x0) and torch.equal(p.eps, eps) for p, x0, eps in copies)


@every
def test_inner_denoisers_are_closed_and_their_errors_propagate(name: str) -> None:
    closed: list[bool] = []
    x = torch.zeros(1, *SHAPE)

    def ask(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        try:
            if t < 0.5:
                raise UserError("too late")
            return (yield [DenoiserCall(MODEL.denoiser, x, t, MODEL.conditioner(["bag"]))])[0]
        finally:
            closed.append(True)

    questions = off(name, ask, x)(x, 0.7)
    assert len(next(questions)) == 1 and not closed
    questions.close()
    assert closed == [True]
    with pytest.raises(UserError, match="too late"):
        next(off(name, ask, x)(x, 0.2))
