"""Cases of the bundled model: requests, the four acts, tasks, dtypes, errors."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from _behaviour import names
from _behaviour.outcome import Case

if TYPE_CHECKING:
    from _behaviour.context import Context

SAMPLERS = (
    "ddim:eta=0.5",
    "ddim:eta=1",
    "ddpm:variance=large",
    "deis:order=3",
    "dpm_solver_2:r1=0.3",
    "dpmpp_2m:lower_order_final=true",
    "dpmpp_2m_sde:solver=heun",
    "dpmpp_3m:published=true",
    "dpmpp_3m_sde:eta=0.5",
    "edm:churn=10",
    "euler:churn=5",
    "euler_ancestral:eta=0.5,noise_scale=0.9",
    "lms:order=2",
    "tcd:eta=0.7",
    "unipc:order=3,variant=bh1",
    "unipc:corrector=false",
)
"""Besides every sampler with the options that it has by default."""

SPACINGS = (
    "karras:rho=5",
    "shifted:shift=2",
    "linspace:drop_last=true",
    "beta:over=noise",
    "dynamic:tokens=1024",
)
"""Besides every spacing."""

GUIDANCE = (
    "1",
    "0",
    "0.5",
    "3",
    "2.5 interval:low=0.2,high=0.8",
    "4 ramp:shape=cosine,first=1,last=0",
    "4 ramp:shape=power,power=3",
    "3 adaptive:disagreement=raises",
    "7.5 rescale:phi=0.3",
    "4 project:eta=0.5,threshold=10,momentum=-0.5",
    "4 ramp project:threshold=2.5",
    "3 zero_star:zero_steps=2",
    "0.6 plus_plus",
    "3 perturbed_attention:layers=down_blocks.1",
    "2 skip_layers:layers=down_blocks.1.resnets.0",
    "2 interval:low=0.3,high=0.9 rescale skip_layers:layers=up_blocks.0.attentions.0",
    "4 dual:kind=away,second=3 condition perturbed_attention:layers=up_blocks.0",
    "4 dual:kind=away,second=3,low=0.4,high=0.8 condition skip_layers:layers=mid_block",
    "3 dual:kind=sum,second=2 condition condition",
    "3 dual:kind=chain,second=1.2 condition condition",
    "2 dual:kind=chain condition perturbed_attention:layers=down_blocks.1",
)
"""Besides every weight with every rule, and every baseline."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "seeds": {"seed": 2**40 + 3, "n": 2},
    "negative seed": {"seed": -5},
    "batch": {"n": 3, "batch": 2},
    "batch of one": {"n": 3, "batch": 1, "guidance": 3},
    "prompts": {"prompt": ["bag", "ankle boot", None]},
    "no prompt": {"prompt": None, "n": 2},
    "negative prompt": {"negative_prompt": "sandal", "guidance": 3},
    "timesteps": {"timesteps": [1.0, 0.8, 0.45, 0.2, 0.0]},
    "timesteps that end early": {"timesteps": [0.9, 0.5, 0.3], "sampler": "dpmpp_2m"},
    "steps": {"steps": 7, "sampler": "heun"},
    "defaults": {"steps": None},
    "other size": {"height": 44, "width": 36},
    "odd size": {"height": 31, "width": 25},
    "cache": {"cache": 2, "steps": 6},
    "cache by calls": {"cache": (0, 1, 3), "steps": 5, "guidance": "3 interval:low=0.3,high=0.8"},
    "canvas": {"canvas": (7, 4), "height": 44, "width": 60, "guidance": 2},
    "canvas and cache": {"canvas": (7, 5), "height": 40, "width": 28, "cache": 2},
    "exact": {"decoding": "exact", "height": 44, "width": 36},
    "tiled": {"decoding": "tiled", "height": 84, "width": 60},
}
"""Arguments of `generate` that cases add to a plain draw."""


def cases(context: "Context") -> Iterator[Case]:
    """Cases of the bundled model."""
    for name, run in _cases(context):
        yield Case(name, run)
    for name, run in _errors(context):
        yield Case(name, run, raises=True)


def _cases(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    def draw(prompt: Any = "ankle boot", **values: Any) -> Any:
        output = values.pop("output", "latent")
        return names.call(
            context.load("fashion").generate,
            prompt,
            output=output,
            **{"steps": 4, "seed": 7, **values},
        )

    for sampler in names.registered("diffuse.samplers"):
        if sampler != "ddim_inversion":
            yield f"sampler/{sampler}", partial(draw, sampler=sampler, n=2)
    for sampler in SAMPLERS:
        yield f"sampler/{sampler}", partial(draw, sampler=sampler, steps=5)
    for spacing in (*names.attribute("diffuse.timesteps", "SPACINGS"), *SPACINGS):
        yield f"spacing/{spacing}", partial(draw, spacing=spacing, steps=5)
    yield from _guidance(context, draw)
    for name, values in ARGUMENTS.items():
        yield f"generate/{name}", partial(draw, **values)
        if values.get("decoding"):
            yield f"generate/{name}, pixels", partial(draw, output="tensor", **values)
    for output in ("pil", "tensor"):
        yield f"generate/output {output}", partial(draw, output=output, n=2)
    yield from _tensors(context, draw)
    yield from _acts(context)
    yield from _tasks(context)
    yield from _loaded(context)


def _guidance(
    context: "Context", draw: Callable[..., Any]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    weights = names.registered("predict.guidance.weights")
    rules = names.registered("predict.guidance.combines")
    baselines = names.registered("predict.references")
    for line in GUIDANCE:
        yield f"guidance/{line}", partial(draw, guidance=line)
    for weight, rule in product(weights, rules):
        scale, two = (
            (0.6, "") if rule == "plus_plus" else (3, " condition condition" * (rule == "dual"))
        )
        if not (rule == "plus_plus" and weight != "constant"):
            yield (
                f"guidance/{weight} {rule}",
                partial(draw, guidance=f"{scale} {weight} {rule}{two}"),
            )
    weaker = names.word("model", "predict.references")
    layers = {
        "perturbed_attention": ":layers=up_blocks.0.attentions.1",
        "skip_layers": ":layers=mid_block",
    }
    for baseline in baselines:
        if baseline != weaker:
            yield (
                f"guidance/3 {baseline}",
                partial(draw, guidance=f"3 {baseline}{layers.get(baseline, '')}"),
            )
    for line in ("2", "2 rescale", "3 dual:kind=away,second=2 condition"):
        yield (
            f"guidance/{line} by a weaker model",
            lambda line=line: draw(
                guidance=f"{line} {weaker}", weaker=context.load("fashion", dtype=torch.bfloat16)
            ),
        )


def _tensors(
    context: "Context", draw: Callable[..., Any]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Requests with tensors in them, and several requests at once."""
    space = (12, 7, 7)

    def noise(n: int = 1, seed: int = 1) -> torch.Tensor:
        return torch.randn(n, *space, generator=torch.Generator().manual_seed(seed))

    def mask() -> torch.Tensor:
        left = torch.zeros(1, 1, 7, 7)
        left[..., :4] = 1
        return left

    def run(prompt: Any = "bag", **values: Any) -> Any:
        return context.load("fashion").run(
            names.request(prompt, **{"steps": 4, **values}), output="latent"
        )

    yield "request/noise", lambda: draw(noise=noise(2), n=2)
    yield "request/noise with sampler's own", lambda: draw(noise=noise(), sampler="euler_ancestral")
    yield "request/known region", lambda: draw(known_region=(noise(1, 2) * 0.5, mask()), n=2)
    yield (
        "request/known region, ancestral",
        lambda: draw(known_region=(noise(1, 2) * 0.5, mask()), sampler="dpmpp_2m_sde", guidance=3),
    )
    yield (
        "request/known region, canvas, cache",
        lambda: draw(
            known_region=(torch.cat([noise(1, 2)] * 2, 3), torch.cat([mask(), mask()], 3)),
            width=56,
            canvas=(7, 3),
            cache=2,
        ),
    )
    yield "request/blind start", lambda: run(known_region=(noise(1, 2), mask()), blind_start=True)
    yield "request/begin", lambda: run(begin=noise(1, 3) * 0.5, timesteps=[0.6, 0.3, 0.1, 0.0], n=2)
    yield "request/resume", lambda: run(resume=noise(1, 4), timesteps=[0.6, 0.3, 0.1, 0.0])
    yield "request/draws used before", lambda: run(drawn=3, sampler="ddpm", n=2)
    yield "request/between prompts", lambda: run(n=3, other_prompt=("sneaker", [0.0, 0.4, 1.0]))
    yield (
        "request/between seeds",
        lambda: run(n=3, other_noise=([5, 6, 7], [0.0, 0.3, 1.0]), sampler="euler_ancestral"),
    )
    yield (
        "request/paste",
        lambda: context.load("fashion").run(
            names.request(
                "bag",
                steps=4,
                paste=(
                    torch.linspace(-1, 1, 784).reshape(1, 1, 28, 28),
                    torch.eye(28).reshape(1, 1, 28, 28),
                ),
            )
        ),
    )
    mixed = [
        {"prompt": "bag", "steps": 3, "sampler": "euler", "seed": 1},
        {
            "prompt": "sandal",
            "steps": 5,
            "sampler": "dpmpp_2m",
            "guidance": "3 rescale",
            "seed": 2,
            "n": 2,
        },
        {
            "prompt": ["coat", None],
            "steps": 4,
            "sampler": "heun",
            "spacing": "karras",
            "guidance": 1,
            "height": 32,
        },
        {
            "steps": 4,
            "sampler": "dpmpp_sde",
            "guidance": "2 perturbed_attention:layers=down_blocks.1",
        },
    ]

    def many(**values: Any) -> Any:
        requests = [names.renamed(request, names.request_fields()) for request in mixed]
        return names.run_many(context.load("fashion"))(requests, **values)

    yield "sample_many/latents", lambda: many(output="latent")
    yield "sample_many/pictures, batch 2", lambda: many(batch=2)
    yield (
        "sample_many/one cancelled",
        lambda: many(output="latent", on_step=lambda k, step: not (k == 1 and step.index == 2)),
    )


def _acts(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    def model() -> Any:
        return context.load("fashion")

    def z(seed: int | None = None, size: int = 28) -> torch.Tensor:
        return model().compress(
            [context.picture(f"grey-{size}x{size}-{k}") for k in range(2)], seed=seed
        )

    yield "acts/compress", z
    yield "acts/compress with a seed", lambda: z(3)
    yield "acts/compress, colour", lambda: model().compress(context.picture("colour-28x28-0"))
    yield (
        "acts/compress, odd sides",
        lambda: model().compress(context.picture("grey-32x32-0").crop((0, 0, 27, 30))),
    )
    yield "acts/pixels", lambda: model().pixels(context.picture("colour-28x28-1"))
    yield (
        "acts/encode with noise",
        lambda: model().encode(
            model().pixels(context.picture("grey-28x28-0")), torch.ones(1, 12, 7, 7)
        ),
    )
    yield "acts/diffuse", lambda: model().diffuse(z(), 0.37, seed=4)

    def predict(prompt: Any) -> Any:
        prediction = model().predict(model().diffuse(z(), 0.6), 0.6, prompt)
        return [prediction.x0, prediction.eps]

    yield "acts/predict", lambda: predict("dress")
    yield "acts/predict, prompts", lambda: predict(["dress", None])
    yield "acts/decode", lambda: model().decode(z())
    yield "acts/invert", lambda: model().invert(z(), "ankle boot", steps=5, iterations=3)
    yield (
        "acts/times",
        lambda: [model().times(), model().times(7, "euler", "karras"), model().times(3)],
    )
    yield "acts/hash", lambda: model().hash
    yield "acts/classes", lambda: list(model().class_names)
    yield (
        "acts/latent space",
        lambda: [list(model().autoencoder.space.mean), list(model().autoencoder.space.std)],
    )


def _tasks(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(
        name: str,
        *positional: Any,
        home: str | None = None,
        output: str = "pil",
        request: Any = None,
        **values: Any,
    ) -> Any:
        plain = names.request("ankle boot", **{"steps": 5, "seed": 3, **(request or {})})
        model = context.load("fashion")
        return model.run(
            names.task(name, model, *positional, plain, home=home, **values), output=output
        )

    def grey(k: int = 0) -> Any:
        return context.picture(f"grey-28x28-{k}")

    def mask() -> Any:
        return context.picture("mask-28x28")

    yield (
        "task/image_to_image",
        lambda: run("image_to_image", grey(), strength=0.6, request={"n": 2}),
    )
    yield (
        "task/image_to_image, sampled, two pictures",
        lambda: run(
            "image_to_image",
            [grey(), grey(1)],
            posterior="sample",
            request={"n": 2, "sampler": "euler_ancestral"},
        ),
    )
    yield "task/inpaint", lambda: run("inpaint", grey(), mask(), request={"n": 2})
    yield (
        "task/inpaint, strength",
        lambda: run("inpaint", grey(), mask(), strength=0.6, posterior="sample"),
    )
    yield (
        "task/inpaint, not pasted, blind",
        lambda: run("inpaint", grey(), mask(), paste=False, blind=True, request={"guidance": 3}),
    )
    yield "task/outpaint", lambda: run("outpaint", grey(), left=8, bottom=5, overlap=3)
    yield "task/outpaint, strength", lambda: run("outpaint", grey(), right=4, top=4, strength=0.8)
    yield "task/enlarge", lambda: run("enlarge", grey(), scale=1.5, strength=0.5)
    yield "task/two_pass", lambda: run("two_pass", home="enlarge", scale=1.5)
    yield "task/variations", lambda: run("variations", grey(), strength=0.4, request={"n": 2})
    yield (
        "task/variations by inversion",
        lambda: run("variations", grey(), strength=0.4, way="inversion", request={"n": 2}),
    )
    yield (
        "task/interpolate_pictures",
        lambda: run("interpolate_pictures", grey(), grey(1), home="interpolate", request={"n": 3}),
    )
    yield (
        "task/interpolate_pictures by inversion",
        lambda: run(
            "interpolate_pictures",
            grey(),
            grey(1),
            home="interpolate",
            way="inversion",
            to_prompt="bag",
            request={"n": 3},
        ),
    )

    def alone(name: str, n: int = 3, home: str | None = None, **values: Any) -> Any:
        return context.load("fashion").run(
            names.task(name, names.request("coat", steps=4, n=n), home=home, **values)
        )

    yield "task/interpolate", lambda: alone("interpolate", to_prompt="bag", to_seed=9)
    yield "task/interpolate seeds", lambda: alone("interpolate", to_seed=4)
    yield "task/vary", lambda: alone("vary", home="variations", seed=11, strength=0.3)

    def refined(**values: Any) -> Any:
        base, refiner = context.load("fashion"), context.load("fashion", dtype=torch.bfloat16)
        return refiner.run(
            names.task(
                "refine", base, refiner, names.request("shirt", n=2, **{"steps": 10, **values})
            )
        )

    yield "task/refine", refined
    yield "task/refine, ancestral", lambda: refined(sampler="euler_ancestral")


def _loaded(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same model in other dtypes, packed, streamed, saved."""

    def draw(model: Any, **values: Any) -> Any:
        return [
            names.call(model.generate, "bag", output=o, **{"steps": 4, "n": 2, **values})
            for o in ("latent", "pil")
        ]

    yield "load/bfloat16", lambda: draw(context.load("fashion", dtype=torch.bfloat16))
    yield "load/float16", lambda: draw(context.load("fashion", dtype=torch.float16))
    yield (
        "load/float16, decoding overflows",
        lambda: context.load("fashion", dtype=torch.float16).decode(1e5 * torch.ones(1, 12, 7, 7)),
    )
    yield "load/moved", lambda: draw(context.load("fashion").to("cpu"))
    yield "load/packed", lambda: draw(context.load("fashion").optimized(), guidance=3)
    yield (
        "load/packed bfloat16",
        lambda: draw(context.load("fashion", dtype=torch.bfloat16).optimized()),
    )
    yield (
        "load/packed, perturbed",
        lambda: draw(
            context.load("fashion").optimized(),
            guidance="3 perturbed_attention:layers=down_blocks.1",
            cache=2,
        ),
    )
    yield "load/streamed", lambda: draw(context.load("fashion", memory="16GB"))
    yield "load/streamed from memory", lambda: draw(context.load("fashion").streamed("16GB"))


def _errors(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    wrong: dict[str, dict[str, Any]] = {
        "no such sampler": {"sampler": "magic"},
        "sampler that inverts": {"sampler": "ddim_inversion"},
        "no such option": {"sampler": "ddim:beta=1"},
        "steps": {"steps": 0},
        "no such class": {"prompt": "elephant"},
        "guidance": {"guidance": -1},
        "guidance that the sampler can't take": {"guidance": "0.6 plus_plus", "sampler": "heun"},
        "rising times": {"timesteps": [0.1, 0.5]},
        "noise of a wrong shape": {"noise": torch.zeros(1, 3, 7, 7)},
        "noise that is not finite": {"noise": torch.full((1, 12, 7, 7), float("nan"))},
        "learned guidance": {"learned_guidance": 2.0},
        "negative prompt without guidance": {"negative_prompt": "bag", "guidance": 1},
        "n": {"n": 0},
        "seed": {"seed": 2**63},
        "decoding": {"decoding": "blurred"},
        "tuned times": {"spacing": "tuned"},
    }
    for name, values in wrong.items():
        yield (
            f"error/{name}",
            lambda values=values: names.call(context.load("fashion").generate, **values),
        )
    yield "error/no such model", lambda: context.load("no-such-model")
    yield "error/no such folder", lambda: context.load(context.scratch / "missing")
