"""What diffusers' pipelines make of a scheduler's file when they are made is made of it here, with a warning."""

from __future__ import annotations

import warnings
from contextlib import suppress
from types import SimpleNamespace

import diffusers
import pytest
from published import TABLE as SD

from ldm.checkpoints.sampler import solver_of
from ldm.errors import ConfigError
from ldm.formats.schedulers import of_pipeline, sample_size
from ldm.untrusted import read_json

PIPELINES = [
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionPAGPipeline", "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline"),
    *("StableDiffusionUpscalePipeline", "StableDiffusionDepth2ImgPipeline"),
]
FILES = [
    {"_class_name": "PNDMScheduler"},
    {"_class_name": "PNDMScheduler", "steps_offset": 0, "skip_prk_steps": False, "clip_sample": True},
    {"_class_name": "PNDMScheduler", "steps_offset": 1, "skip_prk_steps": True, "clip_sample": False},
    {"_class_name": "DDIMScheduler"},
    {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 3},
    {"_class_name": "DDPMScheduler"},
    {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    {"_class_name": "DPMSolverSinglestepScheduler"},
    {"_class_name": "DPMSolverSinglestepScheduler", "steps_offset": 0},
    {"_class_name": "HeunDiscreteScheduler", "clip_sample": True},
    {"_class_name": "LCMScheduler", "clip_sample": True},
]
KEYS = ("steps_offset", "skip_prk_steps", "clip_sample")


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_goes_on_as_in_diffusers_pipeline(name, file, caplog):
    cls = getattr(diffusers, name)
    scheduler = getattr(diffusers, file["_class_name"]).from_config(SD | file)
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=64, in_channels=4))
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(60)
    options = {key: None for key in ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")}
    options |= {"depth_estimator": None} if "Depth" in name else {}
    options |= {"low_res_scheduler": None} if "Upscale" in name else {}
    options = {k: v for k, v in options.items() if k in cls.__init__.__code__.co_varnames}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = cls.__new__(cls)
        made.register_modules = lambda **_: None
        with suppress(AttributeError):  # of the parts that are not there: the scheduler has been seen to by then
            cls.__init__(made, unet=unet, scheduler=scheduler, **options)
    diffusers.utils.logging.set_verbosity(level)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = of_pipeline(SD | file, name)
    known = {key: scheduler.config[key] for key in KEYS if key in scheduler.config}
    defaults = {"steps_offset": 0, "skip_prk_steps": False, "clip_sample": file["_class_name"] in CLIPS}
    assert {key: ours.get(key, defaults[key]) for key in known} == known
    assert all("going on with" in str(w.message) and "\n" not in str(w.message) for w in said)


CLIPS = ("DDIMScheduler", "DDPMScheduler")


def test_a_bare_file_means_what_it_says_and_one_that_is_right_is_not_spoken_of():
    right = SD | {"_class_name": "PNDMScheduler", "steps_offset": 1, "skip_prk_steps": True, "clip_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of_pipeline(SD | {"_class_name": "PNDMScheduler"}, "DiffusionPipeline") == SD | {
            "_class_name": "PNDMScheduler"
        }
        assert of_pipeline(right, "StableDiffusionPipeline") == right
    with pytest.warns(
        UserWarning, match="no steps_offset: going on with 1, as diffusers' StableDiffusionPipeline does"
    ):
        mended = of_pipeline(SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "StableDiffusionPipeline")
    assert mended["steps_offset"] == 1 and mended["clip_sample"] is False, (
        "latents are not clipped by sampler=ddim either"
    )


@pytest.mark.parametrize("key, value", [("clip_sample", "false"), ("clip_sample", 3), ("steps_offset", "1")])
def test_what_is_no_value_is_refused_and_not_mended(key, value):
    """diffusers takes "false" for true, and clips."""
    file = SD | {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1} | {key: value}
    file |= {"timestep_spacing": "leading"}
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=f"has {key}="):
        warnings.simplefilter("error")
        solver_of("own", of_pipeline(file, "StableDiffusionPipeline"))


@pytest.mark.parametrize(
    ("version", "side", "pipeline", "expected"),
    [
        ("0.8.0", 32, "StableDiffusionPipeline", 64),
        ("0.6.0.dev0", 32, "StableDiffusionInpaintPipeline", 64),
        ("0.9.0.dev0", 32, "StableDiffusionPipeline", 32),
        ("0.10.2", 32, "StableDiffusionPipeline", 32),
        ("0.8.0", 96, "StableDiffusionPipeline", 96),
        ("0.8.0", 32, "LDMTextToImagePipeline", 32),
        (None, 32, "StableDiffusionPipeline", 32),
        ("0.8.0", None, "StableDiffusionPipeline", None),
    ],
)
def test_sizes_below_64_of_the_first_versions_are_64(version, side, pipeline, expected):
    unet = {"sample_size": side} | ({} if version is None else {"_diffusers_version": version})
    assert sample_size(unet, pipeline) == expected


def test_diffusers_own_spelling_of_a_dpm_solver_is_read(tmp_path):
    """It writes -Infinity, which JSON does not have."""
    diffusers.DPMSolverMultistepScheduler(**SD).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    assert read_json(file, infinite=True)["lambda_min_clipped"] == float("-inf")
    for text in ('{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is not JSON"):
            read_json(file, infinite=True)
