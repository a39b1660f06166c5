"""The contract of a plan: every `UserError` of a request is raised by `model.plan`, without a
weight, and a request is resolved once.

The models here lie on torch's meta device, where no number can be read: a plan that looked at a
weight would fail.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from helpers.models import LATENT, tiny_model
from sfumato import Defaults, LatentDiffusion, Plan, Request, UserError, tasks
from sfumato.diffuse.timesteps import timesteps
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.unet import UNet
from sfumato.sampling import Settings
from sfumato.sampling.request import RequestFields
from sfumato.types import ImageSpec

IMAGE = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def without_weights(model: LatentDiffusion) -> LatentDiffusion:
    """The same model on the meta device."""
    network = model.denoiser.network.to("meta")
    return replace(
        model,
        autoencoder=model.autoencoder.to("meta"),
        denoiser=replace(model.denoiser, network=network),
    )


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


@pytest.fixture(scope="module")
def empty() -> LatentDiffusion:
    return without_weights(tiny_model())


def inpainting() -> LatentDiffusion:
    """A model whose network takes a mask and a masked image beside the latent."""
    model = tiny_model()
    config = replace(model.denoiser.network.config, in_channels=5)
    return replace(
        model, denoiser=Denoiser(UNet(config).eval().requires_grad_(False), model.denoiser.process)
    )


Z = torch.zeros(1, *LATENT)
MASK = torch.ones(1, 1, 8, 8)
# Fields of a request beside the prompt "bag", and their messages. Values of the wrong
# kind: tests/end_to_end/test_bad_input.py.
REFUSED: list[tuple[dict[str, Any], str]] = [
    # the numbers of a run
    ({"n": 0}, "n=0: expected a whole number of at least 1"),
    ({"steps": 10**14}, f"steps={10**14}: expected a whole number of at most {2**20}"),
    ({"n": 10**14}, f"n={10**14}: expected a whole number of at most {2**20}"),
    ({"prompt": ["bag"] * 2, "n": 3}, "n=3 with 2 prompts"),
    ({"steps": 0}, "steps=0"),
    ({"seed": 2**64}, f"seed={2**64}"),
    ({"seed": -1}, "seed=-1: expected a whole number from 0 to"),
    ({"height": 0}, "height=0"),
    ({"timesteps": [0.5, 0.7, 0.0]}, "that fall strictly"),
    ({"decoding": "hole"}, "unknown way to decode 'hole'"),
    # samplers and spacings
    ({"sampler": "dimm"}, "unknown sampler 'dimm': did you mean 'ddim'"),
    ({"sampler": "ddim:ata=1"}, "unknown option of sampler ddim 'ata'"),
    ({"sampler": "ddim:eta=2.0"}, "eta=2.0: expected a number in"),
    ({"sampler": "lms:order=9"}, "order=9"),
    ({"sampler": "restart:rho=0.0"}, "rho=0.0"),
    ({"sampler": "dpmpp_2s:r=1.5"}, "r=1.5"),
    ({"sampler": "ddim_inversion"}, "goes from an image to noise"),
    ({"sampler": "ddpm:variance=learned"}, "this network predicts no variance"),
    ({"spacing": "karras:row=3"}, "unknown option of spacing karras 'row'"),
    ({"spacing": "shifted:shift=0.0"}, "shift=0.0"),
    ({"spacing": "dynamic:rule=flux3"}, "unknown rule 'flux3'"),
    ({"spacing": "tuned"}, "this model has tuned times for none"),
    # prompts
    ({"prompt": "bagg"}, "unknown class 'bagg': did you mean 'bag'"),
    ({"negative_prompt": "bagg"}, "unknown class 'bagg': did you mean 'bag'"),
    ({"negative_prompt": ["bag"] * 2}, "2 prompts for 1 images"),
    ({"negative_prompt": "bag", "guidance": 1.0}, "nothing is moved away from it"),
    ({"negative_prompt": "bag", "guidance": 0}, "negative prompt 'bag' with guidance 0: nothing"),
    ({"negative_prompt": "bag", "guidance": 0.5}, "raise the guidance above 1, or leave"),
    ({"negative_prompt": [None, "bag"], "n": 2, "guidance": "0 ramp"}, "nothing is moved away"),
    (
        {"negative_prompt": "bag", "guidance": "3 perturbed_attention"},
        "its baseline perturbed_attention keeps the prompt, so that nothing is moved away",
    ),
    ({"negative_prompt_2": "bag", "guidance": 1.0}, "nothing is moved away from it"),
    ({"prompt_2": "bag"}, "no second text encoder"),
    ({"negative_prompt_2": "bag"}, "no second text encoder"),
    ({"prompt_mix": ("dog", [0.5])}, "unknown class 'dog'"),
    ({"prompt_mix": ("bag", [1.5])}, r"prompt_mix with shares \[1.5\]"),
    ({"prompt": ["bag"], "prompt_mix": ("bag", [0.5])}, "one text for all images at each end"),
    # guidance
    ({"guidance": float("nan")}, "guidance=nan"),
    ({"guidance": "strong"}, "guidance='strong'"),
    ({"guidance": "0.6 plus_plus", "sampler": "heun"}, "do not add up to x"),
    ({"distilled_guidance": 3.0}, "this model is not guidance-distilled"),
    ({"guidance": "2 model"}, "needs that model's denoiser"),
    ({"guidance": "2 model", "guide_model": tiny_model("eps")}, "expected the same one"),
    (
        {"guidance": "2 model", "guide_model": tiny_model(classes=("bag", "hat"))},
        "has 3 classes .* the model 4",
    ),
    ({"guidance": 2.0, "guide_model": tiny_model()}, "expected the baseline model"),
    ({"guidance": "2 perturbed_attention:layers=nowhere"}, "nowhere"),
    ({"guidance": "2 skip_layers:layers=conv_in"}, "conv_in"),
    ({"guidance": "2 model", "guide_model": inpainting()}, "expected the same"),
    # latents, noise, regions
    ({"noise": torch.zeros(2, *LATENT)}, r"noise of shape \(2, 2, 8, 8\)"),
    ({"noise": Z * float("nan")}, "noise of shape"),
    ({"noise_mix": ([1, 2], [0.0, 1.0])}, "noise_mix with 2 seeds for 1 images"),
    ({"noise_mix": ([1], [2.0])}, r"noise_mix with shares \[2.0\]"),
    ({"noise_mix": ([2**64], [0.5])}, f"noise_mix seed={2**64}"),
    ({"noise_offset": -1}, "noise_offset=-1"),
    ({"init_latent": torch.zeros(1, 2, 4, 8)}, "init_latent of shape"),
    ({"init_latent": torch.zeros(2, *LATENT)}, "init_latent of shape"),
    ({"noisy_latent": torch.zeros(1, 2, 4, 8)}, "noisy_latent of shape"),
    ({"noisy_latent": Z, "init_latent": Z}, "noisy_latent with init_latent or noise"),
    ({"noisy_latent": Z, "noise": Z}, "noisy_latent with init_latent or noise"),
    ({"known_region": (Z[0], MASK[0])}, r"known_region: expected \(z, mask\)"),
    ({"known_region": (Z, 2 * MASK)}, "a mask with values from 2 to 2"),
    ({"known_region": (Z * float("inf"), MASK)}, "z has numbers that are NaN or infinite"),
    ({"known_region": (Z[..., :4], MASK[..., :4])}, "for latents of shape"),
    ({"composite": (IMAGE, torch.ones(1, 1, 8, 8))}, "composite of an image"),
    (
        {"composite": (IMAGE.expand(3, -1, -1, -1), torch.ones(1, 1, 16, 16))},
        "composite of an image",
    ),
    # the network's other inputs
    ({"concat": torch.zeros(1, 3, 8, 8)}, "need the task that gives it"),
    ({"concat": torch.zeros(1, 3, 4, 4)}, "expected maps of 8 x 8 latent cells"),
    ({"vector": torch.zeros(1, 4)}, "fills the vector itself"),
    ({"reference_images": (Z,)}, "1 reference_images: UNet reads at most 0"),
    # tiles and caches
    ({"tiles": (8, 0)}, r"tiles=\(8, 0\)"),
    ({"tiles": (4, 8)}, "expected strides from 1 to the window's side"),
    (
        {"tiles": (8, 4), "guidance": "2 project:momentum=-0.5"},
        "its momentum would pass from window to window",
    ),
    ({"cache": 0}, "every=0"),
    ({"cache": ()}, "every="),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_plan_raises_the_errors_of_a_run(
    model: LatentDiffusion, empty: LatentDiffusion, values: dict[str, Any], words: str
) -> None:
    """The same sentence from a model without weights, from one with them, and from a run."""
    request = {"prompt": "bag", **values}
    messages = []
    acts: list[Callable[[], object]] = [
        lambda: empty.plan(request),
        lambda: model.plan(request),
        lambda: model.run_many([request]),
    ]
    for act in acts:
        with pytest.raises(UserError, match=words) as caught:
            act()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"n": 2, "sampler": "ddpm", "negative_prompt": "ankle boot"},
        {"height": 15, "width": 31, "tiles": (8, 4), "cache": 2},
        {"guidance": "2 perturbed_attention"},
        {"guidance": "2 model", "guide_model": tiny_model(seed=1)},
        {"noise": Z, "known_region": (Z, MASK), "noise_only_start": True},
        {"init_latent": Z, "timesteps": [0.5, 0.0], "composite": (IMAGE, torch.ones(1, 1, 16, 16))},
    ],
)
def test_a_plan_of_a_possible_request_needs_no_weight(
    empty: LatentDiffusion, values: dict[str, Any]
) -> None:
    plan = empty.plan(Request("bag", **values))
    assert isinstance(plan, Plan) and isinstance(plan, Settings) and plan.request.prompt == "bag"
    assert plan.seeds == tuple(range(plan.n)) and plan.latent_shape == (
        2,
        -(-plan.height // 2),
        -(-plan.width // 2),
    )


def test_a_plan_holds_the_values_of_the_run(model: LatentDiffusion) -> None:
    plan = model.plan(Request("bag", n=2, steps=4, sampler="ddim:eta=0.5", seed=5, guidance=3))
    assert plan.timesteps == tuple(timesteps("trailing", 4, model.denoiser.process.schedule))
    assert (plan.sampler_function.__name__, plan.options, plan.seeds) == (
        "ddim",
        {"eta": 0.5},
        (5, 6),
    )
    assert (
        plan.prompts == ("bag",) * 2
        and plan.negative_prompts == (None,) * 2
        and plan.image_spec == ImageSpec(16, 16)
    )
    assert plan.to_json() == model.settings(n=2, steps=4, sampler="ddim:eta=0.5", guidance=3)
    z = model.sample(plan)
    assert torch.equal(z, model.run(plan, output="latent")) and torch.equal(
        z, model.run(plan.request, output="latent")
    )
    assert torch.equal(model.finish(z, plan, "tensor"), model.run(plan, output="tensor"))
    (shared,) = model.run_many([plan], output="latent")
    assert torch.equal(z, shared)
    assert torch.equal(z, model.run(plan.explicit_request(), output="latent"))


def test_an_edited_plan_is_checked(model: LatentDiffusion) -> None:
    plan = model.plan(Request("bag"))
    assert plan.edit(timesteps=[0.5, 0.0], init_latent=Z).timesteps == (0.5, 0.0)
    for values, words in (
        ({"init_latent": torch.zeros(1, 2, 4, 4)}, "init_latent of shape"),
        ({"noise": Z * float("nan")}, "noise of shape"),
        ({"known_region": (Z, -MASK)}, "a mask with values"),
        ({"concat": torch.zeros(1, 3, 4, 4)}, "expected maps of 8 x 8"),
    ):
        with pytest.raises(UserError, match=words):
            plan.edit(**values)


def test_inputs_that_a_network_lacks_are_missed_by_the_plan() -> None:
    other = inpainting()
    with pytest.raises(UserError, match="takes 5 channels and was given 2, 0 of them by concat"):
        without_weights(other).plan(Request("bag"))
    assert without_weights(inpainting()).plan(Request("bag", concat=torch.zeros(1, 3, 8, 8)))


def test_an_autoencoder_without_parts_cannot_decode_row_by_row(empty: LatentDiffusion) -> None:
    from sfumato.compress.base import Autoencoder, Posterior

    class Whole(Autoencoder):
        space, channels = empty.autoencoder.space, 1

        def posterior(self, image: Tensor) -> Posterior:
            raise AssertionError

        def reconstruct(self, raw: Tensor) -> Tensor:
            raise AssertionError

        def to_config(self) -> dict[str, Any]:
            return {}

    with pytest.raises(UserError, match="decoding='exact': Whole has no list of parts"):
        replace(empty, autoencoder=Whole()).plan(Request("bag", decoding="exact"))


TASKS: dict[str, Callable[[LatentDiffusion, Request], object]] = {
    "image to image": lambda model, request: tasks.image_to_image(model, IMAGE, request),
    "inpainting": lambda model, request: tasks.inpaint(model, IMAGE, (IMAGE > 0).float(), request),
    "outpainting": lambda model, request: tasks.outpaint(model, IMAGE, request, left=4),
    "enlarging": lambda model, request: tasks.enlarge(model, IMAGE, request),
    "variation": lambda model, request: tasks.variations(model, IMAGE, request),
    "inverted variation": lambda model, request: tasks.variations(
        model, IMAGE, request, way="inversion"
    ),
    "series of images": lambda model, request: tasks.interpolate_images(
        model, IMAGE, -IMAGE, replace(request, n=2)
    ),
    "inverted series": lambda model, request: tasks.interpolate_images(
        model, IMAGE, -IMAGE, replace(request, n=2), way="inversion"
    ),
    "refining": lambda model, request: tasks.refine(model, model, request),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_refuses_a_request_before_an_image_is_encoded(
    empty: LatentDiffusion, name: str
) -> None:
    with pytest.raises(UserError, match="unknown class 'bagg': did you mean 'bag'"):
        TASKS[name](empty, Request("bagg", steps=5))
    with pytest.raises(UserError, match="unknown timestep spacing 'karas': did you mean 'karras'"):
        TASKS[name](empty, Request("bag", steps=5, spacing="karas"))


def test_models_trained_for_inpainting_vary_images_by_noise() -> None:
    model, request = inpainting(), Request("bag", steps=2)
    a, b = (
        model.run(task(model, IMAGE, request, strength=0.5), output="latent")
        for task in (tasks.variations, tasks.image_to_image)
    )
    assert torch.equal(a, b)
    for task in ("inverted variation", "series of images", "inverted series"):
        with pytest.raises(UserError, match="that takes the latent alone"):
            TASKS[task](model, request)


# ---- once ----------------------------------------------------------------------------------------


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Request]]:
    """The requests that are resolved while a test runs."""
    from sfumato.sampling import plan

    requests: list[Request] = []
    original = plan.resolve_settings

    def counted(model: Any, request: Request) -> Settings:
        requests.append(request)
        return original(model, request)

    for home in ("sfumato.sampling.plan", "sfumato.model"):
        monkeypatch.setattr(f"{home}.resolve_settings", counted)
    yield requests


RUNS: dict[str, Callable[[LatentDiffusion], object]] = {
    "image": lambda model: model.generate("bag", n=2),
    "several": lambda model: model.run_many([{"prompt": "bag"}])[0],
    "inpainting": lambda model: model.run(
        tasks.inpaint(model, IMAGE, (IMAGE > 0).float(), Request("bag"))
    ),
    "image to image": lambda model: model.run(tasks.image_to_image(model, IMAGE, Request("bag"))),
    "outpainting": lambda model: model.run(tasks.outpaint(model, IMAGE, Request("bag"), left=4)),
    "variation": lambda model: model.run(
        tasks.variations(model, IMAGE, Request("bag"), strength=0.5)
    ),
    "inverted variation": lambda model: model.run(
        tasks.variations(model, IMAGE, Request("bag"), way="inversion")
    ),
    "series": lambda model: model.run(tasks.interpolate(Request("bag", n=2), to_seed=3)),
    "series of images": lambda model: model.run(
        tasks.interpolate_images(model, IMAGE, -IMAGE, Request("bag", n=2), strength=0.5)
    ),
    "enlarging": lambda model: model.run(tasks.enlarge(model, IMAGE, Request("bag"), strength=0.5)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_request_is_resolved_once(
    model: LatentDiffusion, resolved: list[Request], name: str
) -> None:
    RUNS[name](model)
    assert len(resolved) == 1


def test_a_refined_request_is_resolved_once_for_each_model(
    model: LatentDiffusion, resolved: list[Request]
) -> None:
    model.run(tasks.refine(model, model, Request("bag", steps=5), at=0.5))
    assert len(resolved) == 2


# ---- names ---------------------------------------------------------------------------------------


def test_generate_takes_every_field_of_a_request() -> None:
    """The two lists in one file have the same fields and the same descriptions.

    No field can be forgotten.
    """
    types, keywords = get_type_hints(Request), get_type_hints(RequestFields)
    assert list(keywords) == [f.name for f in fields(Request) if f.name != "prompt"]
    assert {name: types[name] for name in keywords} == keywords


def test_defaults_of_older_files_are_read(model: LatentDiffusion, tmp_path: Path) -> None:
    """Literal JSON of model_index.json as it was written before fields were renamed; unknown fields
    are left out.
    """
    import json

    import sfumato

    old = {
        "steps": 28,
        "sampler": "euler",
        "guidance": {"weight": "interval:high=0.8", "scale": 1.5},
        "spacing": "shifted:shift=3.0",
        "learned_guidance": 30.0,
        "references": 1,
        "size": 16,
        "tuned": {"euler": [[1.0, 0.4, 0.0]]},
        "from_the_future": True,
    }
    expected = Defaults(
        steps=28,
        sampler="euler",
        guidance="1.5 interval:high=0.8",
        spacing="shifted:shift=3.0",
        distilled_guidance=30.0,
        max_reference_images=1,
        size=16,
        tuned_timesteps={"euler": [[1.0, 0.4, 0.0]]},
    )
    assert (
        Defaults.from_json(old) == expected and Defaults.from_json(expected.to_json()) == expected
    )
    assert Defaults.from_json({**old, "distilled_guidance": 4.0}).distilled_guidance == 4.0, (
        "today's name wins"
    )
    for place in ("folder", "file.safetensors"):
        model.save(tmp_path / place)
    path = tmp_path / "folder" / "model_index.json"
    values = json.loads(path.read_text())
    assert not {"learned_guidance", "references", "tuned"} & values["_sfumato"]["defaults"].keys()
    values["_sfumato"]["defaults"] = old
    path.write_text(json.dumps(values))
    opened = sfumato.load(tmp_path / "folder")
    assert opened.defaults == expected and opened.times(2) == [1.0, 0.4, 0.0]
    assert sfumato.load(tmp_path / "file.safetensors").defaults == model.defaults


def test_tuned_times_are_stored_beside_older_ones(model: LatentDiffusion, tmp_path: Path) -> None:
    import json

    from sfumato.train.timestep_search import Tuned, store_tuned

    model.save(tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    values = json.loads(path.read_text())
    values["_sfumato"]["defaults"]["tuned"] = {"ddim": [[1.0, 0.4, 0.0]]}
    del values["_sfumato"]["defaults"]["tuned_timesteps"]
    path.write_text(json.dumps(values))
    store_tuned(tmp_path / "model", [Tuned("ddim", 1.0, (1.0, 0.6, 0.3, 0.0), {})])
    written = json.loads(path.read_text())["_sfumato"]["defaults"]
    assert (
        written["tuned_timesteps"] == {"ddim": [[1.0, 0.4, 0.0], [1.0, 0.6, 0.3, 0.0]]}
        and "tuned" not in written
    )
