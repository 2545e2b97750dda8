"""Training that starts from somebody's checkpoint: the whole model goes on, or learns to repaint."""

from dataclasses import replace

import pytest
import torch
from finetuning import SHORT, getattr_, run, same
from PIL import Image

from ldm import Pipeline
from ldm.checkpoints.folder import find, load_parts
from ldm.checkpoints.load import load_any
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.pictures import from_pil
from ldm.sampling import Sampler
from ldm.training.masks import RandomMasks

SHORT += ["callbacks.jump_to_x0.num_steps=2", "callbacks.progress.every_n_steps=1000", "callbacks.validation=null"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_the_whole_model_goes_on_and_leaves_again(request, tmp_path, pictures, model):
    base = request.getfixturevalue(f"{model}_folder")
    before = load_any(base)
    out = run(tmp_path, "finetune", "mine", f"checkpoint={base}", f"images={pictures}", "optimizer.lr=1e-3")
    exported = out / "export/step-00000003.safetensors"
    # The latents keep the autoencoder that made them, and nothing else of the checkpoint.
    (kept,) = (tmp_path / "outputs/stages").glob("latents-*/autoencoder")
    assert {p.name for p in kept.iterdir()} == {"vae.safetensors", "config.yaml", "manifest.json"} and find(
        kept
    ) == kept
    # What is trained has moved, what is frozen has not, in the run and in the file that leaves.
    after = load_any(exported, config=base)
    moved = {part: not same(getattr_(before, part), getattr_(after, part)) for part in ("unet", "vae", "text_encoder")}
    assert moved == {"unet": True, "vae": False, "text_encoder": False}
    # The file draws what the run draws, by the base's own scheduler.
    theirs, ours = Pipeline.load(exported, config=base), Pipeline.load(out)
    assert ours.scheduler_config == theirs.scheduler_config == before.scheduler_config
    assert torch.equal(*(p.sample("a red cat", num_steps=3, seed=1) for p in (ours, theirs)))


@pytest.mark.slow
def test_with_no_learning_rate_nothing_changes(tmp_path, sd1_folder, pictures, monkeypatch):
    """Through our checkpoint, the trainer and the export: the published tensors come out bit for bit.

    The pictures of training are those that the checkpoint's own scheduler draws.
    """
    drawn, sample = [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda s, r: drawn.append((r, sample(s, r))) or drawn[-1][1])
    out = run(tmp_path, "finetune", "still", f"checkpoint={sd1_folder}", f"images={pictures}", "optimizer.lr=0.0")
    base, after = load_any(sd1_folder), load_any(out / "export/step-00000003.safetensors", config=sd1_folder)
    assert all(same(getattr_(base, part), getattr_(after, part)) for part in ("unet", "vae", "text_encoder"))
    monkeypatch.undo()
    pipe, (request, images) = Pipeline.load(sd1_folder), drawn[-1]
    own, ours = (pipe.sampler.sample(replace(request, solver=s)) for s in (pipe.solver(None), None))
    torch.testing.assert_close(images, own, atol=1e-5, rtol=0)
    assert (own - ours).abs().max() > 0.01


@pytest.mark.slow
def test_it_learns_the_pictures(tmp_path, sd1_folder, pictures):
    """Thirty steps: the error of eps on the pictures trained on, at fixed noise, falls."""
    options = ["max_steps=30", "optimizer.lr=1e-3", "export=null"]
    out = run(tmp_path, "finetune", "mine", f"checkpoint={sd1_folder}", f"images={pictures}", *options)
    images = [Image.open(pictures / f"{i}.png").convert("RGB").resize((64, 64)) for i in range(8)]
    batch = torch.stack([from_pil(image) for image in images])
    eps = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for parts in (load_any(sd1_folder), load_any(out)):
        with torch.no_grad():
            z = parts.autoencoder.latents.standardise(parts.autoencoder.encode(batch).mode())
            cond = parts.text_encoder.encode([f"a photo of a very red cat, number {i}" for i in range(8)])
            levels = [parts.denoiser.scheduler.level(t) for t in (0.3, 0.6, 0.9)]
            errors = [parts.denoiser.output(lv.alpha * z + lv.sigma * eps, lv, cond) - eps for lv in levels]
        losses.append(torch.stack(errors).square().mean().item())
    assert losses[1] < 0.8 * losses[0], losses


@pytest.mark.slow
def test_a_small_text_encoder_keeps_its_words(tmp_path, tiny_run, pictures):
    """A run of ours goes on with other captions: its embeddings belong to the words that it has."""
    base = Pipeline.load(tiny_run)
    options = ["image_size=32", "optimizer.lr=0.0", "export=diffusers"]
    out = run(tmp_path, "finetune", "mine", f"checkpoint={tiny_run}", f"images={pictures}", *options)
    after = Pipeline.load(out)
    words = base.sampler.text_encoder.tokenizer.get_vocab()
    assert after.sampler.text_encoder.tokenizer.get_vocab() == words
    assert (out / "export/step-00000003/model_index.json").is_file()
    assert torch.equal(*(p.sample("a red star", num_steps=3) for p in (base, after)))


@pytest.mark.slow
def test_an_inpainting_model_starts_as_its_base(tmp_path, sd1_folder, pictures):
    out = run(tmp_path, "inpaint", "paint", f"checkpoint={sd1_folder}", f"images={pictures}", "optimizer.lr=0.0")
    base, widened = load_any(sd1_folder).denoiser, load_any(out).denoiser
    assert widened.model.in_channels == 9
    draws = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=draws), torch.randn(2, 77, 32, generator=draws)
    concat = torch.randn(2, 5, 8, 8, generator=draws)
    level = base.scheduler.level(0.7)
    with torch.no_grad():
        expected = base.output(x, level, Condition(context=context))
        torch.testing.assert_close(widened.output(x, level, Condition(context=context, concat=concat)), expected)
    # And it learns to use what it sees: the fresh channels get gradients.
    trained = run(tmp_path, "inpaint", "learns", f"checkpoint={sd1_folder}", f"images={pictures}", "optimizer.lr=1e-3")
    fresh = load_parts(find(trained))["unet"]["conv_in.weight"][:, 4:]
    assert fresh.abs().max() > 0
    picture = Image.open(pictures / "1.png").convert("RGB").resize((64, 64))
    mask = Image.new("L", (64, 64), 255)
    drawn = Pipeline.load(trained).sample("a red cat", init_image=picture, mask=mask, num_steps=2)
    assert drawn.shape == (1, 3, 64, 64) and drawn.isfinite().all()


def test_masks_are_boxes_strokes_or_everything():
    masks = RandomMasks(whole=0.25, strokes=0.5)
    drawn = masks(64, 48, 0, "mask", 3, list(range(600)))
    assert drawn.shape == (600, 1, 64, 48) and set(drawn.unique().tolist()) == {0.0, 1.0}
    cover = drawn.mean(dim=(1, 2, 3))
    assert 0.2 < (cover == 1).float().mean() < 0.32  # 0.25 by choice, few by chance
    assert cover.min() > 0 and 0.15 < cover[cover < 1].mean() < 0.5
    # A function of seed, purpose, step and position: not of the batch that it is drawn in.
    assert torch.equal(masks(64, 48, 0, "mask", 3, [5, 7]), drawn[[5, 7]])
    assert not torch.equal(masks(64, 48, 0, "mask", 4, [5]), drawn[[5]])
    boxes = RandomMasks(whole=0.0, strokes=0.0, most=1)(64, 48, 0, "mask", 0, list(range(40)))
    for mask in boxes[:, 0]:  # one rectangle: as many pixels as its rows times its columns
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns
    with pytest.raises(ConfigError, match="shares within"):
        RandomMasks(whole=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=finetune"], "adopt=true needs the model"),
        (["experiment=finetune", "checkpoint={pictures}"], "no checkpoint"),
        (["experiment=finetune", "checkpoint={sd1}", "export=onnx"], "export=onnx"),
        (["experiment=inpaint", "checkpoint={sd1}", "stages.encode={}"], "needs the pictures"),
    ],
)
def test_bad_input_is_one_line(tmp_path, sd1_folder, pictures, overrides, message):
    given = [o.replace("{sd1}", str(sd1_folder)).replace("{pictures}", str(pictures)) for o in overrides]
    experiment, *rest = given
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, experiment.partition("=")[2], "bad", f"images={pictures}", *rest)
